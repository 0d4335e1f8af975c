"""Who owns which utterance: the schemes of 01_partition, from speakers kept whole to IID, each drawn from the seed.

=========  =========================================================================================================
scheme     what a client is
=========  =========================================================================================================
speakers   several whole speakers; clients have equal hours. The usual cross-silo setting of federated ASR (Gao et
           al., "End-to-end speech recognition from federated acoustic models", ICASSP 2022)
speaker    one speaker: a personal device, the natural partition of LEAF (Caldas et al., 2018) and of Guliani et al.,
           "Training speech recognition models with federated learning" (ICASSP 2021)
sex        whole speakers of one sex; the clients are divided between the sexes by hours. The "pathological" split of
           McMahan et al. (AISTATS 2017), each client one class, with voices in place of digits
subset     whole speakers of one subset (clean against other: recording quality); divided likewise. Feature skew in the
           taxonomy of Kairouz et al., "Advances and open problems in federated learning" (2021), section 3.1
chapter    several whole chapters, with equal hours: a reader's books may lie with several clients. Between speakers and
           iid, for devices that share their users; a scheme of this bench's own
dirichlet  whole speakers; each group of speakers (subset and sex) is spread over the clients by shares from
           Dir(alpha): label skew as in Yurochkin et al. (ICML 2019) and NIID-Bench (Li et al., ICDE 2022)
quantity   utterances drawn at random, in amounts falling as rank**-power: pure quantity skew, as the sizes in Li et
           al., "Federated optimization in heterogeneous networks" (MLSys 2020)
iid        utterances drawn at random, in equal amounts: the control, as in McMahan et al. (AISTATS 2017)
=========  =========================================================================================================

Held-out speakers are taken out first and given to nobody; the corpus's test subsets are never looked at.
"""

import heapq
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fedhubert_lib import files, params, seeds
from fedhubert_lib.audio import SAMPLE_RATE
from fedhubert_lib.corpora import scan

HOUR = 3600 * SAMPLE_RATE


class PartitionError(ValueError):
    """A partition that cannot be made as asked."""


def assign(run: Path, p: params.Partition) -> pd.DataFrame:
    """Give every training utterance of the run's manifest to one client; write ``run/01_partition``.

    Each client's folder holds ``train.parquet`` and ``validation.parquet`` with the manifest's columns: all that it may
    read; and ``phones.parquet``, the phones of these utterances, where the corpus knows them. Returns the table of
    clients, as written to ``clients.parquet``: client, train_utterances, validation_utterances, speakers, hours (both
    lists together). Raises PartitionError when a client would have less than ``p.minimum_minutes`` and
    ``p.small_clients`` is "error", or when there are fewer speakers or groups than clients asked for.
    """
    # Arrow's table: paths and texts of a large corpus are copied for one client at a time.
    manifest = pq.ParquetFile(run / "00_corpus" / "manifest.parquet").read().replace_schema_metadata(None)
    everyone = manifest.select(["utterance", "speaker", "chapter", "subset", "sex", "samples", "split"]).to_pandas()
    everyone = everyone[everyone["split"] == "train"]
    heldout = everyone["speaker"].isin(heldout_speakers(everyone, p))
    rest = everyone[~heldout].reset_index(drop=True)
    client = owners(rest, p)
    validation = validation_mask(client, p)

    # Sorted by (list, client), every client's list is one slice.
    order = np.lexsort((rest.index, client, validation))
    count = client.max() + 1
    names = client_names(count)
    rows = np.bincount(client[order] + count * validation[order], minlength=2 * count)
    lists = np.split(everyone.index.to_numpy()[~heldout][order], np.cumsum(rows)[:-1])
    with files.atomic(run / "01_partition" / "clients") as folder:
        for i, mine in enumerate(lists):
            path = folder / names[i % count] / ("train.parquet", "validation.parquet")[i // count]
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(manifest.take(mine), path)
        _write_phones(run, folder, rest["utterance"], client, names)
    with files.atomic(run / "01_partition" / "heldout.parquet") as path:
        pq.write_table(manifest.take(everyone.index.to_numpy()[heldout]), path)
    clients = pd.DataFrame(
        {
            "client": names,
            "train_utterances": rows[:count],
            "validation_utterances": rows[count:],
            "speakers": rest.groupby(client)["speaker"].nunique().to_numpy(),
            "hours": np.bincount(client, rest["samples"]) / HOUR,
        }
    )
    with files.atomic(run / "01_partition" / "clients.parquet") as path:
        clients.to_parquet(path, index=False)
    return clients


def _write_phones(run: Path, folder: Path, utterances: pd.Series, client: np.ndarray, names: list[str]) -> None:
    """Each client's share of ``00_corpus/phones.parquet``, beside its lists; nothing where there is no such file."""
    path = run / "00_corpus" / "phones.parquet"
    if not path.exists():
        return
    table = pq.read_table(path, read_dictionary=["utterance", "phone"]).unify_dictionaries().combine_chunks()
    if not len(table):
        return
    coded = table["utterance"].chunk(0)
    owner = pd.Series(client, utterances).reindex(coded.dictionary.to_pylist(), fill_value=-1).to_numpy()
    owner = owner[coded.indices.to_numpy()]
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(len(names) + 1))
    for name, start, end in zip(names, bounds[:-1], bounds[1:], strict=True):
        mine = table.take(order[start:end])
        # As plain text: a dictionary would carry the names of everybody's utterances to every client.
        for column in ("utterance", "phone"):
            mine = mine.set_column(mine.column_names.index(column), column, mine[column].cast(pa.string()))
        pq.write_table(mine, folder / name / "phones.parquet")


def client_names(count: int) -> list[str]:
    """client-000, client-001, …: wide enough that their order as text is that of their numbers."""
    width = max(3, len(str(count - 1)))
    return [f"client-{i:0{width}d}" for i in range(count)]


def heldout_speakers(manifest: pd.DataFrame, p: params.Partition) -> list[str]:
    """``p.heldout_speakers`` speakers drawn from the seed, the sexes in turn, for the global validation set."""
    speakers = manifest.groupby("speaker")["sex"].first()
    if p.heldout_speakers >= len(speakers):
        raise PartitionError(
            f"partition.heldout_speakers: {p.heldout_speakers} of {len(speakers)} training speakers leaves none"
        )
    rng = seeds.numpy_generator(p.seed, "partition", "heldout")
    speakers = speakers.iloc[rng.permutation(len(speakers))]
    turn = speakers.groupby(speakers).cumcount()
    return sorted(speakers.index[np.argsort(turn.to_numpy(), kind="stable")[: p.heldout_speakers]])


def owners(table: pd.DataFrame, p: params.Partition) -> np.ndarray:
    """The number of the client that owns each row of ``table``, by ``p.scheme``: int64 [utterances], 0 … clients-1.

    Every client has at least ``p.minimum_minutes`` of speech; merging leaves fewer clients than asked for. Needs only
    the columns speaker, chapter, subset, sex and samples.
    """
    schemes: dict[str, Callable[[pd.DataFrame, params.Partition, np.random.Generator], np.ndarray]] = {
        "speakers": _by_speakers,
        "speaker": _by_speaker,
        "sex": _by_sex,
        "subset": _by_subset,
        "chapter": _by_chapter,
        "dirichlet": _by_dirichlet,
        "quantity": _by_quantity,
        "iid": _iid,
    }
    rng = seeds.numpy_generator(p.seed, "partition", p.scheme)
    return _at_least(schemes[p.scheme](table, p, rng), table, p)


def _by_speakers(table: pd.DataFrame, p: params.Partition, rng: np.random.Generator) -> np.ndarray:
    return _balanced(table, table["speaker"], p.clients, rng)


def _by_chapter(table: pd.DataFrame, p: params.Partition, rng: np.random.Generator) -> np.ndarray:
    return _balanced(table, table["speaker"] + "-" + table["chapter"], p.clients, rng)


def _by_speaker(table: pd.DataFrame, p: params.Partition, rng: np.random.Generator) -> np.ndarray:
    codes, speakers = pd.factorize(table["speaker"], sort=True)
    if p.clients < len(speakers):
        raise PartitionError(
            f"partition.clients: scheme speaker makes one client of each of the {len(speakers)} speakers left for "
            f"training, not {p.clients}; set clients={len(speakers)}"
        )
    return codes


def _by_sex(table: pd.DataFrame, p: params.Partition, rng: np.random.Generator) -> np.ndarray:
    if not table["sex"].isin(["F", "M"]).all():
        raise PartitionError("partition.scheme: sex of some speakers is not known; is SPEAKERS.TXT beside the subsets?")
    return _by_group(table, table["sex"], p, rng)


def _by_subset(table: pd.DataFrame, p: params.Partition, rng: np.random.Generator) -> np.ndarray:
    return _by_group(table, table["subset"], p, rng)


def _by_group(table: pd.DataFrame, group: pd.Series, p: params.Partition, rng: np.random.Generator) -> np.ndarray:
    codes, groups = pd.factorize(group, sort=True)
    if len(groups) < 2:
        raise PartitionError(f"partition.scheme: all speech is of one {p.scheme}, {groups[0]}; use scheme speakers")
    if p.clients < len(groups):
        raise PartitionError(
            f"partition.clients: scheme {p.scheme} needs a client for each of {', '.join(groups)}, not {p.clients}"
        )
    # Clients in proportion to hours, one at least: each next one goes where a client would have most (D'Hondt).
    hours = np.bincount(codes, table["samples"])
    counts = np.ones(len(groups), dtype=int)
    for _ in range(p.clients - len(groups)):
        counts[np.argmax(hours / (counts + 1))] += 1
    client = np.empty(len(table), dtype=np.int64)
    for i, first in enumerate(np.cumsum(counts) - counts):
        mine = codes == i
        client[mine] = first + _balanced(table[mine], table.loc[mine, "speaker"], counts[i], rng)
    return client


def _by_dirichlet(table: pd.DataFrame, p: params.Partition, rng: np.random.Generator) -> np.ndarray:
    group = table["subset"] + " " + table["sex"]
    if group.nunique() < 2:
        raise PartitionError(
            f"partition.scheme: dirichlet needs two groups of subset and sex; there is {group.iloc[0]!r}"
        )
    client = np.empty(len(table), dtype=np.int64)
    for _, mine in sorted(table.groupby(group).indices.items()):
        shares = rng.dirichlet(np.full(p.clients, p.alpha))
        units, _ = pd.factorize(table["speaker"].to_numpy()[mine], sort=True)
        samples = np.bincount(units, table["samples"].to_numpy()[mine])
        client[mine] = _cut(samples, shares, rng)[units]
    return client


def _by_quantity(table: pd.DataFrame, p: params.Partition, rng: np.random.Generator) -> np.ndarray:
    shares = np.arange(1, p.clients + 1) ** -p.power
    return _cut(table["samples"].to_numpy(), shares / shares.sum(), rng)


def _iid(table: pd.DataFrame, p: params.Partition, rng: np.random.Generator) -> np.ndarray:
    return _cut(table["samples"].to_numpy(), np.full(p.clients, 1 / p.clients), rng)


def _cut(samples: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Lay the items one after another in random order and cut the line at the cumulated shares of its length."""
    order = rng.permutation(len(samples))
    middle = np.cumsum(samples[order]) - samples[order] / 2
    owner = np.empty(len(samples), dtype=np.int64)
    owner[order] = np.searchsorted(np.cumsum(shares)[:-1] * samples.sum(), middle)
    return owner


def _balanced(table: pd.DataFrame, unit: pd.Series, clients: int, rng: np.random.Generator) -> np.ndarray:
    """Whole units, longest first, each to the client that has least so far (Graham's LPT rule).

    Lengths are compared in tenths of the longest, in random order within a tenth, so that the seed decides who is with
    whom; the short ones that come last even out what is left.
    """
    units, names = pd.factorize(unit, sort=True)
    if clients > len(names):
        raise PartitionError(
            f"partition.clients: {clients} clients, but {len(names)} {unit.name or 'chapter'}s to give"
        )
    samples = np.bincount(units, table["samples"])
    tenth = np.floor(10 * samples / samples.max())
    owner = np.empty(len(names), dtype=np.int64)
    heap = [(0.0, client) for client in range(clients)]
    for i in np.lexsort((rng.permutation(len(names)), -tenth)):
        least, client = heapq.heappop(heap)
        owner[i] = client
        heapq.heappush(heap, (least + samples[i], client))
    return owner[units]


def _at_least(client: np.ndarray, table: pd.DataFrame, p: params.Partition) -> np.ndarray:
    """Refuse clients below the minimum, or merge the smallest with the next smallest until none is."""
    expected = client.max() + 1 if p.scheme == "speaker" else p.clients  # other schemes can leave a client with nothing
    minutes = np.bincount(client, table["samples"], minlength=expected) * 60 / HOUR
    small = np.flatnonzero((minutes < p.minimum_minutes) | (minutes == 0))
    if len(small) and p.small_clients == "error":
        raise PartitionError(
            f"partition.minimum_minutes: {len(small)} of {len(minutes)} clients have less than {p.minimum_minutes} "
            f"minutes, the smallest {minutes.min():.2f}; ask for fewer clients, lower it, or set small_clients=merge"
        )
    merged_into = np.arange(len(minutes))
    heap = [(float(minutes[i]), i) for i in np.flatnonzero(minutes)]
    heapq.heapify(heap)
    while len(heap) > 1 and heap[0][0] < p.minimum_minutes:
        least, i = heapq.heappop(heap)
        next_least, j = heapq.heappop(heap)
        merged_into[i] = j
        heapq.heappush(heap, (least + next_least, j))
    if heap[0][0] < p.minimum_minutes:
        raise PartitionError(
            f"partition.minimum_minutes: all training speech is {heap[0][0]:.2f} minutes, less than {p.minimum_minutes}"
        )
    while not np.array_equal(further := merged_into[merged_into], merged_into):  # follow chains to their ends
        merged_into = further
    return pd.factorize(merged_into[client], sort=True)[0]


def validation_mask(client: np.ndarray, p: params.Partition) -> np.ndarray:
    """Which rows are for validation: ``p.validation_share`` of each client's utterances, rounded; bool [utterances].

    One at least where the share is not zero and the client has two; a client always keeps one to train on.
    """
    draw = seeds.numpy_generator(p.seed, "partition", "validation").random(len(client))
    order = np.lexsort((draw, client))
    count = np.bincount(client)
    rank = np.empty(len(client), dtype=np.int64)
    rank[order] = np.arange(len(client)) - np.repeat(np.cumsum(count) - count, count)
    wanted = np.round(p.validation_share * count).astype(np.int64)
    if p.validation_share > 0:
        wanted = np.maximum(wanted, 1)
    return rank < np.minimum(wanted, count - 1)[client]


def export_client(run: Path, client: str, destination: Path, at: Path | None = None) -> Path:
    """Copy what ``client`` owns, its audio and its lists, and nothing of the others, to the new folder ``destination``.

    It is laid out as a run, so that it is what a SuperNode names as its ``run`` folder: ``audio/`` and
    ``01_partition/clients/CLIENT/``. The lists point into ``destination``, or into ``at`` when that is where the folder
    will lie on the client's machine. Every copy is checked against the fingerprint in the manifest. Raises
    PartitionError when there is no such client, the folder already exists, or a file has changed since it was scanned.
    """
    source = run / "01_partition" / "clients" / client
    there = sorted(path.name for path in (run / "01_partition" / "clients").glob("*"))
    if client not in there:
        remedy = f"it has {there[0]} to {there[-1]}" if there else "run 01_partition first"
        raise PartitionError(f"{run} has no client {client}; {remedy}")
    if destination.exists():
        raise PartitionError(f"{destination} already exists; remove it, or export to a new folder")
    with files.atomic(destination) as folder:
        copy = folder / "01_partition" / "clients" / client
        copy.mkdir(parents=True)
        (folder / "audio").mkdir()
        for part in ("train", "validation"):
            table = pd.read_parquet(source / f"{part}.parquet")
            names = [f"{row.utterance}{Path(row.path).suffix}" for row in table.itertuples()]
            for name, row in zip(names, table.itertuples(), strict=True):
                shutil.copyfile(row.path, folder / "audio" / name)
                if scan.header(str(folder / "audio" / name)).fingerprint != row.fingerprint:
                    raise PartitionError(f"{row.path}: not the audio that was scanned; run 00_corpus again")
            home = (at or destination).absolute() / "audio"
            table.assign(path=[str(home / name) for name in names]).to_parquet(copy / f"{part}.parquet", index=False)
        if (source / "phones.parquet").exists():
            shutil.copyfile(source / "phones.parquet", copy / "phones.parquet")
    return destination
