"""Items that nobody has seen yet: what each method recommends to the users whose target is new, and to the others.

    python benchmarks/quality/new_items.py --data_dir DIR --output_dir outputs/new_items
    python benchmarks/quality/new_items.py --data_dir DIR --output_dir outputs/new_beauty --prefix new_items-beauty

Rows A: 5 % of the items occur in nothing but test targets, but are in the catalog and in the rewards (data.new_items).
Row B: the first recipe, trained without these items; afterwards they get ids from the saved item tokenizer and are
added to the catalog (as `gflowtrl tokenize --add` does), and the model is not trained again.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from office import KEPT, ROOT, kept_run, make_parser, places, settings

from gflowtrl import ItemCatalog, Recommender
from gflowtrl.data import PromptEncoder, add_item_tokens, write_folder
from gflowtrl.metrics import leaf_ranking_metrics, mean_and_error
from gflowtrl.pipeline import load_recipe, run
from gflowtrl.pipeline.plots import titles_of
from gflowtrl.pipeline.run_data import RunData, prepare
from gflowtrl.pipeline.run_report import aligned
from gflowtrl.semantic_ids import ItemTokenizer, item_texts
from gflowtrl.trainer import rank_rows


OWN = ROOT / "benchmarks" / "quality" / "recipes" / "new_items"
NAMES = ("item_recall@10", "item_ndcg@10")
GROUPS = ("new", "others")


def without_new_items(data: RunData, folder: Path) -> Path:
    """Write the data of a run without its new items, as they were before these items existed."""
    source = data.interactions
    sequences = [[item for item in sequence if item not in data.new_items] for sequence in source.sequences]
    kept = [row for row, sequence in enumerate(sequences) if len(sequence) >= 3]
    items = [item for item in source.items if item not in data.new_items]
    known = {item: source.item_features[item] for item in items if item in source.item_features}
    users = [source.users[row] for row in kept]
    old = replace(
        source, users=users, sequences=[sequences[row] for row in kept], items=items, item_features=known,
        semantic_ids=None, times=None, exposed=None, impressions=None,
    )  # fmt: skip
    write_folder(old, folder)
    return folder


def added_afterwards(data: RunData, path: Path, options: list[str], folder: Path) -> dict:
    """Train a recipe without the new items, add them to the catalog, and measure both groups of test users (row B)."""
    old = without_new_items(data, folder / "data")
    given = [*options, "--data_dir", str(old), "--output_dir", str(folder), "--data.new_items", "0"]
    recipe = load_recipe(path, [*given, "--stages", "teacher", "gflownet"])
    results = run(recipe, quiet=True)
    ids_folder = max(folder.glob("semantic_ids-*"), key=lambda path: path.stat().st_mtime)
    item_tokenizer = ItemTokenizer.from_pretrained(ids_folder)
    new = [item for item in data.interactions.items if item in data.new_items]
    texts = dict(zip(data.interactions.items, item_texts(data.interactions), strict=True))
    item_tokenizer.add([texts[item] for item in new], new)
    ids = {item: item_tokenizer.semantic_ids[item] for item in data.interactions.items}
    model = Recommender.from_pretrained(results["methods"]["gflownet"]["model"])
    add_item_tokens(model.tokenizer, ids, model.model)
    catalog = ItemCatalog.from_semantic_ids(ids, model.tokenizer)
    encoder = PromptEncoder(catalog, model.tokenizer, model.max_history_items)
    extended = Recommender(model.model, model.tokenizer, catalog, encoder=encoder)
    leaves = rank_rows(extended.policy, encoder, data.test, recipe.evaluation.num_beams)
    found = leaf_ranking_metrics(leaves, catalog.leaf_of(data.test["target"]).cpu(), catalog.leaf_sizes.cpu(), [10])
    of_new = torch.tensor([target in data.new_items for target in data.test["target"]])
    groups = {"new": of_new, "others": ~of_new}
    return {group: {name: mean_and_error(found[name][rows]) for name in NAMES} for group, rows in groups.items()}


def main() -> None:
    parser = make_parser(__doc__)
    recipes = [OWN / f"{name}.yaml" for name in ("content", "sasrec", "text")]
    parser.add_argument("--recipes", nargs="+", type=Path, default=recipes)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--prefix", default="new_items-office", help="beginning of the names of the kept files")
    given, others = parser.parse_known_args()
    options = [*places(given, given.seed), *others]
    lines = [["method", *(f"{name}, {group}" for group in GROUPS for name in NAMES)]]
    for path in given.recipes:
        recipe = load_recipe(path, options)
        record = kept_run(path, options, KEPT / f"{given.prefix}-{recipe.name}-seed{given.seed}.json")
        for method, groups in record["new_items"]["methods"].items():
            lines.append([f"{titles_of(record['recipe'])[method]}: {recipe.name}", *cells(groups)])
    recipe = load_recipe(given.recipes[0], options)
    file = KEPT / f"{given.prefix}-added-seed{given.seed}.json"
    if not file.is_file() or json.loads(file.read_text())["recipe"] != settings(recipe.as_dict()):
        folder = Path(given.output_dir, "before")
        groups = added_afterwards(prepare(recipe), given.recipes[0], [*options, *others], folder)
        file.write_text(json.dumps({"recipe": settings(recipe.as_dict()), "groups": groups}, indent=2) + "\n")
    lines.append([f"GFlowNet: {recipe.name}, items added afterwards", *cells(json.loads(file.read_text())["groups"])])
    print(f"\n{record['new_items']['items']} new items, {record['new_items']['users']} users:\n\n{aligned(lines)}")


def cells(groups: dict) -> list[str]:
    return ["{:.4f} ± {:.4f}".format(*groups[group][name]) for group in GROUPS for name in NAMES]


if __name__ == "__main__":
    main()
