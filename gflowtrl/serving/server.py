"""Run a server for a saved recommender."""

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
    """Serve a recommender until Ctrl-C or SIGTERM, then answer the queued requests and return.

    The model is on the GPU if there is one, else on the CPU. There is no authentication: listen on this machine only,
    or on a network all of whose members may send requests.

    Args:
        model_dir: the folder of a recommender, or its name on the Hugging Face Hub.
        host: address to listen on.
        port: port to listen on; 0 chooses a free one, which is printed.
        limits: by default `Limits()`.
        threads: number of torch's threads; by default torch chooses.

    Raises:
        ValueError: `port` or `threads` is out of range.
        ImportError: FastAPI or uvicorn is not installed.
        FileNotFoundError: the folder or one of its files is missing.
        OSError: the address is not available, for example because another process uses it.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port is {port}; it must be a number from 0 to 65535.")
    check_number("threads", threads, COUNT, optional=True)
    if threads is not None:
        torch.set_num_threads(threads)
    with _bind(host, port) as address:  # before the model is loaded, which can take long
        device = "cuda" if torch.cuda.is_available() else "cpu"
        recommender = Recommender.from_pretrained(model_dir, device_map=device)
        settings = uvicorn.Config(create_app(recommender, limits), log_level="warning", access_log=False)
        address.listen(settings.backlog)
        url = f"http://{f'[{host}]' if ':' in host else host}:{address.getsockname()[1]}"
        print(f"Serving {len(recommender.catalog)} items of {model_dir} on {url} (Ctrl-C to stop)", flush=True)
        uvicorn.Server(settings).run(sockets=[address])


def _bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address; an OSError names the address."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)  # uvicorn's rule
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart does not wait for old connections
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        text = f"{host}:{port} is not available ({error.strerror}); choose another --host or --port."
        raise OSError(text) from error
    return bound
