"""Which versions of the packages below the plugin it runs on, checked at import."""
import importlib
import re
from typing import Tuple

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


def _numbers(version: str) -> Tuple[int, ...]:
    """First three numbers: a release candidate counts as its release."""
    return tuple(int(number) for number in re.findall(r'\d+', version)[:3])
