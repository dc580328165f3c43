"""What explain() says, and where it has to keep silent."""
import errno
import re
import sys

import pytest
import torch.distributed as dist
from mmcv.cnn import build_conv_layer
from mmdet.datasets import CocoDataset, VOCDataset
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.logging import MessageHub
from mmengine.registry import MODELS
from mmengine.utils import import_modules_from_strings, mkdir_or_exist
from torch import nn

from mmdet_odconv.engine.distributed import prepare_cpu_processes
from mmdet_odconv.engine.launch import _resume_by_hook, errors_explained, explain


def explained(error, function, *args, **kwargs):
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    return explain(caught.value)


@pytest.mark.parametrize(('given', 'passed_on'), [
    ('c.py --resume', 'c.py --cfg-options resume=auto'),
    ('c.py --resume auto --amp', 'c.py --amp --cfg-options resume=auto'),
    ('c.py --resume --cfg-options a=1', 'c.py --cfg-options resume=auto a=1'),
    ('c.py --resume epoch_1.pth', 'c.py --resume epoch_1.pth'),
    ('flexible.py --resume', 'flexible.py --resume'),  # its runner asks no hook what to resume
    ('own.py --resume', 'own.py --resume'),  # whose hook would resume load_from itself
    ('--resume', '--resume'), ('c.py', 'c.py')])
def test_resuming_without_a_file(tmp_path, monkeypatch, given, passed_on):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'c.py').write_text("load_from = 'start.pth'")
    (tmp_path / 'flexible.py').write_text("runner_type = 'FlexibleRunner'")
    (tmp_path / 'own.py').write_text(
        'from mmengine.hooks import CheckpointHook\nfrom mmengine.config import read_base\n'
        'default_hooks = dict(checkpoint=dict(type=CheckpointHook))')
    argv = ['train.py', *given.split()]
    _resume_by_hook(argv)
    assert argv[1:] == passed_on.split()


@pytest.mark.parametrize(('given', 'again'), [
    ('c.py --cfg-options resume=auto', 'again to'), ('c.py', 'again with --resume to'),
    ('c.py --resume epoch_1.pth', 'again with --resume alone to')])
def test_how_an_interrupted_command_is_run_again(monkeypatch, capsys, given, again):
    hub = MessageHub.get_instance(f'launch {given}')
    hub.update_info('iter', 1)
    hub.update_info('max_iters', 2)
    monkeypatch.setattr(sys, 'argv', ['train.py', *given.split()])
    with pytest.raises(SystemExit), errors_explained():
        raise KeyboardInterrupt
    assert f'run the same command {again} resume' in capsys.readouterr().err


def test_processes_without_a_config_are_left_to_mmdets_usage(monkeypatch):
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setattr('mmdet_odconv.engine.distributed.get_device', lambda: 'cpu')
    argv = ['train.py', '--launcher', 'pytorch']
    prepare_cpu_processes(argv)
    assert argv == ['train.py', '--launcher', 'pytorch'] and not dist.is_initialized()


def test_a_full_disk_elsewhere_removes_nothing():
    sentence = explain(OSError(errno.ENOSPC, 'No space left on device'))
    assert sentence.startswith('No space was left on the disk: free some')
    assert 'removed' not in sentence


def test_a_path_that_cannot_be_used(tmp_path):
    assert explained(IsADirectoryError, open, tmp_path) == (
        f'{tmp_path} cannot be used (Is a directory): check the paths in the config.')
    assert explained(FileNotFoundError, open, tmp_path / 'x').startswith(
        f'{tmp_path}/x does not exist: check')


def test_a_layer_that_fails_is_not_called_unknown(monkeypatch):
    class Broken(nn.Module):
        def __init__(self, *args):
            raise KeyError('planes')

    monkeypatch.setitem(MODELS.module_dict, 'Broken', Broken)
    assert explained(KeyError, build_conv_layer, dict(type='Broken'), 3, 4, 1) is None
    sentence = explained(KeyError, build_conv_layer, dict(type='ODConv'), 3, 4, 1)
    assert sentence.startswith('No layer is registered as ODConv: did you mean ODConv2d')


@pytest.mark.parametrize(('options', 'sentence'), [
    (dict(kernel_num=0), 'ODResNet: kernel_num must be at least 1, got 0; correct it in the'),
    (dict(kernal_num=4), 'ODResNet takes no argument kernal_num: did you mean kernel_num?'),
    (dict(frozen_stage=1), 'ODResNet takes no argument frozen_stage: did you mean frozen_stages'),
    (dict(qqqq=1), 'ODResNet takes no argument qqqq: take it out of the config.'),
    (dict(conv_cfg=dict(type='DyConv2d', kernal_num=4)),
     'ODResNet: DyConv2d has no argument kernal_num: did you mean kernel_num?'),
    (dict(conv_cfg=dict(type='ODConv2d', reduction=0)), 'ODResNet: reduction must be'),
])
def test_an_argument_of_the_config_that_is_wrong(options, sentence):
    config = dict(type='ODResNet', depth=18, **options)
    assert explained((TypeError, ValueError), MODELS.build, config).startswith(sentence)


def test_what_is_not_the_users_argument_is_not_explained():
    class Broken(nn.Module):
        def __init__(self):
            dict(3)

    MODELS.register_module('Broken2', module=Broken)
    try:
        assert explained(TypeError, MODELS.build, dict(type='Broken2')) is None
    finally:
        MODELS.module_dict.pop('Broken2')


def test_a_work_directory_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').touch()
    sentence = explained(OSError, mkdir_or_exist, str(tmp_path / 'file/run'))
    assert sentence.startswith(f'Directory {tmp_path}/file/run cannot be made (')
    assert sentence.endswith('): give another --work-dir.')


class Failing(CocoDataset):
    error = MemoryError('too large')

    def load_data_list(self):
        raise self.error


def test_only_what_is_wrong_with_the_data_is_called_not_coco(monkeypatch):
    assert explained(MemoryError, Failing, ann_file='a.json') is None
    monkeypatch.setattr(Failing, 'error', PermissionError(errno.EACCES, 'denied', 'a.json'))
    assert explained(PermissionError, Failing, ann_file='a.json').startswith(
        'a.json cannot be used (denied): check the paths')
    monkeypatch.setattr(Failing, 'error', KeyError('images'))
    assert explained(KeyError, Failing, ann_file='a.json').startswith(
        "Annotation file a.json could not be read as COCO (KeyError: 'images'): ")


class Table(BaseDataset):
    def load_data_list(self):
        return [] if self.ann_file == 'empty.csv' else [{}['label']]


def test_datasets_that_are_not_coco(tmp_path):
    assert explained(ValueError, Table, ann_file='empty.csv').startswith(
        'empty.csv leaves no image to use: set the dataset')
    assert explained(KeyError, Table, ann_file='full.csv') is None
    (tmp_path / 'VOC2007').mkdir()
    missing = str(tmp_path / 'VOC2007/train.txt')
    sentence = explained(FileNotFoundError, VOCDataset, ann_file=missing,
                         data_prefix=dict(sub_data_root=str(tmp_path / 'VOC2007')))
    assert sentence.startswith(f'Annotation file {missing} does not exist: set data_root')


def test_a_config_that_inherits_from_what_is_not_installed(tmp_path):
    path = tmp_path / 'theirs.py'
    path.write_text("_base_ = 'mmocr::kie/sdmgr.py'")
    assert explained(Exception, Config.fromfile, path) == (
        'The config inherits from mmocr, which is not installed: pip install mmocr.')


@pytest.mark.parametrize(('module', 'mend'), [
    ('mmpretrain_absent.models', 'install what is missing'),
    ('mmpretrain', r"pip install '\.\[imagenet\]' in a checkout")])
def test_a_module_of_custom_imports_that_is_missing(monkeypatch, module, mend):
    monkeypatch.setitem(sys.modules, module, None)
    sentence = explained(ImportError, import_modules_from_strings, [module])
    assert re.fullmatch(rf"{module} of the config's custom_imports could not be imported \(.*"
                        rf'{module.split(".")[0]}.*\): check its name, or {mend}\.', sentence)
