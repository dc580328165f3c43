"""Reading checkpoints with torch's weights-only unpickler, which runs no code from the file.

From torch 2.6 on that unpickler is the default, and it refuses the log history that MMEngine
saves beside the weights, so that stock MMDetection can read no checkpoint of its own. Here, while
MMEngine's loaders read, and no longer, it is told what those are; whatever else a file holds is
refused by one sentence, on MMEngine releases and forks alike that would fall back to unpickling
everything.
"""
import contextlib
import functools
import json
import os
import pickle
import re
from pathlib import Path
from typing import Callable

import mmengine
import torch
from mmengine.runner.checkpoint import CheckpointLoader, load_from_http
from mmengine.utils import digit_version

from ..errors import InputError
from .contents import check_contents
from .unpickling import allowing_mmengine, plain


def allow_mmengine_checkpoints() -> None:
    """Let MMEngine read its own checkpoints, and nothing more, with weights_only on.

    Before torch 2.6, whose unpickler is not weights-only by default, loading is left as it is.
    """
    for prefix in ('modelzoo://', 'torchvision://'):
        load = CheckpointLoader._schemes[prefix]
        CheckpointLoader.register_scheme(prefix, _without_torchvision(load), force=True)
    if digit_version(torch.__version__) < digit_version('2.6.0'):
        return
    for prefix, load in list(CheckpointLoader._schemes.items()):
        CheckpointLoader.register_scheme(prefix, _weights_only(load), force=True)


def _without_torchvision(load: Callable[..., dict]) -> Callable[..., dict]:
    """``load``, but for addresses that MMEngine's own table has, which need no torchvision."""

    @functools.wraps(load)
    def load_address(filename, map_location=None, **kwargs) -> dict:
        table = Path(mmengine.__file__).parent / 'hub' / 'torchvision_0.12.json'
        addresses = json.loads(table.read_text()) if table.is_file() else {}
        address = addresses.get(filename.partition('://')[2])
        if address is not None:
            return load_from_http(address, map_location=map_location)
        try:
            return load(filename, map_location=map_location, **kwargs)
        except ImportError as error:
            raise InputError(
                f'{filename} is an address that torchvision knows, which could not be imported '
                f'({error}): install the torchvision of your torch, or give the file or its URL.'
            ) from error

    return load_address


def _weights_only(load: Callable[..., dict]) -> Callable[..., dict]:
    """``load`` with weights_only forced on, and its failures told in one sentence."""

    @functools.wraps(load)  # MMEngine logs a part of its name
    def load_weights_only(filename, map_location=None, **kwargs) -> dict:
        filename = os.path.expanduser(filename)
        is_local = '://' not in filename
        if is_local and not Path(filename).is_file():
            raise InputError(f'Checkpoint {filename} does not exist: give the path of a file '
                             '(the README says where published weights are).')
        try:
            with allowing_mmengine(), _force_weights_only():
                checkpoint = plain(load(filename, map_location=map_location, **kwargs))
        except (InputError, MemoryError):
            raise
        except OSError as error:
            raise InputError(f'Checkpoint {filename} could not be read '
                             f'({error.strerror or error}): check the path, or the address and '
                             'the network.') from error
        except pickle.UnpicklingError as error:
            found = re.search(r'GLOBAL (.+?) was not', str(error))
            if not found and not (is_local and _is_pickle(filename)):
                raise _unreadable(filename) from error
            held = found.group(1) if found else 'more than weights'
            raise InputError(
                f'Checkpoint {filename} was refused, and nothing in it was run, because it holds '
                f'{held}, where tensors, plain Python values and MMEngine logs were expected: '
                'if you trust it, save its weights alone, torch.save({"state_dict": ...}), and '
                'give that file.') from error
        except Exception as error:  # damage comes out as whatever the bytes happen to mean
            if _is_of_the_machine(error, is_local):
                raise
            if is_local and ('TorchScript' in str(error) or not _is_pickle(filename)):
                raise _unreadable(filename) from error
            size = f' ({Path(filename).stat().st_size} bytes)' if is_local else ''
            again = ('copy or save it again' if is_local else
                     f'remove the copy in {torch.hub.get_dir()}/checkpoints to download it again')
            raise InputError(
                f'Checkpoint {filename} is cut short or damaged{size}: {again}.') from error
        check_contents(checkpoint, filename, on_meta=str(map_location) == 'meta')
        return checkpoint

    return load_weights_only


def _is_pickle(filename: str) -> bool:
    """Whether the file begins as torch.save begins one, in either of its formats."""
    with open(filename, 'rb') as file:
        return file.read(2).startswith((pickle.PROTO, b'PK'))


def _unreadable(filename: str) -> InputError:
    return InputError(f'{filename} is not a checkpoint that torch can read: give a file that '
                      'torch.save wrote, whole.')


def _is_of_the_machine(error: Exception, is_local: bool) -> bool:
    """Whether it tells of a device, or of a download, rather than of what the file holds."""
    if not is_local:
        return not isinstance(error, EOFError) and 'PytorchStreamReader' not in str(error)
    return isinstance(error, RuntimeError) and 'cuda' in str(error).lower()


@contextlib.contextmanager
def _force_weights_only():
    """torch's own switch, obeyed by every torch.load below, a fallback to full pickle included."""
    force, opposite = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'
    before = {name: os.environ.pop(name, None) for name in (force, opposite)}
    os.environ[force] = '1'
    try:
        yield
    finally:
        del os.environ[force]
        os.environ.update({name: value for name, value in before.items() if value is not None})
