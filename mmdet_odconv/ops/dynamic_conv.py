"""The one function that every dynamic convolution layer calls."""
from typing import Optional, Tuple, Union

import torch.nn.functional as F
from torch import Tensor

Size2d = Union[int, Tuple[int, int]]


def dynamic_conv2d(input: Tensor,
                   weight: Tensor,
                   bias: Optional[Tensor] = None,
                   stride: Size2d = 1,
                   padding: Union[str, Size2d] = 0,
                   dilation: Size2d = 1,
                   groups: int = 1,
                   *,
                   kernel_attention: Optional[Tensor] = None,
                   spatial_attention: Optional[Tensor] = None,
                   channel_attention: Optional[Tensor] = None,
                   filter_attention: Optional[Tensor] = None) -> Tensor:
    r"""2-D convolution of each image with a kernel of its own (ODConv, ICLR 2022, eq. 3).

    Image :math:`b` is convolved with

    .. math:: W_b[o,c,p] = f_b[o]\, c_b[c]\, s_b[p] \sum_i a_b[i]\, W[i,o,c,p]

    where an attention that is ``None`` counts as 1. With groups, the channel attention of group
    :math:`j` multiplies that group's own input channels. The bias is added as it is.

    Args:
        input: (B, Cin, H, W); B may be 0.
        weight: bank of kernels, (n, Cout, Cin / groups, kh, kw).
        bias: (Cout,).
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`.
        kernel_attention: :math:`a`, (B, n). Required when n > 1.
        spatial_attention: :math:`s`, (B, kh, kw).
        channel_attention: :math:`c`, (B, Cin).
        filter_attention: :math:`f`, (B, Cout).

    Returns:
        (B, Cout, Hout, Wout).

    Raises:
        ValueError: if a shape is not one of those above.
    """
    _check_shapes(input, weight, groups, kernel_attention, spatial_attention, channel_attention,
                  filter_attention)
    batch, in_channels = input.shape[:2]
    bank_size, out_channels = weight.shape[:2]
    geometry = (stride, padding, dilation)

    # Scaling the maps costs one pass over them and is the same for every plan below.
    if channel_attention is not None:
        input = input * channel_attention.to(input.dtype)[:, :, None, None]

    if batch == 0:
        # No image has a kernel, yet every parameter must stay in the graph: under DDP a rank
        # with an empty batch would otherwise leave the others waiting for its gradients.
        output = F.conv2d(input, weight.sum(0), None, *geometry, groups)
        for attention in (kernel_attention, spatial_attention):
            if attention is not None:
                output = output + attention.sum()
    elif kernel_attention is None and spatial_attention is None:
        output = F.conv2d(input, weight[0], None, *geometry, groups)
    else:
        kernels = _mix_kernels(weight, batch, kernel_attention, spatial_attention)
        # One grouped convolution over the images laid side by side as channels.
        output = F.conv2d(
            input.reshape(1, batch * in_channels, *input.shape[2:]), kernels.flatten(0, 1), None,
            *geometry, batch * groups)
        output = output.view(batch, out_channels, *output.shape[2:])

    if filter_attention is not None:
        output = output * filter_attention.to(output.dtype)[:, :, None, None]
    if bias is not None:
        output = output + bias.to(output.dtype)[:, None, None]
    return output


def _mix_kernels(weight: Tensor, batch: int, kernel_attention: Optional[Tensor],
                 spatial_attention: Optional[Tensor]) -> Tensor:
    """Kernels of each image, (B, Cout, Cin / groups, kh, kw), before channel and filter scaling."""
    if kernel_attention is None:
        kernels = weight.expand(batch, *weight.shape[1:])
    else:
        # One matrix product reads the bank once and makes no (B, n, ...) intermediate.
        kernels = kernel_attention.to(weight.dtype) @ weight.flatten(1)
        kernels = kernels.view(batch, *weight.shape[1:])
    if spatial_attention is not None:
        kernels = kernels * spatial_attention.to(kernels.dtype)[:, None, None]
    return kernels


def _check_shapes(input, weight, groups, kernel_attention, spatial_attention, channel_attention,
                  filter_attention) -> None:
    if input.dim() != 4:
        raise ValueError(f'input must be 4-D (B, Cin, H, W), got shape {tuple(input.shape)}')
    if weight.dim() != 5:
        raise ValueError('weight must be a 5-D bank (n, Cout, Cin / groups, kh, kw), got shape '
                         f'{tuple(weight.shape)}')
    batch, in_channels = input.shape[:2]
    bank_size, out_channels, group_channels, *kernel_size = weight.shape
    if in_channels != group_channels * groups:
        raise ValueError(f'weight of shape {tuple(weight.shape)} with groups={groups} needs an '
                         f'input of {group_channels * groups} channels, got {in_channels}')
    if bank_size > 1 and kernel_attention is None:
        raise ValueError(f'a bank of {bank_size} kernels needs kernel_attention of shape '
                         f'{(batch, bank_size)}, got None')
    expected = dict(
        kernel_attention=(kernel_attention, (batch, bank_size)),
        spatial_attention=(spatial_attention, (batch, *kernel_size)),
        channel_attention=(channel_attention, (batch, in_channels)),
        filter_attention=(filter_attention, (batch, out_channels)))
    for name, (attention, shape) in expected.items():
        if attention is not None and attention.shape != shape:
            raise ValueError(f'{name} must have shape {shape}, got {tuple(attention.shape)}')
