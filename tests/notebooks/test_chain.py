"""The six notebooks under papermill as they stand, which is the study toy, judged by what they wrote."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import golden
import matplotlib.image
import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from chapters import NOTEBOOKS

from fedhubert_lib import audio, files, params, pretrained
from fedhubert_lib.labels import Labels

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]  # minutes; a busy machine takes its time

CODEBOOKS = list(get_args(params.Codebook))


@dataclass(frozen=True)
class Chain:
    """A run of all six notebooks."""

    run: Path
    executed: dict[str, nbformat.NotebookNode]

    def folder(self, stage: str) -> Path:
        return self.run / params.FOLDERS[stage]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """All six notebooks under plain papermill, in order, as a person without the runner would start them."""
    outputs = tmp_path_factory.mktemp("chain")
    executed = {stage: execute(stage, outputs) for stage in NOTEBOOKS}
    return Chain(outputs / "toy", executed)


@pytest.fixture(scope="module")
def codebooks(chain: Chain) -> Chain:
    """A second run with all kinds of codebooks, from the first one's corpus and clients."""
    run = chain.run.with_name("codebooks")
    shutil.copytree(chain.run, run, ignore=lambda *_: [params.FOLDERS[stage] for stage in list(NOTEBOOKS)[2:]])
    return Chain(run, {"kmeans": execute("kmeans", run.parent, run="codebooks", codebooks=CODEBOOKS)})


def execute(stage: str, outputs: Path, **parameters: Any) -> nbformat.NotebookNode:
    """A notebook under plain papermill."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDHUBERT_OUTPUTS", str(outputs))
        executed = outputs / f"{stage}-{parameters.get('run')}.ipynb"
        options: dict[str, Any] = {"progress_bar": False, "cwd": outputs, "execution_timeout": 1200}
        return papermill.execute_notebook(NOTEBOOKS[stage], executed, parameters, **options)


def bundles(notebook) -> list[dict]:
    """All rich outputs of an executed notebook."""
    return [output["data"] for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]


@pytest.mark.parametrize("stage", NOTEBOOKS)
def test_every_stage_is_done_with_its_parameters(chain, stage):
    done = json.loads((chain.folder(stage) / "done.json").read_text())
    assert done["headline"]
    assert done["identity"]["parameters"] == params.SECTIONS[stage]().model_dump(exclude={"run"})


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


def test_a_picture_of_each_kind_of_codebook(codebooks):
    test_every_picture_is_shown_and_saved_twice(codebooks, "kmeans")
    test_nothing_was_warned_of(codebooks, "kmeans")


def test_partition_and_labels_fit_the_manifest(codebooks):
    manifest = pd.read_parquet(codebooks.folder("corpus") / "manifest.parquet").set_index("utterance")
    clients = pd.read_parquet(codebooks.folder("partition") / "clients.parquet")
    seen = set()
    for client in clients.client:
        home = codebooks.folder("partition") / "clients" / client
        utterances = pd.concat(pd.read_parquet(home / f"{part}.parquet") for part in ("train", "validation"))
        assert not seen & set(utterances.utterance)
        seen |= set(utterances.utterance)
        for kind in CODEBOOKS:
            labels = Labels(codebooks.folder("kmeans") / "clients" / client / kind)
            assert {u: len(labels[u]) for u in utterances.utterance} == {
                u: audio.frame_count(manifest.samples[u]) for u in utterances.utterance
            }
    assert seen <= set(manifest.index[manifest.split == "train"])


def test_quality_stands_beside_its_shuffled_baseline(codebooks):
    quality = json.loads((codebooks.folder("kmeans") / "quality.json").read_text())
    for kind, row in quality["codebooks"].items():
        if kind != "client":  # whose labels mean something else with every client
            assert row["pnmi"] > 3 * row["shuffled_pnmi"], kind
    same = {kind: np.array(agreement["same"]) for kind, agreement in quality["agreement"].items()}
    assert (same["federated"] == 1).all()
    assert same["client"][0, 1] < 0.5


def test_training_wrote_a_row_per_round_and_models_that_load(chain):
    for stage in ("pretrain", "distill"):
        rounds = params.SECTIONS[stage]().rounds
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


@pytest.mark.parametrize("name", ["loss", *golden.MEASURES])
def test_toy_reaches_its_golden_figures(chain, name):
    """On any processor: digests of weights differ between processors, these figures by less than the tolerance."""
    expected = json.loads(golden.GOLDEN.read_text())[name]
    assert golden.figures(chain.run)[name] == pytest.approx(expected["figures"], abs=expected["tolerance"])


@pytest.mark.parametrize("objective", ["distilhubert", "hubert", "soft-targets"])
def test_every_objective_goes_through_the_notebooks(chain, tmp_path, objective):
    """A student of distilhubert alone names no clusters: it has no accuracy to draw, and no head to evaluate."""
    stages: dict[str, dict[str, Any]] = {"distill": {"objectives": [objective], "soft_weight": 0.5}}
    if objective == "distilhubert":
        stages["evaluate"] = {"seeds": 1, "probe_steps": 10}
    folders = [params.FOLDERS[stage] for stage in ("distill", "evaluate")]
    shutil.copytree(chain.run, tmp_path / "other", ignore=lambda *_: folders)
    for stage, chosen in stages.items():
        executed = execute(stage, tmp_path, run="other", **chosen)
        outputs = [output for cell in executed.cells for output in cell.get("outputs", ())]
        assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
        if stage == "evaluate":
            report = json.loads((tmp_path / "other/05_evaluate/report.json").read_text())
            assert {"student", "centralised-student"} <= {row["system"] for row in report["systems"]}
