"""What the hooks of `keep_segments` remember, hand on and forget."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.packed_models import build, ends, one_process_group, packed, sequences, through
from torch import Tensor, nn

import fastft
from fastft.attention.segments import keep_segments, segments_of, segments_under_way

LENGTHS = (11, 7, 13)


class Attention(nn.Module):
    """Notes the boundaries that it would keep apart."""

    is_causal = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        segments = segments_of(self, {})
        self.seen.append(None if segments is None else segments.bounds_q)
        assert (segments_under_way() is None) == (segments is None)
        return x


class Strict(nn.Module):
    """A model whose forward takes `x` alone."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


class Open(Strict):
    """A model whose forward takes anything and notes it."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        self.kwargs = kwargs
        return self.attention(x)


X = torch.zeros(1, 31)
BATCH = {
    key: value
    for key, value in packed(sequences(LENGTHS)).items()
    if key not in ("input_ids", "position_ids")
}


def test_keys_that_a_forward_does_not_take() -> None:
    model = Strict()
    keep_segments(model)
    model(X, **BATCH, use_cache=False)
    model(X)
    assert model.attention.seen == [[0, 11, 18, 31], None]


def test_keys_that_a_forward_takes() -> None:
    model = Open()
    keep_segments(model)
    model(X, **BATCH, use_cache=False, decoder_max_length=3)
    assert model.kwargs.keys() == {*BATCH, "use_cache"}


def test_forgotten_after_forward() -> None:
    """A part that is called by itself, as PEFT's generate does, is not packed."""
    model = nn.ModuleDict({"inner": Strict()})
    model.forward = lambda x, **kwargs: model["inner"](x)  # type: ignore[method-assign]
    keep_segments(model)
    model(X, **BATCH)
    model["inner"](X)
    assert model["inner"].attention.seen == [[0, 11, 18, 31], None]


@pytest.mark.parametrize("outer_first", [True, False])
def test_kept_twice(outer_first: bool) -> None:
    """A model and its wrapper, in either order; what was kept last is removed first, or last."""
    inner = Strict()
    outer = nn.Sequential(inner)
    outer.forward = lambda x, **kwargs: inner(x)  # type: ignore[method-assign]
    handles = [
        keep_segments(model) for model in ((outer, inner) if outer_first else (inner, outer))
    ]
    outer(X, **BATCH)
    handles[0].remove()
    (inner if outer_first else outer)(X, **BATCH)
    handles[1].remove()
    handles[1].remove()
    inner(X)
    assert inner.attention.seen == [[0, 11, 18, 31], [0, 11, 18, 31], None]


def test_parts_kept_one_by_one() -> None:
    parts = [Strict(), Strict()]
    handles = [keep_segments(part) for part in parts]
    with pytest.raises(ValueError, match="one by one"):
        keep_segments(nn.ModuleList(parts))
    assert handles


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_copies_are_not_kept(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = Strict()
    keep_segments(model)
    twin: Any = duplicate(model)
    twin(X)
    model(X, **BATCH)
    assert (twin.attention.seen, model.attention.seen) == ([None], [[0, 11, 18, 31]])


def test_nothing_stays_after_an_error() -> None:
    model = Strict()
    keep_segments(model)
    with pytest.raises(TypeError):
        model(X, unknown=1, **BATCH)
    assert segments_under_way() is None
    with pytest.raises(ValueError, match="cu_seq_lens_q must be"):
        model(X, cu_seq_lens_q=torch.zeros(2, 2))
    assert segments_under_way() is None
    model(X)
    assert model.attention.seen == [None]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_whole_forward_inside_backward(reentrant: bool) -> None:
    """A model under gradient checkpointing as a whole, on a batch that is not packed, after one
    that was."""
    model, x = Strict(), X.clone().requires_grad_()
    keep_segments(model)
    model(x, **BATCH).sum().backward()
    torch.utils.checkpoint.checkpoint(
        model, x.exp(), use_reentrant=reentrant
    ).exp().sum().backward()
    assert model.attention.seen[0] == [0, 11, 18, 31]
    assert set(model.attention.seen[1:]) == {None}


def test_not_a_model() -> None:
    with pytest.raises(TypeError, match="model must be"):
        keep_segments("model")  # type: ignore[arg-type]


def test_decoder_boundaries_are_needed() -> None:
    model = build("t5", "fastft")
    keep_segments(model)
    batch = packed(sequences(LENGTHS))
    del batch["position_ids"]
    with pytest.raises(ValueError, match="needs decoder_cu_seq_lens"):
        model(**batch, decoder_input_ids=batch["input_ids"])


def test_longest_segments_are_found() -> None:
    segments = segments_of(nn.Module(), {"cu_seq_lens_q": ends(LENGTHS)})
    assert segments is not None
    assert (segments.max_seqlen_q, segments.max_seqlen_k) == (13, 13)


def test_cache_of_a_composite_model_is_off() -> None:
    transformers = pytest.importorskip("transformers")
    text = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "head_dim": 8,
    }
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}
    )
    model = transformers.AutoModelForImageTextToText.from_config(
        config, attn_implementation="fastft"
    )
    with fastft.packed_attention(model):
        output = model(**packed(sequences(LENGTHS)))
        assert output.past_key_values is None
    assert model.config.get_text_config().use_cache


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "lora"])
def test_wrapped_models(wrapper: str, tmp_path: Path) -> None:
    """Wrapped before or after: the same bits as the model alone."""
    tokens = packed(sequences(LENGTHS))

    def run(wrapped: str) -> Tensor:
        model = build("gpt_oss", "fastft")
        if wrapped == "lora":
            peft = pytest.importorskip("peft")
            model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
            model.base_model.disable_adapter_layers()
        keep_segments(model)
        if wrapped == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        if wrapped == "fsdp2":
            torch.distributed.fsdp.fully_shard(
                model, mesh=torch.distributed.init_device_mesh("cpu", (1,))
            )
        return model(**tokens).logits

    with one_process_group(tmp_path / "store"):
        assert torch.equal(run(wrapper), run("none"))


def test_packed_attention_ends(tmp_path: Path) -> None:
    model, tokens = build("opt", "fastft"), sequences(LENGTHS)
    with pytest.raises(KeyError), fastft.packed_attention(model):
        through(model, model(**packed(tokens)).logits[0])
        raise KeyError
    assert model.config.use_cache
    assert not model._forward_pre_hooks
