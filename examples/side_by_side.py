"""TRL's SFTTrainer and DPOTrainer and our GFlowNetTrainer on the same rows, from the same checkpoint.

It takes a few minutes on a CPU.

python examples/side_by_side.py
"""

import random

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from gflowtrl import GFlowNetConfig, GFlowNetTrainer, ItemCatalog
from gflowtrl.data import PromptEncoder, SyntheticShop, build_tokenizer, leave_one_out, text_sft_dataset
from gflowtrl.metrics import summarize
from gflowtrl.policy import make_policy
from gflowtrl.rewards import CollaborativeReward, GroundTruthReward
from gflowtrl.teachers import SASRec
from gflowtrl.trainer import rank_rows


SFT_FOLDER = "outputs/side_by_side/sft"
SHARED = {
    "per_device_train_batch_size": 32, "num_train_epochs": 1, "lr_scheduler_type": "cosine", "logging_steps": 50,
    "save_strategy": "no", "report_to": "none", "bf16": False, "gradient_checkpointing": False,
}  # fmt: skip

# --------------------------------------------------------------------------------------------- shared by all trainers
data, _ = SyntheticShop(seed=0, n_users=800, n_items=400).generate()
splits = leave_one_out(data)
tokenizer = build_tokenizer(data.semantic_ids)
catalog = ItemCatalog.from_semantic_ids(data.semantic_ids, tokenizer)
encoder = PromptEncoder(catalog, tokenizer)
teacher = SASRec.fit(splits.train_sequences, data.items, splits.validation, epochs=40)


def text(tokens: torch.Tensor) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False)


def sft_model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(SFT_FOLDER)


def train(trainer) -> LlamaForCausalLM:
    trainer.train()
    return trainer.model


# ------------------------------------------------------------------------------- SFT, the starting point of the others
def sft(model: LlamaForCausalLM, epochs: int, learning_rate: float) -> LlamaForCausalLM:
    rows = text_sft_dataset(splits.train["history"], splits.train["target"], encoder)
    config = SHARED | {"num_train_epochs": epochs, "learning_rate": learning_rate}
    args = SFTConfig("outputs/side_by_side/sft-run", dataset_kwargs={"skip_prepare_dataset": True}, **config)
    return train(SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer))


# ------------------------------------------------ DPO: the target against an item that the user never interacted with
def dpo(model: LlamaForCausalLM) -> LlamaForCausalLM:
    known, generator, pairs = dict(zip(data.users, map(set, data.sequences), strict=True)), random.Random(0), []
    for row in splits.train:
        ids = encoder([row["history"]])["input_ids"][0]
        other = generator.choice([item for item in data.items if item not in known[row["user"]]])
        chosen, rejected = (" " + " ".join(data.semantic_ids[item]) for item in (row["target"], other))
        pairs.append({"prompt": text(ids), "chosen": chosen, "rejected": rejected})
    args = DPOConfig("outputs/side_by_side/dpo-run", beta=0.1, learning_rate=2e-4, **SHARED)
    return train(DPOTrainer(model, args=args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer))


# ------------------------------------------------------------ GFlowNet: recommendations in proportion to the reward
def gflownet(model: LlamaForCausalLM) -> LlamaForCausalLM:
    rewards = [GroundTruthReward(), CollaborativeReward(teacher)]
    args = GFlowNetConfig(
        "outputs/side_by_side/gflownet-run", loss_type="exact_flow", num_generations=4, reward_weights=[0.3, 0.7],
        learning_rate=1e-3, **SHARED,
    )  # fmt: skip
    return train(GFlowNetTrainer(model, rewards, args, splits.train, processing_class=tokenizer, catalog=catalog))


def evaluate(name: str, model: LlamaForCausalLM) -> None:
    leaves = rank_rows(make_policy(model.eval(), catalog), encoder, splits.test, num_beams=20)
    metrics = summarize(leaves, catalog.leaf_of(splits.test["target"]), catalog, splits.item_counts, ks=[10]).metrics
    figures = "  ".join(f"{metric} {metrics[metric]:.4f}" for metric in ("recall@10", "ndcg@10", "coverage@10"))
    print(f"{name:<14} {figures}", flush=True)


set_seed(0)
special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
small = LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    **special,
)  # fmt: skip
sft(LlamaForCausalLM(small), epochs=3, learning_rate=2e-3).save_pretrained(SFT_FOLDER)
models = {
    "SFT": sft_model(),
    "SFT continued": sft(sft_model(), epochs=1, learning_rate=5e-4),
    "DPO": dpo(sft_model()),
    "GFlowNet": gflownet(sft_model()),
}
print("\nThe SYNTHETIC shop (not evidence about real users):")
for name, model in models.items():
    evaluate(name, model)
