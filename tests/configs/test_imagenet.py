"""Classifiers for MMPretrain: their sizes and schedules, and the way from one to a detector."""
import argparse
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from digits import ROOT, tool
from mmengine.config import Config, DictAction
from mmengine.registry import DefaultScope
from mmengine.runner.checkpoint import CheckpointLoader

if find_spec('mmpretrain') is None:
    pytest.skip('mmpretrain is not installed', allow_module_level=True)

import mmdet_odconv.pretraining  # noqa: F401  before mmpretrain, which imports torchvision
from mmdet_odconv import InputError, ODResNet
from mmdet_odconv.checkpoints.swapping import swap_backbone
from mmdet_odconv.layers import DynamicConv2d

# isort: split
from mmpretrain.registry import MODELS

CONFIGS = ROOT / 'configs'
NAMES = sorted(path.stem for path in CONFIGS.glob('imagenet/*.py'))


@pytest.fixture(autouse=True)
def scope():
    DefaultScope.get_instance('test_imagenet', scope_name='mmpretrain')


def load(name):
    return Config.fromfile(CONFIGS / f'imagenet/{name}.py')


def build(config):
    # MMPretrain's ResNet reads values as it is built, which meta tensors have not.
    with torch.device('cpu' if config.model.backbone.type == 'ResNet' else 'meta'):
        return MODELS.build(config.model)


def published(data):
    """Config names -> rows of the release."""
    rows = {}
    for row in yaml.safe_load((data / 'published.yml').read_text())['odconv_imagenet']:
        kind, _, width = row['model'].partition(' ')
        if kind == 'MobileNetV2':
            backbone, schedule = 'mobilenet-v2', '150e'
            if width != '1.0x':
                backbone += f'-x{width[:-1]}'
        else:
            backbone, schedule = kind.replace('ResNet', 'r'), '100e'
        if row['kernel_num']:
            backbone = f'od-{backbone}-k{row["kernel_num"]}'
        rows[f'{backbone}_8xb32-{schedule}_in1k'] = row
    return rows


def test_every_published_classifier_has_a_config(data):
    dyconv = {'dy-r18-k4_8xb32-100e_in1k', 'dy-mobilenet-v2-k4_8xb32-150e_in1k'}
    assert set(NAMES) == set(published(data)) | dyconv


@pytest.mark.parametrize('name', NAMES)
def test_parameters_equal_the_published(data, name):
    model = build(load(name))
    count = sum(p.numel() for p in model.parameters()) / 1e6
    is_dynamic = any(isinstance(module, DynamicConv2d) for module in model.modules())
    assert is_dynamic == name.startswith(('od-', 'dy-'))
    if name.startswith('dy-'):  # as stated by the DyConv paper, within its rounding
        assert count == pytest.approx({'dy-r18': 42.7, 'dy-mob': 11.1}[name[:6]], rel=0.01)
    else:
        assert round(count, 2) == published(data)[name]['params']


def test_the_metafile_states_what_is_published(data):
    models = yaml.safe_load((CONFIGS / 'imagenet/metafile.yml').read_text())['Models']
    rows = published(data)
    for model in models:
        row, metadata = rows.get(model['Name']), model['Metadata']
        assert metadata['Epochs'] == load(model['Name']).train_cfg.max_epochs
        if row is None:
            assert 'Results' not in model
            continue
        assert metadata['Parameters'] == pytest.approx(row['params'] * 1e6)
        metrics = model['Results'][0]['Metrics']
        assert metrics == {'Top 1 Accuracy': row['top1'], 'Top 5 Accuracy': row['top5']}


@pytest.mark.parametrize('name', NAMES)
def test_recipe_is_the_published_one(name):
    config = load(name)
    is_static, is_mobile = name.startswith(('r', 'mob')), 'mobilenet' in name
    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.momentum) == ('SGD', 0.9)
    assert (optimizer.lr, optimizer.weight_decay) == ((0.05, 4e-5) if is_mobile else (0.1, 1e-4))
    assert config.train_cfg.max_epochs == (150 if is_mobile else 100)
    assert config.train_dataloader.batch_size * 8 == config.auto_scale_lr.base_batch_size == 256
    if is_mobile:
        scheduler, = config.param_scheduler
        assert scheduler == dict(type='CosineAnnealingLR', end=150, T_max=150,
                                 convert_to_iter_based=True)
    else:
        assert config.param_scheduler.milestones == [30, 60, 90]
    annealing = [hook for hook in config.custom_hooks if hook.type == 'TemperatureAnnealingHook']
    assert annealing == ([] if is_static else [
        dict(type='TemperatureAnnealingHook', begin=30, end_epoch=10)])
    model = build(config)
    assert all(layer.init == 'he' for layer in model.modules() if isinstance(layer, DynamicConv2d))
    backbone, head = config.model.backbone, config.model.head
    assert backbone.get('frozen_stages', -1) == -1 and not backbone.get('norm_eval', False)
    assert head.get('dropout') == (None if is_static and not is_mobile else 0.2)


RECIPES = re.findall(r'^\| (\S+-rcnn_\S+) \| (\S+) \| `(.+)` \|$',
                     (CONFIGS / 'imagenet/README.md').read_text(), re.M)


@pytest.mark.parametrize(('detector', 'name', 'options'), RECIPES)
def test_detectors_load_what_the_recipe_named_for_them_trains(detector, name, options):
    classifier = load(name)
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    options = shlex.split(options.replace('\\|', '|'))  # a table's bar has a backslash before it
    classifier.merge_from_dict(parser.parse_args(['--cfg-options', *options]).cfg_options)
    path, = CONFIGS.glob(f'*/{detector}.py')
    config = Config.fromfile(path).model.backbone
    assert config.pop('init_cfg').prefix == 'backbone.'
    backbones = [build(classifier).backbone]
    with torch.device('meta'):
        backbones.append(MODELS.build(config))
    trained, loaded = ({key: value.shape for key, value in backbone.state_dict().items()}
                       for backbone in backbones)
    assert trained == loaded


def test_every_detector_without_published_weights_has_such_a_recipe():
    said = {path.stem for path in CONFIGS.glob('*/faster-rcnn_*.py')
            if 'trained with MMPretrain' in ' '.join(path.read_text().split())}
    without = {'faster-rcnn_dy-mobilenet-v3-small-k4_fpn_1x_coco'}  # which its README says
    assert {detector for detector, *_ in RECIPES} == said - without


@pytest.mark.parametrize('name', ['od-r18-k1_8xb32-100e_in1k', 'dy-r18-k4_8xb32-100e_in1k',
                                  'od-mobilenet-v2-x0.5-k4_8xb32-150e_in1k',
                                  'mobilenet-v2-x0.5_8xb32-150e_in1k'])
def test_trains_with_no_parameter_left_out_and_predicts(name):
    from mmpretrain.structures import DataSample

    model = MODELS.build(load(name).model)
    images, samples = torch.randn(2, 3, 64, 64), [DataSample().set_gt_label(i) for i in (3, 999)]
    loss = model.train()(images, samples, mode='loss')['loss']
    loss.backward()
    assert loss.isfinite()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    predictions = model.eval()(images, samples, mode='predict')
    assert predictions[0].pred_score.shape == (1000,)


def test_dropout_is_before_the_classifier_and_in_training_alone():
    head = MODELS.build(dict(type='DropoutLinearClsHead', num_classes=5, in_channels=1000,
                             dropout=0.25))
    features = torch.ones(4, 1000)
    dropped = head.train().pre_logits((features,))
    assert sorted(set(dropped.flatten().tolist())) == pytest.approx([0, 4 / 3])
    assert (dropped == 0).double().mean().item() == pytest.approx(0.25, abs=0.05)
    assert head.eval().pre_logits((features,)) is features
    torch.testing.assert_close(head((features,)), head.fc(features))


@pytest.mark.slow
def test_from_digits_to_the_backbone_of_a_detector(tmp_path):
    tool(tmp_path, 'dataset_converters/digits.py', 'data/digits-classification',
         '--classification', '--train', '20', '--val', '8', '--size', '64')
    config = CONFIGS / 'quickstart/od-r18-k1_digits.py'
    narrow = dict(base_channels=8, stem_channels=8, kernel_num=2)
    result = subprocess.run(
        [sys.executable, '-m', 'mim', 'train', 'mmpretrain', str(config), '--work-dir', 'work',
         '--cfg-options', 'train_cfg.max_epochs=1', 'train_dataloader.batch_size=10',
         'model.head.in_channels=64', *(f'model.backbone.{k}={v}' for k, v in narrow.items())],
        cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert 'accuracy/top1' in result.stdout + result.stderr
    checkpoint = Path(tmp_path / 'work/epoch_1.pth')

    detector = Config.fromfile(
        CONFIGS / 'quickstart/faster-rcnn_od-r18-k1-pretrained_fpn_digits.py').model
    init_cfg = dict(detector.backbone.init_cfg, checkpoint=str(checkpoint))
    backbone = ODResNet(18, init_cfg=init_cfg, conv_cfg=detector.backbone.conv_cfg, **narrow)
    backbone.init_weights()
    saved = CheckpointLoader.load_checkpoint(str(checkpoint))['state_dict']
    for name, tensor in backbone.state_dict().items():
        torch.testing.assert_close(tensor, saved[f'backbone.{name}'], rtol=0, atol=0)


@pytest.mark.parametrize('kind', ['ResNet', 'ResNetV1d', 'ResNeXt'])
def test_a_backbone_of_mmpretrain_is_swapped_as_it_was(kind):
    """Some of its classes have the defaults of their base, whose arguments they do not name."""
    backbone = dict(type=kind, depth=50)
    config = Config(dict(default_scope='mmpretrain', model=dict(backbone=backbone)))
    swapped = swap_backbone(config)['backbone']
    assert swapped['norm_eval'] is False and swapped['out_indices'] == (3,)
    config.model.backbone.drop_path_rate = 0.1
    with pytest.raises(InputError, match=f'^{kind} has drop_path_rate, which OD{kind} of MMDet'):
        swap_backbone(config)
