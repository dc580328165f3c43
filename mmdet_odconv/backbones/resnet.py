"""ResNets whose body convolutions are dynamic; stem and shortcuts stay static."""
from mmdet.models.backbones import ResNet, ResNetV1d, ResNeXt
from mmengine.registry import MODELS

from .dynamic import DynamicBackbone

BODY_CONVS = r'layer\d\.\d+\.conv\d'


@MODELS.register_module(name=['ODResNet', 'OD_ResNet'])
class ODResNet(DynamicBackbone, ResNet):
    """OD-ResNet of the ODConv paper (Table 1): depth 18, 34, 50, 101 or 152.

    Takes the arguments of :class:`mmdet.models.ResNet` and of :class:`DynamicBackbone`.
    """

    dynamic_convs = BODY_CONVS


@MODELS.register_module()
class ODResNetV1d(DynamicBackbone, ResNetV1d):
    """:class:`mmdet.models.ResNetV1d` (deep stem, average-pooled shortcuts) with ODConv."""

    dynamic_convs = BODY_CONVS


@MODELS.register_module()
class ODResNeXt(DynamicBackbone, ResNeXt):
    """:class:`mmdet.models.ResNeXt` with ODConv, grouped 3x3 convolutions included."""

    dynamic_convs = BODY_CONVS
