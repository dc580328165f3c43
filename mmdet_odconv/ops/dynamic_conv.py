"""The one function that every dynamic convolution layer calls."""
import contextlib
import contextvars
import functools
import math
from types import ModuleType
from typing import Callable, Dict, Iterator, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from . import blocked, folded, fused, kernels, shared
from .autograd import Planned, plain_conv2d, run_forward, without_autocast
from .convolution import (
    is_pointwise,
    is_traced,
    machine_of,
    output_size,
    resolve_padding,
    way_costs,
)
from .exported import exported_conv2d, is_exporting
from .machine import Machine
from .published import published_conv2d

Size2d = Union[int, Tuple[int, int]]
ATTENTION_LAUNCHES = 12  # of a forward pass of ODConv's attention


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
    attentions: Tuple[Optional[Tensor], ...] = (
        kernel_attention, spatial_attention, channel_attention, filter_attention)
    traced = is_traced()
    # A traced size has no hash.
    checked = _checked_geometry.__wrapped__ if traced else _checked_geometry
    stride, padding, dilation, widths = checked(
        *(None if t is None else t.shape for t in (input, weight, bias, *attentions)),
        *(n if isinstance(n, (int, str)) else tuple(n) for n in (stride, padding, dilation)),
        groups)
    if widths is not None:
        input = F.pad(input, widths)
    plan = 'plain' if traced else forced_plan() or choose_plan(
        input, weight, stride, padding, dilation, groups, *attentions)
    geometry = stride, padding, dilation, groups
    device = input.device.type
    if device != 'meta' and torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        input, attentions = input.to(dtype), kernels.in_dtype(kernels.sum_dtype(dtype), *attentions)
        if plan != 'fused':
            weight = weight.to(dtype)
        output = without_autocast(device, _run, plan, input, weight, *attentions, *geometry)
    elif is_exporting():  # runtimes join a convolution's own bias, and what follows it, to it
        a, s, c, f = kernels.in_dtype(input.dtype, *attentions)
        return exported_conv2d(input, weight, a, s, c, f, *geometry, bias=bias)
    else:
        output = _run(plan, input, weight, *attentions, *geometry)
    return output if bias is None else output + bias.to(output.dtype)[:, None, None]


# 'plain' is for compilers and torch.func, 'published' for comparison: both are never the cheapest.
PLANS: Dict[str, Optional[ModuleType]] = dict(
    blocked=blocked, folded=folded, fused=fused, shared=shared, plain=None, published=None)
_forced_plan: contextvars.ContextVar[Optional[str]] = contextvars.ContextVar('plan', default=None)


def _run(plan: str, *arguments) -> Tensor:
    input, weight, *attentions = arguments[:6]
    whole: Optional[Callable] = (
        exported_conv2d if is_exporting() else _empty_batch if input.shape[0] == 0 else
        published_conv2d if plan == 'published' else None)
    if whole is not None:
        return whole(input, weight, *kernels.in_dtype(input.dtype, *attentions), *arguments[6:])
    if plan == 'plain':
        return plain_conv2d(*arguments)
    if _needs_gradients(*arguments[:6]):
        return Planned.apply(PLANS[plan], *arguments)
    return run_forward(PLANS[plan], *arguments)[0]


def _needs_gradients(*tensors: Optional[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def forced_plan() -> Optional[str]:
    """The plan of :func:`force_plan`, in this thread, or None."""
    return _forced_plan.get()


def is_published() -> bool:
    """Whether plan 'published', the formulation of the published code, is forced."""
    return forced_plan() == 'published'


@contextlib.contextmanager
def force_plan(plan: str) -> Iterator[None]:
    """Run every :func:`dynamic_conv2d` inside by one plan, in this thread; for tests, benchmarks.

    Raises:
        ValueError: if there is no such plan.
    """
    if plan not in PLANS:
        raise ValueError(f'plan must be one of {sorted(PLANS)}, got {plan!r}')
    token = _forced_plan.set(plan)
    try:
        yield
    finally:
        _forced_plan.reset(token)


def choose_plan(input: Tensor, weight: Tensor, stride, padding, dilation, groups: int,
                *attentions: Optional[Tensor]) -> str:
    """The plan of least :func:`plan_costs`; on CUDA, Triton's in place of 'folded'.

    The attentions are those of kernels, space, channels and filters.
    """
    is_cpu = input.device.type == 'cpu'
    plan = _cheapest_plan(is_cpu, machine_of(input), input.element_size(),
                          _needs_gradients(input, weight, *attentions), input.shape, weight.shape,
                          stride, padding, dilation, groups,
                          attentions[0] is None and attentions[1] is None)
    return 'fused' if plan == 'folded' and not is_cpu and fused.serves(input) else plan


@functools.lru_cache(maxsize=4096)
def _cheapest_plan(*call) -> str:
    costs = plan_costs(*call)
    return min(costs, key=costs.get)


def plan_costs(is_cpu: bool, machine: Machine, element_size: int, training: bool, input_shape,
               weight_shape, stride, padding, dilation, groups: int, kernel_is_shared: bool
               ) -> Dict[str, float]:
    """Seconds that each plan would take for a call, by the machine's roofline.

    With B images, kernels of K elements and L output pixels: 'folded' reads the bank, writes B
    kernels and reads them again; 'blocked' reads the bank alone, but multiplies matrices, and
    patches if the kernel is not 1x1; 'shared' convolves all images at once and scales both maps.
    Training adds a backward pass: twice the flops, the kernels made again and their gradients
    (by 'shared', the output again). Blocks are for the caches of a CPU: elsewhere kernels are made
    by a few calls for all. The first of equals is chosen.
    """
    batch, kernel = input_shape[0], math.prod(weight_shape[1:])
    bank = kernel * weight_shape[0]
    height, width = output_size(input_shape, weight_shape, stride, padding, dilation)
    pixels = height * width
    flops = 2 * batch * kernel * pixels

    def seconds(convolving: float, elements: float, calls: int) -> float:
        return convolving + elements * element_size / machine.bandwidth + calls * machine.overhead

    if kernel_is_shared and min(height, width) <= 0:
        return dict(folded=0.0)  # whose conv2d refuses it, and says why
    ways = way_costs(machine, element_size, input_shape, weight_shape[1:], stride, padding,
                     dilation, groups)
    # Blocks of rows, each mixed and folded by a few calls.
    calls = 3 * (max(1, batch * kernel * element_size // kernels.BLOCK_BYTES) if is_cpu else 1)
    costs = dict(folded=seconds((3 if training else 1) * min(ways.values()),
                                bank + 2 * batch * kernel, calls))
    if training:
        costs['folded'] += seconds(0, 3 * bank + 4 * batch * kernel, 3 * calls)
    if is_cpu and groups == 1 and min(height, width) > 0:
        product, patches = flops / machine.product, 0.0
        if not is_pointwise(weight_shape, stride, padding):
            elements = batch * math.prod(weight_shape[2:]) * pixels
            patches = elements * element_size / machine.patches
        costs['blocked'] = seconds(product + patches, bank, calls)
        if training:
            costs['blocked'] += seconds(2 * (product + patches), 3 * bank, 3 * calls)
    if kernel_is_shared:
        once = flops / machine.convolution
        maps = 2 * (math.prod(input_shape) + batch * weight_shape[1] * pixels)
        costs['shared'] = seconds(once, maps, 3)
        if training:
            costs['shared'] += seconds(3 * once, 2 * maps, 9)
    return costs


def layer_costs(machine: Machine, element_size: int, training: bool, input_shape, weight_shape,
                stride, padding, dilation, groups: int, kernel_is_shared: bool) -> Dict[str, float]:
    """Seconds that a whole layer would take on a GPU, attention included, by the roofline.

    'static' is nn.Conv2d, which takes its flops or the traffic of its maps, whichever is more.
    Beside what it takes, a dynamic layer has what its plan does beyond the same flops, and
    'attention': a read of its input to average it, and launches, as many again for each half of
    the backward pass. 'chosen' is the least.
    """
    passes = 3 if training else 1
    pixels = math.prod(output_size(input_shape, weight_shape, stride, padding, dilation))
    flops = 2 * input_shape[0] * pixels * math.prod(weight_shape[1:])
    read = math.prod(input_shape) * element_size / machine.bandwidth
    written = input_shape[0] * weight_shape[1] * pixels * element_size / machine.bandwidth
    static = passes * (max(flops / machine.convolution, read + written) + machine.overhead)
    attention = read + ATTENTION_LAUNCHES * passes * machine.overhead
    costs = plan_costs(False, machine, element_size, training, input_shape, weight_shape, stride,
                       padding, dilation, groups, kernel_is_shared)
    seconds = {plan: static + attention + max(0, cost - passes * flops / machine.convolution)
               for plan, cost in costs.items()}
    return dict(seconds, chosen=min(seconds.values()), static=static, attention=attention)


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


@functools.lru_cache(maxsize=4096)
def _checked_geometry(input, weight, bias, kernel_attention, spatial_attention, channel_attention,
                      filter_attention, stride, padding, dilation, groups: int):
    """Stride, padding and dilation as pairs, and widths to pad the input by first, or None.

    The first seven arguments are the shapes of ``dynamic_conv2d``'s, None where there is none.
    """
    if len(input) != 4:
        raise ValueError(f'input must be 4-D (B, Cin, H, W), got shape {tuple(input)}')
    if len(weight) != 5:
        raise ValueError('weight must be a 5-D bank (n, Cout, Cin / groups, kh, kw), got shape '
                         f'{tuple(weight)}')
    batch, in_channels = input[:2]
    bank_size, out_channels, group_channels, *kernel_size = weight
    if min(groups, *kernel_size) < 1:
        raise ValueError('groups and the size of the kernel must be at least 1, got '
                         f'groups={groups} and a weight of shape {tuple(weight)}')
    if in_channels != group_channels * groups:
        raise ValueError(f'weight of shape {tuple(weight)} with groups={groups} needs an '
                         f'input of {group_channels * groups} channels, got {in_channels}')
    if out_channels % groups:
        raise ValueError(f'weight of shape {tuple(weight)} has {out_channels} output '
                         f'channels, which groups={groups} do not divide')
    if bias is not None and tuple(bias) != (out_channels,):
        raise ValueError(f'bias must have shape {(out_channels,)}, got {tuple(bias)}')
    if bank_size > 1 and kernel_attention is None:
        raise ValueError(f'a bank of {bank_size} kernels needs kernel_attention of shape '
                         f'{(batch, bank_size)}, got None')
    expected = dict(
        kernel_attention=(kernel_attention, (batch, bank_size)),
        spatial_attention=(spatial_attention, (batch, *kernel_size)),
        channel_attention=(channel_attention, (batch, in_channels)),
        filter_attention=(filter_attention, (batch, out_channels)))
    for name, (found, shape) in expected.items():
        if found is not None and tuple(found) != shape:
            raise ValueError(f'{name} must have shape {shape}, got {tuple(found)}')
    stride, dilation = _pair('stride', stride, 1), _pair('dilation', dilation, 1)
    if isinstance(padding, str):
        padding, widths = resolve_padding(kernel_size, stride, padding, dilation)
        return stride, padding, dilation, widths
    return stride, _pair('padding', padding, 0), dilation, None
