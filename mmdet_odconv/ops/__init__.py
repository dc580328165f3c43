"""Functions on tensors; needs torch alone."""
from .cells import mix_cells, mixture_count, split_into_cells
from .convolution import convolve_images
from .dynamic_conv import dynamic_conv2d, force_plan
from .pooling import with_average

__all__ = [
    'convolve_images', 'dynamic_conv2d', 'force_plan', 'mix_cells', 'mixture_count',
    'split_into_cells', 'with_average'
]
