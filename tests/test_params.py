"""Study files, ``--set`` and notebooks set the parameters; all errors are shown at once, each with its place."""

import ast
import json
import re
import types
from datetime import date
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from ruamel.yaml import YAML

from fedhubert_lib import params, studies

STUDIES = sorted((ROOT / "params").glob("*.yaml"))


def study(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def errors(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(studies.ParameterError) as caught:
        studies.load(path, overrides)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("stage", params.SECTIONS)
def test_parameters_cell_shows_defaults_of_the_schema(stage):
    notebook = json.loads((ROOT / "notebooks" / f"{params.FOLDERS[stage]}.ipynb").read_text())
    (source,) = ["".join(c["source"]) for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", ())]
    statements = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    shown = {node.targets[0].id: ast.literal_eval(node.value) for node in statements}
    fields = params.SECTIONS[stage].model_fields
    assert shown == {name: fields[name].default for name in shown}
    assert {"run", "seed"} < shown.keys() and len(shown) <= 20


@pytest.mark.parametrize("stage", params.SECTIONS)
def test_parameters_cell_names_the_choices_beside_each_parameter(stage):
    notebook = json.loads((ROOT / "notebooks" / f"{params.FOLDERS[stage]}.ipynb").read_text())
    (source,) = ["".join(c["source"]) for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", ())]
    fields = params.SECTIONS[stage].model_json_schema()["properties"]
    for line in source.splitlines():
        name, (_, comment) = line.split(" = ")[0], line.split("  # ")
        choices = fields[name].get("enum") or fields[name].get("items", {}).get("enum", [])
        assert set(choices) <= set(re.findall(r"[\w-]+", comment)), f"{name}: {choices}"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_study_files_load_and_hold_differences_only(tmp_path, path):
    loaded = studies.load(path)
    assert loaded.study == path.stem
    raw = YAML(typ="safe").load(path)
    if "base" in raw:
        raw["base"] = str(path.parent / raw["base"])
    for stage in params.SECTIONS.keys() & raw.keys():
        for name in raw[stage]:
            rest = raw | {stage: {key: value for key, value in raw[stage].items() if key != name}}
            try:
                less = studies.load(study(tmp_path, json.dumps(rest)))
            except studies.ParameterError:
                continue
            assert less != loaded, f"{stage}.{name} has the same value without this line"


def test_librispeech_distils_at_the_weight_decay_of_s3prl_and_with_960_hours_for_its_steps():
    loaded = {hours: studies.load(ROOT / f"params/librispeech{hours}.yaml") for hours in (100, 960)}
    assert {study.distill.weight_decay for study in loaded.values()} == {1e-6}
    assert {study.pretrain.weight_decay for study in loaded.values()} == {0.01}
    steps = {hours: study.distill.rounds * study.distill.local_steps for hours, study in loaded.items()}
    assert steps == {100: 50_000, 960: 200_000}


def test_toy_is_the_defaults():
    toy = studies.load(ROOT / "params/toy.yaml")
    assert all(getattr(toy, stage) == schema() for stage, schema in params.SECTIONS.items())


@pytest.mark.parametrize(
    ("overrides", "suited"),
    [
        ("", (1.5, 0.9, 1e-3)),
        ("pretrain.local_state=cohort", (1.0, 0.9, 1e-3)),
        ("pretrain.server=nesterov", (0.7, 0.6, 1e-3)),
        ("pretrain.server=fedadam pretrain.local_state=cohort", (0.033, 0.2, 0.03)),
        ("pretrain.server=fedadagrad pretrain.local_state=cohort", (0.066, 0.2, 0.03)),
        ("pretrain.server=fedyogi pretrain.server_rate=0.02 pretrain.server_momentum=0", (0.02, 0.0, 0.03)),
    ],
)
def test_what_suits_a_server_is_resolved_where_a_study_says_nothing(tmp_path, overrides, suited):
    loaded = studies.load(study(tmp_path, "study: s"), overrides.split())
    for p in loaded.pretrain, loaded.distill:
        assert (p.server_rate, p.server_momentum, p.server_tau) == suited


def test_another_server_of_distillation_takes_over_no_rate_of_pretraining(tmp_path):
    loaded = studies.load(study(tmp_path, "pretrain: {server_rate: 2.0}\ndistill: {server: nesterov}\n"))
    assert (loaded.pretrain.server_rate, loaded.distill.server_rate) == (2.0, 0.7)
    moments = "pretrain: {local_state: keep, server_rate: 1.5}\ndistill: {local_state: cohort}\n"
    assert studies.load(study(tmp_path, moments)).distill.server_rate == 1.0
    for server in ("fedavg", "nesterov"):
        both = f"pretrain: {{server: {server}, server_rate: 2.0}}\ndistill: {{server: {server}}}\n"
        assert studies.load(study(tmp_path, both)).distill.server_rate == 2.0


def test_load_puts_a_study_over_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "study: base\nrun: shared\nseed: 3\nkmeans: {clusters: 9}\npretrain: {rounds: 5}\n"
    )
    loaded = studies.load(study(tmp_path, "base: base.yaml\npretrain: {cohort: 2}\n"))
    assert (loaded.study, loaded.run, loaded.seed, loaded.kmeans.clusters) == ("mine", "mine", 3, 9)
    assert (loaded.pretrain.rounds, loaded.pretrain.cohort) == (5, 2)
    emptied = studies.load(study(tmp_path, "base: base.yaml\npretrain:\ndistill:\n"))
    assert (emptied.pretrain.rounds, emptied.distill.rounds) == (5, 5), "an empty section changes nothing"
    (tmp_path / "base.yaml").write_text("kmeans: {clusters: 1}\n")
    assert f"{tmp_path / 'base.yaml'}:1: kmeans.clusters: " in errors(tmp_path / "mine.yaml")[0]
    (tmp_path / "base.yaml").write_text("base: mine.yaml\n")
    assert "base: mine.yaml builds on this file" in errors(tmp_path / "mine.yaml")[0]
    assert f"{Path.home() / 'none.yaml'}: cannot be read" in errors(study(tmp_path, "base: ~/none.yaml"))[0]
    assert "none.yaml: cannot be read" in errors(study(tmp_path, "base: none.yaml"))[0]


def test_distillation_inherits_the_federation_of_pretraining(tmp_path):
    path = study(tmp_path, "pretrain: {server: fedyogi, rounds: 7, layers: 3}\ndistill: {rounds: 4}\n")
    distill = studies.load(path, ["pretrain.privacy_clip=2.5"]).distill
    assert (distill.server, distill.rounds, distill.privacy_clip) == ("fedyogi", 4, 2.5)
    assert distill.layers == params.Distill().layers
    (line,) = errors(path, "pretrain.server=fedadm")
    assert "pretrain.server" in line


def test_described_lists_every_parameter_in_its_group():
    for stage, schema in params.SECTIONS.items():
        text = studies.described(stage)
        assert all(text.count(f"\n  {name}: ") == 1 for name in schema.model_fields)
    text = studies.described("distill")
    assert "  server: fedavg  # server optimiser (fedavg, fedavgm, " in text
    assert "  clusters: 20  # " in studies.described("kmeans") and ">= 2 and <= 65535" in studies.described("kmeans")
    headings = [line.strip() for line in text.splitlines() if line.startswith("  #")]
    groups = ["# Model.", "# Local training.", "# Server.", "# Privacy.", "# Transport.", "# Machine."]
    assert headings == [*groups, "# This stage."]
    assert text.index("# This stage.") < text.index("  objectives: ")
    assert text.index("# Privacy") < text.index("privacy_clip") < text.index("# Transport")


def test_every_parameter_is_read():
    library = [path.read_text() for path in (ROOT / "fedhubert_lib").rglob("*.py") if path.name != "params.py"]
    notebooks = [path.read_text() for path in (ROOT / "notebooks").glob("*.ipynb")]
    source = "\n".join(library + notebooks)
    names = {name for schema in params.SECTIONS.values() for name in schema.model_fields} - {"run"}
    unread = {name for name in names if not re.search(rf"\.{name}\b|\"{name}\"", source)}
    assert not unread


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty"),
        ("- a\n- b", "not a study"),
        ("kmeans:\n\tclusters: 3", "line 2"),
        ("kmeans: {clusters: [", "cannot be read as YAML"),
        ("kmeans:\n  clusters: !!python/object:os.system 3", "could not determine a constructor"),
        ("kmeans:\n  clusters: &a [*a]", "*a in line 2"),
        (
            "a: &a [0, 0]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmnopqrstuvwxyz")),
            "*a in line 2",
        ),
        ('corpus: {root: "a\\0b"}', "mine.yaml:1: corpus.root"),
        ('corpus: {root: "\\ud800"}', "mine.yaml:1: corpus.root"),
        ("run: " + "a" * 300, "mine.yaml:1: run"),
        ("seed: " + "9" * 5000, "cannot be read as YAML"),
        ("seed: !!bool x", "cannot be read as YAML"),
        ("seed: !!int ''", "cannot be read as YAML"),
        ("!!omap [a: b]", "not a study"),
        ("pretrain: {crop_seconds: 1e305}", "crop_seconds"),
        ("pretrain: {threads: 100000000000000000000}", "threads"),
        ("[kmeans]: 3", "mine.yaml:1: a name is expected"),
        ("kmeans:\n  5: 3", "mine.yaml:2: a name is expected"),
        ("kmeans:\n  clusters: {a: 1}", "mine.yaml:2: kmeans.clusters"),
        ("kmeans: " + "[" * 600 + "]" * 600, "maximum recursion depth"),
        ("seed: 1\nseed: 2", "duplicate key"),
        ("kmeans:\n  clusters: 3\n  clusters: 4", "duplicate key"),
        ("kmeans: no", "mine.yaml:1: kmeans"),
        ("study: \udcff", "cannot be read as YAML"),
    ],
)
def test_load_refuses_what_is_not_a_study(tmp_path, text, expected):
    (tmp_path / "mine.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert expected in " ".join(errors(tmp_path / "mine.yaml"))


def test_load_shows_all_errors_each_with_its_line_and_the_nearest_name(tmp_path):
    text = """\
kmeanz: {clusters: 3}
kmeans:
  cluster: 3
  tolerance: fast
  clusters: 1
  layer: best
pretrain:
  server: fedadm
  centralised: no
distill: 3
"""
    lines = errors(study(tmp_path, text), "evaluate.seed=-1", "corpus.speaker=3", "seed", "nothing.x=1")
    path = tmp_path / "mine.yaml"
    for place, hint in (
        (f"{path}:1: kmeanz: ", "did you mean kmeans?"),
        (f"{path}:3: kmeans.cluster: ", "did you mean clusters?"),
        (f"{path}:4: kmeans.tolerance: ", "number, not 'fast'"),
        (f"{path}:5: kmeans.clusters: ", "greater than or equal to 2, not 1"),
        (f"{path}:6: kmeans.layer: ", "not 'best'; or 'auto'"),
        (f"{path}:8: pretrain.server: ", "did you mean fedadam?"),
        (f"{path}:9: pretrain.centralised: ", "boolean, not 'no'"),
        (f"{path}:10: distill: ", "not 3"),
        ("--set evaluate.seed=-1: evaluate.seed: ", "greater than or equal to 0"),
        ("--set corpus.speaker=3: corpus.speaker: ", "did you mean speakers?"),
        ("--set seed: ", "section.parameter=value is expected"),
        ("--set nothing.x=1: ", "no section 'nothing'"),
    ):
        assert [line for line in lines if line.startswith(place) and hint in line], place
    assert len(lines) == 12


def test_load_copies_the_top_level_into_sections(tmp_path):
    path = study(tmp_path, "seed: 7\npretrain:\n  seed: 3\n")
    loaded = studies.load(path, ["kmeans.tolerance=1e-3"], run="there")
    assert (loaded.study, loaded.run) == ("mine", "there")
    assert {getattr(loaded, stage).run for stage in params.SECTIONS} == {"there"}
    assert [getattr(loaded, stage).seed for stage in params.SECTIONS] == [7, 7, 7, 3, 7, 7]
    assert loaded.kmeans.tolerance == 0.001
    assert "one folder is one run" in errors(study(tmp_path, "kmeans: {run: other}"))[0]
    assert len(errors(study(tmp_path, "study: s"), "run=../../elsewhere")) == 1


def test_a_name_that_no_run_can_have_is_said_where_it_was_given(tmp_path):
    path = study(tmp_path, "run: x y")
    with pytest.raises(studies.ParameterError, match=r"^\S+:1: run: .* not 'x y'$"):
        studies.load(path)
    with pytest.raises(studies.ParameterError, match="^--run a b: run: .* not 'a b'$"):
        studies.load(path, run="a b")


def test_overrides_take_text_literally(tmp_path):
    values = [
        "corpus.kind=librispeech",
        "corpus.root=/a: b #c",
        "corpus.train_subsets=[a, b]",
        "distill.conv_width=null",
    ]
    loaded = studies.load(study(tmp_path, "study: s"), values)
    assert loaded.corpus.root == "/a: b #c"
    assert loaded.corpus.train_subsets == ["a", "b"]


def test_relative_places_start_at_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = studies.load(study(tmp_path, "pretrain: {initial: ../there}"))
    assert loaded.pretrain.initial == str(ROOT.parent / "there")
    assert params.places(loaded.pretrain) == {"initial": str(ROOT.parent / "there")}
    assert studies.load(study(tmp_path, "pretrain: {initial: ~nobody-here/there}")).pretrain.initial.endswith(
        "~nobody-here/there"
    )
    assert loaded.kmeans.features == "mfcc" and not params.places(loaded.kmeans)


@pytest.mark.parametrize(
    ("overrides", "place"),
    [
        ("corpus.kind=librispeech", "corpus.root"),
        ("corpus.root=/x", "corpus.root"),
        ("corpus.keywords=speech-commands", "corpus.keywords_root"),
        ("corpus.kind=librispeech corpus.root=/x corpus.test_subsets=[train-clean-100]", "corpus.test_subsets"),
        ("partition.heldout_speakers=6", "partition.heldout_speakers"),
        ("kmeans.codebooks=[client,client]", "kmeans.codebooks"),
        ("kmeans.features=", "kmeans.features"),
        ("kmeans.layer=6", "kmeans.layer"),
        (
            "corpus.kind=librispeech corpus.root=/x corpus.test_subsets=[] partition.heldout_speakers=0"
            " kmeans.features=/model",
            "kmeans.layer",
        ),
        ("corpus.kind=folder corpus.root=/x partition.heldout_speakers=0 kmeans.features=/model", "kmeans.layer"),
        ("evaluate.task=superb", "evaluate.task"),
        ("kmeans.codebooks=[central] kmeans.engine=deployment", "kmeans.codebooks"),
        ("kmeans.codebooks=[one-shot] kmeans.noise_multiplier=1", "kmeans.noise_multiplier"),
        ("kmeans.codebooks=[aligned] kmeans.minimum_count=5", "kmeans.minimum_count"),
        ("pretrain.cohort=4", "pretrain.cohort"),
        ("pretrain.crop_seconds=20", "pretrain.crop_seconds"),
        ("pretrain.mask_length=50", "pretrain.mask_length"),
        ("pretrain.codebook=aligned", "pretrain.codebook"),
        ("pretrain.codebook=client distill.codebook=federated distill.soft_weight=0.5", "distill.codebook"),
        ("distill.hidden_size=100", "distill.hidden_size"),
        ("pretrain.conv_width=64", "pretrain.conv_width"),
        ("pretrain.head=personal distill.soft_weight=0.5", "distill.soft_weight"),
        ("kmeans.codebooks=[client] pretrain.codebook=client pretrain.head=personal", "distill.codebook"),
        ("distill.cohort=2 distill.server=trimmed-mean", "distill.server"),
        ("pretrain.cohort=2 pretrain.server=median", "pretrain.server"),
        ("pretrain.server=median pretrain.compression=top-k", "pretrain.compression"),
        ("pretrain.server=scaffold pretrain.compression=top-k", "pretrain.compression"),
        ("pretrain.privacy=server pretrain.weighting=clients pretrain.compression=top-k", "pretrain.compression"),
        (
            "pretrain.secure_aggregation=true pretrain.weighting=clients pretrain.privacy_quantile=0.5",
            "pretrain.privacy_quantile",
        ),
        ("pretrain.secure_aggregation=true", "pretrain.secure_aggregation"),
        ("pretrain.server=fedadam pretrain.server_momentum=1.0", "pretrain.server_momentum"),  # divides by 0
        ("pretrain.server=fedyogi pretrain.server_beta2=1.0", "pretrain.server_beta2"),
        ("pretrain.local_state=cohort pretrain.compression=int8", "pretrain.local_state"),
        ("pretrain.local_state=cohort pretrain.server=median", "pretrain.local_state"),
        ("pretrain.local_state=cohort pretrain.server=trimmed-mean", "pretrain.local_state"),
        ("pretrain.local_state=cohort pretrain.server=scaffold", "pretrain.local_state"),
        ("pretrain.local_state=cohort pretrain.privacy=server pretrain.weighting=clients", "pretrain.local_state"),
        (
            "pretrain.local_state=cohort pretrain.secure_aggregation=true pretrain.weighting=clients",
            "pretrain.local_state",
        ),
        ("pretrain.privacy=client", "pretrain.privacy"),
        ("pretrain.privacy=client pretrain.weighting=clients pretrain.compression=int8", "pretrain.compression"),
    ],
)
def test_conflicts_between_values_are_refused(tmp_path, overrides, place):
    lines = errors(study(tmp_path, "study: s"), *overrides.split())
    assert any(f": {place}: " in line for line in lines), lines


def test_check_takes_the_variables_of_a_notebook():
    plain = params.Kmeans().model_dump()
    others = {"_mine": 3, "In": ["a"], "Out": {}, "np": types, "f": len, "run_all": object(), "threads": types}
    assert studies.check("kmeans", plain | others) == params.Kmeans(), "a module of a parameter's name is none"
    assert studies.check("kmeans", {"clusters": 7}) == params.Kmeans(clusters=7)
    assert studies.check("kmeans", {"tolerance": np.float32(0.5)}).tolerance == 0.5
    # papermill reads 1e-3 of a YAML file as text
    assert studies.check("kmeans", plain | {"tolerance": "1e-3"}).tolerance == 0.001


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"clustrs": 30}, "parameters of 02_kmeans: kmeans.clustrs: .*did you mean clusters"),
        ({"clustrs": "a: b: c"}, "kmeans.clustrs: .*did you mean clusters"),
        ({"clusters": 30.0}, "kmeans.clusters: "),
        ({"clusters": True}, "kmeans.clusters: "),
        ({"tolerance": float("inf")}, "kmeans.tolerance: "),
        ({"codebooks": ["fedrated"]}, "kmeans.codebooks: .*did you mean federated"),
        ({"codebooks": ["fedrated", "onshot"]}, r"did you mean federated\?$"),
        ({"codebooks": "[federated"}, r"kmeans.codebooks: .*list, not '\[federated'"),
        ({"layer": 3}, "kmeans.layer: "),
        ({"clusters": np.int64(30)}, r"kmeans.clusters: .*, not np.int64\(30\)"),
        ({"features": Path("model")}, "kmeans.features: .*, not PosixPath"),
        ({"run": date(2026, 1, 1)}, "kmeans.run: .*, not datetime.date"),
    ],
)
def test_check_refuses_what_papermill_lets_through(changed, expected):
    with pytest.raises(studies.ParameterError, match=expected):
        studies.check("kmeans", params.Kmeans().model_dump() | changed)


def test_device_without_float64_is_refused():
    with pytest.raises(studies.ParameterError, match="mps lacks float64"):
        studies.load("params/toy.yaml", ["kmeans.device=mps"])
    assert studies.load("params/toy.yaml", ["kmeans.device=cuda:1"]).kmeans.device == "cuda:1"
