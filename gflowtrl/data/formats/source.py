"""Reading of a raw file in blocks of lines: decompression, decoding, progress, and malformed lines."""

import codecs
import csv
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from gflowtrl.checks import one_line, shortened
from gflowtrl.files import is_utf16


#: Errors that a parser raises for a malformed line.
MALFORMED = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, SyntaxError, RecursionError)

T = TypeVar("T")
MAX_LINE_BYTES = 1 << 28
MAX_UNPACKED_BYTES = 1 << 40

_NAMED_LINES = 5
_BROKEN = EOFError, gzip.BadGzipFile, zlib.error, pa.ArrowException, OSError
_BLOCK_BYTES = 1 << 24
_RAW_BYTES = 1 << 20
_HEAD_BYTES = 1 << 12
_SWALLOWED_LINES = 20  # a quoted field with this many lines that all look like rows is not text
_REASON_CHARACTERS = 500
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_UNPACK = "an archive or a file with unsupported compression", "Unpack it, or compress it with gzip."
#: First bytes of files that are not text.
_OTHERS = {
    b"PK\x03\x04": _UNPACK,  # zip
    b"BZh": _UNPACK,
    b"\xfd7zXZ\0": _UNPACK,
    b"7z\xbc\xaf\x27\x1c": _UNPACK,
    b"PAR1": ("a parquet file", "Read it with format parquet."),
}


class Source:
    """A raw file and its malformed lines.

    Args:
        path: the file; gzip and zstandard are detected from the content.
        format: name of the format, for messages.
        expected: description of the expected content, for messages.
        max_malformed: maximum share of malformed lines, 0 to 1.
        encoding: text encoding; `None`: the encoding of the format, which is UTF-8 except for some MovieLens files.
        max_line_bytes: maximum length of a line; longer ones raise an error.
        max_unpacked_bytes: maximum size of the file, unpacked; larger ones raise an error.
        table: the content, if it is a table in memory; `path` then is its name.

    Attributes:
        lines: number of the last line that was read.
        first_line: number of the first line of data; if it is malformed, the file is not in the format.
        malformed: number of malformed lines.
        malformed_lines: the first few malformed lines, each with its number and the reason.
    """

    def __init__(
        self,
        path: str | Path,
        format: str,
        expected: str,
        max_malformed: float,
        encoding: str | None = None,
        max_line_bytes: int = MAX_LINE_BYTES,
        max_unpacked_bytes: int = MAX_UNPACKED_BYTES,
        table: pa.Table | None = None,
    ):
        self.path, self.table = Path(path), table
        if table is None and not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is not a file. Format {format!r} reads {expected}.")
        self.format = format
        self.expected = expected
        self.max_malformed = max_malformed
        self.encoding = encoding and ("utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding)
        self.max_line_bytes, self.max_unpacked_bytes = max_line_bytes, max_unpacked_bytes
        self.lines = 0
        self.first_line = 1
        self.malformed = 0
        self.malformed_lines: list[str] = []
        self._row_lines = 1  # number of lines of the last record

    def peek(self) -> str:
        """Return the first nonblank line without its line end, or an empty string."""
        return next(iter(self.peek_lines(1)), "")

    def peek_lines(self, count: int) -> list[str]:
        """Return the first nonblank lines, at most `count`, without their line ends."""
        with self._content() as (content, _):
            text = io.TextIOWrapper(content, self.encoding or "utf-8-sig", "replace", newline="\n")
            whole = (line for line in iter(lambda: text.readline(_BLOCK_BYTES), "") if line.strip())
            return [line.strip(" \r\n") for line in islice(whole, count)]

    def is_utf8(self) -> bool:
        """Return whether the whole file is valid UTF-8."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        with self._content() as (content, _):
            try:
                for block in self._unpacked_blocks(content):
                    decoder.decode(block)
                decoder.decode(b"", final=True)
            except UnicodeDecodeError:
                return False
        return True

    @contextmanager
    def _content(self) -> Iterator[tuple[io.BufferedIOBase, io.BufferedIOBase]]:
        """Open the file: its unpacked and its packed bytes. Raise a ValueError if it obviously is not text."""
        with self.path.open("rb", buffering=_RAW_BYTES) as raw:
            packed = raw.peek(len(_ZSTD))
            try:
                content = _unpacked(raw, packed)
                problem = _no_text(content.peek(_HEAD_BYTES)[:_HEAD_BYTES], known_encoding=self.encoding is not None)
                if problem:
                    raise ValueError(f"{self.path} {problem} Format {self.format!r} reads {self.expected}.")
                yield content, raw
            except _BROKEN as error:
                kinds = {_GZIP: "gzip", _ZSTD: "zstandard"}
                kind = next((word for begin, word in kinds.items() if packed.startswith(begin)), None)
                if kind is None:
                    raise
                raise ValueError(
                    f"{self.path}: the {kind} data is broken after line {self._readable_lines()} ({error}). Download "
                    "the file again."
                ) from None

    def _readable_lines(self) -> int:
        """Return the number of lines before the place where the packed data is broken."""
        lines = 0
        with self.path.open("rb") as raw:
            content = _unpacked(raw, raw.peek(len(_ZSTD)))
            with suppress(*_BROKEN):
                while block := content.read1(_HEAD_BYTES):
                    lines += block.count(b"\n")
        return lines

    def blocks(self, encoding: str = "utf-8-sig") -> Iterator[tuple[int, pa.LargeStringArray]]:
        """Yield (number of the first line, lines with their line ends) of the whole file, in blocks.

        They are decoded with the encoding of the source, by default `encoding`. Invalid bytes become U+FFFD, which is
        not allowed in ids.
        """
        number, rest, self._row_lines = 1, b"", 1
        with self._content() as (content, raw), byte_bar(self.path.name, self.path.stat().st_size) as bar:
            decoder = codecs.getincrementaldecoder(self.encoding or encoding)("replace")
            for block in self._unpacked_blocks(content):
                bar.update(raw.tell() - bar.n)  # packed bytes, so that the total is the file size
                rest += decoder.decode(block).encode()
                end = rest.rfind(b"\n") + 1
                if end:
                    lines, rest = self._lines(rest[:end], number), rest[end:]
                    yield number, lines
                    number += len(lines)
                elif len(rest) > self.max_line_bytes:
                    raise self._too_long(number)
            rest += decoder.decode(b"", final=True).encode()
            if rest:
                yield number, self._lines(rest, number)

    def _unpacked_blocks(self, content: io.BufferedIOBase) -> Iterator[bytes]:
        """Yield the whole content in blocks."""
        size = 0
        while block := content.read(_BLOCK_BYTES):
            size += len(block)
            if size > self.max_unpacked_bytes:
                raise ValueError(
                    f"{self.path} has more than {self.max_unpacked_bytes:,} bytes, unpacked. Check the file, or raise "
                    "max_unpacked_bytes."
                )
            yield block

    def _lines(self, text: bytes, number: int) -> pa.LargeStringArray:
        """Split text, which begins with line `number`, after its line ends, without a copy."""
        ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n")) + 1
        if not len(ends) or ends[-1] < len(text):
            ends = np.append(ends, len(text))
        offsets = np.concatenate([[0], ends]).astype(np.int64)
        if (long := np.flatnonzero(np.diff(offsets) > self.max_line_bytes)).size:
            raise self._too_long(number + int(long[0]))
        return pa.LargeStringArray.from_buffers(len(ends), pa.py_buffer(offsets), pa.py_buffer(text))

    def _too_long(self, number: int) -> ValueError:
        return ValueError(
            f"{self.path}, line {number} has more than {self.max_line_bytes:,} bytes. Check the file, or raise "
            "max_line_bytes."
        )

    def text_lines(self, encoding: str = "utf-8-sig") -> Iterator[str]:
        """Yield all lines with their line ends, decoded as in `blocks`."""
        return chain.from_iterable(lines.to_pylist() for _, lines in self.blocks(encoding))

    def numbered_lines(self, encoding: str = "utf-8-sig") -> Iterator[tuple[int, str]]:
        """Yield (number, line without its line end) of all nonblank lines."""
        for number, line in enumerate(self.text_lines(encoding), 1):
            self.lines = number
            line = line.rstrip("\r\n")
            if line and not line.isspace():
                yield number, line

    def csv_rows(
        self, delimiter: str, encoding: str = "utf-8-sig", quoted: bool = True, lines: Iterable[str] | None = None
    ) -> Iterator[tuple[int, list[str]]]:
        """Yield (number of the last line, fields) of all nonblank rows, without those before `first_line`.

        An unbalanced quote swallows the lines up to the next quote; all of them count as malformed.

        Args:
            delimiter: the sign between fields.
            encoding: as in `blocks`.
            quoted: whether fields may be in quotes.
            lines: the lines that follow the `lines` that were read before; `None`: those of the whole file.
        """
        if lines is None:
            self.lines, lines = 0, self.text_lines(encoding)
        before, quoting = self.lines, csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        rows = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
        while True:
            try:
                fields = next(rows, None)
            except csv.Error as error:  # the next call continues with the next line
                self._reject_lines(before + rows.line_num, error)
                continue
            last = before + rows.line_num
            if fields is None:
                self.lines = last
                return
            self._row_lines = count = last - self.lines
            if count > _SWALLOWED_LINES and _swallows_rows(fields, delimiter):
                self._reject_lines(last, ValueError("the lines in quotes look like rows"))
                continue
            self.lines = last
            if last >= self.first_line and (len(fields) > 1 or (fields and fields[0].strip())):
                yield last, fields

    def _reject_lines(self, last: int, error: Exception) -> None:
        """Count all lines from the next one to line `last` as malformed, and record the first of them."""
        first, self.lines, self._row_lines = self.lines + 1, last, last - self.lines
        if last > first:
            error = ValueError(f"a quote opens here, so the lines up to {last} are left out ({error})")
        self.reject(first, error)

    def reject(self, number: int, error: Exception) -> None:
        """Count line `number`, with the other lines of its row, as malformed.

        Raises:
            ValueError: if it is the first line of data.
        """
        reason = _short(f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error))
        self.malformed += self._row_lines
        if len(self.malformed_lines) < _NAMED_LINES:
            self.malformed_lines.append(f"line {number}: {reason}")
        if number <= self.first_line:
            raise self.format_error_at(number, reason)

    def format_error_at(self, number: int, reason: str) -> ValueError:
        """Create the error for a file that is not in its format."""
        return ValueError(
            f"{self.path}, line {number} is not in the format {self.format!r}: {_short(reason)}. Expected: "
            f"{self.expected}. Check the file, or choose another format of docs/data.md."
        )

    def nothing(self) -> ValueError:
        """Create the error for a file without data."""
        return ValueError(
            f"{self.path} contains no data. Expected: {self.expected}. Check whether the file is complete."
        )

    def finish(self, last: int | None) -> None:
        """Raise a ValueError if the file was empty, or too many of its lines were malformed.

        Args:
            last: number of the last record, `None` if there was no record.
        """
        if last is None and not self.malformed:
            raise self.nothing()
        share = self.malformed / self.lines
        if share > self.max_malformed:
            raise ValueError(
                f"{self.path}: {self.malformed:,} of {self.lines:,} lines ({share:.1%}) are malformed, but "
                f"max_malformed={self.max_malformed:g} allows {self.max_malformed:.1%}. "
                f"{'; '.join(self.malformed_lines)}. Expected: {self.expected}. "
                "Repair the file, check the format, or raise max_malformed."
            )


def _no_text(head: bytes, known_encoding: bool) -> str:
    """Return what a file that starts with `head` is, and the remedy, if it is not text; otherwise an empty string."""
    for magic, (kind, remedy) in _OTHERS.items():
        if head.startswith(magic):
            return f"is {kind}. {remedy}"
    if known_encoding:
        return ""
    if is_utf16(head) or head.count(0) > len(head) // 4:
        return "is not UTF-8. If it is text, give its encoding (for example --encoding utf-16)."
    if head.count(b"\r") > 1 and b"\n" not in head:
        return "has lines that end in CR alone, as on old Macs. Convert CR to LF first."
    return ""


def _swallows_rows(fields: list[str], delimiter: str) -> bool:
    """Return whether all lines of a quoted field look like rows, so that its quotes belong to two rows."""
    longest = max(fields, key=lambda field: field.count("\n"))
    inner = longest.split("\n")[1:-1]
    return len(inner) >= _SWALLOWED_LINES - 1 and all(line.count(delimiter) == len(fields) - 1 for line in inner)


def _short(reason: str) -> str:
    return shortened(one_line(reason), _REASON_CHARACTERS)


def byte_bar(name: str, total: int | None, done: int = 0) -> tqdm:
    """Return a progress bar in bytes, which is shown only in a terminal and after three seconds."""
    return tqdm(
        desc=name, total=total, initial=done, unit="B", unit_scale=True, unit_divisor=1024, delay=3, disable=None
    )


@contextmanager
def read_ahead(values: Iterable[T]) -> Iterator[Iterator[T]]:
    """Context manager that yields an iterator over `values`; while one is used, a thread computes the next.

    The thread ends with the `with` block. A generator that ends a thread must not be left to the garbage collection,
    which may run while another thread starts or ends: both would wait forever.
    """

    def ahead() -> Iterator[T]:
        following = thread.submit(next, remaining, None)
        while (value := following.result()) is not None:
            following = thread.submit(next, remaining, None)
            yield value

    remaining = iter(values)
    with ThreadPoolExecutor(1) as thread:
        yield ahead()


def _unpacked(raw: io.BufferedReader, head: bytes) -> io.BufferedIOBase:
    """Return the unpacked content of a file that begins with `head`."""
    if head.startswith(_GZIP):
        return gzip.GzipFile(fileobj=raw)
    return io.BufferedReader(pa.CompressedInputStream(raw, "zstd")) if head.startswith(_ZSTD) else raw
