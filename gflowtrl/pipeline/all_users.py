"""Recommendations for all users of a data folder: in parts, on several processes, and restartable."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.checks import COUNT, check_number
from gflowtrl.data import InteractionData, read_interactions
from gflowtrl.data.item_filter import items_where
from gflowtrl.data.readers import json_object
from gflowtrl.ensemble import Ensemble, View
from gflowtrl.files import write_text
from gflowtrl.recommender import Recommender, local_copy
from gflowtrl.request import Request
from gflowtrl.teachers import fingerprint

from .run_data import files_fingerprint
from .user_lists import UsersReport, check_output, merge, table_of, write_part


USERS_PER_PART = 4096
INPUTS_FILE, LOCK_FILE = "inputs.json", ".lock"


@dataclass(frozen=True)
class Models:
    """The models that answer, several as an average.

    Attributes:
        folders: recommenders: folders, or names on the Hub.
        weights: one per model; None: equal.
        views: views of a history as text (`View.parse`); None: the whole history.
    """

    folders: Sequence[str]
    weights: Sequence[float] | None = None
    views: Sequence[str] | None = None

    @property
    def is_ensemble(self) -> bool:
        """Whether lists are averages."""
        return len(self.folders) > 1 or self.views is not None or self.weights is not None

    def load(self) -> Recommender | Ensemble:
        """Load the recommender, or the ensemble."""
        if not self.is_ensemble:
            return Recommender.from_pretrained(self.folders[0])
        views = [View.parse(text) for text in self.views or ["full"]]
        return Ensemble.from_pretrained(self.folders, self.weights, views)


class Part(NamedTuple):
    """Consecutive users, whose lists are written together."""

    number: int
    users: list[Item]
    histories: list[list[Item]]
    exclude: list[list[Item]] | None


@dataclass(frozen=True)
class Answerer:
    """What a process needs to write parts.

    Attributes:
        folder: folder of the parts.
        models: the models.
        arguments: arguments of `recommend`, without the seed.
        seed: seed of the first part, None if lists are not sampled.
        threads: threads of each process; None: do not change them.
    """

    folder: Path
    models: Models
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    threads: int | None = None

    def file(self, number: int) -> Path:
        """The file of a part."""
        return self.folder / f"part-{number:06d}.parquet"

    def write(self, model: Recommender | Ensemble, part: Part) -> None:
        """Write the lists of a part. The file is complete or missing."""
        known, unknown = model.catalog.known_items(part.histories)
        seed = {} if self.seed is None else {"seed": part_seed(self.seed, part.number)}
        names = [f"user {user!r}" for user in part.users]
        lists = model.recommend(known, exclude=part.exclude, names=names, **self.arguments, **seed)
        cold = [not history for history in known]
        table, report = table_of(part.users, lists, cold, model.catalog.items, self.arguments.get("k", 10))
        report.unknown_items = len(unknown)
        write_part(table, report, self.file(part.number))


def recommend_users(
    models: Models,
    data_dir: str | Path,
    output: str | Path,
    *,
    where: str | None = None,
    allowed_items: Collection[Item] | None = None,
    exclude: str | Path | None = None,
    processes: int = 1,
    users_per_part: int = USERS_PER_PART,
    seed: int | None = None,
    **arguments: Any,
) -> UsersReport:
    """Recommend items for every user of a data folder, after the user's whole sequence.

    The lists are computed in parts, which are kept in `OUTPUT.parts` until all are there. A run that was stopped goes
    on there: a part is complete or missing, so no user is lost or answered twice. The parts do not depend on the
    number of processes.

    Args:
        models: the models.
        data_dir: folder of the data (`read_interactions`). Users without an item that the model knows get popular
            items, and their source is "popularity".
        output: the file. Its ending is the format: `.parquet` and `.csv` have one row per user and item, with the
            columns user, rank (from 1), item, probability and source; `.jsonl` has one line per user, also of users
            without an item.
        where: a condition on item features (`items_where`); only these items are recommended.
        allowed_items: recommend only these; with `where`, those that meet it too.
        exclude: file of items that users must not get, JSON lines as in `{"user": 3, "items": [5, 9]}`.
        processes: number of processes. Each loads the models.
        users_per_part: users per part.
        seed: seed of sampled lists; None: the lists are not sampled.
        **arguments: further arguments of `Recommender.recommend`, or of `Ensemble.recommend`.

    Raises:
        ValueError: an unknown ending, invalid arguments, invalid input; `OUTPUT.parts` belongs to other inputs, or
            another run works there; a process has died.
        FileNotFoundError: a file is missing.
    """
    output = Path(output)
    check_output(output)
    check_number("processes", processes, COUNT)
    check_number("users_per_part", users_per_part, COUNT)
    checked = {name: arguments[name] for name in ("strategy", "temperature") if name in arguments}
    Request(arguments.get("k", 10), arguments.get("num_beams"), **checked)  # checks them before the models are loaded
    models = Models([str(local_copy(folder)) for folder in models.folders], models.weights, models.views)
    data = read_interactions(data_dir, with_ids=False)
    excluded = None if exclude is None else read_exclusions(exclude, data)
    allowed = None if allowed_items is None else set(allowed_items)
    if where is not None:
        found = set(items_where(data.items, data.item_features, where))
        found &= set(ItemCatalog.from_pretrained(models.folders[0]).items)
        allowed = found if allowed is None else allowed & found
        if not allowed:
            raise ValueError(f"No item that may be recommended meets the condition {where!r}. Change it.")
    arguments |= {"allowed_items": None if allowed is None else sorted(allowed)}
    inputs = {
        "models": [files_fingerprint(folder) for folder in models.folders],
        "weights": models.weights,
        "views": models.views,
        "data": fingerprint([data.users, data.sequences]),
        "exclude": fingerprint(excluded and list(excluded.items())),
        "arguments": fingerprint(arguments),
        "seed": seed,
        "users_per_part": users_per_part,
    }
    threads = None if processes == 1 else max(1, torch.get_num_threads() // processes)
    with parts_folder(output, inputs) as folder:
        answerer = Answerer(folder, models, arguments, seed, threads)
        starts = range(0, len(data.users), users_per_part)
        missing = [number for number in range(len(starts)) if not answerer.file(number).is_file()]
        parts = (_part(data, excluded, number, starts[number], users_per_part) for number in missing)
        sizes = {number: min(users_per_part, len(data.users) - start) for number, start in enumerate(starts)}
        done = len(data.users) - sum(sizes[number] for number in missing)
        with tqdm(total=len(data.users), initial=done, unit=" users", desc="Recommending", disable=None) as bar:
            for number in _answered(answerer, parts, min(processes, max(len(missing), 1))):
                bar.update(sizes[number])
        report = merge([answerer.file(number) for number in range(len(starts))], data.users, output)
        shutil.rmtree(folder)
    report.allowed_items = None if allowed is None else len(allowed)
    return report


def part_seed(seed: int, part: int) -> int:
    """Return the seed of a part, so that a sampled list depends on the seed and on its place: the first part has the
    given seed, as in Python."""
    return seed if part == 0 else int(np.random.SeedSequence([seed % 2**64, part]).generate_state(1, np.uint64)[0])


def read_exclusions(file: str | Path, data: InteractionData) -> dict[Item, list[Item]]:
    """Read items that users must not get. Items that are not in the data are kept.

    Raises:
        ValueError: a line is broken, a user is not in the data or has two lines; the message names the line.
    """
    known, found = set(data.users), {}
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            try:
                row = json_object(line)
            except ValueError as error:
                raise ValueError(f"{place}: {error}.") from None
            user, items = row.get("user"), row.get("items")
            if not isinstance(items, list) or any(type(item) not in (int, str) for item in items):
                raise ValueError(f'{place} must be as {{"user": 3, "items": [5, 9]}}, with a list of items.')
            if type(user) not in (int, str) or user not in known:
                raise ValueError(
                    f"{place}: user {user!r} is not in {data.name}, whose users are like {data.users[0]!r}."
                )
            if user in found:
                raise ValueError(f"{place}: user {user!r} has an earlier line. Write one line per user.")
            found[user] = items
    return found


@contextmanager
def parts_folder(output: Path, inputs: Mapping[str, Any]) -> Iterator[Path]:
    """Context manager: the folder of an output's parts, for this process alone.

    Raises:
        ValueError: another run works in the folder, or its parts were made from other inputs.
    """
    folder = output.with_name(f"{output.name}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"Another run writes {output}. Wait until it has ended, or choose another file.") from None
    try:
        file, text = folder / INPUTS_FILE, json.dumps(inputs, indent=2)
        if not file.is_file():
            write_text(file, text)
        elif file.read_text(encoding="utf-8") != text:
            raise ValueError(
                f"{folder} has parts that were made with another model, other data or other options. Remove it, or "
                f"choose another output."
            )
        yield folder
    finally:
        if folder.is_dir() and not any(folder.glob("part-*")):  # nothing is lost
            shutil.rmtree(folder)
        lock.release()


def _part(
    data: InteractionData, excluded: Mapping[Item, list[Item]] | None, number: int, start: int, size: int
) -> Part:
    users = data.users[start : start + size]
    left_out = None if excluded is None else [excluded.get(user, []) for user in users]
    return Part(number, users, data.sequences[start : start + size], left_out)


# ----------------------------------------------------------------------------------------------------------- processes
def _answered(answerer: Answerer, parts: Iterator[Part], processes: int) -> Iterator[int]:
    """Write the parts and yield the number of each one that is complete."""
    if processes == 1:
        model = None
        for part in parts:
            model = answerer.models.load() if model is None else model
            answerer.write(model, part)
            yield part.number
        return
    context = multiprocessing.get_context("spawn")  # a forked process would share the threads of torch
    with ProcessPoolExecutor(processes, context, _start, (answerer,)) as pool:
        running: set[Future[int]] = set()
        try:
            # Two parts per process are on their way, so that a million histories are not queued at once.
            for part in parts:
                if len(running) >= 2 * processes:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
                running.add(pool.submit(_work, part))
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool:
            raise ValueError(
                "A process has ended early, for example for lack of memory. Start the command again with fewer "
                "processes; it goes on where it stopped."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_PROCESS: tuple[Answerer, Recommender | Ensemble]  # of a process of the pool


def _start(answerer: Answerer) -> None:
    global _PROCESS
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if answerer.threads is not None:
        torch.set_num_threads(answerer.threads)
    _PROCESS = answerer, answerer.models.load()


def _work(part: Part) -> int:
    answerer, model = _PROCESS
    answerer.write(model, part)
    return part.number


def _end_with_parent() -> None:
    """End this process when its parent has ended, also if that was killed; it would wait for work forever."""
    multiprocessing.parent_process().join()
    os._exit(1)
