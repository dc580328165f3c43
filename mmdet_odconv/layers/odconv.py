"""ODConv: Omni-Dimensional Dynamic Convolution, Li, Zhou and Yao, ICLR 2022.

https://openreview.net/forum?id=DmpCfq6Mg39
"""
import functools
import math
import warnings
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..errors import InputError
from .attention import Attention, PooledLinear, hidden_channels, linear
from .base import DynamicConv2d, PaddingMode

MIN_HIDDEN_CHANNELS = 16
NORM_TYPES = ('BN', 'SyncBN', 'GN', 'LN')
# A device's. BatchNorm that trains on so many pooled values has harmed, and on fewer prevented
# learning (docs/guides/training-from-scratch.md).
FEW_IMAGES = 4


@MODELS.register_module()
class ODConv2d(DynamicConv2d):
    """Convolution with kernel, spatial, channel and filter attention (eq. 3 of the paper).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as in :class:`torch.nn.Conv2d`.
        kernel_num: number of kernels in the bank, n >= 1.
        reduction: the attention's hidden width is max(int(Cin * reduction), 16); in (0, 1].
        temperature: divides the attention logits; > 0, and 1.0 at inference.
        norm_cfg: normalisation inside the attention: dict(type='BN'), 'SyncBN', 'GN' or 'LN',
            with that layer's own arguments.
        gate_scale: what the spatial, channel and filter attentions are at most; > 0. At 1, as
            published, heads at zero give gates of 1/2, so that a static kernel is converted to a
            bank of four or eight times its size, on which an optimizer's steps change less. At 2
            they give gates of 1, as in FDConv, and the bank is the static kernel.
        init: how the heads begin, 'zero' or 'he': see :class:`DynamicConv2d`.

    Raises:
        ValueError: if an argument is out of range.
    """

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
                 reduction: float = 1 / 16,
                 temperature: float = 1.0,
                 norm_cfg: Optional[dict] = None,
                 gate_scale: float = 1.0,
                 init: str = 'zero') -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                         bias, padding_mode, device, dtype, kernel_num=kernel_num,
                         temperature=temperature, init=init)
        if not 0 < gate_scale < math.inf:
            raise ValueError(f'gate_scale must be greater than 0 and finite, got {gate_scale}')
        self._set_attention(ODAttention(in_channels, out_channels, self.kernel_size, groups,
                                        kernel_num, reduction, norm_cfg, gate_scale),
                            device, dtype)

    def extra_repr(self) -> str:
        scale = self.attention.gate_scale
        return super().extra_repr() + ('' if scale == 1 else f', gate_scale={scale:g}')

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        ours: Any = self.attention.gate_scale
        theirs = state_dict.get(f'{prefix}attention.scale', torch.ones(()))
        is_given = f'{prefix}attention.fc.weight' in state_dict and not theirs.is_meta
        # What half precision rounds is the same.
        if is_given and theirs.numel() == 1 and not math.isclose(
                theirs.item(), ours, rel_tol=1e-2):
            raise InputError(f'{prefix[:-1] or type(self).__name__} has gate_scale={ours:g}, but '
                             f'the checkpoint holds weights of gate_scale={theirs.item():g}: set '
                             "it in the layer's conv_cfg, or give weights of the same network.")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class ODAttention(Attention):
    """The four attentions of ODConv, from one pooled read of the input (Fig. 2 of the paper).

    Pool -> fc -> norm -> ReLU -> one fc per attention; sigmoid, times ``gate_scale``, for the
    spatial, channel and filter attentions, softmax over the bank for the kernel attention. An
    attention that could only repeat another is absent: the kernel's with a bank of one, the
    spatial of a 1x1 kernel, the filter's of a depthwise layer. The weights of all heads are read
    at once; hooks on a head do not run.

    Attributes:
        widths: by name of an attention, how many logits its head gives; in the heads' order.
    """

    scale: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Tuple[int, int],
                 groups: int, kernel_num: int, reduction: float,
                 norm_cfg: Optional[dict], gate_scale: float = 1.0) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.gate_scale = float(gate_scale)
        if gate_scale != 1:  # in the state dict, because weights are of no use at another
            self.register_buffer('scale', torch.tensor(self.gate_scale))
        hidden = hidden_channels(in_channels, reduction, MIN_HIDDEN_CHANNELS)
        depthwise = groups == in_channels == out_channels
        self.fc = PooledLinear(in_channels, hidden, bias=False)
        self.bn = build_pooled_norm(norm_cfg or dict(type='BN'), hidden)
        self.channel_fc: Optional[PooledLinear] = PooledLinear(hidden, in_channels)
        self.filter_fc = None if depthwise else PooledLinear(hidden, out_channels)
        kernel_area = math.prod(kernel_size)
        self.spatial_fc = PooledLinear(hidden, kernel_area) if kernel_area > 1 else None
        self.kernel_fc = PooledLinear(hidden, kernel_num) if kernel_num > 1 else None
        self.joined_fc: Optional[PooledLinear] = None  # of join_heads
        heads = dict(channel_attention=self.channel_fc, filter_attention=self.filter_fc,
                     spatial_attention=self.spatial_fc, kernel_attention=self.kernel_fc)
        self.widths = {name: fc.out_channels for name, fc in heads.items() if fc is not None}

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.gate_scale != 1:
            self.scale.fill_(self.gate_scale)

    def reset_to_constant(self) -> float:
        """Answer every input alike: kernels equally, gates halfway; return the product of gates."""
        for fc in self.heads():
            fc.reset_to_zero()
        return (self.gate_scale / 2)**len(self.widths.keys() - {'kernel_attention'})

    def heads(self) -> List[PooledLinear]:
        """The layers that give logits, in the order of ``widths``."""
        return [fc for fc in (self.channel_fc, self.filter_fc, self.spatial_fc, self.kernel_fc,
                              self.joined_fc) if fc is not None]

    def join_heads(self) -> None:
        """Put one layer in the place of all heads, which forward then need not put together."""
        heads = self.heads()
        if len(heads) == 1:
            return
        joined = PooledLinear(self.fc.out_channels, sum(self.widths.values()), device='meta')
        for name in ('weight', 'bias'):
            parts = [getattr(fc, name).detach() for fc in heads]
            setattr(joined, name, nn.Parameter(torch.cat(parts), heads[0].weight.requires_grad))
        self.channel_fc = self.filter_fc = self.spatial_fc = self.kernel_fc = None
        self.joined_fc = joined.train(self.training)

    def forward(self, average: Tensor, temperature: float) -> Dict[str, Tensor]:
        """Attentions of maps with this average, (B, Cin), as arguments of ``dynamic_conv2d``."""
        logits = self.logits(average, temperature)
        gates = logits.sigmoid()
        if self.gate_scale != 1:
            gates = gates * self.gate_scale
        attentions = self.by_name(gates)
        if 'spatial_attention' in attentions:
            spatial = attentions['spatial_attention']
            attentions['spatial_attention'] = spatial.reshape(-1, *self.kernel_size)
        if 'kernel_attention' in attentions:
            width = self.widths['kernel_attention']
            attentions['kernel_attention'] = logits[:, -width:].softmax(1)
        return attentions

    def by_name(self, logits: Tensor) -> Dict[str, Tensor]:
        """Parts of what all heads gave, (B, sum of widths), by name of attention."""
        return dict(zip(self.widths, logits.split(list(self.widths.values()), 1)))

    def logits(self, average: Tensor, temperature: float) -> Tensor:
        """Logits of all heads side by side, (B, sum of widths)."""
        hidden = self.activate(normalise_pooled(self.bn, self.fc(average)))
        # One product for all heads, and one sigmoid: on maps this small a launch is what costs.
        weights, biases = zip(*((fc.weight, fc.bias) for fc in self.heads()))
        if len(weights) == 1:
            logits = linear(hidden, weights[0], biases[0])
        else:
            logits = linear(hidden, torch.cat(weights), torch.cat(biases))
        return logits if temperature == 1 else logits / temperature

    def activate(self, hidden: Tensor) -> Tensor:
        """The hidden layer's activation."""
        return F.relu(hidden)


def build_pooled_norm(cfg: dict, channels: int) -> nn.Module:
    """Normalisation of a pooled map (B, channels, 1, 1) from an OpenMMLab ``norm_cfg``.

    GroupNorm defaults to four groups, or as many as divide the channels; LayerNorm, over the
    channels, is GroupNorm with one group.

    Raises:
        ValueError: for another type, or for what leaves one value to normalise.
        InputError (when weights are loaded): if they are of another kind of norm.
    """
    if not isinstance(cfg, dict):
        raise ValueError(f"norm_cfg of the attention must be a dict such as dict(type='LN'), got "
                         f'{cfg!r}')
    cfg = dict(cfg)
    kind = cfg.pop('type', None)
    requires_grad = cfg.pop('requires_grad', True)
    if kind in ('BN', 'SyncBN'):
        if not cfg.get('track_running_stats', True):
            raise ValueError('norm_cfg of the attention: without running averages it has nothing '
                             'to normalise one image by, got track_running_stats=False: leave it '
                             'out')
        cls: Any = nn.BatchNorm2d if kind == 'BN' else nn.SyncBatchNorm
        sizes: Tuple[int, ...] = (channels, )
    elif kind in ('GN', 'LN'):
        num_groups = cfg.pop('num_groups', 1 if kind == 'LN' else math.gcd(channels, 4))
        if kind == 'LN' and num_groups != 1:
            raise ValueError('norm_cfg of the attention: LN has one group, got num_groups='
                             f"{num_groups}: take type='GN'")
        if num_groups < 1 or channels % num_groups or channels == num_groups:
            raise ValueError('norm_cfg of the attention: num_groups must divide its '
                             f'{channels} channels and be smaller, got {num_groups}')
        if kind == 'LN' and 'elementwise_affine' in cfg:  # as torch's LayerNorm calls it
            cfg['affine'] = cfg.pop('elementwise_affine')
        cls, sizes = nn.GroupNorm, (num_groups, channels)
    else:
        raise ValueError(f'norm_cfg of the attention must have a type among {NORM_TYPES}, '
                         f'got {kind!r}')
    try:
        norm: nn.Module = cls(*sizes, **cfg)
    except TypeError as error:  # an argument that torch's does not have
        raise ValueError(f'norm_cfg of the attention: {error}') from error
    norm._register_load_state_dict_pre_hook(_check_kind, with_module=True)
    return norm.requires_grad_(requires_grad)


def _check_kind(norm: nn.Module, state_dict: Dict[str, Tensor], prefix: str, *_) -> None:
    """Raised, because weight and bias fit, and the network computes something else.

    What a BatchNorm misses of another norm, or of parameters alone, its loader says.
    """
    if prefix + 'running_mean' in state_dict and not isinstance(
            norm, nn.modules.batchnorm._BatchNorm):
        raise InputError(f"{prefix[:-1] or 'norm'} of an attention is of norm_cfg type 'LN' or "
                         "'GN', but the checkpoint's of 'BN': set norm_cfg=dict(type='BN') in the "
                         "layer's conv_cfg, or give weights of the same network.")


def normalise_pooled(norm: nn.Module, x: Tensor) -> Tensor:
    """Pooled values x, (B, C), by what :func:`build_pooled_norm` built.

    Batch statistics of fewer than two pooled values do not exist: use the running ones. Those of
    fewer than FEW_IMAGES are as published, and warned of.
    """
    own = getattr(norm, 'weight', None)
    own = getattr(norm, 'running_mean', None) if own is None else own
    if own is not None and x.dtype == torch.float32 and own.dtype == torch.float16:
        return normalise_pooled(norm, x.half()).float()
    if isinstance(norm, nn.Identity):  # of what was fused
        return x
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        few = norm.training and len(x) < FEW_IMAGES and not _is_synchronised(norm)
        if few and len(x) > 0 and not torch.compiler.is_compiling():
            _warn_few_images(len(x))
        if few and len(x) < 2 or not norm.training:
            return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias,
                                False, 0.0, norm.eps)
    return norm(x[:, :, None, None]).flatten(1)


def _is_synchronised(norm: nn.Module) -> bool:
    return (isinstance(norm, nn.SyncBatchNorm) and torch.distributed.is_available()
            and torch.distributed.is_initialized()
            and torch.distributed.get_world_size(norm.process_group) > 1)


@functools.cache
def _warn_few_images(count: int) -> None:
    found = (
        'one value per channel and no statistics to take from it: it normalises with its running '
        'statistics instead' if count == 1 else
        f'{count} values per channel, whose statistics are mostly noise: from scratch a network '
        'may learn little')
    warnings.warn(
        f'An attention is training with {count} image{"s" if count > 1 else ""} per device, where '
        f"its BatchNorm has {found}. Use more images per device, or in the layer's conv_cfg "
        "norm_cfg=dict(type='LN'), or 'GN', or 'SyncBN'.", stacklevel=2)
