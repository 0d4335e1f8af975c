"""``fedhubert export``: a checkpoint for other software, or s3prl's benchmark on it."""

import argparse
import sys
from pathlib import Path

FORMATS = {
    "huggingface": "a folder that transformers' AutoModel and AutoFeatureExtractor load",
    "torchaudio": "a folder for torchaudio.models.wav2vec2_model",
    "hubert-local": "a file for s3prl's upstream hubert_local (needs: make s3prl)",
    "onnx": "a folder with float32 and int8 ONNX, for any number of clips of any length",
    "card": "a model card (README.md): data, partition, privacy, results and licence of a run's checkpoint",
}


def add(commands: argparse._SubParsersAction) -> None:
    """Add ``export`` and ``s3prl`` to the command's subparsers."""
    parser = commands.add_parser(
        "export",
        help="write a checkpoint for other software, and compare it with the source",
        epilog="\n".join(f"  {name:13} {text}" for name, text in FORMATS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("format", choices=list(FORMATS), metavar="FORMAT", help="one of those below")
    parser.add_argument("checkpoint", type=Path, help="such as outputs/RUN/04_distill/checkpoint")
    parser.add_argument("out", type=Path, help="folder or file to write")
    parser.set_defaults(function=_export)

    parser = commands.add_parser("s3prl", help="train and evaluate s3prl's speech_commands on a checkpoint")
    parser.add_argument("checkpoint", type=Path, help="such as outputs/RUN/04_distill/checkpoint")
    parser.add_argument(
        "keywords", type=Path, help="keywords.parquet of a run, such as outputs/RUN/00_corpus/keywords.parquet"
    )
    parser.add_argument("out", type=Path, help="folder for what s3prl writes")
    parser.add_argument("--background", type=Path, help="_background_noise_ of Speech Commands, for the silence class")
    parser.add_argument("--steps", type=int, default=200_000, help="optimiser steps (default: 200000, as SUPERB)")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate (default: 1e-4, as SUPERB)")
    parser.add_argument("--fine-tune", action="store_true", help="train the whole model on its last layer")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.set_defaults(function=_s3prl)


def _export(given: argparse.Namespace) -> int:
    from fedhubert_lib.export import card, huggingface, onnx, s3prl, torchaudio

    exporters = {
        "huggingface": huggingface.export,
        "torchaudio": torchaudio.export,
        "hubert-local": s3prl.export,
        "onnx": onnx.export,
        "card": card.export,
    }
    if given.out.exists():
        return _fail(f"{given.out} is there already; name another, or remove it")
    try:
        found = exporters[given.format](given.checkpoint, given.out)
    except (RuntimeError, ValueError) as error:  # an export that differs, a checkpoint that does not read
        return _fail(error)
    facts = found if isinstance(found, dict) else {"difference": found}
    print(f"{given.out}: " + ", ".join(f"{name} {value:.6g}" for name, value in facts.items()))
    return 0


def _s3prl(given: argparse.Namespace) -> int:
    import pandas as pd

    from fedhubert_lib.export import s3prl

    data = given.out / "data"
    try:
        if not data.exists():
            s3prl.lay_out(pd.read_parquet(given.keywords), data, background=given.background)
        result = s3prl.benchmark(
            given.checkpoint,
            data,
            given.out,
            steps=given.steps,
            rate=given.rate,
            fine_tune=given.fine_tune,
            device=given.device,
        )
    except (RuntimeError, ValueError) as error:
        return _fail(error)
    print(f"{given.out}: dev {result.dev:.4f}, test {result.test:.4f}")
    return 0


def _fail(reason: object) -> int:
    print(f"fedhubert: {reason}", file=sys.stderr)
    return 1
