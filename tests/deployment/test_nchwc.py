"""Graphs whose maps stay in onnxruntime's blocked layout, against what they were before."""
import platform
import shutil

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from reference import randomised
from torch import nn

from mmdet_odconv.deployment.export import Runtime, write_onnx
from mmdet_odconv.deployment.nchwc import DOMAIN, block_channels
from mmdet_odconv.layers import CondConv2d, DyConv2d, ODConv2d

pytestmark = pytest.mark.skipif(platform.machine().lower() not in ('x86_64', 'amd64'),
                                reason="onnxruntime's blocked layout is of x86-64")


def dynamic(*args, layer=ODConv2d, **kwargs):
    return randomised(layer(*args, kernel_num=2, **kwargs))


class Residual(nn.Module):
    """x + body(x), then an activation."""

    def __init__(self, *body, activation=None):
        super().__init__()
        self.body, self.activation = nn.Sequential(*body), activation or nn.Identity()

    def forward(self, x):
        return self.activation(x + self.body(x))


class Forked(nn.Module):
    """A map that is read blocked and as it is, and answered as well."""

    def __init__(self):
        super().__init__()
        self.first, self.second = dynamic(3, 24, 3, padding=1), dynamic(24, 16, 1)

    def forward(self, x):
        x = self.first(x)
        y = self.second(x.relu())
        return x, y, x.softmax(1)[:, :16] * y


class Fed(nn.Module):
    """A map that is blocked for one reader and plain for the others; a sum over one place."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 16, 3, groups=1), dynamic(16, 16, 1)
        self.pool, self.gate = nn.MaxPool2d(2), dynamic(16, 16, 1)

    def forward(self, x):
        x = self.stem(x).sigmoid()
        y = self.first(x) + self.gate(x.mean((2, 3), keepdim=True))
        return self.pool(x), x.relu(), x.mean((2, 3)), y


class Gated(nn.Module):
    """Additions that only look like a bias or a map of equal size; means over other axes."""

    def __init__(self):
        super().__init__()
        self.stem, self.a = dynamic(3, 24, 3), dynamic(24, 16, 1, bias=False)
        self.b, self.c = dynamic(24, 16, 1), dynamic(24, 16, (1, 3), padding=(0, 1))
        self.depthwise = dynamic(3, 3, 3, groups=3)
        self.d, self.e = dynamic(16, 16, 1, bias=False), dynamic(16, 16, 1)

    def forward(self, x):
        y = self.stem(x)
        strip = F.max_pool2d(y, (1, 31))
        pooled, where = F.max_pool2d(self.c(y), 2, return_indices=True)
        wide = self.b(y)
        gate = self.e(wide.mean((2, 3), keepdim=True))
        return (self.a(y) + self.b(y.mean((2, 3), keepdim=True)), self.b(y) + self.c(strip),
                2 * y.mean((1, 3)), 2 * y.mean((1, 2)), pooled, where, self.depthwise(x),
                self.b(y) + self.c(y), self.d(wide) + gate)


NETWORKS = {
    'inverted residuals of widths that no block divides': lambda: nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU6(), Residual(
            dynamic(24, 40, 1), nn.ReLU6(), dynamic(40, 40, 3, 1, 1, 1, 40), nn.ReLU6(),
            dynamic(40, 24, 1)), dynamic(24, 48, 1), nn.ReLU6(),
        dynamic(48, 48, 5, 2, 2, 1, 48, layer=CondConv2d)),
    'bottlenecks after a pooled stem': lambda: nn.Sequential(
        nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2, 1), Residual(
            dynamic(16, 8, 1, bias=False), nn.ReLU(), dynamic(8, 8, 3, 1, 1, layer=DyConv2d),
            nn.ReLU(), dynamic(8, 16, 1), activation=nn.ReLU()),
        dynamic(16, 32, 3, 2, 1, dilation=2), nn.Conv2d(32, 8, 1)),
    'convolutions that stay as they are': lambda: nn.Sequential(
        dynamic(3, 20, 3), dynamic(20, 20, 3, groups=4), nn.SiLU(), dynamic(20, 12, 1),
        nn.Upsample(scale_factor=2), dynamic(12, 5, 3)),
    'maps that are read both ways': Forked,
    'maps that come unblocked, and of one place': Fed,
    'additions and means of other kinds': Gated,
}
SEVERAL = (Forked, Fed, Gated)


@pytest.mark.parametrize('name', NETWORKS)
def test_blocked_graphs_answer_the_same(name, tmp_path):
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    plain, blocked = tmp_path / 'plain.onnx', tmp_path / 'blocked.onnx'
    image = torch.randn(1, 3, 33, 49)
    outputs = network(image) if isinstance(network, SEVERAL) else [network(image)]
    with torch.no_grad():
        write_onnx(network, image, plain, [f'map{i}' for i in range(len(outputs))],
                   {2: 'rows', 3: 'columns'})
    shutil.copy(plain, blocked)
    block_channels(blocked)
    nodes = onnx.load(blocked).graph.node
    of_kernels = [node for node in nodes if node.op_type == 'Conv' and node.domain == DOMAIN]
    convolutions = sum(isinstance(module, (nn.Conv2d, DyConv2d, ODConv2d, CondConv2d))
                       for module in network.modules())
    as_they_are = 3 if name.startswith('convolutions that stay') else 0
    if isinstance(network, Gated):  # where some are used twice, and the same twice is once
        assert len(of_kernels) >= 5
    else:
        assert len(of_kernels) == convolutions - as_they_are
    # Of 8 channels a whole block may be padding, which this does not leave out.
    assert all(node.attribute[0].i % 16 == 0 for node in nodes if node.op_type == 'ReorderOutput')
    if name.startswith(('inverted', 'bottlenecks')):  # nothing between two leaves the layout
        assert sum(node.op_type == 'ReorderOutput' for node in nodes) == 1
        left = [node.output[0] for node in nodes if node.op_type in ('Add', 'Relu', 'Clip')]
        assert not [output for output in left if 'attention' not in output]
    for size in (33, 49), (64, 40) if name != 'additions and means of other kinds' else (33, 49):
        image = torch.randn(1, 3, *size)
        for a, b in zip(Runtime(plain)(image), Runtime(blocked)(image), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_a_file_of_constant_weights_stays_as_it_is(tmp_path):
    path = tmp_path / 'model.onnx'
    write_onnx(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)).eval(),
               torch.randn(1, 3, 20, 20), path, ['map'], {2: 'rows', 3: 'columns'})
    before = path.read_bytes()
    block_channels(path)
    assert path.read_bytes() == before


def test_branches_read_maps_as_they_are(tmp_path):
    """A graph within the graph, which only a node's attributes name."""
    network = nn.Sequential(dynamic(3, 16, 3), dynamic(16, 16, 1)).eval()
    path = tmp_path / 'model.onnx'
    with torch.no_grad():
        write_onnx(network, torch.randn(1, 3, 20, 20), path, ['map'], {2: 'rows', 3: 'columns'})
    model = onnx.load(path)
    inner = next(node.output[0] for node in model.graph.node if node.op_type == 'Conv')
    make = onnx.helper.make_node
    branch = onnx.helper.make_graph([make('Neg', [inner], ['of_branch'])], 'branch', [], [
        onnx.helper.make_tensor_value_info('of_branch', onnx.TensorProto.FLOAT, None)])
    model.graph.initializer.append(onnx.numpy_helper.from_array(
        torch.tensor(True).numpy(), 'always'))
    model.graph.node.append(make('If', ['always'], ['negated'], then_branch=branch,
                                 else_branch=branch))
    model.graph.output.append(onnx.helper.make_tensor_value_info(
        'negated', onnx.TensorProto.FLOAT, None))
    onnx.save(model, path)
    image = torch.randn(1, 3, 20, 20).numpy()

    def run():
        return onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider']).run(
            None, {'image': image})

    expected = run()
    block_channels(path)
    for a, b in zip(run(), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b))
