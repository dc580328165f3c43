"""Functions on tensors; needs torch alone."""
from .bands import modulate_bands
from .convolution import convolve_images
from .dynamic_conv import dynamic_conv2d, force_plan
from .pooling import with_average
from .spectrum import fourier_kernels, frequency_groups, to_spectrum

__all__ = ['convolve_images', 'dynamic_conv2d', 'force_plan', 'fourier_kernels',
           'frequency_groups', 'modulate_bands', 'to_spectrum', 'with_average']
