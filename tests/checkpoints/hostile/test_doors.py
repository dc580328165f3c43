"""Hostile files through every door by which a checkpoint comes in: nothing of them runs."""
import pickle
import runpy
import sys
import warnings
from pathlib import Path
from unittest.mock import Mock

import digits
import hostile_files
import numpy as np
import pytest
import torch
from hostile_files import CANARY, REFUSED, TEXTS, with_text, write
from mmdet.apis import DetInferencer, init_detector
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner, load_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn
from torch.utils.data import DataLoader

from mmdet_odconv import InputError, ODResNet
from mmdet_odconv.checkpoints.published import check_finite

BACKBONE = dict(type='ODResNet', depth=10, base_channels=8, stem_channels=8, kernel_num=2)


class Toy(BaseModel):
    """A backbone and a loss."""

    def __init__(self):
        super().__init__()
        self.backbone = MODELS.build(BACKBONE)

    def forward(self, inputs=None, **kwargs):
        return dict(loss=self.backbone(inputs)[-1].mean())

    def train_step(self, data, optim_wrapper):
        return super().train_step(dict(inputs=torch.stack(data)), optim_wrapper)


def runner(path, checkpoint=None, **kwargs):
    """A run of one iteration, in work/."""
    return Runner(
        Toy(), 'work', train_dataloader=DataLoader([torch.ones(3, 32, 32)], collate_fn=list),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)), load_from=path,
        custom_hooks=[dict(type='InputCheckHook')],
        default_hooks=dict(checkpoint=checkpoint, logger=None), **kwargs)


@pytest.fixture(scope='module')
def detector():
    config = Config.fromfile(digits.ROOT / 'configs/quickstart' / digits.CONFIG)
    config.merge_from_dict(dict(model=dict(
        backbone=dict(BACKBONE, frozen_stages=-1, norm_eval=False),
        neck=dict(in_channels=[8, 16, 32, 64]))))
    return config


@pytest.fixture
def door(request, detector, tmp_path, monkeypatch):
    """Bring the file at a path in by the door of that name, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)  # it asks compilers
    detector.dump('detector.py')
    Path('static.py').write_text("_base_ = 'detector.py'\nmodel = dict(backbone=dict(\n"
                                 "    _delete_=True, type='ResNet', depth=18))\n")
    resnet = ODResNet(**{key: value for key, value in BACKBONE.items() if key != 'type'})

    def init(kind, path):
        backbone = MODELS.build(dict(BACKBONE, init_cfg=dict(type=kind, checkpoint=path)))
        backbone.init_weights()

    def tool(name, *args):
        script = str(digits.ROOT / 'tools/model_converters' / f'{name}.py')
        monkeypatch.setattr(sys, 'argv', [script, *args])
        try:
            runpy.run_path(script, run_name='__main__')
        except SystemExit as end:
            if end.code:
                raise InputError(end.code) from end

    def tested(path):
        run = Runner(Toy(), 'work', test_dataloader=DataLoader([0]), test_cfg=dict(),
                     test_evaluator=[], load_from=path,
                     custom_hooks=[dict(type='InputCheckHook')])
        run._test_loop = None
        run.load_or_resume()

    return {
        'load_checkpoint': lambda path: load_checkpoint(resnet, path),
        '--checkpoint': tested,
        'Pretrained': lambda path: init('Pretrained', path),
        'StaticPretrained': lambda path: init('StaticPretrained', path),
        'load_from': lambda path: runner(path).train(),
        'resume': lambda path: runner(path, resume=True).train(),
        'published_to_mmdet': lambda path: tool('published_to_mmdet', path, 'out.pth'),
        'static_to_dynamic': lambda path: tool('static_to_dynamic', 'detector.py', path, 'out.pth'),
        'swap_backbone': lambda path: tool('swap_backbone', 'static.py', '--checkpoint', path),
        'DetInferencer': lambda path: DetInferencer(weights=path, device='cpu'),
        'init_detector': lambda path: init_detector('detector.py', path, device='cpu'),
    }[request.param]


DOORS = ('load_checkpoint', '--checkpoint', 'Pretrained', 'StaticPretrained', 'load_from', 'resume',
         'published_to_mmdet', 'static_to_dynamic', 'swap_backbone', 'DetInferencer',
         'init_detector')
every_door = pytest.mark.parametrize('door', DOORS, indirect=True)


@every_door
def test_what_is_refused(door):
    for name, (content, message) in REFUSED.items():
        write(Path('file.pth'), content)
        with pytest.raises(InputError, match=message):
            door('file.pth')
        assert not Path(CANARY).exists(), name


@every_door
def test_texts_that_would_run(door):
    Path('planted.py').write_text(f'{hostile_files.TOUCH}\nModel = dict\n')
    state = Toy().state_dict()
    for name, text in TEXTS.items():
        write(Path('file.pth'), with_text(text, state))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try:
                door('file.pth')
            except Exception as error:  # the door's own answer: here is no detector, or no config
                assert not isinstance(error, RecursionError), name
        assert not Path(CANARY).exists(), name
        assert not {'planted', 'torch.utils.benchmark.examples', 'torch.utils.model_dump.__main__'
                    } & sys.modules.keys(), name


def test_such_a_text_is_left_out_with_a_warning_and_the_weights_load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path('planted.py').write_text(f'{hostile_files.TOUCH}\nModel = dict\n')
    state, log = Toy().state_dict(), Mock()
    monkeypatch.setattr('mmdet_odconv.checkpoints.contents.print_log', log)
    for name, text in TEXTS.items():
        write(Path('file.pth'), with_text(text, state))
        log.reset_mock()
        read = CheckpointLoader.load_checkpoint('file.pth')
        assert not {'cfg', 'config'} & {*read['meta'], *read['message_hub']['runtime_info']}, name
        assert all(map(torch.equal, read['state_dict'].values(), state.values())), name
        said = [call.args[0] for call in log.call_args_list]
        assert len(said) == 3 and all('was left out, because it' in line for line in said), name


def test_each_text_would_run_by_itself(tmp_path, monkeypatch):
    """So that the canary above is known to sing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path('planted.py').write_text(hostile_files.TOUCH)
    for name in ('statement', 'value', 'custom_imports'):
        Path(CANARY).unlink(missing_ok=True)
        try:
            Config.fromstring(TEXTS[name], '.py')
        except Exception:  # after it ran
            pass
        finally:
            sys.modules.pop('planted', None)
        assert Path(CANARY).exists(), name


@pytest.mark.parametrize('door', ['DetInferencer'], indirect=True)
def test_the_config_of_a_run_is_read(door, detector):
    text = detector.pretty_text
    model = MODELS.build(detector.model)
    write(Path('file.pth'), with_text(text, model.state_dict()))
    inferencer = door('file.pth')
    assert inferencer.cfg.model.backbone.kernel_num == 2


@pytest.mark.parametrize('text', [
    "a = 1\nb = dict(c=-1.5, d=[None, True, {'e': ('f', )}])\nwork_dir = './work'",
    "custom_imports = dict(imports=['mmdet_odconv'], allow_failed_imports=False)",
    "model = dict(type='mmdet.FasterRCNN', a=dict(type='mmdet.models.backbones.resnet.ResNet'))",
    "optimizer = dict(type='torch.optim.adamw.AdamW')",
    "custom_keys = dict({'backbone.layer1': dict(lr_mult=0.1)}, bias=dict(decay_mult=0.0))",
])
def test_configs_that_mmengine_saves_are_kept(tmp_path, text):
    write(tmp_path / 'file.pth', with_text(text, {}))
    read = CheckpointLoader.load_checkpoint(str(tmp_path / 'file.pth'))
    assert read['meta']['cfg'] == read['message_hub']['runtime_info']['cfg'] == text


@pytest.mark.parametrize('door', ['resume'], indirect=True)
@pytest.mark.parametrize('where', ['victim', 'work', 'work/best_logs/x', 'best_of_another_run'])
def test_resuming_removes_nothing_that_a_run_did_not_write(door, where):
    victim = Path(where).resolve()
    victim.mkdir(parents=True, exist_ok=True)
    (victim / 'diary.txt').write_text('dear')
    content = with_text('a = 1', Toy().state_dict())
    content['message_hub']['runtime_info'].update(
        best_ckpt=str(victim), best_score=0.0, keep_ckpt_ids=['/../../victim'])
    write(Path('file.pth'), content)
    run = runner('file.pth', resume=True, checkpoint=dict(
        type='CheckpointHook', save_best='score', rule='greater', max_keep_ckpts=1))
    run.train()
    hook, = (hook for hook in run.hooks if isinstance(hook, CheckpointHook))
    hook.after_val_epoch(run, dict(score=1.0))
    assert (victim / 'diary.txt').exists()
    assert list(Path('work').glob('best_score_*.pth'))


def test_the_best_file_of_the_run_itself_is_still_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('work').mkdir()
    content = with_text('a = 1', {})
    content['message_hub']['runtime_info'].update(best_ckpt='./work/best_score_epoch_1.pth')
    write(Path('work/epoch_1.pth'), content)
    read = CheckpointLoader.load_checkpoint('work/epoch_1.pth')
    assert read['message_hub']['runtime_info']['best_ckpt'] == './work/best_score_epoch_1.pth'


@pytest.mark.parametrize('door', ['resume'], indirect=True)
@pytest.mark.parametrize('lacking', ['meta.epoch', 'meta.iter', 'message_hub'])
def test_weights_alone_are_no_run_to_resume(door, lacking):
    content = with_text('a = 1', Toy().state_dict())
    *parent, name = lacking.split('.')
    del (content[parent[0]] if parent else content)[name]
    write(Path('file.pth'), content)
    with pytest.raises(InputError, match=f'no run to resume, for want of {lacking}'):
        door('file.pth')


@pytest.mark.parametrize('optimizer', [[dict(), dict()], {0: dict()}])
def test_weights_beside_optimizers_of_ones_own_are_read_and_not_resumed(tmp_path, monkeypatch,
                                                                        optimizer):
    monkeypatch.chdir(tmp_path)
    content = dict(with_text('a = 1', Toy().state_dict()), optimizer=optimizer)
    write(Path('file.pth'), content)
    assert CheckpointLoader.load_checkpoint('file.pth')['state_dict']
    with pytest.raises(InputError, match='for want of an optimizer that is a dict: give'):
        runner('file.pth', resume=True).train()


@pytest.mark.parametrize('door', ['resume'], indirect=True)
def test_a_run_without_an_optimizer_is_resumed(door):
    write(Path('file.pth'), dict(with_text('a = 1', Toy().state_dict()), optimizer=None))
    door('file.pth')


@pytest.mark.parametrize('door', ['load_from'], indirect=True)
def test_weights_of_which_none_fits(door):
    write(Path('file.pth'), {'foo.bar': torch.ones(1)})
    with pytest.raises(InputError, match='The checkpoint is of another architecture than Toy'):
        door('file.pth')


@pytest.mark.parametrize('door', ['load_from', 'resume'], indirect=True)
def test_statistics_that_are_not_finite(door):
    content = with_text('a = 1', Toy().state_dict())
    name = next(name for name in content['state_dict'] if name.endswith('running_var'))
    content['state_dict'][name][0] = float('nan')
    write(Path('file.pth'), content)
    with pytest.raises(InputError, match=f'{name} of the checkpoint has 1 NaN or infinite values'):
        door('file.pth')


def test_values_that_are_not_all_there():
    huge = torch.ones(1).expand(2**20, 2**20)  # 4 TiB, of four bytes
    check_finite({'a': huge, 'b': torch.ones(2, 3).T, 'c': torch.ones(()), 'd': torch.ones(0, 2)})
    with pytest.raises(InputError, match='a of the checkpoint has 1 NaN or infinite values, of 1'):
        check_finite({'a': torch.tensor([float('nan')]).expand(2**20, 2**20)})
    overlapping = torch.ones(2**11).as_strided((2**10, 2**10), (1, 1))
    with pytest.raises(InputError, match=r'the shape \(1024, 1024\), but only 2048 values'):
        check_finite({'a': overlapping})
    with pytest.raises(InputError, match='a of the checkpoint is sparse'):
        check_finite({'a': torch.ones(2).to_sparse()})


def test_numbers_of_numpy_come_back(tmp_path):
    log = HistoryBuffer([1.0, 2.5], [1, 2])
    values = dict(scalar=np.float64(0.1), flag=np.bool_(True), log=log, same=log,
                  order=np.asfortranarray(np.arange(6.).reshape(2, 3)),
                  big=np.arange(3, dtype='>i4'), none=np.array(1, 'f4'),
                  empty=np.ones((0, 2)))
    values['itself'] = values
    write(tmp_path / 'file.pth', dict(state_dict={}, x=values))
    read = CheckpointLoader.load_checkpoint(str(tmp_path / 'file.pth'))['x']
    assert read['scalar'] == 0.1 and type(read['scalar']) is np.float64 and read['flag']
    assert type(read['log']) is HistoryBuffer and read['log'].current() == 2.5
    assert read['same'] is read['log'] and read['itself'] is read
    for name in ('order', 'big', 'none', 'empty'):
        assert type(read[name]) is np.ndarray and read[name].dtype.isnative
        np.testing.assert_array_equal(read[name], values[name])
    read['big'][0] = 7  # its own memory


def test_only_mmengines_loader_reads_more_than_torch(tmp_path, monkeypatch):
    write(tmp_path / 'file.pth', dict(state_dict={}, log=HistoryBuffer([1.0], [1])))
    path = str(tmp_path / 'file.pth')
    before = torch.serialization.get_safe_globals()
    assert CheckpointLoader.load_checkpoint(path)['log'].current() == 1
    assert set(torch.serialization.get_safe_globals()) == set(before)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    with torch.serialization.safe_globals([np.ndarray, getattr, HistoryBuffer, nn.Linear]):
        during = set(torch.serialization.get_safe_globals())
        assert CheckpointLoader.load_checkpoint(path)['log'].current() == 1
        write(tmp_path / 'evil.pth', REFUSED['forged pointers'][0])
        with pytest.raises(InputError, match='holds numpy.ndarray'):
            CheckpointLoader.load_checkpoint(str(tmp_path / 'evil.pth'))
        assert set(torch.serialization.get_safe_globals()) == during  # the user's own, restored
