"""MobileNetV2 whose every convolution but the first, or the first and last, is dynamic."""
from mmdet.models.backbones import MobileNetV2
from mmengine.registry import MODELS

from .dynamic import DynamicBackbone


@MODELS.register_module(name=['ODMobileNetV2', 'OD_MobileNetV2'])
class ODMobileNetV2(DynamicBackbone, MobileNetV2):
    """OD-MobileNetV2 of the ODConv paper (Table 2), any widen_factor.

    Takes the arguments of :class:`mmdet.models.MobileNetV2` and of :class:`DynamicBackbone`.
    """

    dynamic_convs = r'(layer\d\.\d+\.\w+_conv|conv2)\.conv'


@MODELS.register_module()
class DyMobileNetV2(DynamicBackbone, MobileNetV2):
    """DY-MobileNetV2 of Dynamic Convolution, CVPR 2020 (Table 3), any widen_factor.

    Takes the arguments of :class:`mmdet.models.MobileNetV2` and of :class:`DynamicBackbone`. The
    parameters that the paper states are those of a static last 1x1 convolution, the default.
    ``dynamic_convs='(layer|conv2).*'`` is every convolution but the first, as the ODConv paper
    counts DyConv.
    """

    dynamic_conv_cfg = dict(type='DyConv2d')
    dynamic_convs = r'layer\d\.\d+\.\w+_conv\.conv'
