"""Static convolutions of a model that exists already, replaced by dynamic ones."""
import inspect
import re
from typing import Callable, Dict, List, Union

from mmengine.registry import MODELS
from torch import nn

from ..names import nearest
from .base import DynamicConv2d

GEOMETRY = inspect.signature(nn.Conv2d).parameters.keys()

def replace_convs(model: nn.Module, chosen: Union[str, Callable[[str], bool]], conv_cfg: dict,
                  inflate: bool = False) -> List[str]:
    """Replace static convolutions of ``model``, in place, by dynamic ones.

    Args:
        model: any torch model.
        chosen: a regular expression for whole names, or a function of a name; every
            :class:`torch.nn.Conv2d` so chosen is replaced by a layer of the same geometry, frozen
            and in the mode that it was. One that is used under several names is shared by them
            still.
        conv_cfg: the layer, e.g. ``dict(type='ODConv2d', kernel_num=4)``; the geometry is not its
            to say.
        inflate: give the layer the output of the convolution before; else it is initialised
            afresh.

    Returns:
        The names of the convolutions replaced.

    Raises:
        ValueError: if ``conv_cfg`` names no dynamic convolution, or an argument it has not; if
            a convolution has hooks, a forward of its own or weights shared with another, which its
            replacement would not have. ``model`` is then as it was.
    """
    if not isinstance(conv_cfg, dict):
        raise ValueError(f'conv_cfg must be a dict such as dict(type="ODConv2d"), got {conv_cfg!r}')
    conv_cfg = dict(conv_cfg)
    kind = conv_cfg.pop('type', None)
    layer = kind if isinstance(kind, type) else MODELS.get(str(kind))
    if layer is None or not issubclass(layer, DynamicConv2d):
        raise ValueError(f'conv_cfg must name a dynamic convolution such as ODConv2d, got {kind!r}')
    known = inspect.signature(layer).parameters.keys()
    unknown = sorted(conv_cfg.keys() - known)
    if unknown:
        raise ValueError(f'{layer.__name__} has no argument {", ".join(unknown)}: '
                         f'{nearest(unknown[0], sorted(known - GEOMETRY), "leave it out")}')
    geometry = sorted(conv_cfg.keys() & GEOMETRY)
    if geometry:
        raise ValueError(f'conv_cfg has {", ".join(geometry)}, in which a dynamic convolution '
                         'follows the one in whose place it comes: leave it out.')
    try:
        is_chosen: Callable[[str], object] = (
            re.compile(chosen).fullmatch if isinstance(chosen, str) else chosen)
    except re.error as error:
        raise ValueError(f'{chosen!r} is no regular expression ({error}).') from error
    # Exactly nn.Conv2d: a subclass, such as a deformable convolution, has a reason to be there.
    convs = [(name, module) for name, module in model.named_modules(remove_duplicate=False)
             if type(module) is nn.Conv2d]
    picked = {conv for name, conv in convs if is_chosen(name)}  # under all of its names, then
    found = [(name, conv) for name, conv in convs if conv in picked]
    replacement: Dict[nn.Module, nn.Module] = {}
    if any(conv is model for _, conv in found):
        raise ValueError('the model is itself a convolution, in which nothing can be replaced: '
                         'wrap it in nn.Sequential.')
    for name, conv in found:
        if conv not in replacement:
            _check_replaceable(name, conv, model)
            replacement[conv] = _dynamic(conv, layer, conv_cfg, inflate)
    for name, conv in found:
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, replacement[conv])
    return [name for name, _ in found]


def _check_replaceable(name: str, conv: nn.Conv2d, model: nn.Module) -> None:
    hooks = (conv._forward_hooks, conv._forward_pre_hooks, conv._backward_hooks,
             conv._backward_pre_hooks)
    if any(hooks) or 'forward' in vars(conv):
        raise ValueError(f'{name} has hooks or a forward of its own, which a dynamic convolution '
                         'in its place would not run: remove them, or leave it out.')
    tied = [other for other, module in model.named_modules()
            if module is not conv and any(p is conv.weight for p in module._parameters.values())]
    if tied:
        raise ValueError(f'{name} shares its weight with {tied[0]}, and a bank in its place would '
                         'not: leave both out.')


def _dynamic(conv: nn.Conv2d, layer: type, conv_cfg: dict, inflate: bool) -> DynamicConv2d:
    """The dynamic layer that takes the place of ``conv``."""
    dynamic = layer(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
                    conv.padding, conv.dilation, conv.groups, conv.bias is not None,
                    conv.padding_mode, conv.weight.device, conv.weight.dtype, **conv_cfg)
    if inflate:
        dynamic.inflate(conv.weight, conv.bias)
    if not conv.weight.requires_grad:
        dynamic.requires_grad_(False)
    if conv.bias is not None:
        dynamic.bias.requires_grad_(conv.bias.requires_grad)
    return dynamic.train(conv.training)
