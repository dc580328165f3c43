import torch
from torch import nn

from mmdet_odconv.layers import ODConv2d
from mmdet_odconv.ops import with_average


def test_gradients_are_those_of_the_input_and_its_mean():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)

    def both(x):
        same, average = with_average(x)
        return same.square() * average.exp()[:, :, None, None]

    assert torch.autograd.gradcheck(both, x) and torch.autograd.gradgradcheck(both, x)
    assert torch.autograd.gradcheck(lambda x: with_average(x)[0].square(), x)
    assert torch.autograd.gradcheck(lambda x: with_average(x)[1].square(), x)


def test_adds_its_gradient_to_no_tensor_but_that_of_the_returned_input():
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    y = x * 1
    y.retain_grad()
    same, average = with_average(y)
    (same.square().sum() + average.sum() + y.sum()).backward()
    torch.testing.assert_close(y.grad, 2 * x + 1 / 20 + 1)
    torch.testing.assert_close(x.grad, y.grad)


def test_of_two_layers_under_torch_func():
    layers = nn.Sequential(ODConv2d(3, 4, 3), ODConv2d(4, 2, 1)).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    expected, = torch.autograd.grad(layers(x).square().sum(), x)
    found = torch.func.grad(lambda x: layers(x).square().sum())(x.detach())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_without_gradient_is_the_mean():
    x = torch.randn(2, 3, 4, 5)
    same, average = with_average(x)
    assert same is x
    torch.testing.assert_close(average, x.mean((2, 3)))
