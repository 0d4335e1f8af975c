"""One training step of ours, transformers' and torchaudio's HuBERT: same dimensions, batch, masks, optimiser, machine.

    python benchmarks/bench_model.py [--presets tiny base] [--clips 4] [--seconds 5] [--repeats 5] [--device cpu]

A step is forward, masked-prediction loss, backward, clipping, fused AdamW; ours is a `training.local_update`.
Every contender lives in a process of its own, as it would in use: what an allocator keeps differs between them. They
take turns within each repetition, so that a busy machine is busy for all of them; the figure is the median, and ratios
are medians of the per-repetition ratios. transformers has no HuBERT pretraining class and gets our head; torchaudio
runs with `skip_nomask` and, as published, draws its mask inside the step. Training keeps freed memory in the process
(`training.keep_freed_memory`); peers marked "kept" do, too, the others are as installed. All have the bench's spin
count of OpenMP's threads.

Then, for ours alone: the fractions of a step that loss and masks take and that it waits for data, and what gradient
checkpointing saves and costs.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fedhubert_lib import audio, batching, hubert, identity, masking, objectives, params, resources, seeds, training
from fedhubert_lib.evaluation import cost
from fedhubert_lib.export import formats

CLUSTERS = 100
PUBLISHED_BATCH = 87.5
"""Seconds of audio that base is pretrained on per GPU and step."""
PRECISIONS = ("float32", "bfloat16")
TARGETS = {  # times ours
    ("tiny", "torchaudio"): 2.0,
    ("tiny", "transformers"): 1.5,
    ("base", "torchaudio"): 1.3,
    ("base", "transformers"): 1.3,
}


@dataclass(frozen=True)
class Work:
    """Model, batch and device of every contender."""

    preset: str
    front_end: str
    clips: int
    seconds: float
    device: str

    @property
    def config(self) -> hubert.HubertConfig:
        """Without layerdrop, which would give each contender another number of layers."""
        return hubert.preset(self.preset, self.front_end, layerdrop=0.0)

    @property
    def audio_seconds(self) -> float:
        return self.clips * self.seconds

    def batch(self) -> batching.Batch:
        samples = int(self.seconds * audio.SAMPLE_RATE)
        frames = audio.frame_count(samples)
        generator = seeds.torch_generator(0, "bench")
        return batching.Batch(
            torch.randn(self.clips, samples, generator=generator) * 0.1,
            torch.randint(CLUSTERS, (self.clips, frames), generator=generator),
            torch.from_numpy(self.masks(frames)),
            tuple(f"clip {i}" for i in range(self.clips)),
        ).to(self.device)

    def masks(self, frames: int) -> np.ndarray:
        return np.stack([masking.spans(frames, seeds.numpy_generator(0, i)) for i in range(self.clips)])


# -------------------------------------------------------------------------------------------------------- contenders


class Ours:
    """A local update of one batch, as a client makes it."""

    def __init__(self, work: Work, precision: str, checkpointing: bool = False) -> None:
        self.work = work
        self.model, self.head = hubert.Hubert(work.config), hubert.Head(work.config, CLUSTERS)
        self.module = nn.ModuleList([self.model, self.head]).to(work.device)
        self.model.recompute = checkpointing
        self.p = params.Pretrain(learning_rate=1e-5, warmup_fraction=0.0, precision=precision)
        self.optimiser = training.adamw(self.module, self.p)
        self.batch = work.batch()

    def step(self) -> None:
        self.update([self.batch])

    def tensor_bytes(self) -> int:
        """Peak bytes of a step's tensors beyond those between steps: weights and moments.

        The C library's heap keeps what was freed, so that resident memory says little of it.
        """
        if self.work.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.work.device)
            before = torch.cuda.memory_allocated(self.work.device)
            self.step()
            return torch.cuda.max_memory_allocated(self.work.device) - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.step()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        return max(itertools.accumulate(event.nbytes() for event in events))

    def update(self, batches: object) -> dict[str, float]:
        return training.local_update(
            self.module,
            batches,
            lambda batch, _: objectives.masked_prediction(self.model, self.head, batch),
            self.p,
            first_step=0,
            total_steps=10**6,
            seed=0,
            optimiser=self.optimiser,
        )

    def objective_seconds(self) -> float:
        """Seconds of loss and masks in a step: everything after the model and its gradient, and drawing the masks."""
        batch, size = self.batch, self.work.config.hidden_size
        features = torch.randn(*batch.mask.shape, self.work.config.feature_size, device=self.work.device)
        dtype = torch.bfloat16 if self.p.precision == "bfloat16" else torch.float32

        def once() -> float:
            last = torch.randn(*batch.mask.shape, size, device=self.work.device).requires_grad_()
            convolved = features.to(dtype).requires_grad_()
            _synchronise(self.work.device)
            began = time.perf_counter()
            self.work.masks(batch.mask.shape[1])
            with resources.autocast(self.work.device, self.p.precision):
                model = lambda *_, **__: hubert.HubertOutput(last, None, convolved)  # noqa: E731
                sums = objectives.masked_prediction(model, self.head, batch)
            sums.loss.backward()
            _synchronise(self.work.device)
            return time.perf_counter() - began

        once()
        return statistics.median(once() for _ in range(5))

    def waiting(self, steps: int = 5) -> float:
        """Fraction of an update of ``steps`` steps that waits for clips to be decoded from FLAC."""
        rng = np.random.default_rng(0)
        samples = int((self.work.seconds + 1) * audio.SAMPLE_RATE)
        with tempfile.TemporaryDirectory() as folder:
            paths = [str(Path(folder) / f"{i}.flac") for i in range(2 * self.work.clips)]
            for path in paths:
                soundfile.write(path, 0.1 * rng.standard_normal(samples), audio.SAMPLE_RATE)
            table = pd.DataFrame({"utterance": paths, "path": paths, "samples": samples})
            labels = {path: rng.integers(0, CLUSTERS, audio.frame_count(samples)) for path in paths}
            row = self.update(
                batching.batches(
                    table,
                    labels,
                    params.LocalTraining(batch_seconds=self.work.audio_seconds, crop_seconds=self.work.seconds),
                    (0, 0, "bench"),
                    steps,
                    device=self.work.device,
                )
            )
        return row["waiting_seconds"] / row["seconds"]


class Peer:
    """A peer's model in the usual loop. ``loss`` is a function of the batch."""

    def __init__(self, work: Work, precision: str, module: nn.Module, loss: Callable) -> None:
        self.work, self.precision, self.module, self.loss = work, precision, module.to(work.device).train(), loss
        self.optimiser = torch.optim.AdamW(module.parameters(), 1e-5, betas=(0.9, 0.98), eps=1e-6, fused=True)
        self.batch = work.batch()

    def step(self) -> None:
        with resources.autocast(self.work.device, self.precision):
            value = self.loss(self.batch)
        value.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 10.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        value.item()


def of_transformers(work: Work, precision: str) -> Peer:
    import transformers  # here: a machine that measures the others need not have it

    config = work.config
    names = {f: getattr(config, f) for f in config.__dataclass_fields__ if f in transformers.HubertConfig().to_dict()}
    settings = transformers.HubertConfig(**names | {"conv_dim": list(config.conv_dim)}, attn_implementation="sdpa")
    model, head = transformers.HubertModel(settings), hubert.Head(config, CLUSTERS)

    def loss(batch: batching.Batch) -> torch.Tensor:
        last = model(batch.waveforms, mask_time_indices=batch.mask).last_hidden_state
        return F.cross_entropy(head(last[batch.mask]), batch.labels[batch.mask])

    return Peer(work, precision, nn.ModuleList([model, head]), loss)


def torchaudio_model(config: hubert.HubertConfig, clusters: int) -> torchaudio.models.HuBERTPretrainModel:
    """torchaudio's pretraining model of the same architecture, with the published masks."""
    arguments = formats.torchaudio_arguments(config)
    del arguments["aux_num_out"]
    masking = {"mask_prob": 0.8, "mask_length": 10, "mask_channel_prob": 0.0, "mask_channel_length": 10}
    for kind in ("mask", "mask_channel"):
        masking |= {f"{kind}_selection": "static", f"{kind}_other": 0.0, f"{kind}_min_space": 1}
    return torchaudio.models.hubert_pretrain_model(
        **arguments,
        **masking,
        no_mask_overlap=False,
        no_mask_channel_overlap=False,
        skip_masked=False,
        skip_nomask=True,
        num_classes=clusters,
        final_dim=config.classifier_proj_size,
        feature_grad_mult=None if config.feature_grad_mult == 1 else config.feature_grad_mult,
    )


def of_torchaudio(work: Work, precision: str) -> Peer:
    model = torchaudio_model(work.config, CLUSTERS)

    def loss(batch: batching.Batch) -> torch.Tensor:
        logits, _, penalty = model(batch.waveforms, batch.labels)
        target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        return F.cross_entropy(logits.float(), target) + 10 * penalty

    return Peer(work, precision, model, loss)


CONTENDERS = {
    "ours": Ours,
    "ours, checkpointed": partial(Ours, checkpointing=True),
    "transformers": of_transformers,
    "torchaudio": of_torchaudio,
}


# --------------------------------------------------------------------------------------------------- their processes


def serve(pipe: Connection, name: str, work: Work, precision: str) -> None:
    """Child: makes the contender, then answers "step" with seconds, "peak" with bytes, a method's name with its
    result, and None by ending."""
    before = _peak(work.device)
    torch.manual_seed(0)
    if name.endswith(", kept"):
        training.keep_freed_memory()
    contender = CONTENDERS[name.removesuffix(", kept")](work, precision)
    while order := pipe.recv():
        if order == "peak":
            pipe.send(_peak(work.device) - before)
        elif order == "step":
            began = time.perf_counter()
            contender.step()
            _synchronise(work.device)
            pipe.send(time.perf_counter() - began)
        else:
            pipe.send(getattr(contender, order)())


def _peak(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resources.peak_memory()


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


class Processes:
    """Contenders in their processes, one at work at a time."""

    def __init__(self, names: list[str], work: Work, precision: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.children = {}, []
        for name in names:
            self.pipes[name], theirs = context.Pipe()
            self.children.append(context.Process(target=serve, args=(theirs, name, work, precision), daemon=True))
            self.children[-1].start()
            theirs.close()

    def ask(self, name: str, order: str) -> object:
        self.pipes[name].send(order)
        return self.pipes[name].recv()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, child in zip(self.pipes.values(), self.children, strict=True):
            pipe.send(None)
            child.join()


def turns(processes: Processes, repeats: int) -> dict[str, list[float]]:
    """Seconds of ``repeats`` steps of each, in turns, after two to warm up."""
    times: dict[str, list[float]] = {name: [] for name in processes.pipes}
    for repeat in range(-2, repeats):
        for name, values in times.items():
            seconds = processes.ask(name, "step")
            if repeat >= 0:
                values.append(seconds)
    return times


# ------------------------------------------------------------------------------------------------------------ figures


def ceiling(precision: str, device: str) -> float:
    """FLOP/s of a large matrix product in ``precision``: what a step could reach if it were nothing else."""
    size = 8192 if device.startswith("cuda") else 1024
    a = torch.randn(size, size, device=device).to(getattr(torch, precision))

    def once() -> float:
        _synchronise(device)
        began = time.perf_counter()
        a @ a
        _synchronise(device)
        return time.perf_counter() - began

    return 2 * size**3 / min(once() for _ in range(4))


def compare(work: Work, repeats: int, only: list[str]) -> dict:
    """Median seconds of a step of every contender, and their ratios to ours."""
    rows = {}
    flops = 6 * cost.macs(work.config, work.seconds) * work.clips  # forward once, backward twice
    for precision in PRECISIONS:
        limit = ceiling(precision, work.device)
        with Processes(only, work, precision) as processes:
            times = turns(processes, repeats)
            for name, values in times.items():
                median = statistics.median(values)
                rows[f"{name} {precision}"] = {
                    "seconds": median,
                    "audio_seconds_per_second": work.audio_seconds / median,
                    "times_ours": statistics.median(v / o for v, o in zip(values, times["ours"], strict=True)),
                    "flops_per_second": flops / median,
                    "utilisation": flops / median / limit,
                }
            ours = rows[f"ours {precision}"]
            ours["objective_fraction"] = processes.ask("ours", "objective_seconds") / ours["seconds"]
            if precision == "bfloat16":  # the faster step, which data have to keep up with
                ours["waiting_fraction"] = processes.ask("ours", "waiting")
    best = {name: min(rows[f"{name} {precision}"]["seconds"] for precision in PRECISIONS) for name in only}
    return {"rows": rows, "best": {name: seconds / best["ours"] for name, seconds in best.items() if name != "ours"}}


def checkpointing(work: Work, precision: str, repeats: int) -> dict:
    """Memory and time of a step with gradient checkpointing, as fractions of those without."""
    names = ["ours", "ours, checkpointed"]
    with Processes(names, work, precision) as processes:
        times = turns(processes, repeats)
        resident, resident_saved = (processes.ask(name, "peak") for name in names)
        tensors, tensors_saved = (processes.ask(name, "tensor_bytes") for name in names)
    return {
        "resident": resident,
        "fraction_of_resident": resident_saved / resident,
        "tensors": tensors,
        "fraction_of_tensors": tensors_saved / tensors,
        "times": statistics.median(s / p for p, s in zip(*times.values(), strict=True)),
    }


def show(work: Work, result: dict) -> None:
    print(f"\n{work.preset}, {work.front_end}, {work.clips} x {work.seconds} s on {work.device}")
    for name, row in result["rows"].items():
        target = TARGETS.get((work.preset, name.split(" ")[0]))
        print(
            f"  {name:28} {row['seconds']:7.3f} s {row['audio_seconds_per_second']:8.1f} audio s/s"
            f" {row['flops_per_second'] / 1e9:8.0f} GFLOP/s ({row['utilisation']:4.0%} of a matrix product)"
            f" {row['times_ours']:5.2f} x ours" + (f" (at least {target})" if target else "")
        )
    print("  best of theirs against best of ours (at least 1.5):", {n: round(x, 2) for n, x in result["best"].items()})
    for precision in PRECISIONS:
        row = result["rows"][f"ours {precision}"]
        print(
            f"  {precision}: loss and masks {row['objective_fraction']:.1%} of the step (under 5 %)"
            + (f", waiting for data {row['waiting_fraction']:.1%} (under 2 %)" if "waiting_fraction" in row else "")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["tiny", "base"])
    parser.add_argument("--front-end", default="waveform")
    parser.add_argument("--clips", type=int, nargs="+", default=[4], help="for all presets, or one for each")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", default=["ours", "transformers", "torchaudio"])
    parser.add_argument("--checkpointing", default="base", help="preset to measure it on; empty: none")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    facts = identity.hardware()
    gpu = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else "no GPU was used"
    print(f"{facts['processor']}, {torch.get_num_threads()} threads, torch {torch.__version__}; {gpu}")
    results = []
    if len(options.clips) == 1:
        options.clips *= len(options.presets)
    for preset, clips in zip(options.presets, options.clips, strict=True):
        work = Work(preset, options.front_end, clips, options.seconds, options.device)
        result = compare(work, options.repeats, options.only)
        show(work, result)
        results.append({"preset": preset, "clips": clips, "seconds": options.seconds, **result})
    if options.checkpointing:
        clips = round(PUBLISHED_BATCH / options.seconds)
        work = Work(options.checkpointing, options.front_end, clips, options.seconds, options.device)
        result = checkpointing(work, "bfloat16", options.repeats)
        print(
            f"\ngradient checkpointing, {work.preset}, bfloat16, {work.clips} x {work.seconds} s:"
            f" {result['fraction_of_tensors']:.0%} of {result['tensors'] / 2**30:.2f} GiB of a step's tensors, without"
            f" weights and moments (at most 40 %); {result['fraction_of_resident']:.0%} of"
            f" {result['resident'] / 2**30:.2f} GiB of resident memory; time {result['times']:.2f} x (at most 1.35)"
        )
        results.append({"preset": options.checkpointing, "checkpointing": result})
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
