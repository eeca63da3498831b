"""Options of losses: set by `loss_kwargs`, checked by the configuration, and used by their loss."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
import yaml
from transformers import HfArgumentParser
from trl import TrlParser

from gflowtrl import GFlowNetConfig
from gflowtrl.data import Step
from gflowtrl.losses import LOSSES, LossSpec, register_loss
from gflowtrl.pipeline.recipe import load_recipe
from gflowtrl.policy import make_policy
from gflowtrl.trainer import APAOConfig, TreePolicyConfig
from tests.pipeline.micro import micro_settings
from tests.tiny import tiny_model

from . import rival_formulas
from .test_step import (
    CATALOG,
    FLOOR,
    LEAVES,
    LOG_Z,
    PATHS,
    WEIGHTS,
    first_batch,
    fixed_leaves,
    rewards,
    rival_loss,
    step_residuals,
    sub_path_mean,
    true_rewards,
)
from .world import TOKENIZER, make_trainer


HUBER = {"vargrad": {"huber_delta": 1.0}}


def config(folder, loss_type="vargrad", loss_kwargs=None, kind=GFlowNetConfig, **options):
    return kind(str(folder), loss_type=loss_type, loss_kwargs=loss_kwargs, use_cpu=True, **options)


# ------------------------------------------------------------------------------------------------ checked at the start
REFUSED = [
    # loss, options, error, message
    ("vargrad", {"vargradd": {}}, ValueError, r"options for 'vargradd', but loss_type is \['vargrad'\]"),
    ("vargrad", {"sft": {"token_mean": True}}, ValueError, "options for 'sft'.*Leave them out or add the loss"),
    ("vargrad", {"vargrad": {"huber": 1.0}}, ValueError, r"\['vargrad'\]: There is no option 'huber'.*: huber_delta"),
    ("exact_flow", {"exact_flow": {"huber_delta": 1.0}}, ValueError, r"\['exact_flow'\]: .*'huber_delta'.*: none"),
    (
        "sft,contrastive_balance", {"contrastive_balance": {"huber_delta": 1.0}}, ValueError,
        r"\['contrastive_balance'\]: There is no option 'huber_delta'; known options: delta",
    ),
    ("vargrad", {"vargrad": {"log_rewards": 1.0}}, ValueError, "There is no option 'log_rewards'"),
    ("vargrad", {"vargrad": {"huber_delta": 0.0}}, ValueError, r"\['vargrad'\]: .*huber_delta is 0.0"),
    ("trajectory_balance", {"trajectory_balance": {"huber_delta": -1}}, ValueError, "huber_delta is -1"),
    ("detailed_balance", {"detailed_balance": {"huber_delta": math.nan}}, ValueError, "huber_delta is nan"),
    ("vargrad", {"vargrad": {"huber_delta": "high"}}, ValueError, "huber_delta is 'high'"),
    ("vargrad", {"vargrad": {"huber_delta": True}}, ValueError, "huber_delta is True"),
    ("contrastive_balance", {"contrastive_balance": {"delta": 0.0}}, ValueError, r"_balance'\]: .*elta is 0.0"),
    ("subtrajectory_balance", {"subtrajectory_balance": {"lam": 0.0}}, ValueError, r"_balance'\]: lam is 0.0"),
    ("subtrajectory_balance", {"subtrajectory_balance": {"lam": math.inf}}, ValueError, "lam is inf"),
    ("msl", {"msl": {"temperature": 0.0}}, ValueError, r"\['msl'\]: temperature is 0.0"),
    ("sdpo", {"sdpo": {"beta": 0.0}}, ValueError, r"\['sdpo'\]: beta is 0.0"),
    ("grpo", {"grpo": {"beta": -1.0}}, ValueError, r"\['grpo'\]: beta is -1.0"),
    ("sft", {"sft": {"token_mean": "yes"}}, TypeError, r"\['sft'\]: token_mean is 'yes'.*default, False"),
    ("sft", {"sft": {"token_mean": 1}}, TypeError, r"\['sft'\]: token_mean is 1.*default, False"),
    ("sft", {"sft": {"label_smoothing": 1}}, ValueError, r"\['sft'\]: label_smoothing is 1; it must be a number in"),
    ("prefix_pairwise", {"prefix_pairwise": {"eta": -0.1}}, ValueError, r"\['prefix_pairwise'\]: eta is -0.1"),
    ("prefix_pointwise", {"prefix_pointwise": {"eta": "slow"}}, ValueError, "eta is 'slow'"),
    ("prefix_pairwise", {"prefix_pairwise": {"variant": "2024"}}, ValueError, "variant is '2024'; choose"),
    ("vargrad", {"vargrad": 1.0}, TypeError, r"loss_kwargs\['vargrad'\] is 1.0; give options by name"),
    ("vargrad", [1.0], TypeError, r"loss_kwargs is \[1.0\]; give options under loss names"),
    ("vargrad", "huber_delta=1", TypeError, "loss_kwargs is 'huber_delta=1'; give options under loss names"),
]  # fmt: skip


@pytest.mark.parametrize(("loss_type", "given", "error", "sentence"), REFUSED)
def test_a_bad_option_is_an_error_of_the_configuration(tmp_path, loss_type, given, error, sentence):
    with pytest.raises(error, match=sentence) as caught:
        config(tmp_path, loss_type, given)
    assert type(caught.value) is error and str(caught.value).startswith("loss_kwargs")


def test_smoothed_labels_stay_on_the_tree(tmp_path):
    """By default APAO's losses are over the vocabulary."""
    smooth = {"sft": {"label_smoothing": 0.1}}
    message = "label_smoothing spreads over the children of a state, but label_space is 'vocabulary'"
    with pytest.raises(ValueError, match=message):
        config(tmp_path, "sft", smooth, TreePolicyConfig, label_space="vocabulary")
    with pytest.raises(ValueError, match=message):
        APAOConfig(str(tmp_path), loss_kwargs=smooth)
    assert APAOConfig(str(tmp_path), loss_kwargs=smooth, label_space="tree").loss_options("sft")["token_mean"]
    config(tmp_path, "sft", {"sft": {"label_smoothing": 0.0}}, label_space="vocabulary")


@pytest.mark.parametrize("name", list(LOSSES))
def test_every_loss_accepts_its_defaults(tmp_path, name):
    made = config(tmp_path, name, {name: LOSSES[name].options})
    assert made.loss_options(name) == LOSSES[name].options


@pytest.mark.parametrize(
    "gone",
    [
        *("huber_delta", "contrastive_delta", "subtb_lambda", "sft_reduction", "msl_temperature", "sdpo_beta"),
        *("kl_coef", "prefix_eta", "prefix_variant"),
    ],
)
def test_no_field_belongs_to_a_single_loss(tmp_path, gone):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{gone}'"):
        GFlowNetConfig(str(tmp_path), **{gone: 1})


def test_apao_sets_the_options_of_its_prefix_losses_by_its_fields(tmp_path):
    made = APAOConfig(str(tmp_path), prefix_eta=0.1, prefix_variant="kdd", loss_kwargs={"sft": {"token_mean": False}})
    assert made.loss_options("sft") == {"token_mean": False}
    assert made.loss_options("prefix_pointwise") == {"eta": 0.1, "variant": "kdd"}
    assert APAOConfig(str(tmp_path)).loss_options("sft") == {"token_mean": True}
    with pytest.raises(ValueError, match="'prefix_pointwise'; set prefix_eta and prefix_variant instead"):
        APAOConfig(str(tmp_path), loss_kwargs={"prefix_pointwise": {"eta": 0.1}})
    with pytest.raises(ValueError, match="options for 'prefix_pairwise', but loss_type is"):
        APAOConfig(str(tmp_path), loss_kwargs={"prefix_pairwise": {"eta": 0.1}})
    with pytest.raises(ValueError, match=r"\['sft'\]: There is no option 'reduction'; known options: token_mean"):
        APAOConfig(str(tmp_path), loss_kwargs={"sft": {"reduction": "sum"}})


# ------------------------------------------------------------------------------------ Python, JSON, YAML, command line
@pytest.mark.parametrize("given", [HUBER, json.dumps(HUBER)])
def test_options_round_trip_in_every_format(tmp_path, given):
    made = config(tmp_path, "sft,vargrad", given)
    assert made.loss_kwargs == HUBER and made.loss_options("vargrad") == {"huber_delta": 1.0}
    assert made.loss_options("sft") == {}
    changed = dataclasses.replace(made, seed=3)
    assert changed.loss_kwargs == HUBER and changed.loss_type == ["sft", "vargrad"] and changed.seed == 3
    with pytest.raises(ValueError, match="options for 'vargrad', but loss_type is"):
        dataclasses.replace(made, loss_type=["sft"], loss_weights=None)
    own = GFlowNetConfig.__annotations__ | TreePolicyConfig.__annotations__ | {"output_dir": str}
    kept = {name: value for name, value in made.to_dict().items() if name in own}
    assert kept["loss_kwargs"] == HUBER
    assert GFlowNetConfig(**kept).loss_kwargs == HUBER
    (tmp_path / "config.json").write_text(json.dumps(kept))
    (again,) = HfArgumentParser(GFlowNetConfig).parse_json_file(tmp_path / "config.json")
    assert again.loss_kwargs == HUBER


def test_apao_round_trips(tmp_path):
    made = APAOConfig(str(tmp_path), method="pairwise", beta=0.1, loss_kwargs={"sft": {"token_mean": False}})
    again = dataclasses.replace(made, beta=0.2)
    assert again.loss_kwargs == made.loss_kwargs and again.loss_weights == [1.0, 0.2]


def test_options_on_the_command_line_are_json(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "--loss_kwargs", json.dumps(HUBER)]
    (made,) = TrlParser((GFlowNetConfig,)).parse_args_and_config(arguments)
    assert made.loss_kwargs == HUBER
    with pytest.raises(ValueError, match=r"\['vargrad'\]: There is no option 'huber'"):
        TrlParser((GFlowNetConfig,)).parse_args_and_config([*arguments[:-1], '{"vargrad": {"huber": 1.0}}'])


def test_options_in_yaml_are_nested_and_the_command_line_overrides_them(tmp_path):
    file = tmp_path / "training.yaml"
    file.write_text(
        "loss_type: [vargrad, subtrajectory_balance]\n"
        "loss_kwargs:\n  vargrad:\n    huber_delta: 2.0\n  subtrajectory_balance: {lam: 0.5}\n"
    )
    arguments = ["--config", str(file), "--output_dir", str(tmp_path), "--use_cpu", "true"]
    (made,) = TrlParser((GFlowNetConfig,)).parse_args_and_config(arguments)
    assert made.loss_kwargs == {"vargrad": {"huber_delta": 2.0}, "subtrajectory_balance": {"lam": 0.5}}
    (made,) = TrlParser((GFlowNetConfig,)).parse_args_and_config([*arguments, "--loss_kwargs", json.dumps(HUBER)])
    assert made.loss_kwargs == HUBER


@pytest.mark.parametrize(
    "arguments",
    [
        ["--gflownet.loss_kwargs.vargrad.huber_delta", "3"], ["--loss_kwargs.vargrad.huber_delta", "3"],
        ["--loss_kwargs", "{vargrad: {huber_delta: 3}}"],
    ],
)  # fmt: skip
@pytest.mark.parametrize("given", [None, HUBER])
def test_a_recipe_contains_options_and_the_command_line_changes_them(tmp_path, given, arguments):
    settings = micro_settings(tmp_path / "out")
    settings["gflownet"] |= {"loss_type": ["vargrad"], "use_cpu": True, "loss_kwargs": given}
    if given is None:
        del settings["gflownet"]["loss_kwargs"]
    file = tmp_path / "micro.yaml"
    file.write_text(yaml.safe_dump(settings))

    def options(recipe):
        return recipe.training_arguments("gflownet", tmp_path).loss_kwargs

    assert options(load_recipe(file)) == given
    assert options(load_recipe(file, arguments)) == {"vargrad": {"huber_delta": 3}}
    wrong = [word.replace("huber_delta", "huber") for word in arguments]
    with pytest.raises(ValueError, match=r"loss_kwargs\['vargrad'\]: There is no option 'huber'"):
        load_recipe(file, wrong)


# -------------------------------------------------------------------------------------------------- used by their loss
def huber(size: float, delta: float) -> float:
    return size**2 if abs(size) <= delta else delta * (2 * abs(size) - delta)


def token_log_probs(pi: torch.Tensor, leaf: int) -> list[float]:
    return rival_formulas.token_log_probs(pi, PATHS, leaf)


def smoothed(pi: torch.Tensor, leaf: int, share: float) -> float:
    """Cross entropy along the path to `leaf`, with a share of the target spread evenly over a state's alternatives."""
    path, total = PATHS[leaf], 0.0
    for depth in range(len(path)):
        below = [other for other in range(LEAVES) if PATHS[other][:depth] == path[:depth]]
        mass = {token: 0.0 for token in {PATHS[other][depth] for other in below}}
        for other in below:
            mass[PATHS[other][depth]] += float(pi[other])
        for token, value in mass.items():
            target = share / len(mass) + (1 - share) * (token == path[depth])
            total -= target * math.log(value / sum(mass.values()))
    return total


def pointwise_by_share(pi: torch.Tensor, targets: list[int]) -> float:
    """Prefix losses `-log pi(prefix of m tokens) / m`, weighted by their share of the batch's sum."""
    rows = [[-sum(steps[:m]) / m for m in range(1, len(steps) + 1)] for steps in map(token_log_probs, pi, targets)]
    depth = CATALOG.tree.max_depth
    means = [sum(row[m] for row in rows if m < len(row)) / sum(m < len(row) for row in rows) for m in range(depth)]
    weights = [mean / sum(means) for mean in means]
    return sum(weight * loss for row in rows for weight, loss in zip(weights, row, strict=False)) / len(rows)


def expected(name: str, option: str, value, step, log_pi, log_ref, leaves) -> float:
    """The formula with the option, on the exact distributions `log_pi`, `log_ref (B, N)` of policy and reference."""
    if hasattr(rival_formulas, name):
        return rival_loss(name, step, log_pi, log_ref, leaves, **{option: value})
    option = value
    reward, targets = true_rewards(step), step.target_leaves.tolist()
    surplus = (log_pi - reward.log()).gather(1, leaves)
    pi, ref = log_pi.exp(), log_ref.exp()
    rows = list(zip(pi, ref, reward, leaves.tolist(), targets, strict=True))
    if name == "vargrad":
        residuals = (surplus - surplus.mean(1, keepdim=True)).flatten().tolist()
        values = [2 * math.cosh(x) - 2 if option == "shifted_cosh" else huber(x, option) for x in residuals]
    elif name == "contrastive_balance":
        values = [(a - b) ** 2 for row in surplus.tolist() for a, b in itertools.combinations(row, 2)]
    elif name == "trajectory_balance":
        values = [huber(LOG_Z + x, option) for x in surplus.flatten().tolist()]
    elif name == "detailed_balance":
        paths = [step_residuals(p, r, leaf) for p, _, r, group, _ in rows for leaf in group]
        values = [sum(huber(x, option) for x in path) for path in paths]
    elif name == "subtrajectory_balance":
        values = [sub_path_mean(step_residuals(p, r, leaf), option) for p, _, r, group, _ in rows for leaf in group]
    elif name == "sft":
        steps = [token_log_probs(p, target) for p, *_, target in rows]
        values = [-sum(row) / len(row) for row in steps]
        if option is not True:
            values = [smoothed(p, target, option) for p, *_, target in rows]
    elif name == "msl":  # the policy already has this temperature
        values = [-sum(token_log_probs(p, target)) for p, *_, target in rows]
    elif name == "sdpo":
        gain = (log_pi - log_ref).tolist()
        margins = [
            [math.exp(option * (own[leaf] - own[target])) for leaf in group if leaf != target]
            for own, group, target in zip(gain, leaves.tolist(), targets, strict=True)
        ]
        values = [math.log1p(sum(row)) for row in margins]
    else:
        values = [pointwise_by_share(pi, targets)]
    return sum(values) / len(values)


OPTIONS = [
    ("vargrad", "huber_delta", 0.3), ("vargrad", "penalty", "shifted_cosh"), ("contrastive_balance", "delta", None),
    ("trajectory_balance", "huber_delta", 0.3), ("detailed_balance", "huber_delta", 0.3),
    ("subtrajectory_balance", "lam", 0.5), ("sft", "token_mean", True), ("sft", "label_smoothing", 0.2),
    ("msl", "temperature", 0.7),
    ("bear", "num_beams", 1), ("bear", "xi", 0.5), ("bear", "lam", 4.0), ("sdpo", "beta", 0.5), ("ipa", "beta", 1.0),
    ("grpo", "beta", 2.0), ("sibling_grpo", "beta", 2.0), ("flowrl", "beta", 1.0),
    ("prefix_pointwise", "variant", "2025"), ("prefix_pointwise", "variant", "kdd"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "option", "value"), OPTIONS)
def test_the_loss_is_the_formula_with_its_option(tmp_path, name, option, value):
    given = {option: value} | ({"eta": 0.0} if name == "prefix_pointwise" else {})
    reference = tiny_model(len(TOKENIZER), seed=1)
    compared = {"ref_model": reference} if LOSSES[name].needs_reference else {}

    def loss(loss_kwargs):
        trainer = make_trainer(
            tmp_path, rewards(), loss_type=name, reward_weights=WEIGHTS, reward_floor=FLOOR, sampler=fixed_leaves,
            loss_kwargs=loss_kwargs, **compared,
        )  # fmt: skip
        if LOSSES[name].needs_flow_heads:
            torch.nn.init.constant_(trainer.model.flow_heads.outer.bias, LOG_Z)
        batch = first_batch(trainer)
        return trainer, batch, trainer.compute_loss(trainer.model, batch).item()

    trainer, batch, found = loss({name: given})
    step = Step.from_batch(batch, CATALOG)
    log_pi, log_ref = (make_policy(m, CATALOG).leaf_log_probs(step.prompts) for m in (trainer.model, reference))
    leaves = fixed_leaves(step, None, None, 4, None)
    assert found == pytest.approx(expected(name, option, value, step, log_pi, log_ref, leaves), rel=1e-4)
    assert found != pytest.approx(loss(None)[2], rel=1e-3)  # the default gives another loss


def test_the_rate_of_prefix_weights_is_an_option_of_the_loss(tmp_path):
    given = {"prefix_pairwise": {"eta": 0.4, "variant": "kdd"}, "prefix_pointwise": {"eta": 0.2}}
    trainer = make_trainer(tmp_path, loss_type=list(given), loss_kwargs=given)
    found = {name: (weights.eta, weights.variant) for name, weights in trainer.prefix_weights.items()}
    assert found == {"prefix_pairwise": (0.4, "kdd"), "prefix_pointwise": (0.2, "paper")}


def test_options_of_a_custom_loss_do_not_come_from_the_trainer(tmp_path, monkeypatch):
    """Parameters with the names of configuration fields keep their defaults."""

    def mine(log_probs, temperature=3.0, seed=5, weight_decay=7.0):
        return 0 * log_probs.sum(-1) + 100 * temperature + 10 * seed + weight_decay

    monkeypatch.setitem(LOSSES, "mine", LossSpec(mine))
    register_loss("mine", mine)  # register the same function again, as in a notebook
    for given, result in ((None, 357.0), ({"mine": {"seed": 1, "weight_decay": 0}}, 310.0)):
        trainer = make_trainer(
            tmp_path, loss_type="mine", loss_kwargs=given, temperature=0.5, seed=11, weight_decay=0.1
        )
        assert trainer.compute_loss(trainer.model, first_batch(trainer)).item() == result


def test_a_loss_gets_the_leaves_that_it_scores(tmp_path, monkeypatch):
    """Those of the drawn trajectories, even if another loss scores the target, too."""
    seen = {}

    def drawn(log_probs, leaves, prefix_nodes, rewards):
        seen["drawn"] = leaves, prefix_nodes
        assert leaves.shape == rewards.shape == log_probs.shape[:2] and prefix_nodes.shape == log_probs.shape
        return log_probs.sum(-1)

    def target(log_probs, leaves):
        seen["target"] = leaves
        return log_probs.sum(-1)

    monkeypatch.setitem(LOSSES, "drawn", LossSpec(drawn))
    monkeypatch.setitem(LOSSES, "target", LossSpec(target, uses_target=True))
    trainer = make_trainer(tmp_path, rewards(), loss_type=["target", "drawn"], sampler=fixed_leaves)
    batch = first_batch(trainer)
    trainer.compute_loss(trainer.model, batch)
    step = Step.from_batch(batch, CATALOG)
    expected = fixed_leaves(step, None, None, 4, None)
    assert (expected[:, 0] != step.target_leaves).any()
    assert torch.equal(seen["drawn"][0], expected)
    assert torch.equal(seen["drawn"][1], CATALOG.tree.walk(expected)[:, :, 1:])
    assert torch.equal(seen["target"][:, 0], step.target_leaves)
