"""Rival losses in the trainer: they increase the probability of the targets, and some use a reference."""

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from gflowtrl.data import Step
from gflowtrl.losses import LOSSES
from gflowtrl.policy import make_policy
from gflowtrl.rewards import GroundTruthReward, RankPenaltyReward
from tests.distributed.cases import Case, adapters_of
from tests.tiny import tiny_model

from .world import TOKENIZER, make_catalog, make_rows, make_trainer


CATALOG = make_catalog()


def target_probs(trainer) -> torch.Tensor:
    rows = make_rows()
    prompts = trainer._encoder(rows["history"])
    log_pi = make_policy(trainer.model.eval(), trainer._catalog).leaf_log_probs(prompts)
    return log_pi.exp().gather(1, CATALOG.leaf_of(rows["target"])[:, None])


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "sdpo", "num_generations": 4},
        {"loss_type": "grpo", "reward_transform": "exp", "sampler": "beam", "num_generations": 8},
        {"loss_type": ["sft", "sdpo"], "peft_config": adapters_of(Case("sdpo"))},
        {"loss_type": "bear"},
        {"loss_type": "ipa", "sampler": {"ground_truth": 1, "uniform": 3}, "loss_kwargs": {"ipa": {"beta": 1.0}}},
        {"loss_type": ["grpo", "sibling_grpo"], "reward_transform": "exp", "sampler": "beam", "num_generations": 8},
        {"loss_type": "gbpo", "reward_transform": "exp", "sampler": "beam", "num_generations": 8},
        {"loss_type": "flowrl", "sampler": {"ground_truth": 1, "uniform": 3}},
    ],
    ids=["sdpo", "grpo", "sft and sdpo with adapters", "bear", "ipa", "V-STAR", "gbpo", "flowrl"],
)
@torch.no_grad()
def test_targets_become_more_probable(tmp_path, options):
    names = options["loss_type"] if isinstance(options["loss_type"], list) else [options["loss_type"]]
    rewards = None
    if any(LOSSES[name].needs_rewards for name in names):
        rewards = [GroundTruthReward(), RankPenaltyReward()] if options["sampler"] == "beam" else GroundTruthReward()
    trainer = make_trainer(tmp_path, rewards, max_steps=30, **options)
    before = target_probs(trainer).mean()
    with torch.enable_grad():
        trainer.train()
    assert target_probs(trainer).mean() > before + 0.1
    assert trainer.prior is None  # a reference is not part of any reward
    assert (trainer.reference is not None) == any(LOSSES[name].needs_reference for name in names)


def test_the_reference_does_not_change(tmp_path):
    trainer = make_trainer(tmp_path, loss_type="sdpo", num_generations=4)
    batch = next(iter(trainer.get_train_dataloader()))
    leaves = torch.arange(23).expand(8, -1)
    before = trainer.reference.token_scores(trainer.model, batch["prompts"], leaves).log_probs
    trainer.train()
    assert torch.equal(before, trainer.reference.token_scores(trainer.model, batch["prompts"], leaves).log_probs)
    own = make_policy(trainer.model, trainer._catalog).score(batch["prompts"], leaves).log_probs
    assert (own - before).abs().max() > 0.1


def trl_dpo(tmp_path, model, reference) -> DPOTrainer:
    """TRL's trainer. The rows that it is created with do not matter."""
    rows = Dataset.from_list([{"prompt": "<a_1> <b_1>", "chosen": " <a_0> <b_0>", "rejected": " <a_2> <b_2>"}])
    args = DPOConfig(str(tmp_path), beta=0.5, use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)
    return DPOTrainer(model, reference, args=args, train_dataset=rows, processing_class=TOKENIZER)


@pytest.mark.parametrize("space", ["vocabulary", "tree"])
def test_sdpo_over_the_vocabulary_with_one_negative_is_trls_dpo_without_the_end_token(tmp_path, space):
    model, reference = (tiny_model(len(TOKENIZER), seed=seed) for seed in (0, 1))
    ours = make_trainer(
        tmp_path, model=model, ref_model=reference, loss_type=["sft", "sdpo"], loss_weights=[0.0, 1.0],
        loss_kwargs={"sdpo": {"beta": 0.5}}, num_generations=2, label_space=space, log_completions=True,
    )  # fmt: skip
    batch = next(iter(ours.get_train_dataloader()))
    loss = ours.compute_loss(ours.model, batch)
    loss.backward()
    gradient = [parameter.grad.clone() for parameter in model.parameters()]
    (ids, mask), leaves, tree = batch["prompts"].values(), ours._last_group.leaves, CATALOG.tree
    pairs = []
    for prompt, real, (target, other) in zip(ids, mask.bool(), leaves, strict=True):
        if target != other:  # a negative that equals the target is ignored
            chosen, rejected = (tree.paths[leaf][: tree.leaf_lengths[leaf]].tolist() for leaf in (target, other))
            pairs.append({"prompt_ids": prompt[real].tolist(), "chosen_ids": chosen, "rejected_ids": rejected})
    assert len(pairs) > 4
    theirs = trl_dpo(tmp_path, model, reference)
    model.zero_grad()
    expected = theirs.compute_loss(theirs.model, theirs.data_collator(pairs)) * len(pairs) / len(leaves)
    expected.backward()
    if space == "tree":
        assert abs(loss.item() - expected.item()) > 1e-3
        return
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for own, parameter in zip(gradient, model.parameters(), strict=True):
        torch.testing.assert_close(own, parameter.grad, rtol=1e-3, atol=1e-6)


def test_grpo_stays_over_the_tree_together_with_sdpo_over_the_vocabulary(tmp_path):
    """GRPO's reference is over the tree and S-DPO's over the vocabulary, from one forward."""
    options = {"num_generations": 4, "reward_transform": "exp", "ref_model": tiny_model(len(TOKENIZER), seed=1)}
    found = {}
    for space in ("vocabulary", "tree"):
        trainer = make_trainer(
            tmp_path, GroundTruthReward(), loss_type=["grpo", "sdpo"], label_space=space,
            loss_kwargs={"grpo": {"beta": 1.0}}, **options,
        )  # fmt: skip
        trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        found[space] = {name: float(trainer._metric_sums[f"loss/{name}"][0]) for name in ("grpo", "sdpo")}
    assert found["vocabulary"]["grpo"] == pytest.approx(found["tree"]["grpo"], rel=1e-4)
    assert abs(found["vocabulary"]["sdpo"] - found["tree"]["sdpo"]) > 1e-3


def test_a_rank_penalty_by_hand():
    reward = RankPenaltyReward().bind(CATALOG)
    target = CATALOG.items_of(5)[0]
    step = Step({}, torch.arange(2), torch.full((2,), -1), {"target": [target, target]})
    found = reward.score_leaves(step, torch.tensor([[7, 5, 1], [7, 2, 1]]))
    shares = [1 / torch.log2(torch.tensor(i + 2.0)) for i in range(3)]
    torch.testing.assert_close(found[0], torch.tensor([-shares[0] / sum(shares), 1.0, -shares[2] / sum(shares)]))
    assert found[1].tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="scores whole groups, not single completions"):
        reward(["a"], [[1]], target=[target])
