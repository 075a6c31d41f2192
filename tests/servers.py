"""Servers that tests read datasets from, on this machine: a plain HTTP server with ranges, and its faults."""

import contextlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest

needs_aiohttp = pytest.mark.skipif(find_spec("aiohttp") is None, reason="needs aiohttp: pip install aiohttp")


class FileServer:
    """Serves a folder. `fault` decides about a request: it returns a status to answer with, or None to answer well."""

    def __init__(self, folder: Path, port: int = 0):
        self.folder, self.port = folder, port
        self.asked: list[tuple[str, str]] = []  # path and Range of every request
        self.fault = lambda path: None
        self.change = lambda path, data: data  # what is sent instead of the right bytes
        self.ranges = True
        self.most_at_once = self.now = 0
        self.lock = threading.Lock()
        self.start()

    def start(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with outer.lock:
                    outer.now += 1
                    outer.most_at_once = max(outer.most_at_once, outer.now)
                try:
                    with contextlib.suppress(ConnectionError):
                        outer.answer(self)
                finally:
                    with outer.lock:
                        outer.now -= 1

            def log_message(self, *arguments) -> None:
                pass

        self.server = _Server(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Ends the server and its connections, as a killed process does."""
        self.server.shutdown()
        self.server.server_close()
        self.server.close_connections()
        self.thread.join()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range", "")
        self.asked.append((request.path, wanted))
        status, data = self.fault(request.path), b""
        path = self.folder / request.path.lstrip("/")
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted) if self.ranges else None
        if status is None and not path.is_file():
            status = 404
        if status is None and found and int(found[1]) >= path.stat().st_size:
            status = 416
        if status is None:
            size = path.stat().st_size
            with open(path, "rb") as file:
                file.seek(int(found[1]) if found else 0)
                data = file.read(int(found[2]) - int(found[1]) + 1) if found else file.read()
            data = self.change(request.path, data)
        request.send_response(status or (206 if found else 200))
        request.send_header("Content-Length", str(len(data)))
        if found and status is None:
            request.send_header("Content-Range", f"bytes {found[1]}-{int(found[1]) + len(data) - 1}/{size}")
        request.end_headers()
        request.wfile.write(data)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, *arguments):
        self.connections: set = set()
        super().__init__(*arguments)

    def process_request(self, request, client_address) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def handle_error(self, request, client_address) -> None:
        pass

    def close_connections(self) -> None:
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(2)  # its thread closes it: another connection may have its number at once


@contextlib.contextmanager
def served(folder: Path) -> Iterator[FileServer]:
    server = FileServer(folder)
    try:
        yield server
    finally:
        server.stop()
