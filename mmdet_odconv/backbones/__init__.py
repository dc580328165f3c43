"""Backbones of MMDetection with dynamic convolutions."""
from .dynamic import DynamicBackbone
from .mobilenet_v2 import ODMobileNetV2
from .resnet import ODResNet, ODResNetV1d, ODResNeXt

__all__ = ['DynamicBackbone', 'ODMobileNetV2', 'ODResNet', 'ODResNeXt', 'ODResNetV1d']
