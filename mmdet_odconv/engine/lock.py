"""One run at a time in a work directory."""
import os
import socket
from pathlib import Path
from typing import IO, Dict

from ..errors import InputError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

NAME = '.lock'
_held: Dict[Path, IO[str]] = {}


def lock_directory(directory: str) -> None:
    """Take the lock of a work directory for this process, until it ends or releases it.

    The lock is the kernel's, on a file that stays: it is gone with the process, however that
    ended. Children do not inherit it. Taken twice by one process, it is held once. A file system
    without locks is left unlocked.

    Raises:
        InputError: if another process holds it.
    """
    path = Path(directory).resolve() / NAME
    if fcntl is None or path in _held:
        return
    file = open(path, 'a+')  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = file.read().strip() or 'another process'
        file.close()
        raise InputError(f'{directory} is in use by another run ({owner}): wait until it ends, or '
                         'give another --work-dir.') from None
    except OSError:
        file.close()
        return
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}')
    file.flush()
    _held[path] = file


def release_directory(directory: str) -> None:
    """Give the lock back, if this process holds it."""
    file = _held.pop(Path(directory).resolve() / NAME, None)
    if file is not None:
        file.close()
