"""Fetching and unpacking archives, from a server on this machine that cuts, lies and sends hostile members."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import resource
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest
import soundfile

from fedhubert_lib import corpora, params
from fedhubert_lib.corpora import archives


@dataclass
class Server:
    """What the server does with the next requests, and what it was asked."""

    content: dict[str, bytes] = field(default_factory=dict)
    cut_after: list[int] = field(default_factory=list)
    ranges: bool = True
    pause_after: int = 0
    resume: threading.Event = field(default_factory=threading.Event)
    status: int | None = None
    asked: list[str] = field(default_factory=list)
    url: str = ""


class Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, server: Server, *arguments: object) -> None:
        self.behaviour = server
        super().__init__(*arguments)

    def do_GET(self) -> None:
        server = self.behaviour
        wanted = self.headers.get("Range", "")
        server.asked.append(wanted)
        if server.status:
            self.send_error(server.status)
            return
        content = server.content[self.path]
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges else 0
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self.send_response(206 if wanted and server.ranges else 200)
        if wanted and server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop = start + server.cut_after.pop(0) if server.cut_after else len(content)
        if server.pause_after and not server.resume.is_set():
            self.wfile.write(content[start : server.pause_after])
            server.resume.wait(60)
            return
        self.wfile.write(content[start:stop])
        if stop < len(content):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    behaviour = Server()
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, behaviour)) as listener:
        behaviour.url = f"http://127.0.0.1:{listener.server_address[1]}"
        thread = threading.Thread(target=functools.partial(listener.serve_forever, poll_interval=0.01))
        thread.start()
        yield behaviour
        listener.shutdown()
        thread.join()


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


CONTENT = np.random.default_rng(0).bytes(3_000_000)


def test_a_cut_download_goes_on_where_it_stopped(server, tmp_path):
    server.content["/a"], server.cut_after = CONTENT, [1_000_000, 1_500_000]
    steps = []
    archives.fetch(server.url + "/a", tmp_path / "a", md5(CONTENT), lambda *step: steps.append(step))
    assert (tmp_path / "a").read_bytes() == CONTENT
    starts = [int(asked.removeprefix("bytes=").rstrip("-") or 0) for asked in server.asked]
    assert starts[0] == 0 and 0 < starts[1] <= 1_000_000 and starts[1] < starts[2] <= 2_500_000
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert steps[-1][1] == steps[-1][2] == 2  # MiB


def test_a_later_run_goes_on_and_a_whole_partial_is_not_fetched_again(server, tmp_path):
    server.content["/a"] = CONTENT
    (tmp_path / "a.partial").write_bytes(CONTENT[:2_000_000])
    archives.fetch(server.url + "/a", tmp_path / "a", md5(CONTENT))
    assert server.asked == ["bytes=2000000-"] and (tmp_path / "a").read_bytes() == CONTENT
    (tmp_path / "a").rename(tmp_path / "a.partial")
    archives.fetch(server.url + "/a", tmp_path / "a", md5(CONTENT))
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_server_without_ranges_starts_again(server, tmp_path):
    server.content["/a"], server.ranges = CONTENT, False
    (tmp_path / "a.partial").write_bytes(b"x" * 1_000)
    archives.fetch(server.url + "/a", tmp_path / "a", md5(CONTENT))
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_server_without_ranges_that_cuts_again_and_again_is_given_up(server, tmp_path):
    """Each try starts anew: more or less of the same beginning is no progress."""
    server.content["/a"], server.ranges = CONTENT, False
    server.cut_after = [1_000, 2_000_000] * 20
    with pytest.raises(archives.ArchiveError, match=f"{archives.ATTEMPTS} times in a row"):
        archives.fetch(server.url + "/a", tmp_path / "a", md5(CONTENT))
    assert not (tmp_path / "a").exists()
    assert len(server.asked) == 2 + archives.ATTEMPTS


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Files cannot grow beyond 1 MB: the kernel refuses the write, in the middle of it, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_keeps_what_was_fetched(server, tmp_path):
    server.content["/a"] = CONTENT
    with full_disk(), pytest.raises(archives.DiskFullError, match=f"{tmp_path}: .* MiB free; make room"):
        archives.fetch(server.url + "/a", tmp_path / "a", md5(CONTENT))
    assert (tmp_path / "a.partial").stat().st_size == 1_000_000
    archives.fetch(server.url + "/a", tmp_path / "a", md5(CONTENT))
    assert (tmp_path / "a").read_bytes() == CONTENT and server.asked == ["", "bytes=1000000-"]


def test_a_full_disk_keeps_what_was_unpacked(tmp_path):
    (tmp_path / "mine.tar.gz").write_bytes(tar(GOOD | {"LibriSpeech/mine/1/2/1-2-0001.flac": CONTENT}))
    with full_disk(), pytest.raises(archives.DiskFullError, match="goes on where it stopped"):
        archives.unpack(tmp_path / "mine.tar.gz", tmp_path, "mine", "LibriSpeech")
    assert not (tmp_path / "LibriSpeech").exists()
    assert [p.name for p in tmp_path.rglob("*.flac") if not p.name.startswith(".")] == ["1-2-0000.flac"]
    archives.unpack(tmp_path / "mine.tar.gz", tmp_path, "mine", "LibriSpeech")
    assert (tmp_path / "LibriSpeech/mine/1/2/1-2-0001.flac").read_bytes() == CONTENT
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LibriSpeech", "mine.tar.gz"]


def test_nothing_of_another_archive_is_mixed_in(tmp_path):
    other = GOOD | {"LibriSpeech/mine/1/2/1-2-0009.flac": b"x", "LibriSpeech/mine/1/2/1-2-0008.flac": CONTENT}
    (tmp_path / "mine.tar.gz").write_bytes(tar(other))
    with full_disk(), pytest.raises(archives.DiskFullError):
        archives.unpack(tmp_path / "mine.tar.gz", tmp_path, "mine", "LibriSpeech")
    (tmp_path / "mine.tar.gz").write_bytes(tar(GOOD))
    archives.unpack(tmp_path / "mine.tar.gz", tmp_path, "mine", "LibriSpeech")
    assert [p.name for p in (tmp_path / "LibriSpeech").rglob("*.flac")] == ["1-2-0000.flac"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LibriSpeech", "mine.tar.gz"]


def test_a_partial_longer_than_the_file_is_dropped(server, tmp_path):
    server.content["/a"] = CONTENT
    (tmp_path / "a.partial").write_bytes(CONTENT + b"more")
    archives.fetch(server.url + "/a", tmp_path / "a", md5(CONTENT))
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_wrong_sum_leaves_nothing(server, tmp_path):
    server.content["/a"] = CONTENT
    with pytest.raises(archives.ArchiveError, match=f"MD5 is {md5(CONTENT)}, the published one {md5(b'')}.*mirror"):
        archives.fetch(server.url + "/a", tmp_path / "a", md5(b""))
    assert not list(tmp_path.iterdir())


def test_a_server_that_refuses_or_brings_nothing_is_named(server, tmp_path):
    server.status = 404
    with pytest.raises(archives.ArchiveError, match="404 .* try another mirror"):
        archives.fetch(server.url + "/a", tmp_path / "a", "")
    assert len(server.asked) == 1
    server.status = 503
    with pytest.raises(archives.ArchiveError, match=f"503 .* {archives.ATTEMPTS} times in a row; run again"):
        archives.fetch(server.url + "/a", tmp_path / "a", "")
    assert len(server.asked) == 1 + archives.ATTEMPTS
    with pytest.raises(archives.ArchiveError, match="only http"):
        archives.fetch("file:///etc/passwd", tmp_path / "a", "")


def tar(members: dict[str, bytes | tarfile.TarInfo], compress: str = "gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compress}") as archive:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


GOOD = {"LibriSpeech/SPEAKERS.TXT": b"; none\n", "LibriSpeech/mine/1/2/1-2-0000.flac": CONTENT[:5_000]}


@pytest.mark.parametrize(
    ("hostile", "message"),
    [
        ({"LibriSpeech/../../escaped": b"x"}, "would leave the folder"),
        ({"/escaped": b"x"}, "would leave the folder"),
        ({"escaped": b"x"}, "does not lie in LibriSpeech/"),
        ({"LibriSpeech/mine\\..\\escaped": b"x"}, "would leave the folder"),
        ({"a": special("LibriSpeech/mine/link", tarfile.SYMTYPE, "/etc/passwd")}, "neither a plain file nor a folder"),
        ({"a": special("LibriSpeech/mine/link", tarfile.LNKTYPE, "../x")}, "neither a plain file nor a folder"),
        ({"a": special("LibriSpeech/mine/device", tarfile.CHRTYPE)}, "neither a plain file nor a folder"),
        ({"a": special("LibriSpeech/mine/pipe", tarfile.FIFOTYPE)}, "neither a plain file nor a folder"),
        ({"LibriSpeech/mine/bomb": bytes(30_000_000)}, "larger than any corpus"),
        ({f"LibriSpeech/mine/empty{i}": b"" for i in range(3_000)}, "larger than any corpus"),
        ({"LibriSpeech/mine/1/2": b"a file"}, "is a file and a folder"),
        ({"LibriSpeech/mine/a": b"a file", "LibriSpeech/mine/a/b": b"x"}, "is a file and a folder"),
        ({"LibriSpeech/mine/" + 300 * "a": b"x"}, "longer than a name can be"),
    ],
)
def test_a_hostile_member_refuses_the_whole_archive(hostile, message, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "mine.tar.gz").write_bytes(tar(GOOD | hostile))
    with pytest.raises(archives.ArchiveError, match=message):
        archives.unpack(root / "mine.tar.gz", root, "mine", "LibriSpeech")
    assert [p.name for p in root.iterdir()] == ["mine.tar.gz"]
    assert [p.name for p in tmp_path.iterdir()] == ["root"]


def test_a_header_that_asks_for_all_memory_is_refused(tmp_path):
    huge = tarfile.TarInfo("LibriSpeech/mine/x")
    huge.type, huge.size = tarfile.XHDTYPE, 1 << 40
    (tmp_path / "mine.tar.gz").write_bytes(gzip.compress(huge.tobuf() + bytes(10_240)))
    with pytest.raises(archives.ArchiveError, match="damaged"):
        archives.unpack(tmp_path / "mine.tar.gz", tmp_path, "mine", "LibriSpeech")


@pytest.mark.parametrize("damage", ["cut", "flipped", "no gzip"])
def test_a_damaged_archive_leaves_nothing(damage, tmp_path):
    content = tar(GOOD | {"LibriSpeech/mine/noise": CONTENT})
    content = {
        "cut": content[:-2_000],
        "flipped": content[:-6] + bytes([content[-6] ^ 1]) + content[-5:],
        "no gzip": tar(GOOD, ""),
    }[damage]
    (tmp_path / "mine.tar.gz").write_bytes(content)
    with pytest.raises(archives.ArchiveError, match=r"truncated or damaged .* fetch it again"):
        archives.unpack(tmp_path / "mine.tar.gz", tmp_path, "mine", "LibriSpeech")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.tar.gz"]


def test_a_killed_unpacking_goes_on_after_the_files_that_are_there(tmp_path, monkeypatch):
    members = GOOD | {f"LibriSpeech/mine/1/2/1-2-{i:04d}.flac": CONTENT[:10_000] for i in range(1, 20)}
    (tmp_path / "mine.tar.gz").write_bytes(tar(members))
    written: list[str] = []
    copy = archives.shutil.copyfileobj

    def killed(source, target, *rest):
        written.append(target.name)
        if len(written) == 10:
            raise KeyboardInterrupt
        copy(source, target, *rest)

    monkeypatch.setattr(archives.shutil, "copyfileobj", killed)
    with pytest.raises(KeyboardInterrupt):
        archives.unpack(tmp_path / "mine.tar.gz", tmp_path, "mine", "LibriSpeech")
    assert not (tmp_path / "LibriSpeech").exists(), "what is half unpacked never has the corpus's name"
    archives.unpack(tmp_path / "mine.tar.gz", tmp_path, "mine", "LibriSpeech")
    assert len(written) == 10 + (len(members) - 9)
    found = {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    del found["mine.tar.gz"]
    assert found == members


PROVIDE = """
import sys
from pathlib import Path
from fedhubert_lib.corpora import archives
root, mirror, md5 = sys.argv[1:]
published = {"mine": archives.Archive("mine.tar.gz", md5)}
archives.provide(Path(root), "mine", published, mirror, download=True, inside="LibriSpeech")
"""


def test_killed_at_any_moment_the_next_start_makes_the_whole_of_it(server, tmp_path):
    """kill -9, which nothing can catch: in the middle of the download, then of the unpacking."""
    members = GOOD | {f"LibriSpeech/mine/1/2/1-2-{i:04d}.flac": CONTENT[2_000 * i :][:2_000] for i in range(1, 1_500)}
    archive = tar(members)
    server.content["/mine.tar.gz"], server.pause_after = archive, len(archive) // 2
    command = [sys.executable, "-c", PROVIDE, str(tmp_path), server.url, md5(archive)]
    partial, hidden = tmp_path / "mine.tar.gz.partial", ".mine.*.unpacking/mine/1/2/1*"
    for moment in (lambda: partial.exists() and partial.stat().st_size, lambda: list(tmp_path.glob(hidden))):
        child = subprocess.Popen(command)
        while not moment():
            assert child.poll() is None, "it was over before it could be killed"
            server.resume.wait(0.002)
        child.kill()
        assert child.wait() == -signal.SIGKILL
        assert not (tmp_path / "LibriSpeech" / "mine").exists()
        server.resume.set()
    subprocess.run(command, check=True)
    assert len(server.asked) == 2 and server.asked[1].startswith("bytes=")
    found = {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    del found["mine.tar.gz"], found[".mine.lock"]
    assert found == members


def test_two_processes_do_not_unpack_into_one_folder(tmp_path):
    (tmp_path / "mine.tar.gz").write_bytes(tar(GOOD))
    provide = functools.partial(archives.provide, tmp_path, "mine", {}, "", download=False, inside="LibriSpeech")
    with archives._locked(tmp_path / ".mine.lock"), pytest.raises(archives.ArchiveError, match="another process"):
        provide()
    provide()
    assert (tmp_path / "LibriSpeech" / "mine").is_dir()


def flac(speaker: str, seed: int) -> bytes:
    buffer = io.BytesIO()
    samples = np.random.default_rng(seed).normal(0, 0.1, 16_000)
    soundfile.write(buffer, samples, 16_000, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def wav(seed: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.random.default_rng(seed).normal(0, 0.1, 16_000), 16_000, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def test_the_whole_way_from_a_mirror_to_the_manifest(server, tmp_path, monkeypatch):
    """Two LibriSpeech archives and Speech Commands, in their published layouts, through prepare itself."""
    speakers = {"train-clean-5": ("19", "F", 1), "dev-clean-2": ("84", "M", 2)}
    lines = [f"{speaker} | {sex} | {subset} | 1 | Reader" for subset, (speaker, sex, _) in speakers.items()]
    text = ";ID |SEX| SUBSET |MINUTES| NAME\n" + "\n".join(lines) + "\n"
    published = {}
    for subset, (speaker, _, seed) in speakers.items():
        folder = f"LibriSpeech/{subset}/{speaker}/7"
        archive = tar(
            {
                "LibriSpeech/SPEAKERS.TXT": text.encode(),
                f"{folder}/{speaker}-7-0000.flac": flac(speaker, seed),
                f"{folder}/{speaker}-7.trans.txt": f"{speaker}-7-0000 SOME WORDS\n".encode(),
            }
        )
        server.content[f"/31/{subset}.tar.gz"] = archive
        published[subset] = archives.Archive(f"31/{subset}.tar.gz", md5(archive))
    clips = {f"./{word}/{voice}_nohash_0.wav": wav(hash_) for hash_, (word, voice) in enumerate(
        (word, voice) for word in ("yes", "no") for voice in ("aaaa", "bbbb", "cccc"))}  # fmt: skip
    lists = {
        "./validation_list.txt": b"yes/bbbb_nohash_0.wav\nno/bbbb_nohash_0.wav\n",
        "./testing_list.txt": b"yes/cccc_nohash_0.wav\nno/cccc_nohash_0.wav\n",
    }
    archive = tar(lists | clips)
    server.content["/speech_commands_v0.02.tar.gz"] = archive
    monkeypatch.setattr(archives, "LIBRISPEECH", published)
    monkeypatch.setattr(
        archives, "KEYWORDS", {"speech_commands_v0.02": archives.Archive("speech_commands_v0.02.tar.gz", md5(archive))}
    )
    server.cut_after = [1_000]
    p = params.Corpus(
        kind="librispeech",
        root=str(tmp_path / "data"),
        train_subsets=["train-clean-5"],
        test_subsets=["dev-clean-2"],
        keywords="speech-commands",
        keywords_root=str(tmp_path / "keywords"),
        download=True,
        mirror=server.url,
        keywords_mirror=server.url,
    )
    for _ in range(2):
        corpora.prepare(tmp_path / "run", p)
        manifest = pd.read_parquet(tmp_path / "run" / "00_corpus" / "manifest.parquet")
        assert manifest.utterance.tolist() == ["19-7-0000", "84-7-0000"]
        assert manifest.sex.tolist() == ["F", "M"] and manifest.split.tolist() == ["train", "test"]
        assert manifest.text.tolist() == ["SOME WORDS"] * 2 and manifest.samples.tolist() == [16_000] * 2
        keywords = pd.read_parquet(tmp_path / "run" / "00_corpus" / "keywords.parquet")
        assert keywords.groupby("split").size().to_dict() == {"test": 2, "train": 2, "validation": 2}
        requests = len(server.asked)
    assert requests == 4, "one of the three was cut once, and nothing is fetched twice"


def test_an_archive_in_the_root_is_checked_and_used(tmp_path):
    (tmp_path / "train-clean-5.tar.gz").write_bytes(tar(GOOD))
    with pytest.raises(archives.ArchiveError, match=r"published one .* remove"):
        archives.provide(tmp_path, "train-clean-5", archives.LIBRISPEECH, "", download=False, inside="LibriSpeech")
    assert (tmp_path / "train-clean-5.tar.gz").exists(), "the user's own file is not removed"
    with contextlib.suppress(FileNotFoundError):
        assert not list((tmp_path / "LibriSpeech").iterdir())
