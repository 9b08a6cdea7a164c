"""Every decoder of transformers that labels sequences: packed it has the losses of each example
alone, with a callback and nothing else, or it is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.architectures.models import Case, small_config

import fastft
from fastft.integrations.pool_segments import is_pooled

transformers = pytest.importorskip("transformers")

QUICK = "CTRL GPT2 GptOss Gemma2 Llama Mistral ModernBertDecoder OPT Phi3 Qwen2 Qwen3".split()
EXACT = [
    *"Arcee AXK1 AXK2 BioGpt Bloom CohereCompassText DeepseekV2 DeepseekV3 DiffLlama".split(),
    *"Doge Exaone4 Falcon Gemma Gemma3 Gemma3Text Glm Glm4 GPTBigCode GPTNeo GPTNeoX".split(),
    *"GPTJ Helium HunYuanDenseV1 HunYuanMoEV1 JetMoe MiniCPM3 Ministral Ministral3".split(),
    *"Mistral4 Mixtral Mpt Nemotron Olmo Olmo2 Olmo3 Persimmon Phi Phimoe Qwen2Moe".split(),
    *"Qwen3Moe SeedOss SmolLM3 StableLm Starcoder2".split(),
]
REFUSED = [
    *"Jamba MiniMax OpenAIGPT Qwen3_5 Qwen3_5Text Qwen3Next Zamba Zamba2".split(),
    *"T5Gemma T5Gemma2 Bart MBart MT5 T5".split(),
]
CASES = [
    *QUICK,
    *(pytest.param(name, marks=pytest.mark.slow) for name in EXACT),
]
PAD = 1
LABELS: dict[str, Any] = {
    "single_label_classification": [0, 2, 1, 1, 2],
    "regression": [[0.5, -1.0, 0.2], [2.0, 0.0, 1.0], [1.5, 0.1, 0.4], [1.0, 1.0, 0.0], [0.3] * 3],
    "multi_label_classification": [
        *([1.0, 0.0, 1.0], [0.0] * 3, [1.0] * 3, [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]),
    ],
}


def classifier(name: str) -> Any:
    """A small model in evaluation mode, whose padding token is one of its tokens."""
    kind = getattr(transformers, f"{name}ForSequenceClassification", None)
    listed = transformers.models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    types = [key for key, value in listed.items() if kind and value == kind.__name__]
    if not types:
        pytest.skip(f"this transformers has no {name}ForSequenceClassification")
    config = small_config(Case("sequence", types[0], kind.__name__))
    config.num_labels = 3
    config.pad_token_id = config.get_text_config().pad_token_id = PAD
    torch.manual_seed(0)
    return kind(config).float().eval()


def labelled(problem: str) -> list[dict[str, Any]]:
    """Examples, of which some end with a padding token: their end token is that as well."""
    draw = torch.Generator().manual_seed(2)
    tokens = [torch.randint(12, 60, (size,), generator=draw).tolist() for size in (5, 2, 9, 4, 3)]
    ends = ([], [PAD], [], [PAD, PAD], [])
    return [
        {"input_ids": [*ids, *end], "label": label}
        for ids, end, label in zip(tokens, ends, LABELS[problem], strict=True)
    ]


def one_by_one(model: Any, examples: list[dict[str, Any]]) -> tuple[torch.Tensor, ...]:
    """Logits, their mean loss and its gradients, of the stock model."""
    outputs = [
        model(input_ids=torch.tensor([one["input_ids"]]), labels=torch.tensor([one["label"]]))
        for one in examples
    ]
    loss = torch.stack([output.loss for output in outputs]).mean()
    return torch.cat([output.logits for output in outputs]), loss, gradients(model, loss)


def gradients(model: Any, loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    flat = [one.grad.flatten() for one in model.parameters() if one.grad is not None]
    model.zero_grad()
    return torch.cat(flat)


def training_begins(model: Any, collator: Any) -> fastft.PackingCallback:
    """What Trainer does with the callback."""
    callback = fastft.PackingCallback()
    arguments, loader = SimpleNamespace(n_gpu=1, torch_compile=False), SimpleNamespace()
    loader.collate_fn = collator
    callback.on_train_begin(arguments, None, None, model=model, train_dataloader=loader)
    return callback


@pytest.mark.way(
    "sequence classification on decoders",
    loss="no vocabulary",
    packing="exact",
)
@pytest.mark.parametrize("problem", LABELS)
@pytest.mark.parametrize("name", CASES)
def test_a_decoder_labels_packed_examples_as_each_alone(name: str, problem: str) -> None:
    model, examples = classifier(name), labelled(problem)
    model.config.problem_type = problem
    logits, loss, grads = one_by_one(model, examples)
    collator = fastft.PackingCollator(task="sequence_classification", pad_token_id=PAD)
    callback = training_begins(model, collator)
    output = model(**collator(examples))
    torch.testing.assert_close(output.loss, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-5)
    assert (gradients(model, output.loss) - grads).norm() <= 2e-6 * grads.norm()
    callback.restore()
    assert not is_pooled(model)


@pytest.mark.way("classifiers with states, or an encoder beside", packing="refused")
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_probe_does_not_find_exact_is_refused(name: str) -> None:
    model = classifier(name)
    collator = fastft.PackingCollator(task="sequence_classification", pad_token_id=PAD)
    said = "padded batches|pad instead|is no transformers model"
    with pytest.raises((fastft.PackingLeakError, ValueError), match=said):
        training_begins(model, collator)
