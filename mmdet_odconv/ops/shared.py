"""Plan: one convolution of all images with the one kernel of the bank, between scaled maps.

For a bank of one without spatial attention: the channel attention scales the input and the filter
attention the output. Best where the maps are smaller than the kernels that they would else need.
"""
import torch
import torch.nn.functional as F

from .folded import as_in_forward, differentiable_gradients


class SharedConv(torch.autograd.Function):
    """Forward and backward of the plan; see :func:`~mmdet_odconv.ops.dynamic_conv2d`."""

    @staticmethod
    def forward(ctx, input, weight, kernel_attention, spatial_attention, channel_attention,
                filter_attention, *geometry):
        ctx.save_for_backward(input, weight, kernel_attention, spatial_attention,
                              channel_attention, filter_attention)
        ctx.geometry = geometry
        stride, padding, dilation, groups = geometry
        output = F.conv2d(scale(input, channel_attention), weight[0], None, stride, padding,
                          dilation, groups)
        return output if filter_attention is None else output.mul_(over_maps(filter_attention))

    @staticmethod
    @as_in_forward
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            return (*differentiable_gradients(ctx, grad, *ctx.geometry), None, None, None, None)
        input, weight, _, _, c, f = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        scaled, kernel = scale(input, c), weight[0]
        grad_c = grad_f = None
        if f is not None:
            # Computed again: kept, it would double the memory that the layer's output takes.
            output = F.conv2d(scaled, kernel, None, stride, padding, dilation, groups)
            grad_f = (grad * output).sum((2, 3))
            grad = grad * over_maps(f)
        needs_input = ctx.needs_input_grad[0] or c is not None
        grad_input, grad_kernel, _ = torch.ops.aten.convolution_backward(
            grad, scaled, kernel, None, stride, padding, dilation, False, [0, 0], groups,
            [needs_input, ctx.needs_input_grad[1], False])
        if c is not None:
            grad_c = (grad_input * input).sum((2, 3))
            grad_input.mul_(over_maps(c))
        grad_weight = None if grad_kernel is None else grad_kernel[None]
        return grad_input, grad_weight, None, None, grad_c, grad_f, None, None, None, None


def scale(maps, attention):
    return maps if attention is None else maps * over_maps(attention)


def over_maps(attention):
    return attention[:, :, None, None]
