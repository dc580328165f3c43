"""Dynamic convolution as exporters need it: without a number of groups that is the batch's."""
import torch.nn.functional as F
from torch import Tensor

from .convolution import output_size
from .kernels import folded_kernels


def unfolded_conv2d(input, weight, kernel_attention, spatial_attention, channel_attention,
                    filter_attention, stride, padding, dilation, groups) -> Tensor:
    """``dynamic_conv2d`` as one matrix product with patches."""
    kernels = folded_kernels(input, weight, kernel_attention, spatial_attention,
                             channel_attention, filter_attention, groups)
    columns = F.unfold(input, weight.shape[3:], dilation, padding, stride)
    output = kernels @ columns.unflatten(1, (groups, -1))
    size = output_size(input.shape, weight.shape, stride, padding, dilation)
    return output.flatten(1, 2).unflatten(2, size)
