"""MobileNetV2 whose every convolution but the first is dynamic."""
from mmdet.models.backbones import MobileNetV2
from mmengine.registry import MODELS

from .dynamic import DynamicBackbone


@MODELS.register_module(name=['ODMobileNetV2', 'OD_MobileNetV2'])
class ODMobileNetV2(DynamicBackbone, MobileNetV2):
    """OD-MobileNetV2 of the ODConv paper (Table 2), any widen_factor.

    Takes the arguments of :class:`mmdet.models.MobileNetV2` and of :class:`DynamicBackbone`.
    """

    dynamic_convs = r'(layer\d\.\d+\.\w+_conv|conv2)\.conv'
