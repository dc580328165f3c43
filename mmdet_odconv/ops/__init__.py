"""Functions on tensors; needs torch alone."""
from .bands import modulate_bands
from .convolution import convolve_images
from .dynamic_conv import dynamic_conv2d, force_plan
from .exported import is_exporting
from .machine import Machine, set_machine
from .pooling import with_average
from .spectrum import fourier_kernels, frequency_groups, to_spectrum

__all__ = [
    'Machine', 'convolve_images', 'dynamic_conv2d', 'force_plan', 'fourier_kernels',
    'frequency_groups', 'is_exporting', 'modulate_bands', 'set_machine', 'to_spectrum',
    'with_average'
]
