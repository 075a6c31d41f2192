"""The live page: frames arrive as pictures, a typed prompt is given on, strangers are refused."""

import http.client
import io
import socket
import threading
import time

import numpy as np
import pytest
from PIL import Image

from rf_train.generation.play import LONGEST_PROMPT, PATIENCE, Player


@pytest.fixture
def player():
    player = Player(fps=50, prompt="a cross")
    yield player
    player.close()


def ask(player, method: str, path: str, body: str | None = None, **headers) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", int(player.address.rpartition(":")[2]), timeout=10)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_frames_arrive_as_pictures(player):
    connection = http.client.HTTPConnection("127.0.0.1", int(player.address.rpartition(":")[2]), timeout=10)
    connection.request("GET", "/frames")
    answer = connection.getresponse()
    assert answer.headers["Content-Type"] == "multipart/x-mixed-replace; boundary=frame"
    player.add(np.full((40, 16, 24, 3), 200, np.uint8))
    for _ in range(5):
        assert answer.readline() == b"--frame\r\n" and answer.readline() == b"Content-Type: image/jpeg\r\n"
        length = int(answer.readline().split(b":")[1])
        answer.readline()
        picture = np.asarray(Image.open(io.BytesIO(answer.read(length))))
        assert picture.shape == (16, 24, 3) and abs(int(picture.mean()) - 200) <= 2
        answer.readline()
    status, page = ask(player, "GET", "/")
    assert status == 200 and 'src="/frames"' in page


def test_a_typed_prompt_is_given_on_once_and_the_last_one_counts(player):
    assert player.next_prompt() is None
    for prompt in ("a disc", " a blue disc\n"):
        assert ask(player, "POST", "/prompt", prompt, Origin=player.address)[0] == 200
    assert "prompt: a blue disc" in ask(player, "GET", "/prompt")[1]
    assert player.next_prompt() == "a blue disc" and player.next_prompt() is None


def test_a_port_that_is_taken_is_named(player):
    port = int(player.address.rpartition(":")[2])
    with pytest.raises(ValueError, match=f"--port {port}: Address already in use; choose another one"):
        Player(16, port=port)


def test_strangers_are_refused(player):
    """Another site's page that posts here; a name that was made to lead here; a prompt without end."""
    assert ask(player, "POST", "/prompt", "x", Origin="https://example.org")[0] == 403
    assert ask(player, "POST", "/prompt", "x", Host="example.org")[0] == 403
    assert ask(player, "GET", "/", Host="example.org:80")[0] == 403
    assert ask(player, "POST", "/prompt", "x" * (LONGEST_PROMPT + 1))[0] == 413
    assert ask(player, "GET", "/../secret")[0] == 404
    assert player.next_prompt() is None


def talk(player, sent: bytes, ends: bool = False) -> bytes:
    """All that the page answers to these bytes; `ends`: nothing more will be sent."""
    with socket.create_connection(("127.0.0.1", int(player.address.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(sent)
        if ends:
            connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_a_prompt_that_is_cut_off_is_none(player):
    host = player.address.removeprefix("http://").encode()
    head = b"POST /prompt HTTP/1.1\r\nHost: " + host + b"\r\nContent-Length: 30\r\n\r\n"
    assert b"400" in talk(player, head + b"a red", ends=True).splitlines()[0]
    assert player.next_prompt() is None and player.prompt == "a cross"


def test_who_says_nothing_or_takes_nothing_is_let_go(player, monkeypatch, capsys):
    """Silently: no thread, and no message, is left of a viewer that has gone."""
    handler = player._server.RequestHandlerClass
    assert handler.timeout == PATIENCE
    monkeypatch.setattr(handler, "timeout", 0.2)
    before = threading.active_count()
    assert talk(player, b"GET / HT") == b""
    host = player.address.removeprefix("http://").encode()
    port = int(player.address.rpartition(":")[2])
    stuck = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
    for viewer in stuck:
        viewer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        viewer.sendall(b"GET /frames HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
    stuck.pop().close()
    noise = np.random.default_rng(0).integers(0, 256, (20, 512, 512, 3), dtype=np.uint8)
    end = time.monotonic() + 20
    while time.monotonic() < end and (player.shown < 20 or threading.active_count() > before):
        player.add(noise)
    assert threading.active_count() <= before
    stuck[0].close()
    assert capsys.readouterr().err == ""


def test_other_sites_may_not_show_the_page_or_its_pictures(player):
    host = player.address.removeprefix("http://").encode()
    answer = talk(player, b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n").lower()
    assert b"cross-origin-resource-policy: same-origin" in answer and b"x-frame-options: deny" in answer
