"""`gflowtrl export --to vllm`: a plain model folder, the catalog, and a logits processor that reads it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import Tensor

from gflowtrl.catalog import ItemCatalog, PrefixTree
from gflowtrl.catalog.rows import distinct_rows
from gflowtrl.compat import carries_adapters
from gflowtrl.data import PromptEncoder
from gflowtrl.policy.heads import split_heads

from . import arrays


if TYPE_CHECKING:
    from gflowtrl.recommender import Recommender


STANDALONE = Path(__file__).parent / "standalone"
FILES = ("gflowtrl_tree.py", "gflowtrl_vllm.py", "example.py")


def write(recommender: Recommender, folder: Path) -> None:
    """Write the model with its tokenizer, the catalog, the logits processor and an example into an empty folder.

    Args:
        recommender: of a causal model.
        folder: gets the files. Its top level has no other `.safetensors` files than the model's, since vLLM reads all.

    Raises:
        ValueError: the model is an encoder-decoder or has adapters, or the processor could not see where a prompt ends
            (`check_prompts`).
    """
    if recommender.model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(recommender.model).__name__} is an encoder-decoder, which vLLM does not run. Use a causal model "
            f"(Llama, Qwen3, ...)."
        )
    if isinstance(recommender.model, PeftModel) or carries_adapters(recommender.model):
        raise ValueError(  # of a quantized base, into which they cannot be merged
            "The model has adapters that are not merged, and vLLM needs whole weights. Merge them into the base "
            "model, unquantized, and export that."
        )
    check_prompts(recommender.encoder)
    weights, _ = split_heads(recommender.model.state_dict())
    recommender.model.save_pretrained(folder, state_dict=weights)
    recommender.tokenizer.save_pretrained(folder)
    (folder / arrays.CATALOG_FOLDER).mkdir()
    arrays.write(recommender, folder / arrays.CATALOG_FOLDER)
    for name in FILES:
        shutil.copyfile(STANDALONE / name, folder / name)


def check_prompts(encoder: PromptEncoder) -> None:
    """Check that the end of every prompt is the root when it is read as the logits processor reads it.

    The processor reads runs of id tokens as complete ids (`Catalog.node_after`), also those in titles.

    Raises:
        ValueError: after an item, or the text before or after the history, it would see an unfinished id; the id of a
            retired item begins the id of another item, or the other way round.
    """
    catalog, tree = encoder.catalog, _tree_of_histories(encoder.catalog)
    for tokens in (encoder.head, encoder.tail):
        if tokens and not bool(_ends_at_root(tree, torch.tensor([tokens])).all()):
            raise ValueError(
                "The text before or after the history ends with tokens of a semantic id, so the logits processor "
                "could not see where an answer begins. Train with another template (PromptFormat)."
            )
    complete = _ends_at_root(tree, encoder.table)
    if not bool(complete.all()):
        item = catalog.history_items[int((~complete).nonzero()[0])]
        raise ValueError(
            f"Item {item!r} ends in a prompt with tokens of an unfinished semantic id (such as a number in its "
            f"title), so the logits processor could not see where an answer begins. Train with a PromptFormat whose "
            f"item ends with its semantic id or with other words."
        )


def _tree_of_histories(catalog: ItemCatalog) -> PrefixTree:
    """Return the tree over all ids that a history may contain, those of retired items included."""
    if not catalog.retired:
        return catalog.tree
    try:
        return PrefixTree(distinct_rows(catalog.history_token_ids)[0])
    except ValueError as error:
        raise ValueError(
            f"The logits processor could not read histories with retired items. {error} Retire both items."
        ) from None


def _ends_at_root(tree: PrefixTree, table: Tensor) -> Tensor:
    """Return whether each row `(rows, W)`, padded with -1, read from the root, ends at the root: bool `(rows,)`."""
    device = tree.device
    nodes = torch.zeros(len(table), dtype=torch.long, device=device)
    for tokens in table.to(device).unbind(1):
        following = tree.step(nodes, tokens)
        following = torch.where(tree.leaf_at(following) >= 0, 0, following)
        following = torch.where(torch.isin(tokens, tree.tokens), following, 0)
        nodes = torch.where(tokens >= 0, following, nodes)
    return nodes == 0
