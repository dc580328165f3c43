"""What poses of MMPose need beside the backbones; their configs import it by name.

The plugin itself does not: MMPose is optional, see docs/guides/keypoints.md.
"""
from .stack import optional_torchvision

with optional_torchvision():
    import mmpose.visualization  # noqa: F401
