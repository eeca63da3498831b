"""`gflowtrl serve`: serve recommendations over HTTP."""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Sequence
from contextlib import suppress

from gflowtrl.serving.limits import Limits

from .common import guarded, make_parser, parse


TOKEN_VARIABLE = "GFLOWTRL_CATALOG_TOKEN"


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit code, which is 0 after Ctrl-C."""
    parser = make_parser(
        "serve",
        "Serve recommendations over HTTP. There is no authentication: listen on this machine only, or use a proxy.",
        prints_json=False,
    )
    parser.add_argument("--model", required=True, help="folder of a recommender, or its name on the Hub")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 chooses a free one")
    parser.add_argument("--max_batch", type=int, default=Limits.max_batch, help="histories decoded together")
    parser.add_argument("--max_wait_ms", type=float, default=Limits.max_wait_ms,
                        help="milliseconds a request waits for others while the model is idle")  # fmt: skip
    parser.add_argument("--max_queue", type=int, default=Limits.max_queue, help="waiting requests; more get a 503")
    parser.add_argument("--max_k", type=int, default=Limits.max_k, help="longest list")
    parser.add_argument(
        "--grace_s", type=float, default=Limits.grace_s, help="seconds from Ctrl-C or SIGTERM to the end"
    )
    parser.add_argument("--threads", type=int, help="number of torch's threads")
    parser.add_argument(
        "--catalog_token",
        help=f"secret of POST /catalog, which is off without one; better in the environment, as {TOKEN_VARIABLE}",
    )
    return guarded(lambda: _serve(parse(parser, arguments)))


def _serve(options: argparse.Namespace) -> None:
    from gflowtrl.serving import serve

    token = options.catalog_token or os.environ.get(TOKEN_VARIABLE) or None
    limits = Limits(options.max_batch, options.max_wait_ms, options.max_queue, options.max_k, grace_s=options.grace_s)
    with suppress(KeyboardInterrupt):  # Ctrl-C is the normal way to stop a server
        serve(options.model, options.host, options.port, limits, options.threads, token)
    gc.freeze()  # the last collection, when Python ends, would search a large catalog for seconds
