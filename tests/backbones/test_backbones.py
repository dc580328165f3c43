import re

import pytest
import torch
import yaml
from mmdet.models.backbones import MobileNetV2, ResNet, ResNetV1d, ResNeXt
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.registry import MODELS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmdet_odconv import (
    CondConv2d,
    DCDConv2d,
    DyConv2d,
    DyMobileNetV2,
    DyMobileNetV3,
    DyResNet,
    InputError,
    KWMobileNetV2,
    KWResNet,
    MobileNetV3,
    ODConv2d,
    ODMobileNetV2,
    ODResNet,
    ODResNetV1d,
    ODResNeXt,
    SEMobileNetV2,
    SEResNet,
)
from mmdet_odconv.layers import DynamicConv2d, replace_convs


def kinds(model):
    dynamic = {name for name, m in model.named_modules() if isinstance(m, DynamicConv2d)}
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
                          OD_MobileNetV2=ODMobileNetV2, DyResNet=DyResNet,
                          DyMobileNetV2=DyMobileNetV2, DyMobileNetV3=DyMobileNetV3,
                          MobileNetV3=MobileNetV3, SEResNet=SEResNet,
                          SEMobileNetV2=SEMobileNetV2).items():
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


@pytest.mark.parametrize('depth', [10, 18, 34, 50, 101, 152])
def test_every_depth_builds(depth):
    with torch.device('meta'):
        body, paper, every, se = (
            len(kinds(model)[i]) for model, i in (
                (ODResNet(depth), 0), (DyResNet(depth), 0),
                (DyResNet(depth, dynamic_convs='layer.*'), 0), (SEResNet(depth), 1)))
    expected = {10: 8, 18: 16, 34: 32, 50: 48, 101: 99, 152: 150}[depth]
    shortcuts = 3 if depth < 50 else 4
    first_two_stages = {10: 4, 18: 8, 34: 14, 50: 21, 101: 21, 152: 33}[depth]
    assert body == expected and every == expected + shortcuts
    assert paper == expected - first_two_stages
    blocks = expected // (2 if depth < 50 else 3)
    assert se == 1 + expected + shortcuts + 2 * blocks


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


def test_a_convolution_of_two_names_is_replaced_under_both():
    conv = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    assert replace_convs(model, '0', dict(type='ODConv2d')) == ['0', '2']
    assert model[0] is model[2] and isinstance(model[0], DynamicConv2d)


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        replace_convs(nn.Sequential(nn.Conv2d(4, 4, 1)), '(', dict(type='ODConv2d'))


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(conv_cfg='ODConv2d'), "conv_cfg must be a dict .*, got 'ODConv2d'"),
    (dict(dynamic_convs=['layer1']), r"dynamic_convs=\['layer1'\] is no regular expression")])
def test_arguments_of_another_type(arguments, message):
    with pytest.raises(ValueError, match=message):
        ODResNet(18, **arguments)


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


def test_what_the_user_froze_is_not_excepted():
    with torch.device('meta'):
        model = ODResNet(10, frozen_stages=1, frozen_except='attention',
                         conv_cfg=dict(norm_cfg=dict(type='BN', requires_grad=False)))
    heads = {name for name, _ in model.named_parameters()
             if '.attention.' in name and '.bn.' not in name}

    def trained(prefix=''):
        return {n for n, p in model.named_parameters() if p.requires_grad and n.startswith(prefix)}

    for _ in range(2):  # as constructed, and as training begins
        assert trained('layer1.') == {name for name in heads if name.startswith('layer1.')}
        assert not any('.attention.bn.' in name for name in trained('layer4.'))
        model.train()
    model.requires_grad_(False)
    for mode in (False, True):
        model.train(mode)
        assert trained() == set()


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


def millions(model, *classifier):
    """Parameters of a backbone and of a classifier's fully connected layers, in millions."""
    heads = sum((a + 1) * b for a, b in zip(classifier, classifier[1:]))
    return (sum(p.numel() for p in model.parameters()) + heads) / 1e6


def build_dyconv(name):
    """A row of the DyConv paper's table -> the backbone and its classifier's channels."""
    family, _, width = name[len('DY-'):].partition(' ')
    if family == 'MobileNetV2':
        return DyMobileNetV2(float(width[:-1])), (1280, 1000)
    if family == 'MobileNetV3-Small':
        return DyMobileNetV3('small'), (576, 1280, 1000)
    return DyResNet(int(family[len('ResNet-'):])), (512, 1000)


@pytest.mark.parametrize('name', [
    *(f'DY-MobileNetV2 {w}x' for w in ('1.0', '0.75', '0.5', '0.35')),
    'DY-MobileNetV3-Small', 'DY-ResNet-10', 'DY-ResNet-18'])
def test_dyconv_parameters_are_within_two_percent_of_the_published(data, name):
    rows = yaml.safe_load((data / 'published.yml').read_text())['dyconv_imagenet']
    expected, = (row['params'] for row in rows if row['model'] == name)
    with torch.device('meta'):
        model, classifier = build_dyconv(name)
    assert millions(model, *classifier) == pytest.approx(
        expected, rel=0.05 if '0.35' in name else 0.02)


def test_dyconv_parameters_as_the_odconv_paper_counts_them():
    with torch.device('meta'):
        mobilenet = DyMobileNetV2(dynamic_convs='(layer|conv2).*')
        resnet = DyResNet(18, dynamic_convs='layer.*')
    assert round(millions(mobilenet, 1280, 1000), 2) == 12.40
    assert round(millions(resnet, 512, 1000), 2) == 45.47


@pytest.mark.parametrize(('model', 'classifier', 'expected'), [
    (lambda: MobileNetV3('small'), (576, 1024, 1000), '2.542856'),  # torchvision's counts
    (lambda: MobileNetV3('large'), (960, 1280, 1000), '5.483032'),
    (lambda: MobileNetV3('small_v1'), (576, 1280, 1000), '2.9'),  # the paper's first version
    (lambda: SEResNet(50), (2048, 1000), '28.1')])  # SE-ResNet-50 of the SENet paper
def test_parameters_of_the_static_baselines(model, classifier, expected):
    digits = len(expected.partition('.')[2])
    with torch.device('meta'):
        assert f'{millions(model(), *classifier):.{digits}f}' == expected


@pytest.mark.parametrize(('cls', 'arguments', 'static'), [
    (DyResNet, dict(depth=18), r'conv1|layer[12].*|.*downsample.*'),
    (DyResNet, dict(depth=50, dynamic_convs='layer.*'), 'conv1'),
    (DyMobileNetV2, dict(widen_factor=0.35), r'conv[12]\.conv'),
    (DyMobileNetV2, dict(dynamic_convs='(layer|conv2).*'), r'conv1\.conv'),
    (DyMobileNetV3, {}, r'layer0\.conv|.*\.se\..*'),
    (DyMobileNetV3, dict(arch='large'), r'layer0\.conv|.*\.se\..*')])
def test_which_convolutions_of_dyconv_are_dynamic(cls, arguments, static):
    with torch.device('meta'):
        dynamic, others = kinds(cls(**arguments))
    assert others and all(re.fullmatch(static, name) for name in others)
    assert dynamic and not any(re.fullmatch(static, name) for name in dynamic)


@pytest.mark.parametrize('cls', [ODResNet, DyResNet])
@pytest.mark.parametrize(('layer', 'bank'), [
    (ODConv2d, 4), (DyConv2d, 4), (CondConv2d, 8), (DCDConv2d, 1)])
def test_any_layer_in_any_backbone_with_its_own_defaults(cls, layer, bank):
    with torch.device('meta'):
        model = cls(18, conv_cfg=dict(type=layer.__name__))
    conv = model.layer4[0].conv2
    assert type(conv) is layer and conv.kernel_num == bank


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(dynamic_convs='layer1'), "'layer1' matches the name of no convolution of DyResNet"),
    (dict(dynamic_convs='layer('), r"'layer\(' is no regular expression"),
    (dict(frozen_except='KSM('), r"frozen_except='KSM\(' is no regular expression"),
    (dict(frozen_except='KSM_|FMB'), r"frozen_except='KSM_\|FMB' is in the name of no param"),
    (dict(conv_cfg=dict(type='CondConv2d'), reduction=0.5), 'CondConv2d has no argument reduction'),
    (dict(conv_cfg=dict(type='DCDConv2d'), kernel_num=4), 'DCDConv2d has no argument kernel_num')])
def test_bad_choices_of_dynamic_convolutions(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        DyResNet(18, **arguments)
    assert isinstance(caught.value, InputError) == ('conv_cfg' not in arguments)


@pytest.mark.parametrize(('arch', 'dynamic', 'channels'), [
    ('small', False, [16, 24, 48, 576]), ('large', False, [24, 40, 112, 960]),
    ('small', True, [16, 40, 48, 576])])
def test_mobilenet_v3_returns_strides_4_to_32(arch, dynamic, channels):
    model = (DyMobileNetV3 if dynamic else MobileNetV3)(arch)
    model.init_weights()
    outputs = model.train()(torch.randn(2, 3, 64, 64))
    assert [y.shape[1:] for y in outputs] == [
        (c, 64 // s, 64 // s) for c, s in zip(channels, (4, 8, 16, 32))]
    sum(y.sum() for y in outputs).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize('cls', [MobileNetV3, DyMobileNetV3])
def test_mobilenet_v3_arguments(cls):
    model = cls('large', out_indices=(0, 16), frozen_stages=1, norm_eval=True,
                with_cp=True).train()
    assert [y.shape[1] for y in model(torch.randn(1, 3, 32, 32))] == [16, 960]
    for name, p in model.named_parameters():
        assert p.requires_grad == (not name.startswith(('layer0.', 'layer1.')))
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    for arguments, message in (
            (dict(arch='tiny'), "arch must be one of .*'small'.*, got 'tiny'"),
            (dict(out_indices=(13,)), r'out_indices must be from 0 to 12, got \(13,\)'),
            (dict(frozen_stages=13), 'frozen_stages must be from -1 to 12, got 13')):
        with pytest.raises(ValueError, match=message):
            cls(**arguments)


def test_se_and_mobilenet_v3_name_their_tensors_as_mmpretrain_does():
    with torch.device('meta'):
        assert 'layer1.0.se_layer.conv1.conv.weight' in SEResNet(50).state_dict()
        assert 'layer1.0.se_layer.conv2.conv.bias' in SEResNet(18).state_dict()
        state = MobileNetV3('small').state_dict()
    assert {'layer0.conv.weight', 'layer1.se.conv2.conv.bias', 'layer2.expand_conv.bn.bias',
            'layer11.linear_conv.conv.weight', 'layer12.bn.running_var'} <= set(state)
    assert state['layer1.se.conv1.conv.weight'].shape == (8, 16, 1, 1)


@pytest.mark.parametrize(('se', 'static'), [
    (lambda: SEResNet(18), lambda: ResNet(18)), (lambda: SEResNet(50), lambda: ResNet(50)),
    (lambda: SEMobileNetV2(0.5), lambda: MobileNetV2(0.5))])
def test_se_gates_the_static_backbone_and_loads_its_weights(se, static):
    se, static = se().double(), static().double()
    se.eval()
    static.eval()
    missing, unexpected = se.load_state_dict(static.state_dict(), strict=False)
    assert missing and all('.se' in name for name in missing) and not unexpected
    # Gates that stand wide open leave the static network.
    for name, p in se.named_parameters():
        if '.se' in name:
            nn.init.constant_(p, 40 if name.endswith('conv2.conv.bias') else 0)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for ours, expected in zip(se(x), static(x)):
        torch.testing.assert_close(ours, expected)


def test_se_resnet_keeps_zero_init_residual_and_checkpointing():
    model = SEResNet(18, with_cp=True)
    model.init_weights()
    assert model.layer2[1].bn2.weight.abs().max() == 0
    assert model.layer2[1].se_layer.conv1.conv.weight.abs().max() > 0
    model.train()
    sum(y.sum() for y in model(torch.randn(2, 3, 64, 64, requires_grad=True))).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(('kind', 'conv_cfg', 'count'), [
    ('GN', None, 1), ('SyncBN', None, 1), ('BN', None, 0), ('GN', dict(type='CondConv2d'), 0),
    ('GN', dict(norm_cfg=dict(type='GN')), 0)])
def test_an_attention_that_keeps_batch_norm_where_the_backbone_has_another_is_said(
        monkeypatch, kind, conv_cfg, count):
    said = []
    monkeypatch.setattr('mmdet_odconv.backbones.dynamic.print_log',
                        lambda message, logger, level: said.append(message))
    norm_cfg = dict(type=kind, **dict(num_groups=4) if kind == 'GN' else {})
    ODResNet(depth=10, base_channels=8, stem_channels=8, norm_cfg=norm_cfg, conv_cfg=conv_cfg)
    assert len(said) == count
    assert all(re.search(rf'has norm_cfg type {kind}, .* keeps BatchNorm: conv_cfg=dict\(norm_cfg='
                         rf"dict\(type='{kind}'\)\)", message) for message in said)


@pytest.mark.parametrize('build', [
    lambda: ODResNet(18, kernel_num=2), lambda: ODMobileNetV2(kernel_num=1), lambda: KWResNet(18),
    KWMobileNetV2])
@pytest.mark.parametrize('place', [FakeTensorMode, lambda: torch.device('meta')])
def test_is_made_without_memory(build, place):
    with place():
        maps = build()(torch.randn(2, 3, 64, 64))
    assert maps[-1].shape[2:] == (2, 2)
