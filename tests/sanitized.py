"""make sanitize: the native code under gcc's sanitizers; any report fails.

python tests/sanitized.py [--only cpu threads cuda] [arguments of pytest]

cpu:     the tests below, and support/kernel_digests.cpp, with the sanitizers of addresses and of
         undefined behaviour, on every instruction set that this machine has; what the program never
         frees is a report too.
threads: the program with the thread sanitizer. Its threads are its own: torch's pool is not
         instrumented, so that every use of what was made before would be a report.
cuda:    the launchers of the CUDA library over the fake runtime, as cpu, where there is nvcc.

Each begins with faults that are planted (support/planted_overflow.py): if one is not reported, the
sanitizer does not see the library that is tested.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shlex
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path

from instruction_sets import PROCESSORS, processors
from support import ptx, sanitizers
from support.sanitizers import Watched

TESTS = Path(__file__).resolve().parent

# what depends on the instruction set, and, once, what else calls the CPU library
KERNELS = "adamw adamw_update grad_norm moment_codes moments_4bit moments_4bit_lanes".split()
KERNELS += "moments_8bit cross_entropy matrix_product segment_attention swiglu rms_norm".split()
KERNELS += ["fuzz::test_room[adamw]", "fuzz::test_room[losses]"]
OTHERS = "adamw_bindings adamw_input adamw_plan adamw_scaling stale_remainders plan".split()
OTHERS += "linear_cross_entropy linear_log_probs row_functions boundaries collator".split()
OTHERS += ["native::test_a_call_that_is_refused_lets_go_of_its_tensors", "fuzz::test_room"]
# no code of ours: plain torch, PTX in numpy, Triton, what inductor compiles; and what has processes
# of its own
WITHOUT = "not eager and not ptx and not triton and not compile and not instruction_set"
WITHOUT += " and not where_bf16 and not another_library"
LAUNCHERS = "cuda_launchers scale_gradients".split()


class Row:
    """What one run came to, a line of the summary."""

    def __init__(
        self, name: str, watched: Watched, status: int, results: Path | None = None
    ) -> None:
        self.name, self.reports = name, watched.reports()
        self.wrong = [f"{name}: {report}" for report in self.reports]
        if status:
            self.wrong.append(f"{name}: it ended with status {status}")
        suite = ElementTree.parse(results).getroot() if results and results.exists() else None
        found = [] if suite is None else list(suite.iter("testsuite"))
        self.tests = sum(int(each.get("tests", 0)) for each in found)
        self.skipped = sum(int(each.get("skipped", 0)) for each in found)
        self.files = len(
            {case.get("classname") for each in found for case in each.iter("testcase")}
        )
        fuzzed = [] if suite is None else suite.iter("property")
        cases = (re.search(r": ([\d,]+) cases", each.get("value", "")) for each in fuzzed)
        self.cases = sum(int(case[1].replace(",", "")) for case in cases if case)


def see(name: str, plant: Callable[[Watched], int], expected: str) -> None:
    """Plants a fault; raises SystemExit where no report of it is made."""
    watched = Watched(sanitizers.FOLDER / "planted")
    plant(watched)
    if not any(expected in report for report in watched.reports()):
        raise SystemExit(f"{name}: a planted fault was not reported: {watched.reports()}")


def plant(fault: str, package: Path, **environment: str) -> Callable[[Watched], int]:
    arguments = ["-m", "support.planted_overflow", fault]
    return lambda watched: watched.python(arguments, package, **environment)


def tests(name: str, files: Sequence[str], package: Path, more: list[str], without: str) -> Row:
    print(f"\n{name}", flush=True)
    watched, results = Watched(sanitizers.FOLDER / name), sanitizers.FOLDER / f"{name}.xml"
    results.unlink(missing_ok=True)
    command = ["-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-k", without]
    command += [f"--junit-xml={results}", "-o", "junit_family=xunit1", *more]
    paths = []
    for each in files:
        stem, mark, chosen = each.partition("::")
        paths.append(f"{next(TESTS.rglob(f'test_{stem}.py'))}{mark}{chosen}")
    isa = {"FASTFT_CPU_ISA": name} if name in PROCESSORS else {}
    return Row(name, watched, watched.python([*command, *paths], package, **isa), results)


def cpu(more: list[str]) -> list[Row]:
    package, program = sanitizers.package("address"), sanitizers.program("address")
    see("leaks", lambda watched: watched.program([*program, "leak"]), "LeakSanitizer")
    rows = []
    for isa in processors():
        see(isa, plant("heap", package, FASTFT_CPU_ISA=isa), "heap-buffer-overflow")
        see(isa, plant("alignment", package, FASTFT_CPU_ISA=isa), "misaligned address")
        rows.append(tests(isa, KERNELS, package, more, WITHOUT))
        watched = Watched(sanitizers.FOLDER / f"{isa}-program")
        status = watched.program(program, FASTFT_CPU_ISA=isa)
        rows.append(Row(f"{isa}, program", watched, status))
    return [*rows, tests("others", OTHERS, package, more, WITHOUT)]


def threads(more: list[str]) -> list[Row]:
    sanitizers.package("thread")
    program, rows = sanitizers.program("thread"), []
    for isa in processors():
        race = functools.partial(Watched.program, command=[*program, "race"], FASTFT_CPU_ISA=isa)
        see(isa, race, "data race")
        watched = Watched(sanitizers.FOLDER / f"{isa}-threads")
        rows.append(Row(f"{isa}, threads", watched, watched.program(program, FASTFT_CPU_ISA=isa)))
    return rows


def cuda(more: list[str]) -> list[Row]:
    if reason := ptx.missing():
        print(f"\ncuda: skipped, {reason}")
        return []
    package = sanitizers.package("address")
    os.environ["FASTFT_HOST_FLAGS"] = shlex.join(sanitizers.flags("address"))
    # here, because nvcc itself is not to run under a sanitizer
    ptx.cuda.build(sorted((sanitizers.ROOT / "csrc" / "cuda").glob("*.cu")))
    see("cuda", plant("cuda", package), "heap-buffer-overflow")
    return [tests("cuda", LAUNCHERS, package, more, "not triton")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {"cpu": cpu, "threads": threads, "cuda": cuda}
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    options, more = parser.parse_known_args()
    if reason := sanitizers.missing():
        raise SystemExit(f"nothing can be sanitized here: {reason}")
    rows = [row for name in parts if name in options.only for row in parts[name](more)]
    print(f"\n{'':22}{'files':>7}{'tests':>7}{'skipped':>9}{'fuzz cases':>12}{'reports':>9}")
    for row in rows:
        counts = f"{row.files:7}{row.tests:7}{row.skipped:9}{row.cases:12}{len(row.reports):9}"
        print(f"{row.name:22}{counts}")
    wrong = [line for row in rows for line in row.wrong]
    tests_, cases = sum(row.tests for row in rows), sum(row.cases for row in rows)
    reports = sum(len(row.reports) for row in rows)
    print(f"\n{len(rows)} runs, {tests_:,} tests, {cases:,} fuzz cases, {reports} reports")
    if wrong:
        raise SystemExit("\n".join([*wrong, f"all of each report: {sanitizers.FOLDER}/*/"]))


if __name__ == "__main__":
    main()
