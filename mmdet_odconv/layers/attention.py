"""What the attentions of several layers are made of."""
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

    def forward(self, x: Tensor) -> Tensor:
        """Map pooled values x, (B, Cin), to (B, Cout)."""
        return F.linear(x, self.weight.flatten(1), self.bias)

    def extra_repr(self) -> str:
        text = f'{self.in_channels}, {self.out_channels}'
        return text if self.bias is not None else text + ', bias=False'
