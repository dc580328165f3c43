"""Out of training and into use: fused, exported, checked; detections on one's own pictures."""
from .fusion import fuse
from .inference import allow_base_configs, config_path

__all__ = ['allow_base_configs', 'config_path', 'fuse']
