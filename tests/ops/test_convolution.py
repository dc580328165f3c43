import pytest
import torch
import torch.nn.functional as F

from mmdet_odconv.ops import convolve_images, set_machine
from mmdet_odconv.ops.convolution import choose_way, convolution_gradients, way_costs
from mmdet_odconv.ops.machine import NOMINAL, Machine

NO_MACHINE = Machine(convolution=1e30, grouped=1e30, product=1e30, patches=1e30, bandwidth=1e30,
                     overhead=1e-30)


@pytest.fixture(params=['images', 'grouped', 'product'])
def way(request):
    """A machine on which one way is quickest."""
    name = {'images': 'convolution'}.get(request.param, request.param)
    slow = dict(convolution=1, grouped=1, product=1, patches=1, bandwidth=1e9, overhead=1e-9)
    set_machine(Machine(**{**slow, name: 1e9}))
    yield request.param
    set_machine(None)


@pytest.mark.parametrize(('kernel', 'geometry'), [
    (1, (1, 0, 1, 1)), (1, (2, 0, 1, 1)), (3, (1, 1, 1, 1)), (3, ((2, 1), (0, 1), 1, 2)),
    (3, (1, 'same', 1, 4)), (2, (1, 'same', 1, 2)), (2, (1, 1, 2, 1))])
def test_equals_a_convolution_of_each_image_and_its_gradients(way, kernel, geometry):
    groups = geometry[-1]
    x = torch.randn(3, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    kernels = torch.randn(3, 8, 4 // groups, kernel, kernel, dtype=torch.float64,
                          requires_grad=True)
    ours = convolve_images(x, kernels, *geometry)
    theirs = torch.cat([F.conv2d(x[b:b + 1], kernels[b], None, *geometry) for b in range(3)])
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(theirs)
    expected = torch.autograd.grad(theirs, (x, kernels), grad)
    for one, other in zip(torch.autograd.grad(ours, (x, kernels), grad), expected):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    if geometry[1] == 'same':
        return
    geometry = [(n, n) if isinstance(n, int) else n for n in geometry[:3]]
    pointwise = kernel == 1 and geometry[0] == (1, 1)
    if {'images': True, 'grouped': not pointwise, 'product': pointwise}[way]:
        assert choose_way(x, kernels.shape[1:], *geometry, groups) == way
    with torch.no_grad():
        grads = convolution_gradients(grad, x, kernels, *geometry, groups, True, True)
        none = convolution_gradients(grad, x, kernels, *geometry, groups, False, False)
    assert none == (None, None)
    for one, other in zip(grads, expected):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_an_empty_batch_keeps_its_arguments_in_the_graph():
    x, kernels = (torch.randn(*shape).requires_grad_() for shape in ((0, 4, 5, 5), (0, 6, 4, 3, 3)))
    output = convolve_images(x, kernels, padding=1)
    assert output.shape == (0, 6, 5, 5)
    output.sum().backward()
    assert x.grad.shape == x.shape and kernels.grad.shape == kernels.shape


def test_costs_of_ways():
    def costs(batch, kernel, groups=1, **machine):
        return way_costs(Machine(**{**vars(NO_MACHINE), **machine}), 4, (batch, 8, 10, 12),
                         (6, 8 // groups, kernel, kernel), (1, 1), (kernel // 2, ) * 2, (1, 1),
                         groups)

    flops = 2 * 2 * 6 * 8 * 9 * 120
    assert costs(2, 3, convolution=1)['images'] == pytest.approx(flops)
    assert costs(2, 3, grouped=1)['grouped'] == pytest.approx(flops)
    assert costs(2, 3, bandwidth=1)['images'] == pytest.approx(2 * 2 * 6 * 120 * 4)
    assert costs(1, 3, bandwidth=1)['images'] == pytest.approx(0, abs=1e-9)
    assert costs(2, 3, overhead=1) == pytest.approx(dict(images=2, grouped=1))
    assert set(costs(1, 3)) == {'images'} and set(costs(2, 1)) == {'images', 'product'}
    assert costs(2, 1, product=1)['product'] == pytest.approx(flops / 9)
    assert set(costs(2, 1, groups=2)) == {'images', 'grouped'}


def test_nominal_machine_convolves_as_static_layers_do():
    set_machine(NOMINAL)
    try:
        x = torch.empty(2, 256, 40, 60)
        assert choose_way(x, (256, 256, 3, 3), 1, 1, 1, 1) == 'images'
        assert choose_way(x[:1], (256, 256, 1, 1), 1, 0, 1, 1) == 'images'
        assert choose_way(x, (256, 1, 3, 3), 1, 1, 1, 256) == 'grouped'
    finally:
        set_machine(None)
