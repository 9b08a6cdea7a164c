"""How often the host waits for the device in one training step of each piece, the batch being
there: never, or as said.

The device is the CPU, made to behave as one (`support/device_mode.py`); CUDA's engines are stood in
for by the CPU's.
"""

from __future__ import annotations

import contextlib
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import flash_kernels
from support.device_mode import DeviceMode
from support.host_work import of_host, stand_ins
from support.numerics import assert_no_worse
from support.packed_examples import make
from support.packed_models import MODELS, build, packed_pairs, sequences
from support.pooled_models import classifier, labelled_examples
from support.versions import checkpoint_activations
from torch import Tensor, nn

import fastft
from fastft import _native
from fastft.attention.attention import fastft_attention
from fastft.attention.segment_attention import segment_attention
from fastft.attention.segments import segments_of
from fastft.data.batch import FlatBatch
from fastft.data.collator import PackingCollator
from fastft.optim.grad_norm import grad_norm

SIZES = [5, 9, 3, 12, 1]
KEYS = (
    "input_ids",
    "position_ids",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)


@pytest.fixture
def gpu() -> Iterator[None]:
    """What only a GPU computes runs in plain torch."""
    with stand_ins(native=False):
        yield


def ours(mode: DeviceMode) -> list[Any]:
    """The waits that fastft's code makes, or has others make; not those of a model's own code, nor
    those inside transformers' masks, which are no fewer without us (`assert_masks_are_stocks`)."""
    return [wait for wait in mode.waits if not (wait.where.startswith("test_") or wait.in_mask)]


def assert_masks_are_stocks(mode: DeviceMode, stock: nn.Module, batch: Any) -> None:
    """Transformers' masks wait no more often than in a stock model, which depends on its
    version."""
    with DeviceMode() as alone:
        there = of_host(alone, batch).to(alone.device)
        alone.waits.clear()
        stock(**{key: there[key] for key in KEYS}, use_cache=False)  # as it is with us
    found, expected = (
        Counter((wait.what, wait.in_mask) for wait in each.waits if wait.in_mask)
        for each in (mode, alone)
    )
    assert found <= expected, (found, expected)


ATTENTION: dict[str, dict[str, Any]] = {
    "causal": {},
    "both ways": {"causal": False},
    "window": {"window": 3},
    "chunks": {"chunk": 4},
    "sinks": {"sinks": (4,)},
    "softcap": {"softcap": 1.5},
    "bias": {"bias": (1, 4, 1, 1)},
    "mask": {"mask": True},
    "dropout": {"dropout": 0.1},
}


def attend(device: Any, batch: dict[str, Any], options: dict[str, Any], impl: str) -> list[Tensor]:
    """Two layers of attention, forward and backward, as a model's code calls them: boundaries in
    keyword arguments."""
    torch.manual_seed(0)
    (rows, length), dtype = batch["input_ids"].shape, torch.bfloat16

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()

    given = {
        key: leaf(*value) if isinstance(value, tuple) else value for key, value in options.items()
    }
    if "mask" in given:
        given["mask"] = torch.ones(1, 1, length, length, device=device, dtype=torch.bool)
    leaves = [leaf(rows, heads, length, 8) for heads in (4, 2, 2)]
    leaves += [
        value for value in given.values() if isinstance(value, Tensor) and value.requires_grad
    ]
    total: Any = 0
    for _ in range(2):
        segments = segments_of(nn.Module(), batch)
        assert segments is not None
        out = segment_attention(*leaves[:3], segments, **{"causal": True, **given}, impl=impl)
        total = total + out.float().square().sum()
    total.backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("impl", ["auto", "blocks"])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(gpu: None, name: str, impl: str) -> None:
    batch = PackingCollator(rows=2, pad_to_multiple_of=8)(make(SIZES))
    with DeviceMode() as mode:
        there = of_host(mode, batch).to(mode.device)
        mode.waits.clear()
        grads = attend(mode.device, there, ATTENTION[name], impl)
        assert mode.waits == [] and all(grad.is_cuda for grad in grads)
    # a scalar of the device that met 16-bit tensors would have been rounded there
    if impl == "blocks":
        same = map(torch.equal, grads, attend(torch.device("cpu"), batch, ATTENTION[name], impl))
        assert all(same)
    assert len(flash_kernels.CALLS) == (
        0 if impl == "blocks" or name in ("softcap", "bias", "mask") else 2
    )


def test_attention_over_rows_that_are_not_packed(gpu: None) -> None:
    """Sinks, which stock attention lacks: no boundaries, and none that must be copied."""
    with DeviceMode() as mode:
        q = torch.randn(2, 4, 6, 8, device=mode.device, dtype=torch.bfloat16).requires_grad_()
        sinks = torch.zeros(4, device=mode.device, dtype=torch.bfloat16)
        for _ in range(2):
            fastft_attention(nn.Module(), q, q, q, None, s_aux=sinks)[0].sum().backward()
    assert mode.waits == [] and len(flash_kernels.CALLS) == 2


def step(mode: DeviceMode, model: nn.Module, batch: dict[str, Any]) -> None:
    """Forward and backward."""
    logits = model(**batch).logits
    (logits.float() * torch.ones(logits.shape[-1], device=mode.device)).sum().backward()


@pytest.mark.parametrize(
    "checkpointing", [None, False, True], ids=["stored", "recomputed", "reentrant"]
)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "llama4", "opt", "modernbert"])
def test_attention_in_models(gpu: None, name: str, checkpointing: bool | None) -> None:
    """With the hooks; transformers itself looks once for packed sequences, for each mask that it
    makes."""
    model = build(name, "fastft", torch.bfloat16)
    if checkpointing is not None:
        options: dict[str, Any] = {"use_reentrant": checkpointing}
        if not checkpointing:  # its comparison does not always see the device
            options["determinism_check"] = "none"
        checkpoint_activations(model.train(), **options)
    batch = PackingCollator(position_ids_start=MODELS[name].position_ids_start)(make(SIZES))
    with DeviceMode() as mode, fastft.packed_attention(model):
        there = of_host(mode, batch).to(mode.device)
        there = {key: value for key, value in there.items() if key in KEYS}
        mode.waits.clear()
        step(mode, model, there)
    assert ours(mode) == []
    kind = "sdpa" if type(model)._supports_sdpa else "eager"
    assert_masks_are_stocks(mode, build(name, kind, torch.bfloat16), batch)
    if name == "llama":
        assert [wait.what for wait in mode.waits] == ["local_scalar_dense"]


@pytest.mark.parametrize("hooked", [False, True])
def test_attention_in_a_loop_that_moves_tensor_by_tensor(gpu: None, hooked: bool) -> None:
    model = build("llama", "fastft", torch.bfloat16)
    batch = PackingCollator()(make(SIZES))
    with (
        DeviceMode() as mode,
        fastft.packed_attention(model) if hooked else contextlib.nullcontext(),
    ):
        of_host(mode, batch)
        there = {key: batch[key].to(mode.device) for key in KEYS[:4]} | {"use_cache": False}
        for _ in range(2):
            mode.waits.clear()
            step(mode, model, there)
            expected = [] if _ else ["tolist"]
            assert [wait.what for wait in ours(mode)] == expected


def test_attention_of_an_encoder_and_a_decoder(gpu: None) -> None:
    """T5's position bias makes them blocks; of boundaries made by hand all three are read at the
    same time."""
    model = build("t5", "fastft", torch.bfloat16)
    batch = packed_pairs(sequences((4, 9)), sequences((9, 4), seed=5))
    with DeviceMode() as mode, fastft.packed_attention(model):
        step(mode, model, batch)
    assert [wait.what for wait in ours(mode)] == ["tolist"]


def test_a_batch_of_questions_and_answers(gpu: None) -> None:
    model = build("t5", "fastft", torch.bfloat16)
    batch = PackingCollator(task="seq2seq", decoder_start_token_id=0)(make(SIZES, labels=30))
    with DeviceMode() as mode, fastft.packed_attention(model):
        there = of_host(mode, batch).to(mode.device)
        mode.waits.clear()
        step(mode, model, {key: value for key, value in there.items() if key != "position_ids"})
    assert ours(mode) == []


def test_padding_outside_the_loss_of_a_router(gpu: None) -> None:
    model = build("qwen2_moe", "fastft", torch.bfloat16, output_router_logits=True)
    batch = PackingCollator(rows=2, pad_to_multiple_of=8)(make(SIZES))
    with DeviceMode() as mode, fastft.packed_attention(model):
        there = of_host(mode, batch).to(mode.device)
        mode.waits.clear()
        out = model(**{key: there[key] for key in (*KEYS, "padding_lengths")}, use_cache=False)
        (out.logits.float().sum() + out.aux_loss).backward()
    assert ours(mode) == []


def test_a_block_mask(gpu: None) -> None:
    import transformers

    sizes = {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    config = transformers.BloomConfig(**sizes)
    model, stock = (transformers.BloomForCausalLM(config).to(torch.bfloat16) for _ in range(2))
    batch = PackingCollator(rows=2)(make(SIZES))
    with DeviceMode() as mode, fastft.block_mask(model):
        there = of_host(mode, batch).to(mode.device)
        mode.waits.clear()
        step(mode, model, {key: there[key] for key in KEYS})
    assert ours(mode) == []
    assert_masks_are_stocks(mode, stock, batch)


def test_a_batch_comes_to_the_device_with_a_copy_of_each_tensor() -> None:
    batch = PackingCollator()(make(SIZES, labels=30))
    with DeviceMode() as mode:
        of_host(mode, batch)
        tensors = {id(value) for value in batch.values() if isinstance(value, Tensor)}
        batch.to(mode.device)
        assert len(mode.waits) == len(tensors) == 5
        mode.waits.clear()
        batch.pin_memory().to(mode.device, non_blocking=True)
    assert mode.waits == []


@pytest.mark.parametrize("task", ["causal_lm", "token_classification"])
def test_a_flat_batch_comes_with_one_copy_and_is_unpacked_without_a_wait(task: str) -> None:
    flat, whole = (
        PackingCollator(task=task, rows=2, expand_on_device=expand)(make(SIZES, labels=30))
        for expand in (True, False)
    )
    assert isinstance(flat, FlatBatch)
    with DeviceMode() as mode:
        of_host(mode, flat).to(mode.device)
        assert len(mode.waits) == 1
        mode.waits.clear()
        there = flat.pin_memory().to(mode.device, non_blocking=True)
    assert mode.waits == []
    assert all(
        torch.equal(value, whole[key]) for key, value in there.items() if isinstance(value, Tensor)
    )


@pytest.mark.parametrize("name", ["bert", "modernbert mean", "llama"])
def test_examples_classified_by_their_segments(gpu: None, name: str) -> None:
    model = classifier(name).to(torch.bfloat16)
    model.set_attn_implementation("fastft")
    batch = PackingCollator(task="sequence_classification", rows=2)(labelled_examples("classes"))
    with fastft.pool_segments(model), DeviceMode() as mode, fastft.packed_attention(model):
        there = of_host(mode, batch).to(mode.device)
        mode.waits.clear()
        model(**there).loss.backward()
    assert ours(mode) == []


@pytest.fixture(params=["auto", "eager"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU's kernels in the place of CUDA's, with all that Python does for these; and plain
    torch.

    Where steps are counted on the device, plain torch reads the table of hyper-parameters: no test
    says otherwise.
    """
    if request.param == "auto" and _native.missing("cpu"):
        pytest.skip("the CPU's library is missing")
    with stand_ins(native=request.param == "auto"):
        yield request.param


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "exact": {},
    "clipped": {"max_grad_norm": 0.1},
    "kahan": {"rounding": "kahan"},
    "stochastic, bf16 moments": {"rounding": "stochastic", "moments": "bf16"},
    "8-bit moments": {"rounding": "stochastic", "moments": "8bit"},
    "4-bit moments": {"rounding": "stochastic", "moments": "4bit"},
    "amsgrad": {"amsgrad": True},
    "counted there": {"capturable": True},
    "counted there, clipped": {"capturable": True, "max_grad_norm": 0.1},
}
SHAPES = [(64, 128), (33,), (7, 5), (40, 128)]


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16]
    drawn = [
        torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES for dtype in dtypes
    ]
    return [tensor.requires_grad_() for tensor in drawn]


@contextlib.contextmanager
def on_device(
    optimizer: Callable[[list[Tensor]], Any],
) -> Iterator[tuple[DeviceMode, Any, list[Tensor]]]:
    """An optimizer of parameters on the device, after two steps."""
    params = parameters()
    with DeviceMode() as mode:
        made = optimizer(params)
        for index in range(2):
            give_gradients(params, index)
            made.step()
        mode.waits.clear()
        yield mode, made, params


def give_gradients(params: list[Tensor], seed: int) -> None:
    torch.manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, device=param.device).to(param.dtype)


def assert_same_as_on_a_cpu(params: list[Tensor], train: Callable[[list[Tensor]], Any]) -> None:
    """A scalar of the device that met 16-bit tensors would have been rounded there, and not
    here."""
    others = parameters()
    train(others)
    for actual, expected in zip(params, others, strict=True):
        assert_no_worse(actual, expected, expected.double(), terms=3)


@pytest.mark.filterwarnings("ignore:rounding=")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_of_adamw(name: str, engine: str) -> None:
    options = {**OPTIMIZERS[name], "seed": 1, "impl": engine}
    reads = engine == "eager" and "capturable" in options

    def make_it(params: list[Tensor]) -> Any:
        return fastft.AdamW(params, lr=0.01, **options)

    def train(params: list[Tensor]) -> None:
        optimizer = make_it(params)
        for index in range(3):
            give_gradients(params, index)
            optimizer.step()

    with on_device(make_it) as (mode, optimizer, params):
        optimizer.param_groups[0]["lr"] = 0.01  # a schedule writes there
        give_gradients(params, 2)
        optimizer.step()
        assert bool(mode.waits) == reads
    assert_same_as_on_a_cpu(params, train)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_under_gradscaler(
    capturable: bool, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where steps are counted on the host, it waits for what GradScaler has found; torch's own
    update does not."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)

    def make_it(params: list[Tensor]) -> Any:
        return fastft.AdamW(params, capturable=capturable, max_grad_norm=1.0, impl=engine)

    with on_device(make_it) as (mode, optimizer, params):
        scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
        for found in (False, True):
            optimizer.zero_grad()
            scaler.scale(sum(param.float().square().sum() for param in params)).backward()
            if found:
                params[0].grad.view(-1)[3] = torch.inf
            before = [param.clone() for param in params]
            mode.waits.clear()
            scaler.step(optimizer)
            scaler.update()
            if not (capturable and engine == "eager"):
                assert [wait.what for wait in mode.waits] == (
                    [] if capturable else ["local_scalar_dense"]
                )
            changed = any(not torch.equal(*pair) for pair in zip(params, before, strict=True))
            assert changed != found and optimizer.step_was_skipped == found


def test_a_learning_rate_on_the_device(engine: str) -> None:
    """It is read by the host where steps are counted there."""
    for capturable, expected in ((True, 0), (False, 1)):
        if capturable and engine == "eager":
            continue

        def make_it(params: list[Tensor], capturable: bool = capturable) -> Any:
            lr = torch.full((), 0.01, device=params[0].device)
            return fastft.AdamW(params, lr=lr, capturable=capturable)

        with on_device(make_it) as (mode, optimizer, params):
            optimizer.param_groups[0]["lr"].mul_(0.5)
            give_gradients(params, 2)
            optimizer.step()
            assert len(mode.waits) == expected


def test_clipping_by_trainer_inside_the_step(engine: str) -> None:
    with on_device(lambda params: fastft.AdamW(params, impl=engine)) as (mode, optimizer, params):
        accelerator = types.SimpleNamespace(
            clip_grad_norm_=None,
            unscale_gradients=lambda: None,
            distributed_type=types.SimpleNamespace(value="NO"),
        )
        fastft.fuse_clipping(types.SimpleNamespace(accelerator=accelerator, optimizer=optimizer))
        give_gradients(params, 2)
        norm = accelerator.clip_grad_norm_(params, 0.1)
        optimizer.step()
        assert mode.waits == [] and norm.is_cuda
    truth = torch.cat([param.grad.double().flatten() for param in params]).norm()
    torch.testing.assert_close(norm.double(), truth, rtol=1e-6, atol=0)


def test_other_gradients_than_before(engine: str) -> None:
    """A new plan: where counts are on the device they are read at once, and sent back; else nothing
    waits."""
    for capturable, expected in ((False, 0), (True, 3)):
        if capturable and engine == "eager":
            continue
        make_it = lambda params, c=capturable: fastft.AdamW(params, capturable=c, impl=engine)  # noqa: E731
        with on_device(make_it) as (mode, optimizer, params):
            give_gradients(params, 2)
            params[1].grad = None
            optimizer.step()
            assert len(mode.waits) == expected


def test_the_norm_of_gradients(engine: str) -> None:
    params = parameters()
    with DeviceMode() as mode:
        give_gradients(params, 0)
        norm = grad_norm([param.grad for param in params if param.grad is not None], engine)
        assert mode.waits == [] and norm.is_cuda
