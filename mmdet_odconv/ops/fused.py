"""Plan: as 'folded', with kernels folded and their gradients gathered by Triton, on CUDA.

The bank is read once in the forward pass and once in the backward pass, in the dtype in which it
is kept: under autocast it is never cast as a whole.
"""
import functools
import warnings
from typing import Optional, Tuple

import torch
from torch import Tensor

from .convolution import convolution_gradients, convolve_images

takes_any_dtype = True


def forward(input, weight, kernel_attention, spatial_attention, channel_attention,
            filter_attention, stride, padding, dilation, groups) -> Tuple[Tensor, None]:
    """See :class:`~mmdet_odconv.ops.autograd.Planned`."""
    from .triton_kernels import fold_kernels
    kernels = fold_kernels(weight, kernel_attention, spatial_attention, channel_attention,
                           filter_attention, groups, len(input), input.dtype)
    return convolve_images(input, kernels, stride, padding, dilation, groups), None


def backward(grad, saved, needs, stride, padding, dilation, groups
             ) -> Tuple[Optional[Tensor], ...]:
    """See :class:`~mmdet_odconv.ops.autograd.Planned`."""
    from .triton_kernels import fold_kernels, fold_kernels_backward
    input, weight, a, s, c, f, _ = saved
    kernels = fold_kernels(weight, a, s, c, f, groups, len(input), input.dtype)
    grad_input, grad_kernels = convolution_gradients(
        grad, input, kernels, stride, padding, dilation, groups, needs[0], any(needs[1:]))
    if grad_kernels is None:
        return (grad_input, *[None] * 5)
    grads = fold_kernels_backward(grad_kernels.contiguous(), weight, a, s, c, f, groups, needs[1])
    return (grad_input, *grads)


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
