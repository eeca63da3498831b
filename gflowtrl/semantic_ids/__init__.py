"""Semantic ids from item texts or item vectors."""

from .collisions import resolve_collisions
from .embedders import Embedder, SentenceTransformerEmbedder, TfidfEmbedder
from .making import SemanticIdOptions, default_num_codes, make_item_tokenizer
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
    "SemanticIdOptions",
    "SentenceTransformerEmbedder",
    "TfidfEmbedder",
    "combine_vectors",
    "cooccurrence_vectors",
    "default_num_codes",
    "item_texts",
    "load_vectors",
    "make_item_tokenizer",
    "quality_report",
    "resolve_collisions",
]
