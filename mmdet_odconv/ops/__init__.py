"""Functions on tensors; needs torch alone."""
from .dynamic_conv import dynamic_conv2d, force_plan
from .pooling import with_average

__all__ = ['dynamic_conv2d', 'force_plan', 'with_average']
