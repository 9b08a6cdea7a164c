"""`python -m fastft estimate MODEL`: the peak memory of a training, from the model's configuration.

Trainer's own steps are run by shapes alone (fastft/unallocated.py), stock and with each piece of
fastft, and what is live at the peak is counted by what it is for. Nothing is downloaded but the
configuration, and nothing is computed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.commands.pieces import PIECES, pieces_of

if TYPE_CHECKING:
    from fastft.integrations.estimated_training import Memory, Training

COLUMNS = {
    "stock": (),
    "+loss": ("loss",),
    "+AdamW": ("optimizer",),
    "+packing": ("packing",),
    "all": ("loss", "optimizer", "packing"),
}
# what each column is called in a sentence
_WORDS = {
    "+loss": "the fused loss makes",
    "+AdamW": "fastft's AdamW makes",
    "+packing": "packing makes",
    "all": "all pieces of fastft make",
}
# of --offload: tiers by name, in the order of what they cost
TIERS: dict[str, str | None] = {
    "none": None,
    "states": "states",
    "gradients": "gradients",
    "overlap": "overlap",
}
# "overlap" takes as much memory as "gradients", and a look at a weight may be stale
_BY_ITSELF = ("none", "states", "gradients")
_MOMENTS = ("fp32", "bf16", "8bit", "4bit")
# that take less memory, the exacter ones first
_SMALLER = {moments: _MOMENTS[i + 1 :] for i, moments in enumerate(_MOMENTS)}
_Measure = Any  # (Training, pieces) -> Memory
_Columns = dict[str, "tuple[Training, frozenset[str]]"]
_UNITS = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_LEAST = 1 << 20  # bytes: a number below it has lost its unit
# CUDA's context and what its allocator keeps beside live tensors
_OVERHEAD = {"cuda": 1 << 30, "cpu": 0}


def main(arguments: list[str]) -> int:
    """Prints the table; 2: a sentence says why there is none."""
    options = _parser().parse_args(arguments)
    try:
        return _estimate(options)
    except ValueError as error:
        print(f"fastft estimate: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastft estimate",
        description="The peak memory of a training with Trainer, by parts, from the configuration "
        "alone: stock, with each piece of fastft, and with all.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder, a config.json, or a model of the hub")
    add("--max-tokens", type=int, default=1024, help="tokens of a row (default: 1024)")
    add("--rows", type=int, default=1, help="rows of a batch (default: 1)")
    add("--padding", type=float, default=0.0, help="share of padding in stock's batch, 0.54 e.g.")
    add("--dtype", choices=("fp32", "bf16"), default="bf16", help="of the weights (default: bf16)")
    add("--autocast", action="store_true", help="fp32 weights, computing in bf16: bf16=True")
    add("--checkpointing", action="store_true", help="Trainer's gradient checkpointing")
    add("--accumulation", type=int, default=1, help="micro-steps of a step (default: 1)")
    add("--lora", type=int, default=0, metavar="R", help="adapters of this rank on all layers")
    add("--optim", default="adamw_torch_fused", help="stock's optimizer, as Trainer names it")
    add("--moments", choices=_MOMENTS, default="fp32", help="of fastft's AdamW")
    add(
        "--rounding",
        choices=("exact", "kahan", "stochastic", "nearest"),
        default="exact",
        help="of bf16 weights in fastft's AdamW",
    )
    add(
        "--offload",
        choices=(*TIERS, "auto", "each"),
        default="none",
        help="what of fastft's AdamW is on the host: a tier; auto: the first that fits --memory; "
        "each: a column of all pieces for each tier",
    )
    add("--release-gradients", action="store_true", help="fastft's AdamW uses them up in backward")
    add("--label-smoothing", type=float, default=0.0, help="Trainer's label_smoothing_factor")
    add("--attention", help="stock's attention: sdpa, eager (default: the model's choice)")
    add(
        "--only",
        type=pieces_of,
        metavar="PIECES",
        help=f"a column of these alone: some of {', '.join(PIECES)}, with commas between",
    )
    add("--device", choices=tuple(_OVERHEAD), default="cuda", help="assumed (default: cuda)")
    add("--memory", help="what there is, 24GB e.g.: what fits, and what would make it fit")
    add("--overhead", help="of --memory, what no tensor has (default: 1GB on cuda, 0 on cpu)")
    add("--json", type=Path, metavar="FILE", help="writes all figures, in bytes")
    return parser


def parse_bytes(name: str, text: str) -> int:
    """Bytes of `24GB`, `24GiB`, `24g` or `25769803776`: all units are powers of 1024, as memory is
    sold.

    Raises:
        ValueError: it is no amount.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    amount = 0 if found is None else int(float(found[1]) * 2 ** _UNITS[found[2]])
    if amount < _LEAST:
        raise ValueError(f"{name} must be an amount of memory like 24GB, got {text!r}")
    return amount


def _estimate(options: argparse.Namespace) -> int:
    memory = None if options.memory is None else parse_bytes("--memory", options.memory)
    overhead = _OVERHEAD[options.device]
    if options.overhead is not None:
        overhead = 0 if options.overhead == "0" else parse_bytes("--overhead", options.overhead)
    limit = None if memory is None else memory - overhead
    _check(options)
    training, measured = _prepared(options)
    columns = _columns(options, training)
    results: dict[str, Memory] = {}
    refused: dict[str, str] = {}
    if options.offload == "auto":
        training, columns, said = _tier_that_fits(training, columns, limit or 0, measured)
    for column, (asked, pieces) in columns.items():
        try:
            results[column] = measured(asked, pieces)
        except ValueError as error:
            if column == next(iter(columns)):
                raise
            refused[column] = str(error)
    title = _title(options, training)
    lines = [title, "", *_table(results), ""]
    lines += [said] if options.offload == "auto" else []
    lines += [f"{column}: {reason}" for column, reason in refused.items()]
    found: dict[str, Any] = {"title": title, "columns": _plain(results), "refused": refused}
    found |= {"offload": training.offload} if options.offload == "auto" else {}
    if memory is not None and limit is not None:
        sentence, fits = _advice(training, results, limit, measured)
        assumed = f", of which {_size(overhead)} for {options.device} itself" if overhead else ""
        lines.append(f"in {_size(memory)}{assumed}: {sentence}")
        found |= {"memory": memory, "overhead": overhead, "fits": fits, "advice": sentence}
    print("\n".join(lines))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _columns(options: argparse.Namespace, training: Training) -> _Columns:
    """What is estimated, by the name of its column."""
    if options.only is not None:
        return {" + ".join(options.only): (training, frozenset(options.only))}
    if options.offload == "each":
        pieces = frozenset(COLUMNS["all"])
        tiers = {
            name: (dataclasses.replace(training, offload=tier), pieces)
            for name, tier in TIERS.items()
        }
        return {"stock": (training, frozenset()), **tiers}
    return {name: (training, frozenset(pieces)) for name, pieces in COLUMNS.items()}


def _tier_that_fits(
    training: Training, columns: _Columns, limit: int, measured: _Measure
) -> tuple[Training, _Columns, str]:
    """The training and the columns in the first tier whose last column fits, and what to say."""
    over = list[str]()
    for name in _BY_ITSELF:
        training = dataclasses.replace(training, offload=TIERS[name])
        columns = {column: (training, pieces) for column, (_, pieces) in columns.items()}
        peak = _last(columns, measured)
        if peak <= limit:
            break
        over.append(f"{name} takes {_size(peak)}")
    chosen = f"--offload auto takes {name}"
    why = f", as {' and '.join(over)}" if over else ", as all fits on the device"
    return training, columns, chosen + why


def _last(columns: _Columns, measured: _Measure) -> int:
    """The peak of the last column that there is."""
    error = ValueError("there is no column")
    for training, pieces in reversed(columns.values()):
        try:
            return int(measured(training, pieces).bytes)
        except ValueError as refused:
            error = refused
    raise error


def _check(options: argparse.Namespace) -> None:
    for name, least in (("max_tokens", 2), ("rows", 1), ("accumulation", 1), ("lora", 0)):
        value = getattr(options, name)
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if not 0 <= options.padding < 1:
        raise ValueError(f"--padding must be a share from 0 to below 1, got {options.padding}")
    most = (options.rows - 1) * (options.max_tokens - 1) / (options.rows * options.max_tokens)
    if options.padding > most:
        raise ValueError(
            f"--padding {options.padding} is too much for --rows {options.rows}: the longest row "
            f"has none, the others a token at least, which makes {most:.2f}"
        )
    if options.autocast and options.dtype != "fp32":
        raise ValueError("--autocast computes in bf16 from fp32 weights: add --dtype fp32")
    if options.offload == "auto" and options.memory is None:
        raise ValueError("--offload auto takes what fits into --memory: add --memory 24GB e.g.")
    if options.release_gradients and options.offload != "none":
        raise ValueError(
            f"--release-gradients leaves no gradients to --offload {options.offload}: take one of "
            "them"
        )
    if options.release_gradients and options.accumulation > 1:
        raise ValueError(
            f"--release-gradients uses each gradient up in backward, which --accumulation "
            f"{options.accumulation} would add to: take --offload gradients"
        )
    if options.only is not None and options.offload == "each":
        raise ValueError("--offload each has a column for each tier: leave out --only")
    if options.only is not None and options.offload != "none" and "optimizer" not in options.only:
        raise ValueError(
            f"--offload is of fastft's AdamW, which --only {','.join(options.only)} leaves out"
        )
    if options.json is not None and not options.json.parent.is_dir():
        raise ValueError(f"--json: there is no folder {str(options.json.parent)!r}")


def _prepared(options: argparse.Namespace) -> tuple[Training, _Measure]:
    """The training asked for, and what measures one by shapes."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError("this needs transformers: pip install transformers") from error
    from fastft.integrations import estimated_training
    from fastft.integrations.configuration import load_config
    from fastft.unallocated import Unallocated, UnknownNumbers

    transformers.logging.set_verbosity_error()

    def measured(training: Training, pieces: frozenset[str]) -> Memory:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                counter = Unallocated(device=options.device)
                return estimated_training.measure(training, pieces, counter)
        except UnknownNumbers as error:
            raise ValueError(
                f"the memory of this model depends on its numbers, so that nobody knows it "
                f"beforehand: {error}"
            ) from error
        except OSError as error:
            raise ValueError(f"tensors without memory are not possible here: {error}") from error
        except ValueError:
            raise
        except Exception as error:  # whatever the model's code, or a package, has to say
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"this training raises before its end: {reason}") from error

    same = {field.name for field in dataclasses.fields(estimated_training.Training)}
    given = {name: value for name, value in vars(options).items() if name in same}
    config = load_config(options.model)
    estimated_training.task_of(config)
    given["offload"] = TIERS.get(options.offload)
    training = estimated_training.Training(config, tokens=options.max_tokens, **given)
    return training, measured


def _title(options: argparse.Namespace, training: Training) -> str:
    rows = f"{options.rows} row{'s' if options.rows > 1 else ''} of {options.max_tokens} tokens"
    parts = [rows, f"{options.dtype} weights"]
    parts += [f"{options.padding:.0%} padding"] if options.padding else []
    parts += ["bf16 autocast"] if options.autocast else []
    parts += ["checkpointing"] if options.checkpointing else []
    parts += [f"{options.accumulation} micro-steps"] if options.accumulation > 1 else []
    parts += [f"LoRA of rank {options.lora}"] if options.lora else []
    in_bf16 = options.dtype == "bf16" and not options.lora
    parts += [f"stock: {options.optim}{', its moments in bf16' if in_bf16 else ''}"]
    parts += [f"fastft: {options.moments} moments" + f", {options.rounding} rounding" * in_bf16]
    parts += [f"offload {training.offload}"] if training.offload else []
    parts += ["gradients released in backward, no clipping"] if training.release_gradients else []
    name = (training.config.architectures or [training.config.model_type])[0]
    return f"{name}: {', '.join(parts)}; device {options.device}"


def _table(results: dict[str, Memory]) -> list[str]:
    """The figures in GiB, a line for each part."""
    shown: dict[str, Callable[[Memory], str]] = {
        role: lambda memory, role=role: _gib(memory.training.parts[role])  # type: ignore[misc]
        for role in next(iter(results.values())).training.parts
    }
    shown |= {
        "peak of a step": lambda memory: _gib(memory.training.bytes),
        "  which is in": lambda memory: memory.training.phase,
        "logits at their most": lambda memory: _gib(memory.training.logits),
        "peak of evaluation": lambda memory: _gib(memory.evaluation.bytes),
    }
    if any(memory.host for memory in results.values()):
        shown["on the host"] = lambda memory: _gib(memory.host)
    rows = [["GiB", *results]]
    rows += [[name, *map(figure, results.values())] for name, figure in shown.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def _plain(results: dict[str, Memory]) -> dict[str, Any]:
    return {column: dataclasses.asdict(memory) for column, memory in results.items()}


def _advice(
    training: Training, results: dict[str, Memory], limit: int, measured: _Measure
) -> tuple[str, dict[str, bool]]:
    """What fits into `limit` bytes, and the first change that makes it fit."""
    fits = {column: memory.bytes <= limit for column, memory in results.items()}
    if not results.keys() <= COLUMNS.keys():
        return _which_fit(fits), fits
    first = next((column for column, fit in fits.items() if fit), None)
    if all(fits.values()):
        return "it fits, stock and with fastft", fits
    if first == "stock":
        return _stock_alone(training, fits, limit, measured), fits
    if first is not None:
        return f"stock does not fit; {_WORDS[first]} it fit", fits
    pieces = frozenset(COLUMNS["all" if "all" in results else "+loss"])
    taken = ["fastft"]
    for words, changed in _changes(training):
        training = changed
        taken.append(words)
        try:
            memory = measured(training, pieces)
        except ValueError:
            continue
        if memory.bytes <= limit:
            return f"it does not fit; with {', '.join(taken)} it does: {_sizes(memory)}", fits
    return f"it does not fit, not even with {', '.join(taken)}", fits


def _which_fit(fits: dict[str, bool]) -> str:
    """Which columns fit, where they are not the usual ones."""
    good = [column for column, fit in fits.items() if fit]
    bad = [column for column, fit in fits.items() if not fit]
    said = [f"{' and '.join(good)} fit{'s' if len(good) == 1 else ''}"] if good else []
    said += [f"{' and '.join(bad)} do{'es' if len(bad) == 1 else ''} not fit"] if bad else []
    return "; ".join(said)


def _stock_alone(training: Training, fits: dict[str, bool], limit: int, measured: _Measure) -> str:
    """What to say where stock fits and a column of fastft does not, and what makes it fit."""
    over = [column for column, fit in fits.items() if not fit]
    said = f"stock fits; {' and '.join(over)} do{'es' if len(over) == 1 else ''} not"
    if not any("optimizer" in COLUMNS[column] for column in over):
        return said
    if training.dtype == "bf16":
        said += ", as fastft's AdamW keeps in fp32 what stock rounds to bf16"
    smaller: list[tuple[str, dict[str, Any]]] = []
    smaller += [(f"--offload {tier}", {"offload": tier}) for tier in _further(training)]
    smaller += [(f"--moments {name}", {"moments": name}) for name in _SMALLER[training.moments]]
    for words, values in smaller:
        changed = dataclasses.replace(training, **values)
        memories = [measured(changed, frozenset(COLUMNS[column])) for column in over]
        most = max(memories, key=lambda memory: memory.bytes)
        if most.bytes <= limit:
            return f"{said}; with {words} it fits: {_sizes(most)}"
    return said


def _further(training: Training) -> list[str]:
    """The tiers that leave less on the device, exact all of them."""
    if training.release_gradients or training.lora:
        return []
    tiers = [TIERS[name] for name in _BY_ITSELF]
    if training.offload not in tiers:
        return []
    return [tier for tier in tiers[tiers.index(training.offload) + 1 :] if tier is not None]


def _changes(training: Training) -> list[tuple[str, Training]]:
    """Each change on top of those before it: what costs time, then what costs exactness, then what
    trains less."""
    changes = []

    def change(words: str, wanted: bool, **values: Any) -> None:
        nonlocal training
        if wanted:
            training = dataclasses.replace(training, **values)
            changes.append((words, training))

    change("--checkpointing", not training.checkpointing, checkpointing=True)
    while training.rows > 1:
        rows = training.rows // 2
        most = (rows - 1) * (training.tokens - 1) / (rows * training.tokens)
        more = training.accumulation * training.rows // rows
        padding = min(training.padding, most)
        words = f"--rows {rows} --accumulation {more}"
        change(words, True, rows=rows, accumulation=more, padding=padding)
    for tier in _further(training):
        change(f"--offload {tier}", True, offload=tier)
    is_wide = training.dtype == "fp32"
    change("--dtype bf16", is_wide, dtype="bf16", autocast=False)
    for moments in _SMALLER[training.moments]:
        change(f"--moments {moments}", True, moments=moments)
    change("--lora 16", not training.lora, lora=16)
    return changes


def _gib(count: int) -> str:
    return f"{count / 2**30:,.2f}" if count >= 1 << 27 else f"{count / 2**30:,.4f}"


def _sizes(memory: Memory) -> str:
    return _size(memory.bytes) + (f", and {_size(memory.host)} on the host" if memory.host else "")


def _size(count: int) -> str:
    return f"{_gib(count)} GiB"
