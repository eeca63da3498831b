"""The base class of policies: scores from logits, sampling, beam search, the exact leaf distribution.

A subclass for a kind of model provides the logits of a group in one forward (`_packed`), a decoder that extends
branches of a cached prompt (`_decoder`), and the model's plain forward for comparison (`_plain_logits`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gflowtrl.catalog import ItemCatalog, PrefixTree
from gflowtrl.catalog.tree import in_rows
from gflowtrl.checks import COUNT, POSITIVE, SHARE, check_number
from gflowtrl.compat import attention_implementation
from gflowtrl.trunks import Prompts, num_prompts

from .branches import Branches, dense_rank, merge_branches, scatter_rows
from .heads import has_flow_heads
from .modules import evaluation_mode, innermost
from .noise import Noise, inverse_cdf
from .packing import BranchDecoder
from .restricted_head import num_rows, only_rows, selectable_head
from .scores import StepScores
from .stochastic_beam import StochasticBeams, conditional_gumbels, log_inclusion
from .support import check_positions
from .temperature import temperature_of


class TreePolicy(ABC):
    """The distribution over leaves of a language model, with its logits renormalized over the children of a node.

    At a node s the probability of token t is the softmax of the model's logits over the children of s only, so leaf
    probabilities sum to one, and training and decoding see the same distribution.

    Args:
        model: a language model, bare or wrapped (PEFT, DDP, DeepSpeed, FSDP). It is called only with ordinary keyword
            arguments. `policy_temperature` in its configuration (default 1) divides the logits in all methods.
        catalog: the items. It is moved to the prompts' device when needed.

    Prompts are a left-padded batch `{"input_ids": (B, P), "attention_mask": (B, P)}`, or windows that several prompts
    share, `{"input_ids": (U, T), "attention_mask": (U, T), "trunk": (B,), "cut": (B,)}`: each prompt sees the first
    `cut` tokens of its trunk. Every method takes both formats, with equal results.

    Raises:
        ValueError: the model uses FlashAttention, which does not support 4-D masks.
    """

    def __init__(self, model: nn.Module, catalog: ItemCatalog):
        implementation = attention_implementation(getattr(innermost(model), "config", None))
        if "flash" in implementation:
            raise ValueError(
                f"The model uses {implementation!r} attention, which does not support 4-D masks. Load it with "
                f"attn_implementation='sdpa' (or 'eager')."
            )
        self.model = model
        self.catalog = catalog
        self.temperature = temperature_of(model)
        self._shared: tuple[Prompts, BranchDecoder] | None = None
        self._heads = has_flow_heads(model)
        self._output = self._head = selectable_head(model)
        if self._output is not None and 2 * len(catalog.tree.tokens) > num_rows(self._output):
            self._output = None  # most rows are needed anyway

    @abstractmethod
    def _packed(self, prompts: Prompts, branches: Branches) -> tuple[Tensor, Tensor | None]:
        """Run one forward for the n states of a group.

        Returns:
            Logits `(n, V)` in float32, or of the catalog's tokens only (`only_rows`), and log F `(n,)`, None if the
            model has no flow heads.
        """

    @abstractmethod
    def _decoder(self, prompts: Prompts, flows: bool = False) -> BranchDecoder:
        """Return a decoder with cached prompts, which also reads the flow head if `flows` is set."""

    @abstractmethod
    def _plain_logits(self, prompt: Tensor, paths: Tensor) -> Tensor:
        """Run the model's own forward with one full sequence per row, without padding, mask or cache.

        Args:
            prompt: `(P,)` tokens.
            paths: `(K, L)` semantic ids that follow it.

        Returns:
            Logits `(K, L, V)` that predict each token of the ids.
        """

    # ------------------------------------------------------------------------------------------------------ scoring
    def score(self, prompts: Prompts, leaves: Tensor, vocabulary: bool = False) -> StepScores:
        """Score K leaves per prompt in one packed forward, differentiably.

        Args:
            prompts: the batch.
            leaves: `(B, K)` leaves.
            vocabulary: also return the tokens' log-probabilities over the whole vocabulary, including those of states
                without a choice.

        Returns:
            `StepScores`, equal to scoring every full sequence separately.
        """
        tree = self._tree(prompts)
        nodes = tree.walk(leaves)
        # log F is needed at every state, a distribution only where there is a choice.
        states = nodes[:, :, :-1]
        needed = states if self._heads or vocabulary else states.masked_fill(tree.is_determined(states), -1)
        branches = merge_branches(tree, needed)
        with only_rows(None if vocabulary else self._output, tree.tokens):
            logits, flows = self._packed(prompts, branches)
        width = max(tree.max_children)
        log_probs, child_log_probs, child_nodes = [], [], []
        for d in range(tree.max_depth):
            children, distribution = self._at_trajectories(logits, branches, nodes[:, :, d + 1], d)
            taken = children == nodes[:, :, d + 1 : d + 2]
            taken &= children >= 0
            log_probs.append(torch.where(taken, distribution, 0.0).sum(-1))
            padding = (0, width - children.shape[-1])
            child_nodes.append(nn.functional.pad(children, padding, value=-1))
            child_log_probs.append(nn.functional.pad(distribution, padding, value=-torch.inf))
        lengths, over_vocabulary = tree.leaf_lengths[leaves], None
        if vocabulary:
            tempered = logits if self.temperature == 1 else logits / self.temperature
            # log_softmax is one pass, forward and backward; logits - logsumexp would be several.
            taken = tempered.log_softmax(-1)[branches.slots.clamp(min=0), tree.tokens_of(nodes[:, :, 1:])]
            over_vocabulary = torch.where(nodes[:, :, 1:] >= 0, taken, 0.0)
        return StepScores(
            log_probs=torch.stack(log_probs, 2),
            child_log_probs=torch.stack(child_log_probs, 2),
            child_nodes=torch.stack(child_nodes, 2),
            lengths=lengths,
            log_z=None if flows is None else flows[: len(leaves)],  # the roots come first
            log_flows=None if flows is None else _flows_of_states(flows, branches, lengths),
            vocabulary_log_probs=over_vocabulary,
        )

    def _at_trajectories(
        self, logits: Tensor, branches: Branches, following: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        """Return the children and their log-probabilities `(B, K, C)` at one depth, from the logits of its states.

        `following` `(B, K)` are the trajectories' next nodes: the only children of states that were not computed.
        """
        level = slice(branches.begin[depth], branches.begin[depth + 1])
        slots = branches.slots[:, :, depth, None]
        certain = torch.where(following >= 0, 0.0, -torch.inf)[..., None]
        if level.start == level.stop:
            return following[..., None], certain
        # States that trajectories of a prompt share, such as the root, are computed once.
        children, distribution = self._distribution(logits[level], branches.nodes[level], depth)
        index = (slots[..., 0] - level.start).clamp(min=0)
        children, distribution = children[index], distribution[index]
        rest = (0, children.shape[-1] - 1)
        children = torch.where(slots >= 0, children, nn.functional.pad(following[..., None], rest, value=-1))
        certain = nn.functional.pad(certain, rest, value=-torch.inf)
        return children, torch.where(slots >= 0, distribution, certain)

    def _distribution(self, logits: Tensor, nodes: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """Return the children `(.., C)` of `nodes` `(..)` and their log-probabilities, -inf on padding."""
        tokens, children = self.catalog.tree.children(nodes, depth)
        present = children >= 0
        if logits.shape[-1] == len(self.catalog.tree.tokens):  # logits of the catalog's tokens only
            tokens = self.catalog.tree.compact_token_ids(tokens)
        selected = logits.gather(-1, tokens.clamp(min=0)) / self.temperature
        # With a finite fill, states without children (ended ids) give no NaN, in value and in gradient.
        selected = selected.masked_fill(~present, torch.finfo(logits.dtype).min)
        return children, selected.log_softmax(-1).masked_fill(~present, -torch.inf)

    # ----------------------------------------------------------------------------------------------------- decoding
    @torch.no_grad()
    def sample(
        self, prompts: Prompts, num_generations: int, noise: Noise, temperature: float = 1.0, epsilon: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Sample leaves with replacement.

        Args:
            prompts: the batch.
            num_generations: K, trajectories per prompt.
            noise: `StatelessNoise(seed).at(step, row_ids)`.
            temperature: divides the logits in addition to the policy's temperature; above 1 explores more.
            epsilon: probability of a uniformly random child at each step.

        Returns:
            Leaves `(B, K)` and `log_q` `(B, K)`, their log-probability under the sampling distribution (with
            `temperature` and `epsilon`), not under the policy.
        """
        check_number("temperature", temperature, POSITIVE)
        check_number("epsilon", epsilon, SHARE)
        tree = self._tree(prompts)
        batch = num_prompts(prompts)
        device = prompts["input_ids"].device
        nodes = torch.zeros(batch, num_generations, dtype=torch.long, device=device)
        log_q = torch.zeros(batch, num_generations, device=device)
        parents = torch.zeros_like(nodes)
        with self._decoding(prompts) as decoder:
            logits = decoder.root_logits
            for depth in range(tree.max_depth):
                if not tree.num_branching[depth]:
                    break  # no choices are left, in any process
                determined = tree.is_determined(nodes)
                rank = dense_rank(nodes.masked_fill(determined, -1))  # trajectories at one state share its computation
                width = _width(rank.amax(1) + 1, min(num_generations, tree.num_branching[depth]))
                states = scatter_rows(nodes, rank, width, empty=-1)
                if depth:
                    logits = decoder.extend(tree.tokens_of(states), scatter_rows(parents, rank, width))
                children, log_probs = self._distribution(logits / temperature, states, depth)
                present = children >= 0
                probs = log_probs.exp().double()
                probs = torch.where(probs.isnan(), present, probs)  # still sample a leaf; scoring it will show the NaN
                if epsilon:
                    uniform = present / present.sum(-1, keepdim=True).clamp(min=1)
                    probs = (1 - epsilon) * probs + epsilon * uniform
                parents = rank.clamp(min=0)
                index = parents[..., None].expand(-1, -1, children.shape[-1])
                children, probs = children.gather(1, index), probs.gather(1, index)
                choice = inverse_cdf(probs, noise.uniform("policy", num_generations, depth)[..., None])
                chosen = probs.gather(-1, choice).squeeze(-1)
                log_q += torch.where(determined, 0.0, chosen.log()).float()
                nodes = torch.where(determined, nodes, children.gather(-1, choice).squeeze(-1))
        return tree.unique_leaf(nodes), log_q

    @torch.no_grad()
    def beam_search(
        self, prompts: Prompts, num_beams: int, allowed: Tensor | None = None, excluded: Tensor | None = None,
        flow_weight: float = 0.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Find the most probable leaves by beam search on the tree.

        Args:
            prompts: the batch.
            num_beams: width of the beam.
            allowed: bool `(M,)` nodes that may be visited (`PrefixTree.path_mask`). Default: all. Probabilities are
                still normalized over the whole tree.
            excluded: `(B, X)` leaves that each prompt may not return, padded with -1, on the prompts' device. They are
                left out during the search, so no list is short because of them. Probabilities stay as they are.
            flow_weight: w, 0 to 1. The child t of a state s is ranked by `(1 - w) log pi(s) + w (log F(s) - log Z) +
                log pi(t | s)`, where the flow head estimates log F and log Z, and keeps this rank once nothing is left
                to choose. At pi = R / Z with the true flows this changes nothing.

        Returns:
            Leaves `(B, num_beams)`, best first, and their tree-normalized log-probabilities. If there are fewer leaves
            than beams, the rest is padded with leaf -1 and log-probability -inf.

        Raises:
            ValueError: `excluded` has not one row per prompt, or the model has no flow head for `flow_weight`.
        """
        check_number("flow_weight", flow_weight, SHARE)
        if flow_weight and not self._heads:
            raise ValueError("flow_weight needs a model with a flow head; set it to 0, or load the head (load_heads).")
        batch, tree = num_prompts(prompts), self._tree(prompts)
        start = torch.zeros(batch, 1, device=prompts["input_ids"].device)
        closed: Tensor | None = None
        if excluded is not None:
            if excluded.dim() != 2 or len(excluded) != batch:
                raise ValueError(
                    f"excluded has shape {tuple(excluded.shape)}, but there are {batch} prompts. Give one row of "
                    f"leaves per prompt, padded with -1."
                )
            closed = tree.closed_nodes(excluded, allowed)
            start = start.masked_fill(closed[:, :1] == 0, -torch.inf)  # nothing is left below the root

        def rank(_: Tensor, totals: Tensor, children: Tensor) -> Tensor:
            if allowed is not None:
                totals = totals.masked_fill(~allowed[children.clamp(min=0)], -torch.inf)
            return totals if closed is None else totals.masked_fill(in_rows(closed, children), -torch.inf)

        leaves, log_probs, _ = self._search(prompts, num_beams, 1.0, start, rank, flow_weight)
        return leaves, log_probs

    @torch.no_grad()
    def stochastic_beam_search(
        self, prompts: Prompts, num_generations: int, noise: Noise, temperature: float = 1.0
    ) -> StochasticBeams:
        """Sample K *distinct* leaves, without replacement (Kool, van Hoof and Welling, ICML 2019).

        Independent Gumbel noise is added to the log-probability of every leaf, and the K leaves with the largest sums
        are the sample. They are found top-down, since the largest sum below a node has a known distribution, with a
        beam of K + 1 (the last one gives the threshold) and no approximation. A node's noise depends only on the row,
        the step and the node, so a sample of size K begins with the sample of size K - 1.

        Args:
            prompts: the batch.
            num_generations: K, trajectories per prompt.
            noise: `StatelessNoise(seed).at(step, row_ids)`.
            temperature: divides the logits; above 1 explores more.

        Returns:
            `StochasticBeams`, the largest perturbed log-probability first: the first leaf is an ordinary sample.
        """
        check_number("temperature", temperature, POSITIVE)
        check_number("num_generations", num_generations, COUNT)
        device = prompts["input_ids"].device
        root = torch.zeros(num_prompts(prompts), 1, dtype=torch.long, device=device)

        def perturb(parents: Tensor, totals: Tensor, children: Tensor) -> Tensor:
            return conditional_gumbels(parents, totals, noise.gumbel_at("stochastic_beam", children))

        start = noise.gumbel_at("stochastic_beam", root)
        leaves, log_probs, perturbed = self._search(prompts, num_generations + 1, temperature, start, perturb)
        kept, threshold = slice(0, num_generations), perturbed[:, num_generations]
        return StochasticBeams(
            leaves=leaves[:, kept],
            log_probs=log_probs[:, kept].float(),
            log_inclusion=log_inclusion(log_probs[:, kept], threshold).float(),
            threshold=threshold.float(),
            perturbed=perturbed[:, kept].float(),
        )

    @torch.no_grad()
    def leaf_log_probs(self, prompts: Prompts, chunk_size: int = 256) -> Tensor:
        """Return the exact distribution over all leaves: `(B, N)`. For small catalogs and for tests.

        Args:
            prompts: the batch.
            chunk_size: number of leaves whose branches are computed together.
        """
        tree = self._tree(prompts)
        batch = num_prompts(prompts)
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
                        nodes = nodes[~tree.is_determined(nodes)]
                        if not len(nodes):
                            break
                        parents = torch.searchsorted(previous, tree.parent[nodes].long())
                        tokens = tree.tokens_of(nodes)
                        logits = decoder.extend(tokens.expand(batch, -1), parents.expand(batch, -1))
                        previous = nodes
                    children, log_probs = self._distribution(logits, previous.expand(batch, -1), depth)
                    present = children[0] >= 0
                    totals[:, children[0][present]] = (totals[:, previous, None] + log_probs)[:, present]
        # A leaf's probability is that of the first node on its path that leads to no other leaf.
        first = (~tree.is_determined(tree.path_nodes)).sum(1, keepdim=True)
        return totals[:, tree.path_nodes.gather(1, first).squeeze(1).long()]

    # ------------------------------------------------------------------------------------------------------- helpers
    def _search(
        self, prompts: Prompts, width: int, temperature: float, start: Tensor,
        rank: Callable[[Tensor, Tensor, Tensor], Tensor], flow_weight: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Keep the prefixes with the `width` largest ranking scores at every depth.

        Args:
            prompts: the batch.
            width: number of beams.
            temperature: divides the logits.
            start: `(B, 1)` the root's ranking score, -inf for an empty list; its dtype is used for all sums.
            rank: function from ranking scores of the beams `(B, n)`, log-probabilities of their children `(B, n, C)`
                and the children `(B, n, C)` to the children's ranking scores `(B, n, C)`, -inf for missing children.
            flow_weight: see `beam_search`.

        Returns:
            Leaves, log-probabilities and ranking scores `(B, width)`, best first, padded with -1, -inf and -inf.
        """
        tree = self._tree(prompts)
        nodes = torch.where(start == -torch.inf, -1, 0)
        totals, ranks = torch.where(start == -torch.inf, start, 0.0), start
        with self._decoding(prompts, flows=flow_weight > 0) as decoder:
            logits, parents = decoder.root_logits, torch.zeros_like(nodes)
            for depth in range(tree.max_depth):
                if not tree.num_branching[depth]:
                    break  # no choices are left, in any process
                determined = tree.is_determined(nodes)
                count = _width((~determined).sum(1), min(nodes.shape[1], tree.num_branching[depth]))
                active = determined.to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
                states = nodes.masked_fill(determined, -1).gather(1, active)
                if depth:
                    logits = decoder.extend(tree.tokens_of(states), parents.gather(1, active))
                children, log_probs = self._distribution(logits / temperature, states, depth)
                so_far = totals.gather(1, active)[..., None]
                candidates = so_far + log_probs
                guided = candidates
                if decoder.flows is not None and decoder.root_flows is not None:
                    correction = (decoder.flows - decoder.root_flows)[..., None] - so_far
                    guided = torch.where(so_far > -torch.inf, candidates + flow_weight * correction, candidates)
                ranked = rank(ranks.gather(1, active), guided, children)
                # Determined beams compete unchanged with the children of the others.
                flat = torch.cat([ranked.flatten(1), ranks.masked_fill(~determined, -torch.inf)], 1)
                ranks, best = flat.topk(min(width, flat.shape[1]), dim=1)
                parents = (best // children.shape[-1]).clamp(max=count - 1)
                missing = ranks == -torch.inf
                totals = torch.cat([candidates.flatten(1), totals], 1).gather(1, best)
                totals = totals.masked_fill(missing, -torch.inf)
                nodes = torch.cat([children.flatten(1), nodes], 1).gather(1, best).masked_fill(missing, -1)
        rest = (0, width - nodes.shape[1])
        leaves = nn.functional.pad(tree.unique_leaf(nodes), rest, value=-1)
        totals = nn.functional.pad(totals, rest, value=-torch.inf)
        return leaves, totals, nn.functional.pad(ranks, rest, value=-torch.inf)

    def _tree(self, prompts: Prompts) -> PrefixTree:
        """Check that the prompts fit the model, move the catalog to their device and return its tree."""
        # A trunk may already include the tokens after its prompts.
        id_length = self.catalog.tree.max_depth if "trunk" not in prompts else 1
        check_positions(self.model, prompts["input_ids"].shape[1], id_length)
        device = prompts["input_ids"].device
        if self.catalog.device != device:
            self.catalog.to(device)
        return self.catalog.tree

    @contextmanager
    def computed_once(self, prompts: Prompts) -> Iterator[None]:
        """Context manager: within it, all sampling and searching with these `prompts` (this object) share one
        computation of them. The model must not change meanwhile."""
        self._tree(prompts)
        with self._decoding(prompts) as decoder:
            self._shared = prompts, decoder
            try:
                yield
            finally:
                self._shared = None

    @contextmanager
    def _decoding(self, prompts: Prompts, flows: bool = False) -> Iterator[BranchDecoder]:
        """Context manager: a decoder of the model in evaluation mode. The model's mode is restored afterwards."""
        if self._shared is not None and self._shared[0] is prompts and not flows:
            self._shared[1].restart()
            yield self._shared[1]
            return
        with evaluation_mode(self.model), only_rows(self._output, self.catalog.tree.tokens):
            with torch.no_grad():
                decoder = self._decoder(prompts, flows)
            yield decoder


def _flows_of_states(flows: Tensor, branches: Branches, lengths: Tensor) -> Tensor:
    """Turn log F of the states `(n,)` into log F of each trajectory's s_0 .. s_{L-1} `(B, K, L)`, 0 after its end."""
    states = flows[branches.slots.clamp(min=0)]
    return torch.where(torch.arange(states.shape[2], device=flows.device) < lengths[..., None], states, 0.0)


def _width(needed: Tensor, bound: int) -> int:
    """Return the largest of the rows' numbers of states, `needed` `(B,)`, but at least 1 and at most `bound`.

    At least 1 so that all processes run the same forwards. On an accelerator, reading the numbers would synchronize
    with the device, so there the result is `bound`.
    """
    return bound if needed.device.type != "cpu" else min(bound, max(int(needed.max()), 1))
