from types import SimpleNamespace

import pytest
from mmengine.logging import MessageHub
from torch import nn

from mmdet_odconv import ODConv2d, TemperatureAnnealingHook


class FakeRunner(SimpleNamespace):
    """What the hook reads of a runner: 10 iterations an epoch."""

    def __init__(self, iteration=0):
        super().__init__(model=nn.Sequential(ODConv2d(4, 4, 3), nn.Sequential(ODConv2d(4, 4, 1))),
                         train_dataloader=range(10), iter=iteration,
                         message_hub=MessageHub('test_hooks'))

    @property
    def epoch(self):
        return self.iter // 10

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


def test_by_epoch():
    runner, hook = FakeRunner(), TemperatureAnnealingHook(begin=31, end_epoch=3, by_epoch=True)
    hook.before_train(runner)
    for runner.iter, expected in ((0, 31), (9, 31), (10, 21), (25, 11), (30, 1)):
        hook.before_train_epoch(runner)
        hook.before_train_iter(runner, 0)
        assert runner.temperatures == pytest.approx([expected] * 2)


def test_a_resumed_run_has_the_right_value_at_once_and_ends_at_one():
    runner, hook = FakeRunner(iteration=15), TemperatureAnnealingHook(begin=31, end_epoch=3)
    hook.before_train(runner)
    assert runner.temperatures == pytest.approx([16, 16])
    hook.after_train(runner)
    assert runner.temperatures == [1, 1]


@pytest.mark.parametrize('arguments', [dict(begin=0), dict(end_epoch=0), dict(begin=-1)])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match='begin and end_epoch must be greater than 0, got'):
        TemperatureAnnealingHook(**arguments)
