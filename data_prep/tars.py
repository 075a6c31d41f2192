"""Videos in tar files, read where they lie: the members of a tar by its headers, and a part of a file as a file.

Nothing is extracted. Listing a tar reads its headers and texts only, and skips the rest. Tars can be remote; then
whoever decodes a video copies it first.
"""

import contextlib
import io
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.places import PIECE, Place, Remote, RemoteError, read_range, size_and_version

BLOCK = 64 << 10  # bytes that are read of a remote tar at once while it is listed
LARGEST_TEXT = 1 << 20  # bytes of a caption or JSON
LARGEST_HEADER = 1 << 20  # bytes of an extended header, such as a long name


@dataclass(frozen=True)
class Region:
    """A part of a file: `size` bytes from `offset` on."""

    path: Place
    offset: int
    size: int

    def __str__(self) -> str:
        return str(self.path)

    def open(self) -> "RegionFile":
        """The region of a local file as a file of its own. Raises OSError."""
        return RegionFile(self)

    def pieces(self) -> Iterator[bytes]:
        """Its bytes, in order, until its end or that of the file. Raises as `read_range` does."""
        at, end = self.offset, self.offset + self.size
        while at < end and (piece := read_range(self.path, at, min(PIECE, end - at))):
            yield piece
            at += len(piece)


class _ReadOnly(io.RawIOBase):
    """A file to read, with a position `_at`."""

    _at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at


class RegionFile(_ReadOnly):
    """A region of a file, read-only, with positions from 0. It ends early where the file itself does."""

    def __init__(self, region: Region):
        assert isinstance(region.path, Path)
        self._region = region
        self._file = io.FileIO(region.path)

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


def video_at(path: Path | Remote, region: tuple[int, int] | None) -> Path | Region:
    """A video: a local file, or the region (offset, size) of one, which may be remote."""
    if region:
        return Region(path, *region)
    assert isinstance(path, Path)  # only shards are remote
    return path


@contextlib.contextmanager
def opened_here(video: Path | Region, go_on: Callable[[], None] = lambda: None) -> Iterator[Path | Region]:
    """A video as a local one: itself, or a copy of a remote one, in a file without a name, of which nothing stays.

    Raises as `read_range` does, and what `go_on` raises, which is called before each piece; OSError with a file name
    when there is no room for the copy.
    """
    if isinstance(video, Path) or isinstance(video.path, Path):
        yield video
        return
    with tempfile.TemporaryFile() as file:
        for piece in video.pieces():
            go_on()
            try:
                file.write(piece)
                file.flush()
            except OSError as error:
                raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from None
        yield Region(Path(f"/proc/{os.getpid()}/fd/{file.fileno()}"), 0, file.tell())


class _RemoteFile(_ReadOnly):
    """A remote file, read-only."""

    def __init__(self, place: Remote):
        self._place = place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence != os.SEEK_END
        self._at = offset + (self._at if whence == os.SEEK_CUR else 0)
        return self._at

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        data = read_range(self._place, self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@dataclass(frozen=True)
class Member:
    """A file in a tar: its name, where its data is, and why it can't be used, if that is so.

    `text` has the bytes of a whole .txt or .json of at most LARGEST_TEXT bytes.
    """

    name: str
    offset: int
    size: int
    problem: str = ""
    text: bytes = b""


class _Headers(io.BufferedReader):
    """A tar file of which only headers are read: a damaged one can't have all of the file read into memory."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= LARGEST_HEADER:  # LARGEST_TEXT is no more
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def tar_members(path: Place) -> Iterator[Member]:
    """The files in a tar, in its order. If it is cut short or damaged, the last one has no name, and says so.

    Links and sparse files have a problem, and so have names that lead out of the tar. Folders are left out. Raises a
    one-line ValueError if it is not a tar; OSError if it can't be read; RemoteError if a server stays away.
    """
    remote = isinstance(path, Remote)
    end = size_and_version(path)[0] if isinstance(path, Remote) else os.path.getsize(path)
    raw = _RemoteFile(path) if isinstance(path, Remote) else io.FileIO(path)
    with _Headers(raw, BLOCK if remote else io.DEFAULT_BUFFER_SIZE) as file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        except RemoteError:
            raise
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}: not a plain tar file ({error})") from None
        begin = -1
        while True:
            try:
                info = tar.next()
            except RemoteError:
                raise
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
                name, problem, text = info.name.removeprefix("./"), _problem(info, end), b""
                if name.endswith((".txt", ".json")) and not problem and info.size <= LARGEST_TEXT:
                    file.seek(info.offset_data)
                    text = file.read(info.size)
                yield Member(name, info.offset_data, info.size, problem, text)
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
