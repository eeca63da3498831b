"""Is the policy the model's own distribution? Compared once, on the longest prompts, before anything is trusted.

Everything here stands on models that compute a packed row as if each branch stood alone. A model with a layer that
does something else (a window under a name of its own, say, or a count of columns) would be trained and evaluated on a
distribution that nobody else gets from it, and nothing would show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from gflowtrl.catalog import Item, PrefixTree
from gflowtrl.finite import NonFiniteError, check_ranked
from gflowtrl.trunks import Prompts

from .modules import evaluation_mode, innermost, model_dtype
from .support import TooLongError
from .tree_policy import TreePolicy


COMPARED_LEAVES = 4  # so that all costs about as much as eight prompts
CANDIDATES = 4096


class Encoder(Protocol):
    """What makes prompts of histories, as `gflowtrl.data.PromptEncoder` does."""

    def longest_histories(self) -> list[list[Item]]: ...

    def __call__(self, histories: Sequence[Sequence[Item]], /) -> Prompts: ...


#: Differences of a token's log-probability that rounding explains, per dtype. Measured on tiny models of 15 kinds:
#: at most 4e-6 in float32; in 16 bits up to .08, and 2.4 where a mixture of experts chose another expert, with medians
#: of at most .0011. So it is the largest difference of a prompt that counts, and in 16 bits the median one.
ROUNDING = {torch.float32: 2e-3, torch.float64: 2e-3, torch.float16: 0.03, torch.bfloat16: 0.1}


@torch.no_grad()
def check_exact(policy: TreePolicy, encoder: Encoder, dtype: torch.dtype | None = None) -> None:
    """Compare packed scoring and decoding with the model's plain forward on one full sequence at a time.

    All processes of a sharded model must call this: it runs the wrapped model, the same number of times in each.

    Args:
        policy: of a model, bare or wrapped.
        encoder: its longest prompts are compared, and one of a single item.
        dtype: what the model computes in where that is not its own dtype (autocast).

    Raises:
        ValueError: a difference above the rounding; the message names the model, the difference and likely reasons.
    """
    device = next(policy.model.parameters()).device
    prompts = {name: value.to(device) for name, value in encoder(encoder.longest_histories()).items()}
    leaves = _forking_leaves(policy.catalog.to(device).tree).expand(len(prompts["input_ids"]), -1)
    with evaluation_mode(policy.model):
        plain = plain_log_probs(policy, prompts, leaves)
        check_ranked(torch.zeros_like(plain), plain, policy.model)
        try:
            decoded = decoded_log_probs(policy, prompts, leaves)
            found = {"scoring": policy.score(prompts, leaves).log_probs, "decoding": decoded}
        except (torch.OutOfMemoryError, NonFiniteError, TooLongError):
            raise
        except (RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise ValueError(
                f"{type(innermost(policy.model)).__name__} reads a prompt, but not several branches behind one by a "
                f"4-D attention mask ({type(error).__name__}: {error}). Use another kind of model (Llama, Qwen3, T5)."
            ) from error
    dtype = computed_in(policy.model) if dtype is None else dtype
    allowed = ROUNDING.get(dtype, ROUNDING[torch.bfloat16])
    for way, log_probs in found.items():
        every = (log_probs - plain).abs()
        differences = every.amax((1, 2)) if dtype.itemsize >= 4 else _typical(every, policy.catalog.tree, leaves)
        differences = differences.masked_fill(~every.isfinite().all(2).all(1), torch.nan)
        if not bool((differences <= allowed).all()):  # so that NaN is a difference
            raise ValueError(_message(policy.model, way, differences, prompts["attention_mask"].sum(1), allowed))


def _forking_leaves(tree: PrefixTree) -> Tensor:
    """Some leaves on whose ways most choices are left, from all over the tree: `(K,)`.

    In a sparse tree most first tokens settle the whole id; such a leaf would say nothing of what follows a branch.
    """
    device = tree.parent.device
    some = torch.linspace(0, tree.num_leaves - 1, min(CANDIDATES, tree.num_leaves), device=device).long()
    choices = _is_choice(tree, tree.walk(some)).sum(1)
    count = min(COMPARED_LEAVES, tree.num_leaves)
    best = (choices >= choices.topk(count).values[-1]).nonzero().flatten()
    return some[best[torch.linspace(0, len(best) - 1, count, device=device).long()]]


def _is_choice(tree: PrefixTree, nodes: Tensor) -> Tensor:
    """Where on the way `nodes (.., L + 1)` there is more than one token to choose from: `bool (.., L)`."""
    states = nodes[..., :-1]
    return (tree.num_children[states.clamp(min=0)] > 1) & (states >= 0)


def _typical(differences: Tensor, tree: PrefixTree, leaves: Tensor) -> Tensor:
    """The median difference of each prompt, `(B, K, L) -> (B,)`, of the tokens that tell whether branches are computed
    as if they stood alone: those of a choice, but neither the first of an id nor the first branch, which are right
    whatever the model makes of a packed row. Where there is none, of all tokens."""
    telling = _is_choice(tree, tree.walk(leaves))
    telling[:, 0], telling[:, :, 0] = False, False
    rows = zip(differences, telling, strict=True)
    return torch.stack([(row[told] if told.any() else row).flatten().median() for row, told in rows])


def computed_in(model: nn.Module) -> torch.dtype:
    """The model's dtype; where products are coarser (quantized weights, TF32), one of like precision."""
    dtype = model_dtype(model)
    if getattr(innermost(model), "hf_quantizer", None) is not None:
        return torch.bfloat16
    tf32 = torch.cuda.is_available() and torch.get_float32_matmul_precision() != "highest"
    return torch.float16 if tf32 and dtype == torch.float32 else dtype


def plain_log_probs(policy: TreePolicy, prompts: Prompts, leaves: Tensor) -> Tensor:
    """log pi of each token of `leaves (B, K)` by the model's plain forward: `(B, K, L)`."""
    tree = policy.catalog.tree
    nodes = tree.walk(leaves)
    paths = tree.tokens_of(nodes[:, :, 1:])
    real = prompts["attention_mask"].bool()
    logits = [policy._plain_logits(prompts["input_ids"][b][real[b]], paths[b]).float() for b in range(len(paths))]
    return _along(policy, torch.stack(logits).unbind(2), nodes)


def decoded_log_probs(policy: TreePolicy, prompts: Prompts, leaves: Tensor) -> Tensor:
    """log pi of each token of `leaves (B, K)` by a decoder that follows them token by token: `(B, K, L)`."""
    tree, (batch, count) = policy.catalog.tree, leaves.shape
    nodes = tree.walk(leaves)
    branch = torch.arange(count, device=leaves.device).expand(batch, -1)
    with policy._decoding(prompts) as decoder:
        logits = [decoder.root_logits.expand(-1, count, -1)]
        for depth in range(1, tree.max_depth):
            parents = torch.zeros_like(branch) if depth == 1 else branch
            logits.append(decoder.extend(tree.tokens_of(nodes[:, :, depth]), parents))
        return _along(policy, logits, nodes)


def _along(policy: TreePolicy, logits: Sequence[Tensor], nodes: Tensor) -> Tensor:
    """Log-probabilities of the tokens on the way `nodes (B, K, L + 1)`, from logits `(B, K, V)` of each depth."""
    found = []
    for depth, at_depth in enumerate(logits):
        children, log_probs = policy._distribution(at_depth, nodes[:, :, depth], depth)
        taken = (children == nodes[:, :, depth + 1, None]) & (children >= 0)
        found.append(torch.where(taken, log_probs, 0.0).sum(-1))
    return torch.stack(found, 2)


def _message(model: nn.Module, way: str, differences: Tensor, lengths: Tensor, allowed: float) -> str:
    name, worst = type(innermost(model)).__name__, int(differences.nan_to_num(torch.inf).argmax())
    if not bool(differences.isfinite().all()):
        return (
            f"{name} gives log-probabilities that are not finite; its weights are damaged, or its dtype is too narrow."
        )
    if bool((differences[lengths == lengths.min()] <= allowed).all()):
        reason = "Short prompts agree: a layer sees a part of a long prompt only (a window) or counts a row's columns"
    else:
        reason = "Short prompts differ too: a layer does not see just what the mask says, or sees later tokens"
    return (
        f"{name} cannot be read exactly as a policy: {way} on the tree and the model's own forward differ by "
        f"{float(differences[worst]):.2g} in a token's log-probability, on a prompt of {int(lengths[worst])} tokens "
        f"(rounding explains {allowed:g}). {reason}. Use another model, or shorter histories where those agree."
    )
