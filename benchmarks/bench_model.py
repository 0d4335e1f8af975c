"""One training step of ours, transformers' and torchaudio's HuBERT: same dimensions, batch, masks, optimiser, machine.

    python benchmarks/bench_model.py [--presets tiny base] [--clips 4] [--seconds 5] [--repeats 5] [--device cpu]

A step is forward, masked-prediction loss, backward, clipping, fused AdamW. The contenders take turns within each
repetition, so that a busy machine is busy for all of them; the figure is the median, and ratios are medians of the
per-repetition ratios. transformers has no HuBERT pretraining class and gets our head; torchaudio runs with
``skip_nomask`` and as published draws its mask inside the step.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import torchaudio
import transformers
from torch import nn

from fedhubert_lib import audio, hubert, masking, objectives, seeds, training
from fedhubert_lib.batching import Batch

CLUSTERS = 100


def make_batch(clips: int, seconds: float, device: str) -> Batch:
    samples = int(seconds * audio.SAMPLE_RATE)
    frames = audio.frame_count(samples)
    generator = seeds.torch_generator(0, "bench")
    masks = [masking.spans(frames, seeds.numpy_generator(0, i)) for i in range(clips)]
    return Batch(
        torch.randn(clips, samples, generator=generator) * 0.1,
        torch.randint(CLUSTERS, (clips, frames), generator=generator),
        torch.stack([torch.from_numpy(mask) for mask in masks]),
        tuple(f"clip {i}" for i in range(clips)),
    ).to(device)


def ours(config: hubert.HubertConfig, device: str) -> tuple[nn.Module, Callable[[Batch], torch.Tensor]]:
    model, head = hubert.Hubert(config), hubert.Head(config, CLUSTERS)
    module = nn.ModuleList([model, head]).to(device).train()

    def loss(batch: Batch) -> torch.Tensor:
        sums = objectives.masked_prediction(model, head, batch)
        return sums.loss / sums.count

    return module, loss


def of_transformers(config: hubert.HubertConfig, device: str) -> tuple[nn.Module, Callable[[Batch], torch.Tensor]]:
    names = {f: getattr(config, f) for f in config.__dataclass_fields__ if f in transformers.HubertConfig().to_dict()}
    theirs = transformers.HubertConfig(**names | {"conv_dim": list(config.conv_dim)}, attn_implementation="sdpa")
    model, head = transformers.HubertModel(theirs), hubert.Head(config, CLUSTERS)
    module = nn.ModuleList([model, head]).to(device).train()

    def loss(batch: Batch) -> torch.Tensor:
        last = model(batch.waveforms, mask_time_indices=batch.mask).last_hidden_state
        return F.cross_entropy(head(last[batch.mask]), batch.labels[batch.mask])

    return module, loss


def of_torchaudio(config: hubert.HubertConfig, device: str) -> tuple[nn.Module, Callable[[Batch], torch.Tensor]]:
    model = torchaudio.models.hubert_pretrain_model(
        extractor_mode="group_norm" if config.feat_extract_norm == "group" else "layer_norm",
        extractor_conv_layer_config=list(zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)),
        extractor_conv_bias=config.conv_bias,
        encoder_embed_dim=config.hidden_size,
        encoder_projection_dropout=config.feat_proj_dropout,
        encoder_pos_conv_kernel=config.num_conv_pos_embeddings,
        encoder_pos_conv_groups=config.num_conv_pos_embedding_groups,
        encoder_num_layers=config.num_hidden_layers,
        encoder_num_heads=config.num_attention_heads,
        encoder_attention_dropout=config.attention_dropout,
        encoder_ff_interm_features=config.intermediate_size,
        encoder_ff_interm_dropout=config.activation_dropout,
        encoder_dropout=config.hidden_dropout,
        encoder_layer_norm_first=config.do_stable_layer_norm,
        encoder_layer_drop=config.layerdrop,
        mask_prob=0.8,
        mask_selection="static",
        mask_other=0.0,
        mask_length=10,
        no_mask_overlap=False,
        mask_min_space=1,
        mask_channel_prob=0.0,
        mask_channel_selection="static",
        mask_channel_other=0.0,
        mask_channel_length=10,
        no_mask_channel_overlap=False,
        mask_channel_min_space=1,
        skip_masked=False,
        skip_nomask=True,
        num_classes=CLUSTERS,
        final_dim=config.classifier_proj_size,
        feature_grad_mult=None if config.feature_grad_mult == 1 else config.feature_grad_mult,
    )
    module = model.to(device).train()

    def loss(batch: Batch) -> torch.Tensor:
        logits, _, penalty = model(batch.waveforms, batch.labels)
        target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        return F.cross_entropy(logits.float(), target) + 10 * penalty

    return module, loss


CONTENDERS = {"ours": ours, "transformers": of_transformers, "torchaudio": of_torchaudio}


def stepper(make: Callable, config: hubert.HubertConfig, precision: str, batch: Batch, device: str) -> Callable:
    """A function that does one training step and returns the seconds it took."""
    torch.manual_seed(0)
    module, loss = make(config, device)
    optimiser = torch.optim.AdamW(module.parameters(), 1e-5, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def step() -> float:
        began = time.perf_counter()
        with training.autocast(device, precision):
            value = loss(batch)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 10.0)
        optimiser.step()
        optimiser.zero_grad()
        value.item()
        return time.perf_counter() - began

    return step


def compare(
    preset: str, front_end: str, clips: int, seconds: float, repeats: int, device: str, only: list[str]
) -> dict:
    """Median seconds of a step of every contender, and the ratios to ours."""
    # Layerdrop would give each contender another number of layers.
    config = hubert.preset(preset, front_end, layerdrop=0.0)
    batch = make_batch(clips, seconds, device)
    steps = {
        f"{name} {precision}": stepper(CONTENDERS[name], config, precision, batch, device)
        for name in (only if front_end == "waveform" else ["ours"])
        for precision in ("float32", "bfloat16")
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # warm up
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(step())
    rows = {}
    for name, values in times.items():
        reference = f"ours {name.split()[1]}"
        median = statistics.median(values)
        rows[name] = {
            "seconds": median,
            "audio_seconds_per_second": clips * seconds / median,
            "times_ours": statistics.median(v / o for v, o in zip(values, times[reference], strict=True)),
        }
    best = {name: min(rows[f"{name} {p}"]["seconds"] for p in ("float32", "bfloat16")) for name in only}
    return {"preset": preset, "front_end": front_end, "clips": clips, "seconds": seconds, "rows": rows, "best": best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["tiny", "base"])
    parser.add_argument("--front-end", default="waveform")
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = []
    for preset in options.presets:
        result = compare(
            preset, options.front_end, options.clips, options.seconds, options.repeats, options.device, options.only
        )
        results.append(result)
        print(
            f"{preset}, {options.front_end}, {options.clips} x {options.seconds} s, {torch.get_num_threads()} threads"
        )
        for name, row in result["rows"].items():
            print(
                f"  {name:24} {row['seconds']:8.3f} s  {row['audio_seconds_per_second']:8.1f} audio s/s"
                f"  {row['times_ours']:6.2f} x ours"
            )
        print("  best against best:", {n: round(t / result["best"]["ours"], 2) for n, t in result["best"].items()})
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
