import copy

import pytest
import torch
from mmdet.models.backbones import MobileNetV2, ResNet
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import MODELS
from reference import randomised
from torch import nn

from mmdet_odconv import InputError, KWMobileNetV2, KWResNet
from mmdet_odconv.checkpoints import load_static
from mmdet_odconv.layers import KWConv2d, WarehouseManager, set_warm_up

# Millions, of the release's README with the classifier; R18 1/4 there is 4.08, by its config 4.03.
PUBLISHED = [
    ('resnet18', '1/4', 4.03), ('resnet18', '1/2', 7.43), ('resnet18', '1x', 11.93),
    ('resnet18', '2x', 23.24), ('resnet18', '4x', 45.86),
    ('resnet50', '1/2', 17.64), ('resnet50', '1x', 28.05), ('resnet50', '4x', 102.02),
    ('mobilenetv2_100', '1/2', 2.65), ('mobilenetv2_100', '1x', 5.17),
    ('mobilenetv2_100', '4x', 11.38), ('mobilenetv2_050', '1/2', 1.47),
    ('mobilenetv2_050', '1x', 2.85), ('mobilenetv2_050', '4x', 4.65)]


def build(name, budget, **arguments):
    if 'resnet' in name:
        return KWResNet(int(name[len('resnet'):]), budget=budget, **arguments)
    return KWMobileNetV2(int(name[-3:]) / 100, budget=budget, **arguments)


def classifier(name, budget):
    """Parameters of the release's; MobileNetV2's at 1/2 is dynamic too, of 20 cells of 32x1000."""
    features = {'resnet18': 512, 'resnet50': 2048}.get(name, 1280)
    if features == 1280 and budget == '1/2':
        hidden, mixtures, cells = 40, 40, 20
        attention = features * hidden + 2 * hidden + (hidden + 1) * mixtures * (cells + 1)
        return cells * 32 * 1000 + attention + 1000
    return (features + 1) * 1000


@pytest.mark.parametrize(('name', 'budget', 'expected'), PUBLISHED)
def test_parameters_equal_the_published(name, budget, expected):
    with torch.device('meta'):
        model = build(name, budget)
    count = sum(p.numel() for p in model.parameters()) + classifier(name, budget)
    assert round(count / 1e6, 2) == expected


def test_registered_in_the_root_registry_and_the_layer_nowhere():
    for cls in (KWResNet, KWMobileNetV2):
        assert MODELS.get(cls.__name__) is cls and MMDET_MODELS.get(cls.__name__) is cls
    assert MODELS.get('KWConv2d') is None


def shared(model):
    """Names of the layers of each warehouse, in the order in which they took their cells."""
    layers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, KWConv2d):
            layers.setdefault(layer.warehouse.index, []).append((layer.own.start, name))
    return [[name for _, name in sorted(layers[index])] for index in sorted(layers)]


def test_stages_of_bottlenecks():
    with torch.device('meta'):
        model = KWResNet(50)
    warehouses = shared(model)
    assert len(warehouses) == 4
    assert warehouses[0] == [
        'layer1.0.conv2', 'layer1.0.conv3', *(f'layer1.{b}.conv{c}' for b in (1, 2)
                                              for c in (1, 2, 3)),
        'layer2.0.conv1', 'layer2.0.downsample.0']
    assert warehouses[3][0] == 'layer4.0.conv2' and 'layer4.0.conv1' in warehouses[2]
    static = {name for name, m in model.named_modules() if type(m) is nn.Conv2d}
    assert static == {'conv1', 'layer1.0.conv1', 'layer1.0.downsample.0'}


def test_stages_of_basic_blocks():
    with torch.device('meta'):
        first = shared(KWResNet(18))[0]
    assert first == ['layer1.0.conv1', 'layer1.0.conv2', 'layer1.1.conv1', 'layer1.1.conv2',
                     'layer2.0.conv1', 'layer2.0.downsample.0']


@pytest.mark.parametrize(('budget', 'count', 'static'), [('1/2', 9, 27), ('1x', 13, 0),
                                                         ('4x', 19, 0)])
def test_stages_of_mobilenet(budget, count, static):
    with torch.device('meta'):
        model = KWMobileNetV2(budget=budget)
    warehouses = shared(model)
    assert len(warehouses) == count and warehouses[0] == ['conv1.conv']
    assert warehouses[1] == ['layer1.0.depthwise_conv.conv', 'layer2.0.depthwise_conv.conv']
    last = next(names for names in warehouses if 'conv2.conv' in names)
    assert ('layer6.1.expand_conv.conv' in last) == (budget == '1x')
    assert {'layer6.1.linear_conv.conv', 'layer7.0.linear_conv.conv'} <= set(last)
    assert sum(type(m) is nn.Conv2d for m in model.modules()) == static


@pytest.mark.parametrize(('name', 'budget', 'message'), [
    ('resnet18', '8x', "KWResNet has the budgets '1/4', '1/2', '1x', '2x', '4x', got '8x'"),
    ('resnet18', 1, "KWResNet has the budgets .*, got 1"),
    ('mobilenetv2_100', '2x', "KWMobileNetV2 has the budgets '1/2', '1x', '4x', got '2x'")])
def test_unknown_budgets(name, budget, message):
    with pytest.raises(InputError, match=message):
        build(name, budget)


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(conv_cfg=dict(type='ODConv2d')), 'KWResNet is of KWConv2d alone, got .* ODConv2d'),
    (dict(dynamic_convs='layer1'), "'layer1' matches the name of no convolution of KWResNet"),
    (dict(dynamic_convs='layer('), r"'layer\(' is no regular expression"),
    (dict(kernel_num=4), 'KWConv2d has no argument kernel_num')])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        KWResNet(18, **arguments)


@pytest.mark.parametrize(('name', 'frozen'), [
    ('resnet18', {0}), ('resnet50', {0}), ('mobilenetv2_050', {0, 1, 2})])
def test_a_frozen_stage_freezes_its_cells(name, frozen):
    model = build(name, '1x', frozen_stages=1, norm_eval=True)
    model.train()
    cells = model.warehouse_manager.weights
    assert {i for i, p in enumerate(cells) if not p.requires_grad} == frozen
    assert model.layer2[0].conv1.attention.fc1.weight.requires_grad if 'resnet' in name else True
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(m.training for m in norms)
    x = torch.randn(2, 3, 32, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1)
    before = model.layer1(model.maxpool(model.conv1(x)) if 'resnet' in name else model.conv1(x))
    sum(y.sum() for y in model(x)).backward()
    optimizer.step()
    after = model.layer1(model.maxpool(model.conv1(x)) if 'resnet' in name else model.conv1(x))
    assert torch.equal(before, after)


def test_cells_train_where_somebody_froze_the_attention():
    model = KWResNet(18, frozen_stages=-1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_('.attention.' not in name)
    for mode in (False, True):
        model.train(mode)
        assert all(cells.requires_grad for cells in model.warehouse_manager.weights)


def test_what_is_in_no_file_is_made_anew_when_weights_are_loaded():
    source = KWResNet(18)
    source.warehouse_manager.tau.fill_(0.5)
    x = torch.randn(1, 3, 32, 32)
    source.eval()
    expected = source(x)
    with torch.device('meta'):
        assigned = KWResNet(18)
    state = source.state_dict()
    assigned.load_state_dict(state, assign=True)
    assigned.eval()
    assert all(map(torch.equal, assigned(x), expected))
    del state['warehouse_manager.tau']  # as of the release: of a trained network
    with torch.device('meta'):
        assigned = KWResNet(18)
    assigned.load_state_dict(state, assign=True)
    assigned.eval()
    assert assigned.warehouse_manager.tau.item() == 0 and assigned(x)[0].isfinite().all()
    with torch.device('meta'):
        model = KWResNet(18)
    model = model.to_empty(device='cpu')
    for buffer in model.buffers():
        buffer.fill_(77)  # as memory may
    model.load_state_dict(source.state_dict())
    model.eval()
    assert all(map(torch.equal, model(x), expected))
    for buffer in model.buffers():
        buffer.fill_(77)
    model.init_weights()
    assert model.warehouse_manager.tau.item() == 0
    conv = model.layer3[1].conv2
    assert torch.equal(conv.attention.beta, source.layer3[1].conv2.attention.beta)


def test_all_convolutions_asked_for_and_the_layer_by_name():
    with torch.device('meta'):
        named = KWResNet(18, conv_cfg=dict(type='KWConv2d', norm_cfg=dict(type='LN')))
        asked, deep = (KWResNet(18, dynamic_convs='.*', deep_stem=deep) for deep in (False, True))
    assert isinstance(named.layer1[0].conv1.attention.norm1, nn.GroupNorm)
    assert isinstance(asked.conv1, nn.Conv2d) and isinstance(deep.stem[0], nn.Conv2d)
    assert isinstance(asked.layer1[0].conv1, KWConv2d)
    with pytest.raises(InputError, match="conv_cfg must be a dict such as .*, got 'KWConv2d'"):
        KWResNet(18, conv_cfg='KWConv2d')


@pytest.mark.parametrize(('excepted', 'frozen'), [
    (None, {0}), ('attention', {0}), (r'warehouse_manager\.weights\.0', set())])
def test_cells_are_excepted_by_their_own_names(excepted, frozen):
    with torch.device('meta'):
        model = KWResNet(18, frozen_stages=1, frozen_except=excepted)
    for _ in range(2):  # as constructed, and as training begins
        cells = model.warehouse_manager.weights
        assert {i for i, p in enumerate(cells) if not p.requires_grad} == frozen
        attention = model.layer1[0].conv1.attention.fc1.weight
        assert attention.requires_grad == (excepted == 'attention')
        model.train()


@pytest.mark.parametrize(('name', 'budget'), [
    ('resnet18', '1/2'), ('resnet50', '1/2'), ('mobilenetv2_050', '1x'),
    ('mobilenetv2_050', '1/2')])
def test_no_parameter_is_left_without_a_gradient(name, budget):
    model = build(name, budget)
    model.train()
    model.init_weights()
    sum(y.sum() for y in model(torch.randn(2, 3, 64, 64))).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(('name', 'budget', 'static'), [
    ('resnet18', '1x', lambda: ResNet(18)), ('resnet18', '4x', lambda: ResNet(18)),
    ('mobilenetv2_050', '1x', lambda: MobileNetV2(0.5)),
    ('mobilenetv2_050', '4x', lambda: MobileNetV2(0.5))])
def test_conversion_from_static_weights_is_exact(name, budget, static):
    model, static = build(name, budget).double(), randomised(static()).double()
    static.eval()
    assert load_static(model, static.state_dict(), strict=True) == []
    model.eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for ours, expected in zip(model(x), static(x)):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_conversion_at_a_small_budget_is_refused():
    with pytest.raises(InputError, match=r'^layer1\.0\.conv1: a warehouse of budget 0.5 has fewer'):
        load_static(KWResNet(18, budget='1/2'), ResNet(18).state_dict())


def test_static_weights_of_which_a_layer_is_missing():
    state = {name: t for name, t in ResNet(18).state_dict().items()
             if name != 'layer2.0.conv2.weight'}
    with pytest.raises(InputError, match=r'1 of the 19 dynamic layers .*: layer2\.0\.conv2;'):
        load_static(KWResNet(18), state)


def test_static_weights_by_the_wrong_door():
    with pytest.raises(InputError, match='mixes its kernel from a warehouse, but .*StaticPretr'):
        KWResNet(18).load_state_dict(ResNet(18).state_dict(), strict=False)


def test_copies_and_averages_have_warehouses_of_their_own():
    model = KWResNet(18)
    model.eval()
    average = ExponentialMovingAverage(model)
    set_warm_up(model, 0.5)
    average.update_parameters(model)
    assert average.module.warehouse_manager.tau == 0.5  # and is evaluated as it was trained
    twin = copy.deepcopy(model)
    for p in twin.warehouse_manager.parameters():
        p.data.zero_()
    layers = [m for m in twin.modules() if isinstance(m, KWConv2d)]
    assert all(layer.warehouse.manager is twin.warehouse_manager for layer in layers)
    assert sum(isinstance(m, WarehouseManager) for m in model.modules()) == 1
    assert all(p.any() for p in model.warehouse_manager.parameters())


def test_a_backbone_compiles_without_a_graph_break():
    model = KWResNet(10)
    model.eval()
    x = torch.randn(2, 3, 32, 32)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    for ours, expected in zip(compiled(x), model(x)):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
