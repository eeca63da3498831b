"""A folder that appears complete or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_target(out: Path, overwrite: bool) -> None:
    """Refuse to write where something is that must not be lost.

    Raises:
        FileExistsError: if `out` is a file; or a folder that is not empty, unless it is a data folder (one with
            `sequences.jsonl`) and `overwrite` is set.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file. Name a folder that is new or empty.")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"{out} is not empty. Name another folder, or replace this one with overwrite=True (--overwrite)."
        )
    if not (out / "sequences.jsonl").is_file():
        raise FileExistsError(f"{out} is not empty and no data folder, so it is not replaced. Name another folder.")


def item_tokenizers(folder: Path) -> list[Path]:
    """What `gflowtrl tokenize` keeps in a data folder for new items: codebooks, which cannot be made again."""
    known = (
        path for path in folder.iterdir() if path.stem == "item_tokenizer" or (path / "item_tokenizer.json").is_file()
    )
    return sorted(known)


@contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `out` to write into, which takes the place of `out` at the end, and is removed on an error.

    The item tokenizers of the old folder are copied into the new one; nothing else of it stays.
    """
    check_target(out, overwrite)
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (out.with_name(f".{out.name}.{word}-{os.getpid()}") for word in ("partial", "old"))
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
