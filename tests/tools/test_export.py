"""The export command on detectors of the quickstart's kind: the file detects what they detect."""
import copy
import functools
import importlib.util
import json
import math
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import cv2
import digits
import mmcv
import numpy as np
import pytest
import torch
from mmdet.apis import DetInferencer, inference_detector
from mmdet.models import DetDataPreprocessor
from mmdet.registry import DATASETS, TRANSFORMS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from torch import nn

import mmdet_odconv
from mmdet_odconv import InputError
from mmdet_odconv.checkpoints.swapping import build_model
from mmdet_odconv.deployment import evaluation
from mmdet_odconv.deployment.detector import TensorDetector
from mmdet_odconv.deployment.evaluation import ExportedDetector
from mmdet_odconv.deployment.export import (
    FORMATS,
    Runtime,
    as_program,
    compare,
    load_detector,
    mask_threshold,
    write_onnx,
)
from mmdet_odconv.deployment.preprocessing import (
    Preprocessing,
    Resize,
    described,
    example_images,
    resize_of,
)

CONFIG = """
_base_ = {base!r}
model = dict(
    backbone=dict(depth=10, base_channels=8, stem_channels=8, kernel_num=2),
    neck=dict(in_channels=[8, 16, 32, 64]), test_cfg=dict(rcnn=dict(max_per_img=20)))
test_dataloader = dict(batch_size=2)
test_pipeline = []  # a variable, which no loader reads
"""


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """Four images, and tiny Faster and Mask R-CNNs with random weights."""
    root = tmp_path_factory.mktemp('export')
    digits.make(root)
    for kind in ('faster', 'mask'):
        base = digits.ROOT / f'configs/quickstart/{kind}-rcnn_od-r18-k4_fpn_digits.py'
        (root / f'{kind}.py').write_text(CONFIG.format(base=str(base)))
        torch.manual_seed(0)
        model = build_model(Config.fromfile(root / f'{kind}.py'))
        for name, parameter in model.named_parameters():
            if '_fc' in name:  # or all images would have one kernel
                parameter.data.normal_(std=0.14)
        torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(
            classes=tuple('0123456789')))), root / f'{kind}.pth')
    return root


@pytest.fixture
def run(root, monkeypatch, capsys):
    """Run a command in ``root``; returns what it exited with and what it printed."""

    def run(tool, *args):
        monkeypatch.chdir(root)
        script = str(digits.ROOT / 'tools' / tool)
        monkeypatch.setattr(sys, 'argv', [script, *map(str, args)])
        code = None
        try:
            runpy.run_path(script, run_name='__main__')
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().out

    return run


@pytest.fixture
def export(run):
    return functools.partial(run, 'deployment/export.py')


def detector(root, kind):
    config = Config.fromfile(root / f'{kind}.py')
    model = build_model(config)
    model.load_state_dict(torch.load(root / f'{kind}.pth')['state_dict'])
    return config, model.eval()


@pytest.mark.parametrize(('kind', 'options'), [
    ('faster', ('--evaluate', )), ('mask', ('--fuse', '--normalize', '--opset', '16'))])
def test_onnx(root, export, kind, options):
    code, said = export(f'{kind}.py', f'{kind}.pth', '--out', f'{kind}.onnx', *options)
    assert code is None, code
    checked = re.findall(r'(\d+)x(\d+): 20 detections equal, boxes within', said)
    assert len(set(checked)) == 2
    description = json.loads((root / f'{kind}.json').read_text())
    assert description['classes'] == list('0123456789')
    assert ('mean' in description['input']) == (kind == 'faster')
    assert [step['type'] for step in description['input']['resize']] == ['Resize']
    assert '_scope_' not in description['input']['resize'][0]
    assert description.get('mask_threshold') == (0.5 if kind == 'mask' else None)
    if '--evaluate' in options:
        (plain, ), (exported, ) = (re.findall(rf'{name}: bbox_mAP (\S+),', said)
                                   for name in ('PyTorch', 'faster.onnx'))
        assert plain == exported

    # In MMDetection's hands: boxes and masks in pixels of the original images.
    config, model = detector(root, kind)
    data = pseudo_collate([DATASETS.build(config.test_dataloader.dataset)[i] for i in range(2)])
    with torch.no_grad():
        expected = [sample.pred_instances for sample in model.test_step(data)]
    if '--normalize' in options:
        exported = ExportedDetector(Runtime(root / f'{kind}.onnx'), model.data_preprocessor,
                                    normalize=True)
        results = exported.test_step(data)
    else:  # the guide's own lines, which ``root`` is the working directory of
        guide = (digits.ROOT / 'docs/guides/deployment.md').read_text()
        lines, = re.findall(r"```python\n(from pathlib[^`]*ExportedDetector[^`]*)```", guide)
        (root / f'{kind}.onnx').rename(root / 'model.onnx')
        names = dict(model=model, batch=data)
        exec(lines, names)
        results = names['results']
    for found, wanted in zip(results, expected, strict=True):
        found = found.pred_instances
        assert len(found.bboxes) == 20
        torch.testing.assert_close(found.bboxes, wanted.bboxes, rtol=0, atol=1e-2)
        torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=1e-5)
        assert torch.equal(found.labels, wanted.labels)
        if kind == 'mask':
            assert (found.masks != wanted.masks).float().mean() < 1e-3


LAZY = '''
from mmcv.transforms import LoadImageFromFile, Resize
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs

test_dataloader = dict(dataset=dict(datasets=[dict(pipeline=[
    dict(type=LoadImageFromFile), dict(type=Resize, scale=(64, 48), keep_ratio=True),
    dict(type=LoadAnnotations, with_bbox=True), dict(type=PackDetInputs, meta_keys=())])]))
'''


def test_how_an_image_is_resized_is_said_of_any_config(tmp_path, monkeypatch):
    (tmp_path / 'lazy.py').write_text(LAZY)
    mmcv.imwrite(np.zeros((96, 96, 3), np.uint8), str(tmp_path / 'image.png'))
    given = Preprocessing(DetDataPreprocessor())
    config = Config.fromfile(tmp_path / 'lazy.py')
    assert described(config, given, ())['input']['resize'] == [
        dict(type='Resize', scale=(64, 48), keep_ratio=True)]
    image, _ = example_images(config, given, [str(tmp_path / 'image.png')])
    assert image.shape == (1, 3, 48, 48)
    assert described(Config({}), given, ())['input']['resize'] is None
    inside = Preprocessing(DetDataPreprocessor(), normalize=True, resize=resize_of(config))
    assert described(config, inside, ())['input']['resize'] == 'in the file'
    image, _ = example_images(config, inside, [str(tmp_path / 'image.png')])
    assert image.shape == (1, 3, 96, 96)
    with pytest.raises(InputError, match='no test_dataloader, whose pipeline prepares images'):
        example_images(Config({}), given, ['image.png'])
    log = Mock()
    monkeypatch.setattr('mmdet_odconv.deployment.preprocessing.print_log', log)
    assert len(example_images(Config({}), given, [])) == 2
    said, = log.call_args.args
    assert said.startswith('No image of a test set is here (the config has no test_dataloader)')


def test_torchscript(export):
    code, said = export('faster.py', 'faster.pth', '--out', 'script.pt', '--format', 'torchscript')
    assert code is None and said.count('20 detections equal') == 2


def test_a_detector_with_fdconv(root, export):
    text = (root / 'faster.py').read_text().replace(
        'kernel_num=2)', "conv_cfg=dict(type='FDConv2d', kernel_num=4))")
    (root / 'fd.py').write_text(text)
    torch.manual_seed(0)
    model = build_model(Config.fromfile(root / 'fd.py'))
    for name, parameter in model.named_parameters():
        if any(part in name for part in ('_fc', 'KSM_Local.conv', 'FBM')):
            parameter.data.normal_(std=0.14)
    torch.save(model.state_dict(), root / 'fd.pth')
    code, said = export('fd.py', 'fd.pth', '--out', 'fd.pt', '--format', 'torchscript', '--fuse')
    assert code is None and len(re.findall(r'\d+x\d+: [1-9]\d* detections equal', said)) == 2


@pytest.mark.parametrize(('kind', 'options'), [
    ('mask', ('--resize', '--batch', 'dynamic')), ('faster', ('--resize', '--nchwc'))])
def test_a_file_that_takes_pictures_as_they_are(root, export, kind, options):
    """It detects in them, and answers in their pixels, what MMDetection does."""
    text = (root / f'{kind}.py').read_text()
    (root / 'resizing.py').write_text(text + RESIZING)
    code, said = export('resizing.py', f'{kind}.pth', '--out', 'whole.onnx', '--evaluate',
                        '--force', *options)
    assert code is None, code
    plain, exported = (re.search(rf'{name}: bbox_mAP (\S+),', said).group(1)
                       for name in ('PyTorch', 'whole.onnx'))
    assert float(exported) == pytest.approx(float(plain), abs=1e-3)
    description = json.loads((root / 'whole.json').read_text())
    assert description['input'] == dict(
        resize='in the file', channels='BGR', values='0 to 255',
        layout=f'({"images" if kind == "mask" else 1}, 3, height, width), float32')
    assert ('images' in description['outputs']) == (kind == 'mask')

    config, model = detector(root, kind)
    config.merge_from_dict(Config.fromstring(RESIZING[1:], '.py'))
    run = Runtime(root / 'whole.onnx')
    data = pseudo_collate([DATASETS.build(config.test_dataloader.dataset)[i] for i in range(2)])
    results = ExportedDetector(run, model.data_preprocessor, resize=True,
                               batched=kind == 'mask').test_step(copy.deepcopy(data))
    with torch.no_grad():
        plain = model.test_step(data)
    for found, wanted in zip(results, plain, strict=True):
        found, wanted = found.pred_instances, wanted.pred_instances
        near = torch.cdist(found.bboxes, wanted.bboxes, p=float('inf')) < 0.5
        assert len(found.bboxes) == 20 and near.any(1).sum() > 10  # of another image, hardly any
    model.cfg = config
    pictures = [mmcv.imread(str(path)) for path in sorted((root / 'data/digits/val').iterdir())[:2]]
    pictures = [np.concatenate([picture, picture[:40]]) for picture in pictures]
    expected = [inference_detector(model, picture).pred_instances for picture in pictures]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    batches = [images] if kind == 'mask' else images.split(1)
    for wanted, found in zip(expected, split(run, batches, kind == 'mask'), strict=True):
        boxes, scores, labels, *_ = found
        # OpenCV's grey values are whole, to which random weights are sensitive.
        near = (torch.cdist(boxes, wanted.bboxes, p=float('inf')) < 0.5) & (
            labels[:, None] == wanted.labels) & ((scores[:, None] - wanted.scores).abs() < 0.01)
        assert len(boxes) == 20 and near.any(1).sum() > 10


RESIZING = """
test_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(250, 225), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                                          'scale_factor'))]))
"""


def split(run, batches, batched):
    """What a file answers, image by image."""
    for batch in batches:
        outputs = run(batch)
        if not batched:
            yield outputs
            continue
        of_image = outputs.pop(3)
        assert (of_image.diff() >= 0).all()
        for i in range(len(batch)):
            yield [output[of_image == i] for output in outputs]


@pytest.mark.parametrize('scale', [(250, 225), (1333, 800), (96, 40), (61, 61)])
@pytest.mark.parametrize('keep_ratio', [True, False])
@pytest.mark.parametrize('size', [(50, 75), (199, 101), (480, 640)])
def test_resizing_is_mmcvs(size, scale, keep_ratio):
    picture = cv2.GaussianBlur(np.random.RandomState(0).randint(0, 256, (*size, 3), np.uint8),
                               (5, 5), 0)
    wanted = TRANSFORMS.build(dict(type='mmdet.Resize', scale=scale, keep_ratio=keep_ratio))(
        dict(img=picture))['img']
    image = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    found = Resize(scale, keep_ratio)(image)
    assert found.shape[2:] == wanted.shape[:2]
    difference = (found - torch.from_numpy(wanted).permute(2, 0, 1)).abs()
    assert difference.max() < 1 and difference.mean() < 0.3  # OpenCV rounds


class Resizing(nn.Module):

    def forward(self, image):
        return Resize((1333, 800), True)(image[:, :1])


@pytest.mark.parametrize('engine', ['onnxruntime', 'openvino'])
def test_a_graph_finds_the_sizes_that_mmcv_finds(tmp_path, engine):
    """In double precision: in single, these are one pixel off."""
    if importlib.util.find_spec(engine) is None:
        pytest.skip(f'{engine} is not installed')
    write_onnx(Resizing(), torch.rand(1, 3, 60, 80), tmp_path / 'resize.onnx', ['image_'],
               {2: 'rows', 3: 'columns'})
    run = Runtime(tmp_path / 'resize.onnx', engine)
    for size in ((396, 792), (1111, 704), (75, 100), (480, 640), (1200, 333)):
        wanted = TRANSFORMS.build(dict(type='mmdet.Resize', scale=(1333, 800), keep_ratio=True))(
            dict(img=np.zeros((*size, 3), np.uint8)))['img_shape']
        assert run(torch.rand(1, 3, *size))[0].shape[2:] == wanted


@pytest.mark.skipif(not hasattr(torch.compiler, 'is_exporting'), reason='torch before 2.7')
def test_program(root):
    """Of two stages; kept in a file, which takes as long again, is one of a DETR's elsewhere."""
    two_stages = TensorDetector(mmdet_odconv.fuse(detector(root, 'faster')[1]))
    images = [torch.randn(1, 3, *size) for size in ((192, 192), (172, 144))]
    found = compare(two_stages, as_program(two_stages, images[0]).module(), images)
    assert [f['detections'] for f in found] == [20, 20]


def test_half(root, export, monkeypatch):
    """Half the bytes, and what the detector with rounded weights finds, exactly.

    Evaluated beside it is the detector as it was: what rounding costs is to be seen.
    """
    seen = {}
    monkeypatch.setattr(evaluation, 'evaluate', lambda config, models, _: seen.update(models) or {})
    code, said = export('faster.py', 'faster.pth', '--out', 'half.onnx', '--half', '--evaluate')
    given, evaluated = torch.load(root / 'faster.pth')['state_dict'], seen['PyTorch'].state_dict()
    assert all(torch.equal(tensor, evaluated[name]) for name, tensor in given.items())
    assert code is None and said.count('20 detections equal') == 2
    assert (root / 'half.onnx').stat().st_size < 0.65 * (root / 'faster.pth').stat().st_size


def test_what_cannot_be_exported_is_named(root, export):
    def refused(*args):
        code, _ = export(*args, '--out', 'refused.onnx')
        assert not (root / 'refused.onnx').exists() and not (root / 'refused.json').exists()
        return code

    (root / 'soft.py').write_text(
        "_base_ = './faster.py'\nmodel = dict(test_cfg=dict(rcnn=dict(nms=dict(type='soft_nms'))))")
    assert refused('soft.py', 'faster.pth').startswith(
        "error: The test_cfg of the roi_head has nms={'type': 'soft_nms', 'iou_threshold': 0.5}, w")
    (root / 'fd.py').write_text(
        "_base_ = './faster.py'\nmodel = dict(backbone=dict(kernel_num=4, conv_cfg=dict("
        "type='FDConv2d')))")
    config = Config.fromfile(root / 'fd.py')
    torch.save(build_model(config).state_dict(), root / 'fd.pth')
    assert re.match(r'error: backbone\.\S+ is an FDConv2d, whose Fourier transform of kernels',
                    refused('fd.py', 'fd.pth'))
    for opset in '15', '21':
        assert refused('faster.py', 'faster.pth', '--opset', opset).startswith(
            f'error: opset is {opset}, where 16, the first whose RoiAlign knows where')
    assert refused('faster.py', 'faster.pth', '--image', 'none.jpg') == (
        'error: none.jpg does not exist: give another --image.')
    (root / 'dcn.py').write_text(
        "_base_ = './faster.py'\nmodel = dict(backbone=dict(depth=50, dcn=dict("
        "type='DCNv2'), stage_with_dcn=(False, False, False, True)), "
        'neck=dict(in_channels=[32, 64, 128, 256]))')
    config = Config.fromfile(root / 'dcn.py')
    torch.save(build_model(config).state_dict(), root / 'dcn.pth')
    for format in ('onnx', 'torchscript'):
        path = root / f'refused{FORMATS[format]}'
        code, _ = export('dcn.py', 'dcn.pth', '--out', path, '--format', format)
        assert re.match(r'error: backbone\.\S+ is a deformable convolution', code)
        assert not path.exists()
    assert refused('faster.py', 'faster.pth', '--format', 'torchscript', '--half').startswith(
        'error: half is for onnx, and the format is torchscript')
    for option, sentence in (('--batch', 'nchwc is for one image, whose kernels'),
                             ('--format', 'nchwc is for onnx, and the format is torchscript')):
        value = 'dynamic' if option == '--batch' else 'torchscript'
        assert refused('faster.py', 'faster.pth', '--nchwc', option, value).startswith(
            f'error: {sentence}')
    for options in (('--batch', 'dynamic'), ('--resize', )):
        code, _ = export('faster.py', 'faster.pth', '--out', 'refused.pt2', '--format', 'pt2',
                         *options)
        assert code.startswith('error: A program of torch.export takes one image that is resized')
        assert not (root / 'refused.pt2').exists()
    (root / 'padded.py').write_text(
        "_base_ = './faster.py'\ntest_dataloader = dict(dataset=dict(pipeline=["
        "dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64), keep_ratio=True), "
        "dict(type='Pad', size=(64, 64)), dict(type='PackDetInputs')]))")
    assert re.match(r"error: The test pipeline prepares images by \[.*'Pad'.*\], which the graph "
                    'cannot: expected one bilinear Resize', refused(
                        'padded.py', 'faster.pth', '--resize'))
    for step in ("dict(type='RandomFlip', prob=1.0)", "dict(type='Resize', scale=(9, 9))",
                 "dict(type='LoadImageFromFile', color_type='grayscale')"):
        (root / 'other.py').write_text((root / 'padded.py').read_text().replace(
            "dict(type='Pad', size=(64, 64))", step))
        assert refused('other.py', 'faster.pth', '--resize').startswith(
            'error: The test pipeline prepares images by [')
    (root / 'bad.jpg').write_bytes(b'no image')
    assert refused('faster.py', 'faster.pth', '--resize', '--image', 'bad.jpg') == (
        'error: bad.jpg could not be read as an image: give another.')
    assert refused('mask.py', 'faster.pth').startswith('error: faster.pth lacks ')
    (root / 'rpn.py').write_text(
        "_base_ = './faster.py'\nmodel = dict(roi_head=dict(bbox_roi_extractor=dict("
        "type='GenericRoIExtractor')))")
    assert refused('rpn.py', 'faster.pth').startswith(
        'error: The roi_head.roi_extractor is a GenericRoIExtractor, which predicts in a way of')


@pytest.mark.parametrize(('missing', 'sentence'), [
    ('onnx', 'error: onnx is not installed, which writes the file: pip install'),
    ('onnxruntime', 'error: onnxruntime is not installed, which checks the file: pip install')])
def test_what_export_needs_is_asked_for_at_once(export, monkeypatch, missing, sentence):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec',
                        lambda name, *args: None if name == missing else find_spec(name, *args))
    assert export('faster.py', 'faster.pth', '--out', 'no.onnx')[0].startswith(sentence)


def test_weights_that_name_no_classes(root, run, monkeypatch):
    state = torch.load(root / 'faster.pth', weights_only=False)['state_dict']
    torch.save(state, root / 'bare.pth')
    _, classes = load_detector(Config.fromfile(root / 'faster.py'), str(root / 'bare.pth'))
    assert classes == tuple('0123456789')
    seen = []
    call = DetInferencer.__call__
    monkeypatch.setattr(DetInferencer, '__call__', lambda self, inputs, **options: seen.append(
        self.visualizer.dataset_meta['classes']) or call(self, inputs, **options))
    source = next((root / 'data/digits/val').iterdir())
    code, _ = run('image_demo.py', source, 'faster.py', '--weights', 'bare.pth', '--out', 'bare',
                  '--device', 'cpu')
    assert code is None and seen == [tuple('0123456789')]


def test_the_masks_of_a_file_are_those_of_the_configs_threshold(root, monkeypatch):
    monkeypatch.chdir(root)
    config, model = detector(root, 'mask')
    assert mask_threshold(model) == 0.5
    model.roi_head.test_cfg.mask_thr_binary = 0.9
    assert mask_threshold(model) == 0.9
    assert mask_threshold(detector(root, 'faster')[1]) is None
    exported = ExportedDetector(TensorDetector(model), model.data_preprocessor,
                                mask_threshold=mask_threshold(model))
    data = pseudo_collate([DATASETS.build(config.test_dataloader.dataset)[0]])
    with torch.no_grad():
        (found, ), (wanted, ) = exported.test_step(data), model.test_step(data)
    assert (found.pred_instances.masks != wanted.pred_instances.masks).float().mean() < 1e-3


def test_image_demo(root, run, monkeypatch):
    code, said = run('image_demo.py', 'data/digits/val', 'faster.py', '--weights', 'faster.pth',
                     '--out', 'demo', '--device', 'cpu')
    assert code is None and '4 images or frames: see demo/vis and demo/preds' in said
    assert len(list((root / 'demo/vis').iterdir())) == 4
    predictions = [json.loads(path.read_text()) for path in (root / 'demo/preds').iterdir()]
    assert [len(found['bboxes']) for found in predictions] == [20] * 4
    demo = ('faster.py', '--weights', 'faster.pth', '--device', 'cpu', '--out')
    (root / 'camera').mkdir()
    for source, name in zip((root / 'data/digits/val').iterdir(), ('2.JPG', '1.jpg', '3.PNG')):
        mmcv.imwrite(mmcv.imread(str(source)), str(root / 'camera' / name.lower()))
        (root / 'camera' / name.lower()).rename(root / 'camera' / name)
    (root / 'camera/notes.txt').touch()
    given = []
    call = DetInferencer.__call__
    monkeypatch.setattr(DetInferencer, '__call__', lambda self, inputs, **options: given.append(
        [Path(path).name for path in inputs]) or call(self, inputs, **options))
    code, said = run('image_demo.py', 'camera', *demo, 'camera-out', '--batch-size', '2')
    assert code is None and '3 images or frames' in said
    assert given == [['1.jpg', '2.JPG'], ['3.PNG']]  # of which it keeps pictures until it is done
    drawn = {path: path.read_bytes() for path in (root / 'demo/vis').iterdir()}
    code, _ = run('image_demo.py', 'data/digits/val', *demo, 'demo')
    assert re.match(r'error: demo/vis/\S+ exists already: give another name, or --force', code)
    code, _ = run('image_demo.py', 'demo/vis', *demo, 'demo', '--force')
    assert code.startswith('error: demo/vis is where pictures with detections are written: give')
    assert all(path.read_bytes() == content for path, content in drawn.items())
    (root / 'twins').mkdir()
    for name in ('a.png', 'a.jpg'):
        cv2.imwrite(str(root / 'twins' / name), np.zeros((64, 64, 3), np.uint8))
    code, _ = run('image_demo.py', 'twins', *demo, 'twins-out')
    assert 'would be one file, preds/a.json: rename one of them' in code
    (root / 'clip.mov').write_bytes(b'')
    code, _ = run('image_demo.py', 'clip.mov', *demo, 'clip')
    assert code == 'error: clip.mov is neither an image nor a video in MP4 or AVI: convert it.'
    state = torch.load(root / 'faster.pth', weights_only=False)['state_dict']
    torch.save(dict(state_dict={name: value for name, value in state.items()
                                if name.startswith('backbone.')}), root / 'backbone.pth')
    code, _ = run('image_demo.py', 'data/digits/val', 'faster.py', '--weights', 'backbone.pth',
                  '--device', 'cpu')
    assert re.match(r'error: backbone.pth lacks \d+ tensors of the config, such as', code)
    code, _ = run('image_demo.py', 'camera', 'faster.py', '--weights', 'faster.pth', '--device',
                  'gpu', '--out', 'x')
    assert code.startswith('error: The device gpu is not here (')
    code, _ = run('image_demo.py', 'camera', *demo, 'faster.py')
    assert code == 'error: faster.py is a file: give a folder to write to.'
    (root / 'none.py').write_text("_base_ = './faster.py'\ntest_dataloader = None\n"
                                  'test_cfg = None\ntest_evaluator = None')
    code, _ = run('image_demo.py', 'camera', 'none.py', *demo[1:], 'x')
    assert code.startswith('error: The config has no test_dataloader, whose pipeline prepares')
    code, _ = run('image_demo.py', 'camera', *demo, 'camera-out', '--batch-size', '0')
    assert code.startswith('error: batch_size is 0, where at least one')
    code, _ = run('image_demo.py', 'none.jpg', 'faster.py', '--weights', 'faster.pth')
    assert code.startswith('error: none.jpg does not exist: give an image')
    code, _ = run('image_demo.py', 'data/digits/val', 'faster-rcnn_od-r18-k4', '--weights', 'x.pth')
    assert 'did you mean faster-rcnn_od-r18-k4_fpn_digits.py' in code


def test_image_demo_of_many_classes_and_a_test_set_made_of_several(root, run):
    """More classes than COCO's palette has colours, which new-config's configs inherit."""
    base = re.search(r"_base_ = '(.+)'", (root / 'faster.py').read_text()).group(1)
    pipeline = Config.fromfile(base).test_dataloader.dataset.pipeline
    (root / 'many.py').write_text(f"""
_base_ = './faster.py'
classes = tuple(f'class {{i}}' for i in range(120))
model = dict(roi_head=dict(bbox_head=dict(num_classes=120)),
             test_cfg=dict(rcnn=dict(score_thr=0.0)))
test_dataloader = dict(dataset=dict(_delete_=True, type='ConcatDataset', datasets=[dict(
    type='CocoDataset', metainfo=dict(classes=classes), pipeline={pipeline})]))
""")
    torch.save(build_model(Config.fromfile(root / 'many.py')).state_dict(), root / 'many.pth')
    code, said = run('image_demo.py', 'data/digits/val', 'many.py', '--weights', 'many.pth',
                     '--out', 'many', '--device', 'cpu', '--score', '0')
    assert code is None and '4 images or frames' in said
    found = [label for path in (root / 'many/preds').iterdir()
             for label in json.loads(path.read_text())['labels']]
    assert max(found) >= 80


@pytest.mark.parametrize(('name', 'codec'), [('clip.avi', 'MJPG'), ('clip.mp4', 'mp4v')])
def test_image_demo_of_a_video(root, run, monkeypatch, name, codec):
    """A frame is detected in as an image is, and drawn on."""
    shape = (96, 128, 3)
    writer = cv2.VideoWriter(str(root / name), cv2.VideoWriter.fourcc(*codec), 5, shape[1::-1])
    for _ in range(3):
        writer.write(np.random.randint(0, 255, shape, np.uint8))
    writer.release()
    demo = ('image_demo.py', name, 'faster.py', '--weights', 'faster.pth', '--out', codec,
            '--device', 'cpu', '--score', '0')
    code, said = run(*demo)
    assert code is None and '3 images or frames' in said
    video, drawn = (list(mmcv.VideoReader(str(root / path))) for path in (name,
                                                                          f'{codec}/vis/{name}'))
    assert len(video) == len(drawn) == 3 and drawn[0].shape == shape
    assert np.abs(drawn[0].astype(int) - video[0]).max() > 100
    # In a picture a box has the same colour, however either was compressed.
    mmcv.imwrite(video[0], str(root / f'{codec}.png'))
    run('image_demo.py', f'{codec}.png', *demo[2:])
    picture = mmcv.imread(str(root / codec / f'vis/{codec}.png')).astype(int)
    apart, swapped = (np.abs(picture - other).mean() for other in (drawn[0], drawn[0][..., ::-1]))
    assert apart < swapped / 2
    predictions = json.loads((root / codec / 'preds/clip.json').read_text())
    config, model = detector(root, 'faster')
    model.cfg = config
    expected = inference_detector(model, video[0]).pred_instances
    torch.testing.assert_close(torch.tensor(predictions[0]['bboxes']), expected.bboxes)
    assert len(predictions) == 3
    (root / 'broken.mp4').write_bytes(b'no video')
    code, _ = run('image_demo.py', 'broken.mp4', 'faster.py', '--weights', 'faster.pth', '--device',
                  'cpu')
    assert code.startswith('error: broken.mp4 could not be read as a video')
    unopened = SimpleNamespace(isOpened=lambda: False)  # as OpenCV's is without such a codec
    monkeypatch.setattr(cv2, 'VideoWriter', Mock(return_value=unopened))
    assert f'{codec}/vis/{name} exists already' in run(*demo)[0]
    assert run(*demo, '--force')[0].startswith(
        f'error: OpenCV here cannot write {name[-4:]} videos: convert')


def test_configs_by_name(tmp_path):
    path = mmdet_odconv.config_path('faster-rcnn_od-r50-k4_fpn_1x_coco')
    assert mmdet_odconv.config_path(path) == path
    mine = tmp_path / 'mine.py'
    mine.write_text("_base_ = 'mmdet_odconv::odconv/faster-rcnn_od-r50-k4_fpn_1x_coco.py'")
    assert Config.fromfile(mine).model == Config.fromfile(path).model


def test_a_file_that_differs_is_not_written(root, export, monkeypatch):
    right = TensorDetector(detector(root, 'faster')[1])
    module = 'mmdet_odconv.deployment.export'
    monkeypatch.setattr(f'{module}.write_onnx', lambda *args: None)
    monkeypatch.setattr(f'{module}.Runtime', lambda path: lambda image: [
        value + (i == 0) for i, value in enumerate(right(image))])
    code, _ = export('faster.py', 'faster.pth', '--out', 'wrong.onnx')
    assert code.startswith('error: The file differs from the detector in an image of ')
    assert not (root / 'wrong.onnx').exists() and not (root / 'wrong.json').exists()
    monkeypatch.setattr(f'{module}.Runtime', lambda path: lambda image: [
        value * math.nan if i == 1 else value for i, value in enumerate(right(image))])
    code, _ = export('faster.py', 'faster.pth', '--out', 'wrong.onnx')
    assert code.startswith('error: The file differs') and 'nan in score' in code


def test_that_nothing_was_detected_and_so_compared_is_said(root, export):
    text = (root / 'faster.py').read_text().replace('rcnn=dict(', 'rcnn=dict(score_thr=1.0, ')
    (root / 'blind.py').write_text(text)
    code, said = export('blind.py', 'faster.pth', '--out', 'blind.onnx')
    assert code is None and ': 0 detections equal' in said
    assert 'Nothing was detected in them, so that no box was compared: give --image.' in said


def test_classes_of_a_checkpoint_of_mmdetection_2(root):
    weights = torch.load(root / 'faster.pth')['state_dict']
    torch.save(dict(state_dict=weights, meta=dict(CLASSES=('cat', 'dog'))), root / 'released.pth')
    config = Config.fromfile(root / 'faster.py')
    assert load_detector(config, str(root / 'released.pth'))[1] == ('cat', 'dog')
