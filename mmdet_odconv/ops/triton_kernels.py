"""Kernels of all images from the bank in one pass, and their gradients in another, in Triton.

Every attention of a folded kernel is a factor of its rows or of its columns. With j counting the
Cin / groups * kh * kw columns of a row, and g(o) the group of output channel o:

    K_b[o, j] = rows_b[o] * columns_b[g(o), j] * sum_i a_b[i] * W[i, o, j]

A program keeps a tile of all n kernels in registers while it passes over the images: the bank is
read once, in the dtype that it is kept in, and is never cast as a whole. Sums are float32, or
float64 for float64 tensors. Sums over tiles are left to torch, so that gradients do not depend on
the order in which programs run.
"""
from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import as_matrices, gate_gradients

# Numbers of the bank that a thread holds, and as many of its gradient: two or three programs of
# MAX_WARPS then share the registers of a multiprocessor (80 to 128 a thread, compiled for sm_90).
THREAD_NUMBERS = 16
MAX_WARPS = 8

# Columns of a tile. As wide as tall for n = 4, so that both partial sums are few.
MAX_COLUMNS = 32

# Programs that keep a large GPU busy. A bank of fewer tiles has its images shared among programs.
PROGRAMS = 512


def fold_kernels(weight: Tensor, a: Optional[Tensor], s: Optional[Tensor], c: Optional[Tensor],
                 f: Optional[Tensor], groups: int, batch: int, dtype: torch.dtype) -> Tensor:
    """Kernels of every image with all their attentions.

    Args:
        weight: bank, (n, Cout, Cin / groups, kh, kw), of any floating dtype.
        a, s, c, f: attentions (B, n), (B, kh, kw), (B, Cin), (B, Cout); ``None`` counts as 1.
        groups: of the convolution.
        batch: B.
        dtype: of the result.

    Returns:
        (B, Cout, Cin / groups, kh, kw), contiguous.
    """
    tiles = _Tiles(weight, a, s, c, f, groups, batch)
    kernels = weight.new_empty(batch, *weight.shape[1:], dtype=dtype)
    images = tiles.images_of_program()
    with torch.cuda.device_of(weight):
        _fold[tiles.count, triton.cdiv(batch, images)](
            *tiles.factors, kernels, batch, images, *tiles.sizes, **tiles.constants(dtype))
    return kernels


def fold_kernels_backward(grad: Tensor, weight: Tensor, a: Optional[Tensor], s: Optional[Tensor],
                          c: Optional[Tensor], f: Optional[Tensor], groups: int,
                          needs_bank: bool = True) -> Tuple[Optional[Tensor], ...]:
    """Gradients of the bank, a, s, c and f from that of the folded kernels.

    Args:
        grad: of the kernels, (B, Cout, Cin / groups, kh, kw).
        weight, a, s, c, f, groups: as given to :func:`fold_kernels`.
        needs_bank: whether the bank's gradient is wanted.

    Returns:
        Five gradients, each of its tensor's shape and dtype, ``None`` where there is none.
    """
    batch = len(grad)
    tiles = _Tiles(weight, a, s, c, f, groups, batch)
    # Each share of the images makes a float32 gradient of the bank, written and read again: that
    # must not cost more than the gradients of the kernels that it reads.
    images = max(tiles.images_of_program(), min(batch, 2 * len(weight)))
    shares = triton.cdiv(batch, images)
    constants = tiles.constants(grad.dtype)
    exact = torch.float64 if constants['SUM'] is tl.float64 else torch.float32

    def partial_sums(factor, *shape, dtype=exact):
        return None if factor is None else weight.new_empty(shape, dtype=dtype)

    _, a, rows, columns = tiles.factors
    grad_a = partial_sums(a, batch, tiles.count, len(weight))
    grad_rows = partial_sums(rows, batch, tiles.across, weight.shape[1])
    grad_columns = partial_sums(columns, batch, tiles.down, tiles.groups, tiles.length)
    grad_bank = partial_sums(weight if needs_bank else None, shares, *weight.shape,
                             dtype=weight.dtype if shares == 1 else exact)
    with torch.cuda.device_of(weight):
        _fold_backward[tiles.count, shares](
            *tiles.factors, grad.contiguous(), grad_bank, grad_a, grad_rows, grad_columns, batch,
            images, *tiles.sizes, **constants)
    grad_bank, grad_a, grad_rows, grad_columns = (
        None if partial is None else partial.squeeze(dim) if partial.shape[dim] == 1 else
        partial.sum(dim) for partial, dim in (
            (grad_bank, 0), (grad_a, 1), (grad_rows, 1), (grad_columns, 1)))
    grad_s = grad_c = None
    grad_f = grad_rows
    if columns is not None:
        grad_s, grad_c = gate_gradients(grad_columns, weight, s, tiles.column_channels)
    if tiles.row_channels is not None:
        grad_c = (grad_rows if f is None else grad_rows * f).unflatten(1, (groups, -1)).sum(2)
        grad_f = grad_rows * tiles.row_channels
    grads = zip((weight, a, s, c, f), (grad_bank, grad_a, grad_s, grad_c, grad_f))
    return tuple(None if t is None or g is None else g.to(t.dtype) for t, g in grads)


class _Tiles:
    """The bank as rows and columns, cut into tiles that a program can keep in registers."""

    def __init__(self, weight, a, s, c, f, groups, batch):
        bank_size, out_channels, group_channels = weight.shape[:3]
        self.row_channels, self.column_channels, rows = None, c, f
        if group_channels == 1 and c is not None:
            # One input channel a row: c is a factor of rows, and groups may share a tile.
            self.row_channels = c[:, :, None].expand(-1, -1, out_channels // groups).flatten(1)
            self.column_channels = None
            rows = self.row_channels if f is None else self.row_channels * f
        columns = as_matrices(weight, s, self.column_channels, None, groups)[1]
        self.factors = tuple(None if factor is None else factor.contiguous()
                             for factor in (weight, a, rows, columns))
        self.batch, self.bank_size = batch, bank_size
        self.out_channels, self.length = out_channels, weight[0, 0].numel()
        self.groups = 1 if columns is None else columns.shape[1]
        group_rows = out_channels // self.groups
        padded = triton.next_power_of_2(bank_size)
        numbers = 32 * MAX_WARPS * THREAD_NUMBERS // max(padded, 2)
        block_columns = min(triton.next_power_of_2(self.length), MAX_COLUMNS)
        block_rows = min(triton.next_power_of_2(group_rows), max(1, numbers // block_columns))
        self.blocks = padded, block_rows, block_columns
        self.across = triton.cdiv(self.length, block_columns)
        self.down = triton.cdiv(group_rows, block_rows)
        self.count = self.groups * self.down * self.across

    @property
    def sizes(self):
        return (self.bank_size, self.out_channels, self.length, self.groups, self.down,
                self.across)

    def images_of_program(self) -> int:
        return triton.cdiv(self.batch, min(self.batch, triton.cdiv(PROGRAMS, self.count)))

    def constants(self, dtype: torch.dtype) -> dict:
        padded, block_rows, block_columns = self.blocks
        warps = padded * block_rows * block_columns // (32 * THREAD_NUMBERS)
        double = torch.float64 in (dtype, self.factors[0].dtype)
        return dict(N=padded, ROWS=block_rows, COLUMNS=block_columns,
                    SUM=tl.float64 if double else tl.float32,
                    num_warps=min(max(warps, 1), MAX_WARPS))


@triton.jit
def _place(out_channels, length, groups, down, across, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Group, tile row and tile column of this program; its output channels and columns."""
    tile = tl.program_id(0)
    across_tile = tile % across
    down_tile = tile // across % down
    group = tile // across // down
    group_rows = out_channels // groups
    row = down_tile * ROWS + tl.arange(0, ROWS)
    column = across_tile * COLUMNS + tl.arange(0, COLUMNS)
    return (group, down_tile, across_tile, group * group_rows + row, row < group_rows, column,
            column < length)


@triton.jit
def _load_bank(weight, bank_size, kernel_size, offsets, inside, N: tl.constexpr):
    """A tile of all kernels, (N, ROWS, COLUMNS); zeros beyond the bank."""
    i = tl.arange(0, N)[:, None, None]
    return tl.load(weight + i.to(tl.int64) * kernel_size + offsets[None],
                   mask=(i < bank_size) & inside[None], other=0)


@triton.jit(do_not_specialize=['batch', 'images'])
def _fold(weight, a, rows, columns, kernels, batch, images, bank_size, out_channels, length,
          groups, down, across, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
          SUM: tl.constexpr):
    group, _, _, row, in_rows, column, in_columns = _place(
        out_channels, length, groups, down, across, ROWS, COLUMNS)
    kernel_size = out_channels * length
    offsets = row[:, None] * length + column[None]
    inside = in_rows[:, None] & in_columns[None]
    bank = _load_bank(weight, bank_size, kernel_size, offsets, inside, N).to(SUM)
    first = tl.program_id(1).to(tl.int64) * images
    count = tl.minimum(images, batch - tl.program_id(1) * images)
    i = tl.arange(0, N)
    if a is not None:
        a += first * bank_size
    if rows is not None:
        rows += first * out_channels
    if columns is not None:
        columns += (first * groups + group) * length
    kernels += first * kernel_size
    for _image in tl.range(0, count, num_stages=4):
        if a is not None:
            attention = tl.load(a + i, mask=i < bank_size, other=0).to(SUM)
            kernel = tl.sum(bank * attention[:, None, None], 0)
            a += bank_size
        else:
            kernel = tl.sum(bank, 0)
        if rows is not None:
            kernel *= tl.load(rows + row, mask=in_rows, other=0).to(SUM)[:, None]
            rows += out_channels
        if columns is not None:
            kernel *= tl.load(columns + column, mask=in_columns, other=0).to(SUM)[None]
            columns += groups * length
        tl.store(kernels + offsets, kernel.to(kernels.dtype.element_ty), mask=inside)
        kernels += kernel_size


@triton.jit(do_not_specialize=['batch', 'images'])
def _fold_backward(weight, a, rows, columns, grad, grad_bank, grad_a, grad_rows, grad_columns,
                   batch, images, bank_size, out_channels, length, groups, down, across,
                   N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUM: tl.constexpr):
    # With M the mixed kernels, dM = rows * columns * dK; rows and columns have what remains of
    # dK * M summed over the axis that they lack.
    group, down_tile, across_tile, row, in_rows, column, in_columns = _place(
        out_channels, length, groups, down, across, ROWS, COLUMNS)
    kernel_size = out_channels * length
    offsets = row[:, None] * length + column[None]
    inside = in_rows[:, None] & in_columns[None]
    bank = _load_bank(weight, bank_size, kernel_size, offsets, inside, N).to(SUM)
    bank_sum = bank * 0  # zeros in the bank's layout; tl.zeros would bring a second one
    first = tl.program_id(1).to(tl.int64) * images
    count = tl.minimum(images, batch - tl.program_id(1) * images)
    i = tl.arange(0, N)
    tiles = tl.num_programs(0)
    if a is not None:
        a += first * bank_size
        grad_a += (first * tiles + tl.program_id(0)) * bank_size
    if rows is not None:
        rows += first * out_channels
        grad_rows += (first * across + across_tile) * out_channels
    if columns is not None:
        columns += (first * groups + group) * length
        grad_columns += ((first * down + down_tile) * groups + group) * length
    grad += first * kernel_size
    for _image in tl.range(0, count, num_stages=4):
        d_mixed = tl.load(grad + offsets, mask=inside, other=0).to(SUM)
        grad += kernel_size
        if a is not None:
            attention = tl.load(a + i, mask=i < bank_size, other=0).to(SUM)[:, None, None]
            product = d_mixed * tl.sum(bank * attention, 0)
            a += bank_size
        else:
            product = d_mixed * tl.sum(bank, 0)
        of_rows = product
        if columns is not None:
            factor = tl.load(columns + column, mask=in_columns, other=0).to(SUM)[None]
            of_rows = product * factor
            d_mixed *= factor
            columns += groups * length
        if rows is not None:
            factor = tl.load(rows + row, mask=in_rows, other=0).to(SUM)[:, None]
            product *= factor
            d_mixed *= factor
            tl.store(grad_rows + row, tl.sum(of_rows, 1), mask=in_rows)
            rows += out_channels
            grad_rows += across * out_channels
        if columns is not None:
            tl.store(grad_columns + column, tl.sum(product, 0), mask=in_columns)
            grad_columns += down * groups * length
        if a is not None:
            product = tl.reshape(bank * d_mixed[None], (N, ROWS * COLUMNS))
            tl.store(grad_a + i, tl.sum(product, 1), mask=i < bank_size)
            bank_sum += attention * d_mixed[None]
            grad_a += tiles * bank_size
        else:
            bank_sum += d_mixed[None]
    if grad_bank is not None:
        i = i[:, None, None]
        grad_bank += tl.program_id(1).to(tl.int64) * bank_size * kernel_size
        tl.store(grad_bank + i.to(tl.int64) * kernel_size + offsets[None],
                 bank_sum.to(grad_bank.dtype.element_ty), mask=(i < bank_size) & inside[None])
