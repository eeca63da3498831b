"""Downloads of public data sets by name and of single files by URL, resumable and checked."""

import http.client
import shutil
import ssl
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path, PurePosixPath
from stat import S_ISLNK
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from .source import byte_bar


_AMAZON_2014 = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
_MOVIELENS = "https://files.grouplens.org/datasets/movielens"

_ATTEMPTS = 5
_PAUSE_SECONDS = 2.0
_TIMEOUT_SECONDS = 60
_BLOCK_BYTES = 1 << 18


class RawFiles(NamedTuple):
    """Format and files of a raw data set, the input of `prepare(*raw, out=...)`."""

    format: str
    interactions: Path
    items: Path


@dataclass(frozen=True)
class _Public:
    format: str
    base: str
    interactions: str
    items: str
    archive: str | None = None  # the zip file that contains both
    md5: str | None = None


def _amazon(category: str) -> _Public:
    return _Public("amazon-2014", _AMAZON_2014, f"reviews_{category}_5.json.gz", f"meta_{category}.json.gz")


def _movielens(name: str, ratings: str, movies: str, md5: str | None) -> _Public:
    return _Public("movielens", _MOVIELENS, f"{name}/{ratings}", f"{name}/{movies}", f"{name}.zip", md5)


_PUBLIC = {
    "amazon-2014-beauty": _amazon("Beauty"),
    "amazon-2014-office": _amazon("Office_Products"),
    "amazon-2014-sports": _amazon("Sports_and_Outdoors"),
    "amazon-2014-toys": _amazon("Toys_and_Games"),
    # The md5 sums are those that GroupLens publishes with the archives; ml-latest-small changes occasionally.
    "ml-100k": _movielens("ml-100k", "u.data", "u.item", "0e33842e24a9c977be4e0107933c0723"),
    "ml-1m": _movielens("ml-1m", "ratings.dat", "movies.dat", "c4d9eecfca2ab87c1945afe126590906"),
    "ml-20m": _movielens("ml-20m", "ratings.csv", "movies.csv", "cd245b17a1ae2cc31bb14903e1204af3"),
    "ml-latest-small": _movielens("ml-latest-small", "ratings.csv", "movies.csv", None),
}

#: Names of the data sets that `download` knows.
PUBLIC_DATA = tuple(_PUBLIC)


def download(name: str, folder: str | Path) -> RawFiles:
    """Download a public data set, or reuse the files of an earlier call.

    The data are subject to the terms of their publishers (McAuley Lab, GroupLens). Read these before you use the data.

    Args:
        name: one of `PUBLIC_DATA`.
        folder: target folder; it is created if needed.

    Returns:
        The format and the files, for `prepare(*raw, out=...)`.

    Raises:
        ValueError: for an unknown name; otherwise as in `download_file` and `extract_zip`.
    """
    if name not in _PUBLIC:
        raise ValueError(f"There is no public data set {name!r}. Choose one of {', '.join(PUBLIC_DATA)}.")
    data, folder = _PUBLIC[name], Path(folder)
    if data.archive is None:
        files = (download_file(f"{data.base}/{file}", folder) for file in (data.interactions, data.items))
        return RawFiles(data.format, *files)
    extract_zip(download_file(f"{data.base}/{data.archive}", folder, md5=data.md5), folder)
    return RawFiles(data.format, folder / data.interactions, folder / data.items)


def source_of(name: str) -> str:
    """Return the origin of a public data set, for `prepare(source=...)`. `name` is one of `PUBLIC_DATA`."""
    data = _PUBLIC[name]
    return f"{name}, {data.base}/{data.archive or data.interactions}"


def download_file(url: str, folder: str | Path, *, sha256: str | None = None, md5: str | None = None) -> Path:
    """Download one file into a folder, resuming an interrupted download.

    An unfinished file is `NAME.part`. The sha256 of a finished file is stored in `NAME.sha256`; an existing file is
    compared with it and not downloaded again.

    Args:
        url: an http or https URL whose last part is the file name.
        folder: target folder; it is created if needed.
        sha256, md5: expected checksums in hexadecimal digits, if known.

    Raises:
        ValueError: if the URL is invalid, or the file does not have the expected checksum.
        ConnectionError: if the server refuses the request, or the connection broke off several times in a row.
    """
    target = Path(folder) / _file_name(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    part, record = (target.with_name(target.name + suffix) for suffix in (".part", ".sha256"))
    if not target.exists():
        _fetch(url, part)
        try:
            _check(part, url, "It was removed", sha256=sha256, md5=md5)
        except ValueError:
            part.unlink()
            raise
        record.unlink(missing_ok=True)
        part.replace(target)
        _validator(part).unlink(missing_ok=True)
    else:
        known = record.read_text(encoding="utf-8").split()[0] if record.is_file() else None
        _check(target, url, "Delete it to download it again", sha256=sha256 or known, md5=md5)
    if not record.is_file():
        record.write_text(f"{_digest(target, 'sha256')}  {target.name}\n", encoding="utf-8")
    return target


def extract_zip(archive: str | Path, folder: str | Path) -> list[Path]:
    """Extract all files of a zip archive into `folder`; existing files of the right size are kept.

    Raises:
        ValueError: if the archive is broken, or a member would be written outside `folder` or is a link. Nothing is
            written in this case.
    """
    folder = Path(folder)
    try:
        with zipfile.ZipFile(archive) as content:
            members = [member for member in content.infolist() if not member.is_dir()]
            targets = [folder / _safe_name(member, archive) for member in members]
            for member, target in zip(members, targets, strict=True):
                if not target.is_file() or target.stat().st_size != member.file_size:
                    _extract(content, member, target)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive} is not a readable zip file ({error}). Delete it and download it again.") from None
    return targets


def _extract(content: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with content.open(member) as packed, part.open("wb") as out:
        shutil.copyfileobj(packed, out, _BLOCK_BYTES)
    part.replace(target)


def _safe_name(member: zipfile.ZipInfo, archive: str | Path) -> PurePosixPath:
    name = PurePosixPath(member.filename)
    is_link = S_ISLNK(member.external_attr >> 16)
    if name.is_absolute() or ".." in name.parts or "\\" in member.filename or ":" in member.filename or is_link:
        raise ValueError(
            f"{archive} contains {member.filename!r}, which would leave the folder. Nothing was extracted."
        )
    return name


def _file_name(url: str) -> str:
    parts = urlsplit(url)
    name = unquote(parts.path).rpartition("/")[2]
    if parts.scheme not in ("http", "https") or not parts.netloc or name in ("", ".", "..") or "\\" in name:
        raise ValueError(f"{url!r} is not an http or https URL of a file. Check the URL.")
    return name


def _fetch(url: str, part: Path) -> None:
    """Download the rest of the file to `part`, with several attempts if the connection breaks."""
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _fetch_once(url, part):
                return
            problem = "the connection broke off"
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise ConnectionError(f"{url}: the server answers {error.code} {error.reason}.") from None
            problem = f"the server answers {error.code} {error.reason}"
        except (
            urllib.error.URLError,
            http.client.HTTPException,
            ssl.SSLError,
            TimeoutError,
            ConnectionError,
        ) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        done = part.stat().st_size if part.exists() else 0
        failures = 1 if done > before else failures + 1  # the count restarts whenever bytes arrive
        if failures >= _ATTEMPTS:
            raise ConnectionError(
                f"{url}: {problem}, {_ATTEMPTS} times in a row, at byte {done:,}. Call again to resume from there."
            )
        time.sleep(_PAUSE_SECONDS)


def _fetch_once(url: str, part: Path) -> bool:
    """Append to `part` over one connection, or start it again; return whether it is complete."""
    validator = _validator(part)
    done = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "gflowtrl"}
    if done:
        headers["Range"] = f"bytes={done}-"
        if validator.is_file():  # if the file has changed since, the server sends it from the beginning
            headers["If-Range"] = validator.read_text(encoding="utf-8")
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        total = (error.headers.get("Content-Range") or "").rpartition("/")[2]
        if total == str(done):
            return True
        part.unlink()  # it is longer than the file, so it cannot be a part of it
        return False
    with answer:
        resumed = answer.status == http.HTTPStatus.PARTIAL_CONTENT
        if resumed and not (answer.headers.get("Content-Range") or "").startswith(f"bytes {done}-"):
            raise ConnectionError("the server sent a different range than requested")
        done = done if resumed else 0
        tag = answer.headers.get("ETag") or ""
        mark = answer.headers.get("Last-Modified") if tag.startswith("W/") or not tag else tag
        validator.unlink(missing_ok=True)
        if mark:
            validator.write_text(mark, encoding="utf-8")
        return _receive(answer, part, done)


def _receive(answer: http.client.HTTPResponse, part: Path, done: int) -> bool:
    """Write the answer after the first `done` bytes of `part`; return whether it was received completely."""
    length = answer.headers.get("Content-Length")
    total = None if length is None else done + int(length)
    with part.open("ab" if done else "wb") as out, byte_bar(part.stem, total, done) as bar:
        while block := answer.read(_BLOCK_BYTES):
            out.write(block)
            bar.update(len(block))
            done += len(block)
    return total is None or done == total


def _check(file: Path, url: str, remedy: str, **expected: str | None) -> None:
    for kind, wanted in expected.items():
        found = wanted and _digest(file, kind)
        if wanted and found != wanted.lower():
            raise ValueError(
                f"{file} has the {kind} {found}, but {wanted.lower()} was expected for {url}. {remedy}; if a new "
                f"download has the same {kind}, the published file has changed or the expected {kind} is wrong."
            )


def _validator(part: Path) -> Path:
    """Return the file that stores the server's version (ETag or date) of an unfinished file."""
    return part.with_name(part.name + ".validator")


def _digest(file: Path, kind: str) -> str:
    with file.open("rb") as content:
        return file_digest(content, kind).hexdigest()
