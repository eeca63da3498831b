"""Semantic ids from item texts or item vectors."""

from .collisions import resolve_collisions
from .embedders import Embedder, SentenceTransformerEmbedder, TfidfEmbedder
from .quality import QualityReport, quality_report
from .residual import ResidualKMeans, ResidualQuantizer
from .rqvae import RQVAE
from .texts import item_texts
from .tokenizer import ItemTokenizer
from .vectors import combine_vectors, cooccurrence_vectors, load_vectors


__all__ = [
    "RQVAE",
    "Embedder",
    "ItemTokenizer",
    "QualityReport",
    "ResidualKMeans",
    "ResidualQuantizer",
    "SentenceTransformerEmbedder",
    "TfidfEmbedder",
    "combine_vectors",
    "cooccurrence_vectors",
    "item_texts",
    "load_vectors",
    "quality_report",
    "resolve_collisions",
]
