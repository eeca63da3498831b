"""JSON from files of users: errors in a phrase, for messages that name the file and the line."""

import json
import re
from collections.abc import Callable
from typing import Any


def json_object(text: str, decode: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        text: a line of a `.jsonl` file, or a whole file.
        decode: the parser, `json.loads` or the `decode` method of a decoder.

    Raises:
        ValueError: if the text is not a JSON object; the message is a phrase without a full stop.
    """
    row = json_value(text, decode)
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, not {type(row).__name__}")
    return row


def json_value(text: str, decode: Callable[[str], Any] = json.loads) -> Any:
    """Parse any JSON value; arguments and errors as in `json_object`."""
    try:
        return decode(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"invalid JSON ({error.msg}, {line}column {error.colno})") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # JSON escape of one half of a surrogate pair


def check_characters(row: dict[str, Any], text: str) -> dict[str, Any]:
    """Return `row`, parsed from `text`, unless it contains half a character, which no text file can store."""
    if _SURROGATE.search(text):
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start].encode("ascii", "backslashreplace").decode()
            raise ValueError(f"{half} is half a character (half of a surrogate pair)") from None
    return row


def refuse_constant(word: str) -> Any:
    """Raise a ValueError for NaN and infinity, which Python reads and JSON does not have: a `parse_constant`."""
    raise ValueError(f"{word} is not a number in JSON; write null or leave the entry out")


#: `json.loads` without NaN and infinity; created once, because `json.loads` would create a decoder per line.
strict_decode = json.JSONDecoder(parse_constant=refuse_constant).decode
