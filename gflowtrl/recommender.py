"""Load a saved recommender and recommend items."""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.catalog.catalog import CATALOG_FILE
from gflowtrl.checks import COUNT, check_number, check_titles, check_type
from gflowtrl.data import PromptEncoder
from gflowtrl.data.recommender_files import read_details, read_encoder
from gflowtrl.finite import check_ranked, check_weights
from gflowtrl.policy import Noise, StatelessNoise, check_exact, check_positions, load_backbone, make_policy
from gflowtrl.policy.heads import split_heads
from gflowtrl.policy.loading import check_embedded, load_tokenizer
from gflowtrl.policy.merging import update_adapter_files
from gflowtrl.semantic_ids import ItemTokenizer
from gflowtrl.teachers import TeacherModule, load_teacher
from gflowtrl.teachers.teacher import rank_items

from .catalog_change import ITEM_TOKENIZER_FOLDER, ChangeableCatalog
from .hub import local_copy, upload
from .recommendation import Explanation, Recommendation, Step
from .request import Request, allowed_in, exclusions_in, histories_in


TEACHER_FOLDER = "teacher"
MAX_ENUMERATED = 4096  # sampling among at most so many allowed items computes the probability of each of them
LEAVES_PER_FORWARD = 256


class Recommender(ChangeableCatalog):
    """A trained generative recommender: histories in, ranked items out.

    Args:
        model: a causal language model or an encoder-decoder.
        tokenizer: its tokenizer.
        catalog: the items that can be recommended.
        max_history_items: number of items of a history that are used (the last ones).
        encoder: turns histories into prompts; by default a `PromptEncoder` (plain semantic ids).
        titles: titles of items, which recommendations and explanations return.
        item_counts: `(items,)` numbers of training interactions in the order of `catalog.history_items`; those of
            retired items may be missing. Users with no known item get recommendations by popularity from these counts.
        teacher: the collaborative model of the reward, for explanations.
        item_tokenizer: what made the semantic ids, or its folder, which is read when items are added (`add_items`).

    Raises:
        ValueError: prompts are longer than the model's positions; the model is not known to be exact; at the first
            use, the policy differs from the model's own distribution (`gflowtrl.policy.check_exact`).
        NonFiniteError: weights are NaN or infinite; from `recommend` and `explain`, probabilities are.

    Example:
        ```python
        recommender = Recommender.from_pretrained("outputs/gflownet")
        for recommendation in recommender.recommend([[17, 4, 2205]], k=10)[0]:
            print(recommendation.item, recommendation.title, recommendation.log_prob)
        recommender.recommend([[17, 4, 2205]], k=10, strategy="sample", seed=1)  # another list for another seed
        recommender.explain([17, 4, 2205], 31).steps  # token by token
        ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        catalog: ItemCatalog,
        max_history_items: int = 20,
        encoder: PromptEncoder | None = None,
        titles: Mapping[Item, str] | None = None,
        item_counts: Tensor | None = None,
        teacher: TeacherModule | None = None,
        item_tokenizer: ItemTokenizer | Path | None = None,
    ):
        check_type("catalog", catalog, ItemCatalog, "an ItemCatalog")
        check_type("model", model, torch.nn.Module, "a language model of transformers")
        check_type("tokenizer", tokenizer, PreTrainedTokenizerBase, "a tokenizer of transformers")
        check_type("titles", titles, Mapping, "a dictionary {item: title}", optional=True)
        check_type("teacher", teacher, TeacherModule, "a teacher of gflowtrl.teachers", optional=True)
        check_type("encoder", encoder, Callable, "a PromptEncoder", optional=True)
        if item_counts is not None:
            catalog.check_counts(item_counts, retired=True)
        check_weights(model)
        check_embedded(model, catalog.tree.num_tokens - 1)
        self.model, self.tokenizer, self.catalog = model.eval(), tokenizer, catalog
        self.policy = make_policy(model, catalog)
        self.encoder = PromptEncoder(catalog, tokenizer, max_history_items) if encoder is None else encoder
        check_embedded(model, self.encoder.largest_token, "The prompts use")
        check_positions(model, self.encoder.max_length, catalog.tree.max_depth, self.encoder.max_history_items)
        self._policy_is_checked = False
        self.titles, self.item_counts, self.teacher = dict(titles or {}), item_counts, teacher
        check_titles(self.titles)
        self._item_tokenizer = item_tokenizer

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, **model_kwargs) -> Recommender:
        """Load a recommender that a gflowtrl trainer saved, or a checkpoint of its run.

        Args:
            directory: the folder with model, tokenizer, `catalog.json` and `recommender_config.json` (titles, counts
                and a teacher are optional), or its name on the Hugging Face Hub, as for `AutoModel.from_pretrained`.
            **model_kwargs: passed to the `from_pretrained` of `AutoModelForSeq2SeqLM` if the checkpoint is an
                encoder-decoder, else of `AutoModelForCausalLM`; for example `device_map` or `dtype`. Code in the
                model's folder runs only with `trust_remote_code=True`.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
            ValueError: a file is damaged, or files do not belong together: weights and configuration, catalog and
                tokenizer, prompts, titles, teacher. The message names the file.
        """
        directory = local_copy(directory)
        catalog = ItemCatalog.from_pretrained(directory)
        tokenizer = load_tokenizer(directory, model_kwargs.get("trust_remote_code", False))
        catalog.check_tokenizer(tokenizer, str(directory / CATALOG_FILE))
        files = {"encoder": read_encoder(directory, catalog, tokenizer), **read_details(directory, catalog)}
        if (folder := directory / TEACHER_FOLDER).is_dir():
            files["teacher"] = teacher = load_teacher(folder)
            unknown = set(catalog.items) - set(teacher.items)
            # Items that were added after the training have no teacher.
            if unknown and (catalog.version == 1 or len(unknown) == len(catalog)):
                raise ValueError(
                    f"The teacher in {folder} does not know {len(unknown)} items of {CATALOG_FILE}, for example "
                    f"{next(iter(unknown))!r}. Restore the files that were saved together, or delete the folder."
                )
        if (folder := directory / ITEM_TOKENIZER_FOLDER).is_dir():
            files["item_tokenizer"] = folder
        return cls(load_backbone(directory, **model_kwargs), tokenizer, catalog, **files)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write a folder that `from_pretrained` loads."""
        state_dict, _ = split_heads(self.model.state_dict())  # flow heads serve training only
        self.model.save_pretrained(directory, state_dict=state_dict)
        self.tokenizer.save_pretrained(directory)
        self.save_catalog(directory)
        update_adapter_files(self.model, directory)
        if self.teacher is not None:
            self.teacher.save_pretrained(Path(directory, TEACHER_FOLDER))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the folder of `save_pretrained` to the Hugging Face Hub, for `from_pretrained`.

        Args:
            repo_id: name of the repository, `user/name`. It is created if it does not exist.
            **options: `private`, `token`, `commit_message`, `revision`, `create_pr`, as in
                `PreTrainedModel.push_to_hub`.

        Returns:
            The address of the commit.

        Raises:
            HfHubHTTPError: the Hub refuses the upload, for example because the token may not write.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(folder, repo_id, **options)

    def check(self) -> None:
        """Check that the weights and the log-probabilities of one decoding are finite. It also warms the model up.

        Raises:
            NonFiniteError: they are not; the message names the model's folder and what is wrong with it.
        """
        check_weights(self.model)
        check_ranked(*self.policy.beam_search(self.prompts([self.catalog.items[:1]]), 1), self.model)

    @property
    def max_history_items(self) -> int:
        """Number of items of a history that are used (the last ones)."""
        return self.encoder.max_history_items

    # -------------------------------------------------------------------------------------------------- recommending
    def recommend(
        self,
        histories: Iterable[Sequence[Item]],
        k: int = 10,
        num_beams: int | None = None,
        exclude_seen: bool = False,
        batch_size: int = 256,
        strategy: str = "beam",
        temperature: float = 1.0,
        seed: int = 0,
        allowed_items: Iterable[Item] | None = None,
        exclude: Sequence[Collection[Item]] | None = None,
        names: Sequence[str] | None = None,
    ) -> list[list[Recommendation]]:
        """Recommend `k` items for each history.

        Args:
            histories: items of each user in chronological order. Items that are not in the catalog are skipped with a
                warning. A user with no known item gets the most popular items of the training interactions.
            k: length of the lists. A list is shorter only if fewer items can be recommended.
            num_beams: beam width, by default `max(20, k)`; with `strategy="sample"` the number of semantic ids that
                are drawn, by default `k`, to which `exclude_seen` adds the longest history.
            exclude_seen: leave out items of the history, without a change to the probabilities of the others.
            batch_size: number of histories that are decoded together.
            strategy: `"beam"`: the most probable items, best first. `"sample"`: items drawn without replacement in
                proportion to their probability, in the order of the draw (stochastic beam search). If the policy is
                proportional to a reward, so are these lists: every good item is in some of them. Items that share a
                semantic id are next to each other.
            temperature: with `"sample"`: divides the logits; below 1 closer to `"beam"`, above 1 more varied.
            seed: with `"sample"`: the same seed gives the same lists. A history's draw depends on its index in
                `histories`, not on the batch size.
            allowed_items: recommend only these, for example items in stock. Probabilities stay those among all items.
            exclude: for each history, items that this user must not get; items that are not in the catalog do no harm.
            names: names of the histories in errors and warnings; by default `"row 0"`, `"row 1"`, ...

        Raises:
            ValueError: k or batch_size is below 1, or num_beams below k; the strategy is unknown; the temperature is
                not positive, or is set with `"beam"`; allowed_items is empty or holds an unknown item; exclude has not
                one entry per history; a user has no known item and the recommender has no `item_counts`.
            TypeError: a history is not a list of items.
        """
        (histories, names), allowed = histories_in(histories, names), allowed_in(self.catalog, allowed_items)
        excluded = exclusions_in(self.catalog, exclude, len(histories))
        request = Request(k, num_beams, exclude_seen, allowed, strategy, temperature, seed, excluded)
        return self.answer(histories, names, request, batch_size, self._decode)

    def answer(
        self,
        histories: Sequence[Sequence[Item]],
        names: Sequence[str],
        request: Request,
        batch_size: int,
        decode: Callable[[list[int], list[list[Item]], Request], list[list[Recommendation]]],
    ) -> list[list[Recommendation]]:
        """Answer `recommend`, or that of an `Ensemble`, whose arguments and errors these are.

        `decode` makes the lists of at most `batch_size` non-empty histories, whose indices in `histories` are its
        first argument.
        """
        check_number("batch_size", batch_size, COUNT)
        known = self._known(histories, names, stacklevel=4)
        results = {row: self._popular(row, names[row], request) for row, history in enumerate(known) if not history}
        for rows in request.batches(known, batch_size):
            results.update(zip(rows, decode(rows, [known[row] for row in rows], request), strict=True))
        return [results[row] for row in range(len(known))]

    def prompts(self, histories: list[list[Item]]) -> dict[str, Tensor]:
        """Return the prompts of histories on the model's device, and move the catalog there.

        Raises:
            ValueError: at the first use, if the policy differs from the model's own distribution (`check_exact`).
        """
        self.catalog.to(self.model.device)
        if not self._policy_is_checked:
            check_exact(self.policy, self.encoder)
            self._policy_is_checked = True
        return {name: value.to(self.model.device) for name, value in self.encoder(histories).items()}

    def _decode(self, rows: list[int], histories: list[list[Item]], request: Request) -> list[list[Recommendation]]:
        """Return the lists of non-empty histories, whose indices in the request are `rows`."""
        prompts = self.prompts(histories)
        beams = request.num_beams or (max(20, request.k) if request.strategy == "beam" else request.k)
        beams = min(beams, self.catalog.tree.num_leaves)  # a wider search finds no more
        left_out = request.excluded(rows, histories)
        if request.strategy == "beam":
            nodes = excluded = None
            if request.allowed is not None:
                nodes = self.catalog.tree.path_mask(self.catalog.leaf_of(sorted(request.allowed)))
            if left_out is not None:
                excluded = self.catalog.seen_items(left_out, among=request.allowed).leaves.to(self.model.device)
            leaves, log_probs = self.policy.beam_search(prompts, beams, nodes, excluded)
            return self._lists(left_out, leaves, log_probs, request)
        if left_out is not None:
            # The first unseen items of a draw among all items are a draw among the unseen ones. A masked search would
            # not be one: the noise of a prefix is that of all its leaves, seen or not.
            beams = min(beams + max(len(set(items)) for items in left_out), self.catalog.tree.num_leaves)
        noise = StatelessNoise(request.seed).at(0, torch.tensor(rows, device=self.model.device))
        if request.allowed is not None and len(request.allowed) <= MAX_ENUMERATED:
            return self._lists(left_out, *self._sample_allowed(prompts, noise, request), request)
        while True:
            # With the same noise, a wider search starts with the same draws; its allowed items are a draw among them.
            drawn = self.policy.stochastic_beam_search(prompts, beams, noise, request.temperature)
            lists = self._lists(left_out, drawn.leaves, drawn.log_probs, request)
            wanted = request.lengths(left_out or [()] * len(rows))
            if all(map(operator.ge, map(len, lists), wanted)) or beams >= self.catalog.tree.num_leaves:
                return lists
            beams = min(4 * beams, self.catalog.tree.num_leaves)

    @torch.no_grad()
    def _sample_allowed(self, prompts: dict[str, Tensor], noise: Noise, request: Request) -> tuple[Tensor, Tensor]:
        """Return all allowed leaves `(B, n)` in the order of a draw without replacement (Gumbel), and their
        log-probabilities under the tempered policy."""
        leaves = self.catalog.leaf_of(sorted(request.allowed)).unique()
        log_probs = []
        for part in leaves.split(LEAVES_PER_FORWARD):
            scores = self.policy.score(prompts, part.expand(len(noise), -1))
            children = scores.child_log_probs / request.temperature
            open_states = (scores.child_log_probs != -torch.inf).any(-1)  # NaN stays NaN
            norm = children.masked_fill(~open_states[..., None], 0.0).logsumexp(-1)
            steps = scores.log_probs / request.temperature - norm
            log_probs.append(steps.masked_fill(~open_states, 0.0).sum(-1))
        log_probs = torch.cat(log_probs, 1)
        keys = log_probs - (-noise.uniform("allowed", len(leaves)).log()).log()
        order = keys.argsort(1, descending=True)
        return leaves[order], log_probs.gather(1, order)

    def _lists(
        self, left_out: Sequence[Sequence[Item]] | None, leaves: Tensor, log_probs: Tensor, request: Request
    ) -> list[list[Recommendation]]:
        """Return the first `k` items of ranked leaves `(B, n)` without those `left_out` for each row."""
        check_ranked(leaves, log_probs, self.model)
        results = []
        for removed, row, values in zip(
            left_out or [()] * len(leaves), leaves.tolist(), log_probs.tolist(), strict=True
        ):
            ranked = ((leaf, value) for leaf, value in zip(row, values, strict=True) if leaf >= 0)
            items = ((item, value) for leaf, value in ranked for item in self.catalog.items_of(leaf))
            results.append(self._list(items, request, set(removed)))
        return results

    def _list(
        self, ranked: Iterable[tuple[Item, float]], request: Request, seen: Collection[Item] = ()
    ) -> list[Recommendation]:
        """Return the first `k` items that may be recommended, from ranked pairs of item and log-probability."""
        recommendations = (
            Recommendation(item, log_prob, self.titles.get(item))
            for item, log_prob in ranked
            if item not in seen and (request.allowed is None or item in request.allowed)
        )
        return list(islice(recommendations, request.k))

    def _popular(self, row: int, name: str, request: Request) -> list[Recommendation]:
        """Rank items by popularity in training, or sample them in proportion to it, for a user with no known item."""
        if self.item_counts is None:
            raise ValueError(
                f"The history in {name} is empty or holds no known item, and the recommender has no counts of "
                f"training interactions to rank items by popularity. Leave the history out, or give "
                f"Recommender(item_counts=...)."
            )
        log_probs = (self.item_counts[: len(self.catalog)].double() + 1).log().log_softmax(0)
        order = log_probs / request.temperature
        if request.strategy == "sample":
            noise = StatelessNoise(request.seed).at(0, torch.tensor([row]))
            order = order - (-noise.uniform("cold", len(order))[0].log()).log()
        ranked = order.argsort(descending=True, stable=True).tolist()
        pairs = ((self.catalog.items[index], float(log_probs[index])) for index in ranked)
        return self._list(pairs, request, set() if request.exclude is None else set(request.exclude[row]))

    def _known(self, histories: Sequence[Sequence[Item]], names: Sequence[str], stacklevel: int) -> list[list[Item]]:
        """Return the histories without items that are not in the catalog; warn about these items."""
        known, unknown = self.catalog.readable_items(histories)
        if unknown:
            row, item = unknown[0]
            warnings.warn(
                f"{len(unknown)} items of the histories are not in the catalog and were left out; the first is "
                f"{item!r} in {names[row]}.",
                stacklevel=stacklevel,
            )
        return known

    # ---------------------------------------------------------------------------------------------------- explaining
    @torch.no_grad()
    def explain(self, history: Sequence[Item], item: Item) -> Explanation:
        """Explain the position of `item` in the list of this history by its path and the teacher's score.

        Raises:
            ValueError: the item is not in the catalog, or the history has no known item.
        """
        (known,) = self._known(*histories_in([history], None), stacklevel=3)
        if not known:
            raise ValueError(
                "The history holds no known item, so its list is by popularity and the policy cannot explain it. Give "
                "a history with at least one item of the catalog."
            )
        prompts, leaf = self.prompts([known]), self.catalog.leaf_of([item])
        scores, path = self.policy.score(prompts, leaf[None]), self.catalog.tree.walk(leaf)[0]
        check_ranked(leaf[None], scores.trajectory_log_probs, self.model)
        steps = []
        for depth, token in enumerate(self.catalog.semantic_ids[self.catalog.index_of([item])[0]]):
            probs = scores.child_log_probs[0, 0, depth].exp()
            prob = probs[scores.child_nodes[0, 0, depth] == path[depth + 1]]
            choices = int(self.catalog.tree.num_children[path[depth]])
            steps.append(Step(token, float(prob), 1 + int((probs > prob).sum()), choices))
        others = [other for other in self.catalog.items_of(int(leaf)) if other != item]
        log_prob = float(scores.trajectory_log_probs)
        result = Explanation(item, self.titles.get(item), log_prob, steps, others)
        if self.teacher is None:
            return result
        ((prob, rank),) = rank_items(self.teacher, known, [item], self.catalog, self.encoder.max_history_items)
        return replace(result, teacher_probability=prob, teacher_rank=rank)
