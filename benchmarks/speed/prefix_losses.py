"""Training steps of APAO: pairwise prefix losses with many negatives, and pointwise losses on the same rows.

    python benchmarks/speed/prefix_losses.py --data_dir DIR --out benchmarks/results/speed/prefix_losses.json

Measures complete steps of `trainer.train()` on the prompts of the Office recipe, in fp32 with AdamW. A prompt of P
tokens and K branches of L - 1 tokens are in one row, so pairwise steps have (P + K (L - 1)) / (P + L - 1) times the
tokens of pointwise ones. P is the padded length, averaged over the batches. As in a run of the pipeline, freed memory
is kept (`keep_freed_memory`).
"""

from __future__ import annotations

import statistics
import sys
import tempfile

from measuring import BACKBONES, arguments, office, report
from tqdm.auto import tqdm
from training_step import STEPS, StepClock
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback

from gflowtrl import APAOConfig, APAOTrainer
from gflowtrl.pipeline.memory import keep_freed_memory


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), choices=list(BACKBONES))
    parser.add_argument("--size", default="1.2M")
    parser.add_argument("--prompts", type=int, default=64, help="prompts per step")
    parser.add_argument("--num_negatives", type=int, default=100)
    parser.add_argument("--label_spaces", nargs="+", default=["vocabulary", "tree"])
    given = parser.parse_args()
    kept = keep_freed_memory()
    run_data = office(given.data_dir)
    rows = run_data.splits.train.shuffle(seed=0).select(range(given.prompts * STEPS))
    tokens = 1 + sum(map(len, rows["history"])) * run_data.catalog.tree.max_depth / len(rows)
    measured = []
    for backbone in given.backbones:
        model = BACKBONES[backbone](len(run_data.tokenizer), given.size).to(given.device)
        for space in given.label_spaces:
            with tempfile.TemporaryDirectory() as scratch:
                seconds, memory, prompt = steps(model, run_data, rows, given, space, scratch)
            later = run_data.catalog.tree.max_depth - 1
            branches = 1 + given.num_negatives
            ratio = (prompt + branches * later) / (prompt + later)
            measured.append({
                "backbone": backbone, "label_space": space, "prompt": prompt, "token_ratio": ratio,
                "pointwise": seconds["pointwise"], "pairwise": seconds["pairwise"],
                "ratio": seconds["pairwise"] / seconds["pointwise"],
                "peak_memory_pointwise": memory["pointwise"], "peak_memory_pairwise": memory["pairwise"],
            })  # fmt: skip
            measured[-1]["of_token_ratio"] = measured[-1]["ratio"] / ratio
    columns = {
        "backbone": "{backbone}", "label space": "{label_space}", "P": "{prompt:.0f}",
        "pointwise, s per step": "{pointwise:.3f}", "pairwise, s per step": "{pairwise:.3f}", "ratio": "{ratio:.2f}",
        "token ratio": "{token_ratio:.2f}", "ratio / token ratio": "{of_token_ratio:.2f}",
        "peak bytes, pointwise": "{peak_memory_pointwise:.1e}", "peak bytes, pairwise": "{peak_memory_pairwise:.1e}",
    }  # fmt: skip
    settings = {"prompts": given.prompts, "num_negatives": given.num_negatives, "size": given.size}
    report(measured, columns, given, **settings, mean_prompt_tokens=tokens, rounds=given.rounds, memory_kept=kept)


def steps(model, run_data, rows, given, label_space: str, scratch: str) -> tuple[dict, dict, float]:
    """Return the median seconds and peak memory of both methods, and the mean padded length of the prompts."""
    common = {
        "output_dir": scratch, "max_steps": STEPS, "learning_rate": 1e-4, "use_cpu": given.device.type == "cpu",
        "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no",
        "logging_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": given.prompts,
        "num_negatives": given.num_negatives, "label_space": label_space, "dataloader_pin_memory": False,
    }  # fmt: skip
    trainers: dict[str, Trainer] = {}
    clocks = {}
    for method in ("pointwise", "pairwise"):
        trainers[method] = APAOTrainer(
            model, APAOConfig(method=method, **common), train_dataset=rows, processing_class=run_data.tokenizer,
            catalog=run_data.catalog,
        )  # fmt: skip
        clocks[method] = StepClock(given.device)
        trainers[method].add_callback(clocks[method])
        trainers[method].remove_callback(PrinterCallback)
    widths = [batch["prompts"]["input_ids"].shape[1] for batch in trainers["pointwise"].get_train_dataloader()]
    for _ in tqdm(range(given.rounds), desc=label_space, disable=not sys.stderr.isatty(), leave=False):
        for trainer in trainers.values():
            trainer.train()
    seconds = {method: statistics.median(clock.seconds) for method, clock in clocks.items()}
    return seconds, {method: max(clock.memory) for method, clock in clocks.items()}, statistics.mean(widths)


if __name__ == "__main__":
    main()
