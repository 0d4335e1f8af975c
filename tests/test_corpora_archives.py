"""Fetching from a server that cuts and lies; unpacking published archives, also after a kill in the middle."""

import contextlib
import functools
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
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from fedhubert_lib import corpora, files, identity, params, records
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


def test_fetch_resumes_a_download_that_is_cut(server, tmp_path):
    server.content["/a"], server.cut_after = CONTENT, [1_000_000, 1_500_000]
    steps = []
    archives.fetch(server.url + "/a", tmp_path / "a", md5(CONTENT), lambda *step: steps.append(step))
    assert (tmp_path / "a").read_bytes() == CONTENT
    starts = [int(asked.removeprefix("bytes=").rstrip("-") or 0) for asked in server.asked]
    assert starts[0] == 0 and 0 < starts[1] <= 1_000_000 and starts[1] < starts[2] <= 2_500_000
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert steps[-1][1] == steps[-1][2] == 2  # MiB


def test_fetch_resumes_what_an_earlier_run_left(server, tmp_path):
    server.content["/a"] = CONTENT
    (tmp_path / "a.partial").write_bytes(CONTENT[:2_000_000])
    archives.fetch(server.url + "/a", tmp_path / "a", md5(CONTENT))
    assert server.asked == ["bytes=2000000-"] and (tmp_path / "a").read_bytes() == CONTENT
    (tmp_path / "a").rename(tmp_path / "a.partial")
    archives.fetch(server.url + "/a", tmp_path / "a", md5(CONTENT))
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_fetch_starts_again_from_a_server_without_ranges(server, tmp_path):
    server.content["/a"], server.ranges = CONTENT, False
    (tmp_path / "a.partial").write_bytes(b"x" * 1_000)
    archives.fetch(server.url + "/a", tmp_path / "a", md5(CONTENT))
    assert (tmp_path / "a").read_bytes() == CONTENT
    server.cut_after = [1_000, 2_000_000] * 20  # more or less of the same beginning is no progress
    with pytest.raises(archives.ArchiveError, match=f"{archives.ATTEMPTS} times in a row"):
        archives.fetch(server.url + "/a", tmp_path / "b", md5(CONTENT))
    assert not (tmp_path / "b").exists()
    assert len(server.asked) == 1 + 2 + archives.ATTEMPTS


def test_a_page_in_the_place_of_an_archive_costs_nothing_that_has_come(server, tmp_path):
    server.content["/a"], server.ranges = b"<html>back soon</html>", False
    (tmp_path / "a.partial").write_bytes(CONTENT[:2_000_000])
    with pytest.raises(archives.ArchiveError, match="offers 22 bytes where 2,000,000 have come"):
        archives.fetch(server.url + "/a", tmp_path / "a", md5(CONTENT))
    assert (tmp_path / "a.partial").read_bytes() == CONTENT[:2_000_000]


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


def test_fetch_keeps_what_a_full_disk_took(server, tmp_path):
    server.content["/a"] = CONTENT
    with full_disk(), pytest.raises(OSError, match="File too large") as caught:
        archives.fetch(server.url + "/a", tmp_path / "a", md5(CONTENT))
    assert caught.value.filename == str(tmp_path / "a.partial")
    assert (tmp_path / "a.partial").stat().st_size == 1_000_000
    archives.fetch(server.url + "/a", tmp_path / "a", md5(CONTENT))
    assert (tmp_path / "a").read_bytes() == CONTENT and server.asked == ["", "bytes=1000000-"]


def test_fetch_removes_what_has_another_sum(server, tmp_path):
    server.content["/a"] = CONTENT
    (tmp_path / "a.partial").write_bytes(CONTENT + b"more")
    for content in (CONTENT, b""):
        with pytest.raises(archives.ArchiveError, match=f"the published one {md5(content)}.*mirror"):
            archives.fetch(server.url + "/a", tmp_path / "a", md5(content))
        assert not list(tmp_path.iterdir())


def test_fetch_names_a_server_that_refuses(server, tmp_path):
    server.status = 404
    with pytest.raises(archives.ArchiveError, match="404.*try another mirror"):
        archives.fetch(server.url + "/a", tmp_path / "a", "")
    assert len(server.asked) == 1
    server.status = 503
    with pytest.raises(archives.ArchiveError, match=f"503.* {archives.ATTEMPTS} times in a row; run again"):
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


GOOD = {"LibriSpeech/SPEAKERS.TXT": b"; none\n", "LibriSpeech/mine/1/2/1-2-0000.flac": CONTENT[:5_000]}


def publish(monkeypatch, **published: bytes) -> None:
    """Let archives of this content be the published ones."""
    for name, content in published.items():
        monkeypatch.setitem(archives.PUBLISHED, name, archives.Archive(f"{name}.tar.gz", md5(content)))


def provide(root: Path, name: str = "mine") -> None:
    archives.provide(root, name, "", (), download=False)


@pytest.mark.parametrize("name", ["mine", "other"])
def test_provide_unpacks_nothing_but_the_published_archive(name, tmp_path, monkeypatch):
    publish(monkeypatch, mine=tar(GOOD))
    (tmp_path / f"{name}.tar.gz").write_bytes(tar(GOOD | {"LibriSpeech/../../escaped": b"x"}))
    with pytest.raises(archives.ArchiveError, match="published"):
        provide(tmp_path, name)
    assert {p.name for p in tmp_path.iterdir()} <= {f"{name}.tar.gz", ".mine.lock"}


def test_provide_continues_after_a_full_disk(tmp_path, monkeypatch):
    members = GOOD | {"LibriSpeech/mine/1/2/1-2-0009.flac": b"x", "LibriSpeech/mine/1/2/1-2-0001.flac": CONTENT}
    publish(monkeypatch, mine=(archive := tar(members)))  # another would have its own time
    (tmp_path / "mine.tar.gz").write_bytes(archive)
    with full_disk(), pytest.raises(OSError, match="File too large") as caught:
        provide(tmp_path)
    assert str(caught.value.filename).endswith("1-2-0001.flac") and not (tmp_path / "LibriSpeech").exists()
    provide(tmp_path)
    unpacked = {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    del unpacked["mine.tar.gz"], unpacked[".mine.lock"]
    assert unpacked == members


@pytest.mark.parametrize("beside", ["my-speech", "speech_commands_v0.02"])
def test_a_subset_joins_the_others_where_they_are(beside, tmp_path, monkeypatch):
    """A folder of words is none of them."""
    publish(monkeypatch, more=(archive := tar({"LibriSpeech/more/1/2/1-2-0000.flac": b"x"})))
    (tmp_path / beside).mkdir()
    (tmp_path / "more.tar.gz").write_bytes(archive)
    archives.provide(tmp_path, "more", "", ["more", "my-speech"], download=False)
    assert (tmp_path / "more").is_dir() == (beside == "my-speech") != (tmp_path / "LibriSpeech/more").is_dir()


def test_a_published_subset_joins_others_that_this_study_does_not_name(tmp_path, monkeypatch):
    publish(monkeypatch, more=(archive := tar({"LibriSpeech/more/1/2/1-2-0000.flac": b"x"})))
    (tmp_path / "train-clean-100").mkdir()
    (tmp_path / "more.tar.gz").write_bytes(archive)
    archives.provide(tmp_path, "more", "", ["more"], download=False)
    assert (tmp_path / "more").is_dir() and not (tmp_path / "LibriSpeech").exists()


def test_an_archive_is_unpacked_by_a_python_without_filters(tmp_path, monkeypatch):
    """That of Debian 12, 3.11.2."""
    monkeypatch.delattr(tarfile, "data_filter")
    extract = tarfile.TarFile.extract
    monkeypatch.setattr(tarfile.TarFile, "extract", lambda tar, member, path: extract(tar, member, path))
    publish(monkeypatch, mine=(archive := tar(GOOD)))
    (tmp_path / "mine.tar.gz").write_bytes(archive)
    provide(tmp_path)
    assert (tmp_path / "LibriSpeech/mine").is_dir()


PROVIDE = """
import sys
from pathlib import Path
from fedhubert_lib.corpora import archives
root, mirror, md5 = sys.argv[1:]
archives.PUBLISHED["mine"] = archives.Archive("mine.tar.gz", md5)
archives.provide(Path(root), "mine", mirror, (), download=True)
"""


def test_provide_continues_after_kills_in_the_download_and_the_unpacking(server, tmp_path):
    members = GOOD | {f"LibriSpeech/mine/1/2/1-2-{i:04d}.flac": CONTENT[2_000 * i :][:2_000] for i in range(1, 1_500)}
    archive = tar(members)
    server.content["/mine.tar.gz"], server.pause_after = archive, len(archive) // 2
    command = [sys.executable, "-c", PROVIDE, str(tmp_path), server.url, md5(archive)]
    partial, hidden = tmp_path / "mine.tar.gz.partial", ".mine.unpacking/LibriSpeech/mine/1/2/1*"
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
    contents = {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    del contents["mine.tar.gz"], contents[".mine.lock"]
    assert contents == members


def test_provide_refuses_a_folder_that_another_process_unpacks_into(tmp_path, monkeypatch):
    publish(monkeypatch, mine=(content := tar(GOOD)))
    (tmp_path / "mine.tar.gz").write_bytes(content)
    with files.locked(tmp_path / ".mine.lock"), pytest.raises(archives.ArchiveError, match="another process"):
        provide(tmp_path)
    provide(tmp_path)
    assert (tmp_path / "LibriSpeech" / "mine").is_dir()


def test_what_another_process_has_just_unpacked_is_taken(tmp_path, monkeypatch):
    """Between the look for the folder and the lock."""
    publish(monkeypatch, mine=tar({"LibriSpeech/mine/a.txt": b"a"}))
    (tmp_path / "mine.tar.gz").write_bytes(tar({"LibriSpeech/mine/a.txt": b"a"}))
    locked = files.locked

    def late(path: Path) -> contextlib.AbstractContextManager[bool]:
        (tmp_path / "LibriSpeech" / "mine").mkdir(parents=True)
        return locked(path)

    monkeypatch.setattr(files, "locked", late)
    provide(tmp_path)
    assert not list((tmp_path / "LibriSpeech" / "mine").iterdir())


def flac(speaker: str, seed: int) -> bytes:
    buffer = io.BytesIO()
    samples = np.random.default_rng(seed).normal(0, 0.1, 16_000)
    soundfile.write(buffer, samples, 16_000, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def wav(seed: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.random.default_rng(seed).normal(0, 0.1, 16_000), 16_000, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def test_prepare_from_a_mirror_to_the_manifest(server, tmp_path, monkeypatch):
    """Two LibriSpeech archives and Speech Commands, in their published layouts, through prepare itself."""
    speakers = {"train-clean-5": ("19", "F", 1), "dev-clean-2": ("84", "M", 2)}
    lines = [f"{speaker} | {sex} | {subset} | 1 | Reader" for subset, (speaker, sex, _) in speakers.items()]
    text = ";ID |SEX| SUBSET |MINUTES| NAME\n" + "\n".join(lines) + "\n"
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
        monkeypatch.setitem(archives.PUBLISHED, subset, archives.Archive(f"31/{subset}.tar.gz", md5(archive)))
    clips = {f"./{word}/{voice}_nohash_0.wav": wav(hash_) for hash_, (word, voice) in enumerate(
        (word, voice) for word in ("yes", "no") for voice in ("aaaa", "bbbb", "cccc"))}  # fmt: skip
    lists = {
        "./validation_list.txt": b"yes/bbbb_nohash_0.wav\nno/bbbb_nohash_0.wav\n",
        "./testing_list.txt": b"yes/cccc_nohash_0.wav\nno/cccc_nohash_0.wav\n",
    }
    archive = tar(lists | clips)
    server.content["/speech_commands_v0.02.tar.gz"] = archive
    keywords = archives.PUBLISHED[archives.KEYWORDS]._replace(md5=md5(archive))
    monkeypatch.setitem(archives.PUBLISHED, archives.KEYWORDS, keywords)
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
        assert records.read_json(tmp_path / "run/00_corpus" / identity.READ) == identity.listings(p), "as unpacked"
        manifest = pd.read_parquet(tmp_path / "run" / "00_corpus" / "manifest.parquet")
        assert manifest.utterance.tolist() == ["19-7-0000", "84-7-0000"]
        assert manifest.sex.tolist() == ["F", "M"] and manifest.split.tolist() == ["train", "test"]
        assert manifest.text.tolist() == ["SOME WORDS"] * 2 and manifest.samples.tolist() == [16_000] * 2
        keywords = pd.read_parquet(tmp_path / "run" / "00_corpus" / "keywords.parquet")
        assert keywords.groupby("split").size().to_dict() == {"test": 2, "train": 2, "validation": 2}
        requests = len(server.asked)
    assert requests == 4, "one of the three was cut once, and nothing is fetched twice"
