"""Start a server from the command line or in one call."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence

from . import load, missing_extra
from .limits import Limits


def serve(
    model_dir: str | os.PathLike,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    threads: int | None = None,
) -> None:
    """Answer requests until the process is told to stop (Ctrl-C, SIGTERM), and then those that are queued.

    The model is on the GPU where there is one, else on the CPU. There is no authentication: `host` should be this
    machine or a network whose members may all ask.

    Args:
        model_dir: the folder of a recommender, or its name on the Hugging Face Hub.
        host: the address to listen on.
        port: its port; 0 takes a free one, which is printed.
        limits: by default `Limits()`.
        threads: of torch; by default what torch chooses.

    Raises:
        ImportError: FastAPI or uvicorn is not installed.
        FileNotFoundError: the folder or one of its files is missing.
        OSError: the address cannot be listened on, as when another process does.
    """
    import torch

    from gflowtrl.recommender import Recommender

    try:
        import uvicorn

        create_app = load("create_app").create_app
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error
    if threads is not None:
        torch.set_num_threads(threads)
    with _bound(host, port) as address:  # before the model is loaded, which can take long
        device = "cuda" if torch.cuda.is_available() else "cpu"
        recommender = Recommender.from_pretrained(model_dir, device_map=device)
        settings = uvicorn.Config(create_app(recommender, limits), log_level="warning", access_log=False)
        address.listen(settings.backlog)
        print(f"{len(recommender.catalog)} items of {model_dir} on {_url(address)} (Ctrl-C stops)", flush=True)
        uvicorn.Server(settings).run(sockets=[address])


def main(arguments: Sequence[str] | None = None) -> int:
    """`gflowtrl serve`: starts a server from the command line.

    Returns:
        The exit code: 0 after Ctrl-C, 2 for bad input (one line says what).
    """
    try:
        given = _parser().parse_args(arguments)
        limits = Limits(given.max_batch, given.max_wait_ms, given.max_queue, given.max_k)
        from transformers.utils import logging

        logging.disable_progress_bar()  # of loading weights
        serve(given.model, given.host, given.port, limits, given.threads)
    except SystemExit as end:  # argparse has said what is wrong, or printed its help
        return int(end.code or 0)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message} (--help lists the options)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gflowtrl serve",
        description="Answer requests for recommendations over HTTP. There is no authentication: listen on this "
        "machine only, or put a proxy in front.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    known = Limits()
    parser.add_argument("--model", required=True, help="folder of a recommender, or its name on the Hub")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=_port, default=8000, help="port to listen on; 0 takes a free one")
    parser.add_argument("--max_batch", type=int, default=known.max_batch, help="histories decoded together")
    parser.add_argument("--max_wait_ms", type=float, default=known.max_wait_ms, help="how long one waits for others")
    parser.add_argument("--max_queue", type=int, default=known.max_queue, help="requests waiting; more get a 503")
    parser.add_argument("--max_k", type=int, default=known.max_k, help="longest list")
    parser.add_argument("--threads", type=_count, help="of torch")
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port; give a number from 0 to 65535")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of at least 1")
    return int(text)


def _bound(host: str, port: int) -> socket.socket:
    """A socket on the address; an OSError names what cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for old connections
            bound.bind(address)
        except OSError:
            bound.close()
            raise
        return bound
    except OSError as error:
        text = f"{host}:{port} cannot be listened on ({error.strerror}); choose another --host or --port."
        raise OSError(text) from error


def _url(address: socket.socket) -> str:
    host, port = address.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
