"""Start a server in one call."""

from __future__ import annotations

import os
import socket

import torch
import uvicorn

from gflowtrl.checks import COUNT, check_number
from gflowtrl.recommender import Recommender

from .app import create_app
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
        ValueError: a port that is none, or no thread.
        ImportError: FastAPI or uvicorn is not installed.
        FileNotFoundError: the folder or one of its files is missing.
        OSError: the address cannot be listened on, as when another process does.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port is {port}; give a number from 0 to 65535.")
    check_number("threads", threads, COUNT, optional=True)
    if threads is not None:
        torch.set_num_threads(threads)
    with _bound(host, port) as address:  # before the model is loaded, which can take long
        device = "cuda" if torch.cuda.is_available() else "cpu"
        recommender = Recommender.from_pretrained(model_dir, device_map=device)
        settings = uvicorn.Config(create_app(recommender, limits), log_level="warning", access_log=False)
        address.listen(settings.backlog)
        url = f"http://{f'[{host}]' if ':' in host else host}:{address.getsockname()[1]}"
        print(f"{len(recommender.catalog)} items of {model_dir} on {url} (Ctrl-C stops)", flush=True)
        uvicorn.Server(settings).run(sockets=[address])


def _bound(host: str, port: int) -> socket.socket:
    """A socket on the address; an OSError names what cannot be had."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)  # as uvicorn tells them apart
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for old connections
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        text = f"{host}:{port} cannot be listened on ({error.strerror}); choose another --host or --port."
        raise OSError(text) from error
    return bound
