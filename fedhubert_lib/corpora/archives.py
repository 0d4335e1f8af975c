"""The published archives: fetched so that a cut connection costs nothing, checked, and unpacked as if hostile.

A download grows in ``NAME.tar.gz.partial`` and gets its name only when its MD5 is the published one. An archive is
unpacked into a hidden folder, each file under a temporary name first; a second start goes on after the files that are
there. The corpus folder gets its name last, so whatever has it is whole.
"""

import contextlib
import errno
import glob
import gzip
import hashlib
import http.client
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fedhubert_lib import files
from fedhubert_lib.corpora.librispeech import CorpusError

BLOCK = 1 << 20
ATTEMPTS = 5
"""Tries in a row that bring nothing before a download is given up; the wait doubles from one second."""
TIMEOUT = 30.0
LARGEST_MEMBER = 1 << 30
LARGEST_READ = 1 << 26
LONGEST_NAME = 240
"""Bytes: file systems take 255, and ``.NAME.partial`` is longer than the name."""
LARGEST_RATIO = 20
"""An archive of audio shrinks it by less than this; what grows more is a bomb."""

Progress = Callable[[str, int, int], None]


class Archive(NamedTuple):
    """A published archive: where it lies below a mirror, and its MD5 as published beside it."""

    place: str
    md5: str


LIBRISPEECH = {
    "dev-clean": Archive("12/dev-clean.tar.gz", "42e2234ba48799c1f50f24a7926300a1"),
    "dev-other": Archive("12/dev-other.tar.gz", "c8d0bcc9cca99d4f8b62fcc847357931"),
    "test-clean": Archive("12/test-clean.tar.gz", "32fa31d27d2e1cad72775fee3f4849a9"),
    "test-other": Archive("12/test-other.tar.gz", "fb5a50374b501bb3bac4815ee91d3135"),
    "train-clean-100": Archive("12/train-clean-100.tar.gz", "2a93770f6d5c6c964bc36631d331a522"),
    "train-clean-360": Archive("12/train-clean-360.tar.gz", "c0e676e450a7ff2f54aeade5171606fa"),
    "train-other-500": Archive("12/train-other-500.tar.gz", "d1a0fd59409feb2c614ce4d30c387708"),
    "dev-clean-2": Archive("31/dev-clean-2.tar.gz", "6d7ab67ac6a1d2c993d050e16d61080d"),
    "train-clean-5": Archive("31/train-clean-5.tar.gz", "5df7d4e78065366204ca6845bb08f490"),
}
KEYWORDS = {"speech_commands_v0.02": Archive("speech_commands_v0.02.tar.gz", "6b74f3901214cb2c2934e98196829835")}


class ArchiveError(CorpusError):
    """An archive that cannot be fetched, is not the published one, or must not be unpacked."""


class DiskFullError(ArchiveError):
    """No room for an archive or its content. What is there is kept."""


def provide(
    root: Path,
    name: str,
    published: dict[str, Archive],
    mirror: str,
    *,
    download: bool,
    inside: str,
    on_progress: Progress | None = None,
) -> None:
    """Make the folder ``root/inside/name`` if it is not there: from ``root/name.tar.gz``, fetched first if need be.

    ``inside`` is the archive's top folder ("LibriSpeech"), or "" where the archive has none and its members lie in
    ``name`` itself. Nothing happens when neither the folder nor the archive is there and ``download`` is off: whoever
    reads the folder says that it is missing.
    """
    if (root / inside / name).is_dir() or (root / name).is_dir():
        return
    archive = root / f"{name}.tar.gz"
    known = published.get(name)
    if not archive.exists() and not download:
        return
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f".{name}.lock"):
        if not archive.exists():
            if known is None:
                raise ArchiveError(f"{name} is not published; known are {', '.join(published)}")
            fetch(f"{mirror.rstrip('/')}/{known.place}", archive, known.md5, on_progress)
        elif known is not None:
            _verify(archive, known.md5, f"remove {archive}, or set corpus.download to fetch it again", on_progress)
        unpack(archive, root, name, inside, on_progress)


def fetch(url: str, path: Path, md5: str, on_progress: Progress | None = None) -> None:
    """Fetch ``url`` to ``path``, going on where an earlier attempt stopped, and check it.

    Raises ArchiveError when the server refuses or ATTEMPTS tries in a row bring nothing new or the disk is full (what
    came is kept), or when the sum is wrong (what came is removed, since nothing can be added to it).
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ArchiveError(f"{url}: only http and https addresses are fetched; correct the mirror")
    partial = path.with_name(path.name + ".partial")
    failures = furthest = 0
    while True:
        furthest = max(furthest, partial.stat().st_size if partial.exists() else 0)
        try:
            if _fetch_rest(url, partial, on_progress):
                break
            problem = "the connection was cut"
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise ArchiveError(
                    f"{url}: the server answers {error.code} {error.reason}; try another mirror"
                ) from error
            problem = f"{error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            problem = str(error)
        after = partial.stat().st_size if partial.exists() else 0
        # Further than ever: a server that knows no ranges could bring the same beginning again for ever.
        failures = 0 if after > furthest else failures + 1
        if failures == ATTEMPTS:
            raise ArchiveError(f"{url}: {problem}, {ATTEMPTS} times in a row; run again to go on from byte {after:,}")
        if failures:
            time.sleep(2 ** (failures - 1))
    try:
        _verify(partial, md5, "removed; run again, or try another mirror", on_progress)
    except ArchiveError:
        partial.unlink()
        raise
    partial.replace(path)


def _fetch_rest(url: str, partial: Path, on_progress: Progress | None) -> bool:
    """One request for what is still missing; whether the file is now as long as the server says."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return True
        if error.code == 416:  # longer than the server's file: it cannot be its beginning
            partial.unlink()
            return False
        raise
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if resumed else 0  # a server that knows no ranges starts again from the first byte
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else 0
        with _room(partial), partial.open("ab" if resumed else "wb") as file:
            while block := response.read(BLOCK):
                file.write(block)
                have += len(block)
                _report(on_progress, f"download {partial.stem} (MiB)", have, total)
    return have == total or not length


def _verify(path: Path, md5: str, remedy: str, on_progress: Progress | None) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    done, total = 0, path.stat().st_size
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            done += len(block)
            _report(on_progress, f"check {path.name} (MiB)", done, total)
    if digest.hexdigest() != md5:
        raise ArchiveError(f"{path}: its MD5 is {digest.hexdigest()}, the published one {md5}; {remedy}")


def unpack(archive: Path, root: Path, name: str, inside: str, on_progress: Progress | None = None) -> None:
    """Unpack ``archive`` so that ``root/inside/name`` appears, whole; other files of its top folder go beside it.

    Refused, with nothing of it left behind: a member outside ``inside/``, one that is neither file nor folder (a link,
    a device), a member above 1 GiB, more than 20 times the archive's size in all, a damaged archive. A run that was
    killed, or found the disk full, leaves its hidden folder, and the next goes on from there.
    """
    status = archive.stat()
    size = status.st_size
    # Named after the archive, too: nothing of another one is mixed in.
    hidden = root / f".{name}.{size}-{status.st_mtime_ns}.unpacking"
    for other in root.glob(f".{glob.escape(name)}.*.unpacking"):
        if other != hidden:
            shutil.rmtree(other)
    try:
        with (
            _room(hidden),
            archive.open("rb") as raw,
            _Bounded(fileobj=raw) as stream,
            tarfile.open(fileobj=stream, mode="r:") as tar,
        ):
            total = 0
            for member in tar:
                path = _safe(member, archive, inside)
                total += member.size + tarfile.BLOCKSIZE  # its header, so that empty files count, too
                if member.size > LARGEST_MEMBER or total > LARGEST_RATIO * size:
                    raise ArchiveError(f"{archive}: {member.name} makes it larger than any corpus of its size")
                if member.isfile():
                    _write(tar, member, hidden / path)
                _report(on_progress, f"unpack {archive.name} (MiB)", raw.tell(), size)
            while stream.read(BLOCK):  # to the end, where gzip's checksum stands
                pass
        wanted = hidden / name if inside else hidden
        if not wanted.is_dir():
            raise ArchiveError(f"{archive}: holds no folder {inside}/{name}; is it the archive of another subset?")
    except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
        shutil.rmtree(hidden, ignore_errors=True)
        raise ArchiveError(f"{archive}: {member.name} is a file and a folder; this archive is not unpacked") from error
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        shutil.rmtree(hidden, ignore_errors=True)
        raise ArchiveError(f"{archive}: truncated or damaged ({error}); fetch it again") from error
    except DiskFullError:
        raise
    except ArchiveError:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    if inside:
        (root / inside).mkdir(exist_ok=True)
        for beside in hidden.iterdir():  # SPEAKERS.TXT and the like are the same in each archive
            if beside.is_file() and not (root / inside / beside.name).exists():
                beside.replace(root / inside / beside.name)
    os.sync()
    wanted.rename(root / inside / name)
    shutil.rmtree(hidden, ignore_errors=True)


class _Bounded(gzip.GzipFile):
    """tarfile reads a member's extended header in one go, however large it says it is."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size > LARGEST_READ:
            raise tarfile.ReadError("a header larger than any name can be")
        return super().read(size)


def _safe(member: tarfile.TarInfo, archive: Path, inside: str) -> PurePosixPath:
    """The member's path below the archive's top folder."""
    path = PurePosixPath(member.name)
    if not (member.isfile() or member.isdir()) or member.issparse():
        raise ArchiveError(
            f"{archive}: {member.name} is neither a plain file nor a folder; this archive is not unpacked"
        )
    if path.is_absolute() or ".." in path.parts or "\0" in member.name or "\\" in member.name:
        raise ArchiveError(f"{archive}: {member.name} would leave the folder; this archive is not unpacked")
    if max(map(len, map(os.fsencode, path.parts)), default=0) > LONGEST_NAME:
        raise ArchiveError(f"{archive}: {member.name[:40]}… is longer than a name can be; this archive is not unpacked")
    if not inside:
        return path
    if path.parts[:1] != (inside,):
        raise ArchiveError(f"{archive}: {member.name} does not lie in {inside}/; this archive is not unpacked")
    return path.relative_to(inside)


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    if path.exists() and path.stat().st_size == member.size:
        return  # renamed by an earlier start, so it was whole
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    with tar.extractfile(member) as source, temporary.open("wb") as target:
        shutil.copyfileobj(source, target, BLOCK)
    if temporary.stat().st_size != member.size:
        raise tarfile.ReadError(f"{member.name} is cut off")
    temporary.replace(path)


@contextlib.contextmanager
def _room(path: Path) -> Iterator[None]:
    """A full disk is an error that names ``path``: that of a write does not."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(path.parent).free >> 20
        raise DiskFullError(
            f"{path.parent}: {error.strerror}, {free:,} MiB free; make room and run again, it goes on where it stopped"
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w", encoding="utf-8") as file:
        if not files.lock(file):
            raise ArchiveError(f"{path.parent}: another process is fetching or unpacking here; wait for it")
        yield


def _report(on_progress: Progress | None, what: str, done: int, total: int) -> None:
    if on_progress:
        on_progress(what, done >> 20, total >> 20)
