"""Plan: one convolution of all images with the one kernel of the bank, between scaled maps.

For a bank of one without spatial attention: the channel attention scales the input and the filter
attention the output. Best where the maps are smaller than the kernels that they would else need.
"""
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import sum_dtype


def forward(input, weight, kernel_attention, spatial_attention, channel_attention,
            filter_attention, *geometry) -> Tuple[Tensor, None]:
    """See :class:`~mmdet_odconv.ops.autograd.Planned`."""
    if kernel_attention is not None or spatial_attention is not None:
        found = 'kernel' if spatial_attention is None else 'spatial'
        raise ValueError("plan 'shared' is for a bank of one kernel without attention of its own, "
                         f'got {len(weight)} with {found}_attention')
    output = F.conv2d(scale(input, channel_attention), weight[0], None, *geometry)
    if filter_attention is not None:
        output.mul_(over_maps(filter_attention))
    return output, None


def backward(grad, saved, needs, stride, padding, dilation, groups
             ) -> Tuple[Optional[Tensor], ...]:
    """See :class:`~mmdet_odconv.ops.autograd.Planned`."""
    input, weight, _, _, c, f, _ = saved
    scaled, kernel = scale(input, c), weight[0]
    grad_c = grad_f = None
    if f is not None:
        # Computed again: kept, it would double the memory that the layer's output takes.
        output = F.conv2d(scaled, kernel, None, stride, padding, dilation, groups)
        grad_f = (grad * output).sum((2, 3), dtype=sum_dtype(grad.dtype))
        grad = grad * over_maps(f)
    grad_input, grad_kernel, _ = torch.ops.aten.convolution_backward(
        grad, scaled, kernel, None, stride, padding, dilation, False, [0, 0], groups,
        [needs[0] or c is not None, needs[1], False])
    if c is not None:
        grad_c = (grad_input * input).sum((2, 3), dtype=sum_dtype(grad.dtype))
        grad_input.mul_(over_maps(c))
    return (grad_input, None if grad_kernel is None else grad_kernel[None], None, None, grad_c,
            grad_f)


def scale(maps, attention):
    return maps if attention is None else maps * over_maps(attention)


def over_maps(attention):
    return attention[:, :, None, None]
