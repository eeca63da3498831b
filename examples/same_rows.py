"""Shared by the examples of TRL's trainers: the SFT checkpoint, the training rows, and the evaluation."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from trl import TrlParser

from gflowtrl import ItemCatalog
from gflowtrl.data import leave_one_out, read_interactions
from gflowtrl.data.recommender_files import read_encoder, write_recommender_files
from gflowtrl.metrics import summarize
from gflowtrl.policy import make_policy
from gflowtrl.trainer import rank_rows


@dataclass
class RowsArguments:
    """The data and the checkpoint. The options of the trainer's configuration are accepted too."""

    data_dir: str = field(metadata={"help": "Folder of the data, in one of the formats of docs/data.md."})
    model: str = field(metadata={"help": "Folder of a recommender after SFT (a causal model)."})


class SameRows:
    """The data, its splits, and the checkpoint with its tokenizer, catalog and prompt encoder."""

    def __init__(self, rows: RowsArguments):
        self.data = read_interactions(rows.data_dir)
        self.splits = leave_one_out(self.data)
        self.model = AutoModelForCausalLM.from_pretrained(rows.model)
        self.tokenizer = AutoTokenizer.from_pretrained(rows.model)
        self.catalog = ItemCatalog.from_pretrained(rows.model)
        self.encoder = read_encoder(rows.model, self.catalog, self.tokenizer)

    @classmethod
    def from_command_line(cls, config: type, **defaults: Any) -> tuple["SameRows", Any]:
        """Return the rows and a `config` from the command line, whose options override `defaults`."""
        parser = TrlParser((RowsArguments, config))
        parser.set_defaults(
            num_train_epochs=2, per_device_train_batch_size=64, lr_scheduler_type="cosine", logging_steps=50,
            save_strategy="no", report_to="none", bf16=False, gradient_checkpointing=False, **defaults,
        )  # fmt: skip
        rows, args = parser.parse_args_and_config()
        return cls(rows), args

    def prompt(self, history: list) -> str:
        """Return the prompt as text, including the first token (BOS)."""
        return self.tokenizer.decode(self.encoder([history])["input_ids"][0])

    def semantic_id(self, item: Any) -> str:
        """Return the tokens of an item as text."""
        return " ".join(self.data.semantic_ids[item])

    def finish(self, trainer: Trainer) -> None:
        """Train, save a recommender, and evaluate it on the test split by beam search on the tree."""
        trainer.train()
        folder = Path(trainer.args.output_dir)
        trainer.save_model(folder)
        if not trainer.is_world_process_zero():
            return
        write_recommender_files(folder, self.encoder)
        with torch.no_grad():
            policy, test = make_policy(trainer.model.eval(), self.catalog), self.splits.test
            leaves = rank_rows(policy, self.encoder, test, num_beams=20)
        self.catalog.to("cpu")
        report = summarize(leaves, self.catalog.leaf_of(test["target"]), self.catalog, self.splits.item_counts)
        cost = {"steps": trainer.state.global_step, "seconds": trainer.state.log_history[-1].get("train_runtime")}
        Path(folder, "metrics.json").write_text(json.dumps({**cost, **report.metrics}, indent=2) + "\n")
        for name in ("recall@10", "ndcg@10", "coverage@10"):
            print(f"{name} {report.metrics[name]:.4f}")
