"""Keyword spotting: the probe is s3prl's, clips do not depend on their batch, broken tables are named."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
import transformers

from fedhubert_lib import audio, hubert, params, seeds
from fedhubert_lib.evaluation import extraction, keywords, measures, systems

WORDS = ("yes", "no", "up")


def tones(folder, speakers=6, takes=3):
    """Clips whose word is a pitch; two speakers per split. Lengths differ, as in Speech Commands."""
    rows = []
    rng = np.random.default_rng(0)
    for index, word in enumerate(WORDS):
        for speaker in range(speakers):
            for take in range(takes):
                clip = f"{word}/{speaker:02d}_nohash_{take}"
                samples = int(rng.integers(9_000, 17_000))
                time = np.arange(samples) / 16_000
                wave = 0.3 * np.sin(2 * np.pi * (300 + 400 * index + 10 * speaker) * time) + 0.01 * rng.normal(
                    size=samples
                )
                path = folder / f"{clip.replace('/', '-')}.wav"
                soundfile.write(path, wave.astype(np.float32), 16_000)
                split = ("train", "validation", "test")[speaker % 3]
                rows.append({"clip": clip, "path": str(path), "word": word, "speaker": str(speaker), "split": split})
                rows[-1]["samples"] = samples
    return pd.DataFrame(rows)


@pytest.fixture
def table(tmp_path):
    tones(tmp_path).to_parquet(tmp_path / "keywords.parquet")
    return tmp_path / "keywords.parquet"


def task(clips=300, layers=3, width=8, seed=0):
    """Rows of words that only layer 1 tells apart, and their task."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(4, size=clips)
    rows = rng.normal(size=(clips, layers, width)).astype(np.float32)
    rows[:, 1] += 2 * rng.normal(size=(4, width))[labels]
    train, validation, test = np.split(rng.permutation(clips), [clips // 2, 3 * clips // 4])
    return rows, keywords.Task(list("abcd"), labels, train, validation, test)


def test_probe_on_means_equals_s3prls_order():
    torch.manual_seed(0)
    frames = torch.randn(5, 3, 49, 8)  # [clips, layers, frames, width]
    probe = keywords.Probe(3, 8, 4)
    torch.nn.init.normal_(probe.layer_logits)
    # s3prl: Featurizer (softmax of weights, sum), then UtteranceLevel (projector, mean pooling, linear).
    summed = (torch.softmax(probe.layer_logits, 0)[None, :, None, None] * frames).sum(1)
    theirs = probe.classifier(probe.projection(summed).mean(1))
    torch.testing.assert_close(probe(frames.mean(2)), theirs)


def test_probe_learns_finds_the_layer_and_repeats_itself():
    first, again, other = (keywords.probe(*task(), seed, steps=300, rate=1e-2) for seed in (0, 0, 1))
    assert first.accuracy > 0.9
    assert first.layer_weights.argmax() == 1 and first.layer_weights.sum() == pytest.approx(1)
    assert (again.predicted == first.predicted).all() and (again.layer_weights == first.layer_weights).all()
    assert (other.layer_weights != first.layer_weights).any()


def test_probe_is_at_chance_without_signal():
    rows, of_noise = task()
    noise = np.random.default_rng(1).normal(size=rows.shape).astype(np.float32)
    assert keywords.probe(noise, of_noise, 0, steps=200, rate=1e-2).accuracy < 0.45


def test_probe_does_not_see_the_test_clips():
    rows, one = task()
    changed = rows.copy()
    changed[one.test] = 1e3
    a, b = (keywords.probe(inputs, one, 0, steps=50, rate=1e-2) for inputs in (rows, changed))
    assert (a.layer_weights == b.layer_weights).all() and a.validation_accuracy == b.validation_accuracy


def test_a_probe_is_left_as_it_was_at_its_best():
    rows, one = task()
    one = one._replace(labels=np.random.default_rng(2).integers(4, size=len(rows)))  # accuracies go up and down
    module, _, batches = keywords.draws(rows, one, 0, 1.0)

    def logits(clips):
        return module(torch.from_numpy(rows[clips]))

    outcome = keywords._fit(module, logits, one, batches, steps=40, rate=0.1, looks=20)
    left = (logits(one.validation).argmax(1).numpy() == one.labels[one.validation]).mean()
    assert left == outcome.validation_accuracy


def test_probe_standardises_the_scale_of_features_away():
    rows, one = task()
    a, b = (keywords.probe(inputs, one, 0, steps=100, rate=1e-3) for inputs in (rows, rows * 1000 + 50))
    assert a.accuracy == pytest.approx(b.accuracy, abs=0.03)


def test_one_second_of_clips_of_any_length():
    short, long = torch.ones(9_000), torch.arange(17_001.0)
    assert keywords.one_second(short).tolist() == [1.0] * 9_000 + [0.0] * 7_000
    assert keywords.one_second(long).tolist() == list(range(500, 16_500))


NORMALISING = hubert.preset(
    "tiny", num_hidden_layers=1, conv_dim=(16,) * 7, feat_extract_norm="layer", do_normalize=True
)


@pytest.fixture
def beside_zero(table):
    """Clips around 0.2: where zeros are part of what is normalised, they lie far from zero afterwards."""
    clips = keywords.read_clips(table)
    for clip in clips.itertuples():
        soundfile.write(clip.path, audio.read(clip.path).numpy() + 0.2, 16_000, subtype="FLOAT")
    return clips


def test_short_clips_are_normalised_as_transformers_does_and_then_filled_up(beside_zero):
    """s3prl, transformers and fedhubert s3prl normalise a clip, and not the zeros that fill it up."""
    clips = beside_zero[beside_zero.samples < keywords.CLIP_SAMPLES].iloc[:3]
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    options = {"sampling_rate": 16_000, "padding": "max_length", "max_length": keywords.CLIP_SAMPLES}
    theirs = extractor([audio.read(path).numpy() for path in clips.path], return_tensors="pt", **options).input_values
    torch.testing.assert_close(keywords.waveforms(clips, normalise=True), theirs, rtol=0, atol=1e-5)


def test_all_measures_of_words_hear_normalised_clips_where_the_model_does(beside_zero, tmp_path, monkeypatch):
    """What was kept before, of clips normalised with their zeros, is not read; that of all other models is."""
    clips, names = beside_zero, ("_words", "_abx", "_more_words")
    models = (systems.untrained(hubert.replace(NORMALISING, do_normalize=which), 0) for which in (True, False))
    cpu = torch.device("cpu")
    model, raw = (systems.System("teacher", "", systems.of_model(one, cpu), "digest", one) for one in models)
    expected = torch.stack(raw.encoder(keywords.waveforms(clips, normalise=True)), 1)
    seen = {}
    for name in names:
        monkeypatch.setattr(measures, name, lambda result, *inputs, name=name: seen.update({name: inputs}))
    speech = measures.Speech(clips, keywords.task(clips), tmp_path)
    measures.of_system(model, speech, params.Evaluate())
    np.testing.assert_allclose(seen["_words"][0], expected.mean(2), atol=2e-5)
    np.testing.assert_allclose(seen["_more_words"][1][:, 0], expected[:, 0].mean(1), atol=2e-5)
    unit = torch.nn.functional.normalize(expected[speech.abx_clips.tolist(), 0], dim=-1)
    np.testing.assert_allclose(seen["_abx"][0], unit, atol=1e-3)
    measures.of_system(raw, speech, params.Evaluate())
    kept = {path.name.removeprefix(speech.features(raw, clips).name) for path in tmp_path.glob("digest-*")}
    assert kept == {"-clips.npy", "-frames.npy", "-normalised-clips.npy", "-normalised-frames.npy"}


def test_fine_tuning_hears_normalised_clips_where_the_model_does(beside_zero):
    model, words, heard = systems.untrained(NORMALISING, 0), keywords.task(beside_zero), []
    model.register_forward_pre_hook(lambda module, inputs, named: heard.append((*inputs, named)), with_kwargs=True)
    keywords.fine_tune(model, beside_zero, words, 0, steps=1, rate=1e-3)
    last, named = heard[-1]
    assert torch.equal(last, keywords.waveforms(beside_zero, normalise=True)[words.test]) and named["normalised"]


@pytest.mark.parametrize("front_end", ["waveform", "logmel"])
def test_features_of_a_clip_do_not_depend_on_its_batch(table, tmp_path, front_end):
    config = hubert.preset("tiny", front_end, num_hidden_layers=2, conv_dim=(16,) * 7)
    encoder = systems.of_model(systems.untrained(config, 0), torch.device("cpu"))
    clips = keywords.read_clips(table)
    moments, units = extraction.clips(encoder, clips, tmp_path / "a", whole=np.array([40, 2, 7]), batch=32)
    single, _ = extraction.clips(encoder, clips.iloc[[7]], tmp_path / "b", batch=1)
    assert moments.shape == (54, 2, 3, 192)
    np.testing.assert_allclose(moments[7], single[0], atol=2e-5)
    frames = torch.stack(encoder(keywords.waveforms(clips.iloc[[7]])))[:, 0]
    np.testing.assert_allclose(moments[7], [frames.mean(1), frames.std(1, unbiased=False)], atol=2e-5)
    # The frames of the clips that were asked for, in that order, as far as angles between them go.
    assert units.shape == (3, 3, 49, 192)
    np.testing.assert_allclose(units[2], torch.nn.functional.normalize(frames, dim=-1), atol=1e-3)
    assert np.abs(units[1] - units[2]).max() > 0.01


def test_half_a_clip_is_not_taken_for_the_clip(table):
    clips = keywords.read_clips(table)
    path = Path(clips.path[4])
    path.write_bytes(path.read_bytes()[:9_000])
    with pytest.raises(audio.AudioError, match=path.name):
        keywords.waveforms(clips)


def test_features_are_extracted_once(table, tmp_path):
    calls = []

    def encoder(waveforms):
        calls.append(len(waveforms))
        return (waveforms[:, None, :39],)

    clips = keywords.read_clips(table)
    first, again = (extraction.clips(encoder, clips, tmp_path / "rows", batch=20)[0] for _ in range(2))
    assert sorted(calls) == [14, 20, 20] and (first == again).all()


def test_features_take_their_room_on_the_disk_as_they_come(table, tmp_path):
    """A file that is mapped before it has its blocks ends the process on a disk that is full."""
    sizes = []

    def look(done: int, rows: int) -> None:
        sizes.append(next(tmp_path.glob(".rows-clips.*")).stat().st_size)

    clips = keywords.read_clips(table)
    moments, _ = extraction.clips(lambda w: (w[:, None, :390],), clips, tmp_path / "rows", batch=20, on_progress=look)
    assert sizes[0] < moments.nbytes / 2 and moments.dtype == np.float32 and moments.shape == (54, 2, 1, 390)
    _, frames = extraction.clips(lambda w: (w[:, None, :9],), clips, tmp_path / "none", whole=())
    assert frames.shape == (0, 1, 1, 9) and frames.dtype == np.float16


def test_broken_encoder_leaves_no_features_and_the_clip_is_named(table, tmp_path):
    clips = keywords.read_clips(table)
    broken = keywords.waveforms(clips.iloc[[5]])[0]

    def encoder(waveforms):
        return (torch.where((waveforms == broken).all(1)[:, None, None], torch.nan, waveforms[:, None, :4]),)

    with pytest.raises(keywords.KeywordError, match=f"clip {clips['clip'].iloc[5]} are not finite"):
        extraction.clips(encoder, clips, tmp_path / "rows")
    assert not list(tmp_path.glob("rows*"))


def test_probe_tells_pitches_apart_by_mfcc(table, tmp_path):
    clips = keywords.read_clips(table)
    moments, _ = extraction.clips(systems.mfcc, clips, tmp_path / "mfcc")
    assert moments.shape == (54, 2, 1, 39)
    both, _ = extraction.clips(systems.mfcc_moments, clips, tmp_path / "moments")
    assert both.shape == (54, 2, 1, 78) and not both[:, 1].any()
    assert keywords.probe(moments[:, 0], keywords.task(clips), 0, steps=100, rate=1e-2).accuracy > 0.9


def test_read_clips_without_a_table(tmp_path):
    with pytest.raises(keywords.KeywordError, match="run the corpus stage"):
        keywords.read_clips(tmp_path / "keywords.parquet")


def test_untrained_encoder_gives_n_plus_one_states_and_is_seeded():
    config = hubert.preset("tiny", "logmel", num_hidden_layers=2)
    waveforms = torch.from_numpy(seeds.numpy_generator(0).normal(size=(2, 16_000)).astype(np.float32))
    cpu = torch.device("cpu")
    a, b, c = (systems.of_model(systems.untrained(config, seed), cpu)(waveforms) for seed in (0, 0, 1))
    assert len(a) == 3 and a[0].shape == (2, 49, 192)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) and not torch.equal(a[1], c[1])


def test_models_are_measured_without_dropout():
    config = hubert.preset("tiny", "logmel", num_hidden_layers=1, hidden_dropout=0.5)
    encode, waveforms = systems.of_model(hubert.Hubert(config).train(), torch.device("cpu")), torch.ones(1, 8_000)
    assert torch.equal(encode(waveforms)[-1], encode(waveforms)[-1])


@pytest.fixture
def commands(tmp_path):
    """Ten commands and three other words by six speakers, and a minute of noise, as Speech Commands has them."""
    rows = []
    for word in (*keywords.COMMANDS, "cat", "dog", "tree"):
        for speaker in range(6):
            for take in range(2):
                path = tmp_path / "sc" / word / f"{speaker}_nohash_{take}.wav"
                path.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(path, np.zeros(16_000, np.float32), 16_000)
                split = ("train", "validation", "test")[speaker % 3]
                row = {"clip": f"{word}/{path.name}", "path": str(path), "word": word, "speaker": str(speaker)}
                rows.append(row | {"split": split, "samples": 16_000})
    noise = tmp_path / "sc" / "_background_noise_"
    noise.mkdir()
    soundfile.write(noise / "hum.wav", (np.arange(960_000) / 960_000).astype(np.float32), 16_000, subtype="FLOAT")
    return pd.DataFrame(rows)


def test_superb_has_twelve_classes_of_equal_size(commands):
    clips = keywords.superb(commands, 0)
    sizes = clips.groupby(["split", "word"]).size().unstack()
    assert set(sizes.columns) == {*keywords.COMMANDS, "_unknown_", "_silence_"}
    assert (sizes == 4).all().all()
    assert keywords.superb(commands, 0).equals(clips) and not keywords.superb(commands, 1).equals(clips)


def test_noise_files_as_published_give_each_split_its_silence(tmp_path, monkeypatch):
    """Six of 60 to 95 s, about as published; v0.02 has 407 test clips of a command on average."""
    lengths = {tmp_path / f"{n}.wav": 16_000 * seconds for n, seconds in enumerate((95, 62, 60, 61, 61, 60))}
    monkeypatch.setattr(keywords, "noise", lambda root: lengths)
    clips = keywords._silence(tmp_path)
    counts = clips.split.value_counts()
    assert counts["train"] > 3_077 and counts["validation"] > 370 and counts["test"] > 407


def test_superb_cuts_the_silence_of_each_split_from_other_noise(commands):
    clips = keywords.superb(commands, 0)
    silence = clips[clips.word == "_silence_"]
    heard = keywords.waveforms(silence)  # the noise is a ramp: a sample's value is its place
    assert heard.shape == (12, 16_000)
    for split, low, high in (("train", 0, 0.8), ("validation", 0.8, 0.9), ("test", 0.9, 1)):
        noise = heard[(silence.split == split).to_numpy()]
        assert noise.min() >= low - 1e-6 and noise.max() <= high


def test_voices_of_superb_are_those_of_people(commands, tmp_path, monkeypatch):
    """Each noise of a split has a name in the column of speakers, so that splits share none."""
    clips, heard = keywords.superb(commands, 0), {}
    for name in ("leave_speakers_out", "speaker_accuracy"):
        probe = lambda *inputs, seed, name=name: heard.update({name: inputs}) or (0.5, 0.1)  # noqa: E731
        monkeypatch.setattr(measures.probes, name, probe)
    speech, moments = measures.Speech(clips, keywords.task(clips), tmp_path), np.zeros((len(clips), 2, 3))
    result = measures.Result("mfcc")
    result.layer = 0
    measures._more_words(result, systems.System("mfcc", "MFCC", systems.mfcc, ""), moments, speech, params.Evaluate())
    for rows, *_, speakers in heard.values():
        assert len(rows) == len(speakers) == (clips.word != "_silence_").sum()
        assert set(speakers) == set("012345")
    (unseen,) = [figure for figure in result.figures if figure["measure"] == "unseen-speaker-accuracy"]
    assert unseen["baseline"] == 1 / 11, "silence is nobody's word"


def test_abx_of_superb_compares_single_words(commands):
    """Clips of _unknown_ are many words and those of _silence_ none: two of one name need not sound alike."""
    clips = keywords.superb(commands, 0)
    speech = measures.Speech(clips, keywords.task(clips), Path())
    compared = clips.iloc[speech.abx_clips]
    assert set(compared.word) <= set(keywords.COMMANDS) and set(compared.split) == {"test"}
    assert "_unknown_" in set(clips.word[clips.split == "test"])


def test_superb_names_what_is_missing(commands):
    with pytest.raises(keywords.KeywordError, match="no clip of stop"):
        keywords.superb(commands[commands.word != "stop"], 0)
    with pytest.raises(keywords.KeywordError, match="no clip of other words"):
        keywords.superb(commands[commands.word.isin(keywords.COMMANDS)], 0)
    with pytest.raises(keywords.KeywordError, match="no validation clip of the ten commands"):
        keywords.superb(commands[(commands.split != "validation") | (commands.word == "cat")], 0)
    noise = Path(commands.path[0]).parents[1] / "_background_noise_"
    soundfile.write(noise / "nan.wav", np.full(16_000, np.nan, np.float32), 16_000, subtype="FLOAT")
    with pytest.raises(audio.AudioError, match="nan.wav"):
        keywords.superb(commands, 0)
    for path in noise.iterdir():
        path.unlink()
    (noise / "._hum.wav").write_bytes(b"\0\5\x16\7")  # macOS: a resource fork is no noise
    with pytest.raises(keywords.KeywordError, match="_background_noise_"):
        keywords.superb(commands, 0)


def test_fine_tuning_learns_words_and_leaves_the_model_alone(table):
    config = hubert.preset("tiny", "logmel", hidden_size=48, intermediate_size=96, num_hidden_layers=1)
    model = systems.untrained(config, 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    clips = keywords.read_clips(table)
    options = {"steps": 10, "rate": 3e-3}
    first, again = (keywords.fine_tune(model, clips, keywords.task(clips), 0, **options) for _ in range(2))
    assert first.accuracy > 0.6  # chance is a third
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert (first.predicted == again.predicted).all()
