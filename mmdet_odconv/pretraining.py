"""What classifiers of MMPretrain need beside the backbones; their configs import it by name.

The plugin itself does not: MMPretrain is optional, ``pip install 'mmdet_odconv[imagenet]'``.
"""
import contextlib
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Dict, Iterator, Sequence

from mmengine.registry import MODELS
from torch import Tensor, nn


@contextlib.contextmanager
def _torchvision() -> Iterator[None]:
    """Let MMPretrain be imported where torchvision is not, as with many a torch for CPUs alone.

    MMPretrain imports it, and does not say so among its requirements, for transforms and boxes
    that no config here uses. Within the context, and there alone, modules stand for it that are
    empty but for what importing it asks of them.
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
        modules['torchvision.transforms.transforms'].InterpolationMode = None
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


with _torchvision():
    import mmpretrain.datasets  # noqa: F401
    import mmpretrain.evaluation  # noqa: F401
    from mmpretrain.models import LinearClsHead


@MODELS.register_module()
class DropoutLinearClsHead(LinearClsHead):
    """MMPretrain's LinearClsHead with dropout before the classifier, as the ODConv release has.

    Args:
        *args, **kwargs: those of :class:`mmpretrain.models.LinearClsHead`.
        dropout: probability of dropping a feature, from 0 to 1.

    Raises:
        ValueError: if ``dropout`` is not from 0 to 1.
    """

    def __init__(self, *args, dropout: float = 0.2, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.dropout = nn.Dropout(dropout)

    def pre_logits(self, feats: Sequence[Tensor]) -> Tensor:
        """Features (B, in_channels) that the classifier sees, of the last of ``feats``."""
        return self.dropout(super().pre_logits(feats))
