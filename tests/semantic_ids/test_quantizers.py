"""Quantizers: encoding, decoding and training."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.semantic_ids import RQVAE, ResidualKMeans
from gflowtrl.semantic_ids.residual import assign_within, nearest_codes
from gflowtrl.semantic_ids.rqvae import quantize, revive_dead_codes


def small_rqvae(**options):
    return RQVAE(**{"num_levels": 2, "num_codes": 8, "latent_dim": 4, "hidden_dims": (16,), "steps": 60} | options)


def test_residual_k_means_is_a_loop_of_k_means(vectors):
    from sklearn.cluster import KMeans  # slow to import

    quantizer = ResidualKMeans(num_levels=3, num_codes=8, seed=5).fit(vectors)
    residual, codes = vectors.numpy(), []
    for level in range(3):
        oracle = KMeans(8, n_init=1, random_state=5).fit(residual)
        centroids = quantizer.codebooks[level] + (quantizer.center if level == 0 else 0)
        np.testing.assert_allclose(centroids, oracle.cluster_centers_, atol=1e-5)
        codes.append(oracle.labels_)
        residual = residual - oracle.cluster_centers_[oracle.labels_]
    codes = torch.tensor(np.stack(codes, axis=1), dtype=torch.long)
    assert quantizer.encode(vectors).equal(codes)
    np.testing.assert_allclose(quantizer.decode(codes), vectors.numpy() - residual, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: ResidualKMeans(3, 8), lambda: ResidualKMeans(3, 8, True), small_rqvae])
def test_each_code_is_the_nearest_to_the_residual(make, vectors):
    quantizer = make()
    codes = quantizer.fit_encode(vectors)
    unseen = torch.randn(20, 12, generator=torch.Generator().manual_seed(1))
    residual = quantizer.latents(unseen)
    for level, column in enumerate(quantizer.encode(unseen).T):
        distances = (residual[:, None] - quantizer.codebooks[level]).square().sum(2)
        assert column.equal(distances.argmin(1))
        residual = residual - quantizer.codebooks[level, column]
    if not quantizer.config.get("balanced"):
        assert codes.equal(quantizer.encode(vectors))
    assert quantizer.encode(unseen[:1]).equal(quantizer.encode(unseen)[:1])
    error = (quantizer.decode(codes) - vectors).square().sum() / (vectors - vectors.mean(0)).square().sum()
    assert error < (0.9 if isinstance(quantizer, RQVAE) else 0.5)


@pytest.mark.parametrize("make", [lambda: ResidualKMeans(3, 16), lambda: ResidualKMeans(3, 16, True), small_rqvae])
@pytest.mark.parametrize("offset", [128.0, 8192.0, -65536.0])
def test_a_constant_added_to_all_vectors_changes_no_code(make, offset):
    """The vectors are multiples of 1/128, so that they, their sum and their mean are exact at each offset."""
    vectors = (128 * torch.randn(256, 32, generator=torch.Generator().manual_seed(0))).round() / 128
    far = vectors + offset * torch.tensor([1.0, -1.0, 0.5, 0.0] * 8)
    near_quantizer, far_quantizer = make(), make()
    codes = near_quantizer.fit_encode(vectors)
    assert far_quantizer.fit_encode(far).equal(codes)
    assert far_quantizer.encode(far[:40]).equal(near_quantizer.encode(vectors[:40]))
    assert len(codes[:, 0].unique()) > 6
    shift = near_quantizer.decode(codes) - vectors - (far_quantizer.decode(codes) - far)
    assert shift.abs().max() <= 2**-7 * max(1, abs(offset) / 2**16)  # the rounding of float32 at the offset


def test_a_quantizer_saved_without_a_center_is_loaded_correctly(vectors):
    quantizer = ResidualKMeans(2, 8).fit(vectors)
    codebooks = quantizer.codebooks.clone()
    codebooks[0] += quantizer.center
    old = ResidualKMeans.from_state(quantizer.config, {"codebooks": codebooks})
    assert old.encode(vectors).equal(quantizer.encode(vectors))
    torch.testing.assert_close(old.decode(old.encode(vectors)), quantizer.decode(quantizer.encode(vectors)))


def test_more_levels_have_less_error(vectors):
    quantizer = ResidualKMeans(num_levels=4, num_codes=8).fit(vectors)
    codes = quantizer.encode(vectors)
    errors = [(quantizer.decode(codes[:, :level]) - vectors).square().sum() for level in range(1, 5)]
    assert errors == sorted(errors, reverse=True)


@given(st.integers(1, 40), st.integers(2, 6), st.integers(0, 3), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_assignment_respects_capacities(rows, codes, spare, seed):
    distances = torch.rand(rows, codes, generator=torch.Generator().manual_seed(seed))
    capacity = math.ceil(rows / codes) + spare
    labels = assign_within(distances, capacity)
    sizes = torch.bincount(labels, minlength=codes)
    assert sizes.max() <= capacity
    # if a row does not have its nearest code, all nearer codes are full in the end
    for row, label in enumerate(labels):
        assert (sizes[distances[row] < distances[row, label]] == capacity).all()
    assert assign_within(distances, rows).equal(distances.argmin(1))


def test_rows_with_the_largest_gap_are_assigned_first():
    distances = torch.tensor([[0.0, 1.0, 9.0], [0.1, 5.0, 9.0], [0.2, 2.0, 9.0]])
    assert assign_within(distances, 1).tolist() == [2, 0, 1]


def test_balanced_codes_are_evenly_used(vectors):
    dense = 0.01 * torch.randn(100, 12, generator=torch.Generator().manual_seed(2))
    vectors = torch.cat([vectors, vectors[:1] + dense])
    codes = ResidualKMeans(num_levels=2, num_codes=10, balanced=True).fit_encode(vectors)
    for column in codes.T:
        assert torch.bincount(column).max() <= 30
    assert torch.bincount(ResidualKMeans(2, 10).fit_encode(vectors)[:, 0]).max() > 100


def test_quantize_by_hand():
    """z = (1, 3); the nearest code of level one is (0, 2), the residual (1, 1); the nearest of level two is (1, 0)."""
    latents = torch.tensor([[1.0, 3.0]], requires_grad=True)
    codebooks = torch.tensor([[[5.0, 5.0], [0.0, 2.0]], [[1.0, 0.0], [-3.0, 0.0]]], requires_grad=True)
    codes, quantized, loss = quantize(latents, codebooks, commitment=0.5)
    assert codes.tolist() == [[1, 0]] and quantized.tolist() == [[1.0, 2.0]]
    # means over the two columns: level one |(1, 1)|^2 / 2 = 1, level two |(0, 1)|^2 / 2 = .5, each 1 + .5 times
    assert loss.item() == pytest.approx(1.5 * (1 + 0.5))
    loss.backward(retain_graph=True)
    # codebook: e - r at each level; commitment: .5 * (r - e) summed over the levels
    torch.testing.assert_close(codebooks.grad, torch.tensor([[[0.0, 0.0], [-1.0, -1.0]], [[0.0, -1.0], [0.0, 0.0]]]))
    torch.testing.assert_close(latents.grad, 0.5 * torch.tensor([[1.0, 1.0 + 1.0]]))


def test_the_straight_through_gradient():
    latents = torch.randn(6, 3, requires_grad=True)
    codebooks = torch.randn(2, 4, 3, requires_grad=True)
    quantized = quantize(latents, codebooks, commitment=0.25).latents
    weights = torch.randn(6, 3)
    (quantized * weights).sum().backward()
    torch.testing.assert_close(latents.grad, weights)
    assert codebooks.grad is None


def test_dead_codes_are_replaced_and_used_codes_are_kept():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(50, 2, generator=generator)
    codebooks = torch.cat([torch.randn(2, 4, 2, generator=generator), torch.full((2, 4, 2), 100.0)], dim=1)
    before, codes = codebooks.clone(), nearest_codes(latents, codebooks)
    used = torch.stack([torch.bincount(column, minlength=8) > 0 for column in codes.T])
    assert revive_dead_codes(codebooks, latents, used, generator) == int((~used).sum()) >= 8
    assert codebooks[used].equal(before[used])
    residual = latents
    for level in range(2):
        for centroid in codebooks[level][~used[level]]:
            assert (residual == centroid).all(1).any()  # a dead code becomes a residual
        residual = residual - before[level][codes[:, level]]
    assert len(nearest_codes(latents, codebooks)[:, 0].unique()) > 4


def test_rqvae_learns_and_is_reproducible(vectors):
    state = torch.random.get_rng_state()
    codes = small_rqvae().fit_encode(vectors)
    assert torch.random.get_rng_state().equal(state)
    assert codes.equal(small_rqvae().fit_encode(vectors)) and not codes.equal(small_rqvae(seed=1).fit_encode(vectors))

    def error(steps):
        quantizer = small_rqvae(steps=steps).fit(vectors)
        return (quantizer.decode(quantizer.encode(vectors)) - vectors).square().mean()

    assert error(150) < 0.6 * error(1)


@pytest.mark.parametrize("make", [lambda **o: ResidualKMeans(**o), small_rqvae])
def test_bad_input_is_refused(make, vectors):
    with pytest.raises(ValueError, match="200 vectors cannot be grouped into 201 codes"):
        make(num_codes=201).fit(vectors)
    broken = vectors.clone()
    broken[3, 1] = math.nan
    with pytest.raises(ValueError, match="1 item vectors are not finite, the first in row 3"):
        make(num_codes=4).fit(broken)
    with pytest.raises(ValueError, match=r"item vectors is \(200,\)"):
        make(num_codes=4).fit(vectors[:, 0])
    with pytest.raises(ValueError, match="num_levels is 0; it must be 1 to 25"):
        make(num_levels=0)
    with pytest.raises(ValueError, match="num_codes is 1; it must be a whole number of at least 2"):
        make(num_codes=1)
    with pytest.raises(RuntimeError, match="Call fit"):
        make(num_codes=4).encode(vectors)
    with pytest.raises(ValueError, match="5 columns; they must have 12"):
        make(num_codes=4).fit(vectors).encode(vectors[:, :5])


def test_rqvae_refuses_invalid_settings():
    with pytest.raises(ValueError, match="learning_rate is .*; it must be a finite number above 0"):
        RQVAE(learning_rate=0)
