"""Convolution of each image with a kernel of its own, however that kernel was made."""
import torch.nn.functional as F
from torch import Tensor

from .exported import exported_convolve_images, is_exporting


def convolve_images(input: Tensor, kernels: Tensor, stride=1, padding=0, dilation=1,
                    groups: int = 1) -> Tensor:
    """Convolve the b-th image with the b-th kernel.

    Args:
        input: (B, Cin, H, W).
        kernels: (B, Cout, Cin / groups, kh, kw).
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`.

    Returns:
        (B, Cout, Hout, Wout).
    """
    if is_exporting():
        return exported_convolve_images(input, kernels, stride, padding, dilation, groups)
    batch = len(input)
    output = F.conv2d(input.reshape(1, -1, *input.shape[2:]), kernels.flatten(0, 1), None, stride,
                      padding, dilation, batch * groups)
    return output.view(batch, -1, *output.shape[2:])
