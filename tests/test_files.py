"""Files are atomic, whatever happens to the process that writes them."""

import ast
import errno
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from fedhubert_lib import cli, files, index


def test_atomic_keeps_the_old_file_on_an_error(tmp_path):
    path = tmp_path / "value.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), files.atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_replaces_a_folder(tmp_path):
    path = tmp_path / "checkpoint"
    for name in ("old", "new"):
        with files.atomic(path) as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_replaces_a_link_to_a_folder_and_leaves_that(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoint").symlink_to(tmp_path / "elsewhere")
    with files.atomic(tmp_path / "checkpoint") as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert (tmp_path / "checkpoint/new").exists() and not (tmp_path / "checkpoint").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "elsewhere"]


def test_no_file_replaces_a_folder(tmp_path):
    """As of ``fedhubert reference RUNS --to params/reference``, without the name of a file."""
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference/toy.json").touch()
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        files.write_text(tmp_path / "reference", "{}")
    assert list(tmp_path.rglob("*")) == [tmp_path / "reference", tmp_path / "reference/toy.json"]


def test_write_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "value.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_read_rows_skips_a_row_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    files.append_row(path, {"round": 1})
    with path.open("a") as stream:
        stream.write('{"round": 2, "lo')  # killed here
    assert files.read_rows(path) == [{"round": 1}]
    files.append_row(path, {"round": 2})
    assert files.read_rows(path) == [{"round": 1}, {"round": 2}]
    path.write_bytes(b'{"round": 1}\n\0\0\0\n{"round": 2}\n')  # NFS, after a crash
    with pytest.raises(ValueError, match=f"{path}: a line is no JSON"):
        files.read_rows(path)


FULL = """
import resource, sys
from pathlib import Path
import numpy, pandas
from fedhubert_lib import files, labels
path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))  # a disk with 1,000 bytes left
rows = 0
try:
    while True:
        files.append_row(path / "metrics.jsonl", {"round": rows, "text": "x" * 100})
        rows += 1
except OSError:
    print(rows)
(path / "full.jsonl").write_bytes(bytes(999) + bytes([10]))
try:
    files.append_row(path / "full.jsonl", {})
except OSError as error:
    print(error.filename)
try:
    with files.atomic(path / "model.bin") as temporary:
        temporary.write_bytes(bytes(2000))
except OSError as error:
    print(error.strerror)
table = pandas.DataFrame({"utterance": ["u"], "samples": 320_000})
try:
    labels.write(path / "client", "labels", table, labels.LABELS, None, lambda missing: [[numpy.zeros(999)]])
except OSError as error:
    print(error.filename)
"""


def test_full_disk_leaves_complete_rows_and_files(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, check=True)
    rows, full, reason, labels = done.stdout.splitlines()
    assert 0 < int(rows) < 10 and reason == "File too large"
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert len(files.read_rows(tmp_path / "metrics.jsonl")) == int(rows)
    assert (full, labels) == (str(tmp_path / "full.jsonl"), str(tmp_path / "client" / "labels.bin"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["client", "full.jsonl", "metrics.jsonl"]


def test_sweep_removes_leftovers_alone(tmp_path):
    kept = [tmp_path / "model.old", tmp_path / ".hidden", tmp_path / "partial.npy"]
    for path in kept:
        path.touch()
    clients = tmp_path / "clients"
    (clients / ".checkpoint.12.partial").mkdir(parents=True)
    (clients / ".state.12.partial.safetensors").touch()
    files.sweep(tmp_path)
    assert sorted(tmp_path.rglob("*")) == sorted([*kept, clients])


@pytest.mark.parametrize("arrived", [True, False])
def test_sweep_after_a_kill_between_two_renames(tmp_path, arrived):
    path = tmp_path / "checkpoint"
    for name, content in ((".checkpoint.12.old", "old"), (".checkpoint.12.partial", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").write_text(content)
    if arrived:
        (tmp_path / ".checkpoint.12.partial").rename(path)
    files.sweep(tmp_path)
    assert (path / "model").read_text() == ("new" if arrived else "old")
    assert list(tmp_path.iterdir()) == [path]


ODD = """
import errno, fcntl, os, stat, sys
from pathlib import Path
from fedhubert_lib import cli, files, index, runs
flock, fsync = fcntl.flock, os.fsync

def no_locks(*arguments):
    raise OSError(getattr(errno, sys.argv[2]), "No locks available")

def files_only(descriptor):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, "Invalid argument")
    fsync(descriptor)

fcntl.flock, os.fsync = no_locks, files_only
path = Path(sys.argv[1])
with files.atomic(path / "checkpoint") as folder:
    folder.mkdir()
    (folder / "model").write_text("weights")
files.write_json(path / "a.json", {"a": 1})
(path / ".other").write_text("another machine's process, which was killed")
with runs.holding(path / ".lock", "this"), runs.holding(path / ".other", "that"):
    print("held")
"""


@pytest.mark.parametrize("number", ["ENOLCK", "ENOSYS"])
def test_file_systems_without_locks_and_flush_of_folders(tmp_path, number):
    done = subprocess.run([sys.executable, "-c", ODD, tmp_path, number], capture_output=True, text=True, check=True)
    assert done.stdout == "held\n"
    assert (
        done.stderr == f"{tmp_path}: its file system has no locks; see to it that one process at a time works there\n"
    )
    assert (tmp_path / "checkpoint/model").exists() and (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
        OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),  # pyarrow
    ],
)
def test_atomic_names_path_and_remedy_of_system_errors(tmp_path, error):
    path = tmp_path / "a.json"
    with pytest.raises(OSError, match="No space left on device; free space on that disk") as caught, files.atomic(path):
        raise error
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)


@pytest.mark.parametrize("free", [0, 2**30])
def test_atomic_asks_the_disk_where_libsndfile_does_not_say(tmp_path, monkeypatch, free):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    words = "No space left on device; free space on that disk" if free == 0 else "^Error opening 'a.wav': System error"
    with pytest.raises((OSError, RuntimeError), match=words), files.atomic(tmp_path / "corpus"):
        raise RuntimeError("Error opening 'a.wav': System error.")


def test_a_file_in_the_place_of_a_folder_is_named_with_a_remedy(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    for outputs in (tmp_path / "file", tmp_path):
        monkeypatch.setenv("FEDHUBERT_OUTPUTS", str(outputs))
        assert cli.main(["run", str(ROOT / "params" / "toy.yaml"), "--run", "file"]) == 1
        assert "a file stands where a folder belongs; move it, or name another" in capsys.readouterr().err


def test_atomic_keeps_other_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"), files.atomic(tmp_path / "a.json"):
        (tmp_path / "nowhere").read_bytes()
    with pytest.raises(OSError, match="tunnel collapsed"), files.atomic(tmp_path / "a.json"):
        raise OSError("tunnel collapsed")
    with pytest.raises(ValueError, match="a.flac"), files.atomic(tmp_path / "a.json"):
        raise ValueError("a.flac: cannot be read ([Errno 5] Input/output error)")


def test_the_command_names_path_and_remedy(outputs, monkeypatch, capsys):
    monkeypatch.setattr(index, "listing", lambda place: (place / "missing" / "x").write_text(""))
    assert cli.main(["ls"]) == 1
    assert f"No such file or directory: '{outputs / 'missing' / 'x'}'" in capsys.readouterr().err


def test_atomic_and_sweep_agree_on_names(tmp_path):
    for name in ("model.safetensors", "checkpoint", "a.b.json"):
        with pytest.raises(KeyboardInterrupt), files.atomic(tmp_path / name) as temporary:
            temporary.write_text("half")
            kept = Path(str(temporary))
            raise KeyboardInterrupt
        kept.write_text("half")  # as after a kill, when nothing cleans up
    files.sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_text_files_are_utf8_whatever_the_locale():
    """Each call that opens a text file names its encoding: the locale's may be another, or a notebook's differ."""
    unnamed = []
    for path in sorted((ROOT / "fedhubert_lib").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner, name = ast.unparse(node.func.value), node.func.attr
            text = ast.unparse(node)
            binary = any(mode in text for mode in ("'rb'", "'wb'", "'ab'", "'ab+'")) or owner in (
                "os",
                "tarfile",
                "files",
            )
            if name in ("read_text", "write_text", "open") and not binary and "encoding" not in text:
                unnamed.append(f"{path.name}:{node.lineno}: {text}")
    assert not unnamed


def test_a_row_with_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.append_row(tmp_path / "metrics.jsonl", {"loss": float("nan")})
