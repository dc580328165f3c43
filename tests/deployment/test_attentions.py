"""What layers attend to, what a detector misses, and the page that shows both."""
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import digits
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmengine.config import Config

from mmdet_odconv import InputError
from mmdet_odconv.checkpoints.swapping import build_model
from mmdet_odconv.deployment import attentions
from mmdet_odconv.deployment.attentions import (
    Image,
    by_class,
    mistakes,
    most_and_least_alike,
    record_attentions,
    spread,
)

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'google-chrome'))), None)


def image(boxes, labels, found, scores, found_labels):
    return Image('x.jpg', torch.tensor(boxes).reshape(-1, 4), torch.tensor(labels),
                 torch.tensor(found).reshape(-1, 4), torch.tensor(scores),
                 torch.tensor(found_labels))


def test_spread():
    uniform = spread(torch.full((5, 4), 0.25))
    assert uniform.entropy == pytest.approx(1) and uniform.variation == 0 and not uniform.dead
    apart = spread(torch.eye(3)[[0, 1, 0, 1]])
    assert apart.entropy == 0 and apart.variation == pytest.approx(1 / 3) and apart.dead == [2]
    assert apart.shares.tolist() == [0.5, 0.5, 0]
    # Of a large bank an equal share is small itself.
    even = torch.full((3, 64), 1 / 64)
    even[:, 0] /= 30
    assert spread(even).dead == [0]


def test_by_class_and_alike():
    attention = torch.tensor([[1., 0.], [0.9, 0.1], [0., 1.]])
    images = [image([], labels, [], [], []) for labels in ([0, 1], [0], [1])]
    assert by_class(attention, images, 3)[:2].tolist() == [pytest.approx([0.95, 0.05]), [0.5, 0.5]]
    assert by_class(attention, images, 3)[2].isnan().all()
    assert most_and_least_alike(dict(layer=attention)) == ((0, 1), (0, 2))


def test_mistakes():
    """Found twice, as another class, where nothing is, and not at all."""
    a, b, c, far = [0., 0, 9, 9], [20., 0, 29, 9], [40., 0, 49, 9], [80., 80, 90, 90]
    found = mistakes([image([a, b, c], [0, 1, 0], [a, a, b, far, c], [.9, .8, .7, .6, .1],
                            [0, 0, 0, 1, 0])], ['one', 'two'], 0.5)
    assert [m.text for m in found['false positives']] == ['one 0.80', 'two 0.60']
    assert [m.text for m in found['wrong class']] == ['one 0.70, is two']
    assert [(m.text, m.box.tolist()) for m in found['misses']] == [('one', c)]
    assert found['misses'][0].badness == pytest.approx(0.9)


def test_a_crowd_excuses_a_detection():
    """Which is then neither right nor false; an object in it is found all the same."""
    person, crowd = [0., 0, 9, 9], [0., 0, 90, 90]
    one = image([person], [0], [person, [50., 50, 59, 59], [80., 80, 120, 120]], [.9, .8, .7],
                [0, 0, 0])
    one.ignored = torch.tensor([crowd])
    found = mistakes([one], ['one'], 0.5)
    assert [m.text for m in found['false positives']] == ['one 0.70'] and not found['misses']


def test_what_is_read_of_a_data_set(tmp_path):
    """Not crowds, which are neither right nor missed, nor layers with one kernel to mix."""
    digits.make(tmp_path)
    config = Config.fromfile(digits.ROOT / 'configs/quickstart/faster-rcnn_od-r18-k4_fpn_digits.py')
    path = tmp_path / 'data/digits/annotations/val.json'
    content = json.loads(path.read_text())
    content['annotations'][0]['iscrowd'] = 1
    path.write_text(json.dumps(content))
    config.test_dataloader.dataset.data_root = f'{tmp_path}/data/digits/'
    config.merge_from_dict({'model.backbone.base_channels': 8, 'model.backbone.stem_channels': 8,
                            'model.neck.in_channels': [8, 16, 32, 64],
                            'model.backbone.kernel_num': 1})
    with pytest.raises(InputError, match='^No layer of this detector mixes kernels by attention'):
        record_attentions(build_model(config).eval(), config, 100)
    config.model.backbone.kernel_num = 2
    classes = config.test_dataloader.dataset.metainfo.classes
    config.test_dataloader.dataset.metainfo.classes = classes[::-1]
    with pytest.raises(InputError, match=r"val\.json lists 0 where the config's classes have 9"):
        record_attentions(build_model(config).eval(), config, 100)
    config.test_dataloader.dataset.metainfo.classes = classes
    images, _ = record_attentions(build_model(config).eval(), config, 100)
    assert sum(len(image.boxes) for image in images) == len(content['annotations']) - 1
    assert sum(len(image.ignored) for image in images) == 1

    # Where a file has some of the classes alone, labels are still the config's; in any order.
    categories = content['categories'][3:5]
    content['categories'] = categories
    content['annotations'] = [dict(one, category_id=categories[i % 2]['id'], iscrowd=0)
                              for i, one in enumerate(content['annotations'])]
    path.write_text(json.dumps(content))
    config.test_dataloader.sampler.shuffle = True
    images, _ = record_attentions(build_model(config).eval(), config, 100)
    assert {int(label) for image in images for label in image.labels} == {3, 4}
    boxes = {info['file_name']: [one['bbox'] for one in content['annotations']
                                 if one['image_id'] == info['id']] for info in content['images']}
    for one in images:
        x, y, w, h = boxes[Path(one.path).name][0]
        assert one.boxes[0].tolist() == pytest.approx([x, y, x + w, y + h])
    path.write_text(json.dumps(dict(content, categories=[
        dict(one, name=f'no {one["name"]}') for one in categories])))
    with pytest.raises(InputError, match="^The annotations name none of the config's classes, 0, "):
        record_attentions(build_model(config).eval(), config, 100)
    voc = dict(type='VOCDataset', ann_file='x', metainfo=dict(classes=classes))
    with pytest.raises(InputError, match='^The config has no test_dataloader, whose images are to'):
        record_attentions(build_model(config).eval(), Config({}), 100)
    fake = type('VOCDataset', (), dict(metainfo=voc['metainfo']))()
    with pytest.raises(InputError, match="^The test set is a VOCDataset, whose objects cannot be"):
        attentions._truth(fake)


@pytest.mark.parametrize(('options', 'said'), [
    (('--images', '0'), '--images is 0, where at least one was expected'),
    (('--curves', 'none.png'), 'none.png does not exist: give a picture, or no --curves')])
def test_options_that_cannot_be_met_are_refused_before_any_work(tmp_path, monkeypatch, capsys,
                                                                options, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['attention.py', 'many.py', 'none.pth', *options])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(digits.ROOT / 'tools/analysis_tools/attention.py'), run_name='__main__')
    assert said in f'{end.value.code} {capsys.readouterr().err}'


def test_the_page(tmp_path, monkeypatch, capsys):
    digits.make(tmp_path)
    # Classes that neither the config nor the weights tell: COCO's, as its own configs have it.
    annotations = tmp_path / 'data/digits/annotations/train.json'
    content = json.loads(annotations.read_text())
    for category, name in zip(content['categories'], CocoDataset.METAINFO['classes']):
        category['name'] = name
    annotations.write_text(json.dumps(content))
    (tmp_path / 'tiny.py').write_text(f"""
_base_ = {str(digits.ROOT / 'configs/quickstart/faster-rcnn_od-r18-k4_fpn_digits.py')!r}
model = dict(backbone=dict(base_channels=8, stem_channels=8, kernel_num=2, init='he'),
             neck=dict(in_channels=[8, 16, 32, 64]))
test_dataloader = dict(dataset=dict(_delete_=True, type='ConcatDataset', datasets=[dict(
    type='CocoDataset', ann_file='', metainfo=dict(), pipeline=_base_.test_pipeline)]))
""")
    monkeypatch.chdir(tmp_path)
    torch.save(build_model(Config.fromfile('tiny.py')).state_dict(), 'tiny.pth')
    monkeypatch.setattr(sys, 'argv', ['attention.py', 'tiny.py', 'tiny.pth', '--score', '0.01',
                                      '--data', 'data/digits/annotations/train.json',
                                      'data/digits/train', '--out', 'page/attention.html'])
    runpy.run_path(str(digits.ROOT / 'tools/analysis_tools/attention.py'), run_name='__main__')
    said = capsys.readouterr().out
    rows = re.findall(r'entropy (\S+), variation (\S+), shares', said)
    assert len(set(rows)) == 16 and '0.0000' not in {variation for _, variation in rows}
    page = (tmp_path / 'page/attention.html').read_text()
    # Two pairs of images, four with detections, and the mistakes, each named.
    false, wrong, missed = (int(re.search(rf'<h2>{kind}: (\d+)</h2>', page).group(1))
                            for kind in ('False positives', 'Wrong class', 'Misses'))
    assert page.count('<figure>') == 8 + sum(min(8, n) for n in (false, wrong, missed)) > 8
    names = {Path(info['file_name']).name for info in content['images']}
    captions = re.findall(r'<figcaption>([^<]+)</figcaption>', page)
    assert {caption.partition(':')[0] for caption in captions} == names
    assert sum(': ' in caption for caption in captions) == len(captions) - 8
    assert all(len(picture) > 2000 for picture in re.findall(
        r'<figure><img alt="" src="data:image/jpeg;base64,([^"]+)"', page))
    assert '4 images' in page and not re.search(r'(src|href)="(?!data:)', page)
    if BROWSER is None:
        pytest.skip('no Chromium to open the page in')
    subprocess.run([BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--screenshot=page.png',
                    '--window-size=1000,1500', f'file://{tmp_path}/page/attention.html'],
                   check=True, capture_output=True, timeout=60)
    assert cv2.imread('page.png').std() > 20
