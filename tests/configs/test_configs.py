"""Every supplied detector builds, trains a step and predicts, on small random images.

Classifiers: see test_imagenet.py. Poses: see test_keypoints.py.
"""
import copy
import re
from pathlib import Path

import pytest
import torch
import yaml
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import DefaultScope

from mmdet_odconv.layers import DynamicConv2d

CONFIGS = Path(__file__).parents[2] / 'configs'
NAMES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob('[a-z]*/*.py'))
DETECTORS = [name for name in NAMES
             if not re.match(r'imagenet/|keypoints/|.*/td-hm_|quickstart/od-r18-k1_digits', name)]
ADAMW = [name for name in NAMES if 'adamw' in name]
FAMILY = [name for name in NAMES if name not in ADAMW
          and name.startswith(('condconv/', 'dcd/', 'dyconv/', 'fdconv/', 'se/'))]
ODCONV = [name for name in NAMES if name.startswith('odconv/') and name not in ADAMW]


@pytest.fixture(autouse=True)
def scope():
    # What a Runner sets from the config's default_scope.
    DefaultScope.get_instance('test_configs', scope_name='mmdet')


def build(name):
    config = Config.fromfile(CONFIGS / name).model
    config.data_preprocessor.pop('batch_augments', None)  # YOLOX's asks a Runner for its iteration
    if 'norm_eval' in config.backbone:
        # Without ImageNet weights a deep stack explodes where norms do not measure it.
        config.backbone.norm_eval = False
    if 'rpn_head' in config and 'roi_head' in config:
        # Heads are mmdet's: fewer proposals than COCO's thousand are enough to train them.
        config.train_cfg.rpn_proposal.max_per_img = config.test_cfg.rpn.max_per_img = 32
        stages = config.train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = 32
    model = MODELS.build(config)
    if hasattr(model, 'level_embed'):
        torch.nn.init.normal_(model.level_embed)  # which is whatever the memory held
    return model


def test_every_config_name_is_unique():
    assert NAMES and len({Path(name).name for name in NAMES}) == len(NAMES)


def test_the_model_index_names_every_config_once():
    root = CONFIGS.parent
    index = yaml.safe_load((root / 'model-index.yml').read_text())
    metafiles = [yaml.safe_load((root / name).read_text()) for name in index['Import']]
    models = [model for metafile in metafiles for model in metafile['Models']]
    assert sorted(model['Config'] for model in models) == [f'configs/{name}' for name in NAMES]
    for model in models:
        assert model['Name'] == Path(model['Config']).stem
    collections = {c['Name'] for metafile in metafiles for c in metafile['Collections']}
    assert {model['In Collection'] for model in models} == collections


def test_metafile_results_are_the_published(data):
    metafile = yaml.safe_load((CONFIGS / 'odconv/metafile.yml').read_text())
    stated = {}
    for model in metafile['Models']:
        metrics = {k: v for r in model.get('Results', []) for k, v in r['Metrics'].items()}
        if metrics and 'adamw' not in model['Name']:
            detector, backbone = model['Name'].split('_')[:2]
            stated[detector, backbone] = metrics['box AP'], metrics.get('mask AP')
    published = {}
    for row in yaml.safe_load((data / 'published.yml').read_text())['odconv_coco']:
        key = config_name(row)
        if key[1] != 'r50':  # mmdet has that config
            published[key] = row['box_ap'], row['mask_ap']
    assert stated == published


@pytest.mark.parametrize('folder', sorted({Path(name).parent.name for name in DETECTORS}))
def test_metafiles_state_the_parameters_that_the_configs_have(folder):
    metafile = yaml.safe_load((CONFIGS / folder / 'metafile.yml').read_text())
    for stated in metafile['Models']:
        if 'Parameters' in stated['Metadata']:
            with torch.device('meta'):
                model = MODELS.build(Config.fromfile(CONFIGS.parent / stated['Config']).model)
            assert sum(p.numel() for p in model.parameters()) == pytest.approx(
                stated['Metadata']['Parameters'], abs=10_000), stated['Name']


@pytest.mark.parametrize('name', DETECTORS)
def test_trains_with_no_parameter_left_out_and_predicts(name):
    model = build(name)
    is_dynamic = re.search(r'_(se-\w+|mobilenet-v2|r18|r50)[-.\w]*_fpn', name) is None
    assert any(isinstance(m, DynamicConv2d) for m in model.modules()) == is_dynamic
    model.train()
    size = 96 if 'dconv' in name else 64  # mmcv's deformable kernels need maps as large as they
    data = demo_mm_inputs(2, [(3, size, size)] * 2, num_classes=10, with_mask='mask-rcnn' in name)
    losses = model.forward(**model.data_preprocessor(copy.deepcopy(data), True), mode='loss')
    total, _ = model.parse_losses(losses)
    assert torch.isfinite(total)
    total.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None] == []
    dynamic = [p.grad for n, p in trained.items()
               if re.search(r'(attention|KSM_Global)\.\w*fc\d?\.weight', n)]
    assert bool(dynamic) == is_dynamic and all(grad.isfinite().all() for grad in dynamic)
    model.eval()
    with torch.no_grad():
        predictions = model.forward(**model.data_preprocessor(data, False), mode='predict')
    assert len(predictions) == 2 and 'bboxes' in predictions[0].pred_instances


def config_name(row):
    """Detector and backbone of a published row, as config names spell them."""
    backbone = 'r50' if row['backbone'] == 'ResNet50' else 'mobilenet-v2'
    if row['kernel_num']:
        backbone = f'od-{backbone}-k{row["kernel_num"]}'
    return row['detector'].lower().replace(' r-cnn', '-rcnn'), backbone


def published(data):
    """(detector, backbone) as config names -> millions of parameters without the classifier."""
    rows = yaml.safe_load((data / 'published.yml').read_text())['odconv_coco']
    without_classifier = iter((41.75, 106.87, 19.85, 27.86, 44.40, 109.51, 22.50, 30.52))
    return {config_name(row): next(without_classifier) for row in rows}


@pytest.mark.parametrize('name', ODCONV)
def test_parameters_equal_the_published(data, name):
    detector, backbone = Path(name).name.split('_')[:2]
    expected = published(data).get((detector, backbone))
    if expected is None:
        pytest.skip('the release states no figure for a bank of one')
    config = Config.fromfile(CONFIGS / name)
    with torch.device('meta'):
        model = MODELS.build(config.model)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    if (detector, backbone) == ('mask-rcnn', 'od-mobilenet-v2-k4'):
        # The release states 31.80 for it and 29.14 for Faster R-CNN, 0.02 more than the mask head
        # that it adds in every other row: the sum of what is there is 30.50, not 30.52.
        expected = 27.86 + (22.50 - 19.85)
        assert count == pytest.approx(expected, abs=0.01)
    else:
        assert round(count, 2) == expected


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*/*_coco.py')), ids=lambda path: path.name)
def test_the_optimizer_reads_its_memory_once(path):
    """Four kernels for one make the step count: torch's fused one takes less than half the time."""
    assert Config.fromfile(path).optim_wrapper.optimizer.fused


def check_frozen_stages(config):
    """The stem trains no more, nor what makes the pyramid's first map, at stride 4."""
    with torch.device('meta'):
        backbone = MODELS.build(dict(config, frozen_except=None) if 'frozen_except' in config
                                else config)
    backbone.train()
    trained = {name.partition('.')[0] for name, p in backbone.named_parameters() if p.requires_grad}
    frozen = {name.partition('.')[0] for name, p in backbone.named_parameters()} - trained
    assert frozen == ({'conv1', 'bn1', 'layer1'} if 'ResNet' in config.type else
                      {'layer0', 'layer1'} if 'V3' in config.type else
                      {'conv1', 'layer1', 'layer2'})


@pytest.mark.parametrize('name', [*ODCONV, *FAMILY])
def test_schedule_is_the_published_one(name):
    config = Config.fromfile(CONFIGS / name)
    assert config.train_cfg.max_epochs == 12 and config.train_dataloader.batch_size == 2
    assert config.optim_wrapper.optimizer.lr == 0.02
    assert config.auto_scale_lr.base_batch_size == 16
    backbone = config.model.backbone
    assert backbone.norm_eval is True
    check_frozen_stages(backbone)
    if 'mobilenet-v2' in name:
        assert backbone.out_indices == (1, 2, 4, 7)
        assert config.model.neck.in_channels == [24, 32, 96, 1280]


@pytest.mark.parametrize('name', ADAMW)
def test_the_second_protocol_is_the_published_one(name):
    config = Config.fromfile(CONFIGS / name)
    assert config.model.type == 'MaskRCNN' and config.model.backbone.norm_eval is True
    check_frozen_stages(config.model.backbone)
    if '_kw-' in name:  # whose release has no stage freeze the cells that it reads
        with torch.device('meta'):
            backbone = MODELS.build(config.model.backbone)
        backbone.train()
        assert all(cells.requires_grad for cells in backbone.warehouse_manager.parameters())
    assert config.train_cfg.max_epochs == 12 and config.train_dataloader.batch_size == 2
    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1e-4, 0.05)
    whole, cropped = next(t for t in config.train_dataloader.dataset.pipeline
                          if t['type'] == 'RandomChoice').transforms
    assert [min(scale) for scale in whole[0].scales] == list(range(480, 801, 32))
    assert cropped[1].crop_size == (384, 600) and cropped[2].scales == whole[0].scales
    milestones = config.param_scheduler[-1].milestones
    assert milestones == ([10, 11] if '_fd-' in name else [8, 11])


@pytest.mark.parametrize(('name', 'static'), [
    ('faster-rcnn_fd-r50_fpn_1x_coco.py', 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'),
    ('mask-rcnn_fd-r50_fpn_adamw-ms-1x_coco.py', 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')])
def test_fdconv_adds_the_parameters_that_its_release_does(name, static):
    with torch.device('meta'):
        counts = [sum(p.numel() for p in MODELS.build(config.model).parameters())
                  for config in (Config.fromfile(CONFIGS / 'fdconv' / name),
                                 get_config(f'mmdet::{static}'))]
    assert counts[0] - counts[1] == pytest.approx(3.65e6, abs=0.05e6)


def test_frozen_stages_train_what_is_asked_for_and_nothing_else():
    config = Config.fromfile(CONFIGS / 'fdconv/faster-rcnn_fd-r50_fpn_1x_coco.py').model.backbone
    for asked in ('KSM|FBM', None):
        config.frozen_except = asked
        with torch.device('meta'):
            backbone = MODELS.build(config)
        backbone.train()  # which freezes again, and returns nothing
        trained = {n for n, p in backbone.layer1.named_parameters() if p.requires_grad}
        expected = {n for n, _ in backbone.layer1.named_parameters() if 'KSM' in n or 'FBM' in n}
        assert trained == (expected if asked else set())
        assert all(p.requires_grad for p in backbone.layer2.parameters())


@pytest.mark.parametrize(('name', 'more'), [
    ('kw/mask-rcnn_kw-r50_fpn_adamw-ms-1x_coco.py', 2.5),
    ('kw/mask-rcnn_kw-r50-4x_fpn_adamw-ms-1x_coco.py', 76.5)])
def test_warehouses_add_the_published_parameters(name, more):
    static = '_base_/mask-rcnn_adamw-ms_1x.py'
    with torch.device('meta'):
        counts = [sum(p.numel() for p in MODELS.build(Config.fromfile(CONFIGS / path).model)
                      .parameters()) / 1e6 for path in (name, static)]
    assert round(counts[0] - counts[1], 1) == more
