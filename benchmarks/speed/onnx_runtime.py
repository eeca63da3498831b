"""ONNX Runtime against the recommender itself and the HTTP server, each with one thread.

    OMP_NUM_THREADS=1 python benchmarks/speed/onnx_runtime.py --out benchmarks/results/speed/onnx_runtime.json

All sides answer the same requests in turn: one history after the other, and then batches. The server gets each request
over one open connection. Needs the extras `onnx` and `serve`. Without --model, it is a Llama with random weights. The
table also counts lists that differ by more than a tie.
"""

from __future__ import annotations

import http.client
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import SIZES, arguments, llama, random_catalog, report
from serving import ask, running
from tqdm.auto import tqdm

from gflowtrl import Recommender
from gflowtrl.compat import quiet_libraries
from gflowtrl.export import export


TIE = 1e-4
Lists = list[list[tuple[Any, float]]]


def different(ours: Lists, theirs: Lists) -> int:
    """Return the number of lists with another item at a rank whose log-probabilities differ by more than a tie."""
    pairs = zip(ours, theirs, strict=True)
    return sum(
        any(a != b and abs(x - y) > TIE for (a, x), (b, y) in zip(one, other, strict=True)) for one, other in pairs
    )


def requests(items: Sequence[Any], count: int, length: int, batch: int) -> Iterator[list[list[Any]]]:
    """Yield `count` requests of `batch` random histories."""
    chance = random.Random(0)
    for _ in range(count):
        yield [chance.choices(items, k=length) for _ in range(batch)]


def over_http(connection: http.client.HTTPConnection, histories: list, k: int) -> Lists:
    """Return the server's lists for histories of a request."""
    answer = json.loads(ask(connection, "POST", "/recommend", {"histories": histories, "k": k}))
    return [[(one["item"], math.log(one["probability"])) for one in found] for found in answer["recommendations"]]


def measure(
    sides: dict[str, Callable[[list], Lists]], asked: list[list[list[Any]]], batch: int
) -> list[dict[str, Any]]:
    """Return a row for each side; the first request of each is a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    answers: dict[str, Lists] = {name: [] for name in sides}
    for number, histories in enumerate(tqdm(asked, desc=f"requests of {batch}", disable=not sys.stderr.isatty())):
        for name, answer in sides.items():
            start = time.perf_counter()
            lists = answer(histories)
            if number:
                seconds[name].append(time.perf_counter() - start)
                answers[name] += lists
    first = next(iter(sides))
    rows = []
    for name, times in seconds.items():
        p50, p99 = torch.tensor(times).quantile(torch.tensor([0.5, 0.99])).tolist()
        rows.append({
            "side": name, "batch": batch, "requests": len(times), "p50": p50, "p99": p99,
            "per_second": len(times) / sum(times), "histories_per_second": batch * len(times) / sum(times),
            "different": different(answers[first], answers[name]),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--model", help="folder of a recommender; by default a Llama with random weights")
    parser.add_argument("--requests", type=int, default=300, help="requests of one history; a tenth of it in batches")
    parser.add_argument("--batch", type=int, default=64, help="histories per batch")
    parser.add_argument("--history", type=int, default=20, help="items per history")
    parser.add_argument("--items", type=int, default=5000, help="items in the random catalog")
    parser.add_argument("--size", choices=list(SIZES), default="1.2M", help="size of the random model")
    parser.add_argument("-k", "--k", type=int, default=20, help="length of the lists")
    given = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        if given.model is None:
            catalog, tokenizer = random_catalog(given.items)
            Recommender(llama(len(tokenizer), given.size), tokenizer, catalog).save_pretrained(Path(folder, "model"))
        model = given.model or Path(folder, "model")
        export(model, "onnx", Path(folder, "onnx"))
        from gflowtrl.export.standalone.onnx_recommender import OnnxRecommender

        recommender, exported = Recommender.from_pretrained(model), OnnxRecommender(Path(folder, "onnx"), threads=1)
        rows = []
        with running(str(model), 1, []) as port:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            sides = {
                "Recommender": lambda histories: [
                    [(one.item, one.log_prob) for one in found] for found in recommender.recommend(histories, given.k)
                ],
                "HTTP server": lambda histories: over_http(connection, histories, given.k),
                "ONNX Runtime": lambda histories: exported.recommend(histories, given.k),
            }
            for batch, count in ((1, given.requests), (given.batch, given.requests // 10)):
                asked = list(requests(recommender.catalog.items, given.rounds * count + 1, given.history, batch))
                rows += measure(sides, asked, batch)
            connection.close()
    columns = {
        "side": "{side}", "histories per request": "{batch}", "p50, s": "{p50:.4f}", "p99, s": "{p99:.4f}",
        "requests/s": "{per_second:.1f}", "histories/s": "{histories_per_second:.0f}",
        "different lists": "{different}",
    }  # fmt: skip
    report(rows, columns, given, k=given.k, history=given.history)


if __name__ == "__main__":
    main()
