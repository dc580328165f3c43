import copy
import json
import warnings

import numpy as np
import pytest
import torch
from reference import randomised
from torch import nn

from mmdet_odconv import InputError, ODConv2d
from mmdet_odconv.layers import FDConv2d, odconv


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


def test_a_hosts_init_cfg_leaves_the_attention_as_released():
    from mmdet.models.necks import FPN  # its init_cfg is Xavier for every Conv2d
    neck = FPN([64, 512], 64, 2, conv_cfg=dict(type='ODConv2d', kernel_num=2, init='he'))
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
    (dict(norm_cfg=dict(type='IN')), "must have a type among .* got 'IN'"),
    (dict(norm_cfg=dict(type='GN', groups=4)), "norm_cfg of the attention: .* argument 'groups'"),
    (dict(norm_cfg=dict(type='GN', num_groups=16)), 'divide its 16 channels and be smaller'),
])
def test_bad_norms(arguments, message):
    with pytest.raises(ValueError, match=message):
        ODConv2d(8, 12, 3, **arguments)


def test_one_image_per_device_uses_running_statistics_and_says_so_once():
    layer = randomised(ODConv2d(8, 12, 3)).train()
    x = torch.randn(1, 8, 5, 5)
    odconv._warn_few_images.cache_clear()
    with pytest.warns(UserWarning, match='1 image per device.* its running statistics') as caught:
        trained = layer(x), layer(x)[0]
    assert len(caught) == 1
    layer.eval()
    torch.testing.assert_close(trained[0], layer(x))
    trained[0].sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize(('batch', 'norm', 'warned'), [
    (2, 'BN', True), (3, 'BN', True), (4, 'BN', False), (2, 'LN', False)])
def test_a_batchnorm_of_few_images_is_warned_of(batch, norm, warned):
    odconv._warn_few_images.cache_clear()
    layer = ODConv2d(8, 12, 3, norm_cfg=dict(type=norm))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        layer(torch.randn(batch, 8, 5, 5))
        layer.eval()(torch.randn(batch, 8, 5, 5))
    said = [str(one.message) for one in caught]
    assert len(said) == warned
    assert not said or f'{batch} values per channel' in said[0] and "type='LN'" in said[0]


@pytest.mark.parametrize('norm_cfg', [
    dict(type='GN'), dict(type='GN', num_groups=2), dict(type='LN'),
    dict(type='BN', momentum=0.01)])
def test_other_norms_train_with_any_batch(norm_cfg):
    layer = ODConv2d(8, 12, 3, norm_cfg=norm_cfg, init='he').train()
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


@pytest.mark.parametrize(('groups', 'kernel_size'), [(1, 1), (1, 3), (8, 3)])
@pytest.mark.parametrize('kernel_num', [1, 4])
def test_scaled_gates_learn_from_a_static_kernel_at_its_own_pace(kernel_num, groups, kernel_size):
    static = nn.Conv2d(8, 8, kernel_size, groups=groups, bias=False).double()
    x = torch.randn(2, 8, 5, 5).double()
    static(x).square().sum().backward()
    layer = ODConv2d(8, 8, kernel_size, groups=groups, bias=False, kernel_num=kernel_num,
                     gate_scale=2).double()
    layer.inflate(static.weight.data)
    torch.testing.assert_close(layer.weight.data.mean(0), static.weight.data)
    output = layer(x)
    torch.testing.assert_close(output, static(x), rtol=1e-10, atol=1e-10)
    output.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad.sum(0), static.weight.grad)


def test_gates_as_published_are_where_none_are_asked_for():
    torch.manual_seed(0)
    published = ODConv2d(8, 12, 3, bias=False)
    scaled = ODConv2d(8, 12, 3, bias=False, gate_scale=2)
    assert 'gate_scale=2' in repr(scaled) and 'gate_scale' not in repr(published)
    randomised(published)
    for layer, other, found in ((scaled, published, 1), (published, scaled, 2)):
        with pytest.raises(InputError, match=f'holds weights of gate_scale={found}: set it in'):
            layer.load_state_dict(other.state_dict())
    scaled.load_state_dict({**scaled.state_dict(), **published.state_dict()})
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(scaled.eval()(x), 8 * published.eval()(x))
    with pytest.raises(ValueError, match='gate_scale must be greater than 0 and finite, got 0'):
        ODConv2d(8, 12, 3, gate_scale=0)


@pytest.mark.parametrize(('layer', 'norm'), [
    (ODConv2d, 'attention.bn'), (FDConv2d, 'KSM_Global.bn')])
def test_weights_of_another_norm_are_refused(layer, norm):
    """Their weight and bias fit, and what they compute is not what was trained."""
    batch, other = (layer(64, 64, 3, norm_cfg=dict(type=kind)) for kind in ('BN', 'LN'))
    with pytest.raises(InputError, match=f"{norm} of an attention is of norm_cfg type 'LN' or "
                                         "'GN', but the checkpoint's of 'BN': set norm_cfg="):
        other.load_state_dict(batch.state_dict())
    # Parameters alone, as of averaged weights, may be of either.
    for parameters in (other.state_dict(), dict(batch.named_parameters())):
        missing, _ = batch.load_state_dict(parameters, strict=False)
        assert f'{norm}.running_mean' in missing
    for same in (batch, other):
        copy.deepcopy(same).load_state_dict(same.state_dict())
        copy.deepcopy(same).load_state_dict({}, strict=False)


def test_a_gate_scale_that_was_rounded_to_half_precision_is_the_same():
    layer = ODConv2d(4, 8, 3, gate_scale=1.7)
    halves = {name: value.half() for name, value in layer.state_dict().items()}
    layer.load_state_dict(halves)
    ODConv2d(4, 8, 3, gate_scale=1.7).load_state_dict(layer.state_dict())


def test_a_damaged_gate_scale_is_refused_by_its_shape():
    layer = ODConv2d(4, 8, 3, gate_scale=2)
    damaged = dict(layer.state_dict(), **{'attention.scale': torch.ones(2)})
    with pytest.raises(RuntimeError, match='size mismatch for attention.scale'):
        layer.load_state_dict(damaged)


def test_layernorm_by_torchs_own_argument():
    layer = ODConv2d(8, 8, 3, norm_cfg=dict(type='LN', elementwise_affine=False))
    assert not list(layer.attention.bn.parameters())


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('kind', ['BN', 'LN'])
def test_a_half_layer_whose_norm_has_no_weights(kind, training):
    layer = ODConv2d(8, 8, 3, norm_cfg=dict(type=kind, affine=False)).half().train(training)
    assert layer(torch.randn(4, 8, 9, 9).half()).isfinite().all()
