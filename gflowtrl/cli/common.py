"""What the commands share: options from a YAML file, errors as one line, JSON for shells."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from gflowtrl.compat import parser_actions


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of the commands are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}. {self.prog} --help says what it takes.\n")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults stand in the help, but not that of an option which is off, or must be given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def make_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with `--config` and `--json`."""
    parser = _Parser(prog=f"gflowtrl {name}", description=description, formatter_class=_Formatter, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with options; the command line overrides it")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Options of the command line over those of `--config`.

    Raises:
        ValueError: the file has an option that the command has not, or a value of the wrong kind.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    config = first.parse_known_args(arguments)[0].config
    if config is not None:
        from gflowtrl.pipeline.configuration import check_names, read_yaml

        content = read_yaml(config)
        known = {
            name: action
            for action in parser_actions(parser)
            for name in (action.dest, *(option.lstrip("-") for option in action.option_strings))
        }
        check_names(content, known.keys() - {"h", "help", "config"}, config)
        for name in content.keys() & {action.dest for action in parser_actions(parser) if not action.option_strings}:
            _set_positional(known[name], content.pop(name))
        # As words of a command line, so that they are checked as such; those that follow win.
        arguments = [*_as_words(content, known), *arguments]
    return parser.parse_args(arguments)


def _set_positional(action: argparse.Action, value: Any) -> None:
    """A list that stands on the command line without an option's name: the file's where the command line has none."""
    if value is not None:
        action.nargs, action.required = "*", False
        action.default = list(map(str, value if isinstance(value, list) else [value]))


def _as_words(content: Mapping[str, Any], actions: Mapping[str, argparse.Action]) -> list[str]:
    words = []
    for name, value in content.items():
        flag = actions[name].option_strings[-1]
        if isinstance(value, bool):
            words += [flag] if value else []
        elif value is not None:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return words


def guarded(work: Callable[[], int | None]) -> int:
    """Does the work; bad input is one line on stderr and exit code 2, Ctrl-C is 130; our warnings are one line too."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading weights; that of the work itself stays
    try:
        with warnings.catch_warnings():
            default = warnings.showwarning
            warnings.showwarning = lambda message, category, *place: (
                print(f"warning: {message}", file=sys.stderr)
                if category is UserWarning
                else default(message, category, *place)
            )
            return work() or 0
    except (ValueError, TypeError, OSError, ImportError) as error:  # the last: an optional package is missing
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130


def _sentence(error: Exception) -> str:
    """What went wrong; the operating system's own errors (`[Errno 2] ...`) are put into words."""
    if not isinstance(error, OSError) or error.strerror is None or error.filename is None:
        return str(error)
    if isinstance(error, FileNotFoundError):
        return f"There is no file {error.filename}. Check the path."
    return f"{error.filename} cannot be used: {error.strerror}."


def print_json(content: Any) -> None:
    print(json.dumps(content, ensure_ascii=False))
