"""FDConv: Frequency Dynamic Convolution for Dense Image Prediction, Chen et al., CVPR 2025.

https://arxiv.org/abs/2503.18783
"""
import math
from typing import Collection, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..ops import (
    convolve_images,
    fourier_kernels,
    frequency_groups,
    modulate_bands,
    to_spectrum,
)
from ..ops.bands import BAND_NUM
from .attention import reset_children
from .base import DynamicConv2d, PaddingMode, placed
from .odconv import ODAttention

NEAR_ZERO = 1e-6  # the release's start of what makes gates: so near to 1, but learning


@MODELS.register_module()
class FDConv2d(DynamicConv2d):
    """Convolution whose kernel is mixed from disjoint groups of one spectrum's frequencies.

    Fourier disjoint weight: the kernel of an image is the inverse transform of the groups, each
    times an attention, 2 sigmoid / kernel_num. Kernel spatial modulation: gates of 2 sigmoid on
    channels, filters and kernel positions, and a local one on each element of the kernel, by a
    convolution along the channels' averages. Frequency band modulation: gates on the octaves of
    the input of a 3x3 layer. See :func:`~mmdet_odconv.ops.fourier_kernels` and
    :func:`~mmdet_odconv.ops.modulate_bands`, which are the paper's equations.

    ``dft_weight`` is (1, Cout * kh, Cin / groups * kw // 2 + 1, 2), the spectrum of a static kernel
    divided by half the fewer of Cin and Cout, and all tensors have the release's names. Before
    training, gates are within 1e-3 of 1, and 1 after conversion.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as in :class:`torch.nn.Conv2d`.
        kernel_num: number of frequency groups, >= 1; it need not divide the frequencies.
        reduction: the attention's hidden width is max(int(Cin * reduction), 16); in (0, 1].
        temperature: divides the logits of all but the local gates and those of bands; > 0. The
            release has 1.0.
        norm_cfg: normalisation inside the attention, as in ODConv2d.
        local: whether elements of the kernel have gates of their own.
        fbm: whether the input of a 3x3 layer has its frequency bands modulated.

    Raises:
        ValueError: if an argument is out of range.
    """

    frequency_groups: Tensor
    bank_name = 'dft_weight'
    filters = {}  # of a spectrum, no axis is Cout's alone

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
                 kernel_num: int = 64,
                 reduction: float = 1 / 16,
                 temperature: float = 1.0,
                 norm_cfg: Optional[dict] = None,
                 local: bool = True,
                 fbm: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                         bias, padding_mode, device, dtype, kernel_num=kernel_num,
                         temperature=temperature)
        self.KSM_Global = FDAttention(in_channels, out_channels, self.kernel_size, groups,
                                      kernel_num, reduction, norm_cfg)
        kernel_area = math.prod(self.kernel_size)
        self.KSM_Local = LocalModulation(in_channels, out_channels * kernel_area) if local else None
        has_bands = fbm and self.kernel_size == (3, 3)
        self.FBM = FrequencyBandModulation(in_channels) if has_bands else None
        for module in self.children():
            placed(module, device, dtype)

    def make_bank(self, device, dtype) -> None:
        shape = self._frequency_groups().shape
        self.dft_weight = nn.Parameter(torch.empty(1, *shape, 2, device=device, dtype=dtype))
        self._place_groups()

    def _frequency_groups(self) -> Tensor:
        out_channels, inner, kh, kw = self.kernel_shape
        return frequency_groups(out_channels * kh, inner * kw, self.kernel_num)

    def _place_groups(self) -> None:
        # No buffer, which whoever averages a model's would average too, and to_empty would leave.
        self.frequency_groups = self._frequency_groups().to(self.dft_weight.device)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._place_groups()  # of a layer made on 'meta', whose weights were assigned

    @property
    def attention(self) -> 'FDAttention':  # type: ignore[override]  # registered as released
        return self.KSM_Global

    @property
    def half_width(self) -> int:
        """What the release divides spectra by, and attentions multiply them with."""
        return max(1, min(self.in_channels, self.out_channels) // 2)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The spectrum of a kernel that is initialised as a static convolution's would be."""
        kernel = self.dft_weight.new_empty(self.kernel_shape)
        nn.init.kaiming_normal_(kernel, mode='fan_out', nonlinearity='relu')
        self._set_kernel(kernel)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def init_weights(self) -> None:
        self.reset_parameters()
        reset_children(self)

    def fill_bank(self, kernel: Tensor, multiple: float) -> None:
        self._set_kernel(kernel.to(self.dft_weight) / multiple)
        for module in (self.KSM_Local, self.FBM):
            if module is not None:
                module.reset_to_constant()

    def _set_kernel(self, kernel: Tensor) -> None:
        self.dft_weight[0] = to_spectrum(kernel) / self.half_width

    def attend(self, average: Tensor) -> Dict[str, Tensor]:
        attentions = super().attend(average)
        if self.KSM_Local is not None:
            attentions['local_features'] = self.KSM_Local(average)
        return attentions

    def modulate(self, x: Tensor) -> Tensor:
        return x if self.FBM is None else self.FBM(x)

    def convolve(self, x: Tensor, padding, *,  # type: ignore[override]  # of its own attention
                 kernel_attention: Tensor, **gates: Tensor) -> Tensor:
        if self.KSM_Local is not None:
            gates['local_weight'] = self.KSM_Local.conv.weight.flatten(1)
        scale = self.half_width * self.kernel_num  # of which the attention divides by the latter
        spectrum = self.dft_weight[0]
        # Of a replica of nn.DataParallel's the groups are on the first device.
        frequency_groups = self.frequency_groups.to(spectrum.device)
        kernels = fourier_kernels(spectrum, frequency_groups, self.kernel_shape,
                                  kernel_attention * scale, self.groups, **gates).to(x.dtype)
        return convolve_images(x, kernels, self.stride, padding, self.dilation, self.groups,
                               self.bias)

    def elementwise_madds(self, x: Tensor, output: Tensor, attentions: Collection[str]
                          ) -> Tuple[int, int]:
        elements, pixels = self.kernel_shape.numel(), x[0, 0].numel()
        kernels = elements + _transform_madds(elements)
        gates = len(attentions) - 1 + (self.KSM_Local is not None)
        scaling = len(x) * gates * elements
        if self.FBM is not None:
            transforms = (BAND_NUM + 1) * _transform_madds(pixels)
            scaling += len(x) * self.in_channels * (transforms + (BAND_NUM + 1) * pixels)
        return len(x) * kernels, scaling

    def _apply(self, fn, *args, **kwargs):
        """Show ``fn`` the spectrum without axes that .to(memory_format=...) would reorder."""
        shape = self.dft_weight.shape

        def apply(tensor: Tensor) -> Tensor:
            return fn(tensor.flatten()).view(shape) if tensor.shape == shape else fn(tensor)

        super()._apply(apply, *args, **kwargs)
        self._place_groups()
        return self


def _transform_madds(elements: int) -> int:
    """Multiply-adds of a real fast Fourier transform, half of 5/2 n log2 n operations."""
    return round(1.25 * elements * math.log2(elements))


class FDAttention(ODAttention):
    """Global half of the kernel spatial modulation: ODConv's attention with StarReLU inside.

    The gates are left as logits, which :func:`~mmdet_odconv.ops.fourier_kernels` takes.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.relu = StarReLU()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All gates near 1, the filters' too, which the release means to and does not."""
        super().reset_parameters()
        for fc in self.heads():
            nn.init.normal_(fc.weight, std=NEAR_ZERO)

    def reset_to_constant(self) -> float:
        """Answer every input alike, with gates of 1; return their product."""
        super().reset_to_constant()
        return 1.0

    def activate(self, hidden: Tensor) -> Tensor:
        return self.relu(hidden)

    def forward(self, average: Tensor, temperature: float) -> Dict[str, Tensor]:
        """Arguments of ``fourier_kernels`` for maps with this average, (B, Cin)."""
        found = self.by_name(self.logits(average, temperature))
        a = found.pop('kernel_attention', None)
        a = average.new_ones(average.shape[0], 1) if a is None else a.sigmoid() * (2 / a.shape[1])
        gates = {name.replace('attention', 'logits'): value for name, value in found.items()}
        return dict(kernel_attention=a, **gates)


class StarReLU(nn.Module):
    """scale * relu(x)^2 + bias, both learned (MetaFormer Baselines for Vision, 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.relu(x).square() + self.bias


class LocalModulation(nn.Module):
    """Local half of the kernel spatial modulation: logits of a kernel's every element.

    LayerNorm over the channels' averages, then a convolution along the channels with an output for
    each filter and kernel position. Its forward pass gives what that convolution reads; the
    product with ``conv.weight``, (Cout * kh * kw, 1, T), is for ``fourier_kernels``, which keeps
    no logits.
    """

    def __init__(self, in_channels: int, out_elements: int) -> None:
        super().__init__()
        # As the release: 5 taps for 64 to 512 channels, 7 for 1024 and 2048.
        taps = round(math.log2(in_channels) / 2 + 0.5) // 2 * 2 + 1
        self.norm = nn.LayerNorm(in_channels)
        self.conv = nn.Conv1d(1, out_elements, taps, padding=taps // 2, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.norm.reset_parameters()
        nn.init.constant_(self.conv.weight, NEAR_ZERO)

    def reset_to_constant(self) -> None:
        """Gates of 1, whatever the input."""
        nn.init.zeros_(self.conv.weight)

    def forward(self, average: Tensor) -> Tensor:
        """Average, (B, Cin), to what each tap reads at each channel, (B, T, Cin)."""
        average = self.norm(average.to(self.norm.weight.dtype))
        taps = self.conv.kernel_size[0]
        return F.pad(average, (taps // 2, taps // 2)).unfold(1, taps, 1).mT


class FrequencyBandModulation(nn.Module):
    """Gates on the octaves of a map's frequencies, each made by a 3x3 convolution of the map.

    Bands are those of the map itself, as in the paper. The release scales up those of a map of
    64x64, so that at other sizes a few frequencies at a band's end fall to its neighbour.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.freq_weight_conv_list = nn.ModuleList(BandGate(in_channels) for _ in range(BAND_NUM))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_children(self.freq_weight_conv_list)

    def reset_to_constant(self) -> None:
        """Gates of 1, whatever the input."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """The map x, (B, C, H, W), with its bands modulated."""
        weight, bias = (torch.cat([getattr(gate, name) for gate in self.freq_weight_conv_list])
                        for name in ('weight', 'bias'))
        return modulate_bands(x, 2 * F.conv2d(x, weight, bias, padding=1).sigmoid())


class BandGate(nn.Module):
    """Weights of a 3x3 convolution to one gate.

    Deliberately no :class:`torch.nn.Conv2d`, which a host's init_cfg or ``to_dynamic`` would find.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=NEAR_ZERO)
        nn.init.zeros_(self.bias)
