"""A check that the policy is the model's own distribution, made once, on the longest prompts.

Packed scoring relies on models that compute each branch of a row as in a row of its own. A model with another kind of
layer (for example a window under an unknown name, or a layer that counts columns) would be trained and evaluated on a
distribution that differs from the model's own, without any visible sign.
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


COMPARED_LEAVES = 4  # the whole comparison costs about as much as eight prompts
CANDIDATES = 4096


class Encoder(Protocol):
    """Builds prompts from histories, like `gflowtrl.data.PromptEncoder`."""

    def longest_histories(self) -> list[list[Item]]: ...

    def __call__(self, histories: Sequence[Sequence[Item]], /) -> Prompts: ...


#: Differences of a token's log-probability that rounding explains, per dtype. Measured on tiny models of 15 kinds:
#: at most 4e-6 in float32; in 16 bits up to .08, and 2.4 if a mixture of experts chose another expert, with medians of
#: at most .0011. The largest difference of a prompt is therefore tested, and in 16 bits the median.
ROUNDING = {torch.float32: 2e-3, torch.float64: 2e-3, torch.float16: 0.03, torch.bfloat16: 0.1}


@torch.no_grad()
def check_exact(policy: TreePolicy, encoder: Encoder, dtype: torch.dtype | None = None) -> None:
    """Check packed scoring and decoding against the model's plain forward on one full sequence at a time.

    It runs the wrapped model, so every process of a sharded model must call it. All run it the same number of times.

    Args:
        policy: the policy of a model, bare or wrapped.
        encoder: builds the prompts: its longest ones, and one of a single item.
        dtype: the dtype of the computation, if it is not the model's own (autocast).

    Raises:
        ValueError: a difference is larger than rounding explains. The message names the model, the difference and
            likely reasons.
    """
    device = next(policy.model.parameters()).device
    prompts = {name: value.to(device) for name, value in encoder(encoder.longest_histories()).items()}
    leaves = _forking_leaves(policy.catalog.to(device).tree).expand(len(prompts["input_ids"]), -1)
    with evaluation_mode(policy.model):
        plain = plain_log_probs(policy, prompts, leaves)
        check_ranked(torch.zeros_like(plain), plain, policy.model)
        try:
            decoded = decoded_log_probs(policy, prompts, leaves)
            results = {"scoring": policy.score(prompts, leaves).log_probs, "decoding": decoded}
        except (torch.OutOfMemoryError, NonFiniteError, TooLongError):
            raise
        except (RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise ValueError(
                f"{type(innermost(policy.model)).__name__} can read a prompt, but not several branches after it with "
                f"a 4-D attention mask ({type(error).__name__}: {error}). Use another model (Llama, Qwen3, T5)."
            ) from error
    dtype = compute_dtype(policy.model) if dtype is None else dtype
    tolerance = ROUNDING.get(dtype, ROUNDING[torch.bfloat16])
    for method, log_probs in results.items():
        errors = (log_probs - plain).abs()
        differences = errors.amax((1, 2)) if dtype.itemsize >= 4 else _typical(errors, policy.catalog.tree, leaves)
        differences = differences.masked_fill(~errors.isfinite().all(2).all(1), torch.nan)
        if not bool((differences <= tolerance).all()):  # NaN counts as a difference
            raise ValueError(_message(policy.model, method, differences, prompts["attention_mask"].sum(1), tolerance))


def _forking_leaves(tree: PrefixTree) -> Tensor:
    """Return leaves `(K,)`, spread over the tree, whose paths have the most choices.

    In a sparse tree most first tokens determine the whole id. Such a leaf would not test the tokens of a branch.
    """
    device = tree.parent.device
    candidates = torch.linspace(0, tree.num_leaves - 1, min(CANDIDATES, tree.num_leaves), device=device).long()
    choices = _is_choice(tree, tree.walk(candidates)).sum(1)
    count = min(COMPARED_LEAVES, tree.num_leaves)
    best = (choices >= choices.topk(count).values[-1]).nonzero().flatten()
    return candidates[best[torch.linspace(0, len(best) - 1, count, device=device).long()]]


def _is_choice(tree: PrefixTree, nodes: Tensor) -> Tensor:
    """Return which nodes of the paths `nodes (.., L + 1)` have more than one child: `bool (.., L)`."""
    states = nodes[..., :-1]
    return (tree.num_children[states.clamp(min=0)] > 1) & (states >= 0)


def _typical(differences: Tensor, tree: PrefixTree, leaves: Tensor) -> Tensor:
    """Return the median difference of each prompt over the informative tokens, `(B, K, L) -> (B,)`.

    These are the tokens of a choice that are neither the first of an id nor in the first branch, since those are right
    however the model computes a packed row. Without such tokens the median is over all tokens.
    """
    informative = _is_choice(tree, tree.walk(leaves))
    informative[:, 0], informative[:, :, 0] = False, False
    rows = zip(differences, informative, strict=True)
    return torch.stack([(row[mask] if mask.any() else row).flatten().median() for row, mask in rows])


def compute_dtype(model: nn.Module) -> torch.dtype:
    """Return the model's dtype. If products are less precise (quantized weights, TF32), a dtype of that precision."""
    dtype = model_dtype(model)
    if getattr(innermost(model), "hf_quantizer", None) is not None:
        return torch.bfloat16
    tf32 = torch.cuda.is_available() and torch.get_float32_matmul_precision() != "highest"
    return torch.float16 if tf32 and dtype == torch.float32 else dtype


def plain_log_probs(policy: TreePolicy, prompts: Prompts, leaves: Tensor) -> Tensor:
    """Compute log pi of each token of `leaves (B, K)` with the model's plain forward: `(B, K, L)`."""
    tree = policy.catalog.tree
    nodes = tree.walk(leaves)
    paths = tree.tokens_of(nodes[:, :, 1:])
    mask = prompts["attention_mask"].bool()
    logits = [policy._plain_logits(prompts["input_ids"][b][mask[b]], paths[b]).float() for b in range(len(paths))]
    return _along(policy, torch.stack(logits).unbind(2), nodes)


def decoded_log_probs(policy: TreePolicy, prompts: Prompts, leaves: Tensor) -> Tensor:
    """Compute log pi of each token of `leaves (B, K)` with a decoder, token by token: `(B, K, L)`."""
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
    """Return the log-probabilities of the tokens of paths `nodes (B, K, L + 1)`, from logits `(B, K, V)` per depth."""
    taken_log_probs = []
    for depth, at_depth in enumerate(logits):
        children, log_probs = policy._distribution(at_depth, nodes[:, :, depth], depth)
        taken = (children == nodes[:, :, depth + 1, None]) & (children >= 0)
        taken_log_probs.append(torch.where(taken, log_probs, 0.0).sum(-1))
    return torch.stack(taken_log_probs, 2)


def _message(model: nn.Module, method: str, differences: Tensor, lengths: Tensor, tolerance: float) -> str:
    name, worst = type(innermost(model)).__name__, int(differences.nan_to_num(torch.inf).argmax())
    if not bool(differences.isfinite().all()):
        return (
            f"{name} computes log-probabilities that are not finite: its weights are damaged, or its dtype is too "
            f"narrow. Use an earlier checkpoint or a wider dtype."
        )
    if bool((differences[lengths == lengths.min()] <= tolerance).all()):
        reason = "Short prompts agree: a layer sees only part of a long prompt (a window) or counts a row's columns"
    else:
        reason = "Short prompts differ too: a layer does not follow the mask exactly, or sees later tokens"
    return (
        f"{name} is not exact as a policy: {method} on the tree and the model's own forward differ by "
        f"{float(differences[worst]):.2g} in a token's log-probability, on a prompt of {int(lengths[worst])} tokens "
        f"(rounding explains {tolerance:g}). {reason}. Use another model, or shorter histories if short prompts agree."
    )
