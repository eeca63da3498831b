"""Collision handling: unique ids, and only colliding items change."""

import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.catalog.rows import distinct_rows
from gflowtrl.semantic_ids import ResidualKMeans, resolve_collisions
from gflowtrl.semantic_ids.collisions import colliding


def quantizer_of(seed, num_levels=3, num_codes=3, dim=2):
    quantizer = ResidualKMeans(num_levels, num_codes)
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor([1.0, 0.3, 0.1])[:num_levels, None, None]
    quantizer.codebooks = scales * torch.randn(num_levels, num_codes, dim, generator=generator)
    return quantizer


def some_vectors(number, seed):
    """Vectors with equal pairs, close to each other, so that prefixes become full."""
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
    errors = (vectors - quantizer.decode(codes)).norm(dim=1)
    for path, size in Counter(paths(codes)).items():
        rows = torch.tensor([row for row, other in enumerate(paths(codes)) if other == path])
        assert moved[rows].sum() == size - 1  # one item keeps its id,
        assert errors[rows[~moved[rows]]] == errors[rows].min()  # the one with the smallest error


@given(NUMBERS, SEEDS, st.data())
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("how", ["reassign", "level"])
def test_new_items_never_get_an_existing_id(how, number, seed, data):
    old = data.draw(st.integers(1, number - 1))
    quantizer, vectors = quantizer_of(seed), some_vectors(number, seed)
    codes = quantizer.encode(vectors)
    before = resolve_collisions(codes[:old], vectors[:old], quantizer, how)
    after = resolve_collisions(codes[old:], vectors[old:], quantizer, how, before)
    assert len(set(paths(before) + paths(after))) == number
    if how == "level":
        assert before[:, :3].equal(codes[:old]) and after[:, :3].equal(codes[old:])
        for path, size in Counter(paths(codes)).items():  # numbers continue without a gap
            numbers = [last for *prefix, last in paths(before) + paths(after) if tuple(prefix) == path]
            assert numbers == list(range(size))


def test_items_move_to_the_nearest_free_code_and_then_to_another_prefix():
    quantizer = ResidualKMeans(num_levels=2, num_codes=3)
    quantizer.codebooks = torch.tensor([[[0.0], [10.0], [30.0]], [[-1.0], [0.0], [2.0]]])
    vectors = torch.tensor([[0.1], [0.0], [-0.2], [0.3], [30.0]])
    codes = torch.tensor([[0, 1]] * 4 + [[2, 1]])
    resolved = resolve_collisions(codes, vectors, quantizer, "reassign")
    # row 1 has the smallest error and stays, row 0 moves to -1, row 2 to 2; prefix 0 is full: row 3 moves to 10 - 1
    assert resolved.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [2, 1]]


def test_kept_collisions_are_counted(caplog):
    quantizer = quantizer_of(0)
    codes = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0, 0], [2, 1, 0]])
    assert resolve_collisions(codes, some_vectors(4, 0), quantizer, "keep").equal(codes)
    assert "2 of 4 items share their semantic id" in caplog.text


def test_errors():
    quantizer, vectors = quantizer_of(0, num_levels=1), some_vectors(4, 0)
    codes = quantizer.encode(vectors)
    with pytest.raises(ValueError, match="4 items cannot have unique ids with 1 levels of 3 codes, which give 3 ids"):
        resolve_collisions(codes, vectors, quantizer, "reassign")
    with pytest.raises(ValueError, match="collisions is 'drop'; choose 'reassign' or 'level' or 'keep'"):
        resolve_collisions(codes, vectors, quantizer, "drop")


@pytest.mark.parametrize("how", ["reassign", "level"])
def test_a_few_items_are_added_to_a_million_at_once(how):
    """No loop over the items that have ids."""
    generator = torch.Generator().manual_seed(0)
    quantizer = quantizer_of(0, num_levels=3, num_codes=256)
    levels = quantizer.num_levels + (how == "level")
    taken, _ = distinct_rows(torch.randint(0, 256, (1_000_000, levels), generator=generator))
    vectors = 0.5 * torch.randn(100, 2, generator=generator)
    codes = quantizer.encode(vectors)
    start = time.process_time()
    resolved = resolve_collisions(codes, vectors, quantizer, how, taken)
    assert time.process_time() - start < 2
    assert len(distinct_rows(torch.cat([taken, resolved]))[0]) == len(taken) + len(resolved)
