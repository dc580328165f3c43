"""Norms folded into dynamic and static convolutions: exactly, or not at all."""
import copy
import runpy
import sys

import digits
import pytest
import torch
from mmcv.cnn import ConvModule, fuse_conv_bn
from mmdet.models import RTMDetSepBNHead
from mmengine.registry import DefaultScope
from mmengine.runner import Runner, TestLoop
from reference import randomised
from torch import nn

from mmdet_odconv import (
    CondConv2d,
    DCDConv2d,
    DyConv2d,
    FDConv2d,
    KWMobileNetV2,
    ODConv2d,
    ODMobileNetV2,
    ODResNet,
    fuse,
)
from mmdet_odconv.layers.odconv import ODAttention

LAYERS = (ODConv2d, DyConv2d, CondConv2d, DCDConv2d, FDConv2d)


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize('cls', LAYERS)
@pytest.mark.parametrize('arguments', [
    dict(kernel_size=3, stride=2, padding=1), dict(kernel_size=1, groups=2, bias=False),
    dict(kernel_size=3, groups=8)])
def test_every_layer(cls, arguments):
    model = randomised(nn.Sequential(cls(8, 8, **arguments), nn.BatchNorm2d(8))).double().eval()
    x = torch.randn(3, 8, 7, 9, dtype=torch.float64)
    expected = model(x)
    assert fuse(model) is model and not norms(model)
    if isinstance(model[0].attention, ODAttention):
        assert len(model[0].attention.heads()) == 1
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fuse(model)(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('backbone', [
    lambda: ODResNet(18, base_channels=8, stem_channels=8, kernel_num=2),
    lambda: ODResNet(18, base_channels=8, stem_channels=8, conv_cfg=dict(type='CondConv2d')),
    lambda: ODMobileNetV2(widen_factor=0.25, kernel_num=2),
    # Of a spectrum and of cells, which are other layers' too, no filter can be scaled. Some of
    # their attentions are of matrices of 16 channels and as many hidden ones.
    lambda: ODResNet(18, base_channels=8, stem_channels=8, dynamic_convs='layer.*conv2',
                     conv_cfg=dict(type='FDConv2d', kernel_num=4)),
    lambda: KWMobileNetV2(widen_factor=0.5)])
def test_backbones_with_mmcv_before_or_after(backbone):
    model = randomised(backbone()).double()
    model.eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = model(x)
    before = fuse(fuse_conv_bn(copy.deepcopy(model)))
    after = fuse_conv_bn(fuse(model))
    for fused in (before, after):
        assert not norms(fused)
        for found, wanted in zip(fused(x), expected):
            largest = wanted.abs().max().item()
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9 * largest)


def test_a_norm_goes_into_its_own_convolution():
    """mmcv, which knows no dynamic convolution, folds this norm into the static one."""
    model = randomised(nn.Sequential(
        nn.Conv2d(4, 8, 1), ODConv2d(8, 8, 3), nn.BatchNorm2d(8))).double().eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    expected = model(x)
    with pytest.raises(ValueError, match="mmcv's fuse_conv_bn put the norm of 1 into 0, which"):
        fuse(fuse_conv_bn(copy.deepcopy(model)))
    static = model[0].weight.clone()
    model = fuse_conv_bn(fuse(model))
    assert torch.equal(model[0].weight, static)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def hooked(layer):
    layer.register_forward_hook(lambda module, inputs, output: output.neg())
    return layer


BEYOND = {
    'an activation between': lambda: [nn.Conv2d(4, 8, 1), ODConv2d(8, 8, 3), nn.ReLU(),
                                      nn.BatchNorm2d(8)],
    'a container of its own': lambda: [nn.Conv2d(4, 8, 1), nn.Sequential(ODConv2d(8, 8, 3)),
                                       nn.BatchNorm2d(8)],
    'a norm before': lambda: [nn.Conv2d(4, 8, 1), nn.GroupNorm(2, 8), ODConv2d(8, 8, 3),
                              nn.BatchNorm2d(8)],
    'a hook': lambda: [nn.Conv2d(4, 8, 1), hooked(ODConv2d(8, 8, 3)), nn.BatchNorm2d(8)],
}


@pytest.mark.parametrize('name', BEYOND)
def test_mmcv_reaches_no_norm_beyond_a_dynamic_convolution(name):
    """It knows none, and would fold the norm into the static one before: after fuse it cannot,
    and where it came before, fuse says so."""
    model = randomised(nn.Sequential(*BEYOND[name]())).eval()
    x = torch.randn(2, 4, 6, 6)
    expected = model(x)
    spoilt = fuse_conv_bn(copy.deepcopy(model))
    assert (spoilt(x) - expected).abs().max() > 0.1 * expected.abs().max()
    with pytest.raises(ValueError, match="mmcv's fuse_conv_bn put the norm of [12] into 0, which"):
        fuse(spoilt)
    for found in (fuse(model), fuse_conv_bn(model), fuse(model)):
        torch.testing.assert_close(found(x), expected, rtol=1e-4, atol=1e-4)


def test_an_identity_that_never_was_a_norm():
    for between in (nn.GroupNorm(2, 8), nn.ReLU()):
        model = randomised(nn.Sequential(
            nn.Conv2d(4, 8, 1, bias=False), between, ODConv2d(8, 8, 3), nn.Identity())).eval()
        x = torch.randn(2, 4, 6, 6)
        expected = model(x)
        torch.testing.assert_close(fuse(model)(x), expected, rtol=1e-4, atol=1e-5)


def test_training_mode_is_refused_and_changes_nothing():
    model = nn.Sequential(ODConv2d(4, 8, 3), nn.BatchNorm2d(8)).eval()
    state = copy.deepcopy(model.state_dict())
    model[1].train()
    with pytest.raises(ValueError, match=r'^1 is in training mode, .*: call model.eval\(\) first'):
        fuse(model)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_what_is_used_twice_or_in_another_order_stays():
    conv = ODConv2d(4, 4, 1)
    shared = nn.Sequential(nn.Sequential(conv, nn.BatchNorm2d(4)),
                           nn.Sequential(conv, nn.BatchNorm2d(4)))
    other = ConvModule(4, 4, 1, conv_cfg=dict(type='ODConv2d'), norm_cfg=dict(type='BN'),
                       order=('norm', 'conv', 'act'))
    for model in (shared, other, nn.Sequential(hooked(ODConv2d(4, 4, 1)), nn.BatchNorm2d(4))):
        model = randomised(model).eval()
        x = torch.randn(2, 4, 5, 5)
        expected, outer = model(x), len(norms(model))
        fuse(model)
        assert len(norms(model)) == outer - 1  # the attention's own
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_head_that_shares_convolutions_between_levels():
    with DefaultScope.overwrite_default_scope('mmdet'):
        head = randomised(RTMDetSepBNHead(2, 8, feat_channels=8, anchor_generator=dict(
            type='MlvlPointGenerator', offset=0, strides=[8, 16]), norm_cfg=dict(type='BN'))).eval()
    feats = [torch.randn(1, 8, 6, 6), torch.randn(1, 8, 3, 3)]
    expected = head(feats)
    for found, wanted in zip(sum(fuse(head)(feats), ()), sum(expected, ())):
        torch.testing.assert_close(found, wanted)


def test_the_test_command_fuses_a_copy(tmp_path, monkeypatch):
    """Of a user's config that inherits from one of the plugin's."""
    digits.make(tmp_path)
    (tmp_path / 'mine.py').write_text(f"_base_ = 'mmdet_odconv::quickstart/{digits.CONFIG}'\n"
                                      'resume = True\n')  # as a run's own copy of its config has
    seen = []

    def evaluate(loop):
        assert not loop.runner._resume
        loop.runner.call_hook('before_test_epoch')
        seen.append(len(norms(loop.runner.model)))
        loop.runner.call_hook('after_test_epoch', metrics={})
        seen.append(len(norms(loop.runner.model)))
        return {}

    monkeypatch.setattr(TestLoop, 'run', evaluate)
    monkeypatch.setattr(Runner, 'load_or_resume', lambda runner: None)
    monkeypatch.setattr(sys, 'argv', ['test.py', 'mine.py', 'model.pth', '--fuse', '--work-dir',
                                      'run', '--cfg-options', *digits.TINY])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(digits.ROOT / 'tools/test.py'), run_name='__main__')
    fused, unfused = seen
    assert fused == 0 and unfused > 20
