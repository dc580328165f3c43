"""DCD: Revisiting Dynamic Convolution via Matrix Decomposition, Li et al., ICLR 2021.

https://arxiv.org/abs/2103.08756
"""
import math
from typing import Dict, Sequence

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..ops import convolve_images, dynamic_conv2d, is_exporting
from .attention import Attention, PooledLinear, hidden_channels
from .base import DynamicConv2d, PaddingMode, in_range

MIN_HIDDEN_CHANNELS = 4


@MODELS.register_module()
class DCDConv2d(DynamicConv2d):
    r"""Static kernel with dynamic channel-wise attention and channel fusion (eq. 6 of the paper).

    .. math:: W(x) = \Lambda(x) W_0 + P \Phi(x) Q^T

    Lambda scales the Cout rows of the static kernel; Phi, (L, L), fuses the channels in a latent
    space of width L = C / 2^floor(log2(sqrt(C))), C the fewer of Cin and Cout (of a group, where
    there are several, all fused by the same Phi). Of a larger kernel the fused term is the centre
    element, the paper's R = [.., 0, 1, 0, ..]. A depthwise kernel has no channels to fuse: there it
    is its elements, L = floor(kh * kw / 2), that Phi fuses.

    There is no bank: ``weight`` is W0, (1, Cout, Cin / groups, kh, kw), so that every layer of the
    family stores its static kernels alike. With heads at zero Lambda is 1 and Phi 0: the layer is
    W0 before training.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as in :class:`torch.nn.Conv2d`.
        reduction: the attention's hidden width is max(int(Cin * reduction), 4); in (0, 1].
        temperature: divides the logits of Lambda, as in the other layers; > 0. The paper has
            none, which is 1.0.
        init: how the heads begin, 'zero' or 'he': see :class:`DynamicConv2d`.

    Raises:
        ValueError: if an argument is out of range.
    """

    filters = {'weight': 3, 'p': 1}

    def __init__(self,
                 in_channels: int,
                 out_channels: int,
                 kernel_size,
                 stride=1,
                 padding=0,
                 dilation=1,
                 groups: int = 1,
                 bias: bool = True,
                 padding_mode: PaddingMode = 'zeros',
                 device=None,
                 dtype=None,
                 *,
                 reduction: float = 1 / 16,
                 temperature: float = 1.0,
                 init: str = 'zero') -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                         bias, padding_mode, device, dtype, kernel_num=1, temperature=temperature,
                         init=init)
        hidden = hidden_channels(in_channels, reduction, MIN_HIDDEN_CHANNELS)
        self._set_attention(DCDAttention(in_channels, out_channels, hidden, self.p.shape[1]),
                            device, dtype)

    def make_bank(self, device, dtype) -> None:
        super().make_bank(device, dtype)
        self.fuses_elements = self.groups == self.in_channels
        if self.fuses_elements:
            fused = math.prod(self.kernel_size)
            latent = max(fused // 2, 1)
        else:
            fused = self.in_channels
            latent = latent_width(min(fused, self.out_channels) // self.groups)
        self.p = nn.Parameter(torch.empty(self.out_channels, latent, device=device, dtype=dtype))
        self.q = nn.Parameter(torch.empty(fused, latent, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """W0 as a static kernel; P and Q so that Phi alone sets the scale of the fused term."""
        super().reset_parameters()
        fan_in = len(self.q) if self.fuses_elements else len(self.q) // self.groups
        nn.init.normal_(self.q, std=fan_in**-0.5)
        nn.init.normal_(self.p, std=self.p.shape[1]**-0.5)

    def convolve(self, x: Tensor, padding, *,  # type: ignore[override]  # of its own attention
                 fusion: Tensor, filter_attention: Tensor) -> Tensor:
        if is_exporting() or len(x) > 0 and (self.fuses_elements or self._kernels_are_small(x)):
            output = self._convolve_each(x, padding, fusion, filter_attention)
        else:
            # The kernels are larger than the maps: one static kernel serves all images.
            output = dynamic_conv2d(x, self.weight, None, self.stride, padding, self.dilation,
                                    self.groups, filter_attention=filter_attention)
            if self.fuses_elements:  # no image has a kernel, but all parameters stay in the graph
                output = output + (fusion.sum() + self.p.sum() + self.q.sum())
            else:
                output = self._add_fused_channels(output, x, fusion)
        return output if self.bias is None else output + self.bias.to(output.dtype)[:, None, None]

    def _kernels_are_small(self, x: Tensor) -> bool:
        """Whether an image's kernel has no more elements than its maps."""
        pixels = math.prod(x.shape[2:]) // math.prod(self.stride)
        return self.weight[0, 0].numel() <= pixels

    def _convolve_each(self, x: Tensor, padding, fusion: Tensor, scale: Tensor) -> Tensor:
        """Convolve each image with its own Lambda W0 + P Phi Q^T."""
        kernels = in_range(self._make_kernels, fusion, scale).to(x.dtype)
        return convolve_images(x, kernels, self.stride, padding, self.dilation, self.groups)

    def _make_kernels(self, fusion: Tensor, scale: Tensor) -> Tensor:
        """Lambda W0 + P Phi Q^T, (B, Cout, Cin / groups, kh, kw)."""
        kernels = scale[:, :, None, None, None] * self.weight
        q = self.q.to(fusion.dtype)
        if self.fuses_elements:
            return kernels + (self.p.to(fusion.dtype) @ fusion @ q.T).view_as(kernels)
        q = q.view(self.groups, -1, self.p.shape[1])
        fused = self._expand(fusion) @ q.transpose(1, 2)
        around = [n for k in reversed(self.kernel_size) for n in (k // 2, k - 1 - k // 2)]
        return kernels + F.pad(fused.flatten(1, 2)[..., None, None], around)

    def _add_fused_channels(self, static: Tensor, x: Tensor, fusion: Tensor) -> Tensor:
        """static + P Phi Q^T x, by two thin products on the maps."""
        batch, groups, latent = len(x), self.groups, self.p.shape[1]
        squeeze = self.q.view(groups, -1, latent).transpose(1, 2).reshape(groups * latent, -1, 1, 1)
        z = F.conv2d(self._centres(x, static.shape[2:]), squeeze, None, self.stride, groups=groups)
        pixels = math.prod(static.shape[2:])
        expanded = in_range(self._expand, fusion).flatten(0, 1).to(static.dtype)
        output = torch.baddbmm(
            static.reshape(batch * groups, len(self.p) // groups, pixels), expanded,
            z.reshape(batch * groups, latent, pixels))
        return output.view(static.shape)

    def _expand(self, fusion: Tensor) -> Tensor:
        """P Phi, (B, groups, Cout / groups, L)."""
        p = self.p.to(fusion.dtype)
        return p.view(self.groups, -1, p.shape[1]) @ fusion[:, None]

    def _centres(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """x cut or padded so that a 1x1 convolution of the stride reads the kernel's centres."""
        widths = []
        for axis in (1, 0):
            before = self._pad_widths[2 - 2 * axis] if self.padding_mode == 'zeros' else 0
            first = self.dilation[axis] * (self.kernel_size[axis] // 2) - before
            end = first + (size[axis] - 1) * self.stride[axis] + 1
            widths += [-first, end - x.shape[2 + axis]]
        return F.pad(x, widths) if any(widths) else x


class DCDAttention(Attention):
    """The dynamic branch of DCD (Fig. 2 of the paper): Lambda and Phi from the input's average.

    fc -> ReLU -> one fc each. Lambda's activation, relu6(v + 3) / 3, is the release's;
    Phi is linear.
    """

    def __init__(self, in_channels: int, out_channels: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.fc = PooledLinear(in_channels, hidden, bias=False)
        self.filter_fc = PooledLinear(hidden, out_channels)
        self.fusion_fc = PooledLinear(hidden, latent * latent)
        self.latent = latent

    def reset_to_constant(self) -> float:
        """Answer every input with Lambda = 1 and Phi = 0; return that Lambda."""
        self.filter_fc.reset_to_zero()
        self.fusion_fc.reset_to_zero()
        return 1.0

    def forward(self, average: Tensor, temperature: float) -> Dict[str, Tensor]:
        """Lambda, (B, Cout), and Phi, (B, L, L), of maps with this average, (B, Cin)."""
        hidden = F.relu(self.fc(average))
        scale = F.relu6(self.filter_fc(hidden) / temperature + 3) / 3
        fusion = self.fusion_fc(hidden).reshape(-1, self.latent, self.latent)
        return dict(filter_attention=scale, fusion=fusion)


def latent_width(channels: int) -> int:
    """L = C / 2^floor(log2(sqrt(C))), the paper's default: between sqrt(C) and 2 sqrt(C)."""
    return channels // 2**math.floor(math.log2(math.sqrt(channels)))
