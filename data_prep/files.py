"""Atomic writes and file hashes, for the whole project."""

import hashlib
import json
import os
from pathlib import Path


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Replaces a file as a whole or not at all, also after a power cut. Text is written as UTF-8."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
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
