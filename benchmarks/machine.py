"""What a result must say about where it comes from."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import psutil
import torch

from fastlstm.problem import cpu_capability

ROOT = Path(__file__).resolve().parents[1]


def find_device(wanted: str | None = None) -> torch.device:
    """The device asked for, otherwise the GPU, otherwise the CPU."""
    return torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))


def machine(device: torch.device) -> dict[str, str | int | float | None]:
    """CPU, memory and, when it is what runs, the GPU with its driver-visible limits."""
    found: dict[str, str | int | float | None] = {
        "cpu": cpu_model(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count(),
        "capability": cpu_capability(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_1min": round(psutil.getloadavg()[0], 2),
        "os": platform.platform(),
        "gpu": None,
    }
    if device.type != "cpu":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "gpu_processors": properties.multi_processor_count,
            "gpu_capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        }
    return found


def cpu_model() -> str:
    """The CPU as its vendor names it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Versions of what takes part."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "fastlstm"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["cuda"] = torch.version.cuda
    found["hip"] = torch.version.hip
    found["cudnn"] = str(torch.backends.cudnn.version()) if torch.cuda.is_available() else None
    return found


def commit() -> tuple[str | None, bool | None]:
    """The commit, and whether anything but result files differs from it; None where there is no git."""
    try:
        head = _git("rev-parse", "HEAD").strip()
        return head, bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results").strip())
    except (OSError, subprocess.CalledProcessError):
        return None, None


def source() -> str:
    """A digest of the code that is measured and of what measures it."""
    digest = hashlib.sha256()
    paths = [path for folder in ("fastlstm", "kernels", "benchmarks") for path in sorted((ROOT / folder).glob("*.py"))]
    for path in (*paths, ROOT / "tests" / "helpers.py"):  # the tolerances
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _git(*arguments: str) -> str:
    return subprocess.check_output(["git", *arguments], cwd=ROOT, text=True, stderr=subprocess.DEVNULL)


def command() -> str:
    """The command line, as it can be typed again."""
    return shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])


def now() -> str:
    """The date and time, UTC, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
