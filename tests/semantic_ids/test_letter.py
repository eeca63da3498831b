"""LETTER's losses: figures of the authors' code, and their effect on an RQ-VAE."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gflowtrl.data import leave_one_out
from gflowtrl.semantic_ids import (
    RQVAE,
    ItemTokenizer,
    ResidualKMeans,
    SemanticIdOptions,
    cooccurrence_vectors,
    item_texts,
    make_item_tokenizer,
)
from gflowtrl.semantic_ids.letter import alignment_loss, cluster_codes, diversity_loss, draw_positives


LATENTS = torch.tensor([[0.5, 1.0], [-1.0, 0.2], [0.3, -0.4]], dtype=torch.double)
COLLABORATIVE = torch.tensor([[1.0, 0.5], [-0.5, 0.4], [0.2, -1.0]], dtype=torch.double)
CODEBOOK = torch.tensor([[1.0, 0.0], [0.8, 0.3], [-0.5, 0.5], [-0.4, -0.6]], dtype=torch.double)
CLUSTERS, CODES = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2, 3])


def close(found, expected) -> bool:
    return torch.allclose(found, torch.tensor(expected, dtype=torch.double), rtol=0, atol=6e-7)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_alignment():
    latents = LATENTS.clone().requires_grad_()
    loss = alignment_loss(latents, COLLABORATIVE, torch.tensor([4, 0, 7]))
    assert close(loss, 0.565929)
    expected = [[-0.160809, -0.056457], [0.125638, -0.104531], [0.036105, 0.261449]]
    assert close(torch.autograd.grad(loss, latents)[0], expected)


def test_an_item_that_occurs_twice_in_a_batch_does_not_compete_with_itself():
    rows = torch.tensor([0, 1, 2, 1])
    loss = alignment_loss(LATENTS[rows], COLLABORATIVE[rows], rows)
    single = F.cross_entropy(LATENTS @ COLLABORATIVE.T, torch.arange(3), reduction="none")
    # An item without a copy sees the copies of others, as in a batch that is drawn with replacement.
    twice = (LATENTS @ COLLABORATIVE.T)[:, [0, 1, 2, 1]]
    seen = torch.stack([twice[0].logsumexp(0) - twice[0, 0], twice[2].logsumexp(0) - twice[2, 2]])
    assert torch.allclose(loss, (seen.sum() + 2 * single[1]) / 4)


def test_diversity():
    positives = draw_positives(CLUSTERS, CODES, generator())
    assert positives.tolist() == [1, 3, 2]  # the only other code of each cluster
    codebook = CODEBOOK.clone().requires_grad_()
    loss = diversity_loss(codebook, CODES, positives)
    assert close(loss, 0.754057)
    expected = [[-0.236705, -0.063181], [-0.215267, 0.001075], [0.395377, 0.272039], [0.438709, -0.170559]]
    assert close(torch.autograd.grad(loss, codebook)[0], expected)


def test_positives_are_other_codes_of_the_cluster_evenly():
    clusters, codes = torch.tensor([0, 1, 0, 0, 2]), torch.tensor([0] * 6000 + [1, 4])
    drawn = draw_positives(clusters, codes, generator())
    assert drawn[-2:].tolist() == [-1, -1]
    counts = torch.bincount(drawn[:-2], minlength=5)
    assert counts.tolist()[:2] == [0, 0] and counts[4] == 0 and abs(int(counts[2]) - 3000) < 200
    alone = diversity_loss(CODEBOOK, CODES, torch.tensor([1, -1, 2]))
    assert torch.allclose(alone, diversity_loss(CODEBOOK, CODES[[0, 2]], torch.tensor([1, 2])))
    assert diversity_loss(CODEBOOK, CODES, torch.full((3,), -1)) == 0


def test_clusters_of_codes():
    """Those of vectors that are far apart; no more clusters than codes."""
    codebook = torch.cat([torch.randn(5, 3, generator=generator()) + 100 * shift for shift in (-1, 0, 1)])
    clusters = cluster_codes(codebook, 3, seed=0).view(3, 5)
    assert (clusters == clusters[:, :1]).all() and clusters[:, 0].unique().numel() == 3
    assert cluster_codes(codebook, 40, seed=0).unique().numel() == 15


# --------------------------------------------------------------------------------------------------------- in training
def rqvae(**options) -> RQVAE:
    return RQVAE(**{"num_levels": 2, "num_codes": 8, "latent_dim": 4, "hidden_dims": (16,), "steps": 250} | options)


def test_alignment_brings_latents_to_their_collaborative_vectors(vectors):
    """Measured by the loss over all items. Collaborative vectors are a projection, which the encoder can learn."""
    collaborative = 2 * F.normalize(vectors @ torch.randn(vectors.shape[1], 4, generator=generator(3)), dim=1)
    losses = {}
    for weight in (0.0, 1.0):
        quantizer = rqvae(alignment=weight)
        codes = quantizer.fit_encode(vectors, collaborative if weight else None)
        losses[weight] = float(alignment_loss(quantizer.quantized(codes), collaborative, torch.arange(len(vectors))))
    assert losses[1.0] < losses[0.0] - 1, losses


def test_diversity_moves_codes_of_different_clusters_apart(vectors):
    found = {}
    for weight in (0.0, 1.0):
        quantizer = rqvae(diversity=weight, diversity_clusters=3)
        quantizer.fit(vectors)
        clusters = cluster_codes(quantizer.codebooks[0], 3, seed=0)
        codes = torch.arange(8).repeat(50)
        found[weight] = float(
            diversity_loss(quantizer.codebooks[0], codes, draw_positives(clusters, codes, generator()))
        )
    assert found[1.0] < found[0.0] - 0.1, found


def test_weights_of_zero_change_nothing_and_weights_are_saved(vectors):
    plain, zero = rqvae(steps=40), rqvae(steps=40, alignment=0.0, diversity=0.0)
    assert plain.fit_encode(vectors).equal(zero.fit_encode(vectors))
    both = rqvae(steps=40, alignment=0.1, diversity=0.1)
    codes = both.fit_encode(vectors, torch.randn(len(vectors), 4, generator=generator()))
    assert not codes.equal(plain.encode(vectors))
    again = RQVAE.from_state(both.config, both.state())
    assert again.encode(vectors).equal(codes) and again.alignment == 0.1


def test_collaborative_vectors_that_do_not_fit_are_errors(vectors):
    fitting = torch.randn(len(vectors), 4)
    with pytest.raises(ValueError, match="alignment is 0.5 and collaborative vectors are missing; give both"):
        rqvae(alignment=0.5).fit_encode(vectors)
    with pytest.raises(ValueError, match="alignment is 0.0 and collaborative vectors are given"):
        rqvae().fit_encode(vectors, fitting)
    with pytest.raises(ValueError, match="4"):
        rqvae(alignment=0.5).fit_encode(vectors, torch.randn(len(vectors), 5))
    with pytest.raises(ValueError, match="diversity is -1"):
        rqvae(diversity=-1)
    with pytest.raises(TypeError, match="collaborative vectors are for an RQVAE, not for ResidualKMeans"):
        ItemTokenizer(ResidualKMeans(2, 8)).fit(vectors, list(range(len(vectors))), fitting)


# ---------------------------------------------------------------------------------------------------------- by options
def test_ids_by_options(catalog, tmp_path, monkeypatch):
    """With co-occurrence vectors, and with a file whose dimension becomes that of the latents."""
    sequences = leave_one_out(catalog).train_sequences
    options = {"quantizer": "rqvae", "levels": 2, "codes": 16, "alignment": 0.5, "diversity": 0.1, "seed": 3}
    seen, fit = [], RQVAE.fit_encode

    def briefly(self, vectors, collaborative):
        self.steps = 20
        seen.append(collaborative)
        return fit(self, vectors, collaborative)

    monkeypatch.setattr(RQVAE, "fit_encode", briefly)
    made, _ = make_item_tokenizer(SemanticIdOptions(**options), catalog, sequences)
    assert torch.equal(seen[0], cooccurrence_vectors(sequences, catalog.items, 64, 3))
    assert made.quantizer.alignment == 0.5 and made.quantizer.diversity == 0.1
    file = tmp_path / "sasrec.npy"
    np.save(file, np.random.default_rng(0).normal(size=(len(catalog.items), 7)).astype(np.float32))
    chosen = SemanticIdOptions(**options, alignment_vectors=str(file), features=["title"])
    assert not chosen.uses_interactions
    made, vectors = make_item_tokenizer(chosen, catalog, ())
    assert made.quantizer.latent_dim == 7 and len(vectors) == len(item_texts(catalog))
    made.save_pretrained(tmp_path)
    assert ItemTokenizer.from_pretrained(tmp_path).semantic_ids == made.semantic_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alignment": 0.1}, "alignment is set, but quantizer is 'kmeans'. Use quantizer 'rqvae'"),
        ({"diversity": 0.1, "quantizer": "balanced"}, "diversity is set, but quantizer is 'balanced'"),
        ({"quantizer": "rqvae", "alignment": -1}, "alignment is -1; it must be"),
        ({"quantizer": "rqvae", "alignment_vectors": "a.npy"}, "alignment_vectors is set, but alignment is 0"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        SemanticIdOptions(**options)
