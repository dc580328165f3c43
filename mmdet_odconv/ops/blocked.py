"""Plan: matrix products, a block of output channels at a time.

Where the kernels are larger than the maps, mixing B of them costs more memory traffic than the
convolution itself. Here a block of rows of all B kernels is mixed, used and forgotten while it is
in the processor's cache: the bank is read once and no image's kernel ever exists whole. The
channel and spatial attentions scale the patches, which are smaller than the kernels, and the
filter attention scales the output.
"""
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .folded import differentiable_gradients

# Mixed rows of all images, in bytes: what a core's second-level cache holds with room to spare.
BLOCK_BYTES = 2**22

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
        size = output_size(input, weight, stride, padding, dilation)
        columns = patches(input, weight, stride, padding, dilation)
        gate = column_gate(weight, spatial_attention, channel_attention)
        if gate is not None:
            columns = columns * gate
        bank = weight.flatten(2)
        if kernel_attention is None:
            output = bank[0] @ columns
        else:
            output = columns.new_empty(len(input), bank.shape[1], columns.shape[2])
            for rows in row_blocks(bank, len(input)):
                torch.bmm(mix_rows(bank, kernel_attention, rows), columns, out=output[:, rows])
        if filter_attention is not None:
            output *= filter_attention[:, :, None]
        return output.view(len(input), -1, *size)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            return (*differentiable_gradients(ctx, grad, *ctx.geometry, 1), None, None, None)
        input, weight, a, s, c, f = ctx.saved_tensors
        geometry = ctx.geometry
        batch, bank = len(input), weight.flatten(2)
        grad = grad.reshape(batch, bank.shape[1], -1)
        raw_columns = patches(input, weight, *geometry)
        gate = column_gate(weight, s, c)
        columns = raw_columns if gate is None else raw_columns * gate
        needs_input = ctx.needs_input_grad[0] or gate is not None
        needs_kernels = any(ctx.needs_input_grad[i] for i in (1, 2, 5))
        scaled = grad if f is None else grad * f[:, :, None]
        # A map this small costs less to compute again than a pass over all kernels for f's sake.
        recompute = f is not None and columns.shape[2] < RECOMPUTED_PIXELS
        shared = a is None and (f is None or recompute)
        grad_columns = None
        if needs_input:
            grad_columns = bank[0].mT @ scaled if a is None else torch.zeros_like(columns)
        grad_bank = bank.new_empty(bank.shape) if ctx.needs_input_grad[1] else None
        grad_a = None if a is None else torch.zeros_like(a)
        grad_f = None if f is None else torch.empty_like(f)
        if shared and needs_kernels:
            if f is not None:
                grad_f = (grad * (bank[0] @ columns)).sum(-1)
            if grad_bank is not None:
                torch.mm(scaled.transpose(0, 1).flatten(1), columns.transpose(0, 1).flatten(1).mT,
                         out=grad_bank[0])
        for rows in () if shared else row_blocks(bank, batch):
            kernels = mix_rows(bank, a, rows)
            if needs_input and a is not None:
                grad_columns.baddbmm_(kernels.mT, scaled[:, rows])
            if not needs_kernels:
                continue
            if f is None or recompute:
                grad_kernels = scaled[:, rows] @ columns.mT
            else:
                grad_kernels = grad[:, rows] @ columns.mT
            if recompute:
                grad_f[:, rows] = (grad[:, rows] * (kernels @ columns)).sum(-1)
            elif f is not None:
                # Before it is scaled by f: no gradient is ever divided by an attention.
                grad_f[:, rows] = torch.linalg.vecdot(grad_kernels, kernels)
                grad_kernels *= f[:, rows, None]
            if a is None:
                if grad_bank is not None:
                    torch.sum(grad_kernels, 0, out=grad_bank[0, rows])
                continue
            flat = grad_kernels.flatten(1)
            if grad_bank is not None:
                torch.mm(a.mT, flat, out=grad_bank[:, rows].flatten(1))
            grad_a.addmm_(flat, bank[:, rows].flatten(1).mT)
        grad_s = grad_c = None
        if gate is not None:
            grad_gate = (grad_columns * raw_columns).sum(-1).view(batch, *weight.shape[2:])
            if s is not None:
                channels = 1 if c is None else c[:, :, None, None]
                grad_s = (grad_gate * channels).sum(1)
            if c is not None:
                spatial = 1 if s is None else s[:, None]
                grad_c = (grad_gate * spatial).sum((2, 3))
            grad_columns *= gate
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad_input = patches_gradient(grad_columns, input, weight, *geometry)
        grad_weight = None if grad_bank is None else grad_bank.view_as(weight)
        return grad_input, grad_weight, grad_a, grad_s, grad_c, grad_f, None, None, None


def row_blocks(bank: Tensor, batch: int):
    """Slices of output channels whose kernels, for all images, fit the cache."""
    out_channels, columns = bank.shape[1:]
    rows = max(8, BLOCK_BYTES // (batch * columns * bank.element_size()))
    return (slice(first, min(first + rows, out_channels)) for first in range(0, out_channels, rows))


def mix_rows(bank: Tensor, kernel_attention: Optional[Tensor], rows: slice) -> Tensor:
    """Rows of the kernels of all images, (B, r, Cin * kh * kw), or (1, r, ...) of a bank of one."""
    if kernel_attention is None:
        return bank[:, rows]
    mixed = kernel_attention @ bank[:, rows].flatten(1)
    return mixed.view(len(kernel_attention), -1, bank.shape[2])


def column_gate(weight: Tensor, s: Optional[Tensor], c: Optional[Tensor]) -> Optional[Tensor]:
    """c and s as one factor of the patches, (B, Cin * kh * kw, 1)."""
    if s is None and c is None:
        return None
    factors = 1
    if c is not None:
        factors = c[:, :, None, None]
    if s is not None:
        factors = factors * s[:, None]
    return factors.expand(-1, *weight.shape[2:]).flatten(1)[:, :, None]


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
