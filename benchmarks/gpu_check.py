"""What only a GPU can show: builds against the torch of this Python, tests, measures, trains; in
under ten minutes.

make gpu-check PYTHON=python3 [PART="smoke tests sanitize ops train"]

First the machine and a build for its GPU alone, then parts in the order of their worth:

    smoke     one case of each kernel and engine: is it right, and how long does it take
    tests     the tests marked gpu, in several processes where pytest-xdist is importable
    sanitize  launches.py under the tools of compute-sanitizer, where that is found
    ops       the benchmarks, with the rivals that are importable
    train     a training against stock and Liger; 8 billion parameters under 24 GiB against the same
              without a limit

Each has a share of the time and what those before it have left of theirs; one that is not finished
then is ended, with all that it has started. Whatever ends is on the disk at once, in the folder
$OUT or benchmarks/results: <gpu>.jsonl has every case as a line, <gpu>.md the tables, anew after
each part, with the estimates of results/kernels.md beside what was measured, <gpu>.log what was
printed, <gpu>-tests.xml pytest's report. Needs no network, no git and no environment; this process
needs no torch. The exit status is 1 where anything has failed or was not reached.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bounded
import gpu_report
import one_by_one
from bounded import ROOT
from ledger import Ledger
from tables import failures

HERE = Path(__file__).resolve().parent
# seconds of TOTAL
SHARES = {"machine": 30, "build": 90, "smoke": 40, "tests": 130}
SHARES |= {"sanitize": 60, "ops": 110, "train": 120}
TOTAL = 580.0
PARTS = ("smoke", "tests", "sanitize", "ops", "train")
# the kernels whose speed is least known first
OPS = (
    "cross_entropy",
    "linear_cross_entropy",
    "adamw",
    "linear_log_probs",
    "attention",
    "boundaries",
)
VARIANTS = ("stock", "fastft", "liger")
BIG, BIG_SHARE = "8B under 24 GiB", 3  # times the seconds of a variant
SILENCE = {"smoke": 20.0, "tests": 60.0, "ops": 45.0}  # seconds after which what runs hangs
WORKERS = 8
SANITIZERS = ("memcheck", "racecheck")
REPORTED = 86  # the status of who has something to report


class Check:
    """One run: its clock, its files and what it has found.

    Attributes:
        folder: where the files go.
        stem: their common beginning, once the GPU is known.
        facts: of `machine.py`.
        wrong: sentences about what has failed.
    """

    def __init__(self, parts: list[str], seconds: float, folder: Path) -> None:
        self.parts, self.scale = parts, seconds / TOTAL
        self.deadline = time.monotonic() + seconds
        self.stem = self.folder = folder
        self.log = folder / "gpu-check.log"
        self.log.unlink(missing_ok=True)
        self.ledger = Ledger(folder / "gpu-check.jsonl")
        self.facts: dict[str, Any] = {}
        self.wrong: list[str] = []

    def limit(self, part: str) -> float:
        """The seconds that a part may take: all but what is set aside for those after it."""
        chosen = [name for name in SHARES if name in ("machine", "build", *self.parts)]
        later = sum(SHARES[name] for name in chosen[chosen.index(part) + 1 :])
        return max(self.deadline - time.monotonic() - self.scale * later, 0.0)

    def silence(self, part: str) -> float:
        return max(SILENCE[part] * min(self.scale, 1.0), 2.0)

    def do(self, part: str, work: Callable[[float], str]) -> None:
        """One part: what it says, what it took, and the tables anew, whatever becomes of it."""
        limit, began = self.limit(part), time.monotonic()
        print(f"\n{part} (up to {limit:.0f} s)", flush=True)
        why = "interrupted"
        try:
            why = work(limit) if limit > 0 else "no time was left for it"
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        finally:
            took = round(time.monotonic() - began, 1)
            print(f"{part}: {took} s{f', {why}' if why else ''}", flush=True)
            self.wrong += [f"{part}: {why}"] if why else []
            if "gpu" in self.facts:
                self.ledger.close(part, "cut off", why)
                self.ledger.append(part=part, took=took, limit=round(limit, 1), why=why)
                self.wrong += failures(self.ledger, part)
                self._tables()

    def _tables(self) -> None:
        try:
            gpu_report.write(self.stem, self.ledger)
        except (
            Exception
        ) as error:  # the lines are there, and the parts to come are worth more than a table
            self.wrong.append(f"the tables: {type(error).__name__}: {error}")

    def machine(self, limit: float) -> str:
        facts = self.folder / "gpu-check.json"
        facts.unlink(missing_ok=True)
        command = [sys.executable, str(HERE / "machine.py"), "--to", str(facts)]
        ended = bounded.run(command, seconds=limit, log=self.log)
        if not facts.exists():
            return ended.why or f"the machine cannot be described: {self.log} says why"
        self.facts = json.loads(facts.read_text())
        facts.unlink()
        if "gpu" not in self.facts:
            return f"torch {self.facts['torch']} of {sys.executable} sees no CUDA device"
        name = re.sub(r"[^a-z0-9]+", "-", self.facts["gpu"].lower()).strip("-")
        chosen = "" if list(PARTS) == self.parts else f"-{'-'.join(self.parts)}"
        self.stem = self.folder / f"{name}{chosen}"
        self.log = self.log.rename(self.beside(".log"))
        self.ledger = Ledger(self.beside(".jsonl"))
        for old in (self.ledger.path, self.beside("-tests.xml")):
            old.unlink(missing_ok=True)
        self.ledger.append(part="machine", facts=self.facts)
        print("\n".join(f"  {key}: {value}" for key, value in self.facts.items()), flush=True)
        return ""

    def beside(self, ending: str) -> Path:
        return self.stem.with_name(self.stem.name + ending)

    def build(self, limit: float) -> str:
        architecture = os.environ.get("FASTFT_CUDA_ARCHS", self.facts["architecture"])
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        more = {"FASTFT_CUDA_ARCHS": architecture}
        began = time.monotonic()
        ended = bounded.run(command, seconds=limit, log=self.log, more=more)
        if ended.why or ended.status:
            return ended.why or f"status {ended.status}"
        left = limit - (time.monotonic() - began)
        # which engines there are
        bounded.run([sys.executable, "-m", "fastft"], seconds=left, log=self.log)
        info = json.loads((ROOT / "fastft" / "_lib" / "build_info.json").read_text())
        missing = [
            f"no {kind} library: {built['missing']}"
            for kind, built in info.items()
            if "missing" in built
        ]
        return "; ".join(missing)[-600:]

    def smoke(self, limit: float) -> str:
        return self._cases("smoke", [HERE / "test_smoke.py"], limit)

    def ops(self, limit: float) -> str:
        if not self.facts["packages"].get("pytest_benchmark"):
            return "pytest-benchmark is not importable: no benchmark has run"
        return self._cases(
            "ops", [HERE / f"test_{stem}.py" for stem in OPS], limit, "--benchmark-only"
        )

    def _cases(self, part: str, files: list[Path], limit: float, *options: str) -> str:
        if not self.facts["packages"].get("pytest"):
            return "pytest is not importable"
        shared = {"seconds": limit, "silence": self.silence(part), "log": self.log}
        return one_by_one.run(files, self.ledger, part, options=options, **shared)

    def tests(self, limit: float) -> str:
        if not self.facts["packages"].get("pytest"):
            return "pytest is not importable"
        marked = re.compile(r"^(@|pytestmark = )pytest\.mark\.gpu\b", re.M)
        files = [
            path
            for path in sorted((ROOT / "tests").rglob("test_*.py"))
            if marked.search(path.read_text())
        ]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "-p",
            "pytest_ledger",
            "-p",
            "no:cacheprovider",
        ]
        command += [
            f"--ledger={self.ledger.path}",
            "--part=tests",
            f"--junitxml={self.beside('-tests.xml')}",
        ]
        workers = min(WORKERS, os.cpu_count() or 1)
        if self.facts["packages"].get("xdist"):
            command += ["-n", str(workers), "--dist", "loadgroup"]
        else:
            print("  pytest-xdist is not importable: one test after another", flush=True)
        threads = str(max((os.cpu_count() or 1) // workers, 1))
        self.ledger.news()
        ended = bounded.run(
            [*command, *map(str, files)],
            seconds=limit,
            silence=self.silence("tests"),
            log=self.log,
            heard=self.ledger.news,
            more={"OMP_NUM_THREADS": threads},
        )
        if ended.why:
            return ended.why
        return "" if ended.status in (0, 1) else f"pytest ended with status {ended.status}"

    def sanitize(self, limit: float) -> str:
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        places = [None, f"{home}/bin", f"{home}/compute-sanitizer"]
        found = (shutil.which("compute-sanitizer", path=place) for place in places)
        sanitizer = next(filter(None, found), None)
        # the launches are ours, what torch asks of the runtime by trial is not
        options = [f"--error-exitcode={REPORTED}", "--report-api-errors=no", "--print-limit=20"]
        # each tensor is then memory of its own, whose ends are known
        more = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        end = time.monotonic() + limit
        for number, tool in enumerate(SANITIZERS):
            line = {"part": "sanitize", "case": f"compute-sanitizer[{tool}]"}
            if sanitizer is None:
                self.ledger.append(**line, outcome="skipped", said="no compute-sanitizer is found")
                continue
            command = [sanitizer, f"--tool={tool}", *options, sys.executable]
            share = (end - time.monotonic()) / (len(SANITIZERS) - number)
            ended = bounded.run(
                [*command, str(HERE / "launches.py")], seconds=share, log=self.log, more=more
            )
            outcome = "cut off" if ended.why else "failed" if ended.status else "passed"
            reported = f"{self.log.name} has its reports" if ended.status == REPORTED else ""
            said = ended.why or reported or f"status {ended.status}"
            self.ledger.append(**line, outcome=outcome, seconds=round(ended.seconds, 1), said=said)
        self.ledger.news()
        return ""

    def train(self, limit: float) -> str:
        end, said, cases = time.monotonic() + limit, [], [*VARIANTS, BIG]
        if not self.facts["packages"].get("liger_kernel"):
            cases.remove("liger")
            self.ledger.append(
                part="train", case="training[liger]", outcome="skipped", said="no liger_kernel"
            )
        for number, case in enumerate(cases):
            parts = len(cases) - number - 1 + BIG_SHARE
            share = (end - time.monotonic()) * (BIG_SHARE if case == BIG else 1) / parts
            script = ["offloading.py"] if case == BIG else ["training.py", "--variant", case]
            command = [sys.executable, str(HERE / script[0]), *script[1:]]
            command += ["--ledger", str(self.ledger.path)]
            ended = bounded.run(command, seconds=share, log=self.log, heard=self.ledger.news)
            why = ended.why or f"its process ended with status {ended.status}"
            self.ledger.close("train", "cut off" if ended.why else "died", why)
            if f"training[{case}]" not in self.ledger.cases("train"):
                said.append(f"{case}: {why}")
        self.ledger.news()
        return "; ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; default: all"
    )
    parser.add_argument(
        "--seconds", type=float, default=TOTAL, help=f"of all together (default: {TOTAL:.0f})"
    )
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"a part must be one of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended with us
    folder = Path(os.environ.get("OUT") or HERE / "results").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    check = Check(
        [part for part in PARTS if part in (options.parts or PARTS)], options.seconds, folder
    )
    check.do("machine", check.machine)
    if "gpu" not in check.facts:
        raise SystemExit(check.wrong[-1])
    for part in ("build", *check.parts):
        check.do(part, getattr(check, part))
    print(f"\n{gpu_report.summary(check.ledger)}\n\nAll of it: {check.stem}.*", flush=True)
    if check.wrong:
        raise SystemExit(f"{len(check.wrong)} things are not as they should be")


if __name__ == "__main__":
    main()
