"""Runs beside each other: what differs, their curves over hours, their figures with the intervals that apply."""

import json
from pathlib import Path

import nbformat
import pytest
import yaml

from fedhubert_lib import cli, compare, files, params, plots, records, runs
from fedhubert_lib.evaluation import intervals

WORDS = ["yes", "no"]
TITLES = {"teacher": "teacher, federated", "mfcc": "MFCC"}


def make(
    outputs: Path, name: str, rounds: int = 3, accuracy: float | None = 0.5, loss: float = 4.0, **pretrain: object
) -> Path:
    """A run as far as ``rounds`` of pretraining, and evaluated where there is an ``accuracy``."""
    run = outputs / name
    for stage, values in (("corpus", {}), ("pretrain", pretrain)):
        folder = run / params.FOLDERS[stage]
        folder.mkdir(parents=True)
        (folder / "params.yaml").write_text(yaml.safe_dump(params.SECTIONS[stage](run=name, **values).model_dump()))
        files.write_json(folder / "begun.json", {"started": 1.0, "identity": {"inputs": {}}})
    files.write_json(run / "run.json", {"study": "study", "run": name})
    for number in range(1, rounds + 1):
        row = {"kind": "round", "round": number, "audio_seconds": 3600.0, "loss": 9.0, "accuracy_masked": 0.9}
        row |= {"validation_loss": loss - number, "validation_accuracy_masked": number / 10 if number > 1 else None}
        files.append_row(run / "03_pretrain/metrics.jsonl", row)
        files.append_row(run / "03_pretrain/centralised/metrics.jsonl", row)
    if accuracy is not None:
        figure = {"measure": "keyword-accuracy", "layer": None, "low": accuracy - 0.1, "high": accuracy + 0.1}
        figure |= {"value": accuracy, "values": [accuracy - 0.05, accuracy + 0.05], "seeds": 2}
        values = {"run": name, "parameters": {"seeds": 2}, "data": {"words": WORDS}, "along": []}
        values["systems"] = [{"system": s, "title": title, "digest": s + name} for s, title in TITLES.items()]
        values["figures"] = [figure | {"system": system} for system in TITLES]
        (run / "05_evaluate").mkdir()
        files.write_json(run / "05_evaluate/report.json", values)
    return run


def seeds_of(outputs: Path, name: str, accuracies: list[float], **pretrain: object) -> list[Path]:
    return [make(outputs, f"{name}-{s}", 3 + s, a, 4.0 + s, seed=s, **pretrain) for s, a in enumerate(accuracies)]


def test_names_stand_for_runs_folders_and_training_seeds(outputs):
    folders = seeds_of(outputs, "base", [0.5, 0.6])
    run = make(outputs, "lr")
    make(outputs, "lr-7")
    make(outputs, "base-old")
    assert compare.groups(["base", str(run), "lr-7"]) == {"base": folders, "lr": [run], "lr-7": [outputs / "lr-7"]}
    other = make(outputs / "elsewhere", "lr")
    both = compare.groups([str(run), str(other)])
    assert both == {str(run): [run], str(other): [other]}, "two of one name"
    assert compare.states(both).index.tolist() == [str(run), str(other)]
    for place in ("one", "two"):
        seeds_of(outputs / place, "same", [0.5, 0.6])
    studies = compare.groups([str(outputs / place / "same") for place in ("one", "two")])
    assert compare.states(studies).index.tolist() == [f"{study}-{seed}" for study in studies for seed in (0, 1)]
    (outputs / "copied/05_evaluate").mkdir(parents=True)
    assert runs.named("copied") == outputs / "copied", "a part of a run from another machine"
    with pytest.raises(records.RunError, match="nothing: no run of that name"):
        compare.groups(["base", "nothing"])


def test_parameters_that_differ_are_listed_and_seeds_of_a_group_together(outputs):
    seeds_of(outputs, "base", [0.5, 0.6])
    seeds_of(outputs, "lr", [0.5, 0.6], learning_rate=2e-3)
    make(outputs, "one", seed=3, codebook="client")
    table = compare.parameters(compare.groups(["base", "lr"]))
    assert table.to_dict("index") == {"pretrain.learning_rate": {"base": 1e-3, "lr": 2e-3}}
    table = compare.parameters(compare.groups(["base", "one"]))
    assert table.T.to_dict() == {
        "pretrain.seed": {"base": "0, 1", "one": 3},
        "pretrain.codebook": {"base": "federated", "one": "client"},
    }


def test_runs_that_are_no_seeds_of_one_study_are_no_mean(outputs):
    make(outputs, "base-0", accuracy=None, seed=0)
    make(outputs, "base-1", accuracy=None, seed=1, learning_rate=0.01)
    with pytest.raises(records.RunError, match="pretrain.learning_rate"):
        compare.write(compare.groups(["base"]), outputs / "beside")


def test_a_training_whose_clients_do_not_say_how_much_they_heard_has_no_curve_and_hides_none(outputs):
    for number in (1, 2):  # with privacy: client
        row = {"kind": "round", "round": number, "audio_seconds": None, "loss": None}
        files.append_row(make(outputs, f"private-{number}", 0) / "03_pretrain/metrics.jsonl", row)
    make(outputs, "plain")
    groups = compare.groups(["private-1", "plain"])
    assert set(compare.curves(groups).run) == {"plain"}
    assert "No curves of private-1: " in compare.write(groups, outputs / "beside")
    assert "No curves of private-1: " in compare.write(compare.groups(["private-1"]), outputs / "beside")
    assert "No curves" not in compare.write(compare.groups(["plain"]), outputs / "beside")


def test_curves_are_those_on_validation_speech_over_hours_heard(outputs):
    make(outputs, "a")
    make(outputs, "b", rounds=1)
    table = compare.curves(compare.groups(["a", "b"]))
    chosen = table[(table.run == "a") & (table.system == "federated") & (table.measure == "validation_loss")]
    assert chosen.hours.tolist() == [1.0, 2.0, 3.0] and chosen.value.tolist() == [3.0, 2.0, 1.0]
    masked = table[
        (table.run == "a") & (table.system == "centralised") & (table.measure == "validation_accuracy_masked")
    ]
    assert masked["round"].tolist() == [2, 3], "rounds that were not validated have no value"
    assert set(table[table.run == "b"].system) == {"federated", "centralised"}
    make(outputs, "c", rounds=0)
    assert compare.curves(compare.groups(["c"])).empty


def test_curves_beside_a_run_without_validation_are_those_of_training(outputs):
    make(outputs, "a")
    make(outputs, "b")
    for path in (outputs / "b").rglob("metrics.jsonl"):
        rows = [{key: x for key, x in row.items() if "validation" not in key} for row in files.read_rows(path)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = compare.curves(compare.groups(["a", "b"]))
    assert set(table.run) == {"a", "b"} and "loss" in set(table.measure) and "validation_loss" not in set(table.measure)


def test_the_picture_has_a_line_per_run_and_a_band_over_seeds(outputs):
    seeds_of(outputs, "base", [0.5, 0.6])
    make(outputs, "lr")
    figure = plots.comparison(compare.curves(compare.groups(["base", "lr"])))
    panel = figure.axes[0]
    lines = {line.get_label(): line for line in panel.lines}
    assert set(lines) == {"base", "base, centralised", "lr", "lr, centralised"}
    assert lines["base"].get_color() == lines["base, centralised"].get_color() != lines["lr"].get_color()
    assert lines["base"].get_ydata().tolist() == [3.5, 2.5, 1.5, 1.0], "round 4 is of the one seed that has it"
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes if axes.axison)


def test_figures_have_the_interval_of_the_seeds_that_there_are(outputs):
    seeds_of(outputs, "base", [0.5, 0.6, 0.7])
    make(outputs, "one", accuracy=0.4)
    make(outputs, "started", accuracy=None)
    table, notes = compare.figures(compare.groups(["base", "one", "started"]))
    row = table.iloc[0]
    assert row["base"] == str(intervals.measure([0.5, 0.6, 0.7])) and row["one"] == "0.400 ± 0.100"
    assert list(table.index.get_level_values(1)) == ["teacher, federated", "MFCC"] and "started" not in table
    words = " ".join(notes)
    assert "3 training seeds" in words and "2 evaluation seeds" in words and "started: 0 of 1 runs evaluated" in words
    report = json.loads((outputs / "one/05_evaluate/report.json").read_text())
    files.write_json(outputs / "one/05_evaluate/report.json", report | {"data": {"words": ["other"]}})
    assert "other words" in " ".join(compare.figures(compare.groups(["base", "one"]))[1])
    settings = report["parameters"] | {"clusters": 7}
    files.write_json(outputs / "one/05_evaluate/report.json", report | {"parameters": settings})
    assert "settings; figures do not compare" in " ".join(compare.figures(compare.groups(["base", "one"]))[1])
    files.write_json(outputs / "one/05_evaluate/report.json", report)
    assert "do not compare" not in " ".join(compare.figures(compare.groups(["base", "one"]))[1])
    for run, aligner in (("a", "one"), ("b", "one"), ("c", "another")):
        aligned = make(outputs, f"phones-{run}") / "00_corpus"
        (aligned / "params.yaml").write_text(yaml.safe_dump(params.Corpus(alignments="/phones").model_dump()))
        files.write_json(aligned / "done.json", {"files": {"phones.parquet": aligner}, "identity": {"inputs": {}}})
    assert "do not compare" not in " ".join(compare.figures(compare.groups(["phones-a", "phones-b"]))[1])
    assert "do not compare" in " ".join(compare.figures(compare.groups(["phones-a", "phones-c"]))[1])
    (outputs / "base-2/05_evaluate/report.json").unlink()
    assert "base: 2 of 3 runs evaluated so far." in " ".join(compare.figures(compare.groups(["base"]))[1])
    files.write_json(outputs / "base-1/03_pretrain/done.json", {"identity": {"inputs": {}}, "outputs": "now"})
    older = {"identity": {"inputs": {"03_pretrain": "then"}}}
    files.write_json(outputs / "base-1/05_evaluate/done.json", older)
    words = " ".join(compare.figures(compare.groups(["base"]))[1])
    assert "base: 1 of 3 runs" in words and "base-1's report is made from an older 03_pretrain" in words


def test_the_command_prints_and_writes_a_page_that_fetches_nothing(outputs, tmp_path, capsys):
    make(outputs, "a")
    make(outputs, "b", rounds=0, accuracy=None, local_steps=9)
    assert cli.main(["compare", "a", str(outputs / "b")]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("pretrain.local_steps", "0.500 ± 0.100", "b: 0 of 1 runs", "compare.html"))
    assert out.count("\n\n") == 3, "a line between tables"
    folder = outputs / "compare-a-b"
    page = (folder / "compare.html").read_text(encoding="utf-8")
    assert "data:image/png;base64" in page and "<script" not in page and 'src="curves' not in page
    assert "pretrain.local_steps" in page and (folder / "curves.png").stat().st_size > 10_000
    nbformat.validate(nbformat.read(folder / "compare.ipynb", 4))
    assert cli.main(["compare", "b", "--to", str(tmp_path / "x")]) == 0, "nothing to draw yet"
    assert "Empty DataFrame" not in capsys.readouterr().out
    assert not (tmp_path / "x/curves.png").exists() and (tmp_path / "x/compare.html").exists()
    assert cli.main(["compare", "a", "nothing"]) == 2
    with (outputs / "a/03_pretrain/metrics.jsonl").open("a") as rows:
        rows.write("\0\0\n")
    assert cli.main(["compare", "a", "b"]) == 1 and "remove that line" in capsys.readouterr().err
    assert sorted(path.name for path in outputs.iterdir()) == ["a", "b", "compare-a-b"]
