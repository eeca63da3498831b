"""The residual-quantized variational autoencoder (RQ-VAE) of TIGER."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import trange

from gflowtrl.checks import COUNT, NOT_NEGATIVE, POSITIVE, check_number

from .letter import alignment_loss, cluster_codes, diversity_loss, draw_positives
from .residual import ResidualKMeans, ResidualQuantizer, centered, nearest_codes
from .vectors import as_vectors


REVIVE_EVERY = 100  # steps


class Quantized(NamedTuple):
    """Result of `quantize`: codes, long (B, levels), latents (B, d) with straight-through gradient, and loss ()."""

    codes: Tensor
    latents: Tensor
    loss: Tensor


def quantize(latents: Tensor, codebooks: Tensor, commitment: float) -> Quantized:
    """Quantize latents (TIGER, arXiv 2305.05065, section 3.1; straight-through: VQ-VAE, arXiv 1711.00937).

    With residuals r_1 = z and r_{l+1} = r_l - e_l, where e_l is the centroid nearest to r_l, the loss is the sum over
    levels of |sg[r_l] - e_l|^2 + commitment * |r_l - sg[e_l]|^2, averaged over rows and columns. The quantized latents
    are the sum of the e_l; their gradient passes to z unchanged.
    """
    codes = nearest_codes(latents.detach(), codebooks.detach())
    residual, loss = latents, latents.new_zeros(())
    for level, codebook in enumerate(codebooks):
        chosen = codebook[codes[:, level]]
        loss = loss + F.mse_loss(chosen, residual.detach()) + commitment * F.mse_loss(residual, chosen.detach())
        residual = residual - chosen.detach()
    return Quantized(codes, latents - residual.detach(), loss)


@torch.no_grad()
def revive_dead_codes(codebooks: Tensor, latents: Tensor, used: Tensor, generator: torch.Generator) -> int:
    """Replace unused codes by random residuals, in place; return their number. `used` is bool (levels, codes)."""
    residual = latents
    for codebook, alive in zip(codebooks, used, strict=True):
        dead = (~alive).nonzero().flatten()
        chosen = torch.randint(len(residual), (len(dead),), generator=generator)
        nearest = nearest_codes(residual, codebook[None]).flatten()  # by the codes before replacement
        replaced = codebook.clone()
        replaced[dead] = residual[chosen]
        residual = residual - codebook[nearest]
        codebook.copy_(replaced)
    return int((~used).sum())


@dataclass(eq=False)
class RQVAE(ResidualQuantizer):
    """RQ-VAE (Lee et al., CVPR 2022; TIGER, arXiv 2305.05065): an autoencoder with semantic ids as its bottleneck.

    An MLP maps vectors to a small latent space, where they are quantized by residuals, and a mirrored MLP reconstructs
    them. Encoder, decoder and codebooks are trained together with AdamW on the mean squared error of the
    reconstruction plus the loss of `quantize`. Codebooks are initialized by k-means on the encoded vectors. During the
    first three quarters of the training, every 100 steps, codes that were not used since the last time are replaced by
    residuals of the batch.

    With `alignment` and `diversity` it has the losses of LETTER (arXiv 2405.07314), which are added to the others:
    alignment * `alignment_loss` + diversity * the mean over levels of `diversity_loss`. The clusters of the codes are
    computed again every 100 steps. LETTER's script uses 0.01 and 1e-4, vectors of a SASRec, and the mean over levels
    of the loss of `quantize`, which here is a sum.

    Args:
        num_levels, num_codes: length of an id, and codes per level.
        latent_dim: dimension of the latent space.
        hidden_dims: widths of the encoder's hidden layers; the decoder has the same in reverse.
        steps, batch_size, learning_rate: training hyperparameters.
        commitment: weight of the commitment loss, beta in TIGER.
        seed: seed of weights, batches, k-means and code replacement.
        alignment: weight of the alignment with collaborative vectors, which `fit_encode` then needs.
        diversity: weight of the diversity of codes.
        diversity_clusters: clusters of the codes of a level.
    """

    latent_dim: int = 64
    hidden_dims: Sequence[int] = (256,)
    steps: int = 4000
    batch_size: int = 256
    learning_rate: float = 2e-3
    commitment: float = 0.25
    seed: int = 0
    alignment: float = 0.0
    diversity: float = 0.0
    diversity_clusters: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("latent_dim", "steps", "batch_size", "diversity_clusters"):
            check_number(name, getattr(self, name), COUNT)
        check_number("learning_rate", self.learning_rate, POSITIVE)
        for name in ("commitment", "alignment", "diversity"):
            check_number(name, getattr(self, name), NOT_NEGATIVE)
        self.network: nn.ModuleDict | None = None
        self.scale = torch.ones(())

    def fit_encode(self, vectors: Tensor | np.ndarray, collaborative: Tensor | np.ndarray | None = None) -> Tensor:
        """Learn encoder, decoder and codebooks from `vectors` (N, D) and return the codes, long (N, num_levels).

        Args:
            vectors: the vectors.
            collaborative: `(N, latent_dim)` vectors of the same items from interactions, if `alignment` is above 0.

        Raises:
            ValueError: for fewer vectors than codes, NaN or infinity; collaborative vectors are missing, have another
                shape, or have no effect.
        """
        vectors = self.check_vectors(vectors)
        if (collaborative is None) != (self.alignment == 0):
            given = "missing" if collaborative is None else "given"
            raise ValueError(
                f"alignment is {self.alignment} and collaborative vectors are {given}; give both, or leave both out."
            )
        if collaborative is not None:
            collaborative = as_vectors(collaborative, dim=self.latent_dim, rows=len(vectors))
        self.center = vectors.mean(0, dtype=torch.float64)
        inputs = centered(vectors, self.center)
        self.scale = inputs.square().mean().sqrt().clamp(min=1e-12)
        inputs = inputs / self.scale
        self._build(vectors.shape[1])
        k_means = ResidualKMeans(self.num_levels, self.num_codes, seed=self.seed)
        with torch.no_grad():
            k_means.fit(self.network["encoder"](inputs))
        self.codebooks = k_means.codebooks
        self.codebooks[0] += k_means.center  # the latents of the encoder are quantized without centering
        self._train(inputs, collaborative)
        return self.encode(vectors)

    def _build(self, dim: int) -> None:
        widths = [dim, *self.hidden_dims, self.latent_dim]
        with torch.random.fork_rng(devices=[]):  # layers are initialized with the global generator
            torch.manual_seed(self.seed)
            self.network = nn.ModuleDict({"encoder": _mlp(widths), "decoder": _mlp(widths[::-1])})

    def _train(self, inputs: Tensor, collaborative: Tensor | None) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        codebooks = nn.Parameter(self.codebooks)
        optimizer = torch.optim.AdamW([*self.network.parameters(), codebooks], lr=self.learning_rate)
        used = torch.zeros(codebooks.shape[:2], dtype=torch.bool)
        clusters: list[Tensor] = []
        progress = trange(1, self.steps + 1, desc="RQ-VAE", leave=False)
        for step in progress:
            rows = torch.randint(len(inputs), (self.batch_size,), generator=generator)
            batch = inputs[rows]
            latents = self.network["encoder"](batch)
            quantized = quantize(latents, codebooks, self.commitment)
            error = F.mse_loss(self.network["decoder"](quantized.latents), batch)
            loss = error + quantized.loss
            if collaborative is not None:
                loss = loss + self.alignment * alignment_loss(quantized.latents, collaborative[rows], rows)
            if self.diversity:
                if step % REVIVE_EVERY == 1:
                    clusters = [cluster_codes(level, self.diversity_clusters, self.seed) for level in codebooks]
                loss = loss + self.diversity * self._diversity_loss(codebooks, quantized.codes, clusters, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            used[torch.arange(self.num_levels), quantized.codes] = True
            if step % REVIVE_EVERY == 0:
                progress.set_postfix(error=f"{error.item():.4f}", dead=int((~used).sum()))
                if step < self.steps * 3 // 4:
                    revive_dead_codes(codebooks.data, latents.detach(), used, generator)
                used.zero_()
        self.codebooks = codebooks.detach()
        self.network.requires_grad_(False).eval()

    def _diversity_loss(
        self, codebooks: Tensor, codes: Tensor, clusters: list[Tensor], generator: torch.Generator
    ) -> Tensor:
        """Return the mean of `diversity_loss` over the levels."""
        losses = [
            diversity_loss(codebook, column, draw_positives(of_level, column, generator))
            for codebook, column, of_level in zip(codebooks, codes.T, clusters, strict=True)
        ]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def latents(self, vectors: Tensor | np.ndarray) -> Tensor:
        self.check_fitted()
        vectors = as_vectors(vectors, dim=len(self.center))
        return self.network["encoder"](centered(vectors, self.center) / self.scale)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        return (self.network["decoder"](self.quantized(codes)) * self.scale + self.center).float()

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "scale": self.scale, **self.network.state_dict()}

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "RQVAE":
        quantizer = cls(**config)
        weights = dict(tensors)
        for name in ("codebooks", "center", "scale"):
            setattr(quantizer, name, weights.pop(name))
        quantizer._build(len(quantizer.center))
        quantizer.network.load_state_dict(weights)
        quantizer.network.requires_grad_(False)
        return quantizer


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
