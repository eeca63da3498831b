"""Communication of a training step between the processes of a sharded engine, in multiples of the model's bytes.

    accelerate launch --config_file recipes/accelerate_configs/zero3.yaml --num_processes 2 \\
        benchmarks/speed/communication.py --out benchmarks/results/speed/communication_zero3.json

Two CPU processes are enough (DS_ACCELERATOR=cpu), because bytes are counted, not timed. The thresholds of ZeRO-3 are
set to 0; otherwise it would not shard the weights of such a small model. The bytes are those of the collectives of
torch.distributed in the third step.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from measuring import arguments, llama, random_catalog, report
from transformers import TrainerCallback

from gflowtrl import GFlowNetConfig, GFlowNetTrainer
from gflowtrl.data import SyntheticShop, leave_one_out
from gflowtrl.rewards import GroundTruthReward


COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "broadcast")
JOBS = {
    "off policy": {"loss_type": "vargrad", "sampler": {"ground_truth": 1, "unobserved": 3}},
    "on policy": {"loss_type": "vargrad", "sampler": {"ground_truth": 1, "on_policy": 3}},
    "beam": {"loss_type": "vargrad", "sampler": {"ground_truth": 1, "beam": 3}},
    "exact flows": {"loss_type": "exact_flow", "sampler": "reward"},
}
#: No weights are kept between forward and backward, as with a model that fills the GPU.
NO_THRESHOLDS = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


class Count(TrainerCallback):
    """Counts the bytes of the last step per collective: the largest tensor of each call."""

    def __init__(self):
        self.bytes: Counter[str] = Counter()
        for name in COLLECTIVES:
            setattr(dist, name, self._counting(name, getattr(dist, name)))

    def _counting(self, name: str, real):
        def counted(*args: Any, **kwargs: Any):
            given = [value for value in [*args, *kwargs.values()] if torch.is_tensor(value)]
            self.bytes[name] += max(tensor.numel() * tensor.element_size() for tensor in given)
            return real(*args, **kwargs)

        return counted

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.bytes.clear()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.last = dict(self.bytes)


def main() -> None:
    given = arguments(__doc__).parse_args()
    splits = leave_one_out(SyntheticShop(n_users=100, n_items=200).generate()[0])
    catalog, tokenizer = random_catalog(len(splits.items), depth=4)
    names = dict(zip(splits.items, catalog.items, strict=True))
    train = splits.train.map(
        lambda row: {"history": [names[item] for item in row["history"]], "target": names[row["target"]]}
    )
    count, rows = Count(), []
    for job, options in JOBS.items():
        on_cpu = {"ddp_backend": "gloo"} if given.device.type == "cpu" else {}
        args = GFlowNetConfig(
            "outputs/communication", loss_type=options["loss_type"], num_generations=4, max_steps=3, report_to="none",
            per_device_train_batch_size=4, save_strategy="no", logging_strategy="no", **on_cpu,
        )  # fmt: skip
        trainer = GFlowNetTrainer(
            llama(len(tokenizer), "0.2M"), GroundTruthReward(), args, train_dataset=train,
            processing_class=tokenizer, catalog=catalog, sampler=options["sampler"], callbacks=[count],
        )  # fmt: skip
        plugin = trainer.accelerator.deepspeed_plugin
        if plugin is not None and plugin.zero_stage == 3:
            plugin.deepspeed_config["zero_optimization"] |= NO_THRESHOLDS
        trainer.train()
        # Sharded parameters have their full size as an attribute.
        whole = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in trainer.model.parameters())
        engine = str(trainer.accelerator.distributed_type).split(".")[-1]
        row = {"job": job, "engine": engine, "zero_stage": getattr(plugin, "zero_stage", None), "model_bytes": whole}
        rows.append(row | {name: count.last.get(name, 0) / whole for name in COLLECTIVES})
    if trainer.is_world_process_zero():
        columns = {"engine": "{engine}", "step": "{job}", **{name: f"{{{name}:.2f}}" for name in COLLECTIVES}}
        report(rows, columns, given, processes=trainer.accelerator.num_processes)


if __name__ == "__main__":
    main()
