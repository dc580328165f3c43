import importlib.util
import itertools
import json
from pathlib import Path

import digits
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from pycocotools.coco import COCO
from rich.console import Console

SCRIPT = Path(__file__).parents[2] / 'tools/analysis_tools/report.py'


@pytest.fixture(scope='module')
def report():
    spec = importlib.util.spec_from_file_location('report', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_labels_are_in_the_picture_and_do_not_collide(report):
    # One object found four times, and others at the picture's edges.
    boxes = [(40, 40, 60, 70)] * 4 + [(0, 0, 12, 20), (88, 0, 100, 20), (0, 85, 10, 100)]
    texts = ['7 0.52'] * 4 + ['1 1.00'] * 3
    labels = report.place_labels(boxes, texts, 100, 100, letter=3.5, line=8)
    assert len(labels) == len(boxes)
    for x1, y1, x2, y2 in labels:
        assert (x2 - x1, y2 - y1) == (21, 8)
        assert x1 >= 0 and y1 >= 0 and x2 <= 100 and y2 <= 100
    assert all(report.overlap(a, b) == 0 for a, b in itertools.combinations(labels, 2))
    assert report.overlap((0, 0, 2, 2), (1, 1, 3, 3)) == 1


@pytest.fixture
def figure(report, monkeypatch):
    """What was drawn last; the tool closes its figures."""
    monkeypatch.setattr(report.plt, 'close', lambda figure: None)
    yield report.plt.gcf
    monkeypatch.undo()
    report.plt.close('all')


def test_classes_that_were_left_out_change_no_names(report, figure, tmp_path):
    report.plt.imsave(tmp_path / 'a.png', np.zeros((40, 40)))
    boxes = {1: [1, 1, 9, 9], 2: [20, 1, 9, 9], 0: [1, 20, 9, 9]}
    (tmp_path / 'val.json').write_text(json.dumps(dict(
        images=[dict(id=1, file_name='a.png', width=40, height=40)],
        categories=[dict(id=i, name=name) for i, name in enumerate(('animals', 'cat', 'dog'))],
        annotations=[dict(id=i + 1, image_id=1, category_id=i, bbox=box, area=81, iscrowd=0)
                     for i, box in boxes.items()])))
    coco = COCO(tmp_path / 'val.json')
    corners = [[x, y, x + w, y + h] for x, y, w, h in (boxes[1], boxes[2])]
    predictions = [dict(img_path=str(tmp_path / 'a.png'), img_id=1, pred_instances=dict(
        bboxes=np.array(corners, 'float32'), scores=np.ones(2, 'float32'), labels=np.arange(2)))]

    def drawn(classes):
        report.draw_predictions(predictions, coco, classes, tmp_path / 'out.png', 1, 0.5)
        axis = figure().axes[0]
        return {(text.get_text(), text.get_bbox_patch().get_facecolor()[:3])
                for text in axis.texts}

    right, wrong, missed = (report.plt.matplotlib.colors.to_rgb(report.KINDS[kind][0])
                            for kind in ('right', 'wrong class', 'missed'))
    assert drawn(('dog', 'cat')) == {('cat 1.00', right), ('dog 1.00', right)}  # the file's order
    assert drawn(()) == {('animals 1.00', wrong), ('cat 1.00', wrong), ('animals', missed)}


@pytest.mark.parametrize(('train', 'val', 'expected'), [
    ({10: {'epoch': 1}, 20: {'epoch': 1}, 30: {'epoch': 2}}, {1: {}, 2: {}}, [20, 30]),
    ({10: {}, 20: {}}, {7: {}, 20: {}}, [7, 20]),  # by iteration, not only where one is logged
    ({10: {}, 20: {}}, {0: {}}, [20])])
def test_evaluations_are_drawn_where_they_were(report, figure, tmp_path, train, val, expected):
    for content in train.values():
        content['loss'] = 1.0
    for content in val.values():
        content['coco/bbox_mAP'] = 0.5
    report.draw_curves(train, val, tmp_path / 'curves.png')
    assert list(figure().axes[1].lines[0].get_xdata()) == expected


def test_a_log_that_was_cut_short(report, tmp_path):
    (tmp_path / 'a/vis_data').mkdir(parents=True)
    (tmp_path / 'a/vis_data/scalars.json').write_text(
        '{"loss": 1.0, "iter": 1}\n{"loss": 0.5, "it\n{"coco/bbox_mAP": 0.5, "step": 2}\n')
    train, val = report.read_scalars(tmp_path)
    assert list(train) == [1] and list(val) == [2]


def test_what_it_cannot_show(report, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['report.py', str(tmp_path), '--images', '0'])
    with pytest.raises(SystemExit):
        report.main()
    assert '--images must be at least 1, got 0' in capsys.readouterr().err


def test_points(report, tmp_path, capsys):
    digits.tool(tmp_path, 'dataset_converters/digits.py', 'data', '--keypoints',
                '--train', '1', '--val', '2', '--size', '96')
    coco = COCO(str(tmp_path / 'data/annotations/val.json'))
    pictures = []
    for shift in (0, 9):
        predictions = []
        for annotation in coco.anns.values():
            points = shift + torch.tensor(annotation['keypoints']).view(1, 4, 3)[..., :2]
            predictions.append(dict(
                img_id=annotation['image_id'], pred_instances=dict(keypoints=points),
                img_path=str(tmp_path / f'data/val/{annotation["image_id"]:06d}.jpg')))
        report.draw_points(predictions, coco, tmp_path / 'points.png', 12)
        pictures.append(imread(tmp_path / 'points.png'))
    assert pictures[0].shape == pictures[1].shape and (pictures[0] != pictures[1]).any()
    metrics = {name: 0.5 + 0.01 * i for i, name in enumerate(report.POINT_METRICS)}
    report.print_table({**metrics, 'AP (L)': -1.0}, 'test', Console(width=100))
    table = capsys.readouterr().out
    assert 'COCO evaluation on test' in table
    assert 'keypoint' in table and '0.510' in table and 'none' in table
    report.print_table({}, 'test', Console(width=100))
    assert 'Nothing was detected' in capsys.readouterr().out
