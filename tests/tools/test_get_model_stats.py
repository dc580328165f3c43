import importlib.util
import json
import math
import sys
from pathlib import Path

import digits
import pytest
import torch
import yaml
from mmdet.models.backbones import MobileNetV2, ResNet
from mmengine.analysis import FlopAnalyzer, parameter_count
from torch import nn

from mmdet_odconv.backbones import (
    DyMobileNetV2,
    DyMobileNetV3,
    DyResNet,
    KWResNet,
    ODMobileNetV2,
    ODResNet,
)
from mmdet_odconv.layers import DCDConv2d, FDConv2d, ODConv2d

TOOLS = Path(__file__).parents[2] / 'tools/analysis_tools'
PUBLISHED = yaml.safe_load((Path(__file__).parents[1] / 'data/published.yml').read_text())


@pytest.fixture(scope='module')
def tool():
    sys.path.insert(0, str(TOOLS))  # as when it is run as a script
    try:
        spec = importlib.util.spec_from_file_location('get_model_stats',
                                                      TOOLS / 'get_model_stats.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(TOOLS))
    return module


def madds(tool, backbone, *classifier):
    """Millions, of a backbone for 224x224 and of a classifier's layers of these widths."""
    image = torch.zeros(1, 3, 224, 224, device='meta')
    stats = tool.model_stats(backbone, lambda: backbone(image), activations=False)
    return (stats['madds'] + sum(a * b for a, b in zip(classifier, classifier[1:]))) / 1e6


@pytest.mark.parametrize('row', PUBLISHED['odconv_imagenet'],
                         ids=lambda row: f'{row["model"]} k{row["kernel_num"]}')
def test_published_madds_of_odconv(tool, row):
    family, _, width = row['model'].partition(' ')
    dynamic = {} if row['kernel_num'] is None else dict(kernel_num=row['kernel_num'])
    with torch.device('meta'):
        if family == 'MobileNetV2':
            backbone = (ODMobileNetV2 if dynamic else MobileNetV2)(float(width[:-1]), **dynamic)
        else:
            # The release strides in the 3x3 convolution, but its figures are those of a stride in
            # the first 1x1, mmdet's style 'caffe': 3858 M for ResNet-50, not 4089 M.
            backbone = (ODResNet if dynamic else ResNet)(
                int(family[len('ResNet'):]), style='caffe', **dynamic)
    features = {'ResNet18': 512, 'MobileNetV2': 1280}.get(family, 2048)
    assert madds(tool, backbone, features, 1000) == pytest.approx(row['madds'], rel=0.02)


@pytest.mark.parametrize('row', PUBLISHED['dyconv_imagenet'], ids=lambda row: row['model'])
def test_published_madds_of_dyconv(tool, row):
    family, _, width = row['model'][len('DY-'):].partition(' ')
    with torch.device('meta'):
        if family == 'MobileNetV2':
            backbone, classifier = DyMobileNetV2(float(width[:-1])), (1280, 1000)
        elif family == 'MobileNetV3-Small':
            backbone, classifier = DyMobileNetV3('small'), (576, 1280, 1000)
        else:
            backbone, classifier = DyResNet(int(family[len('ResNet-'):])), (512, 1000)
    # The paper's FLOPs are multiplications and additions, two for a multiply-add.
    assert madds(tool, backbone, *classifier) == pytest.approx(row['gflops'] * 500, rel=0.03)


def test_a_layers_multiply_adds_by_hand(tool):
    """8 to 16 channels, 3x3, of a map of 10x10 to one of 8x8; the hidden layer has 16, DCD's 4."""

    def parts(layer):
        model = nn.ModuleDict(dict(layer=layer))
        return tool.model_stats(model, lambda: layer(torch.zeros(1, 8, 10, 10)))['parts']['layer']

    kernel, maps = 16 * 8 * 9, 64
    found = parts(ODConv2d(8, 16, 3, kernel_num=4))
    assert found['convolution'] == kernel * maps
    assert found['attention'] == 8 * 16 + 16 * (8 + 16 + 9 + 4)
    assert found['mixing'] == (4 + 3) * kernel  # products with the attention, and their sum
    assert found['scaling'] == kernel + 8 * 100 + 16 * maps  # spatial; input; output
    found = parts(DCDConv2d(8, 16, 3))
    latent = 4  # 8 / 2^floor(1.5)
    assert found['convolution'] == kernel * maps and found['attention'] == (
        8 * 4 + 4 * 16 + 4 * latent**2)
    found = parts(FDConv2d(8, 16, 3, fbm=False))
    assert found['convolution'] == kernel * maps
    assert found['scaling'] == 4 * kernel  # channels, filters, positions and elements
    transform = round(1.25 * kernel * math.log2(kernel))
    assert found['mixing'] >= kernel + transform
    banded = parts(FDConv2d(8, 16, 3))
    pixels = 100
    assert banded['scaling'] - found['scaling'] == 8 * (
        4 * round(1.25 * pixels * math.log2(pixels)) + 4 * pixels)


@pytest.mark.parametrize(('budget', 'gmadds'), [('1x', 2.0), ('4x', 8.1)])
def test_mixing_of_a_warehouse_costs_its_cells_times_the_kernels(tool, budget, gmadds):
    with torch.device('meta'):
        backbone = KWResNet(50, budget=budget)
    stats = [tool.model_stats(nn.ModuleDict(dict(backbone=backbone)), lambda s=size: backbone(
        torch.zeros(1, 3, s, s, device='meta'))) for size in (32, 64)]
    cells = {name: len(layer.warehouse.cells) for name, layer in backbone.named_modules()
             if hasattr(layer, 'warehouse')}
    kernels = {name: backbone.get_submodule(name).kernel_shape.numel() for name in cells}
    expected = sum(cells[name] * kernels[name] for name in cells)
    assert round(expected / 1e9, 1) == gmadds
    for found in stats:  # whatever the resolution
        assert found['parts']['backbone']['mixing'] == expected
        assert sum(found['parts']['backbone'][kind] for kind in tool.KINDS) == found['madds']


@pytest.mark.parametrize('backbone', [lambda: ResNet(50), lambda: MobileNetV2()],
                         ids=['ResNet50', 'MobileNetV2'])
def test_convolutions_as_mmengine_counts_them(tool, backbone):
    backbone = backbone()
    backbone.eval()
    image = torch.zeros(1, 3, 64, 96)
    # MMEngine counts normalisation and pooling too.
    theirs = FlopAnalyzer(backbone, image).unsupported_ops_warnings(False).by_operator()
    stats = tool.model_stats(backbone, lambda: backbone(image))
    assert stats['madds'] == theirs['conv']
    assert stats['params'] == parameter_count(backbone)['']


def test_a_detector_and_its_parts(tmp_path):
    result = digits.tool(tmp_path, 'analysis_tools/get_model_stats.py',
                         'faster-rcnn_od-r18-k4_fpn_digits.py', '--shape', '96', '128', '--out',
                         'stats.json')
    assert 'mixing' in result.stdout and 'roi_head' in result.stdout
    stats = json.loads((tmp_path / 'stats.json').read_text())
    kinds = ('convolution', 'attention', 'mixing', 'scaling', 'other')
    total = {kind: sum(part[kind] for part in stats['parts'].values()) for kind in kinds}
    assert sum(total.values()) == stats['madds'] and min(total.values()) > 0
    assert sum(part['params'] for part in stats['parts'].values()) == stats['params']
    assert stats['activations'] > 0
    backbone = stats['parts']['backbone']
    assert backbone['mixing'] > 0 and stats['parts']['neck']['mixing'] == 0
    # 100 proposals of 64x7x7, then two layers of 256, then 11 classes and 4 coordinates.
    roi_head = 100 * (64 * 49 * 256 + 256 * 256 + 256 * 15)
    assert stats['parts']['roi_head']['other'] == roi_head


def test_a_file_that_cannot_be_written_is_told_before_anything_is_counted(tool, monkeypatch):
    monkeypatch.setattr(tool, 'detector_stats', None)
    monkeypatch.setattr('sys.argv', ['get_model_stats.py', 'faster-rcnn_od-r18-k4_fpn_digits.py',
                                     '--out', 'nowhere/stats.json'])
    with pytest.raises(SystemExit, match='^error: nowhere/stats.json could not be written'):
        tool.main()


def test_a_config_that_is_unknown(tmp_path):
    result = digits.tool(tmp_path, 'analysis_tools/get_model_stats.py', 'faster_rcnn_od.py',
                         check=False)
    assert result.returncode == 1 and result.stderr.startswith('error: Config faster_rcnn_od.py')
    assert len(result.stderr.splitlines()) == 1
