"""mmcv's NMS and RoIAlign as operators that graphs can hold, and what they are in ONNX.

mmcv calls its compiled functions out of sight of any tracer. mmcv's own ONNX symbolic for RoIAlign
subtracts half a pixel, which ONNX's operator does itself from opset 16 on. torch's own symbolic
for ``linspace`` divides zero by zero where one step is asked for, as DETRs do for a level that is
one cell wide.
"""
import contextlib
from typing import Iterator

import mmcv.ops
import numpy as np
import torch
from torch import Tensor
from torch.onnx import symbolic_helper

OPSET = 16  # the first whose RoiAlign knows where pixels are
NEWEST_OPSET = 20  # of torch's exporter by tracing
INT64_MAX = 2**63 - 1


@torch.library.custom_op('mmdet_odconv::nms', mutates_args=())
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes, (N, 4), that remain in each image; see :func:`mmcv.ops.nms`.

    Of B images, scores are (B, N), below zero where a box is not the image's. Images follow one
    another, and in each its boxes, by falling score.
    """
    kept = [torch.empty(0, dtype=torch.int64, device=boxes.device)]
    for of_image in scores:
        found = (of_image >= 0).nonzero()[:, 0]
        if len(found):
            kept.append(found[mmcv.ops.nms(boxes[found], of_image[found], iou_threshold)[1]])
    return torch.cat(kept)


@nms.register_fake
def _(boxes, scores, iou_threshold):
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@torch.library.custom_op('mmdet_odconv::roi_align', mutates_args=())
def roi_align(maps: Tensor, rois: Tensor, height: int, width: int, spatial_scale: float,
              sampling_ratio: int, aligned: bool) -> Tensor:
    """Averages in the regions, (N, 5), of maps: (N, C, height, width); :func:`mmcv.ops.roi_align`.
    """
    if not len(rois):
        return maps.new_zeros(0, maps.shape[1], height, width)
    return mmcv.ops.roi_align(maps, rois, (height, width), spatial_scale, sampling_ratio, 'avg',
                              aligned)


@roi_align.register_fake
def _(maps, rois, height, width, spatial_scale, sampling_ratio, aligned):
    return maps.new_empty(rois.shape[0], maps.shape[1], height, width)


@symbolic_helper.parse_args('v', 'v', 'f')
def _nms_to_onnx(g, boxes, scores, iou_threshold):
    def constant(value):
        return g.op('Constant', value_t=torch.as_tensor(value))

    # Images are its classes, so that they share the boxes.
    selected = g.op(
        'NonMaxSuppression', g.op('Unsqueeze', boxes, constant([0])),
        g.op('Unsqueeze', scores, constant([0])), constant([INT64_MAX]),
        *(constant(np.float32([value])) for value in (iou_threshold, -0.5)))
    return g.op('Squeeze', g.op('Gather', selected, constant([2]), axis_i=1), constant([1]))


@symbolic_helper.parse_args('v', 'v', 'i', 'i', 'f', 'i', 'b')
def _roi_align_to_onnx(g, maps, rois, height, width, spatial_scale, sampling_ratio, aligned):
    def columns(*indices):
        return g.op('Gather', rois, g.op('Constant', value_t=torch.tensor(indices)), axis_i=1)

    images = g.op('Squeeze', columns(0), g.op('Constant', value_t=torch.tensor([1])))
    return g.op(
        'RoiAlign', maps, columns(1, 2, 3, 4),
        g.op('Cast', images, to_i=torch.onnx.TensorProtoDataType.INT64),
        coordinate_transformation_mode_s='half_pixel' if aligned else 'output_half_pixel',
        mode_s='avg', output_height_i=height, output_width_i=width,
        sampling_ratio_i=max(0, sampling_ratio), spatial_scale_f=spatial_scale)


@symbolic_helper.parse_args('v', 'v', 'v', 'i', 'i', 'v', 'i')
def _linspace_to_onnx(g, start, end, steps, dtype, layout, device, pin_memory):
    def number(value):
        return g.op('Cast', value, to_i=torch.onnx.TensorProtoDataType.FLOAT)

    zero, one = (g.op('Constant', value_t=torch.tensor(value)) for value in (0, 1))
    gaps = g.op('Max', g.op('Sub', steps, one), one)
    step = g.op('Div', g.op('Sub', number(end), number(start)), number(gaps))
    return g.op('Add', g.op('Mul', number(g.op('Range', zero, steps, one)), step), number(start))


@contextlib.contextmanager
def linspace_of_one_step(opset: int) -> Iterator[None]:
    """Write ``torch.linspace`` in the place of torch's own symbolic, in graphs of this opset."""
    torch.onnx.register_custom_op_symbolic('aten::linspace', _linspace_to_onnx, opset)
    try:
        yield
    finally:
        torch.onnx.unregister_custom_op_symbolic('aten::linspace', opset)


torch.onnx.register_custom_op_symbolic('mmdet_odconv::nms', _nms_to_onnx, OPSET)
torch.onnx.register_custom_op_symbolic('mmdet_odconv::roi_align', _roi_align_to_onnx, OPSET)
