"""The registry of losses, with custom losses, and the options of each loss."""

from functools import partial

import pytest
import torch

from gflowtrl.losses import LOSSES, LossInputs, LossSpec, get_loss, register_loss, sft, vargrad
from gflowtrl.rewards import GroundTruthReward
from tests.trainer.world import losses, make_trainer


@pytest.fixture(autouse=True)
def restored_registry():
    """Remove the losses that a test registers."""
    before = dict(LOSSES)
    yield
    LOSSES.clear()
    LOSSES.update(before)


DEFAULTS = {
    "temperature": 0.5, "epsilon": 0.25, "seed": 3, "delta": 2.0, "lam": 0.75, "weight_decay": 0.125,
    "learning_rate": 7.0, "beta": 5.0, "num_generations": 11,
}  # fmt: skip
calls = []  # the options of every call


def greedy(
    log_probs, log_rewards, temperature=0.5, epsilon=0.25, seed=3, delta=2.0, lam=0.75, weight_decay=0.125,
    learning_rate=7.0, beta=5.0, num_generations=11,
):  # fmt: skip
    """A loss whose options all have names of configuration fields or of other losses' options."""
    arguments = locals()
    calls.append({name: arguments[name] for name in DEFAULTS})
    return lam * vargrad(log_probs, log_rewards)


# ----------------------------------------------------------------------------------------------------- custom losses
def test_a_custom_loss_keeps_its_defaults(tmp_path):
    """Configuration fields with the same names do not change them."""
    register_loss("greedy", LossSpec(greedy, min_generations=2))
    settings = {
        "temperature": 1.75, "seed": 42, "epsilon": 0.0625, "weight_decay": 0.01, "learning_rate": 0.02,
        "num_generations": 4, "max_steps": 2,
    }  # fmt: skip

    def train(folder, **options):
        calls.clear()
        trainer = make_trainer(tmp_path / folder, [GroundTruthReward()], **settings, **options)
        assert all(getattr(trainer.args, name) == value for name, value in settings.items())
        calls.clear()  # checking the options may call the loss
        trainer.train()
        return trainer

    own = train("own", loss_type="greedy")
    assert calls == [DEFAULTS] * 2
    chosen = {"seed": 9, "temperature": 0.1}
    train("chosen", loss_type="greedy", loss_kwargs={"greedy": chosen})
    assert calls == [DEFAULTS | chosen] * 2
    vargrad_alone = train("vargrad", loss_type="vargrad", loss_weights=[0.75])
    assert losses(own) == pytest.approx(losses(vargrad_alone), rel=1e-6)


def test_options_of_one_loss_do_not_reach_another(tmp_path):
    register_loss("greedy", LossSpec(greedy, min_generations=2))
    calls.clear()
    trainer = make_trainer(
        tmp_path, [GroundTruthReward()], loss_type=["greedy", "contrastive_balance", "subtrajectory_balance"],
        loss_kwargs={"contrastive_balance": {"delta": 0.5}, "subtrajectory_balance": {"lam": 0.25}}, max_steps=1,
    )  # fmt: skip
    trainer.train()
    assert calls == [DEFAULTS]
    message = r"loss_kwargs\['greedy'\]: There is no option 'huber_delta'; known options: temperature, epsilon, seed"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, [GroundTruthReward()], loss_type="greedy", loss_kwargs={"greedy": {"huber_delta": 1.0}})


def test_needs_follow_from_the_parameters():
    def mine(log_probs, log_z, log_flows, ref_log_probs, child_target_log_probs, advantages, scale=1.0):
        return log_probs.sum(-1)

    register_loss("mine", mine)
    spec = get_loss("mine")
    assert spec == LossSpec(mine) and spec.min_generations == 1 and not spec.uses_target and not spec.uses_negatives
    assert spec.inputs == ("log_probs", "log_z", "log_flows", "ref_log_probs", "child_target_log_probs", "advantages")
    assert spec.options == {"scale": 1.0}
    assert spec.needs_flow_heads and spec.needs_reference
    assert spec.needs_all_rewards and spec.needs_log_rewards and spec.needs_rewards
    nothing = LossSpec(sft)
    needs = [name for name in dir(LossSpec) if name.startswith("needs_")]
    assert len(needs) == 5 and not any(getattr(nothing, name) for name in needs)


def test_a_name_is_taken_once():
    def first(log_probs):
        return log_probs.sum(-1)

    def second(log_probs):
        return -log_probs.sum(-1)

    register_loss("mine", first)
    with pytest.raises(ValueError, match="already a loss 'mine', .*first; choose another name"):
        register_loss("mine", second)
    with pytest.raises(ValueError, match="already a loss 'sft', sft; choose another name"):
        register_loss("sft", LossSpec(first))
    assert get_loss("mine").function is first and get_loss("sft").function is sft
    register_loss("theirs", second)
    assert get_loss("theirs").function is second


def test_the_same_function_can_be_registered_again():
    """As in a notebook cell that runs twice: the new definition is used."""

    def define(sign):
        def mine(log_probs):
            return sign * log_probs.sum(-1)

        return mine

    one, two = define(1), define(2)
    for function in (one, one, two):
        register_loss("mine", LossSpec(function, min_generations=2))
        assert get_loss("mine") == LossSpec(function, min_generations=2)
    register_loss("vargrad", LossSpec(vargrad, min_generations=2))


def test_a_callable_without_a_name_can_be_a_loss():
    huber = partial(vargrad, huber_delta=1.0)
    register_loss("huber", huber)
    register_loss("huber", huber)
    assert get_loss("huber").options == {"huber_delta": 1.0, "penalty": "squared", "linex_alpha": None}
    inputs = LossInputs(torch.randn(2, 3, 2), torch.full((2, 3), 2), log_rewards=torch.randn(2, 3))
    expected = vargrad(inputs.log_probs, inputs.log_rewards, huber_delta=1.0)
    assert torch.equal(get_loss("huber")(inputs), expected)
    with pytest.raises(ValueError, match=r"already a loss 'huber', functools.partial\(.*; choose another name"):
        register_loss("huber", partial(vargrad, huber_delta=2.0))
    with pytest.raises(ValueError, match=r"The loss 'functools.partial\(.*' needs log_rewards, which was not given"):
        get_loss("huber")(LossInputs(inputs.log_probs, inputs.lengths))
    with pytest.raises(ValueError, match="has the parameter 'histories' without a default"):
        register_loss("other", partial(lambda log_probs, histories, scale: log_probs, scale=1.0))


def test_a_tensor_that_a_loss_can_do_without():
    """It has the default None, and is not an option. Other parameters with the default None are options."""

    def mine(log_probs, ref_log_probs=None, clip=None):
        return log_probs.sum(-1) if ref_log_probs is None else (log_probs - ref_log_probs).sum(-1)

    register_loss("mine", mine)
    spec, inputs = get_loss("mine"), LossInputs.zeros(2)
    assert spec.inputs == ("log_probs", "ref_log_probs") and spec.options == {"clip": None}
    known = LossInputs(inputs.log_probs + 3, inputs.lengths, ref_log_probs=inputs.log_probs + 1)
    assert spec(known).tolist() == [[2, 2]]
    assert spec(LossInputs(known.log_probs, inputs.lengths)).tolist() == [[3, 3]]
    with pytest.raises(ValueError, match="There is no option 'ref_log_probs'; known options: clip"):
        spec.check_options({"ref_log_probs": 1})


def test_a_parameter_that_is_not_a_tensor_of_a_step_is_an_error():
    def mine(log_probs, margin, scale=1.0):
        return log_probs.sum(-1)

    message = "The loss 'mine' has the parameter 'margin' without a default, which is not a tensor of a step; those"
    with pytest.raises(ValueError, match=message + " are log_probs, .*nodes_per_depth. If it is an option, give it"):
        register_loss("mine", mine)
    assert "mine" not in LOSSES


# ------------------------------------------------------------------------------------------------------------- options
def good_options():
    return {
        "trajectory_balance": {"huber_delta": 0.5}, "vargrad": {"huber_delta": None},
        "contrastive_balance": {"delta": None}, "detailed_balance": {"penalty": "linex", "linex_alpha": -1},
        "subtrajectory_balance": {"lam": 0.5, "huber_delta": 1.0}, "exact_flow": {},
        "sft": {"token_mean": True, "label_smoothing": 0.1},
        "prefix_pointwise": {"eta": 0.0, "variant": "kdd"}, "prefix_pairwise": {"eta": 1e-4, "variant": "2025"},
        "msl": {"temperature": 0.7}, "sdpo": {"beta": 1}, "ipa": {"beta": 1},
        "grpo": {"beta": 0.0, "scale_rewards": "none", "loss_type": "dr_grpo", "use_bias_correction_kl": True},
        "sibling_grpo": {"variant": "paper"}, "gbpo": {"importance_sampling_level": "sequence"},
        "flowrl": {"beta": 1.0}, "bear": {"num_beams": 20, "xi": 1.0, "lam": 0.0},
    }  # fmt: skip


def test_every_loss_takes_its_options():
    assert good_options().keys() == LOSSES.keys()
    for name, options in good_options().items():
        LOSSES[name].check_options(options)
        LOSSES[name].check_options({})
        assert options.keys() <= LOSSES[name].options.keys()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vargrad", {"huber": 1.0}, "no option 'huber'; known options: huber_delta, penalty, linex_alpha"),
        ("vargrad", {"log_rewards": 1.0}, "no option 'log_rewards'; known options: huber_delta"),
        ("exact_flow", {"huber_delta": 1.0}, "no option 'huber_delta'; known options: none"),
        ("prefix_pairwise", {"reduce_sum": 1}, "no option 'reduce_sum'; known options: eta, variant"),
        ("vargrad", {"huber_delta": 0}, "huber_delta is 0; it must be a finite number above 0"),
        ("contrastive_balance", {"delta": -1.0}, "is -1.0; it must be a finite number above 0"),
        (
            "contrastive_balance",
            {"penalty": "linex"},
            "delta is 1.0, but penalty is 'linex'; use penalty='squared', or",
        ),
        ("subtrajectory_balance", {"lam": 0.0}, "lam is 0.0"),
        ("sft", {"label_smoothing": 1.0}, r"label_smoothing is 1.0; it must be a number in \[0, 1\)"),
        ("sft", {"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ("sft", {"child_log_probs": 1}, "no option 'child_log_probs'; known options: token_mean, label_smoothing"),
        ("msl", {"temperature": 0}, "temperature is 0; it must be"),
        ("sdpo", {"beta": "high"}, "beta is 'high'; it must be"),
        ("grpo", {"beta": -1e-3}, "beta is -0.001; it must be a finite number of at least 0"),
        ("grpo", {"scale_rewards": "batch"}, "scale_rewards is 'batch'; choose 'group' or 'none'"),
        ("grpo", {"loss_type": "dapo"}, "loss_type is 'dapo'; choose 'grpo' or 'bnpo' or 'dr_grpo'"),
        ("ipa", {"beta": 0}, "beta is 0; it must be a finite number above 0"),
        ("gbpo", {"importance_sampling_level": "id"}, "_level is 'id'; choose 'token' or 'sequence'"),
        ("sibling_grpo", {"beta": 1e-3, "variant": "paper"}, "variant='paper' has no KL term; leave beta out, or"),
        ("flowrl", {"beta": -1}, "beta is -1; it must be"),
        ("bear", {"num_beams": 0}, "num_beams is 0; it must be a whole number of at least 1"),
        ("bear", {"xi": 0}, "xi is 0; it must be"),
        ("bear", {"lam": -0.1}, "lam is -0.1; it must be"),
        ("prefix_pointwise", {"eta": -1.0}, "eta is -1.0; it must be"),
        ("prefix_pairwise", {"variant": "2024"}, "variant is '2024'; choose 'paper' or '2025' or 'kdd'"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        LOSSES[name].check_options(options)


@pytest.mark.parametrize(
    ("name", "options"), [("sft", {"token_mean": 1}), ("sft", {"token_mean": "no"}), ("grpo", {"beta": True})]
)
def test_a_boolean_is_not_a_number(name, options):
    ((option, value),) = options.items()
    with pytest.raises(TypeError, match=f"{option} is {value!r}; it must have the type of its default"):
        LOSSES[name].check_options(options)


def test_checking_options_does_not_call_a_custom_loss():
    """It may need longer ids or larger groups than the check has. Names and types of options are still checked."""

    def picky(log_probs, lengths, scale=1.0, clip=None, mode="soft"):
        raise ValueError("ids need two tokens")

    spec = LossSpec(picky)
    assert spec.check_options({"scale": 2, "clip": True}) == {"scale": 2, "clip": True}
    with pytest.raises(ValueError, match="There is no option 'sclae'; known options: scale, clip, mode"):
        spec.check_options({"sclae": 2})
    with pytest.raises(TypeError, match="scale is True; it must have the type of its default, 1.0"):
        spec.check_options({"scale": True})


def test_options_get_the_types_of_their_defaults():
    """JSON can read 2025 as a number, and YAML reads 5e-4 as text."""
    fitted = get_loss("prefix_pairwise").check_options({"variant": 2025, "eta": "5e-4"})
    assert fitted == {"variant": "2025", "eta": 5e-4}
    assert get_loss("vargrad").check_options({"huber_delta": "1e-1"}) == {"huber_delta": 0.1}
    with pytest.raises(ValueError, match="There is no option 'hubert'"):
        get_loss("vargrad")(LossInputs.zeros(2), hubert=1.0)  # unknown options are errors here too
