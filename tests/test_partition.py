"""Partition schemes: each does what its docstring says, from the seed, and loses no utterance."""

from pathlib import Path
from typing import get_args

import manifests
import numpy as np
import pandas as pd
import pytest
import soundfile

from fedhubert_lib import cli, params, partition, seeds
from fedhubert_lib.corpora import librispeech, scan

SCHEMES = get_args(params.Partition.model_fields["scheme"].annotation)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return manifests.librispeech960(utterances=6_000, speakers=120)


def parameters(scheme: str, table: pd.DataFrame, **changes: object) -> params.Partition:
    values = {"clients": table.speaker.nunique() if scheme == "speaker" else 8, "minimum_minutes": 0.0, "alpha": 5.0}
    return params.Partition(scheme=scheme, **(values | changes))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_owners_follow_from_the_seed(scheme, table):
    first = partition.owners(table, parameters(scheme, table))
    again = partition.owners(table.copy(), parameters(scheme, table))
    assert np.array_equal(first, again)
    assert set(first) == set(range(first.max() + 1)), "client numbers without a gap"
    if scheme != "speaker":
        assert not np.array_equal(first, partition.owners(table, parameters(scheme, table, seed=1)))


@pytest.mark.parametrize("scheme", ["speakers", "speaker", "sex", "subset", "dirichlet"])
def test_owners_keep_speakers_whole(scheme, table):
    if scheme != "subset":  # such as train-clean-5, which is a part of train-clean-100
        elsewhere = (table.speaker == table.speaker[0]) & (table.index % 2 == 0)
        table = table.assign(subset=table.subset.mask(elsewhere, "train-clean-5"))
    owner = partition.owners(table, parameters(scheme, table))
    assert (pd.Series(owner).groupby(table.speaker.to_numpy()).nunique() == 1).all()


def test_owners_of_each_scheme(table):
    def held(scheme: str, column: str) -> pd.Series:
        owner = partition.owners(table, parameters(scheme, table))
        return table[column].groupby(owner).nunique()

    assert (held("speaker", "speaker") == 1).all() and len(held("speaker", "speaker")) == 120
    assert (held("sex", "sex") == 1).all()
    assert (held("subset", "subset") == 1).all()
    owner = partition.owners(table, parameters("chapter", table))
    assert (pd.Series(owner).groupby(table.chapter.to_numpy()).nunique() == 1).all()
    assert (held("iid", "speaker") > 110).all()


def test_the_speaker_of_a_client_that_is_too_small_is_named():
    three = pd.DataFrame({"speaker": ["ana", "ben", "cem"], "samples": [9_600_000, 960_000, 9_600_000]})
    with pytest.raises(partition.PartitionError, match="1 of 3 clients .* the smallest 1.00 of speaker ben;"):
        partition.owners(three, params.Partition(scheme="speaker", clients=3, minimum_minutes=5))


def test_chapters_of_two_speakers_are_two_whatever_their_names():
    like = {"samples": 960_000, "subset": "recordings", "sex": ""}
    two = pd.DataFrame({"speaker": ["A", "A-B"], "chapter": ["B-C", "C"], **like})
    assert sorted(partition.owners(two, parameters("chapter", two, clients=2))) == [0, 1]


def hours(table: pd.DataFrame, p: params.Partition) -> np.ndarray:
    return np.bincount(partition.owners(table, p), table.samples) / partition.HOUR


def test_owners_by_quantity_follow_the_power_law(table):
    share = hours(table, parameters("quantity", table, power=1.0))
    expected = 1 / np.arange(1, 9)
    np.testing.assert_allclose(share / share.sum(), expected / expected.sum(), atol=1e-3)


def test_owners_by_speaker_with_more_clients_than_speakers(table):
    owner = partition.owners(table, parameters("speaker", table, clients=10**9, minimum_minutes=0.1))
    assert owner.max() + 1 == 120
    merged = parameters("speaker", table, clients=10**9, minimum_minutes=30.0, small_clients="merge")
    assert (hours(table, merged) >= 0.5).all()


def test_owners_by_dirichlet_are_less_even_for_small_alpha(table):
    even, uneven = (hours(table, parameters("dirichlet", table, alpha=a, small_clients="merge")) for a in (100.0, 0.3))
    assert even.std() / even.mean() < 0.3 < uneven.std() / uneven.mean()


def test_owners_at_full_size_are_balanced():
    table = manifests.librispeech960()
    share = hours(table, params.Partition(clients=20, heldout_speakers=0))
    assert share.max() / share.min() < 1.01
    assert share.sum() == pytest.approx(table.samples.sum() / partition.HOUR)


def test_owners_below_the_minimum_are_refused_or_merged(table):
    p = parameters("quantity", table, power=2.0, minimum_minutes=60.0)
    with pytest.raises(partition.PartitionError, match=r"minimum_minutes: \d of 8 clients .* small_clients=merge"):
        partition.owners(table, p)
    merged = hours(table, p.model_copy(update={"small_clients": "merge"}))
    assert 1 < len(merged) < 8 and merged.min() >= 1
    assert merged.sum() == pytest.approx(table.samples.sum() / partition.HOUR)
    with pytest.raises(partition.PartitionError, match="all training speech"):
        partition.owners(table, p.model_copy(update={"small_clients": "merge", "minimum_minutes": 1e6}))


@pytest.mark.parametrize("minimum", [0.0, 0.1])
def test_a_client_of_utterances_too_short_to_train_on_is_refused_or_merged(table, minimum):
    """It would fail in every round; half a second a hundred times is speech, and no training speech."""
    short = table.speaker == table.speaker.iloc[0]
    table = table.assign(samples=table.samples.where(~short, 8_000))
    p = parameters("speaker", table, clients=10**9, minimum_minutes=minimum)
    with pytest.raises(partition.PartitionError, match="1 of 120 clients .* 1 s or more"):
        partition.owners(table, p)
    owner = partition.owners(table, p.model_copy(update={"small_clients": "merge"}))
    assert owner.max() + 1 == 119 and (owner == owner[short][0]).sum() > short.sum()


@pytest.mark.parametrize(
    ("scheme", "changes", "message"),
    [
        ("speakers", {"clients": 121}, "for 121 clients there are only 120 speakers; give fewer"),
        ("speaker", {"clients": 119}, "set clients=120"),
        ("sex", {"clients": 240}, "clients there are only 60 [FM] speakers"),
        ("subset", {"clients": 2}, "a client for each of train-clean-100"),
    ],
)
def test_owners_refuse_impossible_requests(scheme, changes, message, table):
    with pytest.raises(partition.PartitionError, match=message):
        partition.owners(table, parameters(scheme, table, **changes))


@pytest.mark.parametrize("scheme", ["sex", "subset"])
def test_owners_refuse_a_scheme_of_one_group(scheme, table):
    with pytest.raises(partition.PartitionError, match=f"all speech is of one {scheme}, F; use scheme speakers"):
        partition.owners(table.assign(**{scheme: "F"}), parameters(scheme, table))


def test_owners_refuse_unknown_sex(table):
    with pytest.raises(partition.PartitionError, match=r"SPEAKERS\.TXT"):
        partition.owners(table.assign(sex=""), parameters("sex", table))
    with pytest.raises(partition.PartitionError, match="two groups"):
        partition.owners(table.assign(sex="", subset="mine"), parameters("dirichlet", table))


@pytest.fixture
def run(tmp_path: Path, table: pd.DataFrame) -> Path:
    (tmp_path / "00_corpus").mkdir()
    test = table.head(50).assign(split="test", speaker="test", utterance=[f"test-{i}" for i in range(50)])
    pd.concat([table, test]).to_parquet(tmp_path / "00_corpus" / "manifest.parquet", index=False)
    phones = pd.DataFrame({"utterance": table.utterance[::3], "start_sample": 0, "end_sample": 400, "phone": "AA"})
    phones.to_parquet(tmp_path / "00_corpus" / "phones.parquet")
    return tmp_path


def test_assign_writes_every_utterance_once(run, table):
    clients = partition.assign(run, params.Partition(clients=5, heldout_speakers=4, validation_fraction=0.2))
    folder = run / "01_partition"
    parts = ("train.parquet", "validation.parquet")
    lists = {c: [pd.read_parquet(folder / "clients" / c / part) for part in parts] for c in clients.client}
    heldout = pd.read_parquet(folder / "heldout.parquet")
    everything = pd.concat([heldout, *(part for pair in lists.values() for part in pair)])
    assert sorted(everything.utterance) == sorted(table.utterance), "test speech stays out, nothing else is lost"
    assert heldout.speaker.nunique() == 4 and (heldout.drop_duplicates("speaker").sex == "F").sum() == 2
    assert not set(heldout.speaker) & {s for pair in lists.values() for part in pair for s in part.speaker}
    for row in clients.itertuples():
        train, validation = lists[row.client]
        assert list(train.columns) == list(table.columns)
        assert (len(train), len(validation)) == (row.train_utterances, row.validation_utterances)
        assert len(validation) == round(0.2 * (len(train) + len(validation)))
        phones = pd.read_parquet(folder / "clients" / row.client / "phones.parquet")
        utterances = {*train.utterance, *validation.utterance}
        assert set(phones.utterance) == utterances & set(table.utterance[::3])
        content = (folder / "clients" / row.client / "phones.parquet").read_bytes()
        others = set(table.utterance.sample(300, random_state=0)) - utterances
        assert not [name for name in others if f"{name}\0".encode() in content or f"{name}\x0b".encode() in content]
    assert pd.read_parquet(folder / "clients.parquet").equals(clients)


def test_assign_replaces_an_earlier_partition(run):
    partition.assign(run, params.Partition(clients=9))
    partition.assign(run, params.Partition(clients=4))
    assert len(list((run / "01_partition" / "clients").iterdir())) == 4


def test_validation_mask_leaves_something_to_train_on():
    client, samples = np.array([0, 1, 1, 2, 2, 2]), np.full(6, 16_000)
    mask = partition.validation_mask(client, samples, params.Partition(validation_fraction=1.0))
    assert np.bincount(client[~mask]).tolist() == [1, 1, 1]
    assert not partition.validation_mask(client, samples, params.Partition(validation_fraction=0.0)).any()
    mask = partition.validation_mask(client, samples, params.Partition(validation_fraction=0.01))
    assert np.bincount(client[mask]).tolist() == [0, 1, 1]
    short = np.where(np.arange(6) == 4, 16_000, 8_000)  # the only one that client 2 can train on
    for seed in range(10):
        mask = partition.validation_mask(client, short, params.Partition(validation_fraction=0.5, seed=seed))
        assert not mask[4] and np.bincount(client[mask]).tolist() == [0, 1, 2]
        more = np.where(np.arange(6) > 3, 16_000, 8_000)  # one of two
        mask = partition.validation_mask(client, more, params.Partition(validation_fraction=0.5, seed=seed))
        assert mask[4:].sum() == 1 and np.bincount(client[mask]).tolist() == [0, 1, 2], "and the other is validated on"
        mask = partition.validation_mask(client, more, params.Partition(validation_fraction=0.01, seed=seed))
        assert mask[4:].sum() == 1 and np.bincount(client[mask]).tolist() == [0, 1, 1]


def test_client_names_sort_as_numbers():
    names = partition.client_names(2338)
    assert names == sorted(names) and names[7] == "client-0007" and partition.client_names(3)[2] == "client-002"


@pytest.fixture
def spoken(tmp_path: Path) -> Path:
    """A run over eight real files, two clients."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(8):
        path = tmp_path / "corpus" / f"{i}.flac"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, rng.normal(0, 0.1, 16_000), 16_000, subtype="PCM_16")
        header = scan.header(str(path))
        rows.append((f"{i % 4}-1-{i}", str(path), str(i % 4), "1", "mine", "F", 16_000, 16_000, "", header.fingerprint))
    (tmp_path / "run" / "00_corpus").mkdir(parents=True)
    manifest = pd.DataFrame(rows, columns=librispeech.COLUMNS).assign(split="train")
    manifest.to_parquet(tmp_path / "run" / "00_corpus" / "manifest.parquet")
    partition.assign(tmp_path / "run", params.Partition(clients=2, heldout_speakers=0, minimum_minutes=0))
    return tmp_path / "run"


def test_export_client_copies_its_audio_alone(spoken, tmp_path):
    partition.export_client(spoken, "client-001", tmp_path / "node")
    assert (tmp_path / "node").stat().st_mode & 0o777 == 0o700, "speakers are nobody else's business"
    lists = [pd.read_parquet(path) for path in (tmp_path / "node").rglob("*.parquet")]
    held = pd.concat(lists)
    utterances = pd.concat(
        pd.read_parquet(p) for p in (spoken / "01_partition" / "clients" / "client-001").glob("*.parquet")
    )
    assert sorted(held.utterance) == sorted(utterances.utterance) and 0 < len(held) < 8
    assert sorted(p.name for p in (tmp_path / "node" / "audio").iterdir()) == sorted(held.utterance + ".flac")
    for row in held.itertuples():
        assert Path(row.path).is_relative_to(tmp_path / "node")
        assert scan.header(row.path).fingerprint == row.fingerprint
    assert {p.name for p in (tmp_path / "node" / "01_partition" / "clients").iterdir()} == {"client-001"}
    partition.export_client(spoken, "client-000", tmp_path / "other", at=Path("/data/speech"))
    paths = pd.read_parquet(tmp_path / "other" / "01_partition" / "clients" / "client-000" / "train.parquet").path
    assert paths.str.startswith("/data/speech/audio/").all()


def test_export_client_is_atomic(spoken, tmp_path):
    for name in ("client-002", "..", "client-000/../client-001", "."):
        with pytest.raises(partition.PartitionError, match=f"no client {name}; it has client-000 to client-001"):
            partition.export_client(spoken, name, tmp_path / "node")
    utterances = pd.read_parquet(spoken / "01_partition" / "clients" / "client-001" / "train.parquet")
    soundfile.write(utterances.path[0], np.zeros(16_000), 16_000, subtype="PCM_16")
    with pytest.raises(partition.PartitionError, match="not the audio that was scanned"):
        partition.export_client(spoken, "client-001", tmp_path / "node")
    audio = Path(pd.read_parquet(spoken / "01_partition/clients/client-000/train.parquet").path[0])
    whole = audio.read_bytes()
    audio.write_bytes(whole[: len(whole) // 2] + bytes(300) + whole[len(whole) // 2 + 300 :])
    assert not scan.header(str(audio)).reason, "its ends say nothing of that"
    with pytest.raises(partition.PartitionError, match=f"{audio}: .*damaged"):
        partition.export_client(spoken, "client-000", tmp_path / "node")
    audio.unlink()
    with pytest.raises(partition.PartitionError, match=f"{audio}: no such file; put it back"):
        partition.export_client(spoken, "client-000", tmp_path / "node")
    audio.write_bytes(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "run"]
    (tmp_path / "node").mkdir()
    with pytest.raises(partition.PartitionError, match="already exists"):
        partition.export_client(spoken, "client-000", tmp_path / "node")


def test_export_client_takes_the_name_of_a_run(spoken, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FEDHUBERT_OUTPUTS", str(tmp_path))
    (spoken / "run.json").write_text("{}")
    assert cli.main(["export-client", "run", "client-001", str(tmp_path / "node")]) == 0
    assert (tmp_path / "node" / "01_partition" / "clients" / "client-001" / "train.parquet").is_file()
    assert cli.main(["export-client", "nothing", "client-001", str(tmp_path / "other")]) != 0
    assert "nothing: no run of that name" in capsys.readouterr().err


def test_dirichlet_draws_for_each_subset_and_sex(table):
    owner = partition.owners(table, parameters("dirichlet", table, alpha=0.5, small_clients="merge"))
    groups = table.subset + table.sex
    dealt = pd.crosstab(groups, owner, table.samples, aggfunc="sum", normalize="index").fillna(0).to_numpy()
    assert abs(np.corrcoef(dealt)[np.triu_indices(len(dealt), 1)]).mean() < 0.7


def test_other_seeds_hold_out_other_speakers_and_utterances(table):
    one, other = (params.Partition(heldout_speakers=4, seed=seed) for seed in (0, 1))
    assert partition.heldout_speakers(table, one) != partition.heldout_speakers(table, other)
    masks = [partition.validation_mask(np.zeros(99, int), np.full(99, 16_000), p) for p in (one, other)]
    assert (masks[0] != masks[1]).any()


def test_sexes_have_clients_by_their_hours():
    speakers = [f"{number:02}" for number in range(40)]
    table = pd.DataFrame({"speaker": speakers, "samples": 960_000, "sex": ["F"] * 30 + ["M"] * 10})
    owner = partition.owners(table, params.Partition(scheme="sex", clients=8, minimum_minutes=0))
    assert (len(set(owner[:30])), len(set(owner[30:]))) == (6, 2)


def test_draws_of_seeds_differ_by_every_key():
    assert seeds.derive(0, 1, 11) != seeds.derive(0, 11, 1)
    assert seeds.derive(0, "1") != seeds.derive(0, 1)
