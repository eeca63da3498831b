"""The library without the pipeline: data, catalog, teacher, model, GFlowNet, recommendations. One minute on a CPU.

python examples/minimal.py
"""

from transformers import LlamaConfig, LlamaForCausalLM

from gflowtrl import GFlowNetConfig, GFlowNetTrainer, ItemCatalog, Recommender
from gflowtrl.data import SyntheticShop, build_tokenizer, leave_one_out
from gflowtrl.rewards import CollaborativeReward, GroundTruthReward
from gflowtrl.teachers import EASE


data, _ = SyntheticShop(seed=0, n_users=600).generate()  # or gflowtrl.data.read_interactions("folder")
splits = leave_one_out(data)
tokenizer = build_tokenizer(data.semantic_ids)  # add_item_tokens(tokenizer, ids, model) for your own checkpoint
catalog = ItemCatalog.from_semantic_ids(data.semantic_ids, tokenizer)
teacher = EASE.fit(splits.train_sequences, data.items, splits.validation)
price = {item: features["price"] for item, features in data.item_features.items()}


def prefer_cheap(items, **kwargs):
    return [1 / min(price[item] for item in group) for group in items]


model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
)
trainer = GFlowNetTrainer(
    model=model,
    reward_funcs=[GroundTruthReward(), CollaborativeReward(teacher), prefer_cheap],
    args=GFlowNetConfig(
        output_dir="outputs/minimal",
        loss_type=["sft", "vargrad"],
        reward_weights=[0.3, 0.6, 0.1],
        num_generations=8,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        num_train_epochs=1,
        eval_strategy="epoch",
    ),
    train_dataset=splits.train,
    eval_dataset=splits.validation,
    processing_class=tokenizer,
    catalog=catalog,
    sampler={"ground_truth": 1, "on_policy": 7},
)
trainer.train()
trainer.save_model("outputs/minimal/final")

recommender = Recommender.from_pretrained("outputs/minimal/final")
histories = splits.test["history"][:3]
for history, recommendations in zip(histories, recommender.recommend(histories, k=5), strict=True):
    print(history[-5:], "->", [(r.item, f"{r.log_prob:.2f}", price[r.item]) for r in recommendations])
