"""`gflowtrl tokenize`: semantic ids for the items of a data folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .common import guarded, make_parser, parse, print_json


IDS_FILE = "semantic_ids.json"


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = make_parser("tokenize", "Gives the items of a data folder semantic ids (docs/semantic_ids.md).")
    parser.add_argument("--data_dir", help="the data folder; its semantic_ids.json is written")
    parser.add_argument(
        "--tokenizer", help="folder for the item tokenizer; by default item_tokenizer in the data folder"
    )
    parser.add_argument(
        "--features",
        nargs="+",
        help="what makes an item's text; title, brand, categories, attributes and description if not given",
    )
    parser.add_argument(
        "--embedder", default="tfidf", help="tfidf, or a sentence-transformers model by name or folder"
    )
    parser.add_argument("--vectors", metavar="FILE", help=".npy or .safetensors with a vector an item, in their order")
    parser.add_argument(
        "--collaborative", type=float, default=0.0, metavar="SHARE", help="share of co-occurrence vectors, 0 to 1"
    )
    parser.add_argument("--quantizer", choices=["kmeans", "balanced", "rqvae"], default="kmeans", help="to codes")
    parser.add_argument("--levels", type=int, default=3, help="tokens an id")
    parser.add_argument(
        "--codes", type=int, help="tokens a level; 256 if not given, fewer where there are fewer than 1,024 items"
    )
    parser.add_argument("--collisions", default="reassign", help="reassign, level (one more level) or keep")
    parser.add_argument("--seed", type=int, default=0, help="of clustering and training")
    parser.add_argument("--add", action="store_true", help="keep the ids that are there, give new items theirs")
    parser.add_argument("--overwrite", action="store_true", help="replace the ids that are there")
    return guarded(lambda: _tokenize(parse(parser, arguments)))


def _tokenize(given: argparse.Namespace) -> None:
    if given.data_dir is None:
        raise ValueError("--data_dir is missing.")
    from gflowtrl.data import read_interactions
    from gflowtrl.semantic_ids import ItemTokenizer, load_vectors, quality_report

    ids_file = Path(given.data_dir, IDS_FILE)
    folder = Path(given.tokenizer or Path(given.data_dir, "item_tokenizer"))
    if given.add:
        tokenizer = ItemTokenizer.from_pretrained(folder)
        # Ids of the old items only are there, which a reader of the folder would refuse.
        data = read_interactions(given.data_dir, with_ids=False)
        known = set(tokenizer.items)
        new = [item for item in data.items if item not in known]
        if given.vectors is not None:
            vectors = load_vectors(given.vectors, data.items)
            tokenizer.add(vectors[[place for place, item in enumerate(data.items) if item not in known]], new)
        else:
            tokenizer.add(data)
        tokenizer.save_pretrained(folder)
        _write(ids_file, tokenizer)
        _say(given, {"new_items": len(new)}, f"{len(new)} new items have ids; those of the others have not changed.")
        return
    if ids_file.is_file() and not given.overwrite:
        raise ValueError(f"{ids_file} is there. Use --add to give new items ids, or --overwrite to replace them all.")
    data = read_interactions(given.data_dir, with_ids=False)
    tokenizer, vectors = _fitted(given, data)
    report = quality_report(tokenizer, vectors)
    tokenizer.save_pretrained(folder)
    _write(ids_file, tokenizer)
    _say(given, report.as_dict(), f"{report}\n\nIds in {ids_file}; the tokenizer, for new items, in {folder}.")


def usual_codes(num_items: int) -> int:
    """Codes a level: the field's 256, or the largest power of two by which there are four items a code."""
    return min(256, max(2, 2 ** ((num_items // 4).bit_length() - 1)))


def _fitted(given: argparse.Namespace, data: Any) -> tuple[Any, Any]:
    """The tokenizer and the vectors that it was fitted on."""
    from gflowtrl.semantic_ids import RQVAE, ItemTokenizer, ResidualKMeans, item_texts

    codes = usual_codes(len(data.items)) if given.codes is None else given.codes
    if given.quantizer == "rqvae":
        quantizer = RQVAE(given.levels, codes, seed=given.seed)
    else:
        quantizer = ResidualKMeans(given.levels, codes, balanced=given.quantizer == "balanced", seed=given.seed)
    if given.vectors is not None or given.collaborative:
        vectors = _vectors(given, data)
        return ItemTokenizer(quantizer, collisions=given.collisions).fit(vectors, data.items), vectors
    embedder = _embedder(given)
    texts = item_texts(data, **_features(given))
    tokenizer = ItemTokenizer(quantizer, embedder, given.collisions).fit(texts, data.items)
    return tokenizer, embedder.embed(texts)


def _vectors(given: argparse.Namespace, data: Any) -> Any:
    from gflowtrl.data import leave_one_out
    from gflowtrl.semantic_ids import combine_vectors, cooccurrence_vectors, item_texts, load_vectors

    if not 0 <= given.collaborative <= 1:
        raise ValueError(f"--collaborative is {given.collaborative}; it is a share from 0 to 1.")
    collaborative = text = None
    if given.collaborative:
        collaborative = cooccurrence_vectors(leave_one_out(data).train_sequences, data.items, seed=given.seed)
    if given.vectors is not None:
        text = load_vectors(given.vectors, data.items)
    elif given.collaborative < 1:
        texts = item_texts(data, **_features(given))
        text = _embedder(given).fit(texts).embed(texts)
    if text is None or collaborative is None:
        return collaborative if text is None else text
    return combine_vectors(text, collaborative, given.collaborative)


def _embedder(given: argparse.Namespace) -> Any:
    from gflowtrl.semantic_ids import SentenceTransformerEmbedder, TfidfEmbedder

    return TfidfEmbedder(seed=given.seed) if given.embedder == "tfidf" else SentenceTransformerEmbedder(given.embedder)


def _features(given: argparse.Namespace) -> dict[str, Any]:
    return {} if given.features is None else {"features": given.features}


def _write(file: Path, tokenizer: Any) -> None:
    from gflowtrl.catalog.files import write_text

    write_text(file, json.dumps({str(item): ids for item, ids in tokenizer.semantic_ids.items()}) + "\n")


def _say(given: argparse.Namespace, content: dict[str, Any], text: str) -> None:
    if given.json:
        print_json(content)
    else:
        print(text)
