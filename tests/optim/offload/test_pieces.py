"""How a step is cut: every element is in one piece, no cut lies inside a block, buffers suffice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.optim import moment_blocks, moment_codes
from fastft.optim.offload import pieces
from fastft.optim.offload.pieces import Form, Span

# of fp32 and bf16 moments with their low bits
FLAT = st.builds(
    Form,
    st.integers(0, 200_000),
    st.sampled_from([((1, 1), (1, 1), (2, 1)), ((4, 1), (4, 1), (2, 1))]),
    st.just(0),
)
# of moments that are codes of 8 and 4 bits, with low bits
CODED = [((1, packed), (1, 1), (2, 1), (4, 128), (4, 128)) for packed in (1, 2)]
ROWS = st.builds(
    lambda rows, columns, staged: Form(rows * columns, staged, columns if rows else 0),
    st.integers(0, 40),
    st.integers(1, 9001),
    st.sampled_from(CODED),
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
                assert at % columns % moment_blocks.BLOCK == 0
            else:
                assert at % 512 == 0 or at == numel
        if columns:  # whole rows, or within one
            whole = span.begin % columns == 0 and (span.end - span.begin) % columns == 0
            assert whole or span.begin // columns == (span.end - 1) // columns


def test_a_parameter_that_fits_into_a_buffer_is_not_cut():
    staged = (4, 1), (4, 1), (2, 1)
    forms = [Form(1000, staged), Form(5000, staged), Form(3, staged)]
    cut = pieces.cut(forms, 51_000)
    assert cut == [[Span(0, 0, 1000)], [Span(1, 0, 5000), Span(2, 0, 3)]]


@pytest.mark.parametrize("moments", moment_codes.CODES)
@pytest.mark.parametrize(
    "span", [(0, 14 * 507), (3 * 507, 5 * 507), (507, 507 + 256), (507 + 128, 1014)]
)
def test_codes_and_scales_of_a_span_are_those_of_the_whole(span, moments):
    moment, at = torch.randn(14, 507).square(), Span(0, *span)
    state = moment_codes.new_entries(moment, moments)
    whole = moment_codes.entries_of(state)
    form = pieces.form(moment, whole, held=False)
    moment_codes.quantise(moment, moment, whole)
    part = pieces.part(moment, at, form)
    of_span = [
        pieces.part(entry, at, form, each)
        for entry, (_, each) in zip(whole, form.staged, strict=True)
    ]
    own = moment_codes.entries_of(moment_codes.new_entries(part, moments))
    moment_codes.quantise(part, part, own)
    assert all(map(torch.equal, own, of_span))
    assert form.content(at.end - at.begin) == sum(entry.nbytes for entry in own)
