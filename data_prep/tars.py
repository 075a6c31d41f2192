"""Videos in tar files, read where they lie: the members of a tar by its headers, and a part of a file as a file.

Nothing is extracted. Listing a tar reads its headers only, and skips the data.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LARGEST_HEADER = 1 << 20  # bytes of an extended header, such as a long name


@dataclass(frozen=True)
class Region:
    """A part of a file: `size` bytes from `offset` on."""

    path: Path
    offset: int
    size: int

    def __str__(self) -> str:
        return str(self.path)

    def open(self) -> "RegionFile":
        """The region as a file of its own. Raises OSError."""
        return RegionFile(self)


class RegionFile(io.RawIOBase):
    """A region of a file, read-only, with positions from 0. It ends early where the file itself does."""

    def __init__(self, region: Region):
        self._region, self._at = region, 0
        self._file = io.FileIO(region.path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._region.size}[whence]
        if base + offset < 0:
            raise ValueError(f"position {base + offset} is before the region")
        self._at = base + offset
        return self._at

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        room = memoryview(buffer).cast("B")[: max(0, self._region.size - self._at)]
        count = os.preadv(self._file.fileno(), [room], self._region.offset + self._at) if room else 0
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass(frozen=True)
class Member:
    """A file in a tar: its name, where its data is, and why it can't be used, if that is so."""

    name: str
    offset: int
    size: int
    problem: str = ""


class _Headers(io.BufferedReader):
    """A tar file of which only headers are read: a damaged one can't have all of the file read into memory."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def tar_members(path: Path) -> Iterator[Member]:
    """The files in a tar, in its order. If it is cut short or damaged, the last one has no name, and says so.

    Links and sparse files have a problem, and so have names that lead out of the tar. Folders are left out. Raises a
    one-line ValueError if it is not a tar; OSError if it can't be read.
    """
    end = os.path.getsize(path)
    with _Headers(io.FileIO(path)) as file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}: not a plain tar file ({error})") from None
        begin = -1
        while True:
            try:
                info = tar.next()
            except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
                yield Member("", 0, 0, f"it is cut short or damaged: nothing can be read behind byte {begin} ({error})")
                return
            if info is None:
                break
            if info.offset <= begin or info.size < 0:
                yield Member("", 0, 0, f"it is damaged: a header behind byte {begin} has a size below 0")
                return
            begin = info.offset
            tar.members.clear()  # type: ignore[attr-defined]  # otherwise it keeps them all
            if not info.isdir():
                yield Member(info.name.removeprefix("./"), info.offset_data, info.size, _problem(info, end))
        file.seek(tar.offset)
        block = file.read(tarfile.BLOCKSIZE)
        if block != bytes(tarfile.BLOCKSIZE):
            how = "damaged" if len(block) == tarfile.BLOCKSIZE else "cut short"
            yield Member("", 0, 0, f"it is {how}: no tar header, and no end of a tar, at byte {tar.offset}")


def _problem(info: tarfile.TarInfo, end: int) -> str:
    """Why a member of a tar of `end` bytes can't be used; "" if it can."""
    if not info.isreg() or info.issparse():
        return "in the tar it is a link or a sparse file, not a plain file"
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return "its name leads out of the tar"
    if info.offset_data + info.size > end:
        return f"cut short: the tar holds {max(0, end - info.offset_data)} of its {info.size} bytes"
    return ""
