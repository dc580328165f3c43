"""Poses for MMPose: their sizes and schedule, a training run, and static weights made dynamic."""
import contextlib
import subprocess
import sys

import pytest
import torch
import yaml
from digits import ROOT, tool
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmdet_odconv.checkpoints import read_weights
from mmdet_odconv.checkpoints.swapping import build_model, swap_backbone
from mmdet_odconv.layers import DynamicConv2d

pytest.importorskip('mmpose')

CONFIGS = ROOT / 'configs'
RECIPE = '8xb64-210e_coco-256x192'
NAMES = sorted(path.stem for path in CONFIGS.glob('keypoints/*.py'))
# Millions of parameters that the DyConv paper states of the classifiers, and of what follows
# their backbones.
PUBLISHED = {
    'dy-r18-k4': ('DY-ResNet-18', 512 * 1000 + 1000),
    'dy-mobilenet-v2-k4': ('DY-MobileNetV2 1.0x', 1280 * 1000 + 1000),
    'dy-mobilenet-v2-x0.5-k4': ('DY-MobileNetV2 0.5x', 1280 * 1000 + 1000),
    'dy-mobilenet-v3-small-k4': ('DY-MobileNetV3-Small', 576 * 1280 + 1280 + 1280 * 1000 + 1000),
}


@pytest.fixture(autouse=True)
def scope():
    DefaultScope.get_instance('test_keypoints', scope_name='mmpose')


def load(name):
    return Config.fromfile(CONFIGS / f'keypoints/{name}.py')


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def build(config):
    with torch.device('meta'):
        return build_model(config)


def tiny(folder, backbone):
    """A config of a few channels that inherits that of ``backbone``; its path."""
    path = folder / f'{backbone}.py'
    path.write_text(
        f'_base_ = {str(CONFIGS / f"keypoints/td-hm_{backbone}_{RECIPE}.py")!r}\n'
        'model = dict(backbone=dict(base_channels=8, stem_channels=8),\n'
        '             head=dict(in_channels=64, deconv_out_channels=(8, 8, 8)))\n')
    return path


@contextlib.contextmanager
def analysis_tools():
    """Let a tool be imported, as when it is run as a script."""
    sys.path.insert(0, str(ROOT / 'tools/analysis_tools'))
    try:
        yield
    finally:
        del sys.path[0]


def test_each_dynamic_pose_has_its_static_one():
    backbones = {name.split('_')[1] for name in NAMES}
    assert {name for name in backbones if name.startswith('dy-')} == set(PUBLISHED)
    assert {name[len('dy-'):-len('-k4')] for name in PUBLISHED} == backbones - set(PUBLISHED)
    assert all(name.endswith(RECIPE) for name in NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_parameters_and_recipe(data, name):
    config = load(name)
    model = build(config)
    metafile = yaml.safe_load((CONFIGS / 'keypoints/metafile.yml').read_text())
    stated, = [row for row in metafile['Models'] if row['Name'] == name]
    assert count(model) == pytest.approx(stated['Metadata']['Parameters'], abs=10_000)
    assert config.train_cfg.max_epochs == stated['Metadata']['Epochs'] == 210
    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr) == ('Adam', 1e-3)
    assert config.param_scheduler[-1].milestones == [170, 200]
    assert config.codec.input_size == (192, 256)
    assert not getattr(model.backbone, 'norm_eval', False)
    backbone = name.split('_')[1]
    is_dynamic = any(isinstance(module, DynamicConv2d) for module in model.modules())
    assert is_dynamic == (backbone in PUBLISHED)
    assert ('TemperatureAnnealingHook' in [hook.type for hook in config.custom_hooks]) == is_dynamic
    if is_dynamic:
        rows = yaml.safe_load((data / 'published.yml').read_text())['dyconv_imagenet']
        network, classifier = PUBLISHED[backbone]
        row, = [row for row in rows if row['model'] == network]
        assert (count(model.backbone) + classifier) / 1e6 == pytest.approx(row['params'], rel=0.03)


def test_the_head_has_the_published_parameters_and_madds():
    """SimpleBaseline with ResNet-50, 34.0M and 8.90 GFLOPs as HRNet's table states it (CVPR 2019).

    Its counter takes a transposed convolution by its output, four times what stride 2 multiplies,
    and 2^30 for a G.
    """
    with analysis_tools():
        from get_model_stats import detector_stats
    config = Config.fromfile(CONFIGS / '_base_/keypoints.py')
    stats = detector_stats(config, (256, 192))
    assert stats['params'] / 1e6 == pytest.approx(34.0, rel=0.01)
    final = 64 * 48 * 256 * 17
    deconvolutions = stats['parts']['head']['convolution'] - final
    assert (stats['madds'] + 3 * deconvolutions) / 2**30 == pytest.approx(8.90, rel=0.03)


def test_from_digits_to_corners(tmp_path):
    tool(tmp_path, 'dataset_converters/digits.py', 'data/digits-keypoints', '--keypoints',
         '--train', '4', '--val', '2', '--size', '96')
    config = CONFIGS / 'quickstart/td-hm_dy-r18-k4_digits.py'
    result = subprocess.run(
        [sys.executable, '-m', 'mim', 'train', 'mmpose', str(config), '--work-dir', 'work',
         '--cfg-options', 'train_cfg.max_epochs=1', 'train_dataloader.batch_size=8',
         'model.backbone.base_channels=8', 'model.backbone.stem_channels=8',
         'model.head.in_channels=64', 'default_hooks.logger.interval=1'],
        cwd=tmp_path, capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-5000:]
    assert 'loss_kpt' in output and 'coco/AP' in output
    assert (tmp_path / 'work/epoch_1.pth').is_file()


@pytest.fixture
def static(tmp_path):
    """A static pose with random statistics, its checkpoint written to static.pth."""
    model = build_model(Config.fromfile(tiny(tmp_path, 'r18')))
    for name, buffer in model.named_buffers():
        if 'running' in name:
            buffer.uniform_(0.5, 1.5)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'static.pth')
    return model.eval()


def test_static_weights_become_dynamic(tmp_path, static):
    path, images = tiny(tmp_path, 'dy-r18-k4'), torch.randn(2, 3, 64, 48)
    tool(tmp_path, 'model_converters/static_to_dynamic.py', path, 'static.pth', 'dynamic.pth')
    config = Config.fromfile(path)
    dynamic = build_model(config).eval()
    dynamic.load_state_dict(read_weights(tmp_path / 'dynamic.pth')[0])
    with torch.no_grad():
        expected = static(images, None, mode='tensor')
        torch.testing.assert_close(dynamic(images, None, mode='tensor'), expected,
                                   rtol=1e-4, atol=1e-5)
    config.model.backbone.init_cfg = dict(
        type='StaticPretrained', checkpoint=str(tmp_path / 'static.pth'))
    fresh = build_model(config).eval()
    fresh.backbone.init_weights()
    with torch.no_grad():
        torch.testing.assert_close(fresh.backbone(images)[-1],
                                   static.backbone(images)[-1], rtol=1e-4, atol=1e-5)


def test_a_static_pose_of_ones_own_is_swapped(tmp_path, static):
    images = torch.randn(2, 3, 64, 48)
    tool(tmp_path, 'model_converters/swap_backbone.py', 'r18.py', '--checkpoint', 'static.pth',
         '--kernel-num', '2', '--out', 'swapped.py')
    dynamic = build_model(Config.fromfile(tmp_path / 'swapped.py')).eval()
    dynamic.load_state_dict(read_weights(tmp_path / 'swapped.pth')[0])
    with torch.no_grad():
        torch.testing.assert_close(dynamic(images, None, mode='tensor'),
                                   static(images, None, mode='tensor'), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['r18', 'mobilenet-v2'])
def test_a_pose_of_mmpose_is_swapped_as_it_was(name):
    config = load(f'td-hm_{name}_{RECIPE}')
    static = build(config)
    for argument in ('out_indices', 'norm_eval'):
        config.model.backbone.pop(argument, None)
    changes = swap_backbone(config, kernel_num=2)
    config.merge_from_dict(dict(model=changes))
    dynamic = build(config)
    assert any(isinstance(module, DynamicConv2d) for module in dynamic.modules())
    assert dynamic.backbone.out_indices == static.backbone.out_indices
    assert dynamic.backbone.norm_eval == static.backbone.norm_eval
