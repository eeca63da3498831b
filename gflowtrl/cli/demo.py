"""`gflowtrl demo`: a page to try a recommender in the browser, and the folder of a Hugging Face Space with it."""

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
    parser.add_argument("--space", metavar="OUT", help="write the folder of a Hugging Face Space, and serve nothing")
    parser.add_argument("--title", help="title of the Space; by default the name of the model")
    parser.add_argument(
        "--requirement",
        help="with --space: how pip installs this library there, as in 'gflowtrl[demo] @ git+https://...'",
    )
    return guarded(lambda: _demo(parse(parser, arguments)))


def _demo(options: argparse.Namespace) -> None:
    if options.space is not None:
        return _write_space(options)
    if options.title is not None or options.requirement is not None:
        raise ValueError("--title and --requirement are used with --space only.")
    from gflowtrl.demo import run_demo  # imports Gradio

    run_demo(options.model, options.host, options.port, options.threads)


def _write_space(options: argparse.Namespace) -> None:
    if options.port is not None or options.threads is not None:
        raise ValueError("--space writes a folder and serves nothing. Leave out --port and --threads.")
    from gflowtrl.demo import write_space

    folder = write_space(options.model, options.space, options.title, options.requirement)
    print(f"{folder} is the folder of a Space. To try it: python {folder / 'app.py'}")
    print(f"To publish it: hf upload USER/NAME {folder} --repo-type space")
