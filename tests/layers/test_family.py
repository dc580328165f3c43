"""What every layer of the family does: the equations of its paper, and nn.Conv2d's conveniences."""
import contextlib
import copy
import inspect
import pickle
import re
import warnings

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.registry import MODELS
from reference import randomised
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from mmdet_odconv import (
    CondConv2d,
    DCDConv2d,
    DyConv2d,
    FDConv2d,
    InputError,
    ODConv2d,
    set_temperature,
)
from mmdet_odconv.layers import KWConv2d, WarehouseManager
from mmdet_odconv.ops import force_plan

LAYERS = [ODConv2d, DyConv2d, CondConv2d, DCDConv2d, FDConv2d]
BANKED = [ODConv2d, DyConv2d, CondConv2d]
every_layer = pytest.mark.parametrize('cls', LAYERS)


def has(cls, argument):
    return argument in inspect.signature(cls).parameters


def warehoused(*args, **arguments):
    """A KWConv2d that holds its warehouse."""
    manager = WarehouseManager()
    shape = nn.Conv2d(*args, **arguments, device='meta').weight.shape
    layer = KWConv2d(*args, **arguments, warehouse=manager.add([shape]))
    layer.warehouse_manager = manager
    return layer


def static_kernels(layer):
    """The kernels of its bank, or the one of its spectrum."""
    if isinstance(layer, FDConv2d):
        return reference.spectrum_kernel(layer)[None]
    return layer.weight


@st.composite
def layers(draw, cls):
    small = st.integers(1, 3)
    groups = draw(small)
    cin, cout = groups * draw(small), groups * draw(small)
    kernel = draw(st.tuples(small, small))
    padding = draw(st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 2)),
                             st.sampled_from(['same', 'valid'])))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    own = dict(kernel_num=draw(small), reduction=draw(st.floats(0.01, 1)),
               gate_scale=draw(st.sampled_from([1.0, 2.0])), local=draw(st.booleans()))
    layer = cls(
        cin, cout, kernel, (1, 1) if padding == 'same' else draw(st.tuples(small, small)), padding,
        draw(st.tuples(st.integers(1, 2), st.integers(1, 2))), groups, draw(st.booleans()),
        draw(st.sampled_from(['zeros', 'reflect', 'replicate', 'circular'])),
        dtype=torch.float64, temperature=draw(st.floats(0.5, 30)),
        **{name: value for name, value in own.items() if has(cls, name)})
    x = torch.randn(draw(small), cin, *(draw(st.integers(5, 9)) for _ in range(2)),
                    dtype=torch.float64)
    return randomised(layer).train(draw(st.booleans())), x.requires_grad_()


@every_layer
@settings(max_examples=100, deadline=None)
@given(drawn=st.data())
def test_equals_the_equations_and_every_gradient(cls, drawn):
    layer, x = drawn.draw(layers(cls))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # batches of one image
        ours = layer(x)
    reference.assert_same_with_gradients(ours, reference.forward(layer, x),
                                         dict(x=x, **dict(layer.named_parameters())))


@every_layer
def test_registered_in_the_root_registry_and_built_by_mmcv(cls):
    from mmcv.cnn import ConvModule
    assert MODELS.get(cls.__name__) is cls
    module = ConvModule(8, 12, 3, padding=1, norm_cfg=dict(type='BN'),
                        conv_cfg=dict(type=cls.__name__))
    assert static_kernels(module.conv).shape[1:] == (12, 8, 3, 3)
    # mmcv's initialiser would take the bank's first axis for the output channels.
    module.init_weights()
    assert static_kernels(module.conv).std().item() == pytest.approx((2 / (12 * 9))**0.5, rel=0.1)
    assert module(torch.randn(2, 8, 6, 6)).shape == (2, 12, 6, 6)


@pytest.mark.parametrize(('cls', 'default'), [
    (ODConv2d, dict(kernel_num=4, reduction=1 / 16, gate_scale=1.0, init='zero')),
    (CondConv2d, dict(kernel_num=8, init='zero')),
    (DyConv2d, dict(kernel_num=4, reduction=1 / 4, init='zero')),
    (DCDConv2d, dict(reduction=1 / 16, init='zero')),
    (FDConv2d, dict(kernel_num=64, reduction=1 / 16, local=True, fbm=True))])
def test_constructor_is_that_of_conv2d_and_the_papers_defaults(cls, default):
    conv, ours = (inspect.signature(c).parameters for c in (nn.Conv2d, cls))
    positional = [p for p in ours.values() if p.kind is not p.KEYWORD_ONLY]
    assert [(p.name, p.default) for p in positional] == [
        (p.name, p.default) for p in conv.values()]
    keywords = {name: p.default for name, p in ours.items() if name not in conv}
    keywords.pop('norm_cfg', None)
    assert keywords == dict(temperature=1.0, **default)


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(kernel_num=0), 'kernel_num must be at least 1, got 0'),
    (dict(kernel_num='4'), "kernel_num must be a whole number, got '4'"),
    (dict(reduction='1/16'), r"reduction must be in \(0, 1\], got '1/16'"),
    (dict(temperature=None), 'temperature must be greater than 0, got None'),
    (dict(norm_cfg='BN'), "norm_cfg of the attention must be a dict .*, got 'BN'"),
    (dict(norm_cfg=dict(type='LN', num_groups=2)), "LN has one group, got num_groups=2: take"),
    (dict(reduction=0), r'reduction must be in \(0, 1\], got 0'),
    (dict(reduction=1.5), r'reduction must be in \(0, 1\], got 1.5'),
    (dict(init='xavier'), r"init must be one of \('zero', 'he'\), got 'xavier'"),
    (dict(temperature=0), 'temperature must be greater than 0, got 0'),
    (dict(temperature=float('nan')), 'temperature must be greater than 0, got nan'),
    (dict(temperature=float('inf')), 'temperature must be greater than 0, got inf: give a finite'),
    (dict(norm_cfg=dict(type='BN', track_running_stats=False)), 'got track_running_stats=False: '),
    (dict(padding=-1), 'padding must be at least 0, got -1'),
    (dict(groups=3), 'divisible by groups, got 8 and 12 with groups=3'),
    (dict(groups=0), 'divisible by groups, got 8 and 12 with groups=0'),
    (dict(padding_mode='mirror'), "padding_mode must be one of .* padding_mode='mirror'"),
    (dict(padding='full'), "Invalid padding string 'full', should be one of"),
    (dict(padding='same', stride=2), "padding='same' is not supported for strided"),
])
@every_layer
def test_bad_arguments(cls, arguments, message):
    if all(has(cls, name) for name in arguments):
        with pytest.raises(ValueError, match=message):
            cls(8, 12, 3, **arguments)


@every_layer
@pytest.mark.parametrize('shape', [(8, 5, 5), (2, 4, 5, 5), (2, 8, 5), (1, 2, 8, 5, 5)])
def test_bad_input(cls, shape):
    expected = rf'{cls.__name__} expects an input of shape \(B, 8, H, W\), got'
    with pytest.raises(ValueError, match=expected):
        cls(8, 12, 3)(torch.zeros(shape))


@pytest.mark.parametrize('groups', [1, 2, 8])
@every_layer
def test_empty_batch_leaves_no_parameter_without_gradient(cls, groups):
    layer = cls(8, 16, 3, padding=1, groups=groups).train()
    before = copy.deepcopy(dict(layer.named_buffers()))
    y = layer(torch.randn(0, 8, 5, 5))
    assert y.shape == (0, 16, 5, 5)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
    for name, value in layer.named_buffers():
        torch.testing.assert_close(value, before[name])


@pytest.mark.parametrize('groups', [1, 16])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@every_layer
def test_autocast(cls, dtype, groups):
    layer = randomised(cls(16, 16, 3, padding=1, groups=groups)).eval()
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    with torch.autocast('cpu', dtype):
        y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.02 * y.abs().max().item())
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize('kernel_size', [1, 3])
@pytest.mark.parametrize('plan', [None, 'blocked', 'folded', 'published'])
@every_layer
def test_output_may_be_changed_in_place(cls, plan, kernel_size):
    """As nn.Conv2d's: by an in-place activation or a residual added to it."""
    if cls is DCDConv2d and plan == 'blocked':
        plan = 'shared'  # its images are groups, or its kernel is one
    layer = randomised(cls(4, 4, kernel_size, padding=kernel_size // 2, bias=False))
    x = torch.randn(2, 4, 6, 6)
    gradients = []
    for change in (lambda y: y.add_(x).relu_(), lambda y: (y + x).relu()):
        layer.zero_grad()
        with force_plan(plan) if plan else contextlib.nullcontext():
            change(layer(x)).square().sum().backward()
        gradients.append([p.grad for p in layer.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize('arguments', [dict(kernel_size=1), dict(kernel_size=3)])
@pytest.mark.parametrize('size', [2, 16])
@every_layer
def test_backward_under_autocast_of_a_float32_forward(cls, size, arguments):
    layer = randomised(cls(16, 16, padding='same', bias=False, **arguments))
    x = torch.randn(2, 16, size, size)
    gradients = []
    for enabled in (True, False):
        layer.zero_grad()
        y = layer(x)
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            y.square().sum().backward()
        gradients.append(getattr(layer, layer.bank_name).grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize('groups', [1, 8])
@every_layer
def test_runs_on_meta(cls, groups):
    layer = cls(8, 16, 3, groups=groups, device='meta')
    y = layer(torch.empty(2, 8, 9, 7, device='meta'))
    assert y.shape == (2, 16, 7, 5) and y.is_meta
    y.sum().backward()
    assert all(p.grad.shape == p.shape for p in layer.parameters())


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@every_layer
def test_dtypes(cls, dtype):
    layer = cls(8, 12, 3, dtype=dtype)
    assert layer(torch.randn(2, 8, 5, 5, dtype=dtype)).dtype == dtype
    assert {p.dtype for p in layer.parameters()} == {dtype}


@every_layer
def test_channels_last(cls):
    layer = randomised(cls(8, 12, 3).double())
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    expected = layer(x)
    layer = layer.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize(('cls', 'arguments'), [
    (ODConv2d, dict(kernel_num=4)), (ODConv2d, dict(kernel_num=1)), (DyConv2d, {}),
    (CondConv2d, {}), (DCDConv2d, {}), (DCDConv2d, dict(groups=8)), (FDConv2d, {})])
@pytest.mark.parametrize('batch', [1, 2])
def test_compiles_without_a_graph_break(cls, arguments, batch):
    layer = randomised(cls(8, 16, 3, **arguments)).train()
    x = torch.randn(batch, 8, 6, 6)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
    state = copy.deepcopy(layer.state_dict())
    y = compiled(x)
    y.sum().backward()
    grads = [p.grad.clone() for p in layer.parameters()]
    layer.load_state_dict(state)
    layer.zero_grad()
    expected = layer(x)
    expected.sum().backward()
    torch.testing.assert_close(y, expected)
    for grad, p in zip(grads, layer.parameters()):
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not hasattr(torch.compiler, 'is_exporting'), reason='torch before 2.7')
@pytest.mark.parametrize('cls', BANKED)
@pytest.mark.parametrize('groups', [1, 4, 8])
def test_exports_with_a_dynamic_batch(cls, groups):
    layer = randomised(cls(8, 16, 3, 2, padding=1, groups=groups)).eval()
    batch = torch.export.Dim('batch')
    program = torch.export.export(layer, (torch.randn(2, 8, 7, 9), ), dynamic_shapes=({0: batch}, ))
    x = torch.randn(5, 8, 7, 9)
    torch.testing.assert_close(program.module()(x), layer(x))


@every_layer
def test_gradient_checkpointing(cls):
    layer = randomised(cls(8, 12, 3).double())
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    saved = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(),
                                [x, *layer.parameters()])
    for a, b in zip(plain, saved):
        torch.testing.assert_close(a, b)


@every_layer
def test_deepcopy_pickle_and_state_dict(cls):
    layer = randomised(cls(8, 12, 3, temperature=2.5)).eval()
    x = torch.randn(2, 8, 5, 5)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.temperature == 2.5
        torch.testing.assert_close(twin(x), layer(x))
    loaded = cls(8, 12, 3, temperature=2.5).eval()
    loaded.load_state_dict(layer.state_dict())
    torch.testing.assert_close(loaded(x), layer(x))


@pytest.mark.parametrize('cls', BANKED)
def test_weights_of_another_bank_are_refused(cls):
    with pytest.raises(InputError, match=r'kernel_num=2, .* holds a bank of kernel_num=3'):
        cls(8, 12, 3, kernel_num=2).load_state_dict(cls(8, 12, 3, kernel_num=3).state_dict())


def test_weights_that_an_fdconv_has_no_place_for():
    layer = FDConv2d(8, 12, 3)
    for state, found in ((nn.Conv2d(8, 12, 3).state_dict(), 'one static kernel'),
                         (ODConv2d(8, 12, 3).state_dict(), 'a bank of kernel_num=4'),
                         (FDConv2d(8, 8, 3).state_dict(), 'a spectrum')):
        with pytest.raises(InputError, match=f'has a spectrum of kernel_num=64.* holds {found}, '):
            layer.load_state_dict(state)


def test_set_temperature():
    model = nn.Sequential(*(cls(4, 4, 3) for cls in LAYERS), nn.Conv2d(4, 4, 3),
                          nn.Sequential(ODConv2d(4, 4, 1)))
    set_temperature(model, 30)
    assert [m.temperature for m in (*model[:len(LAYERS)], model[-1][0])] == [30] * (len(LAYERS) + 1)
    with pytest.raises(ValueError, match='temperature must be greater than 0, got -1'):
        set_temperature(model, -1)


@every_layer
def test_is_no_conv2d_and_prints_its_arguments(cls):
    bank = dict(kernel_num=1) if has(cls, 'kernel_num') else {}
    layer = cls(8, 12, 3, padding=1, bias=False, **bank)
    # Code that initialises by class would misread bank and attention alike.
    assert not any(isinstance(m, (nn.Conv2d, nn.Linear)) for m in layer.modules())
    assert layer.extra_repr() == ('8, 12, kernel_size=(3, 3), stride=(1, 1), kernel_num=1, '
                                  'padding=(1, 1), bias=False')


@pytest.mark.parametrize('plan', ['blocked', 'folded'])
@every_layer
def test_create_graph_changes_no_first_derivative(cls, plan):
    layer = randomised(cls(8, 12, 3).double())
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    with force_plan(plan):
        plain = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
        graph = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()], create_graph=True)
    for a, b in zip(plain, graph):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize(('cls', 'arguments'), [
    (ODConv2d, dict(kernel_num=1)), *((cls, {}) for cls in LAYERS)])
def test_channels_last_backward(cls, arguments, batch):
    layer = randomised(cls(8, 12, 3, **arguments)).eval()
    x = torch.randn(batch, 8, 6, 6, requires_grad=True)
    plain = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    layer.to(memory_format=torch.channels_last)
    x_last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    for plan in ('blocked', 'folded'):
        with force_plan(plan):
            last = torch.autograd.grad(layer(x_last).sum(), [x_last, *layer.parameters()])
        for a, b in zip(plain, last):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('cls', [DyConv2d, CondConv2d])
def test_a_bias_is_a_bank_mixed_by_the_attention_of_the_kernels(cls):
    layer = cls(8, 12, 3, kernel_num=3)
    assert layer.bias.shape == (3, 12) and cls(8, 12, 3, bias=False).bias is None


@pytest.mark.parametrize('groups', [1, 2, 8])
@pytest.mark.parametrize('kernel_size', [1, 3, (2, 5)])
def test_dcd_begins_as_its_static_kernel(groups, kernel_size):
    layer = DCDConv2d(8, 16, kernel_size, padding=1, groups=groups)
    x = torch.randn(2, 8, 7, 7)
    static = nn.functional.conv2d(x, layer.weight[0], layer.bias, 1, 1, 1, groups)
    torch.testing.assert_close(layer(x), static)
    layer = randomised(layer)
    assert not torch.allclose(layer(x), static)
    layer.init_weights()
    torch.testing.assert_close(
        layer(x), nn.functional.conv2d(x, layer.weight[0], layer.bias, 1, 1, 1, groups))


@pytest.mark.parametrize('batch', [0, 1, 3])
@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize(('kernel_size', 'stride', 'padding', 'dilation'), [
    (1, 1, 0, 1), (3, 2, 1, 1), (3, 1, 'same', 2), ((2, 5), (2, 1), (0, 3), (1, 2))])
def test_dcd_is_the_same_on_maps_and_in_kernels(batch, groups, kernel_size, stride, padding,
                                                dilation):
    layer = randomised(DCDConv2d(8, 12, kernel_size, stride, padding, dilation, groups).double())
    x = torch.randn(batch, 8, 12, 11, dtype=torch.float64)  # more pixels than the kernel has
    attentions = layer.attention(x.mean((2, 3)), 1.0)
    if batch:
        expected = layer._convolve_each(x, layer.padding, attentions['fusion'],
                                        attentions['filter_attention'])
    static = nn.functional.conv2d(x, layer.weight[0], None, layer.stride, layer.padding,
                                  layer.dilation, groups)
    scaled = static * attentions['filter_attention'][:, :, None, None]
    on_maps = layer._add_fused_channels(scaled, x, attentions['fusion'])
    torch.testing.assert_close(on_maps, expected if batch else static)


@pytest.mark.parametrize(('arguments', 'p', 'q'), [
    ((64, 256, 1), (256, 8), (64, 8)),           # 64 / 2^3
    ((256, 64, 3), (64, 8), (256, 8)),
    ((512, 512, 3), (512, 32), (512, 32)),       # 512 / 2^floor(4.5)
    ((96, 96, 3, 1, 1, 1, 96), (96, 4), (9, 4)),  # elements: floor(9 / 2)
    ((64, 64, 3, 1, 1, 1, 4), (64, 4), (64, 4)),  # 16 / 2^2 in each group
])
def test_dcd_latent_widths_are_the_papers(arguments, p, q):
    with torch.device('meta'):
        layer = DCDConv2d(*arguments)
    assert (tuple(layer.p.shape), tuple(layer.q.shape)) == (p, q)


# FDConv begins as its release means to, with gates within 1e-3 of 1, and has no other way.
with_init = pytest.mark.parametrize('cls', [cls for cls in LAYERS if has(cls, 'init')])


@pytest.mark.parametrize('groups', [1, 2, 8])
@with_init
def test_begins_with_the_same_kernel_for_all_images_and_learns_to_tell_them_apart(cls, groups):
    layer = cls(8, 8, 3, padding=1, groups=groups).double()
    x = torch.randn(3, 8, 7, 7).double() + torch.tensor([0.0, 1.0, 5.0])[:, None, None, None]
    for begin in (lambda: None, layer.init_weights):
        begin()
        multiple = copy.deepcopy(layer.attention).reset_to_constant()
        static = nn.functional.conv2d(x, multiple * layer.weight.mean(0), None, 1, 1, 1, groups)
        torch.testing.assert_close(layer(x), static)
        heads = [p for name, p in layer.attention.named_parameters() if re.search('._fc', name)]
        assert heads and not any(p.any() for p in heads)
        layer(x).square().sum().backward()
        assert all(p.grad.any() for p in heads)
        with torch.no_grad():
            for p in heads:
                p -= 1e-3 * p.grad
        assert not torch.allclose(layer(x), static)


def published(layer):
    """The state that the releases give this layer, drawn afresh: bank first, attention after."""
    state = copy.deepcopy(layer.state_dict())
    for name, value in state.items():
        if name == 'weight':
            for kernel in value:
                nn.init.kaiming_normal_(kernel, mode='fan_out', nonlinearity='relu')
        elif name.startswith('attention') and value.dim() == 4:
            nn.init.kaiming_normal_(value, mode='fan_out', nonlinearity='relu')
        elif name.endswith('bias'):
            value.zero_()
    return state


@pytest.mark.parametrize('groups', [1, 8])
@pytest.mark.parametrize('cls', BANKED)
def test_he_begins_as_published_to_the_last_bit(cls, groups):
    torch.manual_seed(0)
    layer = cls(8, 16, 3, groups=groups, init='he')
    layer.init_weights()
    torch.manual_seed(0)
    for _ in range(2):  # by the constructor, and as MMEngine begins
        drawn = published(layer)
    assert all(torch.equal(value, drawn[name]) for name, value in layer.state_dict().items())
    assert layer.attention.kernel_fc.weight.any()


@with_init
def test_weights_compute_the_same_however_the_layer_began(cls):
    zero, he = cls(8, 12, 3), cls(8, 12, 3, init='he')
    he.load_state_dict(randomised(zero).state_dict())
    x = torch.randn(2, 8, 6, 6)
    for training in (False, True):
        assert torch.equal(zero.train(training)(x), he.train(training)(x))


def test_a_hotter_attention_is_more_uniform():
    layer, average = DyConv2d(8, 12, 3, init='he'), torch.randn(2, 8)
    warm, hot = (layer.attention(average, t)['kernel_attention'] for t in (1, 1e4))
    torch.testing.assert_close(hot, torch.full((2, 4), 0.25), rtol=1e-2, atol=1e-3)
    assert (hot - 0.25).abs().max() < (warm - 0.25).abs().max()


@every_layer
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('arguments', [dict(kernel_size=1), dict(kernel_size=3, padding=1)])
def test_an_image_that_is_not_finite_spoils_itself_alone(cls, arguments, value):
    """At inference; in training batch statistics carry it on, as those of a static network do."""
    layer = randomised(cls(8, 8, **arguments)).eval()
    for size in (3, 16):
        x = torch.randn(3, 8, size, size)
        x[1, 0, 0, 0] = value
        with torch.no_grad():
            output, alone = layer(x), layer(x[::2])
        assert not output[1].isfinite().all()
        torch.testing.assert_close(output[::2], alone)
    if cls in (DyConv2d, CondConv2d, DCDConv2d):  # no BatchNorm
        assert layer.train()(x)[::2].isfinite().all()


@every_layer
def test_is_one_operation_to_a_tracer(cls):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), cls(8, 8, 3, padding=1), nn.BatchNorm2d(8)).eval()
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes][1:-1] == ['0', '1', '2']
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(traced(x), model(x))


@every_layer
@pytest.mark.parametrize('place', [FakeTensorMode, lambda: torch.device('meta')])
def test_is_made_without_memory(cls, place):
    for _ in range(2):
        with place():
            layer = cls(8, 8, 3, padding=1)
            output = layer(torch.randn(2, 8, 9, 9))
            output.sum().backward()
        assert output.shape == (2, 8, 9, 9)
        assert all(parameter.grad is not None for parameter in layer.parameters())
    x = torch.randn(2, 8, 9, 9)
    made = cls(8, 8, 3, padding=1)
    assert made(x).isfinite().all()  # none is left behind
    for assign in (True, False):
        with torch.device('meta'):
            layer = cls(8, 8, 3, padding=1)
        if not assign:
            layer = layer.to_empty(device='cpu')
            for buffer in layer.buffers():
                buffer.fill_(77)  # as memory may
        layer.load_state_dict(made.state_dict(), assign=assign)
        assert torch.equal(layer.eval()(x), made.eval()(x))


@pytest.mark.parametrize(('cls', 'arguments'), [
    *((cls, {}) for cls in LAYERS), (ODConv2d, dict(gate_scale=2))])
def test_what_memory_held_is_gone_once_weights_are_initialised(cls, arguments):
    with torch.device('meta'):
        layer = cls(8, 8, 3, padding=1, **arguments)
    layer = layer.to_empty(device='cpu')
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data.fill_(77)
    torch.manual_seed(0)
    layer.init_weights()
    made = cls(8, 8, 3, padding=1, **arguments)
    torch.manual_seed(0)
    made.init_weights()
    x = torch.randn(2, 8, 9, 9)
    assert torch.equal(layer(x), made(x))
    assert all(torch.equal(value, made.state_dict()[name])
               for name, value in layer.state_dict().items())


@every_layer
@pytest.mark.parametrize('decay', [0.9, 0.9999])
def test_averages_of_weights_and_buffers(cls, decay):
    """What is equal at all times is the average, too."""
    model = nn.Sequential(randomised(cls(8, 8, 3)))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for _ in range(20):
        average.update_parameters(model)
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(average.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-4)


@every_layer
@pytest.mark.parametrize('options', [{}, dict(kernel_num=1)])
def test_half_layers_are_traced(cls, options):
    if not all(has(cls, name) for name in options):
        return
    layer = randomised(cls(16, 16, 3, padding=1, **options)).half().eval()
    x = torch.randn(1, 16, 8, 8).half()
    traced = torch.jit.trace(layer, x)
    assert traced(x).dtype == torch.float16
    torch.testing.assert_close(traced(x), layer(x), rtol=1e-2, atol=1e-2)


@every_layer
def test_scripting_is_refused_with_the_way_to_go(cls):
    sentence = rf'{cls.__name__} cannot be scripted, .*: use torch\.jit\.trace or torch\.export'
    with pytest.raises(NotImplementedError, match=sentence):
        torch.jit.script(nn.Sequential(cls(8, 8, 3)))


@pytest.mark.parametrize('way', ['autocast', 'half'])
@pytest.mark.parametrize(('size', 'arguments'), [
    (32, dict(kernel_size=3, padding=1)), (4, dict(kernel_size=3, padding=1)),
    (64, dict(kernel_size=1))])
@pytest.mark.parametrize('cls', [*LAYERS, warehoused])
def test_float16_holds_gradients_where_it_holds_those_of_static_layers(cls, size, arguments, way):
    scale = 8 if cls is FDConv2d else 256  # its gates are on maps, too

    def gradients(layer, dtype=torch.float32):
        torch.manual_seed(1)
        x, grad = torch.randn(2, 2, 64, size, size)
        x = x.to(dtype).requires_grad_()
        with torch.autocast('cpu', torch.float16, way == 'autocast' and dtype == torch.float32):
            output = layer(x)
        output.backward((scale * (0.1 + grad / 10)).to(output.dtype))
        return [x.grad, *(parameter.grad for parameter in layer.parameters())]

    dtype = torch.float16 if way == 'half' else torch.float32
    static = gradients(nn.Conv2d(64, 64, **arguments, bias=False).to(dtype), dtype)
    assert all(grad.isfinite().all() for grad in static)
    layer = randomised(cls(64, 64, **arguments, bias=False)).eval()
    expected = gradients(copy.deepcopy(layer).double(), torch.float64)
    for grad, exact in zip(gradients(layer.to(dtype), dtype), expected):
        if exact.abs().max() < torch.finfo(torch.float16).max:
            assert grad.isfinite().all()
            if grad.numel() > 1:  # a single number may be a difference of large ones
                assert (grad - exact).abs().max() <= 0.1 * exact.abs().max()


@every_layer
@pytest.mark.parametrize('change', [dict(kernel_size=(0, 3)), dict(stride=0), dict(dilation=0),
                                    dict(kernel_size=(3, )), dict(kernel_size=(3, 3, 3))])
def test_a_geometry_of_nothing_is_refused(cls, change):
    with pytest.raises(ValueError, match='must be at least 1, got'):
        cls(**{**dict(in_channels=8, out_channels=8, kernel_size=3), **change})


def test_groups_of_a_norm_are_some():
    with pytest.raises(ValueError, match='num_groups must divide its 16 channels .* got 0'):
        ODConv2d(8, 8, 3, norm_cfg=dict(type='GN', num_groups=0))


@pytest.mark.parametrize('switch', ['local', 'fbm'])
def test_fdconvs_modulations_are_switched_off(switch):
    part = dict(local='KSM_Local', fbm='FBM')[switch]
    assert getattr(FDConv2d(8, 8, 3), part) is not None
    assert getattr(FDConv2d(8, 8, 3, **{switch: False}), part) is None


@pytest.mark.parametrize(('cls', 'options', 'geometry', 'sgd', 'adam'), [
    (ODConv2d, dict(kernel_num=1), (64, 3, 1), 1 / 64, 1 / 8),
    (ODConv2d, dict(kernel_num=1, gate_scale=2), (64, 3, 1), 1, 1),
    (ODConv2d, dict(kernel_num=4, gate_scale=2), (64, 3, 1), 1 / 4, 1),
    (DyConv2d, dict(kernel_num=4), (64, 3, 1), 1 / 4, 1),
    (CondConv2d, dict(kernel_num=8), (64, 3, 1), 2, 4),
    (DCDConv2d, {}, (64, 3, 1), 1, 1),
    (FDConv2d, {}, (64, 3, 1), 0.055, 0.235),
    (FDConv2d, {}, (64, 1, 1), 0.49, 0.706),
    (FDConv2d, {}, (96, 3, 96), 4.6, 2.32),
    (FDConv2d, {}, (288, 3, 288), 13.8, 4.04)])
def test_what_a_step_changes_of_what_a_static_layer_would(cls, options, geometry, sgd, adam):
    torch.manual_seed(0)
    channels, size, groups = geometry
    shape = dict(padding=size // 2, groups=groups, bias=False)
    static = nn.Conv2d(channels, channels, size, **shape).double()
    layer = cls(channels, channels, size, **shape, **options).double()
    x, target = torch.randn(2, 4, channels, 9, 9).double()
    for optimizer, expected in ((torch.optim.SGD, sgd), (torch.optim.Adam, adam)):
        layer.inflate(static.weight.data)
        changes = []
        for module, weight in ((copy.deepcopy(static), 'weight'), (layer.eval(), layer.bank_name)):
            before = module(x)
            (before - target).square().sum().backward()
            optimizer([getattr(module, weight)], lr=1e-6).step()
            module.zero_grad()
            changes.append((module(x) - before).detach().norm())
        assert (changes[1] / changes[0]).item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize('cls', BANKED)
@pytest.mark.parametrize('kernel_num', [1, 4, 5])
def test_filters_that_are_zero_are_set_apart_too(cls, kernel_num):
    """As of a head that begins so, or pruned: equal kernels would stay equal."""
    layer = cls(8, 4, 3, kernel_num=kernel_num)
    kernel = torch.randn(4, 8, 3, 3)
    kernel[1] = 0
    layer.inflate(kernel)
    torch.testing.assert_close(layer.weight.mean(0)[1], kernel[1], rtol=0, atol=1e-7)
    for one in layer.weight[:2] if kernel_num > 1 else ():
        assert (one[[0, 1]] != layer.weight.mean(0)[[0, 1]]).any((1, 2, 3)).all()
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(layer(x), nn.functional.conv2d(x, kernel), rtol=1e-4, atol=1e-5)
