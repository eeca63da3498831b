"""Residual quantization: what every quantizer shares, and residual k-means."""

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


ROWS = 65_536  # encoded at a time: a block of distances to 256 codes is 64 MiB
BALANCING_ROUNDS = 3  # the first is a fifth worse in error than the third on Amazon Beauty, further ones gain little


@dataclass(eq=False)
class ResidualQuantizer(ABC):
    """Writes a vector as one code a level: each level's code is the nearest to what the levels before it left over.

    Attributes:
        num_levels, num_codes: length of an id, and codes a level.
        codebooks: `(num_levels, num_codes, latent dim)` once fitted, else `None`.
        center: float64 `(D,)`, the mean of the vectors it was fitted on. It is taken off every vector first: distances
            far from the origin are mostly rounding (hidden states of language models lie there).
        config: the constructor's arguments.
    """

    num_levels: int = 3
    num_codes: int = 256

    def __post_init__(self) -> None:
        self.codebooks: Tensor | None = None
        self.center = torch.zeros((), dtype=torch.float64)
        if not 1 <= self.num_levels <= 25:
            raise ValueError(f"num_levels must be 1 to 25 (levels are named by letters), not {self.num_levels}.")
        check_number("num_codes", self.num_codes, at_least(2))

    @property
    def config(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @abstractmethod
    def fit_encode(self, vectors: Tensor | np.ndarray) -> Tensor:
        """Learns the codebooks from `vectors` (N, D) and returns the codes of these vectors, long (N, num_levels)."""

    def fit(self, vectors: Tensor | np.ndarray) -> "ResidualQuantizer":
        """Learns the codebooks from `vectors` (N, D).

        Raises:
            ValueError: for fewer vectors than codes, NaN or infinity.
        """
        self.fit_encode(vectors)
        return self

    def latents(self, vectors: Tensor | np.ndarray) -> Tensor:
        """Vectors (N, D) to the space of the codebooks, (N, latent dim); by default the vectors around their mean."""
        self.check_fitted()
        return centered(as_vectors(vectors, dim=self.codebooks.shape[2]), self.center)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (N, num_levels) to vectors (N, D), float32."""
        return (self.quantized(codes) + self.center).float()

    @torch.no_grad()
    def encode(self, vectors: Tensor | np.ndarray) -> Tensor:
        """Vectors (N, D) to codes, long (N, num_levels); any vector of the right width, new items too."""
        return torch.cat([nearest_codes(block, self.codebooks) for block in self.latents(vectors).split(ROWS)])

    def quantized(self, codes: Tensor) -> Tensor:
        """The sum of the codes' centroids: (N, levels) -> (N, latent dim). Fewer levels than all are a prefix."""
        self.check_fitted()
        return sum((self.codebooks[level, codes[:, level]] for level in range(codes.shape[1])), torch.zeros(()))

    def check_fitted(self) -> None:
        if self.codebooks is None:
            raise RuntimeError(f"This {type(self).__name__} has no codebooks yet. Call fit(vectors) first.")

    def check_vectors(self, vectors: Tensor | np.ndarray) -> Tensor:
        """Vectors to fit on, as a tensor; too few of them are an error."""
        vectors = as_vectors(vectors)
        if len(vectors) < self.num_codes:
            raise ValueError(
                f"{len(vectors)} vectors cannot be grouped into {self.num_codes} codes a level. Choose num_codes "
                "(--codes) well below the number of items, and more levels instead."
            )
        return vectors

    def state(self) -> dict[str, Tensor]:
        """The tensors to save; `from_state(config, tensors)` makes the quantizer again."""
        self.check_fitted()
        return {"codebooks": self.codebooks, "center": self.center}

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "ResidualQuantizer":
        quantizer = cls(**config)
        quantizer.codebooks = tensors["codebooks"]
        quantizer.center = tensors.get("center", quantizer.center)  # saved before vectors were centered: the origin
        return quantizer


def centered(vectors: Tensor, center: Tensor) -> Tensor:
    """Vectors (N, D) minus `center` (D,) or (), computed in float64 and returned in float32."""
    return torch.cat([(block.double() - center).float() for block in vectors.split(ROWS)])


def nearest_codes(latents: Tensor, codebooks: Tensor) -> Tensor:
    """Greedy residual codes of (N, d) under codebooks (levels, codes, d): long (N, levels)."""
    codes, residual = [], latents
    for codebook in codebooks:
        codes.append(torch.cdist(residual, codebook).argmin(1))
        residual = residual - codebook[codes[-1]]
    return torch.stack(codes, dim=1)


@dataclass(eq=False)
class ResidualKMeans(ResidualQuantizer):
    """Residual k-means (RQ-KMeans; QARM, arXiv 2411.11739): k-means on the vectors, then on what is left over, ...

    Codes do not depend on where the vectors lie: a constant added to all of them changes nothing but their rounding.

    Args:
        num_levels, num_codes: length of an id, and codes a level.
        balanced: no code of a level has more than ceil(N / num_codes) of the vectors it is fitted on, so that the
            tokens are used evenly (as in OneRec, arXiv 2502.18965) and fewer ids collide. Vectors encoded later take
            the nearest code.
        seed: of k-means.
    """

    balanced: bool = False
    seed: int = 0

    def fit_encode(self, vectors: Tensor | np.ndarray) -> Tensor:
        from sklearn.cluster import KMeans  # slow to import, and rarely needed

        fitted_on = self.check_vectors(vectors)
        self.center = fitted_on.mean(0, dtype=torch.float64)
        residual = centered(fitted_on, self.center)
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
        return torch.stack(codes, dim=1) if self.balanced else self.encode(fitted_on)


def balance(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Clusters of at most ceil(N / codes) vectors: assigned within this limit, each centroid the mean of its own.

    Args:
        vectors: (N, D).
        centroids: (codes, D), of k-means.

    Returns:
        Centroids (codes, D), and which of them each vector has, long (N,).
    """
    for _ in range(BALANCING_ROUNDS):
        labels = assign_within(torch.cdist(vectors, centroids), math.ceil(len(vectors) / len(centroids)))
        sums = torch.zeros_like(centroids).index_add_(0, labels, vectors)
        sizes = torch.bincount(labels, minlength=len(centroids))[:, None]
        centroids = torch.where(sizes > 0, sums / sizes.clamp(min=1), centroids)
    return centroids, labels


def assign_within(distances: Tensor, capacity: int) -> Tensor:
    """The nearest code with room for each row of `distances` (N, codes): long (N,), a code at most `capacity` times.

    Greedy: those choose first that lose most by their second choice.
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
