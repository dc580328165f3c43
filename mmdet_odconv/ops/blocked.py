"""Plan: matrix products, a block of output channels at a time.

Where the kernels are larger than the maps, mixing B of them costs more memory traffic than the
convolution itself. Here a block of rows of all B kernels is mixed, used and forgotten while it is
in the processor's cache: the bank is read once and no image's kernel ever exists whole. The
attentions of the input scale the patches or the kernels, the filter attention the output or the
kernels, whichever are fewer.
"""
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .folded import (KernelGradients, as_matrices, differentiable_gradients, fold, gate_gradients,
                     mix, row_blocks)

# Output pixels below which computing the output again beats two passes over the mixed kernels.
RECOMPUTED_PIXELS = 96


class BlockedConv(torch.autograd.Function):
    """Forward and backward of the plan, for groups=1; see ``dynamic_conv2d``."""

    @staticmethod
    def forward(ctx, input, weight, kernel_attention, spatial_attention, channel_attention,
                filter_attention, stride, padding, dilation):
        ctx.save_for_backward(input, weight, kernel_attention, spatial_attention,
                              channel_attention, filter_attention)
        ctx.geometry = stride, padding, dilation
        a, batch = kernel_attention, len(input)
        columns = patches(input, weight, stride, padding, dilation)
        bank, *factors = as_matrices(weight, spatial_attention, channel_attention,
                                     filter_attention, 1)
        column_gate, output_factor, gate, f = where_to_scale(*factors, columns, bank)
        if column_gate is not None:
            columns = columns * column_gate
        output = columns.new_empty(batch, bank.shape[2], columns.shape[2])
        for rows in row_blocks(bank, batch):
            kernels = mix(bank[:, :, rows], a, batch)
            kernels = fold(kernels, gate, None if f is None else f[:, :, rows], a is not None)
            torch.bmm(kernels[:, 0], columns, out=output[:, rows])
        if output_factor is not None:
            output *= output_factor
        size = output_size(input, weight, stride, padding, dilation)
        return output.view(batch, -1, *size)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            return (*differentiable_gradients(ctx, grad, *ctx.geometry, 1), None, None, None)
        input, weight, a, s, c, f = ctx.saved_tensors
        batch = len(input)
        grad = grad.reshape(batch, weight.shape[1], -1)
        raw_columns = patches(input, weight, *ctx.geometry)
        bank, all_gate, all_f = as_matrices(weight, s, c, f, 1)
        column_gate, output_factor, gate, row_f = where_to_scale(all_gate, all_f, raw_columns, bank)
        columns = raw_columns if column_gate is None else raw_columns * column_gate
        needs_columns = ctx.needs_input_grad[0] or column_gate is not None
        needs_kernels = any(ctx.needs_input_grad[i] for i in (1, 2, 5)) or gate is not None
        # A map this small costs less to compute again than a pass over all kernels for f's sake.
        recompute = output_factor is not None and columns.shape[2] < RECOMPUTED_PIXELS
        grad_f = torch.empty_like(f) if recompute else None
        gradients = KernelGradients(bank, a, gate, None if recompute else all_f, batch,
                                    ctx.needs_input_grad[1]) if needs_kernels else None
        grad_columns = None
        for rows in row_blocks(bank, batch):
            mixed = mix(bank[:, :, rows], a, batch)
            kernels = fold(mixed, gate, None if row_f is None else row_f[:, :, rows])[:, 0]
            grad_rows = grad[:, rows]
            scaled = grad_rows if output_factor is None else grad_rows * output_factor[:, rows]
            if needs_columns:
                grad_columns = (kernels.mT @ scaled if grad_columns is None else
                                grad_columns.baddbmm_(kernels.mT, scaled))
            if recompute:
                grad_f[:, rows] = (grad_rows * (kernels @ columns)).sum(-1)
            if needs_kernels:
                # Before it is scaled by f: no gradient is ever divided by an attention.
                grad_kernels = (scaled if recompute else grad_rows) @ columns.mT
                gradients.add(rows, grad_kernels[:, None], mixed)
        grads = (None, ) * 5
        if needs_kernels:
            grads = gradients.of(weight, s, c, None if recompute else f)
        grad_weight, grad_a, grad_s, grad_c, folded_grad_f = grads
        if column_gate is not None:
            grad_gate = (grad_columns * raw_columns).sum(-1)
            grad_s, grad_c = gate_gradients(grad_gate, weight, s, c)
            grad_columns *= column_gate
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad_input = patches_gradient(grad_columns, input, weight, *ctx.geometry)
        return (grad_input, grad_weight, grad_a, grad_s, grad_c,
                grad_f if recompute else folded_grad_f, None, None, None)


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


def output_size(input, weight, stride, padding, dilation):
    """Height and width of the output, px."""
    return tuple(max(0, size + 2 * p - d * (k - 1) - 1 + st) // st for size, k, st, p, d in zip(
        input.shape[2:], weight.shape[3:], stride, padding, dilation))


def is_pointwise(weight, stride, padding) -> bool:
    """Whether the patches are the pixels themselves."""
    return tuple(weight.shape[3:]) == (1, 1) and not any(padding) and tuple(stride) == (1, 1)


def patches(input, weight, stride, padding, dilation) -> Tensor:
    """(B, Cin * kh * kw, L); a view of the input for a 1x1 kernel."""
    if is_pointwise(weight, stride, padding):
        return input.flatten(2)
    return F.unfold(input, weight.shape[3:], dilation, padding, stride)


def patches_gradient(grad_columns, input, weight, stride, padding, dilation) -> Tensor:
    if is_pointwise(weight, stride, padding):
        return grad_columns.view(input.shape)
    return F.fold(grad_columns, input.shape[2:], weight.shape[3:], dilation, padding, stride)
