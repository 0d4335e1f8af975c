"""The published archives: fetched so that a cut connection costs nothing, checked against their sums, and unpacked.

A download grows in ``NAME.tar.gz.partial`` and gets its name only when its MD5 is the published one. Nothing else is
unpacked, into a hidden folder first; a second start continues after the files that are there. The corpus folder gets
its name last, so a folder of that name is complete.
"""

import hashlib
import http.client
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedhubert_lib import files
from fedhubert_lib.corpora.librispeech import CorpusError

BLOCK = 1 << 20
ATTEMPTS = 5
"""Requests in a row that bring nothing before a download fails; the wait doubles from one second."""
TRANSIENT = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)

Progress = Callable[[str, int, int], None]
"""Called with the task, how much of it is done, and how much there is."""


class Archive(NamedTuple):
    """A published archive."""

    place: str
    """Below a mirror."""
    md5: str
    inside: str = "LibriSpeech"
    """Its top folder, which holds NAME; empty where its members lie in NAME itself."""


KEYWORDS = "speech_commands_v0.02"
PUBLISHED = {
    "dev-clean": Archive("12/dev-clean.tar.gz", "42e2234ba48799c1f50f24a7926300a1"),
    "dev-other": Archive("12/dev-other.tar.gz", "c8d0bcc9cca99d4f8b62fcc847357931"),
    "test-clean": Archive("12/test-clean.tar.gz", "32fa31d27d2e1cad72775fee3f4849a9"),
    "test-other": Archive("12/test-other.tar.gz", "fb5a50374b501bb3bac4815ee91d3135"),
    "train-clean-100": Archive("12/train-clean-100.tar.gz", "2a93770f6d5c6c964bc36631d331a522"),
    "train-clean-360": Archive("12/train-clean-360.tar.gz", "c0e676e450a7ff2f54aeade5171606fa"),
    "train-other-500": Archive("12/train-other-500.tar.gz", "d1a0fd59409feb2c614ce4d30c387708"),
    "dev-clean-2": Archive("31/dev-clean-2.tar.gz", "6d7ab67ac6a1d2c993d050e16d61080d"),
    "train-clean-5": Archive("31/train-clean-5.tar.gz", "5df7d4e78065366204ca6845bb08f490"),
    KEYWORDS: Archive("speech_commands_v0.02.tar.gz", "6b74f3901214cb2c2934e98196829835", inside=""),
}


class ArchiveError(CorpusError):
    """An archive that cannot be fetched, or is not the published one."""


def provide(
    root: Path, name: str, mirror: str, subsets: Sequence[str], download: bool, on_progress: Progress = lambda *_: None
) -> None:
    """Make the folder of a corpus part below ``root`` if it is missing: from ``root/NAME.tar.gz``, fetched first if
    need be; where one of ``subsets`` lies in ``root``, there, too.

    Nothing happens when neither the folder nor the archive exists and ``download`` is off: whoever reads the folder
    says that it is missing. Raises ArchiveError for an archive that is not the published one.
    """
    archive, published = root / f"{name}.tar.gz", PUBLISHED.get(name)
    folders = [root / name, root / (published.inside if published else "LibriSpeech") / name]
    if any(folder.is_dir() for folder in folders) or not (archive.exists() or download):
        return
    if published is None:
        raise ArchiveError(f"{archive}: correct its name or unpack it by hand; published are {', '.join(PUBLISHED)}")
    root.mkdir(parents=True, exist_ok=True)
    with files.locked(root / f".{name}.lock") as free:
        if not free:
            raise ArchiveError(f"{root}: another process is fetching or unpacking here; wait for it")
        if any(folder.is_dir() for folder in folders):  # which another one has just done
            return
        if not archive.exists():
            fetch(f"{mirror.rstrip('/')}/{published.place}", archive, published.md5, on_progress)
        else:
            _verify(archive, published.md5, f"remove {archive} to fetch it again", on_progress)
        _unpack(archive, root, name, published.inside, subsets, on_progress)


def fetch(url: str, path: Path, md5: str, on_progress: Progress = lambda *_: None) -> None:
    """Fetch ``url`` to ``path``, resuming where an earlier attempt stopped, and check it.

    Raises ArchiveError when the server refuses, when ATTEMPTS requests in a row bring nothing new (what came is kept),
    or when the sum is wrong (what came is removed, since nothing can be added to it); OSError when the disk is full.
    """
    if not url.startswith(("http://", "https://")):
        raise ArchiveError(f"{url}: only http and https addresses are fetched; correct the mirror")
    partial = path.with_name(path.name + ".partial")
    partial.touch()
    failures, furthest = 0, partial.stat().st_size
    while True:
        try:
            _fetch_rest(url, partial, on_progress)
            break
        except TRANSIENT as error:
            code = error.code if isinstance(error, urllib.error.HTTPError) else None
            if code == 416:  # nothing comes after what is there
                break
            if code is not None and code < 500 and code not in (408, 429):
                raise ArchiveError(f"{url}: the server answers {error}; try another mirror") from error
            # A server without ranges can bring the same beginning for ever: only a new byte is progress.
            failures = 0 if partial.stat().st_size > furthest else failures + 1
            furthest = max(furthest, partial.stat().st_size)
            if failures == ATTEMPTS:
                raise ArchiveError(
                    f"{url}: {error}, {ATTEMPTS} times in a row; run again to resume at {furthest:,} bytes"
                ) from error
        time.sleep(2 ** (failures - 1) if failures else 0)
    try:
        _verify(partial, md5, "removed; run again, or try another mirror", on_progress)
    except ArchiveError:
        partial.unlink()
        raise
    partial.replace(path)


def _fetch_rest(url: str, partial: Path, on_progress: Progress) -> None:
    """One request for what is missing of ``partial``. Raises one of TRANSIENT where it is not complete afterwards."""
    size = partial.stat().st_size
    request = urllib.request.Request(url, headers={"Range": f"bytes={size}-"} if size else {})
    with urllib.request.urlopen(request, timeout=30) as response:
        size = size if response.status == 206 else 0  # a server without ranges starts again from the first byte
        length = response.headers.get("Content-Length")
        total = size + int(length) if length else 0
        if not size and total < (come := partial.stat().st_size):  # such as a page about maintenance
            raise ConnectionError(f"the server offers {total:,} bytes where {come:,} have come; or remove {partial}")
        with partial.open("ab" if size else "wb") as file:
            while block := _read(response):
                with files.naming(partial):
                    file.write(block)
                size += len(block)
                on_progress(f"download {partial.stem} (MiB)", size >> 20, total >> 20)
    if size < total:
        raise ConnectionError("the connection was cut")


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(BLOCK)
    except OSError as error:  # of the network, which has more of them than ConnectionError
        raise ConnectionError(str(error)) from error


def _verify(path: Path, md5: str, remedy: str, on_progress: Progress) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            on_progress(f"check {path.name} (MiB)", file.tell() >> 20, path.stat().st_size >> 20)
    if digest.hexdigest() != md5:
        raise ArchiveError(f"{path}: its MD5 is {digest.hexdigest()}, the published one {md5}; {remedy}")


def _unpack(archive: Path, root: Path, name: str, inside: str, subsets: Sequence[str], on_progress: Progress) -> None:
    """Unpack ``archive`` so that ``root/inside/name`` appears, complete, or ``root/name`` where one of ``subsets``, or
    a published one, is in ``root``; other files of its top folder go beside it."""
    hidden, packed = root / f".{name}.unpacking", archive.stat().st_size
    with archive.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:gz") as tar:
        # Python 3.11.2, which is Debian 12's, has no filters; here the sum is that of the published archive.
        safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        for member in tar:
            path = hidden / member.name
            if not path.is_file() or path.stat().st_size != member.size:
                with files.naming(path):
                    tar.extract(member, hidden, **safe)
            on_progress(f"unpack {archive.name} (MiB)", raw.tell() >> 20, packed >> 20)
    top, home = hidden / inside, root / inside
    if inside:
        if not home.exists() and any((root / other).is_dir() for other in (*subsets, *PUBLISHED.keys() - {KEYWORDS})):
            home = root
        home.mkdir(exist_ok=True)
        for beside in top.iterdir():  # SPEAKERS.TXT and the like are the same in each archive
            if beside.is_file() and not (home / beside.name).exists():
                beside.replace(home / beside.name)
        top /= name
    os.sync()
    top.rename(home / name)
    shutil.rmtree(hidden, ignore_errors=True)
