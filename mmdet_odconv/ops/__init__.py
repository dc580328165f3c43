"""Functions on tensors; needs torch alone."""
from .bands import modulate_bands
from .cells import mix_cells, mixture_count, split_into_cells
from .convolution import convolve_images
from .dynamic_conv import dynamic_conv2d, force_plan
from .exported import is_exporting
from .machine import Machine, set_machine
from .pooling import with_average
from .spectrum import fourier_kernels, frequency_groups, to_spectrum

__all__ = [
    'Machine', 'convolve_images', 'dynamic_conv2d', 'force_plan', 'fourier_kernels',
    'frequency_groups', 'is_exporting', 'mix_cells', 'mixture_count', 'modulate_bands',
    'set_machine', 'split_into_cells', 'to_spectrum', 'with_average'
]
