"""The table of formats: each answers what torch does, a file of ONNX too."""
import runpy
import sys

import digits
import pytest
import torch
from mmengine.config import Config

from mmdet_odconv import InputError
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


def test_the_command(config, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', str(config), '--size', '64', '64', '--rounds',
                                      '1', '--formats', 'eager', 'onnxruntime'])
    runpy.run_path(str(digits.ROOT / 'tools/deployment/benchmark.py'), run_name='__main__')
    said = capsys.readouterr().out
    assert said.count('eager') == said.count('onnxruntime') == said.count('dynamic') == 2


def test_openvino_answers_the_same(config):
    pytest.importorskip('openvino')
    models = timing.counterparts(Config.fromfile(config), 'backbone')
    rows = timing.time_formats(models, torch.randn(1, 3, 64, 96), ['openvino'], rounds=1)
    assert [row['model'] for row in rows] == ['static', 'dynamic']
    assert max(row['error'] for row in rows) < 1e-4


def test_a_wrong_answer_is_told(config, monkeypatch):
    monkeypatch.setattr(timing, 'Runtime', lambda path, kind: lambda x: [torch.zeros(1, 8, 16, 16)])
    models = timing.counterparts(Config.fromfile(config), 'backbone')
    with pytest.raises(InputError, match='^static in onnxruntime differs from torch by '):
        timing.time_formats(models, torch.randn(1, 3, 64, 64), ['onnxruntime'])
