"""Evaluation on exposed items by the trainer, compared with brute force over all leaves; the truth chooses nothing."""

import math
import random

import pytest
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback

from gflowtrl import CausalTreePolicy
from gflowtrl.data import ExposedCollator, exposed_rows
from gflowtrl.data.interactions import Exposed
from gflowtrl.finite import NonFiniteError
from gflowtrl.metrics import exposed_metrics
from gflowtrl.rewards import GroundTruthReward
from gflowtrl.trainer import candidate_log_probs

from .world import ITEMS, SEMANTIC_IDS, make_rows, make_trainer


def make_exposed(users: int = 9, seed: int = 0) -> Dataset:
    """Users with one to seven exposed items; "i001" and "twin" share a semantic id."""
    chance = random.Random(seed)
    logs = [chance.sample(ITEMS, chance.randint(1, 5)) for _ in range(users)]
    shown = {}
    for user in range(users):
        items = ["i001", "twin", *chance.sample([i for i in ITEMS if i not in ("i001", "twin")], 5)][: user % 7 + 1]
        shown[user] = Exposed(items, [chance.randint(0, 1) for _ in items])
    return exposed_rows(range(users), logs, shown).rows


def make(folder, **options):
    return make_trainer(folder, [GroundTruthReward()], **options)


def brute_force(trainer, rows) -> list[list[float]]:
    """The log-probability of each candidate: that of its leaf, shared by the items there."""
    policy, catalog = CausalTreePolicy(trainer.model.eval(), trainer._catalog), trainer._catalog
    sizes = {item: sum(SEMANTIC_IDS[other] == SEMANTIC_IDS[item] for other in ITEMS) for item in ITEMS}
    scores = []
    for history, candidates in zip(rows["history"], rows["candidates"], strict=True):
        (log_probs,) = policy.leaf_log_probs(trainer._encoder([history]))
        scores.append([float(log_probs[catalog.leaf_of([i])]) - math.log(sizes[i]) for i in candidates])
    return scores


def test_evaluate_ranks_the_candidates_by_the_policy(tmp_path):
    rows = make_exposed()
    trainer = make(tmp_path, eval_dataset={"validation": make_rows(6, 1, 500), "exposed": rows},
                           per_device_eval_batch_size=4)  # fmt: skip
    expected = brute_force(trainer, rows)
    width = max(map(len, expected))
    scores = torch.tensor([row + [0.0] * (width - len(row)) for row in expected])
    liked = torch.tensor([row + [-100] * (width - len(row)) for row in rows["liked"]])
    metrics = trainer.evaluate()
    for name, values in exposed_metrics(scores, liked).items():
        assert metrics[f"eval_exposed_{name}"] == pytest.approx(float(values.nanmean())), name
    assert "eval_validation_ndcg@10" in metrics
    assert trainer.evaluate(rows)["eval_auc"] == pytest.approx(metrics["eval_exposed_auc"])

    batch = ExposedCollator(trainer._encoder)(list(rows))
    policy = CausalTreePolicy(trainer.model, trainer._catalog)
    found = candidate_log_probs(policy, batch["prompts"], batch["candidates"])
    present = batch["candidates"] >= 0
    assert torch.allclose(found[present], scores[:, : found.shape[1]][present], atol=1e-5)


def test_predict_scores_the_candidates_in_the_order_of_the_rows(tmp_path):
    rows = make_exposed()
    trainer = make(tmp_path, per_device_eval_batch_size=4, dataloader_drop_last=True)
    output = trainer.predict(rows)
    for found, liked, expected, row in zip(
        output.predictions, output.label_ids, brute_force(trainer, rows), rows, strict=True
    ):
        assert found[: len(expected)] == pytest.approx(expected, abs=1e-5)
        assert liked.tolist()[: len(expected)] == row["liked"] and set(liked[len(expected) :]) <= {-100}
    evaluated = trainer.evaluate(rows)
    for name in ("ndcg@5", "recall@5", "auc"):
        assert output.metrics[f"test_{name}"] == pytest.approx(evaluated[f"eval_{name}"])
    with pytest.raises(TypeError, match="predict takes one dataset of rows, not a dict; call it for each"):
        trainer.predict({"exposed": rows})


def test_scores_of_many_candidates_are_computed_in_parts(tmp_path, monkeypatch):
    trainer, rows = make(tmp_path), make_exposed()
    batch = ExposedCollator(trainer._encoder)(list(rows))
    policy = CausalTreePolicy(trainer.model.eval(), trainer._catalog)
    whole = candidate_log_probs(policy, batch["prompts"], batch["candidates"])
    monkeypatch.setattr("gflowtrl.trainer.exposed.TRAJECTORIES_PER_FORWARD", 20)
    assert torch.allclose(candidate_log_probs(policy, batch["prompts"], batch["candidates"]), whole, atol=1e-5)


def test_exposed_items_choose_no_checkpoint_and_are_not_trained_on(tmp_path):
    rows, validation = make_exposed(), make_rows(6, 1, 500)
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2,
            "eval_steps": 2}  # fmt: skip
    trainer = make(tmp_path, eval_dataset={"exposed": rows, "validation": validation}, **best)
    assert trainer.args.metric_for_best_model == "eval_validation_ndcg@10"
    trainer.train()
    assert {"eval_exposed_auc", "eval_validation_ndcg@10"} <= {
        name for entry in trainer.state.log_history for name in entry
    }
    with pytest.raises(ValueError, match="must not be chosen by exposed items"):
        make(tmp_path, eval_dataset={"exposed": rows, "validation": validation},
                     metric_for_best_model="eval_exposed_auc", **best)  # fmt: skip
    for data in (rows, {"exposed": rows}):
        with pytest.raises(ValueError, match="must not be chosen by exposed items"):
            make(tmp_path, eval_dataset=data, **best)
    with pytest.raises(ValueError, match="must not be chosen by exposed items"):
        make(tmp_path, eval_dataset=rows, eval_strategy="steps", eval_steps=2, callbacks=[EarlyStoppingCallback()])
    with pytest.raises(ValueError, match="train_dataset has candidates and likes"):
        make(tmp_path, train_dataset=rows)


def test_unknown_candidates_are_named(tmp_path):
    rows = exposed_rows([0], [["i001"]], {0: Exposed(["nowhere"], [1])}).rows
    with pytest.raises(ValueError, match="contains item 'nowhere'"):
        make(tmp_path, eval_dataset=rows)


def test_a_model_that_computes_nan_raises(tmp_path):
    trainer = make(tmp_path, eval_dataset=make_exposed())
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteError):
        trainer.evaluate()
