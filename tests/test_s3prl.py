"""s3prl: our checkpoints in its upstreams, and its own benchmark run on them; what is missing is named."""

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import SMALL
from safetensors.torch import load_file, save_file

from fedhubert_lib import cli, files, hubert, pretrained, seeds
from fedhubert_lib.evaluation import keywords, systems, tables
from fedhubert_lib.export import formats, s3prl, s3prl_entry

OPTIONS = {"steps": 60, "rate": 1e-2, "seed": s3prl.FIRST_SEED, "device": "cpu"}


def save(folder, name="tiny", front_end="waveform", head=True):
    changes = SMALL if front_end == "logmel" else {**SMALL, "conv_dim": (16,) * 7}
    model = hubert.Hubert(hubert.preset(name, front_end, **changes))
    hubert.initialise(model, seeds.torch_generator(0))
    pretrained.save(folder, model, hubert.Head(model.config, 5) if head else None)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Thirteen words that are pitches, by nine speakers, named as Speech Commands names its files, and noise."""
    folder = tmp_path_factory.mktemp("words")
    rows = []
    for index, word in enumerate([*keywords.COMMANDS, "cat", "dog", "tree"]):
        for speaker in range(9):
            for take in range(3):
                path = folder / word / f"{speaker:08x}_nohash_{take}.wav"
                path.parent.mkdir(exist_ok=True)
                noise = seeds.numpy_generator(0, str(path.relative_to(folder))).normal(size=16_000)
                tone = np.sin(2 * np.pi * 200 * 1.3**index * np.arange(16_000) / 16_000)
                tone[8_000:] = 0  # a log-mel front end does not hear what never changes
                soundfile.write(path, (0.3 * tone + 0.01 * noise).astype(np.float32), 16_000)
                split = "test" if speaker >= 6 else "validation" if speaker == 5 else "train"
                row = {"clip": f"{word}/{path.name}", "path": str(path), "word": word, "speaker": str(speaker)}
                rows.append({**row, "split": split})
    (folder / "_background_noise_").mkdir()
    noise = 0.1 * seeds.numpy_generator(0, "background").normal(size=320_000)
    soundfile.write(folder / "_background_noise_" / "hum.wav", noise.astype(np.float32), 16_000)
    return pd.DataFrame(rows)


@pytest.fixture
def evaluated(clips, tmp_path):
    """A run with a teacher, the clips above, and a report of nothing but its systems."""
    run = tmp_path / "run"
    save(run / "03_pretrain" / "checkpoint")
    (run / "00_corpus").mkdir()
    clips.to_parquet(run / "00_corpus" / "keywords.parquet")
    compared, _ = systems.of_run(run, 0, torch.device("cpu"))
    written = {"run": "run", "seed": 0, "parameters": {"seeds": 2}, "figures": []}
    written |= {"absent": {}, "notes": [], "data": {"clips": {"test": 9}, "words": ["yes"], "speakers": {"test": 3}}}
    written["measures"] = [
        {"measure": n, "title": t, "better": b, "what": w} for n, (t, b, w) in tables.MEASURES.items()
    ]
    written["systems"] = [
        {"system": system.name, "title": system.title, "digest": system.digest} for system in compared
    ]
    files.write_json(run / "05_evaluate" / "report.json", written)
    files.write_json(run / "run.json", {})
    return run


@pytest.fixture
def environment():
    if not s3prl.PYTHON.is_file():
        pytest.skip("no environment for s3prl; run: make s3prl")


def test_lay_out_makes_the_folders_of_s3prl(clips, tmp_path):
    out = s3prl.lay_out(clips, tmp_path / "data", 0)
    test = {path.name: len(list(path.iterdir())) for path in (out / "test").iterdir()}
    assert test == {**dict.fromkeys(keywords.COMMANDS, 9), "_unknown_": 9, "_silence_": 9}
    assert {path.name for path in (out / "train").iterdir()} == {*clips.word, "_background_noise_"}
    heard = {path.resolve() for path in (out / "train").glob("*/*.wav")}
    assert not heard & {path.resolve() for path in (out / "test").glob("*/*.wav")}
    assert soundfile.info(out / "train" / "_background_noise_" / "hum.wav").frames == 256_000
    assert all(path.is_symlink() for path in (out / "test" / "yes").iterdir())


def test_lay_out_names_a_missing_command_and_does_without_silence(clips, tmp_path):
    with pytest.raises(keywords.KeywordError, match="up"):
        s3prl.lay_out(clips[clips.word != "up"], tmp_path / "data", 0)
    assert not (tmp_path / "data").exists()
    words = Path(clips.path[0]).parents[1]
    shutil.copytree(words, tmp_path / "words", ignore=shutil.ignore_patterns("_background_noise_"))
    elsewhere = clips.assign(path=clips.path.str.replace(str(words), str(tmp_path / "words"), regex=False))
    out = s3prl.lay_out(elsewhere, tmp_path / "data", 0)
    assert {path.name for path in (out / "test").iterdir()} == {*keywords.COMMANDS, "_unknown_"}


def test_missing_environment_names_make_s3prl(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(s3prl, "PYTHON", tmp_path / "none")
    checkpoint = save(tmp_path / "checkpoint")
    with pytest.raises(formats.ExportError, match="make s3prl"):
        s3prl.to_hubert_local(checkpoint, tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()
    assert cli.main(["export", "hubert-local", str(checkpoint), str(tmp_path / "model.pt")]) == 1
    assert "make s3prl" in capsys.readouterr().err


def test_command_refuses_what_it_cannot_run_before_s3prl_starts(evaluated, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(s3prl, "PYTHON", tmp_path / "none")
    assert cli.main(["s3prl", str(evaluated), "--system", "mfcc"]) == 1
    assert "mfcc: not a model of this run; there are teacher, random" in capsys.readouterr().err
    assert cli.main(["s3prl", str(evaluated), "--system", "student"]) == 1
    assert "no checkpoint in 04_distill/checkpoint" in capsys.readouterr().err
    assert cli.main(["s3prl", str(evaluated)]) == 1
    assert "make s3prl" in capsys.readouterr().err
    save(evaluated / "03_pretrain" / "checkpoint", front_end="logmel")
    assert cli.main(["s3prl", str(evaluated)]) == 1
    assert "teacher: has changed since report.json was written; run 05_evaluate again" in capsys.readouterr().err
    (evaluated / "05_evaluate" / "report.json").unlink()
    assert cli.main(["s3prl", str(evaluated)]) == 1
    assert "report.json: not there; run 05_evaluate first" in capsys.readouterr().err


def test_results_are_kept_and_move_aside_for_other_settings(evaluated, monkeypatch):
    def benchmark(checkpoint, data, out, *, fine_tune, device, **settings):
        out.mkdir(parents=True)
        return {"dev": 0.5, "test": settings["rate"], "classes": 12, "fine_tuned": fine_tune, **settings}

    monkeypatch.setattr(s3prl, "lay_out", lambda *_: evaluated)
    monkeypatch.setattr(s3prl, "benchmark", benchmark)
    options = {"fine_tune": False, "steps": 20, "device": "cpu"}
    for number, rate in ((2, 0.5), (3, 0.5), (1, 0.25)):  # the second would fail if it measured the first two again
        s3prl.of_run(evaluated, "teacher", seeds=number, rate=rate, **options)
    assert [figure["values"] for figure in tables.read(evaluated)["figures"]] == [[0.25]]
    previous = evaluated / "s3prl" / "previous"
    assert len(list(previous.glob("teacher-frozen-seed-*/result.json"))) == 3
    done = {"speech": "other words", "outputs": "other", "identity": {"inputs": {}}}
    files.write_json(evaluated / "00_corpus" / "done.json", done)
    s3prl.of_run(evaluated, "teacher", seeds=1, rate=0.25, **options)
    assert len(list(previous.glob("teacher-frozen-seed-*/result.json"))) == 4
    shutil.rmtree(next(previous.glob("*1338*")))  # by hand
    for rate in (0.5, 0.25):
        s3prl.of_run(evaluated, "teacher", seeds=1, rate=rate, **options)
    assert len(list(previous.glob("teacher-frozen-seed-*/result.json"))) == 5


def test_export_never_overwrites(tmp_path, capsys):
    checkpoint = save(tmp_path / "checkpoint")
    assert cli.main(["export", "torchaudio", str(checkpoint), str(tmp_path / "out")]) == 0
    assert "difference" in capsys.readouterr().out
    assert cli.main(["export", "torchaudio", str(checkpoint), str(tmp_path / "out")]) == 1
    assert "is there already" in capsys.readouterr().err


def test_hubert_local_is_a_pickle_of_plain_data(tmp_path, monkeypatch):
    monkeypatch.setattr(s3prl, "check", lambda *_: 0.0)
    s3prl.to_hubert_local(save(tmp_path / "checkpoint"), tmp_path / "model.pt")
    written = torch.load(tmp_path / "model.pt", weights_only=True)
    assert sorted(written) == ["dictionaries_symbols", "model_cfg", "model_weight", "task_cfg"]
    assert written["model_weight"]["label_embs_concat"].shape == (5, 128)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "head"), [("tiny", True), ("large", False)])
def test_hubert_local_gives_our_numbers(environment, tmp_path, name, head):
    assert s3prl.to_hubert_local(save(tmp_path / "checkpoint", name, head=head), tmp_path / "model.pt") < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("front_end", ["waveform", "logmel"])
def test_entry_gives_our_numbers(environment, tmp_path, front_end):
    checkpoint = save(tmp_path / "checkpoint", front_end=front_end)
    assert s3prl.check(pretrained.load(checkpoint)[0], "fedhubert", checkpoint) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("fine_tune", [False, True])
def test_run_downstream_trains_and_evaluates(environment, clips, tmp_path, fine_tune):
    data = s3prl.lay_out(clips, tmp_path / "data", 0)
    checkpoint, out = save(tmp_path / "checkpoint"), tmp_path / "out"
    rate = 1e-3 if fine_tune else 1e-2
    result = s3prl.benchmark(checkpoint, data, out, fine_tune=fine_tune, **OPTIONS | {"rate": rate})
    assert (result["steps"], result["fine_tuned"], result["classes"]) == (60, fine_tune, 12)
    assert result["test"] > 0.3  # pitches, of twelve classes; chance is 0.083
    assert (out / "dev-best.ckpt").is_file()
    # s3prl validates on the clips of our list, and on noise.
    names = {line.split()[0] for line in (out / "dev_truth.txt").read_text().splitlines()}
    validation = clips[clips.split == "validation"]
    resolved = {path.resolve() for path in (data / "train").glob("*/*.wav") if "-".join(path.parts[-2:]) in names}
    assert resolved - {data / "train" / "_background_noise_" / "hum.wav"} <= {
        Path(path).resolve() for path in validation.path
    }


@pytest.mark.slow
def test_keyword_probe_agrees_with_s3prls(environment, tmp_path):
    """Same features, lists, start and batches: within a point. Words are directions in noise, some of them near."""
    rng = seeds.numpy_generator(0, "agreement")
    labels = rng.integers(8, size=1200)
    frames = rng.normal(size=(1200, 3, 49, 16)).astype(np.float32)
    frames[:, 1] += 0.1 * rng.normal(size=(8, 1, 16))[labels]
    parts = dict(zip(("train", "validation", "test"), np.split(rng.permutation(1200), [500, 700]), strict=True))
    steps, rate, seed = 200, 1e-2, 3
    task = keywords.Task(list("abcdefgh"), labels, **parts)
    ours = keywords.probe(frames.mean(2), task, seed, steps=steps, rate=rate, standardise=False)

    start, _, batches = keywords.draws(frames.mean(2), task, seed, 1.0)
    tensors = {name: parameter.detach() for name, parameter in start.named_parameters()}
    tensors |= {"frames": frames, "labels": labels, "order": np.stack(list(itertools.islice(batches, steps))), **parts}
    save_file({name: torch.as_tensor(tensor).contiguous() for name, tensor in tensors.items()}, tmp_path / "given")
    script = [Path(__file__).with_name("s3prl_probe.py"), tmp_path / "given", str(steps), str(rate), tmp_path / "out"]
    subprocess.run([s3prl.PYTHON, *script], check=True, capture_output=True)
    theirs = load_file(tmp_path / "out")["predicted"].numpy()
    accuracy = (theirs == labels[parts["test"]]).mean()
    assert 0.3 < ours.accuracy < 0.95
    assert accuracy == pytest.approx(ours.accuracy, abs=0.01)
    assert (theirs == ours.predicted).mean() > 0.99


@pytest.mark.slow
def test_command_puts_s3prls_accuracy_into_the_report(environment, evaluated, capsys):
    for system in ("teacher", "random"):  # random weights are nowhere on disk
        options = ["--system", system, "--steps", "20", "--rate", "0.01"]
        assert cli.main(["s3prl", str(evaluated), *options]) == 0
        assert "seed 1337: dev" in capsys.readouterr().out
        figures = [figure for figure in tables.read(evaluated)["figures"] if figure["system"] == system]
        said = (evaluated / "s3prl" / f"{system}-frozen" / "seed-1337" / "evaluate.log").read_text()
        accuracy = float(re.findall(r"^test acc: (\S+)$", said, re.MULTILINE)[-1])
        assert [(figure["measure"], figure["values"]) for figure in figures] == [("s3prl-accuracy", [accuracy])]
        assert figures[0]["baseline"] == 1 / 12  # ten commands, unknown and silence


def test_a_clip_beside_a_longer_one_is_followed_by_its_last_frame(tmp_path):
    """s3prl keeps round(samples / 320) frames of each, at times one more than there are."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96}
    model = hubert.Hubert(hubert.preset("tiny", "logmel", **sizes)).eval()
    pretrained.save(tmp_path / "checkpoint", model, hubert.Head(model.config, 5))
    upstream = s3prl_entry.Upstream(str(tmp_path / "checkpoint")).eval()
    short, long = torch.randn(12_000), torch.randn(16_000)
    with torch.no_grad():
        both, alone = upstream([short, long])["last_hidden_state"], upstream([short])["last_hidden_state"]
    assert alone.shape[1] == 37 and torch.equal(both[0, :37], alone[0])
    assert torch.equal(both[0, 37:], alone[0, -1:].expand(both.shape[1] - 37, -1))
