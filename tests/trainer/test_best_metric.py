"""The metric used by best checkpoints, early stopping and schedulers."""

import json

import pytest
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import SchedulerType

from gflowtrl import APAOConfig, GFlowNetConfig
from gflowtrl.rewards import GroundTruthReward
from gflowtrl.trainer.best_metric import metric_names

from . import world
from .world import make_rows, make_trainer


EVERY = {"eval_strategy": "steps", "eval_steps": 2}
BEST = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2, **EVERY}
PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", **EVERY}


def trainer(folder, **options):
    return make_trainer(folder, [GroundTruthReward()], **({"eval_dataset": make_rows(6, 1, 500)} | options))


@pytest.mark.parametrize("kind", [GFlowNetConfig, APAOConfig])
@pytest.mark.parametrize(
    "options", [BEST, PLATEAU, {"save_strategy": "best", **EVERY}], ids=["best at end", "plateau", "best only"]
)
def test_the_default_is_ndcg_at_the_primary_cutoff(tmp_path, kind, options):
    args = kind(str(tmp_path), use_cpu=True, **options)
    assert (args.metric_for_best_model, args.greater_is_better) == ("eval_ndcg@10", True)
    args = kind(str(tmp_path), use_cpu=True, eval_ks=[1, 5], **options)
    assert args.metric_for_best_model == "eval_ndcg@5"
    assert kind(str(tmp_path), use_cpu=True).metric_for_best_model is None


def test_metric_names_are_those_of_evaluate(tmp_path):
    made = trainer(tmp_path)
    found = {name for name in made.evaluate() if "@" in name}
    assert found == set(metric_names([5, 10]))
    several = trainer(tmp_path, eval_dataset={"old": make_rows(3, 1, 500), "new": make_rows(3, 2, 600)})
    found = {name for name in several.evaluate() if "@" in name}
    assert found == set(metric_names([5, 10], ["old", "new"]))


def test_best_checkpoints_and_early_stopping_work_without_a_name(tmp_path):
    made = trainer(tmp_path, **BEST, callbacks=[EarlyStoppingCallback(early_stopping_patience=5)])
    made.train()
    history = {log["step"]: log["eval_ndcg@10"] for log in made.state.log_history if "eval_ndcg@10" in log}
    assert made.state.best_metric == max(history.values()) == history[made.state.best_global_step]


def test_early_stopping_gets_a_default_metric(tmp_path):
    stopping = EarlyStoppingCallback(early_stopping_patience=1)
    made = trainer(tmp_path, learning_rate=0.0, max_steps=20, **EVERY, callbacks=[stopping])
    assert made.args.metric_for_best_model == "eval_ndcg@10"
    made.train()
    assert made.state.global_step < 20


def test_a_scheduler_lowers_the_rate_when_the_metric_no_longer_rises(tmp_path):
    """With learning rate 0 the metric does not change. The second half tests its direction."""
    made = trainer(tmp_path, max_steps=4, **PLATEAU)
    made.train()
    assert (made.lr_scheduler.mode, made.lr_scheduler.best) == (
        "max", max(log["eval_ndcg@10"] for log in made.state.log_history if "eval_ndcg@10" in log),
    )  # fmt: skip
    gini = GFlowNetConfig(str(tmp_path), use_cpu=True, metric_for_best_model="eval_gini@10", **PLATEAU)
    assert (gini.greater_is_better, gini.lr_scheduler_kwargs["mode"]) == (False, "min")
    assert {"reduce_lr_on_plateau"} <= {kind.value for kind in SchedulerType}
    kwargs = json.dumps({"mode": "min"})
    with pytest.raises(ValueError, match="has mode 'min', but greater_is_better is True.*Leave mode out"):
        GFlowNetConfig(str(tmp_path), use_cpu=True, lr_scheduler_kwargs=kwargs, **PLATEAU)


@pytest.mark.parametrize("name", ["eval_recall@20", "recall@3", "loss", "eval_loss", "eval_mrr@10"])
def test_a_metric_that_is_not_reported_is_an_error(tmp_path, name):
    with pytest.raises(
        ValueError, match=f"metric_for_best_model is '{name}'.*choose from eval_recall@5, eval_recall@10"
    ):
        trainer(tmp_path, metric_for_best_model=name)


def test_a_direction_that_contradicts_the_metric_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="greater_is_better is False, but higher values.*are better. Set greater"):
        GFlowNetConfig(str(tmp_path), use_cpu=True, greater_is_better=False, **BEST)


def test_several_datasets_have_prefixed_metrics(tmp_path):
    rows = {"old": make_rows(3, 1, 500), "new": make_rows(3, 2, 600)}
    made = trainer(tmp_path, eval_dataset=rows, **BEST)
    assert made.args.metric_for_best_model == "eval_old_ndcg@10"
    made.train()
    assert made.state.best_metric is not None
    named = trainer(tmp_path, eval_dataset=rows, metric_for_best_model="new_recall@5", **BEST)
    assert named.args.metric_for_best_model == "new_recall@5"
    with pytest.raises(
        ValueError, match="'eval_recall@5', which evaluate.. does not report; choose from eval_old_recall"
    ):
        trainer(tmp_path, eval_dataset=rows, metric_for_best_model="eval_recall@5", **BEST)


def test_a_metric_of_compute_metrics_has_the_name_of_its_dataset(tmp_path):
    """transformers would look for the plain name after the first evaluation, and stop the training there."""
    rows = {"old": make_rows(3, 1, 500), "new": make_rows(3, 2, 600)}
    options = {
        "eval_dataset": rows, "compute_metrics": lambda prediction: {"mine": float(len(prediction.predictions))},
        "greater_is_better": True, **BEST,
    }  # fmt: skip
    for name in ("mine", "eval_mine"):
        with pytest.raises(ValueError, match=f"is '{name}', but .* choose from eval_old_mine, eval_new_mine"):
            trainer(tmp_path, metric_for_best_model=name, **options)
    for name in ("new_mine", "eval_new_mine"):
        made = trainer(tmp_path, metric_for_best_model=name, max_steps=2, **options)
        made.train()
        assert made.state.best_metric == 3
    assert trainer(tmp_path, **(options | {"eval_dataset": rows["old"]}), metric_for_best_model="mine")


def test_early_stopping_can_be_added_later(tmp_path):
    made = trainer(tmp_path, learning_rate=0.0, max_steps=20, **EVERY)
    made.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    made.train()
    assert made.args.metric_for_best_model == "eval_ndcg@10" and made.state.global_step < 20


def test_a_subclass_can_report_another_metric(tmp_path, monkeypatch):
    class Priced(world.GFlowNetTrainer):
        def evaluate(self, *args, **kwargs):
            return super().evaluate(*args, **kwargs) | {"eval_revenue": float(self.state.global_step)}

    monkeypatch.setattr(world, "GFlowNetTrainer", Priced)
    made = trainer(tmp_path, metric_for_best_model="eval_revenue", greater_is_better=True, **BEST)
    made.train()
    assert made.state.best_metric == made.state.global_step
