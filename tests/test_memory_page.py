"""The tables of docs/memory.md are those that `benchmarks/tiers.py` calculates."""

import sys

import pytest
from support.documentation import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # behind the tests: some names are in both

tiers = pytest.importorskip("tiers")


@pytest.mark.parametrize(
    "name",
    [
        *("tiers", "sharded", "cost"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("peaks", "cards")),
    ],
)
def test_the_table_is_what_is_calculated(name):
    _, table = tiers.table_of(tiers.PAGE.read_text(), name)
    assert table == "\n".join(tiers.TABLES[name]())


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("SmolLM2-1.7B", 1.711),
        ("Llama-3.1-8B", 8.030),
        ("Qwen3-14B", 14.768),
        ("Llama-3.1-70B", 70.554),
    ],
)
def test_a_model_of_these_dimensions_has_its_published_size(name, billions):
    assert tiers.parameters(name) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_bytes_of_8_billion_are_those_of_the_small_table():
    """Of one moment for all: embeddings and head have fp32 ones beside 8-bit ones."""
    numbers = tiers.parameters("Llama-3.1-8B")
    none, states, held = (
        tiers.size("Llama-3.1-8B", "fp32", tier) for tier in (None, "states", "gradients")
    )
    assert none.device / numbers == 14
    assert states.device - states.staging == 4 * numbers and states.host == 10 * numbers
    assert held.device < 2.1 * numbers + 2 * held.gradients and held.host == 12 * numbers


def test_the_readme_has_the_rows_of_8_billion():
    """Of the tables of the page, as `estimate` and the tiers have them."""
    page, readme = tiers.PAGE.read_text(), (ROOT / "README.md").read_text()
    _, peaks = tiers.table_of(page, "peaks")
    small, large = (
        [cell.strip() for cell in line.split("|")[3:6]]
        for moments in ("8bit", "fp32")
        for line in peaks.splitlines()
        if line.startswith(f"| Llama-3.1-8B | {moments} ")
    )
    for place, tier in enumerate((None, "states", "gradients")):
        hosts = [tiers.size("Llama-3.1-8B", moments, tier).host for moments in ("8bit", "fp32")]
        cells = [small[place], f"{hosts[0] / 2**30:.1f}", large[place], f"{hosts[1] / 2**30:.1f}"]
        row = " | ".join(cells).replace(" 0.0", "")
        assert f"` | {row}" in readme.replace("|  |", "| |")
