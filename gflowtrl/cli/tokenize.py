"""`gflowtrl tokenize`: make semantic ids for the items of a data folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .common import guarded, make_parser, parse, show


IDS_FILE = "semantic_ids.json"


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit code."""
    parser = make_parser("tokenize", "Make semantic ids for the items of a data folder (docs/semantic_ids.md).")
    parser.add_argument("--data_dir", required=True, help="data folder; the ids are written to its semantic_ids.json")
    parser.add_argument("--tokenizer", help="folder of the item tokenizer; by default DATA_DIR/item_tokenizer")
    parser.add_argument("--features", nargs="+", help="item features of the texts; by default title, brand, "
                        "categories, attributes and description, or with --add the saved tokenizer's")  # fmt: skip
    parser.add_argument("--embedder", default="tfidf", help="tfidf, or a sentence-transformers model (name or folder)")
    parser.add_argument("--vectors", metavar="FILE", help=".npy or .safetensors with one vector per item, in order")
    parser.add_argument("--collaborative", type=float, default=0.0, help="weight of co-occurrence vectors, 0 to 1")
    parser.add_argument("--quantizer", choices=["kmeans", "balanced", "rqvae"], default="kmeans", help="quantizer")
    parser.add_argument("--levels", type=int, default=3, help="tokens per id")
    parser.add_argument("--codes", type=int, help="codes per level; by default 256, fewer below 1,024 items")
    parser.add_argument("--collisions", default="reassign", help="reassign, level (one more level) or keep")
    parser.add_argument("--seed", type=int, default=0, help="seed of clustering and training")
    parser.add_argument("--alignment", type=float, default=0.0, help="rqvae: weight of LETTER's alignment with "
                        "collaborative vectors")  # fmt: skip
    parser.add_argument("--alignment_vectors", metavar="FILE", help="file of these vectors; by default co-occurrences")
    parser.add_argument("--diversity", type=float, default=0.0, help="rqvae: weight of LETTER's diversity of codes")
    parser.add_argument("--add", action="store_true", help="keep existing ids and make ids for new items only")
    parser.add_argument("--overwrite", action="store_true", help="replace existing ids")
    return guarded(lambda: _tokenize(parse(parser, arguments)))


def _tokenize(options: argparse.Namespace) -> None:
    from gflowtrl.files import write_text
    from gflowtrl.semantic_ids import quality_report

    data = _read(options.data_dir)
    ids_file = Path(options.data_dir, IDS_FILE)
    folder = Path(options.tokenizer or Path(options.data_dir, "item_tokenizer"))
    existing = next((file for file in (ids_file, folder / "item_tokenizer.json") if file.is_file()), None)
    if options.add:
        tokenizer, num_new = _add_items(options, folder, data)
        content, text = {"new_items": num_new}, f"{num_new} new items have ids; the ids of other items are unchanged."
    elif existing is not None and not options.overwrite:
        raise ValueError(f"{existing} exists. Use --add to make ids for new items, or --overwrite to replace all ids.")
    else:
        tokenizer, vectors = _fit(options, data)
        report = quality_report(tokenizer, vectors)
        content = report.as_dict()
        text = f"{report}\n\nThe ids are in {ids_file}, the tokenizer for new items in {folder}."
        text += f" Next: gflowtrl train --config gflowgr_office_llama --data_dir {options.data_dir}"
    tokenizer.save_pretrained(folder)
    write_text(ids_file, json.dumps({str(item): ids for item, ids in tokenizer.semantic_ids.items()}) + "\n")
    show(options, content, text)


def _read(data_dir: str) -> Any:
    """Return the data without ids, because a reader refuses ids that do not cover all items."""
    from gflowtrl.data import read_interactions
    from gflowtrl.data.readers import is_data_folder

    data = read_interactions(data_dir, with_ids=False)
    if not is_data_folder(data_dir):
        raise ValueError(
            f"{data_dir} is a LETTER triple, whose ids are not in {IDS_FILE}. Convert it to a data folder first: "
            f"gflowtrl prepare --format letter --interactions {data_dir} --k_core 0 --out DIR."
        )
    return data


def _add_items(options: argparse.Namespace, folder: Path, data: Any) -> tuple[Any, int]:
    """Return the saved tokenizer after adding the new items of the data, and their number."""
    from gflowtrl.semantic_ids import ItemTokenizer, load_vectors

    tokenizer = ItemTokenizer.from_pretrained(folder)
    if options.features not in (None, tokenizer.features):
        raise ValueError(
            f"--features is {' '.join(options.features)}, but the item tokenizer in {folder} was made with "
            f"{' '.join(tokenizer.features)}. Leave --features out."
        )
    if isinstance(data.items[0], str):  # one new item with a letter in its name turns all items into strings
        tokenizer.items = list(map(str, tokenizer.items))
    known = set(tokenizer.items)
    new = [index for index, item in enumerate(data.items) if item not in known]
    if options.vectors is None:
        tokenizer.add(data)
    else:
        tokenizer.add(load_vectors(options.vectors, data.items)[new], [data.items[index] for index in new])
    return tokenizer, len(new)


def _fit(options: argparse.Namespace, data: Any) -> tuple[Any, Any]:
    """Return a fitted item tokenizer and the vectors that it was fitted to."""
    from dataclasses import fields

    from gflowtrl.data import leave_one_out
    from gflowtrl.semantic_ids import SemanticIdOptions, make_item_tokenizer

    try:
        chosen = SemanticIdOptions(**{entry.name: getattr(options, entry.name) for entry in fields(SemanticIdOptions)})
    except ValueError as error:  # it begins with the option's name
        raise ValueError(f"--{error}") from None
    sequences = leave_one_out(data).train_sequences if chosen.uses_interactions else ()
    return make_item_tokenizer(chosen, data, sequences)
