"""Memory and energy of a training."""

import pynvml
import torch

from fedhubert_lib import resources


class Meter:
    """Memory and energy that a training on ``device`` takes: one per run, asked after each round.

    Where clients compute elsewhere (any ``engine`` but inprocess) it is the server's memory alone. A value that the
    machine does not know is left out: no meter stops a training.
    """

    def __init__(self, device: str, engine: str = "inprocess") -> None:
        self.device = "cuda" if device == "auto" else device
        self.has_gpu = engine == "inprocess" and self.device.startswith("cuda") and torch.cuda.is_available()
        self.joules = _gpu_joules(self.device) if self.has_gpu else None

    def used(self) -> dict[str, float]:
        """peak_memory_bytes of the process so far, and since the last call gpu_memory_bytes (peak of the process) and
        gpu_joules (of the whole GPU)."""
        row = {"peak_memory_bytes": float(resources.peak_memory())}
        if self.joules is not None and (joules := _gpu_joules(self.device)) is not None:
            row["gpu_joules"] = joules - self.joules
            self.joules = joules
        if self.has_gpu and torch.cuda.is_initialized():
            row["gpu_memory_bytes"] = float(torch.cuda.max_memory_allocated(self.device))
            torch.cuda.reset_peak_memory_stats(self.device)
        return row


def _gpu_joules(device: str) -> float | None:
    """Joules that the GPU has used since its driver was loaded; None where it does not count them (a part of a GPU)."""
    try:
        pynvml.nvmlInit()
        # By its UUID: indices are others under CUDA_VISIBLE_DEVICES.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except pynvml.NVMLError:
        return None
