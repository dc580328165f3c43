"""Data sets damaged in one way each: what is refused, what is warned of, and by which sentence."""
import contextlib
import gc
import json
import logging
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mmcv import imwrite
from mmdet.datasets import CocoDataset
from mmengine.dataset import RepeatDataset, pseudo_collate
from torch import nn
from torch.utils.data import DataLoader

from mmdet_odconv import InputError
from mmdet_odconv.engine.data_check import SAMPLE, check_data, find_faults, no_garbage_collection
from mmdet_odconv.engine.hooks import InputCheckHook
from mmdet_odconv.engine.launch import explain

TRIANGLE = [[8, 8, 40, 8, 8, 40]]
NAN = float('nan')


def content():
    """Four images of 64 x 48, each with a cat of 32 x 32 and a triangle as its mask."""
    return dict(
        images=[dict(id=i, file_name=f'{i}.png', width=64, height=48) for i in range(4)],
        annotations=[dict(id=10 + i, image_id=i, category_id=1, bbox=[8, 8, 32, 32], area=1024,
                          segmentation=TRIANGLE, iscrowd=0) for i in range(4)],
        categories=[dict(id=1, name='cat')])


def dataset(root, data, masks=True, classes=('cat',), **kwargs):
    (root / 'images').mkdir(exist_ok=True)
    for i in range(4):
        if not (root / f'images/{i}.png').exists():
            imwrite(np.full((48, 64, 3), i, np.uint8), str(root / f'images/{i}.png'))
    (root / 'a.json').write_text(data if isinstance(data, str) else json.dumps(data))
    return CocoDataset(
        ann_file='a.json', data_root=str(root), data_prefix=dict(img='images/'),
        metainfo=dict(classes=classes), filter_cfg=dict(filter_empty_gt=True, min_size=16),
        pipeline=[dict(type='LoadImageFromFile'),
                  dict(type='mmdet.LoadAnnotations', with_bbox=True,
                       with_mask=masks)], **kwargs)


def answer(root, data, **kwargs):
    """What a user reads of this data, as a run begins; None if it trains."""
    try:
        check_data(dataset(root, data, **kwargs))
    except Exception as error:
        return explain(error)
    return None


def annotations(count, **values):
    def change(data):
        for annotation in data['annotations'][:count]:
            annotation.update(values)
    return change


def images(index, **values):
    return lambda data: data['images'][index].update(values)


def without(kind, key):
    return lambda data: data[kind][1].pop(key)


def no_mask(data, **values):
    """One with an empty mask, one with none."""
    data['annotations'][0].update(segmentation=[], **values)
    data['annotations'][1].update(values)
    del data['annotations'][1]['segmentation']


FIRST = r'a\.json cannot be trained on: '
MASK = FIRST + '1 of 4 annotations have a segmentation that is neither polygons nor the RLE'
REFUSED = {
    'NaN': (annotations(2, bbox=[8, NAN, 9, 9]), FIRST + r'2 of 4 annotations have a box that is '
            r'not four finite numbers \(the first: 10, \[8, nan, 9, 9\]\)'),
    'infinite': (annotations(1, bbox=[8, 8, float('inf'), 9]), 'four finite numbers'),
    'text': (annotations(1, bbox=['a', 8, 8, 9]), 'four finite numbers'),
    'three': (annotations(1, bbox=[8, 8, 9]), 'four finite numbers'),
    'beyond floats': (annotations(1, bbox=[8, 8, 9, 10**400]), 'four finite numbers'),
    'negative': (annotations(4, bbox=[40, 40, -9, -9]), r'none of its 4 annotations, of 4 images, '
                 r'is a box of cat to learn from \(4 of 4 annotations have a box less than one'),
    'zero': (annotations(4, bbox=[8, 8, 0, 0]), 'none of its 4 .* less than one pixel'),
    'outside': (annotations(4, bbox=[70, 8, 9, 9]), 'none of its 4 .* box outside their image'),
    'no area': (annotations(4, area=0), 'none of its 4 .* area that is not above 0'),
    'all crowds': (annotations(4, iscrowd=1, segmentation=[]), 'none of its 4 annotations'),
    'no annotation': (lambda data: data['annotations'].clear(), 'none of its 0 annotations'),
    'undefined category': (annotations(4, category_id=7), r'category that the file does not '
                           r'define \(the first: 10, 7\)'),
    'image twice': (images(1, id=0), r'1 of 4 images have the id of another \(the first: 1\.png'),
    'annotation twice': (annotations(2, id=5), '1 of 4 annotations have the id of another'),
    'no width': (without('images', 'width'), r'1 of 4 images have no width \(the first: number 1'),
    'no name': (without('images', 'file_name'), '1 of 4 images have no file_name'),
    'no box': (without('annotations', 'bbox'), '1 of 4 annotations have no bbox'),
    'no size': (images(0, width=0), 'width or height that is no positive number'),
    'small': (lambda data: [image.update(width=9) for image in data['images']],
              'less than min_size=16|box outside'),
    'leaves': (images(0, file_name='../../../etc/passwd'), "1 of 4 images lie outside the data"),
    'absolute': (images(0, file_name='/dev/zero'), r'outside .* \(the first: /dev/zero\)'),
    'polygon of text': (annotations(1, segmentation=[['a'] * 6]), MASK),
    'polygon of NaN': (annotations(1, segmentation=[[NAN] * 6]), MASK),
    'flat polygon': (annotations(1, segmentation=TRIANGLE[0]), MASK),
    'ragged polygon': (annotations(1, segmentation=[[[5, 6], [25, 6, 9], [25, 21]]]), MASK),
    'number': (annotations(1, segmentation=3), MASK),
    'no mask': (no_mask, FIRST + '2 of 4 annotations have no segmentation, which the config learns '
                r'from, and one of boxes alone, .* \(the first: 10\)'),
    'crowds without masks': (lambda data: no_mask(data, iscrowd=1), '2 of 4 .* no segmentation'),
    'RLE of another size': (annotations(1, segmentation=dict(size=[9, 9], counts=[81])), MASK),
    'RLE too short': (annotations(1, segmentation=dict(size=[48, 64], counts=[81])), MASK),
    'RLE without counts': (annotations(1, segmentation=dict(size=[48, 64])), MASK),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_trained_on(tmp_path, name):
    change, message = REFUSED[name]
    data = content()
    change(data)
    sentence = answer(tmp_path, data)
    assert sentence is not None and len(sentence.splitlines()) == 1
    assert re.search(message, sentence), sentence


LEFT_OUT = {
    'zero': (annotations(1, bbox=[8, 8, 0, 9]), '1 of 4 annotations have a box less than one pixel '
             'wide or high (the first: 10, [8, 8, 0, 9])'),
    'outside': (annotations(2, bbox=[70, 8, 9, 9]), '2 of 4 annotations have a box outside'),
    'category': (annotations(1, category_id=7), 'a category that the file does not define'),
    'image': (annotations(1, image_id=7), 'an image that the file does not list (the first: 10, '),
    'two points': (annotations(1, segmentation=[[1, 2, 3, 4]]), 'no polygon of three points'),
}


@pytest.mark.parametrize('name', LEFT_OUT)
def test_what_is_left_out_is_said(tmp_path, monkeypatch, name):
    said = []
    monkeypatch.setattr('mmdet_odconv.engine.data_check.print_log',
                        lambda message, logger, level: said.append((message, level)))
    change, message = LEFT_OUT[name]
    data = content()
    change(data)
    assert answer(tmp_path, data) is None
    (found, level), = said
    assert message in found and found.startswith('Of ') and level == logging.WARNING


def test_sound_data_is_taken_in_silence(tmp_path, monkeypatch):
    monkeypatch.setattr('mmdet_odconv.engine.data_check.print_log', None)
    data = content()
    data['annotations'][0].update(bbox=[-5, -5, 30, 30])  # partly outside
    data['annotations'][1].update(segmentation=dict(size=[48, 64], counts=[1000, 2072]))
    data['annotations'].append(dict(data['annotations'][2], id=20, iscrowd=1,
                                    segmentation=dict(size=[48, 64], counts='PPYo0')))
    data['categories'].append(dict(id=2, name='dog'))  # a class that is not trained on
    data['annotations'].append(dict(data['annotations'][2], id=21, category_id=2))
    assert answer(tmp_path, data) is None
    data['annotations'][0]['segmentation'] = 3  # boxes alone are trained
    assert answer(tmp_path, data, masks=False) is None


IMAGES = {
    'empty': (lambda path: path.write_bytes(b''), r'1\.png could not be read \(it is empty'),
    'text': (lambda path: path.write_text('not found'), r'1\.png could not be read \(it is empty'),
    'directory': (lambda path: (path.unlink(), path.mkdir()), r'1\.png could not be read \(Is a d'),
    'missing': (lambda path: path.unlink(), r'1\.png does not exist: set data_root'),
}


@pytest.mark.parametrize('name', IMAGES)
def test_images_that_cannot_be_read(tmp_path, name):
    damage, message = IMAGES[name]
    data = dataset(tmp_path, content())
    damage(tmp_path / 'images/1.png')
    with pytest.raises(InputError, match=message):
        check_data(RepeatDataset(data, 2))
    with pytest.raises(Exception) as caught:  # noqa: PT011, in the middle of a run
        data[1]
    assert explain(caught.value) is not None
    with pytest.raises(InputError, match=message):
        raise InputError(explain(caught.value))


@pytest.mark.parametrize('name', IMAGES)
def test_images_that_a_worker_cannot_read(tmp_path, name):
    damage, message = IMAGES[name]
    data = dataset(tmp_path, content())
    damage(tmp_path / 'images/1.png')
    with pytest.raises(Exception) as caught:  # noqa: PT011
        list(DataLoader(data, num_workers=1, collate_fn=pseudo_collate))
    sentence = explain(caught.value)
    assert '1.png' in sentence or 'num_workers=0' in sentence
    assert len(sentence.splitlines()) == 1


def test_an_image_of_another_size(tmp_path):
    data = content()
    data['images'][2].update(width=640, height=480)
    assert '2.png is 64 x 48 pixels, where' in answer(tmp_path, data)


@pytest.mark.parametrize('trained', [True, False])
def test_classes_in_another_order_than_the_file_has_them(tmp_path, trained):
    data = content()
    data['categories'] += [dict(id=2, name='cow'), dict(id=0, name='dog')]  # no cow is learnt
    check_data(dataset(tmp_path, data, classes=('cat', 'dog')), trained=trained)
    with pytest.raises(InputError, match=r"a\.json lists cat where the config's classes have dog"):
        check_data(dataset(tmp_path, data, classes=('dog', 'cat')), trained=trained)


def test_masks_that_nothing_asks_for(tmp_path):
    for values in (dict(ignore=1), dict(category_id=2), dict(bbox=[70, 8, 9, 9])):
        data = content()
        no_mask(data, **values)
        data['categories'].append(dict(id=2, name='dog'))
        assert answer(tmp_path, data) is None, values
        assert answer(tmp_path, data, masks=False) is None
        # pycocotools takes those for polygons that MMDetection passes over.
        faults, _ = find_faults(dataset(tmp_path, data, test_mode=True))
        assert bool(faults) == ('category_id' not in values), values


def test_an_annotation_that_evaluation_takes_for_none(tmp_path):
    data = content()
    data['annotations'][2]['id'] = 0
    for test_mode, count in ((True, 1), (False, 0)):  # for training any number will do
        faults, said = find_faults(dataset(tmp_path, data, test_mode=test_mode))
        assert faults == [] and len(said) == count
        assert count == 0 or said[0].startswith('1 of 4 annotations have the id 0, which')


def test_absolute_names_in_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = content()
    data['images'][0]['file_name'] = str(tmp_path / 'images/0.png')
    assert answer(Path(), data) is None
    data['images'][0]['file_name'] = str(tmp_path.parent / '0.png')
    assert '1 of 4 images lie outside' in answer(Path(), data)


def test_strict_can_be_relaxed(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr('mmdet_odconv.engine.data_check.print_log',
                        lambda message, logger, level: said.append(message))
    data = content()
    data['images'][2].update(width=640)
    for sentence in ('2.png is 64 x 48 pixels', 'four finite numbers'):
        runner = SimpleNamespace(model=nn.ModuleDict(), val_loop=None, cfg={}, train_dataloader=(
            SimpleNamespace(dataset=dataset(tmp_path, data))))
        InputCheckHook(strict=False).before_train(runner)
        assert sentence in said[-1]
        with pytest.raises(InputError, match=sentence):
            InputCheckHook().before_train(runner)
        data['annotations'][3]['bbox'] = [8, 8, math.nan, 32]  # said before an image is read


def test_what_is_tested_on_has_the_order_of_its_classes(tmp_path):
    data = content()
    data['categories'] += [dict(id=2, name='dog')]
    hook = InputCheckHook()
    for classes in (('cat', 'dog'), ('dog', 'cat')):
        runner = SimpleNamespace(model=nn.ModuleDict(), test_loop=None, test_dataloader=(
            SimpleNamespace(dataset=dataset(tmp_path, data, classes=classes))))
        if classes[0] == 'cat':
            hook.before_test(runner)
        else:
            with pytest.raises(InputError, match="lists cat where the config's classes have dog"):
                hook.before_test(runner)


def test_json_nested_deep(tmp_path):
    sentence = answer(tmp_path, '[' * 100_000 + ']' * 100_000)
    assert 'could not be read as COCO (RecursionError' in sentence


def test_garbage_is_collected_again_however_the_pass_ends():
    for error in (None, ValueError):
        with contextlib.suppress(ValueError), no_garbage_collection():
            assert not gc.isenabled()
            if error:
                raise error
        assert gc.isenabled()


def test_a_sample_of_many_images_is_read(tmp_path, monkeypatch):
    data = content()
    data['images'] = [dict(id=i, file_name='0.png', width=64, height=48) for i in range(1000)]
    data['annotations'] = [dict(data['annotations'][0], id=i, image_id=i) for i in range(1000)]
    read = []
    many = dataset(tmp_path, data)
    load = many.pipeline.transforms[0]
    monkeypatch.setattr(type(load), 'transform', lambda self, results: read.append(
        results['img_id']) or dict(ori_shape=(48, 64)))
    check_data(many)
    assert len(read) <= SAMPLE and read == list(range(0, 1000, -(-1000 // SAMPLE)))


def test_what_is_no_coco_dataset_is_left_alone():
    check_data(range(3))

    class Own(CocoDataset):
        def parse_data_info(self, raw):
            return {}

    check_data(Own(ann_file=os.devnull, lazy_init=True, pipeline=[]))


@pytest.mark.parametrize(('mend', 'message'), [
    (without('annotations', 'iscrowd'), r'1 of 4 annotations have no iscrowd of 0 or 1'),
    (annotations(1, iscrowd='x'), 'have no iscrowd of 0 or 1, which pycocotools evaluates by'),
    (annotations(1, id='u1'), r'have an id that is no number \(the first: u1\)')])
def test_what_pycocotools_would_fail_on_after_an_epoch(tmp_path, mend, message):
    data = content()
    check_data(dataset(tmp_path, data), trained=False, by_coco=True)
    mend(data)
    assert answer(tmp_path, data) is None  # training needs none of it
    check_data(dataset(tmp_path, data), trained=False)
    with pytest.raises(InputError, match=f'a.json cannot be evaluated on: .*{message}'):
        check_data(dataset(tmp_path, data), trained=False, by_coco=True)
    faults, _ = find_faults(dataset(tmp_path, data, test_mode=True))
    assert re.search(message, faults[0])
