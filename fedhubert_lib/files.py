"""Atomic files: written under a temporary name, flushed to disk, then renamed; JSON Lines; locks."""

import codecs
import contextlib
import errno
import functools
import importlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

_UNSUPPORTED = {errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors of file systems that have no locks, or cannot flush a folder."""
_REMEDIES = {
    errno.ENOSPC: "free space on that disk (fedhubert clean RUN shows what a run could spare)",
    errno.EDQUOT: "free space in your quota (fedhubert clean RUN shows what a run could spare)",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "get the right to write there, or set FEDHUBERT_OUTPUTS elsewhere"),
    errno.EROFS: "it is mounted read-only; set FEDHUBERT_OUTPUTS to a folder that can be written",
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file stands where a folder belongs; move it, or name another"),
    errno.EISDIR: "a folder stands where a file belongs; name a file in it, or another",
    errno.EMFILE: "raise the number of files that a process may open: ulimit -n 65536",
    errno.ENAMETOOLONG: "give the run or the clients shorter names",
    errno.EIO: "the disk does not answer as it should; look at the system's log",
    errno.ESTALE: "the network folder was mounted anew; run the command again",
}


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success flush it to disk and rename it to ``path``.

    Works for a file, which replaces no folder, and for a folder. On an error nothing is left behind, and what stood at
    ``path`` before is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays, since some writers (NumPy) choose the format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        with naming(path):
            yield temporary
            if temporary.is_dir():  # in parallel, so that the file system writes its journal for many files together
                with ThreadPoolExecutor(32) as pool:
                    list(pool.map(_flush, [*temporary.rglob("*"), temporary]))
            elif path.is_dir():  # which would go with all that it holds
                raise explained(errno.EISDIR, path)
            else:
                _flush(temporary)
            if path.is_dir():  # rename cannot replace a folder that has content
                old = path.with_name(f".{path.name}.{os.getpid()}.old")
                path.rename(old)
                temporary.rename(path)
                _remove(old)
            else:
                temporary.replace(path)
            _flush(path.parent)
    finally:
        _remove(temporary)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an error of the system that names no file ``path`` and a remedy.

    A write does not say where it failed; safetensors and pyarrow report the number in words, libsndfile that there is
    one. A ValueError is of the library's, which names its file: one that could not be read while ``path`` was written.
    """
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number is None and (match := re.search(r"\b(?:os error|errno) (\d+)", str(error), re.IGNORECASE)):
            number = int(match[1])
        elif number is None and "System error" in str(error) and shutil.disk_usage(path.parent).free < 2**20:
            number = errno.ENOSPC
        if number is None or getattr(error, "filename", None) is not None:
            raise
        raise explained(number, path) from error


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN is refused: JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def append_row(path: Path, row: dict[str, Any], durable: bool = False) -> None:
    """Append ``row`` to a JSON Lines file in one write, so that a reader never sees half of an earlier row; if
    ``durable`` it is on disk then, with all before it. What a kill has left of an unfinished row is cut off first. On a
    disk that is full nothing of ``row`` stays, and OSError says so.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    with naming(path), path.open("ab+", buffering=0) as stream:
        if (size := stream.tell()) and os.pread(stream.fileno(), 1, size - 1) != b"\n":
            stream.seek(0)
            size = stream.truncate(stream.read().rfind(b"\n") + 1)
        if stream.write(line) != len(line):
            stream.truncate(size)
            raise explained(errno.ENOSPC, path)
        if durable:
            os.fsync(stream.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file that may still be growing: an unfinished last line is left for the next read."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    try:
        return [json.loads(line) for line in lines if line]
    except ValueError as error:
        raise ValueError(f"{path}: a line is no JSON ({error}), as a crash may leave; remove that line") from error


def rounds(path: Path) -> list[dict[str, Any]]:
    """The rows of rounds in a metrics.jsonl, one for each: training that resumes cuts off those that come again."""
    return [row for row in read_rows(path) if row["kind"] == "round"]


def events() -> Any:
    """The module ``events`` where ``FEDHUBERT_TENSORBOARD`` asks for TensorBoard's files; else None, and no import."""
    return importlib.import_module("fedhubert_lib.events") if os.environ.get("FEDHUBERT_TENSORBOARD") else None


def read_text(path: str | Path) -> str:
    """A text of others: UTF-8, or UTF-16 with a byte order mark, which is left out. Raises OSError or ValueError."""
    with open(path, "rb", opener=at_once) as file:
        content = file.read() or b""  # a pipe: empty, or None where its writer is silent
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if utf16 else "utf-8").removeprefix("\ufeff")


def at_once(path: str, flags: int) -> int:
    """An ``opener`` for ``open`` that does not wait for ever at a pipe, whatever it is called."""
    return os.open(path, flags | os.O_NONBLOCK)


def sweep(folder: Path) -> None:
    """Tidy what killed processes left of ``atomic`` below ``folder``, while nobody is writing there.

    What is half-written goes. A folder that had been put aside for a new one comes back if that did not take its place.
    """
    for path in [p for p in folder.rglob(".*") if ".partial" in p.suffixes or p.suffix == ".old"]:
        target = path.with_name(path.name[1:].rsplit(".", 2)[0])
        if path.suffix == ".old" and not target.exists():
            path.rename(target)
        else:
            _remove(path)


@contextlib.contextmanager
def locked(path: Path, seconds: float = 0.0) -> Iterator[bool]:
    """Hold the lock file ``path`` inside the block; False where another process keeps it for longer than ``seconds``.

    On a file system without locks, True: nothing then keeps two processes apart, which is printed once.
    """
    lock = FileLock(path, timeout=seconds, thread_local=False, fallback_to_soft=False)
    free = True
    try:
        lock.acquire()
    except Timeout:
        free = False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _warn_of_no_locks(str(path.parent))
    try:
        yield free
    finally:
        lock.release()


def explained(number: int, path: str | Path) -> OSError:
    """The system's error ``number`` at ``path``, with a remedy where one is known."""
    remedy = f"; {_REMEDIES[number]}" if number in _REMEDIES else ""
    return OSError(number, os.strerror(number) + remedy, str(path))


@functools.cache
def _warn_of_no_locks(folder: str) -> None:
    print(f"{folder}: its file system has no locks; see to it that one process at a time works there", file=sys.stderr)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
