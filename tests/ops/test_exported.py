"""Layers written down by torch's exporters, and run by onnxruntime and by torch itself."""
import io
import warnings

import onnx
import onnxruntime
import pytest
import torch
from reference import randomised

from mmdet_odconv.layers import CondConv2d, DCDConv2d, DyConv2d, FDConv2d, ODConv2d

LAYERS = (ODConv2d, DyConv2d, CondConv2d, DCDConv2d)
LAYER = pytest.mark.parametrize('layer', [
    *(cls(8, 16, 3, 2, padding=1) for cls in LAYERS),
    *(cls(8, 8, 3, padding=2, dilation=2, groups=8) for cls in LAYERS),
    *(cls(8, 12, 1, groups=2) for cls in LAYERS),
    *(DCDConv2d(8, 12, n, padding='same') for n in (2, 3)),
    ODConv2d(8, 12, 1), ODConv2d(8, 12, 1, kernel_num=1), ODConv2d(8, 8, 3, kernel_num=1, groups=8),
], ids=lambda layer: f'{type(layer).__name__}-{layer.extra_repr()}')


def as_onnx(module, x, dynamic_axes):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(module, (x, ), file, dynamo=False, opset_version=16, input_names=['x'],
                          output_names=['y'], dynamic_axes={'x': dynamic_axes, 'y': dynamic_axes})
    session = onnxruntime.InferenceSession(file.getvalue(), providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(None, {'x': x.numpy()})[0])


@LAYER
@pytest.mark.parametrize(('batch', 'axes'), [(1, [2, 3]), (2, [0, 2, 3])])
def test_traced_to_onnx(layer, batch, axes):
    """A batch of one is a constant, and any other an example; height and width always are."""
    layer = randomised(layer).eval()
    run = as_onnx(layer, torch.randn(batch, 8, 7, 9), axes)
    for shape in ((batch if batch == 1 else 3, 8, 10, 6), (1, 8, 9, 9)):
        x = torch.randn(shape)
        torch.testing.assert_close(run(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not hasattr(torch.compiler, 'is_exporting'), reason='torch before 2.7')
@pytest.mark.parametrize(('layer', 'batch'), [
    (ODConv2d(8, 16, 3, 2, padding=1), 1), (ODConv2d(8, 8, 3, groups=8), 2),
    (DCDConv2d(8, 12, 3), None), (DCDConv2d(8, 8, 3, groups=8), None),
    (DCDConv2d(8, 12, 3, padding='same'), None), (FDConv2d(8, 12, 3, padding=1, fbm=False), None),
    (FDConv2d(8, 12, 1, kernel_num=1), None)])
def test_torch_export(layer, batch):
    """With any height and width, and a batch that is a constant or (None) is not."""
    layer = randomised(layer).eval()
    dim = torch.export.Dim.DYNAMIC
    shapes = {2: dim, 3: dim} if batch else {0: dim, 2: dim, 3: dim}
    program = torch.export.export(layer, (torch.randn(batch or 2, 8, 14, 18), ),
                                  dynamic_shapes=(shapes, ))
    x = torch.randn(batch or 3, 8, 20, 13)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_a_constant_batch_of_one_is_a_plain_convolution():
    """What runtimes are fast at, and what those that know no more can run."""
    for layer in (ODConv2d(8, 8, 3), DCDConv2d(8, 8, 3, groups=8)):
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            torch.onnx.export(layer.eval(), (torch.randn(1, 8, 9, 9), ), file, dynamo=False)
        conv, = (node for node in onnx.load_from_string(file.getvalue()).graph.node
                 if node.op_type == 'Conv')
        group, = (attribute.i for attribute in conv.attribute if attribute.name == 'group')
        assert group == layer.groups
