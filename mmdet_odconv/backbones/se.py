"""Squeeze-and-Excitation, the feature attention that dynamic convolution is compared with.

Hu, Shen and Sun, CVPR 2018, https://arxiv.org/abs/1709.01507
"""
from mmdet.models.backbones import MobileNetV2, ResNet
from mmdet.models.backbones.resnet import BasicBlock
from mmdet.models.layers import InvertedResidual, SELayer
from mmengine.registry import MODELS
from torch import Tensor
from torch.utils import checkpoint

from .resnet import ARCH_SETTINGS


@MODELS.register_module()
class SEPlugin(SELayer):
    """mmdet's SELayer as one of the ``plugins`` that its ResNet's bottlenecks take."""

    _abbr_ = 'se_layer'  # its name in a block, that of MMPretrain's SE-ResNets

    def __init__(self, in_channels: int, *args, **kwargs) -> None:
        super().__init__(in_channels, *args, **kwargs)


class SEBasicBlock(BasicBlock):
    """mmdet's BasicBlock, which takes no plugins, with SE on its residual."""

    def __init__(self, inplanes: int, planes: int, *args, **kwargs) -> None:
        super().__init__(inplanes, planes, *args, **kwargs)
        self.se_layer = SELayer(planes)

    def forward(self, x: Tensor) -> Tensor:

        def body(x: Tensor) -> Tensor:
            residual = self.relu(self.norm1(self.conv1(x)))
            residual = self.se_layer(self.norm2(self.conv2(residual)))
            return residual + (x if self.downsample is None else self.downsample(x))

        if self.with_cp and x.requires_grad:
            return self.relu(checkpoint.checkpoint(body, x, use_reentrant=False))
        return self.relu(body(x))


@MODELS.register_module()
class SEResNet(ResNet):
    """SE-ResNet (ratio 16): depth 10, 18, 34, 50, 101 or 152.

    Takes the arguments of :class:`mmdet.models.ResNet`. Weights of static ResNets load, and those
    of MMPretrain's SE-ResNets.
    """

    arch_settings = ARCH_SETTINGS

    def make_res_layer(self, block: type, plugins=None, **kwargs):
        if block is BasicBlock:
            return super().make_res_layer(block=SEBasicBlock, plugins=plugins, **kwargs)
        plugins = [*(plugins or []), dict(cfg=dict(type='SEPlugin'), position='after_conv3')]
        return super().make_res_layer(block=block, plugins=plugins, **kwargs)


@MODELS.register_module()
class SEMobileNetV2(MobileNetV2):
    """MobileNetV2 with SE (ratio 16) after each depthwise convolution, any widen_factor.

    Takes the arguments of :class:`mmdet.models.MobileNetV2`, whose weights it loads.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for block in self.modules():
            if isinstance(block, InvertedResidual):
                block.with_se = True
                block.se = SELayer(block.depthwise_conv.out_channels)
        self._freeze_stages()
