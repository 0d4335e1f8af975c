"""The figures: they draw the data they are given; axes are labelled; files are reproducible."""

import itertools
import subprocess
import sys

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from fedhubert_lib import plots, skew
from fedhubert_lib.plots import training

RNG = np.random.default_rng(0)


def manifest(utterances: int = 60, speakers: int = 6) -> pd.DataFrame:
    speaker = np.arange(utterances) % speakers
    return pd.DataFrame(
        {
            "utterance": [f"u{i}" for i in range(utterances)],
            "speaker": [f"{s:04d}" for s in speaker],
            "sex": np.where(speaker % 2, "F", "M"),
            "samples": RNG.integers(16_000, 160_000, utterances),
            "sample_rate": 16_000,
            "split": np.where(speaker < speakers - 1, "train", "test"),
        }
    )


def metrics(rounds: int, clients: int) -> list[dict]:
    rows = []
    for r in range(1, rounds + 1):
        common = {"round": r, "loss": 3 / r, "accuracy_masked": 0.1 * r, "accuracy_unmasked": 0.2 * r}
        ledger = {"learning_rate": 1e-3, "update_norm": 1.0, "bytes_up": 10**6, "bytes_down": 2 * 10**6}
        rows.append({"kind": "round", **common, **ledger, "audio_seconds_per_second": 100.0, "peak_memory_bytes": 1e9})
        rows += [{"kind": "client", "client": f"c{c}", **common} for c in range(clients)]
    return rows


PHONES = pd.DataFrame({"start_sample": [0, 4000, 9000], "end_sample": [4000, 9000, 16_000], "phone": ["sil", "a", "b"]})
CLIENTS = [f"client-{i:03d}" for i in range(3)]
SQUARE = pd.DataFrame(RNG.random((3, 3)), CLIENTS, CLIENTS)


def holdings(clients: list[str]) -> pd.DataFrame:
    table = manifest(4 * len(clients), len(clients)).assign(text="THREE WORDS HERE")
    return skew.clients(table, np.arange(len(table)) % len(clients)).set_axis(clients)


def hours_table() -> pd.DataFrame:
    rows = [("a", "teacher", 1.0, 0.2), ("a", "teacher", 2.0, 0.4), ("a", "MFCC", np.nan, 0.3)]
    rows += [("b", "teacher", 1.1, 0.3), ("b", "teacher", 2.1, 0.6), ("b", "MFCC", np.nan, 0.3)]
    return pd.DataFrame([(*row, "PNMI") for row in rows], columns=["run", "system", "hours", "value", "measure"])


def trainings() -> pd.DataFrame:
    common = {"stage": "Pretraining", "system": "federated", "measure": "validation_accuracy_masked"}
    rows = [("a", "a-0", 1, 0.1), ("a", "a-1", 1, 0.3), ("b", "b", 1, 0.2), ("b", "b", 2, 0.4)]
    return pd.DataFrame(rows, columns=["run", "member", "round", "value"]).assign(hours=lambda t: t["round"], **common)


def pictures() -> dict[str, Figure]:
    """One call of every function that draws."""
    table = manifest()
    waveform, labels = 0.1 * torch.randn(16_000, generator=torch.Generator().manual_seed(0)), np.arange(49) % 5
    joint = pd.DataFrame(RNG.integers(0, 50, (6, 5)), list("abcdef"))
    result = pd.DataFrame(
        [(s, m, 0.5, 0.4, 0.6, 0.03) for m in ("accuracy", "PNMI") for s in ("federated", "MFCC")],
        columns=["system", "measure", "value", "low", "high", "baseline"],
    )
    schemes = {"speaker": table.assign(client=table.speaker), "iid": table.assign(client="c0")}
    return {
        "along": plots.along(hours_table()),
        "clients": plots.clients(holdings(CLIENTS)),
        "partition_schemes": plots.partition_schemes(schemes, dict.fromkeys(schemes, "skew 0.1")),
        "aligned_units": plots.aligned_units(waveform, PHONES, {"federated": labels}, labels == 1),
        "projection": plots.projection(RNG.normal(size=(200, 39)), np.arange(200) % 9),
        "phones_per_cluster": plots.phones_per_cluster(joint),
        "cluster_spectra": plots.cluster_spectra([waveform], [labels], 7),
        "histograms": plots.histograms(pd.DataFrame(RNG.integers(1, 9, (3, 20)), CLIENTS)),
        "matrices": plots.matrices({"federated": SQUARE, "client": SQUARE}, "distance (bits)"),
        "curves": plots.curves(metrics(3, 2), metrics(3, 0), clusters=20),
        "comparison": plots.comparison(trainings()),
        "ledger": plots.ledger(metrics(3, 2)),
        "bars": plots.bars(result),
    }


@pytest.mark.parametrize(
    ("measures", "label"),
    [
        (("loss", "accuracy_masked"), "loss (nats per frame)"),
        (("loss", "accuracy_masked", "cosine"), "loss (per frame)"),
        (("loss", "cosine"), "loss (per frame)"),
    ],
)
def test_a_loss_with_the_distance_of_layers_has_no_unit(measures, label):
    table = pd.concat([trainings().assign(measure=measure) for measure in measures])
    assert label in {axes.get_ylabel() for axes in plots.comparison(table).axes}


def test_every_function_draws_and_labels_its_axes():
    before, drawn = dict(matplotlib.rcParams), pictures()
    functions = {name for name in vars(plots) if callable(getattr(plots, name))}
    assert functions - {"save", "png", "panels", "heat_map"} == set(drawn)
    for name, figure in drawn.items():
        assert plots.png(figure).startswith(b"\x89PNG"), name
        for axes, axis in itertools.product([axes for axes in figure.axes if axes.axison], "xy"):
            ticks, sharing = getattr(axes, f"get_{axis}ticks")(), getattr(axes, f"get_shared_{axis}_axes")()
            labels = [getattr(panel, f"get_{axis}label")() for panel in sharing.get_siblings(axes)]
            assert any(labels) or not len(ticks) or (name == "bars" and axes.get_title("left")), (name, axis)
    assert dict(matplotlib.rcParams) == before, "the style does not leak"


def test_files_are_the_same_when_drawn_again(tmp_path):
    for folder in ("one", "two"):
        plots.save(plots.curves(metrics(3, 2)), tmp_path / folder, "curves")
    for suffix in ("png", "svg"):
        assert (tmp_path / f"one/curves.{suffix}").read_bytes() == (tmp_path / f"two/curves.{suffix}").read_bytes()


def test_plots_import_neither_pyplot_nor_ipython():
    code = "import sys, fedhubert_lib.plots; print({'matplotlib.pyplot', 'IPython'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_aligned_units_draws_labels_where_their_frames_are():
    labels = np.array([3] * 10 + [7] * 39)
    figure = plots.aligned_units(0.01 * torch.randn(16_000), labels={"k": labels}, start=6)
    runs = figure.axes[1].patches
    assert [(round(run.get_x(), 4), round(run.get_width(), 4)) for run in runs] == [(0.0025, 0.2), (0.2025, 0.78)]
    assert [text.get_text() for text in figure.axes[1].texts] == ["3", "7"]
    figure.canvas.draw()
    seconds = [float(tick.get_text()) for tick in figure.axes[-1].get_xticklabels()]
    assert min(seconds) == 6 and max(seconds) == 7, "the axis counts from where the waveform begins"
    assert plots.png(plots.aligned_units(torch.zeros(16_000))), "silence"


def test_curves_over_hours_heard_have_the_reference_behind_them():
    rows = [row | {"audio_seconds": 1800.0} for row in metrics(3, 2)]
    band = pd.DataFrame({"hours": [0.5, 1.5], "mean": [3.0, 1.0], "band": 0.25})
    axes = plots.curves(rows, reference={"loss": band, "pnmi": band}).axes
    grey = axes[0].collections[0].get_paths()[0].vertices
    assert grey[:, 0].min() == 0.5 and grey[:, 1].min() == 0.75 and grey[:, 1].max() == 3.25
    assert axes[0].lines[0].get_xdata().tolist() == [0.5, 1.0, 1.5]
    assert [line[:, 0].tolist() for line in axes[0].collections[1].get_segments()] == 2 * [[0.5, 1.0, 1.5]]
    assert axes[0].get_xlabel() == "hours of speech heard" != plots.curves(metrics(3, 2)).axes[0].get_xlabel()
    begun = [row for row in rows if row["kind"] == "client" and row["round"] == 1]
    plots.curves(begun, [row for row in rows if row["kind"] == "round"])  # before the first round is done


def test_curves_of_a_student_without_clusters_show_loss_and_cosine():
    rows = [{key: x for key, x in row.items() if "accuracy" not in key} | {"cosine": 0.5} for row in metrics(3, 2)]
    figure = plots.curves(rows, [row for row in rows if row["kind"] == "round"])
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss (per frame)", "cosine"]
    assert figure.axes[1].lines[0].get_ydata().tolist() == [0.5, 0.5, 0.5]


def test_curves_and_ledger_of_a_private_study_without_losses():
    rows = [{name: value for name, value in row.items() if "accuracy" not in name} for row in metrics(3, 2)]
    for row in rows:
        row |= {name: None for name in ("loss", "learning_rate", "audio_seconds_per_second") if name in row}
    plots.curves(rows, metrics(3, 0))  # pooled training has an accuracy, too
    (loss,) = plots.curves(rows).axes
    assert np.isnan(loss.lines[0].get_ydata()).all()
    plots.ledger(rows)


def test_curves_of_thousands_of_clients_draw_some_of_them():
    rows = [{"kind": "client", "round": r, "client": f"c{c}", "loss": 1.0} for r in (1, 2) for c in range(2338)]
    thin = plots.curves(rows + metrics(2, 0)).axes[0].collections[0]
    assert len(thin.get_segments()) <= training.CLIENT_CURVES and "2,338" in thin.get_label()


def test_curves_of_one_round_are_points():
    axes = plots.curves(metrics(1, 3), metrics(1, 0)).axes[0]
    assert {line.get_label(): line.get_marker() for line in axes.lines}.items() >= {("mean", "o"), ("centralised", "o")}
    assert len(axes.collections[1].get_offsets()) == 3, "a point per client, of which a line would show nothing"


def test_a_single_validation_of_a_long_training_is_a_point():
    rows = metrics(50, 0)
    rows[-1]["validation_loss"] = 1.0
    lines = {line.get_label(): line.get_marker() for line in plots.curves(rows).axes[0].lines}
    assert lines["mean"] in ("", "None") and lines["validation"] == "o"
    assert plots.ledger(rows).axes[4].lines[0].get_marker() == "o"


def test_a_students_loss_is_no_cross_entropy():
    rows = [row | {"label_loss": 1.0} for row in metrics(3, 2)]
    assert plots.curves(rows).axes[0].get_ylabel() == plots.ledger(rows).axes[4].get_ylabel() == "loss (per frame)"
    for stage, label in ("Pretraining", "loss (nats per frame)"), ("Distillation", "loss (per frame)"):
        assert plots.comparison(trainings().assign(measure="loss", stage=stage)).axes[0].get_ylabel() == label


def test_matrices_of_other_clients_bear_their_own_names():
    four = pd.DataFrame(np.eye(4), list("abcd"), list("abcd"))
    first, second = plots.matrices({"federated": four, "client": four.drop("b").drop(columns="b")}, "NMI").axes[:2]
    for axes, names in (first, "abcd"), (second, "acd"):
        assert "".join(text.get_text() for text in axes.get_yticklabels()) == names
        assert axes.get_ylim() == (len(names) - 0.5, -0.5)


def test_ticks_of_many_clusters_are_their_names():
    counts = pd.DataFrame([np.arange(100)], ["client-000"])  # the last cluster is the most used
    axes = plots.histograms(counts).axes[0]
    assert [axes.xaxis.get_major_formatter()(place, 0) for place in (0, 10, 99, 100, -1)] == ["99", "89", "0", "", ""]


def test_phones_per_cluster_orders_clusters_by_their_most_likely_phone():
    counts = pd.DataFrame([[0, 9, 1], [9, 1, 0], [1, 0, 0]], ["s", "t", "u"], [10, 11, 12])
    axes = plots.phones_per_cluster(counts).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["12", "11", "10"]  # purest first within a phone
    assert axes.images[0].get_array()[0].tolist() == pytest.approx([1, 0.9, 0])


def test_cluster_spectra_leave_unused_clusters_out():
    low = 0.3 * torch.sin(torch.arange(16_000) * 2 * torch.pi * 200 / 16_000)
    high = 0.3 * torch.sin(torch.arange(16_000) * 2 * torch.pi * 5000 / 16_000)
    figure = plots.cluster_spectra([high, low], [np.full(49, 1), np.full(49, 4)], clusters=6)
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["4", "1"]


def test_clients_draws_what_each_holds():
    held = holdings(CLIENTS)
    speech, _, _, women, lengths, rate = plots.clients(held).axes
    shown = {"speech": (speech, 60 * held.hours), "women": (women, held.female), "rate": (rate, held.words_per_minute)}
    for name, (panel, values) in (shown | {"lengths": (lengths, held.longest)}).items():
        (steps,) = panel.patches  # of all clients, with gaps
        assert steps.get_data().values[::2] == pytest.approx(values), name
    assert lengths.patches[0].get_data().baseline[::2] == pytest.approx(held.shortest)
    plots.clients(held.assign(female=np.nan, words_per_minute=np.nan))  # not recorded
    many = plots.clients(holdings([f"client-{i:04d}" for i in range(200)]))
    assert len(many.axes[0].get_xticklabels()) < 20, "no name for each of many"


def test_partition_schemes_shows_speakers_and_womens_speech_per_client():
    table = manifest(400, 200)
    schemes = {"speaker": table.assign(client=table.speaker), "one": table.assign(client="c")}
    figure = plots.partition_schemes(schemes, dict.fromkeys(schemes, ""))
    fractions = np.asarray(figure.axes[2].images[0].get_array())
    assert fractions.shape == (200, 200) and (np.diag(fractions) == 1).all() and fractions.sum() == 200
    (steps,) = figure.axes[5].patches
    assert steps.get_data().values == pytest.approx(table[table.sex == "F"].samples.sum() / table.samples.sum())
    plots.partition_schemes({"one": table.assign(client="c", sex="")}, {"one": "sex not recorded"})


def test_along_is_a_mean_and_a_band_over_runs():
    axes = plots.along(hours_table()).axes[0]
    (line, baseline), (band,) = axes.lines, axes.collections
    assert axes.get_xscale() == "log" and baseline.get_linestyle() == ":"
    np.testing.assert_allclose(line.get_xydata(), [[1.05, 0.25], [2.05, 0.5]])
    np.testing.assert_allclose(band.get_datalim(axes.transData).intervaly, [0.2, 0.6])


def test_along_tells_how_many_runs_a_line_has_and_keeps_the_colours():
    table = hours_table()
    alone = table[(table.run == table.run.iloc[0]) & table.hours.notna()].assign(system="centralised teacher")
    figure = plots.along(pd.concat([table, alone], ignore_index=True))
    assert figure.get_supxlabel() == "line: mean of up to 2 training seeds, band: lowest to highest"
    colours = {line.get_label(): line.get_color() for line in figure.axes[0].lines}
    untrained = next(line for line in plots.along(table).axes[0].lines if line.get_linestyle() == ":")
    assert untrained.get_color() == colours[untrained.get_label()]
