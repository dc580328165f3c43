"""Backbones of MMDetection with dynamic convolutions, and SE beside them."""
from .dynamic import DynamicBackbone
from .mobilenet_v2 import DyMobileNetV2, ODMobileNetV2
from .mobilenet_v3 import DyMobileNetV3, MobileNetV3
from .resnet import DyResNet, ODResNet, ODResNetV1d, ODResNeXt
from .se import SEMobileNetV2, SEResNet
from .warehouse import KWMobileNetV2, KWResNet, WarehouseBackbone

__all__ = [
    'DyMobileNetV2', 'DyMobileNetV3', 'DyResNet', 'DynamicBackbone', 'KWMobileNetV2', 'KWResNet',
    'MobileNetV3', 'ODMobileNetV2', 'ODResNeXt', 'ODResNet', 'ODResNetV1d', 'SEMobileNetV2',
    'SEResNet', 'WarehouseBackbone'
]
