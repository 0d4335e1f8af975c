"""s3prl for real: a checkpoint for its ``hubert_local``, and its own benchmark run on one of our models.

s3prl 0.4.18 needs an older torch, so it lives in an environment of its own, ``.venv-s3prl`` beside the project, that
``make s3prl`` sets up from ``requirements-s3prl.lock``. Everything here starts that environment's Python.
"""

import functools
import hashlib
import itertools
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import soundfile
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedhubert_lib import audio, files, params, pretrained, records
from fedhubert_lib.evaluation import keywords, report, systems, tables
from fedhubert_lib.export import formats
from fedhubert_lib.hubert import Head, Hubert

PYTHON = params.ROOT / ".venv-s3prl" / "bin" / "python"
FOLDER = "s3prl"
"""Folder of a run with what s3prl wrote of its systems. 05_evaluate keeps it: it depends on weights and words alone."""
FIRST_SEED = 1337
"""s3prl's default."""
RUNNER = {"gradient_clipping": 1, "gradient_accumulate_steps": 1, "max_keep": 1, "eval_dataloaders": ["dev"]}
MODEL = {"projector_dim": 256, "select": "UtteranceLevel", "UtteranceLevel": {"pooling": "MeanPooling"}}
"""Constants of s3prl/downstream/speech_commands/config.yaml, which the package on PyPI lacks."""
FAIRSEQ_NAMES = (
    (r"^masked_spec_embed$", "mask_emb"),
    (r"^(feature_extractor\.conv_layers\.\d+)\.conv\.", r"\1.0."),
    (r"^(feature_extractor\.conv_layers\.\d+)\.layer_norm\.", r"\1.2."),
    (r"^feature_projection\.layer_norm\.", "layer_norm."),
    (r"^feature_projection\.projection\.", "post_extract_proj."),
    (r"^encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original0$", "encoder.pos_conv.0.weight_g"),
    (r"^encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original1$", "encoder.pos_conv.0.weight_v"),
    (r"^encoder\.pos_conv_embed\.conv\.bias$", "encoder.pos_conv.0.bias"),
    (r"(encoder\.layers\.\d+)\.attention\.", r"\1.self_attn."),
    (r"(encoder\.layers\.\d+)\.layer_norm\.", r"\1.self_attn_layer_norm."),
    (r"(encoder\.layers\.\d+)\.feed_forward\.intermediate_dense\.", r"\1.fc1."),
    (r"(encoder\.layers\.\d+)\.feed_forward\.output_dense\.", r"\1.fc2."),
)
"""Patterns of our parameter names and their replacements in fairseq's."""


def call(arguments: list[str], log: Path | None = None) -> str:
    """Run ``export.s3prl_entry`` in s3prl's environment; returns its output, which also goes to ``log``.

    Raises ExportError when the environment is missing; with the last lines of the output when the program fails.
    """
    if not PYTHON.is_file():
        raise formats.ExportError(f"{PYTHON} is missing: s3prl has an environment of its own; run: make s3prl")
    command = [PYTHON, "-m", "fedhubert_lib.export.s3prl_entry", *arguments]
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(params.ROOT)}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.run(command, env=os.environ | offline, **output)
    if log is not None:
        log.write_text(process.stdout, encoding="utf-8")
    if process.returncode:
        last = "\n".join(process.stdout.splitlines()[-15:])
        raise formats.ExportError(f"s3prl {arguments[0]} failed with exit code {process.returncode}:\n{last}")
    return process.stdout


def to_hubert_local(checkpoint: Path, path: Path) -> float:
    """Write the model of ``checkpoint`` as the file that ``-u hubert_local -k PATH`` loads; the largest difference.

    s3prl's format is a pickle of plain dictionaries and tensors; nothing here reads one. Raises ExportError for an
    architecture that s3prl does not know, or where it gives other numbers.
    """
    model, head = formats.load_published(checkpoint, "s3prl's hubert_local")
    if (size := model.config.hidden_size) == model.config.feature_size:  # fairseq then makes no projection
        raise formats.ExportError(f"s3prl's hubert_local has no model whose hidden_size is its conv_width, here {size}")
    with files.atomic(path) as temporary:
        torch.save(converted(model, head), temporary)
        return check(model, "hubert_local", temporary)


def check(model: Hubert, upstream: str, checkpoint: Path) -> float:
    """Largest difference between ``model`` and what s3prl's ``upstream`` gives from ``checkpoint``."""
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch, "waveforms.safetensors"), Path(scratch, "states.safetensors")
        save_file({f"{clips}x{samples}": formats.noise(clips, samples) for clips, samples in formats.SHAPES}, inputs)
        call(["states", upstream, str(checkpoint), str(inputs), str(outputs)])
        states = load_file(outputs)
    return formats.compare(model, lambda waveforms: states[f"{len(waveforms)}x{waveforms.shape[1]}"])


def converted(model: Hubert, head: Head | None) -> dict[str, Any]:
    """The four entries of s3prl's converted fairseq checkpoints. Without a head there is one class, never used."""
    config = model.config
    head = head or Head(config, clusters=1)
    weights: dict[str, Tensor] = {"label_embs_concat": head.label_embeddings}
    weights |= {f"final_proj.{name}": tensor for name, tensor in head.final_proj.named_parameters()}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in FAIRSEQ_NAMES:
            name = re.sub(pattern, replacement, name)
        if config.feat_extract_norm == "layer":  # fairseq wraps it in two transpositions
            name = re.sub(r"^(feature_extractor\.conv_layers\.\d+\.2)\.", r"\1.1.", name)
        weights[name] = tensor
    return {
        "task_cfg": {"label_rate": 50.0, "sample_rate": audio.SAMPLE_RATE, "normalize": config.do_normalize},
        "model_cfg": {
            "label_rate": 50.0,
            "extractor_mode": "default" if config.feat_extract_norm == "group" else "layer_norm",
            "encoder_layers": config.num_hidden_layers,
            "encoder_embed_dim": config.hidden_size,
            "encoder_ffn_embed_dim": config.intermediate_size,
            "encoder_attention_heads": config.num_attention_heads,
            "final_dim": config.classifier_proj_size,
            "layer_norm_first": config.do_stable_layer_norm,
            "conv_feature_layers": repr([*zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)]),
            "conv_bias": config.conv_bias,
            "conv_pos": config.num_conv_pos_embeddings,
            "conv_pos_groups": config.num_conv_pos_embedding_groups,
            "feature_grad_mult": config.feature_grad_mult,
            "dropout": config.hidden_dropout,
            "attention_dropout": config.attention_dropout,
            "activation_dropout": config.activation_dropout,
            "dropout_input": config.feat_proj_dropout,
        },
        "model_weight": {name: tensor.detach().clone() for name, tensor in weights.items()},
        "dictionaries_symbols": [[str(index) for index in range(len(head.label_embeddings))]],
    }


def benchmark(
    checkpoint: Path, data: Path, out: Path, *, steps: int, rate: float, fine_tune: bool, seed: int, device: str
) -> dict[str, Any]:
    """s3prl's ``run_downstream`` on speech_commands with ``checkpoint`` as its upstream: train, then evaluate.

    ``data`` holds ``train`` and ``test`` as ``lay_out`` makes them, or as the official archives unpack. ``fine_tune``
    trains the whole model on its last layer (``-f -s last_hidden_state``); otherwise it is frozen and its layers are
    summed. Everything that s3prl writes lies in ``out``. Returns the settings; ``dev``, the best accuracy on validation
    clips, which s3prl draws with replacement and balanced: not comparable to ``test``, that of the same model on the
    test clips; and the number of ``classes`` among these. Raises ExportError where s3prl fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    every = max(1, steps // 10)
    roots = {"speech_commands_root": str((data / "train").resolve())}
    roots["speech_commands_test_root"] = str((data / "test").resolve())
    config = {
        "runner": RUNNER | {"total_steps": steps, "log_step": every, "eval_step": every, "save_step": steps},
        "optimizer": {"name": "Adam", "lr": rate},
        "downstream_expert": {"datarc": {"num_workers": 0, "batch_size": 32, **roots}, "modelrc": MODEL},
    }
    (out / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    common = ["--device", device, "--seed", str(seed)]
    train = ["-d", "speech_commands", "-u", "fedhubert", "-k", str(checkpoint.resolve())]
    train += ["-p", str(out), "-c", str(out / "config.yaml"), *(["-f", "-s", "last_hidden_state"] if fine_tune else [])]
    trained = call(["run", "-m", "train", *train, *common], out / "train.log")
    evaluated = call(["run", "-m", "evaluate", "-e", str(out / "dev-best.ckpt"), *common], out / "evaluate.log")
    dev = re.findall(r"^dev acc: (\S+)$", trained, re.MULTILINE)
    test = re.findall(r"^test acc: (\S+)$", evaluated, re.MULTILINE)
    if not dev or not test:
        raise formats.ExportError(f"s3prl ended without an accuracy; see train.log and evaluate.log in {out}")
    settings = {"steps": steps, "rate": rate, "seed": seed, "fine_tuned": fine_tune}
    classes = sum(folder.is_dir() for folder in (data / "test").iterdir())
    return {"dev": max(map(float, dev)), "test": float(test[-1]), "classes": classes} | settings


def of_run(
    run: Path, name: str, *, seeds: int, fine_tune: bool, steps: int, rate: float, device: str
) -> list[dict[str, Any]]:
    """``benchmark`` of system ``name`` of an evaluated run, on its keyword clips, with ``seeds`` seeds.

    Results lie in RUN/s3prl/NAME-frozen or NAME-fine-tuned, a folder per seed; what is there of the same weights, words
    and settings is kept, other results move to RUN/s3prl/previous. The test accuracies go into the run's report. Raises
    ExportError for a system that has changed since the report was written, or that s3prl has no use for (MFCC).
    """
    evaluated = tables.read(run)
    checkpoint = evaluated["parameters"].get("checkpoint", "")
    present, absent = systems.of_run(run, evaluated["seed"], torch.device("cpu"), checkpoint)
    models = {system.name: system for system in present if system.model is not None}
    if name not in models:
        reason = absent.get(name, "not a model of this run")
        raise formats.ExportError(f"{name}: {reason}; there are {', '.join(models)}")
    system = models[name]
    if (name, system.digest) not in [(row["system"], row["digest"]) for row in evaluated["systems"]]:
        raise formats.ExportError(f"{name}: has changed since report.json was written; run 05_evaluate again first")
    clips = keywords.read_clips(run / "00_corpus" / "keywords.parquet")
    data = lay_out(clips, run / FOLDER / "data", evaluated["seed"])
    folder = run / FOLDER / f"{name}-{'fine-tuned' if fine_tune else 'frozen'}"
    settings = {"system": name, "digest": system.digest, "words": report.words(run, evaluated["seed"])}
    settings |= {"steps": steps, "rate": rate}
    previous = run / FOLDER / "previous"
    for out in sorted(folder.glob("seed-*")):
        if not settings.items() <= (records.read_json(out / "result.json") or {}).items():
            previous.mkdir(exist_ok=True)
            out.rename(previous / f"{folder.name}-{out.name}-{time.time_ns()}")
    if system.folder is None:  # random weights are nowhere on disk
        pretrained.save(folder / "checkpoint", system.model)
    results = []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        path, source = folder / f"seed-{seed}" / "result.json", system.folder or folder / "checkpoint"
        if not path.is_file():
            options = {"steps": steps, "rate": rate, "fine_tune": fine_tune, "seed": seed, "device": device}
            files.write_json(path, settings | benchmark(source, data, path.parent, **options))
        results.append(records.read_json(path) or {})
    report.write(run, tables.read(run))
    return results


def lay_out(clips: pd.DataFrame, out: Path, seed: int) -> Path:
    """Folders as s3prl's speech_commands expects them, of a run's keyword clips (``keywords.parquet``), by links.

    ``train`` has a folder per word with the training and validation clips. s3prl splits them by a hash of the speaker,
    as the official lists were made; links of other corpora are named so that this gives the run's own lists. ``test``
    has a folder per class with the test clips of ``keywords.superb`` for ``seed``. ``_silence_`` is among them where
    ``_background_noise_`` lies beside the words; the first 80 % of its files are for training.
    Returns ``out``. Raises KeywordError where a command is missing, or the noise cannot be used.
    """
    root = Path(clips.path.iloc[0]).parents[1]
    silence = (root / keywords.NOISE).is_dir()
    test = keywords.superb(clips, seed, silence=silence).query("split == 'test'")
    with files.atomic(out) as temporary:
        for row in clips[clips.split != "test"].itertuples():
            speaker, _, take = Path(row.path).name.partition("_nohash_")
            _link(row.path, temporary / "train" / row.word / f"{_hashed(speaker, row.split)}_nohash_{take}")
        for row in test[test.word != keywords.SILENCE].itertuples():
            _link(row.path, temporary / "test" / row.word / "-".join(Path(row.path).parts[-2:]))
        for row in test[test.word == keywords.SILENCE].itertuples():
            second = audio.read(row.path, row.start, row.start + keywords.CLIP_SAMPLES)
            _save(second, temporary / "test" / f"{row.clip}.wav")
        for path, samples in keywords.noise(root).items() if silence else ():
            _save(audio.read(path, 0, int(0.8 * samples)), temporary / "train" / keywords.NOISE / path.name)
    return out


def _link(path: str, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(Path(path).resolve())


def _save(waveform: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, waveform.numpy(), audio.SAMPLE_RATE)


@functools.cache
def _hashed(speaker: str, split: str) -> str:
    """``speaker``, with a number where Speech Commands' hash would not put it into ``split``."""
    low, high = {"validation": (0, 10), "train": (20, 101)}[split]  # per cent
    names = itertools.chain([speaker], (f"{speaker}-{number}" for number in itertools.count(1)))
    hashes = ((name, int(hashlib.sha1(name.encode()).hexdigest(), 16) % 2**27 * 100 / (2**27 - 1)) for name in names)
    return next(name for name, value in hashes if low <= value < high)
