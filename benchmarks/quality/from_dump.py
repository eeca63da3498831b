"""From a raw dump to recommendations by commands only, comparing new semantic ids with the published ones.

    OMP_NUM_THREADS=1 python benchmarks/quality/from_dump.py --data_dir DIR --output_dir outputs/from_dump

DIR is a data folder with published ids (docs/data.md). Its interactions and items are written in the format of
Amazon's dump of 2014 (gzipped JSON lines of reviews, Python literals of metadata, lines in random order). Everything
after that is done by `gflowtrl`: prepare, tokenize, train, recommend. The same recipe is trained on DIR, too.
`--tokenize` has the options of the new ids, `--stages` the stages that are trained.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gflowtrl.data import InteractionData, read_interactions


DAY = 86_400


def write_dump(data: InteractionData, folder: Path) -> None:
    """Write reviews and metadata in the format of 2014, with lines in random order."""
    folder.mkdir(parents=True, exist_ok=True)
    reviews = [
        {"reviewerID": f"A{user:06}", "asin": f"B{item:06}", "reviewText": "...", "overall": 5.0,
         "unixReviewTime": 1_300_000_000 + DAY * place}
        for user, sequence in zip(data.users, data.sequences, strict=True)
        for place, item in enumerate(sequence)
    ]  # fmt: skip
    metas = []
    for item in data.items:
        known = {name: value for name, value in data.item_features.get(item, {}).items() if value}
        if "categories" in known:
            known["categories"] = [known["categories"].split(", ")]
        metas.append({"asin": f"B{item:06}", **known})
    chance = random.Random(0)
    chance.shuffle(reviews)
    chance.shuffle(metas)
    for name, rows, text in (("reviews", reviews, json.dumps), ("meta", metas, repr)):
        with gzip.open(folder / f"{name}.json.gz", "wt", encoding="utf-8") as file:
            file.writelines(f"{text(row)}\n" for row in rows)


def command(*words: object) -> str:
    """Print and run `gflowtrl ...`, and return its output."""
    print("$ gflowtrl", shlex.join(map(str, words)), flush=True)
    ran = subprocess.run([sys.executable, "-m", "gflowtrl", *map(str, words)], stdout=subprocess.PIPE, text=True)
    print(ran.stdout, flush=True)
    if ran.returncode:
        raise SystemExit(ran.returncode)
    return ran.stdout


def trained(given: argparse.Namespace, data_dir: Path, name: str, others: Sequence[str]) -> dict:
    """Train the recipe on a data folder and return its results."""
    out = given.output_dir / name
    options = ["--data_dir", data_dir, "--output_dir", out, "--seed", given.seed, "--stages", *given.stages]
    command("train", "--config", given.recipe, *options, *others)
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, type=Path)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/from_dump"))
    parser.add_argument("--recipe", default="gflowgr_office_llama")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--stages", nargs="+", default=["teacher", "sft", "gflownet"])
    parser.add_argument("--tokenize", default="", help="options of `gflowtrl tokenize`, as one string")
    parser.add_argument("--name", default="own", help="name of the new ids, used for folders and in the results")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    given, others = parser.parse_known_args()
    raw, folder = given.output_dir / "raw", given.output_dir / f"data-{given.name}"
    write_dump(read_interactions(given.data_dir), raw)
    files = ["--reviews", raw / "reviews.json.gz", "--meta", raw / "meta.json.gz"]
    command("prepare", "--format", "amazon-2014", *files, "--out", folder, "--overwrite", "--name", given.name)
    quality = json.loads(
        command("tokenize", "--data_dir", folder, "--overwrite", "--json", *shlex.split(given.tokenize))
    )
    runs = {given.name: trained(given, folder, given.name, others)}
    runs["published"] = trained(given, given.data_dir, "published", others)
    best = next(m for m in ("gflownet", "control", "sft") if m in runs[given.name]["methods"])
    history = given.output_dir / "history.jsonl"
    history.write_text(json.dumps({"user": "anna", "history": ["B000001", "B000017"]}) + "\n", encoding="utf-8")
    command("recommend", "--model", runs[given.name]["methods"][best]["model"], "--input", history, "-k", "5")
    found = {
        name: {method: entry["metrics"] for method, entry in run["methods"].items()} for name, run in runs.items()
    }
    for method in found[given.name]:
        for metric in ("recall@10", "ndcg@10", "coverage@10"):
            ours, theirs = (found[name][method][metric] for name in runs)
            change = f" ({ours / theirs - 1:+.1%})" if theirs else ""
            print(f"{method} {metric}: new ids {ours:.4f}, published ids {theirs:.4f}{change}")
    if given.out is not None:
        about = {name: runs[given.name][name] for name in ("date", "machine", "versions")}
        content = {"recipe": given.recipe, "seed": given.seed, "tokenize": given.tokenize, **about}
        content |= {"quality": quality, "metrics": found}
        given.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
