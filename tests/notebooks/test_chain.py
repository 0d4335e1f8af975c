"""The six notebooks under papermill, judged by what they wrote."""

import json
import re

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from chapters import INJECTED, NOTEBOOKS

from fedhubert_lib import audio, files, params, pretrained
from fedhubert_lib.labels import Labels

pytestmark = pytest.mark.timeout(1800)  # the chain takes a minute or two; a busy machine takes its time


def bundles(notebook) -> list[dict]:
    """All rich outputs of an executed notebook."""
    return [output["data"] for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]


@pytest.mark.parametrize("stage", NOTEBOOKS)
def test_every_stage_is_done_with_its_parameters(chain, stage):
    done = json.loads((chain.folder(stage) / "done.json").read_text())
    assert done["headline"]
    wanted = params.SECTIONS[stage]().model_dump() | {"run": "papermill"} | INJECTED.get(stage, {})
    del wanted["run"]
    assert done["identity"]["parameters"] == wanted


@pytest.mark.parametrize("stage", NOTEBOOKS)
def test_every_picture_is_shown_and_saved_twice(chain, stage):
    source = "\n".join(cell.source for cell in chain.executed[stage].cells if cell.cell_type == "code")
    names = set(re.findall(r'stage\.figures, f?"(\w+)', source)) | ({"curves"} if "live_curves" in source else set())
    names -= {"along"}  # drawn only where models on the way are evaluated
    figures = chain.folder(stage) / "figures"
    written = {path.stem for path in figures.glob("*.png")}
    assert written == {path.stem for path in figures.glob("*.svg")}
    assert all(any(stem.startswith(name) for stem in written) for name in names), names
    for path in figures.glob("*.png"):
        assert np.std(matplotlib.image.imread(path)) > 0.01, f"{path} is blank"
    assert sum("image/png" in data for data in bundles(chain.executed[stage])) >= len(written)


@pytest.mark.parametrize("stage", NOTEBOOKS)
def test_nothing_was_warned_of(chain, stage):
    for cell in chain.executed[stage].cells:
        streams = [output for output in cell.get("outputs", ()) if output.output_type == "stream"]
        assert not [output.text for output in streams if output.name == "stderr"]


def test_browsers_keep_a_picture_beside_the_widget(chain):
    for stage in ("corpus", "partition", "kmeans"):
        shown = [data for data in bundles(chain.executed[stage]) if "application/vnd.jupyter.widget-view+json" in data]
        assert any("image/png" in data for data in shown), "beside bars of progress, which have none"


def test_training_ends_with_its_final_curves(chain):
    for stage in ("pretrain", "distill"):
        (cell,) = [cell for cell in chain.executed[stage].cells if "live_curves" in cell.source]
        pictures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        assert len(pictures) == 1, "one output, redrawn"


def test_partition_and_labels_fit_the_manifest(chain):
    manifest = pd.read_parquet(chain.folder("corpus") / "manifest.parquet").set_index("utterance")
    clients = pd.read_parquet(chain.folder("partition") / "clients.parquet")
    seen = set()
    for client in clients.client:
        home = chain.folder("partition") / "clients" / client
        utterances = pd.concat(pd.read_parquet(home / f"{part}.parquet") for part in ("train", "validation"))
        assert not seen & set(utterances.utterance)
        seen |= set(utterances.utterance)
        for kind in INJECTED["kmeans"]["codebooks"]:
            labels = Labels(chain.folder("kmeans") / "clients" / client / kind)
            assert {u: len(labels[u]) for u in utterances.utterance} == {
                u: audio.frame_count(manifest.samples[u]) for u in utterances.utterance
            }
    assert seen <= set(manifest.index[manifest.split == "train"])


def test_quality_stands_beside_its_shuffled_baseline(chain):
    quality = json.loads((chain.folder("kmeans") / "quality.json").read_text())
    for kind, row in quality["codebooks"].items():
        if kind != "client":  # whose labels mean something else with every client
            assert row["pnmi"] > 3 * row["shuffled_pnmi"], kind
    same = {kind: np.array(agreement["same"]) for kind, agreement in quality["agreement"].items()}
    assert (same["federated"] == 1).all()
    assert same["client"][0, 1] < 0.5


def test_training_wrote_a_row_per_round_and_models_that_load(chain):
    for stage, rounds in (("pretrain", INJECTED["pretrain"]["rounds"]), ("distill", params.Distill().rounds)):
        for folder in (chain.folder(stage), chain.folder(stage) / "centralised"):
            rows = files.read_rows(folder / "metrics.jsonl")
            assert [row["round"] for row in rows if row["kind"] == "round"] == list(range(1, rounds + 1))
            model, _ = pretrained.load(folder / "checkpoint")
            assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_report_has_every_system_beside_its_baselines(chain):
    report = json.loads((chain.folder("evaluate") / "report.json").read_text())
    assert {row["system"] for row in report["systems"]} >= {"teacher", "student", "centralised", "random", "mfcc"}
    assert not report["absent"]
    assert (chain.folder("evaluate") / "report.csv").stat().st_size > 1000
