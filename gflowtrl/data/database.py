"""A DuckDB of this process, without access to files, network and extensions."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq


_CLOSED = {
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",
    "enable_external_file_cache": "false",
}
_GROUP_ROWS = 1 << 14  # one thread reads a group


class Database:
    """A DuckDB in memory, for `with`. It moves to a temporary folder (TMPDIR) what exceeds its memory.

    Args:
        memory: limit of its memory, such as `"768MiB"`; `None`: that of DuckDB.

    Attributes:
        connection: the connection.
        folder: the temporary folder.
    """

    def __init__(self, memory: str | None = None):
        self._temporary = tempfile.TemporaryDirectory(prefix="gflowtrl-")
        self._tables = 0
        self.folder = self._temporary.name
        limits = {"temp_directory": self.folder} | ({} if memory is None else {"memory_limit": memory})
        try:
            self.connection = duckdb.connect(":memory:", config=_CLOSED | limits)
            self.connection.execute(f"SET allowed_directories = [{text_literal(self.folder)}]")
            self.connection.execute("SET enable_external_access = false")
        except duckdb.Error:
            self._temporary.cleanup()
            raise

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_) -> None:
        self.connection.close()
        self._temporary.cleanup()

    @contextmanager
    def view(self, name: str, table: pa.Table) -> Iterator[None]:
        """Context manager in which queries read `table` as `name`.

        They read it from a file: if threads of DuckDB scan a Python object while threads of Python start or end, they
        can wait for each other forever.
        """
        self._tables += 1
        file = Path(self.folder, f"{self._tables}.parquet")
        pq.write_table(
            table, file, row_group_size=_GROUP_ROWS, compression="none", use_dictionary=False, write_statistics=False
        )
        try:
            # The names of the folders are not columns, whatever they contain.
            content = f"read_parquet({text_literal(str(file))}, hive_partitioning = false)"
            self.connection.execute(f"CREATE OR REPLACE TEMP VIEW {name} AS SELECT * FROM {content}")
            yield
        finally:
            file.unlink()


def text_literal(text: str) -> str:
    """Return a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"
