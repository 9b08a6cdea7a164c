"""Packed against alone: fifty models in CI, every language model of transformers by `make
sweep`."""

from __future__ import annotations

import pytest
from support.architectures.models import all_cases
from support.architectures.outcome import time_limit
from support.architectures.packing import OURS, REFUSED, best, examine
from support.architectures.packing_models import PACKED, START, UNPACKED

pytestmark = pytest.mark.usefixtures("quiet")

MODELS = (*PACKED, *UNPACKED)
SWEPT = [case for case in all_cases() if case.mapping != "image-text" and case not in MODELS]


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_a_model_is_exact_or_refused(case, record_property, request):
    whole = request.config.getoption("--packing-matrix") is not None
    rows = examine(case, START.get(case.model_type, 0), whole)  # raises where one leaks in silence
    record_property("packing", {"case": str(case), "rows": rows, "swept": False})
    if case in PACKED:
        assert best(rows) != REFUSED, rows
        # a model that takes our attention runs with it
        assert best(rows) == OURS or "fastft" not in rows, rows


@pytest.mark.sweep
@pytest.mark.parametrize("case", SWEPT, ids=str)
def test_no_architecture_leaks_silently(case, record_property):
    with time_limit():
        try:
            rows = examine(case)
        except AssertionError:
            raise
        except Exception as error:
            pytest.skip(
                f"cannot be built, or not run alone, with a shrunken config: {error!r}"[:200]
            )
    record_property("packing", {"case": str(case), "rows": rows, "swept": True})
    if best(rows) == REFUSED:
        assert all(row["check_packing"] == "raises" for row in rows.values())
