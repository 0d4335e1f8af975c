"""Masks, batches, the objective and the local update."""

import itertools
import math
import os
import weakref
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from federation import NARROW, digest, pretrain
from torch import nn

from fedhubert_lib import audio, batching, hubert, masking, objectives, params, seeds, training
from fedhubert_lib.federated import fedprox

CONFIG = hubert.preset(
    "tiny",
    "logmel",
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=96,
    num_conv_pos_embedding_groups=4,
    classifier_proj_size=24,
)
KEYS = (0, 1, "client-000")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twelve clips of 1.2 to 4 s whose samples and labels are their own positions: (table, labels)."""
    folder = tmp_path_factory.mktemp("audio")
    rows, labels = [], {}
    for i, samples in enumerate(np.linspace(19_300, 64_000, 12).astype(int)):
        ramp = (np.arange(samples) % 30_000).astype(np.int16)
        soundfile.write(folder / f"{i}.flac", ramp, 16_000)
        rows.append({"utterance": f"u{i}", "path": str(folder / f"{i}.flac"), "samples": samples})
        labels[f"u{i}"] = np.arange(audio.frame_count(int(samples)), dtype=np.uint16)
    return pd.DataFrame(rows), labels


def cut(batch_seconds: float, crop_seconds: float) -> params.LocalTraining:
    return params.LocalTraining(batch_seconds=batch_seconds, crop_seconds=crop_seconds)


def make(config: hubert.HubertConfig = CONFIG) -> nn.ModuleDict:
    module = nn.ModuleDict({"model": hubert.Hubert(config), "head": hubert.Head(config, 250)})
    for part in module.values():
        hubert.initialise(part, seeds.torch_generator(0))
    return module


def objective(module: nn.ModuleDict):
    return lambda batch, _: objectives.masked_prediction(module["model"], module["head"], batch)


def test_masks_are_whole_spans_with_the_published_fraction():
    masks = [masking.spans(781, seeds.numpy_generator(0, i)) for i in range(400)]
    assert np.mean(masks) == pytest.approx(0.567, abs=0.015)
    for mask in masks:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
        assert (edges[1::2] - edges[::2]).min() >= 10
    with pytest.raises(ValueError, match="9 frames"):
        masking.spans(9, seeds.numpy_generator(0))


def test_crops_carry_their_own_labels(corpus):
    table, labels = corpus
    seen = 0
    for batch in batching.batches(table, labels, cut(8.0, 2.5), KEYS, 8):
        frames = audio.frame_count(batch.waveforms.shape[1])
        assert batch.labels.shape == batch.mask.shape == (len(batch.utterances), frames)
        assert batch.seconds <= 8.0
        starts = (batch.waveforms[:, 0] * 32_768).long()
        # The waveform is its own clock and so are the labels: label i belongs to sample 320 i exactly.
        assert torch.equal(starts % 30_000, batch.labels[:, 0] * 320 % 30_000)
        assert torch.equal(batch.labels, batch.labels[:, :1] + torch.arange(frames))
        seen += len(batch.utterances)
    assert seen > 12


def test_batches_depend_on_their_keys_alone(corpus, monkeypatch):
    """For a GPU several threads decode, and batches are pinned."""
    table, labels = corpus
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    draw = partial(batching.batches, table, labels, cut(8.0, 4.0), steps=5)
    for a, b in zip(draw(KEYS), draw(KEYS, device="cuda:1"), strict=True):
        assert torch.equal(a.waveforms, b.waveforms)
        assert torch.equal(a.mask, b.mask)
    other = next(draw((0, 2, "client-000")))
    assert other.utterances != next(draw(KEYS)).utterances


def test_masks_follow_their_parameters_and_differ_by_seed_round_client_and_clip(corpus):
    table, labels = corpus
    recipe = cut(8.0, 1.0).model_copy(update={"mask_probability": 0.3, "mask_length": 5})
    keys = [KEYS, (1, 1, "client-000"), (0, 2, "client-000"), (0, 1, "client-001")]
    masks = np.concatenate([next(batching.batches(table, labels, recipe, key, 1)).mask.numpy() for key in keys])
    assert len({mask.tobytes() for mask in masks}) == len(masks)
    assert masks.mean() == pytest.approx(0.26, abs=0.04)


def test_passes_use_every_utterance_as_often_as_all_others():
    samples = np.random.default_rng(0).integers(8_000, 100_000, 40)  # some are too short to be used
    recipe = cut(8.0, 4.0)
    steps = batching.steps_of(samples, 2, recipe, KEYS)
    plans = list(itertools.islice(batching.plans(samples, recipe, KEYS), steps + 1))
    used = np.bincount(np.concatenate([plan.rows for plan in plans[:-1]]), minlength=40)
    assert used.tolist() == np.where(samples >= 16_000, 2, 0).tolist()
    assert len(plans) == steps + 1


def test_another_pass_has_another_order_and_other_crops():
    samples, recipe = np.full(40, 100_000), cut(8.0, 4.0)
    steps = batching.steps_of(samples, 2, recipe, KEYS)
    drawn = list(itertools.islice(batching.plans(samples, recipe, KEYS), steps))
    rows, starts = (
        np.concatenate([getattr(plan, name) for plan in drawn]).reshape(2, 40) for name in ("rows", "starts")
    )
    assert (rows[0] != rows[1]).any()
    first, second = np.take_along_axis(starts, rows.argsort(1), 1)
    assert (first != second).mean() > 0.9 and starts.max() > 30_000


def test_batches_have_few_shapes_and_little_is_cropped_away():
    samples = np.random.default_rng(0).integers(16_000, 100_000, 400)
    recipe = cut(32.0, 5.0)
    steps = batching.steps_of(samples, 1, recipe, KEYS)
    plans = list(itertools.islice(batching.plans(samples, recipe, KEYS), steps))
    shapes = Counter((len(plan.rows), plan.samples) for plan in plans)
    lengths = {length for _, length in shapes}
    assert len(lengths) <= batching.LENGTHS
    assert len(shapes) <= len(lengths) + 1  # one batch of a pass may be smaller
    kept = sum(len(plan.rows) * plan.samples for plan in plans)
    assert kept > 0.95 * np.minimum(samples, 80_000).sum()
    for plan in plans:
        assert (plan.starts % 320 == 0).all()
        assert (plan.starts + plan.samples <= samples[plan.rows]).all()
        assert len(plan.rows) * plan.samples <= 32 * 16_000
    other = batching.plans(samples[:100], recipe, (0, 1, "client-001"))
    assert {plan.samples for plan in itertools.islice(other, 20)} <= lengths  # clients have them in common


def test_audio_is_decoded_once(corpus, monkeypatch):
    table, labels = corpus
    draw = partial(batching.batches, table, labels, cut(8.0, 2.0), KEYS, 20)
    monkeypatch.setattr(batching, "_decoded", {})
    monkeypatch.setattr(batching, "_has_room", lambda second: False)
    fresh = list(draw())
    assert not batching._decoded
    monkeypatch.setattr(batching, "_has_room", lambda second: True)
    first = list(draw())
    monkeypatch.setattr(audio, "read", None)
    for a, b, c in zip(fresh, first, draw(), strict=True):
        assert torch.equal(a.waveforms, b.waveforms)
        assert torch.equal(a.waveforms, c.waveforms)
    assert {tensor.dtype for tensor in batching._decoded.values()} == {torch.int16}


def test_a_file_that_changes_is_decoded_again(tmp_path):
    path = tmp_path / "a.wav"
    for i, subtype in enumerate(("PCM_16", "FLOAT")):  # finer than 16 bits stays as it is
        soundfile.write(path, np.full(1_000, 0.1 + i / 2), 16_000, subtype=subtype)
        os.utime(path, ns=(i, i))
        assert torch.equal(batching._read(str(path), 0, 1_000, 1_000), audio.read(path))
        assert torch.equal(batching._read(str(path), 10, 30, 1_000), audio.read(path, 10, 30))
    with pytest.raises(audio.AudioError, match="1000 samples, 1100 when scanned"):
        batching._read(str(path), 900, 1_100, 1_100)
    with pytest.raises(audio.AudioError, match="No such file"):
        batching._read(str(tmp_path / "b.wav"), 0, 1, 1)


def test_a_file_that_is_longer_than_its_table_says_is_refused(corpus, tmp_path):
    table, labels = corpus
    soundfile.write(tmp_path / "a.wav", np.zeros(table.samples[0] + 8_000), 16_000)
    table = table.assign(path=table.path.where(table.index > 0, str(tmp_path / "a.wav")))
    with pytest.raises(audio.AudioError, match="when scanned"):
        list(batching.batches(table, labels, cut(8.0, 1.0), KEYS, 2 * len(table)))


def test_an_utterance_is_normalised_whole_before_it_is_cropped(corpus):
    """As the recipe does for large; of a crop, mean and variance are others."""
    table, labels = corpus
    stream = batching.batches(table, labels, cut(8.0, 1.0), KEYS, 1, normalise=True)
    batch = next(stream)
    assert batch.normalised
    for crop, name, first in zip(batch.waveforms, batch.utterances, batch.labels[:, 0].tolist(), strict=True):
        whole = audio.read(table.set_index("utterance").path[name])
        whole = (whole - whole.mean()) / torch.sqrt(whole.var(correction=0) + 1e-7)
        torch.testing.assert_close(crop, whole[320 * first : 320 * first + len(crop)])
    config = hubert.preset("large", num_hidden_layers=1, conv_dim=(16,) * 7, hidden_size=48, num_attention_heads=4)
    model = hubert.Hubert(hubert.replace(config, intermediate_size=96)).eval()
    raw = hubert.Hubert(hubert.replace(model.config, do_normalize=False)).eval()
    raw.load_state_dict(model.state_dict())
    with torch.no_grad():  # and the model does not do it again
        assert torch.equal(model(batch.waveforms, normalised=True).last, raw(batch.waveforms).last)
        assert not torch.equal(model(batch.waveforms).last, raw(batch.waveforms).last)


def test_wrong_number_of_labels_is_an_error(corpus):
    table, labels = corpus
    short = {name: values[:-1] for name, values in labels.items()}
    with pytest.raises(ValueError, match="run 02_kmeans again"):
        next(batching.batches(table, short, cut(8.0, 4.0), KEYS, 1))


def train(corpus, steps: int = 3, adjust=lambda module: (), **changes) -> tuple[nn.ModuleDict, dict[str, float]]:
    table, labels = corpus
    module = make()
    stream = batching.batches(table, labels, cut(8.0, 4.0), KEYS, steps)
    metrics = training.local_update(
        module,
        stream,
        objective(module),
        pretrain(warmup_fraction=0.2, **changes),
        first_step=0,
        total_steps=10,
        seed=0,
        adjust=adjust(module),
    )
    return module, metrics


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_same_seed_same_weights(corpus, precision):
    first, metrics = train(corpus, precision=precision)
    second, _ = train(corpus, precision=precision)
    initial = make()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert not torch.equal(first["head"].label_embeddings, initial["head"].label_embeddings)
    assert metrics["masked_frames"] > 100


def test_dropout_follows_its_seed_alone():
    ends, options = [], {"first_step": 0, "total_steps": 9}
    for seed in (0, 0, 1):
        module = make(hubert.replace(CONFIG, hidden_dropout=0.3))
        torch.rand(1)  # whatever was drawn before
        training.local_update(module, [random_batch(2)], objective(module), pretrain(), **options, seed=seed)
        ends.append(digest(module.state_dict()))
    assert ends[0] == ends[1] != ends[2]


def test_gradients_that_a_failed_update_left_are_no_part_of_the_next_clients():
    """One module serves one client after another."""
    ends = []
    for left in (0.0, 1.0):
        module = make()
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, left)
        options = {"first_step": 0, "total_steps": 9, "seed": 0}
        training.local_update(module, [random_batch(2)], objective(module), pretrain(), **options)
        ends.append(digest(module.state_dict()))
    assert ends[0] == ends[1]


def test_validation_hears_no_dropout():
    module = make(hubert.replace(CONFIG, hidden_dropout=0.5)).train()
    one, again = (training.evaluate(module, [random_batch(2)], objective(module), "float32") for _ in range(2))
    assert one == again


def test_adamw_is_that_of_fairseqs_recipe():
    (group,) = training.adamw(nn.Linear(2, 2), pretrain(weight_decay=0.3)).param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.98), 1e-6, 0.3)


@pytest.mark.parametrize(("limit", "left"), [(1.0, [0.6, 0.8]), (10.0, [3.0, 4.0])])
def test_gradients_are_clipped_after_division(limit, left):
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([6.0, 8.0])
    assert training._clip([weight], 2.0, limit) == 5
    torch.testing.assert_close(weight.grad, torch.tensor(left))


def test_the_objective_knows_the_fraction_of_all_steps_that_are_done():
    """By the global step, so that round 2 of a federation stands where a straight training stands."""
    module, seen = make(), []

    def watched(batch, progress):
        seen.append(progress)
        return objective(module)(batch, progress)

    p = pretrain(warmup_fraction=0.0)
    for first_step in (0, 2):
        training.local_update(module, [random_batch(2)] * 2, watched, p, first_step=first_step, total_steps=4, seed=0)
    assert seen == [0.0, 0.25, 0.5, 0.75]
    assert [objectives.unmasked_weight(2.0, 0.5, progress) for progress in seen] == [2.0, 1.0, 0.0, 0.0]
    training.evaluate(module, [random_batch(2)], watched, "float32")
    assert seen[4:] == [1.0], "validation is of the loss of the end, so that rounds compare"
    assert objectives.unmasked_weight(2.0, 0.0, 0.75) == 2.0


def test_unmasked_frames_have_the_weight_that_is_set():
    module, batch = make(), random_batch(3)
    masked, both, half = (
        objectives.masked_prediction(module["model"], module["head"], batch, unmasked_weight=weight)
        for weight in (0.0, 1.0, 0.5)
    )
    others = masked.measured["unmasked_loss_sum"]
    torch.testing.assert_close(both.loss - masked.loss, others)
    torch.testing.assert_close(half.loss - masked.loss, others / 2)
    logits = module["head"](module["model"](batch.waveforms, batch.mask).last)
    expected = torch.nn.functional.cross_entropy(logits[~batch.mask], batch.labels[~batch.mask], reduction="sum")
    torch.testing.assert_close(others, expected.detach())


def test_accuracies_count_the_frames_that_they_name():
    batch = random_batch(2)
    named = torch.where(batch.mask, batch.labels, (batch.labels + 1) % 250)  # right where masked alone
    logits = nn.functional.one_hot(named, 250).float()
    sums = objectives.label_sums(logits, torch.zeros(batch.mask.shape), batch)
    assert (sums["correct_masked"], sums["correct_unmasked"]) == (batch.mask.sum(), 0)


def test_diverging_batch_is_named(corpus):
    table, labels = corpus
    module = make()
    with torch.no_grad():
        module["head"].final_proj.weight.fill_(float("nan"))
    stream = batching.batches(table, labels, cut(8.0, 4.0), KEYS, 2)
    p = pretrain(warmup_fraction=0.2)
    with pytest.raises(training.DivergedError, match="batch u"):
        training.local_update(module, stream, objective(module), p, first_step=0, total_steps=9, seed=0)


def test_masked_fraction_of_a_clip_does_not_depend_on_its_batch(corpus):
    """fairseq and torchaudio delete masked frames until all rows have equally many."""
    table, labels = corpus
    counts = [batch.mask.sum(1) for batch in batching.batches(table, labels, cut(16.0, 4.0), KEYS, 6)]
    assert any(len(set(count.tolist())) > 1 for count in counts)


def test_crop_of_features_is_the_crop_of_the_whole():
    """Frame i of a crop at sample 320 k sees the samples of frame i + k of the whole clip."""
    waveform = torch.randn(1, 24_000, generator=seeds.torch_generator(0))
    extractor = make_extractor(feat_extract_norm="layer")
    crop = waveform[:, 320 * 7 : 320 * 7 + 9_600]
    with torch.no_grad():
        whole, part = extractor(waveform), extractor(crop)
    assert torch.allclose(whole[:, 7 : 7 + part.shape[1]], part, rtol=0, atol=1e-5)


def make_extractor(**changes) -> hubert.FeatureExtractor:
    model = hubert.Hubert(hubert.preset("tiny", conv_dim=(16,) * 7, **changes))
    hubert.initialise(model, seeds.torch_generator(0))
    return model.feature_extractor


@pytest.mark.parametrize("front_end", ["waveform", "logmel"])
@pytest.mark.parametrize("norm", ["group", "layer"])
def test_clip_alone_has_the_features_it_has_in_a_batch(front_end, norm):
    model = hubert.Hubert(hubert.preset("tiny", front_end, conv_dim=(16,) * 7, feat_extract_norm=norm)).eval()
    waveforms = torch.randn(3, 8_000, generator=seeds.torch_generator(0))
    with torch.no_grad():
        assert torch.allclose(model(waveforms).last[1:2], model(waveforms[1:2]).last, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="frames"):
        model(waveforms, torch.zeros(3, 99, dtype=torch.bool))


def test_convolutions_get_a_tenth_of_the_gradient():
    gradients = {}
    for scale in (1.0, 0.1):
        model = hubert.Hubert(hubert.preset("tiny", conv_dim=(16,) * 7, feature_grad_mult=scale))
        hubert.initialise(model, seeds.torch_generator(0))
        output = model(torch.randn(2, 8_000, generator=seeds.torch_generator(1)))
        (output.last.square().sum() + output.features.square().sum()).backward()
        gradients[scale] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in gradients[1.0].items():
        scale = 0.1 if name.startswith("feature_extractor") else 1.0
        tolerance = 1e-5 * scale * gradient.abs().max().item() + 1e-7
        assert torch.allclose(gradients[0.1][name], gradient * scale, rtol=0, atol=tolerance), name


@pytest.mark.parametrize("front_end", ["waveform", "logmel"])
def test_loss_and_gradient_recombine_over_split_batches(front_end, corpus):
    """Four clips at once equal one clip and three, added up and divided by all masked frames."""
    config = hubert.replace(CONFIG, front_end=front_end, conv_dim=(16,) * 7)
    module = nn.ModuleDict({"model": hubert.Hubert(config), "head": hubert.Head(config, 250)})
    for part in module.values():
        hubert.initialise(part, seeds.torch_generator(0))
    whole = random_batch(4)
    parts = [
        batching.Batch(whole.waveforms[s], whole.labels[s], whole.mask[s], whole.utterances[s])
        for s in (slice(0, 1), slice(1, 4))
    ]

    def total(batches):
        module.zero_grad()
        sums = [
            objectives.masked_prediction(module["model"], module["head"], batch, unmasked_weight=0.3)
            for batch in batches
        ]
        count = sum(s.count for s in sums)
        for s in sums:
            (s.loss / count).backward()
        measured = {name: sum(float(s.measured[name]) for s in sums) for name in sums[0].measured}
        return measured, torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])

    (one, one_gradient), (split, split_gradient) = total([whole]), total(parts)
    assert one == pytest.approx(split, rel=1e-5)
    assert torch.allclose(one_gradient, split_gradient, rtol=0, atol=1e-5 * one_gradient.abs().max().item())


def random_batch(clips: int, frames: int = 60) -> batching.Batch:
    generator = seeds.torch_generator(3)
    masks = [torch.from_numpy(masking.spans(frames, seeds.numpy_generator(3, i))) for i in range(clips)]
    return batching.Batch(
        torch.randn(clips, 400 + 320 * (frames - 1), generator=generator) * 0.1,
        torch.randint(250, (clips, frames), generator=generator),
        torch.stack(masks),
        tuple(f"r{i}" for i in range(clips)),
    )


def test_accumulated_batches_give_the_step_of_one(corpus, monkeypatch):
    """Two batches of two clips, accumulated, move the weights as one batch of four does."""
    monkeypatch.setattr(training, "EPS", 1e-3)
    whole = random_batch(4)
    halves = [
        batching.Batch(whole.waveforms[s], whole.labels[s], whole.mask[s], whole.utterances[s])
        for s in (slice(0, 2), slice(2, 4))
    ]
    weights = []
    for stream, accumulate in (([whole], 1), (halves, 2)):
        module = make()
        p, options = pretrain(warmup_fraction=0.0), {"accumulate": accumulate, "total_steps": 9}
        training.local_update(module, stream, objective(module), p, first_step=0, seed=0, **options)
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.allclose(*weights, rtol=0, atol=1e-6)


def test_logits_stay_float32_and_the_stack_of_negatives_is_never_made():
    """(K + 1) x S x D float32 numbers would be 500 MB here; the loss may not allocate a tenth of it."""
    from torch.profiler import ProfilerActivity, profile

    head = hubert.Head(CONFIG, 500)
    frames = torch.randn(2_000, CONFIG.hidden_size, requires_grad=True)
    stack = 501 * 2_000 * CONFIG.classifier_proj_size * 4
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace,
        torch.autocast("cpu", torch.bfloat16),
    ):
        logits = head(frames)
        torch.nn.functional.cross_entropy(logits, torch.zeros(2_000, dtype=torch.long)).backward()
    assert logits.dtype == torch.float32
    assert sum(max(event.cpu_memory_usage, 0) for event in trace.events()) < stack


def test_schedule_rises_and_falls_linearly_over_global_steps():
    rates = [training.rate(2.0, 1 / 3, step, 12) for step in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert np.diff(rates[4:]) == pytest.approx([-0.25] * 7)
    assert rates[-1] > 0


def test_a_strong_proximal_term_holds_the_weights_near_the_start(corpus):
    start, distances = torch.nn.utils.parameters_to_vector(make().parameters()), []
    for strength in (0.0, 1e4):
        module, _ = train(corpus, adjust=lambda module, s=strength: [fedprox.pull(list(module.parameters()), s)])
        distances.append((torch.nn.utils.parameters_to_vector(module.parameters()) - start).norm().item())
    assert distances[1] < 0.8 * distances[0]


def test_a_personal_head_is_not_held_near_itself():
    names = {name: torch.nn.Parameter(torch.ones(2)) for name in ("model.a", "head.b")}
    update = SimpleNamespace(names=names, arrays={"model.a": torch.ones(2)}, p=pretrain(proximal=0.5), adjust=[])
    next(fedprox.proximal(update))
    for parameter in names.values():
        parameter.data += 1
    update.adjust[0](1.0)
    assert names["model.a"].grad.tolist() == [0.5, 0.5] and names["head.b"].grad is None


@pytest.mark.parametrize("clusters", [100, 500])
def test_loss_starts_at_chance(clusters):
    config = hubert.preset("base", num_hidden_layers=2, conv_dim=(32,) * 7)
    model, head = hubert.Hubert(config), hubert.Head(config, clusters)
    for part in (model, head):
        hubert.initialise(part, seeds.torch_generator(0))
    batch = random_batch(4)
    batch = hubert.replace(batch, labels=batch.labels % clusters)
    sums = objectives.masked_prediction(model, head, batch)
    assert float(sums.measured["loss_sum"]) / sums.count == pytest.approx(np.log(clusters), abs=0.15)


def test_a_teacher_inside_the_objective_stays_in_eval_mode():
    """s3prl calls train() on its teacher, dropout and all. Here it is no part of the module that trains."""
    teacher = hubert.Hubert(hubert.replace(CONFIG, hidden_dropout=0.5, layerdrop=0.5)).eval()
    module, seen, batch = make(), [], random_batch(2)

    def distil(batch, progress):
        with torch.no_grad():
            seen.append(teacher(batch.waveforms).last)
        return objective(module)(batch, progress)

    p = pretrain(warmup_fraction=0.0)
    training.local_update(module, [batch, batch], distil, p, first_step=0, total_steps=9, seed=0)
    assert torch.equal(*seen)
    assert not teacher.training


@pytest.mark.parametrize("front_end", ["waveform", "logmel"])
def test_gradient_checkpointing_changes_nothing_but_memory(front_end):
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        model = hubert.Hubert(hubert.replace(CONFIG, front_end=front_end, hidden_dropout=0.1, conv_dim=(16,) * 7))
        hubert.initialise(model, seeds.torch_generator(0))
        model.recompute = on
        torch.manual_seed(1)
        batch = random_batch(2)
        model.train()(batch.waveforms, batch.mask).last.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    # clips are recomputed one after the other, so that sums over them round differently
    assert (gradients[1] - gradients[0]).norm() < 1e-6 * gradients[0].norm()
    assert front_end == "waveform" or torch.equal(*gradients)


def test_gradient_checkpointing_keeps_a_fraction_of_the_activations():
    """Peak bytes of tensors in forward and backward, of all convolutions and four layers with dropout: measured .17."""
    from torch.profiler import ProfilerActivity, profile

    sizes = NARROW | {"num_hidden_layers": 4, "conv_dim": (32,) * 7}
    dropouts = dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.1)
    peaks = []
    for on in (False, True):
        model = hubert.Hubert(hubert.preset("tiny", **sizes, **dropouts)).train()
        model.recompute = on
        batch = random_batch(8, frames=120)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            model(batch.waveforms, batch.mask).last.float().square().sum().backward()
        events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        peaks.append(max(itertools.accumulate(event.nbytes() for event in events)))
    assert peaks[1] < 0.2 * peaks[0]


def test_batches_of_steps_whose_norms_were_not_fetched_are_let_go():
    """A GPU fetches norms once in fifty steps: so many pinned batches would be gigabytes."""
    batch = batching.Batch(torch.zeros(1, 8), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), ("u1",))
    kept, tally = weakref.ref(batch.waveforms), training._Tally(check_every=50)
    tally.step(1, torch.tensor(math.nan), [batch])
    del batch
    assert kept() is None
    with pytest.raises(training.DivergedError, match="step 1, batch .*u1"):
        tally.result()


def test_steps_mask_differently(corpus):
    table, labels = corpus
    recipe = cut(8.0, 1.0).model_copy(update={"mask_probability": 0.3, "mask_length": 5})
    masks = np.concatenate([batch.mask.numpy() for batch in batching.batches(table, labels, recipe, KEYS, 2)])
    assert len({mask.tobytes() for mask in masks}) == len(masks)


def test_spans_are_two_at_least_start_once_and_keep_their_expectation():
    draws = [seeds.numpy_generator(0, number) for number in range(2000)]
    assert min(masking.spans(12, draw, 0.1, 5).sum() for draw in draws[:50]) > 5
    assert all(masking.spans(12, draw, 6.0, 5).all() for draw in draws[:20]), "8 starts of 8"
    spans = np.mean([masking.spans(400, draw, 0.02, 10, minimum=0).sum() / 10 for draw in draws])
    assert spans == pytest.approx(0.8, abs=0.05)


def test_a_long_recording_gives_as_many_crops_as_it_has_parts_each_normalised_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(batching, "LONG", 32_000)
    recipe, samples = cut(8.0, 1.0), np.array([16_000, 100_000])
    steps = batching.steps_of(samples, 1, recipe, KEYS)
    plans = itertools.islice(batching.plans(samples, recipe, KEYS), steps)
    assert np.bincount(np.concatenate([plan.rows for plan in plans])).tolist() == [1, 4]
    noise = np.random.default_rng(0).normal(0, 0.1, 100_000) * np.linspace(0.1, 1, 100_000)
    path = tmp_path / "a.wav"
    soundfile.write(path, noise, 16_000, subtype="FLOAT")
    table = pd.DataFrame({"utterance": ["a"], "path": [str(path)], "samples": [100_000]})
    labels, whole = {"a": np.arange(audio.frame_count(100_000))}, audio.read(path)
    for batch in batching.batches(table, labels, recipe, KEYS, 3, normalise=True):
        for crop, first in zip(batch.waveforms, batch.labels[:, 0].tolist(), strict=True):
            begin = max(0, min(320 * first, 100_000 - 32_000))
            part = audio.normalise(whole[begin : begin + 32_000])
            torch.testing.assert_close(crop, part[320 * first - begin :][: len(crop)])


def test_labels_of_a_longer_utterance_are_refused():
    with pytest.raises(ValueError, match="run 02_kmeans again"):
        batching._crop_labels({"u": np.zeros(99)}, "u", 16_000, 0, 10)


def test_loss_is_that_of_masked_frames_and_accuracies_are_of_their_own():
    batch = random_batch(2)
    named = torch.where(batch.mask, (batch.labels + 1) % 250, batch.labels)  # right where nothing is masked
    one_hot = torch.nn.functional.one_hot(named, 250).float()
    sums = objectives.label_sums(one_hot, torch.ones(batch.mask.shape), batch)
    sums |= {"objective": torch.tensor(99.0), "penalty_sum": 2.0 * batch.mask.sum()}
    row = objectives.averages({name: float(value) for name, value in sums.items()})
    assert row == {"loss": 1, "feature_penalty": 2, "accuracy_masked": 0, "accuracy_unmasked": 1}
