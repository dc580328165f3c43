"""Convolution of each image with a kernel of its own, however that kernel was made."""
import functools
import math
from typing import Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .exported import constants, exported_convolve_images, is_exporting
from .machine import NOMINAL, Machine, machine


def convolve_images(input: Tensor, kernels: Tensor, stride=1, padding=0, dilation=1,
                    groups: int = 1, bias: Optional[Tensor] = None) -> Tensor:
    """Convolve the b-th image with the b-th kernel; differentiable, as often as one likes.

    By the backend that static convolutions go through, one call an image or one grouped by image,
    or by a matrix product where a 1x1 kernel allows it: whichever this machine does fastest.

    Args:
        input: (B, Cin, H, W); B may be 0.
        kernels: (B, Cout, Cin / groups, kh, kw).
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`.
        bias: (Cout,), added as it is.

    Returns:
        (B, Cout, Hout, Wout).
    """
    if is_exporting():
        if isinstance(padding, str):  # which conv2d knows, and unfold does not
            padding, widths = resolve_padding(constants(kernels.shape[3:]), pair(stride), padding,
                                              pair(dilation))
            input = input if widths is None else F.pad(input, widths)
        return exported_convolve_images(input, kernels, stride, padding, dilation, groups,
                                        None if bias is None else bias.to(input.dtype))
    output = _convolved(input, kernels, stride, padding, dilation, groups)
    return output if bias is None else output + bias.to(output.dtype)[:, None, None]


def _convolved(input: Tensor, kernels: Tensor, stride, padding, dilation, groups: int) -> Tensor:
    if len(input) == 0:  # no image has a kernel, but all arguments stay in the graph
        return F.conv2d(input, kernels.sum(0), None, stride, padding, dilation, groups)
    way = choose_way(input, kernels.shape[1:], stride, padding, dilation, groups)
    if way == 'product':
        output = kernels.flatten(2) @ input.flatten(2)
        return output.view(len(input), -1, *input.shape[2:])
    if way == 'grouped':
        output = F.conv2d(images_as_channels(input), kernels.flatten(0, 1), None, stride, padding,
                          dilation, len(input) * groups)
        return output.view(len(input), -1, *output.shape[2:])
    # split and unbind, whose gradients are put together once: an index's would be as large as all.
    outputs = [F.conv2d(image, kernel, None, stride, padding, dilation, groups)
               for image, kernel in zip(input.split(1), kernels.unbind())]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def convolution_gradients(grad: Tensor, input: Tensor, kernels: Tensor, stride, padding, dilation,
                          groups: int, needs_input: bool, needs_kernels: bool
                          ) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """Gradients of input and kernels of :func:`convolve_images`, shaped as they are."""
    way = choose_way(input, kernels.shape[1:], stride, padding, dilation, groups)
    if way == 'product':
        grad, matrices = grad.flatten(2), kernels.flatten(2)
        grad_input = (matrices.mT @ grad).view(input.shape) if needs_input else None
        grad_kernels = (grad @ input.flatten(2).mT).view(kernels.shape) if needs_kernels else None
        return grad_input, grad_kernels

    def backward(grad, images, kernel, groups):
        return torch.ops.aten.convolution_backward(
            grad, images, kernel, None, stride, padding, dilation, False, [0, 0], groups,
            [needs_input, needs_kernels, False])

    if way == 'grouped':
        grad_input, grad_kernels, _ = backward(images_as_channels(grad), images_as_channels(input),
                                               kernels.flatten(0, 1), len(input) * groups)
        return (None if grad_input is None else grad_input.reshape(input.shape),
                None if grad_kernels is None else grad_kernels.reshape(kernels.shape))
    grads = [backward(*of_image, groups)
             for of_image in zip(grad.split(1), input.split(1), kernels.unbind())]
    if len(grads) == 1:
        (grad_input, grad_kernel, _), = grads
        return grad_input, None if grad_kernel is None else grad_kernel[None]
    return (torch.cat([g for g, _, _ in grads]) if needs_input else None,
            torch.stack([g for _, g, _ in grads]) if needs_kernels else None)


def choose_way(input: Tensor, kernel_shape, stride, padding, dilation, groups: int) -> str:
    """'images', 'grouped' or 'product': that of least :func:`way_costs`."""
    if is_traced():
        return 'grouped'  # a compiler sees one convolution, and vmap has a rule for it
    if isinstance(padding, str):
        return 'images'
    return _cheapest_way(machine_of(input), input.element_size(), tuple(input.shape),
                         tuple(kernel_shape), pair(stride), pair(padding), pair(dilation), groups)


@functools.lru_cache(maxsize=4096)
def _cheapest_way(*call) -> str:
    costs = way_costs(*call)
    return min(costs, key=costs.get)


def way_costs(machine: Machine, element_size: int, input_shape, kernel_shape, stride, padding,
              dilation, groups: int) -> Dict[str, float]:
    """Seconds of each way to convolve a batch with kernels of its own.

    Beside its flops, 'images' has a call an image, and their outputs to put together; the first
    of equals is chosen.
    """
    batch = input_shape[0]
    pixels = math.prod(output_size(input_shape, kernel_shape, stride, padding, dilation))
    flops = 2 * batch * math.prod(kernel_shape) * pixels
    costs = dict(images=flops / machine.convolution + batch * machine.overhead)
    if batch > 1:
        copied = 2 * batch * kernel_shape[0] * pixels * element_size
        costs['images'] += copied / machine.bandwidth
        if groups > 1 or not is_pointwise(kernel_shape, stride, padding):
            costs['grouped'] = flops / machine.grouped + machine.overhead
    if groups == 1 and is_pointwise(kernel_shape, stride, padding):
        costs['product'] = flops / machine.product + machine.overhead
    return costs


def machine_of(input: Tensor) -> Machine:
    """Of the tensor's device and dtype; nominal for one that no device holds."""
    if type(input) is not Tensor and not isinstance(input, torch.nn.Parameter):
        return NOMINAL  # a fake tensor, say
    return machine(input.device, input.dtype)


def output_size(input_shape, kernel_shape, stride, padding, dilation) -> Tuple[int, int]:
    """Height and width of the output, px."""
    return tuple((size + 2 * p - d * (k - 1) - 1 + st) // st for size, k, st, p, d in zip(
        input_shape[2:], kernel_shape[-2:], stride, padding, dilation))


def is_pointwise(kernel_shape, stride, padding) -> bool:
    """Whether each output pixel is made from the one input pixel in its place."""
    return tuple(kernel_shape[-2:]) == (1, 1) and not any(padding) and tuple(stride) == (1, 1)


def images_as_channels(maps: Tensor) -> Tensor:
    """(B, C, H, W) -> (1, B * C, H, W)."""
    return maps.reshape(1, -1, *maps.shape[2:])


def pair(value) -> Tuple[int, int]:
    """One number or two, as two."""
    return (value, value) if isinstance(value, int) else tuple(value)


def resolve_padding(kernel_size, stride, padding: str, dilation):
    """Numbers for 'same' and 'valid', as nn.Conv2d reads them; an odd 'same' pads the input.

    Returns:
        Padding as a pair, and widths to pad the input by first, or None.

    Raises:
        ValueError: for another string, or if 'same' meets a stride.
    """
    if padding == 'valid':
        return (0, 0), None
    if padding != 'same':
        raise ValueError(f"padding must be numbers, 'same' or 'valid', got {padding!r}")
    if stride != (1, 1):
        raise ValueError(f"padding='same' needs stride 1, got {stride}")
    totals = [d * (k - 1) for d, k in zip(dilation, kernel_size)]
    if all(total % 2 == 0 for total in totals):
        return tuple(total // 2 for total in totals), None
    before = [total // 2 for total in totals]
    after = [total - first for total, first in zip(totals, before)]
    return (0, 0), (before[1], after[1], before[0], after[0])


def is_traced() -> bool:
    """Whether plain operations are asked for, whose gradients are torch's own to find.

    So it is while a graph is drawn, by a compiler or an exporter, and under ``torch.func``.
    """
    return torch.compiler.is_compiling() or is_exporting() or _is_transformed()


def _is_transformed() -> bool:
    active = getattr(torch._C, '_are_functorch_transforms_active', None)
    return active is not None and active()
