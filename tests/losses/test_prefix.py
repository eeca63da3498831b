"""APAO's prefix losses compared with the formulas in plain loops, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.losses import prefix_pairwise, prefix_pointwise
from gflowtrl.policy import CausalTreePolicy
from tests.tiny import FIRST_TOKEN, catalog_of, random_paths, tiny_model


def pointwise_by_hand(log_probs, length) -> list[float]:
    return [-sum(log_probs[:m]) / m if m <= length else 0.0 for m in range(1, len(log_probs) + 1)]


def pairwise_by_hand(paths, log_probs, m: int, distinct: int | None = None) -> float:
    """`paths[0]` is the target; `distinct` is the number of m-prefixes, for the scaled form."""
    if m > len(paths[0]):
        return 0.0
    prefixes, terms = {tuple(paths[0][:m])}, []
    for path, steps in zip(paths[1:], log_probs[1:], strict=True):
        prefix = tuple(path[:m])
        if len(path) >= m and prefix not in prefixes:
            prefixes.add(prefix)
            terms.append(math.exp(sum(steps[:m])))
    if not terms:
        return 0.0
    positive = math.exp(sum(log_probs[0][:m]))
    valid = [True, *(True for _ in terms)]  # the release's mask has a column for the target, which is always valid
    scale = 1.0 if distinct is None else (distinct - 1) / valid.count(True)
    return -math.log(positive / (positive + scale * sum(terms))) / (1 if distinct is None else m)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 7), st.booleans(), st.booleans())
def test_both_losses_equal_their_formulas(seed, num_generations, ragged, scaled):
    catalog = catalog_of(random_paths(20, codes=3, seed=seed % 97, ragged=ragged))
    tree, generator = catalog.tree, torch.Generator().manual_seed(seed)
    leaves = torch.randint(tree.num_leaves, (3, num_generations), generator=generator)
    nodes, lengths = tree.walk(leaves)[:, :, 1:], tree.leaf_lengths[leaves]
    log_probs = -3 * torch.rand(*nodes.shape, generator=generator, dtype=torch.double)
    per_depth = torch.tensor(tree.nodes_per_depth)
    pointwise = prefix_pointwise(log_probs[:, :1], lengths[:, :1])
    pairwise = prefix_pairwise(log_probs, lengths, nodes, per_depth, "2025" if scaled else "paper")
    for row in range(3):
        paths = [tree.paths[leaf][: tree.leaf_lengths[leaf]].tolist() for leaf in leaves[row].tolist()]
        steps = log_probs[row].tolist()
        assert pointwise[row].tolist() == pytest.approx(pointwise_by_hand(steps[0], len(paths[0])))
        for m in range(1, nodes.shape[-1] + 1):
            distinct = len(
                {tuple(p[:m].tolist()) for p, n in zip(tree.paths, tree.leaf_lengths, strict=True) if n >= m}
            )
            assert per_depth[m - 1] == distinct
            expected = pairwise_by_hand(paths, steps, m, distinct if scaled else None)
            assert float(pairwise[row, m - 1]) == pytest.approx(expected, abs=1e-12)


def test_a_case_by_hand():
    """Target a b; negatives a c (shares the first token) and d e twice."""
    half, third = math.log(0.5), math.log(1 / 3)
    log_probs = torch.tensor([[[half, third], [half, half], [third, third], [third, third]]], dtype=torch.double)
    nodes = torch.tensor([[[1, 3], [1, 4], [2, 5], [2, 5]]])
    losses = prefix_pairwise(log_probs, torch.full((1, 4), 2), nodes, torch.tensor([2, 3]))
    # 1/2 against 1/3; 1/6 against 1/4 and 1/9.
    assert losses[0].tolist() == pytest.approx([math.log(5 / 3), math.log((1 / 6 + 1 / 4 + 1 / 9) * 6)])


@pytest.mark.parametrize(("prefixes", "negatives"), [(5, 4), (256, 20), (2, 1)])
def test_the_first_releases_scale_counts_the_target(prefixes, negatives):
    """All prefixes equally likely: L_m = log(1 + (D - 1) n / (n + 1)) / m, not the log D / m of a division by n."""
    log_probs = torch.full((1, negatives + 1, 1), -math.log(prefixes), dtype=torch.double)
    nodes = torch.arange(1, negatives + 2)[None, :, None]
    for m in (1, 2):  # m = 2: after a common first token
        steps = torch.cat([torch.zeros(1, negatives + 1, m - 1), log_probs], -1)
        walk = torch.cat([torch.ones(1, negatives + 1, m - 1).long(), nodes], -1)
        counts = torch.tensor([1] * (m - 1) + [prefixes])
        found = prefix_pairwise(steps, torch.full((1, negatives + 1), m), walk, counts, "2025")
        expected = math.log(1 + (prefixes - 1) * negatives / (negatives + 1)) / m
        assert found[0, -1].item() == pytest.approx(expected)
        assert found[0, -1].item() < math.log(prefixes) / m


def test_with_all_prefixes_as_negatives_it_is_the_prefix_probability():
    catalog = catalog_of(random_paths(30, codes=4))
    policy = CausalTreePolicy(tiny_model(FIRST_TOKEN + 12), catalog)
    prompts = {"input_ids": torch.tensor([[1, 5, 9], [1, 4, 10]]), "attention_mask": torch.ones(2, 3).long()}
    target = torch.tensor([[4], [17]])
    every = torch.arange(30).expand(2, -1)
    scores = policy.score(prompts, torch.cat([target, every], 1))
    nodes = catalog.tree.walk(torch.cat([target, every], 1))[:, :, 1:]
    losses = prefix_pairwise(
        scores.log_probs.double(), scores.lengths, nodes, torch.tensor(catalog.tree.nodes_per_depth)
    )
    torch.testing.assert_close(losses, -scores.log_probs[:, 0].double().cumsum(-1), rtol=1e-5, atol=1e-5)


def test_tiny_probabilities_do_not_give_nan():
    log_probs = torch.tensor([[[-200.0, -200.0], [-1.0, -200.0], [-300.0, -1.0]]], requires_grad=True)
    nodes = torch.tensor([[[1, 4], [2, 5], [3, 6]]])
    losses = prefix_pairwise(log_probs, torch.full((1, 3), 2), nodes, torch.tensor([3, 3]))
    assert losses.tolist() == [pytest.approx([199.0, 199.0])]
    (losses.sum() + prefix_pointwise(log_probs[:, :1], torch.tensor([[2]])).sum()).backward()
    assert log_probs.grad.isfinite().all() and log_probs.grad[0, 0].tolist() == pytest.approx([-3.5, -1.5])


def test_wrong_shapes_are_errors():
    with pytest.raises(ValueError, match="prefix_nodes has shape"):
        prefix_pairwise(torch.zeros(1, 3, 2), torch.ones(1, 3), torch.zeros(1, 2, 2), torch.ones(2))
    with pytest.raises(ValueError, match="log_probs has shape"):
        prefix_pointwise(torch.zeros(1, 3, 2), torch.ones(1, 3))


@pytest.mark.parametrize("weights", [(0.25, 0.25, 0.25, 0.25), (0.1, 0.2, 0.3, 0.4)])
def test_pointwise_is_cross_entropy_with_weights_on_the_tokens(weights):
    """sum over m of w_m L_m = sum over t of a_t (-s_t), a_t = sum over m >= t of w_m / m (docs/apao.md)."""
    log_probs = -3 * torch.rand(5, 1, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    losses = prefix_pointwise(log_probs, torch.full((5, 1), 4)) @ torch.tensor(weights, dtype=torch.double)
    of_tokens = [sum(weights[m - 1] / m for m in range(t, 5)) for t in range(1, 5)]
    assert losses.tolist() == pytest.approx((-log_probs[:, 0] @ torch.tensor(of_tokens, dtype=torch.double)).tolist())
    if weights == (0.25, 0.25, 0.25, 0.25):
        assert of_tokens == pytest.approx([0.521, 0.271, 0.146, 0.0625], abs=1e-3)
