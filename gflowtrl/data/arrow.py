"""Tables of Arrow from the DataFrames of other libraries, and their text."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from gflowtrl.checks import one_line


def is_table(value: Any) -> bool:
    """Return whether `as_table` takes a value: a DataFrame of pandas or polars, or whatever Arrow can read."""
    return _is_pandas(value) or isinstance(value, pa.Table | pa.RecordBatch) or hasattr(value, "__arrow_c_stream__")


def as_table(value: Any, name: str) -> pa.Table:
    """Convert a DataFrame (pandas, polars) or whatever Arrow can read to a table.

    Raises:
        ValueError: it is not a table, or a column holds values of several types.
    """
    if not is_table(value):
        raise ValueError(
            f"The {name} is a {type(value).__name__}. Format 'table' takes DataFrames of pandas or polars and tables "
            "of Arrow; files have their own formats."
        )
    try:
        table = pa.Table.from_pandas(value, preserve_index=False) if _is_pandas(value) else pa.table(value)
    except (pa.ArrowException, ValueError, OverflowError) as error:  # ValueError: two columns have one name
        text = one_line(str(error))
        raise ValueError(
            f"The {name} is not a table of Arrow ({text}). Give each column a name and one type."
        ) from None
    views = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    return table.cast(pa.schema([field.with_type(views.get(field.type, field.type)) for field in table.schema]))


def check_utf8(table: pa.Table, where: object, first_row: int = 1) -> None:
    """Check the text of a table, also in lists and structs. Arrow and Parquet do not, and others fail far from it.

    Args:
        table: the table, or a part of one.
        where: the file, or the name of the table.
        first_row: number of the first row.

    Raises:
        ValueError: names the file, the row and the column of the first value that is not UTF-8.
    """
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:  # perhaps about a value of a list or dictionary that is not in these rows
            for row, value in enumerate(column, first_row):
                if not _is_readable(value):
                    raise ValueError(
                        f"{where}, row {row}: the column {name!r} has text that is not UTF-8. Write it as UTF-8."
                    ) from None


def _is_readable(value: pa.Scalar) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _is_pandas(value: Any) -> bool:
    return hasattr(value, "columns") and type(value).__module__.split(".")[0] == "pandas"
