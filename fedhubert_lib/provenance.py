"""What made a result: commit, versions, hardware, data; and what it took: time and memory."""

import platform
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from fedhubert_lib import identity, params, threads
from fedhubert_lib.memory import peak_memory


def of(run: Path, seed: int) -> dict[str, Any]:
    """What made a result: for run.json and for the top of every notebook."""
    return {
        "study": (identity.read_json(run / "run.json") or {}).get("study", run.name),
        "run": run.name,
        "seed": seed,
        "git": git(),
        "versions": identity.versions(),
        "hardware": hardware(),
        "data": identity.data_fingerprint(run),
    }


def git() -> dict[str, Any]:
    """Commit of the project, and whether its files differ from it; outputs that a notebook was saved with are none."""
    command = ["git", "-C", str(params.ROOT)]
    try:
        commit = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        status = subprocess.run([*command, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository: an archive of the source
        return {"commit": None, "dirty": None}
    return {"commit": commit.strip(), "dirty": any(_differs(line) for line in status.splitlines())}


def _differs(line: str) -> bool:
    """Whether a line of ``git status --porcelain`` tells of a change, and not only of outputs saved in a notebook."""
    state, name = line[:2], line[3:].strip('"')
    if not name.endswith(".ipynb") or "M" not in state:
        return True
    command = ["git", "-C", str(params.ROOT), "show", f"HEAD:./{name}"]
    committed = subprocess.run(command, capture_output=True, check=True).stdout.decode("utf-8")
    return identity.cells(committed) != identity.read_notebook(params.ROOT / name)


def hardware() -> dict[str, Any]:
    """What this machine has. GPUs are listed once torch is loaded: a stage that does without it uses none."""
    torch = sys.modules.get("torch")
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": threads.cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else [],
    }


def since(started: float) -> dict[str, Any]:
    """Time since ``started``, and the peak memory of the notebook or of its largest worker, whichever is more."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = [peak_memory(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit]
    now, torch = time.time(), sys.modules.get("torch")
    used = {"finished": clock(now), "seconds": round(now - started, 1), "peak_memory_bytes": max(peaks)}
    if torch and torch.cuda.is_initialized():
        used["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    return used


def clock(seconds: float) -> str:
    """Seconds since 1970 as ISO 8601, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
