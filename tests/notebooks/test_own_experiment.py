"""The experiment of one's own under papermill: what it trains, and that it leaves the run alone."""

from pathlib import Path

import pandas as pd
import papermill
import pytest
from chapters import OWN

from fedhubert_lib import pretrained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # half a minute; a busy machine takes its time


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder after two executions at the smallest size."""
    outputs = tmp_path_factory.mktemp("own")
    parameters = {"changes": ["pretrain.rounds=2", "pretrain.local_steps=2", "corpus.speakers=6", "corpus.minutes=1.5"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDHUBERT_OUTPUTS", str(outputs))
        for number in range(2):
            path = outputs / f"{number}.ipynb"
            papermill.execute_notebook(OWN, path, parameters, progress_bar=False, cwd=outputs, execution_timeout=600)
    return outputs / "own_experiment"


def test_both_trainings_of_every_variant_are_measured_and_load(home):
    first, second = sorted((home / "own_experiment").iterdir())
    for out in first, second:
        curves = pd.read_csv(out / "curves.csv")
        assert (curves.groupby(["variant", "training"])["round"].agg(list).map(tuple) == (1, 2)).all()
        final = pd.read_csv(out / "figures.csv", header=[0, 1], index_col=0)
        assert {"PNMI", "accuracy, training", "accuracy, validation"} == set(final.columns.get_level_values(0))
        assert len(final) == 4 and final.notna().all(axis=None)
        for folder in out.glob("*/*/checkpoint"):
            assert all(parameter.isfinite().all() for parameter in pretrained.load(folder)[0].parameters())
        assert {path.stem for path in (out / "figures").iterdir()} == {"curves", "pnmi"}
    columns = ["variant", "training", "round", "validation_loss"]
    pd.testing.assert_frame_equal(*(pd.read_csv(out / "curves.csv")[columns] for out in (first, second)))


def test_every_change_changes_the_training(home):
    curves = pd.read_csv(next((home / "own_experiment").iterdir()) / "curves.csv")
    last = curves[curves["round"] == 2].groupby("training").validation_loss
    assert (last.nunique() == 4).all()


def test_it_is_no_stage_of_the_run(home):
    assert (
        not list(home.glob("*/done.json")) and not (home / "03_pretrain").exists() and not (home / "clients").exists()
    )
