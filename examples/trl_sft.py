"""Continue a checkpoint with TRL's SFTTrainer on one row per target.

accelerate launch examples/trl_sft.py --data_dir DIR --model SFT_FOLDER --output_dir outputs/trl_sft
"""

from same_rows import SameRows
from trl import SFTConfig, SFTTrainer

from gflowtrl.data import text_sft_dataset


if __name__ == "__main__":
    rows, args = SameRows.from_command_line(SFTConfig, learning_rate=5e-4)
    args.dataset_kwargs = {"skip_prepare_dataset": True}  # the rows are tokenized; the loss is on the target's tokens
    train = text_sft_dataset(rows.splits.train["history"], rows.splits.train["target"], rows.encoder)
    rows.finish(SFTTrainer(rows.model, args=args, train_dataset=train, processing_class=rows.tokenizer))
