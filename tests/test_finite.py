"""Tests that models, teachers and options that are not finite raise an error wherever they are used."""

import dataclasses
import importlib
import inspect
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from gflowtrl import APAOConfig, GFlowNetConfig, Recommender
from gflowtrl.checks import check_storable
from gflowtrl.cli import main
from gflowtrl.finite import NonFiniteError, check_ranked, find_nonfinite
from gflowtrl.rewards import GroundTruthReward
from gflowtrl.samplers import build_sampler
from gflowtrl.teachers import EASE, Popularity, SASRec, load_teacher, top_items
from gflowtrl.trainer import rank_rows
from tests.serving.world import HISTORY, make_recommender
from tests.tiny import tiny_model
from tests.trainer.world import ITEMS, make_catalog, make_rows, make_trainer


NAN, INF = math.nan, math.inf
BAD = [NAN, INF, -INF]


# -------------------------------------------------------------------------------------------------------- the search
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", BAD)
def test_every_position_and_dtype_is_checked(dtype, value):
    good = {
        "whole": torch.arange(4),
        "empty": torch.zeros(0),
        "largest": torch.full((2,), torch.finfo(dtype).max, dtype=dtype),
    }
    assert find_nonfinite(good.items()) is None
    for index in range(6):
        bad = torch.zeros(2, 3, dtype=dtype)
        bad.view(-1)[index] = value
        assert find_nonfinite([*good.items(), ("bad", bad), ("worse", bad)]) == "bad"


def test_missing_beams_may_be_infinite():
    model = tiny_model(9)
    leaves = torch.tensor([[3, 1, -1]])
    check_ranked(leaves, torch.tensor([[-0.5, -1.0, -INF]]), model)
    for log_probs in ([[-0.5, -INF, -INF]], [[NAN, -1.0, -INF]], [[-0.5, -1.0, NAN]]):
        with pytest.raises(
            NonFiniteError, match="LlamaForCausalLM computes probabilities that are not finite.*float32"
        ):
            check_ranked(leaves, torch.tensor(log_probs), model)


# ------------------------------------------------------------------------------------------------------- recommenders
def set_nan(recommender: Recommender) -> None:
    with torch.no_grad():
        recommender.model.lm_head.weight[:] = NAN


def test_a_folder_with_nan_raises_an_error_that_names_it(tmp_path, capsys):
    make_recommender().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = NAN
    save_file(tensors, file, {"format": "pt"})
    message = f"The model {tmp_path} has NaN or infinity in its weight 'model.norm.weight'"
    with pytest.raises(NonFiniteError, match=message):
        Recommender.from_pretrained(tmp_path)
    for command in (["recommend", "--input", __file__], ["serve", "--port", "0"]):
        assert main([command[0], "--model", str(tmp_path), *command[1:]]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"error: {message}") and error.endswith(".")


def test_a_recommender_with_nan_returns_no_lists():
    recommender = make_recommender()
    set_nan(recommender)
    options = [
        {},
        {"strategy": "sample"},
        {"strategy": "sample", "allowed_items": ITEMS[:3]},
        {"allowed_items": ITEMS[:3]},
    ]
    for chosen in options:
        with pytest.raises(NonFiniteError, match="'lm_head.weight'"):
            recommender.recommend([HISTORY], k=2, **chosen)
    with pytest.raises(NonFiniteError, match="'lm_head.weight'"):
        recommender.explain(HISTORY, "i222")
    with pytest.raises(NonFiniteError, match="'lm_head.weight'"):
        rank_rows(recommender.policy, recommender.encoder, make_rows(3), 5, progress=False)


def test_overflow_is_distinguished_from_bad_weights():
    recommender = make_recommender()
    recommender.model.model.norm.register_forward_hook(lambda module, inputs, output: output * INF)
    with pytest.raises(NonFiniteError, match=r"although its weights are finite: its activations overflow in float32"):
        recommender.recommend([HISTORY], k=2)


# ----------------------------------------------------------------------------------------------------------- teachers
def fitted(kind, **options):
    sequences = [[ITEMS[i], ITEMS[(i + 1) % len(ITEMS)], ITEMS[(i + 5) % len(ITEMS)]] for i in range(len(ITEMS))]
    return kind.fit(sequences, ITEMS, **options)


@pytest.mark.parametrize("kind", [SASRec, EASE, Popularity])
def test_a_teacher_with_nan_cannot_rank_be_saved_or_loaded(tmp_path, kind):
    teacher = fitted(kind, **({"epochs": 1, "progress": False} if kind is SASRec else {}))
    teacher.save_pretrained(tmp_path)
    file = tmp_path / "teacher.safetensors"
    tensors = load_file(file)
    for tensor in tensors.values():
        tensor.view(-1)[0] = NAN
    save_file(tensors, file)
    with pytest.raises(NonFiniteError, match="teacher.safetensors holds NaN or infinity in '"):
        load_teacher(tmp_path)
    with torch.no_grad():
        for tensor in teacher.state_dict().values():
            tensor[:] = NAN
    with pytest.raises(NonFiniteError, match=f"The {kind.__name__} teacher holds NaN"):
        teacher.save_pretrained(tmp_path)
    with pytest.raises(NonFiniteError, match=f"The teacher {kind.__name__} has nan as its best score for history 0"):
        top_items(teacher, [["i010"]], 3)


@pytest.mark.parametrize("sampler", ["collaborative", "curriculum"])
def test_samplers_raise_for_scores_that_are_not_finite(tmp_path, sampler):
    def teacher(histories):
        scores = torch.zeros(len(histories), len(ITEMS))
        scores[:, 1] = -INF  # an excluded item
        scores[2, 3] = broken
        return scores

    options = {"loss_type": "sft,vargrad", "reward_funcs": [lambda items, **_: [1.0] * len(items)]}
    spec = build_sampler(sampler, teacher)
    broken = 0.0
    make_trainer(tmp_path, sampler=spec, max_steps=1, **options).train()
    broken = NAN
    with pytest.raises(
        NonFiniteError, match="The teacher CallableTeacher has nan as its best score for history 2 of 8"
    ):
        make_trainer(tmp_path, sampler=spec, max_steps=1, **options).train()


def test_a_teacher_that_diverges_stops():
    with pytest.raises(NonFiniteError, match="The loss of SASRec is nan: the training diverged"):
        fitted(SASRec, epochs=20, progress=False, learning_rate=1e30)


# ------------------------------------------------------------------------------------------------------------ options
def test_the_error_names_the_option():
    check_storable({"a": [1, 2.0, "nan", None], "b": {"c": (1e308,)}})
    with pytest.raises(ValueError, match=r"^rewards.1.weight is nan; it must be a finite number.$"):
        check_storable({"rewards": [{"weight": 1.0}, {"weight": NAN}]})


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("kind", [GFlowNetConfig, APAOConfig])
def test_every_float_of_a_config(tmp_path, kind, value):
    names = {entry.name for entry in dataclasses.fields(kind) if entry.init and "float" in str(entry.type)}
    assert {"learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "temperature"} <= names
    for name in names - {"loss_weights", "reward_weights"}:
        with pytest.raises(ValueError, match=rf"^{name} is {value}[;,] "):
            kind(str(tmp_path), use_cpu=True, **{name: value})
    for name, value_text, path in (
        ("loss_kwargs", '{"sft": {"token_mean": NaN}}', "loss_kwargs.sft.token_mean"),
        ("lr_scheduler_kwargs", '{"min_lr": Infinity}', "lr_scheduler_kwargs.min_lr"),
    ):
        with pytest.raises(ValueError, match=f"^{path} is (nan|inf)"):
            kind(str(tmp_path), use_cpu=True, **{name: value_text})
    if kind is GFlowNetConfig:
        for name, owner in (("loss_weights", "loss_type"), ("reward_weights", "loss_type")):
            with pytest.raises(ValueError, match=f"{name}.0 is {value}"):
                kind(str(tmp_path), use_cpu=True, **{name: [value], owner: ["vargrad"]})
            with pytest.raises(ValueError, match=f"{name}.0 is {value}"):
                kind(str(tmp_path), use_cpu=True, **{name: str(value), owner: ["vargrad"]})


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_recipes_and_their_command_line(tmp_path, capsys, value):
    recipe = tmp_path / "recipe.yaml"
    for option in (
        "teacher.learning_rate",
        "sft.learning_rate",
        "rewards.0.weight",
        "peft.lora_dropout",
        "data.shop.noise",
    ):
        section = "rewards: [{type: ground_truth}]\n"
        recipe.write_text(section, encoding="utf-8")
        assert main(["train", "--config", str(recipe), f"--{option}", value]) == 2
        assert f"error: {option} is " in capsys.readouterr().err
    recipe.write_text(f"gflownet: {{learning_rate: {value}}}\n", encoding="utf-8")
    assert main(["train", "--config", str(recipe)]) == 2
    assert "error: gflownet.learning_rate is " in capsys.readouterr().err


ARGUMENTS = {
    "teacher": lambda histories: torch.zeros(len(histories), len(ITEMS)), "items": ITEMS, "sources": {"uniform": 1},
    "spec": {"on_policy": 1, "collaborative": 1}, "reward_funcs": [GroundTruthReward()], "catalog": make_catalog(),
    "text": torch.eye(4), "collaborative": torch.eye(4), "train_sequences": [ITEMS[:3]], "num_levels": 2,
    "num_codes": 4, "sampler": "uniform", "num_generations": 2,
}  # fmt: skip


def classes_with_floats() -> list:
    """Return the float parameters of the public classes, functions and `fit` methods of five packages."""
    found = []
    for name in ("samplers", "rewards", "teachers", "semantic_ids", "data"):
        package = importlib.import_module(f"gflowtrl.{name}")
        for member in (getattr(package, public) for public in package.__all__):
            for call in (member, getattr(member, "fit", None)) if inspect.isclass(member) else (member,):
                if not callable(call):
                    continue
                parameters = inspect.signature(call).parameters.values()
                if needed(call) <= ARGUMENTS.keys() | {"weight"}:
                    found += [(call, p.name) for p in parameters if str(p.annotation) in ("float", "<class 'float'>")]
    return found


def needed(call) -> set[str]:
    """Return the names of the required parameters."""
    parameters = inspect.signature(call).parameters.values()
    return {p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


@pytest.mark.parametrize(
    ("call", "name"), classes_with_floats(), ids=lambda value: getattr(value, "__qualname__", value)
)
@pytest.mark.parametrize("value", [NAN, INF])
def test_floats_that_are_not_finite_raise(call, name, value):
    taken = needed(call) | inspect.signature(call).parameters.keys() & {"teacher"}
    arguments = {entry: ARGUMENTS[entry] for entry in taken - {name}}
    with pytest.raises(ValueError, match=f"(?i){name}.*{value}|finite|{value}"):
        call(**{**arguments, name: value})


def test_the_search_finds_float_parameters():
    found = {(call.__qualname__, name) for call, name in classes_with_floats()}
    assert len(found) >= 25
    assert {("SASRec.fit", "learning_rate"), ("CompositeReward", "beta"), ("build_sampler", "epsilon")} <= found
