"""One dispatch: which engine computes a call, why another does not, and that every engine has its
operator's schema."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastft
from fastft import _native, ops
from fastft.attention import attention_flash
from fastft.attention import segment_attention as attention
from fastft.commands import engines
from fastft.data import plan
from fastft.ops import OPERATORS, Operator
from fastft.optim.grad_norm import grad_norm

CSRC = Path(fastft.__file__).parent.parent / "csrc"
CPU, GPU, XPU = torch.device("cpu"), torch.device("cuda", 0), torch.device("xpu", 0)
WITH_SCHEMA = {
    name: operator for name, operator in OPERATORS.items() if isinstance(operator, Operator)
}
WITH_TRITON = {
    name: operator for name, operator in WITH_SCHEMA.items() if "triton" in operator.engines
}
needs_cpu_library = pytest.mark.skipif(
    _native.missing("cpu") is not None, reason="no native CPU library"
)


def arguments(operator: Any) -> list[str]:
    return [argument.name for argument in operator._schema.arguments]


def assert_takes(function: Any, names: list[str]) -> None:
    """By position; `*rest` takes what is left."""
    parameters = list(inspect.signature(function).parameters.values())
    if parameters[-1].kind == inspect.Parameter.VAR_POSITIONAL:
        parameters, names = parameters[:-1], names[: len(parameters) - 1]
    assert [parameter.name for parameter in parameters] == names
    assert all(parameter.default is inspect.Parameter.empty for parameter in parameters)


@pytest.mark.parametrize("operator", WITH_SCHEMA.values(), ids=WITH_SCHEMA)
class TestSignatures:
    def test_the_reference_takes_the_schemas_arguments(self, operator: Operator) -> None:
        assert_takes(operator.reference, arguments(operator.native))

    def test_the_fake_takes_the_schemas_arguments(self, operator: Operator) -> None:
        """An operator without results may have one that ignores them."""
        registered = torch._library.simple_registry.singleton.find(operator.qualified_name)
        kernel = registered.fake_impl.kernel.func  # torch's, around ours
        fake = inspect.getclosurevars(kernel).nonlocals["func"]
        if operator.native._schema.returns or fake.__name__ != "<lambda>":
            assert_takes(fake, arguments(operator.native))

    def test_the_native_engines_take_as_many(self, operator: Operator) -> None:
        for engine in set(operator.engines) & set(ops.LIBRARIES):
            folders = (CSRC / ops.LIBRARIES[engine], CSRC / "include")
            text = "".join(
                path.read_text() for folder in folders for path in sorted(folder.iterdir())
            )
            counts = re.findall(rf'"{operator.name}(?:: | takes )(\d+) arguments', text)
            assert counts == [str(len(arguments(operator.native)))], engine

    def test_triton_takes_the_same(self, operator: Operator) -> None:
        if "triton" not in operator.engines:
            pytest.skip("no Triton engine")
        pytest.importorskip("triton")
        assert str(operator.triton._schema).replace("_triton(", "(", 1) == str(
            operator.native._schema
        )
        assert_takes(operator._triton_function(), arguments(operator.native))


def test_the_native_steps_of_adamw_take_as_many_as_their_schemas() -> None:
    for name, kinds in {
        "adamw_bind": ("cpu", "cuda"),
        "adamw_bound_": ("cpu", "cuda"),
        "adamw_clipped_": ("cpu",),
        "adamw_written": ("cpu",),
    }.items():
        count = len(arguments(getattr(torch.ops.fastft, name).default))
        for kind in kinds:
            text = "".join(path.read_text() for path in (CSRC / kind).iterdir())
            assert re.findall(rf'"{name}: (\d+) arguments', text) == [str(count)]


def test_the_flash_engines_take_the_same() -> None:
    of_cpu, of_cuda = (
        inspect.signature(attention_flash.cpu_forward),
        inspect.signature(attention_flash.cuda_forward),
    )
    assert of_cpu == of_cuda


class TestAnOperation:
    @pytest.fixture
    def operation(self, monkeypatch: pytest.MonkeyPatch) -> ops.Operation:
        monkeypatch.setattr(ops, "OPERATORS", {})
        table = {
            "small": ops.Engine(("cpu",)),
            "absent": ops.Engine(("cpu",), lambda device: "it is not built"),
            "any": ops.Engine(),
        }
        engines = {
            "absent": None,
            "small": lambda device, size: "it is for sizes to 4" if size > 4 else None,
            "any": None,
        }
        return ops.Operation("sum", sum, engines=engines, table=table)

    def test_auto_takes_the_first_that_is_there_and_suits(self, operation: ops.Operation) -> None:
        assert operation.resolve("auto", CPU) == operation.resolve("auto", CPU, 4) == "small"
        assert operation.resolve("auto", CPU, 5) == operation.resolve("auto", GPU, 4) == "any"

    @pytest.mark.parametrize(
        ("impl", "device", "size", "reason"),
        [
            ("small", CPU, 5, "it is for sizes to 4"),
            ("small", GPU, 4, "it computes cpu tensors, these are on cuda"),
            ("absent", CPU, 4, "it is not built"),
        ],
    )
    def test_an_explicit_one_that_does_not_suit_says_why(
        self, operation: ops.Operation, impl: str, device: torch.device, size: int, reason: str
    ) -> None:
        assert operation.suits(impl, device, size) == reason
        with pytest.raises(RuntimeError, match=f"impl='{impl}' is not available for sum: {reason}"):
            operation.resolve(impl, device, size)

    def test_plain_torch_computes_what_no_engine_does(self, operation: ops.Operation) -> None:
        del operation.engines["any"]
        assert operation.resolve("auto", CPU, 5) == "eager"


HALF, NARROW, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


def loss(impl: str, dtype: torch.dtype) -> Any:
    return fastft.cross_entropy(torch.randn(3, 5).to(dtype), torch.tensor([0, 1, 2]), impl=impl)


def linear_loss(impl: str, dtype: torch.dtype) -> Any:
    x, weight = torch.randn(3, 4).to(dtype), torch.randn(5, 4).to(dtype)
    return fastft.linear_cross_entropy(x, weight, torch.tensor([0, 1, 2]), impl=impl)


def norm(impl: str, *dtypes: torch.dtype) -> Any:
    return grad_norm([torch.ones(3, dtype=dtype) for dtype in dtypes], impl)


def step(impl: str) -> Any:
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    param = torch.nn.Parameter(torch.ones(3, dtype=NARROW))
    param.grad_dtype = SINGLE
    param.grad = torch.ones(3)
    fastft.AdamW([param], impl=impl).step()


def long_pack(impl: str) -> Any:
    return fastft.plan_packs([2**26, 1], 2**26 + 1, impl=impl)


UNSUITED = {
    "cross-entropy of float64": ("cpp", loss, (DOUBLE,), "it has no kernel for torch.float64"),
    "cross-entropy on a CPU by Triton": ("triton", loss, (SINGLE,), "these are on cpu"),
    "cross-entropy over hidden states": (
        "cpp",
        linear_loss,
        (DOUBLE,),
        "it has no kernel for torch.float64",
    ),
    "a norm of float16": ("cpp", norm, (SINGLE, HALF), "it has no kernel for torch.float16"),
    "a norm on a CPU by CUDA": ("cuda", norm, (SINGLE,), "these are on cpu"),
    "a norm by Triton": ("triton", norm, (SINGLE,), "grad_norm_squared_ has no triton kernel"),
    "AdamW with a gradient unlike its parameter": (
        "cpp",
        step,
        (),
        "is torch.bfloat16, its gradient torch.float32",
    ),
    "a pack longer than the tables": (
        "cpp",
        long_pack,
        (),
        "its tables hold packs of up to 67108864 tokens",
    ),
}


@needs_cpu_library
@pytest.mark.parametrize(("impl", "call", "of", "reason"), UNSUITED.values(), ids=UNSUITED)
def test_an_engine_that_does_not_suit_never_becomes_another(
    impl: str, call: Any, of: Any, reason: str
) -> None:
    with pytest.raises(RuntimeError, match=f"impl='{impl}' is not available for .*{reason}"):
        call(impl, *of)
    call("auto", *of)


def test_clipping_by_an_engine_without_a_norm_is_refused_at_the_door() -> None:
    with pytest.raises(
        ValueError, match="max_grad_norm needs a norm that impl='triton' has no kernel for"
    ):
        fastft.AdamW([torch.nn.Parameter(torch.ones(3))], impl="triton", max_grad_norm=1.0)


def rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where torch is built for AMD's GPUs, which it calls cuda."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for name, uncached in (
        ("library", _native._load),
        ("cuda_unusable", _native.cuda_unusable.__wrapped__),
    ):
        monkeypatch.setattr(_native, name, uncached)


class OnDevice(torch.Tensor):
    """Says that it is on another device."""

    device = XPU  # type: ignore[assignment]


class TestDevices:
    @pytest.fixture(autouse=True)
    def a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As where torch and Triton have every device."""
        monkeypatch.setattr(ops, "triton_missing", lambda: None)
        everything = SimpleNamespace(backends=dict.fromkeys(("nvidia", "amd", "intel")))
        monkeypatch.setitem(importlib.import_module("sys").modules, "triton.backends", everything)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)

    @pytest.fixture
    def cuda_library(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """As where the CUDA library is loaded; the indices of the devices that it was asked for."""
        asked: list[int] = []
        monkeypatch.setattr(_native, "missing", lambda kind: None)
        monkeypatch.setattr(_native, "cuda_unusable", asked.append)
        return asked

    def test_a_device_without_an_index_is_the_current_one(self, cuda_library: list[int]) -> None:
        operator = OPERATORS["grad_norm_squared_"]
        for device in ("cuda", "cuda:0", "cuda:1"):
            assert operator.resolve("auto", torch.device(device)) == "cuda"
        assert cuda_library == [3, 0, 1]

    @pytest.mark.parametrize("operator", WITH_TRITON.values(), ids=WITH_TRITON)
    def test_xpu_is_computed_by_triton(self, cuda_library: list[int], operator: Operator) -> None:
        assert operator.resolve("auto", XPU) == operator.resolve("triton", XPU) == "triton"
        assert operator.suits("cuda", XPU) == "it computes cuda tensors, these are on xpu"
        assert cuda_library == []

    @pytest.mark.parametrize("operator", WITH_TRITON.values(), ids=WITH_TRITON)
    def test_rocm_is_computed_by_triton(
        self, operator: Operator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rocm(monkeypatch)
        assert operator.resolve("auto", GPU) == operator.resolve("triton", GPU) == "triton"
        assert (
            operator.suits("cuda", GPU)
            == "it is for NVIDIA's GPUs, this torch is built for AMD's ROCm"
        )

    @pytest.mark.parametrize(("device", "backend"), [(GPU, "amd"), (XPU, "intel")])
    def test_a_triton_for_other_devices_is_not_taken(
        self, device: torch.device, backend: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rocm(monkeypatch)
        monkeypatch.setattr(
            importlib.import_module("triton.backends"), "backends", {"nvidia": None}
        )
        operator = OPERATORS["cross_entropy_rows"]
        assert operator.suits("triton", device) == f"this triton has no backend for {backend}"
        assert operator.resolve("auto", device) == "eager"

    def test_triton_is_not_taken_on_a_gpu_that_it_was_never_compiled_for(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        operator = OPERATORS["adamw_"]
        assert operator.suits("triton", GPU) == "it needs compute capability 7.5, this GPU has 7.0"

    def test_triton_is_not_asked_about_a_gpu_that_is_not_there(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nor is torch, which raises where it has CUDA and the machine no driver."""
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert OPERATORS["adamw_"].suits("triton", GPU) == "torch finds no NVIDIA GPU"

    def test_triton_launches_on_the_device_of_its_tensors(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Which need not be the current one; AdamW's first argument is a list, its table lies on
        the CPU."""
        done: list[Any] = []

        class Current:
            def __init__(self, tensor: torch.Tensor) -> None:
                done.append(tensor.device)

            def __enter__(self) -> None: ...

            def __exit__(self, *error: object) -> None:
                done.append("left")

        monkeypatch.setattr(torch.xpu, "device_of", Current)
        operator, there = OPERATORS["adamw_"], torch.zeros(3).as_subclass(OnDevice)
        monkeypatch.setattr(operator, "_triton_function", lambda: lambda *args: done.append("run"))
        operator._launch_triton([], [there], torch.zeros(1), 0)  # type: ignore[attr-defined]
        assert done == [XPU, "run", "left"]

    def test_waves_are_as_wide_as_the_device_says(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(warp_size=64)
        )
        assert (
            ops.wave.__wrapped__(GPU) == 64
            and ops.wave.__wrapped__(CPU) == ops.wave.__wrapped__(XPU) == 32
        )


def call_on(
    device: torch.device,
    dtype: torch.dtype,
    size: int,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> tuple[Any, ...]:
    """What decides the engine of an attention call, of tensors which are not there."""
    options = False, softcap is not None, False, dropout > 0
    return device, attention._Asked(dtype, size, size, *options)


class TestAttentionsEngines:
    @pytest.fixture(autouse=True)
    def a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))

    @pytest.mark.parametrize(
        ("capability", "size", "dropout", "engine"),
        [
            ((7, 0), 64, 0.0, "blocks"),
            ((7, 5), 64, 0.0, "blocks"),
            ((8, 0), 256, 0.1, "flash_cuda"),
            ((8, 6), 192, 0.1, "flash_cuda"),
            ((8, 6), 200, 0.0, "blocks"),
            ((8, 6), 256, 0.0, "flash_cuda"),
            ((8, 9), 256, 0.1, "blocks"),
            ((9, 0), 224, 0.1, "flash_cuda"),
            ((10, 0), 256, 0.1, "flash_cuda"),
            ((12, 0), 256, 0.1, "blocks"),
            ((12, 0), 128, 0.1, "flash_cuda"),
        ],
    )
    def test_compute_capability_decides(
        self,
        capability: Any,
        size: int,
        dropout: float,
        engine: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        asked = call_on(GPU, HALF, size, dropout=dropout)
        assert attention.ATTENTION.resolve("auto", *asked) == engine
        if engine == "blocks":
            with pytest.raises(
                RuntimeError, match=r"impl='flash_cuda' is not available .*compute capability \d"
            ):
                attention.ATTENTION.resolve("flash_cuda", *asked)

    def test_a_torch_without_flash_attention(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
        assert attention.ATTENTION.resolve("auto", *call_on(GPU, NARROW, 64)) == "blocks"
        with pytest.raises(RuntimeError, match="this torch is built without flash attention"):
            attention.ATTENTION.resolve("flash_cuda", *call_on(GPU, NARROW, 64))

    def test_rocm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rocm(monkeypatch)
        assert attention.ATTENTION.resolve("auto", *call_on(GPU, NARROW, 64)) == "blocks"
        with pytest.raises(RuntimeError, match="this torch is built for AMD's ROCm"):
            attention.ATTENTION.resolve("flash_cuda", *call_on(GPU, NARROW, 64))

    def test_softcap_is_for_flash_attn_where_it_is_installed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = call_on(GPU, NARROW, 64, softcap=30.0)
        monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
        assert attention.ATTENTION.resolve("auto", *asked) == "blocks"
        with pytest.raises(RuntimeError, match="flash-attn is not installed"):
            attention.ATTENTION.resolve("flash_attn", *asked)
        monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: SimpleNamespace())
        assert attention.ATTENTION.resolve("auto", *asked) == "flash_attn"


class TestTheReport:
    def test_says_what_the_operations_say(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """On a T4, with nothing of its own."""
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        monkeypatch.setattr(engines, "_devices", lambda: [GPU])
        engines.main()
        printed = capsys.readouterr().out
        told = "flash_cuda: it needs compute capability 8.0, this GPU has 7.5; flash_attn: "
        assert re.search(rf"packed attention +blocks +\({told}", printed), printed
        for name, operation in OPERATORS.items():
            for engine in operation.engines:
                reason = operation.suits(engine, GPU)
                if operation.table[engine].serves(GPU) and reason is not None:
                    assert re.search(rf"{name} .*{engine}: {re.escape(reason)}", printed), (
                        name,
                        engine,
                    )

    @pytest.mark.parametrize(
        ("kind", "name"), [("cuda", "AMD Instinct MI300X"), ("xpu", "Intel Data Center GPU Max")]
    )
    def test_says_what_amds_and_intels_gpus_would_use(
        self, kind: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys
    ) -> None:
        if kind == "cuda":
            rocm(monkeypatch)
        everything = dict.fromkeys(("nvidia", "amd", "intel"))
        triton_backends = importlib.import_module("triton.backends")
        monkeypatch.setattr(triton_backends, "backends", everything)
        found = {"cuda": 0, "xpu": 0, kind: 1}
        for each, count in found.items():
            monkeypatch.setattr(getattr(torch, each), "device_count", lambda count=count: count)
        monkeypatch.setattr(getattr(torch, kind), "get_device_name", lambda device: name)
        engines.main()
        _, _, of_the_gpu = capsys.readouterr().out.partition(f"{kind}:0 ({name})\n")
        for operator in WITH_TRITON:
            assert re.search(rf"^  {operator} +triton\b", of_the_gpu, re.M), of_the_gpu
        not_for_it = "it is for NVIDIA's GPUs, this torch is built for AMD's ROCm"
        assert (not_for_it in of_the_gpu) == (kind == "cuda")

    def test_names_the_calls_that_another_engine_computes(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(engines, "_devices", lambda: [CPU])
        engines.main()
        assert re.search(
            r"dropout +blocks +\(cpp: its kernel takes no dropout; flash_cpu: its kernel knows no",
            capsys.readouterr().out,
        )


def test_samples_of_the_plan_are_those_that_its_tables_decide() -> None:
    (sample,) = OPERATORS["plan_packs"].samples.values()
    assert plan._tables_fit(CPU, *sample) is not None
    lengths, tokens = torch.tensor([2**26]), 2**31 - 1
    assert plan._tables_fit(CPU, lengths, tokens) is None  # no pack can have more than there are
