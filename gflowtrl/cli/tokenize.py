"""`gflowtrl tokenize`: semantic ids for the items of a data folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .common import guarded, make_parser, parse, show


IDS_FILE = "semantic_ids.json"


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = make_parser("tokenize", "Gives the items of a data folder semantic ids (docs/semantic_ids.md).")
    parser.add_argument("--data_dir", required=True, help="the data folder; its semantic_ids.json is written")
    parser.add_argument("--tokenizer", help="folder of the item tokenizer; by default DATA_DIR/item_tokenizer")
    parser.add_argument("--features", nargs="+", help="of the items' text; by default title, brand, categories, "
                        "attributes and description, or with --add the saved tokenizer's")  # fmt: skip
    parser.add_argument("--embedder", default="tfidf", help="tfidf, or a sentence-transformers model (name or folder)")
    parser.add_argument("--vectors", metavar="FILE", help=".npy or .safetensors with a vector an item, in their order")
    parser.add_argument("--collaborative", type=float, default=0.0, help="share of co-occurrence vectors, 0 to 1")
    parser.add_argument("--quantizer", choices=["kmeans", "balanced", "rqvae"], default="kmeans", help="to codes")
    parser.add_argument("--levels", type=int, default=3, help="tokens an id")
    parser.add_argument("--codes", type=int, help="tokens a level; by default 256, fewer below 1,024 items")
    parser.add_argument("--collisions", default="reassign", help="reassign, level (one more level) or keep")
    parser.add_argument("--seed", type=int, default=0, help="of clustering and training")
    parser.add_argument("--add", action="store_true", help="keep the ids that are there, give new items theirs")
    parser.add_argument("--overwrite", action="store_true", help="replace the ids that are there")
    return guarded(lambda: _tokenize(parse(parser, arguments)))


def _tokenize(given: argparse.Namespace) -> None:
    from gflowtrl.files import write_text
    from gflowtrl.semantic_ids import quality_report

    data = _read(given.data_dir)
    ids_file = Path(given.data_dir, IDS_FILE)
    folder = Path(given.tokenizer or Path(given.data_dir, "item_tokenizer"))
    there = next((file for file in (ids_file, folder / "item_tokenizer.json") if file.is_file()), None)
    if given.add:
        tokenizer, new = _grown(given, folder, data)
        content, text = {"new_items": new}, f"{new} new items have ids; those of the others have not changed."
    elif there is not None and not given.overwrite:
        raise ValueError(f"{there} is there. Use --add to give new items ids, or --overwrite to replace them all.")
    else:
        tokenizer, vectors = _fitted(given, data)
        report = quality_report(tokenizer, vectors)
        content, text = report.as_dict(), f"{report}\n\nIds in {ids_file}; the tokenizer, for new items, in {folder}."
    tokenizer.save_pretrained(folder)
    write_text(ids_file, json.dumps({str(item): ids for item, ids in tokenizer.semantic_ids.items()}) + "\n")
    show(given, content, text)


def _read(data_dir: str) -> Any:
    """The data without ids: those of the old items alone a reader would refuse."""
    from gflowtrl.data import read_interactions

    data = read_interactions(data_dir, with_ids=False)
    if not Path(data_dir, "sequences.jsonl").is_file():
        raise ValueError(
            f"{data_dir} is a LETTER triple, whose readers know no {IDS_FILE}. Make a data folder of it first: "
            f"gflowtrl prepare --format letter --interactions {data_dir} --k_core 0 --out DIR."
        )
    return data


def _grown(given: argparse.Namespace, folder: Path, data: Any) -> tuple[Any, int]:
    """The saved tokenizer with ids for the items of the data that had none, and their number."""
    from gflowtrl.semantic_ids import ItemTokenizer, load_vectors

    tokenizer = ItemTokenizer.from_pretrained(folder)
    if given.features not in (None, tokenizer.features):
        raise ValueError(
            f"The item tokenizer in {folder} was made with --features {' '.join(tokenizer.features)}, but "
            f"{' '.join(given.features)} is given. Leave --features out."
        )
    if isinstance(data.items[0], str):  # one new id with a letter makes strings of all the numbers
        tokenizer.items = list(map(str, tokenizer.items))
    known = set(tokenizer.items)
    new = [place for place, item in enumerate(data.items) if item not in known]
    if given.vectors is None:
        tokenizer.add(data)
    else:
        tokenizer.add(load_vectors(given.vectors, data.items)[new], [data.items[place] for place in new])
    return tokenizer, len(new)


def usual_codes(num_items: int) -> int:
    """Codes a level: the field's 256, or the largest power of two by which there are four items a code."""
    return min(256, max(2, 2 ** ((num_items // 4).bit_length() - 1)))


def _fitted(given: argparse.Namespace, data: Any) -> tuple[Any, Any]:
    """The tokenizer and the vectors that it was fitted on."""
    from gflowtrl import semantic_ids as library
    from gflowtrl.data import leave_one_out
    from gflowtrl.semantic_ids.texts import FEATURES

    if not 0 <= given.collaborative <= 1:
        raise ValueError(f"--collaborative is {given.collaborative}; it is a share from 0 to 1.")
    codes = usual_codes(len(data.items)) if given.codes is None else given.codes
    if given.quantizer == "rqvae":
        quantizer = library.RQVAE(given.levels, codes, seed=given.seed)
    else:
        quantizer = library.ResidualKMeans(given.levels, codes, given.quantizer == "balanced", given.seed)
    vectors = None
    if given.vectors is not None:
        vectors = library.load_vectors(given.vectors, data.items)
    elif given.collaborative < 1:
        if given.embedder == "tfidf":
            embedder = library.TfidfEmbedder(seed=given.seed)
        else:
            embedder = library.SentenceTransformerEmbedder(given.embedder)
        texts = library.item_texts(data, given.features or FEATURES)
        if not given.collaborative:  # the embedder is kept with the tokenizer, for new items
            tokenizer = library.ItemTokenizer(quantizer, embedder, given.collisions, given.features)
            return tokenizer.fit(texts, data.items), embedder.embed(texts)
        vectors = embedder.fit(texts).embed(texts)
    if given.collaborative:
        together = library.cooccurrence_vectors(leave_one_out(data).train_sequences, data.items, seed=given.seed)
        vectors = together if vectors is None else library.combine_vectors(vectors, together, given.collaborative)
    tokenizer = library.ItemTokenizer(quantizer, collisions=given.collisions, features=given.features)
    return tokenizer.fit(vectors, data.items), vectors
