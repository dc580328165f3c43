import gzip
import json

import pytest
import torch
from mmengine.runner import load_checkpoint

from mmdet_odconv import InputError, ODMobileNetV2, ODResNet


def build(name):
    """'od_resnet50_4x', 'od_mobilenetv2_075_1x' -> the backbone."""
    _, family, *width, kernel_num = name.split('_')
    kernel_num = int(kernel_num[:-1])
    if width:
        return ODMobileNetV2(widen_factor=int(width[0]) / 100, kernel_num=kernel_num)
    return ODResNet(int(family[len('resnet'):]), kernel_num=kernel_num)


def published_shapes(data):
    return json.loads(gzip.decompress((data / 'published_checkpoint_keys.json.gz').read_bytes()))


@pytest.mark.parametrize('name', [
    *(f'od_resnet{d}_{k}x' for d, k in ((18, 1), (18, 4), (50, 1), (50, 4), (101, 1), (101, 2))),
    *(f'od_mobilenetv2_{w}_{k}x' for w in ('050', '075', '100') for k in (1, 4))])
def test_every_published_tensor_has_its_place(data, name):
    shapes = published_shapes(data)[name]
    with torch.device('meta'):
        model = build(name)
        published = {key: torch.empty(shape) for key, shape in shapes.items()}
    missing, unexpected = model.load_state_dict(published, strict=False)
    assert missing == []
    assert set(unexpected) <= {'fc.weight', 'fc.bias', 'classifier.1.weight', 'classifier.1.bias'}


def test_mobilenet_tensors_land_where_they_should(data, tmp_path):
    shapes = published_shapes(data)['od_mobilenetv2_050_1x']
    state = {f'module.{key}': torch.rand(shape) + 0.5 for key, shape in shapes.items()}
    torch.save({'state_dict': state, 'epoch': 150}, tmp_path / 'od.pth.tar')
    model = build('od_mobilenetv2_050_1x')
    load_checkpoint(model, str(tmp_path / 'od.pth.tar'))
    for ours, theirs in {
            'conv1.conv.weight': 'features.0.0.weight', 'conv1.bn.bias': 'features.0.1.bias',
            'layer1.0.depthwise_conv.conv.weight': 'features.1.conv.0.0.weight',
            'layer1.0.linear_conv.bn.running_var': 'features.1.conv.2.running_var',
            'layer2.1.expand_conv.conv.attention.fc.weight':
            'features.3.conv.0.0.attention.fc.weight',
            'layer4.3.depthwise_conv.bn.weight': 'features.10.conv.1.1.weight',
            'layer7.0.linear_conv.conv.attention.bn.bias': 'features.17.conv.2.attention.bn.bias',
            'conv2.conv.weight': 'features.18.0.weight', 'conv2.bn.weight': 'features.18.1.weight',
    }.items():
        torch.testing.assert_close(model.state_dict()[ours], state[f'module.{theirs}'])


@pytest.mark.parametrize(('weights', 'message'), [
    (dict(kernel_num=1), r'layer1\.0\.conv1 has a bank of kernel_num=4, .* kernel_num=1, '),
    (None, r'kernel_num=4, \(4, 64, 64, 3, 3\), but .* one static kernel, \(64, 64, 3, 3\): give'),
])
def test_weights_of_another_bank_are_refused(weights, message):
    from mmdet.models.backbones import ResNet
    state = (ODResNet(18, **weights) if weights else ResNet(18)).state_dict()
    with pytest.raises(InputError, match=message):
        ODResNet(18, kernel_num=4).load_state_dict(state, strict=False)
