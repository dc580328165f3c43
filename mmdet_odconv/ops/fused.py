"""Plan: as 'folded', with kernels folded and their gradients gathered by Triton, on CUDA.

The bank is read once in the forward pass and once in the backward pass, in the dtype in which it
is kept: under autocast it is never cast as a whole.
"""
import functools
import warnings

import torch
from torch import Tensor

from .folded import as_in_forward, convolution_gradients, convolve, differentiable_gradients, own


class FusedConv(torch.autograd.Function):
    """Forward and backward of the plan; see :func:`~mmdet_odconv.ops.dynamic_conv2d`."""

    @staticmethod
    def forward(ctx, input, weight, kernel_attention, spatial_attention, channel_attention,
                filter_attention, stride, padding, dilation, groups):
        from .triton_kernels import fold_kernels
        ctx.save_for_backward(input, weight, kernel_attention, spatial_attention,
                              channel_attention, filter_attention)
        ctx.geometry = stride, padding, dilation, groups
        kernels = fold_kernels(weight, kernel_attention, spatial_attention, channel_attention,
                               filter_attention, groups, len(input), input.dtype)
        return own(convolve(input, kernels.flatten(0, 1), *ctx.geometry))

    @staticmethod
    @as_in_forward
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            return (*differentiable_gradients(ctx, grad, *ctx.geometry), None, None, None, None)
        from .triton_kernels import fold_kernels, fold_kernels_backward
        input, weight, *attentions = ctx.saved_tensors
        groups = ctx.geometry[-1]
        needs_kernels = any(ctx.needs_input_grad[1:6])
        kernels = fold_kernels(weight, *attentions, groups, len(input), input.dtype)
        grad_input, grad_kernels = convolution_gradients(
            grad, input, kernels.flatten(0, 1), *ctx.geometry, ctx.needs_input_grad[0],
            needs_kernels)
        if not needs_kernels:
            return (grad_input, *[None] * 9)
        grads = fold_kernels_backward(grad_kernels.view(kernels.shape), weight, *attentions,
                                      groups, ctx.needs_input_grad[1])
        return (grad_input, *grads, None, None, None, None)


def serves(input: Tensor) -> bool:
    """Whether Triton is there and runs on the input's device."""
    if not input.is_cuda or type(input) is not Tensor:
        return False  # a fake tensor has no memory for Triton to read
    return _works_on(input.device)


@functools.cache
def _works_on(device: torch.device) -> bool:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability(device) < (8, 0):
        return False  # no bfloat16 before
    try:
        from . import triton_kernels
    except ImportError:
        return False
    try:
        triton_kernels.fold_kernels(torch.ones(1, 1, 1, 1, 1, device=device), None, None, None,
                                    None, 1, 1, torch.float32)
    except Exception as error:
        # An image without a C compiler, say, which Triton needs to launch its kernels.
        warnings.warn(f'Triton fails on {device}, so slower plain operations replace its kernels '
                      f'({error}). Repair Triton, or uninstall it.', stacklevel=2)
        return False
    return True
