"""Norms folded into the convolutions before them, dynamic and static."""
import collections
import copy
from typing import Any, Iterator, Optional, Tuple

import torch
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks.wrappers import Conv2d as EmptySafeConv2d
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers.attention import PooledLinear
from ..layers.base import DynamicConv2d
from ..layers.odconv import ODAttention

STATIC = (nn.Conv2d, EmptySafeConv2d)  # exactly: a subclass may change its weights on the way


class Folded(nn.Identity):
    """In the place of a norm that its convolution does now."""


class Affine(nn.Module):
    """What remains of a norm: constants for each channel, the scale ``None`` if it is done before.

    No norm any more, which mmcv would fold into whatever convolution it finds before.
    """

    scale: Optional[Tensor]
    shift: Tensor

    def __init__(self, scale: Optional[Tensor], shift: Tensor) -> None:
        super().__init__()
        self.register_buffer('scale', scale)
        self.register_buffer('shift', shift)

    def forward(self, x: Tensor) -> Tensor:
        """Scale x, (B, C, H, W), and add to it."""
        x = x if self.scale is None else x * self.scale[:, None, None]
        return x + self.shift[:, None, None]


@torch.no_grad()
def fuse(model: nn.Module) -> nn.Module:
    """Fold the norms of a model for inference, in place; its outputs are the same.

    A BatchNorm registered right after a dynamic or static convolution, as in every block of
    MMDetection and as mmcv's ``fuse_conv_bn`` reads them, goes into its kernels and bias: the
    filters of a bank commute with every attention. The BatchNorm of ODConv's attention goes into
    that attention's first layer, and its heads become one layer. CondConv's gates do not sum to
    one, so a constant stays outside; after FDConv and KernelWarehouse, whose kernels are made of no
    filters, a scale does, too.
    Norms and convolutions that are used in several places, or have hooks, stay as they are.

    mmcv's ``fuse_conv_bn`` may be called afterwards: a norm that it would put into a convolution
    beyond a dynamic one is no norm any more, but the constants that it has come to.

    Args:
        model: in evaluation mode; fused twice, it stays as it is.

    Returns:
        ``model``.

    Raises:
        ValueError: if a part of the model is in training mode, or if mmcv's ``fuse_conv_bn`` was
            called before and put the norm of a dynamic convolution into the convolution before it.
    """
    for name, module in model.named_modules():
        if module.training and type(module) is not nn.Identity:  # as mmcv leaves them
            raise ValueError(f'{name or type(model).__name__} is in training mode, where a norm is '
                             'no constant to fold: call model.eval() first.')
    for name, module in model.named_modules():
        _refuse_misfused(name, module)
    uses = collections.Counter(child for module in model.modules()
                               for child in module._modules.values())
    for module in list(model.modules()):
        for conv, name, norm in list(_pairs(module)):
            if uses[conv] == uses[norm] == 1 and not (_hooked(conv) or _hooked(norm)):
                module._modules[name] = _fold(conv, norm).eval()
    for module in list(model.modules()):
        if isinstance(module, ODAttention):
            module.join_heads()
        for name, norm in list(_misled(module)):
            module._modules[name] = Affine(*(constant.to(norm.running_var)
                                             for constant in _constants(norm))).eval()
    return model


@HOOKS.register_module()
class FusionHook(Hook):
    """Tests a copy of the model that :func:`fuse` has folded; the model itself stays as it is."""

    priority = 'LOWEST'  # after the weights of an average have taken their place

    def before_test_epoch(self, runner: Runner) -> None:
        self.place = (runner.model, 'module') if is_model_wrapper(runner.model) else (
            runner, 'model')
        self.original = getattr(*self.place)
        setattr(*self.place, fuse(copy.deepcopy(self.original).eval()))

    def after_test_epoch(self, runner: Runner, metrics=None) -> None:
        setattr(*self.place, self.original)


def _pairs(module: nn.Module) -> Iterator[Tuple[Any, str, Any]]:
    """Convolutions among a module's children, each with the name of its BatchNorm, and that."""
    if isinstance(module, nn.ModuleList):
        return  # whose children are not called in turn
    if isinstance(module, ConvModule) and module.order.index('norm') != module.order.index(
            'conv') + 1:
        return
    before: Any = None
    for name, child in module.named_children():
        if (isinstance(child, _BatchNorm) and child.track_running_stats
                and child.running_mean is not None and _takes_norm(before)
                and before.out_channels == child.num_features):
            yield before, name, child
        before = child


def _takes_norm(module) -> bool:
    return type(module) in STATIC or isinstance(module, (PooledLinear, DynamicConv2d))


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or 'forward' in vars(module))


def _misled(module: nn.Module) -> Iterator[Tuple[str, Any]]:
    """Norms among a module's children that mmcv would put beyond a dynamic convolution."""
    conv: Any = None
    is_beyond = False
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            if conv is not None and is_beyond and child.running_mean is not None and (
                    not _hooked(child)):
                yield name, child
            conv = None
        elif isinstance(child, nn.Conv2d):
            conv, is_beyond = child, False
        elif any(isinstance(part, DynamicConv2d) for part in child.modules()):
            is_beyond = True


def _constants(norm: Any) -> Tuple[Tensor, Tensor]:
    """The scale and shift, (C,), that a BatchNorm has come to.

    In double precision, so that each weight is rounded once.
    """
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    return scale, shift


def _fold(conv: Any, norm: Any) -> nn.Module:
    """Do as ``conv`` what ``norm`` does; what is to be put in the norm's place."""
    scale, shift = _constants(norm)
    if isinstance(conv, DynamicConv2d) and not conv.filters:
        return Affine(scale.to(norm.running_var), shift.to(norm.running_var))
    for name, axes in getattr(conv, 'filters', {'weight': conv.weight.dim() - 1}).items():
        filters = getattr(conv, name)
        _replace(conv, name, filters * scale[(..., ) + (None, ) * axes])
    mixes = getattr(conv, 'mixes_bias', False)
    bias: Any = 0 if conv.bias is None else conv.bias * scale
    if mixes and conv.attention.gate != 'softmax':
        if conv.bias is not None:
            _replace(conv, 'bias', bias)
        return Affine(None, shift.to(conv.weight))
    if mixes:  # by weights that sum to one
        shift = shift.expand(conv.kernel_num, -1)
    _replace(conv, 'bias', bias + shift)
    return Folded()


def _replace(module: Any, name: str, value: Tensor) -> None:
    """A new parameter, because others may be tied to the one before."""
    setattr(module, name, nn.Parameter(
        value.to(module.weight), requires_grad=module.weight.requires_grad))


def _refuse_misfused(name: str, module: nn.Module) -> None:
    """ValueError if mmcv put a norm that came after a dynamic convolution into one before it.

    mmcv keeps the last convolution until a norm or another comes, leaves a bias in it, and in the
    norm's place an Identity that is in training mode, unless ``eval`` was called again.
    """
    last: Optional[str] = None  # static convolution that may have got a norm
    between: Optional[str] = None  # what is dynamic after it
    before: Any = None
    for child_name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            last, between = (child_name if child.bias is not None else None), None
        elif type(child) is nn.Identity and last and between and (
                child.training or isinstance(before, DynamicConv2d)):
            prefix = f'{name}.' if name else ''
            raise ValueError(
                f"mmcv's fuse_conv_bn put the norm of {prefix}{between} into {prefix}{last}, "
                'which mmcv took for the convolution before it: load the model again and call '
                'mmdet_odconv.fuse, which folds the norms of static convolutions too. (If it was '
                'not called, take the Identity after that layer out.)')
        elif isinstance(child, _BatchNorm) or type(child) is nn.Identity and (
                child.training or isinstance(before, nn.Conv2d)):
            last = None  # its own norm
        elif any(isinstance(part, DynamicConv2d) for part in child.modules()):
            between = child_name
        before = child
