"""Plan: the formulation of the published code, for comparison; never chosen.

It scales whole maps for the channel and filter attentions, mixes through a (B, n, ...) tensor and
leaves the backward pass, and what is kept for it, to autograd.
"""
import torch.nn.functional as F


def published_conv2d(input, weight, kernel_attention, spatial_attention, channel_attention,
                     filter_attention, stride, padding, dilation, groups):
    """See :func:`~mmdet_odconv.ops.dynamic_conv2d`."""
    batch, out_channels = len(input), weight.shape[1]
    if channel_attention is not None:
        input = input * channel_attention[:, :, None, None]
    if kernel_attention is None and spatial_attention is None:
        output = F.conv2d(input, weight[0], None, stride, padding, dilation, groups)
    else:
        gate = 1  # multiplied first, as published: the bank is then copied once for each image
        if spatial_attention is not None:
            gate = spatial_attention[:, None, None, None]
        if kernel_attention is not None:
            gate = kernel_attention[:, :, None, None, None, None] * gate
        kernels = gate * weight[None]
        output = F.conv2d(input.reshape(1, -1, *input.shape[2:]), kernels.sum(1).flatten(0, 1),
                          None, stride, padding, dilation, batch * groups)
        output = output.view(batch, out_channels, *output.shape[2:])
    if filter_attention is not None:
        output = output * filter_attention[:, :, None, None]
    return output
