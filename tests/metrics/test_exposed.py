"""Metrics of exposed items, compared with averages over all orders of ties, and estimates under random exposure."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score, roc_auc_score

from gflowtrl.metrics import debiased_estimates, exposed_metrics, inverse_propensities, mean_over_users
from gflowtrl.metrics.exposed import estimates_of


@st.composite
def candidates(draw):
    """Scores with ties, and likes, of a few users."""
    users = draw(st.integers(1, 4))
    sizes = [draw(st.integers(1, 6)) for _ in range(users)]
    scores = [[draw(st.sampled_from([-3.5, -1.0, 0.0, 2.0])) for _ in range(size)] for size in sizes]
    return scores, [[draw(st.integers(0, 1)) for _ in range(size)] for size in sizes]


def padded(rows, value):
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def over_all_orders(scores, liked, k):
    """NDCG and recall averaged over all orders that the scores allow."""
    orders = [
        o
        for o in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(o))
    ]
    ideal = sum(1 / math.log2(place + 2) for place in range(min(k, sum(liked))))
    gains = [sum(liked[i] / math.log2(place + 2) for place, i in enumerate(order[:k])) for order in orders]
    hits = [sum(liked[i] for i in order[:k]) for order in orders]
    return sum(gains) / len(orders) / ideal, sum(hits) / len(orders) / sum(liked)


@given(candidates(), st.integers(1, 7))
@settings(max_examples=80, deadline=None)
def test_metrics_are_expectations_over_the_orders_of_ties(case, k):
    scores, liked = case
    found = exposed_metrics(padded(scores, 99.0), padded(liked, -100), k)
    for user, (values, likes) in enumerate(zip(scores, liked, strict=True)):
        both = 0 < sum(likes) < len(likes)
        if sum(likes):
            ndcg, recall = over_all_orders(values, likes, k)
            assert found[f"ndcg@{k}"][user].item() == pytest.approx(ndcg)
            assert found[f"recall@{k}"][user].item() == pytest.approx(recall)
        else:
            assert found[f"ndcg@{k}"][user].isnan() and found[f"recall@{k}"][user].isnan()
        if both:
            assert found["auc"][user].item() == pytest.approx(roc_auc_score(likes, values))
            assert found[f"ndcg@{k}"][user].item() == pytest.approx(ndcg_score([likes], [values], k=k))
        else:
            assert found["auc"][user].isnan()


def test_means_are_over_the_users_for_whom_a_metric_is_defined():
    metrics = exposed_metrics(
        torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 2.0]]), torch.tensor([[1, 0], [0, 0], [1, 1]])
    )
    means, errors = mean_over_users(metrics)
    assert means["auc"] == 1 and means["recall@5"] == 1 and means["ndcg@5"] == pytest.approx(1)
    assert math.isnan(errors["auc"]) and errors["recall@5"] == 0


def test_bad_scores_raise():
    with pytest.raises(ValueError, match="shapes"):
        exposed_metrics(torch.zeros(2, 3), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="NaN or .inf"):
        exposed_metrics(torch.tensor([[0.0, math.inf]]), torch.tensor([[1, 0]]))
    found = exposed_metrics(torch.tensor([[-math.inf, -2.0, 0.0]]), torch.tensor([[1, 0, -100]]))
    assert found["auc"].tolist() == [0.0] and found["ndcg@5"][0].item() == pytest.approx(1 / math.log2(3))
    exposed_metrics(torch.tensor([[0.0, math.nan]]), torch.tensor([[1, -100]]))  # padding may be anything


def test_inverse_propensities_recover_the_mean_under_random_exposure():
    generator = torch.Generator().manual_seed(0)
    items = 50
    impressions = torch.randint(1, 400, (items,), generator=generator)
    liked, hit = torch.rand(items, generator=generator), torch.rand(items, generator=generator)
    truth = float((liked * hit).sum() / liked.sum())  # of a like of an item that was shown at random
    logged = torch.multinomial(impressions * liked, 200_000, replacement=True, generator=generator)
    weights = inverse_propensities(impressions, clip=1e9)
    naive = float(hit[logged].mean())
    (ips, _), (snips, error) = debiased_estimates(hit[logged], weights[logged]).values()
    assert abs(naive - truth) > 10 * error and abs(snips - truth) < 4 * error
    # IPS also needs the mean weight of a logged like, which this log has as its ratio of likes.
    assert ips / float(weights[logged].double().mean()) == pytest.approx(snips)


def test_weights_are_clipped_and_items_never_shown_count_as_shown_once():
    weights = inverse_propensities(torch.tensor([0, 1, 10, 988]), clip=100.0)
    assert weights.tolist() == [100.0, 100.0, pytest.approx(25.0), pytest.approx(250 / 988)]


def test_equal_weights_change_nothing():
    values = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.5])
    found = estimates_of({"x": values}, ["x"], torch.ones(5))
    assert found["ips_x"][0] == found["snips_x"][0] == 0.5
    assert found["snips_x"][1] == pytest.approx(found["ips_x"][1] * math.sqrt(4 / 5))
