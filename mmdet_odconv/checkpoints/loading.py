"""Reading checkpoints with torch's weights-only unpickler, which runs no code from the file.

From torch 2.6 on that unpickler is the default, and it refuses the log history that MMEngine
saves beside the weights, so that stock MMDetection can read no checkpoint of its own. Here it is
told exactly which classes those are; and whatever else a file holds is refused by one sentence,
on MMEngine releases and forks alike that would fall back to unpickling everything.
"""
import contextlib
import functools
import os
import pickle
import re
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.utils import digit_version

from ..errors import InputError

# Classes of MMEngine in its checkpoints, each with its functions that are there too: the
# statistics of a log history, the curves of a one-cycle schedule.
ATTRIBUTES = {
    HistoryBuffer: ('min', 'max', 'mean', 'current'),
    OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear'),
}


def allow_mmengine_checkpoints() -> None:
    """Let MMEngine read its own checkpoints, and nothing more, with weights_only on.

    Before torch 2.6, whose unpickler is not weights-only by default, loading is left as it is.
    """
    if digit_version(torch.__version__) < digit_version('2.6.0'):
        return
    _allow_classes()
    for prefix, load in list(CheckpointLoader._schemes.items()):
        CheckpointLoader.register_scheme(prefix, _weights_only(load), force=True)


def _allow_classes() -> None:
    """Tell torch's unpickler what MMEngine's checkpoints hold; said again, it changes nothing."""
    reconstruct = np.ones(1).__reduce__()[0]
    scalar = np.float64(1).__reduce__()[0]
    torch.serialization.add_safe_globals([
        *ATTRIBUTES, np.ndarray, np.dtype, reconstruct, scalar,
        *(type(np.dtype(kind)) for kind in (bool, np.int32, np.int64, np.float32, np.float64)),
        (_attribute, 'builtins.getattr'), (_Skipped, 'argparse.Namespace')
    ])


class _Skipped:
    """Stands for the settings that KernelWarehouse's files hold beside weights, and keeps none."""

    def __setstate__(self, state) -> None:
        pass


def _attribute(owner, name: str):
    """Stands for getattr, of which MMEngine's checkpoints ask these functions by name.

    getattr itself would let a file reach anything from what is allowed.
    """
    if not isinstance(owner, type) or name not in ATTRIBUTES.get(owner, ()):
        raise pickle.UnpicklingError(f'GLOBAL getattr({owner!r}, {name!r}) was not allowed')
    return getattr(owner, name)


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
            with _force_weights_only():
                checkpoint = load(filename, map_location=map_location, **kwargs)
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
            found = found.group(1) if found else 'more than weights'
            raise InputError(
                f'Checkpoint {filename} was refused, and nothing in it was run, because it holds '
                f'{found}, where tensors, plain Python values and MMEngine logs were expected: '
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
        finally:
            _allow_classes()  # the fork's loader takes back what it has allowed for a while
        if not isinstance(checkpoint, dict):
            raise InputError(f'Checkpoint {filename} holds a {type(checkpoint).__name__}, where a '
                             'dict of weights was expected: save model.state_dict().')
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
