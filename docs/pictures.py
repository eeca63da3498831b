"""Draw the pictures of docs/images, computed by the library on SYNTHETIC shops and small trees.

    OMP_NUM_THREADS=1 python docs/pictures.py                # all pictures, about four minutes on one thread
    OMP_NUM_THREADS=1 python docs/pictures.py tree beam      # some of them

Everything follows from seeds. No picture says anything about real users.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import torch
from datasets import Dataset
from matplotlib import pyplot as plt
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers import set_seed as seed_everything

from gflowtrl import APAOConfig, APAOTrainer, GFlowNetConfig, GFlowNetTrainer, ItemCatalog, make_policy
from gflowtrl.data import PromptEncoder, Splits, Step, SyntheticShop, build_tokenizer, leave_one_out
from gflowtrl.metrics import prefix_metrics, total_variation
from gflowtrl.rewards import CollaborativeReward, GroundTruthReward, Reward
from gflowtrl.samplers import OnPolicySampler
from gflowtrl.teachers import SASRec


IMAGES = Path(__file__).parent / "images"
BLUE, ORANGE, GREEN, RED, GRAY, LIGHT = "#1f6fb4", "#d9760a", "#2b8a4b", "#c22f3d", "#6b6b6b", "#cfcfcf"
EXPLORING = {"on_policy": 2, "flattened": (OnPolicySampler(temperature=2.0), 1), "uniform": 1}


# ---------------------------------------------------------------------------------------------------- small trainings
@dataclass(frozen=True)
class Task:
    """A catalog, and the training of a small model on it."""

    tokenizer: PreTrainedTokenizerBase
    catalog: ItemCatalog

    @classmethod
    def of(cls, semantic_ids: Mapping) -> Task:
        tokenizer = build_tokenizer(semantic_ids)
        return cls(tokenizer, ItemCatalog.from_semantic_ids(semantic_ids, tokenizer))

    def llama(self, seed: int = 0) -> LlamaForCausalLM:
        seed_everything(seed)
        special = {f"{kind}_token_id": getattr(self.tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
        config = LlamaConfig(
            vocab_size=len(self.tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=128, initializer_range=0.1, **special,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    def train(
        self,
        model: PreTrainedModel,
        rows: Dataset,
        loss_type: str,
        reward_funcs: Any = None,
        sampler: Any = None,
        callbacks: list | None = None,
        **options: Any,
    ) -> PreTrainedModel:
        """Train `model` in place and return it."""
        with tempfile.TemporaryDirectory() as scratch:
            args = GFlowNetConfig(scratch, loss_type=loss_type, **(SHARED | options))
            GFlowNetTrainer(
                model, reward_funcs, args, rows, processing_class=self.tokenizer, catalog=self.catalog,
                sampler=sampler, callbacks=callbacks,
            ).train()  # fmt: skip
        return model.eval()

    @torch.no_grad()
    def leaf_log_probs(self, model: PreTrainedModel, histories: list[list]) -> Tensor:
        """Return log pi of all leaves, float64 `(histories, N)`."""
        policy, encoder = make_policy(model.eval(), self.catalog), PromptEncoder(self.catalog, self.tokenizer)
        parts = [policy.leaf_log_probs(encoder(histories[i : i + 64])) for i in range(0, len(histories), 64)]
        return torch.cat(parts).double()


SHARED = {
    "lr_scheduler_type": "cosine", "save_strategy": "no", "logging_strategy": "no", "report_to": "none",
    "use_cpu": True, "seed": 0, "disable_tqdm": True,
}  # fmt: skip


class TableReward(Reward):
    """R from a table `(prompts, items)`; prompt i is the history of item i alone."""

    def __init__(self, table: Tensor):
        super().__init__("table")
        self.table = table

    def score_items(self, step: Step) -> Tensor:
        return self.table[[history[0] for history in step.columns["history"]]].float()


def prompt_rows(prompts: list[int], steps: int, targets: list | None = None) -> Dataset:
    """Make rows for `steps` steps with one row per prompt; `targets` alternate."""
    count = len(prompts)
    targets = targets or [0]
    return Dataset.from_list(
        [
            {"row_id": i, "history": [prompts[i % count]], "target": targets[i // count % len(targets)]}
            for i in range(count * steps)
        ]
    )


# --------------------------------------------------------------------------------------------------- drawing of trees
def draw_tree(
    axes: plt.Axes,
    task: Task,
    values: Tensor,
    node_text: Callable[[int], str],
    leaf_text: Callable[[int], str],
    color: Callable[[int], str] = lambda node: BLUE,
) -> None:
    """Draw the prefix tree from left to right. The width of a line shows its share of `values` `(M,)`.

    Args:
        node_text, leaf_text: labels of a node, and to the right of a leaf.
        color: color of a node and of the line to it.
    """
    tree = task.catalog.tree
    height = {int(node): -leaf for leaf, node in enumerate(tree.leaf_nodes())}
    depth = {0: 0}
    starts = tree.level_start
    for level in range(1, tree.max_depth + 1):
        depth |= dict.fromkeys(range(starts[level], starts[level + 1]), level)
    for level in range(tree.max_depth - 1, -1, -1):
        for node in range(starts[level], starts[level + 1]):
            below = [height[child] for child in range(1, tree.num_nodes) if int(tree.parent[child]) == node]
            height[node] = sum(below) / len(below)
    for node in range(1, tree.num_nodes):
        up = int(tree.parent[node])
        share = float(values[node] / values[0])
        ends = ([depth[up] + 0.16, depth[node] - 0.16], [height[up], height[node]])
        axes.plot(*ends, color=color(node), linewidth=1 + 14 * share, alpha=0.55, solid_capstyle="butt", zorder=1)
        token = task.tokenizer.convert_ids_to_tokens(int(tree.node_token[node]))
        place = [0.3 * a + 0.7 * b for a, b in ends]  # closer to the child, where lines are separate
        axes.text(*place, token, fontsize=9, ha="center", va="center", zorder=3, bbox=BOX)
    for node in range(tree.num_nodes):
        place = (depth[node], height[node])
        axes.text(*place, node_text(node), ha="center", va="center", color=color(node), zorder=4, weight="bold")
    for leaf, node in enumerate(tree.leaf_nodes().tolist()):
        axes.text(depth[node] + 0.2, height[node], leaf_text(leaf), va="center")
    axes.set_xlim(-0.25, tree.max_depth + 1.35)
    axes.set_ylim(-tree.num_leaves + 0.3, 0.7)
    axes.axis("off")


BOX = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}


@cache
def small_shop() -> tuple[Task, Any, Any]:
    """Return a shop of twelve items in three departments."""
    shop = SyntheticShop(
        seed=5, n_users=40, n_items=12, departments=3, shelves=2, interests=4, min_users_shown=8, sharpness=1.0
    )
    data, truth = shop.generate()
    return Task.of(data.semantic_ids), data, truth


def tree() -> plt.Figure:
    """Draw the flows of one user's preference."""
    task, data, truth = small_shop()
    rewards = task.catalog.fold_items(100 * truth.preference[:1])[0]
    flows = task.catalog.tree.log_flows(rewards.log()[None])[0].exp()
    figure, axes = plt.subplots(figsize=(9.5, 5.4))

    def title(leaf: int) -> str:
        return data.item_features[task.catalog.items_of(leaf)[0]]["title"]

    draw_tree(axes, task, flows, lambda node: f"{flows[node]:.1f}", title)
    axes.set_title("Flow F of a prefix: the sum of R over the items below. P(child) = F(child) / F(node)")
    return figure


# ---------------------------------------------------------------------------------------- what beam search discards
def beam() -> plt.Figure:
    """Draw a policy in which a beam of one discards a prefix of the most probable item."""
    task, data, truth = small_shop()
    users = list(range(12))
    model = task.train(
        task.llama(), prompt_rows(users, 250), "exact_flow", TableReward(truth.preference[users]), "reward",
        per_device_train_batch_size=12, learning_rate=3e-3, num_train_epochs=1,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    log_probs = task.leaf_log_probs(model, [[user] for user in users])
    tree = task.catalog.tree
    best = log_probs.argmax(1)
    lost = prefix_metrics(log_probs.float(), best, tree, num_beams=1)["survival@1"] == 0
    user = int(lost.nonzero()[0])
    probs = tree.log_flows(log_probs[user : user + 1])[0].exp()
    prompts = PromptEncoder(task.catalog, task.tokenizer)([[user]])
    greedy, _ = make_policy(model, task.catalog).beam_search(prompts, 1)
    kept = set(tree.walk(greedy[0, 0]).tolist())
    wanted = set(tree.walk(best[user]).tolist())

    def color(node: int) -> str:
        return ORANGE if node in kept else RED if node in wanted else GRAY

    def text(leaf: int) -> str:
        return {int(greedy[0, 0]): "what a beam of 1 finds", int(best[user]): "the most probable item"}.get(leaf, "")

    figure, axes = plt.subplots(figsize=(9.5, 5.4))
    draw_tree(axes, task, probs, lambda node: f"{probs[node]:.2f}", text, color)
    axes.set_title("Probability of every prefix: the best item follows the second-best first token")
    return figure


# ------------------------------------------------------------------------------- one user: SFT, GRPO and a GFlowNet
def distributions() -> plt.Figure:
    """Draw one user's items under SFT on the log, then GRPO and VarGrad, compared with R / Z."""
    data, truth = SyntheticShop(seed=1, n_users=60, n_items=40, min_users_shown=5, mean_sessions=4).generate()
    task = Task.of(data.semantic_ids)
    favorites = truth.preference.topk(3).indices
    user = int(truth.shown.gather(1, favorites).sum(1).argmin())  # who was shown the fewest of three favorites
    reward = TableReward(truth.preference[[user]])
    shared = {"per_device_train_batch_size": 1, "num_train_epochs": 1, "learning_rate": 1e-3}

    def sft() -> PreTrainedModel:
        rows = prompt_rows([0], 400, data.sequences[user])
        return task.train(task.llama(), rows, "sft", **shared)

    def grpo() -> PreTrainedModel:
        return task.train(sft(), prompt_rows([0], 400), "grpo", reward, "on_policy", num_generations=16, **shared)

    def vargrad() -> PreTrainedModel:
        return task.train(sft(), prompt_rows([0], 400), "vargrad", reward, EXPLORING, num_generations=16, **shared)

    target = task.catalog.fold_items(truth.preference[[user]])
    found = {
        "SFT on the log": sft(), "GRPO after SFT": grpo(), "GFlowNet (VarGrad) after SFT": vargrad(),
    }  # fmt: skip
    panels = {"the reward, R / Z": target[0]}
    for name, model in found.items():
        probs = task.leaf_log_probs(model, [[0]]).exp()
        panels[f"{name}: total variation {float(total_variation(probs, target)):.2f}"] = probs[0]
    shown = task.catalog.fold_items(truth.shown[[user]].double())[0] > 0
    order = target[0].argsort(descending=True)
    figure, rows = plt.subplots(4, 1, figsize=(9, 8), sharex=True)
    for axes, (name, probs) in zip(rows, panels.items(), strict=True):
        colors = [BLUE if shown[leaf] else ORANGE for leaf in order]
        axes.bar(range(len(order)), probs[order], color=colors)
        axes.plot(range(len(order)), target[0][order], color="black", linewidth=1, drawstyle="steps-mid")
        axes.set_title(name, loc="left")
        axes.set_ylim(0, 1.1 * max(float(probs.max()), float(target.max())))
        axes.set_ylabel("probability")
    marks = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (BLUE, ORANGE)] + [plt.Line2D([], [], color="black")]
    rows[0].legend(marks, ["shown to the user", "never shown", "R / Z"], loc="upper right")
    rows[-1].set_xlabel("items, most preferred first")
    rows[-1].set_xticks([])
    figure.align_ylabels(rows)
    return figure


# ---------------------------------------------------------------------------------------- a whole shop: exposure bias
@dataclass(frozen=True)
class Shop:
    """A shop, its splits, its teacher, and the training of an SFT model."""

    task: Task
    truth: Any
    splits: Splits
    impressions: Counter
    teacher: SASRec

    def sft(self) -> PreTrainedModel:
        return self.task.train(
            self.task.llama(), self.splits.train, "sft", per_device_train_batch_size=64, num_train_epochs=3,
            learning_rate=3e-3,
        )  # fmt: skip


@cache
def shop() -> Shop:
    data, truth = SyntheticShop(seed=2, n_users=600, n_items=120).generate()
    splits = leave_one_out(data)
    teacher = SASRec.fit(splits.train_sequences, data.items, splits.validation, epochs=12, batch_size=64)
    impressions = Counter(event.item for log in data.events for event in log)
    return Shop(Task.of(data.semantic_ids), truth, splits, impressions, teacher)


def exposure() -> plt.Figure:
    """Draw the probability of items that users like, shown or not."""
    it = shop()
    corrected = CollaborativeReward(it.teacher, 0.7, popularity_correction=0.85, item_counts=it.impressions)
    flows = it.task.train(
        it.sft(), it.splits.train, "exact_flow", [GroundTruthReward(), corrected], "reward", reward_weights=[0.1, 0.9],
        num_generations=4, per_device_train_batch_size=64, num_train_epochs=2, learning_rate=2e-3,
    )  # fmt: skip
    test = it.splits.test
    rows = torch.tensor(test["user"])
    leaf_of = it.task.catalog.leaf_of(it.truth.items)
    methods = {"the users' true preference": it.truth.preference[rows]}
    for name, model in {"SFT on the log": it.sft(), "exact flows": flows}.items():
        # No two items of this shop share a leaf.
        methods[name] = it.task.leaf_log_probs(model, list(test["history"])).exp()[:, leaf_of]
    liked, shown, taken = it.truth.liked[rows], it.truth.shown[rows], it.truth.consumed[rows]
    groups = {
        "liked and shown": liked & shown, "liked, never shown": liked & ~shown, "not liked": ~liked,
    }  # fmt: skip
    figure, axes = plt.subplots(figsize=(8.5, 4.4))
    for place, ((name, probs), color) in enumerate(zip(methods.items(), (GRAY, BLUE, ORANGE), strict=True)):
        open_probs = probs * ~taken  # an item is not chosen twice
        open_probs = open_probs / open_probs.sum(1, keepdim=True)
        masses = [float((open_probs * mask).sum(1).mean()) for mask in groups.values()]
        bars = axes.bar([i + 0.27 * (place - 1) for i in range(3)], masses, 0.25, color=color, label=name)
        axes.bar_label(bars, fmt="%.2f", padding=2)
    axes.set_xticks(range(3), groups)
    axes.set_ylabel("mean probability over 600 users")
    axes.set_title("Probability of items that a user has not chosen yet", loc="left")
    axes.margins(y=0.12)
    axes.legend()
    return figure


# -------------------------------------------------------------------------------------------- how objectives learn
class Distance(TrainerCallback):
    """Measure the total variation to R / Z every few steps; the maximum over prompts."""

    def __init__(self, measure: Callable[[PreTrainedModel], float], every: int = 30):
        self.measure, self.every, self.found = measure, every, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.found.append((state.global_step, self.measure(model)))
            model.train()


def training() -> plt.Figure:
    """Draw the total variation to R / Z over the steps, on a tree of 200 leaves."""
    ids = {i: (f"<a_{i // 36}>", f"<b_{i // 6 % 6}>", f"<c_{i % 6}>") for i in range(200)}
    task = Task.of(ids)
    log_rewards = 2 * torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    target = task.catalog.fold_items(log_rewards.double().exp()).log().softmax(1)

    def measure(model: PreTrainedModel) -> float:
        return float(total_variation(task.leaf_log_probs(model, [[0], [1], [2]]).exp(), target).max())

    lines = {
        "exact_flow": ("reward", BLUE), "vargrad": (EXPLORING, ORANGE), "trajectory_balance": (EXPLORING, GREEN),
        "detailed_balance": (EXPLORING, RED),
    }  # fmt: skip
    figure, axes = plt.subplots(figsize=(8.5, 4.4))
    for name, (sampler, color) in lines.items():
        distance, model = Distance(measure), task.llama()
        start = (0, measure(model))
        task.train(
            model, prompt_rows([0, 1, 2], 600), name, TableReward(log_rewards), sampler, [distance],
            num_generations=64, reward_transform="exp", per_device_train_batch_size=3, learning_rate=3e-3,
            train_sampling_strategy="sequential", num_train_epochs=1, warmup_steps=50,
        )  # fmt: skip
        axes.plot(*zip(start, *distance.found, strict=True), color=color, label=name, linewidth=2)
    axes.set_yscale("log")
    axes.set_xlabel("steps of 3 prompts, 64 trajectories each")
    axes.set_ylabel("total variation to R / Z")
    axes.set_title("A small Llama, 200 leaves: distance to R / Z over all leaves", loc="left")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


# ------------------------------------------------------------------------------------------------------------- APAO
def apao() -> plt.Figure:
    """Draw the weights of prefixes during training, and the share of target prefixes that a narrow beam keeps."""
    it = shop()
    weights: list[list[float]] = []

    class Weights(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "prefix_pairwise/weight_1" in logs:
                weights.append([logs[f"prefix_pairwise/weight_{m}"] for m in (1, 2, 3)])

    with tempfile.TemporaryDirectory() as scratch:
        options = {
            "per_device_train_batch_size": 64, "num_train_epochs": 2, "learning_rate": 1e-3,
        }  # fmt: skip
        logged = SHARED | {"logging_strategy": "steps", "logging_steps": 5} | options
        args = APAOConfig(scratch, method="pairwise", beta=0.3, num_negatives=16, prefix_eta=1e-2, **logged)
        trainer = APAOTrainer(
            it.sft(), args, train_dataset=it.splits.train, processing_class=it.task.tokenizer,
            catalog=it.task.catalog, callbacks=[Weights()],
        )  # fmt: skip
        trainer.train()
    models = {
        "SFT continued": it.task.train(it.sft(), it.splits.train, "sft", **options),
        "APAO": trainer.model.eval(),
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
    steps = [5 * (i + 1) for i in range(len(weights))]
    for m, color in zip((1, 2, 3), (BLUE, ORANGE, GREEN), strict=True):
        left.plot(steps, [row[m - 1] for row in weights], color=color, linewidth=2, label=f"w_{m}")
    left.set_xlabel("steps")
    left.set_title("weights of the prefixes", loc="left")
    left.legend()
    targets = it.task.catalog.leaf_of(it.splits.test["target"])
    for place, ((name, model), color) in enumerate(zip(models.items(), (GRAY, BLUE), strict=True)):
        log_probs = it.task.leaf_log_probs(model, list(it.splits.test["history"]))
        metrics = prefix_metrics(log_probs.float(), targets, it.task.catalog.tree, num_beams=5)
        kept = [float(metrics[f"survival@{m}"].mean()) for m in (1, 2, 3)]
        bars = right.bar([m + 0.4 * (place - 0.5) for m in (1, 2, 3)], kept, 0.36, color=color, label=name)
        right.bar_label(bars, fmt="%.3f", padding=2)
    right.set_xticks([1, 2, 3], ["1 token", "2 tokens", "the whole id"])
    right.set_title("share of test targets in a beam of 5", loc="left")
    right.margins(y=0.15)
    right.legend()
    return figure


PICTURES = {
    "tree": tree, "exposure": exposure, "distributions": distributions, "beam": beam, "training": training,
    "apao": apao,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(PICTURES)}; default: all")
    names = parser.parse_args().names or list(PICTURES)
    unknown = set(names) - set(PICTURES)
    if unknown:
        sys.exit(f"There is no picture {min(unknown)!r}; choose from {', '.join(PICTURES)}.")
    matplotlib.use("Agg")
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False})
    IMAGES.mkdir(exist_ok=True)
    for name in names:
        figure = PICTURES[name]()
        figure.tight_layout()
        # Leave out matplotlib's version, so that the same pixels give the same bytes.
        figure.savefig(IMAGES / f"{name}.png", dpi=100, metadata={"Software": None})
        plt.close(figure)
        print(IMAGES / f"{name}.png", flush=True)


if __name__ == "__main__":
    main()
