"""Plan: matrix products, a block of output channels at a time.

Where the kernels are larger than the maps, mixing B of them costs more memory traffic than the
convolution itself. Here a block of rows of all B kernels is mixed, used and forgotten while it is
in the processor's cache: the bank is read once and no image's kernel ever exists whole. The
attentions of the input scale the patches or the kernels, the filter attention the output or the
kernels, whichever are fewer.
"""
from typing import Iterator, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels as making
from .convolution import is_pointwise, output_size
from .kernels import (
    ALL,
    KernelGradients,
    as_matrices,
    fold,
    gate_gradients,
    mix,
    part,
    row_blocks,
    slices,
    sum_dtype,
)

# Images of a block where all do not fit: fewer mean more rows, which multiply faster, but more
# reads of the bank's rows.
FEWEST_IMAGES = 4

# Output pixels below which an output is kept for its filter attention's gradient, which would else
# be a pass over the mixed kernels, many times larger.
KEPT_PIXELS = 96


def forward(input, weight, kernel_attention, spatial_attention, channel_attention,
            filter_attention, stride, padding, dilation, groups
            ) -> Tuple[Tensor, Optional[Tensor]]:
    """For groups=1; see :class:`~mmdet_odconv.ops.autograd.Planned`."""
    if groups != 1:
        raise ValueError(f"plan 'blocked' is for groups=1, got {groups}")
    a, batch = kernel_attention, len(input)
    columns = patches(input, weight, stride, padding, dilation)
    bank, all_gate, all_f = as_matrices(weight, spatial_attention, channel_attention,
                                        filter_attention, 1)
    column_gate, output_factor, gate, f = where_to_scale(all_gate, all_f, columns, bank)
    if column_gate is not None:
        columns = columns * column_gate
    output = columns.new_empty(batch, bank.shape[2], columns.shape[2])
    for rows, images in blocks(bank, batch):
        some_columns = part(columns, images)
        kernels = mix(part(bank, ALL, rows), part(a, images), len(some_columns))
        kernels = fold(kernels, part(gate, images), part(f, images, rows),
                       None if a is None else kernels)
        torch.bmm(kernels.squeeze(1), some_columns, out=output[images, rows])
    kept = None
    if output_factor is not None:
        if output.shape[2] < KEPT_PIXELS:
            kept, output = output, output * output_factor
        else:
            output *= output_factor
    size = output_size(input.shape, weight.shape, stride, padding, dilation)
    return output.view(batch, -1, *size), kept


def backward(grad, saved, needs, stride, padding, dilation, groups
             ) -> Tuple[Optional[Tensor], ...]:
    """See :class:`~mmdet_odconv.ops.autograd.Planned`."""
    input, weight, a, s, c, f, unscaled = saved
    geometry, batch = (stride, padding, dilation), len(input)
    grad = grad.reshape(batch, weight.shape[1], -1)
    raw_columns = patches(input, weight, *geometry)
    bank, all_gate, all_f = as_matrices(weight, s, c, f, 1)
    column_gate, output_factor, gate, row_f = where_to_scale(all_gate, all_f, raw_columns, bank)
    columns = raw_columns if column_gate is None else raw_columns * column_gate
    needs_columns = needs[0] or column_gate is not None
    needs_kernels = needs[1] or needs[2] or needs[5] or gate is not None
    grad_f = None
    if unscaled is not None:
        grad_f = (grad * unscaled).sum(-1, dtype=sum_dtype(grad.dtype))
        grad, output_factor, all_f = grad * output_factor, None, None
    gradients = KernelGradients(bank, a, gate, all_f, batch, needs[1])
    grad_columns = torch.empty_like(columns) if needs_columns else None
    for rows, images in blocks(bank, batch):
        some_columns = part(columns, images)
        mixed = mix(part(bank, ALL, rows), part(a, images), len(some_columns))
        scaled = grad_rows = grad[images, rows]
        if output_factor is not None:
            scaled = grad_rows * output_factor[images, rows]
        if needs_columns:
            kernels = fold(mixed, part(gate, images), part(row_f, images, rows)).squeeze(1)
            part(grad_columns, images).baddbmm_(kernels.mT, scaled, beta=int(bool(rows.start)))
        if needs_kernels:
            # Before it is scaled by f: no gradient is ever divided by an attention.
            grad_kernels = grad_rows @ some_columns.mT
            gradients.add(rows, images, grad_kernels[:, None], mixed)
    grad_weight, grad_a, grad_s, grad_c, folded_grad_f = gradients.of(
        weight, s, c, None if all_f is None else f)
    if column_gate is not None:
        grad_gate = (grad_columns * raw_columns).sum(-1, dtype=sum_dtype(grad.dtype))
        grad_s, grad_c = gate_gradients(grad_gate, weight, s, c)
        grad_columns *= column_gate
    grad_input = patches_gradient(grad_columns, input, weight, *geometry) if needs[0] else None
    return (grad_input, grad_weight, grad_a, grad_s, grad_c,
            folded_grad_f if grad_f is None else grad_f)


def blocks(bank: Tensor, batch: int) -> Iterator[Tuple[slice, slice]]:
    """Rows, and images within them, whose kernels fit the cache."""
    kernel_bytes = bank[0].numel() * bank.element_size()
    images = min(batch, max(FEWEST_IMAGES, making.BLOCK_BYTES // kernel_bytes))
    for rows in row_blocks(bank, images):
        for block in slices(batch, images):
            yield rows, block


def where_to_scale(gate: Optional[Tensor], f: Optional[Tensor], columns: Tensor, bank: Tensor):
    """Each factor, or None: gate of the patches, f of the output, gate and f of the kernels.

    Kernels are (rows, I), patches (I, L), outputs (rows, L): the smaller of two is scaled.
    """
    rows, inner, pixels = *bank.shape[2:], columns.shape[2]
    column_gate = output_factor = None
    if gate is not None and pixels < rows:
        column_gate, gate = gate[:, 0].mT, None
    if f is not None and pixels < inner:
        output_factor, f = f[:, 0, :, None], None
    return column_gate, output_factor, gate, f


def patches(input, weight, stride, padding, dilation) -> Tensor:
    """(B, Cin * kh * kw, L); a view of the input for a 1x1 kernel."""
    if is_pointwise(weight.shape, stride, padding):
        return input.flatten(2)
    return F.unfold(input, weight.shape[3:], dilation, padding, stride)


def patches_gradient(grad_columns, input, weight, stride, padding, dilation) -> Tensor:
    if is_pointwise(weight.shape, stride, padding):
        return grad_columns.view(input.shape)
    return F.fold(grad_columns, input.shape[2:], weight.shape[3:], dilation, padding, stride)
