"""Continue a checkpoint with TRL's GRPOTrainer: 16 free completions per prompt, with reward 1 for the target.

accelerate launch examples/trl_grpo.py --data_dir DIR --model SFT_FOLDER --output_dir outputs/trl_grpo --max_steps 300

`per_device_train_batch_size` counts completions. In training, completions are not restricted to the catalog.
"""

from datasets import Dataset
from same_rows import SameRows
from trl import GRPOConfig, GRPOTrainer


def hit(completions: list[str], target_id: list[str], **kwargs) -> list[float]:
    return [float(text.strip() == target) for text, target in zip(completions, target_id, strict=True)]


if __name__ == "__main__":
    rows, args = SameRows.from_command_line(GRPOConfig, learning_rate=1e-5, beta=1e-3, num_generations=16)
    args.max_completion_length = rows.catalog.tree.max_depth
    train = Dataset.from_list(
        [
            {"prompt": rows.prompt(row["history"]), "target_id": rows.semantic_id(row["target"])}
            for row in rows.splits.train
        ]
    )
    rows.finish(GRPOTrainer(rows.model, hit, args=args, train_dataset=train, processing_class=rows.tokenizer))
