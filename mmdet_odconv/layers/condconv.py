"""CondConv: Conditionally Parameterized Convolutions, Yang et al., NeurIPS 2019.

https://arxiv.org/abs/1904.04971
"""
from mmengine.registry import MODELS

from .attention import KernelAttention
from .base import DynamicConv2d, PaddingMode


@MODELS.register_module()
class CondConv2d(DynamicConv2d):
    """Convolution with a sigmoid gate on each kernel, or expert, of its bank (eq. 1 and 2).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as in :class:`torch.nn.Conv2d`; the bias is a bank,
            (n, Cout), mixed by the gates of the kernels.
        kernel_num: number of kernels in the bank, n >= 1.
        temperature: divides the routing logits, as in the other layers; > 0. The paper has none,
            which is 1.0.
        init: how the heads begin, 'zero' or 'he': see :class:`DynamicConv2d`.

    Raises:
        ValueError: if an argument is out of range.
    """

    mixes_bias = True

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
                 kernel_num: int = 8,
                 temperature: float = 1.0,
                 init: str = 'zero') -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                         bias, padding_mode, device, dtype, kernel_num=kernel_num,
                         temperature=temperature, init=init)
        attention = KernelAttention(in_channels, kernel_num, None, 'sigmoid')
        self._set_attention(attention, device, dtype)
