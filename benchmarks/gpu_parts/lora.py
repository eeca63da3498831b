"""LoRA on a Qwen3 with the sizes of Qwen3-0.6B and random weights, through `GFlowNetTrainer`."""

from __future__ import annotations

import tempfile
from functools import partial

import torch
from datasets import Dataset
from measuring import random_catalog
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from gflowtrl import GFlowNetConfig, GFlowNetTrainer, ItemCatalog
from gflowtrl.data import add_item_tokens

from .settings import Row, Rows, RunSettings, cast_parameters
from .throughput import measure
from .training import ItemReward


#: Sizes of Qwen3-0.6B, and small ones.
SIZES = {
    "hidden_size": (1024, 32), "num_hidden_layers": (28, 2), "num_attention_heads": (16, 4),
    "num_key_value_heads": (8, 2), "head_dim": (128, 16), "intermediate_size": (3072, 64),
}  # fmt: skip
VOCABULARY = (151_936, 500)  # without item tokens
HISTORY = (50, 10)  # items of four tokens


def lora(settings: RunSettings) -> Rows:
    """Measure throughput for each loss and K, with bf16 weights, adapters of rank 16 and trained item tokens."""
    catalog, tokenizer = items_and_tokenizer(settings)
    catalog.to(settings.device)
    prompts, items = settings.pick(16, 2), settings.pick(*HISTORY)
    drawn = torch.randint(len(catalog), (prompts * 32, items + 1), generator=torch.Generator().manual_seed(0))
    histories = [[catalog.items[i] for i in row] for row in drawn.tolist()]
    rows = Dataset.from_list(
        [{"row_id": number, "history": row[:-1], "target": row[-1]} for number, row in enumerate(histories)]
    )

    def step(loss: str, count: int) -> Row:
        model = qwen(settings, len(tokenizer))
        with tempfile.TemporaryDirectory() as scratch:
            args = GFlowNetConfig(
                scratch, loss_type=loss, num_generations=count, per_device_train_batch_size=prompts, bf16=True,
                use_cpu=settings.device.type == "cpu", max_history_items=items, report_to="none",
                save_strategy="no", logging_strategy="no", disable_tqdm=True,
            )  # fmt: skip
            trainer = GFlowNetTrainer(
                model, ItemReward(catalog), args, rows, processing_class=tokenizer, catalog=catalog,
                peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            )  # fmt: skip
            trained = trainer.model.get_nb_trainable_parameters()[0]
            return {
                "loss": loss, "num_generations": count, "prompts": prompts, "prompt_tokens": 4 * items,
                "parameters": model.num_parameters(), "trained_parameters": trained,
                **measure(trainer, settings, prompts),
            }  # fmt: skip

    yield from (partial(step, loss, count) for loss in ("vargrad", "exact_flow") for count in (4, 8))


def qwen(settings: RunSettings, vocab_size: int) -> Qwen3ForCausalLM:
    """Return a Qwen3 on the device, in bf16 with tied embeddings."""
    torch.manual_seed(0)
    sizes = {name: settings.pick(*values) for name, values in SIZES.items()}
    config = Qwen3Config(
        vocab_size=vocab_size, max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0,
        bos_token_id=None, eos_token_id=0, **sizes,
    )  # fmt: skip
    with settings.device:
        return cast_parameters(Qwen3ForCausalLM(config), torch.bfloat16)


def items_and_tokenizer(settings: RunSettings) -> tuple[ItemCatalog, PreTrainedTokenizerFast]:
    """Return a catalog whose tokens are added to a large vocabulary of words. Ids are four tokens, each a choice."""
    num_items, codes = settings.pick((5000, 12), (200, 4))
    drawn, _ = random_catalog(num_items, depth=4, codes=codes)
    words = {"<pad>": 0} | {f"word{number}": number for number in range(1, settings.pick(*VOCABULARY))}
    core = Tokenizer(models.WordLevel(words))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<pad>", padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    semantic_ids = dict(zip(drawn.items, drawn.semantic_ids, strict=True))
    add_item_tokens(tokenizer, semantic_ids)
    return ItemCatalog.from_semantic_ids(semantic_ids, tokenizer), tokenizer
