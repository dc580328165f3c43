"""The converters of checkpoints and configs, as commands, on files that a user could give."""
import hashlib
import os
import random
import re
import runpy
import sys
from pathlib import Path

import digits
import pytest
import torch
from mmdet.models.backbones import ResNet
from mmengine.config import Config
from mmengine.runner import load_checkpoint

from mmdet_odconv import InputError, ODResNet, checkpoints
from mmdet_odconv.checkpoints import read_weights, save_checkpoint
from mmdet_odconv.checkpoints.files import halved, writing
from mmdet_odconv.checkpoints.swapping import build_model
from mmdet_odconv.layers import DynamicConv2d

CONFIGS = digits.ROOT / 'configs'
STATIC = f"""
_base_ = {str(CONFIGS / 'quickstart/faster-rcnn_od-r18-k4_fpn_digits.py')!r}
model = dict(
    backbone=dict(_delete_=True, type='ResNet', depth=18, base_channels=8, stem_channels=8,
                  init_cfg=dict(type='Pretrained', checkpoint='static.pth', prefix='backbone.')),
    neck=dict(in_channels=[8, 16, 32, 64]))
"""


@pytest.fixture
def convert(root, monkeypatch, capsys):
    """Run a converter in ``root`` as its command does; returns the exit code and the output."""

    def run(tool, *args):
        monkeypatch.chdir(root)
        script = str(digits.ROOT / 'tools/model_converters' / f'{tool}.py')
        monkeypatch.setattr(sys, 'argv', [script, *map(str, args)])
        code = None
        try:
            runpy.run_path(script, run_name='__main__')
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().out

    return run


@pytest.fixture
def refused(root, convert):
    """The one sentence of a refusal, which leaves nothing behind."""

    def run(tool, *args):
        before = sorted(os.listdir(root))
        sentence, _ = convert(tool, *args)
        assert sorted(os.listdir(root)) == before
        assert sentence.startswith('error: ') and len(sentence.splitlines()) == 1
        return sentence

    return run


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """A folder with a static detector's config and checkpoint, and files that are none."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp('converters')
    (root / 'static.py').write_text(STATIC)
    model = build_model(Config.fromfile(root / 'static.py'))
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if 'var' in name else tensor.normal_(std=0.1)
    torch.save({'state_dict': model.state_dict(), 'optimizer': {'lr': 1.0},
                'meta': {'dataset_meta': {'classes': ('a', 'b')}, 'cfg': 'old', 'epoch': 3}},
               root / 'static.pth')
    od = ODResNet(18, base_channels=8, stem_channels=8, kernel_num=2)
    torch.save({'state_dict': {**{f'module.{k}': v for k, v in od.state_dict().items()},
                               'module.fc.weight': torch.ones(1), 'module.fc.bias': torch.ones(1)},
                'epoch': 100, 'acc': 0.0, 'best_acc': 0.0, 'optimizer': {'lr': 1.0}},
               root / 'od.pth.tar')
    whole = (root / 'static.pth').read_bytes()
    (root / 'truncated.pth').write_bytes(whole[:len(whole) // 2])
    (root / 'page.pth').write_text('<!doctype html><html><body>Sign in</body></html>')
    torch.save([1, 2], root / 'list.pth')
    torch.save({'a': 1}, root / 'nothing.pth')
    torch.save({'state_dict': {'bn1.weight': torch.full((8,), float('nan'))}}, root / 'nan.pth')
    torch.save(ResNet(18).state_dict(), root / 'other.pth')
    return root


def test_published_to_mmdet(root, convert, tmp_path):
    _, said = convert('published_to_mmdet', 'od.pth.tar', tmp_path / 'od.pth')
    out, = tmp_path.iterdir()
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert out.name == f'od-{digest[:8]}.pth'
    os.umask(umask := os.umask(0))
    assert out.stat().st_mode & 0o777 == 0o666 & ~umask  # as any file that is created
    assert said.endswith(f'{out} holds 344 of 346 tensors; left out: fc.weight, fc.bias.\n')
    checkpoint = torch.load(out, weights_only=True)
    assert sorted(checkpoint) == ['meta', 'state_dict']
    assert checkpoint['meta']['provenance']['source'] == 'od.pth.tar'
    assert checkpoint['meta']['provenance']['source_sha256'] == hashlib.sha256(
        (root / 'od.pth.tar').read_bytes()).hexdigest()
    theirs = torch.load(root / 'od.pth.tar', weights_only=True)['state_dict']
    for name, tensor in checkpoint['state_dict'].items():
        assert torch.equal(tensor, theirs[f'module.{name}'])
    sentence, _ = convert('published_to_mmdet', 'od.pth.tar', tmp_path / 'od.pth')
    assert sentence.startswith(f'error: {out} exists already: give another name')
    convert('published_to_mmdet', 'od.pth.tar', tmp_path / 'od.pth', '--force')
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(('backbone', 'layer', 'bank'), [
    ('ODResNet', 'ODConv2d', ('--kernel-num', 2)), ('ODResNet', 'FDConv2d', ('--kernel-num', 2)),
    ('KWResNet', 'KWConv2d', ())])
def test_swap_a_backbone_and_its_checkpoint(root, convert, tmp_path, backbone, layer, bank):
    out = tmp_path / 'dynamic.py'
    convert('swap_backbone', 'static.py', '--out', out, '--checkpoint', 'static.pth',
            '--layer', layer, *bank)
    config = Config.fromfile(out)
    assert config.model.backbone.type == backbone and config.model.backbone.init_cfg is None
    assert config.load_from == str(tmp_path / 'dynamic.pth')
    checkpoint = torch.load(config.load_from, weights_only=True)
    assert sorted(checkpoint) == ['meta', 'state_dict']
    assert sorted(checkpoint['meta']) == ['cfg', 'dataset_meta', 'provenance']
    assert backbone in checkpoint['meta']['cfg']
    models = [build_model(Config.fromfile(path)).eval() for path in (root / 'static.py', out)]
    load_checkpoint(models[0], str(root / 'static.pth'), strict=True)
    load_checkpoint(models[1], config.load_from, strict=True)
    x = torch.randn(2, 3, 64, 64).double()
    static, dynamic = (model.double().extract_feat(x) for model in models)
    # The file is in float32, in which halves of a bank are exact; a spectrum is not, nor are cells
    # that an attention just below 1 is to give back.
    tolerance = 1e-10 if layer == 'ODConv2d' else 1e-6
    torch.testing.assert_close(dynamic, static, rtol=100 * tolerance, atol=tolerance)
    # The same by the other tool, from the dynamic config.
    convert('static_to_dynamic', out, 'static.pth', tmp_path / 'again.pth')
    again = torch.load(tmp_path / 'again.pth', weights_only=True)['state_dict']
    assert all(torch.equal(again[name], t) for name, t in checkpoint['state_dict'].items())


def test_a_swap_is_named_after_its_layer(convert, tmp_path, monkeypatch):
    for layer, name in (('FDConv2d', 'fdconv-k64'), ('DCDConv2d', 'dcdconv'),
                        ('KWConv2d', 'kwconv')):
        _, said = convert('swap_backbone', 'static.py', '--layer', layer, '--force')
        assert said.startswith(f'static_{name}.py is static.py with a dynamic backbone')


@pytest.mark.parametrize(('arguments', 'message'), [
    (('--layer', 'Conv2d'), 'Conv2d is no dynamic layer: give one of CondConv2d, DCDConv2d, '),
    (('--layer', 'DCDConv2d', '--kernel-num', 2), 'DCDConv2d has no kernel_num, got 2: leave it'),
    (('--layer', 'KWConv2d', '--kernel-num', 2), 'KWConv2d has no kernel_num, got 2: leave it'),
])
def test_layers_that_there_are_not(refused, arguments, message):
    assert message in refused('swap_backbone', 'static.py', *arguments)


def test_backbones_without_a_warehouse(refused):
    assert 'ResNeXt has no KernelWarehouse kind, which ResNet and MobileNetV2 have: ' in refused(
        'swap_backbone', 'mmdet::faster-rcnn_x101-32x4d_fpn_1x_coco', '--layer', 'KWConv2d')


def test_swap_without_a_checkpoint_converts_pretrained_weights(root, convert, tmp_path):
    convert('swap_backbone', 'static.py', '--out', tmp_path / 'dynamic.py')
    assert sorted(os.listdir(tmp_path)) == ['dynamic.py']
    config = Config.fromfile(tmp_path / 'dynamic.py')
    init_cfg = config.model.backbone.init_cfg
    assert init_cfg == dict(type='StaticPretrained', checkpoint='static.pth', prefix='backbone.')
    init_cfg.checkpoint = str(root / 'static.pth')
    model = build_model(config)
    model.init_weights()
    theirs = torch.load(root / 'static.pth', weights_only=True)['state_dict']
    assert torch.equal(model.backbone.bn1.bias, theirs['backbone.bn1.bias'])
    bank = model.backbone.layer1[0].conv1.weight.double()  # of gates that begin at 1
    assert torch.equal(bank.mean(0), theirs['backbone.layer1.0.conv1.weight'].double())


def test_swap_repeats_nothing_that_the_config_has(convert, tmp_path):
    convert('swap_backbone', CONFIGS / 'quickstart/faster-rcnn_r18_fpn_digits.py',
            '--out', tmp_path / 'dynamic.py')
    config = Config.fromfile(tmp_path / 'dynamic.py')
    assert config.custom_imports.imports == ['mmdet_odconv']
    assert [hook.type for hook in config.custom_hooks] == ['InputCheckHook']


FEW = CONFIGS / 'quickstart/faster-rcnn_mobilenet-v2-x0.5_fpn_digits.py'  # four; norms train


@pytest.mark.parametrize(('config', 'layer', 'norm'), [
    (FEW, 'ODConv2d', dict(type='LN')), (FEW, 'FDConv2d', dict(type='LN')),
    (FEW, 'KWConv2d', dict(type='LN')), (FEW, 'DyConv2d', None),  # which has no norm
    ('mmdet::yolox_tiny_8xb8-300e_coco', 'ODConv2d', None),
    ('mmdet::faster-rcnn_r50_fpn_1x_coco', 'ODConv2d', None)])  # of two, by running averages
def test_an_attention_that_trains_on_few_images_has_no_batchnorm(convert, tmp_path, config, layer,
                                                                 norm):
    convert('swap_backbone', config, '--out', tmp_path / 'out.py', '--layer', layer)
    backbone = Config.fromfile(tmp_path / 'out.py').model.backbone
    assert (backbone.get('conv_cfg') or {}).get('norm_cfg') == norm


def test_swap_a_config_of_mmdet(convert, tmp_path):
    out = tmp_path / 'yolox.py'
    convert('swap_backbone', 'mmdet::yolox_tiny_8xb8-300e_coco', '--out', out,
            '--kernel-num', 1)
    assert out.read_text().startswith("_base_ = 'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py'")
    config = Config.fromfile(out)
    assert [hook.type for hook in config.custom_hooks][-2:] == ['EMAHook', 'InputCheckHook']
    assert any(isinstance(m, DynamicConv2d) for m in build_model(config).backbone.modules())


@pytest.mark.parametrize(('config', 'message'), [
    ('mmdet::mask-rcnn_swin-t-p4-w7_fpn_1x_coco', 'SwinTransformer takes no conv_cfg.'),
    ('mmdet::no-such', 'mmdet has 0 configs named no-such: '),
    ('no-such.py', 'Config no-such.py does not exist: '),
    (CONFIGS / 'odconv/faster-rcnn_od-r50-k1_fpn_1x_coco.py', 'ODResNet is dynamic already.'),
    # Its own padding would be lost with it.
    ('mmdet::retinanet_effb3_fpn_8xb4-crop896-1x_coco',
     'EfficientNet has conv_cfg=Conv2dAdaptivePadding already.'),
    ('mmdet::mask-rcnn_regnetx-3.2GF-mdconv-c3-c5_fpn_1x_coco',
     'RegNet has dcn, and takes no conv_cfg with it.'),
    ('mmdet::d2_retinanet_r50-caffe_fpn_ms-90k_coco', "The config's backbone has no type: "),
    ('mmdet::detectors_cascade-rcnn_r50_1x_coco', 'DetectoRS_ResNet has conv_cfg=ConvAWS already.'),
])
def test_configs_that_cannot_be_swapped(refused, config, message):
    assert message in refused('swap_backbone', config, '--out', 'dynamic.py')


@pytest.mark.parametrize(('static', 'message'), [
    ('none.pth', 'Checkpoint none.pth does not exist'),
    ('truncated.pth', 'Checkpoint truncated.pth is cut short or damaged ('),
    ('page.pth', 'page.pth is not a checkpoint that torch can read: '),
    ('list.pth', 'Checkpoint list.pth holds a list, where a dict of weights was expected: '),
    ('nothing.pth', 'Checkpoint nothing.pth holds no state_dict of tensors, but a: '),
    ('nan.pth', 'nan.pth: bn1.weight of the checkpoint has 8 NaN or infinite values, of 8: '),
    ('other.pth', '16 of the 16 dynamic layers of FasterRCNN have no static counterpart: '
     'backbone.layer1.0.conv1, backbone.layer1.0.conv2, backbone.layer1.1.conv1 and 13 more; give'),
])
def test_checkpoints_that_cannot_be_converted(refused, static, message):
    assert message in refused('swap_backbone', 'static.py', '--checkpoint', static,
                              '--out', 'dynamic.py')


def test_what_is_read_is_never_written_over(root, refused):
    before = {path: path.read_bytes() for path in (root / 'static.py', root / 'static.pth')}
    for args in (('--out', 'static.py'), ('--checkpoint', 'static.pth', '--out', './static.py')):
        assert 'is what is to be swapped: give another name to --out' in refused(
            'swap_backbone', 'static.py', *args, '--force')
    (root / 'other.py').write_text((root / 'static.py').read_text())
    assert 'static.pth is what is to be swapped' in refused(
        'swap_backbone', 'other.py', '--checkpoint', 'static.pth', '--out', 'static.py', '--force')
    assert 'where the name of a config, such as od.py, was expected' in refused(
        'swap_backbone', 'static.py', '--out', 'od.pth')
    assert all(path.read_bytes() == content for path, content in before.items())


def test_weights_of_whole_static_detectors(root, refused, convert, tmp_path):
    """Those that a config starts from, by load_from or by init_cfg."""
    text = (root / 'static.py').read_text()
    (root / 'started.py').write_text(f"{text}\nload_from = 'static.pth'")
    assert 'starts from a whole static detector, static.pth: give it as --checkpoint' in refused(
        'swap_backbone', 'started.py', '--out', tmp_path / 'd.py')
    init_cfg = "model.update(init_cfg=dict(type='Pretrained', checkpoint='static.pth'))"
    (root / 'whole.py').write_text(f'{text}\n{init_cfg}')
    code, _ = convert('swap_backbone', 'whole.py', '--out', tmp_path / 'e.py')
    assert code is None
    model = build_model(Config.fromfile(tmp_path / 'e.py'))
    model.init_weights()
    static = torch.load(root / 'static.pth')['state_dict']
    name = 'roi_head.bbox_head.fc_cls.weight'
    assert torch.equal(model.state_dict()[name], static[name])
    bank = model.backbone.layer1[0].conv1.weight
    assert bank.dim() == 5
    torch.testing.assert_close(bank.mean(0) / bank.mean(0).norm(),
                               static['backbone.layer1.0.conv1.weight'] /
                               static['backbone.layer1.0.conv1.weight'].norm())


def test_publish_model(root, convert, tmp_path):
    config = Config.fromfile(root / 'static.py')
    _, said = convert('publish_model', 'static.pth', tmp_path / 'small.pth')
    out, = tmp_path.iterdir()
    checkpoint = torch.load(out, weights_only=True)
    assert sorted(checkpoint) == ['meta', 'state_dict'] and f'{out}: ' in said
    assert checkpoint['meta']['dataset_meta'] == {'classes': ('a', 'b')}
    theirs = torch.load(root / 'static.pth', weights_only=True)['state_dict']
    assert out.stat().st_size < 0.6 * sum(t.numel() * t.element_size() for t in theirs.values())
    model = build_model(config)
    load_checkpoint(model, str(out), strict=True)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=5e-4, atol=1e-7)


def test_publish_model_from_an_address(convert, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints, 'read_weights', lambda source: ({'w': torch.ones(9)}, {}))
    code, said = convert('publish_model', 'https://example.org/a.pth', tmp_path / 'small.pth')
    out, = tmp_path.iterdir()
    assert code is None and re.fullmatch(rf'{re.escape(str(out))}: 0\.\d MB\n', said)


def test_halves_hold_what_they_can():
    state = dict(weight=torch.tensor([1e-9, 1.0]), large=torch.tensor([1e6]),
                 running_var=torch.tensor([1e-9, 1.0]), steps=torch.tensor(70000))
    half = halved(state)
    assert half['weight'].dtype == torch.float16
    assert all(half[name] is state[name] for name in ('large', 'running_var', 'steps'))


def test_a_file_of_no_release(refused):
    assert 'where a ResNet or MobileNetV2 with ODConv was expected' in refused(
        'published_to_mmdet', 'other.pth', 'od.pth')


def test_a_classifier_of_another_family(root):
    torch.save({'features.0.0.weight': torch.ones(8, 3, 3, 3),
                'features.1.conv.0.0.weight': torch.ones(8, 1, 3, 3)}, root / 'mobilenet.pth')
    config = Config.fromfile(root / 'static.py')
    config.model.backbone = dict(type='ODResNet', depth=18, init_cfg=dict(
        type='StaticPretrained', checkpoint=str(root / 'mobilenet.pth')))
    with pytest.raises(ValueError, match='has family ResNet, but the checkpoint family MobileN'):
        build_model(config).backbone.init_weights()


def test_outputs_that_cannot_be_written(refused, tmp_path):
    for name in ('dynamic.py', 'dynamic.pth'):
        (tmp_path / name).write_text('mine')
        swap = ('swap_backbone', 'static.py', '--checkpoint', 'static.pth', '--out',
                tmp_path / 'dynamic.py')
        assert f'{tmp_path / name} exists already: give another name, or --force' in refused(
            *swap)
        assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == 'mine'
        (tmp_path / name).unlink()
    assert 'could not be written (No such file or directory): choose a directory that' in refused(
        'published_to_mmdet', 'od.pth.tar', Path('no/od.pth'))
    if os.geteuid():
        tmp_path.chmod(0o500)
        assert 'could not be written (Permission denied): choose' in refused(
            'published_to_mmdet', 'od.pth.tar', tmp_path / 'od.pth')


@pytest.mark.parametrize('start', [0, 64, 2000])
@pytest.mark.parametrize('zipped', [True, False])
def test_damaged_files_are_one_sentence(tmp_path, zipped, start):
    """Cut at any place, or with bytes changed."""
    torch.save(ResNet(18, base_channels=8).state_dict(), tmp_path / 'whole.pth',
               _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / 'whole.pth').read_bytes()
    rng = random.Random(start)
    for i in range(40):
        if i % 2:
            bad = whole[:start + rng.randrange(1 + len(whole) // 2)]
        else:
            bad = bytearray(whole)
            for _ in range(20):
                bad[rng.randrange(start, start + 4000)] = rng.randrange(256)
        (tmp_path / 'bad.pth').write_bytes(bad)
        try:
            read_weights(tmp_path / 'bad.pth')
        except InputError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert not i % 2  # bytes of a weight may be any, but what is cut is not whole


@pytest.mark.parametrize('text', ['Moved Permanently', 'error', 'https://x', 'Rate limit exceeded'])
def test_text_saved_as_a_checkpoint(tmp_path, text):
    (tmp_path / 'page.pth').write_text(text)
    with pytest.raises(InputError, match='page.pth is not a checkpoint that torch can read'):
        read_weights(tmp_path / 'page.pth')


def test_an_address_that_does_not_answer():
    with pytest.raises(InputError, match='x.pth could not be read .*: check the path, or the addr'):
        read_weights('http://127.0.0.1:1/x.pth')


def test_a_file_that_is_read_meanwhile_is_not_the_one_that_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match='absent'), writing(tmp_path / 'out.py'):
        (tmp_path / 'absent').read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(ValueError, match=r'od.pth could not be written \(No space left on device'):
        save_checkpoint({}, tmp_path / 'od.pth')
    assert list(tmp_path.iterdir()) == []
