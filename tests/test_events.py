"""TensorBoard reads what the ledger and the report write for it, and nothing is written unless it is asked for."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedhubert_lib import checkpoints, events
from fedhubert_lib.evaluation import tables
from fedhubert_lib.records import RunError


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """Step and value of each tag in the event files of ``folder``."""
    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "study" / "03_pretrain" / "centralised"


def test_rounds_are_written_as_they_end_and_again_after_a_kill(tmp_path, out, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(events.VARIABLE, "~/events")
    ledger = checkpoints.Ledger(out, 0, {"rounds": 3}, None)
    ledger.row("client", {"round": 1, "client": "a", "loss": 9.0})
    for number, loss in ((1, 4.0), (2, 3.0), (3, 2.5)):
        ledger.row("round", {"round": number, "loss": loss, "epsilon": None, "clients": 2, "privacy": "client"})
    folder = tmp_path / "events" / "study" / "03_pretrain" / "centralised"
    assert scalars(folder) == {"loss": [(1, 4.0), (2, 3.0), (3, 2.5)], "clients": [(1, 2), (2, 2), (3, 2)]}
    checkpoints.Ledger(out, 1, {}, None).row("round", {"round": 2, "loss": 3.5})
    assert scalars(folder)["loss"] == [(1, 4.0), (2, 3.5)]


def test_nothing_is_written_unless_asked_for(out, monkeypatch):
    monkeypatch.delenv(events.VARIABLE, raising=False)
    checkpoints.Ledger(out, 0, {"rounds": 1}, None).row("round", {"round": 1, "loss": 4.0})
    assert {path.name for path in out.iterdir()} == {"metrics.jsonl"}


def test_a_missing_package_is_named_before_the_work(out, monkeypatch):
    monkeypatch.setenv(events.VARIABLE, "events")
    monkeypatch.setattr(events.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RunError, match="make tensorboard"):
        checkpoints.Ledger(out, 0, {}, None)
    assert not (out.parents[2] / "events").exists()


def test_figures_are_those_of_the_best_layers_over_rounds(tmp_path, monkeypatch):
    monkeypatch.setenv(events.VARIABLE, str(tmp_path / "events"))
    figure = {"system": "teacher", "measure": "pnmi", "seeds": 1}
    along = {"system": "teacher", "measure": "pnmi"}
    document = {
        "figures": [
            figure | {"layer": 0, "value": 0.25},
            figure | {"layer": 1, "value": 0.5},
            figure | {"measure": "layer-accuracy", "layer": 1, "value": 0.9},
        ],
        "along": [along | {"round": 1, "value": 0.125}, along | {"round": 8, "value": 0.5}],
    }
    for _ in range(2):  # an evaluation that is repeated takes the place of the first
        events.figures(tmp_path / "study" / "05_evaluate", tables.best(document["figures"]), document["along"])
    written = scalars(tmp_path / "events" / "study" / "05_evaluate" / "teacher")
    assert written.keys() == {"pnmi"}, "the best layer on test clips is no figure"
    assert written["pnmi"] == [(1, 0.125), (8, 0.5), (8, 0.5)]
