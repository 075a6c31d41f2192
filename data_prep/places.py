"""Where a dataset is: a local folder, or an address `https://`, `http://`, `s3://`, `gs://`, read through fsspec.

A local place is a `pathlib.Path`, and is read with plain `open`. A `Remote` is read by ranges of bytes. fsspec and its
parts are imported only then. A server that is away is waited for; a file that is missing is an error at once.
"""

import errno
import hashlib
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from data_prep.files import locked, write_atomic

PATIENCE = 1800.0  # seconds that a read waits for a server that is away
TIMEOUT = 30.0  # seconds without a connection or a byte, after which a server counts as away
LONGEST = 600.0  # seconds of a whole request
PIECE = 8 << 20  # bytes of one request for a large file
LOCAL_TRIES = 3
LOCAL_PAUSE = 0.5  # seconds between them
PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}  # what fsspec needs, by scheme

# Errors of a network file system that may be gone at the next try.
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
# Classes of aiohttp, botocore and google-auth for a server that can't be reached, or breaks off; and those among their
# subclasses that no waiting mends.
_AWAY = {
    "ConnectionError", "TimeoutError", "ClientConnectionError", "ClientPayloadError", "HTTPClientError",
    "IncompleteReadError", "TransportError",
}  # fmt: skip
_NOT_AWAY = {"ClientConnectorCertificateError", "SSLError"}


class RemoteError(ValueError):
    """A remote place can't be read as asked. The message is one line and names the place."""


@dataclass(frozen=True)
class Remote:
    """A remote folder or file. `remote / name` is a file in it. str() is its address."""

    scheme: str
    path: str  # host or bucket, and what follows
    patience: float = PATIENCE

    def __truediv__(self, name: str) -> "Remote":
        return replace(self, path=f"{self.path}/{quote(name) if self.scheme.startswith('http') else name}")

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    @property
    def parent(self) -> "Remote":
        return replace(self, path=self.path.rpartition("/")[0])

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def host(self) -> str:
        """What is said to be away: the host, or the bucket with its scheme."""
        host = self.path.partition("/")[0]
        return host if self.scheme.startswith("http") else f"{self.scheme}://{host}"


Place = Path | Remote


def place_of(address: str | Path | Remote, patience: float | None = None) -> Place:
    """The place of an address: a `Path` for a local folder, else a `Remote`.

    Raises a one-line ValueError for an address that is not read; it never shows a password or a query.
    """
    if isinstance(address, Path):
        return address
    if isinstance(address, Remote):
        return address if patience is None else replace(address, patience=patience)
    if address.lower().startswith("pipe:"):
        raise ValueError("pipe: an address that runs a command is refused; give a folder, or https://, s3:// or gs://")
    scheme, found, rest = address.partition("://")
    if not found:
        return Path(address)
    scheme = scheme.lower()
    if scheme not in PACKAGES:
        raise ValueError(f"{scheme}:// is not read; give a folder, or https://, http://, s3:// or gs://")
    host = re.split(r"[/?#]", rest)[0]
    if "@" in host:
        raise ValueError(
            f"{scheme}://{host.rpartition('@')[2]}: the address holds a name or password; put them into the "
            f"environment, or into the configuration files of {PACKAGES[scheme]}"
        )
    clean = re.split(r"[?#]", rest)[0].rstrip("/")
    if clean != rest.rstrip("/"):
        raise ValueError(f"{scheme}://{clean}: an address ends before the ? or #; give the plain address of a folder")
    if not host:
        raise ValueError(f"{scheme}://{clean}: the address names no host or bucket")
    return Remote(scheme, clean, PATIENCE if patience is None else patience)


def check_address(setting: str, address: str) -> None:
    """Raises a ValueError that names the setting for an address that is not read. Opens nothing."""
    try:
        place_of(address)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from None


def no_such_folder(place: Place) -> bool:
    """Whether a local folder does not exist. Of a remote one only reading can tell."""
    return isinstance(place, Path) and not place.is_dir()


def local_folder(address: str | Path, what: str) -> Path:
    """The folder at an address. Raises ValueError for a remote one: `what` reads local folders only."""
    place = place_of(address)
    if isinstance(place, Remote):
        raise ValueError(f"{place}: {what} reads local folders only; copy the dataset here first")
    return place


def read_range(place: Place, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset` on, or fewer where it ends.

    Raises FileNotFoundError, PermissionError or another OSError; and RemoteError when a server stays away for longer
    than the place's patience, or does not answer range requests.
    """
    if isinstance(place, Remote):
        return _ask(place, offset, size)
    for attempt in range(1, LOCAL_TRIES + 1):
        try:
            with open(place, "rb", buffering=0) as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            if error.errno not in _PASSING or attempt == LOCAL_TRIES:
                raise
        time.sleep(LOCAL_PAUSE)
    raise AssertionError("unreachable")


def read_whole(place: Place) -> bytes:
    """A small file. Raises as `read_range` does."""
    return place.read_bytes() if isinstance(place, Path) else _ask(place, 0, None)


def pieces(place: Place) -> Iterator[bytes]:
    """A file from its begin to its end, in pieces of PIECE bytes. Raises as `read_range` does."""
    offset = 0
    while piece := read_range(place, offset, PIECE):
        yield piece
        offset += len(piece)
        if len(piece) < PIECE:
            return


def size_and_sha256(place: Place) -> tuple[int, str]:
    """The bytes of a file, and their SHA-256 in hexadecimal. Raises as `read_range` does."""
    size, digest = 0, hashlib.sha256()
    for piece in pieces(place):
        size += len(piece)
        digest.update(piece)
    return size, digest.hexdigest()


def cache_folder() -> Path:
    """Where copies of remote files are kept: $XDG_CACHE_HOME/rf_train, or ~/.cache/rf_train."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rf_train"


def local_copy(place: Place, version: str, is_whole: Callable[[Path], bool]) -> Path | None:
    """A local file with the content of `place`: itself, or a copy that all processes of a machine share.

    One process makes the copy, the others wait for it. `version` is a hash of the content: a dataset that has changed
    gets another copy. Returns None when the file is not whole; of a remote one, when two copies were not. Raises as
    `read_range` does.
    """
    if isinstance(place, Path):
        return place if is_whole(place) else None
    folder = cache_folder() / hashlib.sha256(f"{place.parent}\0{version}".encode()).hexdigest()[:32]
    copy = folder / place.name
    if copy.is_file() and is_whole(copy):
        return copy
    try:
        with locked(folder / "lock"):
            if copy.is_file() and is_whole(copy):  # another process has made it meanwhile
                return copy
            for _ in range(2):
                content = bytearray()
                for piece in pieces(place):
                    content += piece
                write_atomic(copy, content)
                if is_whole(copy):
                    return copy
    except PermissionError as error:
        if error.filename and str(error.filename).startswith(str(cache_folder())):
            raise ValueError(f"{folder}: not writable; set XDG_CACHE_HOME to a folder for copies of indexes") from None
        raise
    return None


def checked_copy(place: Place, version: str, is_whole: Callable[[Path], bool], missing: str, damaged: str) -> Path:
    """As `local_copy`. Raises a one-line ValueError that names the place, and says `missing` or `damaged`."""
    try:
        file = local_copy(place, version, is_whole)
    except FileNotFoundError:
        raise ValueError(f"{place}: {missing}") from None
    except OSError as error:
        raise ValueError(f"{place}: not readable ({error.strerror or error})") from None
    if file is None:
        raise ValueError(f"{place}: {damaged}")
    return file


# ---- remote places

_away_since: dict[str, float] = {}  # by host; one change of a dict is atomic, so there is no lock that a fork may copy
_answered: dict[str, float] = {}  # by host: when the last request that was answered began


class _Status(OSError):
    """An answer of an HTTP server that is not what was asked for."""

    def __init__(self, status: int):
        super().__init__(f"HTTP {status}")
        self.status = status


class _WholeFile(Exception):
    """A server sends a whole file instead of the range."""


class _Away(Exception):
    """A server is not reachable, slow or in trouble: waiting may help."""


def size_and_version(place: Remote) -> tuple[int, str]:
    """The bytes of a remote file, and what its server calls this version of it; "" if nothing. Raises as `read_range`.

    Of HTTP it asks for the first byte: the answer says how many there are.
    """
    found = _patiently(place, lambda filesystem: _size_and_version(filesystem, place))
    return (0, "") if found is None else found


def _ask(place: Remote, offset: int, size: int | None) -> bytes:
    """A range of a remote file, or the whole file (size None). Waits for a server that is away."""
    data = _patiently(place, lambda filesystem: _request(filesystem, place, offset, size))
    if data is not None and size is not None and len(data) > size:
        raise RemoteError(f"{place.host} does not answer range requests, {place} can't be read by samples")
    return data or b""


def _patiently(place: Remote, request: Callable[[Any], Any]) -> Any:
    """What a request gives, None if the file ends before. Waits for a server that is away."""
    filesystem = _filesystem(place.scheme, os.getpid())
    began, pause = None, 1.0
    while True:
        asked = time.monotonic()
        try:
            answer = request(filesystem)
        except Exception as error:
            meaning = _meaning(error, place)
            if not isinstance(meaning, _Away):
                _is_back(place.host, asked)
                if meaning is None:  # the file ends before the range
                    return None
                raise meaning from None
        else:
            _is_back(place.host, asked)
            return answer
        _is_away(place.host, asked, str(meaning))
        now = time.monotonic()
        began = now if began is None else began
        left = began + place.patience - now
        if left <= 0:
            raise RemoteError(f"{place}: not reachable for {place.patience:g} s ({meaning})")
        time.sleep(min(pause, left))
        pause = min(2 * pause, 30.0)


def _is_away(host: str, asked: float, reason: str) -> None:
    """Says once that a host is away, unless it has answered something since this request began."""
    if asked >= _answered.get(host, 0.0):
        now = time.monotonic()
        if _away_since.setdefault(host, now) is now:
            _say(f"{host}: not reachable ({reason}); trying again")


def _is_back(host: str, asked: float) -> None:
    """Notes an answer to a request that began at `asked`. Says once that a host is back."""
    _answered[host] = max(asked, _answered.get(host, 0.0))
    since = _away_since.get(host)
    if since is not None and asked >= since and _away_since.pop(host, None) is not None:
        _say(f"{host}: back after {time.monotonic() - since:.0f} s")


def _say(line: str) -> None:
    from tqdm import tqdm  # here, since decoding processes import this module and need to start fast

    tqdm.write(line, file=sys.stderr)


@cache
def _filesystem(scheme: str, process: int) -> Any:
    """fsspec's file system of a scheme. Each process has its own: connections do not survive a fork."""
    package = PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise RemoteError(f"{scheme}:// addresses need {package}: pip install {package}")
    import fsspec

    if package == "aiohttp":
        import aiohttp

        limits = aiohttp.ClientTimeout(total=LONGEST, sock_connect=TIMEOUT, sock_read=TIMEOUT)
        client = {"timeout": limits, "trust_env": True}  # the environment's proxies, and ~/.netrc
        return fsspec.filesystem(scheme, client_kwargs=client, skip_instance_cache=True)
    if package == "s3fs":
        limits = {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT, "retries": {"max_attempts": 0}}
        filesystem = fsspec.filesystem(scheme, config_kwargs=limits, skip_instance_cache=True)
        filesystem.retries = 1  # we try again ourselves, and say so
        return filesystem
    return fsspec.filesystem(scheme, requests_timeout=TIMEOUT, skip_instance_cache=True)


def _request(filesystem: Any, place: Remote, offset: int, size: int | None) -> bytes:
    """One request. Raises what the library raises."""
    from fsspec.asyn import sync

    end = None if size is None else offset + size
    if size == 0:
        return b""
    if place.scheme.startswith("http"):
        return sync(filesystem.loop, _http, filesystem, str(place), offset, end, timeout=LONGEST)[0]
    start = None if end is None else offset
    return sync(filesystem.loop, filesystem._cat_file, place.path, start=start, end=end, timeout=LONGEST)


def _size_and_version(filesystem: Any, place: Remote) -> tuple[int, str]:
    """One request for the size and the version of a file. Raises what the library raises."""
    from fsspec.asyn import sync

    if not place.scheme.startswith("http"):
        info = sync(filesystem.loop, filesystem._info, place.path, timeout=LONGEST)
        if info.get("type") == "directory":
            raise FileNotFoundError
        return int(info["size"]), str(info.get("ETag") or info.get("etag") or "")
    _, headers = sync(filesystem.loop, _http, filesystem, str(place), 0, 1, timeout=LONGEST)
    total = re.fullmatch(r"bytes 0-0/(\d+)", headers.get("Content-Range", ""))
    if total is None:
        raise RemoteError(f"{place.host} does not say how large {place} is (Content-Range)")
    return int(total[1]), headers.get("ETag", "")


async def _http(filesystem: Any, address: str, offset: int, end: int | None) -> tuple[bytes, Any]:
    """One HTTP request: the data and the headers. fsspec's own reads a whole file before it looks at the status."""
    headers = {"Accept-Encoding": "identity"}
    if end is not None:
        headers["Range"] = f"bytes={offset}-{end - 1}"
    session = await filesystem.set_session()
    async with session.get(filesystem.encode_url(address), headers=headers) as answer:
        if end is not None and answer.status == 200:
            raise _WholeFile
        if answer.status not in (200, 206):
            raise _Status(answer.status)
        return await answer.read(), answer.headers


def _meaning(error: Exception, place: Remote) -> Exception | None:
    """What an error of a request means for a reader. None: the file ends before the range."""
    import asyncio  # here, as tqdm

    status, names = _status_of(error), {cls.__name__ for cls in type(error).__mro__}
    if isinstance(error, RemoteError):
        return error
    if isinstance(error, _WholeFile):
        return RemoteError(f"{place.host} does not answer range requests, {place} can't be read by samples")
    if status == 416:
        return None
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return FileNotFoundError(errno.ENOENT, "no such file")
    if isinstance(error, PermissionError) or status in (401, 403):
        return PermissionError(errno.EACCES, f"not allowed{f', HTTP {status}' if status else ''}")
    told = re.sub(r"[?]\S*", "", " ".join(str(error).split())) or type(error).__name__
    if isinstance(error, OSError) and (error.errno or 0) > 0:
        told = os.strerror(error.errno or 0)
    if status is not None:
        passing = status in (408, 425, 429) or status >= 500
        return _Away(f"HTTP {status}") if passing else OSError(f"HTTP {status}")
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return _Away("no answer in time")
    if names & _AWAY and not names & _NOT_AWAY:
        return _Away(told)
    return OSError(f"{type(error).__name__}: {told}")


def _status_of(error: BaseException | None) -> int | None:
    """The HTTP status in an error of ours, aiohttp, botocore or gcsfs, or in its cause."""
    while error is not None:
        response = getattr(error, "response", None)
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        for value in (found, getattr(error, "status", None), getattr(error, "code", None)):
            if isinstance(value, int | str) and str(value).isdigit() and 100 <= int(value) < 600:
                return int(value)
        error = error.__cause__
    return None
