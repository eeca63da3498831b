"""What all trainers share: TRL's base class, averaged metrics, checkpoints that are complete recommenders."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from trl.trainer.base_config import _BaseConfig
from trl.trainer.base_trainer import _BaseTrainer

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.data import PrefixGroupedEpochSampler, PromptEncoder, prefix_groups
from gflowtrl.policy.heads import load_heads, split_heads
from gflowtrl.recommender import write_recommender_files

from .checkpoints import CompleteCheckpointsMixin
from .evaluation import RankingEvaluationMixin, history_lengths
from .model_card import write_model_card


HEADS_FILE = "flow_heads.safetensors"


def computes_in_bf16(use_cpu: bool) -> bool:
    """Whether training is in bf16 mixed precision where nobody says otherwise."""
    return not use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()


@dataclass
class BaseConfig(_BaseConfig):
    """Defaults of all gflowtrl trainers: TRL's, but right for small models and for machines without bf16."""

    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Trade compute for memory; off unless asked for, unlike in TRL."}
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "bfloat16 mixed precision; by default where the device has it."}
    )
    max_shared_prompts: int = field(
        default=1, metadata={"help": "Rows of one user that a causal model computes on one prompt; 1: none."}
    )

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and computes_in_bf16(self.use_cpu)
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # pinning without a device only warns
        if self.max_shared_prompts < 1:
            raise ValueError(
                f"max_shared_prompts is {self.max_shared_prompts}; give at least 1, which shares nothing."
            )
        self._refuse_unused()
        super().__post_init__()

    def _refuse_unused(self) -> None:
        """Arguments of the Trainer that these trainers would stumble over, or not look at."""
        if self.batch_eval_metrics:
            raise ValueError("batch_eval_metrics is True, but breadth is a property of all lists; leave it False.")
        if not self.eval_do_concat_batches:
            raise ValueError("eval_do_concat_batches is False, but metrics are of all lists together; leave it True.")
        if "inputs" in self.include_for_metrics:
            raise ValueError("include_for_metrics names 'inputs', but metrics are of lists and targets; leave it out.")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}, but no loss of gflowtrl smooths labels: it "
                f"would change nothing. Leave it at 0."
            )


class BaseTrainer(CompleteCheckpointsMixin, RankingEvaluationMixin, _BaseTrainer):
    """TRL's base trainer (the one of SFTTrainer and DPOTrainer) without telemetry, for recommenders."""

    loss_is_scaled_for_ga = False  # our losses are means over a micro-batch; the Trainer divides by the accumulation
    _catalog: ItemCatalog
    _encoder: PromptEncoder
    _item_titles: Mapping[Item, str] | None = None

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere."""

    # ------------------------------------------------------------------------------------------------------- metrics
    def record(self, metrics: dict[str, Tensor | float]) -> None:
        """Add to the running means that the next log line reports; NaN is left out. Tensors stay on their device."""
        sums = self.__dict__.setdefault("_metric_sums", defaultdict(lambda: [0.0, 0.0]))
        for name, value in metrics.items():
            value = torch.as_tensor(value, dtype=torch.float32).detach()
            valid = torch.isfinite(value)
            sums[name][0] = sums[name][0] + torch.where(valid, value, 0.0)
            sums[name][1] = sums[name][1] + valid.float()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the mean of what was recorded since the last time, over all processes."""
        sums = self.__dict__.get("_metric_sums")
        if sums and "loss" in logs:
            # A reward may report a metric on one process only; all must add up the same ones.
            names = sorted(set(gather_object(sorted(sums))))
            table = torch.tensor([[float(x) for x in sums[name]] for name in names], device=self.args.device)
            table = self.accelerator.reduce(table, "sum").tolist()
            means = [total / count if count else math.nan for total, count in table]
            logs = logs | dict(zip(names, means, strict=True))
            sums.clear()
        super().log(logs, start_time)

    # ------------------------------------------------------------------------------------------------ order of rows
    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        longest = self._encoder.max_history_items
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        lengths = history_lengths(dataset).clamp(max=longest)
        if self.args.max_shared_prompts == 1:
            return LengthGroupedEpochSampler(lengths, batch, seed)
        groups = prefix_groups(dataset["history"], longest, self.args.max_shared_prompts)
        return PrefixGroupedEpochSampler(groups, lengths[[group[0] for group in groups]].tolist(), batch, seed)

    # --------------------------------------------------------------------------------------------------- checkpoints
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write a complete recommender; flow heads go into their own file, so that `AutoModel` loads in silence."""
        output_dir = output_dir or self.args.output_dir
        state_dict, heads = split_heads(self.model.state_dict() if state_dict is None else state_dict)
        # DeepSpeed hands over a copy of a tied weight under each of its names; it is saved under the first.
        for name, first in getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", {}).items():
            if first in state_dict:
                state_dict.pop(name, None)
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        if heads:
            save_file({name: value.contiguous().cpu() for name, value in heads.items()}, Path(output_dir, HEADS_FILE))
        write_recommender_files(output_dir, self._encoder, self._item_counts, self._item_titles)
        write_model_card(self, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        model = self.model if model is None else model
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_heads(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_heads(self.state.best_model_checkpoint, self.model)

    def _load_heads(self, directory: str, model) -> None:
        file = Path(directory, HEADS_FILE)
        if file.is_file() and not self.is_deepspeed_enabled:  # whose own checkpoint holds them
            load_heads(model, load_file(file))

    def _issue_warnings_after_load(self, load_result) -> None:
        """The heads are not in the model's own file: not a thing to warn of."""
        for name in list(split_heads(dict.fromkeys(load_result.missing_keys))[1]):
            load_result.missing_keys.remove(name)
        super()._issue_warnings_after_load(load_result)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        """Write `README.md` into the output folder (called by `push_to_hub`)."""
        if self.is_world_process_zero():
            os.makedirs(self.args.output_dir, exist_ok=True)
            write_model_card(self, self.args.output_dir)


class LengthGroupedEpochSampler(PrefixGroupedEpochSampler):
    """Rows in random order, rows of like length together, as a function of (seed, epoch): every row its own group.

    transformers' own length grouping draws from the global generator, whose state at the beginning of an epoch is lost
    when a run is interrupted; this one repeats the epoch's order.

    Args:
        lengths: `(rows,)`.
        batch_size, seed, spread: as for `PrefixGroupedEpochSampler`.
    """

    def __init__(self, lengths: Tensor, batch_size: int, seed: int, spread: int = 50):
        super().__init__([[row] for row in range(len(lengths))], lengths.tolist(), batch_size, seed, spread)
