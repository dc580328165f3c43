from concurrent.futures import ThreadPoolExecutor

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mmdet_odconv.ops import (
    blocked,
    dynamic_conv,
    dynamic_conv2d,
    folded,
    force_plan,
    kernels,
    set_machine,
)
from mmdet_odconv.ops.dynamic_conv import (
    ATTENTION_LAUNCHES,
    PLANS,
    choose_plan,
    layer_costs,
    plan_costs,
)
from mmdet_odconv.ops.kernels import BLOCK_BYTES
from mmdet_odconv.ops.machine import NOMINAL, Machine

# Triton's plan has tests of its own; a shared kernel needs other calls.
PLANS = [plan for plan in PLANS if plan not in ('fused', 'shared')]

ATTENTIONS = ('kernel_attention', 'spatial_attention', 'channel_attention', 'filter_attention')


@st.composite
def calls(draw):
    small = st.integers(1, 3)
    groups = draw(small)
    depthwise = draw(st.booleans())
    cin = groups * (1 if depthwise else draw(small))
    cout = cin if depthwise else groups * draw(small)
    n, batch = draw(small), draw(st.integers(1, 3))
    kernel = draw(st.tuples(small, small))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = draw(st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 2)),
                             st.sampled_from(['same', 'valid'])))
    stride = (1, 1) if padding == 'same' else draw(st.tuples(small, small))
    size = [d * (k - 1) + 1 + draw(st.integers(0, 4)) for d, k in zip(dilation, kernel)]
    torch.manual_seed(draw(st.integers(0, 2**16)))

    def rand(*shape):
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    shapes = dict(zip(ATTENTIONS, [(batch, n), (batch, *kernel), (batch, cin), (batch, cout)]))
    attentions = {
        name: rand(*shape) if name == 'kernel_attention' and n > 1 or draw(st.booleans()) else None
        for name, shape in shapes.items()
    }
    x = rand(batch, cin, *size)
    weight = rand(n, cout, cin // groups, *kernel)
    bias = rand(cout) if draw(st.booleans()) else None
    return x, weight, bias, (stride, padding, dilation, groups), attentions


@settings(max_examples=150, deadline=None)
@given(calls())
def test_equals_the_formula_and_every_gradient(call):
    x, weight, bias, geometry, attentions = call
    groups = geometry[-1]
    for plan in PLANS if groups == 1 else set(PLANS) - {'blocked'}:
        with force_plan(plan):
            ours = dynamic_conv2d(x, weight, bias, *geometry, **attentions)
        reference.assert_same_with_gradients(
            ours, reference.dynamic_conv2d(x, weight, bias, *geometry, **attentions),
            dict(input=x, weight=weight, bias=bias, **attentions))


@settings(max_examples=60, deadline=None)
@given(calls())
def test_shared_kernel_equals_the_formula_and_every_gradient(call):
    x, weight, bias, geometry, attentions = call
    weight = weight[:1].detach().requires_grad_()
    attentions.update(kernel_attention=None, spatial_attention=None)
    with force_plan('shared'):
        ours = dynamic_conv2d(x, weight, bias, *geometry, **attentions)
    reference.assert_same_with_gradients(
        ours, reference.dynamic_conv2d(x, weight, bias, *geometry, **attentions),
        dict(input=x, weight=weight, bias=bias, **attentions))


def test_empty_batch_keeps_every_argument_in_the_graph():
    leaves = dict(
        input=torch.randn(0, 4, 5, 5), weight=torch.randn(2, 6, 4, 3, 3),
        kernel_attention=torch.randn(0, 2), spatial_attention=torch.randn(0, 3, 3),
        channel_attention=torch.randn(0, 4), filter_attention=torch.randn(0, 6))
    for leaf in leaves.values():
        leaf.requires_grad_()
    output = dynamic_conv2d(**leaves, padding=1)
    assert output.shape == (0, 6, 5, 5)
    output.sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and not leaf.grad.any(), name


def test_non_contiguous_and_channels_last_input():
    x = torch.randn(2, 6, 5, 8, dtype=torch.float64)
    weight, a = torch.randn(2, 4, 6, 3, 3, dtype=torch.float64), torch.rand(2, 2).double()
    expected = reference.dynamic_conv2d(x, weight, kernel_attention=a)
    for view in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().mT):
        torch.testing.assert_close(dynamic_conv2d(view, weight, kernel_attention=a), expected)


@pytest.mark.parametrize(('change', 'message'), [
    (dict(input=torch.zeros(4, 5, 5)), r'input must be 4-D .* got shape \(4, 5, 5\)'),
    (dict(input=torch.zeros(2, 3, 5, 5)), 'needs an input of 4 channels, got 3'),
    (dict(weight=torch.zeros(6, 4, 3, 3)), r'weight must be a 5-D bank .* \(6, 4, 3, 3\)'),
    (dict(kernel_attention=None), r'a bank of 2 kernels needs kernel_attention of shape \(2, 2\)'),
    (dict(kernel_attention=torch.zeros(1, 2)), r'kernel_attention must have shape \(2, 2\), got'),
    (dict(spatial_attention=torch.zeros(2, 9)), r'spatial_attention must have shape \(2, 3, 3\)'),
    (dict(channel_attention=torch.zeros(2, 6)), r'channel_attention must have shape \(2, 4\)'),
    (dict(filter_attention=torch.zeros(2, 4)), r'filter_attention must have shape \(2, 6\)'),
])
def test_wrong_shapes_are_told_apart(change, message):
    call = dict(input=torch.zeros(2, 4, 5, 5), weight=torch.zeros(2, 6, 4, 3, 3),
                kernel_attention=torch.zeros(2, 2))
    with pytest.raises(ValueError, match=message):
        dynamic_conv2d(**{**call, **change})


@pytest.mark.parametrize(('change', 'message'), [
    (dict(bias=torch.zeros(1)), r'bias must have shape \(6,\), got \(1,\)'),
    (dict(groups=4, weight=torch.zeros(2, 6, 1, 3, 3)), '6 output channels, which groups=4 do not'),
    (dict(padding='full'), "padding must be numbers, 'same' or 'valid', got 'full'"),
    (dict(stride=0), 'stride must be one or two numbers of at least 1, got 0'),
    (dict(dilation=(1, 2, 3)), r'dilation must be one or two numbers .*, got \(1, 2, 3\)'),
    (dict(padding=-1), 'padding must be one or two numbers of at least 0, got -1'),
    (dict(groups=0), 'must be at least 1, got groups=0'),
    (dict(weight=torch.zeros(2, 6, 4, 0, 3)), r'at least 1, got .* \(2, 6, 4, 0, 3\)'),
])
def test_wrong_geometry_is_one_sentence(change, message):
    test_wrong_shapes_are_told_apart(change, message)


def test_geometry_of_one_number():
    x, weight = torch.randn(2, 4, 6, 6), torch.randn(1, 6, 4, 3, 3)
    torch.testing.assert_close(dynamic_conv2d(x, weight, None, (2,), (1,), (1,)),
                               torch.nn.functional.conv2d(x, weight[0], None, (2,), (1,), (1,)))


def test_kernel_larger_than_padded_input_is_refused_as_by_conv2d():
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        dynamic_conv2d(torch.zeros(2, 4, 2, 2), torch.zeros(2, 6, 4, 5, 5),
                       kernel_attention=torch.zeros(2, 2))


def call_with_everything(batch=3, n=2, cin=4, cout=20, size=6, kernel=3):
    def rand(*shape):
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    return dict(
        input=rand(batch, cin, size, size), weight=rand(n, cout, cin, kernel, kernel),
        kernel_attention=rand(batch, n) if n > 1 else None,
        spatial_attention=rand(batch, kernel, kernel), channel_attention=rand(batch, cin),
        filter_attention=rand(batch, cout))


def test_chunks_of_images(monkeypatch):
    monkeypatch.setattr(kernels, 'BLOCK_BYTES', 0)
    monkeypatch.setattr(folded, 'CHUNK_BYTES', 0)  # one image
    call = call_with_everything()
    attentions = {name: value for name, value in call.items() if name.endswith('attention')}
    with force_plan('folded'):
        ours = dynamic_conv2d(**call, padding=1)
    theirs = reference.dynamic_conv2d(call['input'], call['weight'], padding=1, **attentions)
    reference.assert_same_with_gradients(ours, theirs, call)


@pytest.mark.parametrize('n', [1, 3])
@pytest.mark.parametrize('kept_pixels', [0, 10**6])
@pytest.mark.parametrize('absent', [None, 'spatial_attention', 'filter_attention'])
def test_blocks_of_rows_and_both_ways_to_the_filter_gradient(monkeypatch, n, kept_pixels, absent):
    monkeypatch.setattr(kernels, 'BLOCK_BYTES', 0)  # eight rows: three blocks of twenty
    monkeypatch.setattr(blocked, 'KEPT_PIXELS', kept_pixels)
    monkeypatch.setattr(blocked, 'FEWEST_IMAGES', 2)  # blocks of two images and of one
    call = call_with_everything(n=n)
    call[absent] = None
    call.pop(None, None)
    with force_plan('blocked'):
        ours = dynamic_conv2d(**call, padding=1)
    theirs = reference.dynamic_conv2d(call['input'], call['weight'], padding=1, **{
        name: value for name, value in call.items() if name.endswith('attention')})
    reference.assert_same_with_gradients(ours, theirs, call)


@pytest.mark.parametrize('plan', PLANS)
def test_only_gradients_that_are_asked_for(plan):
    call = call_with_everything()
    for names in (['input'], ['weight'], ['filter_attention'], ['kernel_attention', 'input']):
        some = {name: value.detach().requires_grad_(name in names) for name, value in call.items()}
        with force_plan(plan):
            some_grads = torch.autograd.grad(dynamic_conv2d(**some).sum(), [some[n] for n in names])
            grads = torch.autograd.grad(dynamic_conv2d(**call).sum(), [call[n] for n in names])
        for some_grad, grad in zip(some_grads, grads):
            torch.testing.assert_close(some_grad, grad)


@pytest.mark.parametrize('plan', ['blocked', 'folded'])
def test_keeps_nothing_for_backward_but_what_it_was_given(plan):
    call, saved = call_with_everything(size=14), []
    with force_plan(plan), torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor.data_ptr()) or tensor, lambda tensor: tensor):
        dynamic_conv2d(**call)
    assert set(saved) == {tensor.data_ptr() for tensor in call.values()}


@pytest.mark.parametrize('plan', [*PLANS, 'shared'])
def test_second_derivatives(plan):
    call = call_with_everything(batch=2, cin=2, cout=3, size=4, n=1 if plan == 'shared' else 2)
    if plan == 'shared':
        call.pop('spatial_attention')
    call = {name: value for name, value in call.items() if value is not None}
    with force_plan(plan):
        assert torch.autograd.gradgradcheck(
            lambda *values: dynamic_conv2d(**dict(zip(call, values)), padding=1),
            tuple(call.values()))


# One second for each flop of a convolution, each element moved, or each call; the rest is free.
FREE = dict(convolution=1e30, grouped=1e30, product=1e30, patches=1e30, bandwidth=1e30,
            overhead=1e-30)
FLOPS, ELEMENTS, PATCHES, CALLS = (Machine(**{**FREE, **one}) for one in (
    dict(convolution=1), dict(bandwidth=1), dict(patches=1), dict(overhead=1)))


def test_costs_of_a_layer():
    def costs(machine, training=False, stride=1):
        return layer_costs(machine, 1, training, (2, 64, 10, 12), (4, 32, 64, 3, 3),
                           (stride, stride), (1, 1), (1, 1), 1, False)

    flops, maps = 2 * 2 * 32 * 64 * 9 * 120, 2 * (64 + 32) * 120
    assert costs(FLOPS)['static'] == pytest.approx(flops)
    assert costs(FLOPS)['folded'] == pytest.approx(flops)  # no more of them, grouped or not
    assert costs(FLOPS, training=True, stride=2)['static'] == pytest.approx(3 * flops / 4)
    assert costs(ELEMENTS)['static'] == pytest.approx(maps)
    assert costs(ELEMENTS)['attention'] == pytest.approx(2 * 64 * 120)  # its input read
    kernels = 4 * 32 * 64 * 9 + 2 * 2 * 32 * 64 * 9
    assert costs(ELEMENTS)['folded'] == pytest.approx(maps + 2 * 64 * 120 + kernels)
    assert costs(CALLS)['attention'] == pytest.approx(ATTENTION_LAUNCHES)
    assert costs(CALLS, training=True)['attention'] == pytest.approx(3 * ATTENTION_LAUNCHES)
    found = costs(CALLS)
    assert found['chosen'] == min(set(found.values()) - {found['static'], found['attention']})


def test_costs_of_plans():
    def costs(machine, *call, training=False, shared=False, stride=1, padding=1, groups=1,
              is_cpu=True):
        found = plan_costs(is_cpu, machine, 1, training, *call, (stride, stride),
                           (padding, padding), (1, 1), groups, shared)
        return {name: pytest.approx(cost, abs=1e-9) for name, cost in found.items()}

    maps, bank = (2, 64, 10, 12), (4, 32, 64, 3, 3)
    kernel, patches, pixels = 32 * 64 * 9, 2 * 64 * 9 * 120, 120
    folded, blocked = 4 * kernel + 2 * 2 * kernel, 4 * kernel
    assert costs(ELEMENTS, maps, bank) == dict(folded=folded, blocked=blocked)
    assert costs(ELEMENTS, maps, bank, is_cpu=False) == dict(folded=folded)
    many = 64, 512, 7, 7
    blocks = 64 * 512 * 512 * 9 // BLOCK_BYTES
    assert costs(CALLS, many, (4, 512, 512, 3, 3))['blocked'] == 3 * blocks
    # Elsewhere the kernels of all images are made at once; the convolution is grouped by image.
    assert costs(CALLS, many, (4, 512, 512, 3, 3), is_cpu=False) == dict(folded=3 + 1)
    assert costs(PATCHES, maps, bank)['blocked'] == patches
    assert costs(PATCHES, maps, bank, stride=2)['blocked'] == patches / 4
    assert costs(PATCHES, maps, bank, training=True)['blocked'] == 3 * patches
    assert costs(PATCHES, maps, (4, 32, 64, 1, 1), padding=0)['blocked'] == 0
    assert costs(ELEMENTS, maps, (4, 32, 64, 1, 1), padding=0)['blocked'] == 4 * 32 * 64
    assert costs(ELEMENTS, maps, bank, training=True)['folded'] == (
        folded + 3 * 4 * kernel + 4 * 2 * kernel)
    assert costs(ELEMENTS, maps, bank, shared=True)['shared'] == 2 * 2 * (64 + 32) * pixels
    flops = 2 * 2 * kernel * pixels
    only_images = (1, *maps[1:])
    assert costs(FLOPS, only_images, bank, shared=True) == dict(
        folded=flops / 2, blocked=0, shared=flops / 2)
    assert costs(FLOPS, only_images, bank, shared=True, training=True) == dict(
        folded=3 * flops / 2, blocked=0, shared=4 * flops / 2)
    assert set(costs(FLOPS, maps, (4, 64, 1, 3, 3), groups=64)) == {'folded'}
    assert 'blocked' not in costs(FLOPS, (2, 64, 1, 1), bank, padding=0)
    assert costs(CALLS, only_images, bank, shared=True)['shared'] == 3


@pytest.fixture
def set_to():
    """Sets the machine, for one test."""
    yield set_machine
    set_machine(None)


def test_plans(set_to):
    maps, small = torch.empty(2, 64, 48, 48), torch.empty(8, 512, 7, 7)

    def plan(x, n=4, kernel=3, groups=1, spatial=None):
        weight = torch.empty(n, x.shape[1], x.shape[1] // groups, kernel, kernel)
        a = torch.empty(len(x), n) if n > 1 else None
        return choose_plan(x, weight, (1, 1), (kernel // 2, ) * 2, (1, 1), groups, a, spatial,
                           None, None)

    set_to(NOMINAL)
    assert plan(maps) == plan(maps[:1], kernel=1) == plan(small, groups=512) == 'folded'
    assert plan(maps, 1) == 'folded' and plan(small, 1) == plan(small, 1, 1) == 'shared'
    assert plan(small, 1, spatial=torch.empty(8, 3, 3)) != 'shared'
    set_to(Machine(**{**vars(NOMINAL), 'product': 2 * NOMINAL.convolution}))
    assert plan(maps, kernel=1) == plan(small) == 'blocked'
    with FakeTensorMode():
        assert plan(torch.empty(8, 512, 7, 7, device='cuda')) == 'folded'


def test_plans_that_cannot_serve():
    with pytest.raises(ValueError, match=r"must be one of \['blocked', .*\], got 'fast'"):
        force_plan('fast').__enter__()
    with pytest.raises(ValueError, match="plan 'blocked' is for groups=1, got 4"), \
            force_plan('blocked'):
        dynamic_conv2d(torch.zeros(2, 4, 5, 5), torch.zeros(1, 4, 1, 3, 3), groups=4)
    with pytest.raises(ValueError, match="plan 'shared' is for .* got 2 with kernel_attention"), \
            force_plan('shared'):
        dynamic_conv2d(torch.zeros(2, 4, 5, 5), torch.zeros(2, 4, 4, 3, 3),
                       kernel_attention=torch.zeros(2, 2))


def test_a_plan_is_forced_in_one_thread():
    with force_plan('blocked'), ThreadPoolExecutor(1) as threads:
        assert threads.submit(dynamic_conv.forced_plan).result() is None
        assert dynamic_conv.forced_plan() == 'blocked'


@pytest.mark.parametrize('size', [6, 1])
@pytest.mark.parametrize('groups', [1, 2])
def test_torch_func(size, groups):
    kernel = 3 if size > 1 else 1
    call = call_with_everything(cin=4 // groups, cout=6, size=size, kernel=kernel)
    call = {name: value.detach() for name, value in call.items()}
    call['input'] = torch.randn(3, 4, size, size, dtype=torch.float64)
    call['channel_attention'] = torch.randn(3, 4, dtype=torch.float64)

    def loss(weight, input, *attentions):
        return dynamic_conv2d(input, weight, None, 1, kernel // 2, 1, groups,
                              **dict(zip(ATTENTIONS, attentions))).square().sum()

    weight, input, *attentions = (call[name] for name in ('weight', 'input', *ATTENTIONS))
    leaf = weight.clone().requires_grad_()
    expected, = torch.autograd.grad(loss(leaf, input, *attentions), leaf)
    grad = torch.func.grad(loss)(weight, input, *attentions)
    torch.testing.assert_close(grad, expected)
    singles = [tensor[:, None] for tensor in (input, *attentions)]
    each = torch.func.vmap(torch.func.grad(loss), (None, *[0] * 5))(weight, *singles)
    torch.testing.assert_close(each.sum(0), expected)
    tangent = torch.randn_like(weight)
    _, derivative = torch.func.jvp(lambda w: loss(w, input, *attentions), (weight, ), (tangent, ))
    torch.testing.assert_close(derivative, (expected * tangent).sum())


@pytest.mark.parametrize('plan', ['blocked', 'folded'])
def test_channels_last_maps_of_a_pointwise_layer(plan):
    call = call_with_everything(kernel=1, size=5)
    last = {**call, 'input': call['input'].detach().to(memory_format=torch.channels_last)
            .requires_grad_()}
    with force_plan(plan):
        ours = torch.autograd.grad(dynamic_conv2d(**last).square().sum(), list(last.values()))
        theirs = torch.autograd.grad(dynamic_conv2d(**call).square().sum(), list(call.values()))
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other)
