"""Unique ids, and nobody moves without need."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.semantic_ids import ResidualKMeans, resolve_collisions
from gflowtrl.semantic_ids.collisions import colliding


def quantizer_of(seed, num_levels=3, num_codes=3, dim=2):
    quantizer = ResidualKMeans(num_levels, num_codes)
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor([1.0, 0.3, 0.1])[:num_levels, None, None]
    quantizer.codebooks = scales * torch.randn(num_levels, num_codes, dim, generator=generator)
    return quantizer


def some_vectors(number, seed):
    """Twos of equal vectors among others, in a narrow place, so that prefixes are full."""
    vectors = 0.5 * torch.randn(number, 2, generator=torch.Generator().manual_seed(seed))
    vectors[1::2] = vectors[: number // 2]
    return vectors


def paths(codes):
    return list(map(tuple, codes.tolist()))


NUMBERS = st.integers(2, 27)  # as many as there are ids
SEEDS = st.integers(0, 999)


@given(NUMBERS, SEEDS)
@settings(max_examples=60, deadline=None)
def test_reassigned_ids_are_unique_and_only_colliding_items_move(number, seed):
    quantizer, vectors = quantizer_of(seed), some_vectors(number, seed)
    codes = quantizer.encode(vectors)
    resolved = resolve_collisions(codes, vectors, quantizer, "reassign")
    assert not colliding(resolved).any() and resolved.shape == codes.shape
    moved = (resolved != codes).any(1)
    assert not moved[~colliding(codes)].any()
    misfit = (vectors - quantizer.decode(codes)).norm(dim=1)
    for path, size in Counter(paths(codes)).items():
        rows = torch.tensor([row for row, own in enumerate(paths(codes)) if own == path])
        assert moved[rows].sum() == size - 1  # one stays,
        assert misfit[rows[~moved[rows]]] == misfit[rows].min()  # the one that fits best


@given(NUMBERS, SEEDS, st.data())
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("how", ["reassign", "level"])
def test_new_items_never_take_an_old_id(how, number, seed, data):
    old = data.draw(st.integers(1, number - 1))
    quantizer, vectors = quantizer_of(seed), some_vectors(number, seed)
    codes = quantizer.encode(vectors)
    before = resolve_collisions(codes[:old], vectors[:old], quantizer, how)
    after = resolve_collisions(codes[old:], vectors[old:], quantizer, how, before)
    assert len(set(paths(before) + paths(after))) == number
    if how == "level":
        assert before[:, :3].equal(codes[:old]) and after[:, :3].equal(codes[old:])
        for path, size in Counter(paths(codes)).items():  # numbers go on without a gap
            numbers = [last for *own, last in paths(before) + paths(after) if tuple(own) == path]
            assert numbers == list(range(size))


def test_the_nearest_free_code_is_taken_and_then_the_level_before():
    quantizer = ResidualKMeans(num_levels=2, num_codes=3)
    quantizer.codebooks = torch.tensor([[[0.0], [10.0], [30.0]], [[-1.0], [0.0], [2.0]]])
    vectors = torch.tensor([[0.1], [0.0], [-0.2], [0.3], [30.0]])
    codes = torch.tensor([[0, 1]] * 4 + [[2, 1]])
    resolved = resolve_collisions(codes, vectors, quantizer, "reassign")
    # row 1 fits best and stays, row 0 moves to -1, row 2 finds only 2; row 3 finds nothing below 0: next is 10 - 1
    assert resolved.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [2, 1]]


def test_kept_collisions_are_counted(caplog):
    quantizer = quantizer_of(0)
    codes = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0, 0], [2, 1, 0]])
    assert resolve_collisions(codes, some_vectors(4, 0), quantizer, "keep").equal(codes)
    assert "2 of 4 items share their semantic id" in caplog.text


def test_errors():
    quantizer, vectors = quantizer_of(0, num_levels=1), some_vectors(4, 0)
    codes = quantizer.encode(vectors)
    with pytest.raises(ValueError, match="4 items cannot have different ids of 1 levels with 3 codes"):
        resolve_collisions(codes, vectors, quantizer, "reassign")
    with pytest.raises(ValueError, match="reassign, level, keep, but 'drop'"):
        resolve_collisions(codes, vectors, quantizer, "drop")
