"""TRL's DPOTrainer from a checkpoint: the target against an item that the user never interacted with.

accelerate launch examples/trl_dpo.py --data_dir DIR --model SFT_FOLDER --output_dir outputs/trl_dpo
"""

import random

from datasets import Dataset
from same_rows import SameRows
from trl import DPOConfig, DPOTrainer


if __name__ == "__main__":
    rows, args = SameRows.from_command_line(DPOConfig, learning_rate=1e-4, beta=0.1)
    data, choose = rows.data, random.Random(args.seed)
    known = dict(zip(data.users, map(set, data.sequences), strict=True))
    pairs = [
        {
            "prompt": rows.prompt(row["history"]),
            "chosen": " " + rows.semantic_id(row["target"]),
            "rejected": " " + rows.semantic_id(choose.choice([i for i in data.items if i not in known[row["user"]]])),
        }
        for row in rows.splits.train
    ]
    train = Dataset.from_list(pairs)
    rows.finish(DPOTrainer(rows.model, args=args, train_dataset=train, processing_class=rows.tokenizer))
