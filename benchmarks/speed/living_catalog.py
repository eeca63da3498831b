"""Items added to a running server: seconds until they can be recommended, and requests meanwhile.

    OMP_NUM_THREADS=1 python benchmarks/speed/living_catalog.py --out benchmarks/results/speed/living_catalog.json

A server is started with a Llama with random weights and a synthetic catalog: random distinct ids of four tokens with
256 codes, and an item tokenizer that was fitted to 4,000 texts of random words. Clients (threads of this process, one
connection each) send one history after the other. After some seconds, one POST to /catalog adds items by their titles;
a probe asks for one of them until an answer holds it. The benchmark fails if a request of a client fails. Before that,
the change is planned once in this process without any load.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measuring import SIZES, arguments, llama, random_catalog, report
from serving import running

from gflowtrl import Recommender
from gflowtrl.catalog import PrefixTree
from gflowtrl.data.tokenization import EOS
from gflowtrl.semantic_ids import ItemTokenizer, ResidualKMeans


DEPTH, CODES, TEXTS, WORDS = 4, 256, 4000, 2000
TOKEN = "benchmark-of-a-living-catalog"


def some_text(chance: random.Random) -> str:
    return " ".join(f"word{chance.randrange(WORDS)}" for _ in range(8))


def make_recommender(items: int, size: str) -> Recommender:
    """Return a recommender whose item tokenizer has the random ids of the catalog."""
    catalog, tokenizer = random_catalog(items, DEPTH, CODES)
    chance = random.Random(0)
    texts = [some_text(chance) for _ in range(TEXTS)]
    item_tokenizer = ItemTokenizer(ResidualKMeans(DEPTH, CODES)).fit(texts, list(range(TEXTS)))
    first = tokenizer.convert_tokens_to_ids(EOS) + 1
    item_tokenizer.items = catalog.items
    item_tokenizer.codes = catalog.item_token_ids - first - CODES * torch.arange(DEPTH)
    return Recommender(llama(len(tokenizer), size), tokenizer, catalog, item_tokenizer=item_tokenizer)


def plan(recommender: Recommender, new: list[dict[str, Any]]) -> dict[str, float]:
    """Return the seconds to plan the change without load, and of the tree alone."""
    _ = recommender.item_tokenizer  # read and checked once
    start = time.perf_counter()
    change = recommender.plan_change({row["item"]: {"title": row["title"]} for row in new})
    planned = time.perf_counter()
    PrefixTree(change.parts.catalog.item_token_ids)
    return {"plan": planned - start, "tree": time.perf_counter() - planned, "new_tokens": change.report.new_tokens}


@dataclass
class Load:
    """The requests of all clients: their times of begin and end, and the errors."""

    port: int
    items: int
    history: int
    stop: threading.Event = field(default_factory=threading.Event)
    times: list[tuple[float, float]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def client(self, number: int) -> None:
        """Send requests until `stop`."""
        chance, connection = random.Random(number), connect(self.port)
        while not self.stop.is_set():
            history = [chance.randrange(self.items) for _ in range(self.history)]
            begin = time.perf_counter()
            try:
                status, answer = post(connection, "/recommend", {"histories": [history]})
                if status != 200:
                    self.errors.append(f"status {status}: {answer}")
            except (OSError, http.client.HTTPException) as error:
                self.errors.append(repr(error))
                connection = connect(self.port)
            self.times.append((begin, time.perf_counter()))


def connect(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=120)


def post(connection: http.client.HTTPConnection, path: str, content: Any) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    connection.request("POST", path, json.dumps(content), headers)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def probe(port: int, item: int, found: list[float]) -> None:
    """Ask for an item until an answer holds it, and note the time."""
    connection = connect(port)
    while True:
        status, _ = post(connection, "/recommend", {"histories": [[1, 2, 3]], "allowed_items": [item], "k": 1})
        if status == 200:
            found.append(time.perf_counter())
            return
        time.sleep(0.02)


def measure(port: int, new: list[dict[str, Any]], given: Any) -> dict[str, Any]:
    """Add items under load; return seconds and latencies before and during the change."""
    load, found = Load(port, given.items, given.history), []
    threads = [threading.Thread(target=load.client, args=(number,)) for number in range(given.clients)]
    for thread in threads:
        thread.start()
    time.sleep(given.seconds)
    probing = threading.Thread(target=probe, args=(port, new[-1]["item"], found))
    probing.start()
    begin = time.perf_counter()
    status, answer = post(connect(port), "/catalog", {"add": new})
    end = time.perf_counter()
    if status != 200:
        load.stop.set()
        raise RuntimeError(f"The change has status {status}: {answer}")
    probing.join()
    time.sleep(given.seconds)
    load.stop.set()
    for thread in threads:
        thread.join()
    if load.errors:
        raise RuntimeError(f"{len(load.errors)} requests failed; the first error is: {load.errors[0]}")
    quiet = [stop - start for start, stop in load.times if stop < begin]
    meanwhile = [stop - start for start, stop in load.times if stop >= begin and start <= end]
    row = {"post": end - begin, "first_answer": found[0] - begin, "requests": len(load.times), "failed": 0}
    for name, seconds in (("before", quiet), ("during", meanwhile)):
        p50, p99 = torch.tensor(seconds).quantile(torch.tensor([0.5, 0.99])).tolist()
        row |= {f"{name}_p50": p50, f"{name}_p99": p99, f"{name}_most": max(seconds)}
    return {**row, "server": answer}


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--items", type=int, default=1_000_000, help="items of the catalog")
    parser.add_argument("--new", type=int, default=1000, help="items that are added")
    parser.add_argument("--clients", type=int, default=8, help="number of concurrent clients")
    parser.add_argument("--history", type=int, default=20, help="items per history")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds of load before and after the change")
    parser.add_argument("--size", choices=list(SIZES), default="0.2M", help="size of the model")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of the server")
    given = parser.parse_args()
    os.environ["GFLOWTRL_CATALOG_TOKEN"] = TOKEN  # of the server
    chance = random.Random(1)
    new = [{"item": given.items + number, "title": some_text(chance)} for number in range(given.new)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        recommender = make_recommender(given.items, given.size)
        planned = plan(recommender, new)
        print(planned, flush=True)
        recommender.save_pretrained(Path(folder))
        del recommender
        for _ in range(given.rounds):
            with running(folder, given.threads, []) as port:
                rows.append({"items": given.items, "new": given.new, **planned, **measure(port, new, given)})
            print(rows[-1], flush=True)
    columns = {
        "items": "{items:,}", "added": "{new:,}", "tree alone, s": "{tree:.2f}", "plan alone, s": "{plan:.2f}",
        "POST, s": "{post:.2f}", "first answer, s": "{first_answer:.2f}", "requests": "{requests:,}",
        "failed": "{failed}", "p50 before, s": "{before_p50:.3f}", "p99 before, s": "{before_p99:.3f}",
        "p50 during, s": "{during_p50:.3f}", "p99 during, s": "{during_p99:.3f}",
    }  # fmt: skip
    report(rows, columns, given, clients=given.clients, threads=given.threads)


if __name__ == "__main__":
    main()
