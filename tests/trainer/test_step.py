"""One step: the loss compared with brute force over all leaves, and the logged metrics."""

import itertools
import math
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gflowtrl import CausalTreePolicy
from gflowtrl.data import Step
from gflowtrl.losses import LOSSES
from gflowtrl.policy import make_policy
from gflowtrl.rewards import CollaborativeReward, GroundTruthReward
from gflowtrl.samplers import Trajectories
from tests.tiny import tiny_model, tiny_seq2seq

from . import rival_formulas
from .world import ITEMS, PRICES, SEMANTIC_IDS, TOKENIZER, losses, make_catalog, make_trainer, teacher, weights


WEIGHTS, FLOOR, LOG_Z = [0.7, 0.3], 1e-3, 0.6
CATALOG = make_catalog()
LEAVES = CATALOG.tree.num_leaves
PATHS = [SEMANTIC_IDS[CATALOG.items_of(leaf)[0]] for leaf in range(LEAVES)]


def rewards() -> list:
    return [GroundTruthReward(), CollaborativeReward(teacher)]


def fixed_leaves(step, policy, reward, num_generations, noise):
    """Arbitrary leaves that depend only on the row, at least two of them different."""
    first = step.row_ids[:, None] * 7
    return (first + torch.arange(num_generations) ** 2) % LEAVES


def first_batch(trainer) -> dict:
    return next(iter(trainer.get_train_dataloader()))


def first_step(trainer) -> Step:
    return Step.from_batch(first_batch(trainer), CATALOG)


def raw_rewards(step: Step) -> torch.Tensor:
    """The reward of every leaf by definition: the items' rewards summed per leaf, weighted."""
    likes = teacher(step.columns["history"]).softmax(1)
    total = torch.zeros(len(likes), LEAVES)
    for item in ITEMS:
        leaf = int(CATALOG.leaf_of([item]))
        chosen = torch.tensor([float(target == item) for target in step.columns["target"]])
        total[:, leaf] += WEIGHTS[0] * chosen + WEIGHTS[1] * likes[:, ITEMS.index(item)]
    return total


def true_rewards(step: Step) -> torch.Tensor:
    """R of every leaf: the reward, raised to the floor."""
    total = raw_rewards(step)
    return torch.maximum(total, FLOOR * total.mean(1, keepdim=True))


def rival_loss(name: str, step: Step, log_pi: torch.Tensor, log_ref: torch.Tensor, leaves, **options) -> float:
    """The formula of a rival loss on the exact distributions of policy and reference `(B, N)`."""
    if name == "bear":
        return rival_formulas.bear(log_pi.exp(), step.target_leaves.tolist(), PATHS, **options)
    if name == "flowrl":
        options["log_z"] = LOG_Z
    drawn = raw_rewards(step).gather(1, leaves)
    rows = zip(log_pi.exp(), log_ref.exp(), drawn.tolist(), leaves.tolist(), strict=True)
    formula = getattr(rival_formulas, name)
    values = [
        value for pi, ref, rewards, group in rows for value in formula(pi, ref, rewards, group, PATHS, **options)
    ]
    return sum(values) / len(values)


def kl_at_visited_states(pi: torch.Tensor, target: torch.Tensor, leaf: int) -> float:
    """Sum of KL(target || pi) of the next token over the states on the path to `leaf`."""
    total = 0.0
    for depth in range(len(PATHS[leaf])):
        below = [i for i in range(LEAVES) if PATHS[i][:depth] == PATHS[leaf][:depth]]
        for token in {PATHS[i][depth] for i in below}:
            inside = [i for i in below if PATHS[i][depth] == token]
            p, q = (float(x[inside].sum() / x[below].sum()) for x in (target, pi))
            total += p * math.log(p / q)
    return total


def step_residuals(pi: torch.Tensor, reward: torch.Tensor, leaf: int) -> list[float]:
    """Residuals of detailed balance on the path to `leaf`, with log F = LOG_Z at every state that is not a leaf."""
    path, residuals = PATHS[leaf], []
    for depth in range(len(path)):
        below, then = ([i for i in range(LEAVES) if PATHS[i][:d] == path[:d]] for d in (depth, depth + 1))
        end = math.log(reward[leaf]) if depth + 1 == len(path) else LOG_Z
        residuals.append(LOG_Z + math.log(pi[then].sum() / pi[below].sum()) - end)
    return residuals


def sub_path_mean(steps: list[float], lam: float = 0.9) -> float:
    """Weighted mean of squared residuals over all sub-paths; the residual of a sub-path is the sum over its steps."""
    spans = [(i, j) for i in range(len(steps)) for j in range(i + 1, len(steps) + 1)]
    weights = [lam ** (j - i) for i, j in spans]
    return sum(w * sum(steps[i:j]) ** 2 for w, (i, j) in zip(weights, spans, strict=True)) / sum(weights)


def prefix_loss(pi: torch.Tensor, target: int, others: list[int] | None) -> float:
    """APAO's loss with uniform weights: pointwise, or pairwise against the prefixes of `others`."""
    path, total = PATHS[target], 0.0

    def mass(prefix) -> float:
        return float(sum(pi[i] for i in range(LEAVES) if PATHS[i][: len(prefix)] == prefix))

    for m in range(1, len(path) + 1):
        own = mass(path[:m])
        if others is None:
            total -= math.log(own) / m
        else:
            competing = {tuple(PATHS[i][:m]) for i in others if len(PATHS[i]) >= m} - {tuple(path[:m])}
            total += math.log((own + sum(mass(type(path)(prefix)) for prefix in competing)) / own)
    return total / CATALOG.tree.max_depth


def huber(size: float) -> float:
    return size**2 if abs(size) <= 1 else 2 * abs(size) - 1


def expected_loss(name: str, step: Step, log_pi: torch.Tensor, leaves: torch.Tensor) -> float:
    """The formula of the paper on the exact leaf distribution `log_pi (B, N)`."""
    reward = true_rewards(step)
    surplus = (log_pi - reward.log()).gather(1, leaves)
    if name == "msl":  # at temperature 1
        name = "sft"
    if name == "sft":
        return -log_pi.gather(1, CATALOG.leaf_of(step.columns["target"])[:, None]).mean().item()
    if name == "sdpo":  # the policy still equals its reference, so every margin is 0
        targets = CATALOG.leaf_of(step.columns["target"])[:, None]
        return (1 + (leaves != targets).sum(1).double()).log().mean().item()
    if hasattr(rival_formulas, name):
        return rival_loss(name, step, log_pi, log_pi, leaves)
    if name.startswith("prefix_"):
        rows = zip(log_pi.exp(), CATALOG.leaf_of(step.columns["target"]).tolist(), leaves.tolist(), strict=True)
        values = [prefix_loss(pi, target, row if name == "prefix_pairwise" else None) for pi, target, row in rows]
        return sum(values) / len(values)
    if name == "vargrad":
        return surplus.var(1, correction=0).mean().item()
    if name == "contrastive_balance":
        pairs = [huber(a - b) for row in surplus.tolist() for a, b in itertools.combinations(row, 2)]
        return sum(pairs) / len(pairs)
    if name == "trajectory_balance":
        return (LOG_Z + surplus).square().mean().item()
    rows = zip(log_pi.exp(), reward, leaves.tolist(), strict=True)
    if name.endswith("_balance"):
        steps = [step_residuals(pi, target, leaf) for pi, target, row in rows for leaf in row]
        detailed = name == "detailed_balance"
        values = [sum(s**2 for s in path) if detailed else sub_path_mean(path) for path in steps]
        return sum(values) / len(values)
    values = [kl_at_visited_states(pi, target, leaf) for pi, target, row in rows for leaf in row]
    return sum(values) / len(values)


@pytest.mark.parametrize("model", [tiny_model, tiny_seq2seq])
@pytest.mark.parametrize("loss_type", list(LOSSES))
def test_the_loss_is_the_formula_on_the_exact_distribution(tmp_path, loss_type, model):
    trainer = make_trainer(
        tmp_path, rewards(), model(len(TOKENIZER)), loss_type=loss_type, reward_weights=WEIGHTS, reward_floor=FLOOR,
        sampler=fixed_leaves,
    )  # fmt: skip
    if LOSSES[loss_type].needs_flow_heads:
        torch.nn.init.constant_(trainer.model.flow_heads.outer.bias, LOG_Z)
    batch = first_batch(trainer)
    step = Step.from_batch(batch, CATALOG)
    log_pi = make_policy(trainer.model, CATALOG).leaf_log_probs(step.prompts)
    torch.testing.assert_close(log_pi.exp().sum(1), torch.ones(8))
    leaves = fixed_leaves(step, None, None, 4, None)
    expected = expected_loss(loss_type, step, log_pi, leaves)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert abs(expected) > 0.01 or loss_type == "grpo"


def test_several_losses_add_up_by_their_weights(tmp_path):
    names, scales = ["sft", "vargrad", "exact_flow"], [1.0, 0.25, 2.0]
    make = partial(make_trainer, tmp_path, rewards(), sampler=fixed_leaves)
    together = make(loss_type=names, loss_weights=scales)
    batch = first_batch(together)
    single = [make(loss_type=name) for name in names]
    parts = [scale * t.compute_loss(t.model, batch).item() for scale, t in zip(scales, single, strict=True)]
    assert together.compute_loss(together.model, batch).item() == pytest.approx(sum(parts), rel=1e-5)


def test_sum_is_the_mean_times_the_number_of_trajectories(tmp_path):
    make = partial(make_trainer, tmp_path, rewards(), sampler=fixed_leaves, num_generations=5)
    mean, total = make(), make(loss_reduction="sum")
    batch = first_batch(mean)
    expected = 5 * mean.compute_loss(mean.model, batch).item()
    assert total.compute_loss(total.model, batch).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("sampler", "scored"), [(None, 4), ({"on_policy": 1}, 5)])
def test_the_target_is_scored_once(tmp_path, monkeypatch, sampler, scored):
    """It is first in the default group. If it is missing, the SFT term adds it as the first leaf."""
    widths, score = [], CausalTreePolicy.score
    monkeypatch.setattr(
        CausalTreePolicy, "score", lambda s, p, leaves, *r: widths.append(leaves.shape[1]) or score(s, p, leaves, *r)
    )
    trainer = make_trainer(tmp_path, rewards(), loss_type="sft,vargrad", sampler=sampler)
    batch = first_batch(trainer)
    trainer.policy_of(trainer.model)  # the first call compares it with the model
    widths.clear()
    trainer.compute_loss(trainer.model, batch)
    assert widths == [scored]


# ------------------------------------------------------------------------------------------------ complete trainings
def trained(tmp_path, reward_funcs=None, **options) -> tuple[dict, list[float]]:
    trainer = make_trainer(tmp_path, rewards() if reward_funcs is None else reward_funcs, **options)
    trainer.train()
    return weights(trainer), losses(trainer)


def test_lambda_zero_is_sft_bit_for_bit(tmp_path):
    """With the same trajectories in the forward, because otherwise the kernels sum in another order."""
    sampler = {"ground_truth": 1, "on_policy": 3}
    sft, _ = trained(tmp_path, loss_type="sft", sampler=sampler)
    mixed, _ = trained(tmp_path, loss_type="sft,vargrad", loss_weights=[1, 0], sampler=sampler)
    assert all(torch.equal(sft[name], mixed[name]) for name in sft)
    plain, _ = trained(tmp_path, [], loss_type="sft", optim="sgd", max_grad_norm=0.1)
    mixed, _ = trained(tmp_path, loss_type="sft,vargrad", loss_weights=[1, 0], optim="sgd", max_grad_norm=0.1)
    for name in plain:
        torch.testing.assert_close(plain[name], mixed[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["vargrad", "exact_flow"])
def test_accumulated_micro_batches_are_one_batch(tmp_path, loss_type):
    options = {"loss_type": loss_type, "optim": "sgd", "max_grad_norm": 0.1}
    whole, whole_losses = trained(tmp_path, **options)
    halves, half_losses = trained(tmp_path, **options, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert half_losses == pytest.approx(whole_losses, rel=1e-4)
    for name in whole:
        torch.testing.assert_close(halves[name], whole[name], rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    options = {"loss_type": "sft,trajectory_balance", "optim": "sgd", "max_grad_norm": 0.1}
    plain, _ = trained(tmp_path, **options)
    saved, _ = trained(tmp_path, **options, gradient_checkpointing=True)
    for name in plain:
        torch.testing.assert_close(saved[name], plain[name], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- logged metrics
def logged(trainer) -> list[dict]:
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_logged_metrics_agree_with_each_other(tmp_path):
    def odd(items, log_metric, **_):
        log_metric("half", 0.5)
        return [float(ITEMS.index(group[0]) % 2) for group in items]

    trainer = make_trainer(
        tmp_path, [*rewards(), odd], loss_type="sft,vargrad", loss_weights=[1, 0.5], reward_weights=[*WEIGHTS, 0.1]
    )
    for log in logged(trainer):
        parts = [log["rewards/ground_truth"], log["rewards/collaborative"], log["rewards/odd"]]
        assert log["reward"] == pytest.approx(0.7 * parts[0] + 0.3 * parts[1] + 0.1 * parts[2], rel=1e-4)
        assert log["rewards/half"] == 0.5
        assert log["reward_std"] > 0
        assert log["sampler/ground_truth/share"] == 0.25 and log["sampler/on_policy/share"] == 0.75
        per_source = [
            log[f"sampler/{name}/share"] * log[f"sampler/{name}/reward"] for name in trainer.sampler.source_names
        ]
        assert log["reward"] == pytest.approx(sum(per_source), rel=1e-4)
        assert log["loss"] == pytest.approx(log["loss/sft"] + 0.5 * log["loss/vargrad"], rel=1e-4)
        assert 0 < log["residual"] <= math.sqrt(log["loss/vargrad"]) * (1 + 1e-5)  # mean |r|, root mean square
        assert 1 <= log["unique_items"] <= 4
        assert 0 < log["policy_entropy"] <= math.log(4) + 2 * math.log(3)
        assert log["log_pi"] < 0
        assert 0 <= log["reward_floored_mass"] < 1
        steps = [log[f"seconds/{part}"] for part in ("reward", "sample", "score")]
        assert all(second > 0 for second in steps) and sum(steps) < log["seconds/step"]


def test_every_logged_name_is_documented(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "gflownet_trainer.md"
    if not page.is_file():
        pytest.skip("the docs are not installed")
    text, general = page.read_text(encoding="utf-8"), {"grad_norm", "learning_rate", "epoch", "step"}
    for name in set(logged(make_trainer(tmp_path, rewards(), loss_type="sft,vargrad"))[0]) - general:
        group, _, last = name.partition("/")
        pattern = {"loss": "loss/NAME", "rewards": "rewards/NAME", "sampler": f"sampler/SOURCE/{last.split('/')[-1]}"}
        assert f"`{pattern.get(group, name) if last else name}`" in text, name


def test_exact_flow_logs_the_true_log_z(tmp_path):
    trainer = make_trainer(tmp_path, rewards(), loss_type="exact_flow", reward_weights=WEIGHTS, reward_beta=0.5)
    seen, step = [], trainer.compute_loss
    trainer.compute_loss = lambda model, batch, **k: seen.append(batch) or step(model, batch, **k)
    logs = logged(trainer)
    steps = [Step.from_batch(batch, CATALOG) for batch in seen]
    expected = [true_rewards(step).sqrt().sum(1).log().mean().item() for step in steps]
    assert [log["log_z"] for log in logs] == pytest.approx(expected, rel=1e-4)
    assert max(expected) - min(expected) > 1e-2


def test_the_seconds_of_a_part_add_up(tmp_path):
    def slow(step):
        time.sleep(0.02)
        return torch.ones(len(step), len(ITEMS))

    trainer = make_trainer(tmp_path, SimpleNamespace(__name__="slow", score_items=slow), max_steps=1)
    (log,) = logged(trainer)
    assert log["seconds/step"] > log["seconds/reward"] >= 0.02


def test_metrics_are_means_since_the_last_log(tmp_path):
    every, second = (
        logged(
            make_trainer(
                tmp_path, rewards(), logging_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2
            )
        )
        for steps in (1, 2)
    )
    for name in ("reward", "loss/vargrad", "log_z", "unique_items"):
        pairs = zip(every[::2], every[1::2], strict=True)
        assert [log[name] for log in second] == pytest.approx([(a[name] + b[name]) / 2 for a, b in pairs], rel=1e-4)


def test_log_completions_prints_a_group_best_first(tmp_path, capsys):
    titles = {item: f"Title [{item}]" for item in ITEMS}
    trainer = make_trainer(
        tmp_path, rewards(), log_completions=True, max_steps=1, num_generations=6, item_titles=titles
    )
    capsys.readouterr()
    trainer.train()
    printed = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    rows = [row for row in cells if row[1].startswith("<")]
    values = [float(row[4]) for row in rows]
    assert len(rows) == 6 and values == sorted(values, reverse=True)
    for items, leaf_text, probability, log_pi, log_reward, reward, source in rows:
        first = items.split(" (")[0]
        assert f"{first} (Title [{first}])" in items and leaf_text == " ".join(SEMANTIC_IDS[first])
        assert float(probability) == pytest.approx(math.exp(float(log_pi)), rel=0.02)
        assert float(log_reward) == pytest.approx(math.log(float(reward)), abs=0.01)
        assert source in trainer.sampler.source_names
    assert "target: " in printed and "Step 1" in printed


def test_log_completions_prints_the_extra_columns_of_rewards(tmp_path, capsys):
    def price(items, log_extra, **columns):
        log_extra("price [EUR]", [f"for {PRICES[at_leaf[0]]:g}" for at_leaf in items])
        log_extra("too short", [])
        return [PRICES[at_leaf[0]] for at_leaf in items]

    make_trainer(tmp_path, price, log_completions=True, max_steps=1, num_generations=6).train()
    printed = capsys.readouterr().out
    assert "price [EUR]" in printed and "too short" in printed
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│ <" in line]
    assert len(rows) == 6 and all(row[-2:] == [f"for {float(row[5]):g}", ""] for row in rows)


def test_a_sampler_gets_the_step_the_rewards_and_the_noise_of_the_rows(tmp_path):
    draws = []

    def watched(step, policy, reward, num_generations, noise):
        assert {"row_id", "history", "target"} == set(step.columns) and {"input_ids"} < set(step.prompts)
        assert step.row_ids.tolist() == step.columns["row_id"]
        assert torch.equal(step.target_leaves, CATALOG.leaf_of(step.columns["target"]))
        every = torch.arange(LEAVES).expand(len(step), -1)
        torch.testing.assert_close(reward.log(every), true_rewards(step).log(), rtol=1e-4, atol=1e-4)
        draws.append(noise.uniform("mine", num_generations))
        leaves = fixed_leaves(step, policy, reward, num_generations, noise)
        return Trajectories.of_one_source(leaves)

    trainer = make_trainer(
        tmp_path, rewards(), reward_weights=WEIGHTS, sampler=watched, num_train_epochs=2, max_steps=-1
    )
    trainer.train()
    assert len(torch.cat(draws).unique()) == 2 * 24 * 4  # no number occurs twice, also in later epochs
