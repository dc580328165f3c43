import argparse
import copy
import gzip
import json
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import load_checkpoint

from mmdet_odconv import InputError, KWMobileNetV2, KWResNet, ODMobileNetV2, ODResNet
from mmdet_odconv.checkpoints import convert_published, read_weights
from mmdet_odconv.checkpoints.published import check_released

ROOT = Path(__file__).parents[2]


def build(name):
    """'od_resnet50_4x', 'od_mobilenetv2_075_1x' -> the backbone."""
    _, family, *width, kernel_num = name.split('_')
    kernel_num = int(kernel_num[:-1])
    if width:
        return ODMobileNetV2(widen_factor=int(width[0]) / 100, kernel_num=kernel_num)
    return ODResNet(int(family[len('resnet'):]), kernel_num=kernel_num)


def published_shapes(data):
    return json.loads(gzip.decompress((data / 'published_checkpoint_keys.json.gz').read_bytes()))


NAMES = [
    *(f'od_resnet{d}_{k}x' for d, k in ((18, 1), (18, 4), (50, 1), (50, 4), (101, 1), (101, 2))),
    *(f'od_mobilenetv2_{w}_{k}x' for w in ('050', '075', '100') for k in (1, 4))]
CLASSIFIER = {'fc.weight', 'fc.bias', 'classifier.1.weight', 'classifier.1.bias'}


def published_state(data, name, prefix='module.'):
    """A checkpoint of the published layout: every tensor filled with a value of its own."""
    return {prefix + key: torch.tensor(float(i)).expand(shape)
            for i, (key, shape) in enumerate(published_shapes(data)[name].items())}


def values(state):
    """The values that published_state gave, in the order of ``state``, without memory for them."""
    return [float(tensor.flatten()[0]) for tensor in state.values()]


@pytest.mark.parametrize('name', NAMES)
def test_every_published_tensor_lands_where_it_should(data, name):
    state = published_state(data, name)
    with torch.device('meta'):
        model = build(name)
    model.load_state_dict(state, strict=True, assign=True)
    # The release registers its modules in MMDetection's order, which is known without any name.
    ours = model.state_dict()
    theirs = {key: t for key, t in state.items() if key[len('module.'):] not in CLASSIFIER}
    assert len(theirs) == len(state) - 2
    assert [t.shape for t in ours.values()] == [t.shape for t in theirs.values()]
    assert values(ours) == values(theirs)


@pytest.mark.parametrize('name', NAMES)
def test_every_published_tensor_changes_the_output(data, name):
    model = build(name)
    model.eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            # Positive wherever a ReLU could silence what is before it.
            tensor.data = torch.rand_like(tensor) + 0.5 if tensor.dim() < 2 else (
                torch.randn_like(tensor) / tensor[..., 0, 0].numel()**0.5)
    model(torch.rand(1, 3, 32, 32))[-1].square().sum().backward()
    # A BatchNorm's running mean and variance act where its bias and weight do.
    silent = [key for key, tensor in model.named_parameters() if not tensor.grad.any()]
    assert silent == []


@pytest.mark.parametrize('prefix', ['', 'module.', 'backbone.', 'module.backbone.'])
@pytest.mark.parametrize('name', ['od_resnet18_1x', 'od_mobilenetv2_050_4x'])
def test_every_loader_reads_every_prefix(data, tmp_path, name, prefix):
    state = published_state(data, name, prefix)
    if 'backbone' in prefix:
        state[prefix.replace('backbone.', 'neck.') + 'weight'] = torch.ones(1)
    models = [build(name) for _ in range(3)]
    models[0].load_state_dict(state)
    torch.save({'state_dict': state, 'epoch': 1, 'acc': 0.0, 'best_acc': 0.0, 'optimizer': {}},
               tmp_path / 'od.pth.tar')
    load_checkpoint(models[1], str(tmp_path / 'od.pth.tar'))
    models[2].init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'od.pth.tar'))
    models[2].init_weights()
    copy.deepcopy(models[2]).load_state_dict(state)
    expected = [float(t.flatten()[0]) for key, t in state.items()
                if key[len(prefix):] not in CLASSIFIER and 'neck' not in key]
    for model in models:
        assert values(model.state_dict()) == expected


@pytest.mark.parametrize(('config', 'name'), [
    ('faster-rcnn_od-r50-k4', 'od_resnet50_4x'), ('mask-rcnn_od-r50-k4', 'od_resnet50_4x'),
    ('faster-rcnn_od-mobilenet-v2-k4', 'od_mobilenetv2_100_4x'),
    ('mask-rcnn_od-mobilenet-v2-k4', 'od_mobilenetv2_100_4x')])
def test_published_detectors(data, config, name):
    config = Config.fromfile(ROOT / f'configs/odconv/{config}_fpn_1x_coco.py')
    with torch.device('meta'):
        model = MODELS.build(config.model)
    state = published_state(data, name, 'backbone.')
    expected = [v for key, v in zip(state, values(state)) if key[len('backbone.'):]
                not in CLASSIFIER]
    for i, (key, tensor) in enumerate(model.state_dict().items()):
        if not key.startswith(('backbone.', 'data_preprocessor.')):
            state[key] = torch.tensor(-float(i)).expand(tensor.shape)
            expected.append(-float(i))
    model.load_state_dict(state, strict=True, assign=True)
    assert values(model.state_dict()) == expected


def test_a_published_detector_by_load_from(data, tmp_path):
    config = Config.fromfile(ROOT / 'configs/odconv/faster-rcnn_od-mobilenet-v2-k1_fpn_1x_coco.py')
    config.model.backbone.widen_factor = 0.5
    config.model.neck.in_channels = [16, 16, 48, 1280]
    model = MODELS.build(config.model)
    state = published_state(data, 'od_mobilenetv2_050_1x', 'backbone.')
    state.update((key, torch.full_like(tensor, -1.0)) for key, tensor in model.state_dict().items()
                 if not key.startswith('backbone.'))
    torch.save({'state_dict': state, 'meta': {'CLASSES': ('a',)}, 'optimizer': {}},
               tmp_path / 'detector.pth')
    load_checkpoint(model, str(tmp_path / 'detector.pth'), strict=True)
    loaded = model.state_dict()
    assert all(bool((t == -1).all()) for key, t in loaded.items() if not key.startswith('backbone'))
    assert values({k: t for k, t in loaded.items() if k.startswith('backbone.')}) == [
        v for key, v in zip(state, values(state))
        if key.startswith('backbone.') and key[len('backbone.'):] not in CLASSIFIER]


def test_one_line_says_what_was_loaded(data, tmp_path):
    logger = MMLogger.get_instance('one-line', log_file=str(tmp_path / 'log'))
    state = published_state(data, 'od_resnet18_1x', 'backbone.')
    state['rpn_head.rpn_conv.weight'] = state['neck.bias'] = torch.ones(1)
    model = build('od_resnet18_1x')
    for _ in range(2):
        model.load_state_dict(state)
    logger.handlers[-1].flush()
    line, = (tmp_path / 'log').read_text().splitlines()
    assert line.endswith(
        'ODResNet loads 312 of 316 tensors; left out: neck, rpn_head (rest of the network); '
        'fc.weight, fc.bias (classifier).')


@pytest.mark.parametrize(('name', 'model', 'message'), [
    ('od_resnet50_1x', lambda: ODResNet(18, kernel_num=1),
     'ODResNet has depth 18, but the checkpoint depth 50: give weights of the same network'),
    ('od_resnet101_2x', lambda: ODResNet(50, kernel_num=4), 'has depth 50, but .* depth 101: '),
    ('od_resnet18_1x', lambda: ODResNet(18, base_channels=32, kernel_num=1),
     'ODResNet has width 32, but the checkpoint width 64: '),
    ('od_mobilenetv2_050_4x', lambda: ODMobileNetV2(widen_factor=0.75),
     'ODMobileNetV2 has widen_factor 0.75, but the checkpoint widen_factor 0.5: '),
    ('od_mobilenetv2_050_4x', lambda: ODResNet(18),
     'ODResNet has family ResNet, but the checkpoint family MobileNetV2: '),
    ('od_mobilenetv2_050_4x', lambda: ODMobileNetV2(widen_factor=0.5, kernel_num=1),
     r'layer1\.0\.\w+\.conv has a bank of kernel_num=1, .* kernel_num=4, '),
])
def test_weights_of_another_network_are_one_sentence(data, tmp_path, name, model, message):
    torch.save({'state_dict': published_state(data, name)}, tmp_path / 'od.pth')
    with pytest.raises(InputError, match=message) as error:
        load_checkpoint(model(), str(tmp_path / 'od.pth'))
    assert len(str(error.value).splitlines()) == 1


def test_three_stages_take_a_file_of_four(data):
    model = ODResNet(50, kernel_num=1, num_stages=3, out_indices=(2,), strides=(1, 2, 2),
                     dilations=(1, 1, 1))
    missing, _ = model.load_state_dict(published_state(data, 'od_resnet50_1x'), strict=False)
    assert missing == []


def test_four_stages_take_weights_of_one(data):
    state = {name: tensor for name, tensor in published_state(data, 'od_resnet50_1x').items()
             if name.startswith('module.layer1.')}
    model = ODResNet(50, kernel_num=1)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not any(name.startswith('layer1.') for name in missing)
    with pytest.raises(InputError, match='has depth 18, but the checkpoint depth 50 or 101 or 152'):
        ODResNet(18, kernel_num=1).load_state_dict(state, strict=False)


def test_weights_of_no_use_are_refused(data):
    state = published_state(data, 'od_resnet18_1x')
    with pytest.raises(InputError, match='none of the weights of ODResNet, its 2 tensors are a, b'):
        ODResNet(18).load_state_dict(dict(a=torch.ones(1), b=torch.ones(1)), strict=False)
    state['module.bn1.weight'] = torch.full((64,), float('nan'))
    with pytest.raises(InputError, match=r'bn1\.weight of the checkpoint has 64 NaN or infinite'):
        ODResNet(18, kernel_num=1).load_state_dict(state)


@pytest.mark.parametrize(('weights', 'message'), [
    (dict(kernel_num=4, reduction=1 / 2),
     r'layer1\.0\.conv1\.attention\.fc\.weight .* \(32, 64, 1, 1\), where \(16, 64, 1, 1\)'),
    (dict(kernel_num=4, dynamic_convs=r'layer.*|conv1'),
     r'^conv1\.weight .* \(64, 3, 7, 7\) was expected: .* one with the same dynamic_convs'),
    (dict(kernel_num=1), r'layer1\.0\.conv1 has a bank of kernel_num=4, .* kernel_num=1, '),
    (None, r'kernel_num=4, \(4, 64, 64, 3, 3\), but .* one static kernel, \(64, 64, 3, 3\): give'),
])
def test_weights_of_another_bank_are_refused(weights, message):
    from mmdet.models.backbones import ResNet
    state = (ODResNet(18, **weights) if weights else ResNet(18)).state_dict()
    with pytest.raises(InputError, match=message):
        ODResNet(18, kernel_num=4).load_state_dict(state, strict=False)


def warehouse_shapes(data):
    return json.loads(gzip.decompress((data / 'published_kw_checkpoint_keys.json.gz').read_bytes()))


def warehouse_state(data, name):
    """As ``published_state``, of KernelWarehouse's release."""
    return {key: torch.tensor(float(i)).expand(shape)
            for i, (key, shape) in enumerate(warehouse_shapes(data)[name].items())}


def build_warehouse(name):
    """'kw1d2x_resnet18', 'kw4x_mobilenetv2_050' -> the backbone."""
    budget, network = name[len('kw'):].split('_', 1)
    budget = f'1/{budget[2]}' if budget.startswith('1d') else budget
    if network.startswith('resnet'):
        return KWResNet(int(network[len('resnet'):]), budget=budget)
    return KWMobileNetV2(int(network[-3:]) / 100, budget=budget)


WAREHOUSES = [f'kw{b}_{n}' for n, budgets in (
    ('resnet18', ('1d4x', '1d2x', '1x', '2x', '4x')), ('resnet50', ('1d2x', '1x', '4x')),
    ('mobilenetv2_050', ('1d2x', '1x', '4x')), ('mobilenetv2_100', ('1d2x', '1x', '4x')))
    for b in budgets]


@pytest.mark.parametrize('name', WAREHOUSES)
def test_every_tensor_of_a_warehouse_lands_where_it_should(data, name):
    state = warehouse_state(data, name)
    with torch.device('meta'):
        model = build_warehouse(name)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    # At 1/2 the classifier of MobileNetV2 has a warehouse too.
    spare = {'warehouse_manager.weights.9'} if '1d2x_mobile' in name else set()
    assert not missing and set(unexpected) == spare
    ours = {key: t for key, t in model.state_dict().items() if key != 'warehouse_manager.tau'}
    theirs = {key: t for key, t in state.items()
              if key.split('.')[0] not in ('fc', 'classifier') and key not in spare}
    # The release registers the warehouses first, and all else in MMDetection's order.
    first = [key for key in theirs if key.startswith('warehouse_manager.')]
    ordered = [*(key for key in theirs if key not in first), *first]
    assert values(ours) == values({key: theirs[key] for key in ordered})
    assert [t.shape for t in ours.values()] == [theirs[key].shape for key in ordered]


def test_a_file_of_a_warehouse_with_its_settings_is_read_by_every_loader(data, tmp_path):
    state = warehouse_state(data, 'kw1x_mobilenetv2_050')
    file = str(tmp_path / 'kw.pth')
    torch.save(dict(model=state, optimizer={}, epoch=1, scaler={},
                    args=argparse.Namespace(model='kw', lr=0.05, decay=None)), file)
    models = [build_warehouse('kw1x_mobilenetv2_050') for _ in range(2)]
    load_checkpoint(models[0], file)
    models[1].init_cfg = dict(type='Pretrained', checkpoint=file)
    models[1].init_weights()
    expected = [v for key, v in zip(state, values(state)) if not key.startswith('classifier')]
    for model in models:
        got = model.state_dict()
        assert got.pop('warehouse_manager.tau') == 0
        assert sorted(values(got)) == sorted(expected)
    weights, checkpoint = read_weights(file)
    assert not vars(checkpoint['args']) and len(weights) == len(state)
    converted, left_out = convert_published(weights)
    check_released(converted)
    assert left_out == ['classifier.weight', 'classifier.bias']


@pytest.mark.parametrize(('name', 'model', 'message'), [
    ('kw1x_resnet50', lambda: KWResNet(18), 'has depth 18, but the checkpoint depth 50'),
    ('kw1x_mobilenetv2_050', lambda: KWMobileNetV2(), 'widen_factor 1.0, but .* widen_factor 0.5'),
    ('kw1x_resnet18', lambda: ODResNet(18), 'layer ODConv2d, but the checkpoint layer KWConv2d'),
    ('kw1x_resnet18', lambda: KWResNet(18, budget='4x'),
     r'weights\.0 .* \(56, 64, 64, 1, 1\), where \(224, .* expected: .* of the same budget')])
def test_files_of_another_warehouse_are_one_sentence(data, name, model, message):
    with pytest.raises(InputError, match=message) as error:
        model().load_state_dict(warehouse_state(data, name), strict=False)
    assert len(str(error.value).splitlines()) == 1
