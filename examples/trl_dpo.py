"""Continue a checkpoint with TRL's DPOTrainer: the target against an item that the user never interacted with.

accelerate launch examples/trl_dpo.py --data_dir DIR --model SFT_FOLDER --output_dir outputs/trl_dpo
"""

import random

from datasets import Dataset
from same_rows import SameRows
from trl import DPOConfig, DPOTrainer


if __name__ == "__main__":
    rows, args = SameRows.from_command_line(DPOConfig, learning_rate=1e-4, beta=0.1)
    data, generator = rows.data, random.Random(args.seed)
    known = dict(zip(data.users, map(set, data.sequences), strict=True))
    pairs = []
    for row in rows.splits.train:
        other = generator.choice([item for item in data.items if item not in known[row["user"]]])
        chosen, rejected = (" " + rows.semantic_id(item) for item in (row["target"], other))
        pairs.append({"prompt": rows.prompt(row["history"]), "chosen": chosen, "rejected": rejected})
    train = Dataset.from_list(pairs)
    rows.finish(DPOTrainer(rows.model, args=args, train_dataset=train, processing_class=rows.tokenizer))
