"""Detectors as functions of tensors and as files: one stage, cascades, DETRs, against predict."""
import re

import digits
import pytest
import torch
import torch.nn.functional as F
from mmdet.models import ConditionalDETRHead
from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.hub import get_config
from torch import nn

from mmdet_odconv import InputError
from mmdet_odconv.checkpoints.swapping import build_model
from mmdet_odconv.deployment.detector import TensorDetector
from mmdet_odconv.deployment.export import Runtime, compare, export_detector
from mmdet_odconv.layers import DynamicConv2d

RESNET = dict(
    backbone=dict(depth=10, base_channels=8, stem_channels=8, kernel_num=2, init_cfg=None,
                  dynamic_convs='layer4.*'),  # each costs an exporter a fifth of a second
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16))
CSP = dict(backbone=dict(deepen_factor=0.1, widen_factor=0.125),
           neck=dict(in_channels=[32, 64, 128], out_channels=16, num_csp_blocks=1))
HEAD = dict(in_channels=16, feat_channels=64, num_classes=5, stacked_convs=1)
ONE_STAGE = {
    'retinanet_od-r50-k4_fpn_1x_coco': RESNET, 'fcos_od-r50-k4_fpn_gn-head_1x_coco': RESNET,
    'atss_od-r50-k4_fpn_1x_coco': RESNET, 'rtmdet_tiny-odconv-k1_8xb32-300e_coco': CSP,
    'yolox_tiny-odconv-k1_8xb8-300e_coco': CSP,
}
DETRS = ['detr/detr_r50_8xb2-150e_coco.py', 'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
         'dino/dino-4scale_r50_8xb2-12e_coco.py']
# Of the last, no side is a multiple of anything, and a level of 64 px is one cell high.
IMAGES = [torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
          for size in ((96, 128), (160, 64), (61, 139))]


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


def cascade(masks):
    """Two stages of three heads, which tell regions apart."""
    kind = 'cascade-mask' if masks else 'cascade'
    config = get_config(f'mmdet::cascade_rcnn/{kind}-rcnn_r50_fpn_1x_coco.py')
    head = config.model.roi_head
    for bbox_head in head.bbox_head:
        bbox_head.update(in_channels=16, fc_out_channels=32, num_classes=5)
    head.bbox_roi_extractor.out_channels = 16
    changes = dict(RESNET, rpn_head=dict(in_channels=16, feat_channels=16),
                   test_cfg=dict(rpn=dict(max_per_img=40), rcnn=dict(max_per_img=20)))
    changes['backbone'] = dict(changes['backbone'], type='ODResNet')
    config.merge_from_dict(dict(model=changes))
    if masks:
        head.mask_roi_extractor.out_channels = 16
        head.mask_head.update(in_channels=16, conv_out_channels=16, num_classes=5)
    torch.manual_seed(2)  # whose weights find several classes
    model = build_model(config).eval()
    for name, parameter in model.named_parameters():
        if 'fc_cls' in name or 'fc_reg' in name or 'logits' in name or '_fc' in name:
            parameter.data.normal_(std=0.05 if 'reg' in name or 'bias' in name else 0.14)
    return model


@pytest.mark.parametrize('masks', [False, True])
def test_cascade(masks, tmp_path):
    model = cascade(masks)
    expected = [predict(model, x) for x in IMAGES]
    detector = TensorDetector(model)
    assert detector.output_names[3:] == ['masks'] * masks
    check_against_predict(detector, expected, 2)
    found = export_detector(detector, tmp_path / 'model.onnx', IMAGES)
    assert [f['detections'] for f in found] == [len(e.bboxes) for e in expected]


def detr(name):
    """Of one layer each, with weights that tell queries and images apart."""
    config = get_config(f'mmdet::{name}')
    multi_scale = not name.startswith('detr/')
    width = 256 if name.startswith('dino') else 16
    layer = {kind: dict(embed_dims=width, num_heads=4) for kind in ('self_attn_cfg',
                                                                    'cross_attn_cfg')}
    layer['ffn_cfg'] = dict(embed_dims=width, feedforward_channels=16)
    coders = [dict(num_layers=1, layer_cfg={kind: layer[kind] for kind in config.model[
        coder].layer_cfg if kind in layer}) for coder in ('encoder', 'decoder')]
    config.merge_from_dict(dict(model=dict(
        backbone=dict(RESNET['backbone'], type='ODResNet'), encoder=coders[0], decoder=coders[1],
        neck=dict(in_channels=[16, 32, 64] if multi_scale else [64], out_channels=width,
                  norm_cfg=dict(num_groups=4) if multi_scale else None),
        positional_encoding=dict(num_feats=width // 2), num_queries=20,
        bbox_head=dict(embed_dims=width, num_classes=5), test_cfg=dict(max_per_img=20))))
    if name.startswith('dino'):
        config.model.as_two_stage = True
    model = build_model(config).eval()
    if multi_scale:
        nn.init.normal_(model.level_embed)  # which is whatever the memory held
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and ('_fc' in name or not name.startswith('backbone')):
            alpha = 2 / width**0.5 if 'cls' in name else 0.5 if 'coder' in name else 0.05
            parameter.data.add_(torch.randn_like(parameter), alpha=alpha)
    return model


@torch.no_grad()
def predict(model, image, divisor=None):
    divisor = divisor or getattr(model.data_preprocessor, 'pad_size_divisor', 1)
    height, width = image.shape[2:]
    padded = F.pad(image, (0, -width % divisor, 0, -height % divisor),
                   value=model.data_preprocessor.pad_value)
    sample = DetDataSample(metainfo=dict(
        img_shape=(height, width), ori_shape=(height, width),
        batch_input_shape=padded.shape[2:], scale_factor=(1, 1)))
    return model.predict(padded, [sample])[0].pred_instances


def check_against_predict(detector, predictions, least_labels):
    for image, expected in zip(IMAGES, predictions):
        with torch.no_grad():
            boxes, scores, labels, *grids = detector(image)
        assert len(boxes) > 9 and len(labels.unique()) >= least_labels and scores[0] < 1 - 1e-6
        torch.testing.assert_close(boxes, expected.bboxes)
        torch.testing.assert_close(scores, expected.scores)
        assert torch.equal(labels, expected.labels)
        for grid in grids:
            pasted, _ = _do_paste_mask(grid[:, None], boxes, *image.shape[2:], skip_empty=False)
            assert ((pasted >= 0.5) != expected.masks).float().mean() < 1e-3
            assert 0.1 < expected.masks.float().mean() < 0.9


@pytest.mark.parametrize('name', ONE_STAGE)
def test_one_stage(name, tmp_path):
    """RTMDet's file pads itself, which in MMDetection the pipeline does."""
    model = one_stage(name)
    # Of 100, the configs' own, RetinaNet's last on the second image has the score of the next, and
    # rounding chooses; here no two scores at the cut are nearer than 2e-4.
    model.bbox_head.test_cfg.max_per_img = 88
    expected = [predict(model, x, 32 if name.startswith('rtmdet') else None) for x in IMAGES]
    detector = TensorDetector(model)
    check_against_predict(detector, expected, 3)
    found = export_detector(detector, tmp_path / 'model.onnx', IMAGES)
    assert [f['detections'] for f in found] == [len(e.bboxes) for e in expected]


@pytest.mark.parametrize('name', [*ONE_STAGE, 'cascade-mask-rcnn'])
def test_several_images_at_once(name, tmp_path):
    """Each is detected in as if it were alone, whatever the others hold."""
    model = cascade(True) if name == 'cascade-mask-rcnn' else one_stage(name)
    alone, batched = TensorDetector(model), TensorDetector(model, batched=True)
    assert batched.output_names[:4] == ['boxes', 'scores', 'labels', 'images']
    images = torch.cat([0.5 * IMAGES[0], IMAGES[0], IMAGES[0].flip(3)])
    with torch.no_grad():
        # So many that one has fewer, and one would have more.
        head = model.roi_head if name == 'cascade-mask-rcnn' else model.bbox_head
        head.test_cfg.max_per_img = -1
        most = sorted(len(alone(image[None])[0]) for image in images)[1]
        head.test_cfg.max_per_img = 20 if name.startswith('yolox') else most
        expected = [alone(image[None]) for image in images]
        outputs = list(batched(images))
    of_image = outputs.pop(3)
    counts = sorted(len(boxes) for boxes, *_ in expected)
    assert 0 < counts[0] < counts[1]
    if name.startswith('yolox'):  # whose head does not read that
        assert counts[0] > 20 and batched.most == -1
        assert counts == sorted(len(predict(model, image[None]).bboxes) for image in images)
    else:
        assert counts[1] == counts[2] == most
    for i, wanted in enumerate(expected):
        for a, b in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(a[of_image == i], b, rtol=1e-4, atol=1e-4)
    found = export_detector(TensorDetector(model, batched=True), tmp_path / 'model.onnx',
                            IMAGES[:2])
    assert found[-1]['detections'] > found[0]['detections'] > 0


@pytest.mark.parametrize('name', DETRS)
def test_detr(name, tmp_path):
    model = detr(name)
    detector = TensorDetector(model)
    check_against_predict(detector, [predict(model, x) for x in IMAGES],
                          2 if name.startswith('deformable') else 1)
    if not name.startswith('dino'):
        found = export_detector(detector, tmp_path / 'model.onnx', IMAGES)
        assert [f['detections'] for f in found] == [20] * len(IMAGES)


@pytest.mark.skipif(not hasattr(torch.compiler, 'is_exporting'), reason='torch before 2.7')
def test_program(tmp_path):
    """Drawn by torch.export, for sizes whose map is two cells wide and high or more."""
    detector = TensorDetector(detr(DETRS[0]))
    found = export_detector(detector, tmp_path / 'model.pt2', IMAGES, 'pt2')
    assert [f['detections'] for f in found] == [20] * len(IMAGES)
    with pytest.raises(InputError, match='^The file takes no image of 128x30: Guard failed'):
        Runtime(tmp_path / 'model.pt2')(IMAGES[0][:, :, :30])
    with pytest.raises(InputError, match=r'^encoder.layers.0.self_attn is multi-scale deformable'):
        export_detector(TensorDetector(detr(DETRS[1])), tmp_path / 'detr.pt2', IMAGES, 'pt2')
    with pytest.raises(InputError, match=r'model.bin is to be of onnx, whose files end in .onnx'):
        export_detector(detector, tmp_path / 'model.bin', IMAGES)


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
    with pytest.raises(InputError, match='^DETR draws a mask of padding for each image'):
        TensorDetector(detr(DETRS[0]), batched=True)
    with pytest.raises(InputError, match='^The bbox_head of a DETR is a ConditionalDETRHead, '):
        model = detr(DETRS[0])
        model.bbox_head.__class__ = ConditionalDETRHead
        TensorDetector(model)
    model = detr(DETRS[0])
    model.data_preprocessor.pad_size_divisor = 32
    with pytest.raises(InputError, match='^The data_preprocessor of a DETR has pad_size_divi'):
        TensorDetector(model)
    with pytest.raises(InputError, match='^The detector is a Conv2d, which predicts in a way'):
        TensorDetector(nn.Conv2d(3, 8, 1).eval())


def test_what_differs_is_told_apart(monkeypatch):
    """Fewer detections, and as many in other places; none are equal to none."""
    detector = TensorDetector(one_stage('retinanet_od-r50-k4_fpn_1x_coco'))
    with pytest.raises(InputError, match='^The file detects 7 objects in an image of 128x96, and'):
        compare(detector, lambda x: [out[:7] for out in detector(x)], IMAGES[:1])
    with pytest.raises(InputError, match='^The file differs from the detector in an image of'):
        compare(detector, lambda x: [out[:1].expand_as(out) for out in detector(x)], IMAGES[:1])
    # Of equal scores at the end of all that an image may have, rounding chooses.
    assert detector.most == 100

    def end_otherwise(image, score):
        boxes, scores, labels = (output.clone() for output in detector(image))
        boxes[-1], scores[-1] = boxes[-1].flip(0), scores[-1] + score
        return boxes, scores, labels

    (found, ) = compare(detector, lambda x: end_otherwise(x, 1e-6), IMAGES[:1])
    assert found['detections'] == 100 and found['compared'] == 99
    with pytest.raises(InputError, match='^The file differs from the detector in an image of'):
        compare(detector, lambda x: end_otherwise(x, 0.1), IMAGES[:1])
    # But not a file that answers anything, where a detector is as sure of all.
    boxes, scores, labels = (output.detach() for output in detector(IMAGES[0]))
    with monkeypatch.context() as patch:
        patch.setattr(detector, 'forward', lambda image: (boxes, 0 * scores + 0.5, labels))
        with pytest.raises(InputError, match='^The file differs from the detector in an image of'):
            compare(detector, lambda x: [boxes.flip(1), 0 * scores + 0.5, labels], IMAGES[:1])
    detector.most = 99
    with pytest.raises(InputError, match='^The file differs from the detector in an image of'):
        compare(detector, lambda x: end_otherwise(x, 1e-6), IMAGES[:1])
    detector.model.bbox_head.test_cfg.score_thr = 1
    (found, ) = compare(detector, detector, IMAGES[:1])
    assert found['detections'] == found['boxes'] == 0
