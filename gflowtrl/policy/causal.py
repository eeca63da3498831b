"""A causal language model read as a policy on the prefix tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gflowtrl.catalog import ItemCatalog

from .heads import has_flow_heads
from .noise import Noise
from .packing import (
    BranchDecoder,
    accepts_logits_to_keep,
    additive,
    group_visibility,
    model_dtype,
    prompt_positions,
)
from .scores import StepScores


Prompts = Mapping[str, Tensor]


class CausalTreePolicy:
    """The distribution over leaves that a causal model gives when its logits are renormalised over a node's children.

    At a node s the probability of token t is the softmax of the model's logits over the children of s only, so leaf
    probabilities sum to one, and training and decoding see the same distribution.

    Args:
        model: a causal language model, bare or wrapped (PEFT, DDP, DeepSpeed, FSDP); it is only ever called with
            ordinary keyword arguments.
        catalog: the items. It is moved to the prompts' device when needed.

    Prompts are a left-padded batch `{"input_ids": (B, P), "attention_mask": (B, P)}`.
    """

    def __init__(self, model: nn.Module, catalog: ItemCatalog):
        implementation = getattr(getattr(model, "config", None), "_attn_implementation", None) or ""
        if "flash" in implementation:
            raise ValueError(
                f"The model uses {implementation!r} attention, which takes no 4-D mask. Load it with "
                f"attn_implementation='sdpa' (or 'eager')."
            )
        self.model = model
        self.catalog = catalog
        self._keep = accepts_logits_to_keep(model)
        self._heads = has_flow_heads(model)

    # ------------------------------------------------------------------------------------------------------ scoring
    def score(self, prompts: Prompts, leaves: Tensor) -> StepScores:
        """Score K leaves a prompt in one packed forward, differentiably.

        Args:
            prompts: the batch.
            leaves: `(B, K)` leaves.

        Returns:
            `StepScores`; equal to scoring every full sequence by itself.
        """
        tree = self._tree(prompts)
        logits, log_z = self._packed_logits(prompts, tree.paths[leaves].long())
        nodes = tree.walk(leaves)
        batch, count, depth = leaves.shape[0], leaves.shape[1], tree.max_depth
        width = max(tree.max_children)
        log_probs, child_log_probs, child_nodes = [], [], []
        branches = logits[:, 1:].view(batch, count, depth - 1, -1)
        for d in range(depth):
            # All trajectories of a prompt share the root: computed once, expanded as a view.
            at_root = d == 0
            state = nodes[:, :1, 0] if at_root else nodes[:, :, d]
            level_logits = logits[:, :1] if at_root else branches[:, :, d - 1]
            children, distribution = self._distribution(level_logits, state, d)
            if at_root:
                children, distribution = children.expand(-1, count, -1), distribution.expand(-1, count, -1)
            taken = children == nodes[:, :, d + 1 : d + 2]
            taken &= children >= 0
            log_probs.append(torch.where(taken, distribution, 0.0).sum(-1))
            padding = (0, width - children.shape[-1])
            child_nodes.append(nn.functional.pad(children, padding, value=-1))
            child_log_probs.append(nn.functional.pad(distribution, padding, value=-torch.inf))
        return StepScores(
            log_probs=torch.stack(log_probs, 2),
            child_log_probs=torch.stack(child_log_probs, 2),
            child_nodes=torch.stack(child_nodes, 2),
            lengths=tree.leaf_lengths[leaves],
            log_z=log_z,
        )

    def _packed_logits(self, prompts: Prompts, paths: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits `(B, 1 + K (L - 1), V)`: behind the prompt, then behind each branch token; and log Z."""
        batch, count, depth = paths.shape
        mask = prompts["attention_mask"]
        prompt_length = mask.shape[1]
        # The last token of an id predicts nothing, so it is not fed. Ended ids are filled with any token.
        branch_tokens = paths[:, :, : depth - 1].clamp(min=0).reshape(batch, -1)
        steps = torch.arange(depth - 1, device=mask.device).repeat(count)
        positions = torch.cat([prompt_positions(mask), mask.sum(1, keepdim=True) + steps], 1)
        keep = torch.arange(prompt_length - 1, prompt_length + count * (depth - 1), device=mask.device)
        extra = {"logits_to_keep": keep} if self._keep else {}
        if self._heads:
            extra["flow_positions"] = keep[:1]
        output = self.model(
            input_ids=torch.cat([prompts["input_ids"], branch_tokens], 1),
            attention_mask=additive(group_visibility(mask, count, depth - 1), model_dtype(self.model)),
            position_ids=positions,
            use_cache=False,
            **extra,
        )
        logits = output.logits if self._keep else output.logits[:, keep]
        return logits.float(), getattr(output, "log_z", None)

    def _distribution(self, logits: Tensor, nodes: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """Children `(.., C)` of `nodes` `(..)` and their log-probabilities, -inf on padding."""
        tokens, children = self.catalog.tree.children(nodes, depth)
        present = children >= 0
        # A finite fill keeps states without children (ended ids) free of NaN, in value and in gradient.
        chosen = logits.gather(-1, tokens.clamp(min=0)).masked_fill(~present, torch.finfo(logits.dtype).min)
        return children, chosen.log_softmax(-1).masked_fill(~present, -torch.inf)

    # ----------------------------------------------------------------------------------------------------- decoding
    @torch.no_grad()
    def sample(
        self, prompts: Prompts, num_generations: int, noise: Noise, temperature: float = 1.0, epsilon: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Draw leaves, with replacement.

        Args:
            num_generations: K, trajectories a prompt.
            noise: `StatelessNoise(seed).at(step, row_ids)`.
            temperature: divides the logits; above 1 explores more.
            epsilon: probability, at each step, of a uniform child instead.

        Returns:
            leaves `(B, K)` and `log_q` `(B, K)`, their log-probability under the distribution that drew them
            (tempered, mixed), not under the policy.
        """
        if temperature <= 0 or not 0 <= epsilon <= 1:
            raise ValueError(f"temperature must be > 0 and epsilon in [0, 1], got {temperature} and {epsilon}.")
        tree = self._tree(prompts)
        batch = len(prompts["input_ids"])
        device = prompts["input_ids"].device
        nodes = torch.zeros(batch, num_generations, dtype=torch.long, device=device)
        log_q = torch.zeros(batch, num_generations, device=device)
        same = torch.arange(num_generations, device=device).expand(batch, -1)
        with self._decoding(prompts) as decoder:
            logits = decoder.root_logits
            for depth in range(tree.max_depth):
                if depth:
                    parents = torch.zeros_like(same) if depth == 1 else same
                    logits = decoder.extend(tree.node_token[nodes].long(), parents)
                # All trajectories share the root, whose distribution is computed once.
                states = nodes if depth else nodes[:, :1]
                children, log_probs = self._distribution(logits / temperature, states, depth)
                children = children.expand(-1, num_generations, -1)
                log_probs = log_probs.expand(-1, num_generations, -1)
                present = children >= 0
                ended = ~present.any(-1)
                probs = log_probs.exp().double()
                if epsilon:
                    uniform = present / present.sum(-1, keepdim=True).clamp(min=1)
                    probs = (1 - epsilon) * probs + epsilon * uniform
                choice = _inverse_cdf(probs, noise.uniform("policy", num_generations, depth))
                chosen = probs.gather(-1, choice).squeeze(-1)
                log_q += torch.where(ended, 0.0, chosen.log()).float()
                nodes = torch.where(ended, nodes, children.gather(-1, choice).squeeze(-1))
        return tree.leaf_at(nodes), log_q

    @torch.no_grad()
    def beam_search(self, prompts: Prompts, num_beams: int) -> tuple[Tensor, Tensor]:
        """The most probable leaves by beam search on the tree.

        Returns:
            leaves `(B, num_beams)`, best first, and their tree-normalised log-probabilities. Where the catalogue has
            fewer leaves than beams, the rest is leaf -1 with -inf.
        """
        tree = self._tree(prompts)
        batch = len(prompts["input_ids"])
        device = prompts["input_ids"].device
        nodes = torch.zeros(batch, 1, dtype=torch.long, device=device)
        totals = torch.zeros(batch, 1, device=device)
        with self._decoding(prompts) as decoder:
            logits, parents = decoder.root_logits, torch.zeros_like(nodes)
            for depth in range(tree.max_depth):
                if depth:
                    tokens = tree.node_token[nodes.clamp(min=0)].long().clamp(min=0)
                    logits = decoder.extend(tokens, parents)
                children, log_probs = self._distribution(logits, nodes, depth)
                ended = tree.leaf_at(nodes) >= 0  # a finished id stays as it is
                children[..., 0] = torch.where(ended, nodes, children[..., 0])
                log_probs[..., 0] = torch.where(ended, 0.0, log_probs[..., 0])
                candidates = (totals[..., None] + log_probs).flatten(1)
                totals, place = candidates.topk(min(num_beams, candidates.shape[1]), dim=1)
                parents = place // children.shape[-1]
                nodes = children.flatten(1).gather(1, place)
                nodes = torch.where(totals > -torch.inf, nodes, -1)
        missing = (0, num_beams - nodes.shape[1])
        leaves = nn.functional.pad(tree.leaf_at(nodes), missing, value=-1)
        return leaves, nn.functional.pad(totals, missing, value=-torch.inf)

    @torch.no_grad()
    def leaf_log_probs(self, prompts: Prompts, chunk_size: int = 256) -> Tensor:
        """The exact distribution over all leaves: `(B, N)`. For small catalogues and for tests.

        Args:
            chunk_size: number of leaves whose branches are computed together.
        """
        tree = self._tree(prompts)
        batch = len(prompts["input_ids"])
        device = prompts["input_ids"].device
        totals = torch.zeros(batch, tree.num_nodes, device=device)
        with self._decoding(prompts) as decoder:
            for start in range(0, tree.num_leaves, chunk_size):
                decoder.restart()
                paths = tree.path_nodes[start : start + chunk_size].long()
                logits, previous = decoder.root_logits, torch.zeros(1, dtype=torch.long, device=device)
                for depth in range(tree.max_depth):
                    if depth:
                        nodes = paths[:, depth].unique()
                        nodes = nodes[nodes >= 0]
                        parents = torch.searchsorted(previous, tree.parent[nodes].long())
                        tokens = tree.node_token[nodes].long()
                        logits = decoder.extend(tokens.expand(batch, -1), parents.expand(batch, -1))
                        previous = nodes
                    children, log_probs = self._distribution(logits, previous.expand(batch, -1), depth)
                    present = children[0] >= 0
                    totals[:, children[0][present]] = (totals[:, previous, None] + log_probs)[:, present]
        return totals[:, tree.leaf_nodes()]

    # ------------------------------------------------------------------------------------------------------- helpers
    def _tree(self, prompts: Prompts):
        device = prompts["input_ids"].device
        if self.catalog.device != device:
            self.catalog.to(device)
        return self.catalog.tree

    @contextmanager
    def _decoding(self, prompts: Prompts) -> Iterator[BranchDecoder]:
        """A decoder with dropout off; the model's mode is restored afterwards."""
        training = self.model.training
        if training:
            self.model.eval()
        try:
            yield BranchDecoder(self.model, prompts, self._keep)
        finally:
            if training:
                self.model.train()


def _inverse_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """Index `(.., 1)` drawn from `probs` `(.., C)` by one uniform number each; never one of probability 0."""
    cumulative = probs.cumsum(-1)
    choice = (cumulative <= uniform[..., None] * cumulative[..., -1:]).sum(-1, keepdim=True)
    last = ((probs > 0) * torch.arange(probs.shape[-1], device=probs.device)).amax(-1, keepdim=True)
    return torch.minimum(choice, last)
