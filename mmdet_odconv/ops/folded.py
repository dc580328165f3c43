"""Plan: one kernel per image, folded whole, and one convolution grouped by image.

The images lie side by side as channels, (1, B * Cin, H, W), which moves no data. Best where the
maps are larger than the kernels: then folding all attentions into the kernels costs next to
nothing and the maps are read by the convolution alone. Of the forward pass only the input and the
attentions are kept; the kernels are mixed again in the backward pass.
"""
from typing import Iterator, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Kernel rows that are worked on at once, for all images, in bytes: what the second-level caches of
# a few cores hold. Larger intermediates would travel to memory and back between two operations.
BLOCK_BYTES = 2**22


def folded_conv2d(input, weight, kernel_attention, spatial_attention, channel_attention,
                  filter_attention, stride, padding, dilation, groups) -> Tensor:
    """The plan in operations that autograd and torch.compile see through."""
    bank, gate, f = as_matrices(weight, spatial_attention, channel_attention, filter_attention,
                                groups)
    kernels = fold(mix(bank, kernel_attention, len(input)), gate, f)
    return convolve(input, as_kernels(kernels, weight), stride, padding, dilation, groups)


class FoldedConv(torch.autograd.Function):
    """Forward and backward of the plan; see :func:`~mmdet_odconv.ops.dynamic_conv2d`."""

    @staticmethod
    def forward(ctx, input, weight, kernel_attention, spatial_attention, channel_attention,
                filter_attention, stride, padding, dilation, groups):
        ctx.save_for_backward(input, weight, kernel_attention, spatial_attention,
                              channel_attention, filter_attention)
        ctx.geometry = stride, padding, dilation, groups
        bank, gate, f = as_matrices(weight, spatial_attention, channel_attention,
                                    filter_attention, groups)
        kernels = fold_whole(bank, kernel_attention, gate, f, len(input))
        return convolve(input, as_kernels(kernels, weight), stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            return (*differentiable_gradients(ctx, grad, *ctx.geometry), None, None, None, None)
        input, weight, a, s, c, f = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        bank, gate, row_f = as_matrices(weight, s, c, f, groups)
        kernels = fold_whole(bank, a, gate, row_f, len(input))
        needs_kernels = any(ctx.needs_input_grad[1:6])
        grad_input, grad_kernels, _ = torch.ops.aten.convolution_backward(
            images_as_channels(grad), images_as_channels(input), as_kernels(kernels, weight),
            None, stride, padding, dilation, False, [0, 0], len(input) * groups,
            [ctx.needs_input_grad[0], needs_kernels, False])
        if grad_input is not None:
            grad_input = grad_input.view_as(input)
        if not needs_kernels:
            return (grad_input, *[None] * 9)
        grad_kernels = grad_kernels.contiguous().view(kernels.shape)
        del kernels
        gradients = KernelGradients(bank, a, gate, row_f, len(input), ctx.needs_input_grad[1])
        for rows in row_blocks(bank, len(input)):
            gradients.add(rows, grad_kernels[:, :, rows], mix(bank[:, :, rows], a, len(input)))
        return (grad_input, *gradients.of(weight, s, c, f), None, None, None, None)


def fold_whole(bank: Tensor, a: Optional[Tensor], gate: Optional[Tensor], f: Optional[Tensor],
               batch: int) -> Tensor:
    return fold(mix(bank, a, batch), gate, f, inplace=a is not None)


def as_kernels(matrices: Tensor, weight: Tensor) -> Tensor:
    """(B, groups, rows, I) -> (B * Cout, Cin / groups, kh, kw)."""
    return matrices.reshape(-1, *weight.shape[2:])


def convolve(input: Tensor, kernels: Tensor, stride, padding, dilation, groups: int) -> Tensor:
    """Convolve image b of (B, Cin, H, W) with the b-th Cout of (B * Cout, Cin / groups, kh, kw)."""
    output = F.conv2d(images_as_channels(input), kernels, None, stride, padding, dilation,
                      len(input) * groups)
    return output.view(len(input), -1, *output.shape[2:])


def images_as_channels(maps: Tensor) -> Tensor:
    """(B, C, H, W) -> (1, B * C, H, W)."""
    return maps.reshape(1, -1, *maps.shape[2:])


# Below, kernels are matrices: a bank is (n, groups, rows, I), where rows are the output channels
# of a group and I = Cin / groups * kh * kw; the kernels of a batch are (B, groups, rows, I).


def as_matrices(weight: Tensor, s: Optional[Tensor], c: Optional[Tensor], f: Optional[Tensor],
                groups: int) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    """The bank; c and s as one gate of its columns, (B, groups or 1, 1, I); f, (B, groups, rows).

    Views, but for a gate of both c and s.
    """
    bank = weight.flatten(2).unflatten(1, (groups, -1))
    group_channels, area = weight.shape[2], weight.shape[3] * weight.shape[4]
    gate = None
    if c is not None:
        gate = c.view(len(c), groups, group_channels, 1)
        gate = gate.expand(-1, -1, -1, area) if s is None else gate * s.flatten(1)[:, None, None]
    elif s is not None:
        gate = s.flatten(1)[:, None, None].expand(-1, -1, group_channels, -1)
    if gate is not None:
        gate = gate.flatten(2)[:, :, None]
    return bank, gate, None if f is None else f.view(len(f), groups, -1)


def row_blocks(bank: Tensor, batch: int) -> Iterator[slice]:
    """Slices of rows whose kernels, for all images, are of BLOCK_BYTES; all rows if grouped."""
    rows, columns = bank.shape[2:]
    step = rows if bank.shape[1] > 1 else max(
        8, BLOCK_BYTES // max(1, batch * columns * bank.element_size()))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def mix(bank: Tensor, a: Optional[Tensor], batch: int) -> Tensor:
    """sum_i a_b[i] W[i], (B, groups, rows, I); a view of the bank if there is no a."""
    if a is None:
        return bank.expand(batch, -1, -1, -1)
    # One matrix product reads the bank once and makes no (B, n, ...) intermediate.
    return (a @ bank.flatten(1)).view(batch, *bank.shape[1:])


def fold(mixed: Tensor, gate: Optional[Tensor], f: Optional[Tensor],
         inplace: bool = False) -> Tensor:
    """Mixed kernels with their other attentions; in place for the sake of speed alone."""
    for factor in (gate, None if f is None else f[..., None]):
        if factor is not None:
            mixed = mixed.mul_(factor) if inplace else mixed * factor
            inplace = True
    return mixed


class KernelGradients:
    """Gradients of bank, a, s, c and f, gathered from those of the folded kernels, row by row.

    With K = f * g * M, where g is the gate and M the mixed kernels: dM = f * g * dK, and f and g
    have what remains of dK * M summed over the axes that they lack.
    """

    def __init__(self, bank: Tensor, a: Optional[Tensor], gate: Optional[Tensor],
                 f: Optional[Tensor], batch: int, needs_bank: bool) -> None:
        self.bank, self.a, self.gate, self.f = bank, a, gate, f
        self.grad_bank = bank.new_empty(bank.shape) if needs_bank else None
        self.grad_a = None if a is None else torch.zeros_like(a)
        self.grad_f = None if f is None else torch.empty_like(f)
        self.grad_gate = None
        if gate is not None:
            self.grad_gate = bank.new_zeros(batch, bank.shape[1], 1, bank.shape[3])

    def add(self, rows: slice, grad: Tensor, mixed: Tensor) -> None:
        """Take the gradient of the folded rows, (B, groups, r, I), overwritten; M of the same."""
        gate, f = self.gate, None if self.f is None else self.f[:, :, rows]
        if gate is not None or f is not None:
            product = grad * mixed
            if f is not None:
                self.grad_f[:, :, rows] = (
                    product.sum(-1) if gate is None else (product @ gate.mT).squeeze(-1))
            if gate is not None:
                self.grad_gate += (
                    product.sum(2, keepdim=True) if f is None else f[:, :, None] @ product)
            del product
            grad = fold(grad, gate, f, inplace=True)
        bank = self.bank[:, :, rows].flatten(1)
        grad = grad.flatten(1)
        if self.grad_bank is not None:
            grad_bank = self.grad_bank[:, :, rows].flatten(1)
            if self.a is None:
                torch.sum(grad, 0, keepdim=True, out=grad_bank)
            elif len(grad) == 1:
                torch.mul(self.a.mT, grad, out=grad_bank)
            else:
                torch.mm(self.a.mT, grad, out=grad_bank)
        if self.a is not None:
            self.grad_a.addmm_(grad, bank.mT)

    def of(self, weight: Tensor, s: Optional[Tensor], c: Optional[Tensor],
           f: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        """The sums, shaped as the arguments of ``dynamic_conv2d``: bank, a, s, c, f."""
        grad_weight = None if self.grad_bank is None else self.grad_bank.view(weight.shape)
        grad_s, grad_c = gate_gradients(self.grad_gate, weight, s, c)
        grad_f = None if f is None else self.grad_f.view(f.shape)
        return grad_weight, self.grad_a, grad_s, grad_c, grad_f


def gate_gradients(grad_gate: Optional[Tensor], weight: Tensor, s: Optional[Tensor],
                   c: Optional[Tensor]) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """Gradients of s and c from that of their product, (B, groups, 1, I)."""
    if grad_gate is None:
        return None, None
    group_channels, kernel_size = weight.shape[2], weight.shape[3:]
    grad = grad_gate.view(len(grad_gate), -1, group_channels, kernel_size.numel())
    grad_s = grad_c = None
    if s is not None:
        product = grad if c is None else grad * c.view(len(c), -1, group_channels, 1)
        grad_s = product.sum((1, 2)).view(s.shape)
    if c is not None:
        grad_c = grad.sum(3) if s is None else (grad @ s.flatten(1)[:, None, :, None])
        grad_c = grad_c.view(c.shape)
    return grad_s, grad_c


def differentiable_gradients(ctx, grad: Tensor, *geometry) -> Tuple[Optional[Tensor], ...]:
    """Gradients of the saved tensors, themselves differentiable: for create_graph=True."""
    needed = [i for i, needs in enumerate(ctx.needs_input_grad[:6]) if needs]
    # Aliases: the attentions may depend on the input by a path that autograd also takes.
    tensors = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
    output = folded_conv2d(*tensors, *geometry)
    grads = torch.autograd.grad(output, [tensors[i] for i in needed], grad, create_graph=True)
    found = dict(zip(needed, grads))
    return tuple(found.get(i) for i in range(6))
