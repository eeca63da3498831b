"""Texts to vectors."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gflowtrl.checks import COUNT, check_number


if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer


class Embedder(ABC):
    """Makes a vector of each text: `fit(texts)` once, then `embed(texts) -> (len(texts), D)`, rows of length 1.

    `config` (JSON) and `state()` (tensors) are what a saved one is made again of. A text that says nothing to the
    embedder has a vector of zeros.
    """

    config: dict[str, Any]

    def fit(self, texts: Sequence[str]) -> "Embedder":
        """Learns what is to be learned from the catalog's texts, if anything."""
        return self

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Texts to float32 `(len(texts), D)` on the CPU."""

    def state(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Embedder":
        return cls(**config)


class TfidfEmbedder(Embedder):
    """Latent semantic analysis: TF-IDF with 1 + log(tf), reduced by a truncated SVD (Deerwester et al., 1990).

    Needs no download. Words are counted that stand in at least two texts.

    Args:
        dim: columns of the vectors, at most: there are never as many as texts or words.
        seed: of the randomized SVD.
    """

    def __init__(self, dim: int = 256, seed: int = 0) -> None:
        check_number("dim", dim, COUNT)
        self.dim, self.seed = dim, seed
        self.components: Tensor | None = None
        self.tfidf = _vectorizer()

    @property
    def config(self) -> dict[str, Any]:
        words = sorted(self.tfidf.vocabulary_, key=self.tfidf.vocabulary_.get) if self.components is not None else []
        return {"dim": self.dim, "seed": self.seed, "words": words}

    def fit(self, texts: Sequence[str]) -> "TfidfEmbedder":
        """Learns the words, their weights and the SVD; those of an earlier fit are forgotten.

        Raises:
            ValueError: if fewer than three texts or two words are there to tell items apart.
        """
        from sklearn.decomposition import TruncatedSVD  # slow to import, and rarely needed

        tfidf = _vectorizer()  # a loaded one would keep to the words that it has
        try:
            weights = tfidf.fit_transform(texts)
        except ValueError:  # scikit-learn's message speaks of settings that one cannot change here
            weights = None
        if weights is None or min(weights.shape) < 3:
            raise ValueError(
                f"The {len(texts)} item texts share fewer than three words, too few to tell items apart. Give longer "
                "texts (the features of item_texts) or vectors."
            )
        svd = TruncatedSVD(min(self.dim, min(weights.shape) - 1), random_state=self.seed).fit(weights)
        self.tfidf, self.components = tfidf, torch.from_numpy(svd.components_).float()
        return self

    def embed(self, texts: Sequence[str]) -> Tensor:
        if self.components is None:
            raise RuntimeError("This TfidfEmbedder knows no words yet. Call fit(texts) first.")
        return F.normalize(torch.from_numpy(self.tfidf.transform(texts) @ self.components.T.double().numpy()).float())

    def state(self) -> dict[str, Tensor]:
        return {"idf": torch.from_numpy(self.tfidf.idf_), "components": self.components}

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "TfidfEmbedder":
        embedder = cls(config["dim"], config["seed"])
        embedder.tfidf.set_params(vocabulary=config["words"])
        embedder.tfidf.idf_ = tensors["idf"].numpy()
        embedder.components = tensors["components"]
        return embedder


def _vectorizer() -> "TfidfVectorizer":
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(min_df=2, sublinear_tf=True)


class SentenceTransformerEmbedder(Embedder):
    """Vectors of any sentence-transformers model (Reimers and Gurevych, EMNLP 2019), unchanged by `fit`.

    Needs `pip install gflowtrl[text]`. A saved tokenizer keeps the name, not the weights.

    Args:
        name_or_folder: a folder, or a name on the Hugging Face hub, from which it is then downloaded.

    Raises:
        ImportError: if sentence-transformers is not installed.
        FileNotFoundError: if a folder is named that is not there.
    """

    def __init__(self, name_or_folder: str | os.PathLike) -> None:
        name = os.fspath(name_or_folder)
        is_name = name.count("/") <= 1 and not name.startswith((".", "/", "~"))  # as the hub's: "model", "owner/model"
        if not is_name and not Path(name).is_dir():
            raise FileNotFoundError(f"There is no sentence-transformers model in {name}.")
        try:
            library = import_module("sentence_transformers")
        except ImportError as error:
            raise ImportError(
                "SentenceTransformerEmbedder needs the package sentence-transformers: pip install gflowtrl[text]. "
                "TfidfEmbedder needs nothing."
            ) from error
        self.config = {"name_or_folder": name}
        self.model = library.SentenceTransformer(name, trust_remote_code=False)

    def embed(self, texts: Sequence[str]) -> Tensor:
        vectors = self.model.encode(list(texts), convert_to_tensor=True, normalize_embeddings=True)
        silent = torch.tensor([not text.strip() for text in texts])
        return vectors.float().cpu().masked_fill(silent[:, None], 0.0)
