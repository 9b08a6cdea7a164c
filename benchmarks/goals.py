"""What issue 16 promises of single operations and whole trainings on a CPU, as data: rows, rivals
and ratios."""

from __future__ import annotations

from typing import Any, NamedTuple

from tables import scatters
from turns import FAILED, STEADY

BARE, FLATTENING = "bare work", "transformers flattening"
FUSED, CLIPPED = "torch fused", "torch clip_grad_norm_ + fused"
# row: rival: its time is to be at least so many times ours
AHEAD: dict[str, dict[str, float]] = {
    "adamw_8bit[float32]": {"bitsandbytes": 15},
    "adamw_8bit[bfloat16]": {"bitsandbytes": 15},
    "adamw[50M_fp32]": {FUSED: 1.0},
    "adamw_clipped[50M_fp32]": {CLIPPED: 1.35},
    "adamw_clipped[50M_bf16]": {CLIPPED: 1.3},
    "adamw[400_mixed]": {FUSED: 2.5},
    "adamw[400_bf16]": {FUSED: 2.5},
    "adamw_clipped[400_mixed]": {CLIPPED: 3},
    "adamw_clipped[400_bf16]": {CLIPPED: 3},
    "adamw[1000x256_fp32]": {FUSED: 8},
    "adamw_clipped[1000x256_fp32]": {CLIPPED: 8},
    "adamw_bf16_modes[exact_bf16_moments]": {"ours, fp32 moments": 1},
    "adamw_bf16_modes[exact_8bit_moments]": {"ours, fp32 moments": 1},
    "adamw_bf16_modes[stochastic_bf16_moments]": {"ours, fp32 moments": 1},
    "adamw_bf16_modes[stochastic_8bit_moments]": {"ours, fp32 moments": 1},
    "collate[list-ids_and_labels]": {FLATTENING: 8},
    "collate[numpy-ids_and_labels]": {FLATTENING: 40},
    "collate_from_arrow": {FLATTENING: 40},
    "linear_cross_entropy[fp32-trainable-all_counted]": {"torch eager": 1.3, "transformers": 1.7},
    "linear_cross_entropy[bf16-trainable-all_counted]": {"torch eager": 1.3, "transformers": 1.7},
    "cross_entropy[bf16-plain]": {"torch": 2},
    "import": {"torch": 1 / 0.03},
}
# row: ours is to take at most so many times the bare work
OF_THE_BARE_WORK = {
    "linear_cross_entropy[fp32-trainable-all_counted]": 1.0,
    "linear_cross_entropy[bf16-trainable-all_counted]": 1.1,
}
EXACT_BF16, OF_THE_BOUND = "adamw[50M_bf16]", 0.9  # or 1.2 times torch's
SHARED_KEYS = "packed_attention[2048-causal-bf16]"  # errors not above sdpa's
ROWS = (*AHEAD, EXACT_BF16, SHARED_KEYS)
# training: how many times as fast as stock with AVX2 and with AVX-512, at which share of its peak
WHOLE_RUNS: dict[str, tuple[float, float, float | None]] = {
    "whole_demo": (3.5, 5, 0.40),
    "whole_smollm2": (3, 3, 0.50),
    "whole_smollm2_rows": (1.5, 1.5, None),
}


class Reached(NamedTuple):
    """`allowed`: the rival's time / that of the bare work, or / the bound, in the same run; a goal
    beyond it is out of reach for whoever does that work."""

    row: str
    what: str
    goal: str
    found: str
    reached: bool
    allowed: float | None = None
    by: str = ""

    @property
    def verdict(self) -> str:
        if self.reached or self.allowed is None:
            return "yes" if self.reached else "**no**"
        return f"bounded: {self.by} alone allows {self.allowed:.2f}"


def _allowed(row: dict[str, Any], rival: str, goal: float) -> tuple[float | None, str]:
    """What the bare work or the bound allows, where that is less than the goal, and which of them;
    what ours beats by more than times may scatter bounds nothing, nor does what scatters itself."""
    if _scatters(row, rival):
        return None, ""
    ratio, ours_of = row["times_faster_than"][rival], {}
    if "bound_ms" in row:
        ours_of["the bound"] = row["median_ms"]["ours"] / row["bound_ms"]
    if "times_the_bare_work" in row and not _scatters(row, BARE):
        ours_of["the bare work"] = row["times_the_bare_work"]
    allowed = [(ratio * max(t, 1.0), by) for by, t in ours_of.items() if t >= 1 - STEADY]
    least, by = min(allowed, default=(goal, ""))
    return (least, by) if least < goal else (None, "")


def _scatters(row: dict[str, Any], rival: str) -> bool:
    """Whether the ratio to a rival does, or where its quartiles were not kept the row."""
    if "ratio_quartiles" not in row:
        return scatters(row)
    ratio = 1 / row["times_the_bare_work"] if rival == BARE else row["times_faster_than"][rival]
    return _apart(*row["ratio_quartiles"][rival], ratio)


def _apart(low: float, high: float, median: float) -> bool:
    """Whether quartiles are so far apart that a row has failed."""
    return high - low > FAILED * median


def _surely(row: dict[str, Any], ratio: float, rival: str) -> float:
    """How many times faster ours is; where that scatters, by the unfavourable quartile of the
    ratio, or of rows that were measured before it was kept by those of both times."""
    if not _scatters(row, rival):
        return ratio
    if "ratio_quartiles" in row:
        return float(row["ratio_quartiles"][rival][0])
    medians, quartiles = row["median_ms"], row["quartiles_ms"]
    ours = medians["ours"] / quartiles["ours"][1]
    return float(ratio * ours * quartiles[rival][0] / medians[rival])


def _told(ratio: float, sure: float) -> str:
    return f"{ratio:.2f}" if sure == ratio else f"{ratio:.2f}; scatters, at worst {sure:.2f}"


def judge(rows: dict[str, dict[str, Any]]) -> list[Reached]:
    """Every goal of a row that was measured; what scatters reaches it by its worse quartiles, and
    bounds nothing."""
    found = []
    for name, goals in AHEAD.items():
        ratios = rows.get(name, {}).get("times_faster_than", {})
        for rival, goal in goals.items():
            if rival in ratios:
                row, said = rows[name], f"at least {goal:.3g}"
                sure = _surely(row, ratios[rival], rival)
                told, allowed = _told(ratios[rival], sure), _allowed(row, rival, goal)
                found.append(Reached(name, rival, said, told, sure >= goal, *allowed))
    for name, most in OF_THE_BARE_WORK.items():
        if (ratio := rows.get(name, {}).get("times_the_bare_work")) is not None:
            said, sure = f"at most {most}", 1 / _surely(rows[name], 1 / ratio, BARE)
            told = _told(ratio, sure)
            found.append(Reached(name, "ours / bare work", said, told, sure <= most))
    if row := rows.get(EXACT_BF16):
        ratio = row["times_faster_than"][FUSED]
        share = row["bound_ms"] / row["median_ms"]["ours"] if "bound_ms" in row else 0.0
        said = f"{ratio:.2f}; {share:.2f} of the bound" if share else f"{ratio:.2f}"
        goal_said = f"at least 1.2, or {OF_THE_BOUND} of the bound"
        reached = ratio >= 1.2 or share >= OF_THE_BOUND
        found.append(Reached(EXACT_BF16, FUSED, goal_said, said, reached))
    if errors := rows.get(SHARED_KEYS, {}).get("relative_errors"):
        for what in ("d_key", "d_value"):
            ours, theirs = errors["ours"][what], errors["transformers sdpa"][what]
            found.append(
                Reached(
                    SHARED_KEYS,
                    f"error of {what}, sdpa's {theirs:.1e}",
                    "not above",
                    f"{ours:.1e}",
                    ours <= theirs,
                )
            )
    return found


def judge_training(name: str, found: dict[str, Any]) -> list[Reached]:
    """The goals of a training of whole_runs.py, where losses are stock's; what scatters reaches one
    by its worse quartile."""
    runs = {run["name"]: run for run in found["runs"]}
    # what fastft does unasked today, on a machine that was measured before it did
    ours = runs.get("fastft, linear=True") or runs.get("fastft")
    stock = found["runs"][0]
    if ours is None or stock["name"] != "stock Trainer":
        return []
    with_avx2, with_avx512, share = WHOLE_RUNS[name]
    goal = with_avx512 if "avx512" in found["machine"]["cpu_isa"] else with_avx2
    ratio, (low, high) = ours["times_faster"], ours["quartiles"]
    same = all(line["agrees"] for line in found["agreement"] if line["name"] == ours["name"])
    reached = same and (low if _apart(low, high, ratio) else ratio) >= goal
    allowed, bare = None, found.get("bare_work")
    if bare is not None and bare["times_faster"] > ratio * (1 - STEADY):
        allowed = max(bare["quartiles"][1], ratio)
    bound = (allowed, "the bare work") if allowed is not None and allowed < goal else (None, "")
    told = f"{ratio:.2f} ({low:.2f} to {high:.2f})" + ", losses differ" * (not same)
    judged = [Reached(name, "stock Trainer", f"at least {goal}", told, reached, *bound)]
    if share is not None:
        peak, said = ours["peak_bytes"] / stock["peak_bytes"], f"at most {share:.0%}"
        judged.append(Reached(name, "stock's peak", said, f"{peak:.1%}", same and peak <= share))
    return judged
