"""What explain() says, and where it has to keep silent."""
import errno

import pytest
from mmcv.cnn import build_conv_layer
from mmdet.datasets import CocoDataset, VOCDataset
from mmengine.dataset import BaseDataset
from mmengine.registry import MODELS
from torch import nn

from mmdet_odconv.engine.launch import explain


def explained(error, function, *args, **kwargs):
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    return explain(caught.value)


def test_a_full_disk_elsewhere_removes_nothing():
    sentence = explain(OSError(errno.ENOSPC, 'No space left on device'))
    assert sentence.startswith('No space was left on the disk: free some')
    assert 'removed' not in sentence


def test_a_layer_that_fails_is_not_called_unknown(monkeypatch):
    class Broken(nn.Module):
        def __init__(self, *args):
            raise KeyError('planes')

    monkeypatch.setitem(MODELS.module_dict, 'Broken', Broken)
    assert explained(KeyError, build_conv_layer, dict(type='Broken'), 3, 4, 1) is None
    sentence = explained(KeyError, build_conv_layer, dict(type='ODConv'), 3, 4, 1)
    assert sentence.startswith('No layer is registered as ODConv: did you mean ODConv2d')


class Failing(CocoDataset):
    error = MemoryError('too large')

    def load_data_list(self):
        raise self.error


def test_only_what_is_wrong_with_the_data_is_called_not_coco(monkeypatch):
    assert explained(MemoryError, Failing, ann_file='a.json') is None
    monkeypatch.setattr(Failing, 'error', PermissionError(errno.EACCES, 'denied', 'a.json'))
    assert explained(PermissionError, Failing, ann_file='a.json') is None
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
