"""Semantic ids of text and co-occurrence vectors by each quantizer, compared with the published ids of a data set.

    python benchmarks/quality/semantic_ids.py --data_dir DIR/office DIR/beauty \
        --out benchmarks/results/quality/semantic_ids.json

No recommender is trained. The figures come from `quality_report`, for ids whose collisions were reassigned.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import sklearn
from torch import Tensor

from gflowtrl.data import InteractionData, leave_one_out, read_interactions
from gflowtrl.semantic_ids import (
    RQVAE,
    ItemTokenizer,
    ResidualKMeans,
    ResidualQuantizer,
    TfidfEmbedder,
    cooccurrence_vectors,
    item_texts,
    quality_report,
    resolve_collisions,
)


sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.quality.total_variation import environment  # noqa: E402


QUANTIZERS: dict[str, Callable[[], ResidualQuantizer]] = {
    "k-means": ResidualKMeans,
    "balanced k-means": lambda: ResidualKMeans(balanced=True),
    "RQ-VAE": RQVAE,
}
COLUMNS = (
    "data", "vectors", "ids", "colliding at first", "colliding", "relative error", "codes used", "perplexity",
    "first token kept", "by chance", "common prefix", "seconds",
)  # fmt: skip


def vectors_of(data: InteractionData) -> dict[str, tuple[Tensor, float]]:
    """Map each kind of vectors to the vectors and the seconds they took."""

    def text() -> Tensor:
        texts = item_texts(data)
        return TfidfEmbedder().fit(texts).embed(texts)

    def collaborative() -> Tensor:
        return cooccurrence_vectors(leave_one_out(data).train_sequences, data.items)

    return {"text": timed(text), "collaborative": timed(collaborative)}


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return function(), time.perf_counter() - began


def measure(make: Callable[[], ResidualQuantizer], vectors: Tensor, data: InteractionData) -> dict[str, Any]:
    """Return the reports of a quantizer before and after collisions are resolved, and the seconds it took."""
    tokenizer = ItemTokenizer(make(), collisions="keep")
    _, seconds = timed(lambda: tokenizer.fit(vectors, data.items))
    at_first = quality_report(tokenizer, vectors)
    tokenizer.codes, more = timed(lambda: resolve_collisions(tokenizer.codes, vectors, tokenizer.quantizer))
    config = tokenizer.quantizer.config
    return {
        "settings": config, "seconds": seconds + more, "at_first": at_first.as_dict(),
        "report": quality_report(tokenizer, vectors).as_dict(),
    }  # fmt: skip


def table_row(result: dict[str, Any]) -> str:
    report, at_first = result["report"], result.get("at_first", result["report"])
    levels = [f"{100 * share:.0f}" for share in report["share_used"]]
    cells = (
        result["data"], result["vectors"], result["ids"], at_first["colliding_items"], report["colliding_items"],
        "" if report["relative_mse"] is None else f"{report['relative_mse']:.3f}", " / ".join(levels) + " %",
        f"{report['perplexity'][0]:.0f}", f"{report['neighbors_kept'][0]:.3f}",
        f"{report['neighbors_by_chance'][0]:.3f}", f"{report['common_prefix']:.2f}",
        f"{result['seconds']:.0f}" if "seconds" in result else "",
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, nargs="+", help="folders of data with item texts")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    given = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    results, summaries, embedding = [], [], {}
    print("| " + " | ".join(COLUMNS) + " |\n|---|---|---" + "|---:" * (len(COLUMNS) - 3) + "|")
    for folder in given.data_dir:
        data = read_interactions(folder)
        summaries.append(data.summary())
        for kind, (vectors, seconds) in vectors_of(data).items():
            embedding[f"{data.name}, {kind}"] = {"dim": vectors.shape[1], "seconds": seconds}
            for name in (["published"] if data.semantic_ids else []) + list(QUANTIZERS):
                if name in QUANTIZERS:
                    figures = measure(QUANTIZERS[name], vectors, data)
                else:
                    figures = {"report": quality_report(data.semantic_ids, vectors, num_codes=256).as_dict()}
                results.append({"data": data.name, "vectors": kind, "ids": name, **figures})
                print(table_row(results[-1]), flush=True)
    if given.out is not None:
        surroundings = environment()
        surroundings["versions"]["scikit-learn"] = sklearn.__version__
        command = "python benchmarks/quality/semantic_ids.py --data_dir " + " ".join(
            f"DIR/{Path(folder).name}" for folder in given.data_dir
        )
        content = {"command": command, "date": date.today().isoformat(), **surroundings, "data": summaries}
        content |= {"vectors": embedding, "results": results}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
