"""An encoder-decoder read as a policy on the prefix tree.

The encoder reads the prompt once. All branches of a prompt stand in *one* decoder row `[start, branches]` under a 4-D
additive mask, so the cross-attention's keys and values are computed once per prompt as well: there is one encoder row
for one decoder row. The self-attention bias (T5) or position vectors (BART) that these models take from a token's
place in the row are looked up at its place in the branch instead: see `branch_positions`, which does so inside the
model's forward.

Two other ways are exact too and were not taken. Rows of single branches behind one expanded cross-attention cache
need a cache that carries gradients, which gradient checkpointing switches off, and two forwards before one backward.
Correcting the bias through the mask uses a parameter outside the model's forward, which sharded engines do not allow.
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
from .tree_policy import TreePolicy


class Seq2SeqTreePolicy(TreePolicy):
    """The distribution over leaves that an encoder-decoder gives when its logits are renormalized over the children.

    The prompt goes to the encoder, the id to the decoder; the root is the decoder's start token. Prompts come in
    both formats, but an encoder shares nothing; models that count positions from the left get them right-padded.

    Raises:
        ValueError: a kind of model that is not known to be exact (see `branch_positions`), or one without
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
        with self._chosen_states(layout.flat_indices(kept=False)):
            output = self.model(
                input_ids=tokens,
                attention_mask=mask,
                decoder_input_ids=layout.input_ids,
                decoder_attention_mask=additive(layout.visible, model_dtype(self.model)),
                branch_positions=layout.position_ids.amax(0),  # empty places are at 0
                use_cache=False,
                **extra,
            )
        logits = output.logits if output.logits.dim() == 2 else layout.states(output.logits, kept=False)
        flows = getattr(output, "log_flows", None)
        return logits.float(), None if flows is None else layout.states(flows, kept=True)

    def _decoder(self, prompts: Prompts) -> BranchDecoder:
        return Seq2SeqDecoder(self.model, separate_prompts(prompts), self._start)

    def _plain_logits(self, prompt: Tensor, paths: Tensor) -> Tensor:
        start = paths.new_full((len(paths), 1), self._start)
        sequences = torch.cat([start, paths[:, :-1]], 1)
        return self.model(input_ids=prompt.expand(len(paths), -1), decoder_input_ids=sequences, use_cache=False).logits


class Seq2SeqDecoder(BranchDecoder):
    """Branches behind the cached root of an encoder-decoder, whose cross-attention is cached per prompt."""

    def __init__(self, model: nn.Module, prompts: Prompts, start: int):
        self.start = start
        super().__init__(model, EncoderDecoderCache(DynamicCache(), DynamicCache()), prompts)

    def _read(self, prompts: Prompts) -> Tensor:
        tokens, self.mask = _right_padded(prompts)
        root = torch.full((len(tokens), 1), self.start, device=tokens.device)
        output = self._run(input_ids=tokens, attention_mask=self.mask, decoder_input_ids=root)
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
            encoder_outputs=self.encoded,
            attention_mask=self.mask,
            decoder_input_ids=tokens,
            decoder_attention_mask=additive(torch.cat([root, self.visible], 2), self.dtype),
            branch_positions=self.positions,
        ).logits


def _right_padded(prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Tokens and mask `(B, P)` with the padding at the right, whatever side it was on."""
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
