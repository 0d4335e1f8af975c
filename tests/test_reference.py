"""Reference curves and verdicts: which reference belongs to a run, where a curve lies, and the usual causes put in."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import study_curves
import yaml
from conftest import ROOT
from scipy import stats

from fedhubert_lib import cli, diagnosis, files, params, records, reference, studies

RNG = np.random.default_rng(0)
HOURS = np.arange(1, 41) / 10
LOSS = 4.6 - HOURS / 5


def make(run: Path, loss: np.ndarray = LOSS, *changes: str, study: str = "toy") -> Path:
    """The records of a run of ``study`` with ``changes`` that has pretrained with this loss, 0.1 hours a round."""
    loaded = studies.load(ROOT / "params" / f"{study}.yaml", changes, run.name)
    for stage in params.SECTIONS:
        folder = run / params.FOLDERS[stage]
        folder.mkdir(parents=True)
        (folder / "params.yaml").write_text(yaml.safe_dump(getattr(loaded, stage).model_dump()))
    rows = [{"kind": "plan", "rounds": len(loss)}]
    rows += [{"kind": "round", "round": n, "loss": x, "audio_seconds": 360.0} for n, x in enumerate(loss, 1)]
    for row in rows:
        files.append_row(run / "03_pretrain" / "metrics.jsonl", row)
    done = {"git": {"commit": "0123456789"}, "identity": {"inputs": {}}, "outputs": "trained"}
    files.write_json(run / "03_pretrain" / "done.json", done)
    files.write_json(run / "run.json", {"study": study})
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a reference of four seeds of toy, whose losses differ by 0.1."""
    place = tmp_path_factory.mktemp("seeds")
    losses = LOSS + RNG.normal(0, 0.1, (4, len(LOSS)))
    runs = [make(place / f"r{n}", loss, f"pretrain.seed={n}") for n, loss in enumerate(losses)]
    cli.main(["reference", *map(str, runs), "--to", str(place / "references" / "toy.json")])
    return place / "references"


def test_a_reference_is_mean_and_prediction_interval_over_seeds(folder):
    made = reference.read(folder / "toy.json")
    assert (made.study, made.commit, made.seeds) == ("toy", "0123456", [0, 1, 2, 3])
    band = made.curves["pretrain"]["loss"]
    np.testing.assert_allclose(band.hours, HOURS, rtol=1e-3)
    np.testing.assert_allclose(band["mean"], LOSS, atol=0.2)
    losses = LOSS + np.random.default_rng(0).normal(0, 0.1, (4, len(LOSS)))  # rounds of 0.1 h
    medians = [np.median(losses[:, max(0, n - 2) : n + 3], axis=1) for n in range(len(LOSS))]
    variance = np.var(medians, axis=1, ddof=1)
    expected = stats.t.ppf(0.975, 3) * np.sqrt(variance[8:12].mean() * (1 + 1 / 4))
    assert band.band[10] == pytest.approx(expected, rel=1e-3)
    assert str(ROOT) not in (folder / "toy.json").read_text(), "no path of this machine"


@pytest.mark.parametrize(("between_seeds", "between_rounds"), [(0.05, 0.0), (0.02, 0.05), (0.0, 0.05)])
def test_a_band_of_three_seeds_holds_another_seed_and_tells_a_worse_one(between_seeds, between_rounds):
    """Whether seeds differ more or rounds do: a fifth of what is learned above it is seen, but for seeds that differ so
    much that it could be one."""
    rng, hours = np.random.default_rng(1), np.arange(1, 191) / 50

    def curve(shift: float = 0.0) -> pd.DataFrame:
        seed = rng.normal(0, between_seeds) * np.minimum(1, hours) + rng.normal(0, between_rounds, len(hours))
        return pd.DataFrame({"hours": hours, "value": 3.6 + np.exp(-hours / 1.5) + seed + shift})

    outside = {0.0: 0, 0.2: 0}
    for _ in range(100):
        band = reference._band([curve() for _ in range(3)])
        for shift in outside:
            (place,) = reference.positions({"loss": curve(shift)}, {"loss": band})
            outside[shift] += place.place != "inside"
    assert outside[0.0] <= 12 and outside[0.2] >= (35 if between_seeds == 0.05 else 85)


def test_runs_of_which_two_have_one_training_seed_make_no_reference(tmp_path):
    runs = [make(tmp_path / f"r{n}", LOSS + 0.01 * n, f"pretrain.seed={min(n, 1)}") for n in range(3)]
    with pytest.raises(records.RunError, match=r"\[0, 1, 1\].*all of another pretrain.seed"):
        reference.make(runs)


def test_curves_need_the_hours_of_every_round_and_leave_out_a_students_loss(tmp_path):
    """Of hours that one round lacks the later ones are too few; a student's loss holds frames at a falling weight."""
    for stage in ("03_pretrain", "04_distill"):
        for number in (1, 2, 3):
            row = {"kind": "round", "round": number, "loss": 2.0, "validation_loss": 2.0, "audio_seconds": 3600.0}
            files.append_row(tmp_path / stage / "metrics.jsonl", row)
    assert reference.curves(tmp_path, "pretrain").keys() == {"loss", "validation_loss"}
    taught = reference.curves(tmp_path, "distill")
    assert taught.keys() == {"validation_loss"} and taught["validation_loss"].hours.tolist() == [1.0, 2.0, 3.0]
    files.append_row(tmp_path / "03_pretrain/metrics.jsonl", row | {"round": 4, "audio_seconds": None})
    files.append_row(tmp_path / "03_pretrain/metrics.jsonl", row | {"round": 5})
    assert reference.curves(tmp_path, "pretrain") == {}


@pytest.mark.parametrize(
    ("change", "belongs", "word"),
    [
        ("pretrain.seed=9", True, None),
        ("pretrain.learning_rate=0.01", True, "pretrain.learning_rate (0.01, there 0.001)"),
        ("partition.clients=4", True, "partition.clients"),
        ("pretrain.codebook=client", True, "pretrain.codebook"),
        ("evaluate.seeds=1", True, None),
        ("corpus.alignments=phones.json", True, None),
        ("kmeans.clusters=30", False, "kmeans.clusters (30, there 20)"),
        ("pretrain.initial=/a/checkpoint", True, "pretrain.initial (a folder, there nothing)"),
        ("corpus.minutes=3.0", False, "corpus.minutes"),
        ("pretrain.layers=3", False, "pretrain.layers"),
        ("pretrain.front_end=waveform", False, "pretrain.front_end"),
    ],
)
def test_what_is_learned_decides_which_reference_belongs(tmp_path, folder, change, belongs, word):
    chosen, words = reference.of(make(tmp_path / "run", LOSS, change), "pretrain", folder)
    assert (chosen is not None) == belongs
    assert word in words if word else "differs" not in words


def test_phones_of_other_alignments_or_draws_are_not_compared_in_silence(tmp_path):
    changes = "corpus.test_subsets=[]", "corpus.alignments=phones.json"
    mini = make(tmp_path / "mini", LOSS, *changes, study="mini")
    files.write_json(mini / "00_corpus/done.json", {"files": {"phones.parquet": "of an aligner"}, "outputs": ""})
    chosen, words = reference.of(mini, "evaluate")
    assert chosen is None and "corpus.phones (of an aligner, there pocketsphinx)" in words
    assert reference.of(mini, "pretrain")[0] is not None
    chosen, words = reference.of(make(tmp_path / "q", LOSS, "evaluate.seed=1", study="quickstart"), "evaluate")
    assert chosen is not None and "evaluate.seed (1, there 0)" in words


def test_a_copy_of_a_stage_is_no_stage(tmp_path, folder):
    run = make(tmp_path / "run", LOSS, "corpus.kind=librispeech", "corpus.root=/data")
    shutil.copytree(run / "00_corpus", run / "00_corpus-old")
    assert "corpus.kind" in reference.of(run, "pretrain", folder)[1]


@pytest.mark.parametrize(("change", "belongs"), [("clusters=500", False), ("layer=1", False), (None, True)])
def test_clusters_of_a_teachers_layer_are_what_a_student_has_learned(tmp_path, change, belongs):
    band = pd.DataFrame({"hours": [0.1, 0.2], "mean": [2.0, 1.9], "band": [0.1, 0.1]})
    recorded = records.all_parameters(make(tmp_path / "one"))
    made = reference.Reference("toy", "0123456", [0, 1], recorded, {"distill": {"validation_loss": band}})
    reference.write(made, tmp_path / "references" / "toy.json")
    other = make(tmp_path / "other", LOSS, *([f"distill.teacher_{change}"] if change else []))
    assert (reference.of(other, "distill", tmp_path / "references")[0] is not None) == belongs


def test_a_reference_of_one_point_is_compared_with_the_end_of_a_curve():
    one = {"pnmi": pd.DataFrame({"hours": [4.0], "mean": [0.5], "band": [0.05]})}
    curve = {"pnmi": pd.DataFrame({"hours": [1.0, 2.0, 4.0], "value": [0.2, 0.3, 0.4]})}
    (place,) = reference.positions(curve, one)
    assert (place.place, place.since) == ("below", 4.0) and place.worse
    band = {"pnmi": pd.DataFrame({"hours": [1.0, 2.0, 3.0, 4.0], "mean": 0.5, "band": 0.05})}
    curve = {"pnmi": band["pnmi"].assign(value=[0.5, 0.5, 0.7, 0.7])}
    (place,) = reference.positions(curve, band)
    assert (place.place, place.since) == ("above", 3.0) and not place.worse


def test_a_reference_of_a_plain_folder_is_of_its_recordings(tmp_path):
    """No parameter tells one folder from another, nor one checkpoint whose layers are clustered."""

    def recorded(name: str, lists: str, weights: str, seed: int) -> Path:
        changes = ["corpus.kind=folder", f"corpus.root=/data/{name}", "kmeans.features=/models/first"]
        run = make(tmp_path / name, LOSS + 0.01 * seed, f"pretrain.seed={seed}", *changes)
        files.write_json(run / "00_corpus/done.json", {"lists": lists, "identity": {"inputs": {}}, "outputs": ""})
        files.write_json(run / "02_kmeans/begun.json", {"identity": {"inputs": {"features": weights}}})
        return run

    runs = [recorded("a", "speech", "weights", 0), recorded("b", "speech", "weights", 1)]
    reference.write(reference.make(runs), tmp_path / "references" / "own.json")
    with pytest.raises(records.RunError, match=r"corpus\.speech"):
        reference.make([runs[0], recorded("c", "other", "weights", 2)])
    assert reference.of(recorded("d", "speech", "weights", 3), "pretrain", tmp_path / "references")[0] is not None
    for run in (recorded("e", "other", "weights", 4), recorded("f", "speech", "others", 5)):
        assert reference.of(run, "pretrain", tmp_path / "references")[0] is None


def test_of_two_references_of_one_study_the_nearest_belongs(tmp_path, folder):
    text = (folder / "toy.json").read_text()
    (tmp_path / "a.json").write_text(text)
    (tmp_path / "b.json").write_text(text.replace('"kmeans.clusters": 20', '"kmeans.clusters": 30'))
    for clusters in (20, 30):
        run = make(tmp_path / f"run{clusters}", LOSS, f"kmeans.clusters={clusters}")
        chosen, words = reference.of(run, "pretrain", tmp_path)
        assert chosen.parameters["kmeans.clusters"] == clusters and "differs" not in words
    for old, new in (
        ('"pretrain.cohort": 3', '"pretrain.cohort": 2'),
        ('"pretrain.rounds": 2', '"pretrain.rounds": 9'),
    ):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "a.json").write_text(text)
    words = reference.of(make(tmp_path / "run"), "pretrain", tmp_path)[1]
    assert "cohort (3, there 2)" in words, "one that has learned the same is nearer, whatever else differs"


@pytest.mark.parametrize(
    ("loss", "place", "since"),
    [
        (LOSS + 0.05, "inside", 0.1),
        (np.where(HOURS > 2, 4.6, LOSS), "above", 2.1),
        (LOSS - 1, "below", 0.1),
        (LOSS + np.where(np.arange(40) == 39, 2, 0), "inside", 0.1),
    ],
    ids=["another seed", "stops learning", "better", "an outlier at the end"],
)
def test_a_curve_is_inside_above_or_below_and_since_when(tmp_path, folder, loss, place, since):
    run, band = make(tmp_path / "run", loss), reference.read(folder / "toy.json").curves["pretrain"]
    (position,) = reference.positions(reference.curves(run, "pretrain"), band)
    assert position.place == place and position.worse == (place == "above")
    assert since <= position.since <= since + 0.5 * (place == "above") + 0.01
    words = {"inside": "the curves are normal", "above": "worse than normal: loss", "below": "better than normal: loss"}
    assert reference.verdict(run, "pretrain", folder).splitlines()[1] == words[place]


def test_a_run_of_other_length_is_compared_where_both_have_heard(tmp_path, folder):
    band = reference.read(folder / "toy.json").curves["pretrain"]
    longer = np.concatenate([LOSS, LOSS[-2:], np.full(40, 9.0)])  # 5 % more count as the same
    for name, loss in (("longer", longer), ("shorter", LOSS[:10])):
        measured = reference.curves(make(tmp_path / name, loss), "pretrain")
        (position,) = reference.positions(measured, band)
        assert position.place == "inside" and position.value < 5
    later = {"loss": pd.DataFrame({"hours": [0.01], "value": [9.0]})}
    assert not list(reference.positions(later, band)), "the reference begins at 0.1 hours"


def test_only_seeds_of_one_study_make_a_reference(tmp_path):
    one, same = make(tmp_path / "one"), make(tmp_path / "same")
    other = make(tmp_path / "other", LOSS, "pretrain.seed=1", "pretrain.rounds=5")
    none = tmp_path / "none"
    wrong = {"two runs": [one], "pretrain.seed": [one, same], "pretrain.rounds": [one, other], "not done": [one, none]}
    stale = make(tmp_path / "stale", LOSS, "pretrain.seed=1")
    done = {"identity": {"inputs": {"02_kmeans": "an older one"}}, "outputs": "trained"}
    files.write_json(stale / "03_pretrain/done.json", done)
    files.write_json(stale / "02_kmeans/done.json", {"identity": {"inputs": {}}, "outputs": "a newer one"})
    wrong["pretrain is made from an older 02_kmeans"] = [one, stale]
    taught = make(tmp_path / "taught", LOSS, "pretrain.seed=1")
    inputs = {"identity": {"inputs": {"03_pretrain": "an older one"}}, "outputs": "student"}
    files.write_json(taught / "04_distill/done.json", inputs)
    wrong["distill is made from an older 03_pretrain"] = [one, taught]
    for word, runs in wrong.items():
        with pytest.raises(records.RunError, match=word):
            reference.make(runs)


@pytest.mark.parametrize("text", ["[]", "{}", '{"curves": {"pretrain": 3}}', '{"curves": {"pretrain": {"loss": 3}}}'])
def test_a_damaged_reference_is_named(tmp_path, text):
    (tmp_path / "toy.json").write_text(text)
    with pytest.raises(records.RunError, match="toy.json"):
        reference.of(tmp_path, "pretrain", tmp_path)


@pytest.mark.parametrize("study", ["toy", "quickstart", "mini"])
@pytest.mark.parametrize("stage", ["pretrain", "distill", "evaluate"])
def test_a_study_as_it_ships_has_the_reference_that_ships(tmp_path, study, stage):
    """A change of a study or of a default makes its reference one of something else: make it anew."""
    changes = ["corpus.test_subsets=[]"] if study == "mini" else []
    chosen, words = reference.of(make(tmp_path / "run", LOSS, *changes, study=study), stage)
    assert chosen is not None and chosen.study == study and "differs" not in words, words


def test_without_a_reference_or_records_the_verdict_says_so(tmp_path):
    run = make(tmp_path / "run", LOSS, "pretrain.server=fedadam")
    assert "no reference curves" in reference.verdict(run, "pretrain", tmp_path)
    private = make(tmp_path / "private")
    rows = [{"kind": "round", "round": 1, "loss": None, "audio_seconds": None}]
    (private / "03_pretrain" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert reference.curves(private, "pretrain") == {} and diagnosis.causes(private) == []


@pytest.mark.parametrize(("rise", "accused"), [(0.0, False), (0.3, True)])
def test_noise_of_rounds_of_few_clients_is_no_rate_that_is_too_high(tmp_path, rise, accused):
    loss = np.linspace(2.9, 2.4, 200) + np.random.default_rng(1).normal(0, 0.08, 200) + np.linspace(0, 3 * rise, 200)
    loss[0] = 3.08  # fresh weights: above ln 20
    run = make(tmp_path / "run", loss)
    rounds = pd.DataFrame(files.rounds(run / "03_pretrain" / "metrics.jsonl"))
    assert bool(diagnosis._rate({"learning_rate": 0.1}, [], rounds, np.full(20, 0.05))) == accused


def test_a_loss_that_rises_again_is_told_with_its_round():
    loss = [3.0, 2.4, 2.0, 2.1, 2.3, 2.25]
    rounds = pd.DataFrame({"round": range(1, 7), "loss": loss})
    told = diagnosis._rate({"learning_rate": 0.1}, [], rounds, np.full(20, 0.05))
    assert "0.30" in told and "round 5" in told and "round 6" not in told
    assert not diagnosis._rate({"learning_rate": 0.1}, [], rounds[:4].assign(loss=loss[:3] + [2.08]), None)


@pytest.mark.parametrize(
    ("head", "loss", "accuracy", "shown"),
    [
        ("shared", 2.30, 0.1, True),
        ("shared", 2.30, 0.2, False),
        ("shared", 1.90, 0.1, False),
        ("personal", 2.30, 0.1, False),
    ],
)
def test_a_plateau_has_loss_and_accuracy_of_guessing(tmp_path, head, loss, accuracy, shown):
    """Of ten labels, all as frequent. A personal head guesses by its client's frequencies, which nobody knows."""
    run = make(tmp_path / "run", np.full(3, loss), f"pretrain.head={head}")
    row = {"kind": "round", "round": 4, "loss": loss, "accuracy_masked": accuracy, "accuracy_unmasked": 0.3}
    files.append_row(run / "03_pretrain" / "metrics.jsonl", row)
    (folder := run / "02_kmeans" / "codebooks" / "federated").mkdir(parents=True)
    np.save(folder / "counts.npy", np.ones(10))
    assert [cause.startswith(WORDS["plateau"]) for cause in diagnosis.causes(run)] == [True] * shown


@pytest.mark.parametrize(("lag", "side"), [(5, "before"), (-5, "after")])
def test_labels_after_their_audio_fit_what_was_before_them(tmp_path, monkeypatch, lag, side):
    monkeypatch.setattr(diagnosis, "agreement", lambda *place: pd.Series({0: 0.3, lag: 0.8}))
    told = diagnosis._shifted(tmp_path, {"codebook": "federated"}, pd.Series(), None)
    assert all(word in told for word in ("80%", f"100 ms {side}", "30%"))


@pytest.mark.parametrize(("head", "same", "shown"), [("shared", 0.3, 1), ("shared", 0.6, 0), ("personal", 0.3, 0)])
def test_codebooks_that_disagree_are_told_under_a_shared_head(tmp_path, head, same, shown):
    files.write_json(tmp_path / "02_kmeans/quality.json", {"codebooks": {"client": {"agreement_same": same}}})
    rows = [{"kind": "client", "client": name, "accuracy_masked": x} for name, x in (("a", 0.1), ("b", 0.2))]
    told = diagnosis._codebooks(tmp_path, {"head": head, "codebook": "client"}, rows)
    assert ("30% of the same frames" in told and "0.100 to 0.200" in told) == shown


WORDS = {
    "plateau": "plateau at the commonest label",
    "shifted": "labels shifted against the audio",
    "rate": "learning rate too high",
    "codebooks": "client codebooks under a shared head",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that were trained on real, if small, data: normal ones, and one with each cause put in."""
    pytest.importorskip("espeakng_loader", reason="needs the extra fedhubert[synthetic]")
    return study_curves.make(tmp_path_factory.mktemp("curves"))


@pytest.mark.slow
@pytest.mark.parametrize("cause", WORDS)
def test_each_usual_cause_is_found_where_it_was_put_in(trained, cause):
    verdict = reference.verdict(trained[cause], "pretrain", trained[cause].parent / "reference")
    shown = {name for name, words in WORDS.items() if words in verdict}
    assert cause in shown and shown <= {cause, "plateau"}, verdict  # too high a rate ends on the plateau


@pytest.mark.slow
def test_a_normal_run_has_no_cause(trained):
    run = trained["seed-0"]
    assert "the curves are normal" in reference.verdict(run, "pretrain", run.parent / "reference")
    assert diagnosis.causes(run) == []


@pytest.mark.slow
def test_the_audio_says_by_how_much_labels_are_shifted(trained):
    right, late = (diagnosis.agreement(trained[name], "federated") for name in ("seed-0", "shifted"))
    assert right.idxmax() == 0 and late.idxmax() == study_curves.SHIFT
    assert right.max() > 0.7 > 2 * right.drop(0).min() and diagnosis.agreement(trained["codebooks"], "client") is None


@pytest.mark.slow
def test_without_audio_the_accuracies_tell_shifted_labels(trained, monkeypatch):
    """In a real federation audio and labels are on other machines."""
    monkeypatch.setattr(diagnosis, "agreement", lambda *place: None)
    assert [WORDS["shifted"] in " ".join(diagnosis.causes(trained[name])) for name in ("seed-0", "shifted")] == [0, 1]


@pytest.mark.parametrize(("weight", "found"), [(1.0, 1), (0.0, 0)])
def test_accuracies_tell_shifted_labels_where_unmasked_frames_are_learned(tmp_path, weight, found):
    """With the published loss unmasked accuracy is below the masked one in half of all trainings on right labels."""
    run = make(tmp_path / "run", LOSS, f"pretrain.unmasked_weight={weight}")
    accuracies = {"accuracy_masked": 0.2, "accuracy_unmasked": 0.1}
    files.append_row(run / "03_pretrain" / "metrics.jsonl", {"kind": "round", "round": 41, "loss": 3.0, **accuracies})
    (folder := run / "02_kmeans" / "codebooks" / "federated").mkdir(parents=True)
    np.save(folder / "counts.npy", np.ones(100))
    assert sum(WORDS["shifted"] in cause for cause in diagnosis.causes(run)) == found


def test_a_reference_of_runs_that_were_not_all_evaluated_on_the_way_has_their_ends(tmp_path):
    """The end of the one is beside the end of the other, not beside its beginning."""
    runs = [make(tmp_path / f"r{n}", LOSS, f"pretrain.seed={n}") for n in (0, 1)]
    way = [{"system": "teacher", "measure": "pnmi", "hours": hours, "value": hours / 10} for hours in (1.0, 2.0, 4.0)]
    for run, value, along in zip(runs, (0.40, 0.44), (way, []), strict=True):
        figure = {"system": "teacher", "measure": "pnmi", "layer": 1, "seeds": 1, "value": value}
        files.write_json(run / "05_evaluate" / "report.json", {"figures": [figure], "along": along})
        evaluated = {"identity": {"inputs": {"03_pretrain": "trained"}}, "outputs": "evaluated"}
        files.write_json(run / "05_evaluate" / "done.json", evaluated)
    made = reference.make(runs).curves["evaluate"]["pnmi"]
    assert made[["hours", "mean"]].to_numpy().tolist() == [[pytest.approx(4.0), pytest.approx(0.42)]]
    trained = records.read_json(runs[0] / "03_pretrain" / "done.json") | {"outputs": "trained again"}
    files.write_json(runs[0] / "03_pretrain" / "done.json", trained)
    with pytest.raises(FileNotFoundError, match="report.json: made from an older 03_pretrain; run 05_evaluate"):
        reference.make(runs)
