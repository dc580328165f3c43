"""Kernels of images from one spectrum, cut into groups of frequencies (FDConv, CVPR 2025).

Of the forward pass only the kernels are kept, which the convolution keeps too: the gate of every
element of every image's kernel, and the products on the way, are made block by block in the cache
and made again in the backward pass, and no transform is.
"""
import functools
from typing import Optional, Tuple

import torch
from torch import Tensor

from . import dynamic_conv
from .folded import ALL, BLOCK_BYTES, as_in_forward, slices


@functools.lru_cache(maxsize=64)
def frequency_groups(rows: int, columns: int, group_num: int) -> Tensor:
    """Group of each frequency of a real (rows, columns) plane, by its distance from zero.

    The frequencies that :func:`torch.fft.rfft2` keeps, nearest first, are cut into ``group_num``
    groups of equal size, or of sizes that differ by one; where there are fewer frequencies than
    groups, some groups are empty. Equally distant ones, compared exactly, are in the order of
    rows, then columns.

    Returns:
        (rows, columns // 2 + 1), uint8 where that suffices, on the CPU.
    """
    row, column = (torch.arange(n, device='cpu') for n in (rows, columns // 2 + 1))
    cycles = torch.minimum(row, rows - row)
    distance = (cycles * columns)[:, None]**2 + (column * rows)**2
    order = distance.flatten().argsort(stable=True)
    groups = torch.empty(len(order), dtype=torch.uint8 if group_num <= 256 else torch.int32,
                         device='cpu')
    groups[order] = (torch.arange(len(order), device='cpu') * group_num // len(order)).to(
        groups.dtype)
    return groups.view(distance.shape)


def to_spectrum(kernel: Tensor) -> Tensor:
    """Spectrum of a kernel, (Cout, I, kh, kw), laid out as a plane of (Cout * kh, I * kw).

    Returns:
        Real and imaginary parts, (Cout * kh, I * kw // 2 + 1, 2).
    """
    out_channels, inner, kh, kw = kernel.shape
    plane = kernel.permute(0, 2, 1, 3).reshape(out_channels * kh, inner * kw)
    wide = plane.dtype if plane.dtype == torch.float64 else torch.float32
    return torch.view_as_real(torch.fft.rfft2(plane.to(wide))).to(kernel.dtype)


def fourier_kernels(spectrum: Tensor,
                    frequency_groups: Tensor,
                    kernel_shape: Tuple[int, int, int, int],
                    kernel_attention: Tensor,
                    groups: int = 1,
                    *,
                    channel_logits: Optional[Tensor] = None,
                    filter_logits: Optional[Tensor] = None,
                    spatial_logits: Optional[Tensor] = None,
                    local_features: Optional[Tensor] = None,
                    local_weight: Optional[Tensor] = None) -> Tensor:
    r"""Kernels of FDConv: a spectrum's groups weighted by attention, then gated.

    .. math:: W_b[o,c,p] = \gamma(f_b[o])\, \gamma(c_b[c])\, \gamma(s_b[p])\,
              \gamma\big(\sum_t L[o,p,t]\, u_b[t,c]\big)\,
              F^{-1}\Big(\sum_i a_b[i]\, S_i\Big)[o,c,p]

    with :math:`\gamma(z) = 2\sigma(z)`, 1 at z = 0; gates that are ``None`` count as 1. The plane
    that is transformed has a row for each o and kernel row, a column for each c and kernel column.

    Args:
        spectrum: S, real and imaginary parts, (Cout * kh, Cin / groups * kw // 2 + 1, 2).
        frequency_groups: which i each frequency belongs to, (Cout * kh, Cin / groups * kw // 2 +
            1), integers; see :func:`frequency_groups`.
        kernel_shape: (Cout, Cin / groups, kh, kw).
        kernel_attention: a, (B, n).
        groups: of the convolution; gates of input channels are those of the group's own.
        channel_logits, filter_logits: c, (B, Cin), and f, (B, Cout).
        spatial_logits: s, (B, kh * kw).
        local_features: u, (B, T, Cin).
        local_weight: L, (Cout * kh * kw, T).

    Returns:
        (B, Cout, Cin / groups, kh, kw), in float64 if the spectrum is, else in float32.
    """
    wide = torch.float64 if spectrum.dtype == torch.float64 else torch.float32
    tensors = [None if t is None else t.to(wide) for t in (
        spectrum, kernel_attention, channel_logits, filter_logits, spatial_logits, local_features,
        local_weight)]
    arguments = (*tensors, frequency_groups, tuple(kernel_shape), groups)
    device = spectrum.device.type
    plain = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_published()
    function = published_kernels if plain else FourierKernels.apply
    if device == 'meta' or not torch.is_autocast_enabled(device):
        return function(*arguments)
    with torch.autocast(device, enabled=False):
        return function(*arguments)


def is_published() -> bool:
    """Whether plan 'grouped', the formulation of the published code, is forced."""
    return dynamic_conv._forced_plan == 'grouped'


def published_kernels(spectrum, a, c, f, s, u, w, frequency_groups, kernel_shape, groups):
    """The kernels in operations that autograd and torch.compile see through, as published."""
    maps = spectrum * _scale(a, frequency_groups)
    out_channels, inner, kh, kw = kernel_shape
    plane = torch.fft.irfft2(torch.view_as_complex(maps), s=(out_channels * kh, inner * kw))
    column, row = _gates(a, c, f, s, u is not None, kernel_shape, groups)
    gate = column * row
    if u is not None:
        gate = gate * _local_logits(_by_group(u, groups), w, kernel_shape, groups).sigmoid()
    kernels = _as_rows(plane, kernel_shape, groups) * _as_plane(gate, kh).transpose(3, 4)
    return kernels.reshape(len(a), *kernel_shape)


class FourierKernels(torch.autograd.Function):
    """Forward and backward of :func:`fourier_kernels`."""

    @staticmethod
    def forward(ctx, spectrum, a, c, f, s, u, w, frequency_groups, kernel_shape, groups):
        out_channels, inner, kh, kw = kernel_shape
        kernels = a.new_empty(len(a), groups, out_channels // groups, inner, kh, kw)
        column, row = _gates(a, c, f, s, u is not None, kernel_shape, groups)
        u_groups = None if u is None else _by_group(u, groups)
        for images in _image_chunks(spectrum, len(a)):
            maps = spectrum * _scale(a[images], frequency_groups)
            # irfft2 does the same in twice the time, for the sake of a copy.
            plane = torch.fft.irfft(torch.fft.ifft(torch.view_as_complex(maps), dim=1),
                                    inner * kw)
            del maps
            plane = _as_rows(plane, kernel_shape, groups)
            for rows in _row_blocks(kernels[images]):
                gate = _block_gate(column, row, u_groups, w, images, rows, kernel_shape, groups)
                torch.mul(plane[:, :, rows], _as_plane(gate, kh).transpose(3, 4),
                          out=kernels[images, :, rows])
        kernels = kernels.view(len(a), *kernel_shape)
        ctx.save_for_backward(spectrum, a, c, f, s, u, w, frequency_groups, kernels)
        ctx.geometry = kernel_shape, groups
        return kernels

    @staticmethod
    @as_in_forward
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            return (*_differentiable_gradients(ctx, grad), None, None, None)
        spectrum, a, c, f, s, u, w, frequency_groups, kernels = ctx.saved_tensors
        (out_channels, inner, kh, kw), groups = ctx.geometry
        rows_shape = groups, out_channels // groups, inner, kh, kw
        grad, kernels = grad.reshape(len(a), *rows_shape), kernels.view(len(a), *rows_shape)
        column, row = _gates(a, c, f, s, u is not None, *ctx.geometry)
        u_groups = None if u is None else _by_group(u, groups)
        # The derivative of a gate's logarithm by its logit is 1 - sigmoid(logit): of all gates'
        # gradients the kernels times their gradients are a factor, and none is divided by.
        grad_column = a.new_zeros(len(a), groups, inner, kh * kw)
        grad_f = a.new_zeros(len(a), groups, out_channels // groups)
        grad_a = torch.zeros_like(a)
        grad_spectrum = torch.zeros_like(spectrum)
        grad_u, grad_w = (None, None) if u is None else (torch.zeros_like(u_groups),
                                                         torch.zeros_like(w))
        for images in _image_chunks(spectrum, len(a)):
            count = len(a[images])
            plane = a.new_empty(count, groups, rows_shape[1], kh, inner, kw)
            for rows in _row_blocks(kernels[images]):
                some = grad[images, :, rows]
                product = (some * kernels[images, :, rows]).flatten(4)
                grad_column[images] += product.sum(2)
                grad_f[images, :, rows] = product.sum((3, 4))
                gate = _block_gate(column, row, u_groups, w, images, rows, *ctx.geometry,
                                   grad_u, grad_w, product)
                torch.mul(some.transpose(3, 4), _as_plane(gate, kh), out=plane[:, :, rows])
            plane = plane.view(count, out_channels * kh, inner * kw)
            maps = torch.view_as_real(torch.fft.fft(torch.fft.rfft(plane), dim=1))
            # What rfft leaves out is the conjugate of what it keeps: these count twice.
            maps[:, :, 1:(inner * kw + 1) // 2] *= 2
            maps /= plane[0].numel()
            grad_a[images] = _sum_by_group(maps, spectrum, frequency_groups, a.shape[1])
            if ctx.needs_input_grad[0]:
                for some, scale in zip(maps, _scale(a[images], frequency_groups)):
                    grad_spectrum.addcmul_(some, scale)
        grad_c = grad_s = None
        if c is not None:
            grad_c = grad_column.sum(3).view(c.shape) * (1 - c.sigmoid())
        if s is not None:
            grad_s = grad_column.sum((1, 2)) * (1 - s.sigmoid())
        grad_f = None if f is None else grad_f.view(f.shape) * (1 - f.sigmoid())
        if u is not None:
            grad_u = grad_u.transpose(1, 2).reshape(u.shape)
        return grad_spectrum, grad_a, grad_c, grad_f, grad_s, grad_u, grad_w, None, None, None


def _differentiable_gradients(ctx, grad):
    """Gradients of the saved tensors, themselves differentiable: for create_graph=True."""
    *tensors, frequency_groups, _ = ctx.saved_tensors
    needed = [i for i, needs in enumerate(ctx.needs_input_grad[:7]) if needs]
    # Aliases: the attentions may depend on one another by a path that autograd also takes.
    tensors = [None if t is None else t.view_as(t) for t in tensors]
    kernels = published_kernels(*tensors, frequency_groups, *ctx.geometry)
    grads = torch.autograd.grad(kernels, [tensors[i] for i in needed], grad, create_graph=True)
    found = dict(zip(needed, grads))
    return tuple(found.get(i) for i in range(7))


def _scale(a: Tensor, frequency_groups: Tensor) -> Tensor:
    """The attention of each frequency, (B, Cout * kh, I * kw // 2 + 1, 1)."""
    return a.index_select(1, frequency_groups.flatten().int()).view(
        len(a), *frequency_groups.shape, 1)


def _sum_by_group(maps: Tensor, spectrum: Tensor, frequency_groups: Tensor, group_num: int
                  ) -> Tensor:
    """Products of maps, (B, ..., 2), and the spectrum, summed over each group: (B, n)."""
    index, sums = frequency_groups.flatten().int(), maps.new_zeros(len(maps), group_num)
    for some, total in zip(maps, sums):  # along the second axis index_add takes 20 times as long
        real, imaginary = ((some[..., i], spectrum[..., i]) for i in range(2))
        total.index_add_(0, index, torch.addcmul(torch.mul(*real), *imaginary).flatten())
    return sums


# Below, kernels are (B, groups, rows, I, kh, kw), with rows the output channels of a group and I =
# Cin / groups; their gates (B, groups, rows, kh * kw, I), as one matrix product makes them.


def _as_rows(plane: Tensor, kernel_shape, groups: int) -> Tensor:
    """(B, Cout * kh, I * kw) -> (B, groups, rows, I, kh, kw), a view."""
    out_channels, inner, kh, kw = kernel_shape
    return plane.view(len(plane), groups, out_channels // groups, kh, inner, kw).transpose(3, 4)


def _as_plane(gate: Tensor, kh: int) -> Tensor:
    """(B, groups, rows, kh * kw, I) -> (B, groups, rows, kh, I, kw), a view."""
    return gate.unflatten(3, (kh, -1)).transpose(4, 5)


def _gates(a, c, f, s, is_local: bool, kernel_shape, groups: int) -> Tuple[Tensor, Tensor]:
    """All gates but the sigmoid of the local logits, as columns' and rows'.

    (B or 1, 1 or groups, 1, 1 or kh * kw, 1 or I) and (B or 1, 1 or groups, 1 or rows, 1, 1).
    """
    inner = kernel_shape[1]
    column = a.new_full((1, 1, 1, 1, 1), 2.0 if is_local else 1.0)
    row = a.new_ones(1, 1, 1, 1, 1)
    if s is not None:
        column = column * 2 * s.sigmoid()[:, None, None, :, None]
    if c is not None:
        column = column * 2 * c.sigmoid().view(len(c), groups, 1, 1, inner)
    if f is not None:
        row = 2 * f.sigmoid().view(len(f), groups, -1, 1, 1)
    return column.expand(len(a), -1, -1, -1, -1), row.expand(len(a), -1, -1, -1, -1)


def _block_gate(column, row, u, w, images: slice, rows: slice, kernel_shape, groups: int,
                grad_u=None, grad_w=None, product=None) -> Tensor:
    """Gates of a block of kernels.

    The local gates' gradients are added to ``grad_u`` and ``grad_w`` if there is a ``product``,
    of the block's kernels and their gradients.
    """
    column, row = column[images], row[images]
    row = row[:, :, rows] if row.shape[2] > 1 else row
    if u is None:
        return (column * row).expand(-1, groups, -1, kernel_shape[2] * kernel_shape[3],
                                     kernel_shape[1])
    area = kernel_shape[2] * kernel_shape[3]
    w = w.view(groups, -1, area, w.shape[1])[:, rows].flatten(1, 2)
    u = u[images]
    gate = (w @ u).unflatten(2, (-1, area)).sigmoid_()
    if product is not None:
        grad_logits = (product.mT * (1 - gate)).flatten(2, 3)
        grad_u[images] += w.mT @ grad_logits
        grad_w.view(groups, -1, area, w.shape[2])[:, rows] += (
            grad_logits @ u.mT).sum(0).unflatten(1, (-1, area))
    return gate.mul_(column).mul_(row)


def _local_logits(u: Tensor, w: Tensor, kernel_shape, groups: int) -> Tensor:
    area = kernel_shape[2] * kernel_shape[3]
    return (w.view(groups, -1, w.shape[1]) @ u).unflatten(2, (-1, area))


def _by_group(u: Tensor, groups: int) -> Tensor:
    """(B, T, Cin) -> (B, groups, T, I)."""
    return u.unflatten(2, (groups, -1)).transpose(1, 2)


def _image_chunks(spectrum: Tensor, batch: int):
    """Slices of images whose planes are cached together; all images elsewhere than on a CPU."""
    if spectrum.device.type != 'cpu':
        return slices(batch, batch)
    return slices(batch, BLOCK_BYTES // (spectrum.numel() * spectrum.element_size()))


def _row_blocks(kernels: Tensor):
    """Slices of rows whose kernels are of BLOCK_BYTES, if they are not grouped."""
    groups, rows = kernels.shape[1:3]
    if groups > 1 or kernels.device.type != 'cpu' or len(kernels) == 0:
        return (ALL, )
    row_bytes = kernels[:, 0, 0].numel() * kernels.element_size()
    return slices(rows, max(1, BLOCK_BYTES // row_bytes))
