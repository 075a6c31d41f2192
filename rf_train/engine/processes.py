"""Processes of this machine, and what identifies one among all machines."""

import os
import socket
from functools import cache
from pathlib import Path


@cache
def machine() -> dict[str, str | int]:
    """Where process numbers mean the same: the host, since the same boot, and in the same container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"host": socket.gethostname(), "boot": boot, "processes": os.stat("/proc/self/ns/pid").st_ino}


def started(pid: int) -> int | None:
    """When a process of this machine started, in ticks since the boot. None when it is gone, or a zombie."""
    fields = _stat(pid)
    return None if not fields or fields[0] in "ZX" else int(fields[19])


def parent(pid: int) -> int:
    """The parent of a process of this machine; 0 when it is gone."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def command(pid: int) -> list[str]:
    """The words of a process's command; [] when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on. The name before them may hold spaces and brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
