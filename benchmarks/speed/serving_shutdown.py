"""The shutdown of the HTTP server under load, with clients that stall.

    OMP_NUM_THREADS=1 python benchmarks/speed/serving_shutdown.py --out benchmarks/results/speed/serving_shutdown.json

A server is started with a Llama with random weights and 5,000 items. Clients (threads of this process) send requests
one after the other, half of the clients on one connection each, the others on a new connection per request. Some more
clients stall in one of five ways (`KINDS`). When half of the requests are answered, the server gets SIGTERM.

A request whose connection is closed without an answer is "lost" if it was sent before SIGTERM, or if it failed before
SIGTERM; later ones are "closed". Accepted requests are those that were answered or lost. The benchmark fails if a
request is lost, or if the server takes longer than its grace time.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measuring import ROOT, SIZES, arguments, llama, random_catalog, report

from gflowtrl import Recommender


HEAD = b"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"
#: Maps the ways to stall to what a client sends; "slow body" then sends one byte per half second.
KINDS = {
    "silent": b"",
    "half headers": HEAD,
    "half body": HEAD + b'\r\n{"histories": [[1, 2',
    "slow body": HEAD + b"\r\n",
    "never reads": b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 4000,
}


@dataclass
class Load:
    """The requests of all clients, and what became of them."""

    port: int
    histories: list[list[Any]]
    outcomes: Counter[str] = field(default_factory=Counter)
    next: int = 0
    signaled_at: float = float("inf")
    lock: threading.Lock = field(default_factory=threading.Lock)

    def client(self, keep_alive: bool) -> None:
        """Send requests until none is left."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        while True:
            with self.lock:
                number, self.next = self.next, self.next + 1
            if number >= len(self.histories):
                return connection.close()
            outcome = self.send(connection, json.dumps({"histories": [self.histories[number]]}))
            with self.lock:
                self.outcomes[outcome] += 1
            if not keep_alive or outcome != "200":
                connection.close()

    def send(self, connection: http.client.HTTPConnection, body: str) -> str:
        """Send one request and return its outcome: a status, "refused", "lost" or "closed"."""
        sent_at = float("inf")
        try:
            if connection.sock is None:
                connection.connect()
            connection.request("POST", "/recommend", body, {"Content-Type": "application/json"})
            sent_at = time.monotonic()
            answer = connection.getresponse()
            answer.read()
            return str(answer.status)
        except ConnectionRefusedError:
            return "refused"
        except (OSError, http.client.HTTPException):
            return "lost" if min(sent_at, time.monotonic()) < self.signaled_at else "closed"


def stall(port: int, count: int) -> list[tuple[str, socket.socket]]:
    """Connect clients that stall, of all kinds in turn."""
    clients: list[tuple[str, socket.socket]] = []
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.settimeout(0.5)
        with contextlib.suppress(TimeoutError):  # the server does not read on, because its answers are not read
            client.sendall(KINDS[kind])
        clients.append((kind, client))
    return clients


def drip(clients: list[tuple[str, socket.socket]], end: threading.Event) -> None:
    """Send one byte per half second from each client with a slow body."""
    slow = [client for kind, client in clients if kind == "slow body"]
    while not end.wait(0.5):
        for client in slow:
            with contextlib.suppress(OSError):  # answered with 408
                client.send(b" ")


def ends(clients: list[tuple[str, socket.socket]]) -> dict[str, int]:
    """Return how many clients of each kind got which status, after the server has ended."""
    counts = Counter()
    for kind, client in clients:
        try:
            line = client.recv(12).decode()
        except OSError:
            line = ""
        counts[f"{kind}: {line.partition(' ')[2] or 'no answer'}"] += 1
        client.close()
    return dict(counts)


def measure(
    port: int, histories: list[list[Any]], clients: int, stalled: int, stop: Callable[[], Any]
) -> dict[str, Any]:
    """Send all histories, call `stop` when half of them are answered, and return counts and seconds.

    `stop` sends SIGTERM to the server and waits for its end.
    """
    load = Load(port, histories)
    stalls, end = stall(port, stalled), threading.Event()
    threads = [threading.Thread(target=load.client, args=(number % 2 == 0,)) for number in range(clients)]
    threads.append(threading.Thread(target=drip, args=(stalls, end)))
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    while load.outcomes["200"] < len(histories) / 2 and load.outcomes.total() < len(histories):
        time.sleep(0.01)
    load.signaled_at = time.monotonic()
    stop()
    seconds = time.monotonic() - load.signaled_at
    end.set()
    for thread in threads:
        thread.join()
    statuses = {name: count for name, count in load.outcomes.items() if name.isdigit()}
    return {
        "requests": load.outcomes.total(), "answered": sum(statuses.values()), "statuses": statuses,
        "accepted": sum(statuses.values()) + load.outcomes["lost"], "lost": load.outcomes["lost"],
        "refused": load.outcomes["refused"], "closed": load.outcomes["closed"], "stalled": len(stalls),
        "ends": ends(stalls), "load_s": load.signaled_at - begin, "exit_s": seconds,
    }  # fmt: skip


@contextlib.contextmanager
def running(folder: str, grace_s: float) -> Iterator[tuple[int, subprocess.Popen]]:
    """Context manager: start a server in a new process and yield its port and process."""
    command = [sys.executable, "-m", "gflowtrl", "serve", "--model", folder, "--port", "0", "--threads", "1"]
    command += ["--grace_s", str(grace_s)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            if " on http://" not in line:
                raise RuntimeError("The server did not start; its output is above.")
            yield int(line.split("http://")[1].split()[0].rpartition(":")[2]), server
        finally:
            server.kill()


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--clients", type=int, default=40, help="number of concurrent clients")
    parser.add_argument("--requests", type=int, default=6000, help="requests of all clients, one history each")
    parser.add_argument("--stalled", type=int, default=30, help="number of clients that stall")
    parser.add_argument("--grace_s", type=float, default=15.0, help="grace time of the server in seconds")
    parser.add_argument("--history", type=int, default=20, help="items per history")
    parser.add_argument("--items", type=int, default=5000, help="items in the catalog")
    parser.add_argument("--size", choices=list(SIZES), default="0.2M", help="size of the model")
    given = parser.parse_args()
    chance, rows = random.Random(0), []
    histories = [[chance.randrange(given.items) for _ in range(given.history)] for _ in range(given.requests)]
    with tempfile.TemporaryDirectory() as folder:
        catalog, tokenizer = random_catalog(given.items)
        Recommender(llama(len(tokenizer), given.size), tokenizer, catalog).save_pretrained(Path(folder))
        for _ in range(given.rounds):
            with running(folder, given.grace_s) as (port, server):

                def stop(server: subprocess.Popen = server) -> int:
                    server.send_signal(signal.SIGTERM)
                    return server.wait(2 * given.grace_s)

                row = measure(port, histories, given.clients, given.stalled, stop)
                rows.append(row | {"grace_s": given.grace_s, "exit_code": server.returncode})
            print(rows[-1], flush=True)
    columns = {
        "requests": "{requests}", "accepted": "{accepted}", "answered": "{answered}", "refused": "{refused}",
        "closed": "{closed}", "stalled": "{stalled}", "SIGTERM to exit, s": "{exit_s:.1f}", "grace, s": "{grace_s:g}",
    }  # fmt: skip
    report(rows, columns, given)
    bad = [row for row in rows if row["lost"] or row["exit_s"] > row["grace_s"]]
    if bad:
        raise SystemExit(f"{len(bad)} of {len(rows)} runs lost a request or took longer than the grace time.")


if __name__ == "__main__":
    main()
