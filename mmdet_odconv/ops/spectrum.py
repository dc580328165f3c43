"""Kernels of images from one spectrum, cut into groups of frequencies (FDConv, CVPR 2025).

Of the forward pass only the kernels are kept, which the convolution keeps too: the gate of every
element of every image's kernel, and the products on the way, are made block by block in the cache
and made again in the backward pass, and no transform is.
"""
import functools
from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor

from . import dynamic_conv
from .autograd import as_in_forward, differentiable_gradients, without_autocast
from .convolution import is_traced
from .kernels import ALL, BLOCK_BYTES, in_dtype, slices, wide_dtype


def frequency_groups(rows: int, columns: int, group_num: int) -> Tensor:
    """Group of each frequency of a real (rows, columns) plane, by its distance from zero.

    The frequencies that :func:`torch.fft.rfft2` keeps, nearest first, are cut into ``group_num``
    groups of equal size, or of sizes that differ by one; where there are fewer frequencies than
    groups, some groups are empty. Equally distant ones, compared exactly, are in the order of
    rows, then columns.

    Returns:
        (rows, columns // 2 + 1), uint8 where that suffices, on the CPU; shared by all callers.
    """
    if type(torch.empty(0, device='cpu')) is not Tensor:  # a fake one must not be kept
        return _frequency_groups.__wrapped__(rows, columns, group_num)
    return _frequency_groups(rows, columns, group_num)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept may be trained with, whoever asked first
def _frequency_groups(rows: int, columns: int, group_num: int) -> Tensor:
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
    wide = plane.to(wide_dtype(plane.dtype))
    return torch.view_as_real(torch.fft.rfft2(wide)).to(kernel.dtype)


def fourier_kernels(spectrum: Tensor,
                    frequency_groups: Tensor,
                    kernel_shape: Sequence[int],
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
        (B, Cout, Cin / groups, kh, kw), B may be 0, in float64 if the spectrum is, else in float32.
    """
    tensors = in_dtype(wide_dtype(spectrum.dtype), spectrum, kernel_attention, channel_logits,
                       filter_logits, spatial_logits, local_features, local_weight)
    if kernel_attention.shape[0] == 0:  # no image has a kernel, but all arguments stay in the graph
        return tensors[1].new_zeros(0, *kernel_shape) + sum(
            t.sum() for t in tensors if t is not None)
    arguments = (*tensors, frequency_groups, tuple(kernel_shape), groups)
    function = (plain_kernels if is_traced() else
                published_kernels if dynamic_conv.is_published() else FourierKernels.apply)
    return without_autocast(spectrum.device.type, function, *arguments)


def plain_kernels(spectrum, a, c, f, s, u, w, frequency_groups, kernel_shape, groups):
    """The kernels in operations that autograd and torch.compile see through."""
    maps = spectrum * a.index_select(1, frequency_groups.flatten().int()).view(
        a.shape[0], *frequency_groups.shape, 1)
    return _gated_kernels(maps, a, c, f, s, u, w, kernel_shape, groups)


def published_kernels(spectrum, a, c, f, s, u, w, frequency_groups, kernel_shape, groups):
    """As the published code has them: by groups, frequencies are gathered, weighted, scattered."""
    indices = _by_frequency(frequency_groups, a.shape[1])
    if indices is None:  # which the published code does not serve
        return plain_kernels(spectrum, a, c, f, s, u, w, frequency_groups, kernel_shape, groups)
    picked = spectrum[indices].view(1, a.shape[1], -1, 2)
    weighted = torch.stack([picked[..., part] * a[:, :, None] for part in (0, 1)], 3)
    maps = spectrum.new_zeros(len(a), *spectrum.shape)
    maps[(slice(None), *indices)] += weighted.flatten(1, 2)
    return _gated_kernels(maps, a, c, f, s, u, w, kernel_shape, groups)


@functools.lru_cache(maxsize=64)
def _by_frequency(frequency_groups: Tensor, group_num: int) -> Optional[Tuple[Tensor, Tensor]]:
    """Rows and columns of all frequencies by group; None where the groups differ in size."""
    groups = frequency_groups.flatten()
    sizes = groups.int().bincount(minlength=group_num)
    order = groups.argsort(stable=True)
    width = frequency_groups.shape[1]
    return (order // width, order % width) if (sizes == sizes[0]).all() else None


def _gated_kernels(maps, a, c, f, s, u, w, kernel_shape, groups):
    """The kernels of a batch's spectra, (B, Cout * kh, I * kw // 2 + 1, 2), times their gates."""
    out_channels, inner, kh, kw = kernel_shape
    plane = torch.fft.irfft2(torch.view_as_complex(maps), s=(out_channels * kh, inner * kw))
    column, row = _gates(a, c, f, s, kernel_shape, groups)
    gate = column * row
    if u is not None:
        logits = w.view(groups, -1, w.shape[1]) @ _by_group(u, groups)
        gate = gate * 2 * logits.unflatten(2, (-1, kh, kw)).transpose(4, 5).sigmoid()
    # shape[0] and not len(), which makes of a size that an exporter leaves open a number.
    plane = plane.view(a.shape[0], groups, -1, kh, inner, kw)
    return (plane * gate).transpose(3, 4).reshape(a.shape[0], *kernel_shape)


class FourierKernels(torch.autograd.Function):
    """Forward and backward of :func:`fourier_kernels`."""

    @staticmethod
    def forward(ctx, spectrum, a, c, f, s, u, w, frequency_groups, kernel_shape, groups):
        inner, kw = kernel_shape[1::2]
        kernels = a.new_empty(len(a), *kernel_shape)
        in_planes = _in_planes(kernels, kernel_shape, groups)
        gates = _gates(a, c, f, s, kernel_shape, groups)
        local = _LocalGates(u, w, kernel_shape, groups)
        for images in _image_chunks(spectrum, len(a)):
            maps = _scale(a[images], frequency_groups).mul_(spectrum)
            plane = torch.fft.irfft2(torch.view_as_complex(maps), s=(len(spectrum), inner * kw))
            plane = plane.view(in_planes[images].shape)
            for rows in _row_blocks(plane):
                gate = _product(*gates, local.sigmoid(images, rows), images, rows)
                _multiply(plane[:, :, rows], gate, in_planes[images, :, rows])
        ctx.save_for_backward(spectrum, a, c, f, s, u, w, frequency_groups, kernels)
        ctx.geometry = kernel_shape, groups
        return kernels

    @staticmethod
    @as_in_forward
    def backward(ctx, grad):
        *tensors, frequency_groups, kernels = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*differentiable_gradients(
                lambda *tensors: plain_kernels(*tensors, frequency_groups, *ctx.geometry),
                tensors, ctx.needs_input_grad[:7], grad), None, None, None)
        spectrum, a, c, f, s, u, w = tensors
        kernel_shape, groups = ctx.geometry
        grad, kernels = (_in_planes(t, *ctx.geometry) for t in (grad, kernels))
        gates = _gates(a, c, f, s, *ctx.geometry)
        local = _LocalGates(u, w, *ctx.geometry, needs_grad=True)
        # The derivative of a gate's logarithm by its logit is 1 - sigmoid(logit): of all gates'
        # gradients the kernels times their gradients are a factor, and none is divided by.
        grad_column = a.new_zeros(len(a), groups, 1, *kernels.shape[3:])
        grad_row = a.new_zeros(*kernels.shape[:3], 1, 1, 1)
        grad_a, grad_spectrum = torch.zeros_like(a), torch.zeros_like(spectrum)
        for images in _image_chunks(spectrum, len(a)):
            plane = a.new_empty(grad[images].shape)
            for rows in _row_blocks(plane):
                some = grad[images, :, rows]
                product = _multiply(some, kernels[images, :, rows], plane[:, :, rows])
                grad_column[images] += product.sum(2, keepdim=True)
                grad_row[images, :, rows] = product.sum((3, 4, 5), keepdim=True)
                sigmoid = local.sigmoid(images, rows)
                local.add_gradients(product, sigmoid, images, rows)
                gate = _product(*gates, sigmoid, images, rows)
                _multiply(some, gate, plane[:, :, rows])
            plane = plane.view(len(plane), len(spectrum), -1)
            maps = torch.view_as_real(torch.fft.rfft2(plane))
            # What rfft2 leaves out is the conjugate of what it keeps: these count twice.
            maps[:, :, 1:(plane.shape[2] + 1) // 2] *= 2
            maps /= plane[0].numel()
            grad_a[images] = _sum_by_group(maps, spectrum, frequency_groups, a.shape[1])
            if ctx.needs_input_grad[0]:
                for some, scale in zip(maps, _scale(a[images], frequency_groups)):
                    grad_spectrum.addcmul_(some, scale)
        grad_c = grad_f = grad_s = None
        if c is not None:
            grad_c = grad_column.sum((2, 3, 5)).view(c.shape) * (1 - c.sigmoid())
        if f is not None:
            grad_f = grad_row.view(f.shape) * (1 - f.sigmoid())
        if s is not None:
            grad_s = grad_column.sum((1, 2, 4)).view(s.shape) * (1 - s.sigmoid())
        return (grad_spectrum, grad_a, grad_c, grad_f, grad_s, *local.gradients(), None, None,
                None)


def _scale(a: Tensor, frequency_groups: Tensor) -> Tensor:
    """The attention of each frequency, twice, (B, Cout * kh, I * kw // 2 + 1, 2).

    Once for two parts would do, but products with that are not vectorised, and take three times as
    long.
    """
    index, pairs = frequency_groups.flatten().int(), torch.complex(a, a)
    scale = pairs.new_empty(len(a), len(index))
    for pair, out in zip(pairs, scale):  # along the second axis it takes three times as long
        torch.index_select(pair, 0, index, out=out)
    return torch.view_as_real(scale).view(len(a), *frequency_groups.shape, 2)


def _sum_by_group(maps: Tensor, spectrum: Tensor, frequency_groups: Tensor, group_num: int
                  ) -> Tensor:
    """Products of maps, (B, ..., 2), and the spectrum, summed over each group: (B, n)."""
    index, sums = frequency_groups.flatten().int(), maps.new_zeros(len(maps), group_num, 2)
    for some, total in zip(maps, sums):  # along the second axis index_add takes 20 times as long
        products = torch.view_as_complex(some * spectrum).flatten()
        torch.view_as_complex(total).index_add_(0, index, products)
    return sums.sum(2)


# Below, kernels and gates are as in the plane that is transformed, (B, groups, rows, kh, I, kw),
# with rows the output channels of a group and I = Cin / groups.


def _in_planes(kernels: Tensor, kernel_shape, groups: int) -> Tensor:
    """A view of kernels, (B, Cout, I, kh, kw)."""
    return kernels.reshape(len(kernels), groups, -1, *kernel_shape[1:]).transpose(3, 4)


def _multiply(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """x * y into ``out``, by rows of the kernel: all at once take three times as long."""
    for i in range(out.shape[3]):
        torch.mul(x[:, :, :, i], y[:, :, :, i], out=out[:, :, :, i])
    return out


def _gates(a, c, f, s, kernel_shape, groups: int) -> Tuple[Tensor, Tensor]:
    """Gates of columns, (B, groups, 1, kh, I, kw), and of rows, (B, groups, rows, 1, 1, 1)."""
    out_channels, inner, kh, kw = kernel_shape
    column = a.new_ones(a.shape[0], groups, 1, kh, inner, kw)
    row = a.new_ones(a.shape[0], groups, out_channels // groups, 1, 1, 1)
    if c is not None:
        column = column * 2 * c.sigmoid().view(c.shape[0], groups, 1, 1, inner, 1)
    if s is not None:
        column = column * 2 * s.sigmoid().view(s.shape[0], 1, 1, kh, 1, kw)
    if f is not None:
        row = 2 * f.sigmoid().view(row.shape)
    return column, row


def _product(column: Tensor, row: Tensor, sigmoid: Optional[Tensor], images: slice, rows: slice
             ) -> Tensor:
    """All gates of a block of kernels, made of their local ones' sigmoid in place."""
    column, row = column[images], row[images, :, rows]
    if sigmoid is None:
        return column * row
    return sigmoid.mul_(column * 2).mul_(row)


class _LocalGates:
    """The gates of a kernel's single elements, block by block, and their gradients.

    So that they are made in the order of the plane, the product is with features repeated for each
    column of the kernel, (kw * T, I * kw), zero between unlike columns.
    """

    def __init__(self, u, w, kernel_shape, groups: int, needs_grad: bool = False) -> None:
        self.u, self.w, self.groups = u, w, groups
        if u is None:
            return
        self.kernel_shape, (kh, kw) = kernel_shape, kernel_shape[2:]
        self.weight = w.view(groups, -1, kh, kw * w.shape[1])
        features = torch.diag_embed(_by_group(u, groups)[..., None].expand(-1, -1, -1, -1, kw))
        self.features = features.permute(0, 1, 4, 2, 3, 5).flatten(4).flatten(2, 3)
        if needs_grad:
            self.grad_features = torch.zeros_like(self.features)
            self.grad_weight = torch.zeros_like(self.weight)

    def sigmoid(self, images: slice, rows: slice) -> Optional[Tensor]:
        """The sigmoid of a block's logits, (B, groups, rows, kh, I, kw)."""
        if self.u is None:
            return None
        logits = self.weight[:, rows].flatten(1, 2) @ self.features[images]
        _, inner, kh, kw = self.kernel_shape
        return logits.sigmoid_().view(*logits.shape[:2], -1, kh, inner, kw)

    def add_gradients(self, product: Tensor, sigmoid: Tensor, images: slice, rows: slice) -> None:
        """``product`` is of the block's kernels and their gradients; it is changed."""
        if self.u is None:
            return
        grad = product.addcmul_(product, sigmoid, value=-1).flatten(4).flatten(2, 3)
        weight = self.weight[:, rows].flatten(1, 2)
        self.grad_features[images] += weight.mT @ grad
        grad_weight = (grad @ self.features[images].mT).sum(0)
        self.grad_weight[:, rows] += grad_weight.view(self.weight[:, rows].shape)

    def gradients(self) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        """Those of u and w."""
        if self.u is None:
            return None, None
        _, inner, _, kw = self.kernel_shape
        grad = self.grad_features.unflatten(2, (kw, -1)).unflatten(4, (inner, kw))
        grad_u = grad.diagonal(dim1=2, dim2=5).sum(-1)  # (B, groups, T, I)
        return grad_u.transpose(1, 2).reshape(self.u.shape), self.grad_weight.view(self.w.shape)


def _by_group(u: Tensor, groups: int) -> Tensor:
    """(B, T, Cin) -> (B, groups, T, I)."""
    return u.unflatten(2, (groups, -1)).transpose(1, 2)


def _image_chunks(spectrum: Tensor, batch: int) -> Sequence[slice]:
    """Slices of images whose planes are cached together; all images elsewhere than on a CPU."""
    if spectrum.device.type != 'cpu':
        return slices(batch, batch)
    return slices(batch, BLOCK_BYTES // (spectrum.numel() * spectrum.element_size()))


def _row_blocks(plane: Tensor) -> Sequence[slice]:
    """Slices of rows whose kernels are of BLOCK_BYTES, if they are not grouped."""
    groups, rows = plane.shape[1:3]
    if groups > 1 or plane.device.type != 'cpu' or len(plane) == 0:
        return (ALL, )
    return slices(rows, max(1, BLOCK_BYTES // (plane[:, :, 0].numel() * plane.element_size())))
