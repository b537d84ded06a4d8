"""What a measurement was made with: it stands in every results file."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def environment(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Any]:
    """Versions, machine, device, dtype, seed and the exact command of this process, as JSON values."""
    device = torch.device(device)
    return {
        "command": command(),
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_name(device),
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("foveate", "torch", "transformers", "accelerate")},
    }


def command() -> str:
    """The command line of this process, without the place where things are installed."""
    program = Path(sys.argv[0])
    # The console script, and `python -m foveate.cli`, which is how accelerate starts it.
    if program.name == "foveate" or program.parts[-2:] == ("foveate", "cli.py"):
        return shlex.join(["foveate", *sys.argv[1:]])
    return shlex.join([Path(sys.executable).name, *sys.argv])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def device_name(device: torch.device) -> str:
    """The GPU's own name; of other devices what PyTorch calls them."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"
