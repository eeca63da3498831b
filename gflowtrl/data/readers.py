"""Readers: the folder format of this library and the LETTER / APAO triple. docs/data.md describes both."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from gflowtrl.catalog import Item
from gflowtrl.checks import check_text, is_finite

from .interactions import CLICKED, PURCHASED, SHOWN, Event, InteractionData


def read_interactions(path: str | Path, with_ids: bool = True) -> InteractionData:
    """Read a folder in whichever known format its files have.

    Args:
        path: a folder with `sequences.jsonl` (see `read_folder`) or with `X.inter.json` (see `read_letter`).
        with_ids: False leaves semantic ids aside, which may be of other items then.

    Raises:
        FileNotFoundError: if the folder, or a known format in it, is not there.
        ValueError: if a file is broken; the message says where.
    """
    path = Path(path)
    if (path / "sequences.jsonl").is_file():
        return read_folder(path, with_ids)
    if path.is_dir() and not any(path.glob("*.inter.json")):
        raise FileNotFoundError(f"{path} holds neither sequences.jsonl nor X.inter.json (docs/data.md).")
    if not path.exists() and not path.with_name(f"{path.name}.inter.json").is_file():
        raise FileNotFoundError(f"There is no folder {path}. Check the path; `gflowtrl prepare` makes one.")
    return read_letter(path, with_ids)


def read_folder(path: str | Path, with_ids: bool = True) -> InteractionData:
    """Read the folder format.

    `sequences.jsonl` is required. `items.jsonl`, `semantic_ids.json`, `events.jsonl` and `dataset.json` are read where
    they are, the ids only where `with_ids` says so. The catalog is every item named in the first three.

    Raises:
        FileNotFoundError: if `path` or `sequences.jsonl` is missing.
        ValueError: for a broken line, a duplicate, a field that is missing, or files that contradict each other; the
            message names the file and the line, or the user or item.
    """
    path = Path(path)
    file = _require(path / "sequences.jsonl")
    by_user = {user: _items(row.get("items"), f"{where}: user {user!r}") for where, user, row in _rows(file, "user")}
    if not by_user:
        raise ValueError(f"{file} is empty. It needs one line per user.")
    users, sequences = list(by_user), list(by_user.values())
    file, features = path / "items.jsonl", {}
    if file.is_file():
        features = {item: _features(row, where) for where, item, row in _rows(file, "item")}
    numbers = _are_numbers(chain(chain.from_iterable(sequences), features))
    ids_file = path / "semantic_ids.json"
    semantic_ids = _read_semantic_ids(ids_file, numbers) if with_ids and ids_file.is_file() else None
    about = _read_about(path / "dataset.json")
    events = _read_events(path / "events.jsonl", users) if (path / "events.jsonl").is_file() else None
    return InteractionData(
        name=about.get("name") or path.resolve().name,
        users=users,
        sequences=sequences,
        items=_all_items(sequences, features, semantic_ids),
        item_features={item: row for item, row in features.items() if row},  # some lines only name their item
        semantic_ids=semantic_ids,
        synthetic=bool(about.get("synthetic", False)),
        events=events,
        license=about.get("license"),
        source=about.get("source"),
    )


def read_letter(path: str | Path, with_ids: bool = True) -> InteractionData:
    """Read the triple of LETTER, LC-Rec and APAO: `X.inter.json`, `X.index.json`, `X.item.json`.

    `X.inter.json` maps users to their items in order, `X.index.json` items to tokens, `X.item.json` items to features;
    the last two are optional. JSON keys are strings; those that are items become whole numbers where the sequences
    hold whole numbers.

    Args:
        path: the folder, or the common beginning of the files (`folder/X`) where a folder holds several triples.
        with_ids: whether `X.index.json` is read.

    Raises:
        FileNotFoundError, ValueError: as `read_folder`.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.inter.json"))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{path} holds several data sets ({names}). Give the path without '.inter.json'.")
        path = path / (found[0].name.removesuffix(".inter.json") if found else "X")
    inter_file, index_file, item_file = (
        path.with_name(f"{path.name}.{part}.json") for part in ("inter", "index", "item")
    )
    by_user = _read_object(_require(inter_file))
    users: list[Item] = list(by_user)
    if all(_is_number(user) for user in by_user):
        users = [int(user) for user in by_user]
    sequences = [_items(items, f"{inter_file}: user {user}") for user, items in by_user.items()]
    numbers = _are_numbers(chain.from_iterable(sequences))
    semantic_ids = _read_semantic_ids(index_file, numbers) if with_ids and index_file.is_file() else None
    features = _read_features(item_file, numbers) if item_file.is_file() else {}
    return InteractionData(
        name=path.name,
        users=users,
        sequences=sequences,
        items=_all_items(sequences, features, semantic_ids),
        item_features=features,
        semantic_ids=semantic_ids,
    )


def write_folder(data: InteractionData, path: str | Path) -> None:
    """Write `data` in the folder format, so that `read_folder(path)` gives it back.

    The folder is made if needed. Semantic ids and events of earlier data in it are removed where `data` has none. A
    feature called `item` is left out, because that is the name of the id.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    pairs = zip(data.users, data.sequences, strict=True)
    _write_lines(path / "sequences.jsonl", ({"user": user, "items": items} for user, items in pairs))
    rows = ({"item": item} | data.item_features.get(item, {}) | {"item": item} for item in data.items)
    _write_lines(path / "items.jsonl", rows)
    about = {"name": data.name, "synthetic": data.synthetic}
    about |= {key: text for key in ("license", "source") if (text := getattr(data, key)) is not None}
    (path / "dataset.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
    for name in ("semantic_ids.json", "events.jsonl"):
        (path / name).unlink(missing_ok=True)
    if data.semantic_ids is not None:
        ids = {str(item): tokens for item, tokens in data.semantic_ids.items()}
        (path / "semantic_ids.json").write_text(json.dumps(ids) + "\n", encoding="utf-8")
    if data.events is not None:
        _write_lines(path / "events.jsonl", map(_event_row, data.users, data.events))


_LEAST_ID, _GREATEST_ID = -(2**63), 2**63 - 1  # what fits into the int64 columns of the splits


def _require(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing. docs/data.md describes the files that a data folder needs.")
    return file


def _rows(file: Path, key: str) -> Iterator[tuple[str, Item, dict[str, Any]]]:
    """The objects of a file of JSON lines, each with its place and the id under `key`, which no two may share."""
    seen: set[Item] = set()
    for where, row in _json_lines(file):
        found = _checked_id(row.get(key), key, where)
        if found in seen:
            raise ValueError(f"{where}: {key} {found!r} has an earlier line. Put all that is known of it in one line.")
        seen.add(found)
        yield where, found, row


def _read_about(file: Path) -> dict[str, Any]:
    about = _read_object(file) if file.is_file() else {}
    for key in ("name", "license", "source"):
        if not isinstance(about.get(key), str | None):
            raise ValueError(f"{file}: {key!r} must be text, but it is {about[key]!r}. Mend it or leave it out.")
    return about


def _read_events(file: Path, users: list[Item]) -> list[list[Event]]:
    rows: dict[Item, list[Event]] = {}
    for where, user, row in _rows(file, "user"):
        columns = [row.get(key) for key in ("sessions", "items", "levels")]
        if not all(isinstance(column, list) for column in columns) or len({*map(len, columns)}) != 1:
            raise ValueError(f"{where}: 'sessions', 'items' and 'levels' must be three lists of one length.")
        for ids, what in zip(columns, ("session", "item"), strict=False):
            for value in ids:
                _checked_id(value, what, where)
        rows[user] = [Event(*event) for event in zip(*columns, strict=True)]
        if any(event.level not in (SHOWN, CLICKED, PURCHASED) for event in rows[user]):
            raise ValueError(f"{where}: a level must be 0 (shown), 1 (clicked) or 2 (purchased).")
    if unknown := rows.keys() - set(users):
        raise ValueError(f"{file}: user {min(unknown)!r} has events but no line in sequences.jsonl.")
    return [rows.get(user, []) for user in users]


def _read_semantic_ids(file: Path, numbers: bool) -> dict[Item, tuple[str, ...]]:
    ids = _read_by_item(file, numbers)
    for item, tokens in ids.items():
        if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
            raise ValueError(f"{file}: the semantic id of item {item} must be a list of at least one string.")
    return {item: tuple(tokens) for item, tokens in ids.items()}


def _read_features(file: Path, numbers: bool) -> dict[Item, dict[str, Any]]:
    features = _read_by_item(file, numbers)
    for item, row in features.items():
        if not isinstance(row, dict):
            raise ValueError(f"{file}: the features of item {item} must be a JSON object.")
        _check_features(row, f"{file}: item {item}")
    return features


def _features(row: dict[str, Any], where: str) -> dict[str, Any]:
    """What a line says of its item."""
    known = {name: value for name, value in row.items() if name != "item"}
    _check_features(known, where)
    return known


def _check_features(known: dict[str, Any], where: str) -> None:
    """A title is text, and every number, however deep it lies, fits into a float."""
    check_text(f"{where}: 'title'", known.get("title"), optional=True)
    for name, value in known.items():
        parts = [value]
        while parts:
            part = parts.pop()
            if isinstance(part, dict | list):
                parts += part.values() if isinstance(part, dict) else part
            elif isinstance(part, int | float) and not is_finite(part):
                shown = str(part) if isinstance(part, float) else f"a number of {len(str(abs(part)))} digits"
                raise ValueError(f"{where}: {name!r} is {shown}, more than a float holds. Mend it or leave it out.")


def _json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _utf8(file), file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}, line {number}"
            if not line.strip():
                continue
            try:
                row = _whole(json_object(line, _decode), line)
            except ValueError as error:
                raise ValueError(f"{where}: {error}. Mend the line or take it out.") from None
            yield where, row


@contextmanager
def _utf8(file: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error}). Unpack it, or save it as UTF-8.") from None


def json_object(text: str, decode: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    """One JSON object. A ValueError says what the text is instead of one, without a full stop.

    Args:
        text: a line of a `.jsonl` file, or a whole file.
        decode: what reads it, `json.loads` or a decoder's `decode`.
    """
    row = json_value(text, decode)
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, not {type(row).__name__}")
    return row


def json_value(text: str, decode: Callable[[str], Any] = json.loads) -> Any:
    """What JSON text holds, as `json_object`, but any value will do."""
    try:
        return decode(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"no JSON ({error.msg}, {line}column {error.colno})") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deeply to be read") from None


_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # how JSON writes halves of surrogate pairs; two make a character


def _whole(row: dict[str, Any], text: str) -> dict[str, Any]:
    """`row`, unless its text holds half a character, which no file can hold that is made of it."""
    if _HALF.search(text):
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start].encode("ascii", "backslashreplace").decode()
            raise ValueError(f"{half} is half a character (of a surrogate pair, cut apart)") from None
    return row


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number in JSON; write null or leave the entry out")


_decode = json.JSONDecoder(parse_constant=_no_number).decode  # made once: json.loads would make one for each line


def _read_object(file: Path) -> dict[str, Any]:
    """One JSON object. A key that is there twice is an error (the json module would silently keep the last)."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if repeated := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
            raise ValueError(f"{repeated[0]!r} is there twice")
        return dict(pairs)

    with _utf8(file):
        text = file.read_text(encoding="utf-8-sig")
    try:
        decoder = json.JSONDecoder(object_pairs_hook=unique, parse_constant=_no_number)
        return _whole(json_object(text, decoder.decode), text)
    except ValueError as error:
        raise ValueError(f"{file}: {error}. Mend or replace the file.") from None


def _checked_id(value: Any, what: str, where: str) -> Item:
    if type(value) not in (int, str):  # bool is an int to isinstance
        raise ValueError(f"{where}: {what!r} must be a whole number or a string, but it is {value!r}.")
    if type(value) is int and not _LEAST_ID <= value <= _GREATEST_ID:
        raise ValueError(f"{where}: {what} {value} does not fit into 64 bits. Write all such ids as strings.")
    return value


def _items(items: Any, where: str) -> list[Item]:
    if not isinstance(items, list) or not items:
        raise ValueError(f"{where} has no items: a list with at least one item is needed.")
    return [_checked_id(item, "item", where) for item in items]


def _read_by_item(file: Path, numbers: bool) -> dict[Item, Any]:
    """A JSON object with items as keys, which JSON has as strings: whole numbers where those of the sequences are."""
    content = _read_object(file)
    if not numbers:
        return content
    if strange := [key for key in content if not _is_number(key)]:
        raise ValueError(f"{file}: {strange[0]!r} is no item: the items of the sequences are whole numbers.")
    return {int(key): value for key, value in content.items()}


def _are_numbers(items: Iterable[Item]) -> bool:
    return not any(type(item) is str for item in items)


def _is_number(text: str) -> bool:
    """Whether a JSON key is a whole number that fits into 64 bits with a sign."""
    return text.removeprefix("-").isdecimal() and len(text) <= 20 and _LEAST_ID <= int(text) <= _GREATEST_ID


def _all_items(sequences: list[list[Item]], features: dict, semantic_ids: dict | None) -> list[Item]:
    items = {*chain.from_iterable(sequences), *features, *(semantic_ids or ())}
    if len({type(item) for item in items}) > 1:
        raise ValueError("Items must be all whole numbers or all strings, but there are both.")
    return sorted(items)


def _event_row(user: Item, log: list[Event]) -> dict[str, Any]:
    sessions, items, levels = ([event[column] for event in log] for column in range(3))
    return {"user": user, "sessions": sessions, "items": items, "levels": levels}


def _write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
