import torch

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


def test_without_gradient_is_the_mean():
    x = torch.randn(2, 3, 4, 5)
    same, average = with_average(x)
    assert same is x
    torch.testing.assert_close(average, x.mean((2, 3)))
