"""`gflowtrl demo`: a page to try a recommender in the browser."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .common import guarded, make_parser, parse


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit code, which is 0 after Ctrl-C."""
    parser = make_parser(
        "demo",
        "Try a recommender in the browser: build a history, and see recommendations and their way through the tree. "
        "There is no authentication: listen on this machine only, or use a proxy.",
        prints_json=False,
    )
    parser.add_argument("--model", required=True, help="folder of a recommender, or its name on the Hub")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, help="port to listen on; by default the first free one from 7860 on")
    parser.add_argument("--threads", type=int, help="number of torch's threads")
    return guarded(lambda: _demo(parse(parser, arguments)))


def _demo(options: argparse.Namespace) -> None:
    from gflowtrl.demo import run_demo  # imports Gradio

    run_demo(options.model, options.host, options.port, options.threads)
