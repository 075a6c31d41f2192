"""Addresses, and reading from a server that is away, slow, wrong or without ranges."""

import errno
import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from data_prep import places
from data_prep.card import NotADataset, read_card
from data_prep.codecs import dataset_codec
from data_prep.default_codec import DefaultCodec
from data_prep.index import SampleIndex
from data_prep.places import RemoteError, place_of, read_range, read_whole
from data_prep.shards import SampleError, read_sample
from data_prep.text import HashText, dataset_text
from data_prep.verify import problems
from tests.conftest import change_card, write_dataset
from tests.distributed import free_port
from tests.servers import needs_aiohttp, served

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def server(tmp_path):
    write_dataset(tmp_path / "data" / "d", 12)
    with served(tmp_path / "data") as running:
        yield running


@pytest.mark.parametrize(
    "address, message",
    [
        ("pipe:curl http://h/x", "an address that runs a command is refused"),
        ("ftp://h/x", "ftp:// is not read; give a folder, or https://"),
        ("file:///x", "file:// is not read"),
        ("simplecache::s3://b/x", "simplecache::s3:// is not read"),
        ("https://me:secret@h/x", "https://h: the address holds a name or password; put them into the environment"),
        ("s3://key:secret@b/x", "s3://b: the address holds a name or password"),
        ("https://h/x?sig=secret", "https://h/x: an address ends before the ? or #"),
        ("https:///x", "the address names no host or bucket"),
    ],
)
def test_addresses_that_are_not_read_are_refused_in_one_line_without_secrets(address, message):
    with pytest.raises(ValueError) as caught:
        place_of(address)
    assert message in str(caught.value) and "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_local_addresses_stay_paths_and_remote_ones_keep_their_parts():
    assert place_of("data/x") == Path("data/x") and place_of(Path("x:y")) == Path("x:y")
    remote = place_of("HTTPS://host/a/b/", 5) / "c d"
    assert str(remote) == "https://host/a/b/c%20d" and remote.host == "host" and remote.patience == 5
    assert str(place_of("s3://bucket/a") / "c d") == "s3://bucket/a/c d" and place_of("s3://b/a").host == "s3://b"


@pytest.mark.parametrize("scheme, package", [("https", "aiohttp"), ("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_part_of_fsspec_is_named_with_the_command_that_installs_it(scheme, package, monkeypatch):
    monkeypatch.setattr(places.importlib.util, "find_spec", lambda name: None)
    places._filesystem.cache_clear()
    with pytest.raises(ValueError, match=f"^{scheme}:// addresses need {package}: pip install {package}$"):
        read_whole(place_of(f"{scheme}://h/x"))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_network_file_system_is_tried_three_times(tmp_path, monkeypatch, number):
    folder = write_dataset(tmp_path / "d", 12)
    file, entry = SampleIndex(folder, read_card(folder))[3]
    tries, failing = [], [number, number]

    def broken(*arguments, **options):
        tries.append(arguments)
        if failing:
            raise OSError(failing.pop(), "broken")
        return open(*arguments, **options)

    monkeypatch.setattr(places, "open", broken, raising=False)
    monkeypatch.setattr(places, "LOCAL_PAUSE", 0)
    assert read_sample(folder / file, entry).meta["key"] == "000003_0000" and len(tries) == 3
    failing += [number] * 3
    with pytest.raises(SampleError, match=r"unreadable \(broken\)"):
        read_sample(folder / file, entry)
    assert len(tries) == 6
    failing[:] = [errno.EACCES]
    with pytest.raises(SampleError, match="unreadable"):
        read_sample(folder / file, entry)
    assert len(tries) == 7


@needs_aiohttp
def test_a_remote_dataset_is_the_local_one_and_its_index_is_copied_once(server, tmp_path):
    local, remote = tmp_path / "data" / "d", f"{server.address}/d"
    card = read_card(remote)
    index = SampleIndex(remote, card)
    assert card == read_card(local) and (index.rows == SampleIndex(local, card).rows).all()
    file, entry = index[7]
    one, other = (read_sample(place_of(folder) / file, entry) for folder in (str(local), remote))
    assert (one.latent == other.latent).all() and (one.text == other.text).all() and one.meta == other.meta
    assert (f"/d/{file}", f"bytes={entry.offset}-{entry.offset + entry.bytes - 1}") in server.asked
    SampleIndex(remote, card)
    assert sum(path == "/d/samples.npy" for path, _ in server.asked) == 1
    copy = next((tmp_path / "cache").rglob("samples.npy"))
    rows = index.rows.copy()
    copy.write_bytes(copy.read_bytes()[:-1] + b"x")
    assert (SampleIndex(remote, card).rows == rows).all()  # a damaged copy is made again
    assert list(problems(remote)) == []


@needs_aiohttp
def test_a_dataset_that_has_changed_gets_another_copy_of_its_index(server, tmp_path):
    remote, folder = f"{server.address}/d", tmp_path / "data" / "d"
    first = SampleIndex(remote, read_card(remote)).rows["offset"].copy()
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    write_dataset(folder, 7, seed=1)
    assert len(SampleIndex(remote, read_card(remote)).rows) == 7 != len(first)
    assert len(list((tmp_path / "cache").rglob("samples.npy"))) == 2  # who still reads the first one is not disturbed
    (folder / "samples.npy").write_bytes((folder / "samples.npy").read_bytes()[:-1])
    change_card(folder, lambda card: card["index"].update(sha256="0" * 64))
    with pytest.raises(ValueError, match=r"http://.*/d/samples.npy: not the index that the card names"):
        SampleIndex(remote, read_card(remote))


@needs_aiohttp
def test_missing_forbidden_and_cut_files_are_told_apart_at_once(server, tmp_path):
    remote = place_of(f"{server.address}/d")
    with pytest.raises(NotADataset, match=r"/none: not a dataset, it has no dataset\.json"):
        read_card(f"{server.address}/none")
    file, entry = SampleIndex(remote, read_card(remote))[1]
    with pytest.raises(SampleError, match=r"/d/none\.tar: 000001_0000: missing"):
        read_sample(remote / "none.tar", entry)
    server.fault = lambda path: 403 if path.endswith(".tar") else None
    with pytest.raises(SampleError, match=r"unreadable \(not allowed, HTTP 403\)"):
        read_sample(remote / file, entry)
    server.fault = lambda path: None
    (tmp_path / "data" / "d" / file).write_bytes(b"")
    with pytest.raises(SampleError, match=r"cut short \(0 of"):
        read_sample(remote / file, entry)
    server.fault = lambda path: 403
    with pytest.raises(ValueError, match=r"dataset\.json: not readable \(not allowed, HTTP 403\)"):
        read_card(remote)


@needs_aiohttp
def test_a_wrong_answer_is_asked_for_once_more_before_it_counts_as_damage(server):
    remote = place_of(f"{server.address}/d")
    file, entry = SampleIndex(remote, read_card(remote))[1]
    wrong = [1]
    server.change = lambda path, data: data[:-1] + b"x" if wrong and wrong.pop() else data
    assert read_sample(remote / file, entry).meta["key"] == entry.key
    server.change = lambda path, data: data[:-1] + b"x"
    before = len(server.asked)
    with pytest.raises(SampleError, match="damaged"):
        read_sample(remote / file, entry)
    assert len(server.asked) == before + 2
    server.change = lambda path, data: data[:100]
    with pytest.raises(SampleError, match="cut short"):
        read_sample(remote / file, entry)


@needs_aiohttp
def test_a_server_without_ranges_is_refused_before_it_sends_the_file(server, tmp_path):
    remote = place_of(f"{server.address}/d")
    big = tmp_path / "data" / "big.tar"
    with open(big, "wb") as file:
        file.truncate(1 << 28)
    server.ranges = False
    begin = time.monotonic()
    with pytest.raises(RemoteError, match=r"does not answer range requests, http://.*/big\.tar can't be read"):
        read_range(place_of(f"{server.address}/big.tar"), 100, 10)
    with pytest.raises(RemoteError, match="does not answer range requests"):
        SampleIndex(remote, read_card(remote))
    assert time.monotonic() - begin < 5


@pytest.mark.slow
@needs_aiohttp
def test_reading_waits_for_a_server_that_is_away_and_says_so_once(server, capsys):
    remote = place_of(f"{server.address}/d")
    file, entry = SampleIndex(remote, read_card(remote))[1]
    expected = read_sample(remote / file, entry).latent
    server.stop()
    found = []
    readers = [threading.Thread(target=lambda: found.append(read_sample(remote / file, entry))) for _ in range(4)]
    for reader in readers:
        reader.start()
    time.sleep(1.5)
    assert not found
    server.start()
    for reader in readers:
        reader.join(20)
    assert len(found) == 4 and all((sample.latent == expected).all() for sample in found)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2, lines
    assert lines[0].startswith(f"127.0.0.1:{server.port}: not reachable (")
    assert lines[0].endswith("); trying again") and lines[1].startswith(f"127.0.0.1:{server.port}: back after ")


@needs_aiohttp
@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_in_trouble_is_waited_for_and_then_named(server, capsys, monkeypatch, status):
    monkeypatch.setattr(places.time, "sleep", lambda seconds: None)
    failing = [status] * 3
    server.fault = lambda path: failing.pop() if failing else None
    assert read_card(f"{server.address}/d")["counts"]["samples"] == 12
    assert f"not reachable (HTTP {status}); trying again" in capsys.readouterr().err
    server.fault = lambda path: status
    with pytest.raises(RemoteError, match=rf"^http://.*/d/dataset\.json: not reachable for 0 s \(HTTP {status}\)$"):
        read_card(place_of(f"{server.address}/d", 0))


@needs_aiohttp
def test_a_server_that_hangs_is_noticed(server, monkeypatch):
    monkeypatch.setattr(places, "TIMEOUT", 0.3)
    places._filesystem.cache_clear()
    slow = [1]
    server.fault = lambda path: time.sleep(2) if slow and slow.pop() else None
    begin = time.monotonic()
    assert read_card(f"{server.address}/d")
    assert time.monotonic() - begin < 2  # the second try came before the first answer
    places._filesystem.cache_clear()


@needs_aiohttp
def test_the_pauses_double_up_to_half_a_minute_within_the_patience(monkeypatch):
    clock, pauses = [0.0], []

    def pause(seconds):
        pauses.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(places.time, "sleep", pause)
    monkeypatch.setattr(places.time, "monotonic", lambda: clock[0])

    def refuse(*arguments):
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(places, "_request", refuse)
    with pytest.raises(RemoteError, match=r"http://h/x: not reachable for 100 s \(refused\)"):
        read_whole(place_of("http://h/x", 100))
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 9]


@needs_aiohttp
def test_a_forked_process_reads_with_connections_of_its_own(server):
    remote = f"{server.address}/d"
    card = read_card(remote)
    child = os.fork()
    if child == 0:
        os._exit(0 if read_card(remote) == card else 1)
    end = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        time.sleep(0.05)
    if ended == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended[1] == 0 and ended[0] == child


@pytest.fixture
def s3_server(tmp_path, monkeypatch):
    """An S3 server on this machine with a dataset at s3://bucket/d, and what a client finds in its environment."""
    for package in ("moto", "flask", "s3fs"):
        if importlib.util.find_spec(package) is None:
            pytest.skip("needs an S3 server and client: pip install 'moto[server]' s3fs")
    import boto3

    port = free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    places._filesystem.cache_clear()
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < end:
            time.sleep(0.1)
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for path in write_dataset(tmp_path / "d", 12).iterdir():
            client.upload_file(str(path), "bucket", f"d/{path.name}")
        yield server
    finally:
        server.kill()
        server.wait()
        places._filesystem.cache_clear()


@pytest.mark.slow
def test_s3_gives_what_the_disk_gives_and_its_errors_have_reasons(s3_server, tmp_path, capsys):
    local, remote = tmp_path / "d", place_of("s3://bucket/d", 3)
    assert list(problems(remote)) == []
    card = read_card(remote)
    index = SampleIndex(remote, card)
    for number in range(12):
        file, entry = index[number]
        one, other = read_sample(local / file, entry), read_sample(remote / file, entry)
        assert (one.latent == other.latent).all() and (one.text == other.text).all() and one.meta == other.meta
    with pytest.raises(SampleError, match=r"^s3://bucket/d/none\.tar: 000011_0000: missing"):
        read_sample(remote / "none.tar", entry)
    with pytest.raises(SampleError, match="cut short"):
        read_sample(remote / file, entry._replace(offset=10**9))
    for address in ("s3://bucket/none", "s3://none/d"):
        with pytest.raises(NotADataset):
            read_card(address)
    s3_server.kill()
    s3_server.wait()
    with pytest.raises(RemoteError, match=rf"^s3://bucket/d/{file}: not reachable for 3 s \(.*connect"):
        read_sample(remote / file, entry)
    assert capsys.readouterr().err.count("s3://bucket: not reachable") == 1


@needs_aiohttp
def test_the_codec_and_the_text_encoder_of_a_remote_dataset_are_found(server, tmp_path):
    folder, remote = tmp_path / "data" / "d", place_of(f"{server.address}/d")
    codec = DefaultCodec({"latent_mean": torch.zeros(16), "latent_std": torch.ones(16)}, {"version": 1})
    change_card(folder, lambda card: (card["codec"].update(hash=codec.hash), card["text"].update(hash=HashText.hash)))
    with pytest.raises(ValueError, match=r"^http://.*/d/codec\.safetensors: no such file, expected a default codec$"):
        dataset_codec(remote)
    codec.save(folder / "codec.safetensors")
    assert [dataset_codec(remote).hash for _ in range(2)] == [codec.hash] * 2
    assert [path for path, _ in server.asked].count("/d/codec.safetensors") == 2  # once before it was there
    assert dataset_text(remote).hash == HashText.hash
    change_card(folder, lambda card: card["codec"].update(hash="another"))
    with pytest.raises(ValueError, match=r"^http://.*/d/codec\.safetensors: not the codec that the card names"):
        dataset_codec(remote)
