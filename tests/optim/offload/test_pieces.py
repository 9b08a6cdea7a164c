"""How a step is cut: every element is in one piece, no cut lies inside a block, buffers suffice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.optim import moments_8bit
from fastft.optim.offload import pieces
from fastft.optim.offload.pieces import Form, Span

FLAT = st.builds(Form, st.integers(0, 200_000), st.sampled_from([4, 10]), st.just(3), st.just(0))
ROWS = st.builds(
    lambda rows, columns: Form(rows * columns, 4, 5, columns if rows else 0),
    st.integers(0, 40),
    st.integers(1, 9001),
)
FORMS = st.lists(FLAT | ROWS, max_size=6)


@given(FORMS, st.integers(1_000, 200_000))
@settings(max_examples=60, deadline=None)
def test_every_element_is_in_one_piece_in_order_and_pieces_fit(forms, room):
    cut = pieces.cut(forms, room)
    ends = [0] * len(forms)
    for span in (span for spans in cut for span in spans):
        assert span.begin == ends[span.place] < span.end
        ends[span.place] = span.end
    assert ends == [form.numel for form in forms]
    smallest = 512 * 12 + 5 * pieces.ALIGNMENT
    for spans in cut:
        size = sum(forms[span.place].size(span.end - span.begin) for span in spans)
        assert size <= max(room, smallest)
    assert len(pieces.buffers(forms, cut)) == min(2, len(cut))


@given(FORMS, st.integers(1_000, 200_000))
@settings(max_examples=60, deadline=None)
def test_cuts_lie_between_blocks(forms, room):
    for span in (span for spans in pieces.cut(forms, room) for span in spans):
        columns, numel = forms[span.place].columns, forms[span.place].numel
        for at in (span.begin, span.end):
            if columns:
                assert at % columns % moments_8bit.BLOCK == 0
            else:
                assert at % 512 == 0 or at == numel
        if columns:  # whole rows, or within one
            whole = span.begin % columns == 0 and (span.end - span.begin) % columns == 0
            assert whole or span.begin // columns == (span.end - 1) // columns


def test_a_parameter_that_fits_into_a_buffer_is_not_cut():
    forms = [Form(1000, 10, 3), Form(5000, 10, 3), Form(3, 10, 3)]
    cut = pieces.cut(forms, 51_000)
    assert cut == [[Span(0, 0, 1000)], [Span(1, 0, 5000), Span(2, 0, 3)]]


@pytest.mark.parametrize(
    "span", [(0, 14 * 507), (3 * 507, 5 * 507), (507, 507 + 256), (507 + 128, 1014)]
)
def test_codes_and_scales_of_a_span_are_those_of_the_whole(span):
    form, at = Form(14 * 507, 4, 5, 507), Span(0, *span)
    moment = torch.randn(14, 507).square()
    whole = (
        torch.zeros(14, 507, dtype=torch.int8),
        torch.zeros(14, 507, dtype=torch.uint8),
        torch.zeros(14, 4),
        torch.zeros(14, 4),
    )
    moments_8bit.quantise(moment, moment, whole)
    part = pieces.elements(moment, at, form)
    own = [torch.zeros_like(pieces.elements(codes, at, form)) for codes in whole[:2]]
    own += [torch.zeros_like(pieces.scales(scale, at, form)) for scale in whole[2:]]
    moments_8bit.quantise(part, part, tuple(own))
    for mine, codes in zip(own[:2], whole[:2], strict=True):
        assert torch.equal(mine, pieces.elements(codes, at, form))
    for mine, scale in zip(own[2:], whole[2:], strict=True):
        assert torch.equal(mine, pieces.scales(scale, at, form))
