"""ResNets whose body convolutions are dynamic; stem and shortcuts stay static."""
from mmdet.models.backbones import ResNet, ResNetV1d, ResNeXt
from mmdet.models.backbones.resnet import BasicBlock
from mmengine.registry import MODELS

from .dynamic import DynamicBackbone

BODY_CONVS = r'layer\d\.\d+\.conv\d'
ARCH_SETTINGS = {10: (BasicBlock, (1, 1, 1, 1)), **ResNet.arch_settings}


@MODELS.register_module(name=['ODResNet', 'OD_ResNet'])
class ODResNet(DynamicBackbone, ResNet):
    """OD-ResNet of the ODConv paper (Table 1): depth 10, 18, 34, 50, 101 or 152.

    Takes the arguments of :class:`mmdet.models.ResNet` and of :class:`DynamicBackbone`;
    ``conv_cfg=dict(type='CondConv2d')`` makes it a CondConv-ResNet, 'DCDConv2d' a DCD-ResNet.
    """

    arch_settings = ARCH_SETTINGS
    dynamic_convs = BODY_CONVS


@MODELS.register_module()
class DyResNet(DynamicBackbone, ResNet):
    """DY-ResNet of Dynamic Convolution, CVPR 2020: depth 10, 18, 34, 50, 101 or 152.

    Takes the arguments of :class:`mmdet.models.ResNet` and of :class:`DynamicBackbone`. The
    parameters that the paper states are those of dynamic convolutions in the last two stages,
    the default. ``dynamic_convs='layer.*'`` is every convolution but the first, shortcuts
    included, as the ODConv paper counts DyConv.
    """

    arch_settings = ARCH_SETTINGS
    dynamic_conv_cfg = dict(type='DyConv2d')
    dynamic_convs = r'layer[34]\.\d+\.conv\d'


@MODELS.register_module()
class ODResNetV1d(DynamicBackbone, ResNetV1d):
    """:class:`mmdet.models.ResNetV1d` (deep stem, average-pooled shortcuts) with ODConv."""

    dynamic_convs = BODY_CONVS


@MODELS.register_module()
class ODResNeXt(DynamicBackbone, ResNeXt):
    """:class:`mmdet.models.ResNeXt` with ODConv, grouped 3x3 convolutions included."""

    dynamic_convs = BODY_CONVS
