"""Small files that a reader sees whole or as they were before, also when the writer is killed."""

import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file of this process beside the name, and rename it; the folder is there.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp()) / "best.json"
        >>> write_whole(path, b"{}")
        >>> [file.name for file in path.parent.iterdir()]
        ['best.json']
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    unfinished.replace(path)
