"""The HTTP server under load, with and without batching of requests.

    OMP_NUM_THREADS=1 python benchmarks/speed/serving.py --out benchmarks/results/speed/serving.json

For each side, a server is started with a Llama with random weights and 5,000 items. Clients (threads of this process,
each with its own connection) send one history after the other; the first request of each client is not counted. If a
response has a status other than 200, the benchmark fails.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import ROOT, SIZES, arguments, llama, random_catalog, report

from gflowtrl import Recommender


#: Maps the rows of the table to the options of the server.
SIDES = {
    "batched": [],
    "batched, at most 16": ["--max_batch", "16"],
    "batching off": ["--max_batch", "1", "--max_wait_ms", "0"],
}


@contextlib.contextmanager
def running(folder: str, threads: int, options: Sequence[str]) -> Iterator[int]:
    """Context manager: start a server in a new process and yield its port."""
    start = [sys.executable, "-m", "gflowtrl", "serve", "--model", folder, "--port", "0"]
    command = [*start, "--threads", str(threads), *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            if " on http://" not in line:
                raise RuntimeError("The server did not start; its output is above.")
            yield int(line.split("http://")[1].split()[0].rpartition(":")[2])
        finally:
            server.terminate()


def ask(connection: http.client.HTTPConnection, method: str, path: str, content: Any = None) -> bytes:
    body = None if content is None else json.dumps(content)
    connection.request(method, path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"The response to {path} has status {answer.status}: {text.decode()}")
    return text


def client(
    port: int, histories: list[list[int]], start: threading.Barrier, seconds: list[float], errors: list
) -> None:
    """Send one history after the other; the first one is a warm-up."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    for number, history in enumerate(histories):
        if number == 1:
            start.wait()
        begin = time.perf_counter()
        try:
            ask(connection, "POST", "/recommend", {"histories": [history]})
        except (RuntimeError, OSError, http.client.HTTPException) as error:
            errors.append(error)
        if number:
            seconds.append(time.perf_counter() - begin)
    connection.close()


def batches(port: int) -> tuple[float, float]:
    """Return the number of histories that were decoded so far, and the number of batches."""
    text = ask(http.client.HTTPConnection("127.0.0.1", port, timeout=120), "GET", "/metrics").decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return tuple(float(values[f"gflowtrl_batch_histories_{name}"]) for name in ("sum", "count"))


def load(port: int, clients: int, requests: int, length: int, items: int) -> dict[str, float]:
    """Send requests from all clients; return their latencies, the throughput and the mean batch size."""
    chance = random.Random(0)
    histories = [
        [[chance.randrange(items) for _ in range(length)] for _ in range(requests + 1)] for _ in range(clients)
    ]
    seconds: list[float] = []
    errors: list[Exception] = []
    start = threading.Barrier(clients + 1)
    threads = [threading.Thread(target=client, args=(port, mine, start, seconds, errors)) for mine in histories]
    for thread in threads:
        thread.start()
    while start.n_waiting < clients:  # until all clients have warmed up
        time.sleep(0.01)
    rows, count = batches(port)
    begin = time.perf_counter()
    start.wait()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - begin
    more_rows, more_count = batches(port)
    if errors:
        raise RuntimeError(f"{len(errors)} requests failed; the first error is: {errors[0]}")
    quantiles = torch.tensor(seconds).quantile(torch.tensor([0.5, 0.99])).tolist()
    return {
        "errors": len(errors), "requests": len(seconds), "p50": quantiles[0], "p99": quantiles[1],
        "per_second": len(seconds) / wall, "batch": (more_rows - rows) / (more_count - count),
    }  # fmt: skip


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--clients", type=int, default=50, help="number of concurrent clients")
    parser.add_argument("--requests", type=int, default=20, help="requests per client, one history each")
    parser.add_argument("--history", type=int, default=20, help="items per history")
    parser.add_argument("--items", type=int, default=5000, help="items in the catalog")
    parser.add_argument("--size", choices=list(SIZES), default="1.2M", help="size of the model")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of the server")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        catalog, tokenizer = random_catalog(given.items)
        Recommender(llama(len(tokenizer), given.size), tokenizer, catalog).save_pretrained(Path(folder))
        for _ in range(given.rounds):
            for side, options in SIDES.items():
                with running(folder, given.threads, options) as port:
                    measured = load(port, given.clients, given.requests, given.history, given.items)
                rows.append({"side": side, **measured})
                print(rows[-1], flush=True)
    columns = {
        "side": "{side}", "errors": "{errors}", "p50, s": "{p50:.3f}", "p99, s": "{p99:.3f}",
        "requests/s": "{per_second:.0f}", "histories per batch": "{batch:.1f}",
    }  # fmt: skip
    report(rows, columns, given, clients=given.clients, threads=given.threads)


if __name__ == "__main__":
    main()
