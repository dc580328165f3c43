"""What every dynamic convolution layer shares: geometry, bank, initialisation, forward."""
import math
from typing import Callable, Collection, Dict, Literal, Optional, Tuple, TypeVar, Union

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..ops import dynamic_conv2d, with_average
from ..ops.autograd import without_autocast
from ..ops.convolution import pair
from ..ops.dynamic_conv import Size2d
from .attention import Attention

# Standard deviation of what sets the kernels of an inflated bank apart, relative to each weight.
PERTURBATION = 0.1
INITS = ('zero', 'he')
PaddingMode = Literal['zeros', 'reflect', 'replicate', 'circular']
Module = TypeVar('Module', bound=nn.Module)


class DynamicConv2d(nn.Module):
    """Convolution whose kernel is mixed, for each image, from a bank by attention.

    A subclass sets ``self.attention``, a module that maps the input's global average, (B, Cin),
    and the temperature to the attentions that :func:`~mmdet_odconv.ops.dynamic_conv2d` takes; and
    ``mixes_bias`` where the paper mixes the bias, too, from a bank, (n, Cout). One whose kernels
    are no mixture of a bank names what they are made from, ``bank_name``, and overrides
    ``make_bank``, ``reset_parameters``, ``fill_bank`` and ``convolve``.

    It is deliberately no subclass of :class:`torch.nn.Conv2d`: code that initialises, fuses or
    quantises by that class would misread the 5-D bank.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as in :class:`torch.nn.Conv2d`.
        kernel_num: number of kernels in the bank, n >= 1.
        temperature: divides the attention logits; > 0, and 1.0 at inference.
        init: how the last layers of the attention, its heads, begin. 'zero': all images get the
            same kernel, as from a static convolution, until training tells them apart; 'he': at
            random, as published. It changes nothing that is loaded or inflated.

    Raises:
        ValueError: if an argument is out of range.
    """

    attention: Attention

    # What mmcv's ConvModule reads from any convolution that it wraps.
    transposed = False
    output_padding = (0, 0)

    bank_name = 'weight'  # of the parameter that kernels are made from
    mixes_bias = False
    filters = {'weight': 3}  # parameters with an axis of Cout, and how many axes come after it
    has_temperature = True  # which the attention's logits are divided by
    takes_static = False  # whether a static kernel in a state dict is inflated, or refused

    def __init__(self,
                 in_channels: int,
                 out_channels: int,
                 kernel_size: Size2d,
                 stride: Size2d = 1,
                 padding: Union[str, Size2d] = 0,
                 dilation: Size2d = 1,
                 groups: int = 1,
                 bias: bool = True,
                 padding_mode: PaddingMode = 'zeros',
                 device=None,
                 dtype=None,
                 *,
                 kernel_num: int = 4,
                 temperature: float = 1.0,
                 init: str = 'zero') -> None:
        super().__init__()
        if not isinstance(kernel_num, int):
            raise ValueError(f'kernel_num must be a whole number, got {kernel_num!r}')
        if kernel_num < 1:
            raise ValueError(f'kernel_num must be at least 1, got {kernel_num}')
        if init not in INITS:
            raise ValueError(f'init must be one of {INITS}, got {init!r}')
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f'in_channels and out_channels must be divisible by groups, got '
                             f'{in_channels} and {out_channels} with groups={groups}')
        # nn.Conv2d itself normalises and checks the geometry; on 'meta' it costs no memory.
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                         False, padding_mode, device='meta')
        self.in_channels = conv.in_channels
        self.out_channels = conv.out_channels
        self.kernel_size = pair(conv.kernel_size)
        self.stride = pair(conv.stride)
        self.padding = conv.padding
        self.dilation = pair(conv.dilation)
        self.groups = conv.groups
        self.padding_mode = conv.padding_mode
        self._pad_widths = conv._reversed_padding_repeated_twice
        geometry = self.kernel_size, self.stride, self.dilation
        if any(len(value) != 2 or min(value) < 1 for value in geometry):
            raise ValueError('kernel_size, stride and dilation, one number or two each, must be at '
                             f'least 1, got {kernel_size}, {stride} and {dilation}')
        if not isinstance(self.padding, str) and min(self.padding) < 0:
            raise ValueError(f'padding must be at least 0, got {padding}')
        self.kernel_num = kernel_num
        self.temperature = temperature
        self.init = init
        self.kernel_shape = conv.weight.shape
        self.make_bank(device, dtype)
        if bias:
            shape = (kernel_num, out_channels) if self.mixes_bias else (out_channels,)
            self.bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        else:
            self.register_parameter('bias', None)
        self.reset_parameters()

    @property
    def temperature(self) -> float:
        """Divides the attention logits; 1.0 at inference."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f'temperature must be greater than 0, got {value!r}: give a '
                             'finite number')
        self._temperature = float(value)

    def make_bank(self, device, dtype) -> None:
        """Register what kernels are made from, here a bank, (n, Cout, Cin/g, kh, kw)."""
        self.weight = nn.Parameter(
            torch.empty(self.kernel_num, *self.kernel_shape, device=device, dtype=dtype))

    def _set_attention(self, attention: Attention, device, dtype) -> None:
        """Take this attention, fresh from its constructor."""
        self.attention = placed(attention, device, dtype)
        self._begin()

    def _begin(self) -> None:
        if self.init == 'zero':
            self.attention.reset_to_constant()

    def reset_parameters(self) -> None:
        """Initialise each kernel of the bank as a static convolution would be."""
        for i in range(self.kernel_num):
            nn.init.kaiming_normal_(self.weight[i], mode='fan_out', nonlinearity='relu')
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def init_weights(self) -> None:
        """Called by MMEngine in place of an initialiser that would misread the 5-D bank."""
        self.reset_parameters()
        self.attention.reset_parameters()
        self._begin()

    @torch.no_grad()
    def inflate(self, kernel: Tensor, bias: Optional[Tensor] = None) -> None:
        """Compute what a static convolution computes, on every input, and learn from there.

        The attention answers every input alike, which makes the mixture a multiple of the bank's
        mean; the bank's kernels are the static one, divided by that multiple, plus random
        perturbations of mean zero. Without those, equal kernels would get equal gradients, and
        the attention over them none. Where the multiple is a power of two, as of gates of 1/2 or
        of a bank of four, the mean is exact in any dtype: kernels come in pairs whose differences
        from the static one cancel.

        Args:
            kernel: (Cout, Cin/g, kh, kw).
            bias: (Cout,); ``None`` for zero.

        Raises:
            ValueError: on other shapes, or a bias that the layer has no place for.
        """
        if kernel.shape != self.kernel_shape:
            raise ValueError(f'expected a static kernel of shape {tuple(self.kernel_shape)}, '
                             f'got {tuple(kernel.shape)}')
        if bias is not None and (self.bias is None or bias.shape != (self.out_channels,)):
            raise ValueError(f'{type(self).__name__} with bias={self.bias is not None} and '
                             f'{self.out_channels} output channels got a static bias of shape '
                             f'{tuple(bias.shape)}')
        multiple = self.attention.reset_to_constant()
        self.fill_bank(kernel, multiple)
        if self.bias is not None:
            self.bias.zero_()
        if bias is not None:
            self.bias.copy_(bias / multiple if self.mixes_bias else bias)

    def fill_bank(self, kernel: Tensor, multiple: float) -> None:
        """Make ``kernel`` what an attention mixes that answers the mean, times ``multiple``."""
        kernel = kernel.to(self.weight)
        noise = PERTURBATION * torch.randn_like(self.weight[:self.kernel_num // 2])
        # Between one and two times the static weight, so that both subtractions are exact; of
        # filters that are zero, as some begin, what a weight might be.
        is_zero = (kernel == 0).flatten(1).all(1)[:, None, None, None]
        size = torch.where(is_zero, math.sqrt(2 / max(1, kernel[0].numel())), kernel)
        larger = kernel + size * noise.abs().clamp(max=1)
        smaller = kernel - (larger - kernel)
        pairs = (larger, smaller), (smaller, larger)
        bank = torch.stack([torch.where(noise > 0, *pair) for pair in pairs], 1).flatten(0, 1)
        if self.kernel_num % 2:
            bank = torch.cat([bank, kernel[None]])
        self.weight.copy_(bank / multiple)

    def __prepare_scriptable__(self):  # torch.jit.script asks every module
        raise NotImplementedError(
            f'{type(self).__name__} cannot be scripted, since it chooses how to convolve as it '
            'runs: use torch.jit.trace or torch.export, or export the detector by mim run '
            'mmdet_odconv export.')

    def _apply(self, fn, *args, **kwargs):
        return super()._apply(on_banks(fn), *args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        name = prefix[:-1] or type(self).__name__
        given = {key: state_dict[prefix + key] for key in {'weight', self.bank_name}
                 if prefix + key in state_dict}
        if 'weight' in given and self.takes_static:
            self._inflate_from(state_dict, prefix, name)
            given = {}
        own = getattr(self, self.bank_name)
        for key, tensor in given.items():
            if key == self.bank_name and tensor.shape == own.shape:
                continue
            found = ('a spectrum' if key != 'weight' else 'one static kernel'
                     if tensor.dim() == 4 else f'a bank of kernel_num={len(tensor)}')
            # Raised, because MMEngine only logs what torch would collect, and trains on.
            raise InputError(
                f'{name} has a {"bank" if self.bank_name == "weight" else "spectrum"} of '
                f'kernel_num={self.kernel_num}, {tuple(own.shape)}, but the checkpoint '
                f'holds {found}, {tuple(tensor.shape)}: give weights of the same dynamic network, '
                "convert static ones (init_cfg=dict(type='StaticPretrained', checkpoint=...)), or "
                'give none (init_cfg=None, frozen_stages=-1) to train from scratch.')
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _inflate_from(self, state_dict: Dict[str, Tensor], prefix: str, name: str) -> None:
        """Put the whole layer, inflated from a static kernel, in the place of that kernel."""
        weight = state_dict.pop(prefix + 'weight')
        if weight.dim() == 5:
            raise InputError(f'{name} of the weights holds a bank of {len(weight)} kernels, where '
                             'a static kernel was expected: load what is dynamic already as it is.')
        try:
            self.inflate(weight, state_dict.get(prefix + 'bias'))
        except ValueError as error:
            raise InputError(f'{name}: {error}; give weights of the same network.') from error
        state_dict.update(self.state_dict(prefix=prefix))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x, (B, Cin, H, W), to (B, Cout, Hout, Wout); ValueError on other shapes."""
        if isinstance(x, torch.fx.Proxy):  # a tracer, to which the layer is one operation
            return x.tracer.create_proxy('call_module', x.tracer.path_of_module(self), (x, ), {})
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f'{type(self).__name__} expects an input of shape '
                             f'(B, {self.in_channels}, H, W), got {tuple(x.shape)}')
        x, average = with_average(x)
        attentions = in_range(self.attend, average)
        x = self.modulate(x)
        padding: Union[str, int, Tuple[int, ...]] = self.padding
        if self.padding_mode != 'zeros':
            x = F.pad(x, self._pad_widths, mode=self.padding_mode)
            padding = 0
        return self.convolve(x, padding, **attentions)

    def attend(self, average: Tensor) -> Dict[str, Tensor]:
        """Arguments of :meth:`convolve` for inputs with this average, (B, Cin)."""
        return self.attention(average, self.temperature)

    def modulate(self, x: Tensor) -> Tensor:
        """What is convolved in the place of x, (B, Cin, H, W), before it is padded."""
        return x

    def convolve(self, x: Tensor, padding, **attentions: Tensor) -> Tensor:
        """Convolve x, which needs zero padding at most, with the kernels of its attentions."""
        output = dynamic_conv2d(x, self.weight, None if self.mixes_bias else self.bias,
                                self.stride, padding, self.dilation, self.groups, **attentions)
        if self.mixes_bias and self.bias is not None:
            # No matrix product, which autocast would have in float16, and its gradients too.
            bias = (attentions['kernel_attention'][:, :, None] * self.bias).sum(1)
            output = output + bias.to(output.dtype)[:, :, None, None]
        return output

    def elementwise_madds(self, x: Tensor, output: Tensor, attentions: Collection[str]
                          ) -> Tuple[int, int]:
        """Multiply-adds that the published formulation does outside of convolutions and products.

        Args:
            x, output: of a forward pass.
            attentions: names of those that ``self.attention`` gave.

        Returns:
            Those of making the kernels, and those of scaling them, the input and the output.
        """
        kernels = len(x) * self.kernel_shape.numel()
        sizes = dict(spatial_attention=kernels, channel_attention=x.numel(),
                     filter_attention=output.numel())
        mixing = (2 * self.kernel_num - 1) * kernels if 'kernel_attention' in attentions else 0
        return mixing, sum(size for name, size in sizes.items() if name in attentions)

    def extra_repr(self) -> str:
        """Arguments that differ from their defaults, as nn.Conv2d prints them."""
        text = (f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, '
                f'stride={self.stride}, kernel_num={self.kernel_num}')
        defaults = dict(padding=(0, 0), dilation=(1, 1), groups=1, padding_mode='zeros',
                        temperature=1.0)
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f', {name}={getattr(self, name)!r}'
        return text if self.bias is not None else text + ', bias=False'


def on_banks(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn``, shown a bank without the axes that .to(memory_format=...) reorders, or fails on.

    Kernels are made of it as it is, and what orders them for a backend does so image by image.
    """

    def apply(tensor: Tensor) -> Tensor:
        if tensor.dim() != 5:
            return fn(tensor)
        return fn(tensor.flatten(1)).unflatten(1, tensor.shape[1:])

    return apply


def in_range(function: Callable, tensor: Tensor, *others):
    """``function`` of these arguments, without the float16 of autocast.

    For what makes kernels: the gradients of an attention are sums over all of a kernel, too large
    for float16 where those of the kernel are not. It costs little, as it is of no map.
    """
    device = tensor.device.type
    if (device == 'meta' or not torch.is_autocast_enabled(device)
            or torch.get_autocast_dtype(device) != torch.float16):
        return function(tensor, *others)
    return without_autocast(device, function, tensor, *others)


def placed(module: Module, device, dtype) -> Module:
    """``module`` on a device in a dtype; as it is, as a fake one must be, if it is there."""
    is_there = all(device in (None, tensor.device)
                   and (dtype in (None, tensor.dtype) or not tensor.is_floating_point())
                   for tensor in (*module.parameters(), *module.buffers()))
    return module if is_there else module.to(device=device, dtype=dtype)


def set_temperature(model: nn.Module, value: float) -> int:
    """Set the temperature of every dynamic convolution in ``model``; ValueError if <= 0.

    Returns:
        How many have one.
    """
    layers = [module for module in model.modules()
              if isinstance(module, DynamicConv2d) and module.has_temperature]
    for layer in layers:
        layer.temperature = value
    return len(layers)
