"""Checkpoint files: read whole and sound, written whole or not at all."""
import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Dict, Iterator, Mapping, Tuple

import torch
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor

from ..errors import InputError
from ..version import __version__
from .published import check_finite, weights_of


def read_weights(filename: str, map_location='cpu') -> Tuple[Dict[str, Tensor], dict]:
    """Weights in a checkpoint, from a file or any address that MMEngine reads, and the checkpoint.

    Raises:
        InputError: if it cannot be read, holds no weights, or holds NaN.
    """
    checkpoint = CheckpointLoader.load_checkpoint(str(filename), map_location=map_location)
    if not isinstance(checkpoint, dict):
        raise InputError(f'Checkpoint {filename} holds a {type(checkpoint).__name__}, where a '
                         'dict of weights was expected: save model.state_dict().')
    state = weights_of(checkpoint)
    tensors = {name: value for name, value in state.items()
               if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors or len(tensors) != len(state):
        raise InputError(f'Checkpoint {filename} holds no state_dict of tensors, but '
                         f'{", ".join(map(str, list(checkpoint)[:5])) or "nothing"}: '
                         'save model.state_dict().')
    try:
        check_finite(tensors)
    except InputError as error:
        raise InputError(f'{filename}: {error}') from error
    return tensors, checkpoint


def kept_meta(checkpoint: dict) -> dict:
    """What holds of a converted checkpoint as it did before: the classes."""
    meta = (checkpoint.get('meta') or {}) if 'state_dict' in checkpoint else {}
    return {name: meta[name] for name in ('CLASSES', 'PALETTE', 'dataset_meta') if name in meta}


def halved(state: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Weights in half precision, but for tensors with values that it cannot hold."""
    result = {}
    for name, tensor in state.items():
        half = tensor.half() if tensor.dtype in (torch.float32, torch.float64) else tensor
        lost = ~torch.isfinite(half)
        if name.endswith('running_var'):
            lost |= half == 0
        result[name] = tensor if lost.any() else half
    return result


def provenance(source: str, tool: str) -> Dict[str, str]:
    """What a converted checkpoint says in its meta of where it is from."""
    said = dict(source=Path(source).name, converted_by=f'mmdet_odconv {__version__} {tool}')
    if Path(source).is_file():
        said['source_sha256'] = sha256(Path(source))
    return said


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def writing(path: Path, force: bool = False) -> Iterator[Path]:
    """A temporary file beside ``path``, renamed to it when the block ends, or removed if it fails.

    Raises:
        InputError: if ``path`` exists and ``force`` is not set, or cannot be written.
    """
    refuse_existing(path, force)
    with _beside(path) as temporary:
        yield temporary
        os.replace(temporary, path)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    temporary = None
    if path.is_dir():
        raise InputError(f'{path} is a directory: give the name of a file.')
    try:
        handle, temporary = tempfile.mkstemp(path.suffix, f'.{path.stem}-', path.parent)
        os.close(handle)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # as open() would; mkstemp's is the owner's alone
        yield Path(temporary)
    except OSError as error:
        about = Path(error.filename or temporary or '').name
        if temporary is not None and about != Path(temporary).name:
            raise  # of another file, which the block reads
        raise _unwritable(path, error.strerror or error) from error
    except RuntimeError as error:  # so torch.save answers a full disk
        if 'PytorchStreamWriter' not in str(error):
            raise
        raise _unwritable(path, str(error).splitlines()[0]) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _unwritable(path: Path, reason) -> InputError:
    return InputError(f'{path} could not be written ({reason}): choose a directory that exists, '
                      'is writable and has space.')


def refuse_existing(path: Path, force: bool) -> None:
    """InputError if ``path`` exists and ``force`` is not set."""
    if path.exists() and not force:
        raise InputError(f'{path} exists already: give another name, or --force to replace it.')


def save_checkpoint(checkpoint: dict, path: Path, force: bool = False) -> None:
    """``torch.save`` to ``path``, whole or not at all; equal contents give equal files."""
    with writing(path, force) as temporary:
        _save(checkpoint, temporary)


def publish(checkpoint: dict, path: Path, force: bool = False) -> Path:
    """Save to ``path`` with the first eight digits of the file's sha256 at the end of its stem."""
    with _beside(path) as temporary:
        _save(checkpoint, temporary)
        final = path.with_name(f'{path.stem}-{sha256(temporary)[:8]}{path.suffix}')
        refuse_existing(final, force)
        os.replace(temporary, final)
    return final


def _save(checkpoint: dict, path: Path) -> None:
    with open(path, 'wb') as file:
        torch.save(checkpoint, file)  # by name, the archive would hold that name
