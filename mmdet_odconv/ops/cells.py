"""Kernels put together from mixtures of cells (KernelWarehouse, ICML 2024)."""
import math
from typing import Sequence, Tuple

from torch import Tensor


def mix_cells(attention: Tensor, cells: Tensor, kernel_shape: Sequence[int]) -> Tensor:
    r"""Kernels whose every cell is a mixture :math:`w_i = \sum_j \alpha_{ij} e_j`.

    The cells are read once for all images, by one matrix product.

    Args:
        attention: :math:`\alpha`, (B, m, n), m the number of cells in a kernel.
        cells: :math:`e`, (n, co, ci, 1, 1), co and ci divisors of Cout and Cin / groups.
        kernel_shape: (Cout, Cin / groups, kh, kw).

    Returns:
        (B, Cout, Cin / groups, kh, kw).
    """
    kernels = attention.flatten(0, 1) @ cells.flatten(1)
    kernels = kernels.view(-1, *_grid(kernel_shape, cells.shape[1:3]))
    return kernels.permute(0, 2, 4, 3, 5, 1).reshape(-1, *kernel_shape)


def split_into_cells(kernel: Tensor, cell_shape: Sequence[int]) -> Tensor:
    """Cells (m, co, ci, 1, 1) of a kernel (Cout, Cin / groups, kh, kw), in a mixture's order."""
    area, outs, ins, out, inner = _grid(kernel.shape, cell_shape[:2])
    grid = kernel.reshape(outs, out, ins, inner, area).permute(4, 0, 2, 1, 3)
    return grid.reshape(-1, *cell_shape)


def mixture_count(kernel_shape: Sequence[int], cell_shape: Sequence[int]) -> int:
    """m, the number of cells of ``cell_shape``, (co, ci, 1, 1), in a kernel."""
    return math.prod(kernel_shape) // math.prod(cell_shape)


def _grid(kernel_shape: Sequence[int], cell: Sequence[int]) -> Tuple[int, int, int, int, int]:
    """Cells along space, output and input channels, in this order, and a cell's two sides."""
    out_channels, in_channels, *kernel_size = kernel_shape
    return (math.prod(kernel_size), out_channels // cell[0], in_channels // cell[1], cell[0],
            cell[1])
