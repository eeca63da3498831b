"""A stage: a folder with a fingerprint, work that is done once, and a file that marks it as done."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from gflowtrl.checks import NOT_NEGATIVE, check_number
from gflowtrl.files import damage_of, is_entry, read_json, read_object, write_text
from gflowtrl.teachers import fingerprint
from gflowtrl.trainer.processes import A_DAY, check_processes


DONE_FILE = "done.json"
CLOCK_FILE = "seconds.json"
CHECKPOINTS = "checkpoints"  # of a training; removed once the stage is done
#: Files of a stage that no later stage reads, or that are written again at the end of each run.
UNREAD = {DONE_FILE, CLOCK_FILE, "inputs.json", "README.md"}

CHECKSUMS = "checksums"  # in the record, of the record and of tensors
CHANGED = "does not have its checksum"

Record = dict[str, Any]
Work = Callable[[Path], Record]


class RunContext:
    """The output folder of a run, and the processes that share its work.

    Args:
        root: folder of all stages.
        quiet: print nothing.
        callbacks: handed to every trainer.
        redo: names of finished stages to do again.
        plan: names of the run's stages in order, with rough costs relative to each other.
    """

    def __init__(
        self,
        root: str | Path,
        quiet: bool = False,
        callbacks: Sequence[TrainerCallback] = (),
        redo: Collection[str] = (),
        plan: Mapping[str, float] | None = None,
    ):
        self.root = Path(root)
        # The other processes wait while the first one fits a teacher, possibly longer than the default half hour.
        self.state = PartialState(timeout=A_DAY)
        check_processes()
        self.quiet, self.callbacks, self.redo = quiet, list(callbacks), set(redo)
        self.seconds: dict[str, float] = {}  # of each stage that this run used, by folder
        self.plan, self._spent = dict(plan or {}), Counter[str]()
        self.at_work = 0  # stages within stages: a reward of a later stage may fit its own teacher

    @property
    def is_main(self) -> bool:
        return self.state.is_main_process

    @property
    def shows_progress(self) -> bool:
        return self.is_main and not self.quiet

    def log(self, text: str = "") -> None:
        if self.shows_progress:
            print(text, flush=True)

    def position(self, name: str) -> str:
        """ "stage 3 of 9: "; "" for a stage that is not in the plan, or is done within another one."""
        planned = name in self.plan and not self.at_work
        return f"stage {[*self.plan].index(name) + 1} of {len(self.plan)}: " if planned else ""

    def time_left(self, name: str, seconds: float) -> str:
        """ "; about 4 min left", estimated from the stages so far, after one of that name took `seconds`.

        "" until stages with an eighth of the plan's cost are done: a teacher alone says little about the training.
        """
        if name not in self.plan or self.at_work:
            return ""
        self._spent[name] += seconds
        rest = sum([*self.plan.values()][[*self.plan].index(name) + 1 :])
        done = sum(self.plan[name] for name in self._spent)
        if 8 * done < sum(self.plan.values()):
            return ""
        left = rest * self._spent.total() / done
        return f"; about {left / 60:.0f} min left" if left >= 60 else f"; about {left:.0f} s left" if rest else ""

    def stage(self, name: str, inputs: Mapping[str, Any]) -> Stage:
        """The stage of this name. `inputs` is a JSON-able value of everything that its result depends on."""
        return Stage(self, name, dict(inputs))


class Stage:
    """One unit of work and its folder `<root>/<name>-<fingerprint of its inputs>`.

    Equal inputs give the same folder, so runs share the stages in which they agree. A folder with `done.json` is
    finished; one without it was interrupted.
    """

    def __init__(self, run: RunContext, name: str, inputs: Record):
        self.context, self.name, self.inputs = run, name, inputs
        self.fingerprint = fingerprint({"stage": name, **inputs})
        self.folder = run.root / f"{name}-{self.fingerprint[:8]}"

    @property
    def done(self) -> bool:
        return is_entry(self.folder / DONE_FILE)

    @property
    def record(self) -> Record:
        """What the work returned, with `seconds` (interrupted attempts included) and `files` (what it wrote)."""
        return _Record(read_object(self.folder / DONE_FILE), self)

    def run(self, title: str, work: Work, main_only: bool = False) -> Record:
        """Do the work unless it is done.

        Args:
            title: what to print.
            work: takes the folder and returns a JSON-able record.
            main_only: only the first process works, and the others wait for it; otherwise all work together.

        Raises:
            ValueError: the stage is finished, but some of its files are missing or damaged.
        """
        run = self.context
        run.state.wait_for_everyone()
        if self.name in run.redo and self.folder.name not in run.seconds:
            if run.is_main:
                shutil.rmtree(self.folder, ignore_errors=True)
            run.state.wait_for_everyone()
        if self.done:
            self._check()
            run.log(f"[{self.name}] {run.position(self.name)}{title}: already done, loaded from {self.folder}")
            run.time_left(self.name, self.record["seconds"])
        elif run.is_main or not main_only:
            run.log(f"[{self.name}] {run.position(self.name)}{title}")
            if run.is_main:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(self.folder / "inputs.json", self.inputs)
            clock, started = self.folder / CLOCK_FILE, time.monotonic()
            spent = _seconds(clock) if clock.is_file() else 0.0
            run.at_work += 1
            try:
                record = work(self.folder)
            finally:
                run.at_work -= 1
                seconds = round(spent + time.monotonic() - started, 1)
                if run.is_main:
                    write_json(clock, seconds)
            if run.is_main:
                record = {**record, "seconds": seconds, "files": self._files()}
                write_json(self.folder / DONE_FILE, {**record, CHECKSUMS: self._checksums(record)})
            run.log(f"[{self.name}] finished in {seconds:.0f} s{run.time_left(self.name, seconds)}")
        if run.is_main:
            shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
        run.state.wait_for_everyone()
        record = self.record
        run.seconds[self.folder.name] = record["seconds"]
        return record

    def _files(self) -> list[str]:
        """Files that later stages, reports and recommenders read, as paths in the stage's folder."""
        found = [*self.folder.glob("*"), *(self.folder / "model").rglob("*")]
        return sorted(path.relative_to(self.folder).as_posix() for path in found if _is_read(path))

    def _checksums(self, record: Record) -> dict[str, str]:
        """Checksums of the record and of the stage's own tensors, from which reports are made.

        Those of a model are too many to read at each start.
        """
        content = {name: value for name, value in json.loads(json.dumps(record)).items() if name != CHECKSUMS}
        sums = {DONE_FILE: fingerprint(content)}
        for path in self.folder.glob("*.safetensors"):
            with path.open("rb") as file:
                sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return sums

    def _damages(self) -> dict[str, str]:
        """What is wrong with the files of a finished stage, by name. Earlier versions wrote no checksums."""
        if damage := damage_of(self.folder / DONE_FILE):
            return {DONE_FILE: damage}
        record = read_object(self.folder / DONE_FILE)
        sums = record.get(CHECKSUMS, {})
        if CHECKSUMS in record and not isinstance(sums, dict):
            return {DONE_FILE: CHANGED}
        if sums and sums.get(DONE_FILE) != fingerprint({n: value for n, value in record.items() if n != CHECKSUMS}):
            return {DONE_FILE: CHANGED}
        names = record.get("files", self._files())
        damages = {name: damage for name in names if (damage := damage_of(self.folder / name))}
        if damages or not sums:
            return damages
        return {name: CHANGED for name, value in self._checksums(record).items() if sums.get(name) != value}

    def _check(self) -> None:
        """Raise an error if files of a finished stage are missing or damaged."""
        text = "; ".join(f"{self.folder / name} {damage}" for name, damage in self._damages().items())
        if text:
            raise ValueError(
                f"The stage {self.name} is finished, but {text}. Restore the file, or do the stage again: add "
                f"--redo {self.name}."
            )


class _Record(dict[str, Any]):
    """The record of a finished stage. A missing entry is an error that names the file and the remedy."""

    def __init__(self, content: Record, stage: Stage):
        super().__init__(content)
        self._stage = stage

    def __missing__(self, name: str) -> Any:
        raise ValueError(
            f"{self._stage.folder / DONE_FILE} lacks {name!r}. Restore the file, or do the stage again: add --redo "
            f"{self._stage.name}."
        )


def _seconds(clock: Path) -> float:
    seconds = read_json(clock)
    check_number(f"{clock}: the number", seconds, NOT_NEGATIVE)
    return seconds


def _is_read(path: Path) -> bool:
    return path.is_file() and path.name not in UNREAD and not path.name.startswith(".")


def if_set(**inputs: Any) -> Record:
    """Those inputs of a stage that are set; a stage does not depend on the others."""
    return {name: value for name, value in inputs.items() if value}


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the new one."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
