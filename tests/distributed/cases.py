"""Short training runs and their results that must not depend on the number of processes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from gflowtrl import GFlowNetTrainer
from gflowtrl.rewards import CollaborativeReward, GroundTruthReward
from gflowtrl.samplers import Sampler, build_sampler
from tests.tiny import tiny_model, tiny_seq2seq
from tests.trainer.world import TOKENIZER, make_rows, make_trainer, make_user_rows, teacher


STEPS, PROMPTS = 20, 8
VOCABULARY = 4 * len(TOKENIZER)  # mostly tokens of no item, so that the head computes only some of its rows
LOSSES = (
    "sft,trajectory_balance", "vargrad", "contrastive_balance", "detailed_balance", "subtrajectory_balance",
    "exact_flow",
)  # fmt: skip
BACKBONES = ("llama", "qwen3", "t5")


@dataclass(frozen=True)
class Case:
    """A training run: losses, backbone, adapters or full fine-tuning, a reference model or none; and how the prompts
    of a step are computed (gradient accumulation, gradient checkpointing)."""

    loss: str
    backbone: str = "llama"
    adapters: bool = False
    reference: bool = False
    accumulation: int = 1
    checkpointing: bool = False

    @property
    def plain(self) -> Case:
        """The same run without gradient accumulation and gradient checkpointing."""
        return Case(self.loss, self.backbone, self.adapters, self.reference)

    @property
    def combination(self) -> tuple[str, str, bool]:
        """Loss, backbone, and whether adapters are trained."""
        return self.loss, self.backbone, self.adapters

    def __str__(self) -> str:
        words = [self.loss.replace(",", "+"), self.backbone, "lora" if self.adapters else "full"]
        words += ["reference"] * self.reference
        words += [f"accumulate {self.accumulation}"] * (self.accumulation > 1) + ["checkpoint"] * self.checkpointing
        return "-".join(words).replace(" ", "")


#: Cases that every engine resumes, and further ones for the slow tests.
RESUMED = [Case("sft,trajectory_balance", "llama"), Case("detailed_balance", "t5", adapters=True)]
RESUMED_TOO = [Case("vargrad", "qwen3", adapters=True), Case("vargrad", "t5")]

#: A sampler with state: a replay buffer, adaptive shares, and a curriculum.
STATEFUL = {
    "ground_truth": 1,
    "rest": [{"type": "adaptive_mixture", "sources": {"replay": 1, "on_policy": 1, "curriculum": 1}}, 3],
}


class Draws(list):
    """A reward that records all sampled trajectories: step, row, items."""

    __name__ = "draws"

    def __call__(self, items, row_id, trainer_state, **_):
        self.extend((trainer_state.global_step, row, ",".join(leaf)) for row, leaf in zip(row_id, items, strict=True))
        return [0.1] * len(items)


def build(
    case: Case, folder: Path, processes: int = 1, seed: int = 0, **options: Any
) -> tuple[GFlowNetTrainer, Draws]:
    """Return a trainer with global batches of `PROMPTS` prompts, and the list of its draws. Windows have one to five
    targets, and are split differently by the number of processes and micro-batches."""
    drawn = Draws()
    rewards = [GroundTruthReward(), CollaborativeReward(teacher), drawn]
    settings = {
        "loss_type": case.loss, "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant",
        "log_z_learning_rate": 0.05, "max_grad_norm": 1.0, "max_steps": STEPS,
        "per_device_train_batch_size": PROMPTS // processes // case.accumulation,
        "gradient_accumulation_steps": case.accumulation, "gradient_checkpointing": case.checkpointing,
        "train_dataset": make_user_rows(48), "sampler": {"ground_truth": 1, "on_policy": 3},
        "eval_dataset": make_rows(7, 1, 500), "per_device_eval_batch_size": 2, "peft_config": adapters_of(case),
        "ref_weight": 0.5 * case.reference,
        "loss_kwargs": {"prefix_pairwise": {"eta": 0.3}} if "prefix_pairwise" in case.loss else None,
    }  # fmt: skip
    if case.loss == "exact_flow":  # it needs the reward of every item
        rewards = rewards[:2]
    return make_trainer(folder, rewards, model_of(case, seed), **{**settings, **options}), drawn


def step_losses(trainer: GFlowNetTrainer) -> list[float]:
    """Return the unrounded loss of every step."""
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return [sum(log[f"loss/{name}"] for name in trainer.args.loss_type) for log in logs]


def train(case: Case, folder: Path, processes: int = 1, **options: Any) -> dict[str, Any]:
    """Train, evaluate and save, and return the results of this process."""
    trainer, drawn = build(case, folder, processes, **options)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(str(folder / "model"))
    return {
        "losses": step_losses(trainer),
        "grad_norms": [log["grad_norm"] for log in trainer.state.log_history if "loss" in log],
        "drawn": drawn,
        "prefix_weights": [
            weight
            for weights in trainer.prefix_weights.values()
            for weight in weights.state_dict()["log_weights"].exp().tolist()
        ],
        "evaluation": {name: metrics[f"eval_{name}"] for name in ("ndcg@10", "recall@5", "coverage@10")},
        "engine": {
            "processes": trainer.accelerator.num_processes,
            "distributed_type": str(trainer.accelerator.distributed_type).split(".")[-1],
            "wrapper": type(trainer.model_wrapped).__name__,
            "zero_stage": getattr(trainer.accelerator.deepspeed_plugin, "zero_stage", None),
        },
    }


def resume(case: Case, folder: Path, processes: int = 1, **options: Any) -> dict[str, Any]:
    """Train 8 steps, then resume from the checkpoint of step 4. Without adapters, the model that resumes has other
    initial weights."""
    options |= {"optim": "adamw_torch", "max_steps": 8, "save_strategy": "steps", "save_steps": 4}

    def sampler() -> Sampler:
        return build_sampler(STATEFUL, teacher)

    whole, drawn = build(case, folder / "whole", processes, sampler=sampler(), **options)
    whole.train()
    whole.save_model(str(folder / "whole" / "model"))
    other = 0 if case.adapters else 1
    resumed, drawn_again = build(case, folder / "resumed", processes, other, sampler=sampler(), **options)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-4"))
    resumed.save_model(str(folder / "resumed" / "model"))
    return {
        "whole": step_losses(whole), "resumed": step_losses(resumed),
        "drawn": drawn, "drawn_again": drawn_again,
        "shares": [log.get("sampler/rest/weight/replay") for log in whole.state.log_history if "loss" in log],
    }  # fmt: skip


def model_of(case: Case, seed: int = 0) -> PreTrainedModel:
    unset_hf_deepspeed_config()  # the previous case's would shard this model before its weights are set
    model = (tiny_seq2seq if case.backbone == "t5" else tiny_model)(VOCABULARY, case.backbone, seed=seed)
    if (
        case.backbone == "qwen3"
    ):  # tied embeddings, as in Qwen's small models, and a layer with sliding-window attention
        model.config.tie_word_embeddings = True
        model.config.layer_types = ["sliding_attention", "full_attention"]
        model.config.use_sliding_window, model.config.sliding_window = True, 4
        torch.manual_seed(seed)
        model = type(model)(model.config)
    for module in model.modules():  # no dropout: its random numbers depend on the shape of the micro-batch
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


def adapters_of(case: Case) -> LoraConfig | None:
    if not case.adapters:
        return None
    if case.backbone == "t5":
        return LoraConfig(r=4, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


def chosen(engine: int, every: bool = False) -> list[Case]:
    """Return the cases of an engine: each loss once, each backbone once with and once without adapters; over six
    engines, each loss with each of these. The first case accumulates gradients, the second checkpoints activations,
    and the third and fourth (one of them with adapters) have a reference model. `every`: all combinations."""
    combinations = [
        (loss, combo) for index, loss in enumerate(LOSSES) for combo in (range(6) if every else [(index + engine) % 6])
    ]
    return [
        Case(loss, BACKBONES[combo % 3], combo % 2 == 1, number in (2, 3), 1 + (number == 0), number == 1)
        for number, (loss, combo) in enumerate(combinations)
    ]


def dump(cases: list[Case]) -> str:
    return json.dumps([asdict(case) for case in cases])


def load(text: str) -> list[Case]:
    return [Case(**case) for case in json.loads(text)]
