"""`gflowtrl catalog`: add items to a saved recommender, or retire some, without a training."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import guarded, make_parser, parse, show


if TYPE_CHECKING:
    from gflowtrl.catalog import Item
    from gflowtrl.recommender import Recommender

#: Files of a checkpoint with which only the training of the earlier catalog can be resumed.
OF_TRAINING = (
    *("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json", "training_args.bin"),
    *("sampler*.safetensors", "flow_heads.safetensors", "prefix_weights.safetensors", "reference.safetensors"),
)


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit code."""
    parser = make_parser(
        "catalog",
        "Add items to a saved recommender, or retire some. The changed recommender is written to a new folder "
        "(docs/living_catalog.md).",
    )
    parser.add_argument("action", choices=["add", "retire"], help="what to do with the items")
    parser.add_argument("--model", required=True, help="folder of a recommender, or its name on the Hub")
    parser.add_argument(
        "--items",
        required=True,
        nargs="+",
        metavar="FILE",
        help='JSON lines {"item": ..., "title": ...} or .parquet; to retire also a JSON list (.json), or the items',
    )
    parser.add_argument("--output", required=True, help="folder of the changed recommender; new or empty")
    parser.add_argument(
        "--semantic_ids", metavar="DIR", help="folder of the item tokenizer; by default that in the model's folder"
    )
    return guarded(lambda: _change(parse(parser, arguments)))


def _change(options: argparse.Namespace) -> None:
    from gflowtrl.data.item_file import read_items
    from gflowtrl.files import check_new_folder, new_folder
    from gflowtrl.hub import local_copy
    from gflowtrl.recommender import ITEM_TOKENIZER_FOLDER, Recommender

    out = Path(options.output)
    check_new_folder(out)
    add, retire = {}, None
    if options.action == "add":
        if len(options.items) > 1:
            raise ValueError("--items has several files; give one file with the items to add.")
        add = read_items(options.items[0])
    elif Path(options.items[0]).suffix in (".json", ".jsonl", ".parquet") and len(options.items) == 1:
        retire = _read_retired(options.items[0])
    if options.semantic_ids is not None and not Path(options.semantic_ids).is_dir():
        raise FileNotFoundError(f"There is no folder {options.semantic_ids}. Check --semantic_ids.")
    model = local_copy(options.model)
    if model.resolve() in out.resolve().parents:
        raise ValueError(f"{out} is in the folder of the model, which is copied. Choose an --output outside of it.")
    recommender = Recommender.from_pretrained(model)
    if options.semantic_ids is not None:
        recommender.set_item_tokenizer(options.semantic_ids)
    if options.action == "retire" and retire is None:
        retire = _given_items(options.items, recommender)
    change = recommender.plan_change(add, retire or ())
    changed = recommender.with_change(change)
    with new_folder(out) as partial:
        shutil.copytree(model, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*OF_TRAINING))
        if options.semantic_ids is not None:
            shutil.rmtree(partial / ITEM_TOKENIZER_FOLDER, ignore_errors=True)
        changed.save_pretrained(partial) if change.similar_tokens else changed.save_catalog(partial)
    text = f"{change.report} Written to {out}. Next: gflowtrl recommend --model {out} --input FILE"
    show(options, change.report.as_dict(), text)


def _read_retired(file: str) -> list[Item]:
    """Return the items of a file: a JSON list, or rows as for `add`, whose features do not count."""
    from gflowtrl.data.item_file import read_items
    from gflowtrl.files import read_json

    if Path(file).suffix != ".json":
        return list(read_items(file))
    if not Path(file).is_file():
        raise FileNotFoundError(f"There is no file {file}. Check the path.")
    items: Any = read_json(file)
    if not isinstance(items, list) or not items or not all(type(item) in (int, str) for item in items):
        raise ValueError(f"{file} must hold a JSON list of items (numbers or strings).")
    return items


def _given_items(words: Sequence[str], recommender: Recommender) -> list[Item]:
    """Return items that were given as words, with the type of the catalog's items."""
    if isinstance(recommender.catalog.items[0], str):
        return list(words)
    try:
        return [int(word) for word in words]
    except ValueError:
        raise ValueError(
            f"--items is {' '.join(words)}, but the items of {recommender.model.name_or_path} are whole numbers, such "
            f"as {recommender.catalog.items[0]}. Give such numbers, or a file."
        ) from None
