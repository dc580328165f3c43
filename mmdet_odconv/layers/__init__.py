"""Dynamic convolution layers, one a file; need torch and mmengine's registry."""
from .base import DynamicConv2d, set_temperature
from .condconv import CondConv2d
from .dcd import DCDConv2d
from .dyconv import DyConv2d
from .fdconv import FDConv2d
from .odconv import ODConv2d
from .replace import replace_convs

__all__ = [
    'CondConv2d', 'DCDConv2d', 'DyConv2d', 'DynamicConv2d', 'FDConv2d', 'ODConv2d',
    'replace_convs', 'set_temperature'
]
