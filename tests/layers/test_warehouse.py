import copy
import pickle
import warnings

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import randomised
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdet_odconv import InputError, fuse
from mmdet_odconv.deployment.fusion import Affine
from mmdet_odconv.layers import KWConv2d, WarehouseManager, set_temperature, set_warm_up


def network(*layers, budget=1.0, tau=0.0, dtype=None, **arguments):
    """Convolutions, each the arguments of nn.Conv2d, of one warehouse, which stands at the end."""
    convs = [nn.Conv2d(*args, device='meta') for args in layers]
    manager = WarehouseManager(dtype=dtype)
    warehouse = manager.add([conv.weight.shape for conv in convs], budget)
    model = nn.Sequential(*(KWConv2d(*args, dtype=dtype, warehouse=warehouse, **arguments)
                            for args in layers), manager)
    set_warm_up(model, tau)
    return model


def inputs_of(model):
    """Every parameter of a network by its name; the layers' own names have no warehouse."""
    return dict(model.named_parameters())


@st.composite
def networks(draw):
    small = st.integers(1, 3)
    co, ci = draw(small), draw(small)
    layers = []
    for _ in range(draw(st.integers(1, 2))):
        groups = draw(small)
        layers.append((groups * ci * draw(st.integers(1, 2)), groups * co * draw(st.integers(1, 2)),
                       draw(st.tuples(st.integers(1, 2), small)), draw(st.integers(1, 2)),
                       draw(st.integers(0, 2)),
                       draw(st.integers(1, 2)), groups, draw(st.booleans()),
                       draw(st.sampled_from(['zeros', 'reflect']))))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    model = network(*layers, budget=draw(st.sampled_from([0.25, 0.5, 1, 2, 4])),
                    tau=draw(st.sampled_from([0, 0.3, 1])), dtype=torch.float64,
                    basis_ratio=draw(st.sampled_from([1, 0.1])), reduction=draw(
                        st.floats(0.01, 1)))
    tau = model[-1].tau.clone()
    randomised(model).train(draw(st.booleans()))
    model[-1].tau.copy_(tau)
    for layer in model[:-1]:  # not a parameter
        layer.attention.beta.copy_(layer.attention.beta.abs() > 1)
    which = draw(st.integers(0, len(layers) - 1))
    x = torch.randn(draw(small), layers[which][0], *(draw(st.integers(5, 8)) for _ in range(2)),
                    dtype=torch.float64)
    return model, model[which], x.requires_grad_()


@settings(max_examples=40, deadline=None)
@given(drawn=networks())
def test_equals_the_equations_and_every_gradient(drawn):
    model, layer, x = drawn
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # batches of one image
        ours = layer(x)
    named = dict(layer.named_parameters(), cells=layer.warehouse.cells)
    if model[-1].tau == 1:  # the attention is without effect
        named = {name: p for name, p in named.items() if 'attention' not in name}
    reference.assert_same_with_gradients(ours, reference.forward(layer, x), dict(x=x, **named))


@pytest.mark.parametrize(('budget', 'own', 'beta'), [
    (1, [(0, 4), (4, 6)], [0, 1, 2, 3]),
    (2, [(0, 8), (8, 12)], [0, 2, 4, 6]),
    (4, [(0, 16), (16, 24)], [0, 4, 8, 12])])
def test_layers_take_their_cells_in_turn(budget, own, beta):
    first, second, manager = network((4, 4, (2, 2)), (4, 4, (2, 1)), budget=budget)
    assert [(layer.own.start, layer.own.stop) for layer in (first, second)] == own
    assert manager.weights[0].shape == (6 * budget, 4, 4, 1, 1)
    assert first.attention.beta.argmax(1).tolist() == beta
    assert first.attention.beta.sum(1).tolist() == [1] * 4
    assert not second.attention.beta[:, :own[0][1]].any()


def test_below_one_some_mixtures_begin_as_the_cell_of_zeros():
    layer, manager = network((8, 8, 1), budget=0.5)
    # Cells of 4 x 4: four mixtures of two cells. i mod 2 == (i // 2) mod 2 holds for 0 and 3.
    assert manager.weights[0].shape == (2, 4, 4, 1, 1)
    assert layer.attention.beta.tolist() == [[1, 0], [0, 0], [0, 0], [0, 1]]
    set_warm_up(manager, 1)
    kernel = manager.weights[0].detach()
    expected = torch.zeros(8, 8)
    expected[:4, :4], expected[4:, 4:] = kernel[0, ..., 0, 0], kernel[1, ..., 0, 0]
    x = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(layer(x), F.conv2d(x, expected[..., None, None], layer.bias))


def test_a_warehouse_without_cells_left():
    model = network((4, 4, 1))
    with pytest.raises(ValueError, match='of 1 cells has none left for one more .* 9 mixtures'):
        KWConv2d(4, 4, 3, warehouse=model[0].warehouse)


def test_cells_have_the_scale_of_the_release():
    model = network((64, 64, 3), (64, 64, 1))
    for layer, m in zip(model, (9, 1)):
        own = layer.warehouse.cells[layer.own]
        assert own.std().item() == pytest.approx((2 / (64 * m))**0.5, rel=0.05)
    before = model[1].warehouse.cells.detach().clone()
    model[0].init_weights()
    after = model[0].warehouse.cells
    assert torch.equal(after[9:], before[9:]) and not torch.equal(after[:9], before[:9])


@pytest.mark.parametrize('budget', [1, 2, 4])
@pytest.mark.parametrize('groups', [1, 2, 8])
def test_a_static_convolution_inflated_is_the_same(budget, groups):
    conv = nn.Conv2d(8, 16, 3, 2, 1, groups=groups).double()
    geometry = 8, 16, 3, 2, 1, 1, groups
    first, second, _ = network(geometry, geometry, budget=budget, dtype=torch.float64)
    x = torch.randn(3, 8, 9, 7, dtype=torch.float64)
    for layer in (first, second):
        layer.inflate(conv.weight, conv.bias)
    for layer in (first, second):
        for training in (True, False):
            torch.testing.assert_close(layer.train(training)(x), conv(x), rtol=0, atol=1e-10)
    first(x).square().sum().backward()  # and it learns from there, the attention too
    assert first.attention.fc2.weight.grad.abs().max() > 0
    assert first.warehouse.cells.grad[first.own].abs().max() > 0


@pytest.mark.parametrize('budget', [0.25, 0.5])
def test_a_small_budget_cannot_hold_a_static_kernel(budget):
    layer, _ = network((8, 8, 3), budget=budget)
    with pytest.raises(ValueError, match=f'budget {budget:g} has fewer cells than the static'):
        layer.inflate(torch.zeros(8, 8, 3, 3))


@pytest.mark.parametrize(('kernel', 'bias', 'message'), [
    ((8, 8, 1, 1), (8,), r'expected a static kernel of shape \(8, 8, 3, 3\), got \(8, 8, 1, 1\)'),
    ((8, 8, 3, 3), (4,), r'bias=True and 8 output channels got a static bias of shape \(4,\)')])
def test_static_kernels_of_another_shape(kernel, bias, message):
    with pytest.raises(ValueError, match=message):
        network((8, 8, 3))[0].inflate(torch.zeros(kernel), torch.zeros(bias))


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(reduction=0), r'reduction must be in \(0, 1\], got 0'),
    (dict(norm_cfg=dict(type='IN')), 'norm_cfg of the attention must have a type among'),
    (dict(kernel_num=4), 'kernel_num')])
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        network((8, 8, 3), **arguments)


def test_a_static_kernel_in_a_state_dict_is_refused():
    model = network((8, 8, 3))
    state = {'0.weight': torch.zeros(8, 8, 3, 3), '0.bias': torch.zeros(8)}
    with pytest.raises(InputError, match='^0 mixes its kernel from a warehouse, but .*Static'):
        model.load_state_dict(state, strict=False)


def test_warm_up_is_in_the_state_and_files_without_it_are_of_trained_networks():
    model, other = network((8, 8, 3), tau=0.25), network((8, 8, 3), tau=0.75)
    other.load_state_dict(model.state_dict())
    assert other[-1].tau == 0.25
    state = {name: t for name, t in model.state_dict().items() if not name.endswith('tau')}
    other.load_state_dict(state)
    assert other[-1].tau == 0
    for value in (-0.1, 1.1, float('nan')):
        with pytest.raises(ValueError, match=f'tau must be from 0 to 1, got {value}'):
            set_warm_up(model, value)


@pytest.mark.parametrize('budget', [0.3, 1.5, 0, -1, float('nan')])
def test_a_budget_that_is_no_share(budget):
    with pytest.raises(ValueError, match='budget must be a whole number or one over a whole'):
        WarehouseManager().add([torch.Size((8, 8, 3, 3))], budget)


def test_arguments_of_a_layer_that_its_warehouse_cannot_serve():
    warehouse = WarehouseManager().add([torch.Size((8, 8, 3, 3))] * 2)
    with pytest.raises(ValueError, match='basis_ratio must be greater than 0, got -1'):
        KWConv2d(8, 8, 3, warehouse=warehouse, basis_ratio=-1)
    with pytest.raises(ValueError, match=r'a kernel of shape \(12, 8, 3, 3\) is not made of cells '
                                         r'of \(8, 8\): give its shape to the warehouse'):
        KWConv2d(8, 12, 3, warehouse=warehouse)


def test_the_temperature_of_the_other_layers_is_none_of_its():
    model, x = network((8, 8, 3)).eval(), torch.randn(2, 8, 5, 5)
    expected = model[0](x)
    assert set_temperature(model, 30) == 0
    assert torch.equal(model[0](x), expected) and model[-1].tau == 0


def test_every_parameter_is_registered_once():
    model = network((8, 8, 3), (8, 8, 1))
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) and '2.weights.0' in names
    assert not any('warehouse' in name for name in names)
    assert set(model.state_dict()) == {*names, *(name for name in model.state_dict() if any(
        leaf in name for leaf in ('running', 'tracked', 'tau')))}


@pytest.mark.parametrize('clone', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_share_a_warehouse_of_their_own(clone):
    model = randomised(network((8, 8, 3), (8, 8, 1))).eval()
    twin = clone(model)
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(twin[1](twin[0](x)), model[1](model[0](x)))
    assert all(layer.warehouse.cells is twin[-1].weights[0] for layer in twin[:-1])
    assert twin[-1].weights[0] is not model[-1].weights[0]


def test_empty_batch_leaves_no_parameter_without_gradient():
    model = network((8, 16, 3), (8, 16, 1, 1, 0, 1, 2)).train()
    for layer in model[:-1]:
        assert layer(torch.randn(0, 8, 5, 5)).shape[:2] == (0, 16)
    sum(layer(torch.randn(0, 8, 5, 5)).sum() for layer in model[:-1]).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_one_image_in_training_uses_running_statistics():
    layer, _ = randomised(network((8, 16, 3))).train()
    x = torch.randn(1, 8, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        y = layer(x)
    torch.testing.assert_close(y, layer.eval()(x))


@pytest.mark.parametrize('norm_cfg', [dict(type='SyncBN'), dict(type='GN'), dict(type='LN')])
def test_norms(norm_cfg):
    layer, _ = network((8, 16, 3), norm_cfg=norm_cfg)
    assert layer.eval()(torch.randn(1, 8, 5, 5)).shape == (1, 16, 3, 3)


@pytest.mark.parametrize('groups', [1, 8])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(dtype, groups):
    model = randomised(network((16, 16, 3, 1, 1, 1, groups))).eval()
    x = torch.randn(2, 16, 8, 8)
    with torch.autocast('cpu', dtype):
        y = model[0](x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), model[0](x), rtol=0.1, atol=0.02 * y.abs().max().item())
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_dtypes_and_meta(dtype):
    model = network((8, 12, 3)).to(dtype)
    assert model[0](torch.randn(2, 8, 5, 5, dtype=dtype)).dtype == dtype
    with torch.device('meta'):
        layer, _ = network((8, 12, 3))
        assert layer(torch.empty(2, 8, 5, 5)).shape == (2, 12, 3, 3)


def test_channels_last():
    model = randomised(network((8, 12, 3)).double())
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    expected = model[0](x)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model[0](x.to(memory_format=torch.channels_last)), expected)


def test_compiles_without_a_graph_break():
    model = randomised(network((8, 8, 3, 1, 1), (8, 16, 1))).eval()
    both, x = nn.Sequential(*model[:-1]), torch.randn(2, 8, 6, 6)
    torch._dynamo.reset()
    y = torch.compile(both, fullgraph=True, backend='aot_eager')(x)
    y.sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = both(x)
    expected.sum().backward()
    torch.testing.assert_close(y, expected)
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-4)


def test_traced_for_any_batch():
    model = randomised(network((8, 8, 3, 1, 1), (8, 16, 1), basis_ratio=0.5)).eval()
    model.requires_grad_(False)  # the cells, which are not in what is traced, are constants
    both = nn.Sequential(*model[:-1])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        traced = torch.jit.trace(both, torch.randn(2, 8, 6, 6))
        for batch in (1, 2, 5):
            x = torch.randn(batch, 8, 6, 6)
            torch.testing.assert_close(traced(x), both(x))


def test_fusion_leaves_constants_behind_shared_cells():
    first, second, manager = randomised(network((8, 8, 3, 1, 1), (8, 8, 1)))
    model = nn.Sequential(first, randomised(nn.BatchNorm2d(8)), second, manager).eval()
    x = torch.randn(2, 8, 6, 6)
    expected = model[:-1](x)
    fuse(model)
    assert type(model[1]) is Affine
    torch.testing.assert_close(model[:-1](x), expected)


def test_attention_begins_at_random_as_released():
    layer, _ = network((8, 8, 3))
    assert layer.attention.fc2.weight.any()
    layer.init_weights()
    assert layer.attention.fc2.weight.any() and not layer.attention.fc2.bias.any()


def test_gradient_checkpointing():
    model = randomised(network((8, 12, 3)).double())
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x, *model.parameters()]
    plain = torch.autograd.grad(model[0](x).sum(), inputs)
    saved = torch.autograd.grad(checkpoint(model[0], x, use_reentrant=False).sum(), inputs)
    for a, b in zip(plain, saved):
        torch.testing.assert_close(a, b)


def test_is_no_conv2d_and_prints_its_arguments():
    layer, _ = network((8, 12, 3, 1, 1, 1, 1, False))
    assert not any(isinstance(m, (nn.Conv2d, nn.Linear)) for m in layer.modules())
    assert layer.extra_repr() == ('8, 12, kernel_size=(3, 3), stride=(1, 1), mixtures=9, '
                                  'warehouse=0, cells=9x(12, 8), padding=(1, 1), bias=False')
