"""Recommendations for all users of a data folder: in parts, on several processes, and restartable."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.checks import COUNT, check_number, short_repr
from gflowtrl.configuration import check_names
from gflowtrl.data import InteractionData, read_interactions
from gflowtrl.data.json_text import json_object
from gflowtrl.data.recommender_files import read_details
from gflowtrl.ensemble import Ensemble, View, normalized_weights
from gflowtrl.files import text_lines
from gflowtrl.hub import local_copy
from gflowtrl.recommender import Recommender
from gflowtrl.request import Request, allowed_in
from gflowtrl.teachers import fingerprint

from .run_data import files_fingerprint
from .user_lists import UsersReport, check_output, inputs_of, merge, table_of, write_part


USERS_PER_PART = 4096
SAMPLING = {"strategy", "temperature", "seed"}  # arguments that an average does not have
ARGUMENTS = {"k", "num_beams", "batch_size", "exclude_seen", *SAMPLING}


@dataclass(frozen=True)
class Models:
    """The models that answer, several as an average.

    Attributes:
        folders: recommenders: folders, or names on the Hub.
        weights: one per model; None: equal.
        views: views of a history as text (`View.parse`); None: the whole history.

    Raises:
        ValueError: there are not as many weights as models, or a view is not known.
    """

    folders: Sequence[str]
    weights: Sequence[float] | None = None
    views: Sequence[str] | None = None

    def __post_init__(self) -> None:
        normalized_weights(self.weights, len(self.folders))
        for text in self.views or ():
            View.parse(text)

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
class Job:
    """What a process needs to write parts.

    Attributes:
        folder: folder of the parts.
        models: the models.
        arguments: arguments of `recommend`, without the seed.
        seed: seed of the first part; None: lists are not sampled.
        inputs: a hash of all that the lists depend on, which is kept with each part.
    """

    folder: Path
    models: Models
    arguments: Mapping[str, Any]
    seed: int | None
    inputs: str

    def file(self, number: int) -> Path:
        """The file of a part."""
        return self.folder / f"part-{number:06d}.parquet"

    def is_done(self, number: int) -> bool:
        """Whether a part exists.

        Raises:
            ValueError: it was made from other inputs.
        """
        found = inputs_of(self.file(number))
        if found not in (None, self.inputs):
            raise ValueError(
                f"{self.folder} has lists of another model, other data or other options. Remove it, or choose another "
                f"output."
            )
        return found is not None

    def write(self, model: Recommender | Ensemble, part: Part) -> None:
        """Write the lists of a part. The file is complete or missing."""
        known, unknown = model.catalog.readable_items(part.histories)
        seed = {} if self.seed is None else {"seed": part_seed(self.seed, part.number)}
        names = [f"user {user!r}" for user in part.users]
        lists = model.recommend(known, exclude=part.exclude, names=names, **self.arguments, **seed)
        cold = [not history for history in known]
        table, report = table_of(part.users, lists, cold, model.catalog.items, self.arguments.get("k", 10))
        report.unknown_items = len(unknown)
        write_part(table, report, self.inputs, self.file(part.number))


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
    **arguments: Any,
) -> UsersReport:
    """Recommend items for every user of a data folder, after the user's whole sequence.

    The lists are computed in parts, which are kept in `OUTPUT.parts` until all of them exist. A run that was stopped
    goes on there: a part is complete or missing, so no user is lost or answered twice. The parts do not depend on the
    number of processes. With several ones, a script needs `if __name__ == "__main__":`.

    Args:
        models: the models.
        data_dir: folder of the data (`read_interactions`). Users without an item that the model knows get popular
            items, and their source is "popularity".
        output: the file. Its ending is the format: `.parquet` and `.csv` have one row per user and item, with the
            columns user, rank (from 1), item, probability and source; `.jsonl` has one line per user, also of users
            for whom no item is left, whose source is null.
        where: a condition on item features (`items_where`); only these items are recommended.
        allowed_items: recommend only these; with `where`, those of them that meet it.
        exclude: file of items that users must not get, JSON lines as in `{"user": 3, "items": [5, 9]}`.
        processes: number of processes, at most one per part. Each loads the models.
        users_per_part: users per part.
        **arguments: `k`, `num_beams`, `batch_size`, `exclude_seen`; for one model also `strategy`, `temperature` and
            `seed`.

    Raises:
        ValueError: an unknown ending, invalid arguments, invalid input; data and models share no item; the models have
            no popular items for users who need them; `OUTPUT.parts` belongs to other inputs, or another run works
            there; a process has died.
        FileNotFoundError: a file is missing.
    """
    output, sampled = Path(output), arguments.get("strategy", "beam") == "sample"
    check_output(output)
    check_number("processes", processes, COUNT)
    check_number("users_per_part", users_per_part, COUNT)
    _check_arguments(models, arguments)
    seed = arguments.pop("seed", 0)
    models = Models([str(local_copy(folder)) for folder in models.folders], models.weights, models.views)
    catalog, data = ItemCatalog.from_pretrained(models.folders[0]), read_interactions(data_dir, with_ids=False)
    _check_users(models, catalog, data)
    excluded = None if exclude is None else read_exclusions(exclude, data)
    allowed = allowed_in(catalog, allowed_items)
    if where is not None:
        allowed = _meeting(where, data, catalog if allowed is None else allowed)
    arguments["allowed_items"] = None if allowed is None else sorted(allowed)
    inputs = {
        **_given_inputs(models, data, excluded, arguments), "seed": seed, "users_per_part": users_per_part,
    }  # fmt: skip
    with parts_folder(output) as folder:
        job = Job(folder, models, arguments, seed if sampled else None, fingerprint(inputs))
        files = _write_parts(job, data, excluded, users_per_part, processes)
        report = merge(files, data.users, output, folder / "merged")
        shutil.rmtree(folder)
    report.allowed_items = None if allowed is None else len(allowed)
    return report


def _given_inputs(
    models: Models, data: InteractionData, excluded: Mapping[Item, list[Item]] | None, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """All that lists depend on, without the seed and the size of parts."""
    return {
        "models": [files_fingerprint(folder) for folder in models.folders],
        "average": [models.weights, models.views],
        "data": fingerprint([data.users, data.sequences]),
        "exclude": fingerprint(excluded and list(excluded.items())),
        "arguments": {name: value for name, value in arguments.items() if name != "batch_size"},
    }


def _write_parts(
    job: Job, data: InteractionData, excluded: Mapping[Item, list[Item]] | None, size: int, processes: int
) -> list[Path]:
    """Write the parts that do not exist yet, and return the files of all parts in the order of the users."""
    starts = range(0, len(data.users), size)
    missing = [number for number in range(len(starts)) if not job.is_done(number)]
    parts = (_part(data, excluded, number, starts[number], size) for number in missing)
    sizes = {number: min(size, len(data.users) - start) for number, start in enumerate(starts)}
    done = len(data.users) - sum(sizes[number] for number in missing)
    with (
        tqdm(total=len(data.users), initial=done, unit=" users", desc="Recommending", disable=None) as bar,
        closing(_answered(job, parts, min(processes, len(missing)))) as answered,  # its processes end with this block
    ):
        for number in answered:
            bar.update(sizes[number])
    return [job.file(number) for number in range(len(starts))]


def _check_arguments(models: Models, arguments: Mapping[str, Any]) -> None:
    """Check the arguments of `recommend` before anything is read."""
    check_names(arguments, ARGUMENTS - (SAMPLING if models.is_ensemble else set()), what="argument")
    given = {name: arguments[name] for name in ("strategy", "temperature") if name in arguments}
    Request(arguments.get("k", 10), arguments.get("num_beams"), **given)
    check_number("batch_size", arguments.get("batch_size", 256), COUNT)


def _check_users(models: Models, catalog: ItemCatalog, data: InteractionData) -> None:
    """Check that the models know the data, and popular items if a user needs them."""
    known = set(catalog.history_items)
    if not known & set(data.items):
        raise ValueError(
            f"{models.folders[0]} knows no item of {data.name}: its items are like {catalog.items[0]!r}, those of the "
            f"data like {data.items[0]!r}. Give the data that the model was trained on."
        )
    cold = next((u for u, row in zip(data.users, data.sequences, strict=True) if known.isdisjoint(row)), None)
    if cold is not None and "item_counts" not in read_details(models.folders[0], catalog):
        raise ValueError(
            f"User {cold!r} has no item that the model knows, and the model has no counts of training interactions to "
            f"recommend popular items. Leave such users out of the data."
        )


def _meeting(where: str, data: InteractionData, among: Collection[Item]) -> frozenset[Item]:
    """Return the items `among` these that meet a condition on their features."""
    from gflowtrl.data.item_filter import items_where  # imports DuckDB, which nothing else here needs

    found = frozenset(item for item in items_where(data.items, data.item_features, where) if item in among)
    if not found:
        raise ValueError(f"No item that may be recommended meets the condition {where!r}. Change it.")
    return found


def part_seed(seed: int, part: int) -> int:
    """Return the seed of a part, so that a sampled list depends on the seed and on its place: the first part has the
    given seed, as in Python."""
    return seed if part == 0 else int(np.random.SeedSequence([seed % 2**64, part]).generate_state(1, np.uint64)[0])


def read_exclusions(file: str | Path, data: InteractionData) -> dict[Item, list[Item]]:
    """Read items that users must not get. Items that are not in the data are kept.

    Raises:
        ValueError: a line is broken, a user is not in the data or has two lines, or items are not of the type of the
            data's; the message names the line.
    """
    known, kind, found = set(data.users), type(data.items[0]), {}
    for number, line in enumerate(text_lines(file), 1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            row = json_object(line)
        except ValueError as error:
            raise ValueError(f"{place}: {error}.") from None
        user, items = row.get("user"), row.get("items")
        if not isinstance(items, list) or any(type(item) is not kind for item in items):
            like = f"whose items are like {data.items[0]!r}"
            raise ValueError(f'{place} must be as {{"user": 3, "items": [5, 9]}}, with items of {data.name}, {like}.')
        if type(user) not in (int, str) or user not in known:
            raise ValueError(
                f"{place}: user {short_repr(user)} is not in {data.name}, whose users are like {data.users[0]!r}."
            )
        if user in found:
            raise ValueError(f"{place}: user {short_repr(user)} has an earlier line. Write one line per user.")
        found[user] = items
    return found


@contextmanager
def parts_folder(output: Path) -> Iterator[Path]:
    """Context manager: the folder of an output's parts, for this run alone.

    Raises:
        ValueError: another run works in the folder.
    """
    folder, file = output.with_name(f"{output.name}.parts"), output.with_name(f".{output.name}.lock")
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"Another run writes {output}. Wait until it has ended, or choose another file.") from None
    try:
        folder.mkdir(exist_ok=True)
        yield folder
    finally:
        with suppress(OSError):
            folder.rmdir()  # if it is empty; parts are kept
        file.unlink(missing_ok=True)
        lock.release()


def _part(
    data: InteractionData, excluded: Mapping[Item, list[Item]] | None, number: int, start: int, size: int
) -> Part:
    users = data.users[start : start + size]
    left_out = None if excluded is None else [excluded.get(user, []) for user in users]
    return Part(number, users, data.sequences[start : start + size], left_out)


# ----------------------------------------------------------------------------------------------------------- processes
def _answered(job: Job, parts: Iterator[Part], processes: int) -> Generator[int, None, None]:
    """Write the parts and yield the number of each one that is complete."""
    if processes <= 1:
        model = None
        for part in parts:
            model = job.models.load() if model is None else model
            job.write(model, part)
            yield part.number
        return
    context = multiprocessing.get_context("spawn")  # a forked process would share the threads of torch
    stop, threads = context.Event(), max(1, torch.get_num_threads() // processes)
    with ProcessPoolExecutor(processes, context, _start, (job, threads, stop)) as pool:
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
            if running:  # an error, or Ctrl-C: parts that are not complete are not worth waiting for
                stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


_PROCESS: tuple[Job, Recommender | Ensemble | Exception]  # of a process of the pool


def _start(job: Job, threads: int, stop: Event) -> None:
    global _PROCESS
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one stops the others
    threading.Thread(target=_end, args=(stop,), daemon=True).start()
    torch.set_num_threads(threads)
    try:
        _PROCESS = job, job.models.load()
    except Exception as error:  # raised by the first part, because an error here would break the pool without a reason
        _PROCESS = job, error


def _work(part: Part) -> int:
    job, model = _PROCESS
    if isinstance(model, Exception):
        raise model
    job.write(model, part)
    return part.number


def _end(stop: Event) -> None:
    """End this process on a signal to stop, or when its parent has ended: it would wait for work forever."""
    parent = multiprocessing.parent_process()
    while not stop.wait(0.5) and parent is not None and parent.is_alive():
        pass
    os.kill(os.getpid(), signal.SIGTERM)
