"""Out of training and into use: fused, exported, checked."""
from .fusion import fuse

__all__ = ['fuse']
