"""Hooks, and the door through which mmdet's own scripts are called."""
from .hooks import InputCheckHook, TemperatureAnnealingHook

__all__ = ['InputCheckHook', 'TemperatureAnnealingHook']
