"""Hooks, and the door through which mmdet's own scripts are called."""
from .checkpointing import SafeCheckpointHook
from .distributed import GradientCompressionHook
from .hooks import InputCheckHook, TemperatureAnnealingHook, WarehouseWarmUpHook

__all__ = [
    'GradientCompressionHook', 'InputCheckHook', 'SafeCheckpointHook', 'TemperatureAnnealingHook',
    'WarehouseWarmUpHook'
]
