"""Hooks, and the door through which mmdet's own scripts are called."""
from .hooks import InputCheckHook, TemperatureAnnealingHook, WarehouseWarmUpHook

__all__ = ['InputCheckHook', 'TemperatureAnnealingHook', 'WarehouseWarmUpHook']
