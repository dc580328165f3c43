"""Static convolutions of a model that exists already, replaced by dynamic ones."""
import inspect
import re
from typing import Dict, List

from mmengine.registry import MODELS
from torch import nn

from .base import DynamicConv2d


def replace_convs(model: nn.Module, pattern: str, conv_cfg: dict,
                  inflate: bool = False) -> List[str]:
    """Replace static convolutions of ``model``, in place, by dynamic ones.

    Args:
        model: any torch model.
        pattern: regular expression; every :class:`torch.nn.Conv2d` whose whole name matches is
            replaced by a layer of the same geometry, frozen and in the mode that it was. One that
            is used under several names is shared by them still.
        conv_cfg: the layer, e.g. ``dict(type='ODConv2d', kernel_num=4)``.
        inflate: give the layer the output of the convolution before; else it is initialised
            afresh.

    Returns:
        The names of the convolutions replaced.

    Raises:
        ValueError: if ``conv_cfg`` names no dynamic convolution, or an argument it has not; if
            a convolution has hooks, which its replacement would not run.
    """
    conv_cfg = dict(conv_cfg)
    kind = conv_cfg.pop('type', None)
    layer = kind if isinstance(kind, type) else MODELS.get(str(kind))
    if layer is None or not issubclass(layer, DynamicConv2d):
        raise ValueError(f'conv_cfg must name a dynamic convolution such as ODConv2d, got {kind!r}')
    unknown = sorted(conv_cfg.keys() - inspect.signature(layer).parameters.keys())
    if unknown:
        raise ValueError(f'{layer.__name__} has no argument {", ".join(unknown)}: leave it out.')
    # Exactly nn.Conv2d: a subclass, such as a deformable convolution, has a reason to be there.
    found = [(name, module) for name, module in model.named_modules(remove_duplicate=False)
             if type(module) is nn.Conv2d and re.fullmatch(pattern, name)]
    replacement: Dict[nn.Module, nn.Module] = {}
    for name, conv in found:
        if conv._forward_hooks or conv._forward_pre_hooks:
            raise ValueError(f'{name} has forward hooks, which a {layer.__name__} in its place '
                             'would not run: remove them, or leave it out.')
        if conv not in replacement:
            dynamic = layer(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
                            conv.padding, conv.dilation, conv.groups, conv.bias is not None,
                            conv.padding_mode, conv.weight.device, conv.weight.dtype, **conv_cfg)
            if inflate:
                dynamic.inflate(conv.weight, conv.bias)
            if not conv.weight.requires_grad:
                dynamic.requires_grad_(False)
            replacement[conv] = dynamic.train(conv.training)
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, replacement[conv])
    return [name for name, _ in found]
