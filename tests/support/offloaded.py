"""Trainings whose optimizer's states lie on the host, held to the bits of those without that."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastft
from fastft.optim.grad_norm import CHUNK
from fastft.optim.offload import gradients, pieces

TIERS = ("states", "gradients", "overlap")
VOCABULARY = 61
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61}
HEADS = {"num_attention_heads": 4, "max_position_embeddings": 64}


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, num_key_value_heads=2))


def _gemma() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **HEADS, num_key_value_heads=2, head_dim=8))


def _experts() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    heads = {"num_key_value_heads": 2, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **HEADS, **experts, **heads))


def _t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    special = {"decoder_start_token_id": 0, "pad_token_id": 0, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes, **special))


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    still = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **still))


def _bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(**SIZES, **HEADS, **still))


class Chain(torch.nn.Module):
    """A few layers of odd sizes, with biases and a tied head, and a weight that is no module's:
    the model that is quick."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 33)
        self.layers = torch.nn.ModuleList(
            [torch.nn.Linear(33, 47), torch.nn.Linear(47, 47), torch.nn.Linear(47, 33)]
        )
        self.head = torch.nn.Linear(33, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.beside = [torch.nn.Parameter(torch.ones(33))]

    def to(self, what: torch.dtype | str) -> Chain:  # type: ignore[override]
        self.beside = [torch.nn.Parameter(param.detach().to(what)) for param in self.beside]
        return super().to(what)

    def get_extra_state(self) -> Tensor:
        return self.beside[0].detach()

    def set_extra_state(self, state: Tensor) -> None:
        with torch.no_grad():
            self.beside[0].copy_(state)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        scale = 1 * self.beside[0]  # before any other weight is asked for
        hidden = self.embedding(input_ids) * scale
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        logits = self.head(hidden)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return SimpleNamespace(loss=loss)


# the last three have tied embeddings, as the second and the fourth
FAMILIES = {
    "llama": _llama,
    "gemma3": _gemma,
    "qwen3_moe": _experts,
    "t5": _t5,
    "gpt2": _gpt2,
    "bert": _bert,
    "chain": Chain,
}


class Case(NamedTuple):
    """A training. `rounding` "fp32": of fp32 parameters; `clipping`: where it is said; `params`:
    whether some never have a gradient, or only in the middle third of the steps; `resumed`: with
    which `offload` ("as before": the same) the second half goes on from a checkpoint."""

    family: str = "llama"
    offload: str = "states"
    rounding: str = "exact"
    moments: str = "fp32"
    clipping: str = "none"
    accumulation: int = 1
    params: str = "all"
    checkpointing: bool = False
    resumed: str = "no"
    order: str | int = "host"

    def __str__(self) -> str:
        values = zip(self._fields, self, strict=True)
        return "-".join(
            f"{value}" if isinstance(value, str) else f"{n}{value}" for n, value in values
        )


CHOICES: dict[str, tuple[Any, ...]] = {
    "family": ("llama", "gemma3", "qwen3_moe", "t5", "gpt2", "bert"),
    "offload": TIERS,
    "rounding": ("fp32", "exact", "kahan", "stochastic", "nearest"),
    "moments": ("fp32", "bf16", "8bit", "4bit"),
    "clipping": ("none", "option", "call"),
    "accumulation": (1, 4),
    "params": ("all", "frozen", "late"),
    "checkpointing": (False, True),
    "resumed": ("no", "as before", "None", *TIERS),
    "order": ("host", "late", "early", 1),
}


def pairwise(seed: int) -> list[Case]:
    """Cases among which every pair of values of two choices is met."""
    random = Random(seed)
    names = list(CHOICES)
    open_pairs = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in CHOICES[a]
        for y in CHOICES[b]
    }
    cases = []
    while open_pairs:
        best, met = Case(), set()
        pair = min(open_pairs, key=str)
        for _ in range(40):
            values = {name: random.choice(options) for name, options in CHOICES.items()}
            values |= dict(pair)
            found = open_pairs & set(itertools.combinations(values.items(), 2))
            if len(found) > len(met):
                best, met = Case(**values), found
        cases.append(best)
        open_pairs -= met
    return cases


def small_buffers(monkeypatch: Any) -> None:
    """Cuts the steps of tiny models into many pieces, each larger than some parameters."""
    for room, name, size in (
        (pieces, "BUFFER", 8192),
        (gradients, "IN_FLIGHT", 4096),
        (gradients, "STAGE", CHUNK),
    ):
        monkeypatch.setattr(room, name, size)


class Trained(NamedTuple):
    """What a training leaves behind."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    states: dict[str, Tensor]


def trained(
    case: Case,
    *,
    offload: str | None,
    steps: int,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    device: str = "cpu",
) -> Trained:
    """Trains a case with its own `offload` or another."""
    model, optimizer = _made(case, offload, device)
    losses: list[float] = []
    norms: list[float] = []
    for step in range(steps):
        if step == steps // 2 and case.resumed != "no":
            other = {"as before": offload, "None": None}.get(case.resumed, case.resumed)
            model, optimizer = _resumed(case, other, model, optimizer, device)
        _freeze(case, model, step / steps)
        for batch in _batches(step, case.accumulation, device):
            loss = model(input_ids=batch, labels=batch).loss / case.accumulation
            backward(loss)
            losses.append(loss.item())
        grads = [p.grad for p in _params(optimizer) if p.grad is not None]
        if case.clipping == "call":
            norms.append(float(grads[-1].clone().float().sum()))
            norms.append(float(optimizer.clip_at_step(grads, 0.5)))
        del grads
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / (2 * steps))
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 1e3  # what is scheduled behind the step is not of it
        if case.clipping == "option":
            norms.append(float(optimizer.grad_norm))
        optimizer.zero_grad()
    states = dict(_flat("", optimizer.state_dict()["state"]))
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    for batch in _batches(steps, 1, device):  # a training may end in the middle of a step
        backward(model(input_ids=batch, labels=batch).loss)
    return Trained(losses, norms, weights, states)


def assert_same_bits(these: Trained, those: Trained) -> None:
    assert these.losses == those.losses
    assert these.norms == those.norms
    for mine, other in ((these.weights, those.weights), (these.states, those.states)):
        assert mine.keys() == other.keys()
        different = [name for name in mine if not same(mine[name], other[name])]
        assert not different, different


def same(one: Tensor, other: Tensor) -> bool:
    """To the bit, NaNs too."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))


def _made(case: Case, offload: str | None, device: str) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    model = FAMILIES[case.family]().train()
    if case.rounding != "fp32":
        model = model.to(torch.bfloat16)
    if device != "cpu":
        model = model.to(device)
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    options: dict[str, Any] = {"moments": case.moments, "seed": 7, "weight_decay": 0.1}
    if case.rounding != "fp32":
        options["rounding"] = case.rounding
    if case.clipping == "option":
        options["max_grad_norm"] = 0.5
    if offload is not None:
        options["offload"] = offload
    optimizer = fastft.AdamW([*model.parameters(), *getattr(model, "beside", ())], **options)
    if offload == "overlap":
        optimizer.follow(model)
    return model, optimizer


def _resumed(
    case: Case, offload: str | None, model: torch.nn.Module, optimizer: Any, device: str
) -> tuple[torch.nn.Module, Any]:
    """Another model and optimizer out of a checkpoint, which has gone through a file."""
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "model": model.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    model, optimizer = _made(case, offload, device)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return model, optimizer


def _freeze(case: Case, model: torch.nn.Module, done: float) -> None:
    if case.params != "all":
        trainable = case.params == "late" and 1 / 3 <= done < 2 / 3
        for name, param in model.named_parameters():
            if ".1." in name:  # the second layer
                param.requires_grad_(trainable)


def _batches(step: int, count: int, device: str) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(step)
    for _ in range(count):
        yield torch.randint(1, VOCABULARY, (2, 9), generator=generator).to(device)


def _params(optimizer: Any) -> list[Any]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _flat(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value.clone()
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _flat(f"{name}.{key}", entry)
