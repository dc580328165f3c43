"""Dynamic convolution layers, one a file; need torch and mmengine's registry."""
from .base import DynamicConv2d, set_temperature
from .condconv import CondConv2d
from .dcd import DCDConv2d
from .dyconv import DyConv2d
from .fdconv import FDConv2d
from .odconv import ODConv2d
from .replace import replace_convs
from .warehouse import KWConv2d, WarehouseManager, set_warm_up

__all__ = [
    'CondConv2d', 'DCDConv2d', 'DyConv2d', 'DynamicConv2d', 'FDConv2d', 'KWConv2d', 'ODConv2d',
    'WarehouseManager', 'replace_convs', 'set_temperature', 'set_warm_up'
]
