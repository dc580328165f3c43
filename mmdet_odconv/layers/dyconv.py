"""DyConv: Dynamic Convolution: Attention over Convolution Kernels, Chen et al., CVPR 2020.

https://arxiv.org/abs/1912.03458
"""
from mmengine.registry import MODELS

from .attention import KernelAttention, hidden_channels
from .base import DynamicConv2d, PaddingMode

MIN_HIDDEN_CHANNELS = 4


@MODELS.register_module()
class DyConv2d(DynamicConv2d):
    """Convolution with softmax attention over its kernels and biases (eq. 2 and 3 of the paper).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as in :class:`torch.nn.Conv2d`; the bias is a bank,
            (n, Cout), mixed by the attention of the kernels.
        kernel_num: number of kernels in the bank, n >= 1.
        reduction: the attention's hidden width is max(int(Cin * reduction), 4); in (0, 1].
        temperature: divides the attention logits; > 0, and 1.0 at inference. The paper trains
            with 30 falling to 1 over the first ten epochs: ``TemperatureAnnealingHook``.
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
                 kernel_num: int = 4,
                 reduction: float = 1 / 4,
                 temperature: float = 1.0,
                 init: str = 'zero') -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                         bias, padding_mode, device, dtype, kernel_num=kernel_num,
                         temperature=temperature, init=init)
        hidden = hidden_channels(in_channels, reduction, MIN_HIDDEN_CHANNELS)
        attention = KernelAttention(in_channels, kernel_num, hidden, 'softmax')
        self._set_attention(attention, device, dtype)
