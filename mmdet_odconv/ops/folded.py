"""Plan: one kernel per image, folded whole, and the convolution of each image with its own.

Best where the maps are larger than the kernels: then folding all attentions into the kernels costs
next to nothing, the maps are read by the convolution alone, and that is the one that a static
layer would run. Of the forward pass only the input and the attentions are kept; the kernels are
mixed again in the backward pass.
"""
from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor

from .convolution import convolution_gradients, convolve_images
from .kernels import (
    ALL,
    KernelGradients,
    as_matrices,
    mix_and_fold,
    part,
    row_blocks,
    slices,
)

# Kernels that are convolved with at once, in bytes: larger ones would be allocated anew each time,
# and a page of memory costs more when it is first touched than to be written ten times.
CHUNK_BYTES = 2**24


def forward(input, weight, kernel_attention, spatial_attention, channel_attention,
            filter_attention, stride, padding, dilation, groups) -> Tuple[Tensor, None]:
    """See :class:`~mmdet_odconv.ops.autograd.Planned`."""
    bank, gate, f = as_matrices(weight, spatial_attention, channel_attention, filter_attention,
                                groups)
    outputs = []
    for images in chunks(bank, len(input)):
        some = part(input, images)
        _, kernels = mix_and_fold(bank, part(kernel_attention, images), part(gate, images),
                                  part(f, images), len(some))
        outputs.append(convolve_images(some, as_kernels(kernels, weight), stride, padding,
                                       dilation, groups))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs), None


def backward(grad, saved, needs, stride, padding, dilation, groups
             ) -> Tuple[Optional[Tensor], ...]:
    """See :class:`~mmdet_odconv.ops.autograd.Planned`."""
    input, weight, a, s, c, f, _ = saved
    bank, gate, row_f = as_matrices(weight, s, c, f, groups)
    gradients = KernelGradients(bank, a, gate, row_f, len(input), needs[1])
    grad_inputs = []
    for images in chunks(bank, len(input)):
        some = part(input, images)
        mixed, kernels = mix_and_fold(bank, part(a, images), part(gate, images),
                                      part(row_f, images), len(some), keep_mixed=True)
        grad_input, grad_kernels = convolution_gradients(
            part(grad, images), some, as_kernels(kernels, weight), stride, padding, dilation,
            groups, needs[0], any(needs[1:]))
        grad_inputs.append(grad_input)
        if grad_kernels is not None:
            grad_kernels = grad_kernels.contiguous().view(kernels.shape)
            for rows in row_blocks(bank, len(kernels)):
                gradients.add(rows, images, part(grad_kernels, ALL, rows), part(mixed, ALL, rows))
    grad_input = None
    if needs[0]:
        grad_input = grad_inputs[0] if len(grad_inputs) == 1 else torch.cat(grad_inputs)
    return (grad_input, *gradients.of(weight, s, c, f))


def chunks(bank: Tensor, batch: int) -> Sequence[slice]:
    """Slices of images whose kernels are of CHUNK_BYTES; all images elsewhere than on a CPU."""
    if bank.device.type != 'cpu':
        return slices(batch, batch)
    return slices(batch, CHUNK_BYTES // (bank[0].numel() * bank.element_size()))


def as_kernels(matrices: Tensor, weight: Tensor) -> Tensor:
    """(B, groups, rows, I) -> (B, Cout, Cin / groups, kh, kw)."""
    return matrices.view(-1, *weight.shape[1:])
