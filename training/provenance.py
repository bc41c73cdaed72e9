"""Where a result comes from: the code's revision, the date, the machine and the versions."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

import jax

_ROOT = Path(__file__).resolve().parents[1]


def provenance() -> dict[str, str]:
    """Revision (marked where the working tree differs from it), date, device, JAX and Python versions."""
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    return {
        "revision": _revision(),
        "date": datetime.date.today().isoformat(),
        "device": f"{os.cpu_count()} CPU cores" if on_cpu else f"{jax.device_count()} x {device.device_kind}",
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def _revision() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
