"""The picture of a comparison; needs matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from fastft.commands.compare_report import Comparison
    from fastft.commands.figures import Figures

_STOCK, _FAST, _NOISE = "#8c8c8c", "#d9480f", "#1971c2"
_OTHERS = ["#1971c2", "#2f9e44", "#9c36b5", "#e8a33d"]


def draw(comparison: Comparison, path: Path) -> None:
    """Losses one over the other, their difference against the noise, tokens a second, memory."""
    figure = plt.figure(figsize=(12, 5.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[1.5, 1], hspace=0.08, wspace=0.06)
    curves = figure.add_subplot(grid[0, 0])
    _losses(curves, comparison)
    _difference(figure.add_subplot(grid[1, 0], sharex=curves), comparison)
    curves.tick_params(labelbottom=False)
    bars = _bars(comparison)
    rates = [one.tokens_per_second for one in bars.values()]
    _horizontal(
        figure.add_subplot(grid[0, 1]),
        bars,
        [rate.value for rate in rates],
        "Tokens per second, padding not counted",
        [(rate.value - rate.low, rate.high - rate.value) for rate in rates],
    )
    memory = [one.peak / 2**20 for one in bars.values()]
    _horizontal(
        figure.add_subplot(grid[1, 1]),
        bars,
        memory,
        f"Peak memory of a process, MiB{'' if comparison.stock.peak_tells else ' (too small)'}",
    )
    verdict = comparison.verdict
    answer = "the same training" if verdict.cause is None else f"different: {verdict.cause.what}"
    figure.suptitle(
        f"{comparison.command if len(comparison.command) < 60 else comparison.command[:57] + '...'}"
        f"  ·  without and with fastft: {answer}",
        fontsize=12,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _losses(axes: Any, comparison: Comparison) -> None:
    runs = comparison.runs
    steps = range(1, runs.length + 1)
    stock = [step.loss for step in runs.stock[0].steps[: runs.length]]
    axes.plot(steps, stock, color=_STOCK, linewidth=6, alpha=0.5, label="stock")
    if runs.fp32 is not None:
        losses = [step.loss for step in runs.fp32.steps[: runs.length]]
        axes.plot(
            steps, losses, color=_NOISE, linewidth=1, linestyle="--", label="stock, fp32 weights"
        )
    fast = comparison.verdict.loss.fast
    axes.plot(steps, fast, color=_FAST, linewidth=1.6, label="fastft")
    axes.set(ylabel="loss", title="Training loss")
    _plain(axes)


def _difference(axes: Any, comparison: Comparison) -> None:
    loss = comparison.verdict.loss
    steps = list(range(1, len(loss.stock) + 1))
    positive = [
        value for value in (*loss.difference, *loss.noise, *loss.allowed) if 0 < value < math.inf
    ]
    bottom, top = min(positive, default=1e-9) / 3, max(positive, default=1.0) * 4

    def shown(values: list[float]) -> list[float]:
        # what is 0 lies on the axis
        return [min(max(value, bottom), top) for value in values]

    axes.fill_between(
        steps, bottom, shown(loss.allowed), color=_STOCK, alpha=0.18, linewidth=0, label="allowed"
    )
    axes.plot(steps, shown(loss.noise), color=_NOISE, linewidth=1.4, label="stock's own noise")
    axes.plot(
        steps,
        shown(loss.difference),
        color=_FAST,
        linewidth=0,
        marker="o",
        markersize=4,
        label="fastft",
        clip_on=False,
    )
    axes.set_yscale("log")
    axes.set(
        xlabel="step", ylabel="off by", ylim=(bottom, top), title="Loss, difference from stock"
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    _plain(axes)


def _bars(comparison: Comparison) -> dict[str, Figures]:
    bars = {"stock": comparison.stock, "fastft": comparison.fast}
    bars |= {f"{name} alone": one for name, (_, one) in comparison.alone.items()}
    if comparison.packed is not None:
        bars[f"packs of {comparison.packing}"] = comparison.packed
    return bars


def _horizontal(
    axes: Any,
    names: dict[str, Figures],
    values: list[float],
    title: str,
    errors: list[tuple[float, float]] | None = None,
) -> None:
    colors = [_STOCK, _FAST, *_OTHERS][: len(names)]
    spread = None if errors is None else [list(side) for side in zip(*errors, strict=True)]
    drawn = axes.barh(
        list(names),
        values,
        color=colors,
        height=0.62,
        xerr=spread,
        error_kw={"elinewidth": 1.2, "ecolor": "#333333"},
    )
    axes.invert_yaxis()
    axes.bar_label(drawn, [f"{value:,.0f}" for value in values], padding=5)
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.2, y=0.12)
    axes.set_xticks([])
    axes.tick_params(left=False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _plain(axes: Any) -> None:
    axes.title.set_fontsize(10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
