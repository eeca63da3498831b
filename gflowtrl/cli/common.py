"""What the commands share: options from a YAML file, errors as one line, JSON for shells."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from safetensors import SafetensorError

from gflowtrl.compat import parser_actions


class Parser(argparse.ArgumentParser):
    """A parser whose errors are those of the commands: `guarded` prints them as one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. {self.prog} --help says what it takes.")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults stand in the help, but not that of an option which is off, or must be given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def make_parser(name: str, description: str, prints_json: bool = True) -> Parser:
    """A parser with `--config`, and `--json` where the command has a result to print."""
    parser = Parser(prog=f"gflowtrl {name}", description=description, formatter_class=_Formatter, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with options; the command line overrides it")
    if prints_json:
        parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def parse(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """Options of the command line over those of `--config`.

    Raises:
        ValueError: an option that the command does not have, one that is missing, or a value of the wrong kind.
    """
    first = Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    config, words = first.parse_known_args(arguments)[0].config, []
    if config is not None:
        from gflowtrl.configuration import check_names, read_yaml

        actions = {name.lstrip("-"): a for a in parser_actions(parser) for name in (a.dest, *a.option_strings)}
        content = read_yaml(config)
        check_names(content, actions.keys() - {"h", "help", "config"}, config)
        words = [word for name, value in content.items() for word in _as_words(actions[name], value)]
    return parser.parse_args([*words, *arguments])


def _as_words(action: argparse.Action, value: Any) -> list[str]:
    """An option of a file as words of a command line, so that it is checked as such; those that follow win."""
    if value is None or value is False:
        return []
    values = list(map(str, value if isinstance(value, list) else [value]))
    if not action.option_strings:  # a list without an option's name: the file's where the command line has none
        action.nargs, action.required, action.default = "*", False, values
        return []
    return [action.option_strings[-1], *(values if value is not True else [])]


#: What a parser raises on content that is not its own, where no reader has named the file (`files.reading` does).
PARSERS: dict[type[Exception], str] = {
    RecursionError: "Something in the input is nested too deeply to be read",
    OverflowError: "A number in the input is too large",
    SafetensorError: "A file of tensors cannot be read",
    EOFError: "A file ends too early",
}
#: Errors that say what is wrong with the input; an ImportError, that an optional package is missing.
BAD_INPUT = (ValueError, TypeError, OSError, ImportError, *PARSERS)


def guarded(work: Callable[[], int | None]) -> int:
    """Does the work; bad input is one line on stderr and exit code 2, Ctrl-C is 130; our warnings are one line too."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of loading weights; that of the work itself stays
    try:
        with warnings.catch_warnings():
            default = warnings.showwarning
            warnings.showwarning = lambda message, category, *place: (
                print(f"warning: {message}", file=sys.stderr)
                if category is UserWarning
                else default(message, category, *place)
            )
            return work() or 0
    except BAD_INPUT as error:
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130


def _sentence(error: Exception) -> str:
    """What went wrong; the operating system's own errors (`[Errno 2] ...`) and those of parsers are put into words."""
    for kind, what in PARSERS.items():
        if isinstance(error, kind):
            return f"{what} ({str(error) or type(error).__name__}). Check the files and options that were given."
    if not isinstance(error, OSError) or error.strerror is None or error.filename is None:
        return str(error)
    if isinstance(error, FileNotFoundError):
        return f"There is no file {error.filename}. Check the path."
    return f"{error.filename} cannot be used: {error.strerror}."


def show(given: argparse.Namespace, content: Any, text: str) -> None:
    """Prints the result: `content` as JSON where `--json` is given, else `text`."""
    print(json.dumps(content, ensure_ascii=False) if given.json else text)
