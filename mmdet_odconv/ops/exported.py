"""Dynamic convolution as exporters write it down: plain operations, and groups that are constants.

A convolution's number of groups is a constant of any graph, and convolving each image with its own
kernel would make it depend on the batch. So where the batch is a constant of the graph the kernels
are computed and given to a plain convolution, and where it is not, to a matrix product with
patches.
"""
import warnings
from typing import List, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def is_exporting() -> bool:
    """Whether a graph is being drawn that others will run."""
    if torch.jit.is_tracing():
        return True
    exporting = getattr(torch.compiler, 'is_exporting', None)  # from torch 2.7 on
    return exporting is not None and exporting()


def exported_conv2d(input: Tensor, weight: Tensor, kernel_attention: Optional[Tensor],
                    spatial_attention: Optional[Tensor], channel_attention: Optional[Tensor],
                    filter_attention: Optional[Tensor], stride, padding, dilation,
                    groups: int, bias: Optional[Tensor] = None) -> Tensor:
    """:func:`~mmdet_odconv.ops.dynamic_conv2d` for exporters."""
    weight = weight.to(input.dtype)
    bias = None if bias is None else bias.to(input.dtype)
    if kernel_attention is None and spatial_attention is None:
        # One kernel for all images, a constant of the graph: whatever the batch, only maps scale.
        if channel_attention is not None:
            input = input * channel_attention[:, :, None, None]
        inner = bias if filter_attention is None else None
        output = F.conv2d(input, weight[0], inner, stride, padding, dilation, groups)
        if filter_attention is not None:
            output = output * filter_attention[:, :, None, None]
        return output if bias is inner else _plus(output, bias)
    _, out_channels, group_channels, *kernel_size = weight.shape
    # Every reshaping is an operation of a runtime, so images and groups have axes only where
    # there are several, or several filters in a group.
    is_one = _constant_batch(input) == 1
    images = () if is_one else (-1, )
    filters, channels = [groups, out_channels // groups], [groups, 1, group_channels]
    if groups in (1, out_channels):
        filters, channels = [out_channels], [groups, group_channels]
    kernels = weight.reshape(-1, *filters, group_channels, *kernel_size)
    if kernel_attention is not None:
        kernels = (kernel_attention @ kernels.flatten(1)).reshape(*images, *kernels.shape[1:])
    elif is_one:
        kernels = kernels[0]
    gate = None  # of the columns: small, so both of its factors are multiplied first
    if channel_attention is not None:
        gate = channel_attention.reshape(*images, *channels, 1, 1)
    if spatial_attention is not None:
        spatial = spatial_attention.reshape(*images, *(1 for _ in channels), *kernel_size)
        gate = spatial if gate is None else gate * spatial
    if gate is not None:
        kernels = kernels * gate
    if filter_attention is not None:
        kernels = kernels * filter_attention.reshape(*images, *filters, 1, 1, 1)
    if len(filters) > 1:
        kernels = kernels.reshape(*images, out_channels, group_channels, *kernel_size)
    if is_one:
        return F.conv2d(input, kernels, bias, stride, padding, dilation, groups)
    return exported_convolve_images(input, kernels, stride, padding, dilation, groups, bias)


def exported_convolve_images(input: Tensor, kernels: Tensor, stride=1, padding=0, dilation=1,
                             groups: int = 1, bias: Optional[Tensor] = None) -> Tensor:
    """:func:`~mmdet_odconv.ops.convolution.convolve_images`, plus a bias, for exporters."""
    out_channels, group_channels, kh, kw = constants(kernels.shape[1:])
    kernel_size = kh, kw
    batch = _constant_batch(input)
    if batch == 1:
        kernel = kernels.reshape(out_channels, group_channels, *kernel_size)
        return F.conv2d(input, kernel, bias, stride, padding, dilation, groups)
    if batch is not None:
        output = F.conv2d(input.reshape(1, -1, *input.shape[2:]), kernels.flatten(0, 1), None,
                          stride, padding, dilation, batch * groups)
        return _plus(output.reshape(batch, out_channels, *output.shape[2:]), bias)
    stride, padding, dilation = (
        (value, value) if isinstance(value, int) else tuple(value)
        for value in (stride, padding, dilation))
    pointwise = kernel_size == (1, 1) and stride == (1, 1) and padding == (0, 0)
    columns = input.flatten(2) if pointwise else F.unfold(input, kernel_size, dilation, padding,
                                                          stride)
    inner = group_channels * kh * kw
    matrices = kernels.reshape(-1, groups, out_channels // groups, inner)
    output = matrices @ columns.reshape(columns.shape[0], groups, inner, -1)
    height, width = ((size + 2 * p - d * (k - 1) - 1) // st + 1 for size, k, st, p, d in zip(
        input.shape[2:], kernel_size, stride, padding, dilation))
    return _plus(output.reshape(output.shape[0], out_channels, height, width), bias)


def _plus(output: Tensor, bias: Optional[Tensor]) -> Tensor:
    return output if bias is None else output + bias[:, None, None]


def _constant_batch(input: Tensor) -> Optional[int]:
    """Batch size where it is a constant of the graph, or else ``None``.

    torch.export knows which sizes may change. A tracer does not: a batch of one is taken to be
    meant, and any other to be an example.
    """
    if not torch.jit.is_tracing():
        return input.shape[0] if isinstance(input.shape[0], int) else None
    return 1 if constants(input.shape[:1]) == [1] else None


def constants(sizes: Sequence) -> List[int]:
    """Sizes as numbers, where a tracer would take them for results."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        return [int(size) for size in sizes]
