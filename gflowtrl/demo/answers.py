"""What the page shows of a recommender, as plain rows: recommendations, and the way through the tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gflowtrl.catalog import Item
from gflowtrl.finite import check_ranked
from gflowtrl.recommender import Recommender
from gflowtrl.teachers.teacher import rank_items

from .run_reward import RunReward


MOST_CHILDREN = 10


@dataclass(frozen=True)
class Row:
    """One recommendation.

    Attributes:
        rank: from 1.
        item, title: the item.
        probability: of its semantic id, under the tempered policy if it was sampled; for an empty history its share
            in the training interactions.
        teacher_probability, teacher_rank: the item under the teacher (`rank_items`); None: it does not know the item.
        target: R / Z of its semantic id under the run's reward, or None.
    """

    rank: int
    item: Item
    title: str | None
    probability: float
    teacher_probability: float | None = None
    teacher_rank: int | None = None
    target: float | None = None


@dataclass(frozen=True)
class Answer:
    """A list of recommendations.

    Attributes:
        history: the items that it is for.
        rows: the recommendations, in order.
        temperature: that of the probabilities.
        notes: sentences about the list.
    """

    history: list[Item]
    rows: list[Row]
    temperature: float = 1.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Child:
    """A token that may follow a prefix.

    Attributes:
        token: the token.
        items: number of items below.
        example: one of these items.
        rank: among all tokens that may follow, by probability (1 = most probable).
        probability: under the (tempered) policy, given the prefix.
        taken: whether it leads to the recommended item.
        target: F(child) / F(prefix) under the run's reward, or None.
    """

    token: str
    items: int
    example: Item
    rank: int
    probability: float
    taken: bool
    target: float | None = None


@dataclass(frozen=True)
class Level:
    """One step of the way to an item.

    Attributes:
        prefix: the tokens before.
        choices: number of tokens that may follow.
        children: the most probable ones, and the one that is taken, by rank.
    """

    prefix: tuple[str, ...]
    choices: int
    children: list[Child]


def recommend(
    recommender: Recommender,
    history: Sequence[Item],
    k: int = 10,
    strategy: str = "beam",
    temperature: float = 1.0,
    seed: int = 0,
    exclude_seen: bool = False,
    reward: RunReward | None = None,
) -> Answer:
    """Recommend items, with the teacher's scores and the run's target where they are known.

    Args:
        recommender: the recommender.
        history: items of the catalog, oldest first.
        k, strategy, temperature, seed, exclude_seen: as in `Recommender.recommend`; "beam" ignores the temperature.
        reward: the reward of the run.

    Raises:
        ValueError: as in `Recommender.recommend`.
    """
    temperature = temperature if strategy == "sample" else 1.0
    options = {"strategy": strategy, "temperature": temperature, "seed": seed, "exclude_seen": exclude_seen}
    if not history and recommender.item_counts is None:
        raise ValueError("The history is empty, and this model has no counts of popular items. Add an item to it.")
    (found,) = recommender.recommend([history], k, **options)
    rows = [Row(rank, one.item, one.title, one.probability) for rank, one in enumerate(found, 1)]
    if not history:
        note = "The history is empty, so these are the most frequent items of the training data."
        return Answer([], rows, temperature, (note,))
    notes, items = [], [row.item for row in rows]
    if len(history) > recommender.max_history_items:
        notes.append(f"The model reads the last {recommender.max_history_items} items of the history.")
    if recommender.teacher is not None:
        longest, among = recommender.max_history_items, recommender.catalog
        pairs = zip(rows, rank_items(recommender.teacher, history, items, among, longest), strict=True)
        rows = [replace(row, teacher_probability=prob, teacher_rank=rank) for row, (prob, rank) in pairs]
    if reward is not None:
        ends = recommender.catalog.tree.leaf_nodes()[recommender.catalog.leaf_of(items)]
        targets = reward.of(history)(ends).exp().tolist()
        rows = [replace(row, target=target) for row, target in zip(rows, targets, strict=True)]
    return Answer(list(history), rows, temperature, tuple(notes))


@torch.no_grad()
def way_to(
    recommender: Recommender, answer: Answer, item: Item, most: int = MOST_CHILDREN, reward: RunReward | None = None
) -> list[Level]:
    """Return the way through the tree to an item, token by token.

    The product of the probabilities of the tokens taken is the probability of the item's semantic id.

    Args:
        recommender: the recommender.
        answer: the list whose history and temperature are meant.
        item: the item.
        most: number of tokens that are returned for each prefix, besides the one that is taken.
        reward: the reward of the run.

    Raises:
        ValueError: the history is empty, so that its list does not come from the tree.
        NonFiniteError: probabilities are NaN.
    """
    if not answer.history:
        raise ValueError("The list of an empty history is by popularity, not from the tree. Add an item to it.")
    catalog = recommender.catalog
    prompts, leaf = recommender.prompts([answer.history]), catalog.leaf_of([item])
    scores, path = recommender.policy.score(prompts, leaf[None]), catalog.tree.walk(leaf)[0]
    check_ranked(leaf[None], scores.trajectory_log_probs, recommender.model)
    tokens = catalog.semantic_ids[catalog.index_of([item])[0]]
    flows = None if reward is None else reward.of(answer.history)
    levels = []
    for depth in range(len(tokens)):
        is_child = scores.child_nodes[0, 0, depth] >= 0
        nodes = scores.child_nodes[0, 0, depth][is_child]
        probs = (scores.child_log_probs[0, 0, depth][is_child] / answer.temperature).softmax(-1)
        order = probs.argsort(descending=True, stable=True)
        taken = int((nodes[order] == path[depth + 1]).nonzero())
        chosen = [*range(min(most, len(nodes))), *([taken] if taken >= most else [])]
        kept = order[chosen]
        targets: list[float | None] = [None] * len(chosen)
        if flows is not None:
            targets = (flows(nodes[kept]) - flows(path[depth])).exp().tolist()
        columns = zip(chosen, nodes[kept].tolist(), probs[kept].tolist(), targets, strict=True)
        children = [
            Child(*_describe(recommender, node, depth), rank + 1, prob, rank == taken, target)
            for rank, node, prob, target in columns
        ]
        levels.append(Level(tokens[:depth], len(nodes), children))
    return levels


def _describe(recommender: Recommender, node: int, depth: int) -> tuple[str, int, Item]:
    """Return the token that leads to a node at `depth + 1`, the number of items below it, and one of them."""
    catalog, tree = recommender.catalog, recommender.catalog.tree
    first, count = int(tree.first_leaf[node]), int(tree.leaf_count[node])
    item = catalog.items_of(first)[0]
    (index,) = catalog.index_of([item]).tolist()
    return catalog.semantic_ids[index][depth], int(catalog.leaf_sizes[first : first + count].sum()), item
