"""Where numbers were measured: what `malloc-bench env` prints and a run's manifest keeps."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "numpy", "polars", "pyarrow")
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS", "OMP_PROC_BIND", "KMP_AFFINITY",
    "GOMP_CPU_AFFINITY", "LD_PRELOAD", "MALLOC_ARENA_MAX", "ATEN_CPU_CAPABILITY", "CUDA_VISIBLE_DEVICES",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
)  # fmt: skip


def load() -> float:
    """Load average of the last minute: runnable processes, of all users; NaN where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """Versions, hardware and settings, ready for JSON; what does not apply is None. Memory in bytes.

    git_commit and git_dirty are None where the package does not run from a checkout of its own.
    """
    commit, dirty = _git(Path(__file__).resolve().parents[2])
    model, flags = _cpu()
    return {
        "python": platform.python_version(),
        "malloc_bench": _version("malloc-bench"),
        **{name: _version(name) for name in _PACKAGES},
        "git_commit": commit,
        "git_dirty": dirty,
        "os": platform.platform(),
        "hostname": socket.gethostname(),
        "cpu": model,
        "cpu_flags": flags,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "cores_usable": cores(),
        "memory_bytes": _memory(),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "load": load(),
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpu_count": torch.cuda.device_count(),
        "gpu_driver": _driver() if torch.cuda.is_available() else None,
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _run(*command: str) -> str | None:
    """What a command prints; None where it is not there, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.strip()


def _git(root: Path) -> tuple[str | None, bool | None]:
    """Commit of the checkout at `root`, and whether tracked files differ from it."""
    top = _run("git", "-C", str(root), "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():  # a virtual environment inside somebody else's checkout
        return None, None
    # without locks: a process that is killed would leave its own in the checkout, where nothing can be committed then
    changes = _run("git", "--no-optional-locks", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return _run("git", "-C", str(root), "rev-parse", "HEAD"), None if changes is None else bool(changes)


def _cpu() -> tuple[str | None, list[str]]:
    """Model, and those of the interesting instruction sets that it has (Linux on x86)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine() or None, []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines) if value}
    model = facts.get("model name") or platform.processor() or platform.machine() or None
    return model, [flag for flag in _FLAGS if flag in facts.get("flags", "").split()]


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _driver() -> str | None:
    versions = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return versions.splitlines()[0] if versions else None
