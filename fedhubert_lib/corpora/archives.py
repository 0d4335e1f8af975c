"""The published archives: fetched so that a cut connection costs nothing, checked, and unpacked as if hostile.

A download grows in ``NAME.tar.gz.partial`` and gets its name only when its MD5 is the published one. An archive is
unpacked into a hidden folder; a second start continues after the files that are there. The corpus folder gets its name
last, so a folder of that name is complete.
"""

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
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fedhubert_lib import files
from fedhubert_lib.corpora.librispeech import CorpusError

BLOCK = 1 << 20
ATTEMPTS = 5
"""Requests in a row that bring nothing before a download fails; the wait doubles from one second."""
LARGEST_READ = 1 << 26
LARGEST_RATIO = 20
"""An archive of audio shrinks it by less than this; what grows more is a bomb."""
_MALFORMED = {None, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG}
"""Error numbers that blame an archive (a file that is a folder, too; a name too long); None: not the system's."""

Progress = Callable[[str, int, int], None]
"""Called with the task, how much of it is done, and how much there is."""


class Archive(NamedTuple):
    """A published archive: its place below a mirror, and its MD5 as published beside it."""

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
    """Make the folder ``root/inside/name`` if it is missing: from ``root/name.tar.gz``, fetched first if need be.

    ``inside`` is the archive's top folder ("LibriSpeech"), or "" where the archive has none and its members lie in
    ``name`` itself. Nothing happens when neither the folder nor the archive exists and ``download`` is off: whoever
    reads the folder says that it is missing.
    """
    if (root / inside / name).is_dir() or (root / name).is_dir():
        return
    archive = root / f"{name}.tar.gz"
    if not archive.exists() and not download:
        return
    root.mkdir(parents=True, exist_ok=True)
    with files.locked(root / f".{name}.lock") as free:
        if not free:
            raise ArchiveError(f"{root}: another process is fetching or unpacking here; wait for it")
        if not archive.exists():
            if name not in published:
                raise ArchiveError(f"{name} is not published; choose from {', '.join(published)}")
            fetch(f"{mirror.rstrip('/')}/{published[name].place}", archive, published[name].md5, on_progress)
        elif name in published:
            _verify(archive, published[name].md5, f"remove {archive} to fetch it again", on_progress)
        unpack(archive, root, name, inside, on_progress)


def fetch(url: str, path: Path, md5: str, on_progress: Progress | None = None) -> None:
    """Fetch ``url`` to ``path``, resuming where an earlier attempt stopped, and check it.

    Raises ArchiveError when the server refuses, when ATTEMPTS requests in a row bring nothing new (what came is kept),
    or when the sum is wrong (what came is removed, since nothing can be added to it); OSError when the disk is full.
    """
    if not url.startswith(("http://", "https://")):
        raise ArchiveError(f"{url}: only http and https addresses are fetched; correct the mirror")
    partial = path.with_name(path.name + ".partial")
    partial.touch()
    failures, furthest = 0, partial.stat().st_size
    while problem := _fetch_rest(url, partial, on_progress):
        # A server without ranges can bring the same beginning for ever: only a new byte is progress.
        progress, furthest = partial.stat().st_size > furthest, max(furthest, partial.stat().st_size)
        failures = 0 if progress else failures + 1
        if failures == ATTEMPTS:
            raise ArchiveError(
                f"{url}: {problem}, {ATTEMPTS} times in a row; run again to resume at {furthest:,} bytes"
            )
        if failures:
            time.sleep(2 ** (failures - 1))
    try:
        _verify(partial, md5, "removed; run again, or try another mirror", on_progress)
    except ArchiveError:
        partial.unlink()
        raise
    partial.replace(path)


def _fetch_rest(url: str, partial: Path, on_progress: Progress | None) -> str:
    """One request for what is missing of ``partial``: why it is not complete afterwards, or nothing."""
    size = partial.stat().st_size
    request = urllib.request.Request(url, headers={"Range": f"bytes={size}-"} if size else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            size = size if response.status == 206 else 0  # a server without ranges starts again from the first byte
            length = response.headers.get("Content-Length")
            total = size + int(length) if length else 0
            with partial.open("ab" if size else "wb") as file:
                while block := response.read(BLOCK):
                    with files.naming(partial):
                        file.write(block)
                    size += len(block)
                    _report(on_progress, f"download {partial.stem} (MiB)", size, total)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing comes after what is there
            return ""
        if error.code < 500 and error.code not in (408, 429):
            raise ArchiveError(f"{url}: the server answers {error.code} {error.reason}; try another mirror") from error
        return f"{error.code} {error.reason}"
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        return str(error)
    return "the connection was cut" if length and size < total else ""


def _verify(path: Path, md5: str, remedy: str, on_progress: Progress | None) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            _report(on_progress, f"check {path.name} (MiB)", file.tell(), path.stat().st_size)
    if digest.hexdigest() != md5:
        raise ArchiveError(f"{path}: its MD5 is {digest.hexdigest()}, the published one {md5}; {remedy}")


def unpack(archive: Path, root: Path, name: str, inside: str, on_progress: Progress | None = None) -> None:
    """Unpack ``archive`` so that ``root/inside/name`` appears, complete; other files of its top folder go beside it.

    Refused, with nothing of it left behind: a member that would leave the folder, or is neither file nor folder (a
    link, a device); more than 20 times the archive's size in all; a damaged archive. A run that was killed, or whose
    disk was full, leaves its hidden folder, and the next one continues from there.
    """
    status = archive.stat()
    # Named after the archive, too: nothing of another one is mixed in.
    hidden = root / f".{name}.{status.st_size}-{status.st_mtime_ns}.unpacking"
    for other in root.glob(f".{glob.escape(name)}.*.unpacking"):
        if other != hidden:
            shutil.rmtree(other)
    try:
        _extract(archive, hidden, on_progress)
        top = hidden / inside
        if inside and not (top / name).is_dir():
            raise tarfile.ReadError(f"no folder {inside}/{name} in it; is it the archive of another subset?")
    except (tarfile.TarError, EOFError, zlib.error, ValueError, OSError) as error:
        if getattr(error, "errno", None) not in _MALFORMED:
            raise
        shutil.rmtree(hidden, ignore_errors=True)
        raise ArchiveError(f"{archive}: damaged or not what it should be, and not unpacked: {error}") from error
    if inside:
        (root / inside).mkdir(exist_ok=True)
        for beside in top.iterdir():  # SPEAKERS.TXT and the like are the same in each archive
            if beside.is_file() and not (root / inside / beside.name).exists():
                beside.replace(root / inside / beside.name)
        top /= name
    os.sync()
    top.rename(root / inside / name)
    shutil.rmtree(hidden, ignore_errors=True)


class _Bounded(gzip.GzipFile):
    """tarfile reads a member's extended header in one go, however large it says it is."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size > LARGEST_READ:
            raise tarfile.ReadError("a header larger than any name can be")
        return super().read(size)


def _extract(archive: Path, folder: Path, on_progress: Progress | None) -> None:
    """Write the members of ``archive`` that are missing below ``folder``. Raises an error at the first hostile one."""
    packed, unpacked = archive.stat().st_size, 0
    with archive.open("rb") as raw, _Bounded(fileobj=raw) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            if not (member.isfile() or member.isdir()):  # a link, even inside, serves no corpus
                raise tarfile.SpecialFileError(member)
            unpacked += member.size + tarfile.BLOCKSIZE  # its header, so that empty files count, too
            if unpacked > LARGEST_RATIO * packed:
                raise tarfile.ReadError(f"{member.name} makes it larger than any corpus of its size")
            path = folder / member.name
            if not path.is_file() or path.stat().st_size != member.size:
                with files.naming(path):
                    tar.extract(member, folder, filter="data")
            _report(on_progress, f"unpack {archive.name} (MiB)", raw.tell(), packed)
        while stream.read(BLOCK):  # to the end, where gzip's checksum stands
            pass


def _report(on_progress: Progress | None, what: str, done: int, total: int) -> None:
    if on_progress:
        on_progress(what, done >> 20, total >> 20)
