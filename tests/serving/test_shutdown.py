"""A server in its own process: signals, the grace time, clients that stall or hang up, and what is not HTTP."""

import importlib
import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from gflowtrl import Recommender

from .world import HISTORY, make_recommender


pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
pytest.importorskip("httpx2", reason="of the extra `test`")

import httpx2  # noqa: E402

from gflowtrl.serving import Limits, serve  # noqa: E402


REQUEST = {"histories": [HISTORY], "k": 3}
ALONE = REQUEST | {"strategy": "sample"}  # is not batched
HEAD = b"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"
HALF_BODY = HEAD + b'\r\n{"histories": [["i0'
STALLS = [b"", HEAD, HALF_BODY, b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 3000]  # the last never reads
SPEED = Path(__file__).parents[2] / "benchmarks" / "speed"

# Each server is a fork of a process that has imported this module.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_recommender().save_pretrained(folder)
    return str(folder)


def run(folder: str, log: str, limits: Limits, decoding, may_decode) -> None:
    """In the server's process: serve, with stdout and stderr in the file `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1), os.dup2(file, 2)
    recommend = Recommender.recommend

    def wait_and_recommend(*args, **options):
        decoding.set()
        may_decode.wait()
        return recommend(*args, **options)

    Recommender.recommend = wait_and_recommend
    with suppress(KeyboardInterrupt):
        serve(folder, port=0, limits=limits)


class Server:
    """A server that decodes nothing until `may_decode` is set."""

    def __init__(self, folder: str, log, limits: Limits):
        self.log, self.decoding, self.may_decode = log, PROCESSES.Event(), PROCESSES.Event()
        arguments = (folder, str(log), limits, self.decoding, self.may_decode)
        self.process = PROCESSES.Process(target=run, args=arguments)
        self.process.start()
        wait_until(lambda: log.exists() and "(Ctrl-C to stop)" in log.read_text(), 120)
        self.url = log.read_text().split(" on ")[1].split()[0]
        self.port = int(self.url.rpartition(":")[2])
        assert httpx2.get(f"{self.url}/health").status_code == 200

    def send(self, content: bytes) -> socket.socket:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", self.port))
        client.settimeout(0.3)
        with suppress(TimeoutError):  # the server does not read on, because its answers are not read
            client.sendall(content)
        client.settimeout(20)
        return client

    def kill(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def metrics(self) -> dict[str, float]:
        lines = httpx2.get(f"{self.url}/metrics").text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def accepts(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port)).close()
        except ConnectionRefusedError:
            return False
        return True


@pytest.fixture
def start(folder, tmp_path) -> Iterator[Callable[..., Server]]:
    servers = []

    def start(**limits) -> Server:
        servers.append(Server(folder, tmp_path / "log", Limits(**limits)))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def read(client: socket.socket) -> tuple[str, dict]:
    """The status line and the JSON of an answer after which the server closes the connection."""
    with client, client.makefile("rb") as file:
        head, _, body = file.read().partition(b"\r\n\r\n")
    assert b"application/json" in head and b"connection: close" in head.lower()
    return head.splitlines()[0].decode(), json.loads(body)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin <= seconds


# -------------------------------------------------------------------------------------------------------- the shutdown
def test_under_load_every_accepted_request_is_answered_within_the_grace_time(start, monkeypatch):
    """The same as benchmarks/speed/serving_shutdown.py with fewer clients."""
    monkeypatch.syspath_prepend(SPEED)
    measure = importlib.import_module("serving_shutdown").measure
    server = start(grace_s=5.0)
    server.may_decode.set()

    def stop() -> None:
        server.kill(signal.SIGTERM)
        server.process.join(20)

    found = measure(server.port, [HISTORY] * 400, clients=12, stalled=10, stop=stop)
    assert found["lost"] == 0 and found["statuses"].keys() == {"200"} and found["exit_s"] <= 5.0, found
    assert found["answered"] >= 200 and found["refused"] > 0, found
    assert found["closed"] <= 12, found  # a connection that was idle at the end; at most one per client
    assert found["ends"]["half body: 503"] == 2, found
    assert server.process.exitcode == -signal.SIGTERM  # after everything was answered, as uvicorn does it


def test_a_decoding_that_hangs_is_503_and_does_not_outlast_the_grace_time(start):
    server = start(grace_s=4.0)
    with ThreadPoolExecutor(2) as pool, within(10.0):
        answers = [pool.submit(httpx2.post, f"{server.url}/recommend", json=ALONE, timeout=20) for _ in range(2)]
        assert server.decoding.wait(20)
        wait_until(lambda: server.metrics()["gflowtrl_queue_length"] == 1)
        with within(4.0):
            server.kill(signal.SIGTERM)
            server.process.join(20)
        for answer in answers:
            assert answer.result().status_code == 503
            assert answer.result().json()["detail"].startswith("The server stopped before it could answer.")
    assert server.process.exitcode == 1
    assert "wait_and_recommend" in server.log.read_text()  # where it hangs


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_server_at_once(start, number):
    server = start(grace_s=600.0)
    client = server.send(HALF_BODY)
    server.kill(number)
    wait_until(lambda: not server.accepts())
    assert server.process.is_alive()
    server.kill(number)
    server.process.join(5)
    assert server.process.exitcode == -number
    client.close()


def test_ctrl_c_ends_the_server_without_an_error_whatever_clients_do(start):
    server = start(grace_s=5.0)
    clients = [server.send(content) for content in STALLS]
    with within(5.5):  # and the end of the interpreter
        server.kill(signal.SIGINT)
        server.process.join(20)
    assert server.process.exitcode == 0
    for client in clients:
        client.close()


# ------------------------------------------------------------------------------------------------------------- clients
def test_clients_that_hang_up_are_not_answers_and_their_work_is_not_done(start):
    server = start()
    body = json.dumps(ALONE).encode()
    whole = HEAD.replace(b"1000", str(len(body)).encode()) + b"\r\n" + body
    stays = server.send(whole)
    assert server.decoding.wait(20)
    leaving = [server.send(whole) for _ in range(3)]
    wait_until(lambda: server.metrics()["gflowtrl_queue_length"] == 3)
    for client in [*leaving, server.send(HALF_BODY)]:
        client.close()
    wait_until(lambda: server.metrics()["gflowtrl_queue_length"] == 0)
    server.may_decode.set()
    assert b" 200 OK" in stays.recv(100)
    stays.close()
    assert httpx2.post(f"{server.url}/recommend", json=REQUEST).status_code == 200
    numbers = server.metrics()
    assert numbers["gflowtrl_batch_histories_count"] == 2
    counted = {name: value for name, value in numbers.items() if "requests_total" in name and "recommend" in name}
    assert counted == {'gflowtrl_requests_total{path="/recommend",status="200"}': 2}


def test_slow_bodies_and_requests_that_are_not_http_are_refused_in_json(start):
    server = start(body_timeout_s=1.0)
    slow, silent = server.send(HEAD + b"\r\n"), server.send(HALF_BODY)
    with suppress(OSError):
        for _ in range(30):
            slow.sendall(b" ")
            time.sleep(0.1)
    for client in (slow, silent):
        status, answer = read(client)
        assert status == "HTTP/1.1 408 Request Timeout"
        assert answer == {"detail": "The body did not arrive within 1 seconds; send it faster."}
    for content in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n"):
        status, answer = read(server.send(content))
        assert status == "HTTP/1.1 400 Bad Request" and answer["detail"].startswith("The request is not valid HTTP")
    assert httpx2.get(f"{server.url}/health").status_code == 200
