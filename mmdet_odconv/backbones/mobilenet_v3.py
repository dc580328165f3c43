"""MobileNetV3, static, which mmdet lacks, and with dynamic convolutions.

Searching for MobileNetV3, Howard et al., ICCV 2019, https://arxiv.org/abs/1905.02244
"""
from typing import Optional, Sequence, Tuple

from mmcv.cnn import ConvModule
from mmdet.models.layers import InvertedResidual
from mmdet.models.utils import make_divisible
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .dynamic import DynamicBackbone

LARGE = (  # Table 1 of the paper: kernel size, expanded and output channels, SE, activation, stride
    (3, 16, 16, False, 'ReLU', 1), (3, 64, 24, False, 'ReLU', 2), (3, 72, 24, False, 'ReLU', 1),
    (5, 72, 40, True, 'ReLU', 2), (5, 120, 40, True, 'ReLU', 1), (5, 120, 40, True, 'ReLU', 1),
    (3, 240, 80, False, 'HSwish', 2), (3, 200, 80, False, 'HSwish', 1),
    (3, 184, 80, False, 'HSwish', 1), (3, 184, 80, False, 'HSwish', 1),
    (3, 480, 112, True, 'HSwish', 1), (3, 672, 112, True, 'HSwish', 1),
    (5, 672, 160, True, 'HSwish', 2), (5, 960, 160, True, 'HSwish', 1),
    (5, 960, 160, True, 'HSwish', 1))
SMALL = (  # Table 2
    (3, 16, 16, True, 'ReLU', 2), (3, 72, 24, False, 'ReLU', 2), (3, 88, 24, False, 'ReLU', 1),
    (5, 96, 40, True, 'HSwish', 2), (5, 240, 40, True, 'HSwish', 1),
    (5, 240, 40, True, 'HSwish', 1), (5, 120, 48, True, 'HSwish', 1),
    (5, 144, 48, True, 'HSwish', 1), (5, 288, 96, True, 'HSwish', 2),
    (5, 576, 96, True, 'HSwish', 1), (5, 576, 96, True, 'HSwish', 1))
# The first version of that paper takes its stride to 16 one block later: 66M MAdds, not 56M.
SMALL_V1 = (*SMALL[:3], (5, 96, 40, True, 'HSwish', 1), (5, 240, 40, True, 'HSwish', 2),
            *SMALL[5:])


@MODELS.register_module()
class MobileNetV3(BaseModule):
    """MobileNetV3 without its classifier; modules named as MMPretrain's, whose weights it loads.

    Args:
        arch: 'small', 'large', or 'small_v1', the small one of the paper's first version.
        out_indices: layers whose maps are returned: 0 is the first convolution, then the blocks,
            and the 1x1 convolution last. By default the last of each of the strides 4 to 32.
        frozen_stages: layers up to and including this index are frozen; -1 freezes none.
        norm_cfg, norm_eval, with_cp, init_cfg: as in :class:`mmdet.models.MobileNetV2`.

    Raises:
        ValueError: if an argument is out of range.
    """

    arch_settings = dict(small=SMALL, large=LARGE, small_v1=SMALL_V1)

    def __init__(self,
                 arch: str = 'small',
                 out_indices: Optional[Sequence[int]] = None,
                 frozen_stages: int = -1,
                 norm_cfg: Optional[dict] = None,
                 norm_eval: bool = False,
                 with_cp: bool = False,
                 init_cfg=None) -> None:
        super().__init__(init_cfg or [
            dict(type='Kaiming', layer='Conv2d'),
            dict(type='Constant', val=1, layer=['_BatchNorm', 'GroupNorm'])])
        if arch not in self.arch_settings:
            raise ValueError(f'arch must be one of {sorted(self.arch_settings)}, got {arch!r}')
        settings = self.arch_settings[arch]
        strides = [stride for *_, stride in settings]
        last = len(settings) + 1
        if out_indices is None:
            # The stem and the first of four blocks bring stride 4; each other ends a stage.
            halving = [i for i, stride in enumerate(strides, 1) if stride == 2]
            out_indices = (*(i - 1 for i in halving[1:]), last)
        if not set(out_indices) <= set(range(last + 1)):
            raise ValueError(f'out_indices must be from 0 to {last}, got {tuple(out_indices)}')
        if frozen_stages not in range(-1, last + 1):
            raise ValueError(f'frozen_stages must be from -1 to {last}, got {frozen_stages}')
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        norm_cfg = norm_cfg or dict(type='BN', eps=0.001, momentum=0.01)
        channels = 16
        layers = [ConvModule(3, channels, 3, 2, 1, norm_cfg=norm_cfg, act_cfg=dict(type='HSwish'))]
        for kernel_size, expanded, out_channels, with_se, activation, stride in settings:
            layers.append(InvertedResidual(
                channels, out_channels, expanded, kernel_size, stride,
                se_cfg(expanded) if with_se else None, with_expand_conv=expanded != channels,
                norm_cfg=norm_cfg, act_cfg=dict(type=activation), with_cp=with_cp))
            channels = out_channels
        layers.append(ConvModule(channels, 6 * channels, 1, norm_cfg=norm_cfg,
                                 act_cfg=dict(type='HSwish')))
        self.layers = [f'layer{i}' for i in range(len(layers))]
        for name, layer in zip(self.layers, layers):
            self.add_module(name, layer)
        self._freeze_stages()

    def _freeze_stages(self) -> None:
        for name in self.layers[:self.frozen_stages + 1]:
            getattr(self, name).eval().requires_grad_(False)

    def train(self, mode: bool = True):
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Maps of ``out_indices`` from images (B, 3, H, W)."""
        outputs = []
        for i, name in enumerate(self.layers):
            x = getattr(self, name)(x)
            if i in self.out_indices:
                outputs.append(x)
        return tuple(outputs)


def se_cfg(channels: int) -> dict:
    """mmdet's SELayer as MobileNetV3 has it: a quarter of the channels, in eights; hard sigmoid."""
    squeezed = make_divisible(channels // 4, 8)
    # torch's own hard sigmoid: mmcv's HSigmoid computes the same, and warns that it once did not.
    return dict(channels=channels, ratio=channels / squeezed,
                act_cfg=(dict(type='ReLU'), dict(type=nn.Hardsigmoid)))


@MODELS.register_module()
class DyMobileNetV3(DynamicBackbone, MobileNetV3):
    """DY-MobileNetV3 of Dynamic Convolution, CVPR 2020 (Table 3); arch 'small' or 'large'.

    Takes the arguments of :class:`MobileNetV3` and of :class:`DynamicBackbone`. Every convolution
    but the first is dynamic and SE stays. The 4.8M parameters and 0.137 GFLOPs that the paper
    states are those of the first version of MobileNetV3-Small, with its classifier of 1280 hidden
    channels (2.9M and 66M MAdds when static), which 'small' is here.
    """

    arch_settings = dict(small=SMALL_V1, large=LARGE)
    dynamic_conv_cfg = dict(type='DyConv2d')
    dynamic_convs = r'layer[1-9]\d*\.(\w+_conv\.)?conv'
