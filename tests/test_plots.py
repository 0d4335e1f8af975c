"""The pictures: what is drawn is what was given; axes are labelled; files are reproducible; full size is drawn too."""

import subprocess
import sys

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


def pictures() -> dict[str, Figure]:
    """One call of every public function."""
    table = manifest()
    own = table.assign(client=table.speaker)
    waveform = 0.1 * torch.randn(16_000, generator=torch.Generator().manual_seed(0))
    labels = np.arange(49) % 5
    joint = pd.DataFrame(RNG.integers(0, 50, (6, 5)), list("abcdef"))
    held = holdings(CLIENTS)
    result = pd.DataFrame(
        [(s, m, 0.5, 0.4, 0.6, 0.03) for m in ("accuracy", "PNMI") for s in ("federated", "MFCC")],
        columns=["system", "measure", "value", "low", "high", "baseline"],
    )
    way = [("a", "teacher", 1.0, 0.2), ("a", "teacher", 2.0, 0.4), ("a", "MFCC", np.nan, 0.3)]
    way += [("b", "teacher", 1.1, 0.3), ("b", "teacher", 2.1, 0.6), ("b", "MFCC", np.nan, 0.3)]
    way = pd.DataFrame([(*row, "PNMI") for row in way], columns=["run", "system", "hours", "value", "measure"])
    return {
        "along": plots.along(way),
        "utterance_lengths": plots.utterance_lengths(table),
        "speakers": plots.speakers(table),
        "phone_lengths": plots.phone_lengths(PHONES),
        "clients": plots.clients(held),
        "partition_schemes": plots.partition_schemes({"speaker": own, "iid": table.assign(client="c0")}),
        "aligned_units": plots.aligned_units(waveform, PHONES, {"federated": labels}),
        "inertia": plots.inertia([{"kind": "lloyd", "codebook": "federated", "round": 1, "inertia": 2.0}]),
        "cluster_sizes": plots.cluster_sizes({"federated": np.array([5, 0, 10]), "client": np.array([5, 5, 5])}),
        "projection": plots.projection(RNG.normal(size=(200, 39)), np.arange(200) % 9),
        "phones_per_cluster": plots.phones_per_cluster(joint),
        "cluster_spectra": plots.cluster_spectra([waveform], [labels], 7),
        "histograms": plots.histograms(pd.DataFrame(RNG.integers(1, 9, (3, 20)), CLIENTS)),
        "matrices": plots.matrices({"federated": SQUARE, "client": SQUARE}, "distance (bits)"),
        "curves": plots.curves(metrics(3, 2), metrics(3, 0), clusters=20),
        "ledger": plots.ledger(metrics(3, 2)),
        "bars": plots.bars(result),
        "kept": plots.kept({"accuracy": 0.97}, {"MACs": 0.3}),
        "confusion": plots.confusion(np.eye(4, dtype=int), ["yes", "no", "up", "down"]),
        "layers": plots.layers(pd.DataFrame({"teacher": [0.1, 0.2]}), "accuracy", {"MFCC": 0.1}),
    }


def test_every_function_draws_and_labels_its_axes(tmp_path):
    drawn = pictures()
    assert set(plots.__all__) - {"save", "png"} == set(drawn)
    for name, figure in drawn.items():
        assert isinstance(figure, Figure)
        plots.save(figure, tmp_path, name)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert any(axes.get_xlabel() for axes in figure.axes) or name in ("bars", "matrices")
        assert any(axes.get_ylabel() for axes in figure.axes) or name in ("bars", "kept")


def test_files_are_the_same_when_drawn_again(tmp_path):
    for folder in ("one", "two"):
        plots.save(plots.curves(metrics(3, 2)), tmp_path / folder, "curves")
    for suffix in ("png", "svg"):
        assert (tmp_path / f"one/curves.{suffix}").read_bytes() == (tmp_path / f"two/curves.{suffix}").read_bytes()


def test_plots_leave_pyplot_and_ipython_alone():
    code = "import sys, fedhubert_lib.plots; print({'matplotlib.pyplot', 'IPython'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_style_does_not_leak():
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.utterance_lengths(manifest())
    assert dict(matplotlib.rcParams) == before


def test_labels_are_drawn_where_their_frames_are():
    labels = np.array([3] * 10 + [7] * 39)
    figure = plots.aligned_units(torch.zeros(16_000) + 0.01 * torch.randn(16_000), labels={"k": labels})
    runs = figure.axes[1].patches
    assert [(round(run.get_x(), 4), round(run.get_width(), 4)) for run in runs] == [(0.0025, 0.2), (0.2025, 0.78)]
    assert [text.get_text() for text in figure.axes[1].texts] == ["3", "7"]


def test_the_time_axis_counts_from_where_the_waveform_begins():
    figure = plots.aligned_units(torch.randn(16_000), start=6)
    figure.canvas.draw()
    shown = [float(tick.get_text()) for tick in figure.axes[-1].get_xticklabels()]
    assert min(shown) == 6 and max(shown) == 7


def test_silence_can_be_drawn():
    assert plots.png(plots.aligned_units(torch.zeros(16_000)))


def test_a_round_that_was_done_again_counts_once_with_its_last_value():
    rows = metrics(3, 2) + [row | {"loss": 9.0} for row in metrics(3, 2) if row["round"] == 3]
    loss = plots.curves(rows).axes[0]
    assert loss.lines[0].get_xydata().tolist() == [[1, 3], [2, 1.5], [3, 9]]
    assert [line[-1].tolist() for line in loss.collections[0].get_segments()] == [[3, 9], [3, 9]]


def test_a_student_that_names_no_clusters_has_loss_and_cosine_drawn():
    rows = [{key: x for key, x in row.items() if "accuracy" not in key} | {"cosine": 0.5} for row in metrics(3, 2)]
    figure = plots.curves(rows, [row for row in rows if row["kind"] == "round"])
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss (per frame)", "cosine"]
    assert figure.axes[1].lines[0].get_ydata().tolist() == [0.5, 0.5, 0.5]


def test_rounds_of_a_private_study_that_tell_no_loss_are_drawn():
    rows = [{name: value for name, value in row.items() if "accuracy" not in name} for row in metrics(3, 2)]
    for row in rows:
        row |= {name: None for name in ("loss", "learning_rate", "audio_seconds_per_second") if name in row}
    plots.curves(rows, metrics(3, 0))  # pooled training tells an accuracy, too
    (loss,) = plots.curves(rows).axes
    assert np.isnan(loss.lines[0].get_ydata()).all()
    plots.ledger(rows)


def test_labels_of_clusters_in_one_place_can_be_read():
    frames = RNG.normal(size=(400, 2))
    figure = plots.projection(frames, np.arange(400) % 5)  # five clusters around one middle
    figure.draw_without_rendering()
    boxes = [text.get_bbox_patch().get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 5
    centres = np.array([((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2) for box in boxes])
    gaps = np.linalg.norm(centres[:, None] - centres, axis=2) + 1e9 * np.eye(5)
    assert gaps.min() > 0.9 * max(box.width for box in boxes)


def test_clusters_follow_their_most_likely_phone():
    counts = pd.DataFrame([[0, 9, 1], [9, 1, 0], [1, 0, 0]], ["s", "t", "u"], [10, 11, 12])
    figure = plots.phones_per_cluster(counts)
    ticks = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert ticks == ["12", "11", "10"]  # purest first within a phone
    assert figure.axes[0].images[0].get_array()[0].tolist() == pytest.approx([1, 0.9, 0])


def test_unused_clusters_have_no_spectrum():
    low = 0.3 * torch.sin(torch.arange(16_000) * 2 * torch.pi * 200 / 16_000)
    high = 0.3 * torch.sin(torch.arange(16_000) * 2 * torch.pi * 5000 / 16_000)
    figure = plots.cluster_spectra([high, low], [np.full(49, 1), np.full(49, 4)], clusters=6)
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["4", "1"]


def test_what_clients_hold_is_drawn_or_said_to_be_missing():
    held = holdings(CLIENTS)
    speech, utterances, speakers, women, lengths, rate = plots.clients(held).axes
    assert [bar.get_height() for bar in speech.patches] == pytest.approx(60 * held.hours)
    assert [bar.get_height() for bar in women.patches] == pytest.approx(held.female)
    assert [bar.get_height() for bar in lengths.patches] == pytest.approx(held.longest - held.shortest)
    assert [bar.get_height() for bar in rate.patches] == pytest.approx(held.words_per_minute)
    women, _, rate = plots.clients(held.assign(female=np.nan, words_per_minute=np.nan)).axes[3:]
    assert women.texts[0].get_text() == rate.texts[0].get_text() == "not recorded"


def test_a_client_of_each_speaker_is_a_line_also_among_thousands():
    table = manifest(4_000, 2_000)
    schemes = {"speaker": table.assign(client=table.speaker), "two": table.assign(client=np.arange(4_000) % 2)}
    figure = plots.partition_schemes(schemes)
    image = figure.axes[2].images[0]
    shares = np.asarray(image.get_array())
    assert shares.shape == (150, 150) and image.get_extent() == [-0.5, 1999.5, 1999.5, -0.5]
    assert (np.diag(shares) == 1).all() and shares.sum() == 150, "no speaker is lost between two pixels"
    assert figure.axes[0].get_yscale() == "log", "or the small ones could not be seen beside the large ones"
    shown = figure.axes[4].lines[0].get_ydata()[0]
    assert shown == pytest.approx(table[table.sex == "F"].samples.sum() / table.samples.sum())
    unknown = plots.partition_schemes({name: scheme.assign(sex="") for name, scheme in schemes.items()})
    assert [axes.texts[0].get_text() for axes in unknown.axes[4:6]] == ["not recorded"] * 2
    curves = plots.speakers(table).axes[0].lines
    assert [len(curve.get_ydata()) for curve in curves] == [1_000, 1_000]
    assert all((np.diff(curve.get_ydata()) <= 0).all() for curve in curves)


def test_full_size_is_drawn_without_a_name_for_each():
    names = [f"client-{i:04d}" for i in range(2338)]
    figure = plots.clients(holdings(names))
    assert len(figure.axes[0].get_xticklabels()) < 20
    rows = [
        {"kind": "client", "round": r, "client": f"c{c}", "loss": 1.0, "accuracy_masked": 0.1, "accuracy_unmasked": 0.1}
        for r in range(1, 4)
        for c in range(2338)
    ]
    thin = plots.curves(rows + metrics(3, 0)).axes[0].collections[0]
    assert len(thin.get_segments()) <= training.CURVES
    assert "2,338" in thin.get_label()


def test_quality_over_hours_is_a_mean_and_a_band_over_runs():
    axes = pictures()["along"].axes[0]
    (line, floor), (band,) = axes.lines, axes.collections
    assert axes.get_xscale() == "log" and floor.get_linestyle() == ":"
    np.testing.assert_allclose(line.get_xydata(), [[1.05, 0.25], [2.05, 0.5]])
    np.testing.assert_allclose(band.get_datalim(axes.transData).intervaly, [0.2, 0.6])
    assert "mean of 2 training seeds" in axes.figure.get_supxlabel()
