import importlib.util
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from mmdet.models.backbones import MobileNetV2, ResNet
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmdet_odconv import InputError
from mmdet_odconv.checkpoints.swapping import make_static
from mmdet_odconv.engine.launch import find_config
from mmdet_odconv.layers import DynamicConv2d

SCRIPT = Path(__file__).parents[2] / 'tools/analysis_tools/benchmark.py'


@pytest.fixture
def benchmark():
    spec = importlib.util.spec_from_file_location('benchmark', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(('name', 'static'), [
    ('faster-rcnn_od-mobilenet-v2-k4_fpn_1x_coco.py', None),
    ('faster-rcnn_od-r50-k4_fpn_1x_coco.py', 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'),
    ('faster-rcnn_fd-r50_fpn_1x_coco.py', 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'),
    ('faster-rcnn_r50_odfpn-k1_1x_coco.py', 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'),
    ('rtmdet_tiny-odconv-k1_8xb32-300e_coco.py', 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py'),
    ('yolox_tiny-odconv-k1_8xb8-300e_coco.py', 'yolox/yolox_tiny_8xb8-300e_coco.py')])
def test_the_static_alternative_is_the_detector_that_it_was(name, static):
    DefaultScope.get_instance('test_benchmark', scope_name='mmdet')
    config = Config.fromfile(find_config(name)).model
    with torch.device('meta'):
        assert any(isinstance(m, DynamicConv2d) for m in MODELS.build(config).modules())
        make_static(config)
        model = MODELS.build(config)
        assert not any(isinstance(m, DynamicConv2d) for m in model.modules())
        if static is not None:
            other = MODELS.build(Config.fromfile(
                Path(importlib.import_module('mmdet').__file__).parent / '.mim/configs' / static
            ).model)
            assert ({n: v.shape for n, v in model.state_dict().items()} ==
                    {n: v.shape for n, v in other.state_dict().items()})


def test_arguments_of_a_backbones_own_layer_go_with_it():
    config = dict(type='ODMobileNetV2', conv_cfg=dict(norm_cfg=dict(type='LN')), out_indices=(1,))
    make_static(config)
    assert config == dict(type=MobileNetV2, out_indices=(1,))
    config = dict(type='KWResNet', depth=18, conv_cfg=dict(type='KWConv2d', reduction=0.1))
    make_static(config)
    assert config == dict(type=ResNet, depth=18)


@pytest.mark.parametrize('arch', ['small', 'large'])
def test_the_static_network_has_the_dynamic_ones_maps(arch):
    config = dict(type='DyMobileNetV3', arch=arch)
    dynamic = MODELS.build(config)
    make_static(config)
    image = torch.zeros(1, 3, 64, 64)
    assert ([m.shape for m in dynamic(image)] == [m.shape for m in MODELS.build(config)(image)])


def test_a_size_that_the_static_network_has_not():
    with pytest.raises(InputError, match='^ResNet has nothing like ODResNet of depth=10: give ano'):
        make_static(dict(type='ODResNet', depth=10))


def test_measured_plans_are_those_that_can_serve_each_layer():
    result = subprocess.run(
        [sys.executable, str(SCRIPT.with_name('measure_plans.py')), 'ODMobileNetV2',
         '--kernel-num', '1', '--batch', '2', '--size', '32', '32', '--rounds', '2',
         '--device', 'cpu'],
        capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [[cell.strip() for cell in line.split('│')[2:-1]]
            for line in result.stdout.splitlines() if line.startswith('│')]
    pointwise = [row for row in rows if row[0].endswith('x1x1')]
    depthwise = [row for row in rows if row[0].endswith('x1x3x3')]
    assert len(pointwise) + len(depthwise) == len(rows) and pointwise and depthwise
    # weight, input, stride; milliseconds of blocked, folded, fused, shared; the plan chosen
    assert all(row[3] and row[4] and row[6] and not row[5] for row in pointwise)
    assert all(row[4] and not (row[3] or row[5] or row[6]) for row in depthwise)
    assert {row[7] for row in depthwise} == {'folded'}
    assert f'of {len(rows)} choices within a tenth of the fastest plan' in result.stdout


@pytest.mark.parametrize('name', ['swap/retinanet_od-r50-k4', 'swap/cascade-rcnn_od-r50-k4',
                                  'odconv/mask-rcnn_od-r50-k4'])
def test_iterations_of_detectors_of_all_kinds(benchmark, monkeypatch, tmp_path, name):
    base = SCRIPT.parents[2] / f'configs/{name}_fpn_1x_coco.py'
    (tmp_path / 'small.py').write_text(
        f'_base_ = {str(base)!r}\n'
        'model = dict(backbone=dict(depth=18, base_channels=8, stem_channels=8, kernel_num=2),\n'
        '             neck=dict(in_channels=[8, 16, 32, 64]))\n')
    monkeypatch.setattr('sys.argv', ['benchmark.py', 'detector', str(tmp_path / 'small.py'),
                                     '--mode', 'iteration', '--size', '64', '64', '--batch', '1'])
    case, = benchmark.cases(benchmark.parse_args())
    assert case.iteration('ours') > 0 and case.iteration('static') > 0


@pytest.mark.filterwarnings('error')  # matplotlib only warns of axes that long names leave no room
def test_long_names_leave_room_for_the_bars(benchmark, tmp_path):
    records = [dict(case='faster-rcnn_od-mobilenet-v2-k4_fpn_1x_coco, 1x416x672', alternative=name,
                    to_static=dict(iteration=1.2)) for name in ('static', 'published', 'ours')]
    benchmark.draw(records, ['iteration'], tmp_path / 'benchmark.png')


def test_both_allocators_leave_a_result_each(benchmark, monkeypatch, tmp_path):
    run = Mock(return_value=Mock(returncode=0))
    monkeypatch.setattr(benchmark.subprocess, 'run', run)
    monkeypatch.setattr('sys.argv', ['benchmark.py', 'layer', '--mode', 'both', '--allocator',
                                     'both', '--out', str(tmp_path)])
    with pytest.raises(SystemExit, match='0'):
        benchmark.main()
    kinds = []
    for called in run.call_args_list:
        monkeypatch.setattr('sys.argv', called.args[0][1:])
        args = benchmark.parse_args()
        assert args.mode == 'both' and args.out == tmp_path / args.allocator
        kinds.append(args.allocator)
    assert kinds == ['default', 'settled']


def test_a_backbone_that_mmdet_has_no_static_one_of(benchmark, monkeypatch):
    command = ['benchmark.py', 'backbone']
    monkeypatch.setattr('sys.argv', [*command, 'DyMobileNetV3', '--layer', 'DyConv2d', '--size',
                                     '32', '32', '--batch', '1'])
    case, = benchmark.cases(benchmark.parse_args())
    assert case.inference('ours') > 0 and case.inference('static') > 0
    monkeypatch.setattr('sys.argv', [*command, 'ODResnet'])
    with pytest.raises(InputError, match='^ODResnet is no dynamic backbone: did you mean ODResNet'):
        next(benchmark.cases(benchmark.parse_args()))


def test_a_kernelwarehouse_of_any_size_and_no_other_layer_in_it(benchmark, monkeypatch, capsys):
    command = ['benchmark.py', 'backbone', 'KWResNet', '--depth', '18', '--size', '32', '32']
    parameters = []
    for options in ((), ('--layer-options', 'budget=1/2')):
        monkeypatch.setattr('sys.argv', [*command, *options])
        args = benchmark.parse_args()
        case, = benchmark.cases(args)
        parameters.append(sum(p.numel() for p in case.models['ours'][0].parameters()))
    assert case.label == 'ResNet18 KW budget=1/2, 2x32x32'
    assert parameters[1] < 0.7 * parameters[0]
    monkeypatch.setattr('sys.argv', [*command, '--kernel-num', '4'])
    with pytest.raises(SystemExit):
        benchmark.parse_args()
    assert 'KWResNet has layers of its own' in capsys.readouterr().err


@pytest.mark.parametrize(('given', 'said'), [
    ('--suite --batch 8', '--suite does not read --batch: leave it out'),
    ('backbone ODResNet --suite', '--suite measures its own cases, and no backbone'),
    ('detector x.py --layer-options fbm=False', 'detector does not read --layer-options'),
    ('layer --depth 18', 'layer does not read --depth'),
    ('layer --rounds 0', '--rounds must be at least 1, got 0'),
    ('layer --batch 2 0', '--batch must be at least 1, got 0'),
    ('', 'say what to measure: layer, backbone, model, detector or --suite')])
def test_what_would_not_be_read_is_refused(benchmark, monkeypatch, capsys, given, said):
    monkeypatch.setattr('sys.argv', ['benchmark.py', *given.split()])
    with pytest.raises(SystemExit):
        benchmark.parse_args()
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(('given', 'said'), [
    ('layer --groups 3', 'must be divisible by groups'), ('model resnet50', 'ValueError: Empty'),
    ('model no.such', 'ModuleNotFoundError'), ('backbone ODResNet --depth 49', 'KeyError'),
    ('layer --layer-options kernelnum=3', 'TypeError')])
def test_what_cannot_be_built(benchmark, monkeypatch, given, said):
    monkeypatch.setattr('sys.argv', ['benchmark.py', *given.split()])
    with pytest.raises(InputError, match=f'^{given.split()[0]} .*could not be built .*{said}'):
        next(benchmark.cases(benchmark.parse_args()))


def test_a_case_that_fails_loses_no_others(benchmark, monkeypatch, capsys, tmp_path):
    cases = iter(range(99))

    def run(command, **options):
        out = Path(command[command.index('--out') + 1])
        out.mkdir(parents=True)
        (out / 'benchmark.json').write_text('{"records": ["row"]}')
        return Mock(returncode=next(cases) == 0)

    monkeypatch.setattr(benchmark.subprocess, 'run', run)
    monkeypatch.setattr('sys.argv', ['benchmark.py', '--suite', '--out', str(tmp_path)])
    rows = list(benchmark.suite(benchmark.parse_args(), ['training']))
    assert rows and len(rows) == next(cases) - 1
    assert 'failed and has no row' in capsys.readouterr().err
