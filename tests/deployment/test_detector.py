"""Detectors of one stage as functions of tensors: what MMDetection's own predict answers."""
import re

import digits
import pytest
import torch
import torch.nn.functional as F
from mmdet.structures import DetDataSample
from mmengine.config import Config
from torch import nn

from mmdet_odconv import InputError
from mmdet_odconv.checkpoints.swapping import build_model
from mmdet_odconv.deployment.detector import TensorDetector
from mmdet_odconv.deployment.export import compare, export_detector
from mmdet_odconv.layers import DynamicConv2d

RESNET = dict(
    backbone=dict(depth=18, base_channels=8, stem_channels=8, kernel_num=2, init_cfg=None),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16))
CSP = dict(backbone=dict(deepen_factor=0.1, widen_factor=0.125),
           neck=dict(in_channels=[32, 64, 128], out_channels=16, num_csp_blocks=1))
HEAD = dict(in_channels=16, feat_channels=64, num_classes=5, stacked_convs=1)
ONE_STAGE = {
    'retinanet_od-r50-k4_fpn_1x_coco': RESNET, 'fcos_od-r50-k4_fpn_gn-head_1x_coco': RESNET,
    'atss_od-r50-k4_fpn_1x_coco': RESNET, 'rtmdet_tiny-odconv-k1_8xb32-300e_coco': CSP,
    'yolox_tiny-odconv-k1_8xb8-300e_coco': CSP,
}
IMAGES = [torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
          for size in ((96, 128), (160, 64))]


def one_stage(name, **changes):
    config = Config.fromfile(digits.ROOT / f'configs/swap/{name}.py')
    config.merge_from_dict(dict(model=dict(ONE_STAGE[name], bbox_head=HEAD)))
    config.merge_from_dict(changes)
    model = build_model(config).eval()
    spread(model)
    return model


def spread(model):
    """Give a fresh detector scores between 0 and 1, and images attentions of their own."""
    seen = set()

    def scale(conv, _, output):
        if conv not in seen:
            seen.add(conv)
            conv.weight.data.div_(output.std())
            return output / output.std()
        return output

    hooks = []
    for module in model.modules():
        if isinstance(module, DynamicConv2d):
            for name, parameter in module.attention.named_parameters():
                if '_fc' in name:
                    parameter.data.normal_(std=0.05)
        if isinstance(module, (nn.Conv2d, DynamicConv2d)):
            hooks.append(module.register_forward_hook(scale))
    with torch.no_grad():
        model.bbox_head(model.extract_feat(IMAGES[0]))
    for hook in hooks:
        hook.remove()
    for name, module in model.bbox_head.named_modules():
        if isinstance(module, nn.Conv2d) and re.search(r'(cls|obj|centerness)(\.\d)?$', name):
            module.bias.data.fill_(-1)


@torch.no_grad()
def predict(model, image):
    divisor = getattr(model.data_preprocessor, 'pad_size_divisor', 1)
    height, width = image.shape[2:]
    sample = DetDataSample(metainfo=dict(img_shape=(height, width), scale_factor=(1, 1)))
    padded = F.pad(image, (0, -width % divisor, 0, -height % divisor),
                   value=model.data_preprocessor.pad_value)
    return model.predict(padded, [sample])[0].pred_instances


@pytest.mark.parametrize('name', ONE_STAGE)
def test_one_stage(name, tmp_path):
    model = one_stage(name)
    detector = TensorDetector(model)
    for image in IMAGES:
        expected = predict(model, image)
        with torch.no_grad():
            boxes, scores, labels = detector(image)
        assert len(boxes) > 9 and len(labels.unique()) > 2 and scores[0] < 1 - 1e-6
        torch.testing.assert_close(boxes, expected.bboxes)
        torch.testing.assert_close(scores, expected.scores)
        assert torch.equal(labels, expected.labels)
    if name.startswith(('retinanet', 'yolox')):
        found = export_detector(detector, tmp_path / 'model.onnx', IMAGES)
        assert [f['detections'] for f in found] == [len(predict(model, x).bboxes) for x in IMAGES]


def test_what_predicts_in_a_way_of_its_own_is_named():
    name = 'retinanet_od-r50-k4_fpn_1x_coco'
    with pytest.raises(InputError, match='^The bbox_head is a PAAHead, which predicts in a way'):
        TensorDetector(one_stage(name, **{
            'model.bbox_head.type': 'PAAHead', 'model.bbox_head.loss_centerness': dict(
                type='mmdet.CrossEntropyLoss', use_sigmoid=True)}))
    model = one_stage(name)
    model.bbox_head.test_cfg.nms = dict(type='soft_nms', iou_threshold=0.5)
    with pytest.raises(InputError, match='^The test_cfg of the bbox_head has nms={.*soft_nms'):
        TensorDetector(model)
    with pytest.raises(ValueError, match='^The detector is in training mode'):
        TensorDetector(model.train())
    with pytest.raises(InputError, match='^The detector is a Conv2d, which predicts in a way'):
        TensorDetector(nn.Conv2d(3, 8, 1).eval())


def test_what_differs_is_told_apart():
    """Fewer detections, and as many in other places."""
    detector = TensorDetector(one_stage('retinanet_od-r50-k4_fpn_1x_coco'))
    with pytest.raises(InputError, match='^The file detects 7 objects in an image of 128x96, and'):
        compare(detector, lambda x: [out[:7] for out in detector(x)], IMAGES[:1])
    with pytest.raises(InputError, match='^The file differs from the detector in an image of'):
        compare(detector, lambda x: [out[:1].expand_as(out) for out in detector(x)], IMAGES[:1])
