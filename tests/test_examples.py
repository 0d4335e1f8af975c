"""The parts that notebooks use: Tab shows the public names alone, and the example that ``?`` shows is right."""

import ast
import doctest
import functools
import gc
import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from typing import Any

import federation
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from fedhubert_lib import batching, hubert, labels, notebook, objectives, params, pretraining

EXAMPLES = [
    "batching.batches", "evaluation.layers.unit_quality", "federated.rounds.Server.rounds", "federated.rounds.cohort",
    "hubert.Hubert", "kmeans.clustering.fit", "masking.spans",
    "objectives.masked_prediction", "objectives.unmasked_weight", "partition.owners", "seeds.derive", "studies.load",
    "training.local_update",
]  # fmt: skip


def _is_module(words: list[str]) -> bool:
    path = ROOT.joinpath("fedhubert_lib", *words)
    return path.is_dir() or path.with_suffix(".py").is_file()


def used() -> dict[str, set[str]]:
    """The modules of the library that notebooks import, with the names of theirs that they use."""
    names: dict[str, set[str]] = {}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        tree = ast.parse("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))
        modules = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedhubert_lib"):
                for name in (alias.name for alias in node.names):
                    module = f"{node.module}.{name}"
                    if _is_module(module.split(".")[1:]):
                        modules[name] = module
                        names.setdefault(module, set())
                    else:
                        names.setdefault(str(node.module), set()).add(name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                names[modules[node.value.id]].add(node.attr)
    return names


@pytest.fixture
def modules_as_before() -> Iterator[None]:
    """Take away what names the public, as other tests expect it."""
    yield
    for place in list(sys.modules):
        if place.startswith("fedhubert_lib."):
            vars(sys.modules[place]).pop("__dir__", None)


@pytest.mark.usefixtures("modules_as_before")
@pytest.mark.parametrize(("module", "names"), sorted(used().items()))
def test_tab_shows_the_public_names_alone(module, names):
    loaded = importlib.import_module(module)
    notebook._name_the_public()
    shown = set(dir(loaded))
    imported = {name for name, value in vars(loaded).items() if inspect.ismodule(value)} | {"Path", "Any", "Tensor"}
    imported -= set(getattr(loaded, "__all__", ()))
    assert names <= shown, "what notebooks use is public"
    assert not shown & imported and not any(name.startswith("_") for name in shown)


@pytest.mark.usefixtures("modules_as_before")
def test_tab_bears_modules_that_are_imported_meanwhile(monkeypatch):
    """Another thread's imports, of a notebook's progress bar say, played by the garbage collector's callbacks."""
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    imports = iter(range(100_000))
    meanwhile = lambda *_: sys.modules.update({f"module_{next(imports)}": None})  # noqa: E731
    threshold = gc.get_threshold()
    gc.callbacks.append(meanwhile)
    gc.set_threshold(1)
    try:
        notebook._name_the_public()
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(meanwhile)
    assert next(imports) > 0, "something was imported"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the examples begin with: the speech and labels of a client, parameters, a narrow model, a batch, server."""
    run = federation.make(tmp_path_factory.mktemp("examples") / "run", clients=2)
    table = pd.read_parquet(run / "01_partition" / "clients" / "client-000" / "train.parquet")
    targets = labels.Labels(run / "02_kmeans" / "clients" / "client-000" / federation.CODEBOOK)
    p = federation.pretrain(hidden_size=32, layers=1, centralised=False)
    (batch,) = batching.batches(table, targets, p, (0, 1, "client-000"), 1)
    config = hubert.preset("tiny", "logmel", **federation.NARROW)
    module = torch.nn.ModuleDict({"model": hubert.Hubert(config), "head": hubert.Head(config, federation.TONES)})
    variables = {"table": table, "labels": targets, "p": p, "batch": batch, "module": module, "params": params}
    variables |= {"objective": functools.partial(_objective, module), "np": np, "pd": pd, "torch": torch}
    with pretraining.serving(run, p) as server:
        yield variables | {"server": server}


def _objective(module: torch.nn.ModuleDict, batch: batching.Batch, progress: float) -> objectives.Sums:
    return objectives.masked_prediction(module["model"], module["head"], batch)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_right(name, shown):
    words = name.split(".")
    number = next(i for i in range(len(words), 0, -1) if words[i - 1].islower() and _is_module(words[:i]))
    member = importlib.import_module(".".join(["fedhubert_lib", *words[:number]]))
    globs = vars(member) | shown
    for word in words[number:]:
        member = getattr(member, word)
    (example,) = doctest.DocTestFinder(recurse=False).find(member, name, globs=globs)
    assert example.examples
    runner = doctest.DocTestRunner(verbose=False)
    report: list[str] = []
    runner.run(example, out=report.append)
    assert not runner.failures, "".join(report)
