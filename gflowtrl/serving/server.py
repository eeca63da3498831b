"""Run a server for a saved recommender."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import signal
import socket
from types import FrameType

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.server import HANDLED_SIGNALS

from gflowtrl.checks import COUNT, check_number
from gflowtrl.recommender import Recommender

from .app import create_app
from .catalog import TokenCheck
from .limits import Limits


def serve(
    model_dir: str | os.PathLike,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    threads: int | None = None,
    catalog_token: str | None = None,
) -> None:
    """Serve a recommender until Ctrl-C or SIGTERM, then answer the accepted requests and return.

    At most `limits.grace_s` seconds pass between the signal and the end. Clients that have not sent their request or
    read their answer by then are disconnected; if the model hangs, the process ends with exit code 1. A second signal
    ends the process at once. In a thread other than the main one, signals are not handled.

    The model is on the GPU if there is one, else on the CPU. Only changes of the catalog need a token:
    listen on this machine only, or on a network all of whose members may send requests.

    Args:
        model_dir: the folder of a recommender, or its name on the Hugging Face Hub.
        host: address to listen on.
        port: port to listen on; 0 chooses a free one, which is printed.
        limits: by default `Limits()`.
        threads: number of torch's threads; by default torch chooses.
        catalog_token: the secret of clients that may change the catalog (`POST /catalog`); None: nobody may.

    Raises:
        ValueError: `port` or `threads` is out of range; the token is too short; the item tokenizer is damaged.
        ImportError: a library of the extra `serve` is not installed.
        FileNotFoundError: the folder or one of its files is missing.
        OSError: the address is not available, for example because another process uses it.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port is {port}; it must be a number from 0 to 65535.")
    check_number("threads", threads, COUNT, optional=True)
    if threads is not None:
        torch.set_num_threads(threads)
    limits = Limits() if limits is None else limits
    if catalog_token is not None:
        TokenCheck(catalog_token)
    with _bind(host, port) as address:  # before the model is loaded, which can take long
        device = "cuda" if torch.cuda.is_available() else "cpu"
        recommender = Recommender.from_pretrained(model_dir, device_map=device)
        if catalog_token is not None:
            recommender.item_tokenizer  # noqa: B018  (reads and checks its files, before the first change needs them)
        server = _Server(create_app(recommender, limits, catalog_token), limits.grace_s)
        items = len(recommender.catalog)
        del recommender  # so that a change of the catalog frees it
        gc.collect()
        address.listen(server.config.backlog)
        url = f"http://{f'[{host}]' if ':' in host else host}:{address.getsockname()[1]}"
        print(f"Serving {items} items of {model_dir} on {url} (Ctrl-C to stop)", flush=True)
        gc.freeze()  # a full collection would search the model and the catalog for a quarter of a second and more
        try:
            server.run(sockets=[address])
        finally:
            gc.unfreeze()
            if server.signaled:
                faulthandler.cancel_dump_traceback_later()


class _Server(uvicorn.Server):
    """A server that ends within `grace_s` seconds of a signal, and at once after a second signal."""

    def __init__(self, app: FastAPI, grace_s: float):
        settings = uvicorn.Config(app, http=_JSONProtocol, ws="none", log_level="warning", access_log=False)
        # What is left of the grace time is for the 503s of the requests that are canceled then, and for the exit.
        settings.timeout_graceful_shutdown = 0.8 * grace_s
        super().__init__(settings)
        self.state, self.grace_s, self.signaled = app.state, grace_s, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop."""
        super().handle_exit(sig, frame)
        self.state.stopping = self.signaled = True
        faulthandler.dump_traceback_later(0.95 * self.grace_s, file=2, exit=True)  # the end, even if a decoding hangs
        for each in HANDLED_SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new connections, then do what uvicorn does: close idle connections and wait for the others."""
        self.state.stopping = True
        for server in self.servers:
            server.close()
        for _ in range(10):  # turns of the event loop: requests that have arrived are read, so they are not idle
            await asyncio.sleep(0.01)
        await super().shutdown(sockets)


class _JSONProtocol(AutoHTTPProtocol):
    """uvicorn's protocol, which answers in JSON what is not HTTP."""

    def send_400_response(self, msg: str) -> None:
        """Answer a request that cannot be read, and close the connection."""
        text = "The request is not valid HTTP/1.1; check its first line, and the format and length of its headers."
        answer = JSONResponse({"detail": text}, 400, {"Connection": "close"})
        headers = b"".join(b"%b: %b\r\n" % header for header in answer.raw_headers)
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n" + headers + b"\r\n" + answer.body)
        self.transport.close()


def _bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address; an OSError names the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET  # uvicorn's rule
    # asyncio switches Nagle's algorithm off only if the protocol is named; with it, answers wait 40 ms for the client.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart does not wait for old connections
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        text = f"{host}:{port} is not available ({error.strerror}); choose another --host or --port."
        raise OSError(text) from error
    return bound
