"""A detector of MMDetection as a function of tensors: images in, boxes, scores and labels out.

It computes what the detector's own ``predict`` does, without its Python objects and without
branches on values, so that a graph drawn on one image is right for every other. What is found in
several images lies in one row, beside the index of its image. Only detectors that are known to
predict so are taken; any other is refused by the name of the part.
"""
import math
from types import SimpleNamespace
from typing import Any, List, Optional, Sequence, Tuple

import torch
from mmcv.ops import RoIAlign
from mmdet.models import (
    BaseDetector,
    BaseRoIHead,
    BBoxHead,
    CascadeRoIHead,
    CSPNeXtPAFPN,
    DeformableDETRHead,
    DETRHead,
    FCNMaskHead,
    RPNHead,
    SingleRoIExtractor,
    SingleStageDetector,
    StandardRoIHead,
    TwoStageDetector,
    YOLOXHead,
)
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors.base_detr import DetectionTransformer
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from torch import Tensor, nn
from torch.onnx.operators import shape_as_tensor

from ..errors import InputError
from ..ops.exported import is_exporting
from .operators import nms, roi_align
from .preprocessing import Preprocessing, Resize

Found = Tuple[Tensor, Tensor, Tensor, Tensor]  # boxes, scores, labels, images

DENSE_METHODS = ('predict', 'predict_by_feat', '_predict_by_feat_single', '_bbox_post_process')
# Parts, with the classes whose way to predict is known here, by the methods that say it.
KNOWN = {
    'detector': tuple((cls, ('predict', )) for cls in (
        TwoStageDetector, SingleStageDetector, DetectionTransformer)),
    'rpn_head': ((RPNHead, DENSE_METHODS), ),
    'bbox_head': ((BaseDenseHead, DENSE_METHODS), (YOLOXHead, (*DENSE_METHODS, '_bbox_decode'))),
    'bbox_head of a DETR': tuple((cls, DENSE_METHODS[:3]) for cls in (
        DETRHead, DeformableDETRHead)),
    'roi_head': (
        (StandardRoIHead, ('predict', 'predict_bbox', 'predict_mask', '_bbox_forward',
                           '_mask_forward')),
        (CascadeRoIHead, ('predict', 'predict_bbox', 'predict_mask', '_bbox_forward',
                          '_mask_forward', '_refine_roi'))),
    'roi_head.bbox_head': ((BBoxHead, ('predict_by_feat', '_predict_by_feat_single',
                                       'regress_by_class')), ),
    'roi_head.mask_head': ((FCNMaskHead, ('predict_by_feat', '_predict_by_feat_single')), ),
    'roi_head.roi_extractor': ((SingleRoIExtractor, ('forward', 'map_roi_levels')), ),
}


class TensorDetector(nn.Module):
    """The function of tensors that a detector is at inference.

    Args:
        model: a detector, in evaluation mode, of two stages (Faster, Mask and Cascade R-CNN), of
            one whose head predicts as MMDetection's :class:`BaseDenseHead` or YOLOX's does, or a
            DETR whose head predicts as DETR's or Deformable DETR's does.
        normalize: whether images are as they were read, BGR values from 0 to 255, and normalising
            them is part of the function; otherwise they are normalised already.
        resize: how they are resized, if that is part of the function, too.
        batched: whether several images of one size are taken at once, and the index of its image
            answered with each detection.

    Attributes:
        output_names: of what is answered.
        most: how many detections an image may have, by the config.

    Raises:
        InputError: with the name of the part, if it predicts in a way that is not known here.
        ValueError: if the model is in training mode.
    """

    def __init__(self, model: BaseDetector, normalize: bool = False,
                 resize: Optional[Resize] = None, batched: bool = False) -> None:
        super().__init__()
        if any(module.training for module in model.modules() if list(module.children())):
            raise ValueError('The detector is in training mode: call model.eval() first.')
        _check('detector', model)
        self.model = model
        self.batched = batched
        self.two_stages = isinstance(model, TwoStageDetector)
        self.is_detr = isinstance(model, DetectionTransformer)
        divisor = getattr(model.data_preprocessor, 'pad_size_divisor', 1)
        if self.is_detr:
            _check('bbox_head of a DETR', model.bbox_head)
            if divisor != 1:
                raise InputError('The data_preprocessor of a DETR has pad_size_divisor='
                                 f'{divisor}, whose mask cannot be exported: expected 1.')
            if batched:
                raise InputError(f'{type(model).__name__} draws a mask of padding for each image, '
                                 'by a loop whose length a graph fixes, and cannot be exported '
                                 'for batches: leave --batch dynamic out.')
        elif self.two_stages:
            if not (model.with_rpn and model.with_roi_head):
                raise InputError(f'{type(model).__name__} has no rpn_head or no roi_head, and '
                                 'cannot be exported without.')
            _check_head('rpn_head', model.rpn_head)
            _check_roi_head(model.roi_head)
        else:
            _check_head('bbox_head', model.bbox_head)
            if isinstance(getattr(model, 'neck', None), CSPNeXtPAFPN):
                # RTMDet's pipeline pads, not its preprocessor.
                stride, _ = model.bbox_head.prior_generator.strides[-1]
                divisor = math.lcm(divisor, stride)
        self.preprocessing = Preprocessing(model.data_preprocessor, divisor, normalize, resize)
        last = model.roi_head if self.two_stages else model.bbox_head
        # Which YOLOX's head does not read.
        self.most = -1 if isinstance(last, YOLOXHead) else last.test_cfg.get('max_per_img', -1)
        self.output_names = ['boxes', 'scores', 'labels', *['images'] * batched]
        if self.two_stages and model.roi_head.with_mask:
            self.output_names.append('masks')
        self.eval()  # itself too: an exporter puts the whole back into the mode that it found

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        """Detect in one image, or in several of one size.

        Args:
            images: (B, 3, H, W), where B is 1 unless the detector is ``batched``; they are padded
                here to what the backbone needs.

        Returns:
            Of N detections, by falling score in each image, their boxes (N, 4) as x1, y1, x2, y2
            in pixels of the given image, scores (N,), labels (N,), if ``batched`` the indices of
            their images (N,), rising, and, where there is a mask head, the probability of each
            pixel of a grid over each box, (N, h, w).
        """
        prepared, limit, factors = self.preprocessing(images)
        maps = self.model.extract_feat(prepared)
        head = self.model.roi_head if self.two_stages else None
        if self.is_detr:
            found = self._detect_by_queries(maps, prepared.shape[2:], limit)
        elif head is None:
            found = self._detect_densely(self.model.bbox_head, maps, limit)
        else:
            proposals, _, _, of_image = self._detect_densely(self.model.rpn_head, maps, limit)
            rois = as_rois(proposals, of_image)
            detect = (self._detect_in_cascade if isinstance(head, CascadeRoIHead) else
                      self._detect_in_regions)
            found = detect(head, maps, rois, limit)
        boxes, scores, labels, of_image = found
        masks = [] if head is None or not head.with_mask else [
            self._masks(head, maps, as_rois(boxes, of_image), labels)]
        if factors is not None:
            boxes = boxes / factors
        return boxes, scores, labels, *[of_image] * self.batched, *masks

    def _detect_by_queries(self, maps: Tuple[Tensor, ...], shape: Sequence[int],
                           limit: Tensor) -> Found:
        head = self.model.bbox_head
        whole = SimpleNamespace(img_shape=shape, batch_input_shape=shape)
        logits, boxes = (layers[-1][0] for layers in head(
            **self.model.forward_transformer(maps, [whole])))
        most = head.test_cfg.get('max_per_img', len(boxes))
        if head.loss_cls.use_sigmoid:
            scores, best = logits.sigmoid().flatten().topk(most)
            rows = torch.div(best, logits.shape[1], rounding_mode='floor')
            labels = best - rows * logits.shape[1]
        else:
            scores, labels = logits.softmax(-1)[:, :-1].max(-1)
            scores, rows = scores.topk(most)
            labels = labels[rows]
        boxes = bbox_cxcywh_to_xyxy(boxes[rows]) * limit
        return (torch.minimum(boxes.clamp(min=0), limit), scores, labels,
                torch.zeros_like(labels))

    @staticmethod
    def _detect_densely(head: BaseDenseHead, maps: Tuple[Tensor, ...], limit: Tensor) -> Found:
        """Detections of a dense head; of an RPN, the labels are levels."""
        outputs = head(maps)
        sizes = [level.shape[2:] for level in outputs[0]]
        is_yolox, is_rpn = isinstance(head, YOLOXHead), isinstance(head, RPNHead)
        priors = head.prior_generator.grid_priors(
            sizes, dtype=maps[0].dtype, device=maps[0].device,
            **(dict(with_stride=True) if is_yolox else {}))
        levels = [[as_rows(level, width) for level in output] for output, width in zip(
            outputs, (head.cls_out_channels, 4, 1))]
        batch = count(maps[0])
        if is_yolox:
            logits, deltas, objectness = (torch.cat(level, 1) for level in levels)
            scores, labels = logits.sigmoid().max(2)
            scores = scores * objectness.sigmoid()[..., 0]
            boxes = head._bbox_decode(torch.cat(priors), deltas)
            of_image, rows = (scores >= head.test_cfg.score_thr).nonzero().unbind(1)
            found = [part[of_image, rows] for part in (boxes, scores, labels)]
            return suppress(found[0], found[1], found[2], of_image, batch, head.test_cfg, False)
        candidates = []
        for i, (logits, deltas, *factors) in enumerate(zip(*levels)):
            scores = logits.sigmoid() if head.use_sigmoid_cls else logits.softmax(-1)[..., :-1]
            classes = scores.shape[2]
            scores, best = top(scores.flatten(1), head.test_cfg.get('nms_pre', -1))
            of_image = torch.arange(batch, device=best.device)[:, None].expand_as(best).flatten()
            scores, best = scores.flatten(), best.flatten()
            rows = torch.div(best, classes, rounding_mode='floor')
            boxes = clipped(head.bbox_coder, head.bbox_coder.decode(
                priors[i][rows], deltas[of_image, rows]), limit)
            labels = torch.full_like(best, i) if is_rpn else best - rows * classes
            # The threshold is on the score before the factor that ranks it.
            threshold = None if is_rpn else head.test_cfg.get('score_thr', 0)
            candidate = torch.ones_like(scores) if threshold is None else (scores > threshold)
            if factors:
                scores = scores * factors[0][of_image, rows, 0].sigmoid()
            candidates.append((boxes, scores, labels, of_image, candidate.bool()))
        boxes, scores, labels, of_image, candidate = (torch.cat(parts) for parts in zip(
            *candidates))
        smallest = head.test_cfg.get('min_bbox_size', -1)
        if smallest >= 0:
            sides = boxes[:, 2:] - boxes[:, :2]
            candidate = candidate & (sides[:, 0] > smallest) & (sides[:, 1] > smallest)
        keep = candidate.nonzero()[:, 0]
        return suppress(boxes[keep], scores[keep], labels[keep], of_image[keep], batch,
                        head.test_cfg)

    def _detect_in_regions(self, head: StandardRoIHead, maps: Tuple[Tensor, ...], rois: Tensor,
                           limit: Tensor) -> Found:
        logits, deltas = head.bbox_head(self._pooled(head.bbox_roi_extractor, maps, rois, head))
        return select_classes(logits.softmax(-1), decode_classes(
            head.bbox_head, rois, deltas, limit), rois, count(maps[0]), head.test_cfg)

    def _detect_in_cascade(self, head: CascadeRoIHead, maps: Tuple[Tensor, ...], rois: Tensor,
                           limit: Tensor) -> Found:
        stages = []
        for stage, bbox_head in enumerate(head.bbox_head):
            logits, deltas = bbox_head(
                self._pooled(head.bbox_roi_extractor[stage], maps, rois, head))
            stages.append(logits)
            decoded = decode_classes(bbox_head, rois, deltas, limit)
            if stage + 1 < head.num_stages:
                rois = torch.cat([rois[:, :1], of_class(decoded, logits[:, :-1].argmax(1))], 1)
        scores = (sum(stages) / len(stages)).softmax(-1)
        return select_classes(scores, decoded, rois, count(maps[0]), head.test_cfg)

    def _pooled(self, extractor: SingleRoIExtractor, maps: Tuple[Tensor, ...], rois: Tensor,
                head: BaseRoIHead) -> Tensor:
        """Features of each region from its level of the pyramid, in the regions' order."""
        maps = maps[:extractor.num_inputs]
        levels = extractor.map_roi_levels(rois, len(maps))
        inside, pooled = [], []
        for i, (level, layer) in enumerate(zip(maps, extractor.roi_layers)):
            inside.append((levels == i).nonzero()[:, 0])
            pooled.append(roi_align(level, rois[inside[i]], *layer.output_size, layer.spatial_scale,
                                    layer.sampling_ratio, layer.aligned))
        order = torch.cat(inside)
        position = torch.zeros_like(order).scatter(0, order, torch.arange(
            order.shape[0], device=order.device))
        features = torch.cat(pooled)[position]
        if is_exporting() and not torch.jit.is_tracing():
            # Numbers known when the graph runs: MMDetection's branch on "no region" wants one.
            torch._check(features.shape[0] == rois.shape[0])
            torch._check(features.shape[0] != 0)
        return head.shared_head(features) if head.with_shared_head else features

    def _masks(self, head: BaseRoIHead, maps: Tuple[Tensor, ...], rois: Tensor,
               labels: Tensor) -> Tensor:
        if not isinstance(head, CascadeRoIHead):
            return self._masks_of(head.mask_head, head.mask_roi_extractor, maps, rois, labels, head)
        stages = [self._masks_of(mask_head, extractor, maps, rois, labels, head)
                  for mask_head, extractor in zip(head.mask_head, head.mask_roi_extractor)]
        return sum(stages[1:], stages[0]) / len(stages)

    def _masks_of(self, mask_head, extractor, maps, rois, labels, head) -> Tensor:
        logits = mask_head(self._pooled(extractor, maps, rois, head))
        if mask_head.class_agnostic:
            return logits[:, 0].sigmoid()
        return logits[torch.arange(labels.shape[0], device=labels.device), labels].sigmoid()


def count(maps: Tensor) -> Any:
    """How many images there are, of the graph where one is drawn."""
    return shape_as_tensor(maps)[0] if torch.jit.is_tracing() else maps.shape[0]


def as_rows(maps: Tensor, width: int) -> Tensor:
    """(B, A * width, H, W) -> (B, H * W * A, width)."""
    return maps.permute(0, 2, 3, 1).reshape(maps.shape[0], -1, width)


def as_rois(boxes: Tensor, images: Tensor) -> Tensor:
    """(N, 4) and the indices of their images, (N,), -> (N, 5)."""
    return torch.cat([images[:, None].to(boxes), boxes], 1)


def top(scores: Tensor, most: int) -> Tuple[Tensor, Tensor]:
    """The highest of each row of (B, N), by falling score, and indices; all if ``most`` <= 0."""
    number: Any = shape_as_tensor(scores)[1] if torch.jit.is_tracing() else scores.shape[1]
    if most > 0:
        number = torch.clamp(number, max=most) if torch.jit.is_tracing() else min(number, most)
    return scores.topk(number)


def clipped(coder, boxes: Tensor, limit: Tensor) -> Tensor:
    """Boxes within (width, height, width, height) px, if the coder is one that clips."""
    return torch.minimum(boxes.clamp(min=0), limit) if coder.clip_border else boxes


def decode_classes(head: BBoxHead, rois: Tensor, deltas: Tensor, limit: Tensor) -> Tensor:
    """Boxes of each region, (N, classes or 1, 4)."""
    classes = 1 if head.reg_class_agnostic else head.num_classes
    boxes = head.bbox_coder.decode(rois[:, 1:].repeat_interleave(classes, dim=0),
                                   deltas.reshape(-1, 4))
    return clipped(head.bbox_coder, boxes, limit).reshape(-1, classes, 4)


def of_class(boxes: Tensor, labels: Tensor) -> Tensor:
    """The box of a class, (N, 4), from those of all, (N, classes or 1, 4)."""
    if boxes.shape[1] == 1:
        return boxes[:, 0]
    return boxes.gather(1, labels[:, None, None].expand(-1, 1, 4))[:, 0]


def select_classes(scores: Tensor, boxes: Tensor, rois: Tensor, batch: Any, cfg) -> Found:
    """Detections of (N, classes + 1) scores, the background's last, and (N, classes or 1, 4) boxes,
    found in regions (N, 5).
    """
    rows, labels = (scores[:, :-1] > cfg.score_thr).nonzero().unbind(1)
    return suppress(of_class(boxes[rows], labels), scores[rows, labels], labels,
                    rois[rows, 0].long(), batch, cfg)


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, images: Tensor, batch: Any, cfg,
             is_limited: bool = True) -> Found:
    """Non-maximum suppression among boxes of equal labels and images, (N,) each, of a batch, and,
    if it is limited, the most that an image may have; image by image.
    """
    apart = boxes
    if not cfg.nms.get('class_agnostic', False):
        # As mmcv does it: classes are moved so far apart that they do not meet.
        extent = torch.cat([boxes, boxes.new_zeros(1, 4)]).max() + 1
        apart = boxes + (labels.to(boxes) * extent)[:, None]
    numbers = torch.arange(batch, device=images.device)[:, None]
    keep = nms(apart, torch.where(numbers == images, scores, -1.0), float(cfg.nms.iou_threshold))
    most: Optional[int] = cfg.get('max_per_img')
    if is_limited and most is not None and most > 0:
        # Images follow one another: the first of each has as many before it as those have kept.
        kept = (numbers == images[keep]).sum(1)
        first = (kept.cumsum(0) - kept)[images[keep]]
        keep = keep[torch.arange(keep.shape[0], device=keep.device) - first < most]
    return boxes[keep], scores[keep], labels[keep], images[keep]


def _check(part: str, module: nn.Module) -> None:
    """InputError if ``module`` predicts in a way that is not known here."""
    kind = type(module)
    for cls, methods in KNOWN[part]:
        if isinstance(module, cls) and all(
                getattr(kind, method) is getattr(cls, method) for method in methods):
            return
    expected: List[str] = [cls.__name__ for cls, _ in KNOWN[part]]
    raise InputError(f'The {part} is a {kind.__name__}, which predicts in a way of its own and '
                     f'cannot be exported: expected one that does as {" or ".join(expected)}.')


def _check_head(part: str, head: BaseDenseHead) -> None:
    _check(part, head)
    if getattr(head.loss_cls, 'custom_cls_channels', False):
        raise InputError(f'The {part} has {type(head.loss_cls).__name__}, whose own activation '
                         'cannot be exported.')
    _check_nms(part, head.test_cfg)


def _check_nms(part: str, cfg) -> None:
    given = {name for name in cfg.nms if name not in ('split_thr', )}
    if cfg.nms.get('type', 'nms') != 'nms' or given - {'type', 'iou_threshold', 'class_agnostic'}:
        raise InputError(f'The test_cfg of the {part} has nms={dict(cfg.nms)}, which cannot be '
                         "exported: expected dict(type='nms', iou_threshold=...).")


def _check_roi_head(head: BaseRoIHead) -> None:
    _check('roi_head', head)
    _check_nms('roi_head', head.test_cfg)
    is_cascade = isinstance(head, CascadeRoIHead)
    kinds = ('bbox', 'mask') if head.with_mask else ('bbox', )
    for kind in kinds:
        heads = getattr(head, f'{kind}_head')
        extractors = getattr(head, f'{kind}_roi_extractor')
        for part, extractor in zip(*((heads, extractors) if is_cascade else
                                     ([heads], [extractors]))):
            _check(f'roi_head.{kind}_head', part)
            _check('roi_head.roi_extractor', extractor)
            layer = extractor.roi_layers[0]
            if not isinstance(layer, RoIAlign) or layer.pool_mode != 'avg':
                raise InputError(f'The roi_head.{kind}_roi_extractor pools by '
                                 f'{type(layer).__name__}, which cannot be exported: expected '
                                 'RoIAlign with averages.')
            if getattr(part, 'custom_cls_channels', False):
                raise InputError(f'The roi_head.bbox_head has {type(part.loss_cls).__name__}, '
                                 'whose own activation cannot be exported.')
