"""What MMEngine's checkpoints name beside tensors, each by a stand-in that checks what it is given.

A file tells the unpickler which class or function to call with what. Those that build NumPy's
arrays and MMEngine's logs do not expect an enemy: ``numpy.ndarray((1,), 'O', b'A' * 8)`` is an
array of one forged pointer. So none of them is called. The file's calls reach the stand-ins, which
keep numbers alone, and :func:`plain` makes of them what MMEngine expects.
"""
import contextlib
import math
import pickle
import re
import threading
from typing import Any, Dict, Iterator, Optional
from unittest import mock

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.runner import checkpoint as mmengine_checkpoint

NUMERIC = re.compile(r'b1|[iu][1248]|f[248]')
_lock = threading.RLock()  # torch's allow-list is the process's


def _refused(what: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(f'GLOBAL {what} was not allowed')


class _Kind:
    """Stands for ``numpy.dtype``, of booleans, integers and floating-point numbers."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not (isinstance(code, str) and NUMERIC.fullmatch(code)):
            raise _refused(f'numpy.dtype {code}')
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        order, described = state[1], state[2:5]
        if order not in ('<', '>', '=', '|') or described != (None, None, None):
            raise _refused('numpy.dtype with fields')
        self.dtype = self.dtype.newbyteorder(order)

    def read(self, data: bytes, shape: tuple) -> np.ndarray:
        """An array of ``shape`` of its own, in this machine's byte order."""
        if not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError(f'an array cannot have the shape {shape}')
        if len(data) != math.prod(shape) * self.dtype.itemsize:
            raise ValueError(f'{len(data)} bytes are no array of shape {shape}')
        return np.frombuffer(data, self.dtype).astype(self.dtype.newbyteorder('='))


class _Array:
    """Stands for ``numpy.ndarray``, which only :func:`_reconstruct` may make."""

    def __init__(self, *args, **kwargs) -> None:
        raise _refused('numpy.ndarray')

    def __setstate__(self, state: tuple) -> None:
        *_, shape, kind, is_fortran, data = state
        self.value = kind.read(data, shape).reshape(shape, order='F' if is_fortran else 'C')


def _reconstruct(cls, shape, kind) -> _Array:
    if cls is not _Array:
        raise _refused(f'numpy._reconstruct of {cls!r}')
    return _Array.__new__(_Array)


def _scalar(kind: _Kind, data: bytes) -> np.generic:
    return kind.read(data, ())[0]


class _History:
    """Stands for MMEngine's HistoryBuffer, the log of one value."""

    def __init__(self, *args, **kwargs) -> None:
        raise _refused('mmengine.logging.HistoryBuffer')

    def __setstate__(self, state: dict) -> None:
        self.state = state

    def buffer(self) -> HistoryBuffer:
        logs, counts = (self.state[name].value for name in ('_log_history', '_count_history'))
        return HistoryBuffer(logs, counts, int(self.state['max_length']))


class _OneCycle:
    """Stands for the schedule of which a checkpoint holds the curve, by :func:`_attribute`."""

    def __init__(self, *args, **kwargs) -> None:
        raise _refused('mmengine.optim.OneCycleParamScheduler')


def _empty_bytes() -> bytes:
    """Stands for ``bytes``, which pickle calls for an empty array's."""
    return b''


class _Skipped:
    """Stands for the settings that KernelWarehouse's files hold beside weights, and keeps none."""

    def __setstate__(self, state) -> None:
        pass


ATTRIBUTES: Dict[type, Dict[str, Any]] = {
    _History: {name: getattr(HistoryBuffer, name) for name in ('min', 'max', 'mean', 'current')},
    _OneCycle: {name: getattr(OneCycleParamScheduler, name)
                for name in ('_annealing_cos', '_annealing_linear')},
}


def _attribute(owner, name: str):
    """Stands for getattr, of which MMEngine's checkpoints ask these functions by name.

    getattr itself would let a file reach anything from what is allowed.
    """
    if not isinstance(owner, type) or name not in ATTRIBUTES.get(owner, ()):
        raise _refused(f'getattr({owner!r}, {name!r})')
    return ATTRIBUTES[owner][name]


STAND_INS = {
    'numpy.dtype': _Kind, 'numpy.ndarray': _Array, 'builtins.getattr': _attribute,
    'builtins.bytes': _empty_bytes, 'argparse.Namespace': _Skipped,
    f'{ConfigDict.__module__}.ConfigDict': dict,
    **{f'numpy.{core}.multiarray.{name}': stand_in for core in ('core', '_core')  # NumPy 1, 2
       for name, stand_in in (('_reconstruct', _reconstruct), ('scalar', _scalar))},
    f'{HistoryBuffer.__module__}.HistoryBuffer': _History,
    f'{OneCycleParamScheduler.__module__}.OneCycleParamScheduler': _OneCycle,
}


@contextlib.contextmanager
def allowing_mmengine() -> Iterator[None]:
    """Let torch's weights-only unpickler read what MMEngine saves, within the context alone.

    What the process has allowed for itself stays allowed, but not in the place of a stand-in.
    """
    allowed = torch.serialization
    # The fork's loaders would allow getattr and numpy.ndarray themselves.
    fork = mock.patch.object(mmengine_checkpoint, 'get_torch_safe_globals', list, create=True)
    with _lock, fork:
        before = allowed.get_safe_globals()
        others = [entry for entry in before if _name(entry) not in STAND_INS]
        allowed.clear_safe_globals()
        try:
            allowed.add_safe_globals([*others, *((stand_in, name) for name, stand_in
                                                 in STAND_INS.items())])
            yield
        finally:
            allowed.clear_safe_globals()
            allowed.add_safe_globals(before)


def _name(entry) -> str:
    """Under which an entry of torch's allow-list is found."""
    return entry[1] if isinstance(entry, tuple) else f'{entry.__module__}.{entry.__qualname__}'


def plain(value, done: Optional[Dict[int, tuple]] = None):
    """``value`` with arrays and logs in the place of their stand-ins, its dicts and lists the same.

    Args:
        value: what the unpickler returned.
        done: each object seen so far, and what it became, by id: a file may hold itself.
    """
    done = {} if done is None else done
    if id(value) in done:
        return done[id(value)][1]
    if isinstance(value, _Array):
        result = value.value
    elif isinstance(value, _Kind):
        result = value.dtype
    elif isinstance(value, _History):
        result = value.buffer()
    elif type(value) is tuple:
        result = tuple(plain(item, done) for item in value)
    else:
        result = value
        done[id(value)] = value, result
        if isinstance(value, dict):
            for key in value:
                value[key] = plain(value[key], done)
        elif isinstance(value, list):
            value[:] = [plain(item, done) for item in value]
    done[id(value)] = value, result  # the object is kept, lest another gets its id
    return result
