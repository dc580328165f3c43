"""The table of formats: each answers what torch does, a file of ONNX too."""
import itertools
import re
import runpy
import sys

import digits
import pytest
import torch
from mmdet.registry import DATASETS
from mmengine.config import Config

from mmdet_odconv import InputError
from mmdet_odconv.checkpoints.swapping import build_model
from mmdet_odconv.deployment import timing


@pytest.fixture
def config(tmp_path):
    """A tiny config with dynamic layers."""
    path = tmp_path / 'tiny.py'
    path.write_text(f"""
_base_ = {str(digits.ROOT / 'configs/quickstart/faster-rcnn_od-r18-k4_fpn_digits.py')!r}
model = dict(backbone=dict(base_channels=8, stem_channels=8, kernel_num=2),
             neck=dict(in_channels=[8, 16, 32, 64]))
""")
    return path


@pytest.mark.parametrize('part', ['backbone', 'detector'])
def test_counterparts_find_the_same(config, part):
    models = timing.counterparts(Config.fromfile(config), part)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        static, dynamic = (model(image) for model in models.values())
    for a, b in zip(static, dynamic):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_the_command(config):
    """In a process of its own: OpenVINO brings its own threads, beside which torch's may die."""
    said = digits.tool(config.parent, 'deployment/benchmark.py', config, '--size', '64', '64',
                       '--rounds', '1', '--formats', 'eager', 'onnxruntime', 'onnxruntime-nchwc',
                       'openvino').stdout
    rows = re.findall(r'│ ([\w-]+) +│ (static|dynamic) .* (\S+) │', said)
    kinds = ['eager', 'onnxruntime', 'onnxruntime-nchwc',
             *(['openvino'] if timing.is_installed('openvino') else [])]
    assert [row[:2] for row in rows] == [
        (kind, model) for model in ('static', 'dynamic') for kind in kinds]
    assert all(float(error) < 1e-4 for _, _, error in rows)
    assert ('not installed' in said) == ('openvino' not in kinds)


def test_a_layer_that_no_exporter_takes_is_named_below_the_others_rows(config, monkeypatch, capsys):
    config.write_text(config.read_text() + "model['backbone']['conv_cfg'] = dict(type='FDConv2d')")
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', str(config), '--size', '64', '64', '--rounds',
                                      '1', '--formats', 'eager', 'onnxruntime'])
    runpy.run_path(str(digits.ROOT / 'tools/deployment/benchmark.py'), run_name='__main__')
    said = ' '.join(capsys.readouterr().out.split())
    assert re.findall(r'│ (\w+) │ (\w+) │ (refused|[\d.]+) │', said)[-1] == (
        'onnxruntime', 'dynamic', 'refused')
    assert said.count('is an FDConv2d, whose Fourier transform of kernels') == 1
    assert said.count('│ static │') == 2


def test_what_is_not_installed_is_left_out(config, monkeypatch):
    models = timing.counterparts(Config.fromfile(config), 'backbone')
    monkeypatch.setattr(timing.importlib.util, 'find_spec', lambda name: None)
    rows = timing.time_formats(models, torch.randn(1, 3, 64, 64), ['eager', 'openvino'], rounds=1)
    assert [(row['format'], row['model']) for row in rows] == [('eager', 'static'),
                                                               ('eager', 'dynamic')]


def test_what_the_table_cannot_have_is_refused_at_once(config, monkeypatch, capsys):
    tool = str(digits.ROOT / 'tools/deployment/benchmark.py')
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', str(config), '--size', '0', '64'])
    with pytest.raises(SystemExit):
        runpy.run_path(tool, run_name='__main__')
    assert '--size is 0 64, where at least 1 1 was expected' in capsys.readouterr().err
    config.write_text(config.read_text() + "test_evaluator = dict(metric='proposal')")
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', str(config), '--static', 'none.pth'])
    with pytest.raises(SystemExit, match="^error: The config's test_evaluator is not one of "):
        runpy.run_path(tool, run_name='__main__')


def test_a_trained_detector_is_timed_on_an_image_of_its_test_set(config, tmp_path, monkeypatch,
                                                                 capsys):
    digits.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    # As a trained one's, but that nothing is found, which is said.
    loaded = Config.fromfile(config)
    timing.make_static(loaded.model)
    torch.save(build_model(loaded).state_dict(), 'static.pth')
    config.write_text(config.read_text() + "model['test_cfg'] = dict(rcnn=dict(score_thr=1.0))")
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', str(config), '--static', 'static.pth',
                                      '--formats', 'eager', '--rounds', '1'])
    runpy.run_path(str(digits.ROOT / 'tools/deployment/benchmark.py'), run_name='__main__')
    said = ' '.join(capsys.readouterr().out.split())
    assert 'detector, one image of 192x192, ' in said and said.count('none found') == 2


def test_a_trained_detector_beside_a_random_one_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', 'x.py', '--checkpoint', 'x.pth'])
    with pytest.raises(SystemExit):
        runpy.run_path(str(digits.ROOT / 'tools/deployment/benchmark.py'), run_name='__main__')
    assert '--checkpoint was given without --static' in capsys.readouterr().err


def test_map_through_what_runs_it(config, tmp_path, monkeypatch):
    """Each with weights of its own; what finds exactly the objects has a mAP of 1."""
    digits.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    loaded = Config.fromfile(config)
    torch.save(build_model(loaded).state_dict(), 'dynamic.pth')
    models = timing.counterparts(loaded, 'detector', dict(dynamic='dynamic.pth'))
    weights = torch.load('dynamic.pth')
    assert torch.equal(models['dynamic'].model.rpn_head.rpn_cls.weight,
                       weights['rpn_head.rpn_cls.weight'])
    dataset = DATASETS.build(loaded.test_dataloader.dataset)
    samples = itertools.cycle([dataset[i]['data_samples'] for i in range(len(dataset))])

    def oracle(image):
        sample = next(samples)  # whose boxes are in pixels of the original image
        found, scale = sample.gt_instances, torch.tensor(sample.scale_factor).repeat(2)
        return [found.bboxes.tensor * scale, torch.ones(len(found.labels)), found.labels]

    for _ in range(2):  # as for two formats
        assert timing.mean_average_precision(loaded, models['dynamic'], oracle) == pytest.approx(1)


@pytest.mark.parametrize('value', [0.0, float('nan')])
def test_a_wrong_answer_is_told(config, monkeypatch, value):
    monkeypatch.setattr(timing, 'Runtime',
                        lambda path, kind: lambda x: [torch.full((1, 8, 16, 16), value)])
    models = timing.counterparts(Config.fromfile(config), 'backbone')
    with pytest.raises(InputError, match='^static in onnxruntime differs from torch by '):
        timing.time_formats(models, torch.randn(1, 3, 64, 64), ['onnxruntime'])


def test_what_this_machine_cannot_run_is_a_row(config, monkeypatch):
    """As without a compiler, or off x86-64, where onnxruntime has no blocked layout."""
    models = timing.counterparts(Config.fromfile(config), 'backbone')
    prepared = timing._prepared

    def prepare(kind, *args):
        if kind == broken:
            raise RuntimeError('no compiler\nin any path')
        return prepared(kind, *args)

    monkeypatch.setattr(timing, '_prepared', prepare)
    broken = 'compile'
    rows = timing.time_formats(models, torch.randn(1, 3, 64, 64), ['eager', 'compile'], rounds=1)
    assert [row.get('refused') for row in rows] == [None, None, 'no compiler', 'no compiler']
    broken = 'eager'
    with pytest.raises(RuntimeError):
        timing.time_formats(models, torch.randn(1, 3, 64, 64), ['eager'], rounds=1)
