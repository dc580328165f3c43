"""Which versions of the packages below the plugin it runs on, checked at import."""
import contextlib
import importlib
import re
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Dict, Iterator, Tuple

# name: (lowest, below, how to install). torch 2.4 is the first to tell autocast's dtype for any
# device. OpenMMLab's packages and their maintained continuation (onedl-mmcv, onedl-mmengine,
# onedl-mmdetection) share these import names.
STACK = {
    'torch': ('2.4.0', '3.0.0', 'pip install "torch>=2.4"'),
    'mmengine': ('0.10.0', '1.0.0', 'pip install "mmengine>=0.10"'),
    'mmcv': ('2.0.0', '2.4.0', 'pip install "mmcv>=2.0.0,<2.2.0", built with its ops'),
    'mmdet': ('3.1.0', '4.0.0', 'pip install "mmdet>=3.1,<4"'),
}


def check_stack() -> None:
    """Import the packages of :data:`STACK`.

    Raises:
        ImportError: in one sentence, if one is missing, out of range, cannot be imported, or lacks
            its ops.
    """
    for name, (lowest, below, install) in STACK.items():
        wanted = f'mmdet_odconv needs {name}>={lowest},<{below}'
        try:
            version = importlib.import_module(name).__version__
        except ImportError as error:
            if error.name == name:
                raise ImportError(f'{wanted}, but it is not installed: {install}.') from error
            raise ImportError(f'{wanted}, which is installed but could not be imported ({error}): '
                              'install what it lacks.') from error
        except AssertionError as error:  # so mmdet answers an mmcv that it was not made for
            raise ImportError(f'{wanted} in a version that fits the others: {error}') from error
        if not _numbers(lowest) <= _numbers(version) < _numbers(below):
            raise ImportError(f'{wanted}, found {version}: {install}.')
    try:
        importlib.import_module('mmcv.ops')
    except ImportError as error:
        raise ImportError(f'mmdet_odconv needs mmcv with its ops (RoIAlign, NMS), but mmcv.ops '
                          f'could not be imported ({error}): '
                          'MMCV_WITH_OPS=1 pip install --no-build-isolation "mmcv>=2.0.0,<2.2.0" '
                          'builds them.') from error


@contextlib.contextmanager
def optional_torchvision() -> Iterator[None]:
    """Let MMPretrain and MMPose be imported where torchvision is not.

    It is missing beside many a torch for CPUs alone. They import it for transforms, boxes and
    pictures that no config here uses. Within the context, and there alone, modules stand for it
    that are empty but for what importing it asks of them.
    """
    modules: Dict[str, Any] = {}
    if 'torchvision' not in sys.modules and find_spec('torchvision') is None:
        parts = ('transforms', 'transforms.functional', 'transforms.transforms', 'ops',
                 'ops.boxes')
        for name in ('torchvision', *(f'torchvision.{part}' for part in parts)):
            modules[name] = ModuleType(name, 'Not installed: an empty one made by mmdet_odconv.')
            parent, _, child = name.rpartition('.')
            if parent:
                setattr(modules[parent], child, modules[name])
        modules['torchvision'].__version__ = '0.0.0'
        modules['torchvision.transforms'].RandomResizedCrop = object
        modules['torchvision.transforms'].ToPILImage = None
        modules['torchvision.transforms.transforms'].InterpolationMode = None
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def _numbers(version: str) -> Tuple[int, ...]:
    """First three numbers: a release candidate counts as its release."""
    return tuple(int(number) for number in re.findall(r'\d+', version)[:3])
