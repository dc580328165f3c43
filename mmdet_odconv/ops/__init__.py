"""Functions on tensors; needs torch alone."""
from .convolution import convolve_images
from .dynamic_conv import dynamic_conv2d, force_plan
from .exported import is_exporting
from .machine import Machine, set_machine
from .pooling import with_average

__all__ = [
    'Machine', 'convolve_images', 'dynamic_conv2d', 'force_plan', 'is_exporting', 'set_machine',
    'with_average'
]
