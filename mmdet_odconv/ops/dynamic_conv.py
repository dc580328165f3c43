"""The one function that every dynamic convolution layer calls."""
import contextlib
import functools
import math
from typing import Dict, Iterator, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocked import BlockedConv
from .exported import exported_conv2d, is_exporting
from .folded import FoldedConv, folded_conv2d, is_pointwise, output_size
from .fused import FusedConv, serves
from .grouped import grouped_conv2d
from .shared import SharedConv

# Cost of moving an element of the patches (written, scaled, gathered again) or of a scaled map,
# relative to one of the kernels; fitted to `benchmark.py plans`.
PATCH_COST = 4
MAP_COST = 4

Size2d = Union[int, Tuple[int, int]]


def dynamic_conv2d(input: Tensor,
                   weight: Tensor,
                   bias: Optional[Tensor] = None,
                   stride: Size2d = 1,
                   padding: Union[str, Size2d] = 0,
                   dilation: Size2d = 1,
                   groups: int = 1,
                   *,
                   kernel_attention: Optional[Tensor] = None,
                   spatial_attention: Optional[Tensor] = None,
                   channel_attention: Optional[Tensor] = None,
                   filter_attention: Optional[Tensor] = None) -> Tensor:
    r"""2-D convolution of each image with a kernel of its own (ODConv, ICLR 2022, eq. 3).

    Image :math:`b` is convolved with

    .. math:: W_b[o,c,p] = f_b[o]\, c_b[c]\, s_b[p] \sum_i a_b[i]\, W[i,o,c,p]

    where an attention that is ``None`` counts as 1. With groups, the channel attention of group
    :math:`j` multiplies that group's own input channels. The bias is added as it is.

    Args:
        input: (B, Cin, H, W); B may be 0.
        weight: bank of kernels, (n, Cout, Cin / groups, kh, kw).
        bias: (Cout,).
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`.
        kernel_attention: :math:`a`, (B, n). Required when n > 1.
        spatial_attention: :math:`s`, (B, kh, kw).
        channel_attention: :math:`c`, (B, Cin).
        filter_attention: :math:`f`, (B, Cout).

    Returns:
        (B, Cout, Hout, Wout).

    Raises:
        ValueError: if a shape or the geometry is not one of those above.
    """
    _check_shapes(input, weight, bias, groups, kernel_attention, spatial_attention,
                  channel_attention, filter_attention)
    stride, dilation = _pair('stride', stride, 1), _pair('dilation', dilation, 1)
    input, padding = _resolve_padding(input, weight, stride, padding, dilation)
    plan = _forced_plan or choose_plan(
        input, weight, stride, padding, dilation, groups, kernel_attention, spatial_attention)
    attentions = (kernel_attention, spatial_attention, channel_attention, filter_attention)
    geometry = stride, padding, dilation, groups
    device = input.device.type
    if device != 'meta' and torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        input, *attentions = (None if t is None else t.to(dtype) for t in (input, *attentions))
        if plan != 'fused':
            weight = weight.to(dtype)
        with torch.autocast(device, enabled=False):
            output = _run(plan, input, weight, *attentions, *geometry)
    else:
        output = _run(plan, input, weight, *attentions, *geometry)
    return output if bias is None else output + bias.to(output.dtype)[:, None, None]


def _run(plan: str, input: Tensor, *arguments) -> Tensor:
    if input.shape[0] == 0:
        return _empty_batch(input, *arguments)
    return PLANS[plan](input, *arguments)


def _folded(input, weight, a, s, c, f, stride, padding, dilation, groups) -> Tensor:
    if is_exporting():
        return exported_conv2d(input, weight, a, s, c, f, stride, padding, dilation, groups)
    if torch.compiler.is_compiling():
        # The compiler fuses and saves what it likes.
        return folded_conv2d(input, weight, a, s, c, f, stride, padding, dilation, groups)
    return FoldedConv.apply(input, weight, a, s, c, f, stride, padding, dilation, groups)


def _blocked(input, weight, a, s, c, f, stride, padding, dilation, groups) -> Tensor:
    if groups != 1:
        raise ValueError(f"plan 'blocked' is for groups=1, got {groups}")
    return BlockedConv.apply(input, weight, a, s, c, f, stride, padding, dilation)


def _shared(input, weight, a, s, c, f, *geometry) -> Tensor:
    if a is not None or s is not None:
        raise ValueError("plan 'shared' is for a bank of one kernel without attention of its own, "
                         f'got {len(weight)} with {"kernel" if s is None else "spatial"}_attention')
    return SharedConv.apply(input, weight, a, s, c, f, *geometry)


PLANS = dict(blocked=_blocked, folded=_folded, fused=FusedConv.apply, grouped=grouped_conv2d,
             shared=_shared)
_forced_plan: Optional[str] = None


@contextlib.contextmanager
def force_plan(plan: str) -> Iterator[None]:
    """Run every :func:`dynamic_conv2d` inside by one plan; for tests and benchmarks.

    Raises:
        ValueError: if there is no such plan.
    """
    global _forced_plan
    if plan not in PLANS:
        raise ValueError(f'plan must be one of {sorted(PLANS)}, got {plan!r}')
    before, _forced_plan = _forced_plan, plan
    try:
        yield
    finally:
        _forced_plan = before


def choose_plan(input: Tensor, weight: Tensor, stride, padding, dilation, groups: int,
                kernel_attention=None, spatial_attention=None) -> str:
    """The plan of least :func:`plan_costs`; on CUDA, Triton's in place of 'folded'."""
    if torch.compiler.is_compiling() or is_exporting():
        return 'folded'
    plan = _cheapest_plan(input.device.type == 'cpu', input.shape, weight.shape, stride, padding,
                          dilation, groups, kernel_attention is None and spatial_attention is None)
    return 'fused' if plan == 'folded' and serves(input) else plan


@functools.lru_cache(maxsize=4096)
def _cheapest_plan(is_cpu: bool, *call) -> str:
    costs = plan_costs(*call)
    if not is_cpu:
        costs.pop('blocked', None)  # blocks are for the caches of a CPU
    return min(costs, key=costs.get)


def plan_costs(input_shape, weight_shape, stride, padding, dilation, groups: int,
               kernel_is_shared: bool) -> Dict[str, float]:
    """What each plan that can serve a call moves beside the convolution itself.

    In elements of kernels, per image. With Cout * I elements in a kernel, I = Cin / groups * kh *
    kw, and L output pixels: 'folded' moves the kernel; 'blocked' only a cached part of it at a
    time, but patches, I * L, unless they are the pixels themselves; 'shared' scales both maps.
    The first of equals is chosen.
    """
    height, width = output_size(input_shape, weight_shape, stride, padding, dilation)
    out_channels, inner, pixels = weight_shape[1], math.prod(weight_shape[2:]), height * width
    costs = {}
    if groups == 1 and is_pointwise(weight_shape, stride, padding):
        costs['blocked'] = out_channels * inner
    elif groups == 1 and min(height, width) > 0:  # else conv2d refuses it, and says why
        costs['blocked'] = PATCH_COST * inner * pixels
    costs['folded'] = out_channels * inner
    if kernel_is_shared:
        costs['shared'] = MAP_COST * (math.prod(input_shape[1:]) + out_channels * pixels)
    return costs


def _empty_batch(input, weight, a, s, c, f, stride, padding, dilation, groups) -> Tensor:
    # No image has a kernel, yet every argument must stay in the graph: under DDP a rank with an
    # empty batch would otherwise leave the others waiting for its gradients.
    output = F.conv2d(input, weight.sum(0).to(input.dtype), None, stride, padding, dilation, groups)
    for attention in (a, s, c, f):
        if attention is not None:
            output = output + attention.sum()
    return output


def _pair(name: str, value: Size2d, smallest: int) -> Tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    pair = pair * 2 if len(pair) == 1 else pair
    if len(pair) != 2 or min(pair) < smallest:
        raise ValueError(f'{name} must be one or two numbers of at least {smallest}, got {value}')
    return pair


def _resolve_padding(input, weight, stride, padding, dilation) -> Tuple[Tensor, Tuple[int, int]]:
    """Numbers for 'same' and 'valid', as nn.Conv2d reads them; an odd 'same' pads the input."""
    if padding == 'valid':
        return input, (0, 0)
    if padding != 'same':
        if isinstance(padding, str):
            raise ValueError(f"padding must be numbers, 'same' or 'valid', got {padding!r}")
        return input, _pair('padding', padding, 0)
    if stride != (1, 1):
        raise ValueError(f"padding='same' needs stride 1, got {stride}")
    totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[3:])]
    if all(total % 2 == 0 for total in totals):
        return input, tuple(total // 2 for total in totals)
    before = [total // 2 for total in totals]
    after = [total - first for total, first in zip(totals, before)]
    return F.pad(input, (before[1], after[1], before[0], after[0])), (0, 0)


def _check_shapes(input, weight, bias, groups, kernel_attention, spatial_attention,
                  channel_attention, filter_attention) -> None:
    if input.dim() != 4:
        raise ValueError(f'input must be 4-D (B, Cin, H, W), got shape {tuple(input.shape)}')
    if weight.dim() != 5:
        raise ValueError('weight must be a 5-D bank (n, Cout, Cin / groups, kh, kw), got shape '
                         f'{tuple(weight.shape)}')
    batch, in_channels = input.shape[:2]
    bank_size, out_channels, group_channels, *kernel_size = weight.shape
    if in_channels != group_channels * groups:
        raise ValueError(f'weight of shape {tuple(weight.shape)} with groups={groups} needs an '
                         f'input of {group_channels * groups} channels, got {in_channels}')
    if out_channels % groups:
        raise ValueError(f'weight of shape {tuple(weight.shape)} has {out_channels} output '
                         f'channels, which groups={groups} do not divide')
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f'bias must have shape {(out_channels,)}, got {tuple(bias.shape)}')
    if bank_size > 1 and kernel_attention is None:
        raise ValueError(f'a bank of {bank_size} kernels needs kernel_attention of shape '
                         f'{(batch, bank_size)}, got None')
    expected = dict(
        kernel_attention=(kernel_attention, (batch, bank_size)),
        spatial_attention=(spatial_attention, (batch, *kernel_size)),
        channel_attention=(channel_attention, (batch, in_channels)),
        filter_attention=(filter_attention, (batch, out_channels)))
    for name, (attention, shape) in expected.items():
        if attention is not None and attention.shape != shape:
            raise ValueError(f'{name} must have shape {shape}, got {tuple(attention.shape)}')
