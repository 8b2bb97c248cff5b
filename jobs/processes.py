"""Processes of this machine, told apart from later ones with the same number."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path

import psutil

# Of processes that train: waiting threads sleep, and the C library asks for huge pages (Linux), which spares a child most of its page faults.
TRAINING = {"OMP_WAIT_POLICY": "passive", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def process_start(pid: int) -> int | None:
    """When the kernel started this process, in clock ticks since boot; None when there is no such process or it is a zombie."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.joinpath("self").exists():
        try:
            fields = stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in "ZX" else int(fields[19])
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else int(process.create_time() * 100)
    except psutil.Error:
        return None


def is_alive(pid: int | None, started: int | None) -> bool:
    """Whether exactly this process still runs."""
    return pid is not None and started is not None and process_start(pid) == started


def this_process() -> str:
    """A name that no other process ever has: host, number, start."""
    return f"{socket.gethostname()[:50]}/{os.getpid()}/{process_start(os.getpid())}"


def is_gone(owner: str) -> bool:
    """Whether the process of this name is known to have ended. False when it lives, and when it is on another host."""
    host, _, rest = owner.partition("/")
    pid, _, started = rest.partition("/")
    if host != socket.gethostname()[:50] or not (pid.isdigit() and started.isdigit()):
        return False
    return not is_alive(int(pid), int(started))


def signal_group(pid: int, number: signal.Signals) -> None:
    """Send a signal to a child and everything it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def lock_holder(path: Path) -> int | None:
    """The process that holds the exclusive flock of this file, as the kernel lists it."""
    try:
        status = path.stat()
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return None
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in lines:
        fields = line.split()
        if "FLOCK" in fields and "->" not in fields and fields[-3] == place:
            return int(fields[-4]) if int(fields[-4]) > 0 else None
    return None


def num_memory_kills() -> int:
    """How many processes the kernel has ended on this machine because memory ran out."""
    total = 0
    for path, key in ((Path("/proc/vmstat"), "oom_kill"), (Path("/sys/fs/cgroup/memory.events"), "oom_kill")):
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_text(encoding="ascii").splitlines():
                name, _, count = line.partition(" ")
                if name == key:
                    total += int(count)
    return total
