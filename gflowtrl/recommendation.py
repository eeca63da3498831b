"""What a recommender returns: recommended items, and the explanation of one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gflowtrl.catalog import Item


@dataclass(frozen=True)
class Recommendation:
    """One recommended item.

    Attributes:
        item: the item.
        log_prob: log-probability (natural logarithm) of its leaf under the policy, or under the tempered policy if the
            item was sampled with a temperature. Items that share a semantic id have the same value. For a user with
            no known item: logarithm of the item's share in the training interactions.
        title: title of the item, if the recommender knows it.
    """

    item: Item
    log_prob: float
    title: str | None = None

    @property
    def probability(self) -> float:
        """The exponential of `log_prob`."""
        return math.exp(self.log_prob)


@dataclass(frozen=True)
class Step:
    """One token of an item's path.

    Attributes:
        token: the token.
        probability: its probability under the policy, among the tokens that are possible at this step.
        rank: its rank among these tokens (1 = most probable).
        choices: number of tokens that are possible at this step.
    """

    token: str
    probability: float
    rank: int
    choices: int


@dataclass(frozen=True)
class Explanation:
    """Explanation of an item's position in a user's list.

    Attributes:
        item, title: the item.
        log_prob: log-probability of its semantic id.
        steps: its path, token by token.
        shares_id_with: other items with the same semantic id. The policy cannot distinguish them.
        teacher_probability, teacher_rank: the item's probability (softmax over all items) and rank (1 = best) under
            the teacher of the reward, if the teacher was saved with the model and knows the item.
    """

    item: Item
    title: str | None
    log_prob: float
    steps: list[Step]
    shares_id_with: list[Item]
    teacher_probability: float | None = None
    teacher_rank: int | None = None
