"""Model folders in the layout of Hugging Face: ours, and public HuBERT checkpoints. Pickled weights are never read.

A folder holds ``config.json``, ``preprocessor_config.json`` and ``model.safetensors`` (float32, transformers' names);
ours have the head in ``head.safetensors`` beside them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from fedhubert_lib import files
from fedhubert_lib.audio import SAMPLE_RATE
from fedhubert_lib.hubert import Head, Hubert, HubertConfig

FIXED = {"hidden_act": "gelu", "feat_extract_activation": "gelu", "conv_pos_batch_norm": False}
"""Settings of transformers' ``HubertConfig`` that have one supported value."""
LARGEST = 100_000
"""Beyond any size, kernel or number of layers of a model."""
LEFT_OUT = ("lm_head.", "projector.", "classifier.", "final_proj.", "layer_weights", "log_mel.")
"""Tensors that are not read: task heads of fine-tuned models, and the constants of an export's log-mel front end."""


def published(config: HubertConfig) -> bool:
    """Whether this is the paper's architecture, which other software knows."""
    return config.front_end == "waveform"


def documents(config: HubertConfig) -> dict[str, str]:
    """The JSON files that make a folder with ``model.safetensors`` a Hugging Face one: text by name.

    transformers loads it if the architecture is the published one; otherwise its ``model_type`` says no.
    """
    values = asdict(config) | FIXED | {"model_type": "hubert" if published(config) else "fedhubert"}
    values |= {"architectures": ["HubertModel"], "num_feat_extract_layers": len(config.conv_dim)}
    preprocessor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": SAMPLE_RATE,
        "padding_value": 0.0,
        "padding_side": "right",
        "do_normalize": config.do_normalize,
        "return_attention_mask": config.feat_extract_norm == "layer",
    }
    texts = {"config.json": values, "preprocessor_config.json": preprocessor}
    return {name: json.dumps(content, indent=2) + "\n" for name, content in texts.items()}


def save(folder: Path, model: Hubert, head: Head | None = None) -> None:
    """Write a model folder, atomically; an existing one is replaced."""
    modules: dict[str, nn.Module] = {"model": model} | ({"head": head} if head is not None else {})
    groups = {name: {n: t.cpu().float() for n, t in module.state_dict().items()} for name, module in modules.items()}
    with files.atomic(folder) as temporary:
        write(temporary, groups, documents(model.config))


def write(folder: Path, groups: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, str]) -> None:
    """Make ``folder``, as open as the umask says: tensors on the CPU as GROUP.safetensors; ``documents``, texts."""
    folder.mkdir()
    for group, tensors in groups.items():
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(tensors, path := folder / f"{group}.safetensors", metadata={"format": "pt"})
        path.chmod(folder.stat().st_mode & 0o666)  # as the umask says; its own is 0600
    for name, text in documents.items():
        (folder / name).write_text(text, encoding="utf-8")


def load(folder: str | Path, weights: bool = True) -> tuple[Hubert, Head | None]:
    """Read a model folder, ours or public, in eval mode; with the head if ``head.safetensors`` is there.

    Reads one file or shards, the older ``weight_g``/``weight_v`` names, and fine-tuned checkpoints (prefix ``hubert.``)
    without their task head. A checkpoint fine-tuned without masking has no mask embedding: it gets a random one, always
    the same, uniform as in transformers; nothing but masked training from this checkpoint uses it. Without ``weights``
    all is checked and no weight is kept: the modules are on the device ``meta``. Raises ValueError or
    FileNotFoundError that says what does not fit.
    """
    folder, device = Path(folder), "cpu" if weights else "meta"
    config, paths = read_config(folder), weight_files(folder)
    embedding = torch.rand(config.hidden_size, generator=torch.Generator().manual_seed(0)).to(device)
    tensors = {"masked_spec_embed": embedding}
    for name, tensor in _read_tensors(paths, weights).items():
        name = name.removeprefix("hubert.")
        for old, new in (("conv.weight_g", "original0"), ("conv.weight_v", "original1")):
            name = name.replace(old, f"conv.parametrizations.weight.{new}")
        if not name.startswith(LEFT_OUT):
            tensors[name] = tensor
    if (count := config.num_hidden_layers) > (layers := sum(n.endswith(".final_layer_norm.weight") for n in tensors)):
        raise ValueError(f"{paths[0]}: does not fit its config.json: it has {layers} of num_hidden_layers: {count}")
    head: Head | None = None
    for place in ("meta", device):  # sizes that no tensor has would take all memory
        with torch.device(place):
            model = Hubert(config)
        _fill(model, {name: tensor.to(place) for name, tensor in tensors.items()}, paths[0])
    if (path := folder / "head.safetensors").is_file():
        tensors = _read_tensors([path], weights)
        if "label_embeddings" not in tensors or tensors["label_embeddings"].ndim != 2:
            raise ValueError(f"{path}: holds no table label_embeddings; it is not a HuBERT head")
        clusters, size = tensors["label_embeddings"].shape
        with torch.device(device):
            head = Head(replace(config, classifier_proj_size=size), clusters).eval()
        _fill(head, tensors, path)
    return model.eval(), head


def read_config(folder: Path) -> HubertConfig:
    """The configuration of the model in ``folder``, from its JSON files. Raises as ``load`` does.

    Whether the model expects normalised waveforms stands in ``processor_config.json`` (transformers 5), in
    ``preprocessor_config.json``, or, in ours, in ``config.json``. It must stand there for a model with layer norm
    in its convolutions, which gives other numbers without; group norm removes scale and offset but for rounding.
    """
    if not (path := folder / "config.json").is_file():
        what = "holds no config.json" if folder.is_dir() else "no such folder"
        model = inner if (inner := folder / "checkpoint").is_dir() else "the folder of a Hugging Face HuBERT checkpoint"
        raise FileNotFoundError(f"{folder}: {what}; give {model}")
    values = _read_json(path)
    if values.get("model_type") not in ("hubert", "fedhubert"):
        raise ValueError(f"{path}: model_type is {values.get('model_type')!r}; only HuBERT checkpoints can be read")
    for name, value in FIXED.items():
        if values.get(name, value) != value:
            raise ValueError(f"{path}: {name} is {values[name]!r}; only {value!r} is supported")
    processor = _read_json(folder / "processor_config.json", "feature_extractor")
    processor = processor or _read_json(folder / "preprocessor_config.json")
    if (rate := processor.get("sampling_rate", SAMPLE_RATE)) != SAMPLE_RATE:
        raise ValueError(f"{folder}: its model is for {rate} Hz; only {SAMPLE_RATE} Hz is supported")
    if processor:
        values["do_normalize"] = processor.get("do_normalize", True)  # the default of Wav2Vec2FeatureExtractor
    elif "do_normalize" not in values and values.get("feat_extract_norm") == "layer":
        raise ValueError(
            f"{folder}: neither processor_config.json nor preprocessor_config.json says whether the model was trained"
            " on normalised waveforms; copy one from where the checkpoint comes from, or write"
            ' preprocessor_config.json with {"do_normalize": true}, as for the published large and xlarge models'
        )
    if values.get("do_stable_layer_norm") and "feature_grad_mult" not in values:  # of transformers: as published large
        values |= {"feature_grad_mult": 1.0, "classifier_proj_size": 768}
    values = {field.name: values[field.name] for field in fields(HubertConfig) if field.name in values}
    try:
        config = TypeAdapter(HubertConfig).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = (".".join(map(str, first["loc"])) + ": ").removeprefix(": ")  # none: values that do not go together
        raise ValueError(f"{path}: {name}{first['msg'].removeprefix('Value error, ')}") from error
    for name, value in asdict(config).items():
        largest = 1 - 2**-16 if "drop" in name else LARGEST  # at 1 nothing is left to scale
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, str | bool) and not isinstance(number, int) <= number <= largest:
                raise ValueError(f"{path}: {name} is {value}, which no model can have")
    return config


def _read_json(path: Path, key: str = "") -> dict[str, Any]:
    """The object in a JSON file, or the one under ``key`` in it; empty where there is none."""
    try:
        values = json.loads(files.read_text(path))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError, OSError) as error:  # not JSON, not UTF-8, a folder
        raise ValueError(f"{path}: is not JSON ({error}); copy it again") from error
    if key and isinstance(values, dict):
        values = values.get(key) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no JSON object {key}; copy it again")
    return values


def weight_files(folder: Path) -> list[Path]:
    """``model.safetensors`` in ``folder``, or the shards that its index names. Raises as ``load`` does."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if (index := folder / "model.safetensors.index.json").is_file():
        names = _read_json(index, "weight_map")
        shards = [folder / name for name in sorted(set(map(str, names.values())))]
        if not shards or any(path.parent != folder for path in shards):
            raise ValueError(f"{index}: has no weight_map of files beside it; copy the checkpoint again")
        if missing := [path.name for path in shards if not path.is_file()]:
            raise FileNotFoundError(f"{folder}: {', '.join(missing)} missing, which {index.name} names; copy it again")
        return shards
    if pickles := sorted(path.name for path in folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder}: holds {pickles[0]} but no model.safetensors. Pickled weights are never read; convert them once:"
            f" transformers.HubertModel.from_pretrained({str(folder)!r}).save_pretrained(ANOTHER_FOLDER)"
        )
    raise FileNotFoundError(f"{folder}: holds no weights (model.safetensors); copy the checkpoint again, whole")


def _read_tensors(paths: list[Path], weights: bool) -> dict[str, Tensor]:
    """The tensors of safetensors files, all finite; without ``weights`` of their shapes on the device ``meta``."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                for name in list(file.keys()):  # it is no dictionary
                    tensor = file.get_tensor(name)
                    if not (tensor.is_floating_point() and tensor.float().isfinite().all()):
                        raise ValueError(f"{path}: {name} ({tensor.dtype}) is not all finite numbers; copy it again")
                    tensors[name] = tensor if weights else tensor.to("meta")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: cannot be read ({error}); copy it again, or make it anew") from error
    return tensors


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise ValueError(f"{path}: does not fit its config.json. {' '.join(str(error).split())[:1000]}") from error
