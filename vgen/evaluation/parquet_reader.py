"""Pictures in parquet files in the layout of the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vgen.data.parquet import ParquetReader
from vgen.errors import UserError
from vgen.evaluation.pictures import EncodedPictures

IMAGE_COLUMNS = ("image", "img", "png", "jpg")
LABEL_COLUMNS = ("label", "fine_label", "cls", "class")


class ParquetPictures(EncodedPictures):
    """All rows of parquet files: an image column (``image``, ``img``, ``png``, ``jpg``) and, if any, a label column.

    A data set with splits, crops or other column names is better named by the data group (``data=parquet``).

    Raises:
        UserError: naming a file that is damaged or has no image column.
    """

    kind = "parquet"

    def __init__(self, paths: Sequence[Path], name: str):
        super().__init__()
        self.name = name
        groups, labels = [], []
        column = None
        for path in paths:
            found, rows, classes = _index(path)
            if column not in (None, found):
                raise UserError(f"{path} keeps its images in column {found}, the files before it in {column}")
            column = found
            groups += rows
            labels.append(classes)
        if not groups:
            raise UserError(f"{name} holds no rows")
        assert column is not None
        self._reader = ParquetReader(paths[0].parent, groups, column)
        if all(part is not None for part in labels):
            self.labels = torch.cat([part for part in labels if part is not None])

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self._reader)

    def encoded(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            UserError: if a damaged file gives none.
        """
        try:
            return self._reader.read(index) or b""
        except OSError as error:
            raise UserError(f"{self.item_name(index)} cannot be read ({error}); copy the file again") from error

    def item_name(self, index: int) -> str:
        """File and row."""
        return self._reader.name(index)


def _index(path: Path) -> tuple[str, list[tuple[Path, int, int]], Tensor | None]:
    """Image column, row groups and labels of a file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            column = next((name for name in IMAGE_COLUMNS if name in names), None)
            if column is None:
                raise UserError(
                    f"{path} has no image column ({', '.join(IMAGE_COLUMNS)}), only {', '.join(names)}; use "
                    f"data=parquet data.image_column=... and samples=data"
                )
            groups = [(path, i, file.metadata.row_group(i).num_rows) for i in range(file.num_row_groups)]
            label = next((name for name in LABEL_COLUMNS if name in names), None)
            labels = None
            if label is not None and pa.types.is_integer(file.schema_arrow.field(label).type):
                values = file.read(columns=[label])[label]
                labels = None if values.null_count else torch.tensor(values.to_pylist(), dtype=torch.int64)
            return column, groups, labels
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file ({error}); download it again") from error
