"""Rows of parquet and Arrow files as JSON records, a batch at a time.

pyarrow is an extra (``megasft[data]``) and imported here alone. Columns give every row the same
fields, so in a table "absent" and "null" look alike; a null field is left out at every depth, or
the tool definitions of a chat would be rendered with the parameters of all other tools. What JSON
cannot hold (binary columns) becomes null too, and is an error only where text is wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import orjson

from megasft.data.remote import Location, Remote
from megasft.errors import DataError

PARQUET_MAGIC: Final = b"PAR1"
ARROW_MAGICS: Final = (b"ARRO", b"\xff\xff\xff\xff")
"""An Arrow file (feather), and the Arrow stream that `datasets` writes."""
_BATCH_ROWS: Final = 512


def is_table(magic: bytes) -> bool:
    """Say whether a file with these first four bytes is a table."""
    return magic == PARQUET_MAGIC or magic in ARROW_MAGICS


def require_pyarrow(path: Location) -> None:
    """Check that tables can be read here.

    Raises:
        DataError: pyarrow is missing.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise DataError(
            f"{path} is a parquet or Arrow file, and the Python package pyarrow is not installed; "
            "pip install 'megasft[data]', or write the file as .jsonl"
        ) from None


def read_rows(path: Location) -> Iterator[bytes]:
    """Yield each row of a table as a JSON object.

    Raises:
        DataError: The file is damaged.
    """
    import pyarrow

    number = 0
    try:
        for batch in _batches(path):
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                    number += 1
                    yield orjson.dumps(_without_nulls(row), default=_nothing)
    except (pyarrow.ArrowException, OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{path}:record {number + 1}: the table cannot be read: {error}; write it again"
        ) from None


def _batches(path: Location) -> Iterator[Any]:
    import pyarrow

    with path.open() if isinstance(path, Remote) else pyarrow.memory_map(str(path)) as file:
        magic = file.read(4)
        file.seek(0)
        if magic == PARQUET_MAGIC:
            import pyarrow.parquet

            table = pyarrow.parquet.ParquetFile(file)
            yield from table.iter_batches(batch_size=_BATCH_ROWS, use_threads=False)
        elif magic == ARROW_MAGICS[0]:
            reader = pyarrow.ipc.open_file(file)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from pyarrow.ipc.open_stream(file)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _nothing(value: Any) -> None:
    return None
