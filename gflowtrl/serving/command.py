"""Start a server from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .limits import Limits


def main(arguments: Sequence[str] | None = None) -> int:
    """`gflowtrl serve`: starts a server from the command line.

    Returns:
        The exit code: 0 after Ctrl-C, 2 for bad input (one line says what).
    """
    try:
        given = _parser().parse_args(arguments)
        limits = Limits(given.max_batch, given.max_wait_ms, given.max_queue, given.max_k)
        from transformers.utils import logging

        from gflowtrl.serving import serve

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
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one")
    parser.add_argument("--max_batch", type=int, default=known.max_batch, help="histories decoded together")
    parser.add_argument("--max_wait_ms", type=float, default=known.max_wait_ms, help="how long one waits for others")
    parser.add_argument("--max_queue", type=int, default=known.max_queue, help="requests waiting; more get a 503")
    parser.add_argument("--max_k", type=int, default=known.max_k, help="longest list")
    parser.add_argument("--threads", type=int, help="of torch")
    return parser
