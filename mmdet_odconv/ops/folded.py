"""Plan: one kernel per image, folded whole, and one convolution grouped by image.

The images lie side by side as channels, (1, B * Cin, H, W), which moves no data. Best where the
maps are larger than the kernels: then folding all attentions into the kernels costs next to
nothing and the maps are read by the convolution alone. Of the forward pass only the input and the
attentions are kept; the kernels are mixed again in the backward pass.
"""
import functools
from typing import Callable, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Kernels that are worked on at once, in bytes: what the second-level caches of a few cores hold.
# Larger intermediates would travel to memory and back between two operations.
BLOCK_BYTES = 2**22
# Kernels that are convolved with at once, in bytes: larger ones would be allocated anew each time,
# and a page of memory costs more when it is first touched than to be written ten times.
CHUNK_BYTES = 2**24

ALL = slice(None)


def folded_conv2d(input, weight, kernel_attention, spatial_attention, channel_attention,
                  filter_attention, stride, padding, dilation, groups) -> Tensor:
    """The plan in operations that autograd and torch.compile see through."""
    kernels = folded_kernels(input, weight, kernel_attention, spatial_attention,
                             channel_attention, filter_attention, groups)
    return convolve(input, as_kernels(kernels, weight), stride, padding, dilation, groups)


def folded_kernels(input, weight, a, s, c, f, groups: int) -> Tensor:
    """Kernels of the batch as matrices, (B, groups, Cout / groups, I); differentiable."""
    bank, gate, row_f = as_matrices(weight.to(input.dtype), s, c, f, groups)
    return fold(mix(bank, a, input.shape[0]), gate, row_f)


def own(output: Tensor) -> Tensor:
    """The same values, no view to autograd: it refuses to change a Function's views in place."""
    return torch.ops.aten._unsafe_view(output, output.shape)


def as_in_forward(backward: Callable) -> Callable:
    """A backward pass in the dtypes of its forward pass, wherever autocast is on by then."""

    @functools.wraps(backward)
    def run(ctx, grad):
        device = grad.device.type
        if device == 'meta' or not torch.is_autocast_enabled(device):
            return backward(ctx, grad)
        with torch.autocast(device, enabled=False):
            return backward(ctx, grad)

    return run


class FoldedConv(torch.autograd.Function):
    """Forward and backward of the plan; see :func:`~mmdet_odconv.ops.dynamic_conv2d`."""

    @staticmethod
    def forward(ctx, input, weight, kernel_attention, spatial_attention, channel_attention,
                filter_attention, stride, padding, dilation, groups):
        ctx.save_for_backward(input, weight, kernel_attention, spatial_attention,
                              channel_attention, filter_attention)
        ctx.geometry = stride, padding, dilation, groups
        bank, *factors = as_matrices(weight, spatial_attention, channel_attention,
                                     filter_attention, groups)
        outputs = []
        for images in chunks(bank, len(input)):
            some = part(input, images)
            kernels = fold_by_rows(
                bank, *(part(t, images) for t in (kernel_attention, *factors)), len(some))
            outputs.append(convolve(some, as_kernels(kernels, weight), *ctx.geometry))
        return own(outputs[0]) if len(outputs) == 1 else torch.cat(outputs)

    @staticmethod
    @as_in_forward
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            return (*differentiable_gradients(ctx, grad, *ctx.geometry), None, None, None, None)
        input, weight, a, s, c, f = ctx.saved_tensors
        bank, gate, row_f = as_matrices(weight, s, c, f, ctx.geometry[-1])
        needs_kernels = any(ctx.needs_input_grad[1:6])
        gradients = KernelGradients(bank, a, gate, row_f, len(input), ctx.needs_input_grad[1])
        grad_inputs = []
        for images in chunks(bank, len(input)):
            attentions = [part(t, images) for t in (a, gate, row_f)]
            kernels = fold_by_rows(bank, *attentions, len(part(input, images)))
            grad_input, grad_kernels = convolution_gradients(
                part(grad, images), part(input, images), as_kernels(kernels, weight), *ctx.geometry,
                ctx.needs_input_grad[0], needs_kernels)
            grad_inputs.append(grad_input)
            if needs_kernels:
                grad_kernels = grad_kernels.view(kernels.shape)
                for rows in row_blocks(bank, len(kernels)):
                    mixed = mix(part(bank, ALL, rows), attentions[0], len(kernels))
                    gradients.add(rows, images, part(grad_kernels, ALL, rows), mixed)
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad_input = grad_inputs[0] if len(grad_inputs) == 1 else torch.cat(grad_inputs)
        return (grad_input, *gradients.of(weight, s, c, f), None, None, None, None)


def chunks(bank: Tensor, batch: int) -> Sequence[slice]:
    """Slices of images whose kernels are of CHUNK_BYTES; all images elsewhere than on a CPU."""
    if bank.device.type != 'cpu':
        return slices(batch, batch)
    return slices(batch, CHUNK_BYTES // (bank[0].numel() * bank.element_size()))


def fold_by_rows(bank: Tensor, a: Optional[Tensor], gate: Optional[Tensor], f: Optional[Tensor],
                 batch: int) -> Tensor:
    """:func:`fold` of :func:`mix`, made in the cache; not differentiable."""
    if a is None:
        return fold(mix(bank, a, batch), gate, f)
    kernels = bank.new_empty(batch, *bank.shape[1:])
    for rows in row_blocks(bank, batch):
        block = part(kernels, ALL, rows)
        torch.mm(a, part(bank, ALL, rows).flatten(1), out=block.flatten(1))
        fold(block, gate, part(f, ALL, rows), inplace=True)
    return kernels


def as_kernels(matrices: Tensor, weight: Tensor) -> Tensor:
    """(B, groups, rows, I) -> (B * Cout, Cin / groups, kh, kw)."""
    return matrices.reshape(-1, *weight.shape[2:])


def convolve(input: Tensor, kernels: Tensor, stride, padding, dilation, groups: int) -> Tensor:
    """Convolve image b of (B, Cin, H, W) with the b-th Cout of (B * Cout, Cin / groups, kh, kw)."""
    batch = input.shape[0]
    if groups == 1 and is_pointwise(kernels.shape, stride, padding):
        output = kernels.view(batch, -1, input.shape[1]) @ input.flatten(2)
        return output.view(batch, -1, *input.shape[2:])
    output = F.conv2d(images_as_channels(input), kernels, None, stride, padding, dilation,
                      batch * groups)
    return output.view(batch, -1, *output.shape[2:])


def convolution_gradients(grad, input, kernels, stride, padding, dilation, groups: int,
                          needs_input: bool, needs_kernels: bool
                          ) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """Gradients of input and kernels of :func:`convolve`, shaped as they are."""
    if groups == 1 and is_pointwise(kernels.shape, stride, padding):
        grad = grad.flatten(2)
        matrices = kernels.view(len(input), -1, input.shape[1])
        grad_input = (matrices.mT @ grad).view(input.shape) if needs_input else None
        grad_kernels = grad @ input.flatten(2).mT if needs_kernels else None
    else:
        grad_input, grad_kernels, _ = torch.ops.aten.convolution_backward(
            images_as_channels(grad), images_as_channels(input), kernels, None, stride, padding,
            dilation, False, [0, 0], len(input) * groups, [needs_input, needs_kernels, False])
        grad_input = None if grad_input is None else grad_input.reshape(input.shape)
    if grad_kernels is not None:
        grad_kernels = grad_kernels.reshape(kernels.shape).contiguous()
    return grad_input, grad_kernels


def output_size(input_shape, weight_shape, stride, padding, dilation):
    """Height and width of the output, px."""
    return tuple((size + 2 * p - d * (k - 1) - 1 + st) // st for size, k, st, p, d in zip(
        input_shape[2:], weight_shape[3:], stride, padding, dilation))


def is_pointwise(weight_shape, stride, padding) -> bool:
    """Whether each output pixel is made from the one input pixel in its place."""
    return tuple(weight_shape[-2:]) == (1, 1) and not any(padding) and tuple(stride) == (1, 1)


def images_as_channels(maps: Tensor) -> Tensor:
    """(B, C, H, W) -> (1, B * C, H, W)."""
    return maps.reshape(1, -1, *maps.shape[2:])


# Below, kernels are matrices: a bank is (n, groups, rows, I), where rows are the output channels
# of a group and I = Cin / groups * kh * kw; the kernels of a batch are (B, groups, rows, I).


def as_matrices(weight: Tensor, s: Optional[Tensor], c: Optional[Tensor], f: Optional[Tensor],
                groups: int) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    """The bank; c and s as one gate of its columns, (B, groups or 1, 1, I); f, (B, groups, rows).

    Views, but for a gate of both c and s.
    """
    bank_size, out_channels, group_channels, *kernel_size = weight.shape
    area = kernel_size[0] * kernel_size[1]
    bank = weight.reshape(bank_size, groups, out_channels // groups, group_channels * area)
    gate = c
    if s is not None:
        gate = s.reshape(s.shape[0], 1, 1, area)
        gate = gate.expand(-1, -1, group_channels, -1) if c is None else (
            c.view(c.shape[0], groups, group_channels, 1) * gate)
    elif c is not None and area > 1:
        gate = c.view(c.shape[0], groups, group_channels, 1).expand(-1, -1, -1, area)
    if gate is not None:
        gate = gate.reshape(gate.shape[0], -1, 1, group_channels * area)
    return bank, gate, None if f is None else f.view(f.shape[0], groups, -1)


def row_blocks(bank: Tensor, batch: int) -> Sequence[slice]:
    """Slices of rows whose kernels, of so many images, are of BLOCK_BYTES.

    All rows if they are grouped, or elsewhere than on a CPU.
    """
    rows, columns = bank.shape[2:]
    if bank.shape[1] > 1 or bank.device.type != 'cpu':
        return slices(rows, rows)
    return slices(rows, max(8, BLOCK_BYTES // (batch * columns * bank.element_size())))


def slices(total: int, step: int) -> Sequence[slice]:
    if step >= total:
        return (ALL, )
    step = max(1, step)
    return [slice(first, min(first + step, total)) for first in range(0, total, step)]


def part(tensor: Optional[Tensor], images: slice, rows: slice = ALL) -> Optional[Tensor]:
    """Images, and rows of the third axis, of a tensor if there is one; itself if that is all."""
    if tensor is None or images is rows is ALL:
        return tensor
    return tensor[images] if rows is ALL else tensor[images, :, rows]


def mix(bank: Tensor, a: Optional[Tensor], batch: int) -> Tensor:
    """sum_i a_b[i] W[i], (B, groups, rows, I); a view of the bank if there is no a."""
    if a is None:
        return bank.expand(batch, -1, -1, -1)
    # One matrix product reads the bank once and makes no (B, n, ...) intermediate.
    return (a @ bank.flatten(1)).view(batch, *bank.shape[1:])


def fold(mixed: Tensor, gate: Optional[Tensor], f: Optional[Tensor],
         inplace: bool = False) -> Tensor:
    """Mixed kernels with their other attentions; in place for the sake of speed alone."""
    for factor in (gate, None if f is None else f[..., None]):
        if factor is not None:
            mixed = mixed.mul_(factor) if inplace else mixed * factor
            inplace = True
    return mixed


class KernelGradients:
    """Gradients of bank, a, s, c and f, gathered from those of the folded kernels, row by row.

    With K = f * g * M, where g is the gate and M the mixed kernels: dM = f * g * dK, and f and g
    have what remains of dK * M summed over the axes that they lack.
    """

    def __init__(self, bank: Tensor, a: Optional[Tensor], gate: Optional[Tensor],
                 f: Optional[Tensor], batch: int, needs_bank: bool) -> None:
        self.bank, self.a, self.gate, self.f = bank, a, gate, f
        self.grad_bank = bank.new_empty(bank.shape) if needs_bank else None
        self.grad_a = None if a is None else torch.zeros_like(a)
        self.grad_f = None if f is None else torch.empty_like(f)
        self.grad_gate = None
        if gate is not None:
            self.grad_gate = bank.new_zeros(batch, bank.shape[1], 1, bank.shape[3])

    def add(self, rows: slice, images: slice, grad: Tensor, mixed: Tensor) -> None:
        """Take the gradient of folded rows, (b, groups, r, I), overwritten, and their M.

        Rows of the bank are begun with image 0 and then added to.
        """
        gate, f = part(self.gate, images), part(self.f, images, rows)
        if gate is not None or f is not None:
            product = grad * mixed
            if f is not None:
                self.grad_f[images, :, rows] = (
                    product.sum(-1) if gate is None else (product @ gate.mT).squeeze(-1))
            if gate is not None:
                self.grad_gate[images] += (
                    product.sum(2, keepdim=True) if f is None else f[:, :, None] @ product)
            del product
            grad = fold(grad, gate, f, inplace=True)
        grad = grad.flatten(1)
        if self.grad_bank is not None:
            grad_bank = part(self.grad_bank, ALL, rows).flatten(1)
            a = grad.new_ones(len(grad), 1) if self.a is None else part(self.a, images)
            if images.start:
                grad_bank.addmm_(a.mT, grad)
            elif len(grad) == 1:
                torch.mul(a.mT, grad, out=grad_bank)
            else:
                torch.mm(a.mT, grad, out=grad_bank)
        if self.a is not None:
            part(self.grad_a, images).addmm_(grad, part(self.bank, ALL, rows).flatten(1).mT)

    def of(self, weight: Tensor, s: Optional[Tensor], c: Optional[Tensor],
           f: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        """The sums, shaped as the arguments of ``dynamic_conv2d``: bank, a, s, c, f."""
        grad_weight = None if self.grad_bank is None else self.grad_bank.view(weight.shape)
        grad_s, grad_c = gate_gradients(self.grad_gate, weight, s, c)
        grad_f = None if f is None else self.grad_f.view(f.shape)
        return grad_weight, self.grad_a, grad_s, grad_c, grad_f


def gate_gradients(grad_gate: Optional[Tensor], weight: Tensor, s: Optional[Tensor],
                   c: Optional[Tensor]) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """Gradients of s and c from that of their product, (B, groups, 1, I)."""
    if grad_gate is None:
        return None, None
    group_channels, kernel_size = weight.shape[2], weight.shape[3:]
    grad = grad_gate.view(len(grad_gate), -1, group_channels, kernel_size.numel())
    grad_s = grad_c = None
    if s is not None:
        product = grad if c is None else grad * c.view(len(c), -1, group_channels, 1)
        grad_s = product.sum((1, 2)).view(s.shape)
    if c is not None:
        grad_c = grad.sum(3) if s is None else grad @ s.to(grad.dtype).flatten(1)[:, None, :, None]
        grad_c = grad_c.view(c.shape)
    return grad_s, grad_c


def differentiable_gradients(ctx, grad: Tensor, *geometry) -> Tuple[Optional[Tensor], ...]:
    """Gradients of the saved tensors, themselves differentiable: for create_graph=True."""
    needed = [i for i, needs in enumerate(ctx.needs_input_grad[:6]) if needs]
    # Aliases: the attentions may depend on the input by a path that autograd also takes.
    tensors = [None if t is None else t.view_as(t) for t in ctx.saved_tensors[:6]]
    output = folded_conv2d(*tensors, *geometry)
    grads = torch.autograd.grad(output, [tensors[i] for i in needed], grad, create_graph=True)
    found = dict(zip(needed, grads))
    return tuple(found.get(i) for i in range(6))
