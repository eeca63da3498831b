"""`gflowtrl serve`: recommendations over HTTP."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress

from gflowtrl.serving.limits import Limits

from .common import guarded, make_parser, parse


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code, which is 0 after Ctrl-C."""
    parser = make_parser(
        "serve",
        "Answers requests for recommendations over HTTP. There is no authentication: listen on this machine only, or "
        "put a proxy in front.",
        prints_json=False,
    )
    parser.add_argument("--model", required=True, help="folder of a recommender, or its name on the Hub")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one")
    parser.add_argument("--max_batch", type=int, default=Limits.max_batch, help="histories decoded together")
    parser.add_argument("--max_wait_ms", type=float, default=Limits.max_wait_ms, help="how long one waits for others")
    parser.add_argument("--max_queue", type=int, default=Limits.max_queue, help="requests waiting; more get a 503")
    parser.add_argument("--max_k", type=int, default=Limits.max_k, help="longest list")
    parser.add_argument("--threads", type=int, help="of torch")
    return guarded(lambda: _serve(parse(parser, arguments)))


def _serve(given: argparse.Namespace) -> None:
    from gflowtrl.serving import serve

    limits = Limits(given.max_batch, given.max_wait_ms, given.max_queue, given.max_k)
    with suppress(KeyboardInterrupt):  # how a server is stopped
        serve(given.model, given.host, given.port, limits, given.threads)
