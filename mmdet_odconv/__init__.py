"""Dynamic convolution for MMDetection 3.x; importing it registers everything below.

``MMDET_ODCONV_LAYERS_ONLY=1`` in the environment imports nothing by itself, so that
``mmdet_odconv.ops`` (torch alone) and ``mmdet_odconv.layers`` (torch and mmengine) can be used
where mmdet and mmcv are not.
"""
import os

from .version import __version__

__all__ = ['__version__']

if not os.environ.get('MMDET_ODCONV_LAYERS_ONLY'):
    from .stack import check_stack

    check_stack()

    from .backbones import (
        DyMobileNetV2,
        DyMobileNetV3,
        DyResNet,
        KWMobileNetV2,
        KWResNet,
        MobileNetV3,
        ODMobileNetV2,
        ODResNet,
        ODResNetV1d,
        ODResNeXt,
        SEMobileNetV2,
        SEResNet,
    )
    from .checkpoints import allow_mmengine_checkpoints, to_dynamic
    from .deployment import allow_base_configs, config_path, fuse
    from .engine import InputCheckHook, TemperatureAnnealingHook, WarehouseWarmUpHook
    from .errors import InputError
    from .layers import CondConv2d, DCDConv2d, DyConv2d, FDConv2d, ODConv2d, set_temperature
    from .ops import dynamic_conv2d

    __all__ += [
        'CondConv2d', 'DCDConv2d', 'DyConv2d', 'DyMobileNetV2', 'DyMobileNetV3', 'DyResNet',
        'FDConv2d', 'InputCheckHook', 'InputError', 'KWMobileNetV2', 'KWResNet', 'MobileNetV3',
        'ODConv2d', 'ODMobileNetV2', 'ODResNeXt', 'ODResNet', 'ODResNetV1d', 'SEMobileNetV2',
        'SEResNet', 'TemperatureAnnealingHook', 'WarehouseWarmUpHook', 'config_path',
        'dynamic_conv2d', 'fuse', 'set_temperature',
        'to_dynamic'
    ]

    allow_base_configs()
    allow_mmengine_checkpoints()
