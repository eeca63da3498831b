"""Parts shared by the commands: options from a YAML file, one-line errors, JSON output."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any, NoReturn

from safetensors import SafetensorError

from gflowtrl.checks import one_line
from gflowtrl.compat import parser_actions


if TYPE_CHECKING:
    from gflowtrl.ensemble import Ensemble
    from gflowtrl.pipeline.all_users import Models
    from gflowtrl.recommender import Recommender


class Parser(argparse.ArgumentParser):
    """A parser that raises its errors, so that `guarded` prints them as one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. Run {self.prog} --help for the options.")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show defaults in the help, except for flags and required options."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def make_parser(name: str, description: str, prints_json: bool = True) -> Parser:
    """A parser with `--config`, and `--json` if the command prints a result."""
    parser = Parser(prog=f"gflowtrl {name}", description=description, formatter_class=_Formatter, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with options; the command line overrides it")
    if prints_json:
        parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def parse(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line, whose options override those of `--config`.

    Raises:
        ValueError: an unknown or missing option, or a value of the wrong type.
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
    try:
        return parser.parse_args([*words, *arguments])
    except ValueError as error:
        raise ValueError(f"{error} Some options are from {config}." if words else str(error)) from None


def _as_words(action: argparse.Action, value: Any) -> list[str]:
    """An option of a file as words of a command line, so that it is checked in the same way; later words win."""
    if value is None or value is False:
        return []
    values = list(map(str, value if isinstance(value, list) else [value]))
    if not action.option_strings:  # positional: the file's values are the default
        action.nargs, action.required, action.default = "*", False, values
        return []
    return [action.option_strings[-1], *(values if value is not True else [])]


#: Errors of parsers on bad content, if no reader has named the file (`files.reading` does).
PARSERS: dict[type[Exception], str] = {
    RecursionError: "Something in the input is nested too deeply to be read",
    OverflowError: "A number in the input is too large",
    SafetensorError: "A file of tensors cannot be read",
    UnicodeDecodeError: "A file is not in the encoding in which it is read",
    UnicodeEncodeError: "A text of the input has half a character (half of a surrogate pair) or cannot be encoded",
    EOFError: "A file ends too early",
    MemoryError: "There is not enough memory for the input",
}
#: Errors about the input, and ImportError for a missing optional package.
BAD_INPUT = (ValueError, TypeError, OSError, ImportError, *PARSERS)


def guarded(work: Callable[[], int | None]) -> int:
    """Do the work. Bad input is one line on stderr and exit code 2, Ctrl-C is 130; our warnings are one line too.

    Other errors are mistakes of the program, and keep their traceback. A closed pipe is left to `gflowtrl.cli.main`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of other libraries, about their own next versions
            default = warnings.showwarning
            warnings.showwarning = lambda message, category, *place: (
                print(f"warning: {one_line(str(message))}", file=sys.stderr)
                if issubclass(category, UserWarning | RuntimeWarning)
                else default(message, category, *place)
            )
            return work() or 0
    except BrokenPipeError:
        raise
    except BAD_INPUT as error:
        _print_below_progress(f"error: {one_line(_format_error(error))}")
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130


def _print_below_progress(line: str) -> None:
    """Print a line on stderr, not at the end of a progress bar that the error has left there."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr)


def _format_error(error: Exception) -> str:
    """The message of an error; those of the operating system (`[Errno 2] ...`) and of parsers are put into words."""
    for kind, what in PARSERS.items():
        if isinstance(error, kind):
            return f"{what} ({str(error) or type(error).__name__}). Check the files and options."
    if str(error).startswith("embedded null"):
        return "A name of a file has a NUL character. Correct it."
    if not isinstance(error, OSError) or error.strerror is None or error.filename is None:
        return str(error)
    if isinstance(error, FileNotFoundError):
        return f"There is no file {error.filename}. Check the path."
    return f"{error.filename} cannot be used: {error.strerror}."


def is_unicode(stream: IO[str]) -> bool:
    """Return whether a stream takes every character. JSON for other streams is written in ASCII, without a loss."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")


def show(given: argparse.Namespace, content: Any, text: str) -> None:
    """Print the result: `content` as JSON with `--json`, else `text`."""
    print(json.dumps(content, ensure_ascii=not is_unicode(sys.stdout)) if given.json else text)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `load_models`."""
    parser.add_argument(
        "--model", required=True, nargs="+", help="recommender (folder or Hub name); several: averaged"
    )
    parser.add_argument("--weights", type=float, nargs="+", help="one weight per model; by default equal")
    parser.add_argument("--views", nargs="+", help="average over views of a history, as in: full last=10 last=5")


def is_ensemble(options: argparse.Namespace) -> bool:
    """Return whether the options of `add_model_options` ask for an average."""
    return len(options.model) > 1 or options.views is not None or options.weights is not None


def models_of(options: argparse.Namespace) -> Models:
    """Return the models of `add_model_options`."""
    from gflowtrl.pipeline.all_users import Models

    return Models(options.model, options.weights, options.views)


def load_models(options: argparse.Namespace) -> Recommender | Ensemble:
    """Load the recommender of `--model`, or the ensemble."""
    return models_of(options).load()
