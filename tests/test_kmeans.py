"""Codebooks: federated Lloyd is Lloyd, every kind runs, labels stay with their clients, restarts resume."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import psutil
import pytest
import soundfile
import torch
from federation import pretrain
from sklearn.cluster import KMeans

from fedhubert_lib import (
    audio,
    features,
    federated,
    files,
    hubert,
    kmeans,
    labels,
    params,
    pooled,
    preflight,
    pretrained,
    pretraining,
    recipes,
    runs,
    units,
)
from fedhubert_lib.federated import handlers, noise
from fedhubert_lib.federated.protocol import ClientHome, Clients, Failure, Reply
from fedhubert_lib.kmeans import client, clustering, hidden, private, public, reading, server, stage

KINDS = ["federated", "one-shot", "client", "aligned", "random-projection", "central"]


class Direct(Clients):
    """Clients whose handlers are called directly, each with its own folders."""

    def __init__(self, run: Path) -> None:
        super().__init__([folder.name for folder in (run / "01_partition" / "clients").iterdir()])
        self.run = run
        self.asked: list[tuple[str, dict]] = []
        self.replies: list[tuple[str, Reply]] = []
        self.failing: dict[str, str] = {}
        self.change = lambda action, reply: reply

    def answers(self, request):
        action, config = request.action, json.dumps(request.config)
        self.asked.append((action, request.arrays))
        for client_id in request.clients:
            if self.failing.get(client_id) == action:
                yield Failure(client_id, "away")
                continue
            answer = handlers.HANDLERS[action](home(self.run, client_id), request.arrays, json.loads(config))
            self.replies.append((action, self.change(action, Reply(client_id, *answer))))
            yield self.replies[-1][1]


def home(run: Path, client_id: str = "client-001", simulated: bool = True) -> ClientHome:
    return handlers.home(run, client_id, "kmeans", "cpu", simulated)


def codebook(run: Path, name: str = "centroids") -> np.ndarray:
    return np.load(run / "02_kmeans" / "codebooks" / "federated" / f"{name}.npy")


def labels_of(run: Path, client_id: str, kind: str = "federated") -> labels.Labels:
    return labels.Labels(run / "02_kmeans" / "clients" / client_id / kind)


def tone_like(samples: int, rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, int, str]]]:
    """A row of vowels of a kind, and their times: three sounds that MFCCs tell apart."""
    pieces, phones, at = [], [], 0
    while at < samples:
        length = min(int(rng.integers(800, 3_000)), samples - at)
        phone = rng.choice(["low", "high", "noise"])
        time = np.arange(length) / 16_000
        sound = {
            "low": np.sin(2 * np.pi * 300 * time) + 0.5 * np.sin(2 * np.pi * 900 * time),
            "high": np.sin(2 * np.pi * 2_500 * time) + 0.5 * np.sin(2 * np.pi * 4_000 * time),
            "noise": rng.standard_normal(length),
        }[phone]
        pieces.append(0.1 * sound + 0.002 * rng.standard_normal(length))
        phones.append((at, at + length, phone))
        at += length
    return np.concatenate(pieces).astype(np.float32), phones


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A run with three clients of four utterances, one shorter than a frame, one silent; and held-out speech."""
    run = tmp_path_factory.mktemp("kmeans") / "run"
    (run / "audio").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows, times = [], []
    for speaker in range(4):
        for number in range(5):
            samples = 399 if (speaker, number) == (0, 1) else int(rng.integers(16_000, 40_000))
            waveform, phones = tone_like(samples, rng)
            if (speaker, number) == (1, 2):
                waveform, phones = np.zeros(samples, np.float32), [(0, samples, "sil")]
            name = f"s{speaker}-{number}"
            soundfile.write(run / "audio" / f"{name}.wav", waveform, 16_000, subtype="FLOAT")
            rows.append((name, str(run / "audio" / f"{name}.wav"), f"s{speaker}", samples))
            times += [(name, *phone) for phone in phones]
    table = pandas.DataFrame(rows, columns=["utterance", "path", "speaker", "samples"])
    phones = pandas.DataFrame(times, columns=["utterance", "start_sample", "end_sample", "phone"])
    for number in range(3):
        folder = run / "01_partition" / "clients" / f"client-00{number}"
        folder.mkdir(parents=True)
        mine = table[table.speaker == f"s{number}"]
        mine.iloc[:4].to_parquet(folder / "train.parquet", index=False)
        mine.iloc[4:].to_parquet(folder / "validation.parquet", index=False)
        phones[phones.utterance.isin(mine.utterance)].to_parquet(folder / "phones.parquet", index=False)
    table[table.speaker == "s3"].to_parquet(run / "01_partition" / "heldout.parquet", index=False)
    (run / "00_corpus").mkdir()
    phones.to_parquet(run / "00_corpus" / "phones.parquet", index=False)
    return run


@pytest.fixture
def run(corpus: Path, tmp_path: Path) -> Path:
    shutil.copytree(corpus / "00_corpus", tmp_path / "00_corpus")
    shutil.copytree(corpus / "01_partition", tmp_path / "01_partition")
    return tmp_path


def settings(**changes) -> params.Kmeans:
    return params.Kmeans(**{"codebooks": ["federated"], "clusters": 8, "normalisation": "none", **changes})


def prepared(run: Path, p: params.Kmeans) -> tuple[server.Exchange, dict]:
    """An exchange whose clients have computed their features, and the settings of messages."""
    exchange, config = server.Exchange(Direct(run), lambda row: None), server.settings(p)
    list(exchange.ask("features", {}, config))
    return exchange, config


# ---------------------------------------------------------------------------------------------------- k-means itself


def blobs(frames: int = 3_000, width: int = 13, centres: int = 12, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    middles = 3 * rng.standard_normal((centres, width))
    return torch.from_numpy(middles[rng.integers(0, centres, frames)] + rng.standard_normal((frames, width))).float()


def test_nearest_with_large_means():
    """Raw MFCCs lie far from the origin; a plain float32 expansion of the distance picks wrong centroids there."""
    frames = blobs() * 0.01 + 300
    centroids = frames[:40]
    exact = (frames.double()[:, None] - centroids.double()[None]).square().sum(-1)
    chosen = exact.gather(1, clustering.nearest(frames, centroids)[:, None])[:, 0]
    torch.testing.assert_close(chosen, exact.min(1).values, rtol=1e-3, atol=1e-7)
    assert clustering.inertia(frames, centroids) == pytest.approx(float(exact.min(1).values.sum()), rel=1e-6)


@pytest.mark.parametrize("width", [13, 192])
def test_nearest_does_not_depend_on_the_batch(width, monkeypatch):
    """Not even where float32 cannot tell: centroids a few of its steps apart. What decides there is float64."""
    frames = blobs(1_200, width)
    centroids = torch.cat([frames[:30] * (1 + 2e-7 * step) for step in range(4)] + [frames[:3]])
    distances = (frames.double()[:, None] - centroids.double()[None]).square().sum(-1)
    chosen = clustering.nearest(frames, centroids)
    taken = distances.gather(1, chosen[:, None])[:, 0]
    torch.testing.assert_close(taken, distances.min(1).values, rtol=1e-13, atol=0)
    assert chosen.max() < 120  # the last three centroids are the first three: of equals the first is taken
    for size in (1, 37, 512, 1_000):
        assert (torch.cat([clustering.nearest(part, centroids) for part in frames.split(size)]) == chosen).all()
    order = torch.randperm(1_200, generator=torch.Generator().manual_seed(0))
    assert (clustering.nearest(frames[order], centroids) == chosen[order]).all()
    for threads in ("1", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        monkeypatch.setattr(clustering, "SCORES", 16 * len(centroids))  # many small products
        assert (clustering.nearest(frames, centroids) == chosen).all()


def test_lloyd_equals_scikit_learn():
    frames = blobs()
    start = frames[:20]
    expected = KMeans(20, init=start.numpy(), n_init=1, max_iter=7, tol=0).fit(frames.double().numpy())
    centroids = clustering.lloyd(frames, start, np.random.default_rng(0), rounds=7, tolerance=-1)
    np.testing.assert_allclose(centroids.numpy(), expected.cluster_centers_, atol=1e-6)


def test_fit_as_good_as_scikit_learn():
    frames = blobs(40_000, 20, 60)
    ours = clustering.fit(frames, 50, np.random.default_rng(0))
    reference = KMeans(50, n_init=3, random_state=0).fit(frames.double().numpy())
    assert clustering.inertia(frames, ours) <= 1.01 * reference.inertia_
    assert len(clustering.nearest(frames, ours).unique()) == 50


def test_lloyd_weights_are_numbers_of_points():
    points, weights = blobs(200), torch.arange(200) % 3 + 1
    rng = np.random.default_rng
    many = clustering.lloyd(points.repeat_interleave(weights, 0), points[:5], rng(0), rounds=5, tolerance=-1)
    once = clustering.lloyd(points, points[:5], rng(0), rounds=5, tolerance=-1, weights=weights)
    torch.testing.assert_close(once, many)


def test_statistics_in_parts_are_those_of_the_whole(monkeypatch):
    frames, weights = torch.randn(100, 6, generator=torch.manual_seed(0)), torch.arange(100) % 5
    labels = clustering.nearest(frames, frames[:7])
    whole = clustering.statistics(frames, labels, frames[:7], weights)
    monkeypatch.setattr(clustering, "VALUES", 6 * 30)
    for total, expected in zip(clustering.statistics(frames, labels, frames[:7], weights), whole, strict=True):
        torch.testing.assert_close(total, expected, atol=1e-12, rtol=1e-12)
    assert whole[1].sum() == weights.sum()


def test_lloyd_fills_empty_clusters():
    frames = blobs()
    far = torch.full((3, 13), 1e4)
    centroids = clustering.lloyd(frames, torch.cat([frames[:5], far]), np.random.default_rng(0))
    counts = torch.bincount(clustering.nearest(frames, centroids), minlength=8)
    assert (counts > 0).all()


def test_an_empty_cluster_begins_beside_the_widest_by_its_standard_deviation():
    counts, inertias = torch.tensor([100.0, 0.0, 50.0]).double(), torch.tensor([400.0, 0.0, 50.0]).double()
    sums = torch.tensor([[300.0, 0.0], [0.0, 0.0], [0.0, 50.0]]).double()
    moved = clustering.update(sums, counts, inertias, torch.zeros(3, 2), np.random.default_rng(0))
    assert (moved[0] - moved[1]).norm().item() == pytest.approx(2 * 0.1 * 2.0), "a tenth of it to either side"
    assert ((moved[0] + moved[1]) / 2).tolist() == pytest.approx([3.0, 0.0]) and moved[2].tolist() == [0.0, 1.0]


def test_a_mean_of_scaled_counts_is_that_of_the_counts():
    """Clipping before noise scales sums and counts of a client alike, also below one frame."""
    sums, counts = torch.tensor([[6.0, 3.0], [1.0, 1.0]]), torch.tensor([3.0, 2.0])
    made = clustering.update(sums, counts, torch.zeros(2), torch.zeros(2, 2), np.random.default_rng(0))
    scaled = clustering.update(sums / 100, counts / 100, torch.zeros(2), torch.zeros(2, 2), np.random.default_rng(0))
    torch.testing.assert_close(scaled, made)
    assert made.tolist() == [[2.0, 1.0], [0.5, 0.5]]


def test_lloyd_goes_on_where_an_empty_cluster_begins_anew():
    """In many dimensions half of another cluster has the greater inertia, which is not a standstill."""
    generator = torch.Generator().manual_seed(1)
    groups = 0.7 * torch.randn(10, 768, generator=generator)
    frames = groups[torch.randint(10, (3_000,), generator=generator)] + torch.randn(3_000, 768, generator=generator)
    settled = clustering.lloyd(frames, frames[:9].double(), np.random.default_rng(0))
    start = torch.cat([settled, torch.full((1, 768), 1e3, dtype=torch.float64)])
    centroids = clustering.lloyd(frames, start, np.random.default_rng(0))
    further = clustering.lloyd(frames, centroids, np.random.default_rng(0))
    assert clustering.inertia(frames, further) > 0.999 * clustering.inertia(frames, centroids)


def test_fit_with_fewer_distinct_points_than_clusters():
    same = torch.ones(50, 13)
    centroids = clustering.fit(same, 4, np.random.default_rng(0))
    assert centroids.isfinite().all()
    with pytest.raises(ValueError, match="4 clusters from 3 points"):
        clustering.plus_plus(same[:3], 4, np.random.default_rng(0))


def test_matched_undoes_a_permutation():
    reference = blobs(30)
    shuffled = reference[torch.randperm(30, generator=torch.Generator().manual_seed(0))] + 0.01
    torch.testing.assert_close(clustering.matched(shuffled, reference), reference + 0.01)


# ------------------------------------------------------------------------------------------------- federated = central


@pytest.mark.parametrize("normalisation", ["none", "speaker"])
def test_federated_lloyd_equals_central(run, normalisation):
    """From the same start, over three clients, over one that holds everything, and scikit-learn's on all frames."""
    p = settings(normalisation=normalisation)
    exchange, config = prepared(run, p)
    start, _ = server.start(exchange, config)
    federated, _ = server.lloyd(exchange, config, start, rounds=5, tolerance=-1)

    pooled = run / "pooled" / "01_partition" / "clients" / "client-000"
    pooled.mkdir(parents=True)
    for part in ("train", "validation"):
        paths = [run / "01_partition" / "clients" / one / f"{part}.parquet" for one in exchange.ids]
        pandas.concat([pandas.read_parquet(path) for path in paths]).to_parquet(pooled / f"{part}.parquet")
    alone, _ = prepared(run / "pooled", settings(normalisation="none"))
    central, _ = server.lloyd(alone, config, start, rounds=5, tolerance=-1)
    torch.testing.assert_close(federated, central, atol=1e-6, rtol=0)

    frames = reading.in_memory(home(run / "pooled", "client-000"), config)
    expected = KMeans(8, init=start.numpy(), n_init=1, max_iter=5, tol=0).fit(frames.double().numpy())
    np.testing.assert_allclose(federated, expected.cluster_centers_, atol=1e-4)
    assert (clustering.nearest(frames, federated) == clustering.nearest(frames, central)).all()


def test_start_weighs_local_centroids_by_their_frames():
    def answers(*_, **__):
        for client_id, place, count in (("a", 0.0, 90.0), ("b", 1.0, 10.0)):
            yield Reply(client_id, {"centroids": torch.tensor([[place]]), "counts": torch.tensor([count]).double()}, {})

    exchange = SimpleNamespace(ids=["a", "b"], ask=answers)
    centroids, _ = server.start(exchange, {"clusters": 1, "width": 1, "seed": 0})
    assert centroids.item() == pytest.approx(0.1)


def test_start_draws_local_centroids_by_their_frames():
    """One frame far away takes no cluster from two hours at each of two places."""
    points, counts = torch.tensor([[0.0], [1.0], [100.0]]), torch.tensor([360_000.0, 360_000.0, 1.0]).double()
    exchange = SimpleNamespace(
        ids=["a"], ask=lambda *_, **__: [Reply("a", {"centroids": points, "counts": counts}, {})]
    )
    for seed in range(5):
        centroids, _ = server.start(exchange, {"clusters": 2, "width": 1, "seed": seed})
        assert sorted(centroids.flatten().tolist()) == pytest.approx([0.0, 1.0], abs=0.01)


@pytest.mark.parametrize(("clusters", "clients", "local"), [(100, 8, 100), (500, 100, 250), (500, 10_000, 16)])
def test_local_centroids_of_all_clients_together_do_not_grow_with_their_number(clusters, clients, local):
    def answers(*asked, **__):
        assert asked[2]["local"] == local
        points = torch.arange(clusters).float()[:, None]
        return [Reply("a", {"centroids": points, "counts": torch.ones(clusters).double()}, {})]

    config = {"clusters": clusters, "width": 1, "seed": 0}
    centroids, _ = server.start(SimpleNamespace(ids=range(clients), ask=answers), config)
    assert len(centroids) == clusters


def test_local_centroids_come_with_their_numbers_of_frames(run):
    exchange, config = prepared(run, settings())
    for reply in exchange.ask("local_centroids", {}, {**config, "local": 4}):
        frames = reading.in_memory(home(run, reply.client), config)
        nearest = torch.bincount(clustering.nearest(frames, reply.arrays["centroids"]), minlength=4)
        assert reply.arrays["counts"].tolist() == pytest.approx(nearest.tolist(), abs=2)


def test_normalised_features_have_mean_0_and_standard_deviation_1(run):
    """Of each speaker, who is a client here."""
    exchange, config = prepared(run, settings(normalisation="speaker"))
    for one in (home(run, client_id) for client_id in exchange.ids):
        frames = reading.in_memory(one, config, reading.utterances(one))
        torch.testing.assert_close(frames.mean(0), torch.zeros(39), atol=1e-3, rtol=0)
        torch.testing.assert_close(frames.std(0, correction=0), torch.ones(39), atol=1e-3, rtol=0)


def test_another_normalisation_is_refused_by_the_client(run):
    """An earlier version of the server could ask for one scale for everybody."""
    _, config = prepared(run, settings())
    with pytest.raises(ValueError, match="'global': server and clients need one version"):
        client.local_centroids(home(run), {}, {**config, "normalisation": "global", "local": 4})


# --------------------------------------------------------------------------------------------------------- whole stage


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_every_kind_end_to_end(run):
    clients = Direct(run)
    rows = []
    table = kmeans.run(run, settings(codebooks=KINDS, normalisation="speaker"), clients, rows.append)
    assert table.index.tolist() == KINDS
    assert (table.pnmi.drop(index=["client", "random-projection"]) > 0.5).all(), table.pnmi
    assert table.loc[["federated", "one-shot", "random-projection", "central"], "agreement_same"].eq(1).all()
    assert table.loc["client", "agreement_same"] < table.loc["aligned", "agreement_same"] < 1
    assert table.loc["client", "agreement_nmi"] == pytest.approx(table.loc["aligned", "agreement_nmi"])
    for kind in KINDS:
        assert json.loads((run / "02_kmeans" / "codebooks" / kind / "codebook.json").read_text())["clusters"] == 8
        for one in clients.ids:
            sequences, lists = labels_of(run, one, kind), reading.utterances(home(run, one))
            assert sequences.utterances == lists.utterance.tolist()
            for utterance, samples in zip(lists.utterance, lists.samples, strict=True):
                assert len(sequences[utterance]) == audio.frame_count(samples)
    quality = json.loads((run / "02_kmeans" / "quality.json").read_text())
    assert quality["codebooks"]["federated"]["pnmi"] == table.pnmi["federated"]
    assert len(quality["agreement"]["client"]["nmi"]) == 3
    assert {row["kind"] for row in rows} == {"features", "lloyd", "codebook", "quality"}
    assert rows[0]["bytes_up"] == 0, "features stay with the clients"
    frames = sum(len(labels_of(run, one, "central").flat) for one in clients.ids)
    assert table.loc["federated", "fit_fraction"] == table.loc["federated", "fit_frames"] / frames
    assert 0.6 < table.loc["federated", "fit_fraction"] < 1  # all that is for training
    assert np.isnan(table.bytes_up["central"])
    assert table.bytes_up["federated"] > 0
    homes = [home(run, one) for one in clients.ids]
    frames = [
        sum(map(audio.frame_count, reading.sampled(one, {"seed": 0, "sample_fraction": 1}).samples)) for one in homes
    ]
    cost = json.loads((run / "02_kmeans" / "codebooks" / "aligned" / "codebook.json").read_text())["cost"]
    assert cost["reference"] == clients.ids[int(np.argmax(frames))] and len(set(frames)) == 3
    alone = [pandas.read_parquet(one.data / "phones.parquet") for one in homes]
    counted = [units.count_phones(p, labels_of(run, one), 8)[1] for p, one in zip(alone, clients.ids, strict=True)]
    alone = [units.quality_of_counts(table, 0) for table in counted]
    within = np.average([one["pnmi"] for one in alone], weights=[one["frames"] for one in alone])
    assert table.loc["federated", "pnmi_within"] == pytest.approx(within, rel=1e-9)
    assert 0 < table.inertia["client"] < table.inertia["federated"] < 39, "a frame's; without clusters it is 39"
    # A start that was killed at its very end finds all of this, and asks nobody for anything but to tidy up.
    again = Direct(run)
    pandas.testing.assert_frame_equal(kmeans.run(run, settings(codebooks=KINDS, normalisation="speaker"), again), table)
    assert {action for action, _ in again.asked} == {"kmeans.forget"}


def test_phones_of_one_kind_alone_are_as_good_as_none(run):
    for path in [*run.glob("01_partition/clients/*/phones.parquet"), run / "00_corpus" / "phones.parquet"]:
        pandas.read_parquet(path).assign(phone="sil").to_parquet(path)
    table = kmeans.run(run, settings(), Direct(run))
    assert table.loc["federated", "label_entropy"] > 0 and "pnmi" not in table and "heldout_pnmi" not in table


def test_first_minutes_of_public_speech_may_have_no_phones(run, monkeypatch):
    """Clients label these with codebooks of their own; agreement is measured, unit quality is not."""
    monkeypatch.setattr(stage, "PROBE_FRAMES", 40)
    path, heldout = run / "00_corpus" / "phones.parquet", run / "01_partition" / "heldout.parquet"
    phones, first = pandas.read_parquet(path), pandas.read_parquet(heldout).utterance[0]
    phones[(phones.utterance != first) | (phones.start_sample > 41 * audio.HOP)].to_parquet(path)
    table = kmeans.run(run, settings(codebooks=["federated", "client"]), Direct(run))
    assert table.heldout_pnmi.isna().tolist() == [False, True] and table.agreement_nmi["client"] < 1


def test_units_of_public_speech_are_those_of_its_features_normalised(run):
    """Where a phone is known; where clients label them, in the mean over clients."""
    known = pandas.read_parquet(path := run / "00_corpus" / "phones.parquet")
    known[known.start_sample > 8_000].to_parquet(path)
    clients = Direct(run)
    table = kmeans.run(run, settings(codebooks=["federated", "client"], normalisation="speaker"), clients)
    heldout = pandas.read_parquet(run / "01_partition" / "heldout.parquet")
    parts = [features.mfcc([audio.read(path)])[0][::2] for path in heldout.path]
    frames, lengths = torch.cat(parts), dict(zip(heldout.utterance, map(len, parts), strict=True))
    frames = (frames - frames.mean(0)) / frames.std(0, correction=0)  # of one speaker
    phones = units.frame_phones(pandas.read_parquet(path), lengths)
    spoken = phones != ""
    assert 0.3 < spoken.mean() < 0.95
    heard = clustering.nearest(frames, torch.from_numpy(codebook(run))).numpy()
    expected = units.quality(heard[spoken], phones[spoken], 0)["pnmi"]
    assert table.heldout_pnmi["federated"] == pytest.approx(expected, abs=0.01)
    labels = [reply.arrays["labels"].numpy() for action, reply in clients.replies if action == "kmeans.probe"]
    qualities = [units.quality(one[spoken], phones[spoken], 0)["pnmi"] for one in labels]
    assert table.heldout_pnmi["client"] == pytest.approx(np.mean(qualities)) and len({*qualities}) == 3


def test_public_speech_is_held_out_else_of_the_test_split_and_has_phones_where_any_has(tmp_path):
    def heard() -> tuple[list[str], bool]:
        table, phones = public.speech(tmp_path, {"seed": 0})
        return table.utterance.tolist(), phones is not None

    rows = [
        (name, f"{name}.flac", "s", 16_000, split) for name, split in (("a", "train"), ("b", "test"), ("c", "test"))
    ]
    manifest = pandas.DataFrame(rows, columns=["utterance", "path", "speaker", "samples", "split"])
    (tmp_path / "00_corpus").mkdir()
    (tmp_path / "01_partition").mkdir()
    assert heard() == ([], False)
    manifest.to_parquet(tmp_path / "00_corpus/manifest.parquet")
    assert heard() == (["b", "c"], False)
    phones = pandas.DataFrame({"utterance": ["a", "a", "c"], "start_sample": [0, 8_000, 0], "end_sample": 12_000})
    phones.assign(phone=["AH", "B", "AH"]).to_parquet(tmp_path / "00_corpus/phones.parquet")
    assert heard() == (["c"], False), "one phone, and frames without one, tell nothing of units"
    manifest[manifest.utterance != "c"].to_parquet(tmp_path / "01_partition/heldout.parquet")
    assert heard() == (["a"], True)
    manifest[:0].to_parquet(tmp_path / "01_partition/heldout.parquet")
    assert heard() == (["c"], False)


def test_of_many_clients_some_from_all_over_say_how_far_they_agree(run, monkeypatch):
    monkeypatch.setattr(stage, "AGREEMENT_CLIENTS", 2)
    table = kmeans.run(run, settings(codebooks=["client"]), Direct(run))
    agreement = json.loads((run / "02_kmeans" / "quality.json").read_text())["agreement"]["client"]
    assert agreement["clients"] == ["client-000", "client-002"] and len(agreement["nmi"]) == 2
    assert table.agreement_nmi["client"] == agreement["nmi"][0][1] < 1, "of one with itself it is 1"


def test_labels_are_those_of_every_second_mfcc_frame(run):
    """Through the whole stage: label i is the nearest centroid to MFCC frame 2 i."""
    kmeans.run(run, settings(), Direct(run))
    table = reading.utterances(home(run))
    for utterance, path in zip(table.utterance, table.path, strict=True):
        expected = clustering.nearest(features.mfcc([audio.read(path)])[0][::2], torch.from_numpy(codebook(run)))
        np.testing.assert_array_equal(labels_of(run, "client-001")[utterance], expected.numpy())


@pytest.mark.parametrize("normalisation", ["none", "speaker"])
def test_client_of_silence_and_of_utterances_shorter_than_a_frame(run, normalisation):
    """A microphone that was never switched on: no NaN, one label throughout, none where there is no frame."""
    folder = run / "01_partition" / "clients" / "client-001"
    table = pandas.read_parquet(folder / "train.parquet")
    table["samples"] = [8_000, 399, 720, 0]
    for number, samples in enumerate(table.samples):
        path = run / f"silent-{number}.wav"
        soundfile.write(path, np.zeros(samples, np.float32), 16_000)
        table.loc[number, "path"] = str(path)
    table.to_parquet(folder / "train.parquet", index=False)
    table.iloc[:0].to_parquet(folder / "validation.parquet", index=False)
    kmeans.run(run, settings(codebooks=["federated", "one-shot"], normalisation=normalisation), Direct(run))
    assert np.isfinite(codebook(run)).all()
    sequences = labels_of(run, "client-001")
    assert [len(sequences[utterance]) for utterance in table.utterance] == [24, 0, 2, 0]
    assert len(np.unique(sequences.flat)) == 1


@pytest.mark.parametrize("killed_at", [5, 20, 23])
def test_killed_while_writing_resumes(run, monkeypatch, killed_at):
    """Of 15 utterances features are written first, then labels: what is written is not computed again."""
    monkeypatch.setattr(reading, "BATCH_VALUES", 39 * 60)  # about an utterance at a time
    monkeypatch.setattr(reading, "BATCH_SAMPLES", 40_000)
    kmeans.run(run, settings(), Direct(run))
    folder = run / "02_kmeans" / "clients" / "client-001" / "federated"
    whole = (folder / "labels.bin").read_bytes()
    shutil.rmtree(run / "02_kmeans")
    original, written = labels.write, [0]

    def killed(*arguments):
        *kept, frames_of = arguments

        def frames(missing):
            for batch in frames_of(missing):
                for rows in batch:
                    if written[0] == killed_at:
                        raise KeyboardInterrupt
                    written[0] += 1
                    yield [rows]

        original(*kept, frames)

    monkeypatch.setattr(labels, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        kmeans.run(run, settings(), Direct(run))
    in_features, killed_at, clients = killed_at < 15, -1, Direct(run)
    kmeans.run(run, settings(), clients)
    assert written == [30] and (folder / "labels.bin").read_bytes() == whole
    assert ("kmeans.lloyd" in {action for action, _ in clients.asked}) == in_features


def test_killed_between_lloyd_rounds_resumes(run):
    """Rounds that are done are not done again; files and bytes are those of one go, but for the round that was lost."""
    p = settings(lloyd_rounds=6, tolerance=0)
    table = kmeans.run(run, p, Direct(run))
    whole, progress = codebook(run), run / "02_kmeans/codebooks/federated/lloyd.safetensors"
    bits = progress.read_bytes()
    shutil.rmtree(run / "02_kmeans")
    rows = []

    def killed(row):
        rows.append(row)
        if row.get("round") == 2:  # before the second round is saved
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kmeans.run(run, p, Direct(run), killed)
    again = kmeans.run(run, p, Direct(run), rows.append)
    assert [row["round"] for row in rows if row["kind"] == "lloyd"][:4] == [1, 2, 2, 3]
    np.testing.assert_array_equal(codebook(run), whole)
    assert progress.read_bytes() == bits
    assert again.bytes_up["federated"] == table.bytes_up["federated"]
    assert again.bytes_down["federated"] == table.bytes_down["federated"]


def test_lloyd_goes_on_where_other_clients_answer_and_where_inertia_rises(run):
    """Less inertia, or more, of other frames says nothing about whether the centroids stand still."""
    exchange, config = prepared(run, settings())
    start, clients = server.start(exchange, config)[0], exchange.clients
    exchange._missing = 1

    def away(row):
        """In every other round, client-001."""
        clients.failing = {"client-001": "kmeans.lloyd"} if row["round"] % 2 else {}

    _, stats = server.lloyd(exchange, config, start, rounds=6, tolerance=0.9, log=away)
    assert stats["round"] == 6 and not stats["settled"], "less inertia, of fewer frames"
    clients.failing, rounds = {}, []

    def rising(action, reply):
        rounds.append(action)
        return replace(reply, arrays=reply.arrays | {"inertias": reply.arrays["inertias"] * 2.0 ** (len(rounds) // 3)})

    clients.change = rising
    _, stats = server.lloyd(exchange, config, start, rounds=6, tolerance=1e-1)
    assert stats["round"] == 6 and not stats["settled"], "more inertia"
    clients.change = lambda action, reply: reply
    _, stats = server.lloyd(exchange, config, start, rounds=6, tolerance=1e-1)
    assert stats["round"] < 6 and stats["settled"]


@pytest.mark.parametrize("first", ["mfcc", "hidden"])
def test_features_are_computed_once_and_gone_at_the_end(run, first, monkeypatch):
    """Audio is read in one message of each client, the checkpoint travels with it alone, and no features stay."""
    if first == "hidden":
        pretrained.save(run / "first", hubert.Hubert(hubert.preset("tiny", front_end="logmel")))
        first = str(run / "first")
    clients, read, during = Direct(run), [], []
    original = audio.read

    def watched(path, **length):
        read.append(str(path))
        during.append(clients.asked[-1][0])
        return original(path, **length)

    monkeypatch.setattr(audio, "read", watched)
    p = settings(codebooks=["federated", "client", "central", "random-projection"], features=first, lloyd_rounds=2)
    kmeans.run(run, p.model_copy(update={"layer": 2 if first != "mfcc" else "auto"}), clients)
    assert set(during) == {"kmeans.features"}
    theirs = pandas.concat([pandas.read_parquet(path) for path in (run / "01_partition").rglob("clients/*/*n.parquet")])
    assert sorted(path for path in read if path in set(theirs.path)) == sorted(theirs.path)
    carried = {action for action, arrays in clients.asked if any(name.startswith("model/") for name in arrays)}
    assert carried == ({"kmeans.features"} if first != "mfcc" else set())
    assert not list(run.rglob("features*"))


def test_weights_travel_up_to_the_layer_that_is_used(run):
    pretrained.save(run / "first", hubert.Hubert(hubert.preset("tiny", front_end="logmel")))
    for layer, normed in ((1, False), (4, False), (1, True)):
        if normed:
            config = hubert.preset("tiny", front_end="logmel", do_stable_layer_norm=True)
            pretrained.save(run / "first", hubert.Hubert(config))
        model, _ = pretrained.load(run / "first")
        config, weights = hidden.describe(settings(features=str(run / "first")), layer)
        sent = hidden.model_of(weights, config, "cpu")
        assert len(sent.encoder.layers) == layer + normed
        waveform = torch.randn(8_000, generator=torch.Generator().manual_seed(0))
        expected = model(waveform[None], hidden_states=True).hidden[layer]
        torch.testing.assert_close(sent(waveform[None], hidden_states=True).hidden[layer], expected)


def test_disk_that_is_too_small_is_seen_before_anything_is_computed(run, monkeypatch):
    pandas.DataFrame({"client": Direct(run).ids, "hours": 1.0}).to_parquet(run / "01_partition" / "clients.parquet")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 50_000, 50_000))
    rows, clients = [], Direct(run)
    with pytest.raises(OSError, match=r"features take 0.1 GB of disk .*FEDHUBERT_OUTPUTS"):
        kmeans.run(run, settings(), clients, rows.append)
    assert rows[0]["feature_bytes"] == 3 * 3600 * 50 * 39 * 4 and not clients.asked
    (run / "01_partition" / "clients.parquet").unlink()  # a federation: each client looks at its own disk
    with pytest.raises(OSError, match="features take"):
        kmeans.run(run, settings(), clients)


def test_disk_is_looked_at_before_a_layer_is_chosen(run, monkeypatch):
    pandas.DataFrame({"client": Direct(run).ids, "hours": 1.0}).to_parquet(run / "01_partition" / "clients.parquet")
    pretrained.save(run / "first", hubert.Hubert(hubert.preset("tiny", front_end="logmel")))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 50_000, 50_000))
    monkeypatch.setattr(hidden, "states", None)  # nothing passes through the model
    with pytest.raises(OSError, match="features take"):
        kmeans.run(run, settings(features=str(run / "first")), Direct(run))


def test_central_codebook_starts_from_all_clients_however_many_they_are(run, monkeypatch):
    """A client's part of FIT_FRAMES may be shorter than any of its utterances."""
    monkeypatch.setattr(reading, "FIT_FRAMES", 150)
    fitted, fit = [], clustering.fit
    monkeypatch.setattr(clustering, "fit", lambda points, *more: fitted.append(len(points)) or fit(points, *more))
    kmeans.run(run, settings(codebooks=["central"]), Direct(run))
    assert 150 - 125 < fitted[0] <= 150  # up to the first utterance that is too long, of 125 frames at most


def test_pooled_labels_keep_no_file_open(run):
    kmeans.run(run, settings(codebooks=["federated", "client"]), Direct(run))
    before = psutil.Process().num_fds()
    labels = pooled.labels(sorted((run / "02_kmeans" / "clients").glob("*/federated")))
    assert len(labels) == 15 and psutil.Process().num_fds() == before


def test_work_of_other_settings_moves_aside_and_comes_back(run, monkeypatch):
    kmeans.run(run, settings(codebooks=["federated", "client"]), Direct(run))
    whole = labels_of(run, "client-001").flat.tolist()
    kmeans.run(run, settings(codebooks=["federated", "client"], clusters=5), Direct(run))
    assert labels_of(run, "client-001").flat.max() == 4 and len(codebook(run)) == 5
    monkeypatch.setattr(clustering, "fit", None)  # nothing is fitted again, or labelled
    monkeypatch.setattr(client, "assign", lambda frames, codebook: torch.zeros(len(frames)).long())
    kmeans.run(run, settings(codebooks=["federated", "client"]), Direct(run))
    assert labels_of(run, "client-001").flat.tolist() == whole and len(codebook(run)) == 8


def test_two_folders_without_settings_move_aside_both(tmp_path):
    for number in range(2):
        folder = tmp_path / "features"
        folder.mkdir()
        (folder / "work").write_text(str(number))
        reading.folder_for(folder, {"seed": number})
        (folder / "settings.json").unlink(missing_ok=True)
        shutil.rmtree(folder)
    assert sorted(path.read_text() for path in tmp_path.glob(".previous/*/work")) == ["0", "1"]


@pytest.mark.parametrize("where", ["_fit", "_agreement"])
def test_work_of_other_settings_that_was_stopped_is_not_taken_for_that_of_these(run, monkeypatch, where):
    kmeans.run(run, settings(), Direct(run))
    whole = labels_of(run, "client-001").flat.tolist()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage, where, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        kmeans.run(run, settings(clusters=5), Direct(run))
    kmeans.run(run, settings(), Direct(run))
    assert labels_of(run, "client-001").flat.tolist() == whole and len(codebook(run)) == 8


def test_codebook_that_was_removed_is_made_again(run):
    """As the message about one that cannot be read asks for."""
    table = kmeans.run(run, settings(), Direct(run))
    whole, centroids = labels_of(run, "client-001").flat.tolist(), codebook(run).tolist()
    (run / "02_kmeans" / "codebooks" / "federated" / "codebook.json").unlink()
    again = kmeans.run(run, settings(), Direct(run))
    assert again.bytes_up["federated"] == table.bytes_up["federated"] > 0, "of the fit, whose rounds are not done again"
    assert recipes.clusters(run, "federated") == 8 and codebook(run).tolist() == centroids
    assert labels_of(run, "client-001").flat.tolist() == whole


@pytest.mark.parametrize("damage", ["missing", "short", "unreadable", "beyond"])
def test_damaged_labels_are_found_before_training_and_made_again(run, damage):
    """By what the message says and the same call: no codebook is fitted again, no other client's labels are touched."""
    pandas.DataFrame({"client": Direct(run).ids, "hours": 0.01}).to_parquet(run / "01_partition" / "clients.parquet")
    kmeans.run(run, settings(), Direct(run))
    p, folder = params.Pretrain(), run / "02_kmeans" / "clients" / "client-001" / "federated"
    preflight.check("pretrain", p, run)
    whole, centroids = labels_of(run, "client-001").flat.tolist(), codebook(run).tolist()
    if damage == "missing":
        shutil.rmtree(folder)
    elif damage == "unreadable":
        (folder / "index.parquet").write_bytes(b"PAR1")
    else:
        content = (folder / "labels.bin").read_bytes()
        (folder / "labels.bin").write_bytes(content[:-2] if damage == "short" else b"\xff" * len(content))
    with pytest.raises(runs.RunError, match=rf"pretrain.codebook: {folder}.* run 02_kmeans again"):
        preflight.check("pretrain", p, run)
    shutil.rmtree(folder, ignore_errors=True)
    kmeans.run(run, settings(), Direct(run))
    preflight.check("pretrain", p, run)
    assert labels_of(run, "client-001").flat.tolist() == whole and codebook(run).tolist() == centroids


def test_labels_of_another_partition_are_not_kept(run):
    kmeans.run(run, settings(), Direct(run))
    (run / "02_kmeans" / "quality.json").unlink()
    path = run / "01_partition" / "clients" / "client-001" / "train.parquet"
    table = pandas.read_parquet(path).iloc[1:]
    table.to_parquet(path, index=False)
    kmeans.run(run, settings(), Direct(run))
    assert labels_of(run, "client-001").utterances[:3] == table.utterance.tolist()


@pytest.mark.parametrize(("second", "rounds"), [(10.0, 2), (0.0, 5)])
def test_lloyd_does_not_settle_while_a_cluster_is_empty_and_fills_it_by_the_seed(second, rounds):
    """The inertia does not change; an empty cluster begins anew beside the one that is spread most."""
    answer = {"sums": torch.tensor([[10.0] * 3, [2 * second] * 3]), "counts": torch.tensor([10.0, second])}
    answer |= {"inertias": torch.tensor([5.0, second / 10])}
    clients = SimpleNamespace(bytes={}, since=lambda before: {})
    exchange = SimpleNamespace(clients=clients, ask=lambda *_, **__: [Reply("a", dict(answer), {})])
    ends = []
    for seed in (0, 0, 1):
        config = {"seed": seed, "noise_multiplier": 0, "minimum_count": 0}
        centroids, stats = server.lloyd(
            exchange, config, torch.tensor([[1.0] * 3, [2.0] * 3]), rounds=5, tolerance=1e-4
        )
        assert stats["round"] == rounds
        ends.append(centroids.flatten().tolist())
    assert ends[0] == ends[1] and (ends[0] == ends[2]) == bool(second)


def test_draws_of_a_clients_clusters_are_those_of_client_and_study(run, monkeypatch):
    monkeypatch.setattr(reading, "in_memory", lambda home, config: blobs())

    def centroids(action: str, client_id: str, seed: int) -> torch.Tensor:
        config = server.settings(settings(seed=seed)) | {"kind": "client", "local": 8}
        answer, _ = handlers.HANDLERS[f"kmeans.{action}"](home(run, client_id), {}, config)
        return (answer or client.lend(home(run, client_id), {}, config)[0])["centroids"]

    for action in ("local_centroids", "fit"):
        first = centroids(action, "client-000", 0)
        assert torch.equal(first, centroids(action, "client-000", 0))
        for other in (("client-001", 0), ("client-000", 1)):
            assert not torch.allclose(first, centroids(action, *other))


def test_a_codebook_of_other_utterances_is_fitted_anew(run):
    """By the client, which keeps one of the same utterances whatever the server has begun anew."""

    def frames() -> dict[str, float]:
        exchange, config = prepared(run, settings())
        fitted = exchange.ask("fit", {}, {**config, "kind": "client"})
        return {reply.client: reply.metrics["frames"] for reply in fitted}

    before, path = frames(), run / "01_partition" / "clients" / "client-001" / "train.parquet"
    lengths = pandas.read_parquet(path).samples.map(audio.frame_count)
    kept = home(run).state / "codebook" / "client.safetensors"
    made = kept.stat().st_mtime_ns
    assert before["client-001"] == lengths.sum() and frames() == before and kept.stat().st_mtime_ns == made
    pandas.read_parquet(path).iloc[1:].to_parquet(path, index=False)
    assert frames() == before | {"client-001": lengths[1:].sum()}


def test_what_leaves_a_client(run):
    """Replies hold K x D sums and K counts, nothing that grows with a client's frames; labels only of public frames."""
    clients = Direct(run)
    kmeans.run(run, settings(codebooks=["federated", "client"], normalisation="speaker"), clients)
    public = pandas.read_parquet(run / "01_partition" / "heldout.parquet").samples.map(audio.frame_count).sum()
    for action, reply in clients.replies:
        for name, array in reply.arrays.items():
            if action == "kmeans.probe":
                assert array.shape == (public,)
            else:
                assert array.numel() <= (40 if name == "phones" else 8 * 39), (action, name)


def test_k_larger_than_frames(run):
    with pytest.raises(kmeans.KmeansError, match="local centroids for 5000 clusters; lower clusters"):
        kmeans.run(run, settings(clusters=5_000), Direct(run))


def test_client_with_too_few_frames_says_so(run):
    config = server.settings(settings())
    reading.compute(home(run), {}, config)
    with pytest.raises(ValueError, match=r"client-001 has \d+ frames to fit 9999 clusters"):
        client.fit(home(run), {}, {**config, "clusters": 9_999})


@pytest.mark.parametrize("action", ["features", "local_centroids", "lloyd", "label"])
def test_failed_client_stops_the_stage_and_is_tried_again_alone(run, action, monkeypatch):
    """Neither silent nor a dead end: the stage says who and why, and the same command does what is missing."""
    whole = kmeans.run(run, settings(), Direct(run))
    centroids = codebook(run)
    shutil.rmtree(run / "02_kmeans")
    clients, rows = Direct(run), []
    clients.failing = {"client-001": f"kmeans.{action}"}
    with pytest.raises(kmeans.KmeansError, match=rf"kmeans.{action}: 1 of 3 .*\nclient-001: away"):
        kmeans.run(run, settings(), clients, rows.append)
    assert [row["client"] for row in rows if row["kind"] == "failure"] == ["client-001"]
    assert not (run / "02_kmeans" / "quality.json").exists()
    read, original = [], audio.read
    monkeypatch.setattr(audio, "read", lambda path, **length: (read.append(path), original(path, **length))[1])
    clients.failing = {}
    again = kmeans.run(run, settings(), clients)
    again, whole = (
        table.drop(columns=[c for c in table if "seconds" in c or "bytes" in c]) for table in (again, whole)
    )
    pandas.testing.assert_frame_equal(again, whole)
    np.testing.assert_array_equal(codebook(run), centroids)
    if action == "features":  # the others' are kept
        assert {Path(path).name[:2] for path in read} == {"s1", "s3"}  # client-001, and public speech


@pytest.mark.parametrize("kind", ["client", "aligned"])
def test_a_client_that_was_away_when_the_others_fitted_their_codebooks_fits_its_later(run, kind):
    rows = [{"client": f"client-00{number}", "train_utterances": 4, "hours": 0.01} for number in range(3)]
    pandas.DataFrame(rows).to_parquet(run / "01_partition" / "clients.parquet")
    clients = Direct(run)
    clients.failing = {"client-001": "kmeans.fit", "client-002": "kmeans.label"}
    kmeans.run(run, settings(codebooks=[kind], missing_clients=1), clients)
    assert federated.client_ids(run, kind) == ["client-000", "client-001"]
    clients.failing = {}
    assert kmeans.run(run, settings(codebooks=[kind]), clients).loc[kind, "clients"] == 3
    assert federated.client_ids(run, kind) == [row["client"] for row in rows]


def test_missing_clients_are_left_out_of_training(run):
    """As many as the study states: pretraining and its pooled twin then use exactly the clients that have labels."""
    rows = [{"client": f"client-00{number}", "train_utterances": 4, "hours": 0.01} for number in range(3)]
    pandas.DataFrame(rows).to_parquet(run / "01_partition" / "clients.parquet")
    clients, rows = Direct(run), []
    clients.failing = {"client-001": "kmeans.features"}
    table = kmeans.run(run, settings(missing_clients=1), clients, rows.append)
    assert table.loc["federated", "clients"] == 2
    assert {row["client"] for row in rows if row["kind"] == "failure"} == {"client-001"}
    assert federated.client_ids(run, "federated") == ["client-000", "client-002"]
    homes = handlers.homes(run, federated.client_ids(run, "federated"), "pretrain", "cpu")
    owned = [set(pandas.read_parquet(home.data / "train.parquet")["utterance"]) for home in homes.values()]
    assert len(owned) == 2 and set(pooled.utterances(homes.values())["utterance"]) == set.union(*owned)
    with federated.connect(run, codebook="federated") as connected:
        assert connected.ids == ["client-000", "client-002"]
    clients.failing = {}
    assert kmeans.run(run, settings(missing_clients=1), clients).loc["federated", "clients"] == 2, "nothing to do"
    before = codebook(run)
    assert kmeans.run(run, settings(), clients).loc["federated", "clients"] == 3, "it is wanted now, and back"
    np.testing.assert_array_equal(codebook(run), before)
    shutil.rmtree(run / "02_kmeans")
    clients.failing = {"client-001": "kmeans.features"}
    clients.failing |= {"client-002": "kmeans.lloyd"}
    kmeans.run(run, settings(missing_clients=1), clients)  # one at a time: client-002 has labels
    shutil.rmtree(run / "02_kmeans")
    clients.failing |= {"client-002": "kmeans.label"}
    with pytest.raises(kmeans.KmeansError, match="2 of 3 clients have no labels, and 1 may"):
        kmeans.run(run, settings(missing_clients=1), clients)
    clients.failing |= {"client-002": "kmeans.features"}
    shutil.rmtree(run / "02_kmeans")
    with pytest.raises(kmeans.KmeansError, match="2 of 3 clients failed, and 1 may"):
        kmeans.run(run, settings(missing_clients=1), clients)


def test_unreadable_file_of_one_client_names_it(run):
    path = pandas.read_parquet(run / "01_partition" / "clients" / "client-001" / "train.parquet").path[3]
    whole = Path(path).read_bytes()
    Path(path).write_bytes(b"")
    try:
        with (
            federated_clients(run) as clients,
            pytest.raises(kmeans.KmeansError, match=rf"client-001.*{Path(path).name}"),
        ):
            kmeans.run(run, settings(), clients)
    finally:
        Path(path).write_bytes(whole)
    with federated_clients(run) as clients:
        assert kmeans.run(run, settings(), clients).loc["federated", "clients"] == 3


def federated_clients(run: Path):
    rows = [{"client": f"client-00{number}", "hours": 0.01} for number in range(3)]
    pandas.DataFrame(rows).to_parquet(run / "01_partition" / "clients.parquet")
    return federated.connect(run)


@pytest.mark.parametrize("bad", ["NaN", "shape", "nothing"])
def test_hostile_answers_are_left_out(run, bad):
    clients, rows = Direct(run), []

    def changed(action, reply):
        if action != "kmeans.lloyd" or reply.client != "client-002":
            return reply
        sums = {"NaN": reply.arrays["sums"] * np.nan, "shape": torch.zeros(3)}
        return Reply(reply.client, {**reply.arrays, "sums": sums[bad]} if bad in sums else {})

    clients.change = changed
    kmeans.run(run, settings(missing_clients=1), clients, rows.append)
    reasons = {row["reason"] for row in rows if row["kind"] == "failure"}
    assert len(reasons) == 1 and {"NaN": "NaN", "shape": "[3], not", "nothing": "no sums"}[bad] in reasons.pop()
    assert {row["clients"] for row in rows if row["kind"] == "lloyd"} == {2}


def at(value: float, place: int = 0):
    """A change to an array: ``value`` at ``place``, in float64."""

    def changed(array: torch.Tensor) -> torch.Tensor:
        array = array.double().clone()
        array.flatten()[place] = value
        return array

    return changed


BAD = {
    ("one-shot", "local_centroids", "counts"): [
        (lambda array: torch.cat([array, array[:1]]), "centroids and counts of its answer differ in length"),
        (at(-1), "below 0 .counts"),
    ],
    ("one-shot", "local_centroids", "centroids"): [(at(1e300), "infinity"), (at(1e25), "no speech gives .cent")],
    ("federated", "lloyd", "counts"): [(at(-1e6), "below 0 .counts")],
    ("federated", "lloyd", "inertias"): [(at(-1e9), "below 0 .inertias")],
    ("client", "probe", "labels"): [(at(-1), "below 0 .labels"), (at(8), "labels above 7")],
    ("federated", "label", "contingency"): [
        (None, "no contingency"),
        (lambda array: array[1:], r"contingency of its answer is \[\d, 8\], not"),
        (at(-1), "below 0 .contingency"),
        (at(1e12), "no speech gives .contingency"),
    ],
    ("federated", "label", "phones"): [
        (
            lambda names: torch.tensor([*b"\n".join([b"low"] * (bytes(names.tolist()).count(b"\n") + 1))]),
            "names a phone twice",
        ),
    ],
    ("federated", "label", "runs"): [(lambda runs: -runs, "below 0 .runs")],
    ("client", "fit", "frames"): [(None, "lacks a figure .frames"), (lambda frames: np.nan, "figure .frames")],
}


@pytest.mark.parametrize(
    ("kind", "action", "name", "change", "reason"),
    [(*place, *change) for place, changes in BAD.items() for change in changes],
)
def test_one_broken_answer_is_named_and_counts_as_a_missing_client(run, kind, action, name, change, reason):
    """The arrays are finite and of the right rank, and what they say would end the stage, or spoil a codebook."""
    clients, rows = Direct(run), []

    def changed(asked, reply):
        parts = {"arrays": dict(reply.arrays), "metrics": dict(reply.metrics)}
        if (asked, reply.client) == (f"kmeans.{action}", "client-002"):
            part = parts["metrics" if action == "fit" else "arrays"]
            value = part.pop(name)
            part |= {} if change is None else {name: change(value)}
        return Reply(reply.client, **parts)

    clients.change = changed
    p = settings(codebooks=[kind], missing_clients=1, lloyd_rounds=2)
    kmeans.run(run, p, clients, rows.append)
    failures = [row for row in rows if row["kind"] == "failure"]
    assert {row["client"] for row in failures} == {"client-002"}
    assert all(re.search(reason, row["reason"]) for row in failures), failures


def test_inertia_without_a_frame_is_no_answer(run):
    """A cluster that is empty everywhere, whose variance is the inertia of a broken client over no frame."""
    exchange, config = prepared(run, settings())
    centroids = torch.full((8, config["width"]), 1e6)
    centroids[0] = 0
    exchange.clients.change = lambda action, reply: Reply(
        reply.client, reply.arrays | {"inertias": at(1e12, 7)(reply.arrays["inertias"])}
    )
    with pytest.raises(kmeans.KmeansError, match="client-001: its answer holds inertias of clusters without a frame"):
        server.lloyd(exchange, config, centroids, rounds=1, tolerance=0)


PRIVATE = {"normalisation": "speaker", "noise_multiplier": 0.01, "noise_clip": 200.0, "lloyd_rounds": 4}


def epsilon(rounds: int, multiplier: float) -> float:
    return private.cost(settings(**{**PRIVATE, "noise_multiplier": multiplier}), rounds)["epsilon"]


def test_noise_comes_from_the_system_unless_a_simulation_asks(run):
    """The server knows the seed; with noise from it, it would subtract it."""

    def centroids(**changes):
        clients = Direct(run)
        table = kmeans.run(run, settings(**PRIVATE, **changes), clients)
        assert "kmeans.local_centroids" not in {action for action, _ in clients.asked}
        fitted = codebook(run)
        shutil.rmtree(run / "02_kmeans")
        return fitted, table.loc["federated"]

    (one, row), (other, _) = centroids(), centroids()
    assert (one != other).any() and row.privacy == "client" and row.epsilon == epsilon(4, 0.01)
    (one, row), (other, _) = centroids(noise_seeded=True), centroids(noise_seeded=True)
    np.testing.assert_array_equal(one, other)
    assert "not private" in row.privacy
    config = server.settings(settings(**PRIVATE, noise_seeded=True))
    reading.compute(home(run), {}, config)
    with pytest.raises(ValueError, match="refused outside of a simulation"):
        client.lloyd(home(run, simulated=False), {"centroids": torch.zeros(8, 39)}, {**config, "round": 1})


def test_epsilon_counts_rounds_that_were_asked_twice(run):
    rows = []

    def killed(row):
        rows.append(row)
        if row.get("round") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kmeans.run(run, settings(**PRIVATE), Direct(run), killed)
    table = kmeans.run(run, settings(**PRIVATE), Direct(run), rows.append)
    assert table.loc["federated", "epsilon"] == epsilon(5, 0.01) > epsilon(4, 0.01)
    assert epsilon(10, 1.0) > epsilon(10, 2.0) > epsilon(5, 2.0)


def test_under_noise_nothing_else_leaves_a_client(run):
    """No counts of labels, no phones, no inertia, no labels of its own codebook: no noise covers them."""
    clients = Direct(run)
    table = kmeans.run(run, settings(**{**PRIVATE, "codebooks": ["federated", "client"]}), clients)
    arrays = {action: set(reply.arrays) for action, reply in clients.replies if reply.arrays}
    assert arrays == {"kmeans.lloyd": {"sums", "counts", "inertias"}}
    assert all(not reply.arrays["inertias"].any() for _, reply in clients.replies if reply.arrays)
    assert not {name for _, reply in clients.replies for name in reply.metrics}
    assert table.loc["federated", "heldout_pnmi"] > table.loc["federated", "heldout_shuffled_pnmi"]


def test_one_client_changes_a_round_by_the_clipping_norm_at_most(run, monkeypatch):
    """With normalisation by speaker, too, where one utterance moves all others of its speaker."""
    exchange, config = prepared(run, settings(**PRIVATE))
    monkeypatch.setattr(noise, "generator", lambda *keys: torch.zeros)
    width = config["width"]
    centroids = torch.randn(8, width, generator=torch.Generator().manual_seed(0))
    for clip in (5.0, 50.0, 1e9):
        message = {**config, "noise_clip": clip, "round": 1}
        for reply in exchange.ask("lloyd", {"centroids": centroids}, message):
            total = torch.cat([(reply.arrays["sums"] / width**0.5).flatten(), reply.arrays["counts"]]).norm()
            assert total <= clip * (1 + 1e-9)
            assert clip == 1e9 or total == pytest.approx(clip, rel=1e-5)


def test_minimum_count_hides_small_clusters(run):
    exchange, config = prepared(run, settings(minimum_count=40))
    centroids = server.start(exchange, config)[0]
    for reply in exchange.ask("lloyd", {"centroids": centroids}, {**config, "round": 1}):
        counts = reply.arrays["counts"]
        assert ((counts == 0) | (counts >= 40)).all()
        assert (reply.arrays["sums"][counts == 0] == 0).all()
    for reply in exchange.ask("label", {"centroids": centroids}, {**config, "kind": "federated"}):
        told = reply.arrays["counts"]
        assert ((told == 0) | (told >= 40)).all() and told.any()
        assert "contingency" not in reply.arrays, "without its rare pairs units look far better than they are"
        sequences, counts = labels_of(run, reply.client), reply.arrays["counts"].numpy()
        runs = np.concatenate([units.runs(sequences[one]) for one in sequences.utterances])
        assert reply.arrays["runs"] == (counts[runs] > 0).sum(), "of labels that are told"
    config |= {"minimum_count": 10**6}
    with pytest.raises(server.KmeansError, match="minimum_count: 1000000"):
        server.lloyd(exchange, config, centroids, rounds=1, tolerance=0.0)
    row = kmeans.run(run, settings(minimum_count=40), Direct(run)).loc["federated"]
    assert row.fit_frames > 0 and "fit_fraction" not in row, "of frames of which some are not told"
    central = kmeans.run(run, settings(codebooks=["central"], minimum_count=10**6), Direct(run)).loc["central"]
    assert central.fit_frames > row.fit_frames, "the baseline, for which no client sends anything, hides nothing"


def test_noise_has_its_standard_deviation(run):
    exchange, config = prepared(run, settings(normalisation="speaker"))
    width = config["width"]
    centroids = torch.randn(200, width, generator=torch.Generator().manual_seed(0))
    answers = []
    for multiplier in (1e-12, 3.0):
        message = {**config, "noise_multiplier": multiplier, "noise_clip": 50.0, "round": 1}
        answers.append(next(iter(exchange.ask("lloyd", {"centroids": centroids}, message))).arrays)
    difference = answers[1]["counts"] - answers[0]["counts"]
    assert difference.std() == pytest.approx(150, rel=0.2)
    assert (answers[1]["sums"] - answers[0]["sums"]).std() == pytest.approx(150 * width**0.5, rel=0.05)
    assert answers[0]["inertias"].sum() == 0


def test_the_first_utterances_by_their_draws_are_taken_as_long_as_they_fit():
    rng = np.random.default_rng(0)
    table = pandas.DataFrame({"utterance": [f"u{n}" for n in range(20)], "samples": rng.integers(16_000, 160_000, 20)})
    lengths, order = table.samples.map(audio.frame_count), np.argsort(reading.rank({"seed": 0}, table.utterance))
    for frames in (600, 1_500, 4_000):
        chosen = reading.within(table, {"seed": 0}, frames).index
        assert chosen.tolist() == sorted(order[: len(chosen)])
        assert lengths[chosen].sum() <= frames < lengths[order[: len(chosen) + 1]].sum()
    hours = pandas.DataFrame({"utterance": ["a", "b"], "samples": 3_600 * audio.SAMPLE_RATE})
    kept = reading.within(hours, {"seed": 0}, 30_000).samples
    assert kept.nunique() == 1 and 29_900 < kept.map(audio.frame_count).sum() <= 30_000, "an equal part of each"


def test_sample_fraction(run):
    clients, rows = Direct(run), []
    everything = kmeans.run(run, settings(), clients).loc["federated", "fit_frames"]
    shutil.rmtree(run / "02_kmeans")
    part = kmeans.run(run, settings(sample_fraction=0.4), clients, rows.append).loc["federated"]
    assert 0 < part.fit_frames < 0.8 * everything
    assert part.fit_fraction == part.fit_frames / part.labelled_frames


def test_changed_audio_is_noticed(run):
    path = run / "01_partition" / "clients" / "client-001" / "train.parquet"
    table = pandas.read_parquet(path)
    table.loc[0, "samples"] += 1
    table.to_parquet(path)
    with pytest.raises(audio.AudioError, match="run 00_corpus again"):
        kmeans.run(run, settings(), Direct(run))


# ---------------------------------------------------------------------------------------------------- second iteration


@pytest.mark.parametrize("layer", ["auto", 1])
def test_second_iteration(run, layer):
    """Clusters of a hidden layer by changing one parameter; clients read no file of the server's."""
    torch.manual_seed(0)
    pretrained.save(run / "first", hubert.Hubert(hubert.preset("tiny", front_end="logmel")))
    p = settings(features=str(run / "first"), layer=layer, normalisation="speaker", lloyd_rounds=2)
    table = kmeans.run(run, p, Direct(run))
    assert table.loc["federated", "pnmi"] > 0.4
    model, _ = pretrained.load(run / "first")
    table = reading.utterances(home(run))
    chosen = layer
    if layer == "auto":
        row = json.loads((run / "02_kmeans" / "layer.json").read_text())
        chosen = row["layer"]
        assert min(row["scores"]) > 0.3, "of clusters, not of shuffled ones: .006"
    states = [state[0].half().float() for state in hidden.states(model, [audio.read(p) for p in table.path], [chosen])]
    everything = torch.cat(states)  # of one speaker
    frames = (everything - everything.mean(0)) / everything.std(0, correction=0)
    expected = clustering.nearest(frames, torch.from_numpy(codebook(run))).numpy()
    labels = np.concatenate([labels_of(run, "client-001")[utterance] for utterance in table.utterance])
    assert (labels == expected).mean() > 0.99


def test_layer_is_chosen_by_agreement_without_phones_and_not_at_all_without_public_speech(run):
    pretrained.save(run / "first", hubert.Hubert(hubert.preset("tiny", front_end="logmel", num_hidden_layers=3)))
    (run / "00_corpus" / "phones.parquet").unlink()
    p, clients = settings(features=str(run / "first")), Direct(run)
    kmeans.run(run, p, clients)
    chosen = json.loads((run / "02_kmeans" / "layer.json").read_text())
    assert "agreement" in chosen["reason"] and chosen["layer"] == 1 + int(np.argmax(chosen["scores"]))
    assert len(chosen["scores"]) == 3 and all(0 < score <= 1 for score in chosen["scores"])
    shutil.rmtree(run / "02_kmeans")
    (run / "01_partition" / "heldout.parquet").unlink()
    clients.asked.clear()
    with pytest.raises(kmeans.KmeansError, match="set layer"):
        kmeans.run(run, p, clients)
    assert not clients.asked


def test_layer_too_deep(run):
    pretrained.save(run / "first", hubert.Hubert(hubert.preset("tiny")))
    with pytest.raises(kmeans.KmeansError, match="set layer to 1.."):
        kmeans.run(run, settings(features=str(run / "first"), layer=99), Direct(run))


# ------------------------------------------------------------------------------------------------------- pretraining


@pytest.fixture
def narrow(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One narrow layer, and the list of clients that pretraining reads."""
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    monkeypatch.setitem(hubert.PRESETS, "tiny", {**hubert.PRESETS["tiny"], **small})
    rows = [{"client": f"client-00{number}", "train_utterances": 4, "hours": 0.01} for number in range(3)]
    pandas.DataFrame(rows).to_parquet(run / "01_partition" / "clients.parquet")


SHORT = {"rounds": 3, "cohort": 3, "local_steps": 4, "crop_seconds": 1.0, "front_end": "logmel", "learning_rate": 3e-3}


@pytest.mark.parametrize(
    ("kind", "head", "bound"),
    [
        ("federated", "shared", np.log(8)),
        ("federated", "personal", np.log(8)),
        ("aligned", "shared", np.log(8)),
        ("client", "personal", np.log(8)),
        ("client", "shared", 1.5 * np.log(8)),  # a head that averages over codebooks with nothing in common
    ],
)
@pytest.mark.usefixtures("narrow")
def test_pretraining_takes_shared_and_own_codebooks(run, kind, head, bound):
    kmeans.run(run, settings(codebooks=[kind]), Direct(run))
    pretraining.run(run, pretrain(codebook=kind, head=head, server="fedavg", server_rate=1.0, **SHORT))
    rows = files.read_rows(run / "03_pretrain" / "metrics.jsonl")
    losses = [row["validation_loss"] for row in rows if row["kind"] == "round"]
    assert max(losses) < bound, "guessing evenly has log 8"
    assert (run / "03_pretrain" / "checkpoint" / "head.safetensors").exists() == (head == "shared")


@pytest.mark.usefixtures("narrow")
def test_pretraining_takes_the_targets_of_a_second_iteration(run):
    """Clusters of what the first pretraining made, predicted by a new model with as many classes as they are."""
    kmeans.run(run, settings(), Direct(run))
    pretraining.run(run, pretrain(**SHORT))
    shutil.move(run / "03_pretrain" / "checkpoint", run / "first")
    for done in ("02_kmeans", "03_pretrain"):
        shutil.rmtree(run / done)
    p = settings(features=str(run / "first"), clusters=12, lloyd_rounds=3)
    kmeans.run(run, p, Direct(run))
    _, head = pretrained.load(pretraining.run(run, pretrain(**SHORT)))
    assert len(head.label_embeddings) == 12


def test_codes_of_a_random_projection_lie_on_the_sphere_and_follow_the_seed():
    config = {"seed": 0, "width": 39, "clusters": 8}
    one, other = server.random_projection(config), server.random_projection(config | {"seed": 1})
    torch.testing.assert_close(one["centroids"].norm(dim=1), torch.ones(8))
    assert one["projection"].abs().max() <= (6 / 55) ** 0.5, "Xavier's range, as in BEST-RQ"
    assert not torch.equal(one["projection"], other["projection"])


def test_seeding_is_weighted_and_followed_by_passes_over_all_frames(monkeypatch):
    points = torch.tensor([[0.0], [1.0], [2.0]])
    for seed in range(5):
        weights = torch.tensor([0.0, 1.0, 0.0])
        assert clustering.plus_plus(points, 1, np.random.default_rng(seed), weights).item() == 1
    frames = blobs(3_000)
    monkeypatch.setattr(clustering, "SEEDING_POINTS", 100)
    fitted = clustering.fit(frames, 20, np.random.default_rng(0))
    further = clustering.lloyd(frames, fitted, np.random.default_rng(0))
    assert clustering.inertia(frames, further) > 0.99 * clustering.inertia(frames, fitted)


def test_private_clusters_within_the_noise_count_as_empty():
    def ask(*_, **__):
        sums, counts = torch.tensor([[100.0], [7.0]]).double(), torch.tensor([10.0, 0.7]).double()
        return [Reply(one, {"sums": sums, "counts": counts, "inertias": torch.zeros(2).double()}) for one in "abcd"]

    clients = SimpleNamespace(bytes={}, since=lambda before: {})
    exchange = SimpleNamespace(ids=list("abcd"), ask=ask, clients=clients)
    config = {"seed": 0, "noise_multiplier": 1.0, "noise_clip": 2.0, "minimum_count": 0}
    _, stats = server.lloyd(exchange, config, torch.tensor([[9.0], [50.0]]), rounds=1, tolerance=0)
    assert stats["empty"] == 1, "2.8 frames, with noise of 2 sqrt(4)"


def test_not_all_clients_may_be_missing():
    clients = SimpleNamespace(ids=["a", "b"], ask=lambda *_, clients, **__: [Failure(one, "away") for one in clients])
    exchange = server.Exchange(clients, lambda row: None, missing=5)
    with pytest.raises(server.KmeansError, match="2 of 2 clients failed"):
        list(exchange.ask("lloyd", {"a": torch.zeros(3)}, {}))


def test_long_asks_say_how_many_clients_have_answered(monkeypatch):
    monkeypatch.setattr(server, "PATIENCE", -1.0)
    rows, clients = [], SimpleNamespace(ids=["a", "b"], ask=lambda *_, clients, **__: map(Reply, clients))
    config = {"clusters": 2, "noise_multiplier": 0.0}
    assert len(list(server.Exchange(clients, rows.append).ask("features", {}, config))) == 2
    assert rows == [{"kind": "answers", "action": "features", "clients": n, "of": 2} for n in (1, 2)]


def test_seeded_noise_differs_by_client_and_round_and_a_random_start_by_seed():
    config = {"noise_seeded": True, "seed": 0, "round": 1, "noise_clip": 1.0, "noise_multiplier": 1.0}

    def sums(client_id, **changes):
        home = ClientHome(client_id, Path(), Path(), Path(), simulated=True)
        return private.released(home, config | changes, torch.zeros(2, 3).double(), torch.zeros(2).double())[0]

    assert not torch.equal(sums("a"), sums("b")) and not torch.equal(sums("a"), sums("a", round=2))
    starts = [private.random_start({"seed": seed, "clusters": 2, "width": 3}) for seed in (0, 1)]
    assert not torch.equal(*starts)


def test_a_layer_is_chosen_among_all_but_the_input_normalised_and_for_one_checkpoint(monkeypatch, tmp_path):
    asked, scaled, frames = [], [], [torch.randn(3, 60, 4)]
    described = {"model": {"num_hidden_layers": 3}, "checkpoint": "first", "normalisation": "none"}
    monkeypatch.setattr(hidden, "describe", lambda p, layer: (described, {}))
    monkeypatch.setattr(hidden.public, "speech", lambda *_: (pandas.DataFrame({"speaker": ["s"]}), None))
    monkeypatch.setattr(hidden.public, "extracted", lambda *_: asked.append(list(_[-1])) or frames)
    monkeypatch.setattr(hidden.public, "normalised", lambda parts, *_: scaled.append(1) or list(parts))
    p = params.Kmeans(features="x", layer="auto", clusters=4)
    for checkpoint in ("first", "first", "second"):
        described["checkpoint"] = checkpoint
        hidden.choose(tmp_path, p, "cpu", lambda row: None)
    assert asked == [[1, 2, 3]] * 2 and len(scaled) == 6


def test_a_layer_is_scored_on_frames_whose_phone_is_known(monkeypatch, tmp_path):
    """Two layers of 60 frames: the first tells two phones apart, the second frames that have one from the others."""
    phones = np.array(["a", "b", ""] * 20)
    one_hot = torch.eye(2)
    parts = [torch.stack([one_hot[(phones == "b").astype(int)], one_hot[(phones == "").astype(int)]])]
    described = {"model": {"num_hidden_layers": 2}, "checkpoint": "one", "normalisation": "none"}
    monkeypatch.setattr(hidden, "describe", lambda p, layer: (described, {}))
    monkeypatch.setattr(hidden.public, "speech", lambda *_: (pandas.DataFrame({"speaker": ["s"]}), phones))
    monkeypatch.setattr(hidden.public, "extracted", lambda *_: parts)
    rows = []
    p = params.Kmeans(features="x", layer="auto", clusters=2)
    assert hidden.choose(tmp_path, p, "cpu", rows.append) == 1
    assert rows[0]["scores"] == pytest.approx([1.0, 0.0])


def test_pieces_of_a_long_recording_are_equal(tmp_path, monkeypatch):
    """A rest of a few frames would be no speech to a model."""
    monkeypatch.setattr(reading, "BATCH_SAMPLES", 100 * audio.HOP)
    heard = []

    def states(model, waveforms, layers, device):
        heard.extend(audio.frame_count(len(waveform)) for waveform in waveforms)
        return [torch.zeros(1, heard[-1], 2) for _ in waveforms]

    monkeypatch.setattr(hidden, "model_of", lambda *_: None)
    monkeypatch.setattr(hidden, "states", states)
    samples = 202 * audio.HOP + 100
    soundfile.write(path := tmp_path / "long.wav", np.zeros(samples), audio.SAMPLE_RATE)
    table = pandas.DataFrame({"utterance": ["long"], "path": [str(path)], "speaker": ["a"], "samples": [samples]})
    config = {"features": "hidden", "layer": 1}
    ((_, (frames,)),) = reading.extracted({}, config, table, "cpu")
    assert heard == [68, 68, 66] and frames.shape[1] == audio.frame_count(samples) == sum(heard)


def test_states_of_a_model_that_hears_speech_normalised_do_not_know_its_scale():
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = hubert.preset("large", **small, conv_dim=(16,) * 7)
    assert config.do_normalize
    model, speech = hubert.Hubert(config).eval(), 0.1 * torch.randn(8_000, generator=torch.Generator().manual_seed(0))
    (plain,), (louder,) = (hidden.states(model, [waveform], [1]) for waveform in (speech, 5 * speech + 0.3))
    torch.testing.assert_close(plain, louder, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        whole = model(audio.normalise(speech)[None], hidden_states=True, normalised=True).hidden[1]
    torch.testing.assert_close(plain, whole, rtol=1e-3, atol=1e-3)
