"""A page on this machine that shows a video while it is made, with a box to type the next prompt.

The frames are JPEGs in one endless HTTP response (multipart/x-mixed-replace), which every browser shows as a picture
that moves. Only this machine can open the page, and only the page itself can send a prompt.
"""

import io
import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

LONGEST_PROMPT = 4000  # bytes
PATIENCE = 10.0  # seconds that a viewer may take to ask, or to take a frame; then the connection is closed

_PAGE = """<!doctype html>
<meta charset="utf-8"><title>rf_train</title>
<style>
 body { font: 16px sans-serif; max-width: 54em; margin: 2em auto; padding: 0 1em }
 img { width: 100%; max-width: 832px; image-rendering: pixelated; background: #ddd }
 form { display: flex; gap: .5em; margin: 1em 0; max-width: 832px } input { flex: 1; font: inherit; padding: .4em }
</style>
<img src="/frames" alt="the video">
<form><input name="prompt" autofocus placeholder="the next prompt" maxlength="1000"><button>Show it</button></form>
<p id="said"></p>
<script>
const said = document.getElementById("said")
async function status(options) {
  const answer = await fetch("/prompt", options)
  said.textContent = await answer.text()
}
document.forms[0].onsubmit = event => {
  event.preventDefault()
  status({method: "POST", body: document.forms[0].prompt.value})
}
const look = () => status().catch(() => { said.textContent = "the generator has stopped" })
look()
setInterval(look, 1000)
</script>
"""


class Player:
    """Shows frames at their rate to everybody who looks, and keeps the prompt that was typed last."""

    def __init__(self, fps: float, prompt: str = "", port: int = 0):
        """Port 0: any that is free. Raises ValueError when the port is taken, or needs rights."""
        self.fps, self.prompt = fps, prompt
        self.shown = 0  # frames so far
        self._jpeg = b""
        self._changed = threading.Condition()
        self._typed: queue.SimpleQueue[str] = queue.SimpleQueue()
        # One chunk waits while another one is shown: a prompt is seen soon, and the picture doesn't stop in between.
        self._chunks: queue.Queue[np.ndarray] = queue.Queue(maxsize=1)
        try:
            self._server = _Server(("127.0.0.1", port), _handler_of(self))
        except OSError as error:
            raise ValueError(f"--port {port}: {error.strerror}; choose another one, or 0 for any") from None
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        for action in (self._server.serve_forever, self._show):
            threading.Thread(target=action, daemon=True).start()

    def add(self, frames: np.ndarray) -> None:
        """Shows a chunk, uint8 [f, H, W, 3], after those before it. Waits while another one is waiting."""
        self._chunks.put(frames)

    def next_prompt(self) -> str | None:
        """What was typed since the last call; None for nothing."""
        typed = None
        while not self._typed.empty():
            typed = self._typed.get()
        return typed

    def type(self, prompt: str) -> None:
        """As if somebody had typed it."""
        self.prompt = prompt
        self._typed.put(prompt)

    def jpegs(self) -> Iterator[bytes]:
        """The frames from now on, as JPEGs. One that comes while the last one is being sent may be left out."""
        seen = 0
        while True:
            with self._changed:
                while self.shown == seen:
                    self._changed.wait()
                seen, jpeg = self.shown, self._jpeg
            yield jpeg

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _show(self) -> None:
        due = time.monotonic()
        while True:
            for frame in self._chunks.get():
                due = max(due + 1 / self.fps, time.monotonic())
                file = io.BytesIO()
                Image.fromarray(frame).save(file, "JPEG", quality=90)
                time.sleep(max(0.0, due - time.monotonic()))
                with self._changed:
                    self._jpeg, self.shown = file.getvalue(), self.shown + 1
                    self._changed.notify_all()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A viewer that leaves in the middle, or says nothing, is no error."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def _handler_of(player: Player) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"
        timeout = PATIENCE

        def do_GET(self) -> None:
            if not self._is_ours():
                return
            if self.path == "/":
                self._answer(200, "text/html; charset=utf-8", _PAGE)
            elif self.path == "/prompt":
                self._answer(200, "text/plain; charset=utf-8", self._status())
            elif self.path == "/frames":
                self._send_frames()
            else:
                self._answer(404, "text/plain", "no such page")

        def do_POST(self) -> None:
            """Takes a prompt, from the page itself only: another site's page names itself in `Origin`."""
            if not self._is_ours():
                return
            length = self.headers.get("Content-Length", "")
            if self.path != "/prompt" or self.headers.get("Origin", self._own) != self._own:
                self._answer(403, "text/plain", "prompts come from the page itself")
            elif not length.isdigit() or int(length) > LONGEST_PROMPT:
                self._answer(413, "text/plain", f"a prompt has at most {LONGEST_PROMPT} bytes")
            elif len(body := self.rfile.read(int(length))) < int(length):
                self._answer(400, "text/plain", "the prompt is not whole")
            else:
                player.type(body.decode(errors="replace").strip())
                self._answer(200, "text/plain; charset=utf-8", self._status())

        @property
        def _own(self) -> str:
            return f"http://{self.headers.get('Host', '')}"

        def _is_ours(self) -> bool:
            """Whether the browser was sent to this machine by name: a site that resolves to it is refused."""
            host = self.headers.get("Host", "").rpartition(":")[0]
            if host in ("127.0.0.1", "localhost"):
                return True
            self._answer(403, "text/plain", "open this page as http://127.0.0.1")
            return False

        def _status(self) -> str:
            return f"{player.shown / player.fps:.1f} s shown; prompt: {player.prompt or '(none)'}"

        def _answer(self, code: int, kind: str, text: str) -> None:
            body = text.encode()
            self._begin(code, kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _begin(self, code: int, kind: str) -> None:
            """The first headers. Other sites' pages may neither frame this one nor show its pictures."""
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Frame-Options", "DENY")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Cross-Origin-Resource-Policy", "same-origin")

        def _send_frames(self) -> None:
            self._begin(200, "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            with suppress(ConnectionError, TimeoutError):  # the viewer has left, or takes no more
                for jpeg in player.jpegs():
                    head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                    self.wfile.write(head.encode() + jpeg + b"\r\n")

        def log_message(self, format: str, *arguments: Any) -> None:
            """Requests are not printed."""

    return Handler
