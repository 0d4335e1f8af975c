"""Partition schemes of 01_partition: which client owns which utterance, from whole speakers to IID, by the seed.

=========  =========================================================================================================
scheme     what a client is
=========  =========================================================================================================
speakers   several whole speakers; clients have equal hours. The usual cross-silo setting of federated ASR (Gao et
           al., "End-to-end speech recognition from federated acoustic models", ICASSP 2022)
speaker    one speaker: a personal device, the natural partition of LEAF (Caldas et al., 2018) and of Guliani et al.,
           "Training speech recognition models with federated learning" (ICASSP 2021)
sex        whole speakers of one sex; the clients are divided between the sexes by hours (merging may mix them). The
           "pathological" split of McMahan et al. (AISTATS 2017), each client one class, with voices in place of digits
subset     whole speakers of one subset (clean against other: recording quality); divided likewise. Feature skew in the
           taxonomy of Kairouz et al., "Advances and open problems in federated learning" (2021), section 3.1
chapter    several whole chapters, with equal hours: a reader's books may lie with several clients. Between speakers and
           iid, for devices that share their users; this bench's scheme
dirichlet  whole speakers; each group of speakers (subset and sex) is spread over the clients by fractions from
           Dir(alpha): label skew as in Yurochkin et al. (ICML 2019) and NIID-Bench (Li et al., ICDE 2022)
quantity   utterances drawn at random, in amounts falling as rank**-power: pure quantity skew, as the sizes in Li et
           al., "Federated optimization in heterogeneous networks" (MLSys 2020)
iid        utterances drawn at random, in equal amounts: the control, as in McMahan et al. (AISTATS 2017)
=========  =========================================================================================================

Held-out speakers are taken out first and belong to no client; the corpus's test subsets are never read.
"""

import heapq
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from fedhubert_lib import files, params, seeds
from fedhubert_lib.audio import SAMPLE_RATE, SHORTEST
from fedhubert_lib.corpora import alignments, scan

HOUR = 3600 * SAMPLE_RATE


class PartitionError(ValueError):
    """A partition that cannot be made as asked."""


def assign(run: Path, p: params.Partition) -> pd.DataFrame:
    """Give every training utterance of the run's manifest to one client; write ``run/01_partition``.

    Each client's folder holds ``train.parquet`` and ``validation.parquet`` with the manifest's columns: all that it may
    read; and ``phones.parquet``, the phones of these utterances, where the corpus has them. Returns the table of
    clients, as written to ``clients.parquet``: client, train_utterances, validation_utterances, speakers, hours (both
    lists together). Raises PartitionError when a client would have less than ``p.minimum_minutes`` and
    ``p.small_clients`` is "error", or when there are fewer speakers or groups than clients.
    """
    # Arrow's table: paths and texts of a large corpus are copied for one client at a time.
    manifest = pq.ParquetFile(run / "00_corpus" / "manifest.parquet").read().replace_schema_metadata(None)
    table = manifest.select(["utterance", "speaker", "chapter", "subset", "sex", "samples", "split"]).to_pandas()
    table = table[table["split"] == "train"]
    heldout = table["speaker"].isin(heldout_speakers(table, p))
    rest = table[~heldout]
    client = owners(rest, p)
    validation = validation_mask(client, rest["samples"].to_numpy(), p)
    count = client.max() + 1
    names = client_names(count)
    with files.atomic(run / "01_partition" / "clients") as folder:
        for part, mask in ("train", ~validation), ("validation", validation):
            for name, rows in zip(names, _split(client[mask], rest.index[mask], count), strict=True):
                (folder / name).mkdir(parents=True, exist_ok=True)
                pq.write_table(manifest.take(rows), folder / name / f"{part}.parquet")
        _write_phones(run, folder, rest["utterance"], client, names)
    with files.atomic(run / "01_partition" / "heldout.parquet") as path:
        pq.write_table(manifest.take(table.index[heldout].to_numpy()), path)
    clients = pd.DataFrame(
        {
            "client": names,
            "train_utterances": np.bincount(client[~validation], minlength=count),
            "validation_utterances": np.bincount(client[validation], minlength=count),
            "speakers": rest.groupby(client)["speaker"].nunique().to_numpy(),
            "hours": np.bincount(client, rest["samples"]) / HOUR,
        }
    )
    with files.atomic(run / "01_partition" / "clients.parquet") as path:
        clients.to_parquet(path, index=False)
    return clients


def _split(owner: np.ndarray, rows: np.ndarray, count: int) -> list[np.ndarray]:
    """``rows`` of each owner 0 … count-1, in order; those of no owner (-1) are left out."""
    order = np.argsort(owner, kind="stable")
    return np.split(np.asarray(rows)[order], np.searchsorted(owner[order], np.arange(count + 1)))[1:-1]


def _write_phones(run: Path, folder: Path, utterances: pd.Series, client: np.ndarray, names: list[str]) -> None:
    """Each client's part of ``00_corpus/phones.parquet``, beside its lists; nothing where there is no such file."""
    path = run / "00_corpus" / "phones.parquet"
    if not path.exists() or not pq.read_metadata(path).num_rows:
        return
    table = pq.read_table(path, columns=alignments.PHONES.names, read_dictionary=["utterance", "phone"])
    table = table.unify_dictionaries().combine_chunks()
    coded = table["utterance"].chunk(0)
    owner = pd.Series(client, utterances).reindex(coded.dictionary.to_pylist(), fill_value=-1).to_numpy()
    owner = owner[coded.indices.to_numpy()]
    # As plain text: a dictionary would carry the names of everybody's utterances to every client.
    for name, rows in zip(names, _split(owner, np.arange(len(table)), len(names)), strict=True):
        pq.write_table(table.take(rows).cast(alignments.PHONES), folder / name / "phones.parquet")


def client_names(count: int) -> list[str]:
    """client-000, client-001, …: wide enough that their order as text is that of their numbers."""
    width = max(3, len(str(count - 1)))
    return [f"client-{i:0{width}d}" for i in range(count)]


def heldout_speakers(manifest: pd.DataFrame, p: params.Partition) -> list[str]:
    """``p.heldout_speakers`` speakers drawn from the seed, the sexes in turn: the public speech of the study."""
    speakers = manifest.groupby("speaker")["sex"].first()
    if p.heldout_speakers >= len(speakers):
        raise PartitionError(
            f"partition.heldout_speakers: {p.heldout_speakers} given, of {len(speakers)} training speakers; give fewer"
        )
    rng = seeds.numpy_generator(p.seed, "partition", "heldout")
    speakers = speakers.iloc[rng.permutation(len(speakers))]
    turn = speakers.groupby(speakers).cumcount()
    return sorted(speakers.index[np.argsort(turn.to_numpy(), kind="stable")[: p.heldout_speakers]])


def owners(table: pd.DataFrame, p: params.Partition) -> np.ndarray:
    """The number of the client that owns each row of ``table``, by ``p.scheme``: int64 [utterances], 0 … clients-1.

    Every client has at least ``p.minimum_minutes`` of speech; merging leaves fewer clients than asked for. Needs only
    the columns samples and speaker, and chapter, subset and sex where the scheme looks at them.

    >>> minutes = pd.DataFrame({"speaker": ["ana", "ana", "ben"], "samples": 960_000})
    >>> owners(minutes, params.Partition(scheme="speaker", clients=2))
    array([0, 0, 1])
    """
    rng = seeds.numpy_generator(p.seed, "partition", p.scheme)
    match p.scheme:
        case "speakers":
            client = _balanced(table, table["speaker"], p.clients, rng)
        case "chapter":
            unit = table.groupby([table["speaker"] + "-" + table["chapter"], "speaker"]).ngroup()  # A/B-C is not A-B/C
            client = _balanced(table, unit.rename("chapter"), p.clients, rng)
        case "speaker":
            client, speakers = pd.factorize(table["speaker"], sort=True)
            if p.clients < len(speakers):
                raise PartitionError(
                    f"partition.clients: scheme speaker makes one client of each of the {len(speakers)} speakers left "
                    f"for training, not {p.clients}; set clients={len(speakers)}"
                )
        case "sex" | "subset":
            client = _by_group(table, p, rng)
        case "dirichlet":
            client = _by_dirichlet(table, p, rng)
        case "quantity" | "iid":
            power = p.power if p.scheme == "quantity" else 0.0
            fractions = np.arange(1, p.clients + 1) ** -power
            client = _cut(table["samples"].to_numpy(), fractions / fractions.sum(), rng)
        case _:
            raise PartitionError(f"partition.scheme: nothing in partition.py does {p.scheme} yet")
    return _at_least(client, table, p)


def _by_group(table: pd.DataFrame, p: params.Partition, rng: np.random.Generator) -> np.ndarray:
    if p.scheme == "sex" and not table["sex"].isin(["F", "M"]).all():
        remedy = "is SPEAKERS.TXT beside the subsets? A plain folder has none: use scheme speakers"
        raise PartitionError(f"partition.scheme: some speakers have no sex; {remedy}")
    codes, groups = pd.factorize(table[p.scheme], sort=True)
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
        rows = codes == i
        unit = table.loc[rows, "speaker"].rename(f"{groups[i]} speaker")
        client[rows] = first + _balanced(table[rows], unit, counts[i], rng)
    return client


def _by_dirichlet(table: pd.DataFrame, p: params.Partition, rng: np.random.Generator) -> np.ndarray:
    group = table.groupby("speaker")["subset"].transform("first") + " " + table["sex"]  # whole, if in two subsets
    if group.nunique() < 2:
        raise PartitionError(
            f"partition.scheme: dirichlet needs two groups of subset and sex; there is {group.iloc[0]!r}"
        )
    client = np.empty(len(table), dtype=np.int64)
    for _, rows in sorted(table.groupby(group).indices.items()):
        fractions = rng.dirichlet(np.full(p.clients, p.alpha))
        units, _ = pd.factorize(table["speaker"].to_numpy()[rows], sort=True)
        samples = np.bincount(units, table["samples"].to_numpy()[rows])
        client[rows] = _cut(samples, fractions, rng)[units]
    return client


def _cut(samples: np.ndarray, fractions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Lay the items one after another in random order and cut the line at the cumulated fractions of its length."""
    order = rng.permutation(len(samples))
    middle = np.cumsum(samples[order]) - samples[order] / 2
    owner = np.empty(len(samples), dtype=np.int64)
    owner[order] = np.searchsorted(np.cumsum(fractions)[:-1] * samples.sum(), middle)
    return owner


def _balanced(table: pd.DataFrame, unit: pd.Series, clients: int, rng: np.random.Generator) -> np.ndarray:
    """Whole units, longest first, each to the client that has least so far (Graham's LPT rule).

    Lengths are compared in tenths of the longest, in random order within a tenth, so that the seed decides which units
    a client has; the short ones that come last even out the rest.
    """
    units, names = pd.factorize(unit, sort=True)
    if clients > len(names):
        few = f"{clients} clients there are only {len(names)} {unit.name}s; give fewer clients or held-out speakers"
        raise PartitionError(f"partition.clients: for {few}")
    samples = np.bincount(units, table["samples"])
    tenth = np.floor(10 * samples / samples.max())
    owner = np.empty(len(names), dtype=np.int64)
    heap = [(0.0, client) for client in range(clients)]
    for i in np.lexsort((rng.permutation(len(names)), -tenth)):
        least, owner[i] = heap[0]
        heapq.heapreplace(heap, (least + samples[i], owner[i]))
    return owner[units]


def _at_least(client: np.ndarray, table: pd.DataFrame, p: params.Partition) -> np.ndarray:
    """Refuse clients below the minimum, or merge the smallest with the next smallest until none is.

    Utterances that are too short to be trained on do not count; one that is long enough is the least.
    """
    expected = client.max() + 1 if p.scheme == "speaker" else p.clients  # other schemes can leave a client with nothing
    samples = table["samples"].where(table["samples"] >= SHORTEST, 0)
    minutes = np.bincount(client, samples, minlength=expected) * 60 / HOUR
    minimum = max(p.minimum_minutes, SHORTEST * 60 / HOUR)
    small = np.flatnonzero(minutes < minimum)
    if len(small) and p.small_clients == "error":
        whose = f" of speaker {table['speaker'][client == minutes.argmin()].iloc[0]}" if p.scheme == "speaker" else ""
        raise PartitionError(
            f"partition.minimum_minutes: {len(small)} of {len(minutes)} clients have less than {minimum:.3g} minutes "
            f"in utterances of 1 s or more, the smallest {minutes.min():.2f}{whose}; ask for fewer clients, lower "
            "it, or set small_clients=merge"
        )
    owner = np.arange(len(minutes))  # the client that each one is merged into
    minutes[np.bincount(client, minlength=expected) == 0] = np.inf  # nothing left to merge
    while np.isfinite(minutes).sum() > 1 and minutes.min() < minimum:
        smallest, second = np.argsort(minutes, kind="stable")[:2]
        owner[owner == smallest] = second
        minutes[second] += minutes[smallest]
        minutes[smallest] = np.inf
    if (total := minutes.min()) < minimum:
        raise PartitionError(
            f"partition.minimum_minutes: all training speech is {total:.2f} minutes in utterances of 1 s or more, "
            f"less than {minimum:.3g}"
        )
    return pd.factorize(owner[client], sort=True)[0]


def validation_mask(client: np.ndarray, samples: np.ndarray, p: params.Partition) -> np.ndarray:
    """Which rows are for validation: ``p.validation_fraction`` of each client's utterances, rounded; bool [utterances].

    At least one where the fraction is not zero and the client has two; a client always keeps one to train on. That one
    is long enough to be used, of ``samples`` [utterances], where any is, and one for validation is where two are.
    """
    draw = pd.Series(seeds.numpy_generator(p.seed, "partition", "validation").random(len(client)))
    usable = draw.where(samples >= SHORTEST).groupby(client)
    last, first = draw == usable.transform("max"), draw == usable.transform("min")
    draw += last.astype(float) - (first & ~last)
    count = np.bincount(client)
    kept = np.round(p.validation_fraction * count).clip(int(p.validation_fraction > 0), count - 1)
    return (draw.groupby(client).rank(method="first") <= kept[client]).to_numpy()


def export_client(run: Path, client: str, destination: Path, at: Path | None = None) -> Path:
    """Copy what ``client`` owns, its audio and its lists, and nothing of the others, to the new folder ``destination``.

    It is laid out as a run, so that a SuperNode can use it as its ``run`` folder: ``audio/`` and
    ``01_partition/clients/CLIENT/``. The lists point into ``destination``, or into ``at``, the folder's later place on
    the client's machine. Every copy is checked against the fingerprint in the manifest. Raises PartitionError when
    there is no such client, the folder already exists, or a file has changed or gone since it was scanned.
    """
    source = run / "01_partition" / "clients" / client
    clients = sorted(path.name for path in (run / "01_partition" / "clients").glob("*"))
    if client not in clients:
        remedy = f"it has {clients[0]} to {clients[-1]}" if clients else "run 01_partition first"
        raise PartitionError(f"{run} has no client {client}; {remedy}")
    if destination.exists():
        raise PartitionError(f"{destination} already exists; remove it, or export to a new folder")
    with files.atomic(destination) as folder:
        folder.mkdir(mode=0o700)  # it may wait in a place that others can read
        copy = folder / "01_partition" / "clients" / client
        copy.mkdir(parents=True)
        for part in ("train", "validation"):
            table = pd.read_parquet(source / f"{part}.parquet")
            paths = []
            for row in table.itertuples():
                if not Path(row.path).exists():
                    raise PartitionError(f"{row.path}: no such file; put it back, or run 00_corpus, 01_partition again")
                name = f"audio/{row.utterance}{Path(row.path).suffix}"
                (folder / name).parent.mkdir(parents=True, exist_ok=True)  # of a plain folder: SPEAKER/FILE
                shutil.copyfile(row.path, folder / name)
                copied = scan.header(str(folder / name), decode=True)  # a FLAC's fingerprint stands in its header
                if copied.reason or copied.fingerprint != row.fingerprint:
                    why = copied.reason or "not the audio that was scanned"
                    raise PartitionError(f"{row.path}: {why}; run 00_corpus again, with decode_check: true")
                paths.append(str((at or destination).absolute() / name))
            table.assign(path=paths).to_parquet(copy / f"{part}.parquet", index=False)
        if (source / "phones.parquet").exists():
            shutil.copyfile(source / "phones.parquet", copy / "phones.parquet")
    return destination


def check_lists(data: Path) -> None:
    """Raise PartitionError unless the lists in a client's folder ``data``, which others may have made, can be used."""
    listed: set[str] = set()
    for part in ("train", "validation"):
        path = data / f"{part}.parquet"
        if not path.is_file():
            raise PartitionError(f"{path}: no such file; `fedhubert export-client` writes it")
        table = pd.read_parquet(path)
        if missing := {"utterance", "path", "speaker", "samples"} - set(table):
            raise PartitionError(f"{path}: no column {', '.join(sorted(missing))}")
        for column in ("utterance", "path", "speaker"):
            if not all(isinstance(value, str) and value for value in table[column]):
                raise PartitionError(f"{path}: column {column} holds something other than text")
        if len(table) and table.samples.dtype.kind not in "iu":
            raise PartitionError(
                f"{path}: column samples holds {table.samples.dtype}; the length at 16 kHz is expected"
            )
        if twice := listed.intersection(table.utterance) or set(table.utterance[table.utterance.duplicated()]):
            raise PartitionError(f"{path}: {min(twice)} is listed twice; give each utterance its name")
        listed.update(table.utterance)
        if gone := [file for file in table.path if not (os.path.isabs(file) and os.path.isfile(file))]:
            raise PartitionError(f"{path}: {gone[0]}: no such file, or no absolute path ({len(gone)} such rows)")
        if part == "train" and not (table.samples >= SHORTEST).any():
            raise PartitionError(f"{path}: lists no utterance that is long enough; give it longer speech")
