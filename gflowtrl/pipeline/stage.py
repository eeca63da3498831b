"""A stage: a folder with a fingerprint, work that is done once, and a file that says that it is done."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from gflowtrl.files import damage_of, write_text
from gflowtrl.teachers import fingerprint
from gflowtrl.trainer.processes import A_DAY, check_processes


DONE_FILE = "done.json"
CLOCK_FILE = "seconds.json"
CHECKPOINTS = "checkpoints"  # of a training; given up when the stage is done, and not before
#: In the folder of a stage: what nothing of a run reads, or what is written again at the end of each run.
UNREAD = {DONE_FILE, CLOCK_FILE, "inputs.json", "README.md"}

Record = dict[str, Any]
Work = Callable[[Path], Record]


class RunContext:
    """Where stages live, and the processes that share the work.

    Args:
        root: folder of all stages.
        quiet: print nothing.
        callbacks: handed to every trainer.
        redo: names of stages that are done again, although they are finished.
    """

    def __init__(
        self,
        root: str | Path,
        quiet: bool = False,
        callbacks: Sequence[TrainerCallback] = (),
        redo: Collection[str] = (),
    ):
        self.root = Path(root)
        # The other processes wait while the first one fits a teacher, longer than the usual half hour.
        self.state = PartialState(timeout=A_DAY)
        check_processes()
        self.quiet, self.callbacks, self.redo = quiet, list(callbacks), set(redo)
        self.seconds: dict[str, float] = {}  # of each stage that this run used, whenever it was done

    @property
    def is_main(self) -> bool:
        return self.state.is_main_process

    @property
    def shows_progress(self) -> bool:
        return self.is_main and not self.quiet

    def log(self, text: str = "") -> None:
        if self.shows_progress:
            print(text, flush=True)

    def stage(self, name: str, inputs: Mapping[str, Any]) -> Stage:
        """The stage of that name for these inputs: a JSON-able value of all that its result depends on."""
        return Stage(self, name, dict(inputs))


class Stage:
    """One unit of work and its folder `<root>/<name>-<fingerprint of its inputs>`.

    The same inputs lead to the same folder, so runs that agree up to some point share what comes before it. A folder
    with `done.json` is finished; one without was interrupted.
    """

    def __init__(self, run: RunContext, name: str, inputs: Record):
        self.context, self.name, self.inputs = run, name, inputs
        self.fingerprint = fingerprint({"stage": name, **inputs})
        self.folder = run.root / f"{name}-{self.fingerprint[:8]}"

    @property
    def done(self) -> bool:
        return (self.folder / DONE_FILE).is_file()

    @property
    def record(self) -> Record:
        """What the work returned, `seconds`, interrupted attempts included, and `files`, what it has left."""
        return json.loads((self.folder / DONE_FILE).read_text(encoding="utf-8"))

    def run(self, title: str, work: Work, main_only: bool = False) -> Record:
        """Does the work unless it is done.

        Args:
            title: what to print.
            work: gets the folder and returns a JSON-able record.
            main_only: the first process works, the others wait for it; else all of them work together.

        Raises:
            ValueError: the stage is finished, but files of it are missing or damaged.
        """
        run = self.context
        run.state.wait_for_everyone()
        if self.name in run.redo and self.folder.name not in run.seconds:
            if run.is_main:
                shutil.rmtree(self.folder, ignore_errors=True)
            run.state.wait_for_everyone()
        if self.done:
            self._check()
            run.log(f"[{self.name}] {title}: done before, kept in {self.folder}")
        elif run.is_main or not main_only:
            run.log(f"[{self.name}] {title}")
            if run.is_main:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(self.folder / "inputs.json", self.inputs)
            clock, started = self.folder / CLOCK_FILE, time.monotonic()
            spent = json.loads(clock.read_text(encoding="utf-8")) if clock.is_file() else 0.0
            try:
                record = work(self.folder)
            finally:
                seconds = round(spent + time.monotonic() - started, 1)
                if run.is_main:
                    write_json(clock, seconds)
            if run.is_main:
                write_json(self.folder / DONE_FILE, {**record, "seconds": seconds, "files": self._files()})
            run.log(f"[{self.name}] finished in {seconds:.0f} s")
        if run.is_main:
            shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
        run.state.wait_for_everyone()
        record = self.record
        run.seconds[self.folder.name] = record["seconds"]
        return record

    def _files(self) -> list[str]:
        """What later stages, reports and recommenders read of a finished stage, by the path in its folder."""
        found = [*self.folder.glob("*"), *(self.folder / "model").rglob("*")]
        return sorted(path.relative_to(self.folder).as_posix() for path in found if _is_read(path))

    def _check(self) -> None:
        """Refuse a finished stage whose files are not what they were."""
        damaged = damage_of(self.folder / DONE_FILE)
        names = [DONE_FILE] if damaged else self.record.get("files", self._files())
        found = {name: damage_of(self.folder / name) for name in names}
        told = "; ".join(f"{self.folder / name} {damage}" for name, damage in found.items() if damage)
        if told:
            raise ValueError(
                f"The stage {self.name} is finished, but {told}. Restore the file, or do the stage again: add "
                f"--redo {self.name}."
            )


def _is_read(path: Path) -> bool:
    return path.is_file() and path.name not in UNREAD and not path.name.startswith(".")


def if_set(**inputs: Any) -> Record:
    """Inputs that a stage depends on only where they are set."""
    return {name: value for name, value in inputs.items() if value}


def write_json(path: Path, content: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of it."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
