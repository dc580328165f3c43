"""Hooks, and the door through which mmdet's own scripts are called."""
from .hooks import InputCheckHook

__all__ = ['InputCheckHook']
