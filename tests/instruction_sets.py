"""make test-isa: the numeric rooms under every instruction set of our kernels and of torch.

python tests/instruction_sets.py [--only avx2 avx512] [arguments of pytest]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from fastft import _native

TESTS = Path(__file__).resolve().parent
ROOMS = (
    *(
        "adamw",
        "adamw_goals",
        "adamw_update",
        "attention",
        "boundaries",
        "cross_entropy",
        "dtensor_head",
    ),
    *(
        "fused_loss",
        "grad_norm",
        "lazy_logits",
        "linear_cross_entropy",
        "linear_log_probs",
        "loss_goals",
        "row_functions",
    ),
    *(
        "gated_down",
        "moments_4bit",
        "moments_4bit_lanes",
        "moments_8bit",
        "normed_linear",
        "packed",
        "packing_callback",
        "pool_segments",
        "rms_norm",
        "segment_attention",
        "seq2seq",
        "swiglu",
    ),
    "vocab_parallel",
)
VARIABLES = (
    "FASTFT_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
)
# of each of our instruction sets: its name, and those of the nearest that torch, oneDNN and MKL
# have
PROCESSORS = {
    "baseline": ("baseline", "default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "avx512", "AVX512_CORE", "AVX512"),
    "avx512bf16": ("avx512bf16", "avx512", "AVX512_CORE_BF16", "AVX512"),
}


def processors() -> dict[str, tuple[str, ...]]:
    """What this machine can pass for, the best last."""
    best = _native.cpu_isa()
    if best is None:
        raise SystemExit(f"no CPU kernels: {_native.missing('cpu')}")
    names = list(PROCESSORS)
    return {name: PROCESSORS[name] for name in names[: names.index(best) + 1]}


def settings() -> dict[str, tuple[str, ...]]:
    """The processors, and the farthest crossed: our kernels of one, torch's of another."""
    had = processors()
    best = list(had)[-1]
    if best != "baseline":
        had["ours baseline"] = ("baseline", *PROCESSORS[best][1:])
        had["torch baseline"] = (best, *PROCESSORS["baseline"][1:])
    return had


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=sorted({*PROCESSORS, "ours baseline", "torch baseline"})
    )
    options, arguments = parser.parse_known_args()
    if not any(argument.endswith(".py") for argument in arguments):
        arguments = [*arguments, *(str(next(TESTS.rglob(f"test_{room}.py"))) for room in ROOMS)]
    failed = []
    for name, values in settings().items():
        if options.only and name not in options.only:
            continue
        chosen = dict(zip(VARIABLES, values, strict=True))
        print(
            f"\n{name}: {' '.join(f'{key}={value}' for key, value in chosen.items())}", flush=True
        )
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", *arguments]
        if subprocess.run(command, cwd=TESTS.parent, env={**os.environ, **chosen}).returncode:
            failed.append(name)
    if failed:
        raise SystemExit(f"failed on: {', '.join(failed)}")


if __name__ == "__main__":
    main()
