"""Atomic writes, locks and file hashes, for the whole project."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path


def temporary_beside(path: str | Path) -> Path:
    """A name for a file that becomes `path` when it is whole. No two processes, on any machine, have the same."""
    path = Path(path)
    return path.with_name(f"{path.name}.{_machine()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def is_abandoned(temporary: Path) -> bool:
    """Whether the maker of a `temporary_beside` is gone.

    It is known by the number of its process, where such numbers mean the same as here: on this machine since its last
    start, and in this container. Anywhere else, whether an hour has passed in silence.
    """
    name, process = temporary.name.split("."), ""
    if len(name) > 4 and name[-4] == _machine():
        process = name[-3]
    if process.isdigit():
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return int(process) == os.getpid()
    return time.time() - temporary.stat().st_mtime > 3600


@cache
def _machine() -> str:
    """What the number of a process refers to: the host, since its last start, and the container's own numbers."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # only Linux has these
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def write_atomic(path: str | Path, data: bytes | bytearray | str) -> None:
    """Replaces a file as a whole or not at all, also after a power cut. Text is written as UTF-8."""
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        with naming(path), open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: str | Path, value: object) -> None:
    """Writes `value` as indented JSON, as a whole or not at all."""
    write_atomic(path, json.dumps(value, indent=1))


@contextlib.contextmanager
def locked(path: str | Path, on_wait: Callable[[], object] | None = None, shared: bool = False) -> Iterator[int]:
    """Waits until no other process, on any machine, has this file. Yields its descriptor: a child that gets it counts.

    The operating system frees the lock when a process dies. `on_wait` is called before a wait. With `shared`, others
    that share it may have it, too. On a file system without locks there is no waiting.
    """
    path, kind = Path(path), fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w+") as file:  # NFS shares no file that can't be read
        try:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_wait:
                    on_wait()
                fcntl.flock(file, kind)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
        yield file.fileno()


def has_size(path: Path, size: int) -> bool:
    """Whether a file is there, with so many bytes."""
    try:
        return path.stat().st_size == size
    except OSError:
        return False


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file to an OSError that names none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def sync(path: str | Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of_file(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal. The file is read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sha256_of_files(paths: list[Path], settings: dict) -> str:
    """SHA-256, in hexadecimal, of files (by name and content) and of a dict of settings that JSON can hold."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in sorted(paths):
        digest.update(f"{path.name}:{sha256_of_file(path)}".encode())
    return digest.hexdigest()


def begin_folder(out: Path, record: dict, maker: str) -> None:
    """Makes a folder of videos for the command `data_prep.MAKER`, with its settings in MAKER.json.

    Raises ValueError if the folder holds videos of other settings, or anything else.
    """
    path = out / f"{maker}.json"
    if path.is_file():
        try:
            found = json.loads(path.read_text())
        except ValueError:
            found = None
        if found != record:
            raise ValueError(
                f"{out}: holds videos made with other settings ({found}); remove it, or choose another folder"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and was not made by data_prep.{maker}; choose another folder")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(record))
