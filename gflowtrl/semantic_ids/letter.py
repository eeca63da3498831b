"""LETTER's losses for an RQ-VAE: alignment with collaborative vectors, and diversity of the codes.

References:
    Wang et al., Learnable item tokenization for generative recommendation (LETTER), CIKM 2024, arXiv 2405.07314.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def alignment_loss(latents: Tensor, collaborative: Tensor, rows: Tensor) -> Tensor:
    """Cross entropy of each quantized latent with its item's collaborative vector among those of the batch.

    Logits are plain inner products. Through the straight-through gradient, the loss trains the encoder only.

    Args:
        latents: `(B, d)` quantized latents.
        collaborative: `(B, d)` vectors of the same items, without gradient.
        rows: `(B,)` the items. Another occurrence of the same item in the batch does not count as a different one.

    Returns:
        Scalar, in nats.
    """
    logits = latents @ collaborative.T
    itself = torch.eye(len(rows), dtype=torch.bool)
    logits = logits.masked_fill((rows[:, None] == rows) & ~itself, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(rows)))


def cluster_codes(codebook: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Cluster the vectors of a codebook `(codes, d)` by k-means: long `(codes,)`.

    LETTER limits the sizes of clusters (constrained k-means); here they are free.
    """
    from sklearn.cluster import KMeans  # slow to import, and rarely needed

    k_means = KMeans(min(num_clusters, len(codebook)), n_init=1, random_state=seed)
    return torch.from_numpy(k_means.fit(codebook.detach().numpy()).labels_).long()


def draw_positives(clusters: Tensor, codes: Tensor, generator: torch.Generator) -> Tensor:
    """Draw another code of the same cluster, uniformly, for each code of a batch.

    Args:
        clusters: `(number of codes,)` the cluster of each code.
        codes: `(B,)`.
        generator: source of randomness.

    Returns:
        Long `(B,)`, -1 for a code that is alone in its cluster.
    """
    others = (clusters[codes][:, None] == clusters) & (codes[:, None] != torch.arange(len(clusters)))
    alone = ~others.any(1)
    drawn = torch.multinomial((others | alone[:, None]).float(), 1, generator=generator)[:, 0]
    return drawn.masked_fill(alone, -1)


def diversity_loss(codebook: Tensor, codes: Tensor, positives: Tensor) -> Tensor:
    """Cross entropy of a code with another one of its cluster, among all other codes of the level.

    It pulls the codes of a cluster together and pushes those of different clusters apart. Logits are inner products,
    and both factors have a gradient.

    Args:
        codebook: `(number of codes, d)` of one level.
        codes: `(B,)` the codes of a batch at this level.
        positives: `(B,)` (`draw_positives`); rows with -1 do not count.

    Returns:
        Scalar, in nats; 0 if no row counts.
    """
    kept = positives >= 0
    codes, positives = codes[kept], positives[kept]
    logits = (codebook[codes] @ codebook.T).scatter(1, codes[:, None], -torch.inf)
    return F.cross_entropy(logits, positives, reduction="sum") / max(len(codes), 1)
