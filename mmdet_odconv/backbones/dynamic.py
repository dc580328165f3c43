"""The one decision that makes a static backbone dynamic: which of its convolutions are."""
import re
from typing import List, Optional

from mmengine.registry import MODELS
from torch import nn

from ..layers import DynamicConv2d


def replace_convs(model: nn.Module, pattern: str, conv_cfg: dict) -> List[str]:
    """Replace static convolutions of ``model``, in place, by freshly initialised dynamic ones.

    Args:
        model: any torch model.
        pattern: regular expression; every :class:`torch.nn.Conv2d` whose whole name matches is
            replaced by a layer of the same geometry.
        conv_cfg: the layer, e.g. ``dict(type='ODConv2d', kernel_num=4)``.

    Returns:
        The names of the convolutions replaced.

    Raises:
        ValueError: if ``conv_cfg`` names no dynamic convolution.
    """
    conv_cfg = dict(conv_cfg)
    kind = conv_cfg.pop('type', None)
    layer = kind if isinstance(kind, type) else MODELS.get(str(kind))
    if layer is None or not issubclass(layer, DynamicConv2d):
        raise ValueError(f'conv_cfg must name a dynamic convolution such as ODConv2d, got {kind!r}')
    # Exactly nn.Conv2d: a subclass, such as a deformable convolution, has a reason to be there.
    names = [
        name for name, module in model.named_modules()
        if type(module) is nn.Conv2d and re.fullmatch(pattern, name)
    ]
    for name in names:
        conv = model.get_submodule(name)
        parent, _, child = name.rpartition('.')
        dynamic = layer(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
                        conv.padding, conv.dilation, conv.groups, conv.bias is not None,
                        conv.padding_mode, conv.weight.device, conv.weight.dtype, **conv_cfg)
        setattr(model.get_submodule(parent), child, dynamic)
    return names


class DynamicBackbone:
    """Mixin put before a backbone of MMDetection; the subclass names its dynamic convolutions.

    Args:
        *args, **kwargs: those of the backbone that is extended.
        kernel_num: number of kernels in each bank.
        reduction: width of the attention relative to the layer's input channels.
        conv_cfg: another dynamic layer, or more of its arguments; stem and shortcut convolutions
            stay static whatever it says.
    """

    dynamic_conv_cfg = dict(type='ODConv2d')
    dynamic_convs: str  # regular expression of module names

    def __init__(self,
                 *args,
                 kernel_num: int = 4,
                 reduction: float = 1 / 16,
                 conv_cfg: Optional[dict] = None,
                 **kwargs) -> None:
        super().__init__(*args, **kwargs)
        conv_cfg = {**self.dynamic_conv_cfg, 'kernel_num': kernel_num, 'reduction': reduction,
                    **(conv_cfg or {})}
        replace_convs(self, self.dynamic_convs, conv_cfg)
        self._freeze_stages()  # mmdet froze the convolutions that were here before
