"""An encoder-decoder as a policy on the prefix tree.

The encoder reads the prompt once. All branches of a prompt are in *one* decoder row `[start, branches]` with a 4-D
additive mask, so there is one encoder row per decoder row, and the cross-attention's keys and values are computed once
per prompt as well. These models take the self-attention bias (T5) or the position vectors (BART) from a token's
position in the row. `branch_positions` changes this to its position in the branch, inside the model's forward.

Two alternatives are exact too, but not used. Rows of single branches with one expanded cross-attention cache need a
cache that carries gradients, which gradient checkpointing disables, and two forwards before one backward. Correcting
the bias through the mask would use a parameter outside the model's forward, which sharded engines do not allow.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from gflowtrl.catalog import ItemCatalog
from gflowtrl.trunks import Prompts, Trunks, separate_prompts

from .branch_positions import place_branches
from .branches import Branches
from .masks import additive
from .modules import innermost, model_dtype
from .packing import BranchDecoder, lay_out
from .restricted_head import only_states
from .tree_policy import TreePolicy


class Seq2SeqTreePolicy(TreePolicy):
    """The distribution over leaves of an encoder-decoder, with its logits renormalized over a node's children.

    The prompt goes to the encoder, and the semantic id to the decoder; the root is the decoder's start token. Prompts
    of both formats are accepted, but the encoder reads every prompt separately. Prompts are right-padded, since some
    models count positions from the left.

    Raises:
        ValueError: the kind of model is not known to be exact (see `branch_positions`), or the model has no
            `decoder_start_token_id`.
    """

    def __init__(self, model: nn.Module, catalog: ItemCatalog):
        super().__init__(model, catalog)
        place_branches(model)
        self._start = _start_token(innermost(model))

    def _packed(self, prompts: Prompts, branches: Branches) -> tuple[Tensor, Tensor | None]:
        tokens, mask = _right_padded(separate_prompts(prompts))
        root = torch.full((len(tokens), 1), self._start, device=tokens.device)
        start = {"input_ids": root, "attention_mask": torch.ones_like(root)}
        layout = lay_out(self.catalog.tree, Trunks.of(start), branches, aligned=True)
        extra = {"flow_positions": layout.keep} if self._heads else {}
        with only_states(self._head, layout.flat_indices(kept=False)):
            output = self.model(
                input_ids=tokens,
                attention_mask=mask,
                decoder_input_ids=layout.input_ids,
                decoder_attention_mask=additive(layout.visible, model_dtype(self.model)),
                branch_positions=layout.position_ids.amax(0),  # empty columns have position 0
                use_cache=False,
                **extra,
            )
        return layout.at_states(output, kept=False)

    def _decoder(self, prompts: Prompts, flows: bool = False) -> BranchDecoder:
        return Seq2SeqDecoder(self.model, separate_prompts(prompts), self._start, flows)

    def _plain_logits(self, prompt: Tensor, paths: Tensor) -> Tensor:
        start = paths.new_full((len(paths), 1), self._start)
        sequences = torch.cat([start, paths[:, :-1]], 1)
        return self.model(input_ids=prompt.expand(len(paths), -1), decoder_input_ids=sequences, use_cache=False).logits


class Seq2SeqDecoder(BranchDecoder):
    """Branches after the cached root of an encoder-decoder, with one cross-attention cache per prompt."""

    def __init__(self, model: nn.Module, prompts: Prompts, start: int, flows: bool = False):
        self.start = start
        super().__init__(model, EncoderDecoderCache(DynamicCache(), DynamicCache()), prompts, flows)

    def _read(self, prompts: Prompts) -> Tensor:
        tokens, self.mask = _right_padded(prompts)
        root = torch.full((len(tokens), 1), self.start, device=tokens.device)
        first = torch.zeros(1, dtype=torch.long, device=tokens.device)
        output = self._run(first, input_ids=tokens, attention_mask=self.mask, decoder_input_ids=root)
        self.encoded = BaseModelOutput(last_hidden_state=output.encoder_last_hidden_state)
        return output.logits

    def restart(self) -> None:
        super().restart()
        self.positions = torch.zeros(1, dtype=torch.long, device=self.device)

    def _feed(self, tokens: Tensor) -> Tensor:
        width = tokens.shape[1]
        root = self.visible.new_ones(self.batch, width, 1)
        self.positions = torch.cat([self.positions, self.positions.new_full((width,), self.depth + 1)])
        return self._run(
            torch.arange(width, device=tokens.device),
            encoder_outputs=self.encoded,
            attention_mask=self.mask,
            decoder_input_ids=tokens,
            decoder_attention_mask=additive(torch.cat([root, self.visible], 2), self.dtype),
            branch_positions=self.positions,
        ).logits


def _right_padded(prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Move the padding to the right, whatever side it is on, and return tokens and mask `(B, P)`."""
    mask = prompts["attention_mask"]
    order = (mask == 0).to(torch.uint8).argsort(dim=1, stable=True)
    return prompts["input_ids"].gather(1, order), mask.gather(1, order)


def _start_token(model: nn.Module) -> int:
    for config in (model.config, getattr(model, "generation_config", None)):
        start = getattr(config, "decoder_start_token_id", None)
        if start is not None:
            return start
    raise ValueError(
        f"{type(model).__name__} has no decoder_start_token_id; set model.config.decoder_start_token_id (T5 uses the "
        f"padding token)."
    )
