"""What lies below a folder of speech or of words."""

import os
from collections.abc import Iterator
from pathlib import Path


def walk(root: str | Path) -> Iterator[os.DirEntry[str]]:
    """Every file below the folder ``root``, in no particular order. Links are followed, but for those to a folder that
    they are in; a link that leads nowhere is listed as a file. Raises OSError where a folder cannot be read.
    """
    folders: list[tuple[str, tuple[tuple[int, int], ...]]] = [(os.fspath(root), ())]
    while folders:
        folder, above = folders.pop()
        status = os.stat(folder)
        here = status.st_dev, status.st_ino
        if here in above:
            continue
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                    folders.append((entry.path, (*above, here)))
                else:
                    yield entry
