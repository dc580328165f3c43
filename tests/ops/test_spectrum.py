"""Kernels from spectra, and frequency bands: against waves, and with every derivative."""
import pytest
import reference
import torch
import torch.nn.functional as F

from mmdet_odconv import FDConv2d
from mmdet_odconv.ops import (
    force_plan,
    fourier_kernels,
    frequency_groups,
    modulate_bands,
    to_spectrum,
)

SHAPES = [(1, (6, 4, 3, 3)), (2, (6, 3, 1, 1)), (4, (4, 1, 3, 3)), (1, (2, 1, 1, 1)),
          (2, (4, 3, 2, 5))]


def arguments(groups, shape, is_local=True, batch=3, group_num=5):
    torch.manual_seed(0)
    out_channels, inner, kh, kw = shape
    plane = out_channels * kh, inner * kw
    sizes = dict(channel_logits=inner * groups, filter_logits=out_channels, spatial_logits=kh * kw)
    named = {name: torch.randn(batch, size).double() for name, size in sizes.items()}
    if is_local:
        named.update(local_features=torch.randn(batch, 5, inner * groups).double(),
                     local_weight=torch.randn(out_channels * kh * kw, 5).double())
    named.update(spectrum=to_spectrum(torch.randn(shape).double()),
                 kernel_attention=torch.randn(batch, group_num).double())
    for tensor in named.values():
        tensor.requires_grad_()
    fixed = dict(frequency_groups=frequency_groups(*plane, group_num), kernel_shape=shape,
                 groups=groups)
    return named, fixed


@pytest.mark.parametrize('group_num', [5, 6])  # of which the latter cuts three of them evenly
@pytest.mark.parametrize('is_local', [False, True])
@pytest.mark.parametrize(('groups', 'shape'), SHAPES)
def test_equals_the_published_formulation_with_both_derivatives(groups, shape, is_local,
                                                                group_num):
    named, fixed = arguments(groups, shape, is_local, group_num=group_num)
    ours, theirs = both(lambda: fourier_kernels(**named, **fixed))
    reference.assert_same_with_gradients(ours, theirs, named)
    assert_same_second_derivatives(lambda: fourier_kernels(**named, **fixed), named.values())


def both(function):
    """What it gives by our formulation and by the published one."""
    with force_plan('published'):
        theirs = function()
    return function(), theirs


def assert_same_second_derivatives(function, tensors):
    tensors, seconds = list(tensors), []
    for output in both(function):
        first = torch.autograd.grad(output.square().sum(), tensors, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
    torch.testing.assert_close(*seconds)


@pytest.mark.parametrize(('groups', 'shape'), SHAPES)
def test_attention_of_one_is_the_kernel_that_the_spectrum_is_of(groups, shape):
    kernel = torch.randn(shape).double()
    _, fixed = arguments(groups, shape)
    kernels = fourier_kernels(to_spectrum(kernel), kernel_attention=torch.ones(2, 5), **fixed)
    torch.testing.assert_close(kernels, kernel.expand(2, *shape))


@pytest.mark.parametrize(('rows', 'columns', 'group_num'), [(6, 9, 4), (8, 8, 5), (12, 1, 3),
                                                          (2, 2, 64)])
def test_groups_are_by_distance_and_ties_by_rows_then_columns(rows, columns, group_num):
    expected = reference.frequency_groups(rows, columns, group_num)
    assert torch.equal(frequency_groups(rows, columns, group_num).long(), expected)
    sizes = torch.bincount(expected.flatten(), minlength=group_num)
    assert sizes.max() - sizes.min() <= 1


def test_many_groups_have_indices_wide_enough():
    assert frequency_groups(64, 64, 300).max() == 299


def test_a_layer_made_for_inference_leaves_others_trainable():
    with torch.inference_mode():
        FDConv2d(7, 11, 3)
    layer = FDConv2d(7, 11, 3)
    layer(torch.randn(2, 7, 5, 5)).sum().backward()
    assert layer.dft_weight.grad.any()


def test_only_the_kernels_are_kept_for_the_backward_pass():
    named, fixed = arguments(1, (48, 32, 3, 3))
    kept = {}

    def pack(tensor):
        if tensor.is_floating_point() and tensor.numel() > 48 * 32 * 9 / 2:
            kept[tensor.untyped_storage().data_ptr()] = tensor.shape
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kernels = fourier_kernels(**named, **fixed)
    del kept[named['spectrum'].untyped_storage().data_ptr()]
    assert list(kept) == [kernels.untyped_storage().data_ptr()]


@pytest.mark.parametrize('size', [(8, 8), (16, 12), (7, 9), (1, 1), (2, 5), (33, 20)])
def test_bands_equal_the_published_formulation_with_both_derivatives(size):
    x, gates = (torch.randn(2, 3, *size).double().requires_grad_() for _ in range(2))
    ours, theirs = both(lambda: modulate_bands(x, gates))
    reference.assert_same_with_gradients(ours, theirs, dict(x=x, gates=gates))
    assert_same_second_derivatives(lambda: modulate_bands(x, gates), (x, gates))
    assert_same_second_derivatives(lambda: modulate_bands(x.detach(), gates), (gates, ))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_gates_of_one_change_no_bit(dtype):
    x = torch.randn(2, 3, 24, 37, dtype=dtype)
    assert torch.equal(modulate_bands(x, torch.ones(2, 3, 24, 37, dtype=dtype)), x)


def test_a_wave_is_in_its_band():
    columns = torch.arange(64).double()
    for cycles, band in ((20, 0), (16, 0), (15, 1), (9, 1), (8, 2), (5, 2), (4, None), (0, None)):
        x = torch.cos(2 * torch.pi * cycles * columns / 64).expand(1, 1, 64, 64)
        for i in range(3):
            gates = torch.ones(1, 3, 64, 64).double()
            gates[:, i] = 0
            torch.testing.assert_close(modulate_bands(x, gates), x if i != band else 0 * x)


def deterministic(shape, phase, scale):
    """Values that no random generator's version can change."""
    count = torch.Size(shape).numel()
    return (scale * torch.sin(1.7 * torch.arange(count).double()**1.01 + phase)).view(shape).float()


@pytest.mark.parametrize('kernel_size', [1, 3])
def test_equals_outputs_of_the_release(data, kernel_size):
    """Of FDConv.py at commit bf7a33d, groups of frequencies included; its masks are of 64 px."""
    layer = FDConv2d(20, 24, kernel_size, padding=kernel_size // 2, kernel_num=4).eval()
    for i, (name, tensor) in enumerate(sorted(layer.state_dict().items())):
        if tensor.is_floating_point() and 'running' not in name:
            tensor.copy_(deterministic(tensor.shape, i, 1 if 'norm' in name else 0.3))
    released = torch.load(data / 'fdconv_release.pt')[kernel_size]
    assert sorted(layer.state_dict()) == released['names']
    with torch.no_grad():
        y = layer(deterministic((2, 20, 64, 64), 0.5, 1))
    torch.testing.assert_close(y[:, :, 3::9, 5::11], released['y'], rtol=1e-4, atol=1e-5)
    static = F.conv2d(deterministic((2, 20, 64, 64), 0.5, 1),
                      reference.spectrum_kernel(layer).float(), padding=kernel_size // 2)
    assert (y - static).abs().max() > 0.1 * y.abs().max()


def test_bands_traced_at_one_size_hold_at_others():
    trace = torch.jit.trace(modulate_bands, (torch.randn(1, 2, 16, 16), torch.rand(1, 3, 16, 16)))
    for size in ((16, 16), (20, 13), (33, 40)):
        x, gates = torch.randn(1, 2, *size), torch.rand(1, 3, *size)
        torch.testing.assert_close(trace(x, gates), modulate_bands(x, gates), rtol=1e-5, atol=1e-5)
