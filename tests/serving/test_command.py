"""`serve` and `gflowtrl serve`: a real server, its shutdown, and error messages."""

import gc
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from gflowtrl import Recommender
from tests.tiny import tiny_model
from tests.trainer.world import TOKENIZER, make_catalog


pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
pytest.importorskip("uvicorn", reason="serving needs the extra `serve`")
pytest.importorskip("httpx2", reason="of the extra `test`")

import httpx2  # noqa: E402
import uvicorn  # noqa: E402

from gflowtrl.cli.serve import main  # noqa: E402
from gflowtrl.serving import serve  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    Recommender(tiny_model(len(TOKENIZER)), TOKENIZER, make_catalog(), 5).save_pretrained(folder)
    return folder


def test_a_real_server_answers_and_a_shutdown_answers_waiting_requests(folder, monkeypatch, capsys):
    """`serve` runs in a thread, where uvicorn does not handle signals."""
    servers, decoding, may_decode = [], threading.Event(), threading.Event()
    run, recommend = uvicorn.Server.run, Recommender.recommend

    def run_and_record(server, sockets):
        servers.append(server)
        run(server, sockets=sockets)

    def slow(recommender, *args, **options):
        decoding.set()
        assert may_decode.wait(10)
        return recommend(recommender, *args, **options)

    monkeypatch.setattr(uvicorn.Server, "run", run_and_record)
    monkeypatch.setattr(Recommender, "recommend", slow)
    serving = threading.Thread(target=serve, args=(folder,), kwargs={"port": 0})
    serving.start()
    while not (servers and servers[0].started):
        time.sleep(0.01)
    printed = capsys.readouterr().out
    url = printed.split(" on ")[1].split()[0]
    assert printed.startswith(f"Serving 24 items of {folder} on http://127.0.0.1:")
    with httpx2.Client() as open_connection:
        assert open_connection.get(f"{url}/health").json()["model"] == str(folder)
        transports = [connection.transport for connection in servers[0].server_state.connections]
        accepted = transports[0].get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)  # or each answer takes 40 ms more
    oversized = httpx2.post(f"{url}/recommend", content=b" " * 3_000_000, headers={"content-type": "application/json"})
    assert oversized.status_code == 413  # not a broken connection
    with ThreadPoolExecutor(5) as pool:
        request = {"histories": [["i010"]], "strategy": "sample", "k": 3}  # not batched, so four requests wait
        answers = [pool.submit(httpx2.post, f"{url}/recommend", json=request, timeout=10) for _ in range(5)]
        assert decoding.wait(5)
        while "gflowtrl_queue_length 4" not in httpx2.get(f"{url}/metrics").text:
            time.sleep(0.01)
        assert gc.get_freeze_count() > 1000  # full collections do not search the model
        servers[0].should_exit = True
        time.sleep(0.1)
        may_decode.set()
        assert [answer.result().status_code for answer in answers] == [200] * 5
    serving.join(10)
    assert not serving.is_alive() and gc.get_freeze_count() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere/at/all"], "error: /nowhere/at/all is not a folder; give the folder of a saved"),
        ([], "error: the following arguments are required: --model"),
        (["--model", "x", "--port", "99999"], "error: port is 99999; it must be a number from 0 to 65535."),
        (["--model", "x", "--port", "http"], "error: argument --port: invalid int value: 'http'"),
        (["--model", "x", "--threads", "0"], "error: threads is 0; it must be a whole number of at least 1 or None."),
        (["--model", "x", "--max_k", "0"], "error: max_k is 0; it must be a whole number of at least 1."),
        (
            ["--model", "x", "--max_wait_ms", "-1"],
            "error: max_wait_ms is -1.0; it must be a finite number of at least 0",
        ),
        (["--model", "x", "--host", "300.1.1.1"], "error: 300.1.1.1:8000 is not available"),
        (["--model", "x", "--nonsense", "1"], "error: unrecognized arguments: --nonsense 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


def test_a_port_in_use_is_an_error_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--model", "x", "--port", str(port)]) == 2
    assert f"127.0.0.1:{port} is not available (Address already in use)" in capsys.readouterr().err


def test_options_reach_the_server_and_ctrl_c_ends_it_without_an_error(monkeypatch):
    arguments = []

    def interrupted(*args):
        arguments.extend(args)
        raise KeyboardInterrupt

    monkeypatch.setattr("gflowtrl.serving.server.serve", interrupted)
    assert (
        main(
            [
                "--model",
                "folder",
                "--port",
                "81",
                "--max_batch",
                "7",
                "--max_k",
                "9",
                "--threads",
                "2",
                "--grace_s",
                "3",
            ]
        )
        == 0
    )
    folder, host, port, limits, threads, catalog_token = arguments
    assert (folder, host, port, threads, catalog_token) == ("folder", "127.0.0.1", 81, 2, None)
    assert (limits.max_batch, limits.max_k, limits.max_queue, limits.grace_s) == (7, 9, 256, 3.0)
    with pytest.raises(SystemExit) as stop:  # raised by argparse
        main(["--help"])
    assert stop.value.code == 0


@pytest.mark.parametrize("library", ["fastapi", "prometheus_client", "uvicorn"])
def test_a_missing_library_is_an_error_with_the_remedy(library, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("gflowtrl.serving.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    assert main(["--model", "x", "--port", "0"]) == 2
    assert capsys.readouterr().err == f"error: Serving needs {library}. Run: pip install gflowtrl[serve]\n"
