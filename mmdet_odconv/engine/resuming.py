"""Which checkpoint a run resumes from."""
import re
import zipfile
from pathlib import Path
from typing import List, Optional, Tuple

from mmengine.logging import MessageHub

from ..errors import InputError

POINTER = 'last_checkpoint'
AUTO = 'auto'  # a config's ``resume`` that leaves its ``load_from`` for a run that has not begun


def newest_whole(work_dir: Path, out_dir: Path,
                 template: str) -> Tuple[Optional[Path], List[str]]:
    """The newest checkpoint that is whole.

    It is the one that ``work_dir/last_checkpoint`` names, unless a later one was written when the
    run was killed, before it could be named. Should that not be whole, the others follow, the
    latest written first.

    Args:
        work_dir: where ``last_checkpoint`` is.
        out_dir: where checkpoints are.
        template: their names, with ``{}``, or ``{:04d}``, for the epoch or iteration.

    Returns:
        the checkpoint, ``None`` if there is none at all, and what was passed over, why.

    Raises:
        InputError: if there are some, and none is whole.
    """
    pointer = work_dir / POINTER
    named = pointer.read_text(errors='replace').strip() if pointer.is_file() else ''
    steps = {path: number for path in out_dir.glob(pattern(template))
             if (number := step(path, template)) is not None and path.exists()}
    files = sorted(steps, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    if named:
        target = Path(named)
        if not target.exists() and (out_dir / target.name).exists():
            target = out_dir / target.name  # the directory was moved
        last = step(target, template)
        later = [path for path in files if last is not None and steps[path] > last
                 and path.stat().st_mtime_ns > pointer.stat().st_mtime_ns]
        files = [*later, target, *(path for path in files if path not in (*later, target))]
    passed: List[str] = []
    for path in files:
        fault = damage(path)
        if fault is None:
            return path, passed
        passed.append(f'{path} ({fault})')
    if passed:
        raise InputError(f'No checkpoint in {work_dir} is whole to resume from: '
                         f'{", ".join(passed)}; give one, --resume FILE, or move them and '
                         f'{POINTER} away to begin anew.')
    return None, passed


def pattern(template: str) -> str:
    """What ``glob`` finds checkpoints by whose names are made by ``template``."""
    return re.sub(r'{.*?}', '*', template, count=1)


def step(path: Path, template: str) -> Optional[int]:
    """The epoch or iteration in a checkpoint's name; ``None`` if it is not of the template."""
    before, _, after = pattern(template).partition('*')
    found = re.fullmatch(f'{re.escape(before)}([0-9]+){re.escape(after)}', path.name)
    return int(found[1]) if found else None


def damage(path: Path) -> Optional[str]:
    """What keeps a checkpoint from being whole: its end, or a checksum; ``None`` if nothing."""
    if not path.exists():
        return 'does not exist'
    if path.is_dir():  # shards, each process's own
        return None
    if not zipfile.is_zipfile(path):
        return f'cut short or no checkpoint, {path.stat().st_size} bytes'
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # zipfile has no common class for what damaged headers may raise
        return f'damaged: {error}'
    return None if bad is None else f'damaged at {bad}'


def no_space(writing: str) -> str:
    """What to say when the disk is full; of what is being written, ' while writing F' or ''."""
    return (f'No space was left on the disk{writing}: free some and run again with --resume, '
            'which continues from the last whole checkpoint.')


def interruption(again: str) -> str:
    """What to say when training is interrupted by the keyboard: where it was, and what to do.

    Args:
        again: how the same command is to be run to resume, 'again' or more.
    """
    info = MessageHub.get_current_instance().runtime_info
    if 'max_iters' not in info:
        return 'interrupted before any iteration; run the same command again.'
    last = info.get('last_ckpt')  # which MMEngine names before it is written
    saved = ('from the beginning, as nothing was saved yet' if not last else
             f'from {last}' if '://' in str(last) or Path(last).exists() else
             'from the newest checkpoint, if one was saved')
    return (f'interrupted at iteration {info["iter"] + 1} of {info["max_iters"]}; run the same '
            f'command {again} to resume {saved}.')
