"""A static network and the dynamic one made of it compute the same, in float64 to 1e-10."""
import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from mmdet.models.backbones import MobileNetV2, ResNet, ResNetV1d, ResNeXt
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.model import BaseModule
from torch import nn

from mmdet_odconv import (
    DyMobileNetV2,
    DyResNet,
    InputError,
    ODConv2d,
    ODMobileNetV2,
    ODResNet,
    ODResNetV1d,
    ODResNeXt,
    to_dynamic,
)
from mmdet_odconv.checkpoints import load_static
from mmdet_odconv.layers import DynamicConv2d, replace_convs

ROOT = Path(__file__).parents[2]
LAYERS = [
    dict(type='ODConv2d', kernel_num=4), dict(type='ODConv2d', kernel_num=1),
    dict(type='ODConv2d', kernel_num=3, norm_cfg=dict(type='LN'), temperature=7.0),
    dict(type='DyConv2d', kernel_num=4, temperature=30.0), dict(type='CondConv2d', kernel_num=8),
    dict(type='CondConv2d', kernel_num=3), dict(type='DCDConv2d'), dict(type='FDConv2d'),
    dict(type='FDConv2d', kernel_num=1, norm_cfg=dict(type='LN'), local=False)]
EXACT = dict(rtol=1e-10, atol=1e-10)


def trained(model):
    """As after training: no statistic, scale or bias at its start, and signals that stay O(1)."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.1)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias)
    return model


class Plain(nn.Module):
    """Everything that nn.Conv2d can be."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(6, 8, (3, 5), padding=(1, 2))
        self.grouped = nn.Conv2d(8, 12, 3, (2, 1), 1, groups=4, bias=False)
        self.depthwise = nn.Conv2d(12, 12, (1, 3), padding='same', dilation=(1, 2), groups=12)
        self.multiplied = nn.Conv2d(12, 24, 3, 1, 2, 2, groups=12, padding_mode='reflect')
        self.pointwise = nn.Conv2d(24, 10, 1)
        self.circular = nn.Conv2d(10, 7, (2, 3), 2, padding=1, padding_mode='circular')

    def forward(self, x):
        for module in self.children():
            x = module(x).relu()
        return x


def assert_same_outputs(static, dynamic, x):
    for training in (False, True):
        for model in (static, dynamic):
            model.train(training)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            ours, theirs = dynamic(x), static(x)
        assert all(y.abs().max() > 1e-3 for y in theirs)
        torch.testing.assert_close(ours, theirs, **EXACT)


def dynamic_names(model):
    return {name for name, m in model.named_modules() if isinstance(m, DynamicConv2d)}


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('conv_cfg', LAYERS, ids=str)
@pytest.mark.parametrize('build', [
    lambda: (Plain(), 6), lambda: (ResNet(18, base_channels=16, stem_channels=16), 3),
    lambda: (MobileNetV2(widen_factor=0.25), 3)], ids=['plain', 'resnet', 'mobilenet'])
def test_to_dynamic_keeps_the_output(build, conv_cfg, batch):
    static, channels = build()
    static = trained(static.double())
    dynamic = copy.deepcopy(static)
    assert to_dynamic(dynamic, conv_cfg) is dynamic
    assert len(dynamic_names(dynamic)) >= 6
    assert_same_outputs(static, dynamic, torch.randn(batch, channels, 64, 64).double())


@pytest.mark.parametrize('conv_cfg', LAYERS, ids=str)
def test_an_inflated_layer_can_learn(conv_cfg):
    model = nn.Sequential(nn.Conv2d(6, 8, 3)).double()
    layer = to_dynamic(model, {**conv_cfg, 'temperature': 1.0})[0]
    x = torch.randn(4, 6, 9, 9).double()
    if layer.kernel_num > 1 and layer.bank_name == 'weight':
        assert all(not torch.equal(layer.weight[0], other) for other in layer.weight[1:])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for _ in range(2):  # in the first step the logits are zero, and what is before them has none
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    still = [name for name, p in layer.named_parameters() if torch.equal(p, before[name])]
    assert still == []


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('kernel_num', [1, 2, 3, 4])
def test_the_mean_of_the_bank_is_exact_in_any_dtype(dtype, kernel_num):
    conv = nn.Conv2d(32, 64, 3, dtype=dtype)
    layer = ODConv2d(32, 64, 3, dtype=dtype, kernel_num=kernel_num)
    layer.inflate(conv.weight, conv.bias)
    bank = layer.weight.double() / 8  # three gates of 1/2
    assert torch.equal(bank.sum(0), kernel_num * conv.weight.double())
    assert torch.equal(layer.bias, conv.bias)
    if kernel_num > 1:
        difference = (bank[0] / conv.weight - 1).std()
        assert difference.item() == pytest.approx(0.1, rel=0.05)


def test_static_kernels_of_another_shape():
    conv = nn.Conv2d(32, 64, 3)
    with pytest.raises(ValueError, match=r'kernel of shape \(32, 64, 3, 3\), got \(64, 32, 3, 3\)'):
        ODConv2d(64, 32, 3).inflate(conv.weight)
    with pytest.raises(ValueError, match=r'ODConv2d with bias=False .* bias of shape \(64,\)'):
        ODConv2d(32, 64, 3, bias=False).inflate(conv.weight, conv.bias)


def test_stems_shortcuts_and_heads_stay_static_unless_asked_for():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for name, channels in (('first', 3), ('stem', 8), ('conv1', 8), ('downsample', 8),
                                   ('bbox_head', 8), ('neck', 8)):
                self.add_module(name, nn.Sequential(nn.Conv2d(channels, 8, 1)))
            self.tied = self.conv1

    cfg = dict(type='DyConv2d')
    model = to_dynamic(Net(), cfg)
    assert dynamic_names(model) == {'conv1.0', 'neck.0'} and model.tied is model.conv1
    assert dynamic_names(to_dynamic(Net(), cfg, exclude=())) == {
        'first.0', 'stem.0', 'conv1.0', 'downsample.0', 'bbox_head.0', 'neck.0'}
    assert dynamic_names(to_dynamic(Net(), cfg, include=['stem.*', 'neck.*'], exclude='n.*')) == {
        'stem.0'}
    assert dynamic_names(to_dynamic(Net(), cfg, exclude=r'tied\..*', include=r'(conv1|neck).*')
                         ) == {'neck.0'}
    with pytest.raises(ValueError, match='of the 6 nn.Conv2d in Net .* none .*: first.0'):
        to_dynamic(Net(), cfg, include='neck')
    with pytest.raises(ValueError, match=r"'\*' is no regular expression"):
        to_dynamic(Net(), cfg, include='*')
    with pytest.raises(ValueError, match="a dynamic convolution such as ODConv2d, got 'Conv2d'"):
        to_dynamic(Net(), dict(type='Conv2d'))


def test_names_of_a_resnet_and_a_detector():
    body = re.compile(r'(backbone\.)?layer\d\.\d+\.conv\d')
    assert all(map(body.fullmatch, dynamic_names(to_dynamic(ResNet(50), dict(type='DyConv2d')))))
    config = Config.fromfile(ROOT / 'configs/quickstart/faster-rcnn_od-r18-k4_fpn_digits.py')
    config.model.backbone = dict(type='ResNet', depth=18)
    names = dynamic_names(to_dynamic(MODELS.build(config.model), dict(type='DyConv2d')))
    backbone = {name for name in names if body.fullmatch(name)}
    assert len(backbone) == 16
    assert all(name.startswith('neck.') for name in names - backbone)


def test_shared_frozen_and_hooked_convolutions():
    shared = nn.Conv2d(8, 8, 1)
    model = nn.ModuleDict(dict(a=nn.Sequential(shared), b=nn.Sequential(shared),
                               c=nn.Conv2d(8, 8, 1).requires_grad_(False).eval()))
    to_dynamic(model, dict(type='ODConv2d'))
    assert model['a'][0] is model['b'][0] and isinstance(model['a'][0], ODConv2d)
    assert not any(p.requires_grad for p in model['c'].parameters())
    assert not model['c'].training and not model['c'].attention.bn.training
    assert all(p.requires_grad for p in model['a'].parameters()) and model['a'][0].training
    bias = nn.Sequential(nn.Conv2d(8, 8, 1))
    bias[0].bias.requires_grad_(False)
    to_dynamic(bias, dict(type='DyConv2d'))
    assert [n for n, p in bias.named_parameters() if not p.requires_grad] == ['0.bias']


@pytest.mark.parametrize(('change', 'conv_cfg', 'message'), [
    (lambda conv, _: conv.register_forward_hook(lambda *_: None), {}, '1 has hooks or a forward'),
    (lambda conv, _: setattr(conv, 'forward', torch.relu), {}, '1 has hooks or a forward of its'),
    (lambda conv, other: setattr(conv, 'weight', other.weight), {}, '0 shares its weight with 1'),
    (lambda *_: None, dict(norm_cfg=dict(type='GN', num_groups=3)), 'num_groups'),
    (lambda *_: None, dict(stride=2), 'conv_cfg has stride, in which a dynamic convolution follow'),
])
def test_a_model_that_cannot_be_converted_is_left_as_it_was(change, conv_cfg, message):
    model = nn.Sequential(nn.Conv2d(48, 48, 1), nn.Conv2d(48, 48, 1))
    change(model[1], model[0])
    before = list(model)
    with pytest.raises(ValueError, match=message):
        to_dynamic(model, dict(type='ODConv2d', **conv_cfg))
    assert all(now is then for now, then in zip(model, before))


@pytest.mark.parametrize('kind', ['ODConv2d', 'DCDConv2d', 'FDConv2d'])
def test_no_step_copies_a_bank_because_of_its_memory_format(kind):
    model = nn.Sequential(nn.Conv2d(8, 8, 3)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 5, 7).to(memory_format=torch.channels_last)
    expected = model(x)
    to_dynamic(model, dict(type=kind))
    model.to(memory_format=torch.channels_last)
    assert getattr(model[0], model[0].bank_name).is_contiguous()
    torch.testing.assert_close(model(x), expected)


def test_weights_of_another_or_a_dynamic_network_are_no_static_ones():
    with pytest.raises(InputError, match=r'ResNet has no place for .* layer1\.2\.'):
        load_static(ResNet(18, conv_cfg=dict(type='ODConv2d')), ResNet(34).state_dict(),
                    strict=True)
    with pytest.raises(InputError, match=r'layer1\.0\.conv1 .* holds a bank of 4 kernels'):
        load_static(ODResNet(18), ODResNet(18).state_dict())


@pytest.mark.parametrize(('static', 'dynamic'), [
    (lambda: ResNet(18), lambda: ODResNet(18, kernel_num=2)),
    (lambda: ResNet(50), lambda: DyResNet(50)),
    (lambda: ResNet(18), lambda: ODResNet(18, conv_cfg=dict(type='CondConv2d'))),
    (lambda: ResNet(18), lambda: ODResNet(18, conv_cfg=dict(type='DCDConv2d'))),
    (lambda: ResNetV1d(depth=18), lambda: ODResNetV1d(depth=18, kernel_num=1)),
    (lambda: ResNeXt(depth=50, groups=32, base_width=4),
     lambda: ODResNeXt(depth=50, groups=32, base_width=4, kernel_num=1)),
    (lambda: MobileNetV2(widen_factor=0.5), lambda: ODMobileNetV2(widen_factor=0.5)),
    (lambda: MobileNetV2(widen_factor=0.35), lambda: DyMobileNetV2(widen_factor=0.35)),
])
def test_static_pretrained(tmp_path, static, dynamic):
    static, dynamic = trained(static()), dynamic()
    torch.save({'state_dict': {f'backbone.{k}': v for k, v in static.state_dict().items()}},
               tmp_path / 'static.pth')
    dynamic.init_cfg = dict(type='StaticPretrained', checkpoint=str(tmp_path / 'static.pth'))
    BaseModule.init_weights(dynamic)
    for name, tensor in static.state_dict().items():
        if tensor.shape == dynamic.state_dict()[name].shape:
            assert torch.equal(tensor, dynamic.state_dict()[name]), name
    assert_same_outputs(static.double(), dynamic.double(), torch.randn(2, 3, 64, 64).double())


def torchvision_names(model):
    """The state dict of mmdet's MobileNetV2 under torchvision's names, which count modules."""
    state, index = {}, 0

    def add(prefix, module):
        state.update({f'{prefix}.{name}': t for name, t in module.state_dict().items()})

    add('features.0.0', model.conv1.conv)
    add('features.0.1', model.conv1.bn)
    for stage in model.layers[:-1]:
        for block in getattr(model, stage):
            index += 1
            steps = [m for m in block.children() if hasattr(m, 'conv')]
            for i, step in enumerate(steps):
                last = i == len(steps) - 1
                add(f'features.{index}.conv.{i}' + ('' if last else '.0'), step.conv)
                add(f'features.{index}.conv.' + (f'{i + 1}' if last else f'{i}.1'), step.bn)
    add('features.18.0', model.conv2.conv)
    add('features.18.1', model.conv2.bn)
    state['classifier.1.weight'], state['classifier.1.bias'] = torch.ones(10, 1280), torch.ones(10)
    return state


def test_static_pretrained_from_torchvisions_names(tmp_path):
    static = trained(MobileNetV2())
    torch.save(torchvision_names(static), tmp_path / 'mobilenet_v2.pth')
    dynamic = ODMobileNetV2(kernel_num=2, init_cfg=dict(
        type='StaticPretrained', checkpoint=str(tmp_path / 'mobilenet_v2.pth')))
    dynamic.init_weights()
    assert_same_outputs(static.double(), dynamic.double(), torch.randn(1, 3, 64, 64).double())


@pytest.mark.parametrize('prefix', ['backbone', 'backbone.'])
def test_a_prefix_ends_in_a_dot_or_not(tmp_path, prefix):
    static, dynamic = ResNet(18).state_dict(), ODResNet(18, kernel_num=1)
    torch.save({'state_dict': {f'backbone.{k}': v for k, v in static.items()}}, tmp_path / 'a.pth')
    dynamic.init_cfg = dict(type='StaticPretrained', checkpoint=str(tmp_path / 'a.pth'),
                            prefix=prefix)
    dynamic.init_weights()
    assert torch.equal(dynamic.conv1.weight, static['conv1.weight'])


def test_a_layer_without_a_static_counterpart_is_named():
    static = ResNet(18).state_dict()
    static = {name: t for name, t in static.items() if name != 'layer2.1.conv1.weight'}
    with pytest.raises(InputError, match='1 of the 16 dynamic layers of ODResNet have no static '
                                         r'counterpart: layer2\.1\.conv1; give'):
        load_static(ODResNet(18), static)
    del static['bn1.weight']
    with pytest.raises(InputError, match='ODResNet has depth 50, but the checkpoint depth 18'):
        load_static(ODResNet(50), static)
    with pytest.raises(InputError, match='ResNet has no dynamic convolution to inflate'):
        load_static(ResNet(18), static)
    static = ResNet(18).state_dict()
    del static['bn1.weight']
    load_static(ODResNet(18), static)
    with pytest.raises(InputError, match=r'lack 1 tensors of ODResNet: bn1\.weight; give'):
        load_static(ODResNet(18), static, strict=True)
    static['bn1.weight'] = torch.ones(32)
    with pytest.raises(InputError, match=r'^bn1\.weight .* \(32,\), where \(64,\) was expected'):
        load_static(ODResNet(18), static)
    with pytest.raises(InputError, match='one static kernel'):
        ODResNet(18).load_state_dict(ResNet(18).state_dict())


@pytest.mark.parametrize('conv_cfg', LAYERS[:1] + LAYERS[3:5] + LAYERS[6:], ids=str)
def test_a_detector_finds_the_same_boxes(conv_cfg):
    config = Config.fromfile(ROOT / 'configs/quickstart/faster-rcnn_od-r18-k4_fpn_digits.py')
    config.model.backbone = dict(type='ResNet', depth=18, base_channels=16, stem_channels=16)
    config.model.neck.in_channels = [16, 32, 64, 128]
    static = trained(MODELS.build(config.model))
    dynamic = to_dynamic(copy.deepcopy(static), conv_cfg)
    for model in (static, dynamic):
        model.eval()
    data = demo_mm_inputs(2, [(3, 96, 96)] * 2)
    found = []
    for model in (static, dynamic):
        with torch.no_grad():
            found += model.test_step(copy.deepcopy(data))
    for theirs, ours in zip(found[:2], found[2:]):
        theirs, ours = theirs.pred_instances, ours.pred_instances
        assert len(theirs) > 10
        assert torch.equal(ours.labels, theirs.labels)
        torch.testing.assert_close(ours.bboxes, theirs.bboxes, rtol=0, atol=1e-3)
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-5)
    images = model.data_preprocessor(data, False)['inputs'].double()
    if conv_cfg['type'] == 'FDConv2d':  # whose spectrum is rounded to the dtype of the conversion
        dynamic = to_dynamic(copy.deepcopy(static).double(), conv_cfg)
    features = [m.double().extract_feat(images) for m in (dynamic, static)]
    torch.testing.assert_close(*features, **EXACT)


@pytest.mark.parametrize(('conv_cfg', 'said'), [
    (dict(type='ODConv2d'), True), (dict(type='ODConv2d', gate_scale=2), False),
    (dict(type='FDConv2d'), False)])
def test_banks_that_would_learn_slowly_are_told_of(monkeypatch, conv_cfg, said):
    static = nn.Sequential(nn.Conv2d(4, 8, 3))
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    replace_convs(model, '0', conv_cfg)
    messages = []
    monkeypatch.setattr('mmdet_odconv.checkpoints.inflation.print_log',
                        lambda message, **_: messages.append(message))
    load_static(model, static.state_dict())
    assert ('conv_cfg=dict(gate_scale=2)' in messages[0]) == said
