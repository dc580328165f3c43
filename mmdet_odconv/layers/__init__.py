"""Dynamic convolution layers, one a file; need torch and mmengine's registry."""
from .base import DynamicConv2d, set_temperature
from .odconv import ODConv2d
from .replace import replace_convs

__all__ = ['DynamicConv2d', 'ODConv2d', 'replace_convs', 'set_temperature']
