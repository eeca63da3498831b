"""A seeded, SYNTHETIC shop with known user preferences, for measuring exposure bias.

It contains no real person or product. It is the default data of the examples: small enough for a laptop, and with
information that no real log has, the preference of each user for items that were never shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gflowtrl.catalog import Item
from gflowtrl.checks import POSITIVE_SHARE, at_least, check_number, check_storable

from .interactions import CLICKED, PURCHASED, SHOWN, Event, InteractionData


DEPARTMENTS = ("Garden", "Kitchen", "Music", "Office", "Outdoor", "Pets", "Toys", "Wellness")
SHELVES = ("Basics", "Care", "Decoration", "Electronics", "Gifts", "Refills", "Storage", "Tools")


@dataclass(eq=False, repr=False)
class ShopTruth:
    """Ground truth of a synthetic shop, for evaluation only. No `InteractionData`, row or dataset refers to it.

    Attributes:
        users, items: ids, in the order of the tensors' axes (`items` is `InteractionData.items`).
        preference: float64 (users, items); each row is the user's true distribution over all items and sums to 1.
        shown: bool (users, items); whether the user was shown the item at least once.
        consumed: bool (users, items); whether the user clicked or bought the item.
        liked: bool (users, items); whether the preference is more than `liked_ratio` times uniform (1 / items).
    """

    users: list[Item]
    items: list[Item]
    preference: Tensor
    shown: Tensor
    consumed: Tensor
    liked_ratio: float = 2.0

    def __post_init__(self):
        self.liked = self.preference > self.liked_ratio / len(self.items)
        self._row_of = {user: row for row, user in enumerate(self.users)}

    def per_user(self, user_ids: Sequence[Item], item_probs: Tensor) -> dict[str, Tensor]:
        """Return the metrics of `evaluate` for each user: name -> float64 (U,)."""
        unknown = [user for user in user_ids if user not in self._row_of]
        if unknown:
            raise ValueError(f"User {unknown[0]!r} is not in this synthetic shop.")
        probs = torch.as_tensor(item_probs).detach().cpu().double()
        if probs.shape != (len(user_ids), len(self.items)):
            raise ValueError(f"item_probs must be ({len(user_ids)}, {len(self.items)}), but is {tuple(probs.shape)}.")
        invalid = ~((probs >= 0).all(1) & ((probs.sum(1) - 1).abs() < 1e-3))  # True for NaN too
        if invalid.any():
            raise ValueError(f"Row {int(invalid.nonzero()[0])} of item_probs is not a probability distribution.")
        rows = torch.tensor([self._row_of[user] for user in user_ids], dtype=torch.long)
        unseen_liked = self.liked[rows] & ~self.shown[rows]
        candidates = ~self.consumed[rows]
        truth, predicted = (_normalize(p * candidates) for p in (self.preference[rows], probs))
        return {
            "unseen_liked_mass": (probs * unseen_liked).sum(1),
            "total_variation": (truth - predicted).abs().sum(1) / 2,
        }

    def evaluate(self, user_ids: Sequence[Item], item_probs: Tensor) -> dict[str, float]:
        """Compare predicted distributions with the true preferences; return means over the users.

        `unseen_liked_mass` is the probability of items that a user likes and was never shown (higher is better; as
        predicted, not renormalized). `total_variation` to the true preference (lower is better) compares the two
        distributions **on the items that the user has not clicked or bought, each renormalized there**. Sequences
        contain distinct items, so a model correctly learns to leave out consumed items, which the preference includes.

        Args:
            user_ids: U users.
            item_probs: (U, items); rows sum to 1, columns in the order of `items`.

        Raises:
            ValueError: for an unknown user, a wrong shape, or a row that is not a distribution.
        """
        return {name: float(values.mean()) for name, values in self.per_user(user_ids, item_probs).items()}


@dataclass(frozen=True)
class SyntheticShop:
    """Configuration of a SYNTHETIC shop. `generate()` returns its log and, separately, its ground truth.

    Two shops with equal fields are identical.

    *Catalog.* `departments` x `shelves` categories. A semantic id is the department, the shelf, and the item's
    position on its shelf, cheapest first, so the tokens of an id have a meaning.

    *Truth.* An interest is a softmax over items of an affinity to the department, an affinity to the shelf, a smaller
    one to the single item, and the item's quality. A user is a sparse Dirichlet mixture of the `interests`, so the
    preference matrix has that rank and collaborative filtering can recover it.

    *Logging.* A session shows `slate_size` items drawn by popularity, which is skewed and only loosely related to
    quality. In addition, each item is shown to `min_users_shown` random users (discovery). Logging is not
    personalized. An item that a user ignored is shown to them less often, an item they took is not shown again. A
    user's sessions continue until `min_items` items are taken.

    *Behavior.* A shown item is clicked with probability 1 - (1 - noise) exp(-click_rate * n_items * preference), which
    is proportional to small preferences, saturates, and includes random clicks. A click becomes a purchase with
    probability 1 - exp(-purchase_rate * n_items * preference).

    Args:
        seed: seed of all random numbers.
        n_users, n_items, departments, shelves, interests: sizes.
        concentration: concentration of the Dirichlet over interests; small values give few interests per user.
        sharpness: scale of the affinities; large values concentrate interests on few items.
        popularity_skew: standard deviation of the log exposure weight; 0 shows all items equally.
        popularity_quality: correlation of log exposure and quality.
        fatigue: decrease of an item's log exposure weight for a user per impression.
        slate_size: items per session that are shown by popularity.
        mean_sessions: mean number of sessions per user (at least 3; Poisson above that).
        min_users_shown: minimum number of users that each item is shown to.
        click_rate, purchase_rate, noise: parameters of the behavior above; noise is the probability of a random click.
        min_items: minimum sequence length.
        liked_ratio: an item is liked if its preference is more than this many times uniform.
    """

    seed: int = 0
    n_users: int = 1500
    n_items: int = 300
    departments: int = 8
    shelves: int = 8
    interests: int = 6
    concentration: float = 0.05
    sharpness: float = 1.8
    popularity_skew: float = 1.75
    popularity_quality: float = 0.3
    fatigue: float = 1.0
    slate_size: int = 8
    mean_sessions: float = 12.0
    min_users_shown: int = 60
    click_rate: float = 0.3
    purchase_rate: float = 0.1
    noise: float = 0.005
    min_items: int = 5
    liked_ratio: float = 2.0

    def __post_init__(self):
        check_storable(self)
        check_number("noise", self.noise, POSITIVE_SHARE)
        check_number("min_items", self.min_items, at_least(3))  # one item each for training, validation and test
        if self.n_items <= self.min_items:
            raise ValueError(f"n_items is {self.n_items}; it must be above min_items={self.min_items}. Raise n_items.")
        if self.min_users_shown > self.n_users:
            raise ValueError(
                f"min_users_shown is {self.min_users_shown}, above n_users={self.n_users}. Raise n_users."
            )

    def generate(self) -> tuple[InteractionData, ShopTruth]:
        """Generate the log for training, and the ground truth, which is for evaluation only."""
        rng = np.random.default_rng(self.seed)
        department = rng.integers(self.departments, size=self.n_items)
        shelf = rng.integers(self.shelves, size=self.n_items)
        quality = rng.standard_normal(self.n_items)
        preference = self._preferences(rng, department, shelf, quality)
        users, items = list(range(self.n_users)), list(range(self.n_items))
        events, shown, consumed = self._simulate(rng, preference, quality)
        features, semantic_ids = self._describe(rng, department, shelf)
        data = InteractionData(
            name="synthetic_shop",
            users=users,
            sequences=[[event.item for event in log if event.level >= CLICKED] for log in events],
            items=items,
            item_features=features,
            semantic_ids=semantic_ids,
            synthetic=True,
            events=events,
        )
        truth = (torch.from_numpy(values) for values in (preference, shown, consumed))
        return data, ShopTruth(users, items, *truth, self.liked_ratio)

    def _preferences(self, rng, department, shelf, quality) -> np.ndarray:
        """Return preferences (users, items), rows sum to 1: mixtures of interests x distributions of interests."""
        affinity = (
            rng.standard_normal((self.interests, self.departments))[:, department]
            + rng.standard_normal((self.interests, self.departments, self.shelves))[:, department, shelf]
            + 0.5 * rng.standard_normal((self.interests, self.n_items))
        )
        logits = self.sharpness * affinity + 0.5 * quality
        tastes = np.exp(logits - logits.max(1, keepdims=True))
        tastes /= tastes.sum(1, keepdims=True)
        mixture = rng.dirichlet(np.full(self.interests, self.concentration), size=self.n_users)
        return mixture @ tastes

    def _simulate(
        self, rng, preference: np.ndarray, quality: np.ndarray
    ) -> tuple[list[list[Event]], np.ndarray, np.ndarray]:
        """Simulate all sessions, for all users at once.

        Returns:
            The events of each user in order; which items were shown and which were taken, bool (users, items).
        """
        shape = preference.shape
        rho = self.popularity_quality
        independent = rng.standard_normal(self.n_items)
        popularity = self.popularity_skew * (rho * quality + np.sqrt(1 - rho**2) * independent)
        intensity = self.n_items * preference
        click = 1 - (1 - self.noise) * np.exp(-self.click_rate * intensity)
        purchase = 1 - np.exp(-self.purchase_rate * intensity)
        sessions = 3 + rng.poisson(max(self.mean_sessions - 3, 0), size=self.n_users)
        discovery = self._discovery(rng, sessions)

        taken, times_shown = np.zeros(shape, dtype=bool), np.zeros(shape)
        log, session = [], 0
        while (active := (session < sessions) | (taken.sum(1) < self.min_items)).any():
            keys = popularity - self.fatigue * times_shown + rng.gumbel(size=shape)  # Gumbel top-k: a weighted draw
            keys[taken] = -np.inf
            size = min(self.slate_size, self.n_items)
            slate = keys >= np.partition(keys, -size, axis=1)[:, [-size]]
            slate = (slate | (discovery == session)) & ~taken & active[:, None]
            clicked = slate & (rng.random(shape) < click)
            bought = clicked & (rng.random(shape) < purchase)
            user, item = np.nonzero(slate)
            level = np.where(bought, PURCHASED, np.where(clicked, CLICKED, SHOWN))[user, item]
            log.append(np.stack([user, np.full_like(user, session), rng.permutation(len(user)), item, level]))
            taken |= clicked
            times_shown += slate
            session += 1
        user, number, position, item, level = np.concatenate(log, axis=1)
        order = np.lexsort((position, number, user))
        events: list[list[Event]] = [[] for _ in range(self.n_users)]
        for row, *event in zip(*(column[order].tolist() for column in (user, number, item, level)), strict=True):
            events[row].append(Event(*event))
        return events, times_shown > 0, taken

    def _discovery(self, rng, sessions: np.ndarray) -> np.ndarray:
        """Return the session in which each user is shown each item regardless of popularity, (users, items), or -1."""
        order = rng.random((self.n_users, self.n_items)).argsort(0).argsort(0)
        when = (rng.random((self.n_users, self.n_items)) * sessions[:, None]).astype(int)
        return np.where(order < self.min_users_shown, when, -1)

    def _describe(self, rng, department, shelf) -> tuple[dict[Item, dict], dict[Item, tuple[str, ...]]]:
        """Return features (title, category, price) and semantic ids, both independent of quality and popularity."""
        price = np.exp(rng.normal(3.0, 0.4, self.departments)[department] + rng.normal(0, 0.6, self.n_items)).round(2)
        features, ids, last_number = {}, {}, {}
        for item in np.argsort(price, kind="stable").tolist():
            key = (int(department[item]), int(shelf[item]))
            number = last_number[key] = last_number.get(key, -1) + 1
            category = f"{_name(DEPARTMENTS, key[0])} / {_name(SHELVES, key[1])}"
            features[item] = {"title": f"{category} no. {number}", "category": category, "price": float(price[item])}
            ids[item] = (f"<a_{key[0]}>", f"<b_{key[1]}>", f"<c_{number}>")
        return {item: features[item] for item in sorted(features)}, ids


def _name(names: tuple[str, ...], index: int) -> str:
    return names[index] if index < len(names) else f"{names[index % len(names)]} {index // len(names) + 1}"


def _normalize(weights: Tensor) -> Tensor:
    return weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
