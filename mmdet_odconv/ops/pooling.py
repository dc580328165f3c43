"""Global average pooling of a map that a convolution reads too."""
from typing import Tuple

import torch
from torch import Tensor

from .convolution import is_traced
from .kernels import sum_dtype


def with_average(input: Tensor) -> Tuple[Tensor, Tensor]:
    """The input, (B, C, H, W), for a convolution to read, and its average, (B, C).

    The average of float16 is float32: its gradient, before it is divided among the pixels, may be
    larger than float16 holds.

    The average's gradient is added to the convolution's in place: by itself it would be a map
    as large as the input, to be written, read and added. So give the returned input only to
    operations whose gradient is a new tensor, as a convolution's is and a sum's is not.
    """
    if not (input.requires_grad and torch.is_grad_enabled()) or is_traced():
        return input, _average(input)
    return _WithAverage.apply(input)


class _WithAverage(torch.autograd.Function):

    @staticmethod
    def forward(ctx, input):
        ctx.set_materialize_grads(False)
        ctx.shape = input.shape
        return input.view_as(input), _average(input)

    @staticmethod
    def backward(ctx, grad, grad_average):
        if grad_average is None:
            return grad
        pixels = ctx.shape[2] * ctx.shape[3]
        spread = (grad_average / pixels)[:, :, None, None]
        if grad is None:
            return spread.expand(ctx.shape)
        return grad + spread if torch.is_grad_enabled() else grad.add_(spread)


def _average(input: Tensor) -> Tensor:
    return input.mean((2, 3), dtype=sum_dtype(input.dtype))
