"""Runs beside each other: parameters that differ, curves in one picture, figures; as text and as a page.

A name stands for a run, or for the runs NAME-0, NAME-1 ... of one study with different training seeds, over which means
and intervals are taken. Runs may be unfinished: what there is so far is shown.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from fedhubert_lib import files, index, params, plots, records, runner, runs
from fedhubert_lib.evaluation import tables, training_seeds

Groups = Mapping[str, Sequence[Path]]
"""Name to the folders of its runs."""
TRAINING = {"pretrain": "Pretraining", "distill": "Distillation"}
MEASURES = ("loss", "accuracy_masked", "accuracy_unmasked", "cosine")
SETTINGS = ("task", "seed", "unit_minutes", "clusters", "train_fraction", "probe_steps", "probe_rate", "standardise")
"""Of 05_evaluate: figures with others do not compare."""
PICTURE = "curves.png"


def groups(names: Sequence[str]) -> dict[str, list[Path]]:
    """The runs that each of ``names``, or of folders, stands for. Raises RunError where there are none."""
    short = [Path(name).name for name in names]
    keys = short if len(set(short)) == len(set(names)) else names
    return {key: _seed_runs(name) or [runs.named(name)] for key, name in zip(keys, names, strict=True)}


def _seed_runs(name: str) -> list[Path]:
    """The folders of the runs ``name``-SEED by their seed; none for the name of a run, or of nothing."""
    whole = runs.outputs() / name
    numbers = {path: path.name.removeprefix(f"{whole.name}-") for path in whole.parent.glob(f"{whole.name}-*")}
    folders = {int(number): path for path, number in numbers.items() if number.isdecimal()}
    return [] if (whole / "run.json").is_file() else [folders[seed] for seed in sorted(folders)]


def parameters(groups: Groups) -> pd.DataFrame:
    """The parameters (rows) in which the groups (columns) differ; what runs of a group differ in is listed."""
    values: dict[str, dict[str, Any]] = {}
    for name, folders in groups.items():
        of_runs = [records.all_parameters(folder) for folder in folders]
        for key in dict.fromkeys(key for one in of_runs for key in one):
            unique = {str(one[key]): one[key] for one in of_runs if key in one}
            values.setdefault(name, {})[key] = unique.popitem()[1] if len(unique) == 1 else ", ".join(unique)
    return index.differing(values)


def states(groups: Groups) -> pd.DataFrame:
    """A row per run: study, commit, state, time."""
    return pd.DataFrame(
        {
            name if len(folders) == 1 else f"{name}-{folder.name.rpartition('-')[2]}": index.summary(folder)
            for name, folders in groups.items()
            for folder in folders
        }
    ).T.reindex(columns=["study", "commit", "state", "started", "time", "memory"])


def curves(groups: Groups) -> pd.DataFrame:
    """All curves so far, for ``plots.comparison``, of groups as ``run`` and of their runs as ``member``.

    Values are those on validation speech, which runs of one partition share; those of training where a run has none.
    """
    rows = []
    for stage, title in TRAINING.items():
        trained = {
            (name, folder.name, system): pd.DataFrame(rounds)
            for name, folders in groups.items()
            for folder in folders
            for system, place in (("federated", "."), ("centralised", "centralised"))
            if (rounds := files.rounds(folder / params.FOLDERS[stage] / place / "metrics.jsonl"))
        }
        validated = all("validation_loss" in table for table in trained.values())
        for (name, member, system), table in trained.items():
            table["hours"] = table.audio_seconds.cumsum() / 3600
            facts = {"stage": title, "run": name, "member": member, "system": system}
            for measure in [f"validation_{measure}" if validated else measure for measure in MEASURES]:
                if measure in table:
                    part = table[["round", "hours", measure]].dropna().rename(columns={measure: "value"})
                    rows.append(part.assign(**facts, measure=measure))
    return pd.concat(rows, ignore_index=True).astype({"hours": float, "value": float}) if rows else pd.DataFrame()


def figures(groups: Groups) -> tuple[pd.DataFrame, list[str]]:
    """The headline figures, measure and system by group, as ``mean ± interval``; and what to know when reading them."""
    columns: dict[str, dict[tuple[str, str], str]] = {}
    notes: list[str] = []
    spans: dict[str, list[str]] = {}
    measured_on: dict[str, str] = {}
    for name, folders in groups.items():
        written = [folder for folder in folders if (folder / tables.STAGE / "report.json").is_file()]
        stale = {folder: why for folder in written if (why := records.stale(folder).get("evaluate"))}
        done = [folder for folder in written if folder not in stale]
        if len(done) < len(folders):
            old = "".join(f"; {folder.name}'s report is {why}: run it again" for folder, why in stale.items())
            notes.append(f"{name}: {len(done)} of {len(folders)} runs evaluated so far{old}.")
        if not done:
            continue
        reports = training_seeds.reports(done)
        settings = [reports[0]["parameters"].get(setting) for setting in SETTINGS]
        phones = records.all_parameters(done[0]).get("corpus.phones")
        measured_on[name] = json.dumps([reports[0]["data"], settings, phones])
        one_model = f"{reports[0]['parameters']['seeds']} evaluation seeds of one model"
        spans.setdefault(f"{len(done)} training seeds" if len(done) > 1 else one_model, []).append(name)
        values = training_seeds.means(reports).items()
        columns[name] = {(tables.TITLES[measure], title): str(value) for (title, measure), value in values}
    notes += [f"{', '.join(names)}: intervals over {span}." for span, names in spans.items()]
    if len(set(measured_on.values())) > 1:
        notes.append(f"{', '.join(measured_on)}: evaluated on other words, speech or settings; figures do not compare.")
    table = pd.DataFrame(columns).reindex([tables.TITLES[name] for name in tables.HEADLINE], level=0)
    return table.fillna(""), notes


def write(groups: Groups, folder: Path) -> str:
    """Compare ``groups``: compare.html, compare.ipynb and curves.png in ``folder``; returns the tables as text."""
    for folders in groups.values():
        if len(folders) > 1:  # their lines become a mean
            training_seeds.check_one_study(folders)
    text, cells = [], [f"# {', '.join(groups)}, compared"]
    compared, notes = figures(groups)
    drawn = curves(groups)
    members = set() if drawn.empty else set(drawn.member)
    missing = [folder.name for folders in groups.values() for folder in folders if folder.name not in members]
    untold = f"No curves of {', '.join(missing)}: no round yet, or nobody says how much was heard." if missing else ""
    for title, table, remark in (
        ("Runs", states(groups), untold),
        ("Parameters that differ", parameters(groups), ""),
        ("Figures: mean and 95 % interval", compared, " ".join(notes)),
    ):
        text.append(f"{title}:\n{table.to_string(na_rep='-') if table.size else 'none'}\n{remark}".rstrip())
        cells.append(f"## {title}\n\n{table.to_html(na_rep='-') if table.size else 'None.'}\n\n{remark}")
    if len(drawn):
        with files.atomic(folder / PICTURE) as temporary:
            temporary.write_bytes(plots.png(plots.comparison(drawn)))
        what = "A lower loss and higher accuracies at the same hours are better, for the same targets and objectives."
        cells.insert(3, f"## Curves\n\n![Curves of {', '.join(groups)}]({PICTURE})\n\n{what}")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(cell) for cell in cells])
    with files.atomic(folder / "compare.ipynb") as temporary:
        nbformat.write(notebook, temporary)
    page = runner.save_page(folder / "compare.ipynb")
    return "\n\n".join([*text, f"{page}\n{folder / PICTURE}" if len(drawn) else str(page)])
