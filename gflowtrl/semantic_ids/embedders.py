"""Text embedders."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gflowtrl.checks import COUNT, check_number


class Embedder(ABC):
    """Base class of text embedders: `fit(texts)` once, then `embed(texts) -> (len(texts), D)`, rows of norm 1.

    `from_state` restores a saved embedder from `config` (JSON) and `state()` (tensors). A text without known words has
    a vector of zeros.
    """

    config: dict[str, Any]

    def fit(self, texts: Sequence[str]) -> "Embedder":
        """Fit the embedder to the texts of the catalog; by default nothing is fitted."""
        return self

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as float32 `(len(texts), D)` on the CPU."""

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to save."""
        return {}

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Embedder":
        """Restore a saved embedder."""
        return cls(**config)


class TfidfEmbedder(Embedder):
    """Latent semantic analysis: TF-IDF with 1 + log(tf), reduced by a truncated SVD (Deerwester et al., 1990).

    It needs no download. Words that occur in only one text are ignored.

    Args:
        dim: maximum dimension of the vectors; it is always less than the number of texts and of words.
        seed: seed of the randomized SVD.
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
        """Learn the vocabulary, the word weights and the SVD, replacing those of an earlier fit.

        Raises:
            ValueError: if there are fewer than three texts, or fewer than three words that occur in two texts.
        """
        from sklearn.decomposition import TruncatedSVD  # slow to import, and rarely needed

        tfidf = _vectorizer()  # new, because a loaded one has a fixed vocabulary
        try:
            weights = tfidf.fit_transform(texts)
        except ValueError:  # the message of scikit-learn names settings that cannot be changed here
            weights = None
        if weights is None or min(weights.shape) < 3:
            raise ValueError(
                f"The {len(texts)} item texts share fewer than three words, too few to distinguish items. Give longer "
                "texts (the features of item_texts) or vectors."
            )
        svd = TruncatedSVD(min(self.dim, min(weights.shape) - 1), random_state=self.seed).fit(weights)
        self.tfidf, self.components = tfidf, torch.from_numpy(svd.components_).float()
        return self

    def embed(self, texts: Sequence[str]) -> Tensor:
        if self.components is None:
            raise RuntimeError("This TfidfEmbedder is not fitted yet. Call fit(texts) first.")
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


def _vectorizer() -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import, and rarely needed

    return TfidfVectorizer(min_df=2, sublinear_tf=True)


class SentenceTransformerEmbedder(Embedder):
    """Embed texts with a sentence-transformers model (Reimers and Gurevych, EMNLP 2019), which `fit` does not change.

    It needs `pip install gflowtrl[text]`. A saved `ItemTokenizer` contains the name of the model, not its weights.

    Args:
        name_or_folder: a folder, or a name on the Hugging Face Hub, from which the model is downloaded.

    Raises:
        ImportError: if sentence-transformers is not installed.
        FileNotFoundError: if the folder does not exist.
    """

    def __init__(self, name_or_folder: str | os.PathLike) -> None:
        name = os.fspath(name_or_folder)
        is_name = name.count("/") <= 1 and not name.startswith((".", "/", "~"))  # on the Hub: "model", "owner/model"
        if not is_name and not Path(name).is_dir():
            raise FileNotFoundError(f"There is no sentence-transformers model in {name}. Check the path.")
        try:
            library = import_module("sentence_transformers")
        except ImportError as error:
            raise ImportError(
                "SentenceTransformerEmbedder needs the package sentence-transformers: pip install gflowtrl[text]. "
                "TfidfEmbedder works without it."
            ) from error
        self.config = {"name_or_folder": name}
        self.model = library.SentenceTransformer(name, trust_remote_code=False)

    def embed(self, texts: Sequence[str]) -> Tensor:
        vectors = self.model.encode(list(texts), convert_to_tensor=True, normalize_embeddings=True)
        empty = torch.tensor([not text.strip() for text in texts])
        return vectors.float().cpu().masked_fill(empty[:, None], 0.0)
