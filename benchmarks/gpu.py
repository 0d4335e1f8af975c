"""Measurements on a GPU in one command of at most eight minutes: `make gpu`.

    python benchmarks/gpu.py [--phases parity speed federation features learning] [--minutes 8] [--device cuda] [--tiny]

Each phase is a process with a time limit; each figure is printed and saved (outputs/gpu/measured.json) as soon as it is
there, so that a run that is cut off keeps what it has. The machine needs no network: what this project imports and the
machine lacks comes from benchmarks/wheels, which `make gpu-wheels` fills elsewhere; torch has to be there.
`--device cpu --tiny` runs all of it in seconds, to see that it runs: its figures mean nothing.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / "benchmarks" / "wheels"
LIMITS = {"parity": 60, "speed": 190, "federation": 60, "features": 30, "learning": 140}
"""Phases and the seconds that each may take."""
NEEDED = ("flwr", "pydantic", "soundfile", "psutil", "yaml", "safetensors", "threadpoolctl", "espeakng_loader")
FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
}
"""Dense bfloat16 operations per second by data sheet, for cards whose name holds this."""
ROW = "ROW "
"""Before a figure on a phase's standard output."""


def row(what: str, **figures: object) -> None:
    """Print a figure so that the parent saves it."""
    print(ROW + json.dumps({"what": what, **figures}), flush=True)


def skip(what: str, reason: str) -> None:
    row(what, skipped=reason)


class Setting:
    """Device, sizes and end of a phase."""

    def __init__(self, device: str, tiny: bool, seconds: float) -> None:
        self.device, self.tiny, self.until = device, tiny, time.monotonic() + seconds
        self.gpu = device.startswith("cuda")

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def synchronise(self) -> None:
        import torch

        if self.gpu:
            torch.cuda.synchronize(self.device)


# ------------------------------------------------------------------------------------------------------------- phases


def parity(at: Setting) -> None:
    """CPU and device give the same loss and gradients; the device gives the same weights twice."""
    import torch
    from bench_model import Work
    from torch import nn

    from fedhubert_lib import hubert, kernels, objectives, resources, seeds

    def gradients(config: hubert.HubertConfig, work: Work, device: str, precision: str) -> tuple[float, torch.Tensor]:
        module = nn.ModuleDict({"model": hubert.Hubert(config), "head": hubert.Head(config, 100)})
        for part in module.values():
            hubert.initialise(part, seeds.torch_generator(0))
        module.to(device)
        with resources.autocast(device, precision):
            sums = objectives.masked_prediction(*module.values(), work.batch().to(device), unmasked_weight=0.5)
        (sums.loss / sums.count).backward()
        return sums.loss.item() / sums.count, torch.cat([p.grad.double().cpu().flatten() for p in module.parameters()])

    torch.backends.cudnn.allow_tf32 = False  # in float32 convolutions, too, are compared
    off = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0, "layerdrop": 0.0}
    for preset, front_end in [("tiny", "waveform"), ("tiny", "logmel"), *([] if at.tiny else [("base", "waveform")])]:
        config, work = hubert.preset(preset, front_end, **off), Work(preset, front_end, 2, 2.0, "cpu")
        loss, gradient = gradients(config, work, "cpu", "float32")
        for precision, bound in (("float32", 1e-4), ("bfloat16", 5e-2)):
            for form in ("plain", "products"):
                with on_device(kernels, at.device, form):
                    other, its = gradients(config, work, at.device, precision)
                error = ((its - gradient).norm() / gradient.norm()).item()
                figures = {"loss_error": abs(other - loss) / loss, "gradient_error": error, "bound": bound}
                row(
                    f"{preset} {front_end} {precision} {form}",
                    **figures,
                    holds=max(error, figures["loss_error"]) <= bound,
                )

    def weights(preset: str) -> list[torch.Tensor]:
        ours = make_ours(Work(preset, "waveform", 2, 2.0, at.device), "bfloat16")
        for part in (ours.model, ours.head):
            hubert.initialise(part, seeds.torch_generator(0))
        ours.update([ours.batch] * 3)
        return [p.detach().cpu() for p in ours.module.parameters()]

    for preset in ("tiny",) if at.tiny else ("tiny", "base"):
        first, second = weights(preset), weights(preset)
        same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        row(f"{preset}: the same weights twice, bfloat16, dropout as the preset has it", holds=same)


def speed(at: Setting) -> None:
    """Training: audio seconds per second, fraction of the card's operations, peak memory, and the peers'."""
    import torch
    from bench_model import Work, of_torchaudio, of_transformers

    from fedhubert_lib import hubert, kernels, params, planning, resources, training
    from fedhubert_lib.evaluation import cost

    torch.backends.cuda.matmul.allow_tf32 = False
    name = torch.cuda.get_device_name(at.device) if at.gpu else "cpu"
    peak = next((flops for card, flops in FLOPS.items() if card in name and "MIG" not in name), None)

    def measure(label: str, work: Work, make: Callable, steps: Callable) -> None:
        if at.left < 15:
            skip(label, "no time left")
            return
        try:
            with memory(at) as used:
                contender = make(work, "bfloat16")
                began = time.perf_counter()
                steps(contender, 2)
                at.synchronise()
                cold = time.perf_counter() - began
                count, most = (1, 1) if at.tiny else (8, 3)
                times = []
                while len(times) < most and at.left > 5:
                    began = time.perf_counter()
                    steps(contender, count)
                    at.synchronise()
                    times.append((time.perf_counter() - began) / count)
        except (torch.OutOfMemoryError, ModuleNotFoundError) as error:
            skip(label, "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error))
            return
        seconds = statistics.median(times)
        flops = 6 * cost.macs(work.config, work.seconds) * work.clips / seconds
        figures = {"audio_seconds": work.audio_seconds, "seconds": seconds, "first_two_steps_seconds": cold}
        figures |= {"audio_seconds_per_second": work.audio_seconds / seconds, "flops_per_second": flops}
        row(label, **figures, model_flop_utilisation=flops / peak if peak else None, peak_bytes=used["bytes"])

    update = lambda ours, count: ours.update([ours.batch] * count)  # noqa: E731
    steps = lambda peer, count: [peer.step() for _ in range(count)]  # noqa: E731
    works = [Work("base", "waveform", 6, 15.0, at.device), Work("tiny", "logmel", 67, 15.0, at.device)]
    works += [Work("large", "waveform", 4, 14.0, at.device), Work("small", "waveform", 6, 15.0, at.device)]
    if at.tiny:
        works = [Work("tiny", "logmel", 2, 2.0, at.device)]
    for work in works:
        label = f"{work.preset} {work.front_end} {work.clips} x {work.seconds:.0f} s"
        measure(f"{label}, ours", work, make_ours, update)
        if work.front_end == "waveform" and work.preset != "small":
            measure(f"{label}, transformers", work, of_transformers, steps)
            measure(f"{label}, torchaudio", work, of_torchaudio, steps)
        with on_device(kernels, at.device, "products"):
            measure(f"{label}, ours, products of matrices", work, make_ours, update)
        if not at.gpu:
            skip(f"{label}, ours, compiled", "needs CUDA")
            skip(f"{label}, ours, not reproducible", "needs CUDA")
            continue
        measure(f"{label}, ours, compiled", work, compiled, update)
        reproducible, training.reproducible = training.reproducible, lambda _: contextlib.nullcontext()
        measure(f"{label}, ours, not reproducible", work, make_ours, update)
        training.reproducible = reproducible
    for preset in ("base", "large") if at.gpu else ():
        if at.left < 40:
            skip(f"{preset} waveform, largest batch", "no time left")
            continue
        config = hubert.preset(preset, layerdrop=0.0)
        p = params.Pretrain(crop_seconds=15.0, precision="bfloat16")
        one, two = (planning.measure_step(p, config, 100, clips, at.device).bytes for clips in (1, 2))
        budget = 0.8 * resources.free_memory(torch.device(at.device))
        work = Work(preset, "waveform", max(1, int((budget - one) / (two - one)) + 1), 15.0, at.device)
        measure(f"{preset} waveform {work.clips} x 15 s, ours, largest batch", work, make_ours, update)
    if not at.gpu:
        skip("largest batch", "needs CUDA")


def federation(at: Setting) -> None:
    """Time that a round adds to its clients' steps, in-process; fraction of an update that waits for FLAC."""
    import federation as small  # tests/federation.py
    from bench_model import Work

    from fedhubert_lib import files, pretraining

    clients = 2 if at.tiny else 8
    with tempfile.TemporaryDirectory() as folder:
        run = small.make(Path(folder), clients=clients)
        chosen = {"model": "tiny" if at.tiny else "base", "front_end": "logmel" if at.tiny else "waveform"}
        chosen |= {"rounds": 3, "cohort": clients, "local_steps": 2, "validate_every": 3, "local_state": "reset"}
        p = small.pretrain(**chosen, device=at.device, precision="bfloat16", centralised=False)
        pretraining.run(run, p)
        rows = files.read_rows(run / pretraining.STAGE / "metrics.jsonl")
    for number in (2,):  # the first builds the model, the last validates
        total = next(r["seconds"] for r in rows if r["kind"] == "round" and r["round"] == number)
        steps = sum(r["seconds"] for r in rows if r["kind"] == "client" and r["round"] == number)
        row(f"{p.model}: a round of {clients} clients beyond their steps", seconds_per_client=(total - steps) / clients)
    work = Work("tiny" if at.tiny else "base", "waveform", 2 if at.tiny else 6, 2.0 if at.tiny else 15.0, at.device)
    ours = make_ours(work, "bfloat16")
    ours.step()
    row(
        f"{work.preset} {work.audio_seconds:.0f} s: waits for FLAC",
        fraction_of_update=ours.waiting(8 if at.tiny else 40),
    )


def features(at: Setting) -> None:
    """MFCC and labels of speech that lies in main memory, times real time."""
    import torch

    from fedhubert_lib import features, seeds
    from fedhubert_lib.kmeans import clustering

    count = 4 if at.tiny else 240
    waveforms = [torch.randn(240_000, generator=seeds.torch_generator(i)) * 0.1 for i in range(count)]
    centroids = torch.cat(features.mfcc(waveforms[:4]))[::40][:100].to(at.device)

    def once() -> torch.Tensor:
        frames = [part[::2] for part in features.mfcc([waveform.to(at.device) for waveform in waveforms])]
        return clustering.nearest(torch.cat(frames), centroids).cpu()

    once()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        labels = once()
        times.append(time.perf_counter() - began)
    frames = torch.cat([part[::2] for part in features.mfcc(waveforms[:4])])
    same = (clustering.nearest(frames, centroids.cpu()) == labels[: len(frames)]).float().mean().item()
    row("MFCC and labels", times_real_time=15 * count / statistics.median(times), labels_as_on_a_cpu=same)


def learning(at: Setting) -> None:
    """An hour of synthetic speech, targets, a federated run for the time that is left; phones before and after."""
    import numpy as np
    import torch

    from fedhubert_lib import corpora, federated, files, kmeans, params, partition, planning, pretrained, pretraining
    from fedhubert_lib.evaluation import extraction, layers, probes, systems

    with tempfile.TemporaryDirectory() as folder:
        run, began = Path(folder), time.perf_counter()
        speech = {"speakers": 8, "minutes": 2.0, "test_speakers": 3, "test_minutes": 0.5} if at.tiny else {}
        speech = speech or {"speakers": 48, "minutes": 90.0, "test_speakers": 8, "test_minutes": 4.0}
        corpora.prepare(run, params.Corpus(kind="synthetic", **speech))
        clients = 2 if at.tiny else 8
        partition.assign(run, params.Partition(clients=clients, heldout_speakers=1))
        row("synthetic speech", minutes=speech["minutes"], seconds=time.perf_counter() - began)
        began = time.perf_counter()
        p = params.Kmeans(codebooks=["federated"], clusters=20 if at.tiny else 100, lloyd_rounds=8, device=at.device)
        with federated.connect(run, device=at.device) as connected:
            kmeans.run(run, p, connected)
        row("targets of all clients", seconds=time.perf_counter() - began)

        sizes = {"batch_seconds": 8.0, "crop_seconds": 2.0} if at.tiny else {"batch_seconds": 64.0, "crop_seconds": 4.0}
        sizes |= {
            "front_end": "logmel" if at.tiny else "waveform",
            "cohort": clients,
            "local_steps": 2 if at.tiny else 10,
        }
        p = params.Pretrain(**sizes, learning_rate=4e-3, validate_every=5, centralised=False, device=at.device)
        step = planning.plan(run, p.model_copy(update={"rounds": 1})).step.seconds
        seconds = at.left - 45
        p = p.model_copy(
            update={"rounds": 2 if at.tiny else max(2, int(0.8 * seconds / (step * clients * p.local_steps)))}
        )
        began = time.perf_counter()
        checkpoint = pretraining.run(run, p)
        last = [r for r in files.read_rows(run / pretraining.STAGE / "metrics.jsonl") if r["kind"] == "round"]
        heard = sum(r["audio_seconds"] for r in last) / 3600
        kept = ("accuracy_masked", "accuracy_unmasked", "loss", "validation_loss", "validation_accuracy_masked")
        figures = {name: last[-1][name] for name in kept if name in last[-1]}
        row("federated training", rounds=p.rounds, hours_heard=heard, seconds=time.perf_counter() - began, **figures)

        table, phones = layers.held_out(run, 0.5 if at.tiny else 4.0, 0)
        labels, speakers = layers.phone_labels(table, phones)
        known = labels >= 0
        model, _ = pretrained.load(checkpoint)
        for name, network in {"trained": model, "random weights": systems.untrained(model.config, 0)}.items():
            encoder = systems.of_model(network, torch.device(at.device))
            frames = extraction.utterances(encoder, table, run / f"{name.split()[0]}.npy")
            score = {}
            for layer in range(frames.shape[1]):
                block = np.ascontiguousarray(frames[:, layer])
                quality = layers.unit_quality(block, labels, clusters=20 if at.tiny else 100, seed=0)
                accuracy, _ = probes.leave_speakers_out(block[known], labels[known], speakers[known], seed=0, folds=3)
                score[layer] = (accuracy, quality["pnmi"])
            best = [max(values) for values in zip(*score.values(), strict=True)]
            row(f"phones, {name}, best layer", phone_probe=best[0], pnmi=best[1])


PHASES = {phase.__name__: phase for phase in (parity, speed, federation, features, learning)}


def make_ours(work: object, precision: str) -> object:
    import bench_model

    return bench_model.Ours(work, precision)


def compiled(work: object, precision: str) -> object:
    """Ours with its transformer layers compiled, one graph for all of them."""
    ours = make_ours(work, precision)
    for layer in ours.model.encoder.layers:
        layer.compile()
    return ours


@contextlib.contextmanager
def on_device(kernels: object, device: str, form: str) -> Iterator[None]:
    """Front end and positions as PyTorch's convolutions or as products of matrices."""
    before = kernels.DEVICES
    kernels.DEVICES = {device.split(":")[0]} if form == "products" else set()
    try:
        yield
    finally:
        kernels.DEVICES = before


@contextlib.contextmanager
def memory(at: Setting) -> Iterator[dict[str, int]]:
    """Peak bytes of the device from here to the end of the block."""
    import torch

    used = {"bytes": 0}
    if at.gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(at.device)
    yield used
    if at.gpu:
        used["bytes"] = torch.cuda.max_memory_allocated(at.device)


# ------------------------------------------------------------------------------------------------------------- parent


def provide(folder: str) -> str:
    """Install packages that the machine lacks from the wheels into ``folder``; the path to search last."""
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    if lacking and not wheels:
        raise SystemExit(
            f"{', '.join(lacking)} not installed, and {WHEELS} is empty: run make gpu-wheels where there is a network,"
            " and copy that folder here"
        )
    if lacking:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", folder]
        subprocess.run(command + wheels, check=True)
    return folder


def machine(device: str) -> dict[str, object]:
    import torch

    card = {"device": device}
    if device.startswith("cuda"):
        facts = torch.cuda.get_device_properties(device)
        card |= {"card": facts.name, "memory_bytes": facts.total_memory, "cuda": torch.version.cuda}
    return card | {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}


def follow(name: str, command: list[str], environment: dict[str, str], seconds: float, keep: Callable) -> str:
    """Run a phase; its figures go to ``keep`` as they come. How it ended."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    tail: list[str] = []
    for line in process.stdout:
        if line.startswith(ROW):
            keep(name, json.loads(line.removeprefix(ROW)))
        else:
            tail = [*tail[-30:], line]
    code = process.wait()
    timer.cancel()
    if code == 0:
        return "done"
    print("".join(tail), end="")
    return f"stopped after {seconds:.0f} s" if code == -9 else f"failed with exit code {code}: {''.join(tail[-3:])}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of them")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes of seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu")
    parser.add_argument("--phase", choices=LIMITS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.phase:
        sys.path.append(os.environ["FEDHUBERT_WHEELS"])  # last: what the machine has goes first
        PHASES[options.phase](Setting(options.device, options.tiny, options.seconds))
        return 0
    until = time.monotonic() + 60 * options.minutes
    result = {"machine": machine(options.device), "minutes": options.minutes, "tiny": options.tiny, "phases": {}}
    print(json.dumps(result["machine"]))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"measured{'-tiny' if options.tiny else ''}.json"
    if path.exists():
        path.rename(path.with_suffix(f".{int(path.stat().st_mtime)}.json"))

    def keep(name: str, figures: dict) -> None:
        result["phases"][name]["rows"].append(figures)
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in figures.items() if k != "what"}
        print(f"  {figures['what']}: " + ", ".join(f"{k} {v}" for k, v in shown.items()), flush=True)
        save()

    def save() -> None:
        partial_file = path.with_suffix(".partial")
        partial_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        partial_file.replace(path)

    with tempfile.TemporaryDirectory() as folder:
        places = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
        environment |= {"FEDHUBERT_WHEELS": provide(folder), "FLWR_TELEMETRY_ENABLED": "0"}
        command = [sys.executable, __file__, "--device", options.device, *(["--tiny"] if options.tiny else [])]
        for name in options.phases:
            seconds = min(until - time.monotonic(), float("inf") if options.tiny else LIMITS[name])
            result["phases"][name] = {"rows": [], "ended": "no time left"}
            print(f"{name} (at most {max(seconds, 0):.0f} s)", flush=True)
            if seconds > 5:
                phase = ["--phase", name, "--seconds", str(seconds)]
                result["phases"][name]["ended"] = follow(name, command + phase, environment, seconds, keep)
            print(f"  {result['phases'][name]['ended']}", flush=True)
            save()
    print(f"saved: {path}")
    return int(any(phase["ended"] != "done" for phase in result["phases"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
