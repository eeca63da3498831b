"""Output folders that are written completely or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from ..readers import is_data_folder


def check_target(out: Path, overwrite: bool) -> None:
    """Check that writing to `out` destroys no existing files.

    A folder that a killed run had moved away, and not yet replaced, is put back first.

    Raises:
        FileExistsError: if `out` is a file, or a folder that is not empty, unless it is a data folder and `overwrite`
            is set.
    """
    _put_back(out.resolve())
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file. Choose a new or empty folder.")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"{out} is not empty. Choose another folder, or replace this one with overwrite=True (--overwrite)."
        )
    if not is_data_folder(out):
        raise FileExistsError(f"{out} is not empty and not a data folder, so it is not replaced. Choose another.")


def _put_back(out: Path) -> None:
    """Restore `out` after a run was killed between its two renames (`output_folder`)."""
    moved = sorted(out.parent.glob(f".{escape(out.name)}.old-*"), key=lambda path: path.stat().st_mtime_ns)
    if moved and not os.path.lexists(out):
        moved[-1].rename(out)


def item_tokenizers(folder: Path) -> list[Path]:
    """Return the files and folders of `ItemTokenizer`s in a data folder, whose codebooks cannot be recreated."""
    known = (
        path for path in folder.iterdir() if path.stem == "item_tokenizer" or (path / "item_tokenizer.json").is_file()
    )
    return sorted(known)


@contextmanager
def output_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Context manager: a temporary folder next to `out`, which replaces `out` on success and is removed on an error.

    The item tokenizers of the old folder are copied into the new one; the rest of the old folder is deleted.
    """
    check_target(out, overwrite)
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (out.with_name(f".{out.name}.{word}-{os.getpid()}") for word in ("partial", "old"))
    for left in (partial, old):  # of a killed process with the same number, as is usual in containers
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if out.exists():
            for path in item_tokenizers(out):
                (shutil.copytree if path.is_dir() else shutil.copy2)(path, partial / path.name)
            out.rename(old)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
