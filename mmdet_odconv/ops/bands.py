"""Gates on the octaves of a map's frequencies (frequency band modulation of FDConv, CVPR 2025).

An ideal low-pass that is a box in frequency is a projection of rows and of columns: a matrix
product with the few lowest waves on each side, without complex numbers, at any size of map, and
what an exporter knows. The lower octaves' waves are the first of the higher ones'.
"""
import math
from typing import Iterator, List, Sequence, Tuple

import torch
from torch import Tensor

from . import dynamic_conv
from .autograd import as_in_forward, differentiable_gradients, without_autocast
from .convolution import is_traced
from .kernels import wide_dtype

BAND_NUM = 3  # gates; what is below the last band passes as it is


def cutoffs(size: int) -> Tuple[int, ...]:
    """Highest frequency that each low-pass keeps, in cycles along ``size`` pixels.

    Below 1/4, up to 1/8 and up to 1/16 cycles a pixel: the release's comparison, in float32, has
    1/4 itself in the highest band, 1/8 and 1/16 in the lower ones.
    """
    return (size - 1) // 4, size // 8, size // 16


def modulate_bands(input: Tensor, gates: Tensor) -> Tensor:
    r"""Sum of a map's frequency bands, each times a gate that all channels share.

    .. math:: y_b = L_3 x_b + \sum_{i=1}^3 g_{b,i} (L_{i-1} x_b - L_i x_b)

    where :math:`L_0 x = x`, and :math:`L_i` keeps the frequencies up to the i-th of
    :func:`cutoffs` along both axes. Where all gates are 1, y is x to the last bit.

    Args:
        input: x, (B, C, H, W).
        gates: g, (B, 3, H, W).

    Returns:
        (B, C, H, W).
    """
    wide = wide_dtype(input.dtype)
    function = (_modulate if is_traced() else published_bands if dynamic_conv.is_published() else
                BandModulation.apply)
    return without_autocast(input.device.type, function, input.to(wide), gates.to(wide)
                            ).to(input.dtype)


def published_bands(input: Tensor, gates: Tensor) -> Tensor:
    """The formulation of the published code: a Fourier transform and three inverse ones."""
    height, width = input.shape[2:]
    spectrum = torch.fft.rfft2(input, norm='ortho')
    row, column = (torch.arange(n, device=input.device) for n in (height, width // 2 + 1))
    cycles = torch.minimum(row, height - row)
    output, rest = 0, input
    for i, (highest_row, highest_column) in enumerate(zip(cutoffs(height), cutoffs(width))):
        mask = (cycles <= highest_row)[:, None] & (column <= highest_column)
        low = torch.fft.irfft2(spectrum * mask, s=(height, width), norm='ortho')
        output, rest = output + gates[:, i:i + 1] * (rest - low), low
    return output + rest


class BandModulation(torch.autograd.Function):
    """:func:`modulate_bands`, image by image; of the forward pass only its arguments are kept."""

    @staticmethod
    def forward(ctx, input, gates):
        ctx.save_for_backward(input, gates)
        waves = _all_waves(input)
        output = torch.empty_like(input)
        for x, g, y in zip(input, gates, output):
            torch.mul(x, g[0], out=y)
            for low, difference in zip(_lows(x, *waves), _differences(g)):
                y.addcmul_(low, difference)
        return output

    @staticmethod
    @as_in_forward
    def backward(ctx, grad):
        input, gates = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable_gradients(_modulate, (input, gates), ctx.needs_input_grad, grad)
        rows, columns = _all_waves(input)
        grad_input, grad_gates = torch.empty_like(input), torch.zeros_like(gates)
        for x, g, dy, dx, dg in zip(input, gates, grad, grad_input, grad_gates):
            dg[0] = (dy * x).sum(0)
            waves = dy.new_zeros(len(x), rows[0].shape[1], columns[0].shape[1])
            for i, (low, difference) in enumerate(zip(_lows(x, rows, columns), _differences(g))):
                along = (dy * low).sum(0)  # of the difference of the next gate, or 1, and this
                dg[i] -= along
                if i + 1 < BAND_NUM:
                    dg[i + 1] += along
                q, p = rows[i], columns[i]
                waves[:, :q.shape[1], :p.shape[1]] += q.mT @ ((dy * difference) @ p)
            torch.mul(dy, g[0], out=dx).add_((rows[0] @ waves) @ columns[0].mT)
        return grad_input, grad_gates


def _modulate(input: Tensor, gates: Tensor) -> Tensor:
    """In operations that autograd, torch.compile and exporters see through."""
    output = input * gates[:, :1]
    differences = _differences(gates.transpose(0, 1))
    for low, difference in zip(_lows(input, *_all_waves(input)), differences):
        output = output + low * difference[:, None]
    return output


def _differences(gates: Tensor) -> List[Tensor]:
    """By what each low-passed map is multiplied: its own band's gate less the one above."""
    return [*(gates[1:] - gates[:-1]), 1 - gates[-1]]


def _all_waves(input: Tensor) -> Tuple[List[Tensor], List[Tensor]]:
    """Of rows and of columns, the waves that each low-pass keeps."""
    height, width = input.shape[2:]
    return _waves(height, input), _waves(width, input)


def _waves(size: int, like: Tensor) -> List[Tensor]:
    """The constant, and a cosine and a sine of each frequency, as orthonormal columns.

    No function of :mod:`math` is given the size, of which it would make a number under a tracer.
    """
    highest = cutoffs(size)
    cycles = torch.arange(1, highest[0] + 1, device=like.device)
    # The angle modulo a turn, exactly: of large ones a cosine is not.
    turns = torch.arange(size, device=like.device)[:, None] * cycles % size
    wide = torch.float32 if like.device.type == 'mps' else torch.float64  # which MPS has not
    angles = turns.to(wide) * (2 * math.pi / size)
    pairs = torch.stack([angles.cos(), angles.sin()], 2).flatten(1) * (2 / size)**0.5
    constant = pairs.new_full((size, 1), (1 / size)**0.5)
    waves = torch.cat([constant, pairs], 1).to(like.dtype)
    return [waves[:, :1 + 2 * count] for count in highest]


def _lows(x: Tensor, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Iterator[Tensor]:
    """The map, (..., H, W), through each low-pass."""
    waves = rows[0].mT @ (x @ columns[0])
    for q, p in zip(rows, columns):
        yield (q @ waves[..., :q.shape[1], :p.shape[1]]) @ p.mT
