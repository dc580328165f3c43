"""Global average pooling of a map that a convolution reads too."""
from typing import Tuple

import torch
from torch import Tensor


def with_average(input: Tensor) -> Tuple[Tensor, Tensor]:
    """The input, (B, C, H, W), for one convolution to read, and its average, (B, C).

    The average's gradient is added to the convolution's in place: by itself it would be a map
    as large as the input, to be written, read and added. Use the returned input only once.
    """
    if not (input.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return input, input.mean((2, 3))
    return _WithAverage.apply(input)


class _WithAverage(torch.autograd.Function):

    @staticmethod
    def forward(ctx, input):
        ctx.set_materialize_grads(False)
        ctx.shape = input.shape
        return input.view_as(input), input.mean((2, 3))

    @staticmethod
    def backward(ctx, grad, grad_average):
        if grad_average is None:
            return grad
        pixels = ctx.shape[2] * ctx.shape[3]
        spread = (grad_average / pixels)[:, :, None, None]
        if grad is None:
            return spread.expand(ctx.shape)
        return grad + spread if torch.is_grad_enabled() else grad.add_(spread)
