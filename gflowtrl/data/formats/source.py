"""A raw file that is read once from its beginning to its end: unpacking, progress, and its malformed lines."""

import codecs
import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from tqdm.auto import tqdm


#: What a parser raises on a line that does not fit its format.
MALFORMED = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, SyntaxError, RecursionError)

_NAMED_LINES = 5
_BLOCK_BYTES = 1 << 20
_HEAD_BYTES = 1 << 12
_SWALLOWED_LINES = 20  # of a quoted field that all look like rows, which no text does
_REASON_CHARACTERS = 500
_UNPACK = "an archive or packed in a way that is not read", "Unpack it, or pack it with gzip."
#: How files begin that are given in the place of text.
_OTHERS = {
    b"PK\x03\x04": _UNPACK,  # zip
    b"BZh": _UNPACK,
    b"\xfd7zXZ\0": _UNPACK,
    b"7z\xbc\xaf\x27\x1c": _UNPACK,
    b"\x28\xb5\x2f\xfd": _UNPACK,  # zstandard
    b"PAR1": ("a parquet file", "Read it with format parquet."),
}


class Source:
    """A raw file, and what was wrong in it.

    Args:
        path: the file; gzip is recognized by its content.
        format: name of the format, for messages.
        expected: what a line of this file should be, for messages.
        max_malformed: share of the lines, 0 to 1, that may be malformed.
        encoding: of its text; `None` for that of the format, which is UTF-8 but for some of MovieLens.

    Attributes:
        lines: number of the last line that was read.
        first_line: number of the first line that is data; a malformed one there means the wrong format.
        malformed: how many lines were rejected.
        malformed_lines: the first few rejections, each with the line's number and the reason.
    """

    def __init__(
        self, path: str | Path, format: str, expected: str, max_malformed: float, encoding: str | None = None
    ):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is no file. Format {format!r} reads {expected}.")
        self.format = format
        self.expected = expected
        self.max_malformed = max_malformed
        self.encoding = encoding and ("utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding)
        self.lines = 0
        self.first_line = 1
        self.malformed = 0
        self.malformed_lines: list[str] = []
        self._row_lines = 1  # lines of the record that was read last

    def peek(self) -> str:
        """The first line that is not blank, without its line end; empty where there is none."""
        return next(iter(self.peek_lines(1)), "")

    def peek_lines(self, count: int) -> list[str]:
        """The first lines that are not blank, at most `count`, without their line ends."""
        with self.path.open("rb") as raw, self._whole_gzip(), self._text(io.BufferedReader(raw), "utf-8-sig") as text:
            whole = (line for line in iter(lambda: text.readline(_BLOCK_BYTES), "") if line.strip())
            return [line.strip(" \r\n") for line in islice(whole, count)]

    def is_utf8(self) -> bool:
        """Whether the whole file is text in UTF-8."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        with self.path.open("rb") as raw, self._whole_gzip():
            content = _unpacked(raw)
            try:
                while block := content.read(_BLOCK_BYTES):
                    decoder.decode(block)
                decoder.decode(b"", final=True)
            except UnicodeDecodeError:
                return False
        return True

    @contextmanager
    def _whole_gzip(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{self.path}: the gzip data is broken after line {self.lines} ({error}). Download the file again."
            ) from None

    def text_lines(self, encoding: str = "utf-8-sig") -> Iterator[str]:
        """All lines with their line ends, in the encoding of the source, or else in `encoding`.

        Bytes that are not text become U+FFFD, which no id may hold.
        """
        with byte_bar(self.path.name, self.path.stat().st_size) as bar, _Counted(self.path, bar) as counted:
            raw = io.BufferedReader(counted, _BLOCK_BYTES)
            with self._whole_gzip(), self._text(raw, encoding) as text:
                yield from text

    def _text(self, raw: io.BufferedReader, encoding: str) -> io.TextIOWrapper:
        """The text in a file. Raises a ValueError if it plainly is none."""
        content = _unpacked(raw)
        problem = _no_text(content.peek(_HEAD_BYTES)[:_HEAD_BYTES], known_encoding=self.encoding is not None)
        if problem:
            raise ValueError(f"{self.path} {problem} Format {self.format!r} reads {self.expected}.")
        return io.TextIOWrapper(content, self.encoding or encoding, "replace", newline="\n")

    def numbered_lines(self, encoding: str = "utf-8-sig") -> Iterator[tuple[int, str]]:
        """(number, line without its line end) of all lines that are not blank."""
        for number, line in enumerate(self.text_lines(encoding), 1):
            self.lines = number
            line = line.rstrip("\r\n")
            if line and not line.isspace():
                yield number, line

    def csv_rows(self, delimiter: str, encoding: str = "utf-8-sig", quoted: bool = True) -> Iterator:
        """(number of its last line, fields) of all rows that are not blank, the header's too.

        A stray quote swallows the lines up to the next quote: all of them are malformed.
        """
        quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        rows = csv.reader(self.text_lines(encoding), delimiter=delimiter, quoting=quoting, strict=True)
        while True:
            try:
                fields = next(rows, None)
            except csv.Error as error:  # the next call goes on with the next line
                self._reject_lines(rows.line_num, error)
                continue
            last = rows.line_num
            if fields is None:
                self.lines = last
                return
            self._row_lines = count = last - self.lines
            if count > _SWALLOWED_LINES and _swallows_rows(fields, delimiter):
                self._reject_lines(last, ValueError("the lines in quotes look like rows"))
                continue
            self.lines = last
            if len(fields) > 1 or (fields and fields[0].strip()):
                yield last, fields

    def _reject_lines(self, last: int, error: Exception) -> None:
        """Count all lines from the next one to line `last` as malformed, under the number of the first of them."""
        first, self.lines, self._row_lines = self.lines + 1, last, last - self.lines
        if last > first:
            error = ValueError(f"a quote opens here, and the lines up to {last} are left out with it ({error})")
        self.reject(first, error)

    def reject(self, number: int, error: Exception) -> None:
        """Count line `number`, and all other lines of its row, as malformed.

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
        """The error for a file that is not of its format."""
        return ValueError(
            f"{self.path}, line {number} is not {self.format!r}: {_short(reason)}. Expected is {self.expected}. "
            "Check the file, or give another format; docs/data.md lists them."
        )

    def nothing(self) -> ValueError:
        """The error for a file without data."""
        return ValueError(f"{self.path} holds no data. Expected is {self.expected}. Check whether the file is whole.")

    def finish(self, last: int | None) -> None:
        """Raise a ValueError if the file held nothing, or too many of its lines were malformed.

        Args:
            last: number of the last record, `None` where there was none.
        """
        if last is None and not self.malformed:
            raise self.nothing()
        share = self.malformed / self.lines
        if share > self.max_malformed:
            raise ValueError(
                f"{self.path}: {self.malformed:,} of {self.lines:,} lines ({share:.1%}) are malformed, and "
                f"max_malformed={self.max_malformed:g} allows {self.max_malformed:.1%}. "
                f"{'; '.join(self.malformed_lines)}. Expected is {self.expected}. "
                "Repair the file, check the format, or raise max_malformed."
            )


def _no_text(head: bytes, known_encoding: bool) -> str:
    """What a file is that begins with `head`, and the remedy, where it is no text; else nothing."""
    for magic, (kind, remedy) in _OTHERS.items():
        if head.startswith(magic):
            return f"is {kind}. {remedy}"
    if known_encoding:
        return ""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or head.count(0) > len(head) // 4:
        return "is no UTF-8. If it is text, name its encoding (--encoding, utf-16 for example)."
    if head.count(b"\r") > 1 and b"\n" not in head:
        return "has lines that end in CR alone, as old Macs wrote them. Make LF of each CR first."
    return ""


def _swallows_rows(fields: list[str], delimiter: str) -> bool:
    """Whether a field in quotes holds lines that all look like rows: its quotes belong to two rows."""
    longest = max(fields, key=lambda field: field.count("\n"))
    inner = longest.split("\n")[1:-1]
    return len(inner) >= _SWALLOWED_LINES - 1 and all(line.count(delimiter) == len(fields) - 1 for line in inner)


def _short(reason: str) -> str:
    """A reason that fits on a line: without control characters, and cut where a broken file made it long."""
    plain = "".join(sign if sign.isprintable() else "?" for sign in reason)
    return plain if len(plain) <= _REASON_CHARACTERS else plain[:_REASON_CHARACTERS] + " ..."


def byte_bar(name: str, total: int | None, done: int = 0) -> tqdm:
    """A progress bar in bytes, that shows itself in a terminal and where the work takes more than three seconds."""
    return tqdm(
        desc=name, total=total, initial=done, unit="B", unit_scale=True, unit_divisor=1024, delay=3, disable=None
    )


class _Counted(io.RawIOBase):
    """A file that moves a progress bar as it is read: packed bytes, so that the bar's total is the file's size."""

    def __init__(self, path: Path, bar: tqdm):
        self._file = path.open("rb", buffering=0)
        self._bar = bar

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._file.readinto(buffer)
        self._bar.update(count)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _unpacked(raw: io.BufferedReader) -> io.BufferedIOBase:
    return gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
