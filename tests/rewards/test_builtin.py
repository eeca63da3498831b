"""The built-in rewards: their values, and the agreement of the three forms of each reward."""

import pytest
import torch

from gflowtrl.catalog import ItemCatalog
from gflowtrl.data import Step, SyntheticShop, build_tokenizer, leave_one_out
from gflowtrl.data.interactions import CLICKED, PURCHASED, SHOWN
from gflowtrl.policy import make_policy as make_policy_of
from gflowtrl.rewards import (
    CollaborativeReward,
    CompositeReward,
    GroundTruthReward,
    InteractionReward,
    LikelihoodReward,
    Reward,
    RewardModel,
    TitleLikelihoodReward,
    TokenSimilarityReward,
    UniformReward,
)
from tests.rewards.world import (
    SEMANTIC_IDS,
    TOKENIZER,
    TableTeacher,
    all_leaves,
    make_catalog,
    make_policy,
    make_seq2seq,
    make_step,
    make_title_reward,
)  # fmt: skip


BUILT_IN = {
    "ground_truth": lambda catalog: GroundTruthReward(),
    "propensity": lambda catalog: GroundTruthReward(0.5, {"apple": 9, "nut": 3}, clip=3.0),
    "collaborative": lambda catalog: CollaborativeReward(TableTeacher(), 0.7),
    "corrected": lambda catalog: CollaborativeReward(TableTeacher(), 2.0, 0.5, {"apple": 9, "nut": 3}),
    "min_max": lambda catalog: CollaborativeReward(TableTeacher(), normalization="min_max", exponent=2.0),
    "interaction": lambda catalog: InteractionReward(),
    "interaction_of_levels": lambda catalog: InteractionReward((0.5, 2.0, 3.0), target=None),
    "token_similarity": lambda catalog: TokenSimilarityReward(),
    "shared_prefix": lambda catalog: TokenSimilarityReward(normalize=True, prefix=True),
    "likelihood": lambda catalog: LikelihoodReward(make_policy(catalog)),
    "likelihood_of_model": lambda catalog: LikelihoodReward(make_policy(catalog).model),
    "likelihood_of_encoder_decoder": lambda catalog: LikelihoodReward(make_seq2seq()),
    "titles": lambda catalog: make_title_reward(all_items=True),
    "whole_titles": lambda catalog: make_title_reward(normalize="sum", batch_size=3, all_items=True),
}


@pytest.mark.parametrize("reduction", ["sum", "max"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_three_forms_agree(name, reduction):
    """Scores of items, scores of leaves and calls with TRL's signature give the same values for every row and leaf."""
    catalog, step = make_catalog(), make_step()
    leaves = all_leaves(catalog, step)
    reward = BUILT_IN[name](catalog).bind(catalog, TOKENIZER, reduction)
    over_leaves = reward.score_leaves(step, leaves)
    assert over_leaves.std() > 0.2 * over_leaves.mean() > 0
    torch.testing.assert_close(catalog.fold_items(reward.score_items(step), reduction), over_leaves)

    def plain(**keywords):
        return reward(**keywords)

    as_list = CompositeReward(plain, catalog, TOKENIZER, leaf_reduction=reduction).of(make_step()).score(leaves)
    as_tensor = CompositeReward(reward, catalog, leaf_reduction=reduction).of(make_step()).score(leaves)
    torch.testing.assert_close(as_list.parts["plain"], as_tensor.parts[reward.__name__], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(as_list.log_rewards, as_tensor.log_rewards, atol=1e-4, rtol=1e-4)


def test_a_target_that_was_hardly_ever_shown_counts_more():
    catalog, step = make_catalog(), make_step()
    targets, items = step.columns["target"], list(catalog.items)
    counts = {item: 4 * place for place, item in enumerate(items)}
    mean = sum(counts.values()) / len(counts)
    for strength, clip in ((1.0, 3.0), (0.5, 100.0)):
        reward = GroundTruthReward(strength, counts, clip).bind(catalog)
        expected = [min(clip, ((mean + 1) / (counts[target] + 1)) ** strength) for target in targets]
        scores = reward.score_items(step)
        assert scores.sum(1).tolist() == pytest.approx(expected)
        assert [items[i] for i in scores.argmax(1).tolist()] == targets
    with pytest.raises(ValueError, match="needs item_counts"):
        GroundTruthReward(1.0)
    for option in ({"clip": 5}, {"popularity": "impressions"}):
        with pytest.raises(ValueError, match="with a popularity_correction only"):
            GroundTruthReward.check_spec(option)
    with pytest.raises(ValueError, match="clip is 0"):
        GroundTruthReward(clip=0)
    with pytest.raises(ValueError, match="item_counts has shape"):
        GroundTruthReward(1.0, [1, 2]).bind(catalog)


def test_a_uniform_share_gives_every_item_the_same():
    catalog, step = make_catalog(), make_step()
    scores = UniformReward().bind(catalog).score_items(step)
    assert torch.equal(scores, torch.full_like(scores, 1 / len(catalog)))
    composite = CompositeReward([GroundTruthReward(), UniformReward()], catalog, weights=[0.8, 0.2])
    shares = composite.dense(step).result.log_rewards.exp()
    expected = 0.2 * catalog.leaf_sizes / len(catalog)
    for row, target in enumerate(catalog.leaf_of(step.columns["target"]).tolist()):
        others = torch.arange(len(expected)) != target
        torch.testing.assert_close(shares[row, others], expected[others])
        assert shares[row, target] == pytest.approx(0.8 + float(expected[target]))


def test_ground_truth_marks_the_targets_leaf():
    catalog, step = make_catalog(), make_step()
    scores = GroundTruthReward().bind(catalog).score_items(step)
    assert [catalog.items[i] for i in scores.argmax(1)] == step.columns["target"]
    assert scores.sum(1).tolist() == [1, 1, 1, 1]


def test_collaborative_is_the_softmax_of_the_corrected_scores():
    catalog, step, teacher = make_catalog(), make_step(), TableTeacher()
    counts = [float(i) for i in range(len(catalog))]
    reward = CollaborativeReward(teacher, 0.5, 0.3, counts).bind(catalog)
    score = teacher.score(step.columns["history"])
    for j, item in enumerate(catalog.items):
        column = (score[:, teacher.items.index(item)] - 0.3 * torch.tensor(counts[j] + 1).log()) / 0.5
        log_z = torch.logsumexp(
            torch.stack([
                (score[:, teacher.items.index(other)] - 0.3 * torch.tensor(counts[k] + 1).log()) / 0.5
                for k, other in enumerate(catalog.items)
            ]), 0,
        )  # fmt: skip
        torch.testing.assert_close(reward.score_items(step)[:, j], (column - log_z).exp())


def test_rewards_that_share_a_teacher_score_a_batch_once():
    catalog, step, teacher = make_catalog(), make_step(), TableTeacher()
    sharp, flat = (CollaborativeReward(teacher, t).bind(catalog) for t in (0.5, 5.0))
    assert sharp.score_items(step).max() > flat.score_items(step).max()
    assert teacher.calls == 1


def test_any_callable_is_a_teacher():
    catalog, step = make_catalog(), make_step()
    reward = CollaborativeReward(lambda histories: torch.eye(9)[: len(histories)].tolist()).bind(catalog)
    assert reward.score_items(step).argmax(1).tolist() == [0, 1, 2, 3]


def test_min_max_by_hand():
    """Each row is in [0, 1], with the correction before the normalization and the exponent after it.

    Equal scores give 1 for all items.
    """
    catalog, step, teacher = make_catalog(), make_step(), TableTeacher()
    counts = [float(i * i) for i in range(len(catalog))]
    reward = CollaborativeReward(teacher, 1.0, 0.5, counts, normalization="min_max", exponent=3.0).bind(catalog)
    order = [teacher.items.index(item) for item in catalog.items]
    for row, score in zip(reward.score_items(step), teacher.score(step.columns["history"])[:, order], strict=True):
        score = score - 0.5 * (torch.tensor(counts) + 1).log()
        torch.testing.assert_close(row, ((score - score.min()) / (score.max() - score.min())) ** 3)
        assert row.min() == 0 and row.max() == 1
    flat = CollaborativeReward(lambda histories: torch.full((len(histories), 9), -3.0), normalization="min_max")
    assert (flat.bind(catalog).score_items(step) == 1).all()


def test_standard_scores_by_hand():
    """Each row has mean 0 and deviation 1, in the order of the teacher; equal scores give 0 for all items."""
    catalog, step, teacher = make_catalog(), make_step(), TableTeacher()
    reward = CollaborativeReward(teacher, normalization="standard").bind(catalog)
    order = [teacher.items.index(item) for item in catalog.items]
    scores = teacher.score(step.columns["history"])[:, order].double().numpy()
    expected = (scores - scores.mean(1, keepdims=True)) / scores.std(1, keepdims=True)
    torch.testing.assert_close(reward.score_items(step).double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)
    flat = CollaborativeReward(lambda histories: torch.full((len(histories), 9), 0.1), normalization="standard")
    assert (flat.bind(catalog).score_items(step) == 0).all()
    with pytest.raises(ValueError, match="transform='power' rewards must be >= 0"):  # a power of it has no meaning
        CompositeReward(reward, catalog).dense(step)
    composite = CompositeReward(reward, catalog, transform="exp", beta=0.5, leaf_reduction="max")
    log_rewards = composite.dense(step).result.log_rewards
    best = torch.full_like(log_rewards, -torch.inf)
    best.scatter_reduce_(1, catalog.leaf_of(catalog.items).expand(4, -1), reward.score_items(step) / 2, "amax")
    torch.testing.assert_close(log_rewards, best)


@pytest.mark.parametrize("normalization", ["min_max", "standard"])
def test_a_teachers_nan_is_reported(normalization):
    broken = CollaborativeReward(
        lambda histories: torch.full((len(histories), 9), torch.nan), normalization=normalization
    )
    with pytest.raises(ValueError, match="teacher .* has nan as its best score for history 0"):
        CompositeReward(broken, make_catalog()).dense(make_step())


def test_interaction_levels_by_hand():
    """Purchased is 10, clicked is 1, a repeated item has its higher level, the target has its own value, others 0."""
    catalog, step = make_catalog(), make_step()
    expected = [{"apple": 10, "fig": 1, "quince": 1}, {"date": 10}, {"pear": 10, "nut": 10}, {"quince": 10, "kiwi": 1}]
    scores = InteractionReward().bind(catalog).score_items(step)
    for row, values in zip(scores, expected, strict=True):
        assert row.tolist() == [values.get(item, 0) for item in catalog.items]
    levels = InteractionReward((0, 1, 5), target=None).bind(catalog).score_items(step)
    assert levels[:, catalog.items.index("quince")].tolist() == [1, 0, 0, 0]
    assert levels[0, catalog.items.index("apple")] == 5  # purchased
    assert levels[1].sum() == 1 and levels[1, catalog.items.index("date")] == 1  # the target, clicked
    empty = make_step((0,), session_items=[[]], session_levels=[[]])
    assert InteractionReward(target=None).bind(catalog).score_items(empty).tolist() == [[0] * 9]
    leaf = catalog.leaf_of(["apple"])[None]  # the leaf of apple and quince
    row = step.rows(slice(0, 1))
    for reduction, value in (("sum", 11), ("max", 10)):
        assert InteractionReward().bind(catalog, None, reduction).score_leaves(row, leaf).item() == value


def step_of(rows, catalog):
    """Make one step of all rows, without prompts."""
    columns = rows[:]
    return Step({}, torch.tensor(columns["row_id"]), catalog.leaf_of(columns["target"]), columns)


def test_interaction_reads_the_sessions_of_the_shop():
    """Reads the columns of `leave_one_out` and the levels of the log. Other purchases than the target are 10 too."""
    data, _ = SyntheticShop(seed=1, n_users=30, n_items=20, min_users_shown=5).generate()
    rows = leave_one_out(data).train
    catalog = ItemCatalog.from_semantic_ids(data.semantic_ids, build_tokenizer(data.semantic_ids))
    scores = InteractionReward().bind(catalog).score_items(step_of(rows, catalog))
    seen = set()
    for row, score in zip(rows, scores, strict=True):
        levels = dict(zip(row["session_items"], row["session_levels"], strict=True))
        for item, value in zip(catalog.items, score.tolist(), strict=True):
            level = PURCHASED if item == row["target"] else levels.get(item, SHOWN)
            assert value == {SHOWN: 0, CLICKED: 1, PURCHASED: 10}[level]
            seen.add(level)
    assert seen == {SHOWN, CLICKED, PURCHASED}


def test_token_similarity_by_hand():
    catalog, step = make_catalog(), make_step()
    leaves = all_leaves(catalog, step)
    every, prefix, share = (
        TokenSimilarityReward(**options).bind(catalog).score_leaves(step, leaves)
        for options in ({}, {"prefix": True}, {"normalize": True})
    )
    for row, target in enumerate(step.columns["target"]):
        target_id = SEMANTIC_IDS[target]
        for leaf in range(catalog.tree.num_leaves):
            other = SEMANTIC_IDS[catalog.items_of(leaf)[0]]
            same = [a == b for a, b in zip(target_id, other, strict=False)]
            assert every[row, leaf] == sum(same)
            assert prefix[row, leaf] == ([*same, False]).index(False)
            assert share[row, leaf] == pytest.approx(sum(same) / len(target_id))
        assert every[row, catalog.leaf_of([target])[0]] == len(target_id)  # even if two items share the id
    assert (every != prefix).any()


def test_likelihood_is_the_probability_under_the_frozen_policy():
    """Dropout is off, there is no gradient, and a model in training mode stays in training mode."""
    catalog, step = make_catalog(), make_step()
    policy = make_policy(catalog)
    expected = policy.leaf_log_probs(step.prompts).exp()
    for layer in policy.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    policy.model.train()
    policy.model.lm_head.eval()
    reward = LikelihoodReward(policy).bind(catalog)
    scores = reward.score_leaves(step, all_leaves(catalog, step))
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores.sum(1), torch.ones(4))
    assert not scores.requires_grad
    assert policy.model.training and policy.model.model.layers[0].training and not policy.model.lm_head.training


@pytest.mark.parametrize("make", [make_policy, lambda catalog: make_policy_of(make_seq2seq(), catalog)])
def test_likelihood_of_the_policy_in_training(make):
    """Uses the current policy, without gradient, dropout or a change of mode.

    Log-probabilities that the trainer has computed already are reused.
    """
    catalog, step = make_catalog(), make_step()
    policy, leaves = make(catalog), all_leaves(catalog, step)
    reward = LikelihoodReward()
    composite = CompositeReward([GroundTruthReward(), reward], catalog)
    assert composite.sampled_only == ["likelihood"] and not composite.can_score_all
    policy.model.train()
    for _ in range(2):
        expected = policy.leaf_log_probs(step.prompts).exp()
        scores = composite.of(step, policy).score(leaves).parts["likelihood"]
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)
        assert not scores.requires_grad and policy.model.training
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.mul_(0.8)
    known = torch.rand(leaves.shape).log().requires_grad_()
    assert torch.equal(reward.score_leaves(step, leaves, known), known.detach().exp())
    for policy_or_none in (None, policy):
        result = composite.of(step, policy_or_none).score(leaves, known)
        assert torch.equal(result.parts["likelihood"], known.detach().exp()) and not result.log_rewards.requires_grad
    with pytest.raises(
        ValueError, match="neither a model nor a policy in training. GFlowNetTrainer passes the policy"
    ):
        composite.of(step).score(leaves)
    with pytest.raises(ValueError, match="neither a model nor a policy in training"):
        reward.score_items(step)


@pytest.mark.parametrize(("beta", "transform"), [(1.0, "power"), (2.0, "power"), (1.0, "exp")])
def test_fixed_point_with_the_likelihood_of_the_policy(beta, transform):
    """Iterating pi <- R(pi) / Z gives r / Z with exponent 1, as without the term, and otherwise a sharper policy."""
    catalog, step = make_catalog(), make_step()
    leaves = all_leaves(catalog, step)
    teacher = CollaborativeReward(TableTeacher())
    without = CompositeReward(teacher, catalog, floor=0.0, beta=beta, transform=transform)
    composite = CompositeReward([teacher, LikelihoodReward()], catalog, floor=0.0, beta=beta, transform=transform)
    target = without.of(step).log(leaves).log_softmax(1)
    log_pi = torch.full_like(target, 1 / 8).log()
    for _ in range(200):
        log_pi = composite.of(step).log(leaves, log_pi).log_softmax(1)
    entropy, target_entropy = (-(p.exp() * p).sum(1) for p in (log_pi, target))
    if beta == 1 and transform == "power":
        torch.testing.assert_close(log_pi, target, atol=1e-5, rtol=1e-5)
    else:
        assert (entropy < target_entropy - 1e-4).all()


def test_completions_of_a_plain_trl_trainer():
    """Works without `items`, with an end token, and with completions that do not spell an item."""
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


def test_invalid_options_raise_errors():
    catalog, step = make_catalog(), make_step()
    with pytest.raises(ValueError, match=r"'ground_truth' has no catalog; call bind\(catalog\) first"):
        GroundTruthReward().score_items(step)
    with pytest.raises(ValueError, match="'ground_truth' needs the dataset column 'target'"):
        GroundTruthReward().bind(catalog).score_items(make_step(without=["target"]))
    with pytest.raises(
        ValueError, match="temperature of CollaborativeReward is 0.*; it must be a finite number above 0"
    ):
        CollaborativeReward(TableTeacher(), temperature=0)
    with pytest.raises(ValueError, match="needs item_counts"):
        CollaborativeReward(TableTeacher(), popularity_correction=0.5)
    with pytest.raises(ValueError, match=r"item_counts has shape \(2,\), but the catalog has 9 items"):
        CollaborativeReward(TableTeacher(), popularity_correction=0.5, item_counts=[1, 2]).bind(catalog)
    with pytest.raises(ValueError, match="normalization is 'minmax'; choose 'softmax' or 'min_max' or 'standard'"):
        CollaborativeReward(TableTeacher(), normalization="minmax")
    with pytest.raises(ValueError, match="exponent of CollaborativeReward is 0.*; it must be a finite number above 0"):
        CollaborativeReward(TableTeacher(), normalization="min_max", exponent=0)
    with pytest.raises(ValueError, match="The exponent is 2; .*For a softmax, set temperature=0.5 instead"):
        CollaborativeReward(TableTeacher(), exponent=2)
    with pytest.raises(
        ValueError, match="The temperature is 2, but normalization='min_max' does not depend on a temp"
    ):
        CollaborativeReward(TableTeacher(), 2, normalization="min_max")
    broken = TableTeacher()
    broken.table = broken.table[:, :4]
    broken.items = list(catalog.items)
    with pytest.raises(ValueError, match=r"Reward 'collaborative': its teacher returned scores of shape \(4, 4\)"):
        CollaborativeReward(broken).bind(catalog).score_items(step)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": ()}, "give a list with a number for each level"),
        ({"values": (0, -1)}, "values is -1; it must be a finite number of at least 0"),
        ({"target": float("nan")}, "target is nan; it must be a finite number of at least 0"),
        ({"values": (0, "high")}, "values is 'high'; it must be a finite number"),
        ({"values": (0, 10, 1)}, "a higher level must not have a lower value"),
    ],
)
def test_interaction_values_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        InteractionReward(**options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"session_levels": [[1], [0, 1], [2], [1]]}, "row 0 of the batch has 4 session_items but 1 session_levels"),
        (
            {"session_levels": [[0, 1, 2, 3], [0, 1], [2, 0, 1], [1]]},
            "item 'apple' in row 0 of the batch has the level 3",
        ),
        (
            {"session_levels": [[0, 1, 2, "x"], [0, 1], [2, 0, 1], [1]]},
            "has the level 'x'; it must be an integer from 0 to 2, because 3 values were given",
        ),
        (
            {"session_items": [["fig"] * 3 + ["soap"], ["fig"] * 2, ["nut"] * 3, ["fig"]]},
            "Item 'soap' is not in the catalog",
        ),
        ({"session_items": None}, "'interaction' needs the dataset column 'session_items'"),
    ],
)
def test_invalid_sessions_raise_errors(changes, message):
    columns = {name: value for name, value in changes.items() if value is not None}
    step = make_step(without=changes.keys() - columns.keys(), **columns)
    with pytest.raises(ValueError, match=message):
        InteractionReward().bind(make_catalog()).score_items(step)


def test_trl_calls_provide_target_leaves_and_row_ids():
    """A reward that reads `step.target_leaves` or `step.row_ids` has the same values in TRL's own trainers."""

    class Hit(Reward):
        def score_leaves(self, step, leaves):
            return (leaves == step.target_leaves[:, None]) * step.row_ids[:, None].float()

    reward = Hit("hit").bind(make_catalog())
    ids = [TOKENIZER.convert_tokens_to_ids(SEMANTIC_IDS[item]) for item in ("apple", "fig")]
    assert reward(["-"] * 2, completion_ids=ids, target=["quince", "date"], row_id=[7, 8]) == [7, 0]


def test_likelihood_needs_a_model_or_a_policy():
    with pytest.raises(TypeError, match="got str; it needs a model or a TreePolicy"):
        LikelihoodReward("sft_checkpoint")


@pytest.mark.parametrize(
    "reward", [GroundTruthReward, lambda **options: CollaborativeReward(TableTeacher(), **options)]
)
@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        (torch.full((9,), float("nan")), ValueError, "item_counts has nan for item"),
        ({"fig": -1}, ValueError, "item_counts has -1.0 for item 'fig'"),
        ({"fig": "many"}, TypeError, "item_counts is .*; give a number per item"),
        (5, ValueError, r"item_counts has shape \(\), but the catalog has 9 items"),
        ([10**400] * 9, TypeError, "item_counts is .*; give a number per item"),
    ],
)
def test_counts_of_a_correction_are_checked(reward, counts, error, message):
    with pytest.raises(error, match=message):
        reward(popularity_correction=0.5, item_counts=counts).bind(make_catalog())


def test_models_of_rewards_are_checked():
    with pytest.raises(TypeError, match="model is of type str; it must be a sequence classifier"):
        RewardModel("outputs/classifier", None)
    with pytest.raises(TypeError, match="model is of type NoneType; it must be a causal language model"):
        TitleLikelihoodReward(None, None, {})
