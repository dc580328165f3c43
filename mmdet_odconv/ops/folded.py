"""Plan: one kernel per image, folded whole, and one convolution grouped by image.

The images lie side by side as channels, (1, B * Cin, H, W), which moves no data. Best where the
maps are larger than the kernels: then folding all attentions into the kernels costs next to
nothing and the maps are read by the convolution alone. Of the forward pass only the input and the
attentions are kept; the kernels are mixed again in the backward pass. On CUDA both are done by
Triton kernels where Triton is installed.
"""
import functools
import warnings
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor


def kernels_for(input: Tensor):
    """The module of Triton kernels if they serve this input, else None.

    Its functions take a bank of any dtype; plain operations need the input's.
    """
    if not input.is_cuda or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None  # compilers and tracers see through plain operations only
    return _triton_kernels(input.device)


@functools.cache
def _triton_kernels(device: torch.device):
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None  # no bfloat16 before
    try:
        from . import triton_kernels
    except ImportError:
        return None
    try:
        triton_kernels.fold_kernels(torch.ones(1, 1, 1, 1, 1, device=device), None, None, None,
                                    None, 1, 1, torch.float32)
    except Exception as error:
        # An image without a C compiler, say, which Triton needs to launch its kernels.
        warnings.warn(f'Triton fails on {device}, so slower plain operations replace its kernels '
                      f'({error}). Repair Triton, or uninstall it.', stacklevel=2)
        return None
    return triton_kernels


def mix(weight: Tensor, kernel_attention: Optional[Tensor], batch: int) -> Tensor:
    """sum_i a_b[i] W[i], (B, Cout, Cin / groups, kh, kw); a view of the bank if there is no a."""
    if kernel_attention is None:
        return weight.expand(batch, *weight.shape[1:])
    # One matrix product reads the bank once and makes no (B, n, ...) intermediate.
    return (kernel_attention @ weight.flatten(1)).view(batch, *weight.shape[1:])


def input_gate(spatial_attention: Optional[Tensor], channel_attention: Optional[Tensor],
               groups: int) -> Optional[Tensor]:
    """c and s as one factor of the kernels, broadcastable to (B, groups, Cout/g, Cin/g, kh, kw)."""
    gate = None
    if channel_attention is not None:
        gate = channel_attention.view(len(channel_attention), groups, 1, -1, 1, 1)
    if spatial_attention is not None:
        spatial = spatial_attention[:, None, None, None]
        gate = spatial if gate is None else gate * spatial
    return gate


def input_gate_gradients(grad_gate: Optional[Tensor], s: Optional[Tensor], c: Optional[Tensor]
                         ) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """Gradients of s and c from that of their gate, (B, groups or 1, Cin / groups, kh, kw)."""
    grad_s = grad_c = None
    if s is not None:
        channels = 1 if c is None else c.view(*grad_gate.shape[:3], 1, 1)
        grad_s = (grad_gate * channels).sum((1, 2))
    if c is not None:
        spatial = 1 if s is None else s[:, None, None]
        grad_c = (grad_gate * spatial).sum((3, 4)).flatten(1)
    return grad_s, grad_c


def fold(mixed: Tensor, gate: Optional[Tensor], filter_attention: Optional[Tensor],
         groups: int) -> Tensor:
    """Kernels of every image with all their attentions, shaped like ``mixed``."""
    if gate is None and filter_attention is None:
        return mixed
    kernels = mixed.unflatten(1, (groups, -1))
    if gate is not None:
        kernels = kernels * gate
    if filter_attention is not None:
        factor = filter_attention.view(len(mixed), groups, -1, 1, 1, 1)
        kernels = kernels * factor
    return kernels.flatten(1, 2)


def folded_conv2d(input, weight, kernel_attention, spatial_attention, channel_attention,
                  filter_attention, stride, padding, dilation, groups) -> Tensor:
    """The plan in plain operations, which autograd and torch.compile see through."""
    gate = input_gate(spatial_attention, channel_attention, groups)
    mixed = mix(weight.to(input.dtype), kernel_attention, len(input))
    kernels = fold(mixed, gate, filter_attention, groups)
    return convolve(input, kernels, stride, padding, dilation, groups)


def differentiable_gradients(ctx, grad: Tensor, *geometry) -> Tuple[Optional[Tensor], ...]:
    """Gradients of the saved tensors, themselves differentiable: for create_graph=True."""
    needed = [i for i, needs in enumerate(ctx.needs_input_grad[:6]) if needs]
    # Aliases: the attentions may depend on the input by a path that autograd also takes.
    tensors = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
    output = folded_conv2d(*tensors, *geometry)
    grads = torch.autograd.grad(output, [tensors[i] for i in needed], grad, create_graph=True)
    found = dict(zip(needed, grads))
    return tuple(found.get(i) for i in range(6))


class FoldedConv(torch.autograd.Function):
    """Forward and backward of the plan; see :func:`~mmdet_odconv.ops.dynamic_conv2d`."""

    @staticmethod
    def forward(ctx, input, weight, kernel_attention, spatial_attention, channel_attention,
                filter_attention, stride, padding, dilation, groups):
        ctx.save_for_backward(input, weight, kernel_attention, spatial_attention,
                              channel_attention, filter_attention)
        ctx.geometry = stride, padding, dilation, groups
        ctx.triton = kernels_for(input)
        if ctx.triton is not None:
            kernels = ctx.triton.fold_kernels(
                weight, kernel_attention, spatial_attention, channel_attention, filter_attention,
                groups, len(input), input.dtype)
            return convolve(input, kernels, stride, padding, dilation, groups)
        return folded_conv2d(input, weight, kernel_attention, spatial_attention, channel_attention,
                             filter_attention, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            return (*differentiable_gradients(ctx, grad, *ctx.geometry), None, None, None, None)
        input, weight, a, s, c, f = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        batch = len(input)
        if ctx.triton is not None:
            kernels = ctx.triton.fold_kernels(weight, a, s, c, f, groups, batch, input.dtype)
        else:
            mixed = mix(weight, a, batch)
            gate = input_gate(s, c, groups)
            kernels = fold(mixed, gate, f, groups)
        needs_kernels = any(ctx.needs_input_grad[1:6])
        grad_input, grad_kernels, _ = torch.ops.aten.convolution_backward(
            images_as_channels(grad), images_as_channels(input), kernels.flatten(0, 1), None,
            stride, padding, dilation, False, [0, 0], batch * groups,
            [ctx.needs_input_grad[0], needs_kernels, False])
        if grad_input is not None:
            grad_input = grad_input.view_as(input)
        if not needs_kernels:
            return (grad_input, *[None] * 9)
        grad_kernels = grad_kernels.contiguous().view(kernels.shape)
        if ctx.triton is not None:
            grads = ctx.triton.fold_kernels_backward(grad_kernels, weight, a, s, c, f, groups,
                                                     ctx.needs_input_grad[1])
        else:
            grads = unfold_gradients(grad_kernels, mixed, weight, a, s, c, f, gate, groups,
                                     ctx.needs_input_grad[1])
        return (grad_input, *grads, None, None, None, None)


def convolve(input: Tensor, kernels: Tensor, stride, padding, dilation, groups) -> Tensor:
    """Convolve image b of (B, Cin, H, W) with kernels[b]."""
    batch, out_channels = kernels.shape[:2]
    output = F.conv2d(images_as_channels(input), kernels.flatten(0, 1), None, stride, padding,
                      dilation, batch * groups)
    return output.view(batch, out_channels, *output.shape[2:])


def images_as_channels(maps: Tensor) -> Tensor:
    """(B, C, H, W) -> (1, B * C, H, W)."""
    return maps.reshape(1, -1, *maps.shape[2:])


def unfold_gradients(grad: Tensor, mixed: Tensor, weight: Tensor, a, s, c, f, gate, groups: int,
                     needs_bank: bool) -> Tuple[Optional[Tensor], ...]:
    """Gradients of the bank, a, s, c and f from that of the folded kernels, which is overwritten.

    With K = f * g * M, where g is the input gate and M the mixed kernels: dM = f * g * dK, and f
    and g have what remains of dK * M summed over the axes that they lack.
    """
    batch, _, group_channels, *kernel_size = mixed.shape
    grouped = (batch, groups, -1, group_channels * kernel_size[0] * kernel_size[1])
    grad_gate = grad_f = None
    if gate is not None or f is not None:
        product = (grad * mixed).reshape(grouped)
        if gate is not None:
            full_gate = gate.expand(batch, groups, 1, group_channels, *kernel_size)
            full_gate = full_gate.reshape(batch, groups, 1, -1)
        if f is not None:
            grad_f = (product.sum(-1) if gate is None else
                      (product @ full_gate.mT).squeeze(-1)).view(batch, -1)
        if gate is not None:
            grad_gate = (product.sum(2, keepdim=True) if f is None else
                         f.view(batch, groups, 1, -1) @ product)
            grad_gate = grad_gate.view(batch, groups, group_channels, *kernel_size)
        del product
        grad = grad.view(grouped)
        if gate is not None:
            grad = grad.mul_(full_gate)
        if f is not None:
            grad = grad.mul_(f.view(batch, groups, -1, 1))
    grad_s, grad_c = input_gate_gradients(grad_gate, s, c)
    grad = grad.reshape(batch, -1)
    if a is None:
        grad_weight = grad.sum(0) if needs_bank else None
        grad_a = None
    else:
        grad_weight = a.mT @ grad if needs_bank else None
        grad_a = grad @ weight.flatten(1).mT
    if grad_weight is not None:
        grad_weight = grad_weight.view_as(weight)
    return grad_weight, grad_a, grad_s, grad_c, grad_f
