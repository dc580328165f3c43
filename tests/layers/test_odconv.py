import copy
import json
import pickle
import warnings

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.registry import MODELS
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdet_odconv import ODConv2d, set_temperature
from mmdet_odconv.layers import odconv
from mmdet_odconv.ops import force_plan


def randomised(layer):
    """As after training: no statistic, scale or bias at its start."""
    for name, value in (*layer.named_parameters(), *layer.named_buffers()):
        if value.is_floating_point():
            value.data.normal_(std=0.5) if 'var' not in name else value.data.uniform_(0.5, 2)
    return layer


@pytest.mark.parametrize('mode', ['eval', 'train'])
@pytest.mark.parametrize('temperature', [1, 30])
@pytest.mark.parametrize('case', [
    'k3_n4', 'k3_n1_s2', 'k1_n1', 'k1_n4', 'dw_k3_n4_s2', 'dw_k3_n1', 'group2_k3_n2_d2'])
def test_equals_reference_data(data, case, temperature, mode):
    arguments = json.loads((data / 'odconv2d_float64.json').read_text())[case]
    arrays = np.load(data / 'odconv2d_float64.npz')

    def tensor(name):
        return torch.from_numpy(arrays[f'{case}/{name}'])

    layer = ODConv2d(**arguments, dtype=torch.float64).train(mode == 'train')
    state = {name: tensor(f'state/{name}') for name in layer.state_dict()}
    prefix = f'{case}/state/'
    assert {prefix + name for name in state} == {k for k in arrays.files if k.startswith(prefix)}
    layer.load_state_dict(state)
    layer.temperature = temperature
    x = tensor('x').requires_grad_()
    y = layer(x)
    y.backward(tensor('grad_y'))

    run = f'{mode}/t{temperature}'
    torch.testing.assert_close(y, tensor(f'{run}/y'), rtol=1e-9, atol=1e-11)
    grads = dict(x=x.grad, **{name: p.grad for name, p in layer.named_parameters()})
    for name, grad in grads.items():
        torch.testing.assert_close(grad, tensor(f'{run}/grad/{name}'), rtol=1e-9, atol=1e-11,
                                   msg=lambda m, n=name: f'{n}: {m}')


@st.composite
def layers(draw):
    small = st.integers(1, 3)
    groups = draw(small)
    cin, cout = groups * draw(small), groups * draw(small)
    kernel = draw(st.tuples(small, small))
    padding = draw(st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 2)),
                             st.sampled_from(['same', 'valid'])))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    layer = ODConv2d(
        cin, cout, kernel, (1, 1) if padding == 'same' else draw(st.tuples(small, small)), padding,
        draw(st.tuples(st.integers(1, 2), st.integers(1, 2))), groups, draw(st.booleans()),
        draw(st.sampled_from(['zeros', 'reflect', 'replicate', 'circular'])),
        dtype=torch.float64, kernel_num=draw(small), reduction=draw(st.floats(0.01, 1)),
        temperature=draw(st.floats(0.5, 30)))
    x = torch.randn(draw(small), cin, *(draw(st.integers(5, 9)) for _ in range(2)),
                    dtype=torch.float64)
    return randomised(layer).train(draw(st.booleans())), x.requires_grad_()


@settings(max_examples=150, deadline=None)
@given(layers())
def test_equals_the_formula_and_every_gradient(drawn):
    layer, x = drawn
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # batches of one image
        ours = layer(x)
    # nn.Conv2d pads, so that padding_mode is tested against torch's own.
    identity = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride,
                         layer.padding, layer.dilation, layer.groups,
                         padding_mode=layer.padding_mode)
    padded, padding = x, layer.padding
    if layer.padding_mode != 'zeros':
        padded = nn.functional.pad(x, identity._reversed_padding_repeated_twice,
                                   mode=layer.padding_mode)
        padding = 0
    theirs = reference.dynamic_conv2d(
        padded, layer.weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups,
        **reference.odconv_attentions(layer, x))
    reference.assert_same_with_gradients(ours, theirs, dict(x=x, **dict(layer.named_parameters())))


def test_registered_in_the_root_registry_and_built_by_mmcv():
    from mmcv.cnn import ConvModule
    assert MODELS.get('ODConv2d') is ODConv2d
    module = ConvModule(8, 12, 3, padding=1, norm_cfg=dict(type='BN'),
                        conv_cfg=dict(type='ODConv2d', kernel_num=2, reduction=1 / 4))
    bank = module.conv.weight
    assert bank.shape == (2, 12, 8, 3, 3)
    # mmcv's initialiser would take the bank's first axis for the output channels.
    expected = (2 / (12 * 9))**0.5
    module.init_weights()
    assert bank.std().item() == pytest.approx(expected, rel=0.1)
    assert module(torch.randn(2, 8, 6, 6)).shape == (2, 12, 6, 6)


def test_a_hosts_init_cfg_leaves_the_attention_as_released():
    from mmdet.models.necks import FPN  # its init_cfg is Xavier for every Conv2d
    neck = FPN([64, 512], 64, 2, conv_cfg=dict(type='ODConv2d', kernel_num=2))
    neck.init_weights()
    conv = neck.lateral_convs[1].conv
    assert conv.attention.fc.weight.std().item() == pytest.approx((2 / 32)**0.5, rel=0.05)
    for fc in (conv.attention.channel_fc, conv.attention.filter_fc):
        expected = (2 / fc.out_channels)**0.5
        assert fc.weight.std().item() == pytest.approx(expected, rel=0.1)
        assert not fc.bias.any()


def test_absent_attentions_have_no_parameters():
    def names(*args, **kwargs):
        layer = ODConv2d(*args, **kwargs)
        return {n.split('.')[1] for n, _ in layer.named_parameters() if n.startswith('attention')}

    common = {'fc', 'bn', 'channel_fc'}
    assert names(8, 4, 3) == common | {'filter_fc', 'spatial_fc', 'kernel_fc'}
    assert names(8, 4, 1) == common | {'filter_fc', 'kernel_fc'}
    assert names(8, 4, (1, 3), kernel_num=1) == common | {'filter_fc', 'spatial_fc'}
    assert names(8, 8, 3, groups=8) == common | {'spatial_fc', 'kernel_fc'}
    assert names(8, 16, 3, groups=8) == common | {'filter_fc', 'spatial_fc', 'kernel_fc'}


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(kernel_num=0), 'kernel_num must be at least 1, got 0'),
    (dict(reduction=0), r'reduction must be in \(0, 1\], got 0'),
    (dict(reduction=1.5), r'reduction must be in \(0, 1\], got 1.5'),
    (dict(temperature=0), 'temperature must be greater than 0, got 0'),
    (dict(temperature=float('nan')), 'temperature must be greater than 0, got nan'),
    (dict(groups=3), 'divisible by groups, got 8 and 12 with groups=3'),
    (dict(groups=0), 'divisible by groups, got 8 and 12 with groups=0'),
    (dict(padding_mode='mirror'), "padding_mode must be one of .* padding_mode='mirror'"),
    (dict(padding='full'), "Invalid padding string 'full', should be one of"),
    (dict(padding='same', stride=2), "padding='same' is not supported for strided"),
    (dict(norm_cfg=dict(type='IN')), "must have a type among .* got 'IN'"),
    (dict(norm_cfg=dict(type='GN', num_groups=16)), 'divide its 16 channels and be smaller'),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ODConv2d(8, 12, 3, **arguments)


@pytest.mark.parametrize('shape', [(8, 5, 5), (2, 4, 5, 5), (2, 8, 5), (1, 2, 8, 5, 5)])
def test_bad_input(shape):
    with pytest.raises(ValueError, match=r'ODConv2d expects an input of shape \(B, 8, H, W\), got'):
        ODConv2d(8, 12, 3)(torch.zeros(shape))


def test_one_image_per_device_uses_running_statistics_and_says_so_once():
    layer = randomised(ODConv2d(8, 12, 3)).train()
    x = torch.randn(1, 8, 5, 5)
    odconv._warn_single_image.cache_clear()
    with pytest.warns(UserWarning, match="norm_cfg=dict\\(type='SyncBN'\\)") as caught:
        trained = layer(x), layer(x)[0]
    assert len(caught) == 1
    layer.eval()
    torch.testing.assert_close(trained[0], layer(x))
    trained[0].sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize('norm_cfg', [
    dict(type='GN'), dict(type='GN', num_groups=2), dict(type='LN'),
    dict(type='BN', momentum=0.01)])
def test_other_norms_train_with_any_batch(norm_cfg):
    layer = ODConv2d(8, 12, 3, norm_cfg=norm_cfg).train()
    for batch in (1, 2):
        layer(torch.randn(batch, 8, 5, 5)).sum().backward()
    assert layer.attention.fc.weight.grad.abs().sum() > 0


def test_layer_norm_normalises_over_channels():
    layer = randomised(ODConv2d(8, 12, 3, norm_cfg=dict(type='LN'))).double()
    norm, v = layer.attention.bn, torch.randn(3, 16).double()
    expected = nn.functional.layer_norm(v, (16,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(norm(v[:, :, None, None]).flatten(1), expected)


def test_sync_bn_falls_back_like_bn_when_alone():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        layer = ODConv2d(8, 12, 3, norm_cfg=dict(type='SyncBN')).train()
        assert layer(torch.randn(1, 8, 5, 5)).shape == (1, 12, 3, 3)


def test_empty_batch_leaves_no_parameter_without_gradient():
    layer = ODConv2d(8, 12, 3, padding=1).train()
    before = copy.deepcopy(dict(layer.named_buffers()))
    y = layer(torch.randn(0, 8, 5, 5))
    assert y.shape == (0, 12, 5, 5)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
    for name, value in layer.named_buffers():
        torch.testing.assert_close(value, before[name])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    layer = randomised(ODConv2d(16, 16, 3, padding=1)).eval()
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    with torch.autocast('cpu', dtype):
        y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.2)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    layer = ODConv2d(8, 12, 3, dtype=dtype)
    assert layer(torch.randn(2, 8, 5, 5, dtype=dtype)).dtype == dtype
    assert {p.dtype for p in layer.parameters()} == {dtype}


def test_channels_last():
    layer = randomised(ODConv2d(8, 12, 3).double())
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    expected = layer(x)
    layer = layer.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize(('batch', 'kernel_num'), [(1, 4), (2, 4), (2, 1)])
def test_compiles_without_a_graph_break(batch, kernel_num):
    layer = randomised(ODConv2d(8, 12, 3, kernel_num=kernel_num)).train()
    x = torch.randn(batch, 8, 6, 6)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
    state = copy.deepcopy(layer.state_dict())
    y = compiled(x)
    y.sum().backward()
    grads = [p.grad.clone() for p in layer.parameters()]
    layer.load_state_dict(state)
    layer.zero_grad()
    expected = layer(x)
    expected.sum().backward()
    torch.testing.assert_close(y, expected)
    for grad, p in zip(grads, layer.parameters()):
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing():
    layer = randomised(ODConv2d(8, 12, 3).double())
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    saved = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(),
                                [x, *layer.parameters()])
    for a, b in zip(plain, saved):
        torch.testing.assert_close(a, b)


def test_deepcopy_and_pickle():
    layer = randomised(ODConv2d(8, 12, 3, temperature=2.5)).eval()
    x = torch.randn(2, 8, 5, 5)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.temperature == 2.5
        torch.testing.assert_close(twin(x), layer(x))


def test_set_temperature():
    model = nn.Sequential(ODConv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Sequential(ODConv2d(4, 4, 1)))
    set_temperature(model, 30)
    assert [model[0].temperature, model[2][0].temperature] == [30, 30]
    with pytest.raises(ValueError, match='temperature must be greater than 0, got -1'):
        set_temperature(model, -1)


def test_is_no_conv2d_and_prints_its_arguments():
    layer = ODConv2d(8, 12, 3, padding=1, kernel_num=2, bias=False)
    assert not isinstance(layer, nn.Conv2d)
    assert layer.extra_repr() == ('8, 12, kernel_size=(3, 3), stride=(1, 1), kernel_num=2, '
                                  'padding=(1, 1), bias=False')


@pytest.mark.parametrize('plan', ['blocked', 'folded'])
def test_create_graph_changes_no_first_derivative(plan):
    layer = randomised(ODConv2d(8, 12, 3).double())
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    with force_plan(plan):
        plain = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
        graph = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()], create_graph=True)
    for a, b in zip(plain, graph):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize('kernel_num', [1, 4])
def test_channels_last_backward(batch, kernel_num):
    layer = randomised(ODConv2d(8, 12, 3, kernel_num=kernel_num)).eval()
    x = torch.randn(batch, 8, 6, 6, requires_grad=True)
    plain = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    layer.to(memory_format=torch.channels_last)
    x_last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    for plan in ('blocked', 'folded'):
        with force_plan(plan):
            last = torch.autograd.grad(layer(x_last).sum(), [x_last, *layer.parameters()])
        for a, b in zip(plain, last):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
