"""Reading weights: ours, released ones, and static ones."""
from .loading import allow_mmengine_checkpoints
from .published import read_published_names

__all__ = ['allow_mmengine_checkpoints', 'read_published_names']
