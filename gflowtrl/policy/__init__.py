"""Language models as policies on the prefix tree: scoring, sampling, beam search, exact leaf distribution."""

from torch import nn

from gflowtrl.catalog import ItemCatalog
from gflowtrl.checks import check_type
from gflowtrl.compat import whole_models
from gflowtrl.trunks import Prompts, num_prompts, separate_prompts, some_prompts

from .backbone import load_backbone, merge_tied_embeddings
from .causal import CausalTreePolicy
from .exactness import check_exact
from .heads import attach_flow_heads, has_flow_heads
from .modules import innermost
from .noise import Noise, StatelessNoise, inverse_cdf
from .scores import StepScores
from .seq2seq import Seq2SeqTreePolicy
from .stochastic_beam import StochasticBeams
from .support import check_causal, check_positions
from .tree_policy import TreePolicy


__all__ = [
    "CausalTreePolicy",
    "Noise",
    "Prompts",
    "Seq2SeqTreePolicy",
    "StatelessNoise",
    "StepScores",
    "StochasticBeams",
    "TreePolicy",
    "attach_flow_heads",
    "check_causal",
    "check_exact",
    "check_positions",
    "has_flow_heads",
    "inverse_cdf",
    "load_backbone",
    "make_policy",
    "merge_tied_embeddings",
    "num_prompts",
    "separate_prompts",
    "some_prompts",
    "whole_models",
]


def make_policy(model: nn.Module, catalog: ItemCatalog) -> TreePolicy:
    """Create the policy for a kind of model: `Seq2SeqTreePolicy` for an encoder-decoder, else `CausalTreePolicy`.

    Args:
        model: bare or wrapped (PEFT, DDP, DeepSpeed, FSDP).
        catalog: the items.
    """
    check_type("catalog", catalog, ItemCatalog, "an ItemCatalog")
    check_type("model", model, nn.Module, "a language model of transformers")
    encoder_decoder = getattr(innermost(model).config, "is_encoder_decoder", False)
    return (Seq2SeqTreePolicy if encoder_decoder else CausalTreePolicy)(model, catalog)
