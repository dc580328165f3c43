"""Reading weights: ours, released ones, and static ones, which inflation makes dynamic."""
from .files import read_weights, save_checkpoint
from .inflation import StaticPretrainedInit, load_static, to_dynamic
from .loading import allow_mmengine_checkpoints
from .published import convert_published, read_published_names

__all__ = [
    'StaticPretrainedInit', 'allow_mmengine_checkpoints', 'convert_published', 'load_static',
    'read_published_names', 'read_weights', 'save_checkpoint', 'to_dynamic'
]
