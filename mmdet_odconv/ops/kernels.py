"""Making kernels: those of a batch from a bank and its attentions, and their gradients.

Kernels are matrices here: a bank is (n, groups, rows, I), where rows are the output channels of a
group and I = Cin / groups * kh * kw; the kernels of a batch are (B, groups, rows, I).
"""
from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor

# Kernels that are worked on at once, in bytes: what the second-level caches of a few cores hold.
# Larger intermediates would travel to memory and back between two operations.
BLOCK_BYTES = 2**22

ALL = slice(None)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of sums over a whole kernel or map, which are out of float16's range when no term is."""
    return torch.float32 if dtype == torch.float16 else dtype


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of Fourier transforms and waves: float64 where that is given, else float32."""
    return dtype if dtype == torch.float64 else torch.float32


def in_dtype(dtype: torch.dtype, *tensors: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
    """Each tensor, or None, in ``dtype``."""
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def folded_kernels(input, weight, a, s, c, f, groups: int) -> Tensor:
    """Kernels of the batch as matrices, (B, groups, Cout / groups, I); differentiable.

    Made in the dtype of the attentions, whose gradients are then summed in it.
    """
    dtype = next((t.dtype for t in (a, s, c, f) if t is not None), input.dtype)
    bank, gate, row_f = as_matrices(weight.to(dtype), s, c, f, groups)
    return fold(mix(bank, a, input.shape[0]), gate, row_f).to(input.dtype)


def mix_and_fold(bank: Tensor, a: Optional[Tensor], gate: Optional[Tensor], f: Optional[Tensor],
                 batch: int, keep_mixed: bool = False) -> Tuple[Tensor, Tensor]:
    """:func:`mix` and :func:`fold` of it, made in the cache, by rows; not differentiable.

    Both are returned; unless the mixed kernels are to be kept, they are overwritten.
    """
    if a is None:
        mixed = mix(bank, a, batch)
        return mixed, fold(mixed, gate, f)
    mixed = bank.new_empty(batch, *bank.shape[1:])
    folds = gate is not None or f is not None
    kernels = torch.empty_like(mixed) if folds and keep_mixed else mixed
    for rows in row_blocks(bank, batch):
        block = part(mixed, ALL, rows)
        torch.mm(a, part(bank, ALL, rows).flatten(1), out=block.flatten(1))
        fold(block, gate, part(f, ALL, rows), part(kernels, ALL, rows))
    return mixed, kernels


def as_matrices(weight: Tensor, s: Optional[Tensor], c: Optional[Tensor], f: Optional[Tensor],
                groups: int) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    """The bank; c and s as one gate of its columns, (B, groups or 1, 1, I); f, (B, groups, rows).

    The bank and f are views where they are contiguous.
    """
    bank_size, out_channels, group_channels, *kernel_size = weight.shape
    area = kernel_size[0] * kernel_size[1]
    bank = weight.reshape(bank_size, groups, out_channels // groups, group_channels * area)
    gate = c
    if s is not None:
        gate = s.reshape(s.shape[0], 1, 1, area)
        gate = gate.expand(-1, -1, group_channels, -1) if c is None else (
            c.view(c.shape[0], groups, group_channels, 1) * gate)
    elif c is not None and area > 1:
        gate = c.view(c.shape[0], groups, group_channels, 1).expand(-1, -1, -1, area)
    if gate is not None:
        gate = gate.reshape(gate.shape[0], -1, 1, group_channels * area)
    return bank, gate, None if f is None else f.view(f.shape[0], groups, -1)


def row_blocks(bank: Tensor, batch: int) -> Sequence[slice]:
    """Slices of rows whose kernels, of so many images, are of BLOCK_BYTES.

    All rows if they are grouped, or elsewhere than on a CPU.
    """
    rows, columns = bank.shape[2:]
    if bank.shape[1] > 1 or bank.device.type != 'cpu':
        return slices(rows, rows)
    return slices(rows, max(8, BLOCK_BYTES // (batch * columns * bank.element_size())))


def slices(total: int, step: int) -> Sequence[slice]:
    if step >= total:
        return (ALL, )
    step = max(1, step)
    return [slice(first, min(first + step, total)) for first in range(0, total, step)]


def part(tensor: Optional[Tensor], images: slice, rows: slice = ALL) -> Optional[Tensor]:
    """Images, and rows of the third axis, of a tensor if there is one; itself if that is all."""
    if tensor is None or images is rows is ALL:
        return tensor
    return tensor[images] if rows is ALL else tensor[images, :, rows]


def mix(bank: Tensor, a: Optional[Tensor], batch: int) -> Tensor:
    """sum_i a_b[i] W[i], (B, groups, rows, I); a view of the bank if there is no a."""
    if a is None:
        return bank.expand(batch, -1, -1, -1)
    # One matrix product reads the bank once and makes no (B, n, ...) intermediate.
    return (a @ bank.flatten(1)).view(batch, *bank.shape[1:])


def fold(mixed: Tensor, gate: Optional[Tensor], f: Optional[Tensor],
         out: Optional[Tensor] = None) -> Tensor:
    """Mixed kernels times their other attentions; into ``out``, which may be ``mixed`` itself."""
    factors = [factor for factor in (gate, None if f is None else f[..., None])
               if factor is not None]
    if not factors:
        return mixed
    kernels = torch.mul(mixed, factors[0], out=out)
    return kernels if len(factors) == 1 else kernels.mul_(factors[1])


class KernelGradients:
    """Gradients of bank, a, s, c and f, gathered from those of the folded kernels, row by row.

    With K = f * g * M, where g is the gate and M the mixed kernels: dM = f * g * dK, and f and g
    have what remains of dK * M summed over the axes that they lack. Sums are of ``sum_dtype``.
    """

    def __init__(self, bank: Tensor, a: Optional[Tensor], gate: Optional[Tensor],
                 f: Optional[Tensor], batch: int, needs_bank: bool) -> None:
        self.dtype = sum_dtype(bank.dtype)
        self.bank = bank
        self.a, self.gate, self.f = in_dtype(self.dtype, a, gate, f)
        self.grad_bank = bank.new_empty(bank.shape, dtype=self.dtype) if needs_bank else None
        self.grad_a = None if a is None else torch.zeros_like(self.a)
        self.grad_f = None if f is None else torch.empty_like(self.f)
        self.grad_gate = None
        if gate is not None:
            self.grad_gate = bank.new_zeros(batch, bank.shape[1], 1, bank.shape[3],
                                            dtype=self.dtype)

    def add(self, rows: slice, images: slice, grad: Tensor, mixed: Tensor) -> None:
        """Take the gradient of folded rows, (b, groups, r, I), overwritten, and their M.

        Rows of the bank are begun with image 0 and then added to.
        """
        gate, f = part(self.gate, images), part(self.f, images, rows)
        grad, mixed = grad.to(self.dtype), mixed.to(self.dtype)
        if gate is not None or f is not None:
            product = grad * mixed
            if f is not None:
                self.grad_f[images, :, rows] = (
                    product.sum(-1) if gate is None else (product @ gate.mT).squeeze(-1))
            if gate is not None:
                self.grad_gate[images] += (
                    product.sum(2, keepdim=True) if f is None else f[:, :, None] @ product)
            del product
            grad = fold(grad, gate, f, out=grad)
        grad = grad.flatten(1)
        if self.grad_bank is not None:
            grad_bank = part(self.grad_bank, ALL, rows).flatten(1)
            a = grad.new_ones(len(grad), 1) if self.a is None else part(self.a, images)
            if images.start:
                grad_bank.addmm_(a.mT, grad)
            elif len(grad) == 1:
                torch.mul(a.mT, grad, out=grad_bank)
            else:
                torch.mm(a.mT, grad, out=grad_bank)
        if self.a is not None:
            bank = part(self.bank, ALL, rows).flatten(1).to(self.dtype)
            part(self.grad_a, images).addmm_(grad, bank.mT)

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
        grad_c = grad.sum(3) if s is None else grad @ s.to(grad.dtype).flatten(1)[:, None, :, None]
        grad_c = grad_c.view(c.shape)
    return grad_s, grad_c
