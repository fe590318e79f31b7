"""On what a run ran: versions, device, memory."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import torch

import trainer
from trainer.config import DeviceName
from trainer.process import cpu_name, version_of
from trainer.schema import ThawError

_PACKAGES: Final = ("torch", "torchvision", "timm", "numpy", "pillow")


def choose_device(name: DeviceName) -> torch.device:
    """The device to train on; `auto` takes a GPU where there is one. Raises ThawError."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ThawError(
            f"--device cuda: torch {torch.__version__} sees no CUDA GPU here. Check the driver "
            "with nvidia-smi, or use --device cpu."
        )
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def describe(device: torch.device) -> dict[str, Any]:
    """The "environment" of run.json."""
    return {
        "versions": {"thaw": trainer.__version__, "python": platform.python_version()}
        | {p: version_of(p) for p in _PACKAGES}
        | {"onnxruntime": version_of("onnxruntime-gpu") or version_of("onnxruntime")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": f"{cpu_name()} ({os.cpu_count()} cores)",
        "threads": torch.get_num_threads(),
        "git": _commit(),
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: on the GPU by torch, on the CPU by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _commit() -> str | None:
    """The commit of Thaw itself, where it runs from a git checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
