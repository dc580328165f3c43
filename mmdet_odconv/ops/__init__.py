"""Functions on tensors; needs torch alone."""
from .dynamic_conv import dynamic_conv2d, force_plan

__all__ = ['dynamic_conv2d', 'force_plan']
