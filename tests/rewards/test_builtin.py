"""The built-in rewards: their values, and that all three forms of one reward agree."""

import pytest
import torch

from gflowtrl.rewards import CollaborativeReward, GroundTruthReward, LikelihoodReward, RewardFusion
from tests.rewards.world import (
    SEMANTIC_IDS,
    TOKENIZER,
    TableTeacher,
    all_leaves,
    make_batch,
    make_catalog,
    make_policy,
)  # fmt: skip


BUILT_IN = {
    "ground_truth": lambda catalog: GroundTruthReward(),
    "collaborative": lambda catalog: CollaborativeReward(TableTeacher(), 0.7),
    "corrected": lambda catalog: CollaborativeReward(TableTeacher(), 2.0, 0.5, {"apple": 9, "nut": 3}),
    "likelihood": lambda catalog: LikelihoodReward(make_policy(catalog)),
    "likelihood_of_model": lambda catalog: LikelihoodReward(make_policy(catalog).model),
}


@pytest.mark.parametrize("reduction", ["sum", "max"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_three_forms_agree(name, reduction):
    """Over items, over leaves, and called as TRL would: the same numbers for every row and leaf."""
    catalog, batch = make_catalog(), make_batch()
    leaves = all_leaves(catalog, batch)
    reward = BUILT_IN[name](catalog).bind(catalog, TOKENIZER, reduction)
    over_leaves = reward.score_leaves(batch, leaves)
    assert over_leaves.std() > 0.01
    torch.testing.assert_close(catalog.fold_items(reward.score_items(batch), reduction), over_leaves)

    def plain(**keywords):
        return reward(**keywords)

    as_list = RewardFusion(plain, catalog, TOKENIZER, leaf_reduction=reduction).log_rewards(make_batch(), leaves)
    as_tensor = RewardFusion(reward, catalog, leaf_reduction=reduction).log_rewards(make_batch(), leaves)
    torch.testing.assert_close(as_list.parts["plain"], as_tensor.parts[reward.__name__], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(as_list.log_rewards, as_tensor.log_rewards, atol=1e-4, rtol=1e-4)


def test_ground_truth_marks_the_targets_leaf():
    catalog, batch = make_catalog(), make_batch()
    scores = GroundTruthReward().bind(catalog).score_items(batch)
    assert [catalog.items[i] for i in scores.argmax(1)] == batch["target"]
    assert scores.sum(1).tolist() == [1, 1, 1, 1]


def test_collaborative_is_the_softmax_of_the_corrected_scores():
    catalog, batch, teacher = make_catalog(), make_batch(), TableTeacher()
    counts = [float(i) for i in range(len(catalog))]
    reward = CollaborativeReward(teacher, 0.5, 0.3, counts).bind(catalog)
    score = teacher.score(batch["history"])
    for j, item in enumerate(catalog.items):
        column = (score[:, teacher.items.index(item)] - 0.3 * torch.tensor(counts[j] + 1).log()) / 0.5
        log_z = torch.logsumexp(
            torch.stack([
                (score[:, teacher.items.index(other)] - 0.3 * torch.tensor(counts[k] + 1).log()) / 0.5
                for k, other in enumerate(catalog.items)
            ]), 0,
        )  # fmt: skip
        torch.testing.assert_close(reward.score_items(batch)[:, j], (column - log_z).exp())


def test_teacher_is_asked_once_a_batch_by_all_who_share_it():
    catalog, batch, teacher = make_catalog(), make_batch(), TableTeacher()
    sharp, flat = (CollaborativeReward(teacher, t).bind(catalog) for t in (0.5, 5.0))
    assert sharp.score_items(batch).max() > flat.score_items(batch).max()
    assert teacher.calls == 1


def test_any_callable_is_a_teacher():
    catalog, batch = make_catalog(), make_batch()
    reward = CollaborativeReward(lambda histories: torch.eye(9)[: len(histories)].tolist()).bind(catalog)
    assert reward.score_items(batch).argmax(1).tolist() == [0, 1, 2, 3]


def test_likelihood_is_the_frozen_policys_probability():
    """Dropout is off, no graph is built, and a model in training stays in training."""
    catalog, batch = make_catalog(), make_batch()
    policy = make_policy(catalog)
    expected = policy.leaf_log_probs(batch["prompts"]).exp()
    for layer in policy.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    policy.model.train()
    policy.model.lm_head.eval()
    reward = LikelihoodReward(policy).bind(catalog)
    scores = reward.score_leaves(batch, all_leaves(catalog, batch))
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores.sum(1), torch.ones(4))
    assert not scores.requires_grad
    assert policy.model.training and policy.model.model.layers[0].training and not policy.model.lm_head.training


def test_completions_of_a_plain_trl_trainer():
    """Without `items`, with an end token, and with completions that are no item at all."""
    reward = GroundTruthReward().bind(make_catalog())
    ids = TOKENIZER.get_vocab()
    spelled = [[ids[t] for t in SEMANTIC_IDS[item]] for item in ("apple", "date", "fig")]
    completions = [
        *spelled[:2],
        [*spelled[1], ids["<eos>"], ids["<pad>"]],
        spelled[2],
        spelled[0][:2],
        [ids["<eos>"]],
        [],
    ]
    target = ["quince", "date", "date", "apple", "apple", "apple", "apple"]
    assert reward(["-"] * 7, completion_ids=completions, completions=None, target=target) == [1, 1, 1, 0, 0, 0, 0]


def test_mistakes_are_explained():
    catalog, batch = make_catalog(), make_batch()
    with pytest.raises(ValueError, match=r"'ground_truth' does not know the catalogue yet; call bind"):
        GroundTruthReward().score_items(batch)
    with pytest.raises(ValueError, match="'ground_truth' needs the dataset column 'target'"):
        GroundTruthReward().bind(catalog).score_items({"history": [["fig"]]})
    with pytest.raises(ValueError, match="temperature of CollaborativeReward must be > 0, got 0"):
        CollaborativeReward(TableTeacher(), temperature=0)
    with pytest.raises(ValueError, match="needs item_counts"):
        CollaborativeReward(TableTeacher(), popularity_correction=0.5)
    with pytest.raises(ValueError, match=r"item_counts has shape \(2,\), but the catalogue has 9 items"):
        CollaborativeReward(TableTeacher(), popularity_correction=0.5, item_counts=[1, 2]).bind(catalog)
    broken = TableTeacher()
    broken.table = broken.table[:, :4]
    broken.items = list(catalog.items)
    with pytest.raises(ValueError, match=r"teacher of reward 'collaborative' returned scores of shape \(4, 4\)"):
        CollaborativeReward(broken).bind(catalog).score_items(batch)
