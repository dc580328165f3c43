"""What the attentions of several layers are made of."""
from typing import Any, Dict, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PooledLinear(nn.Module):
    """Fully connected layer on pooled values, stored as the 1x1 convolution of the releases.

    It is deliberately no subclass of :class:`torch.nn.Conv2d`: a host whose init_cfg names that
    class, as FPN's does, would re-initialise the attention.

    Args:
        in_channels, out_channels, bias, device, dtype: as in :class:`torch.nn.Conv2d`; the
            weight is (Cout, Cin, 1, 1).
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True, device=None,
                 dtype=None) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels, 1, 1, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter('bias', None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ODConv's release: He initialisation, bias at zero."""
        nn.init.kaiming_normal_(self.weight, mode='fan_out', nonlinearity='relu')
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def reset_to_zero(self) -> None:
        """Answer every input with zeros, and learn from there."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Map pooled values x, (B, Cin), to (B, Cout), in the dtype of x."""
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        text = f'{self.in_channels}, {self.out_channels}'
        return text if self.bias is not None else text + ', bias=False'


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """x, (B, Cin), times weight, (Cout, Cin, ...), in the dtype of x, float32 in float16 layers."""
    return F.linear(x, weight.flatten(1).to(x.dtype), None if bias is None else bias.to(x.dtype))


def hidden_channels(in_channels: int, reduction: float, at_least: int) -> int:
    """Width of an attention's hidden layer; ValueError if reduction is not in (0, 1]."""
    if not isinstance(reduction, (int, float)) or not 0 < reduction <= 1:
        raise ValueError(f'reduction must be in (0, 1], got {reduction!r}')
    return max(int(in_channels * reduction), at_least)


class Attention(nn.Module):
    """What a layer calls with its input's average, (B, Cin), and its temperature."""

    def reset_parameters(self) -> None:
        """As when constructed, each of its layers by its own rule."""
        reset_children(self)

    def reset_to_constant(self) -> float:
        """Answer every input alike; return how often the bank's mean is then in the mixture."""
        raise NotImplementedError


def reset_children(module: nn.Module) -> None:
    """Initialise each child of ``module`` by its own rule."""
    child: Any  # of whose methods nn.Module says nothing
    for child in module.children():
        child.reset_parameters()


class KernelAttention(Attention):
    """Attention over the kernels of a bank and nothing else, from the input's average.

    (fc -> ReLU ->) kernel_fc -> gate, where DyConv and CondConv differ in the hidden layer
    and in the gate.

    Args:
        in_channels: Cin.
        kernel_num: size n of the bank.
        hidden_channels: width of the hidden layer; ``None`` for none.
        gate: 'softmax' over the bank, or 'sigmoid' of each logit.
    """

    def __init__(self, in_channels: int, kernel_num: int, hidden_channels: Optional[int],
                 gate: str) -> None:
        super().__init__()
        self.fc = None
        if hidden_channels is not None:
            self.fc = PooledLinear(in_channels, hidden_channels)
        self.kernel_fc = PooledLinear(hidden_channels or in_channels, kernel_num)
        self.gate = gate

    def reset_to_constant(self) -> float:
        """Answer every input alike; return how often the bank's mean is in the mixture."""
        self.kernel_fc.reset_to_zero()
        return 1.0 if self.gate == 'softmax' else self.kernel_fc.out_channels / 2

    def forward(self, average: Tensor, temperature: float) -> Dict[str, Tensor]:
        """Kernel attention of maps with this average, (B, Cin), as ``dynamic_conv2d`` takes it."""
        hidden = average if self.fc is None else F.relu(self.fc(average))
        logits = self.kernel_fc(hidden) / temperature
        return dict(kernel_attention=logits.softmax(1) if self.gate == 'softmax' else
                    logits.sigmoid())
