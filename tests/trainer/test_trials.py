"""`model_init` and the search for hyperparameters: each training is new, and follows its own configuration."""

import optuna
import pytest
import torch
from peft import LoraConfig

from gflowtrl import APAOConfig, APAOTrainer
from gflowtrl.rewards import CollaborativeReward, GroundTruthReward
from gflowtrl.samplers import ReplaySampler
from gflowtrl.trainer import input_checks
from tests.tiny import tiny_model
from tests.trainer.world import TOKENIZER, losses, make_catalog, make_rows, make_trainer, teacher, weights


optuna.logging.set_verbosity(optuna.logging.WARNING)
FIXED = {"save_strategy": "no", "report_to": "none"}


class Model:
    """Makes models, and counts them."""

    def __init__(self):
        self.made = 0

    def __call__(self):
        self.made += 1
        return tiny_model(len(TOKENIZER))


def rewards():
    return [GroundTruthReward(), CollaborativeReward(teacher)]


def searched(tmp_path, space, rewards=rewards, **options):
    """Search on a grid of one hyperparameter, and return what each trial trained: (value, losses, weights)."""
    trainer, trained = make_trainer(tmp_path, rewards(), model=False, model_init=Model(), **FIXED, **options), []
    train = trainer.train

    def recorded(*args, trial=None, **kwargs):
        output = train(*args, trial=trial, **kwargs)
        trained.append((dict(trial.params), losses(trainer), weights(trainer)))
        return output

    trainer.train = recorded
    (name, values), *_ = space.items()
    best = trainer.hyperparameter_search(
        lambda trial: {name: trial.suggest_categorical(name, values)},
        n_trials=len(values),
        sampler=optuna.samplers.GridSampler({name: values}),
    )
    return trainer, best, trained


def alone(tmp_path, rewards=rewards, **options):
    """Train without a search."""
    trainer = make_trainer(tmp_path, rewards(), model=tiny_model(len(TOKENIZER)), **FIXED, **options)
    trainer.train()
    return trainer


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name])


def test_each_training_begins_anew(tmp_path):
    """The second train() gives the same model as the first, with a sampler and an adapter that have no past."""
    options = {"peft_config": LoraConfig(r=2), "loss_type": "trajectory_balance", "sampler": ReplaySampler()}
    model = Model()
    trainer = make_trainer(tmp_path, rewards(), model=False, model_init=model, **FIXED, **options)
    kept = []
    for _ in range(2):
        trainer.train()
        kept.append((losses(trainer)[-4:], weights(trainer)))
    assert kept[0][0] == kept[1][0] and model.made == 3
    assert_equal(kept[0][1], kept[1][1])
    plain = alone(tmp_path, peft_config=LoraConfig(r=2), loss_type="trajectory_balance", sampler=ReplaySampler())
    assert_equal(weights(plain), kept[0][1])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("reward_weights", [[1.0, 0.0], [0.2, 0.8]]),
        ("num_generations", [2, 6]),
        ("ref_weight", [0.0, 1.0]),
        ("loss_kwargs", [{}, {"vargrad": {"huber_delta": 0.1}}]),
    ],
)
def test_a_trial_equals_a_training_with_its_values(tmp_path, name, values):
    """Optuna chooses among names of values, so the space has their positions."""
    trainer, trained = make_trainer(tmp_path, rewards(), model=False, model_init=Model(), **FIXED), {}
    train = trainer.train

    def recorded(*args, trial=None, **kwargs):
        output = train(*args, trial=trial, **kwargs)
        trained[trial.params["position"]] = weights(trainer)
        return output

    trainer.train = recorded
    trainer.eval_dataset = make_rows(seed=1)
    trainer.hyperparameter_search(
        lambda trial: {name: values[trial.suggest_categorical("position", [0, 1])]},
        n_trials=2, sampler=optuna.samplers.GridSampler({"position": [0, 1]}),
    )  # fmt: skip
    for position, value in enumerate(values):
        assert_equal(trained[position], weights(alone(tmp_path, **{name: value})))
    assert any(not torch.equal(trained[0][key], trained[1][key]) for key in trained[0])


def test_the_best_trial_has_the_best_metric(tmp_path):
    options = {"eval_dataset": make_rows(seed=1)}
    _, best, trained = searched(tmp_path, {"learning_rate": [1e-5, 1e-2]}, **options)
    found = {}
    for values, _, state in trained:
        same = alone(tmp_path, **values, **options)
        assert_equal(weights(same), state)
        found[values["learning_rate"]] = same.evaluate()["eval_ndcg@10"]
    assert best.hyperparameters["learning_rate"] == max(found, key=found.get)
    assert best.objective == pytest.approx(max(found.values()))


def test_the_objective_may_be_another_metric(tmp_path):
    options = {"eval_dataset": {"a": make_rows(seed=1), "b": make_rows(seed=2)}}
    _, best, _ = searched(tmp_path, {"learning_rate": [1e-5, 1e-2]}, metric_for_best_model="b_gini@5", **options)
    trainer = alone(tmp_path, **best.hyperparameters, **options)
    assert best.objective == pytest.approx(trainer.evaluate()["eval_b_gini@5"])


def test_apao_follows_its_trials(tmp_path):
    args = APAOConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, eval_num_beams=10,
        eval_ks=[5, 10], logging_steps=1, **FIXED,
    )  # fmt: skip
    trainer = APAOTrainer(
        None, args, train_dataset=make_rows(), eval_dataset=make_rows(), processing_class=TOKENIZER,
        catalog=make_catalog(), model_init=Model(),
    )  # fmt: skip
    seen = []
    log = trainer.log
    trainer.log = lambda logs, *rest: (seen.append(sorted(trainer.losses)), log(logs, *rest))[1]
    trainer.hyperparameter_search(
        lambda trial: {"method": trial.suggest_categorical("method", ["pointwise", "pairwise"]), "num_negatives": 3},
        n_trials=2, sampler=optuna.samplers.GridSampler({"method": ["pointwise", "pairwise"]}),
    )  # fmt: skip
    assert {tuple(names) for names in seen} == {("prefix_pairwise", "sft"), ("prefix_pointwise", "sft")}


def test_a_trial_has_nothing_of_the_trial_before(tmp_path):
    """Conditional values, the loss, and the seed of random weights."""
    trainer, trained = make_trainer(tmp_path, rewards(), model=False, model_init=random_model, **FIXED), []
    spaces = [
        {"reward_beta": 3.0, "loss_type": ["vargrad", "sft"], "loss_kwargs": {"vargrad": {"huber_delta": 0.1}}},
        {"loss_type": "contrastive_balance", "seed": 7},
    ]
    train, trainer.eval_dataset = trainer.train, make_rows(seed=1)

    def recorded(*args, trial=None, **kwargs):
        output = train(*args, trial=trial, **kwargs)
        trained.append((weights(trainer), trainer.state.log_history[0]["loss"]))
        return output

    trainer.train = recorded
    trainer.hyperparameter_search(
        lambda trial: spaces[trial.suggest_categorical("position", [0, 1])],
        n_trials=2, sampler=optuna.samplers.GridSampler({"position": [0, 1]}, seed=0),
    )  # fmt: skip
    expected = []
    for space in spaces:
        alone = make_trainer(tmp_path, rewards(), model=False, model_init=random_model, **FIXED, **space)
        alone.train()
        expected.append((weights(alone), alone.state.log_history[0]["loss"]))
    for state, loss in expected:
        assert loss in [other for _, other in trained]
        assert_equal(state, next(found for found, other in trained if other == loss))


def test_a_trial_keeps_as_many_checkpoints_as_a_training(tmp_path):
    """Each trial in its own folder; the checkpoints of an earlier training stay."""
    (tmp_path / "checkpoint-1").mkdir()
    trainer = make_trainer(
        tmp_path, rewards(), model=False, model_init=Model(), eval_dataset=make_rows(6, seed=1), max_steps=3,
        save_strategy="steps", save_steps=1, save_total_limit=2, report_to="none",
    )  # fmt: skip
    values = {"learning_rate": [1e-4, 1e-3]}
    trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", values["learning_rate"])},
        n_trials=2, sampler=optuna.samplers.GridSampler(values),
    )  # fmt: skip
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("checkpoint-*")}
    kept = {f"run-{number}/checkpoint-{step}" for number in range(2) for step in (2, 3)}
    assert found == kept | {"checkpoint-1"}
    assert trainer.args.save_total_limit == 2


def test_rows_are_checked_once(tmp_path, monkeypatch):
    """All models have the catalog of the first, so that their rows are the same."""
    seen = []
    monkeypatch.setattr(input_checks, "check_rows", lambda rows, catalog: seen.append(len(rows)))
    evaluation = {"a": make_rows(5, seed=1), "b": make_rows(7, seed=2)}
    trainer = make_trainer(
        tmp_path, rewards(), model=False, model_init=Model(), eval_dataset=evaluation, max_steps=1, **FIXED
    )
    trainer.train()
    trainer.train()
    assert seen == [24, 5, 7]


def random_model():
    config = tiny_model(len(TOKENIZER)).config
    torch.randn(3)
    return type(tiny_model(len(TOKENIZER)))(config)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"learning_speed": 1.0}, "hp_space sets 'learning_speed', which is not a field of GFlowNetConfig"),
        ({"reward_beta": -1.0}, "reward_beta is -1.0"),
        ({"max_history_items": 5}, "hp_space sets 'max_history_items', which is fixed"),
        ({"save_total_limit": 5}, "hp_space sets 'save_total_limit', which is fixed"),
        ({"reward_weights": [1.0]}, "1 reward_weights were given for 2 rewards"),
    ],
)
def test_bad_trials(tmp_path, space, message):
    trainer = make_trainer(tmp_path, rewards(), model=False, model_init=Model(), eval_dataset=make_rows(), **FIXED)
    with pytest.raises(ValueError, match=message):
        trainer.hyperparameter_search(lambda trial: space, n_trials=1)


def test_bad_constructors(tmp_path):
    model = tiny_model(len(TOKENIZER))
    with pytest.raises(ValueError, match="Both of model and model_init"):
        make_trainer(tmp_path, rewards(), model=model, model_init=Model())
    with pytest.raises(ValueError, match="None of model and model_init"):
        make_trainer(tmp_path, rewards(), model=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="model_init makes a new model for each training"):
        make_trainer(tmp_path, rewards(), model=False, model_init=Model(), optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="give the trainer an eval_dataset"):
        make_trainer(tmp_path, rewards(), model=False, model_init=Model()).hyperparameter_search()
    with pytest.raises(RuntimeError, match="model_init"):
        make_trainer(tmp_path, rewards(), model=model, eval_dataset=make_rows()).hyperparameter_search()
