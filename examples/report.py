"""The table and the picture of finetune.py."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

COLORS = ["#8c8c8c", "#d9480f", "#1971c2", "#2f9e44", "#9c36b5"]


def print_table(results: list, agreement: list[dict], tolerance: float) -> None:
    stock = results[0]
    table = Table(title="The same examples in the same batches")
    for heading in (
        "run",
        "loss at the end",
        "tokens/s",
        "",
        "seconds",
        "peak memory",
        "padding",
        "losses against stock",
    ):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for result, row in zip(results, [None, *agreement], strict=True):
        table.add_row(
            result.name,
            f"{result.losses[-1]:.4f}",
            f"{result.tokens_per_second:,.0f}",
            f"{result.tokens_per_second / stock.tokens_per_second:.2f}x",
            f"{result.seconds:.1f}",
            f"{result.peak_bytes / 2**20:,.0f} MiB",
            f"{result.padding:.0%}",
            f"within {row['largest_difference']:.0e}" if row else "",
        )
    console = Console(width=120)
    console.print(table)
    if all(row["agrees"] for row in agreement):
        console.print(
            f"Every run's losses agree with stock Trainer's at every step (relative difference <= "
            f"{tolerance:g})."
        )
    for row in agreement:
        if not row["agrees"]:
            console.print(
                f"[red]{row['name']} does NOT agree: off by {row['largest_difference']:.2g} at its "
                f"worst step."
            )


def plot(results: list, path: Path, device: str) -> None:
    figure, (curves, speed, memory) = plt.subplots(
        1, 3, figsize=(13, 4), width_ratios=[1.4, 1, 1], layout="constrained"
    )
    for result, color in zip(results, COLORS, strict=True):
        stock = result is results[0]
        style = {"linewidth": 6, "alpha": 0.5} if stock else {"linewidth": 1.5}
        curves.plot(
            range(1, len(result.losses) + 1), result.losses, color=color, label=result.name, **style
        )
    curves.set(xlabel="step", ylabel="loss", title="Training loss")
    curves.legend(frameon=False)
    names = [result.name for result in results]
    bars(
        speed,
        names,
        [result.tokens_per_second for result in results],
        "Tokens per second, padding not counted",
    )
    bars(
        memory,
        names,
        [result.peak_bytes / 2**20 for result in results],
        "Peak memory above the start, MiB",
    )
    figure.suptitle(f"Fine-tuning with stock Trainer and with fastft ({device})")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def bars(axes, names: list[str], values: list[float], title: str) -> None:
    drawn = axes.barh(names[::-1], values[::-1], color=COLORS[: len(names)][::-1])
    axes.bar_label(drawn, [f"{value:,.0f}" for value in values[::-1]], padding=3)
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.18)
    axes.spines[["top", "right"]].set_visible(False)
