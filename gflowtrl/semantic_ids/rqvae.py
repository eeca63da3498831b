"""The residual-quantized autoencoder of TIGER."""

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

from .residual import ResidualKMeans, ResidualQuantizer, centered, nearest_codes
from .vectors import as_vectors


REVIVE_EVERY = 100  # steps


class Quantized(NamedTuple):
    """What `quantize` returns: codes long (B, levels), latents (B, d) with the straight-through gradient, loss ()."""

    codes: Tensor
    latents: Tensor
    loss: Tensor


def quantize(latents: Tensor, codebooks: Tensor, commitment: float) -> Quantized:
    """The quantizer's step (TIGER, arXiv 2305.05065, section 3.1; straight-through: VQ-VAE, arXiv 1711.00937).

    With residuals r_1 = z and r_{l+1} = r_l - e_l, e_l the centroid nearest to r_l, the loss is the sum over levels of
    |sg[r_l] - e_l|^2 + commitment * |r_l - sg[e_l]|^2, averaged over rows and columns. The quantized latents are the
    sum of the e_l; their gradient goes to z unchanged.
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
    """Puts codes that nobody uses where residuals are: in place, `used` is bool (levels, codes). Returns how many."""
    residual = latents
    for codebook, alive in zip(codebooks, used, strict=True):
        dead = (~alive).nonzero().flatten()
        chosen = torch.randint(len(residual), (len(dead),), generator=generator)
        nearest = nearest_codes(residual, codebook[None]).flatten()  # of the codes as they were
        replaced = codebook.clone()
        replaced[dead] = residual[chosen]
        residual = residual - codebook[nearest]
        codebook.copy_(replaced)
    return int((~used).sum())


@dataclass(eq=False)
class RQVAE(ResidualQuantizer):
    """RQ-VAE (Lee et al., CVPR 2022; TIGER, arXiv 2305.05065): an autoencoder whose bottleneck is semantic ids.

    An MLP brings vectors to a small latent space, where they are quantized by residuals, and a mirrored MLP
    reconstructs them; encoder, decoder and codebooks are trained together by AdamW on the mean squared error of the
    reconstruction plus the loss of `quantize`. Codebooks begin as k-means of the encoded vectors. Every 100 steps the
    codes that were not used meanwhile are re-seeded with residuals of the batch, until a quarter of the steps is left.

    Args:
        num_levels, num_codes: length of an id, and codes a level.
        latent_dim: columns of the latent space.
        hidden_dims: widths of the encoder's layers; the decoder's are these in reverse.
        steps, batch_size, learning_rate: of the training.
        commitment: weight of the commitment loss, TIGER's beta.
        seed: of weights, batches, k-means and re-seeding.
    """

    latent_dim: int = 64
    hidden_dims: Sequence[int] = (256,)
    steps: int = 4000
    batch_size: int = 256
    learning_rate: float = 2e-3
    commitment: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("latent_dim", "steps", "batch_size"):
            check_number(name, getattr(self, name), COUNT)
        check_number("learning_rate", self.learning_rate, POSITIVE)
        check_number("commitment", self.commitment, NOT_NEGATIVE)
        self.network: nn.ModuleDict | None = None
        self.scale = torch.ones(())

    def fit_encode(self, vectors: Tensor | np.ndarray) -> Tensor:
        vectors = self.check_vectors(vectors)
        self.center = vectors.mean(0, dtype=torch.float64)
        around = centered(vectors, self.center)
        self.scale = around.square().mean().sqrt().clamp(min=1e-12)
        generator = torch.Generator().manual_seed(self.seed)
        self._build(vectors.shape[1])
        inputs = around / self.scale
        first = ResidualKMeans(self.num_levels, self.num_codes, seed=self.seed)
        with torch.no_grad():
            first.fit(self.network["encoder"](inputs))
        self.codebooks = first.codebooks
        self.codebooks[0] += first.center  # the encoder's latents are quantized as they are
        self._train(inputs, generator)
        return self.encode(vectors)

    def _build(self, dim: int) -> None:
        widths = [dim, *self.hidden_dims, self.latent_dim]
        with torch.random.fork_rng(devices=[]):  # layers are drawn from torch's own generator
            torch.manual_seed(self.seed)
            self.network = nn.ModuleDict({"encoder": _mlp(widths), "decoder": _mlp(widths[::-1])})

    def _train(self, inputs: Tensor, generator: torch.Generator) -> None:
        codebooks = nn.Parameter(self.codebooks)
        optimizer = torch.optim.AdamW([*self.network.parameters(), codebooks], lr=self.learning_rate)
        used = torch.zeros(codebooks.shape[:2], dtype=torch.bool)
        progress = trange(1, self.steps + 1, desc="RQ-VAE", leave=False)
        for step in progress:
            batch = inputs[torch.randint(len(inputs), (self.batch_size,), generator=generator)]
            latents = self.network["encoder"](batch)
            quantized = quantize(latents, codebooks, self.commitment)
            error = F.mse_loss(self.network["decoder"](quantized.latents), batch)
            optimizer.zero_grad()
            (error + quantized.loss).backward()
            optimizer.step()
            used[torch.arange(self.num_levels), quantized.codes] = True
            if step % REVIVE_EVERY == 0:
                progress.set_postfix(error=f"{error.item():.4f}", dead=int((~used).sum()))
                if step < self.steps * 3 // 4:
                    revive_dead_codes(codebooks.data, latents.detach(), used, generator)
                used.zero_()
        self.codebooks = codebooks.detach()
        self.network.requires_grad_(False).eval()

    @torch.no_grad()
    def latents(self, vectors: Tensor | np.ndarray) -> Tensor:
        self.check_fitted()
        vectors = as_vectors(vectors, dim=len(self.center))
        return self.network["encoder"](centered(vectors, self.center) / self.scale)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        return (self.network["decoder"](self.quantized(codes)) * self.scale + self.center).float()

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "center": self.center, "scale": self.scale, **self.network.state_dict()}

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
