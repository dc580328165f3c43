"""Plans in autograd: what all their forward and backward passes share."""
import functools
from types import ModuleType
from typing import Callable, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .convolution import convolve_images
from .kernels import folded_kernels, in_dtype


def as_in_forward(backward: Callable) -> Callable:
    """A backward pass in the dtypes of its forward pass, wherever autocast is on by then."""

    @functools.wraps(backward)
    def run(ctx, grad):
        return without_autocast(grad.device.type, backward, ctx, grad)

    return run


def without_autocast(device_type: str, function: Callable, *arguments):
    """``function`` of these arguments, in their own dtypes."""
    if device_type == 'meta' or not torch.is_autocast_enabled(device_type):
        return function(*arguments)
    with torch.autocast(device_type, enabled=False):
        return function(*arguments)


class Planned(torch.autograd.Function):
    """``dynamic_conv2d`` by a plan, of whose forward pass only the arguments are kept.

    A plan is a module of two functions. ``forward`` takes the first ten arguments of
    ``dynamic_conv2d`` without its bias, (input, weight, kernel, spatial, channel and filter
    attention, stride, padding, dilation, groups), and returns the output and what else the
    backward pass needs, or None. ``backward`` takes the output's gradient, those tensors, which of
    the six need a gradient, and the geometry; it returns the six gradients. Both are given
    attentions of the input's dtype, but for a plan that ``takes_any_dtype``.
    """

    @staticmethod
    def forward(ctx, plan: ModuleType, *arguments):
        output, kept = run_forward(plan, *arguments)
        ctx.save_for_backward(*arguments[:6], kept)
        ctx.plan, ctx.geometry = plan, arguments[6:]
        # The same values, no view to autograd: it refuses to change a Function's views in place.
        return torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    @as_in_forward
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[1:7]
        if torch.is_grad_enabled():
            grads = differentiable_gradients(lambda *tensors: plain_conv2d(*tensors, *ctx.geometry),
                                             ctx.saved_tensors[:6], needs, grad)
        else:
            *tensors, kept = ctx.saved_tensors
            saved = (*_as_taken(ctx.plan, *tensors), kept)
            grads = ctx.plan.backward(grad, saved, needs, *ctx.geometry)
        return (None, *grads, None, None, None, None)


def run_forward(plan: ModuleType, *arguments) -> Tuple[Tensor, Optional[Tensor]]:
    """The forward pass of a plan: see :class:`Planned`."""
    return plan.forward(*_as_taken(plan, *arguments[:6]), *arguments[6:])


def _as_taken(plan: ModuleType, input: Tensor, weight: Tensor, *attentions: Optional[Tensor]):
    if getattr(plan, 'takes_any_dtype', False):
        return input, weight, *attentions
    return (input, weight, *in_dtype(input.dtype, *attentions))


def differentiable_gradients(function: Callable[..., Tensor], tensors: Sequence[Optional[Tensor]],
                             needs: Sequence[bool], grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    """Gradients of ``function(*tensors)``, themselves differentiable: for create_graph=True.

    Args:
        function: in operations that autograd sees through.
        tensors: its arguments, as a Function's forward pass saved them.
        needs: which of them need a gradient.
        grad: of what ``function`` returns.
    """
    # Aliases: they may depend on one another by a path that autograd also takes.
    tensors = [None if t is None else t.view_as(t) for t in tensors]
    wanted = [tensor for tensor, needed in zip(tensors, needs) if needed]
    found = iter(torch.autograd.grad(function(*tensors), wanted, grad, create_graph=True,
                                     allow_unused=True))
    return tuple(next(found) if needed else None for needed in needs)


def plain_conv2d(input, weight, kernel_attention, spatial_attention, channel_attention,
                 filter_attention, stride, padding, dilation, groups) -> Tensor:
    """``dynamic_conv2d`` in operations that autograd, compilers and torch.func see through."""
    kernels = folded_kernels(input, weight, kernel_attention, spatial_attention,
                             channel_attention, filter_attention, groups)
    return convolve_images(input, kernels.view(-1, *weight.shape[1:]), stride, padding, dilation,
                           groups)
