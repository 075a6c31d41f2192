"""The index of a dataset, `samples.npy`: where every sample is, in 24 bytes each.

    DATASET/samples.npy     one row (offset, bytes, crc32, video, clip) per sample, in the order of the card's shards

It is a plain numpy array, mapped into memory: the processes of a machine share its pages, and opening it takes no time.
That of a remote dataset is copied first, once for all processes of the machine.
"""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.files import sha256_of_file, write_atomic
from data_prep.places import Place, checked_copy, place_of
from data_prep.shards import Entry

INDEX = "samples.npy"
ROW = np.dtype([("offset", "<u8"), ("bytes", "<u4"), ("crc32", "<u4"), ("video", "<u4"), ("clip", "<u4")])


def write_index(folder: str | Path, records: Iterable[dict]) -> dict:
    """Writes the index of the shards with these records (what `ShardWriter.finish` returns), in order.

    Returns {"file", "bytes", "sha256"}, for the card.
    """
    parts = [np.array([tuple(entry) for entry in record["index"]], ROW) for record in records]
    return write_rows(folder, np.concatenate(parts) if parts else np.empty(0, ROW))


def write_rows(folder: str | Path, rows: np.ndarray) -> dict:
    """Writes the index with these rows, [samples] of dtype ROW. Returns {"file", "bytes", "sha256"}, for the card."""
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    path = Path(folder) / INDEX
    write_atomic(path, buffer.getvalue())
    return {"file": INDEX, "bytes": len(buffer.getvalue()), "sha256": sha256_of_file(path)}


class SampleIndex:
    """The samples of a dataset, by number, in the order of its shards. len() is their count.

    Raises a one-line ValueError when the index is not the one that the card names.
    """

    def __init__(self, folder: str | Place, card: dict):
        path = place_of(folder) / card["index"]["file"]

        def is_whole(file: Path) -> bool:
            return file.stat().st_size == card["index"]["bytes"] and sha256_of_file(file) == card["index"]["sha256"]

        damaged = "not the index that the card names, or damaged; encode again to write it anew"
        file = checked_copy(path, card["index"]["sha256"], is_whole, "missing, but the card names it", damaged)
        try:
            self.rows = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}: not an index ({error})") from None
        self.files = [shard["file"] for shard in card["shards"]]
        self._first_videos = [shard.get("first_video", 0) for shard in card["shards"]]
        self._ends = np.cumsum([shard["samples"] for shard in card["shards"]])
        if self.rows.dtype != ROW or self.rows.shape != (self._ends[-1],):
            found = f"{self.rows.dtype} {self.rows.shape}"
            raise ValueError(f"{path}: holds {found}, the card's shards have {self._ends[-1]} samples")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[str, Entry]:
        """The shard file of sample `number`, and the place in it."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return self.files[shard], self._entry(self.rows[number], shard)

    def key(self, number: int) -> str:
        """The name of sample `number`."""
        return self[number][1].key

    def of_shard(self, shard: int) -> list[Entry]:
        """The entries of shard number `shard`, in its order."""
        begin = 0 if shard == 0 else int(self._ends[shard - 1])
        return [self._entry(row, shard) for row in self.rows[begin : int(self._ends[shard])]]

    def _entry(self, row: Any, shard: int) -> Entry:
        offset, size, crc32, video, clip = row.tolist()
        return Entry(offset, size, crc32, video, clip, self._first_videos[shard])
