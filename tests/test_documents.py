"""Every command that README and docs show can be given: its program, subcommand, options and study are there."""

import argparse
import importlib.util
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from conftest import ROOT

from fedhubert_lib import cli, hubert, pretrained, seeds, studies

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDERS = {"params/study.yaml": "params/toy.yaml", "FORMAT": "onnx"}


def shown() -> list[str]:
    """The commands in code blocks and between backticks, without comments, one a line."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        spans = re.findall(r"^    (.+)$", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)
        for span in spans:
            for command in re.split(r" && | & |\s#", span):
                if re.match(r"(\.venv/bin/)?(fedhubert|papermill|python|pip|uv|make) ", command.strip()):
                    found.append(re.sub(r"\s+", " ", command.removesuffix("...")).strip())
    return sorted(set(found))


COMMANDS = shown()


def test_there_are_commands_of_every_kind():
    assert len(COMMANDS) > 25
    for word in ("fedhubert run", "fedhubert deploy", "fedhubert export", "fedhubert s3prl", "make", "python bench"):
        assert any(word in command for command in COMMANDS), word


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_shown_can_be_given(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DATA", "/data")
    program, *words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)]
    program = program.removeprefix(".venv/bin/")
    if program == "make":
        assert subprocess.run(["make", "-n", *words], capture_output=True).returncode == 0
    elif program == "fedhubert":
        _given_to_fedhubert(words)
    elif program == "python":
        _given_to_a_benchmark(words, monkeypatch)
    elif program == "papermill":
        assert (ROOT / words[0]).is_file() and words[2] == "-f" and len(words) == 4
    else:
        pytest.fail(f"{command}: an installation that could replace the bench that is edited; give a make target")


def _given_to_fedhubert(words: list[str]) -> None:
    names = list(cli.parser()._subparsers._group_actions[0].choices)
    if len(words) == 1 or words[0] == "deploy" and len(words) == 2:  # named in a sentence
        assert words[0] in names
        return
    given = cli.parser().parse_args(words)
    if words[0] == "run":
        assert studies.load(given.study, given.set, given.run)


def _given_to_a_benchmark(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / words[0])
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark", module)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", words)
    parse, parsed = argparse.ArgumentParser.parse_args, []

    class Parsed(Exception):
        """What comes after the arguments takes minutes."""

    def stop(self: argparse.ArgumentParser, *arguments: object) -> None:
        parsed.append(parse(self, *arguments))
        raise Parsed

    if "argparse" not in (ROOT / words[0]).read_text():  # it takes no argument
        assert len(words) == 1
        return
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Parsed):
        module.main()
    assert parsed


def test_the_python_that_is_shown_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = hubert.Hubert(config := hubert.preset("tiny", num_hidden_layers=2))
    pretrained.save(tmp_path / "outputs/toy/03_pretrain/checkpoint", model, hubert.Head(config, 7))
    soundfile.write("speech.flac", np.random.default_rng(0).uniform(-0.1, 0.1, 16_000), 16_000)
    text = (ROOT / "docs/tasks.md").read_text(encoding="utf-8")
    exec(re.findall(r"```python\n(.+?)```", text, re.DOTALL)[0], names := {})
    assert names["frames"].shape == names["second"].shape == (49, config.hidden_size)
    assert names["clusters"].shape == (49,) and names["clusters"].max() < 7


def test_an_export_without_its_packages_names_the_line_that_works(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    absent = {"transformers", "onnxruntime"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    for form, package in (("huggingface", "transformers"), ("onnx", "onnxruntime")):
        assert cli.main(["export", form, str(tmp_path / "checkpoint"), str(tmp_path / "out")]) == 1
        assert f"export {form} needs {package}, which is not installed; run: make export" in capsys.readouterr().err


def test_make_export_and_ray_install_what_is_tested_and_leave_the_bench_alone():
    for target, packages in (("export", "transformers onnx onnxruntime onnxscript"), ("ray", "ray")):
        said = subprocess.run(
            ["make", "--no-print-directory", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        last = said.splitlines()[-1]
        assert last.endswith(f"--constraint requirements-test.lock {packages}")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["huggingface", "onnx"])
def test_the_exports_that_are_shown_are_made(form, tmp_path, capsys):
    model = hubert.Hubert(hubert.preset("tiny", num_hidden_layers=2))
    hubert.initialise(model, seeds.torch_generator(0))
    pretrained.save(tmp_path / "checkpoint", model)
    assert cli.main(["export", form, str(tmp_path / "checkpoint"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").is_dir() and "difference" in capsys.readouterr().out


@pytest.mark.slow
def test_the_benchmark_of_one_preset_runs(tmp_path):
    options = ["--presets", "tiny", "--clips", "1", "--seconds", "1", "--repeats", "1", "--only", "ours"]
    options += ["--checkpointing", "", "--out", str(tmp_path / "out.json")]
    command = [sys.executable, "benchmarks/bench_model.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.json").is_file()
