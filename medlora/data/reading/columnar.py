"""Rows of parquet files, a few at a time: as many as memory surely holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from medlora.bounds import MAX_COLUMNS, MAX_LINE_BYTES, check_growth, clean
from medlora.data.reading.formats import FileRow
from medlora.errors import InputError
from medlora.runs.object_store import is_store, open_store

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

_ROWS = 1024


_BATCH_BYTES = 256 * 2**20
"""Most bytes of rows that are in memory at once; a single row may have more."""


def read_parquet(name: str) -> Iterator[FileRow]:
    """The rows of a parquet file; raises InputError where it is none, or a part of it does not fit into memory."""
    import pyarrow
    from pyarrow import parquet

    try:
        store, path = open_store(name if is_store(name) else str(Path(name).absolute()))
        with store.open_input_file(path) as opened, parquet.ParquetFile(opened) as file:
            if len(file.schema_arrow) > MAX_COLUMNS:
                raise InputError(f"{name}: {len(file.schema_arrow):,} columns, more than {MAX_COLUMNS:,}")
            if (mean := _mean(file)) > 2 * MAX_LINE_BYTES:
                raise InputError(f"{name}: its rows have {mean:,} bytes on average, which is no row; cut the texts")
            worst, packed = _measure(file.metadata)
            number = unpacked = 0
            # A word of a dictionary is stored once and may be in every row: such columns are left packed.
            names = packed if worst * _ROWS > _BATCH_BYTES else []
            with parquet.ParquetFile(opened, read_dictionary=names) as whole:
                for batch in whole.iter_batches(batch_size=max(1, min(_ROWS, _BATCH_BYTES // max(1, mean)))):
                    unpacked += _count_bytes(batch)
                    check_growth(name, _find_packed(file, number), unpacked)
                    for row in _take_rows(batch):
                        number += 1
                        yield f"{name}:{number}", row
    except MemoryError:
        raise InputError(f"{name}: its rows do not fit into memory; write it anew with shorter values") from None
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = clean(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        raise InputError(f"{name}: is no readable parquet file: {reason}") from None


def _measure(metadata: parquet.FileMetaData) -> tuple[int, list[str]]:
    """The most bytes that one row can have, and the columns of which each value may be that long: texts at the top level."""
    worst, texts = 0, dict[str, None]()
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        columns = [group.column(j) for j in range(group.num_columns)]
        worst = max(worst, sum(column.total_uncompressed_size for column in columns))
        texts |= {
            c.path_in_schema: None for c in columns if c.physical_type == "BYTE_ARRAY" and "." not in c.path_in_schema
        }
    return worst, list(texts)


def _find_packed(file: parquet.ParquetFile, number: int) -> int:
    """Bytes in the file of the row groups up to the one that holds row `number`, from 0."""
    packed = rows = 0
    for i in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(i)
        packed += sum(group.column(j).total_compressed_size for j in range(group.num_columns))
        rows += group.num_rows
        if number < rows:
            break
    return packed


def _mean(file: parquet.ParquetFile) -> int:
    """Bytes of a row on average, in the row group where rows are largest."""
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    return max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)


def _count_bytes(batch: pyarrow.RecordBatch) -> int:
    """How large the rows of a batch are once every word of a dictionary is written out."""
    import pyarrow
    from pyarrow import compute

    whole = 0
    for column in batch.columns:
        if pyarrow.types.is_dictionary(column.type):
            lengths = compute.binary_length(column.dictionary).take(column.indices)
            whole += compute.sum(lengths).as_py() or 0
        else:
            whole += column.nbytes
    return whole


def _take_rows(batch: pyarrow.RecordBatch) -> Iterator[object]:
    """The rows of a batch as plain values, so many at a time as surely fit."""
    step = max(1, min(len(batch), len(batch) * _BATCH_BYTES // max(1, _count_bytes(batch)) // 4))
    for start in range(0, len(batch), step):
        yield from batch.slice(start, step).to_pylist()
