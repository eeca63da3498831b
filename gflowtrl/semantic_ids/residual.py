"""Residual quantization: the base class of quantizers, and residual k-means."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gflowtrl.checks import at_least, check_number

from .vectors import as_vectors


ROWS = 65_536  # rows encoded at a time: their distances to 256 codes take 64 MiB
MOST_LEVELS = 25  # levels are named by letters, and collisions may need one more
BALANCING_ROUNDS = 3  # on Amazon Beauty, one round has a fifth more error than three; further rounds gain little


@dataclass(eq=False)
class ResidualQuantizer(ABC):
    """Encode a vector as one code per level: the code nearest to the residual of the levels before it.

    Attributes:
        num_levels, num_codes: length of an id, and codes per level.
        codebooks: `(num_levels, num_codes, latent dim)`, `None` before `fit`.
        center: float64 `(D,)`, the mean of the fitted vectors, which is subtracted from every vector first, because
            distances far from the origin (as between hidden states of language models) are mostly rounding errors.
        config: the arguments of the constructor.
    """

    num_levels: int = 3
    num_codes: int = 256

    def __post_init__(self) -> None:
        self.codebooks: Tensor | None = None
        self.center = torch.zeros((), dtype=torch.float64)
        if not 1 <= self.num_levels <= MOST_LEVELS:
            raise ValueError(
                f"num_levels is {self.num_levels}; it must be 1 to {MOST_LEVELS} (levels are named by letters)."
            )
        check_number("num_codes", self.num_codes, at_least(2))

    @property
    def config(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @abstractmethod
    def fit_encode(self, vectors: Tensor | np.ndarray) -> Tensor:
        """Learn the codebooks from `vectors` (N, D) and return the codes of these vectors, long (N, num_levels)."""

    def fit(self, vectors: Tensor | np.ndarray) -> "ResidualQuantizer":
        """Learn the codebooks from `vectors` (N, D).

        Raises:
            ValueError: for fewer vectors than codes, NaN or infinity.
        """
        self.fit_encode(vectors)
        return self

    def latents(self, vectors: Tensor | np.ndarray) -> Tensor:
        """Map vectors (N, D) to the space of the codebooks, (N, latent dim); by default, center them."""
        self.check_fitted()
        return centered(as_vectors(vectors, dim=self.codebooks.shape[2]), self.center)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes (N, num_levels) as vectors (N, D), float32."""
        return (self.quantized(codes) + self.center).float()

    @torch.no_grad()
    def encode(self, vectors: Tensor | np.ndarray) -> Tensor:
        """Encode vectors (N, D), also of new items, as codes, long (N, num_levels)."""
        return torch.cat([nearest_codes(block, self.codebooks) for block in self.latents(vectors).split(ROWS)])

    def quantized(self, codes: Tensor) -> Tensor:
        """Sum the centroids of codes or prefixes of codes, (N, levels) -> (N, latent dim)."""
        self.check_fitted()
        return sum((self.codebooks[level, codes[:, level]] for level in range(codes.shape[1])), torch.zeros(()))

    def check_fitted(self) -> None:
        if self.codebooks is None:
            raise RuntimeError(f"This {type(self).__name__} is not fitted yet. Call fit(vectors) first.")

    def check_vectors(self, vectors: Tensor | np.ndarray) -> Tensor:
        """Return the vectors to fit on as a tensor; raise an error if there are fewer than codes."""
        vectors = as_vectors(vectors)
        if len(vectors) < self.num_codes:
            raise ValueError(
                f"{len(vectors)} vectors cannot be grouped into {self.num_codes} codes per level. Choose num_codes "
                "(--codes) well below the number of items, and more levels instead."
            )
        return vectors

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to save; `from_state(config, tensors)` restores the quantizer."""
        self.check_fitted()
        return {"codebooks": self.codebooks, "center": self.center}

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "ResidualQuantizer":
        """Restore a saved quantizer."""
        quantizer = cls(**config)
        quantizer.codebooks = tensors["codebooks"]
        quantizer.center = tensors.get("center", quantizer.center)  # without one in files of earlier versions
        return quantizer


def centered(vectors: Tensor, center: Tensor) -> Tensor:
    """Subtract `center` (D,) or () from vectors (N, D), in float64; return float32."""
    return torch.cat([(block.double() - center).float() for block in vectors.split(ROWS)])


def nearest_codes(latents: Tensor, codebooks: Tensor) -> Tensor:
    """Encode latents (N, d) greedily with codebooks (levels, codes, d): long (N, levels)."""
    codes, residual = [], latents
    for codebook in codebooks:
        codes.append(torch.cdist(residual, codebook).argmin(1))
        residual = residual - codebook[codes[-1]]
    return torch.stack(codes, dim=1)


@dataclass(eq=False)
class ResidualKMeans(ResidualQuantizer):
    """Residual k-means (RQ-KMeans; QARM, arXiv 2411.11739): k-means on the vectors, then on the residuals, and so on.

    Adding a constant to all vectors does not change the codes, except for rounding.

    Args:
        num_levels, num_codes: length of an id, and codes per level.
        balanced: limit each code of a level to ceil(N / num_codes) of the N fitted vectors, so that tokens are used
            evenly (as in OneRec, arXiv 2502.18965) and fewer ids collide. Vectors encoded later get the nearest code.
        seed: seed of k-means.
    """

    balanced: bool = False
    seed: int = 0

    def fit_encode(self, vectors: Tensor | np.ndarray) -> Tensor:
        from sklearn.cluster import KMeans  # slow to import, and rarely needed

        vectors = self.check_vectors(vectors)
        self.center = vectors.mean(0, dtype=torch.float64)
        residual = centered(vectors, self.center)
        codebooks, codes = [], []
        for _ in range(self.num_levels):
            k_means = KMeans(self.num_codes, n_init=1, random_state=self.seed).fit(residual.numpy())
            centroids, labels = torch.from_numpy(k_means.cluster_centers_), torch.from_numpy(k_means.labels_).long()
            if self.balanced:
                centroids, labels = balance(residual, centroids)
            residual = residual - centroids[labels]
            codebooks.append(centroids)
            codes.append(labels)
        self.codebooks = torch.stack(codebooks)
        return torch.stack(codes, dim=1) if self.balanced else self.encode(vectors)


def balance(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Balance k-means clusters, so that each has at most ceil(N / codes) vectors and their mean as its centroid.

    Args:
        vectors: (N, D).
        centroids: (codes, D), the centroids of k-means.

    Returns:
        Centroids (codes, D), and the index of each vector's centroid, long (N,).
    """
    for _ in range(BALANCING_ROUNDS):
        labels = assign_within(torch.cdist(vectors, centroids), math.ceil(len(vectors) / len(centroids)))
        sums = torch.zeros_like(centroids).index_add_(0, labels, vectors)
        sizes = torch.bincount(labels, minlength=len(centroids))[:, None]
        centroids = torch.where(sizes > 0, sums / sizes.clamp(min=1), centroids)
    return centroids, labels


def assign_within(distances: Tensor, capacity: int) -> Tensor:
    """Assign each row of `distances` (N, codes) to its nearest code with less than `capacity` rows, long (N,).

    The assignment is greedy: rows with the largest gap between their nearest and second nearest code go first.
    """
    nearest = distances.topk(2, largest=False).values
    order = (nearest[:, 1] - nearest[:, 0]).argsort(descending=True, stable=True).tolist()
    choices = distances.argsort(dim=1, stable=True).numpy()
    room = np.full(distances.shape[1], capacity)
    labels = np.empty(len(distances), dtype=np.int64)
    for row in order:
        labels[row] = choices[row][np.argmax(room[choices[row]] > 0)]
        room[labels[row]] -= 1
    return torch.from_numpy(labels)
