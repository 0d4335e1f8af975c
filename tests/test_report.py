"""The report: all systems on all measures, stable keys, equal for equal runs, honest about what is missing."""

import itertools
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from fedhubert_lib import cli, files, hubert, params, pretrained, seeds
from fedhubert_lib.evaluation import encoders, keywords, layers, measures, report, systems, tables

WORDS = ("yes", "no", "up")


def speech(path, pitches, samples=8_000):
    """A tone per pitch, one after another."""
    time = np.arange(samples) / 16_000
    noise = seeds.numpy_generator(0, path.name).normal(size=samples * len(pitches))
    wave = np.concatenate([0.3 * np.sin(2 * np.pi * pitch * time) for pitch in pitches]) + 0.01 * noise
    soundfile.write(path, wave.astype(np.float32), 16_000)
    return len(wave)


@pytest.fixture(autouse=True)
def few_triplets(monkeypatch):
    monkeypatch.setattr(measures, "ABX_TRIPLETS", 50)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run whose words and phones are pitches, with an untrained teacher and student."""
    folder = tmp_path_factory.mktemp("made") / "run"
    sounds = folder / "00_corpus" / "sounds"
    sounds.mkdir(parents=True)
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


@pytest.fixture(scope="module")
def evaluated(made, tmp_path_factory):
    """A copy that has been evaluated, its table, and the progress that was shown."""
    run, seen = shutil.copytree(made, tmp_path_factory.mktemp("evaluated") / "run"), []
    config = hubert.preset("tiny", "logmel", hidden_size=48, intermediate_size=96, num_hidden_layers=1)
    for seed, place in itertools.product((9, 10), ("hubert/{}", "hubert/{}/centralised", "untrained/{}")):
        student = encoders.untrained(config, len(place) + seed)
        pretrained.save(run / "04_distill" / "compared" / place.format(seed) / "checkpoint", student)
    teacher = systems.of_run(run, 0, torch.device("cpu"))[0][0]
    for fine_tuned in (False, True):
        said_by_s3prl(run, teacher.digest, fine_tuned=fine_tuned)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "ABX_TRIPLETS", 50)
        return run, report.run(run, P, on_progress=lambda *what: seen.append(what)), seen


def said_by_s3prl(run, digest, accuracies=(0.5, 0.7), fine_tuned=False):
    """Results as ``fedhubert s3prl`` leaves them for the teacher, a seed each."""
    kind = "fine-tuned" if fine_tuned else "frozen"
    for seed, accuracy in enumerate(accuracies):
        result = {"system": "teacher", "digest": digest, "test": accuracy, "classes": 11, "fine_tuned": fine_tuned}
        files.write_json(run / "s3prl" / f"teacher-{kind}" / f"seed-{seed}" / "result.json", result)


P = params.Evaluate(run="run", seeds=2, probe_steps=20, clusters=4, unit_minutes=1.0, device="cpu", fine_tune_steps=2)


def test_a_student_stands_beside_the_teacher_that_it_had(run, made):
    given = hubert.preset("tiny", "logmel", hidden_size=96, intermediate_size=96, num_hidden_layers=1)
    pretrained.save(run / "public", encoders.untrained(given, 5))
    (run / "04_distill" / "params.yaml").write_text(f"teacher: {run / 'public'}\n")
    found, _ = systems.of_run(run, 0, torch.device("cpu"))
    names = [each.name for each in found]
    assert systems.teacher_of(names) == "given-teacher" and "teacher" in names
    (own,) = [each for each in found if each.name == "given-teacher"]
    assert own.model.config == given and found[names.index("random")].model.config != given
    (run / "04_distill" / "params.yaml").write_text('teacher: ""\n')
    assert systems.teacher_of([each.name for each in systems.of_run(run, 0, torch.device("cpu"))[0]]) == "teacher"


def test_every_system_stands_beside_its_baselines(evaluated):
    _, table, seen = evaluated
    assert list(dict.fromkeys(table.system_name)) == ["teacher", "student", "random", "mfcc", "mfcc-moments"]
    assert table[table.measure_name == "keyword-accuracy"].shape[0] == 5
    words = table[table.measure_name == "keyword-accuracy"]
    assert (words.seeds == 2).all() and words.low.notna().all() and (words.baseline == 1 / 3).all()
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


def test_report_is_stable_documented_and_plain_json(evaluated):
    run, _, _ = evaluated
    written = json.loads((run / "05_evaluate" / "report.json").read_text())
    assert written["format"] == "fedhubert-report" and written["version"] == 1
    assert list(written) == [
        *("format", "version", "run", "seed", "parameters", "data", "systems", "absent", "measures", "figures"),
        *("along", "compared", "confusion", "missed", "notes"),
    ]
    keys = ["system", "measure", "layer", "value", "low", "high", "baseline", "seeds", "values"]
    assert all(list(figure) == keys for figure in written["figures"])
    assert {figure["measure"] for figure in written["figures"]} == set(report.MEASURES)
    assert all(f"``{key}``" in report.__doc__ for key in (*list(written)[2:], *keys[3:]))
    assert written["absent"] == {
        "centralised": "no checkpoint in 03_pretrain/centralised/checkpoint",
        "centralised-student": "no checkpoint in 04_distill/centralised/checkpoint",
    }
    assert written["data"]["clips"] == {"test": 18, "train": 18, "validation": 18}
    assert written["data"]["units"]["utterances"] == 3  # two of the test subset, one held-out speaker
    table = pd.read_csv(run / "05_evaluate" / "report.csv")
    assert len(table) == len(written["figures"])
    assert np.sum(written["confusion"]["teacher"]) == 2 * 18


def test_equal_runs_give_equal_reports(evaluated, run):
    first = {name: (evaluated[0] / "05_evaluate" / name).read_bytes() for name in ("report.json", "report.csv")}
    for kept in ("05_evaluate/features", "04_distill/compared", "s3prl"):
        shutil.copytree(evaluated[0] / kept, run / kept)
    features = sorted((run / "05_evaluate" / "features").iterdir())
    features[0].unlink()  # as after a kill in the middle
    report.run(run, P)
    assert first == {name: (run / "05_evaluate" / name).read_bytes() for name in first}


def trained(run, rounds=(1, 2, 3)):
    """Give the teacher of ``run`` rounds and models on the way: the first is another model, the last is the teacher."""
    config = pretrained.load(run / "03_pretrain" / "checkpoint")[0].config
    for number in rounds:
        files.append_row(run / "03_pretrain" / "metrics.jsonl", {"kind": "client", "round": number})
        row = {"kind": "round", "round": number, "audio_seconds": 1800.0}
        files.append_row(run / "03_pretrain" / "metrics.jsonl", row)
        if number & (number - 1) == 0:
            place = run / "03_pretrain" / "checkpoints" / f"model-{number:05d}"
            pretrained.save(place, encoders.untrained(config, number))


def test_checkpoints_on_the_way_tell_quality_over_hours(run):
    trained(run)
    report.run(run, P.model_copy(update={"along": True}))
    written = report.read(run)
    keys = ["system", "round", "hours", "measure", "layer", "value", "low", "high", "values"]
    assert all(list(each) == keys for each in written["along"])
    assert [(each["round"], each["hours"]) for each in written["along"][::4]] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert {each["measure"] for each in written["along"]} == set(measures.ESSENTIALS)
    # The end of the way is the teacher of the table, and its start another model.
    best = tables.best(tables.figures(written)).set_index(["system_name", "measure_name"]).value
    values = {(each["round"], each["measure"]): each["value"] for each in written["along"]}
    assert all(values[3, name] == best["teacher", name] for name in measures.ESSENTIALS)
    assert any(values[1, name] != best["teacher", name] for name in measures.ESSENTIALS)
    drawn = tables.along([written, written | {"run": "other"}])
    assert set(drawn[drawn.hours.isna()].system) == {"random weights", "MFCC"}
    assert len(drawn) == 2 * (3 * 4 + 2 * 4)
    assert tables.along([written | {"along": []}]).empty


def test_intervals_over_training_seeds_need_other_weights_and_like_measures(evaluated, capsys):
    first = report.read(evaluated[0])
    second = json.loads(json.dumps(first)) | {"run": "other"}
    with pytest.raises(tables.DifferentRunsError, match="the same teacher"):
        tables.over_training_seeds([first, second])
    for each in second["systems"]:
        each["digest"] += "other"
    for each in second["figures"]:
        each["value"] += 0.02 if each["measure"] == "keyword-accuracy" else 0
    values = tables.over_training_seeds([first, second])
    one = next(each for each in first["figures"] if each["measure"] == "keyword-accuracy")
    pair = values["federated teacher", "keyword-accuracy"]
    assert pair.mean == pytest.approx(one["value"] + 0.01) and pair.over == "training seeds"
    assert pair.interval == pytest.approx(12.706 * 0.01, rel=1e-3)  # Student's t of two
    assert "over 2 training seeds" in tables.markdown([first, second])
    assert "one training seed, 2 evaluation seeds" in tables.markdown([first])
    assert cli.main(["table", str(evaluated[0])]) == 0
    assert capsys.readouterr().out.count("\n") == 2 + len(first["systems"])
    assert cli.main(["table", str(evaluated[0]), str(evaluated[0])]) == 1
    assert "give runs of different seeds" in capsys.readouterr().err
    second["parameters"] |= {"clusters": 9}
    with pytest.raises(tables.DifferentRunsError, match="other: measured otherwise than run: clusters differ"):
        tables.over_training_seeds([first, second])


def test_the_picture_of_hours_heard_is_drawn_of_runs_that_have_it(run, evaluated, tmp_path, capsys):
    trained(run)
    report.run(run, P.model_copy(update={"along": True}))
    assert cli.main(["along", str(run), "--to", str(tmp_path / "along.png")]) == 0
    assert (tmp_path / "along.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["along", str(evaluated[0])]) == 1
    assert "set evaluate.along: true" in capsys.readouterr().err


def test_compared_students_stand_between_their_teacher_and_the_floors(evaluated):
    written = report.read(evaluated[0])
    keys = ["objective", "training", "measure", "value", "low", "high", "values"]
    assert all(list(each) == keys and len(each["values"]) == 2 for each in written["compared"])
    known = {(each["objective"], each["training"], each["measure"]): each["values"] for each in written["compared"]}
    trained = {("hubert", "federated"), ("hubert", "centralised"), ("untrained", "none")}
    assert set(known) == {(*each, name) for each in trained for name in ("keyword-accuracy", "pnmi", "phone-accuracy")}
    table = tables.comparison(written)
    assert list(table.system.unique()) == ["teacher", "hubert, federated", "hubert, centralised", "untrained", "MFCC"]
    kept = tables.kept(written)
    ratio = np.divide(*(known["hubert", each, "pnmi"] for each in ("federated", "centralised")))
    assert kept.loc[("hubert", "PNMI of units"), "of the centralised student's"].startswith(f"{ratio.mean():.3f} ±")
    teacher = max(
        each["value"] for each in written["figures"] if (each["system"], each["measure"]) == ("teacher", "pnmi")
    )
    share = np.mean(known["hubert", "federated", "pnmi"]) / teacher
    assert kept.loc[("hubert", "PNMI of units"), "of the teacher's"].startswith(f"{share:.3f} ±")
    # Seeds are numbers: 9 comes before 10.
    assert [each.name[-2:] for each in systems.compared(evaluated[0], torch.device("cpu"))["hubert", "federated"]] == [
        " 9",
        "10",
    ]
    assert tables.comparison(written | {"compared": []}).empty and tables.kept(written | {"compared": []}).empty


def test_s3prls_accuracy_joins_the_report_and_goes_with_the_weights(evaluated, tmp_path):
    run = shutil.copytree(evaluated[0], tmp_path / "run")
    before = report.read(run)
    [figure] = [each for each in before["figures"] if each["measure"] == "s3prl-accuracy"]
    assert (figure["system"], figure["values"], figure["baseline"]) == ("teacher", [0.5, 0.7], 1 / 11)
    table = report.add_s3prl(run)
    shown = tables.below(table)[0].loc["federated teacher"]
    assert report.read(run) == before and shown["keyword accuracy, s3prl"].startswith("0.600\N{NO-BREAK SPACE}±")

    said_by_s3prl(run, before["systems"][0]["digest"], (0.9,))
    (run / "s3prl" / "teacher-frozen" / "seed-1" / "result.json").unlink()
    shutil.rmtree(run / "s3prl" / "teacher-fine-tuned")
    report.add_s3prl(run)
    found = [each for each in report.read(run)["figures"] if each["measure"].startswith("s3prl-")]
    assert [(each["measure"], each["value"]) for each in found] == [("s3prl-accuracy", 0.9)]

    said_by_s3prl(run, "of other weights", (0.9,))
    report.add_s3prl(run)
    assert not [each for each in report.read(run)["figures"] if each["measure"].startswith("s3prl-")]
    assert any("teacher has changed since" in note for note in report.read(run)["notes"])


def test_tables_hold_every_measure_with_one_line_in_a_cell(evaluated):
    _, table, _ = evaluated
    wide = tables.headline(table)
    assert list(wide.index) == list(dict.fromkeys(table.system)) and wide.shape[1] == 5
    assert wide.map(len).max().max() <= len("0.500 ± 0.010")  # one line in a cell
    shown = {title for each in [wide, *tables.below(table)] for title in each.columns}
    of_layers = {"keyword accuracy, one layer", "share of the layer"}
    assert shown | of_layers == set(table.measure)  # what is not in the headline stands below


def test_without_phones_units_are_noted_not_invented(run):
    (run / "00_corpus" / "phones.parquet").unlink()
    table = report.run(run, P)
    assert not {"pnmi", "phone-accuracy"} & set(table.measure_name)
    notes = json.loads((run / "05_evaluate" / "report.json").read_text())["notes"]
    assert len(notes) == 1 and notes[0].startswith("units: no utterance")


def test_units_of_trained_on_speech_are_never_used(run):
    table, phones = layers.held_out(run, 1.0, 0)
    assert set(table.speaker) == {"3", "4", "5"} and set(phones.utterance) == set(table.utterance)
    assert len(layers.held_out(run, 0.01, 0)[0]) == 1


def test_without_a_teacher_there_is_nothing_to_evaluate(run):
    (run / "03_pretrain" / "checkpoint" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="run 03_pretrain first"):
        report.run(run, P)


def test_a_teacher_alone_is_evaluated(run):
    (run / "04_distill" / "begun.json").write_text("{}")  # and not done: what lies there may be of other weights
    table = report.run(run, P)
    assert list(dict.fromkeys(table.system_name)) == ["teacher", "random", "mfcc", "mfcc-moments"]
    assert report.read(run)["absent"]["student"] == "04_distill is not done"


def test_a_checkpoint_is_evaluated_without_any_training(run):
    public = hubert.preset("tiny", "logmel", hidden_size=96, intermediate_size=96, num_hidden_layers=2)
    pretrained.save(run / "public", encoders.untrained(public, 5))
    p = P.model_copy(update={"checkpoint": str(run / "public")})
    beside, _ = systems.of_run(run, 0, torch.device("cpu"), p.checkpoint)
    assert [each.name for each in beside][:4] == ["teacher", "student", "checkpoint", "random"]
    for stage in ("01_partition", "03_pretrain", "04_distill"):
        shutil.rmtree(run / stage)
    table = report.run(run, p)
    assert list(dict.fromkeys(table.system)) == ["checkpoint public", "random weights", "MFCC", *table.system[-1:]]
    assert table.set_index("measure_name").layer.loc["phone-accuracy"].max() == 2


def test_student_of_another_architecture_is_an_error_that_names_it(run):
    config = run / "04_distill" / "checkpoint" / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 48', '"hidden_size": 96'))
    with pytest.raises(ValueError, match=r"04_distill/checkpoint/model.safetensors.*another shape"):
        report.run(run, P)


def test_too_few_clips_for_a_measure_are_noted(run):
    path = run / "00_corpus" / "keywords.parquet"
    clips = pd.read_parquet(path)
    clips["speaker"] = clips["clip"]  # a speaker per clip
    clips.to_parquet(path)
    table = report.run(run, P)
    assert not {"abx-error", "speaker-accuracy"} & set(table.measure_name)
    notes = json.loads((run / "05_evaluate" / "report.json").read_text())["notes"]
    assert [note.partition(":")[0] for note in notes] == ["abx", "voice"]


def test_phones_of_frames_are_laid_out_as_frames(run):
    table, phones = layers.held_out(run, 1.0, 0)
    labels, speakers = layers.phone_labels(table, phones.sample(frac=1, random_state=0))
    assert len(labels) == len(speakers) == layers.frame_counts(table).sum()
    first = phones[phones.utterance == table.utterance[0]].phone.to_list()
    own = labels[: layers.frame_counts(table)[0]]
    # A phone lasts half a second: its frame 25 i + 12 lies in its middle.
    assert [f"p{own[25 * i + 12]}" for i in range(4)] == first and list(speakers[:99]) == [table.speaker[0]] * 99
    cut = phones[phones.start_sample != 8_000]
    assert (layers.phone_labels(table, cut)[0][30:45] == -1).all()


def test_one_speaker_is_too_few_for_the_phone_probe(run):
    for place in ("00_corpus/manifest.parquet", "01_partition/heldout.parquet"):
        pd.read_parquet(run / place).assign(speaker="one").to_parquet(run / place)
    table = report.run(run, P)
    assert "pnmi" in set(table.measure_name) and "phone-accuracy" not in set(table.measure_name)
    assert any(each.startswith("phones: leaving speakers out needs") for each in report.read(run)["notes"])


def test_frames_are_those_of_each_utterance_alone(run, tmp_path):
    compared, _ = systems.of_run(run, 0, torch.device("cpu"))
    table, _ = layers.held_out(run, 1.0, 0)
    rows = layers.frames(compared[0].encoder, table, tmp_path / "all.npy")
    one = layers.frames(compared[0].encoder, table.iloc[[1]], tmp_path / "one.npy")
    counts = layers.frame_counts(table)
    assert rows.shape == (counts.sum(), 2, 48)
    assert (rows[counts[0] : counts[0] + counts[1]] == one).all()


def test_more_clusters_than_frames_is_refused(run):
    with pytest.raises(ValueError, match="raise unit_minutes"):
        layers.unit_quality(np.zeros((5, 2), np.float32), None, None, clusters=6, seed=0)


def test_clips_are_read_from_the_runs_own_table(run):
    assert list(keywords.read_clips(run / "00_corpus" / "keywords.parquet").word.unique()) == ["no", "up", "yes"]
