"""Plants faults, and sees whether `make fuzz` and the tests find them: writes
results/planted_faults.json and planted_faults.md.

    make planted        or: PYTHONPATH=tests python benchmarks/planted_faults.py [NAME ...]

`FORMER` are the faults of the campaign that the rooms of tests/fuzz come from. `LIKELY` are faults
that fastft has not had as far as anybody knows, of kinds that such code has, for the rooms that
found none of the former ones: each room has to find something. Each fault is planted by changing
the text of a copy of the package, and of its C++ sources, which are compiled anew; then the target
that is to find it runs on that copy. A room of tests/fuzz finds what a case can show, an ordinary
test what is none of a room's affair. Each target also runs on a copy without a fault, for as long
as it took to find the last of its faults, and has to pass. `tests/test_planted_back.py` fails where
a change does not fit the text any more.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COPIED = ("fastft", "csrc", "tests", "benchmarks", "setup.py", "pyproject.toml")
LONGEST = 1800  # seconds that a room is tried
_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}
# of a copy that cannot be run, not of one that is at fault
_BROKEN = {"ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError", "NameError"}


class Change(NamedTuple):
    """`old`, which stands in the file once, becomes `new`."""

    file: str
    old: str
    new: str


class Fault(NamedTuple):
    """`target`: a room of tests/fuzz, or the name of a test."""

    name: str
    what: str
    target: str
    changes: tuple[Change, ...]


class Outcome(NamedTuple):
    """`seconds`: of a processor. `cases`: of a room, until one shows it, or all. `shown`: the
    exception by which the target says it."""

    found: bool
    seconds: float
    cases: int | None
    shown: str


FORMER = (
    Fault(
        "r01",
        "a save that ends early has removed the earlier weights",
        "fp32_weights",
        (
            Change(
                "fastft/optim/weight_files.py",
                "        (folder / _ASIDE).mkdir()\n        yield\n",
                "        (folder / _ASIDE).mkdir()\n"
                '        for file in folder.glob("model*"):\n'
                "            file.unlink()\n"
                "        yield\n",
            ),
        ),
    ),
    Fault(
        "r02",
        "integers, doubles and complex numbers of a file of weights go through fp32",
        "fp32_weights",
        (
            Change(
                "fastft/optim/fp32_weights.py",
                '"BF16": torch.bfloat16}',
                '"BF16": torch.bfloat16, "I64": torch.int64, "F64": torch.float64, '
                '"C64": torch.complex64}',
            ),
        ),
    ),
    Fault(
        "r03",
        "a column of lists that has no token in a batch is refused",
        "collator",
        (
            Change(
                "fastft/data/columns.py",
                "torch.frombuffer(memory, dtype=torch.int64) if memory else torch.empty(0).long()",
                "torch.frombuffer(memory, dtype=torch.int64)",
            ),
        ),
    ),
    Fault(
        "r04",
        "`balance` shares examples out across windows",
        "plan",
        (
            Change(
                "fastft/data/balance.py",
                "begin = int(torch.searchsorted(plan.windows[:end], window))",
                "begin = 0",
            ),
        ),
    ),
    Fault(
        "r05",
        "a copy of lazy logits shares what the backward pass reads",
        "lazy_logits",
        (
            Change(
                "fastft/loss/lazy/logits.py",
                "return dense.clone() if self._recipe.is_copy else dense",
                "return dense",
            ),
        ),
    ),
    Fault(
        "r06",
        "the number of a binding is its address",
        "tests/optim/test_adamw_bindings.py",
        (
            Change(
                "csrc/include/live_table.h",
                "    FT_CHECK(found != objects_.end(),",
                "    if (found == objects_.end())\n"
                "      return std::shared_ptr<T>(reinterpret_cast<T*>(number), [](T*) {});\n"
                "    FT_CHECK(found != objects_.end(),",
            ),
        ),
    ),
    Fault(
        "r07",
        "of a library of the right size, damaged blocks are loaded",
        "tests/test_native.py",
        (
            Change(
                "fastft/_native.py",
                'if hashlib.sha256(path.read_bytes()).hexdigest() != built.get("sha256"):',
                "if path.stat().st_size < 2**18:",
            ),
        ),
    ),
    Fault(
        "r08",
        "columns of the examples replace the boundaries of a batch",
        "collator",
        (Change("fastft/data/keys.py", "    if taken is not None:\n", "    if False:\n"),),
    ),
    Fault(
        "r09",
        "after an exception the next callback leaves the model patched for good",
        "plug",
        (
            Change(
                "fastft/integrations/packing.py",
                "        for stale in list(callbacks):\n            stale.restore()\n",
                "",
            ),
            Change(
                "fastft/loss/lazy/output_head.py",
                "        if isinstance(stale, LazyForward):\n            stale.remove()\n",
                "        if False:\n",
            ),
        ),
    ),
    Fault(
        "r10",
        "moments that are codes load without one of their scales",
        "checkpoints",
        (
            Change(
                "fastft/optim/checkpoint.py",
                "if missing := set(ENTRIES) - entries.keys():",
                "if missing := {SCALES[0]} - entries.keys():",
            ),
            Change(
                "fastft/optim/checkpoint.py",
                "    for name, dtypes in kinds.items():\n",
                "    for name in kinds.keys() & entries.keys():\n        dtypes = kinds[name]\n",
            ),
            Change(
                "fastft/optim/checkpoint.py",
                "        if entries[name].shape != needed:\n",
                "        if name in entries and entries[name].shape != needed:\n",
            ),
        ),
    ),
    Fault(
        "r11",
        "a row of the table that no table has is read",
        "tests/optim/test_adamw_bindings.py",
        (Change("csrc/include/adamw_args.h", " && entry[0] < kMostRows", ""),),
    ),
    Fault(
        "r12",
        "`balance` compares each example with each",
        "tests/data/test_balance.py",
        (
            Change(
                "fastft/data/balance.py",
                "place = bisect_left(packs[pack], (gap / 2, -1))",
                "place = sum(entry < (gap / 2, -1) for entry in packs[pack])",
            ),
        ),
    ),
    Fault(
        "r13",
        "an index of weights names files outside of its folder",
        "fp32_weights",
        (
            Change(
                "fastft/optim/weight_files.py",
                'file in ("", ".", "..") or re.search(r"[/\\\\\\0]", file)',
                'file in ("", ".", "..")',
            ),
        ),
    ),
    Fault(
        "r13b",
        "a tensor that two files have comes from the last",
        "fp32_weights",
        (
            Change(
                "fastft/optim/weight_files.py",
                "if weight_map is None or weight_map.get(name) == file:",
                "if True:",
            ),
        ),
    ),
    Fault(
        "r14",
        "the loss of 16-bit lazy logits and fp32 probabilities has 16 bits",
        "lazy_logits",
        (
            Change(
                "fastft/loss/lazy/losses.py",
                'dtype = func(no_logits, target[:0], weight=weight, reduction="none").dtype',
                "dtype = no_logits.dtype",
            ),
        ),
    ),
    Fault(
        "r15",
        "functions of transposed lazy logits have strides that torch's have not",
        "lazy_logits",
        (
            Change(
                "fastft/loss/lazy/rules.py",
                "return lazy.derived(call, on_meta(lazy, func, args, call.keywords))",
                "return lazy.derived(call, torch.empty_like(lazy.shadow))",
            ),
        ),
    ),
)

LIKELY = (
    Fault(
        "n01",
        "decay makes weights larger where a group maximizes",
        "adamw",
        (
            Change(
                "fastft/optim/groups.py",
                "        1 - lr * weight_decay,\n",
                "        1 - sign * lr * weight_decay,\n",
            ),
        ),
    ),
    Fault(
        "n02",
        "a bias that tiles share has the gradient of the last tile",
        "attention",
        (
            Change(
                "fastft/attention/segment_attention.py",
                "part += d_s.sum_to_size(part.shape)",
                "part.copy_(d_s.sum_to_size(part.shape))",
            ),
        ),
    ),
    Fault(
        "n03",
        "a window ends one key too early for the last query of a block",
        "attention",
        (
            Change(
                "fastft/attention/attention_tiles.py",
                "high = min(high, k0 + stop - q0 + self.window - 1)",
                "high = min(high, k0 + stop - q0 + self.window - 2)",
            ),
        ),
    ),
    Fault(
        "n04",
        "the gradients of log sum exp and entropy have changed places",
        "log_probs",
        (
            Change(
                "fastft/loss/linear_log_probs.py",
                "upstream = [-log_probs, of_lse, entropy]",
                "upstream = [-log_probs, entropy, of_lse]",
            ),
        ),
    ),
    Fault(
        "n05",
        "means of logits are not scaled",
        "log_probs",
        (
            Change(
                "fastft/loss/linear_log_probs.py",
                "call.options.logit_scale / len(operands[1])",
                "1.0 / len(operands[1])",
            ),
        ),
    ),
    Fault(
        "n06",
        "the mean of weighted losses counts the weights of ignored rows",
        "losses",
        (
            Change(
                "fastft/loss/options.py",
                "(weight[index] * counted).sum()",
                "weight[index].sum()",
            ),
        ),
    ),
    Fault(
        "n07",
        "the kernel's gradient of the z term leaves out what comes from above",
        "losses",
        (
            Change(
                "csrc/include/cross_entropy_math.h",
                "2.0 * terms.z_loss * terms.upstream_loss * lse",
                "2.0 * terms.z_loss * lse",
            ),
        ),
    ),
    Fault(
        "n08",
        "the first row of a table's chunk is looked for in the one before",
        "pack",
        (
            Change(
                "fastft/data/column_rows.py",
                "bisect.bisect_right(self._firsts, row) - 1",
                "max(0, bisect.bisect_left(self._firsts, row) - 1)",
            ),
        ),
    ),
    Fault(
        "n09",
        "packs are drawn for the first epoch alone",
        "pack",
        (
            Change(
                "fastft/data/packed.py",
                "if self._drawn is None or self._drawn[0] != epoch:",
                "if self._drawn is None:",
            ),
        ),
    ),
    Fault(
        "n10",
        "positions run on through the padding of a decoder's row",
        "speech",
        (
            Change(
                "fastft/data/tasks/speech_seq2seq.py",
                "place if place < length else 0  #",
                "place  #",
            ),
        ),
    ),
    Fault(
        "n11",
        "a stream that goes on counts its examples from 0 again",
        "streams",
        (
            Change(
                "fastft/data/streaming.py",
                'self._seen, self._source = state["seen"], state["source"]',
                'self._seen, self._source = 0, state["source"]',
            ),
        ),
    ),
    Fault(
        "n12",
        "labels are smoothed over the classes of this process alone",
        "vocab_parallel",
        (
            Change(
                "fastft/loss/vocab_parallel.py",
                "self.spread = options.label_smoothing / shard.classes",
                "self.spread = options.label_smoothing / count",
            ),
        ),
    ),
)
FAULTS = FORMER + LIKELY


def plant(fault: Fault, root: Path) -> None:
    """Changes the text under `root`.

    Raises:
        ValueError: a text to be changed is not there once.
    """
    for file, old, new in fault.changes:
        text = (root / file).read_text()
        if text.count(old) != 1:
            raise ValueError(f"{fault.name}: {file} has {text.count(old)} times {old!r}")
        (root / file).write_text(text.replace(old, new))


def copied(to: Path) -> None:
    """All that a target needs."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            unneeded = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(ROOT / name, to / name, ignore=unneeded)
        else:
            shutil.copy2(ROOT / name, to / name)


def build(root: Path) -> None:
    """Compiles the CPU library of a copy, quickly."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {**os.environ, "FASTFT_BUILD_CUDA": "0", "FASTFT_CXXFLAGS": "-O1"}
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True)


def run(target: str, root: Path, seconds: float, seed: int = 0) -> Outcome:
    """Runs a target on a copy.

    Raises:
        RuntimeError: the target could not be run, or its failure says nothing of a fault.
    """
    room = not target.startswith("tests/")
    asked = [f"tests/fuzz/test_fuzz.py::test_room[{target}]"] if room else [target]
    if room:
        asked += [f"--fuzz-seconds={seconds:g}", f"--fuzz-seed={seed}", "--fuzz-first"]
    report = root / "report.xml"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "--tb=short", *asked]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    begin = _of_children()
    done = subprocess.run(
        [*command, "--junit-xml", str(report)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    passed = _of_children() - begin
    if -done.returncode in _CRASHES:  # it has ended the process, as it did then
        return Outcome(True, passed, None, f"signal {-done.returncode}")
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{target} could not be run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    tests = list(ElementTree.parse(report).iter("testcase"))
    if done.returncode == 0:
        tried = re.search(r" ([\d,]+) cases", _fuzzed(tests)) if room else None
        return Outcome(False, passed, int(tried[1].replace(",", "")) if tried else None, "")
    return Outcome(True, passed, *_finding(target, room, tests))


def _fuzzed(tests: list[ElementTree.Element]) -> str:
    """What a room has said of its cases."""
    said = (each for test in tests for each in test.iter("property"))
    return next((each.get("value", "") for each in said if each.get("name") == "fuzzed"), "")


def _finding(target: str, room: bool, tests: list[ElementTree.Element]) -> tuple[int | None, str]:
    """The case, and the exception, by which a test has failed that looks for faults.

    Raises:
        RuntimeError: nothing was tested, or what has failed is the copy, not what it computes.
    """
    failure = next((failed for test in tests for failed in test.iter("failure")), None)
    if failure is None:  # of a collection, or a fixture
        error = next((error for test in tests for error in test.iter("error")), None)
        text = None if error is None else error.text
        raise RuntimeError(f"{target} has tested nothing: {text}")
    message = failure.get("message", "")
    case = re.search(r"^first seen in case ([\d,]+):", message, re.MULTILINE)
    kind = re.match(r"support\.fuzzing\.Found: (\w+)\(" if room else r"(?:\w+\.)*(\w+)", message)
    if kind is None or (room and case is None) or kind[1] in _BROKEN:
        raise RuntimeError(f"{target} fails, but not by a fault: {message}")
    shown = re.findall(
        r"^E +(?:support\.fuzzing\.Found: )?(\w.*)", failure.text or "", re.MULTILINE
    )
    said = (line for line in shown if not line.rstrip().endswith("Error:"))
    return int(case[1].replace(",", "")) if room and case else None, next(said, "")


def _of_children() -> float:
    """Seconds of a processor that all processes have taken which this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def find(fault: Fault, seconds: float = LONGEST, seed: int = 0) -> Outcome:
    """Plants a fault in a copy of its own, and runs its target there."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        copied(root)
        plant(fault, root)
        if any(change.file.startswith("csrc/") for change in fault.changes):
            build(root)
        return run(fault.target, root, seconds, seed)


def page(kept: dict[str, Any]) -> Iterator[str]:
    """The lines of planted_faults.md."""
    yield from (
        "# Planted faults",
        "",
        "Faults, planted one at a time into a copy of the package: is each found, by what, and",
        "how soon? Made by `make planted`. A room of `tests/fuzz` is tried from its first seed on:",
        "the number is that of the first case that shows the fault. The seconds are those of a",
        "processor for the whole process, Python and its imports too. Ordinary tests find what is",
        "none of a room's affair.",
        "",
        f"**{sum(row['found'] for row in kept['faults'])} of {len(kept['faults'])} are found.**",
    )
    rows = {row["name"]: row for row in kept["faults"]}
    for heading, faults in (
        ("Faults that fastft once had", FORMER),
        (
            "Faults of the kinds that such code has, for the rooms that the former ones leave",
            LIKELY,
        ),
    ):
        yield from ("", f"## {heading}", "")
        yield from ("| | fault | target | found in | case | by |", "|---|---|---|---:|---:|---|")
        yield from (_line(rows[fault.name]) for fault in faults if fault.name in rows)
    if kept["controls"]:
        yield from ("", "## Without a fault", "")
        yield "The targets on a copy as it is; each room for as long as its last fault took:"
        yield from ("", "| target | | cases |", "|---|---|---:|")
    for row in kept["controls"]:
        said = "finds a fault where none is" if row["found"] else "passes"
        yield f"| {_target(row['target'])} | {said} | {row['cases'] or ''} |"
    yield from ("", f"{kept['machine']}; {kept['versions']}.")


def _target(target: str) -> str:
    return f"`{target}`" if target.startswith("tests/") else f"`make fuzz`, {target}"


def _line(row: dict[str, Any]) -> str:
    seconds = f"{row['seconds']:.0f} s" if row["found"] else "not found"
    fault, case = f"{row['name']} | {row['what']} | {_target(row['target'])}", row["cases"] or ""
    return f"| {fault} | {seconds} | {case} | `{row['shown']}` |"


def save(outcomes: dict[str, Outcome], controls: dict[str, Outcome]) -> None:
    """Beside those of faults, and of targets, that were not tried again."""
    file = RESULTS / "planted_faults.json"
    earlier = json.loads(file.read_text()) if file.exists() else {}
    rows = {row["name"]: row for row in earlier.get("faults", [])}
    passed = {row["target"]: row for row in earlier.get("controls", [])}
    for fault in FAULTS:
        if fault.name in outcomes:
            told = {"name": fault.name, "what": fault.what, "target": fault.target}
            rows[fault.name] = told | _kept(outcomes[fault.name])
    passed |= {target: {"target": target} | _kept(controls[target]) for target in controls}
    facts = machine.facts()
    kept = {
        "machine": facts["cpu"],
        "versions": f"torch {facts['torch']}, transformers {facts['packages']['transformers']}",
        "faults": [rows[fault.name] for fault in FAULTS if fault.name in rows],
        "controls": [passed[target] for target in targets(FAULTS) if target in passed],
    }
    file.write_text(json.dumps(kept, indent=1) + "\n")
    (RESULTS / "planted_faults.md").write_text("\n".join(page(kept)) + "\n")


def _kept(outcome: Outcome) -> dict[str, Any]:
    brief = outcome._replace(seconds=round(outcome.seconds, 1), shown=_brief(outcome.shown))
    return brief._asdict()


def _brief(shown: str) -> str:
    """What fits into a cell, and is the same each time."""
    shown = re.sub(r"/\S*/", "", shown.split("\\n")[0])
    return shown.replace("|", " ").replace("`", "'")[:80]


def targets(faults: Sequence[Fault]) -> list[str]:
    """The targets of the faults, each once."""
    return list(dict.fromkeys(fault.target for fault in faults))


def main() -> int:
    wanted = sys.argv[1:]
    faults = [fault for fault in FAULTS if not wanted or fault.name in wanted]
    outcomes, controls = dict[str, Outcome](), dict[str, Outcome]()
    for fault in faults:
        outcomes[fault.name] = outcome = find(fault)
        print(fault.name, fault.target, *outcome, flush=True)
        save({fault.name: outcome}, {})
    for target in targets(faults):
        took = max(outcomes[fault.name].seconds for fault in faults if fault.target == target)
        controls[target] = find(Fault("none", "", target, ()), took)
        print("no fault", target, *controls[target], flush=True)
        save({}, {target: controls[target]})
    found = all(outcome.found for outcome in outcomes.values())
    return 0 if found and not any(outcome.found for outcome in controls.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
