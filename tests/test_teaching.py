"""Each objective of distillation against its definition; a teacher that never moves; students that start right."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from federation import pretrain

from fedhubert_lib import distillation, hubert, masking, params, seeds, teaching, training
from fedhubert_lib.batching import Batch
from fedhubert_lib.objectives import masked_prediction

CLUSTERS = 12
WEIGHTS = {"soft_weight": 0.7, "label_weight": 0.3}
TEACHER = hubert.preset(
    "tiny", "logmel", hidden_size=64, num_attention_heads=2, intermediate_size=128, hidden_dropout=0.2, layerdrop=0.3
)
STUDENT = hubert.preset(
    "tiny", "logmel", hidden_size=32, num_attention_heads=2, intermediate_size=64, num_hidden_layers=2
)


def build(config, seed=0, clusters=CLUSTERS):
    model, head = hubert.Hubert(config), hubert.Head(config, clusters)
    for module in (model, head):
        hubert.initialise(module, seeds.torch_generator(seed))
    return model, head


def batch(seed=0, clips=3, samples=32_000):
    generator = seeds.torch_generator(seed)
    rng = seeds.numpy_generator(seed)
    frames = (samples - 400) // 320 + 1
    mask = torch.stack([torch.from_numpy(masking.spans(frames, rng)) for _ in range(clips)])
    labels = torch.randint(CLUSTERS, (clips, frames), generator=generator)
    return Batch(torch.randn(clips, samples, generator=generator) * 0.1, labels, mask, tuple("abc"[:clips]))


@pytest.fixture
def teacher():
    return teaching.Teacher(*build(TEACHER))


def test_teacher_answers_the_same_bits_while_the_student_trains(teacher):
    student, head = build(STUDENT, 1)
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    first = teacher.probabilities(batch(), 4.0)

    def objective(one, _):
        return teaching.soft_targets(student, head, teacher, one, **WEIGHTS)

    module = torch.nn.ModuleDict({"model": student, "head": head})
    training.local_update(
        module, [batch(), batch(1)], objective, pretrain(warmup_fraction=0.0), first_step=0, total_steps=2, seed=0
    )
    assert torch.equal(first, teacher.probabilities(batch(), 4.0))
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_soft_targets_are_temperature_distillation(teacher):
    student, head = build(STUDENT, 1)
    student.eval()
    one = batch()
    sums = teaching.soft_targets(student, head, teacher, one, **WEIGHTS)
    with torch.no_grad():
        theirs = teacher.head(teacher.model(one.waveforms).last)[one.mask]
        ours = head(student(one.waveforms, one.mask).last)[one.mask]
    soft = F.kl_div(F.log_softmax(ours / 4, -1), F.softmax(theirs / 4, -1), reduction="sum") * 16
    hard = F.cross_entropy(ours, one.labels[one.mask], reduction="sum")
    torch.testing.assert_close(sums.loss, 0.7 * soft + 0.3 * hard)
    assert sums.count == int(one.mask.sum())


def test_soft_targets_of_labels_alone_are_masked_prediction(teacher):
    student, head = build(hubert.preset("tiny", conv_dim=(8,) * 7, num_hidden_layers=1), 1)
    one = batch()
    teacher = teaching.Teacher(teacher.model, None)  # it is not asked
    ours = teaching.soft_targets(student, head, teacher, one, soft_weight=0, label_weight=1)
    theirs = masked_prediction(student, head, one)
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert theirs.measured["penalty_sum"] > 0
    for name, value in theirs.measured.items():
        torch.testing.assert_close(ours.measured[name], value)


def test_soft_targets_without_labels_ignore_them(teacher):
    student, head = build(STUDENT, 1)
    one = batch()
    beyond = Batch(one.waveforms, one.labels + 10_000, one.mask, one.utterances)
    sums = teaching.soft_targets(student.eval(), head, teacher, beyond, soft_weight=1, label_weight=0)
    torch.testing.assert_close(
        sums.loss, teaching.soft_targets(student, head, teacher, one, soft_weight=1, label_weight=0).loss
    )
    row = teaching.averages({name: float(value) for name, value in sums.measured.items()})
    assert row["loss"] == pytest.approx(row["divergence"]) and "accuracy_masked" not in row


def test_teacher_hears_the_clip_unmasked(teacher):
    student, head = build(TEACHER)
    student.eval()
    one = batch()
    unmasked = Batch(one.waveforms, one.labels, torch.zeros_like(one.mask), one.utterances)
    everything = Batch(one.waveforms, one.labels, torch.ones_like(one.mask), one.utterances)
    logits = head(student(unmasked.waveforms).last)
    targets = teacher.probabilities(everything, 4.0)
    torch.testing.assert_close((logits / 4).softmax(-1), targets)


def test_layer_regression_equals_s3prl_distiller(teacher):
    student, _ = build(STUDENT, 1)
    layers = teaching.target_layers(4)
    torch.manual_seed(0)
    regressors = teaching.Regressors(32, 64, len(layers))
    one = batch()
    sums = teaching.layer_regression(student, regressors, teacher, one)
    with torch.no_grad():
        predicted = regressors(student(one.waveforms).last)
        targets = torch.stack([teacher.model(one.waveforms, hidden_states=True).hidden[i] for i in layers], 1)
    # s3prl/pretrain/distiller: l1_loss(...).mean() + cosine_loss * (-logsigmoid(cosine_similarity)).mean()
    expected = F.l1_loss(predicted, targets) - F.logsigmoid(F.cosine_similarity(predicted, targets, dim=-1)).mean()
    torch.testing.assert_close(sums.loss / sums.count, expected)
    assert sums.count == one.labels.numel()


@pytest.mark.parametrize(("depth", "layers"), [(12, (4, 8, 12)), (24, (8, 16, 24)), (4, (1, 3, 4)), (1, (1,))])
def test_target_layers(depth, layers):
    assert teaching.target_layers(depth) == layers


def test_summed_adds_objectives_by_their_averages(teacher):
    student, head = build(STUDENT, 1)
    regressors = teaching.Regressors(32, 64, 3)
    one = batch()
    parts = [
        (0.5, teaching.soft_targets(student, head, teacher, one, **WEIGHTS)),
        (2.0, teaching.layer_regression(student, regressors, teacher, one)),
    ]
    both = teaching.summed(parts)
    soft, regression = (part for _, part in parts)
    expected = 0.5 * soft.loss / soft.count + 2.0 * regression.loss / regression.count
    torch.testing.assert_close(both.loss / both.count, expected)
    assert {"soft_loss_sum", "cosine_sum"} <= set(both.measured)


@pytest.mark.parametrize(("name", "weight"), [("soft-targets", 1.0), ("hubert", 2.0)])
def test_a_students_loss_weighs_its_parts_by_its_parameters(teacher, name, weight):
    student, head = build(STUDENT, 1)
    module = torch.nn.ModuleDict({"model": student.eval(), "head": head, "regressors": teaching.Regressors(32, 64, 3)})
    one, chosen = batch(), {"soft_weight": 0.25, "label_weight": 0.5, "temperature": 0.5}
    p = params.Distill(**chosen, regression_weight=3.0, hubert_weight=2.0, unmasked_weight=0.5, unmasked_decay=0.5)
    p = p.model_copy(update={"objectives": [name, "distilhubert"]})
    sums = distillation._objective(module, teacher, p, one, 0.25)  # half of the decay: half of unmasked_weight
    if name == "hubert":
        first = masked_prediction(student, head, one, unmasked_weight=0.25)
    else:
        first = teaching.soft_targets(student, head, teacher, one, **chosen, unmasked_weight=0.25)
    second = teaching.layer_regression(student, module["regressors"], teacher, one)
    expected = weight * first.loss / first.count + 3 * second.loss / second.count
    torch.testing.assert_close(sums.loss / sums.count, expected)


def test_student_from_is_the_first_layers_of_the_teacher(teacher):
    config = hubert.replace(TEACHER, num_hidden_layers=2)
    student = teaching.student_from(teacher.model, config).eval()
    theirs = teacher.model(batch().waveforms, hidden_states=True).hidden
    ours = student(batch().waveforms, hidden_states=True).hidden
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=False))
    with pytest.raises(teaching.TeacherError, match=r"is \[.*\] in the student and \[.*\] in the teacher"):
        teaching.student_from(teacher.model, STUDENT)
    with pytest.raises(teaching.TeacherError, match=r"layers\.4.*absent"):
        teaching.student_from(teacher.model, hubert.replace(TEACHER, num_hidden_layers=5))
    with pytest.raises(teaching.TeacherError, match="num_attention_heads is 4 in the student and 2 in the teacher"):
        teaching.student_from(teacher.model, hubert.replace(TEACHER, num_attention_heads=4))


@pytest.mark.parametrize("name", ["soft-targets", "distilhubert"])
def test_objectives_bring_a_student_nearer_to_its_teacher(teacher, name):
    student, head = build(STUDENT, 1)
    torch.manual_seed(0)
    regressors = teaching.Regressors(32, 64, 3)

    def objective(one, _=0.0):
        if name == "soft-targets":
            return teaching.soft_targets(student, head, teacher, one, soft_weight=1, label_weight=0)
        return teaching.layer_regression(student, regressors, teacher, one)

    module = torch.nn.ModuleDict({"student": student, "head": head, "regressors": regressors})
    p = pretrain(learning_rate=2e-3, warmup_fraction=3 / 40)
    first = objective(batch())
    training.local_update(module, [batch()] * 40, objective, p, first_step=0, total_steps=40, seed=0)
    last = objective(batch())
    assert last.loss / last.count < 0.8 * (first.loss / first.count)


def test_unmasked_frames_count_with_their_weight(teacher):
    student, head = build(STUDENT, 1)
    student.eval()
    one = batch()
    sums = teaching.soft_targets(student, head, teacher, one, **WEIGHTS, unmasked_weight=0.5)
    with torch.no_grad():
        theirs, ours = teacher.head(teacher.model(one.waveforms).last), head(student(one.waveforms, one.mask).last)
    soft, whole = [], []
    for mask in (one.mask, ~one.mask):
        targets = F.softmax(theirs[mask] / 4, -1)
        soft.append(F.kl_div(F.log_softmax(ours[mask] / 4, -1), targets, reduction="sum") * 16)
        whole.append(0.7 * soft[-1] + 0.3 * F.cross_entropy(ours[mask], one.labels[mask], reduction="sum"))
    torch.testing.assert_close(sums.loss, whole[0] + 0.5 * whole[1])
    torch.testing.assert_close(sums.measured["soft_loss_sum"], soft[0])


def test_waveforms_that_are_normalised_already_are_not_normalised_again(teacher):
    config = replace(TEACHER, front_end="waveform", conv_dim=(16,) * 7, hidden_dropout=0.0, layerdrop=0.0)
    one = replace(batch(), normalised=True)  # not of unit variance, as a crop is not
    (model, head), (plain, _) = build(replace(config, do_normalize=True)), build(config)
    heard, other = (teaching.Teacher(module, head) for module in (model, plain))
    assert torch.equal(heard.probabilities(one, 4.0), other.probabilities(one, 4.0))
    assert torch.equal(heard.layers(one), other.layers(one))
    regressors = teaching.Regressors(64, 64, 3)
    losses = [
        lambda module: masked_prediction(module, head, one),
        lambda module: teaching.soft_targets(module, head, other, one, soft_weight=1, label_weight=0),
        lambda module: teaching.layer_regression(module, regressors, other, one),
    ]
    for loss in losses:
        assert torch.equal(loss(model).loss, loss(plain).loss)


def test_cosine_is_that_of_all_frames_and_a_sum_counts_masked_ones(teacher):
    student, head = build(STUDENT, 1)
    student.eval()
    regressors, one = teaching.Regressors(32, 64, 3), batch()
    soft = teaching.soft_targets(student, head, teacher, one, **WEIGHTS)
    regression = teaching.layer_regression(student, regressors, teacher, one)
    assert teaching.summed([(0.5, soft), (2.0, regression)]).measured["masked_frames"] == soft.count
    predicted = regressors(student(one.waveforms).last)
    cosine = F.cosine_similarity(predicted, teacher.layers(one), dim=-1).mean()
    assert teaching.averages(regression.measured)["cosine"] == pytest.approx(cosine.item(), rel=1e-5)
