"""The machine that a run would use: its device, memory and number formats."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import psutil
import torch

from engine.core.facts import MachineFacts


def this_machine() -> MachineFacts:
    """The device a run would use. Asks the driver, not CUDA, so that this process may still fork."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if torch.cuda.is_available():
        name, memory, capability = _gpu()
        return MachineFacts(
            device="cuda",
            device_name=name,
            memory_bytes=memory,
            num_threads=torch.get_num_threads(),
            has_bf16=capability >= 8,
            compiler_lacks=compiler_lacks("cuda"),
        )
    flags = _cpu_line("flags")
    return MachineFacts(device="cpu", device_name=_cpu_line("model name") or "CPU", memory_bytes=_memory(), num_threads=torch.get_num_threads(),
                        has_bf16="avx512_bf16" in flags or "amx_bf16" in flags, compiler_lacks=compiler_lacks("cpu"))  # fmt: skip


def compiler_lacks(device: str) -> str:
    """What torch.compile misses on this machine to make code for a device, in words; "" when it finds everything. It starts no compiler."""
    if device == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "the package triton"
        names = (os.environ["CC"],) if "CC" in os.environ else ("gcc", "clang")
        found = any(shutil.which(name) for name in names)
    else:
        names = (os.environ.get("CXX", "g++"),)
        found = shutil.which(names[0]) is not None
    if not found:
        return f"a compiler ({' or '.join(names)})"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.is_file() else "Python's header files (Python.h)"


def _gpu() -> tuple[str, int, int]:
    """Name, memory and major compute capability of the first visible GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            handle = (
                pynvml.nvmlDeviceGetHandleByIndex(int(visible))
                if visible.isdigit()
                else pynvml.nvmlDeviceGetHandleByUUID(visible)
            )
            name = pynvml.nvmlDeviceGetName(handle)
            memory = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
            return str(name), memory, int(pynvml.nvmlDeviceGetCudaComputeCapability(handle)[0])
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # a container without the management library: ask CUDA itself
        seen = torch.cuda.get_device_properties(0)
        return str(seen.name), int(seen.total_memory), int(seen.major)


def free_memory() -> int:
    """Main memory, in bytes, that can still be had: the machine's, or less where a control group says so."""
    free, limit, used = int(psutil.virtual_memory().available), _group("memory.max"), _group("memory.current")
    return free if limit is None or used is None else max(0, min(free, limit - used))


def _memory() -> int:
    """Memory that this process may use: the machine's, or less where a control group says so."""
    total, limit = int(psutil.virtual_memory().total), _group("memory.max")
    return total if limit is None else min(total, limit)


def _group(name: str) -> int | None:
    """A number of this process's control group; None where there is no group, or no limit."""
    path = Path("/sys/fs/cgroup") / name
    text = path.read_text(encoding="ascii").strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None


@functools.cache
def _cpu_line(key: str) -> str:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        return next((line.partition(":")[2].strip() for line in file if line.partition(":")[0].strip() == key), "")
