"""Distillation over a federation: every objective, a teacher sent once, known by its digest; resume; clear errors."""

import contextlib
import json
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import federation
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedhubert_lib import distillation, federated, files, hubert, params, pooled, pretrained, recipes, seeds
from fedhubert_lib.federated import handlers
from fedhubert_lib.kmeans import targets
from fedhubert_lib.labels import Labels
from fedhubert_lib.teaching import TeacherError

TEACHER = hubert.preset(
    "tiny", "logmel", hidden_size=48, num_attention_heads=3, intermediate_size=192, hidden_dropout=0.1, layerdrop=0.1
)


def distill(**changes):
    """Parameters of seconds."""
    chosen = {"rounds": 2, "cohort": 2, "local_steps": 2, "batch_seconds": 4.0, "crop_seconds": 1.5, "device": "cpu"}
    chosen |= {"precision": "float32", "layers": 1, "hidden_size": 48, "teacher_clusters": 5, "soft_weight": 0.5}
    return params.Distill(**{**chosen, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with clients, labels and a teacher with a head."""
    folder = federation.make(tmp_path_factory.mktemp("made") / "run", clients=3)
    save_teacher(folder / "03_pretrain" / "checkpoint")
    return folder


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def save_teacher(folder, config=TEACHER, clusters=federation.TONES, seed=0):
    model, head = hubert.Hubert(config), hubert.Head(config, clusters) if clusters else None
    for module in (model, head) if clusters else (model,):
        hubert.initialise(module, seeds.torch_generator(seed))
    pretrained.save(folder, model, head)


def weights(folder):
    model, _ = pretrained.load(folder)
    return federation.digest(model.state_dict())


def trained(run, p):
    with federated.connect(run) as clients:
        if "hubert" in p.objectives:
            targets.run(run, p, clients)
        return distillation.run(run, p, clients=clients)


def rounds_of(folder):
    return [row for row in files.read_rows(folder / "metrics.jsonl") if row["kind"] == "round"]


@pytest.mark.parametrize(
    "objectives", [["soft-targets"], ["distilhubert"], ["hubert"], ["soft-targets", "distilhubert"]]
)
def test_every_objective_runs_federated_and_centralised(run, objectives):
    soft_weight = 0.5 if objectives == ["soft-targets"] else 0.0
    p = distill(objectives=objectives, soft_weight=soft_weight, local_state="cohort")
    checkpoint = trained(run, p)
    assert checkpoint == run / "04_distill" / "checkpoint"
    student, head = pretrained.load(checkpoint)
    assert student.config.num_hidden_layers == 1 and student.config.hidden_size == 48
    clusters = {"soft-targets": federation.TONES, "hubert": 5}.get(objectives[0])
    assert (head is None) if clusters is None else len(head.label_embeddings) == clusters
    assert sorted(path.name for path in checkpoint.iterdir()) == sorted(
        ["config.json", "model.safetensors", "preprocessor_config.json", *(["head.safetensors"] if head else [])]
    )
    assert pretrained.load(pooled.train(run, p))[0].config == student.config
    for folder in (run / "04_distill", run / "04_distill" / "centralised"):
        rows = rounds_of(folder)
        assert [row["round"] for row in rows] == [1, 2]
        assert all("validation_loss" in row for row in rows)
        assert ("cosine" in rows[0]) == ("distilhubert" in objectives)
        assert ("accuracy_masked" in rows[0]) == (objectives != ["distilhubert"])


def test_labels_alone_need_no_teacher_with_a_head(run):
    save_teacher(run / "03_pretrain" / "checkpoint", clusters=0)
    checkpoint = distillation.run(run, distill(objectives=["soft-targets"], soft_weight=0.0, rounds=1))
    assert len(pretrained.load(checkpoint)[1].label_embeddings) == federation.TONES
    assert "divergence" not in rounds_of(run / "04_distill")[0]


def test_labels_and_predictions_of_two_codebooks_are_refused(run):
    (run / "03_pretrain/params.yaml").write_text("codebook: aligned\n")
    p = distill(objectives=["soft-targets"])
    with pytest.raises(TeacherError, match="predicts codebook aligned, and the labels are of federated"):
        distillation.read_teacher(run, p)
    distillation.read_teacher(run, p.model_copy(update={"label_weight": 0.0}))


def test_a_student_that_starts_as_a_public_teacher_hears_as_it_does(run):
    """What shapes do not show comes with the front end: biases, and whether utterances are normalised."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "conv_bias": True}
    config = hubert.preset("tiny", "waveform", **sizes, intermediate_size=192, do_normalize=True)
    save_teacher(run / "03_pretrain" / "checkpoint", config, clusters=0)
    p = distill(objectives=["distilhubert"], initial="teacher", front_end="waveform", attention_heads=4, rounds=1)
    teacher = distillation.read_teacher(run, p)
    task, weights = distillation.begin(run, p, teacher)
    student, expected = hubert.Hubert(distillation.student_config(p, teacher)).eval(), teacher.model
    student.load_state_dict({n.removeprefix("model."): t for n, t in weights.items() if n.startswith("model.")})
    waveforms = torch.randn(1, 8_000, generator=torch.Generator().manual_seed(0)) + 0.5
    ours, theirs = (model(waveforms, hidden_states=True).hidden for model in (student, expected))
    assert torch.equal(ours[1], theirs[1])
    assert '"do_normalize": true' in task.documents["preprocessor_config.json"]
    home = handlers.homes(run, ["client-000"], "distill", "cpu")["client-000"]
    assert distillation.lesson(home, weights, {**task.config, "session": "a", "round": 1}).normalise
    student = task.config["student"] | {"model": task.config["student"]["model"] | {"do_normalize": False}}
    lesson = distillation.lesson(home, weights, {**task.config, "student": student, "session": "a", "round": 1})
    assert not lesson.normalise, "one of the two hears speech as it is"


def test_another_seed_starts_from_another_student_in_every_part(run):
    objectives = ["soft-targets", "distilhubert"]
    first, second = (distillation.begin(run, distill(objectives=objectives, seed=seed))[1] for seed in (0, 1))
    for part in ("model.", "head.", "regressors."):
        assert any(not torch.equal(first[name], second[name]) for name in first if name.startswith(part))


def test_distilhubert_leaves_no_layer_out(run):
    """Of two layers one would be missing in every tenth step; s3prl sets layerdrop to 0. Other students keep theirs."""
    teacher = distillation.read_teacher(run, distill())
    sizes = {"model": "base", "front_end": "waveform", "hidden_size": None}
    dropped = {
        which: distillation.student_config(distill(**sizes, objectives=which.split("+")), teacher).layerdrop
        for which in ("distilhubert", "soft-targets", "soft-targets+distilhubert")
    }
    assert dropped == {"distilhubert": 0.0, "soft-targets": 0.05, "soft-targets+distilhubert": 0.05}


def test_student_learns_from_its_teacher(run):
    p = distill(rounds=6, local_steps=4, learning_rate=3e-3, server="fedavg", server_rate=1.0, soft_weight=1.0)
    distillation.run(run, p.model_copy(update={"objectives": ["soft-targets"], "label_weight": 0.0}))
    losses = [row["loss"] for row in rounds_of(run / "04_distill")]
    assert losses[-1] < 0.9 * losses[0]


def test_run_that_was_stopped_gives_the_same_student(run, made, tmp_path):
    p = distill(rounds=3, cohort=3)
    whole = weights(distillation.run(run, p))

    other = shutil.copytree(made, tmp_path / "other")

    def stop(row):
        if row["kind"] == "client" and row["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distillation.run(other, p, on_row=stop)
    assert weights(distillation.run(other, p)) == whole


def test_run_does_not_change_the_teacher(run):
    teacher = distillation.read_teacher(run, distill())
    waveforms = torch.randn(2, 16_000, generator=seeds.torch_generator(0))
    before, name = teacher.model(waveforms).last, distillation.digest(teacher)
    distillation.run(run, distill(initial="teacher"))
    after = distillation.read_teacher(run, distill())
    assert torch.equal(before, after.model(waveforms).last) and distillation.digest(after) == name
    after.model.config = hubert.replace(after.model.config, do_normalize=not after.model.config.do_normalize)
    assert distillation.digest(after) != name, "with equal weights another teacher"


def test_send_once_and_keep_by_digest(run, monkeypatch):
    p = distill(send_teacher=True)
    with federated.connect(run) as clients:
        teacher = distillation.read_teacher(run, p)
        assert distillation.send(clients, teacher) == 3
        assert distillation.send(clients, teacher) == 0
        kept = run / "04_distill" / "clients" / "client-000" / "teacher" / distillation.digest(teacher)
        assert distillation.digest(distillation.Teacher(*pretrained.load(kept))) == kept.name
    # With its own copy a client needs the public folder no more.
    shutil.move(run / "03_pretrain", run / "elsewhere")
    config = distillation.begin(run, p, teacher)[0].config
    home = handlers.home(run, "client-000", "distill", "cpu", True)
    distillation._load.cache_clear()
    assert distillation._teacher(home, config).model.config == TEACHER
    lacking = handlers.home(run / "nowhere", "client-000", "distill", "cpu", True)
    with pytest.raises(TeacherError, match="send_teacher: true"):
        distillation._teacher(lacking, config)


@pytest.mark.parametrize("simulated", [True, False])
def test_over_a_network_no_path_of_the_servers_is_followed(run, simulated):
    config = distillation.begin(run, distill(), distillation.read_teacher(run, distill()))[0].config
    home = handlers.home(run, "client-000", "distill", "cpu", simulated)
    with contextlib.nullcontext() if simulated else pytest.raises(TeacherError, match="send_teacher: true"):
        assert distillation._teacher(home, config).model.config == TEACHER


def test_labels_of_clusters_that_were_fitted_again_are_refused(run):
    p = distill(objectives=["hubert"], teacher_clusters=5, soft_weight=0.0)
    teacher = distillation.read_teacher(run, p)
    with federated.connect(run) as clients:
        targets.run(run, p, clients)
    home = handlers.home(run, "client-000", "distill", "cpu", True)
    assert distillation._labels(home, distillation.begin(run, p, teacher)[0].config, p).is_dir()
    path = distillation.centroids(run, p, teacher)
    save_file({"centroids": 2 * load_file(path)["centroids"]}, path)
    with pytest.raises(recipes.LabelsError, match="labels of another codebook"):
        distillation._labels(home, distillation.begin(run, p, teacher)[0].config, p)


def test_sent_and_public_teacher_give_the_same_student(run, made, tmp_path):
    other = shutil.copytree(made, tmp_path / "other")
    assert weights(distillation.run(run, distill())) == weights(distillation.run(other, distill(send_teacher=True)))
    public, sent = (files.read_rows(folder / "04_distill/metrics.jsonl") for folder in (run, other))
    assert not [row for row in public if row["kind"] == "sent"]
    (before,) = (row for row in sent if row["kind"] == "sent")
    teacher = distillation.read_teacher(run, distill()).modules
    assert before["bytes_down"] == 3 * 4 * sum(weight.numel() for weight in teacher.parameters())
    down = [[row["bytes_down"] for row in rounds_of(folder / "04_distill")] for folder in (run, other)]
    assert down[0] == down[1], "of rounds alone"


def test_no_client_goes_without_labels_because_the_disk_is_small(run, monkeypatch):
    """Each client alone would find room, until it is used up; and the training would go without the others."""
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with federated.connect(run) as clients, pytest.raises(OSError, match="features take"):
        targets.run(run, distill(objectives=["hubert"], teacher_clusters=5, centralised=False), clients)
    assert not (run / "04_distill/clients").exists(), "before any work"


def test_update_refuses_a_replaced_teacher(run):
    p = distill()
    teacher = distillation.read_teacher(run, p)
    config = distillation.begin(run, p, teacher)[0].config
    save_teacher(run / "03_pretrain" / "checkpoint", seed=1)
    home = handlers.home(run, "client-000", "distill", "cpu", True)
    distillation._load.cache_clear()
    with pytest.raises(TeacherError, match="not the announced"):
        distillation._teacher(home, config)


def test_receive_keeps_one_teacher_and_refuses_another_than_announced(run):
    teacher = distillation.read_teacher(run, distill())
    home = handlers.home(run, "client-000", "distill", "cpu", True)
    arrays = {name: parameter + 1e-3 for name, parameter in teacher.modules.named_parameters()}
    config = {"digest": distillation.digest(teacher), "clusters": federation.TONES}
    config["model"] = json.loads(json.dumps(asdict(TEACHER)))
    earlier = home.state / "teacher" / "earlier"
    earlier.mkdir(parents=True)
    with pytest.raises(TeacherError, match="not the announced"):
        distillation.receive(home, arrays, config)
    assert list(earlier.parent.iterdir()) == [earlier]
    distillation.receive(home, dict(teacher.modules.named_parameters()), config)
    assert [path.name for path in earlier.parent.iterdir()] == [config["digest"]]  # in the earlier one's place


@pytest.mark.parametrize(
    ("teacher", "changes", "message"),
    [
        ({"clusters": 0}, {}, "has no head.safetensors.*soft_weight: 0"),
        ({"clusters": 9}, {}, "predicts 9 clusters, and codebook federated of this run has 6"),
        ({}, {"initial": "teacher", "hidden_size": 96}, r"is \[.*\] in the student and \[.*\] in the teacher"),
        ({}, {"initial": "teacher", "layers": 5}, r"layers\.4.*absent"),
    ],
)
def test_run_names_a_teacher_that_does_not_fit_before_any_round(run, teacher, changes, message):
    save_teacher(run / "03_pretrain" / "checkpoint", **teacher)
    with pytest.raises(TeacherError, match=message):
        distillation.run(run, distill(**changes))
    assert not rounds_of(run / "04_distill")


def test_run_refuses_a_teacher_with_other_frames(run):
    path = run / "03_pretrain" / "checkpoint" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "conv_stride": [5, 2, 2, 2, 2, 2, 1]}))
    with pytest.raises(ValueError, match="labels need 400 per 320"):
        distillation.run(run, distill())


def test_run_refuses_a_teacher_of_another_architecture(run):
    path = run / "03_pretrain" / "checkpoint" / "config.json"
    text = path.read_text()
    path.write_text(json.dumps({**json.loads(text), "model_type": "wav2vec2"}))
    with pytest.raises(ValueError, match="model_type is 'wav2vec2'; only HuBERT"):
        distillation.run(run, distill())
    path.write_text(json.dumps({**json.loads(text), "hidden_size": 96}))
    with pytest.raises(ValueError, match="model.safetensors.*does not fit"):
        distillation.run(run, distill())
    assert not rounds_of(run / "04_distill")


def test_student_of_another_width_starts_at_random(run):
    task, arrays = distillation.begin(run, distill(hidden_size=96), distillation.read_teacher(run, distill()))
    config = task.config["student"]["model"]
    assert config["hidden_size"] == 96 and arrays["head.label_embeddings"].shape == (federation.TONES, 128)
    heads = {width: recipes.model_config(distill(hidden_size=width)).num_attention_heads for width in (96, 128, 176)}
    assert heads == {96: 3, 128: 2, 176: 2}
    assert recipes.model_config(distill(front_end="waveform", conv_width=32)).conv_dim == (32,) * 7


def test_hubert_predicts_clusters_that_are_not_those_of_kmeans(run):
    p = distill(objectives=["hubert"])
    with pytest.raises(TeacherError, match="kmeans.targets"):
        distillation.run(run, p)
    trained(run, p)
    (folder,) = (run / "04_distill" / "clients" / "client-000" / "labels").glob("*-layer-middle-clusters-5-seed-0")
    labels = Labels(folder)
    utterance = labels.utterances[0]
    assert labels[utterance].max() < 5
    assert len(labels[utterance]) == len(Labels(run / "02_kmeans/clients/client-000/federated")[utterance])
