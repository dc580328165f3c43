import importlib.util
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope

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
    ('faster-rcnn_r50_odfpn-k1_1x_coco.py', 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'),
    ('rtmdet_tiny-odconv-k1_8xb32-300e_coco.py', 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py'),
    ('yolox_tiny-odconv-k1_8xb8-300e_coco.py', 'yolox/yolox_tiny_8xb8-300e_coco.py')])
def test_the_static_alternative_is_the_detector_that_it_was(benchmark, name, static):
    DefaultScope.get_instance('test_benchmark', scope_name='mmdet')
    config = Config.fromfile(find_config(name)).model
    with torch.device('meta'):
        assert any(isinstance(m, DynamicConv2d) for m in MODELS.build(config).modules())
        benchmark.make_static(config)
        model = MODELS.build(config)
        assert not any(isinstance(m, DynamicConv2d) for m in model.modules())
        if static is not None:
            other = MODELS.build(Config.fromfile(
                Path(importlib.import_module('mmdet').__file__).parent / '.mim/configs' / static
            ).model)
            assert ({n: v.shape for n, v in model.state_dict().items()} ==
                    {n: v.shape for n, v in other.state_dict().items()})
