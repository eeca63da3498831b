"""`evaluate()` compared with brute force over all leaves, and the Trainer's use of its metrics."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback

from gflowtrl import CausalTreePolicy
from gflowtrl.rewards import CollaborativeReward, GroundTruthReward, LikelihoodReward
from gflowtrl.trainer import compare_with_rewards, rank_rows
from tests.tiny import tiny_model

from .world import ITEMS, TOKENIZER, make_catalog, make_rows, make_trainer, teacher, weights


LEAVES = make_catalog().tree.num_leaves


def rewards() -> list:
    return [GroundTruthReward(), CollaborativeReward(teacher)]


def brute_force(trainer, rows) -> tuple[torch.Tensor, dict[str, float]]:
    """Rank all leaves of each row exactly, and compute recall, NDCG and coverage by definition."""
    policy, catalog = CausalTreePolicy(trainer.model.eval(), trainer._catalog), trainer._catalog
    ranked = torch.cat(
        [policy.leaf_log_probs(trainer._encoder([history])).argsort(1, descending=True) for history in rows["history"]]
    )
    metrics = {}
    for k in (5, 10):
        ranks = [
            row.index(int(catalog.leaf_of([t]))) + 1 for row, t in zip(ranked.tolist(), rows["target"], strict=True)
        ]
        hits = [rank for rank in ranks if rank <= k]
        metrics[f"recall@{k}"] = len(hits) / len(rows)
        metrics[f"ndcg@{k}"] = sum(1 / math.log2(rank + 1) for rank in hits) / len(rows)
        lists = [[item for leaf in row for item in catalog.items_of(leaf)][:k] for row in ranked.tolist()]
        metrics[f"coverage@{k}"] = len({item for items in lists for item in items}) / len(ITEMS)
    return ranked, metrics


def test_evaluate_equals_brute_force_over_all_leaves(tmp_path):
    rows = make_rows(10, 1, 500)
    trainer = make_trainer(tmp_path, rewards(), eval_dataset=rows, eval_num_beams=LEAVES, per_device_eval_batch_size=3)
    ranked, expected = brute_force(trainer, rows)
    metrics = trainer.evaluate()
    assert 0 < expected["ndcg@5"] < expected["recall@5"] < expected["recall@10"] < 1
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value), name
    policy = CausalTreePolicy(trainer.model, trainer._catalog)
    assert torch.equal(rank_rows(policy, trainer._encoder, rows, LEAVES, batch_size=4, progress=False), ranked)


def test_several_datasets_have_separate_metrics_and_others_can_be_passed(tmp_path):
    easy, hard = make_rows(6, 1, 500), make_rows(9, 2, 600)
    trainer = make_trainer(tmp_path, rewards(), eval_dataset={"easy": easy, "hard": hard}, eval_num_beams=LEAVES)
    metrics = trainer.evaluate()
    for name, rows in (("easy", easy), ("hard", hard)):
        _, expected = brute_force(trainer, rows)
        assert metrics[f"eval_{name}_ndcg@10"] == pytest.approx(expected["ndcg@10"])
        assert trainer.evaluate(rows)["eval_ndcg@10"] == pytest.approx(expected["ndcg@10"])
        assert trainer.predict(rows).metrics["test_ndcg@10"] == pytest.approx(expected["ndcg@10"])


def test_every_row_is_evaluated_even_if_training_drops_the_last_batch(tmp_path):
    options = {"eval_dataset": make_rows(7, 1, 500), "per_device_eval_batch_size": 4, "dataloader_drop_last": True}
    trainer = make_trainer(tmp_path, rewards(), **options)
    trainer.train()
    metrics = trainer.evaluate()
    expected = brute_force(trainer, options["eval_dataset"])[1]
    assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected)
    assert trainer.args.dataloader_drop_last and len(trainer.get_train_dataloader()) == 3


def test_predict_ranks_every_row_in_its_order(tmp_path):
    trainer, rows = make_trainer(tmp_path, [GroundTruthReward()], dataloader_drop_last=True), make_rows(11, 3, 900)
    output, policy = trainer.predict(rows), CausalTreePolicy(trainer.model.eval(), trainer._catalog)
    ranked = rank_rows(policy, trainer._encoder, rows, 10, progress=False)
    assert output.predictions.tolist() == ranked.tolist()
    assert [ITEMS.index(target) for target in rows["target"]] == output.label_ids.tolist()


def test_persistent_workers_do_not_mix_up_the_datasets(tmp_path):
    rows = {"a": make_rows(5, 1, 500), "b": make_rows(7, 2, 600)}
    trainer = make_trainer(
        tmp_path, [GroundTruthReward()], eval_dataset=rows, dataloader_persistent_workers=True,
        dataloader_num_workers=1,
    )  # fmt: skip
    found = {name: len(trainer.get_eval_dataloader(name).dataset) for name in rows}
    assert found == {"a": 5, "b": 7} and trainer.args.dataloader_persistent_workers


def test_breadth_uses_the_given_counts(tmp_path):
    counts = torch.arange(len(ITEMS))
    rows = make_rows(6, 1, 500)
    own = make_trainer(tmp_path, rewards(), eval_dataset=rows, item_counts=counts)
    targets = make_trainer(tmp_path, rewards(), eval_dataset=rows)
    assert own.evaluate()["eval_long_tail@10"] != targets.evaluate()["eval_long_tail@10"]


class WreckAt(TrainerCallback):
    """Damage the model after a step, so that the best checkpoint is an earlier one."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, model, **_):
        if state.global_step >= self.step:
            with torch.no_grad():
                model.lm_head.weight.zero_()
                model.flow_heads.outer.bias.fill_(100.0)


def test_the_best_model_is_loaded_and_its_card_says_so(tmp_path, warned):
    trainer = make_trainer(
        tmp_path, rewards(), loss_type="sft,trajectory_balance", eval_dataset=make_rows(), eval_strategy="steps",
        eval_steps=2, save_strategy="steps", save_steps=2, max_steps=8, load_best_model_at_end=True,
        metric_for_best_model="eval_ndcg@10", callbacks=[WreckAt(5)],
    )  # fmt: skip
    trainer.train()
    history = [log["eval_ndcg@10"] for log in trainer.state.log_history if "eval_ndcg@10" in log]
    assert trainer.state.best_global_step == 4 and max(history) == history[1]
    assert trainer.evaluate()["eval_ndcg@10"] == pytest.approx(history[1])
    heads = load_file(tmp_path / "checkpoint-4" / "flow_heads.safetensors")
    assert len(heads) == 4 and all(torch.equal(weights(trainer)[name], value) for name, value in heads.items())
    trainer.save_model(tmp_path / "final")
    card = (tmp_path / "final" / "README.md").read_text()
    assert "| step | 4 |" in card and "validation at step 4 |" in card and f"| ndcg@10 | {history[1]:.4f} |" in card
    assert f"| ndcg@10 | {history[3]:.4f} |" in (tmp_path / "checkpoint-8" / "README.md").read_text()
    assert not warned


def test_early_stopping_uses_the_metric(tmp_path, warned):
    """With learning rate 0, the third evaluation is the second one without progress."""
    trainer = make_trainer(
        tmp_path, rewards(), learning_rate=0.0, eval_dataset=make_rows(6, 1, 500), eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, max_steps=10, load_best_model_at_end=True,
        metric_for_best_model="eval_ndcg@10", callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3
    assert not warned


def test_evaluation_changes_neither_training_nor_the_model(tmp_path):
    plain = make_trainer(tmp_path, rewards())
    plain.train()
    watched = make_trainer(tmp_path, rewards(), eval_dataset=make_rows(6, 1, 500), eval_strategy="steps", eval_steps=1)
    watched.train()
    expected = weights(plain)
    assert all(torch.equal(value, expected[name]) for name, value in weights(watched).items())


def test_distance_to_the_reward_equals_that_of_enumerated_distributions(tmp_path):
    """With a collision (two items share a leaf, whose reward is their sum) and any number of batches."""
    rows = make_rows(7, 1, 500)
    trainer = make_trainer(tmp_path, rewards(), eval_dataset=rows, reward_weights=[0.3, 0.7], reward_floor=0.0)
    catalog, policy = trainer._catalog, CausalTreePolicy(trainer.model.eval(), trainer._catalog)
    distances = compare_with_rewards(policy, trainer.rewards, trainer._encoder, rows, batch_size=3, progress=False)
    for i, row in enumerate(rows):
        reward = torch.zeros(LEAVES, dtype=torch.double)
        for item, probability in zip(ITEMS, teacher([row["history"]])[0].double().softmax(0), strict=True):
            reward[catalog.leaf_of([item])] += 0.7 * probability + 0.3 * (item == row["target"])
        target = reward / reward.sum()
        probs = policy.leaf_log_probs(trainer._encoder([row["history"]]))[0].exp()
        assert distances["total_variation"][i].item() == pytest.approx((probs - target).abs().sum().item() / 2, 1e-4)
        middle = (probs + target) / 2
        divergence = sum((p * (p / middle).log()).sum().item() / 2 for p in (probs.double(), target))
        assert distances["jensen_shannon"][i].item() == pytest.approx(divergence, rel=1e-4)


def test_the_distance_is_zero_if_the_reward_is_the_policys_likelihood(tmp_path):
    trainer = make_trainer(tmp_path, LikelihoodReward(tiny_model(len(TOKENIZER))), reward_floor=0.0)
    policy = CausalTreePolicy(trainer.model.eval(), trainer._catalog)
    distances = compare_with_rewards(
        policy, trainer.rewards, trainer._encoder, make_rows(4), batch_size=3, progress=False, bins=True
    )
    for name in ("total_variation", "jensen_shannon"):
        assert distances[name].shape == (4,) and distances[name].abs().max() < 1e-5
    assert distances["leaves"].sum(1).tolist() == [LEAVES] * 4
    torch.testing.assert_close(distances["policy"], distances["target"], rtol=1e-4, atol=1e-8)


def test_the_reference_model_is_part_of_the_target(tmp_path):
    """With a constant reward, pi_ref^1 R / Z is the reference model, which is the untrained policy."""
    trainer = make_trainer(tmp_path, Nothing(), ref_weight=1.0, loss_type="vargrad", reward_floor=0.0)
    policy = CausalTreePolicy(trainer.model.eval(), trainer._catalog)
    options = {"progress": False, "prior": trainer.prior}
    distances = compare_with_rewards(policy, trainer.rewards, trainer._encoder, make_rows(4), **options)
    assert distances["total_variation"].max() < 1e-5
    without = compare_with_rewards(policy, trainer.rewards, trainer._encoder, make_rows(4), progress=False)
    assert without["total_variation"].min() > 0.01


class Nothing:
    """The same reward for every leaf."""

    def score_items(self, step):
        return 1 / trainer_catalog.leaf_sizes[trainer_catalog.item_leaf].expand(len(step), -1)


trainer_catalog = make_catalog()
