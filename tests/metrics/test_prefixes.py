"""Prefix metrics, compared with the beam search of the policy and with plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.metrics import prefix_metrics
from gflowtrl.policy import CausalTreePolicy
from tests.tiny import FIRST_TOKEN, catalog_of, random_paths, tiny_model


def prefix_of(tree, leaf: int, depth: int) -> tuple:
    return tuple(token for token in tree.paths[leaf].tolist() if token >= 0)[:depth]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.booleans())
def test_metrics_follow_their_definitions(seed, num_beams, ragged):
    tree = catalog_of(random_paths(20, codes=3, seed=seed % 89, ragged=ragged)).tree
    generator = torch.Generator().manual_seed(seed)
    log_probs = (3 * torch.randn(2, tree.num_leaves, generator=generator, dtype=torch.double)).log_softmax(1)
    targets = torch.randint(tree.num_leaves, (2,), generator=generator)
    metrics = prefix_metrics(log_probs, targets, tree, num_beams)
    for row, target in enumerate(targets.tolist()):
        beam, gap = [()], 0.0
        for depth in range(1, tree.max_depth + 1):
            mass: dict[tuple, float] = {}
            for leaf, value in enumerate(log_probs[row].exp().tolist()):
                prefix = prefix_of(tree, leaf, depth)
                mass[prefix] = mass.get(prefix, 0.0) + value
            candidates = [prefix for prefix in mass if any(prefix[: len(kept)] == kept for kept in beam)]
            beam = sorted(candidates, key=lambda prefix: -mass[prefix])[:num_beams]
            prefix = prefix_of(tree, target, depth)
            assert metrics[f"survival@{depth}"][row] == float(prefix in beam)
            lower = sum(mass[other] < mass[prefix] for other in mass)
            assert float(metrics[f"prefix_auc@{depth}"][row]) == pytest.approx(
                lower / max(len(mass) - 1, 1) or float(len(mass) == 1)
            )
            assert float(metrics[f"prefix_mrr@{depth}"][row]) == pytest.approx(1 / (len(mass) - lower))
            gap += 1 / mass[prefix] - 1
        best = log_probs[row].topk(min(num_beams, tree.num_leaves)).indices.tolist()
        share = sum(prefix_of(tree, leaf, tree.max_depth) in beam for leaf in best) / len(best)
        assert float(metrics["top_survival"][row]) == pytest.approx(share)
        bound = float(metrics["survival_bound"][row])
        assert bound == pytest.approx(max(0.0, 1 - gap / num_beams), abs=1e-6)
        assert metrics[f"survival@{tree.max_depth}"][row] >= bound


def test_survival_equals_the_beam_search_of_the_policy():
    catalog = catalog_of(random_paths(60, codes=5, ragged=True))
    tree, policy = catalog.tree, CausalTreePolicy(tiny_model(FIRST_TOKEN + 20), catalog)
    tokens = torch.arange(24).view(8, 3) % (FIRST_TOKEN + 15)
    prompts = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    log_probs, beams = policy.leaf_log_probs(prompts), policy.beam_search(prompts, 6)[0]
    for target in range(0, tree.num_leaves, 7):
        metrics = prefix_metrics(log_probs, torch.full((8,), target), tree, num_beams=6)
        assert torch.equal(metrics[f"survival@{tree.max_depth}"].bool(), (beams == target).any(1))
    exact = log_probs.topk(6).indices
    share = torch.stack([torch.isin(a, b).float().mean() for a, b in zip(exact, beams, strict=True)])
    torch.testing.assert_close(metrics["top_survival"], share)
    assert share.min() < 1  # the beam misses some of the best items


def test_zero_beams_raise_an_error():
    tree = catalog_of(random_paths(5)).tree
    with pytest.raises(ValueError, match="num_beams is 0"):
        prefix_metrics(torch.zeros(1, 5), torch.zeros(1, dtype=torch.long), tree, 0)
