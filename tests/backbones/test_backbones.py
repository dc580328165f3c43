import re

import pytest
import torch
import yaml
from mmdet.models.backbones import MobileNetV2, ResNet, ResNetV1d, ResNeXt
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.registry import MODELS
from torch import nn

from mmdet_odconv import ODConv2d, ODMobileNetV2, ODResNet, ODResNetV1d, ODResNeXt
from mmdet_odconv.layers import replace_convs


def kinds(model):
    dynamic = {name for name, m in model.named_modules() if isinstance(m, ODConv2d)}
    static = {name for name, m in model.named_modules()
              if type(m) is nn.Conv2d and '.attention.' not in name}
    return dynamic, static


def published_parameters(data):
    rows = yaml.safe_load((data / 'published.yml').read_text())
    return rows['odconv_backbone_params_without_classifier']


def build_published(row):
    """'MobileNetV2 0.75x k4' -> the backbone."""
    *name, kernel_num = row.split()
    kernel_num = int(kernel_num[1:])
    if name[0] == 'MobileNetV2':
        return ODMobileNetV2(widen_factor=float(name[1][:-1]), kernel_num=kernel_num)
    return ODResNet(int(name[0][len('ResNet'):]), kernel_num=kernel_num)


@pytest.mark.parametrize('row', [
    *(f'ResNet{d} k{k}' for d, k in ((18, 1), (18, 4), (50, 1), (50, 4), (101, 1), (101, 2))),
    *(f'MobileNetV2 {w}x k{k}' for w in ('1.0', '0.75', '0.5') for k in (1, 4))])
def test_parameters_equal_the_published(data, row):
    expected = published_parameters(data)[row]
    with torch.device('meta'):
        model = build_published(row)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == expected


def test_registered_in_the_root_registry_and_seen_by_mmdet():
    for name, cls in dict(ODResNet=ODResNet, OD_ResNet=ODResNet, ODResNetV1d=ODResNetV1d,
                          ODResNeXt=ODResNeXt, ODMobileNetV2=ODMobileNetV2,
                          OD_MobileNetV2=ODMobileNetV2).items():
        assert MODELS.get(name) is cls and MMDET_MODELS.get(name) is cls


@pytest.mark.parametrize(('cls', 'base', 'arguments'), [
    (ODResNet, ResNet, dict(depth=18)),
    (ODResNet, ResNet, dict(depth=50)),
    (ODResNetV1d, ResNetV1d, dict(depth=50)),
    (ODResNeXt, ResNeXt, dict(depth=50, groups=32, base_width=4)),
    (ODMobileNetV2, MobileNetV2, dict(widen_factor=0.5)),
])
def test_every_body_convolution_is_dynamic_and_nothing_else_changes(cls, base, arguments):
    model, static_model = cls(**arguments), base(**arguments)
    dynamic, static = kinds(model)
    _, all_convs = kinds(static_model)
    assert dynamic | static == all_convs
    if base is MobileNetV2:
        assert static == {'conv1.conv'}
    else:
        stem_and_shortcuts = re.compile(r'conv1|stem|.*downsample')
        assert static == set(filter(stem_and_shortcuts.match, all_convs))
    for name in dynamic:
        ours, theirs = model.get_submodule(name), static_model.get_submodule(name)
        for attribute in ('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding',
                          'dilation', 'groups', 'padding_mode'):
            assert getattr(ours, attribute) == getattr(theirs, attribute), (name, attribute)
    x = torch.randn(2, 3, 64, 64)
    assert [y.shape for y in model(x)] == [y.shape for y in static_model(x)]


@pytest.mark.parametrize('depth', [18, 34, 50, 101, 152])
def test_every_depth_builds(depth):
    with torch.device('meta'):
        assert len(kinds(ODResNet(depth, kernel_num=1))[0]) == {
            18: 16, 34: 32, 50: 48, 101: 99, 152: 150}[depth]


def test_arguments_of_the_extended_backbone():
    model = ODResNet(
        50, out_indices=(1, 3), deep_stem=True, avg_down=True, style='caffe', with_cp=True,
        norm_cfg=dict(type='GN', num_groups=32), dilations=(1, 1, 1, 2), strides=(1, 2, 2, 1),
        dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, False, False, True), zero_init_residual=False,
        plugins=[dict(cfg=dict(type='ContextBlock', ratio=1 / 16), stages=(False, True, True, True),
                      position='after_conv3')], kernel_num=1, reduction=1 / 8)
    dynamic, static = kinds(model)
    assert type(model.layer4[0].conv2).__name__ == 'ModulatedDeformConv2dPack'
    assert 'layer4.0.conv2' not in dynamic and 'layer3.0.conv2' in dynamic
    assert any('context_block' in name for name in static)
    assert model.layer1[0].conv3.attention.fc.out_channels == 16
    assert model.layer4[0].conv1.attention.fc.out_channels == 1024 // 8
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    model.train()
    outputs = model(x)
    assert [y.shape[1] for y in outputs] == [512, 2048]
    sum(y.sum() for y in outputs).backward()


def test_conv_cfg_chooses_the_layer():
    model = ODResNet(18, conv_cfg=dict(type='ODConv2d', kernel_num=2, norm_cfg=dict(type='LN')))
    conv = model.layer1[0].conv1
    assert conv.kernel_num == 2 and isinstance(conv.attention.bn, nn.GroupNorm)
    with pytest.raises(ValueError, match="a dynamic convolution such as ODConv2d, got 'Conv2d'"):
        ODResNet(18, conv_cfg=dict(type='Conv2d'))
    with pytest.raises(ValueError, match="got 'ODConv3d'"):
        ODResNet(18, conv_cfg=dict(type='ODConv3d'))


def test_replace_convs_takes_any_model():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 1, bias=False)))
    names = replace_convs(model, r'1\..*', dict(type='ODConv2d', kernel_num=2))
    assert names == ['1.0']
    assert type(model[0]) is nn.Conv2d and model[1][0].bias is None
    assert model(torch.randn(2, 3, 5, 5)).shape == (2, 8, 3, 3)


def test_replace_convs_keeps_mode_and_frozenness():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)).eval()
    model[1].requires_grad_(False)
    model[2].train()
    norm_cfg = dict(type='BN', requires_grad=False)
    replace_convs(model, r'\d', dict(type='ODConv2d', norm_cfg=norm_cfg))
    assert [{m.training for m in conv.modules()} for conv in model] == [{False}, {False}, {True}]
    trainable = [{n for n, p in conv.named_parameters() if p.requires_grad} for conv in model]
    everything = {n for n, _ in model[0].named_parameters()}
    assert trainable[0] == everything - {'attention.bn.weight', 'attention.bn.bias'}
    assert trainable[1] == set()


@pytest.mark.parametrize(('cls', 'arguments', 'frozen', 'moving'), [
    (ODResNet, dict(depth=18), ('conv1', 'bn1', 'layer1'), ('layer2', 'layer3', 'layer4')),
    (ODMobileNetV2, dict(), ('conv1', 'layer1'), ('layer2', 'layer7', 'conv2')),
])
def test_frozen_stages_and_norm_eval_cover_the_attention(cls, arguments, frozen, moving):
    model = cls(frozen_stages=1, norm_eval=True, kernel_num=2, **arguments)
    model.train()
    for name, p in model.named_parameters():
        assert p.requires_grad == (not name.startswith(frozen)), name
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) > 30 and not any(m.training for m in norms)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    model(torch.randn(2, 3, 32, 32))
    for name, value in model.named_buffers():
        torch.testing.assert_close(value, buffers[name])
    model = cls(frozen_stages=1, norm_eval=False, **arguments)
    model.train()
    training = {n: m.training for n, m in model.named_modules() if n.endswith('attention.bn')}
    assert not any(t for n, t in training.items() if n.startswith(frozen))
    assert all(t for n, t in training.items() if n.startswith(moving))


@pytest.mark.parametrize('kernel_num', [1, 4])
@pytest.mark.parametrize(('cls', 'arguments'), [
    (ODResNet, dict(depth=18)), (ODMobileNetV2, dict(widen_factor=0.5))])
def test_no_parameter_is_left_without_a_gradient(cls, arguments, kernel_num):
    model = cls(kernel_num=kernel_num, **arguments)
    model.train()
    model.init_weights()
    sum(y.sum() for y in model(torch.randn(2, 3, 64, 64))).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_init_weights_gives_every_kernel_the_scale_of_a_static_one():
    model = ODResNet(18, kernel_num=4)
    model.init_weights()
    for kernel in model.layer2[1].conv2.weight:
        assert kernel.std().item() == pytest.approx((2 / (128 * 9))**0.5, rel=0.03)
    assert model.layer2[1].bn2.weight.abs().max() == 0  # zero_init_residual still holds


def test_a_backbone_compiles_without_a_graph_break():
    model = ODResNet(18, kernel_num=2)
    model.eval()
    x = torch.randn(2, 3, 64, 64)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    for ours, expected in zip(compiled(x), model(x)):
        torch.testing.assert_close(ours, expected)


def test_channels_last_backbone():
    model = ODResNet(18, kernel_num=2).double()
    model.eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    for ours, theirs in zip(model(x.to(memory_format=torch.channels_last)), expected):
        torch.testing.assert_close(ours, theirs)
