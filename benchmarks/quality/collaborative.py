"""Collaborative baselines: popularity, ItemKNN (`implicit`) and EASE. SASRec is the teacher in office.py.

    pip install -e .[benchmarks]
    python benchmarks/quality/collaborative.py --data_dir DIR --out benchmarks/results/quality/collaborative.json

Settings are selected by NDCG@10 on the validation split. The test split is measured once, by the protocol of the other
tables: leave one out, histories of 20 items, all items are candidates, items of the history are not removed.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from implicit.nearest_neighbors import BM25Recommender, CosineRecommender, TFIDFRecommender
from torch import Tensor
from tqdm.auto import tqdm

from gflowtrl.data import InteractionData, Splits, leave_one_out, read_interactions
from gflowtrl.metrics import RankingReport, summarize_items
from gflowtrl.pipeline.run_report import aligned
from gflowtrl.teachers import EASE, Popularity, top_items


sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.quality.total_variation import environment  # noqa: E402


KS = [5, 10, 20]
NEIGHBORS = {"cosine": CosineRecommender, "TF-IDF": TFIDFRecommender, "BM25": BM25Recommender}
Ranker = Callable[[Sequence[Sequence]], Tensor]


class Rows:
    """The data with items as indices."""

    def __init__(self, data: InteractionData):
        self.data: InteractionData = data
        self.splits: Splits = leave_one_out(data)
        self.index = {item: place for place, item in enumerate(data.items)}

    def matrix(self, histories: Sequence[Sequence]) -> sp.csr_matrix:
        """Return a matrix `(histories, items)` with 1 for the items of each history."""
        columns = np.array([self.index[item] for history in histories for item in set(history)])
        rows = np.repeat(np.arange(len(histories)), [len(set(history)) for history in histories])
        ones = np.ones(len(columns), dtype=np.float32)
        return sp.csr_matrix((ones, (rows, columns)), (len(histories), len(self.index)))

    def measure(self, ranker: Ranker, split: str) -> RankingReport:
        rows = getattr(self.splits, split)
        targets = torch.tensor([self.index[item] for item in rows["target"]])
        return summarize_items(ranker(rows["history"]), targets, self.splits.item_counts, KS)


def item_knn(rows: Rows, kind: str, neighbors: int) -> Ranker:
    """Rank items by their similarity to the history (from `implicit`), without the similarity of an item to itself."""
    model = NEIGHBORS[kind](K=neighbors + 1)
    model.fit(rows.matrix(rows.splits.train_sequences), show_progress=False)
    similarity = model.similarity.tocsr()
    similarity.setdiag(0)

    def rank(histories: Sequence[Sequence]) -> Tensor:
        scores = rows.matrix([history[-20:] for history in histories]) @ similarity.T
        return torch.from_numpy(scores.toarray()).topk(max(KS)).indices

    return rank


def rankers(rows: Rows) -> dict[str, dict[str, Callable[[], Ranker]]]:
    """Map each method to its settings, and each setting to a function that fits it."""
    sequences, items = rows.splits.train_sequences, rows.data.items

    def by_teacher(fit: Callable) -> Callable[[], Ranker]:
        def make() -> Ranker:
            teacher = fit()
            return lambda histories: top_items(teacher, histories, max(KS))

        return make

    return {
        "popularity": {"": by_teacher(lambda: Popularity.fit(sequences, items))},
        "ItemKNN": {
            f"{kind}, {k} neighbors": lambda kind=kind, k=k: item_knn(rows, kind, k)
            for kind, k in itertools.product(NEIGHBORS, (5, 10, 20, 50, 100, 200))
        },
        "EASE": {
            f"regularization {value:g}": by_teacher(
                lambda value=value: EASE.fit(sequences, items, regularization=value)
            )
            for value in (10, 30, 100, 300, 1000)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="the folder of the data")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    given = parser.parse_args()
    rows, found = Rows(read_interactions(given.data_dir)), {}
    for method, settings in rankers(rows).items():
        fitted = {name: fit() for name, fit in tqdm(settings.items(), desc=method, leave=False)}
        tried = {name: rows.measure(ranker, "validation").metrics["ndcg@10"] for name, ranker in fitted.items()}
        best = max(tried, key=tried.get)
        found[method] = {
            "setting": best, "validation_ndcg@10": tried, "metrics": rows.measure(fitted[best], "test").metrics
        }  # fmt: skip
    columns = [f"{name}@{k}" for k in KS for name in ("recall", "ndcg")] + ["coverage@10", "dgu@10", "mgu@10"]
    lines = [[m, entry["setting"], *(f"{entry['metrics'][c]:.4f}" for c in columns)] for m, entry in found.items()]
    print(aligned([["method", "setting", *columns], *lines]))
    if given.out is not None:
        content = {"date": date.today().isoformat(), **environment(), "data": rows.data.summary(), "methods": found}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
