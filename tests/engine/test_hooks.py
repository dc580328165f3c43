import json
from types import SimpleNamespace

import pytest
import torch
from mmdet.datasets import CocoDataset, ConcatDataset, MultiImageMixDataset
from mmdet.datasets.samplers import MultiSourceSampler
from mmengine.dataset import ClassBalancedDataset, InfiniteSampler, RepeatDataset
from mmengine.dataset import ConcatDataset as MMEngineConcatDataset
from mmengine.logging import MessageHub
from torch import nn
from torch.utils.data import ConcatDataset as TorchConcatDataset
from torch.utils.data import DataLoader, TensorDataset

from mmdet_odconv import (
    InputCheckHook,
    InputError,
    ODConv2d,
    TemperatureAnnealingHook,
    WarehouseWarmUpHook,
)
from mmdet_odconv.layers import WarehouseManager


class FakeRunner(SimpleNamespace):
    """What the hook reads of a runner: 10 iterations an epoch."""

    def __init__(self, iteration=0):
        super().__init__(model=nn.Sequential(ODConv2d(4, 4, 3), nn.Sequential(ODConv2d(4, 4, 1))),
                         train_dataloader=range(10), iter=iteration,
                         message_hub=MessageHub('test_hooks'))

    @property
    def temperatures(self):
        return [self.model[0].temperature, self.model[1][0].temperature]


def test_falls_linearly_to_one_and_is_logged():
    runner, hook = FakeRunner(), TemperatureAnnealingHook(begin=31, end_epoch=3)
    hook.before_train(runner)
    for runner.iter, expected in ((0, 31), (1, 30), (15, 16), (29, 2), (30, 1), (100, 1)):
        hook.before_train_iter(runner, runner.iter)
        assert runner.temperatures == pytest.approx([expected] * 2)
        logged = runner.message_hub.get_scalar('train/temperature').current()
        assert logged == pytest.approx(expected)


def test_epochs_of_a_sampler_without_an_end_are_all_processes(monkeypatch):
    """Its length is the data set's in each of them."""
    monkeypatch.setattr('mmdet_odconv.engine.hooks.get_world_size', lambda: 2)
    runner, hook = FakeRunner(iteration=5), TemperatureAnnealingHook(begin=31, end_epoch=3)
    images = TensorDataset(torch.zeros(10, 1))
    both = TorchConcatDataset([images, images])
    endless = MultiSourceSampler(both, batch_size=1, source_ratio=[1, 1])
    for sampler, expected in ((InfiniteSampler(images), 21), (endless, 26), (None, 26)):
        runner.train_dataloader = DataLoader(images, sampler=sampler)
        hook.before_train(runner)
        assert runner.temperatures == pytest.approx([expected] * 2)


def test_by_epoch():
    runner, hook = FakeRunner(), TemperatureAnnealingHook(begin=31, end_epoch=3, by_epoch=True)
    hook.before_train(runner)
    for runner.iter, expected in ((0, 31), (9, 31), (10, 21), (25, 11), (30, 1)):
        hook.before_train_iter(runner, 0)
        assert runner.temperatures == pytest.approx([expected] * 2)


def test_a_resumed_run_has_the_right_value_at_once_and_ends_at_one():
    runner, hook = FakeRunner(iteration=15), TemperatureAnnealingHook(begin=31, end_epoch=3)
    hook.before_train(runner)
    assert runner.temperatures == pytest.approx([16, 16])
    hook.after_train(runner)
    assert runner.temperatures == [1, 1]


@pytest.mark.parametrize('evaluation', ['before_val', 'before_test'])
@pytest.mark.parametrize('by_epoch', [False, True])
def test_evaluates_at_one_and_goes_on_where_it_was(evaluation, by_epoch):
    runner = FakeRunner(iteration=20)
    hook = TemperatureAnnealingHook(begin=31, end_epoch=3, by_epoch=by_epoch)
    hook.before_train_iter(runner, 0)
    assert runner.temperatures == pytest.approx([11, 11])
    getattr(hook, evaluation)(runner)
    assert runner.temperatures == [1, 1]
    assert runner.message_hub.get_scalar('train/temperature').current() == pytest.approx(11)
    hook.before_train_iter(runner, 1)
    assert runner.temperatures == pytest.approx([11, 11])


def test_iterations_in_place_of_epochs():
    runner = FakeRunner(iteration=5)
    hook = TemperatureAnnealingHook(begin=31, end_iter=10)
    for runner.train_dataloader in (range(10), range(1000)):
        hook.before_train(runner)
        assert runner.temperatures == pytest.approx([16, 16])
    for hook in (TemperatureAnnealingHook, WarehouseWarmUpHook):
        with pytest.raises(ValueError, match='end_iter must be greater than 0, got 0'):
            hook(end_iter=0)


@pytest.mark.parametrize(('hook', 'module', 'name'), [
    (TemperatureAnnealingHook, WarehouseManager, 'temperature'),
    (WarehouseWarmUpHook, lambda: ODConv2d(4, 4, 3), 'tau')])
def test_a_hook_of_another_layer_says_that_it_does_nothing(hook, module, name, monkeypatch):
    said = []
    monkeypatch.setattr('mmdet_odconv.engine.hooks.print_log', lambda text, **_: said.append(text))
    runner = FakeRunner()
    runner.model = nn.Sequential(module())
    runner.message_hub = MessageHub(f'test_hooks_{name}')
    hook().before_train(runner)
    assert said == [f'{hook.__name__} finds nothing in a Sequential to change: it has no {name}.']
    assert not runner.message_hub.log_scalars


@pytest.mark.parametrize('arguments', [dict(begin=0), dict(end_epoch=0), dict(begin=-1)])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match='begin and end_epoch must be greater than 0, got'):
        TemperatureAnnealingHook(**arguments)


def test_warm_up_of_warehouses_falls_to_zero_and_stays_for_validation():
    runner, hook = FakeRunner(iteration=5), WarehouseWarmUpHook(end_epoch=2)
    manager = WarehouseManager()
    runner.model.append(nn.Sequential(manager))
    hook.before_train(runner)  # resumed: the right value at once
    assert manager.tau.item() == pytest.approx(0.75)
    for runner.iter, expected in ((5, 0.75), (10, 0.5), (19, 0.05), (20, 0), (30, 0)):
        hook.before_train_iter(runner, 0)
        assert manager.tau.item() == pytest.approx(expected)
        hook.before_val(runner)
        assert manager.tau.item() == pytest.approx(expected)
        logged = runner.message_hub.get_scalar('train/tau').current()
        assert logged == pytest.approx(expected)
    assert runner.temperatures == [1, 1]


@pytest.mark.parametrize('arguments', [dict(begin=0), dict(begin=1.5), dict(end_epoch=0)])
def test_bad_arguments_of_the_warm_up(arguments):
    with pytest.raises(ValueError, match='begin must be above 0 to 1 and end_epoch greater than 0'):
        WarehouseWarmUpHook(**arguments)


CLASSES = ('cat', 'dog', 'cow')


class Fake(CocoDataset):
    """A dataset of two images whose annotations have ``found`` categories."""

    def __init__(self, ann_file='a.json', classes=CLASSES, found=None, **kwargs):
        self.cat_ids = list(range(len(classes) if found is None else found))
        super().__init__(ann_file=ann_file, metainfo=dict(classes=classes), **kwargs)

    def load_data_list(self):
        return [dict(instances=[dict(bbox_label=i)], img_id=i, height=9, width=9)
                for i in range(2)]

    def filter_data(self):
        return self.data_list


def check(dataset, num_classes=3):
    head = nn.Module()
    head.num_classes = num_classes
    InputCheckHook().before_train(SimpleNamespace(
        model=nn.ModuleDict(dict(bbox_head=head)), val_loop=None, train_dataloader=SimpleNamespace(
            dataset=dataset)))


WRAPPERS = {
    'none': lambda dataset: dataset,
    'repeated balanced': lambda dataset: RepeatDataset(
        dict(type=ClassBalancedDataset, dataset=dataset, oversample_thr=1e-3), 2),
    'mixed': lambda dataset: MultiImageMixDataset(dataset, []),
    "mmengine's concat": lambda dataset: MMEngineConcatDataset([Fake(), dataset]),
    "mmdet's concat": lambda dataset: ConcatDataset([Fake('b.json'), dataset]),
    'repeated concat': lambda dataset: RepeatDataset(
        dict(type=ConcatDataset, datasets=[Fake(), dataset]), 2),
}


@pytest.mark.parametrize('wrap', WRAPPERS.values(), ids=WRAPPERS)
def test_datasets_are_checked_in_any_wrapper(wrap):
    check(wrap(Fake()))
    with pytest.raises(InputError, match=r'bbox_head has num_classes=80 but a\.json has 3 classes'):
        check(wrap(Fake()), num_classes=80)
    with pytest.raises(InputError, match=r'a\.json has 2 of the 3 classes that the config names'):
        check(wrap(Fake(found=2)))


def test_a_classifiers_head_is_checked():
    head = nn.Module()
    head.num_classes = 10
    runner = SimpleNamespace(model=nn.ModuleDict(dict(head=head)), val_loop=None,
                             train_dataloader=SimpleNamespace(dataset=Fake()))
    with pytest.raises(InputError, match=r'^head has num_classes=10 but a\.json has 3 classes'):
        InputCheckHook().before_train(runner)


def test_what_is_evaluated_on_is_checked_as_training_begins(tmp_path):
    """Not after the first epoch; only its classes, since it may have no annotations."""
    path = tmp_path / 'val.json'
    path.write_text(json.dumps(dict(images=[], categories=[
        dict(id=i, name=name) for i, name in enumerate(('dog', 'cat', 'cow'))])))

    def begin(classes):
        val = CocoDataset(ann_file=str(path), metainfo=dict(classes=classes), test_mode=True,
                          serialize_data=False)
        runner = SimpleNamespace(
            model=nn.ModuleDict(), train_dataloader=SimpleNamespace(dataset=Fake()),
            val_loop=object(), val_dataloader=SimpleNamespace(dataset=val), cfg={})
        InputCheckHook().before_train(runner)

    begin(('dog', 'cat', 'cow'))
    with pytest.raises(InputError, match=r"val\.json lists dog where the config's .* have cat"):
        begin(CLASSES)
    with pytest.raises(InputError, match=r'val\.json has 0 of the 1 classes'):
        begin(('horse',))


def test_concatenated_datasets_of_different_classes_need_the_most():
    dataset = ConcatDataset([Fake(), Fake('b.json', classes=('cat', 'dog'))])
    check(dataset)
    with pytest.raises(InputError, match=r'num_classes=2 but a\.json has 3 classes'):
        check(dataset, num_classes=2)


def test_nothing_is_refused_that_may_be_right():
    panoptic = Fake()
    panoptic._metainfo['stuff_classes'] = ['sky']
    check(panoptic, num_classes=2)  # a bbox head knows things alone
    check(Fake(return_classes=True), num_classes=256)  # classes are named by text
    check(range(3), num_classes=7)


def test_decay_that_does_not_reach_depthwise_dynamic_layers_is_said(monkeypatch):
    said = []
    monkeypatch.setattr('mmdet_odconv.engine.hooks.print_log',
                        lambda message, logger, level: said.append(message))
    config = dict(optim_wrapper=dict(paramwise_cfg=dict(dwconv_decay_mult=0.0)))
    for groups, count in ((1, 0), (4, 1)):
        model = nn.ModuleDict(dict(conv=ODConv2d(4, 4, 3, groups=groups)))
        InputCheckHook().before_train(SimpleNamespace(
            model=model, cfg=config, val_loop=None,
            train_dataloader=SimpleNamespace(dataset=range(3))))
        assert len(said) == count
    assert said[0].startswith('paramwise_cfg.dwconv_decay_mult=0.0 does not reach 1 depthwise')
    assert "custom_keys, such as {'conv.weight': dict(decay_mult=0.0)}" in said[0]
