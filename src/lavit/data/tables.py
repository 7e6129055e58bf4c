"""Parquet tables, read a few rows at a time: what is in memory are the pages that hold them.

`datasets` reads a row group as a whole, which may be all of a file, and keeps it decoded while its
rows are served. pyarrow's buffered reading needs one page of a column at a time; pyarrow writes at
most 1,024 rows to one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets.packaged_modules.parquet.parquet import Parquet

ROWS = 64  # that are read together
FEW = {"buffer_size": 1 << 20, "pre_buffer": False}  # bytes of a column, not its row group


class Tables(Parquet):  # type: ignore[misc]  # which is Any
    """Reads tables as the header says."""

    def _generate_tables(
        self, files: Any, row_groups_list: Any = None
    ) -> Iterator[tuple[tuple[int, int], pa.Table]]:
        how = {"batch_size": ROWS, "columns": self.config.columns, "use_threads": False}
        for number, name in enumerate(files):
            with open(name, "rb") as file, pq.ParquetFile(file, **FEW) as table:
                groups = row_groups_list[number] if row_groups_list else None
                for place, batch in enumerate(table.iter_batches(row_groups=groups, **how)):
                    yield (number, place), self._cast_table(pa.Table.from_batches([batch]))
