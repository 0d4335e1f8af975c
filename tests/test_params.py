"""Study files, notebooks and schema say the same, and whatever is wrong is said at once, in place, with the remedy."""

import ast
import json
import re
import types
from pathlib import Path

import pytest
from conftest import ROOT

from fedhubert_lib import params, yaml12

STUDIES = sorted((ROOT / "params").glob("*.yaml"))
CHAPTERS = list(params.SECTIONS)


def study(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def errors(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(params.ParameterError) as caught:
        params.load(path, overrides)
    return str(caught.value).splitlines()


def cell(stage: str) -> dict[str, object]:
    """The variables that the parameters cell of a notebook sets."""
    notebook = json.loads((ROOT / "notebooks" / f"{params.FOLDERS[stage]}.ipynb").read_text())
    (source,) = ["".join(c["source"]) for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", ())]
    statements = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in statements}


def test_toy_is_what_the_schema_says():
    toy = params.load(ROOT / "params/toy.yaml")
    for stage, schema in params.SECTIONS.items():
        assert getattr(toy, stage) == schema()


@pytest.mark.parametrize("stage", CHAPTERS)
def test_parameters_cell_shows_defaults_of_the_schema(stage):
    shown, defaults = cell(stage), params.SECTIONS[stage]().model_dump()
    assert shown == {name: defaults[name] for name in shown}
    assert {"run", "seed"} < shown.keys() and len(shown) <= 20


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_study_files_hold_differences_only(tmp_path, path):
    loaded = params.load(path)
    assert loaded.study == path.stem
    assert f"# fedhubert run params/{path.name}" in path.read_text().split("\nstudy:")[0], "opens with its command"
    raw, _, wrong = yaml12.read(path)
    assert not wrong
    if "base" in raw:
        raw["base"] = str(path.parent / raw["base"])
    for stage in params.SECTIONS.keys() & raw.keys():
        for name in raw[stage]:
            rest = raw | {stage: {key: value for key, value in raw[stage].items() if key != name}}
            try:
                less = params.load(study(tmp_path, json.dumps(rest)))
            except params.ParameterError:
                continue
            assert less != loaded, f"{stage}.{name} is what it would be without this line"


def test_a_study_builds_on_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text("study: base\nseed: 3\nkmeans: {clusters: 9}\npretrain: {rounds: 5}\n")
    loaded = params.load(study(tmp_path, "base: base.yaml\npretrain: {cohort: 2}\n"))
    assert (loaded.study, loaded.seed, loaded.kmeans.clusters) == ("mine", 3, 9)
    assert (loaded.pretrain.rounds, loaded.pretrain.cohort) == (5, 2)
    (tmp_path / "base.yaml").write_text("kmeans: {clusters: 1}\n")
    assert f"{tmp_path / 'base.yaml'}:1: kmeans.clusters: 1 given" in errors(tmp_path / "mine.yaml")[0]
    (tmp_path / "base.yaml").write_text("base: mine.yaml\n")
    assert "rests on this file" in errors(tmp_path / "mine.yaml")[0]
    assert "No such file" in errors(study(tmp_path, "base: none.yaml"))[0]


def test_distillation_takes_over_the_federation_of_pretraining(tmp_path):
    path = study(tmp_path, "pretrain: {server: fedyogi, rounds: 7, layers: 3}\ndistill: {rounds: 4}\n")
    distill = params.load(path, ["pretrain.privacy_clip=2.5"]).distill
    assert (distill.server, distill.rounds, distill.privacy_clip) == ("fedyogi", 4, 2.5)
    assert distill.layers == params.Distill().layers
    (line,) = errors(path, "pretrain.server=fedadm")
    assert "pretrain.server" in line
    injected = {"pretrain": {"server": "fedyogi"}, "distill": {"rounds": 4}}
    assert params.check("distill", injected).server == "fedyogi"


def test_all_parameters_are_described():
    for stage, schema in params.SECTIONS.items():
        text = params.described(stage)
        assert all(f"\n  {name}: " in text for name in schema.model_fields)
    assert "  server: fedavg  # server optimiser (one of fedavg, " in params.described("pretrain")


def test_every_parameter_is_read():
    library = [path.read_text() for path in (ROOT / "fedhubert_lib").rglob("*.py") if path.name != "params.py"]
    notebooks = [path.read_text() for path in (ROOT / "notebooks").glob("*.ipynb")]
    source = "\n".join(library + notebooks)
    names = {name for schema in params.SECTIONS.values() for name in schema.model_fields} - {"run"}
    unread = {name for name in names if not re.search(rf"\.{name}\b|\"{name}\"", source)}
    assert not unread


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E+3", 1000.0),
        ("1.0e3", 1000.0),
        (".5", 0.5),
        ("-3", -3),
        ("0", 0),
        ("true", True),
        ("false", False),
        ("no", "no"),
        ("on", "on"),
        ("0777", "0777"),
        ("0o17", "0o17"),
        ("0x1f", "0x1f"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
        (".nan", ".nan"),
        ("null", None),
        ("", None),
        ("'1'", "1"),
        ("[a, 1e-3]", ["a", 0.001]),
    ],
)
def test_yaml_is_read_as_written(text, value):
    got = yaml12.value(text)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("- a\n- b", "not a study"),
        ("kmeans:\n\tclusters: 3", "line 2"),
        ("kmeans: {clusters: [", "cannot be read as YAML"),
        ("kmeans:\n  clusters: !!python/object:os.system 3", "mine.yaml:2: kmeans.clusters"),
        ("kmeans:\n  clusters: &a [*a]", "mine.yaml:2: kmeans.clusters"),
        ("kmeans:\n  clusters: {a: 1}", "mine.yaml:2: kmeans.clusters"),
        ("kmeans: " + "[" * 2000, "nested too deeply"),
        ("seed: 1\nseed: 2", "mine.yaml:2: seed: stands twice, here and on line 1"),
        ("kmeans:\n  clusters: 3\n  clusters: 4", "mine.yaml:3: kmeans.clusters: stands twice"),
    ],
)
def test_a_file_that_is_no_study(tmp_path, text, said):
    assert said in errors(study(tmp_path, text))[0]


def test_a_file_that_cannot_be_read(tmp_path):
    assert "No such file" in errors(tmp_path / "none.yaml")[0]
    (tmp_path / "mine.yaml").write_bytes(b"study: \xff\xfe")
    assert "cannot be read" in errors(tmp_path / "mine.yaml")[0]


def test_all_errors_at_once_each_with_its_line_and_remedy(tmp_path):
    text = """\
kmeanz: {clusters: 3}
kmeans:
  cluster: 3
  tolerance: fast
  clusters: 1
pretrain:
  server: fedadm
  centralised: no
  seed: 0777
distill: 3
"""
    got = errors(study(tmp_path, text), "evaluate.seed=-1", "corpus.speaker=3", "seed", "nothing.x=1")
    path = tmp_path / "mine.yaml"
    for line in (
        f"{path}:1: kmeanz: no such section; did you mean kmeans?",
        f"{path}:3: kmeans.cluster: no such parameter; did you mean clusters?",
        f"{path}:4: kmeans.tolerance: 'fast' given; a number >= 0 is expected",
        f"{path}:5: kmeans.clusters: 1 given; a whole number >= 2 and <= 65535 is expected",
        f"{path}:8: pretrain.centralised: 'no' given; true or false is expected",
        f"{path}:9: pretrain.seed: '0777' given; a whole number >= 0 is expected",
        f"{path}:10: distill: 3 given; a section with 'parameter: value' lines is expected",
        "--set evaluate.seed=-1: evaluate.seed: -1 given; a whole number >= 0 is expected",
        "--set corpus.speaker=3: corpus.speaker: no such parameter; did you mean speakers?",
        "--set seed: section.parameter=value is expected, or study, run or seed=value",
    ):
        assert line in got
    assert any(line.startswith(f"{path}:7: pretrain.server: 'fedadm' given; one of fedavg,") for line in got)
    assert any("did you mean fedadam?" in line for line in got)
    assert any(line.startswith("--set nothing.x=1: no section 'nothing'") for line in got)
    assert len(got) == 12


def test_top_level_flows_into_sections(tmp_path):
    path = study(tmp_path, "seed: 7\npretrain:\n  seed: 3\n")
    loaded = params.load(path, ["kmeans.tolerance=1e-3"], run="there")
    assert (loaded.study, loaded.run) == ("mine", "there")
    assert {getattr(loaded, stage).run for stage in params.SECTIONS} == {"there"}
    assert [getattr(loaded, stage).seed for stage in params.SECTIONS] == [7, 7, 7, 3, 7, 7]
    assert loaded.kmeans.tolerance == 0.001
    assert "one folder is one run" in errors(study(tmp_path, "kmeans: {run: other}"))[0]
    path = study(tmp_path, "study: s")
    assert len(errors(path, "run=../../elsewhere")) == 1


def test_overrides_take_text_as_it_stands(tmp_path):
    path = study(tmp_path, "study: s")
    loaded = params.load(
        path,
        ["corpus.kind=librispeech", "corpus.root=/a: b #c", "corpus.train_subsets=[a, b]", "distill.conv_width=null"],
    )
    assert loaded.corpus.root == "/a: b #c"
    assert loaded.corpus.train_subsets == ["a", "b"]


def test_relative_places_start_at_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = params.load(study(tmp_path, "pretrain: {initial: ../there}"))
    assert loaded.pretrain.initial == str(ROOT.parent / "there")
    assert params.places(loaded.pretrain) == {"initial": str(ROOT.parent / "there")}
    assert loaded.kmeans.features == "mfcc" and not params.places(loaded.kmeans)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["corpus.kind=librispeech"], "corpus.root: kind: librispeech needs the folder"),
        (["corpus.root=/x"], "corpus.root: '/x' given, but kind is synthetic"),
        (["corpus.keywords=speech-commands"], "corpus.keywords_root: keywords: speech-commands needs"),
        (["corpus.kind=librispeech", "corpus.root=/x", "corpus.test_subsets=[train-clean-100]"], "never trained on"),
        (["partition.heldout_speakers=6"], "partition.heldout_speakers: 6 given, but corpus.speakers is 6"),
        (["kmeans.codebooks=[client, client]"], "kmeans.codebooks: names one of them twice"),
        (["kmeans.features="], "kmeans.features: nothing given; mfcc, or a checkpoint folder"),
        (["kmeans.layer=6"], "kmeans.layer: 6 given, but features is mfcc"),
        (["kmeans.codebooks=[central]", "kmeans.engine=deployment"], "kmeans.codebooks: names central, which pools"),
        (["kmeans.codebooks=[one-shot]", "kmeans.noise_multiplier=1"], "protects the federated codebook, not one-shot"),
        (["kmeans.codebooks=[aligned]", "kmeans.minimum_count=5"], "kmeans.minimum_count: protects no codebook that"),
        (["pretrain.cohort=4"], "pretrain.cohort: 4 given, but partition.clients is 3"),
        (["pretrain.crop_seconds=20"], "pretrain.crop_seconds: 20.0 given; a batch holds batch_seconds: 16.0"),
        (["pretrain.mask_length=300"], "pretrain.mask_length: 300 frames"),
        (["pretrain.codebook=aligned"], "pretrain.codebook: aligned given, but kmeans.codebooks has federated, client"),
        (
            ["pretrain.codebook=client", "distill.codebook=federated"],
            "distill.codebook: federated given, but the teacher's soft targets",
        ),
        (["pretrain.mask_length=10", "pretrain.crop_seconds=0.2"], "pretrain.mask_length: 10 frames do not fit"),
        (["distill.hidden_size=100"], "distill.hidden_size: 100 given; positions are convolved in 16 groups"),
        (["pretrain.head=personal"], "distill.objectives: soft-targets needs the teacher's head"),
        (
            ["pretrain.head=personal", "distill.objectives=[hubert]", "distill.compare=[soft-targets]"],
            "distill.compare: soft-targets needs the teacher's head",
        ),
        (["distill.cohort=2", "distill.server=trimmed-mean"], "distill.server: trimmed-mean needs a cohort of 3"),
    ],
)
def test_values_that_cannot_go_together(tmp_path, overrides, said):
    got = errors(study(tmp_path, "study: s"), *overrides)
    assert any(said in line for line in got), got


def test_check_takes_the_variables_of_a_notebook():
    plain = params.Kmeans().model_dump()
    others = {"_mine": 3, "In": ["a"], "Out": {}, "np": types, "f": len, "run_all": object()}
    assert params.check("kmeans", plain | others) == params.Kmeans()
    # papermill reads 1e-3 of a YAML file as text
    assert params.check("kmeans", plain | {"tolerance": "1e-3"}).tolerance == 0.001


def test_check_takes_a_whole_study_from_plain_papermill():
    plain = params.Kmeans().model_dump()
    injected = {"study": "mine", "seed": 5, "kmeans": {"clusters": 30}, "corpus": {"minutes": 3.0}}
    got = params.check("kmeans", plain | injected)
    assert (got.run, got.seed, got.clusters) == ("mine", 5, 30)
    with pytest.raises(params.ParameterError, match="clustrs: no such parameter; did you mean clusters"):
        params.check("kmeans", plain | {"kmeans": {"clustrs": 30}})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"clustrs": 30}, "parameters of 02_kmeans: kmeans.clustrs: no such parameter; did you mean clusters?"),
        ({"clusters": 30.0}, "kmeans.clusters: 30.0 given; a whole number"),
        ({"clusters": True}, "kmeans.clusters: True given; a whole number"),
        ({"tolerance": float("inf")}, "kmeans.tolerance: inf given; a number"),
        ({"codebooks": ["fedrated"]}, "did you mean federated?"),
        ({"layer": 3}, "kmeans.layer: 3 given, but features is mfcc"),
    ],
)
def test_check_refuses_what_papermill_lets_through(changed, said):
    with pytest.raises(params.ParameterError) as caught:
        params.check("kmeans", params.Kmeans().model_dump() | changed)
    assert said in str(caught.value)


def test_what_the_cell_does_not_show_has_its_default():
    assert params.check("kmeans", {"clusters": 7}) == params.Kmeans(clusters=7)


@pytest.mark.parametrize("stage", ["kmeans", "pretrain", "distill", "evaluate"])
def test_a_device_that_cannot_compute_is_refused_with_the_reason(stage):
    with pytest.raises(params.ParameterError, match="cuda:NUMBER is expected; mps does not have float64"):
        params.load("params/toy.yaml", [f"{stage}.device=mps"])
    assert getattr(params.load("params/toy.yaml", [f"{stage}.device=cuda:1"]), stage).device == "cuda:1"
