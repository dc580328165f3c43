"""Runs of a small model that are killed, resumed, interrupted and diverge."""
import copy
import inspect
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.dataset import DefaultSampler
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn
from torch.utils.data import Dataset

from mmdet_odconv.engine import checkpointing, distributed
from mmdet_odconv.engine.checkpointing import STATES, SafeCheckpointHook, WholeFileBackend
from mmdet_odconv.engine.lock import lock_directory, release_directory
from mmdet_odconv.engine.randomness import random_state, set_random_state
from mmdet_odconv.engine.resuming import AUTO, damage, interruption, newest_whole
from mmdet_odconv.errors import DivergenceError, InputError


class Noisy(Dataset):
    """Images that every generator has a part in."""

    metainfo = dict(classes=('a',))

    def __len__(self):
        return 8

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(4)
        return dict(inputs=index + noise)


class Small(BaseModel):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.register_buffer('mask', torch.tensor([0.0, float('-inf')]))

    def forward(self, inputs, mode='loss'):
        x = self.linear(nn.functional.dropout(self.norm(inputs), training=self.training))
        return dict(loss_a=x.square().mean(), loss_b=x.mean()) if mode == 'loss' else list(x)


class Score(BaseMetric):
    """Grows with the epochs, and disturbs every generator."""

    epoch = 0

    def process(self, data_batch, data_samples):
        self.results.append(torch.rand(3).sum() + np.random.rand() + random.random())

    def compute_metrics(self, results):
        self.epoch += 1
        return dict(mAP=float(self.epoch))


class At(Hook):
    """Calls ``function(runner)`` when the runner begins an iteration, or ends a stage."""

    def __init__(self, stage, number, function):
        self.stage, self.number, self.function = stage, number, function

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if self.stage == 'iter' and runner.iter == self.number:
            self.function(runner)

    def after_val_epoch(self, runner, metrics=None):
        if self.stage == 'val' and runner.epoch == self.number:
            self.function(runner)


class Killed(BaseException):
    """Ends a run where it is, as far as one process can."""


def kill(runner):
    raise Killed


def make_runner(work_dir, resume=False, by_epoch=True, workers=0, hooks=(), load_from=None,
                lr=0.01, max_epochs=3, optimizer=None, seed=3, **checkpoint):
    loop = (dict(by_epoch=True, max_epochs=max_epochs, val_interval=1) if by_epoch else
            dict(by_epoch=False, max_iters=14, val_interval=5))
    data = dict(dataset=Noisy(), batch_size=2, num_workers=workers,
                collate_fn=dict(type='default_collate'), persistent_workers=workers > 0,
                sampler=dict(type=DefaultSampler, shuffle=True))
    torch.manual_seed(0)  # for the model, which is made before the runner seeds
    RUNNERS.append(Runner(
        Small(), str(work_dir), train_dataloader=data, train_cfg=loop, val_cfg=dict(),
        val_dataloader=dict(data, num_workers=0, persistent_workers=False),
        val_evaluator=Evaluator([Score()]),
        optim_wrapper=dict(optimizer=optimizer or dict(type='AdamW', lr=lr)),
        default_hooks=dict(checkpoint=dict(
            type='CheckpointHook', by_epoch=by_epoch, interval=1 if by_epoch else 4,
            **{'max_keep_ckpts': 1, **checkpoint})),
        custom_hooks=list(hooks), resume=resume, load_from=load_from, randomness=dict(seed=seed),
        log_level='WARNING', experiment_name=f'{Path(work_dir).name}-{time.monotonic_ns()}'))
    return RUNNERS[-1]


RUNNERS = []


@pytest.fixture(autouse=True)
def end_of_processes():
    """Data workers go with their run: those that the garbage collector finds wait 5 s each."""
    yield
    while RUNNERS:
        iterator = getattr(RUNNERS.pop().train_dataloader, '_iterator', None)
        if iterator is not None:
            iterator._shutdown_workers()


def final(work_dir):
    path = Path((Path(work_dir) / 'last_checkpoint').read_text())
    checkpoint = torch.load(path, weights_only=False)
    return path, checkpoint


def assert_bit_equal(one, other):
    for name, value in one['state_dict'].items():
        assert torch.equal(value, other['state_dict'][name]), name
    for state, their in zip(one['optimizer']['state'].values(),
                            other['optimizer']['state'].values()):
        assert all(torch.equal(state[key], their[key]) for key in state)


def killed(runner):
    with pytest.raises(Killed):
        runner.train()
    release_directory(runner.work_dir)  # as the kernel does when the process is gone


@pytest.fixture
def runs(tmp_path):
    """Two directories: of the run that is not interrupted, and of the one that is."""
    return tmp_path / 'whole', tmp_path / 'killed'


def test_every_config_gets_it(tmp_path):
    assert HOOKS.get('CheckpointHook') is SafeCheckpointHook is HOOKS.get('SafeCheckpointHook')


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('moment', [('iter', 6), ('val', 2)])
def test_an_epochs_checkpoint_resumes_bit_equal(runs, workers, moment):
    whole, broken = runs
    make_runner(whole, workers=workers).train()
    killed(make_runner(broken, workers=workers, hooks=[At(*moment, kill)]))
    make_runner(broken, workers=workers, resume=True).train()
    assert_bit_equal(final(whole)[1], final(broken)[1])


@pytest.mark.parametrize('workers', [0, 2])
def test_iterations_continue_in_the_middle_of_an_epochs_order(runs, workers, monkeypatch):
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)
    whole, broken = runs
    make_runner(whole, by_epoch=False, workers=workers).train()
    killed(make_runner(broken, by_epoch=False, workers=workers, hooks=[At('iter', 10, kill)]))
    assert final(broken)[0].name == 'iter_8.pth'
    make_runner(broken, by_epoch=False, workers=workers, resume=True).train()
    assert_bit_equal(final(whole)[1], final(broken)[1])


@pytest.mark.parametrize(('by_epoch', 'workers'), [(True, 0), (True, 2), (False, 0), (False, 2)])
def test_a_run_that_was_given_no_seed_goes_on_with_its_own(runs, by_epoch, workers, monkeypatch):
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)
    whole, broken = runs
    make_runner(whole, by_epoch=by_epoch, workers=workers).train()
    killed(make_runner(broken, by_epoch=by_epoch, workers=workers, hooks=[At('iter', 10, kill)]))
    runner = make_runner(broken, by_epoch=by_epoch, workers=workers, resume=True, seed=None)
    assert runner.seed != 3
    runner.train()
    assert_bit_equal(final(whole)[1], final(broken)[1])


def test_a_run_that_has_not_begun_begins_from_the_weights_of_its_config(tmp_path):
    make_runner(tmp_path / 'first', max_epochs=1).train()
    start, checkpoint = final(tmp_path / 'first')
    seen = []

    def see(runner):
        seen.append((runner.iter, copy.deepcopy(runner.model.state_dict())))
        raise Killed

    work_dir = tmp_path / 'run'
    killed(make_runner(work_dir, AUTO, load_from=str(start), hooks=[At('iter', 0, see)]))
    assert seen[0][0] == 0
    assert torch.equal(seen[0][1]['linear.weight'], checkpoint['state_dict']['linear.weight'])
    killed(make_runner(work_dir, AUTO, load_from=str(start), hooks=[At('iter', 6, kill)]))
    killed(make_runner(work_dir, AUTO, load_from=str(start), hooks=[At('iter', 4, see)]))
    assert seen[1][0] == 4
    assert torch.equal(seen[1][1]['linear.weight'],
                       final(work_dir)[1]['state_dict']['linear.weight'])


def test_weights_alone_are_no_run_to_resume(tmp_path):
    torch.save(dict(state_dict=Small().state_dict()), tmp_path / 'weights.pth')
    with pytest.raises(InputError, match=r'holds no run to resume, for want of meta\.epoch: give'):
        make_runner(tmp_path / 'run', True, load_from=str(tmp_path / 'weights.pth')).train()


@pytest.mark.skipif(
    'fast_forward_on_resume' not in inspect.signature(IterBasedTrainLoop).parameters,
    reason="an option of onedl-mmengine's")
def test_iterations_that_are_not_read_again_restore_no_generator_later(tmp_path, monkeypatch):
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)
    killed(make_runner(tmp_path, by_epoch=False, hooks=[At('iter', 6, kill)]))
    runner = make_runner(tmp_path, by_epoch=False, resume=True)
    restored = []
    monkeypatch.setattr('mmdet_odconv.engine.randomness.set_random_state', restored.append)
    runner._train_loop['fast_forward_on_resume'] = True
    runner.train()
    assert final(tmp_path)[0].name == 'iter_14.pth' and not restored


def test_best_checkpoints_are_saved_with_the_random_states_of_training(runs):
    whole, broken = runs
    make_runner(whole, save_best='mAP', rule='greater').train()
    killed(make_runner(broken, save_best='mAP', rule='greater', hooks=[At('iter', 4, kill)]))
    make_runner(broken, save_best='mAP', rule='greater', resume=True).train()
    assert_bit_equal(final(whole)[1], final(broken)[1])
    assert {p.name for p in whole.glob('*.pth')} == {p.name for p in broken.glob('*.pth')}
    assert len(list(whole.glob('best_*.pth'))) == 1


def test_the_middle_of_an_epoch_is_said_to_be_repeated(tmp_path, caplog):
    runner = make_runner(tmp_path, hooks=[At('iter', 7, kill)])
    hook = next(hook for hook in runner.hooks if isinstance(hook, SafeCheckpointHook))
    hook.by_epoch, hook.interval, hook.filename_tmpl = False, 3, 'iter_{}.pth'
    killed(runner)
    runner = make_runner(tmp_path, resume=True)
    said = warnings_of(runner)
    runner.train()
    assert 'epoch 2 begins anew, its first 2 iterations are repeated' in ' '.join(said)


def test_another_number_of_processes_is_said_to_differ(tmp_path):
    killed(make_runner(tmp_path, hooks=[At('iter', 5, kill)]))
    path, checkpoint = final(tmp_path)
    for states in (checkpoint[STATES] * 2, 'no', [dict(checkpoint[STATES][0], numpy=(1, 2))]):
        torch.save(dict(checkpoint, **{STATES: states}), path)
        runner = make_runner(tmp_path, resume=True, hooks=[At('iter', 4, kill)])
        said = warnings_of(runner)
        killed(runner)
        assert 'The random states in the checkpoint do not fit' in ' '.join(said)


def warnings_of(runner):
    said = []
    runner.logger.warning = lambda message, *args: said.append(message)
    return said


def test_random_states_are_read_weights_only(tmp_path):
    state = random_state()
    expected = random.random(), np.random.rand(), np.random.randn(), torch.rand(1)
    torch.save(state, tmp_path / 'state.pth')
    set_random_state(torch.load(tmp_path / 'state.pth', weights_only=True))
    assert (random.random(), np.random.rand(), np.random.randn(), torch.rand(1)) == expected


def test_metainfo_of_a_config_is_read_back(tmp_path):
    """MMEngine keeps its dicts as the config had them, of a class that no loader here allows."""
    meta = dict(dataset_meta=ConfigDict(classes=('a', 'b'), groups=[dict(a=1)]))
    old = tmp_path / 'old.pth'
    torch.save(dict(meta=meta, state_dict={}), old)  # as runs before wrote it
    checkpoint = dict(meta=meta)
    SafeCheckpointHook().before_save_checkpoint(None, checkpoint)
    torch.save(checkpoint, tmp_path / 'new.pth')
    for found in (CheckpointLoader.load_checkpoint(str(old)),
                  torch.load(tmp_path / 'new.pth', weights_only=True)):
        found = found['meta']['dataset_meta']
        assert found == dict(classes=('a', 'b'), groups=[dict(a=1)])
        assert type(found) is dict and type(found['groups'][0]) is dict


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / 'new' / 'file'
    WholeFileBackend().put(b'old', path)
    monkeypatch.setattr(os, 'fsync', lambda file: kill(None))
    with pytest.raises(Killed):
        WholeFileBackend().put(b'new', path)
    assert path.read_bytes() == b'old' and os.listdir(path.parent) == ['file']


def test_the_old_checkpoint_goes_last_and_what_is_left_over_goes_on_resuming(tmp_path, monkeypatch):
    removed = []

    def remove(self, path):
        pointer = (tmp_path / 'last_checkpoint').read_text()
        removed.append((Path(path).name, Path(pointer).name, damage(Path(pointer))))
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(WholeFileBackend, 'remove', remove)
        killed(make_runner(tmp_path))
    assert removed == [('epoch_1.pth', 'epoch_2.pth', None)]
    (tmp_path / '.epoch_3-abcdefgh.pth').write_bytes(b'half')
    mine = tmp_path / 'epoch_0.pth'
    mine.write_bytes(b'')
    os.utime(mine, (0, 0))
    make_runner(tmp_path, resume=True).train()
    assert {path.name for path in tmp_path.glob('*.pth')} == {'epoch_0.pth', 'epoch_3.pth'}
    assert not list(tmp_path.glob('.epoch*'))


def test_nothing_outside_the_directory_is_removed(tmp_path):
    elsewhere = tmp_path / 'precious'
    elsewhere.mkdir()
    killed(make_runner(tmp_path / 'run', hooks=[At('iter', 5, kill)], save_best='mAP',
                       rule='greater'))
    path, checkpoint = final(tmp_path / 'run')
    info = checkpoint['message_hub']['runtime_info']
    info['best_ckpt'], info['best_score'] = str(elsewhere), -1.0
    info['keep_ckpt_ids'] = ['/../../precious']
    checkpoint['meta']['replaces'] = ['../precious/epoch_7.pth', 3]
    (elsewhere / 'epoch_7.pth').write_bytes(b'')
    torch.save(checkpoint, path)
    make_runner(tmp_path / 'run', resume=True, save_best='mAP', rule='greater').train()
    assert (elsewhere / 'epoch_7.pth').exists()


def test_another_runs_checkpoint_names_none_of_this_ones_files(tmp_path):
    make_runner(tmp_path / 'other', max_keep_ckpts=3).train()
    make_runner(tmp_path / 'run', max_epochs=2, max_keep_ckpts=3).train()
    path, checkpoint = final(tmp_path / 'other')
    assert checkpoint['message_hub']['runtime_info']['keep_ckpt_ids'] == [1, 2, 3]
    runner = make_runner(tmp_path / 'run', resume=True, load_from=str(path), max_epochs=4,
                         hooks=[At('iter', 12, kill)])
    killed(runner)
    assert {file.name for file in (tmp_path / 'run').glob('*.pth')} == {'epoch_1.pth',
                                                                       'epoch_2.pth'}


def test_a_remote_directory_is_left_to_mmengine(tmp_path):
    (tmp_path / 'last_checkpoint').write_text('s3://bucket/run/epoch_3.pth')
    runner = Mock(work_dir=str(tmp_path), _resume=True, _load_from=None, _has_loaded=False,
                  _train_loop=Mock(spec=BaseLoop))
    SafeCheckpointHook(out_dir='s3://bucket/run').before_run(runner)
    assert runner._load_from is None and not runner.logger.warning.called


@pytest.mark.parametrize(('found', 'message'), [
    (['epoch_3.pth', None], 'does not exist for process 0: give a --work-dir that all share'),
    ([None, 'None of the checkpoints is whole.'], '^None of the checkpoints is whole')])
def test_all_processes_resume_as_the_first(tmp_path, monkeypatch, found, message):
    """In another process than the first, which sees another directory."""
    for module in (checkpointing, distributed):
        monkeypatch.setattr(module, 'is_main_process', lambda: False)

    def receive(value):
        value[:] = [found[0] and (tmp_path / found[0], []), found[1]]

    monkeypatch.setattr(distributed, 'broadcast_object_list', receive)
    runner = Mock(work_dir=str(tmp_path), _resume=True, _load_from=None, _has_loaded=False,
                  _train_loop=Mock(spec=BaseLoop))
    with pytest.raises(InputError, match=message):
        SafeCheckpointHook().before_run(runner)
    if found[0]:
        (tmp_path / 'epoch_3.pth').touch()
        SafeCheckpointHook().before_run(runner)
        assert runner._load_from == f'{tmp_path}/epoch_3.pth'


class TestNewestWhole:

    @pytest.fixture
    def directory(self, tmp_path):
        for number in (1, 2, 3):
            path = tmp_path / f'epoch_{number}.pth'
            torch.save(dict(weights=torch.zeros(1000)), path)
            os.utime(path, (number, number))
        self.point(tmp_path, 'epoch_3.pth', 3)
        return tmp_path

    @staticmethod
    def point(directory, name, moment):
        (directory / 'last_checkpoint').write_text(str(directory / name))
        os.utime(directory / 'last_checkpoint', (moment, moment))

    @staticmethod
    def found(directory):
        path, passed = newest_whole(directory, directory, 'epoch_{}.pth')
        return path and path.name, passed

    def test_is_the_one_that_is_named(self, directory):
        assert self.found(directory) == ('epoch_3.pth', [])

    def test_is_a_later_one_that_was_not_yet_named(self, directory):
        self.point(directory, 'epoch_2.pth', 2)
        assert self.found(directory) == ('epoch_3.pth', [])

    def test_is_not_a_later_one_of_an_earlier_run(self, directory):
        self.point(directory, 'epoch_1.pth', 9)
        assert self.found(directory) == ('epoch_1.pth', [])

    def test_is_the_one_before_if_it_is_damaged(self, directory):
        for cut, reason in ((lambda data: data[:-100], 'cut short or no checkpoint, '),
                            (lambda data: data.replace(b'\0' * 64, b'\1' * 64, 1), 'damaged')):
            data = (directory / 'epoch_3.pth').read_bytes()
            (directory / 'epoch_3.pth').write_bytes(cut(data))
            name, (passed,) = self.found(directory)
            assert name == 'epoch_2.pth' and f'epoch_3.pth ({reason}' in passed
            (directory / 'epoch_3.pth').write_bytes(data)

    def test_is_the_one_before_whatever_zipfile_says_of_the_damage(self, directory):
        data = bytearray((directory / 'epoch_3.pth').read_bytes())
        data[data.index(b'PK\1\2') + 10] ^= 64  # the compression, of which there is no such kind
        (directory / 'epoch_3.pth').write_bytes(data)
        (directory / 'epoch_9.pth').symlink_to('nowhere')
        (directory / 'last_checkpoint').write_bytes(b'\xff')
        name, passed = self.found(directory)
        assert name == 'epoch_2.pth' and 'epoch_3.pth (damaged: ' in ' '.join(passed)

    def test_may_have_zeros_before_its_number(self, directory):
        for number in (2, 3):
            (directory / f'epoch_{number}.pth').rename(directory / f'epoch_000{number}.pth')
        (directory / 'last_checkpoint').unlink()
        path, _ = newest_whole(directory, directory, 'epoch_{:04d}.pth')
        assert path.name == 'epoch_0003.pth'

    def test_is_the_one_before_if_it_is_gone(self, directory):
        (directory / 'epoch_3.pth').unlink()
        name, (passed,) = self.found(directory)
        assert name == 'epoch_2.pth' and 'epoch_3.pth (does not exist)' in passed

    def test_is_found_in_a_directory_that_was_moved(self, directory):
        moved = shutil.move(directory, directory.with_name('moved'))
        assert self.found(Path(moved)) == ('epoch_3.pth', [])

    def test_needs_no_pointer(self, directory):
        for content in ('', None):
            if content is None:
                (directory / 'last_checkpoint').unlink()
            else:
                (directory / 'last_checkpoint').write_text(content)
            assert self.found(directory) == ('epoch_3.pth', [])

    def test_is_none_where_nothing_is_and_a_sentence_where_nothing_is_whole(self, tmp_path):
        assert self.found(tmp_path) == (None, [])
        (tmp_path / 'epoch_1.pth').write_bytes(b'PK')
        with pytest.raises(InputError, match=r'is whole to resume from: .*epoch_1\.pth \(cut'):
            self.found(tmp_path)


def test_what_was_passed_over_is_said_when_resuming(tmp_path):
    make_runner(tmp_path, max_keep_ckpts=2, max_epochs=2).train()
    (tmp_path / 'epoch_2.pth').write_bytes(b'PK')
    runner = make_runner(tmp_path, resume=True, hooks=[At('iter', 4, kill)])
    said = warnings_of(runner)
    killed(runner)
    assert f'Passed over {tmp_path / "epoch_2.pth"} (cut short' in said[0]


def poison(parameter):
    def function(runner):
        with torch.no_grad():
            dict(runner.model.named_parameters())[parameter].fill_(float('nan'))
    return function


def test_divergence_stops_at_once_and_keeps_the_last_good_checkpoint(tmp_path):
    runner = make_runner(tmp_path, hooks=[At('iter', 6, poison('linear.bias'))], lr=0.02)
    with pytest.raises(DivergenceError, match=(
            r'^Training diverged at iteration 7, learning rate 0\.02: loss_a is nan; '
            r'.*epoch_1\.pth is the last good checkpoint: lower [^.]*\.optimizer\.lr')):
        runner.train()
    path, checkpoint = final(tmp_path)
    assert path.name == 'epoch_1.pth' and damage(path) is None
    release_directory(tmp_path)


def test_weights_are_looked_at_before_they_are_saved(tmp_path):
    class Poison(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if runner.iter == 7:
                poison('norm.weight')(runner)

    with pytest.raises(DivergenceError, match=r'iteration 8,.*: norm\.weight is not finite; .*'
                                              r'epoch_1\.pth is the last good'):
        make_runner(tmp_path, hooks=[Poison()]).train()
    release_directory(tmp_path)


class Skipping(torch.optim.SGD):
    """Leaves out steps of gradients that are not finite, as under a gradient scaler."""

    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group['params']]
        if all(p.grad.isfinite().all() for p in parameters):
            super().step(closure)


def overflow(runner):
    """A loss that is not finite, from weights that are."""
    inputs = runner.model.linear.register_forward_hook(lambda *args: args[-1] * float('inf'))
    runner.model.linear.handle = inputs


def recover(runner):
    runner.model.linear.handle.remove()


def test_skipped_steps_are_no_divergence_unless_they_go_on(tmp_path):
    optimizer = dict(type=Skipping, lr=0.01)
    hooks = [At('iter', 2, overflow), At('iter', 4, recover)]
    make_runner(tmp_path / 'a', hooks=hooks, optimizer=optimizer, nonfinite_losses=2).train()
    with pytest.raises(DivergenceError, match='at iteration 3, .*: loss_a is inf; .*epoch_1'):
        make_runner(tmp_path / 'b', hooks=hooks[:1], optimizer=optimizer,
                    nonfinite_losses=2).train()


def test_divergence_can_be_let_pass(tmp_path):
    make_runner(tmp_path, hooks=[At('iter', 2, poison('linear.bias'))],
                nonfinite_losses=None).train()
    assert final(tmp_path)[0].name == 'epoch_3.pth'


HOLDER = '''
import os, sys, time
from mmdet_odconv.engine.lock import lock_directory
lock_directory(sys.argv[1])
if os.fork() == 0:
    time.sleep(60)  # a data worker that outlives its run
print(os.getpid(), flush=True)
time.sleep(60)
'''


def test_the_lock_dies_with_its_owner(tmp_path):
    owner = subprocess.Popen([sys.executable, '-c', HOLDER, tmp_path], stdout=subprocess.PIPE,
                             start_new_session=True, text=True,
                             env={**os.environ, 'MMDET_ODCONV_LAYERS_ONLY': '1'})
    pid = next(line.strip() for line in owner.stdout if line.strip().isdigit())  # OneDL prints, too
    with pytest.raises(InputError, match=rf'in use by another run \(process {pid} on \S+\): wait'):
        lock_directory(tmp_path)
    with pytest.raises(InputError, match='in use by another run'):
        make_runner(tmp_path).train()
    os.kill(int(pid), signal.SIGKILL)
    owner.wait()
    lock_directory(tmp_path)
    lock_directory(tmp_path)
    release_directory(tmp_path)
    os.killpg(int(pid), signal.SIGKILL)


def test_an_interruption_in_one_line(tmp_path):
    hub = MessageHub.get_instance('interrupted')
    assert interruption('again') == (
        'interrupted before any iteration; run the same command again.')
    hub.update_info('iter', 11)
    hub.update_info('max_iters', 750)
    assert interruption('again with --resume') == (
        'interrupted at iteration 12 of 750; run the same command again with --resume to resume '
        'from the beginning, as nothing was saved yet.')
    hub.update_info('last_ckpt', str(tmp_path / 'epoch_1.pth'))  # and interrupted as it is written
    assert interruption('again').endswith(
        '; run the same command again to resume from the newest checkpoint, if one was saved.')
    (tmp_path / 'epoch_1.pth').touch()
    assert interruption('again').endswith(
        f'; run the same command again to resume from {tmp_path}/epoch_1.pth.')


def test_an_interrupted_run_exits_without_a_traceback(tmp_path):
    code = textwrap.dedent('''
        from mmdet_odconv.engine.launch import errors_explained
        with errors_explained():
            raise KeyboardInterrupt
    ''')
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.returncode == 130
    assert 'interrupted before any iteration' in result.stderr and 'Traceback' not in result.stderr
