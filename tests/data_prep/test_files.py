"""Temporary files: no two have the same name, and only those whose maker is gone are taken away."""

import os
import subprocess
import sys
import time

import pytest

from data_prep import files
from data_prep.files import is_abandoned, temporary_beside


@pytest.fixture
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def made_by(process, path, monkeypatch, machine=None):
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: process)
        if machine:
            patch.setattr(files, "_machine", lambda: machine)
        temporary = temporary_beside(path)
    temporary.write_bytes(b"half")
    return temporary


def test_no_two_names_are_the_same(tmp_path):
    path = tmp_path / "a.b.tar"
    names = {temporary_beside(path) for _ in range(100)}
    assert len(names) == 100  # threads, and containers with equal names and process numbers, too
    assert all(name.parent == tmp_path and name.name.startswith("a.b.tar.") and name.suffix == ".tmp" for name in names)


def test_a_living_process_of_this_machine_has_not_abandoned_its_file(tmp_path, dead, monkeypatch):
    assert not is_abandoned(made_by(os.getppid(), tmp_path / "a.tar", monkeypatch))
    assert is_abandoned(made_by(dead, tmp_path / "a.tar", monkeypatch))
    assert is_abandoned(made_by(os.getpid(), tmp_path / "a.tar", monkeypatch))  # of an earlier try of this process


def test_elsewhere_only_an_hour_of_silence_tells(tmp_path, dead, monkeypatch):
    """A container may have this host's name; its process numbers mean nothing here."""
    for temporary in (
        made_by(dead, tmp_path / "a.tar", monkeypatch, "0123456789ab"),
        tmp_path / "a.tar.host.77.tmp",  # of an earlier version
        tmp_path / "a.tmp",
    ):
        temporary.write_bytes(b"half")
        assert not is_abandoned(temporary)
        os.utime(temporary, (time.time() - 4000,) * 2)
        assert is_abandoned(temporary)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="process numbers of containers are Linux's")
def test_the_machine_is_another_one_in_a_container_of_the_same_name(monkeypatch):
    here = files._machine()
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]")
    files._machine.cache_clear()
    try:
        assert files._machine() != here
    finally:
        files._machine.cache_clear()
