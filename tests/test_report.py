"""The report: all systems on all measures, stable keys, equal for equal runs, a reason for what is missing."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from fedhubert_lib import cli, files, hubert, params, pretrained, records, runner, seeds
from fedhubert_lib.evaluation import extraction, keywords, layers, measures, report, systems, tables, training_seeds
from fedhubert_lib.export import s3prl
from fedhubert_lib.index import results

WORDS = ("yes", "no", "up")


def speech(path, pitches, samples=8_000):
    """A tone per pitch, one after another."""
    time = np.arange(samples) / 16_000
    noise = seeds.numpy_generator(0, path.name).normal(size=samples * len(pitches))
    wave = np.concatenate([0.3 * np.sin(2 * np.pi * pitch * time) for pitch in pitches]) + 0.01 * noise
    soundfile.write(path, wave.astype(np.float32), 16_000)
    return len(wave)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run whose words and phones are pitches, with an untrained teacher and student."""
    folder = tmp_path_factory.mktemp("made") / "run"
    sounds = folder / "00_corpus" / "sounds"
    sounds.mkdir(parents=True)
    files.write_json(folder / "run.json", {})
    clips, manifest, phones = [], [], []
    for speaker in range(6):
        split = ("train", "validation", "test")[speaker % 3]
        for index, word in enumerate(WORDS):
            for take in range(3):
                clip = f"{word}/{speaker}_{take}"
                path = sounds / f"{clip.replace('/', '-')}.wav"
                samples = speech(path, [300 + 300 * index + 20 * speaker, 900])
                row = {"clip": clip, "path": str(path), "word": word, "speaker": str(speaker), "split": split}
                clips.append(row | {"samples": samples, "sample_rate": 16_000})
        utterance = f"{speaker}-0-0"
        order = seeds.numpy_generator(0, speaker).permutation(4)
        path = sounds / f"{utterance}.wav"
        samples = speech(path, [300 + 300 * phone for phone in order])
        row = {"utterance": utterance, "path": str(path), "speaker": str(speaker), "samples": samples}
        manifest.append(row | {"split": "train" if speaker < 4 else "test"})
        phones += [
            {"utterance": utterance, "start_sample": 8_000 * i, "end_sample": 8_000 * (i + 1), "phone": f"p{phone}"}
            for i, phone in enumerate(order)
        ]
    pd.DataFrame(clips).to_parquet(folder / "00_corpus" / "keywords.parquet")
    pd.DataFrame(manifest).to_parquet(folder / "00_corpus" / "manifest.parquet")
    pd.DataFrame(phones).to_parquet(folder / "00_corpus" / "phones.parquet")
    (folder / "01_partition").mkdir()
    pd.DataFrame(manifest)[3:4].to_parquet(folder / "01_partition" / "heldout.parquet")
    for place, seed in (("03_pretrain/checkpoint", 1), ("04_distill/checkpoint", 2)):
        config = hubert.preset("tiny", "logmel", hidden_size=48, intermediate_size=96, num_hidden_layers=seed)
        model = hubert.Hubert(config)
        hubert.initialise(model, seeds.torch_generator(seed))
        pretrained.save(folder / place, model)
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A copy to change. Its clips are read where ``made`` has them."""
    return shutil.copytree(made, tmp_path / "run")


CPU = torch.device("cpu")
P = params.Evaluate(run="run", seeds=2, probe_steps=20, clusters=4, unit_minutes=1.0, device="cpu", fine_tune_steps=2)
SHORT = P.model_copy(update={"seeds": 1, "probe_steps": 2, "fine_tune_steps": 0})


@pytest.fixture(scope="module")
def evaluated(made, tmp_path_factory):
    """A copy that has been evaluated, with results of s3prl; its report, and the progress."""
    run, seen = shutil.copytree(made, tmp_path_factory.mktemp("evaluated") / "run"), []
    teacher = systems.of_run(run, 0, CPU)[0][0]
    for fine_tuned in (False, True):
        leave_s3prl_results(run, teacher.digest, fine_tuned=fine_tuned)
    return run, report.run(run, P, on_progress=lambda *progress: seen.append(progress)), seen


def leave_s3prl_results(run, digest, accuracies=(0.5, 0.7), fine_tuned=False):
    """Results as ``fedhubert s3prl`` leaves them for the teacher, one per seed."""
    kind = "fine-tuned" if fine_tuned else "frozen"
    for seed, accuracy in enumerate(accuracies):
        result = {"system": "teacher", "digest": digest, "words": report.words(run, 0), "test": accuracy}
        result |= {"classes": 11, "fine_tuned": fine_tuned, "steps": 5000, "rate": 1e-3}
        files.write_json(run / "s3prl" / f"teacher-{kind}" / f"seed-{seed}" / "result.json", result)


def names(run, checkpoint=""):
    return [system.name for system in systems.of_run(run, 0, CPU, checkpoint)[0]]


def s3prl_figures(run):
    return [figure for figure in tables.read(run)["figures"] if figure["measure"].startswith("s3prl-")]


def test_report_has_every_system_beside_its_baselines(evaluated):
    _, written, seen = evaluated
    table = tables.figures(written)
    assert list(dict.fromkeys(table.system_name)) == ["teacher", "student", "random", "mfcc", "mfcc-moments"]
    words = table[table.measure_name == "keyword-accuracy"]
    assert len(words) == 5 and (words.seeds == 2).all() and (words.baseline == 1 / 3).all()
    assert words.low[words.value < 1].notna().all(), "of seeds that all have 1 there is no interval"
    moments = table[table.measure_name == "moments-accuracy"]
    assert list(moments.system_name) == ["teacher", "student", "random", "mfcc"] and (moments.seeds == 2).all()
    student = table[table.system_name == "student"].set_index(["measure_name", "layer"])
    assert {layer for name, layer in student.index if name == "pnmi"} == {0, 1, 2}
    assert student.loc[("macs", pd.NA), "value"] > 0
    # The words are pitches: MFCC hears them, and its units are the phones.
    mfcc = table[(table.system_name == "mfcc")].set_index("measure_name").value
    assert mfcc["keyword-accuracy"] > 0.8 and mfcc["pnmi"] > 0.8 and mfcc["phone-accuracy"] > 0.9
    probed = table[table.measure_name == "phone-accuracy"]
    assert list(probed[probed.system_name == "teacher"].layer) == [0, 1] and probed.low.isna().all()  # three speakers
    assert probed.baseline.between(0.1, 0.5).all()  # four phones
    assert ("federated teacher", 54, 54) in seen


def test_report_is_documented_plain_json(evaluated):
    run, written, _ = evaluated
    assert json.loads((run / "05_evaluate" / "report.json").read_text()) == written == tables.read(run)
    assert written["format"] == "fedhubert-report" and written["version"] == 2
    keys = {"system", "measure", "layer", "value", "low", "high", "baseline", "seeds", "values"}
    assert all(set(figure) == keys for figure in written["figures"])
    assert {figure["measure"] for figure in written["figures"]} == set(tables.MEASURES)
    documented = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert all(f"`{key}`" in documented for key in {*written, *keys} - {"format", "version"})
    assert written["absent"] == {
        "centralised": "no checkpoint in 03_pretrain/centralised/checkpoint",
        "centralised-student": "no checkpoint in 04_distill/centralised/checkpoint",
    }
    assert written["data"]["clips"] == {"test": 18, "train": 18, "validation": 18}
    assert written["data"]["units"]["utterances"] == 3  # two of the test subset, one held-out speaker
    assert len(pd.read_csv(run / "05_evaluate" / "report.csv")) == len(written["figures"])
    counts = np.array(written["confusion"]["teacher"])
    assert (counts.sum(1) == 12).all(), "six test clips of each word, by two seeds"
    accuracy = tables.best(written["figures"])["teacher"]["keyword-accuracy"]["value"]
    assert np.trace(counts) / 36 == pytest.approx(accuracy)
    missed = written["missed"]["teacher"]
    assert missed or accuracy == 1
    assert all(clip["word"] != clip["taken_for"] and 1 <= clip["seeds"] <= 2 for clip in missed)


def test_equal_runs_give_equal_reports(evaluated, run):
    first = {name: (evaluated[0] / "05_evaluate" / name).read_bytes() for name in ("report.json", "report.csv")}
    for kept in ("05_evaluate/features", "s3prl"):
        shutil.copytree(evaluated[0] / kept, run / kept)
    features = sorted((run / "05_evaluate" / "features").iterdir())
    features[0].unlink()  # as after a kill in the middle
    report.run(run, P)
    assert first == {name: (run / "05_evaluate" / name).read_bytes() for name in first}


def test_best_figures_are_those_of_the_best_layer(evaluated):
    written = evaluated[1]
    pnmi, purity = [0.2, 0.4, 0.4, 0.6], [0.9, 0.5, 0.8, 1.0]  # the last layer was measured with one seed alone
    accuracy, weights = [0.1, 0.3, 0.2, 0.2], [0.5, 0.2, 0.3, 0.1]
    columns = {"pnmi": pnmi, "phone-purity": purity, "abx-error": accuracy, "layer-weight": weights}
    figures = [
        {"system": "a", "measure": name, "layer": layer, "value": values[layer], "seeds": 1 if layer == 3 else 3}
        for layer in range(4)
        for name, values in columns.items()
    ]
    chosen = {name: figure["layer"] for name, figure in tables.best(figures)["a"].items()}
    assert chosen == {"pnmi": 1, "phone-purity": 1, "abx-error": 0, "layer-weight": 0}
    rows = tables.of_best_layers(written)
    assert rows.groupby("measure_name", sort=False).size().to_dict() == dict(
        zip(tables.HEADLINE, (5, 4, 4, 4, 4), strict=True)
    )


def test_words_are_measured_on_the_layer_that_is_best_on_validation_clips(monkeypatch, tmp_path):
    """Means of layer 0 are good on test clips, those of layer 1 on validation clips, and its frames on test clips."""
    rng, splits = np.random.default_rng(0), ("train", "validation", "test")
    rows = [(f"{word}-{voice}-{take}", word, str(voice)) for word in "abcd" for voice in range(6) for take in range(6)]
    clips = pd.DataFrame(rows, columns=["clip", "word", "speaker"])
    clips["split"] = [splits[int(voice) % 3] for voice in clips.speaker]
    speech = measures.Speech(clips, keywords.task(clips), tmp_path)
    signal = 5 * rng.normal(size=(4, 8))[speech.task.labels]
    moments = rng.normal(size=(len(clips), 2, 2, 8)).astype(np.float32)
    for layer, split in ((0, "test"), (1, "validation")):
        heard = clips.split.isin(["train", split]).to_numpy()
        moments[heard, 0, layer] += signal[heard]
    frames = rng.normal(size=(len(speech.abx_clips), 2, 3, 8))
    frames[:, 1] += signal[speech.abx_clips, None]
    monkeypatch.setattr(extraction, "clips", lambda *_, **__: (moments, frames))
    drawn, original = [], keywords.training_clips
    monkeypatch.setattr(
        keywords, "training_clips", lambda *arguments: (drawn.append(arguments[2]), original(*arguments))[1]
    )
    p = params.Evaluate(run="r", seeds=1, probe_steps=1, train_fraction=0.5)
    result = measures.of_system(systems.System("a", "a", systems.mfcc, "a"), speech, p)
    values = {(figure["measure"], figure["layer"]): figure["value"] for figure in result.figures}
    assert values["layer-accuracy", 0] > 0.9 > 0.5 > values["layer-accuracy", 1]
    assert values["abx-error", 1] < 0.1 and values["moments-accuracy", 1] < 0.5 and values["nearest-accuracy", 1] < 0.5
    assert drawn == [0.5, 0.5]  # by the probe, and by that on moments


def test_units_and_phones_are_those_of_their_layer(tmp_path):
    rng, phones = np.random.default_rng(0), np.arange(300) % 3
    frames = rng.normal(size=(300, 2, 6)).astype(np.float32)
    frames[:, 1] += 8 * rng.normal(size=(3, 6))[phones]
    speech = measures.Speech(pd.DataFrame(), None, tmp_path, pd.DataFrame(), phones, np.repeat(list("abc"), 100))
    result, p = measures.Result("a"), params.Evaluate(run="r", seeds=1, clusters=3)
    measures._units(result, frames, speech, p)
    measures._phones(result, frames, speech, p)
    for name in ("pnmi", "phone-accuracy"):
        first, second = (figure["value"] for figure in result.figures if figure["measure"] == name)
        assert first < 0.6 and second > 0.9, name


def test_tables_show_every_measure_once(evaluated):
    written = evaluated[1]
    wide, below = tables.headline(written), tables.below(written)
    assert list(wide.index) == [system["title"] for system in written["systems"]] and wide.shape[1] == 5
    assert wide.map(len).max().max() <= len("0.500 ± 0.010")  # one line in a cell
    shown = [title for table in [wide, *below] for title in table.columns]
    assert sorted([*shown, *(tables.TITLES[name] for name in ("layer-accuracy", "layer-weight"))]) == sorted(
        tables.TITLES.values()
    )
    shown = results(evaluated[0])
    assert all(title in shown for title in (*wide.index, *wide.columns))
    assert str(evaluated[0] / "05_evaluate" / "report.csv") in shown


def test_student_is_a_fraction_of_its_teacher(evaluated):
    halved = [f | {"value": f["value"] / (1 + (f["system"] == "random"))} for f in evaluated[1]["figures"]]
    written = evaluated[1] | {"figures": halved}
    fractions = tables.student(written).set_index("system").value
    chosen = tables.best(written["figures"])
    student, teacher, random = (chosen[system]["pnmi"]["value"] for system in ("student", "teacher", "random"))
    ratio = (student - random) / (teacher - random)
    assert fractions["PNMI of units"] == ratio and fractions["parameters"] > 1  # two layers after one
    at_zero = [figure | {"value": figure["value"] * (figure["measure"] != "pnmi")} for figure in written["figures"]]
    assert fractions.index.difference(tables.student(written | {"figures": at_zero}).system).tolist() == [
        "PNMI of units"
    ]
    unsure = [figure | {"high": figure["value"] + 1} for figure in written["figures"]]
    assert set(tables.student(written | {"figures": unsure}).measure) == {"cost: fraction of the teacher's"}
    alone = [figure for figure in written["figures"] if figure["system"] != "student"]
    assert tables.student(written | {"figures": alone}).empty
    figures = [figure | {"system": "given-teacher"} for figure in written["figures"] if figure["system"] == "student"]
    assert (tables.student(written | {"figures": written["figures"] + figures}).value == 1).all()


def trained(run, rounds=(1, 2, 3)):
    """Give the teacher of ``run`` rounds and models on the way: the first is another model, the last is the teacher."""
    config = pretrained.load(run / "03_pretrain" / "checkpoint")[0].config
    for number in rounds:
        files.append_row(run / "03_pretrain" / "metrics.jsonl", {"kind": "client", "round": number})
        row = {"kind": "round", "round": number, "audio_seconds": 1800.0}
        files.append_row(run / "03_pretrain" / "metrics.jsonl", row)
        if number & (number - 1) == 0:
            place = run / "03_pretrain" / "checkpoints" / f"model-{number:05d}"
            pretrained.save(place, systems.untrained(config, number))


def test_along_measures_checkpoints_over_hours_and_draws_them(run, evaluated, tmp_path, capsys):
    trained(run)
    written = report.run(run, SHORT.model_copy(update={"along": True}))
    keys = ["system", "round", "hours", "measure", "layer", "value", "low", "high", "values"]
    assert all(list(row) == keys for row in written["along"])
    assert [(row["round"], row["hours"]) for row in written["along"][::4]] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert {row["measure"] for row in written["along"]} == set(tables.ESSENTIALS)
    # The end of the way is the teacher of the table, and its start another model.
    best = tables.best(written["figures"])["teacher"]
    values = {(row["round"], row["measure"]): row["value"] for row in written["along"]}
    assert all(values[3, name] == best[name]["value"] for name in tables.ESSENTIALS)
    assert any(values[1, name] != best[name]["value"] for name in tables.ESSENTIALS)
    drawn = tables.along([written, written | {"run": "other"}])
    assert set(drawn[drawn.hours.isna()].system) == {"random weights", "MFCC"}
    assert len(drawn) == 2 * (3 * 4 + 2 * 4)
    assert tables.along([written | {"along": []}]).empty

    assert cli.main(["along", str(run), "--to", str(tmp_path / "along.png")]) == 0
    assert (tmp_path / "along.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["along", str(evaluated[0])]) == runner.USAGE
    assert "evaluate.along: true" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["table"], ["along"], ["reference", "--to", "toy.json"], ["s3prl"]])
def test_commands_take_the_name_of_a_run(evaluated, command, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDHUBERT_OUTPUTS", str(evaluated[0].parent))
    monkeypatch.setattr(s3prl, "PYTHON", tmp_path / "none")
    assert cli.main([*command, "nothing"]) == runner.USAGE
    assert "nothing: no run of that name" in capsys.readouterr().err
    assert (cli.main([*command, "run"]) == runner.OK) == (command == ["table"])  # others need more than this run has
    said = capsys.readouterr().err
    assert "no run of that name" not in said and "not there" not in said


def test_intervals_over_training_seeds_need_other_weights(evaluated):
    first = evaluated[1]
    second = json.loads(json.dumps(first)) | {"run": "other"}
    with pytest.raises(records.RunError, match="the same teacher"):
        training_seeds.means([first, second])
    for system in second["systems"]:
        system["digest"] += "other"
    for figure in second["figures"]:
        figure["value"] += 0.02 if figure["measure"] == "keyword-accuracy" else 0
    mean = training_seeds.means([first, second])["federated teacher", "keyword-accuracy"]
    value = tables.best(first["figures"])["teacher"]["keyword-accuracy"]["value"]
    assert mean.value == pytest.approx(value + 0.01)
    assert mean.high - mean.value == pytest.approx(12.706 * 0.01, rel=1e-3)  # Student's t of two
    for figure in second["figures"]:
        figure["value"] -= 0.02 if figure["system"] == "mfcc" and figure["measure"] == "keyword-accuracy" else 0
    assert "±" not in str(training_seeds.means([first, second])["MFCC", "keyword-accuracy"]), "it has no training seed"
    assert "over 2 training seeds" in training_seeds.markdown([first, second])
    assert "one training seed, 2 evaluation seeds" in training_seeds.markdown([first])
    second["data"]["words"] = ["yes"]
    with pytest.raises(records.RunError, match="other speech"):
        training_seeds.means([first, second])


def test_table_refuses_runs_that_differ_in_more_than_their_seed(evaluated, tmp_path, capsys):
    assert cli.main(["table", str(evaluated[0])]) == 0
    assert capsys.readouterr().out.count("\n") == 2 + len(evaluated[1]["systems"])
    runs = [shutil.copytree(evaluated[0], tmp_path / name) for name in ("one", "two")]
    command = ["table", *map(str, runs)]
    for number, run in enumerate(runs):
        for stage in ("03_pretrain", "04_distill"):
            (run / stage / "params.yaml").write_text(f"run: {run.name}\nseed: {number}\nengine: pool\nrounds: 40\n")
    assert cli.main(command) == runner.USAGE
    assert "give runs of different seeds" in capsys.readouterr().err
    (runs[1] / "03_pretrain" / "params.yaml").write_text("run: two\nseed: 1\nengine: inprocess\nrounds: 60\n")
    assert cli.main(command) == runner.USAGE
    assert "differ in pretrain.rounds (40, 60)\n" in capsys.readouterr().err
    (runs[1] / "03_pretrain" / "params.yaml").write_text(
        "run: two\nrounds: 40\ncohort_fraction: 0.5\n"
    )  # no longer there
    assert cli.main(command) == runner.USAGE
    assert "differ in pretrain.cohort_fraction (1.0, 0.5)\n" in capsys.readouterr().err
    for number, run in enumerate(runs):  # at places of their own, of other aligners
        (run / "00_corpus" / "params.yaml").write_text(f"run: {run.name}\nalignments: /{run.name}.json\n")
        done = {"files": {"phones.parquet": str(number)}, "identity": {"inputs": {}}}
        files.write_json(run / "00_corpus" / "done.json", done)
    with pytest.raises(records.RunError, match=r"differ in corpus.phones \(0, 1\)"):
        training_seeds.check_one_study(runs)


def test_s3prls_accuracy_joins_the_report_and_goes_with_weights_and_words(evaluated, tmp_path):
    run = shutil.copytree(evaluated[0], tmp_path / "run")
    before = tables.read(run)
    fine_tuned, figure = s3prl_figures(run)
    assert fine_tuned["measure"] == "s3prl-fine-tuned-accuracy"
    assert (figure["system"], figure["values"], figure["baseline"]) == ("teacher", [0.5, 0.7], 1 / 11)
    report.write(run, tables.read(run))
    assert tables.read(run) == before
    assert tables.below(before)[0].loc["federated teacher", "keyword accuracy, s3prl"].startswith("0.600")
    notes = [note for note in before["notes"] if note.startswith("s3prl-")]
    assert notes == [
        "s3prl-fine-tuned-accuracy: teacher-fine-tuned, 5,000 steps at 0.001",
        "s3prl-accuracy: teacher-frozen, 5,000 steps at 0.001",
    ]

    leave_s3prl_results(run, before["systems"][0]["digest"], (0.9,))
    (run / "s3prl" / "teacher-frozen" / "seed-1" / "result.json").unlink()
    shutil.rmtree(run / "s3prl" / "teacher-fine-tuned")
    report.write(run, tables.read(run))
    assert [(figure["measure"], figure["value"]) for figure in s3prl_figures(run)] == [("s3prl-accuracy", 0.9)]
    assert "0.9," in (run / "05_evaluate" / "report.csv").read_text()

    done = {"identity": {"inputs": {}}, "outputs": "tables", "speech": "other words"}
    files.write_json(run / "00_corpus" / "done.json", done)
    report.write(run, tables.read(run))
    assert not s3prl_figures(run) and any("words have changed" in note for note in tables.read(run)["notes"])
    leave_s3prl_results(run, before["systems"][0]["digest"], (0.9,))
    report.write(run, tables.read(run))
    assert s3prl_figures(run)
    leave_s3prl_results(run, "of other weights", (0.9,))
    report.write(run, tables.read(run))
    assert not s3prl_figures(run) and any("teacher or its words" in note for note in tables.read(run)["notes"])


def test_given_teacher_stands_beside_its_student(run):
    config = hubert.preset("tiny", "logmel", hidden_size=96, intermediate_size=96, num_hidden_layers=1)
    pretrained.save(run / "public", systems.untrained(config, 5))
    (run / "04_distill" / "params.yaml").write_text(f"teacher: {run / 'public'}\n")
    compared = {system.name: system for system in systems.of_run(run, 0, CPU)[0]}
    assert "given-teacher" in compared and "teacher" in compared
    assert compared["given-teacher"].model.config == config != compared["random"].model.config
    shutil.move(run / "public", run / "elsewhere")
    systems_there, absent = systems.of_run(run, 0, CPU)
    assert "given-teacher" not in {system.name for system in systems_there} and "gone" in absent["given-teacher"]
    (run / "04_distill" / "params.yaml").write_text('teacher: ""\n')
    assert "given-teacher" not in names(run)


def test_student_that_is_not_done_or_of_an_older_teacher_is_left_out(run):
    (run / "04_distill" / "begun.json").write_text("{}")  # and not done: what lies there may be of other weights
    assert systems.of_run(run, 0, CPU)[1]["student"] == "04_distill is not done"
    files.write_json(run / "03_pretrain" / "done.json", {"outputs": "new", "identity": {"inputs": {}}})
    inputs = {"03_pretrain": "old"}
    files.write_json(run / "04_distill" / "done.json", {"outputs": "x", "identity": {"inputs": inputs}})
    compared, absent = systems.of_run(run, 0, CPU)
    assert [system.name for system in compared] == ["teacher", "random", "mfcc", "mfcc-moments"]
    assert absent["student"] == "04_distill is made from an older 03_pretrain; run it again"


def test_checkpoint_in_shards_is_evaluated_without_any_training(run):
    public = hubert.preset("tiny", "logmel", hidden_size=96, intermediate_size=96, num_hidden_layers=2)
    pretrained.save(run / "other" / "03_pretrain" / "checkpoint", systems.untrained(public, 5))
    folder = run / "other" / "03_pretrain" / "checkpoint"
    tensors = load_file(folder / "model.safetensors")
    shards = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in tensors if shards[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "model.safetensors").unlink()
    p = SHORT.model_copy(update={"checkpoint": str(folder)})
    assert names(run, p.checkpoint)[:4] == ["teacher", "student", "checkpoint", "random"]
    for stage in ("01_partition", "03_pretrain", "04_distill"):
        shutil.rmtree(run / stage)
    written = report.run(run, p)
    titles = [system["title"] for system in written["systems"]]
    assert titles[:3] == ["checkpoint other/03_pretrain", "random weights", "MFCC"] and len(titles) == 4
    assert max(figure["layer"] for figure in written["figures"] if figure["measure"] == "phone-accuracy") == 2
    sizes = [figure["value"] for figure in written["figures"] if figure["measure"] == "bytes"]
    assert sizes == [sum((folder / shard).stat().st_size for shard in set(shards.values()))]
    shard = folder / shards["masked_spec_embed"]
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard)
    assert systems._digest(folder) != written["systems"][0]["digest"], "of other weights, under whatever name"


def test_nothing_to_evaluate_is_refused(run):
    for stage in ("03_pretrain", "04_distill"):
        (run / stage / "checkpoint" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="run 03_pretrain first"):
        report.run(run, P)


def test_student_of_another_architecture_is_an_error_that_names_it(run):
    config = run / "04_distill" / "checkpoint" / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 48', '"hidden_size": 96'))
    with pytest.raises(ValueError, match=r"04_distill/checkpoint/model.safetensors.*does not fit its config"):
        report.run(run, P)


def test_more_clusters_than_frames_are_refused_before_any_work(run):
    with pytest.raises(ValueError, match=r"evaluate.clusters: 400 given, .* has 29[0-9] frames"):
        report.run(run, P.model_copy(update={"clusters": 400}))
    assert not (run / "05_evaluate").exists()


def test_speech_without_phones_is_noted(run):
    (run / "00_corpus" / "phones.parquet").unlink()
    speech, data, notes = report.gather(run, P)
    assert speech.utterances is None and "units" not in data and [note.partition(":")[0] for note in notes] == ["units"]


def test_too_few_clips_and_speakers_are_noted(run):
    path = run / "00_corpus" / "keywords.parquet"
    clips = pd.read_parquet(path)
    clips.assign(speaker=clips["clip"]).to_parquet(path)  # a speaker per clip
    for place in ("00_corpus/manifest.parquet", "01_partition/heldout.parquet"):
        pd.read_parquet(run / place).assign(speaker="one").to_parquet(run / place)
    written = report.run(run, SHORT)
    measured = {figure["measure"] for figure in written["figures"]}
    assert "pnmi" in measured and not {"abx-error", "speaker-accuracy", "phone-accuracy"} & measured
    assert [note.partition(":")[0] for note in written["notes"]] == ["abx", "phones", "voice"]


def test_held_out_speech_is_of_no_training_speaker(run, monkeypatch):
    table, phones = layers.held_out(run, 1.0, 0)
    assert set(table.speaker) == {"3", "4", "5"} and set(phones.utterance) == set(table.utterance)
    assert len(layers.held_out(run, 0.01, 0)[0]) == 1
    assert len({layers.held_out(run, 0.01, seed)[0].utterance[0] for seed in range(9)}) > 1, "drawn by the seed"
    monkeypatch.setattr(layers, "LONGEST", 8_000)
    assert len(layers.held_out(run, 1 / 60, 0)[0]) == 2, "of a long utterance only what is used counts"


@pytest.mark.parametrize("lacking", ["speech", "phones", "phones that are measured"])
def test_without_held_out_speech_or_with_one_phone_alone_units_are_left_out(run, lacking, monkeypatch):
    if lacking == "phones that are measured":  # others come where long utterances are cut
        monkeypatch.setattr(layers, "LONGEST", 6_000)
        path = run / "00_corpus" / "phones.parquet"
        table = pd.read_parquet(path)
        table.loc[table.start_sample == 0, "phone"] = "sil"
        table.to_parquet(path)
    elif lacking == "phones":
        path = run / "00_corpus" / "phones.parquet"
        pd.read_parquet(path).assign(phone="sil").to_parquet(path)
    else:
        for path in (run / "00_corpus" / "manifest.parquet", run / "01_partition" / "heldout.parquet"):
            table = pd.read_parquet(path)
            (table[table.split != "test"] if "manifest" in path.name else table[:0]).to_parquet(path)
    with pytest.raises(layers.NoPhonesError):
        layers.held_out(run, 1.0, 0)


def test_phone_labels_are_laid_out_as_frames(run):
    table, phones = layers.held_out(run, 1.0, 0)
    labels, speakers = layers.phone_labels(table, phones.sample(frac=1, random_state=0))
    counts = layers.frame_counts(table)
    assert len(labels) == len(speakers) == counts.sum()
    first = phones[phones.utterance == table.utterance[0]].phone.to_list()
    # A phone lasts half a second: its frame 25 i + 12 lies in its middle.
    assert [f"p{labels[25 * i + 12]}" for i in range(4)] == first and list(speakers[:99]) == [table.speaker[0]] * 99
    cut = phones[phones.start_sample != 8_000]
    assert (layers.phone_labels(table, cut)[0][30:45] == -1).all()


def test_frames_are_those_of_each_utterance_alone(run, tmp_path):
    encoder = systems.of_run(run, 0, CPU)[0][0].encoder
    table, _ = layers.held_out(run, 1.0, 0)
    rows = extraction.utterances(encoder, table, tmp_path / "all.npy")
    alone = extraction.utterances(encoder, table.iloc[[1]], tmp_path / "alone.npy")
    counts = layers.frame_counts(table)
    assert rows.shape == (counts.sum(), 2, 48)
    assert (rows[counts[0] : counts[0] + counts[1]] == alone).all()


@pytest.mark.parametrize("same", ["centralised", "student"])
def test_same_centralised_teachers_or_students_and_a_given_teacher_that_is_gone(same):
    def one(name, teacher):
        digests = {"teacher": teacher, same: "same"}
        systems = [{"system": system, "digest": digest, "title": system} for system, digest in digests.items()]
        return {"run": name, "data": {"words": []}, "figures": [], "systems": systems}

    with pytest.raises(records.RunError, match=f"the same {same}"):
        training_seeds.means([one("a", "1"), one("b", "2")])
    figure = {"measure": "pnmi", "value": 0.5, "layer": 0, "seeds": 1}
    figures = [figure | {"system": system} for system in ("student", "teacher")]
    assert tables.student({"figures": figures, "absent": {"given-teacher": "gone"}}).empty
    assert tables._text({"measure": "parameters", "value": 23_500_000.0}) == f"23.50{tables.NO_BREAK}M"


def test_units_and_phones_take_each_seed_and_their_own_baseline(monkeypatch, tmp_path):
    seen: dict[str, list[int]] = {"units": [], "phones": []}
    quality = {"pnmi": 0.5, "shuffled_pnmi": 0.1, "phone_purity": 0.7, "cluster_purity": 0.3}
    monkeypatch.setattr(layers, "unit_quality", lambda *_, clusters, seed: seen["units"].append(seed) or quality)
    monkeypatch.setattr(
        measures.probes, "leave_speakers_out", lambda *_, seed, folds: seen["phones"].append(seed) or (0.5, 0.1)
    )
    speakers = np.array(list("abcdabcd"))
    speech = measures.Speech(pd.DataFrame(), None, tmp_path, pd.DataFrame(), np.arange(8) % 2, speakers)
    result, p = measures.Result("a"), params.Evaluate(run="r", seed=5, seeds=3, clusters=2)
    measures._units(result, np.zeros((8, 1, 3), np.float32), speech, p)
    measures._phones(result, np.zeros((8, 1, 3), np.float32), speech, p)
    assert (sorted(seen["units"]), sorted(seen["phones"])) == ([5, 6, 7], [5, 6, 7])
    shown = {figure["measure"]: (figure["value"], figure["baseline"]) for figure in result.figures}
    assert measures._of_seeds(lambda seed: seed, p) == [5, 6, 7], "words, too"
    assert shown["pnmi"] == (0.5, pytest.approx(0.1)) and shown["phone-purity"][1] is None


def test_features_are_kept_by_clips_not_by_words(tmp_path):
    clips = pd.DataFrame({"clip": ["a", "b"], "word": ["x", "y"], "path": ["p", "q"]})
    speech, system = measures.Speech(clips, None, tmp_path), systems.System("s", "s", None, "digest")
    place = speech.features(system, clips)
    assert place == speech.features(system, clips.assign(word="z")) != speech.features(system, clips.assign(path="p"))


def test_a_short_name_shows_no_folder_behind_a_link(tmp_path):
    (tmp_path / "private/grant/checkpoint").mkdir(parents=True)
    (tmp_path / "models/base").mkdir(parents=True)
    (tmp_path / "models/base/checkpoint").symlink_to(tmp_path / "private/grant/checkpoint")
    assert systems.short_name(tmp_path / "models/base/checkpoint") == "models/base"
    assert systems.short_name(tmp_path / "models/base") == "base"


def test_clips_that_most_seeds_got_wrong_come_first_with_what_they_were_taken_for():
    spoken = ["a", "a", "b", keywords.SILENCE, "b"]
    clips = pd.DataFrame({"clip": list("vwxyz"), "word": spoken, "split": "test"})
    task = keywords.task(clips)
    heard = [["a", "b", "b", "a", "a"], ["a", "b", "b", "a", keywords.SILENCE], ["a", "b", "a", "a", keywords.SILENCE]]
    outcomes = [keywords.Outcome(0.0, np.array([task.words.index(word) for word in of_seed]), 0.0) for of_seed in heard]
    result = measures.Result("teacher", outcomes=outcomes)
    counts, missed = report._mistakes(result, measures.Speech(clips, task, ROOT))
    expected = [("w", "a", "b", 3), ("z", "b", keywords.SILENCE, 3), ("x", "b", "a", 1)]
    assert [tuple(clip.values()) for clip in missed] == expected, "of silence there is nothing to listen to"
    silence, a, b = (task.words.index(word) for word in (keywords.SILENCE, "a", "b"))
    assert (counts[a][a], counts[a][b], counts[b][silence], counts[silence][a]) == (3, 3, 2, 3)
