"""Reader of the folder format, and a reader of LETTER / APAO triples. docs/data.md describes both."""

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from gflowtrl.catalog import Item
from gflowtrl.checks import check_text, is_finite, short_repr
from gflowtrl.configuration import locate_errors
from gflowtrl.files import check_data_path, is_entry, read_text, text_lines

from .interactions import CLICKED, PURCHASED, SHOWN, Event, Exposed, InteractionData, flatten
from .json_text import check_characters, json_object, refuse_constant, strict_decode
from .parquet import ITEMS_FILE, SEQUENCES_FILE, read_parquet_items, read_parquet_sequences
from .sequences import Sequences


def read_interactions(path: str | Path, with_ids: bool = True) -> InteractionData:
    """Read a data folder, detecting its format from its files.

    Args:
        path: a folder with `sequences.jsonl` or `sequences.parquet` (see `read_folder`), or with `X.inter.json` (see
            `read_letter`).
        with_ids: whether to read semantic ids; False ignores them, even if they belong to other items.

    Raises:
        FileNotFoundError: if the folder does not exist or has no known format.
        ValueError: if a file is broken; the message names the file and the position.
    """
    path = Path(path)
    if is_data_folder(path):
        return read_folder(path, with_ids)
    if path.is_dir() and not any(path.glob("*.inter.json")):
        raise FileNotFoundError(
            f"{path} contains neither sequences.jsonl nor X.inter.json nor sequences.parquet; see docs/data.md."
        )
    check_data_path(path)
    return read_letter(path, with_ids)


def is_data_folder(path: str | Path) -> bool:
    """Return whether a folder holds sequences of users."""
    return Path(path, "sequences.jsonl").is_file() or Path(path, SEQUENCES_FILE).exists()


def read_folder(path: str | Path, with_ids: bool = True) -> InteractionData:
    """Read the folder format.

    `sequences.jsonl` or `sequences.parquet` is required. `items.jsonl` or `items.parquet`, `semantic_ids.json`,
    `events.jsonl`, `exposed.jsonl`, `impressions.json` and `dataset.json` are read if they exist, the ids only if
    `with_ids` is set. The catalog is all items in the first three files.

    Raises:
        FileNotFoundError: if `path` or `sequences.jsonl` is missing.
        ValueError: for a broken line, a duplicate, a missing field, or files that contradict each other; the message
            names the file and the line, or the user or item.
    """
    path = Path(path)
    if is_entry(file := path / SEQUENCES_FILE):
        _only_one(file, path / "sequences.jsonl")
        users, sequences, times = read_parquet_sequences(file)
    else:
        users, sequences, times = _read_sequences(_require(path / "sequences.jsonl"))
    features = {}
    for where, item, row in _item_rows(path):
        features[item] = row
        check_features(row, where)
    numeric_items = _all_numeric(chain(sequences.names, features))
    ids_file = path / "semantic_ids.json"
    semantic_ids = _read_semantic_ids(ids_file, numeric_items) if with_ids and is_entry(ids_file) else None
    about = _read_about(path / "dataset.json")
    events = _read_events(file, users) if is_entry(file := path / "events.jsonl") else None
    exposed = read_exposed(file) if is_entry(file := path / "exposed.jsonl") else None
    impressions = read_impressions(file, numeric_items) if is_entry(file := path / "impressions.json") else None
    items = _all_items(sequences.names, features, semantic_ids, path)
    if len(items) == len(sequences.names):
        items = sequences.names
    with locate_errors(str(path), ()):
        return InteractionData(
            name=about.get("name") or path.resolve().name,
            users=users,
            sequences=sequences if items is sequences.names else Sequences(*flatten(sequences, items), items),
            items=items,
            item_features={
                item: row for item, row in features.items() if row
            },  # some lines name an item without features
            semantic_ids=semantic_ids,
            synthetic=about.get("synthetic", False),
            events=events,
            license=about.get("license"),
            source=about.get("source"),
            times=times,
            exposed=exposed,
            impressions=impressions,
        )


def _only_one(file: Path, other: Path) -> None:
    if is_entry(other):
        raise ValueError(f"{file} and {other} both exist. Remove the one that is out of date.")


def _read_sequences(file: Path) -> tuple[list[Item], Sequences[Item], Sequences[float] | None]:
    """Read users, items and, if all users have them, times from JSON lines."""
    users: list[Item] = []
    numbers: dict[Item, int] = {}
    codes, ends, times, timed = array("i"), array("q", [0]), [], 0
    for where, user, row in json_rows(file, "user"):
        items = _items(row.get("items"), f"{where}: user {short_repr(user)}")
        users.append(user)
        codes.extend([numbers.setdefault(item, len(numbers)) for item in items])
        ends.append(len(codes))
        if "times" in row:
            timed += 1
            times.append(np.array(_times(row["times"], len(items), where)))
    if not users:
        raise ValueError(f"{file} is empty. It needs one line per user.")
    check_one_type(numbers, file)
    offsets = np.array(ends)
    sequences = Sequences.with_sorted_names(np.array(codes), offsets, list(numbers))
    # A user may have been added without times.
    return users, sequences, Sequences(np.concatenate(times), offsets) if timed == len(users) else None


def _item_rows(path: Path) -> Iterator[tuple[str, Item, dict[str, Any]]]:
    """Yield (file and line, item, features) of the items that are described."""
    file = path / ITEMS_FILE
    if is_entry(file):
        _only_one(file, path / "items.jsonl")
        seen: set[Item] = set()
        for where, item, row in read_parquet_items(file):
            if item in seen:
                raise ValueError(f"{where}: item {item!r} is on an earlier row already. Merge the two rows.")
            seen.add(item)
            yield where, item, row
    elif is_entry(file := path / "items.jsonl"):
        for where, item, row in json_rows(file, "item"):
            yield where, item, {name: value for name, value in row.items() if name != "item"}


def read_exposed(file: str | Path) -> dict[Item, Exposed]:
    """Read the items that users were shown at random: JSON lines `{"user", "items": [...], "liked": [0 or 1, ...]}`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: for a broken line, a repeated user, an item that a user was shown twice, or a value that is neither
            0 nor 1; the message names the line.
    """
    exposed = {}
    for where, user, row in json_rows(_require(Path(file)), "user"):
        items, liked = _items(row.get("items"), f"{where}: user {short_repr(user)}"), row.get("liked")
        if (
            not isinstance(liked, list)
            or len(liked) != len(items)
            or any(type(v) is not int or v not in (0, 1) for v in liked)
        ):
            raise ValueError(f"{where}: 'liked' must hold 0 or 1 for each of the {len(items)} items.")
        if len(set(items)) < len(items):
            item = next(item for item, count in Counter(items).items() if count > 1)
            raise ValueError(f"{where}: item {item!r} occurs twice. Name each exposed item once.")
        exposed[user] = Exposed(items, liked)
    if not exposed:
        raise ValueError(f"{file} is empty. It needs one line per user, or leave the file out.")
    return exposed


def read_impressions(file: str | Path, numeric_items: bool) -> dict[Item, int]:
    """Read how often each item was shown: one JSON object from items to whole numbers.

    Args:
        file: the file.
        numeric_items: whether items are whole numbers, which are strings as keys of JSON.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is not an item, a value is not a whole number of at least 0, or all are 0.
    """
    file = _require(Path(file))
    counts = _read_by_item(file, numeric_items)
    for item, count in counts.items():
        if type(count) is not int or not 0 <= count <= _MAX_ID:
            named = f"{file}: the impressions of item {short_repr(item)}"
            raise ValueError(f"{named} are {short_repr(count)}; give a whole number of at least 0.")
    if not any(counts.values()):
        raise ValueError(f"{file}: no item has an impression. Leave the file out if nothing is known.")
    return counts


def read_letter(path: str | Path, with_ids: bool = True) -> InteractionData:
    """Read the triple of LETTER, LC-Rec and APAO: `X.inter.json`, `X.index.json`, `X.item.json`.

    `X.inter.json` maps users to their items in order, `X.index.json` items to tokens, and `X.item.json` items to
    features; the last two are optional. JSON keys are strings; item keys are converted to whole numbers if the
    sequences contain whole numbers.

    Args:
        path: the folder, or the common prefix of the file names (`folder/X`) if the folder contains several triples.
        with_ids: whether to read `X.index.json`.

    Raises:
        FileNotFoundError, ValueError: as `read_folder`.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.inter.json"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"{path} contains several data sets ({names}). Give the path without '.inter.json'.")
        path = path / (files[0].name.removesuffix(".inter.json") if files else "X")
    inter_file, index_file, item_file = (
        path.with_name(f"{path.name}.{part}.json") for part in ("inter", "index", "item")
    )
    by_user = _read_object(_require(inter_file))
    if not by_user:
        raise ValueError(f"{inter_file} is empty. It needs an entry per user.")
    users: list[Item] = list(by_user)
    if all(map(_is_int64, by_user)):
        users = [int(user) for user in by_user]
    sequences = [_items(items, f"{inter_file}: user {user}") for user, items in by_user.items()]
    numeric_items = _all_numeric(chain.from_iterable(sequences))
    semantic_ids = _read_semantic_ids(index_file, numeric_items) if with_ids and index_file.is_file() else None
    features = _read_features(item_file, numeric_items) if item_file.is_file() else {}
    return InteractionData(
        name=path.name,
        users=users,
        sequences=sequences,
        items=_all_items(chain.from_iterable(sequences), features, semantic_ids, inter_file),
        item_features=features,
        semantic_ids=semantic_ids,
    )


_MIN_ID, _MAX_ID = -(2**63), 2**63 - 1  # range of the int64 columns of the splits


def _require(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing. docs/data.md describes the files that a data folder needs.")
    return file


def json_rows(file: Path, key: str) -> Iterator[tuple[str, Item, dict[str, Any]]]:
    """Yield (file and line, id under `key`, object) of each object in a JSON Lines file. Ids must be unique."""
    seen: set[Item] = set()
    for number, line in enumerate(text_lines(file), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = check_characters(json_object(line, strict_decode), line)
        except ValueError as error:
            raise ValueError(f"{where}: {error}. Correct or remove the line.") from None
        row_id = _check_id(row.get(key), key, where)
        if row_id in seen:
            raise ValueError(
                f"{where}: {key} {short_repr(row_id)} is on an earlier line already. Merge the two lines."
            )
        seen.add(row_id)
        yield where, row_id, row


def _read_about(file: Path) -> dict[str, Any]:
    about = _read_object(file) if is_entry(file) else {}
    for key in ("name", "license", "source"):
        check_text(f"{file}: {key!r}", about.get(key), optional=True)
    if not isinstance(about.get("synthetic", False), bool):
        raise ValueError(f"{file}: 'synthetic' must be true or false, but it is {short_repr(about['synthetic'])}.")
    return about


def _read_events(file: Path, users: list[Item]) -> list[list[Event]]:
    rows: dict[Item, list[Event]] = {}
    for where, user, row in json_rows(file, "user"):
        columns = [row.get(key) for key in ("sessions", "items", "levels")]
        if not all(isinstance(column, list) for column in columns) or len({*map(len, columns)}) != 1:
            raise ValueError(f"{where}: 'sessions', 'items' and 'levels' must be three lists of the same length.")
        for ids, what in zip(columns, ("session", "item"), strict=False):
            for value in ids:
                _check_id(value, what, where)
        rows[user] = [Event(*event) for event in zip(*columns, strict=True)]
        if any(event.level not in (SHOWN, CLICKED, PURCHASED) for event in rows[user]):
            raise ValueError(f"{where}: a level must be 0 (shown), 1 (clicked) or 2 (purchased).")
    if unknown := rows.keys() - set(users):
        raise ValueError(f"{file}: user {min(unknown)!r} has events but no line with a sequence.")
    return [rows.get(user, []) for user in users]


def _read_semantic_ids(file: Path, numeric_items: bool) -> dict[Item, tuple[str, ...]]:
    ids = _read_by_item(file, numeric_items)
    for item, tokens in ids.items():
        if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
            raise ValueError(f"{file}: the semantic id of item {item} must be a list of at least one string.")
    return {item: tuple(tokens) for item, tokens in ids.items()}


def _read_features(file: Path, numeric_items: bool) -> dict[Item, dict[str, Any]]:
    features = _read_by_item(file, numeric_items)
    for item, row in features.items():
        if not isinstance(row, dict):
            raise ValueError(f"{file}: the features of item {item} must be a JSON object.")
        check_features(row, f"{file}: item {item}")
    return features


def check_features(features: dict[str, Any], where: str) -> None:
    """Check that the title is text and that every number, at any depth, fits into a float."""
    check_text(f"{where}: 'title'", features.get("title"), optional=True)
    for name, value in features.items():
        stack = [value]
        while stack:
            part = stack.pop()
            if isinstance(part, dict | list):
                stack += part.values() if isinstance(part, dict) else part
            elif isinstance(part, int | float) and not is_finite(part):
                number = str(part) if isinstance(part, float) else f"a number of {len(str(abs(part)))} digits"
                raise ValueError(f"{where}: {name!r} is {number}, which exceeds a float. Correct it or leave it out.")


def _read_object(file: Path) -> dict[str, Any]:
    """Read one JSON object, refusing duplicate keys (the json module silently keeps the last)."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if repeated := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
            raise ValueError(f"the key {short_repr(repeated[0])} occurs twice")
        return dict(pairs)

    text = read_text(file)
    try:
        decoder = json.JSONDecoder(object_pairs_hook=unique, parse_constant=refuse_constant)
        return check_characters(json_object(text, decoder.decode), text)
    except ValueError as error:
        raise ValueError(f"{file}: {error}. Repair or replace the file.") from None


def _check_id(value: Any, what: str, where: str) -> Item:
    if type(value) not in (int, str):  # isinstance accepts bool as int
        raise ValueError(f"{where}: {what!r} must be a whole number or a string, but it is {short_repr(value)}.")
    if type(value) is int and not _MIN_ID <= value <= _MAX_ID:
        raise ValueError(
            f"{where}: {what} {short_repr(value)} does not fit into 64 bits. Write all such ids as strings."
        )
    return value


def _items(items: Any, where: str) -> list[Item]:
    if not isinstance(items, list) or not items:
        raise ValueError(f"{where} has no items. Give a list with at least one item.")
    return [_check_id(item, "item", where) for item in items]


def _times(times: Any, count: int, where: str) -> list[float]:
    if not isinstance(times, list) or len(times) != count:
        raise ValueError(f"{where}: 'times' must be a list of {count} numbers, one per item.")
    for time in times:
        if type(time) not in (int, float) or not is_finite(time):
            raise ValueError(
                f"{where}: the time {short_repr(time)} is not a number. Write times as numbers, such as seconds."
            )
    return times


def _read_by_item(file: Path, numeric_items: bool) -> dict[Item, Any]:
    """Read a JSON object with items as keys, converted to whole numbers if `numeric_items`."""
    content = _read_object(file)
    if not numeric_items:
        return content
    if wrong := [key for key in content if not _is_int64(key)]:
        raise ValueError(
            f"{file}: {short_repr(wrong[0])} is not an item, because the items of the sequences are whole numbers."
        )
    return {int(key): value for key, value in content.items()}


def _all_numeric(items: Iterable[Item]) -> bool:
    return not any(type(item) is str for item in items)


def _is_int64(text: str) -> bool:
    """Whether a JSON key is a whole number that fits into a signed 64-bit integer."""
    return text.removeprefix("-").isdecimal() and len(text) <= 20 and _MIN_ID <= int(text) <= _MAX_ID


def _all_items(taken: Iterable[Item], features: dict, semantic_ids: dict | None, where: Path) -> list[Item]:
    items = {*taken, *features, *(semantic_ids or ())}
    check_one_type(items, where)
    return sorted(items)


def check_one_type(items: Iterable[Item], where: Path) -> None:
    first = {type(item): item for item in items}
    if len(first) > 1:
        number, text = short_repr(first[int]), short_repr(first[str])
        raise ValueError(
            f"Items must be all whole numbers or all strings, but the data contains both {number} and {text} "
            f"({where}). Write all of them as strings."
        )
