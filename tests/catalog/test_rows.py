"""Tests of sorting rows against Python's sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.catalog.rows import distinct_rows, sorted_rows


@st.composite
def matrices(draw):
    """Small and large numbers, so that a row is packed into one number or into several."""
    largest = draw(st.sampled_from([1, 3, 2**10, 2**17, 2**31, 2**40]))
    columns = draw(st.integers(1, 6))
    row = st.lists(st.sampled_from([-1, 0, 1, largest // 2, largest]), min_size=columns, max_size=columns)
    return draw(st.lists(row, min_size=1, max_size=20))


@given(matrices())
@settings(max_examples=300, deadline=None)
def test_rows_are_sorted_as_python_sorts_them(rows):
    ordered, order = sorted_rows(torch.tensor(rows))
    expected = sorted(range(len(rows)), key=rows.__getitem__)  # stable
    assert order.tolist() == expected and ordered.tolist() == [rows[i] for i in expected]


@given(matrices())
@settings(max_examples=300, deadline=None)
def test_distinct_rows_agree_with_a_set(rows):
    distinct, inverse = distinct_rows(torch.tensor(rows))
    assert distinct.tolist() == [list(row) for row in sorted(set(map(tuple, rows)))]
    assert distinct[inverse].tolist() == rows


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_large_32_bit_numbers_are_packed_without_overflow(dtype):
    rows = torch.tensor([[2**31 - 1, 5], [2**31 - 1, 4], [0, 2**31 - 1]], dtype=dtype)
    assert sorted_rows(rows)[1].tolist() == [2, 1, 0]
