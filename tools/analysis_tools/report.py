"""Show what a training run reached: curves, pictures, metrics.

    python report.py WORK_DIR [--images 12] [--score 0.5]

Reads the config, the logs and ``predictions.pkl`` (written by ``tools/test.py --out``, of poses by
MMPose's ``test.py --dump``) in WORK_DIR and leaves there ``metrics.json``, ``curves.png`` and
``predictions.png``.
"""
import argparse
import json
import sys
from pathlib import Path

import matplotlib
import mmcv
import mmengine
import numpy as np
import torch
from mmengine.config import Config
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from rich.console import Console
from rich.table import Table

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from mmdet_odconv.deployment.attentions import Image, judge  # noqa: E402
from mmdet_odconv.engine.data_sets import nested  # noqa: E402
from mmdet_odconv.engine.launch import errors_explained  # noqa: E402

# What each is drawn as, of colours that a colour-blind reader tells apart (Okabe and Ito).
KINDS = {'right': ('#56b4e9', '-'), 'wrong class': ('#f0e442', '-'), 'false': ('#e69f00', '--'),
         'missed': ('#cc79a7', ':')}
POINTS = {'true': KINDS['right'], 'predicted': KINDS['false']}
FONT = 7  # points, of a label on a picture
MAPS = {'bbox_mAP': 'box', 'segm_mAP': 'mask', 'AP': 'keypoint'}  # as the logs call their mAP
METRICS = {
    'mAP': 'AP @ IoU 0.50:0.95', 'mAP_50': 'AP @ IoU 0.50', 'mAP_75': 'AP @ IoU 0.75',
    'mAP_s': 'AP, small objects', 'mAP_m': 'AP, medium objects', 'mAP_l': 'AP, large objects'
}
POINT_METRICS = {
    'AP': 'AP @ OKS 0.50:0.95', 'AP .5': 'AP @ OKS 0.50', 'AP .75': 'AP @ OKS 0.75',
    'AP (M)': 'AP, medium objects', 'AP (L)': 'AP, large objects'
}


def read_scalars(work_dir):
    """Training records and validation records of all runs in ``work_dir``, the last run's winning.

    Returns two dicts: iteration -> record, and epoch, or iteration where logs name no epochs, ->
    record.
    """
    train, val = {}, {}
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # cut short, as by a full disk
            if 'loss' in record:
                train[record['iter']] = record
            elif 'step' in record:  # an evaluation, without metrics where nothing was detected
                val[record['step']] = record
    return train, val


def draw_curves(train, val, path):
    """Loss over iterations, and beside it mAP of boxes, masks or keypoints after every epoch."""
    iterations = sorted(train)
    figure, (loss_axis, map_axis) = plt.subplots(1, 2, figsize=(9, 3.6), layout='constrained')
    loss_axis.plot(iterations, [train[i]['loss'] for i in iterations], color='0.3')
    loss_axis.set(xlabel='iteration', ylabel='training loss', ylim=(0, None))
    last_of_epoch = {train[i]['epoch']: i for i in iterations if 'epoch' in train[i]}
    if not last_of_epoch:  # logged by iteration; 0 is where MMEngine's default puts the last of all
        last_of_epoch = {step: step or iterations[-1] for step in val}
    epochs = sorted(epoch for epoch in val if epoch in last_of_epoch)
    for (name, kind), colour, above in zip(MAPS.items(), ('#0072b2', '#d55e00', '#0072b2'),
                                           (6, -14, 6)):
        points = [(last_of_epoch[epoch], val[epoch][f'coco/{name}']) for epoch in epochs
                  if f'coco/{name}' in val[epoch]]
        if points:
            map_axis.plot(*zip(*points), color=colour, marker='o', label=f'{kind} mAP')
            for x, y in points:
                map_axis.annotate(f'{y:.2f}', (x, y), (0, above), textcoords='offset points',
                                  color=colour, ha='center')
            map_axis.legend(loc='lower right', frameon=False)
    map_axis.set(xlabel='iteration', ylabel='COCO evaluation on val', ylim=(0, 1),
                 xlim=loss_axis.get_xlim())
    figure.savefig(path, dpi=120)
    plt.close(figure)


def overlap(a, b):
    """Area that two boxes, (x1, y1, x2, y2), share."""
    return (max(0, min(a[2], b[2]) - max(a[0], b[0]))
            * max(0, min(a[3], b[3]) - max(a[1], b[1])))


def place_labels(boxes, texts, width, height, letter, line):
    """Where the label of each box goes: above, below or beside it, where it covers least.

    Args:
        boxes: (x1, y1, x2, y2) each, in px of a picture of ``width`` and ``height``.
        texts: of the labels.
        letter, line: width of a letter and height of a line, in the same px.

    Returns:
        (x1, y1, x2, y2) of each label; one over another, or out of the picture, counts most.
    """
    placed = []
    for (x1, y1, x2, y2), text in zip(boxes, texts):
        wide = letter * len(text)
        corners = [(x, y) for y in (y1 - line, y2, y1, y2 - line)
                   for x in (x1, x2 - wide, x2, x1 - wide)]

        def cost(label):
            inside = overlap(label, (0, 0, width, height))
            outside = (label[2] - label[0]) * (label[3] - label[1]) - inside
            return 10 * (outside + sum(overlap(label, other) for other in placed)) + sum(
                overlap(label, other) for other in boxes)

        placed.append(min(((x, y, x + wide, y + line) for x, y in corners), key=cost))
    return placed


def contact_sheet(paths):
    """A figure with the images at ``paths``, and the axes that they are on."""
    columns = min(4, len(paths))
    rows = -(-len(paths) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 3.2 * rows + 0.5),
                                squeeze=False, layout='constrained')
    for axis in axes.flat:
        axis.axis('off')
    for axis, path in zip(axes.flat, paths):
        axis.imshow(mmcv.imread(path)[..., ::-1])  # turned and coloured as the detector saw it
    return figure, axes.flat


def show_legend(figure, kinds, title):
    figure.legend(handles=[Line2D([], [], color=colour, ls=style, lw=2, label=kind)
                           for kind, (colour, style) in kinds.items()],
                  title=title, loc='outside upper center', ncols=len(kinds), frameon=False)


def draw_points(predictions, coco, path, images):
    """Contact sheet of the first validation images with true and predicted points and skeletons."""
    skeleton = [(a - 1, b - 1) for a, b in coco.loadCats(coco.getCatIds())[0]['skeleton']]
    by_image = {}  # a prediction holds one instance
    for prediction in predictions:
        by_image.setdefault(prediction['img_path'], []).append(prediction)
    by_image = dict(list(by_image.items())[:images])
    figure, axes = contact_sheet(list(by_image))
    for axis, found in zip(axes, by_image.values()):
        truths = coco.loadAnns(coco.getAnnIds(found[0]['img_id']))
        true = [np.reshape(truth['keypoints'], (-1, 3))[:, :2] for truth in truths]
        predicted = [one for prediction in found
                     for one in np.asarray(prediction['pred_instances']['keypoints'])]
        for instances, (colour, style) in zip((true, predicted), POINTS.values()):
            for points in instances:
                for link in skeleton:
                    axis.plot(*points[list(link)].T, color=colour, ls=style, lw=1.2)
                axis.plot(*points.T, 'o', color=colour, ms=2.5)
                axis.plot(*points[0], 's', color=colour, ms=4.5)  # which way round it is
    show_legend(figure, POINTS, 'points; the first of each is square')
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_predictions(predictions, coco, classes, path, images, min_score):
    """Contact sheet of the first validation images: what is right, wrong, false and missed.

    ``classes`` are names that the detector knows; none means all that the annotations have.
    """
    categories = coco.getCatIds(catNms=classes)  # in the file's order, as mmdet numbers labels
    names = [category['name'] for category in coco.loadCats(categories)]
    predictions = predictions[:images]
    figure, axes = contact_sheet([prediction['img_path'] for prediction in predictions])
    for axis, prediction in zip(axes, predictions):
        found = prediction['pred_instances']
        truth = coco.loadAnns(coco.getAnnIds(prediction['img_id'], categories, iscrowd=False))
        corners = [(x, y, x + w, y + h) for x, y, w, h in (one['bbox'] for one in truth)]
        image = Image(prediction['img_path'], torch.tensor(corners).reshape(-1, 4),
                      torch.tensor([categories.index(one['category_id']) for one in truth],
                                   dtype=torch.long),
                      *(torch.as_tensor(found[key]) for key in ('bboxes', 'scores', 'labels')))
        taken, missed = judge(image, min_score)
        shown = [('missed', corners[i], names[image.labels[i]]) for i in missed]
        for i, true in taken.items():
            kind = ('false' if true is None else 'right'
                    if image.labels[true] == image.found_labels[i] else 'wrong class')
            text = f'{names[image.found_labels[i]]} {image.found_scores[i]:.2f}'
            shown.append((kind, tuple(image.found_boxes[i].tolist()), text))
            if 'masks' in found:
                mask = mask_utils.decode(found['masks'][i]).astype(float)
                axis.contour(mask, [0.5], colors=KINDS[kind][0], linewidths=0.8)
        height, width = axis.images[0].get_array().shape[:2]
        point = max(height, width) / 3.2 / 72  # in px of the picture
        labels = place_labels([box for _, box, _ in shown], [text for _, _, text in shown], width,
                              height, 0.62 * FONT * point, 1.5 * FONT * point)
        for (kind, (x1, y1, x2, y2), text), (left, _, _, bottom) in zip(shown, labels):
            colour, style = KINDS[kind]
            axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour,
                                     ls=style, lw=1.6))
            axis.text(left, bottom, text, fontsize=FONT, va='bottom',
                      bbox=dict(facecolor=colour, edgecolor='none', pad=0.8))
        axis.set(xlim=(0, width), ylim=(height, 0))
    show_legend(figure, KINDS,
                f'detections with a score of {min_score:g} or more, and objects missed')
    figure.savefig(path, dpi=110)
    plt.close(figure)


def read_metrics(work_dir):
    """Metrics of the latest evaluation by tools/test.py, name -> value."""
    records = sorted(path for path in work_dir.glob('*/*.json') if path.stem == path.parent.name)
    if not records:
        sys.exit(f'error: {work_dir} holds no evaluation: run tools/test.py with --work-dir and '
                 '--out first.')
    record = json.loads(records[-1].read_text())
    return {name[5:]: value for name, value in record.items() if name.startswith('coco/')}


def print_table(metrics, split, console):
    """COCO's summary, a column each for boxes and masks, or one for keypoints."""
    kinds = {name: kind for name, kind in MAPS.items() if name in metrics}
    if not kinds:
        console.print('Nothing was detected, so that COCO evaluation has no figures.')
        return
    table = Table(title=f'COCO evaluation on {split}')
    table.add_column('metric')
    for kind in kinds.values():
        table.add_column(kind, justify='right')
    for name, title in (POINT_METRICS if 'AP' in kinds else METRICS).items():
        # 'bbox_' and 'segm_', and nothing of 'AP'
        values = [metrics[kind[:-len('mAP')] + name] for kind in kinds]
        # pycocotools answers -1 where no object is of that size.
        table.add_row(title, *('none' if value < 0 else f'{value:.3f}' for value in values))
    console.print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('work_dir', type=Path)
    parser.add_argument('--images', type=int, default=12, help='pictures on the contact sheet')
    parser.add_argument('--score', type=float, default=0.5, help='least score of a box shown')
    args = parser.parse_args()
    if args.images < 1:
        parser.error(f'--images must be at least 1, got {args.images}')
    with errors_explained():
        report(args)


def report(args):
    """What main writes and prints."""
    configs = list(args.work_dir.glob('*.py'))
    predictions = args.work_dir / 'predictions.pkl'
    if not configs or not predictions.is_file():
        sys.exit(f'error: {args.work_dir} lacks a config or predictions.pkl: train into it, then '
                 f'run tools/test.py with --work-dir {args.work_dir} --out {predictions}.')
    metrics = read_metrics(args.work_dir)
    (args.work_dir / 'metrics.json').write_text(json.dumps(metrics, indent=1))
    draw_curves(*read_scalars(args.work_dir), args.work_dir / 'curves.png')
    config = Config.fromfile(max(configs, key=lambda path: path.stat().st_mtime))
    evaluator = config.test_evaluator
    classes = nested(config.test_dataloader.dataset)[-1].get('metainfo', {}).get('classes', ())
    if isinstance(classes, str):  # a file of names, which MMEngine takes, too
        classes = mmengine.list_from_file(classes)
    if isinstance(evaluator, list):  # MMPose's --dump adds to it, and saves that
        evaluator = evaluator[0]
    coco = COCO(evaluator.ann_file)
    predictions, picture = mmengine.load(predictions), args.work_dir / 'predictions.png'
    if 'keypoints' in predictions[0]['pred_instances']:
        draw_points(predictions, coco, picture, args.images)
    else:
        draw_predictions(predictions, coco, classes, picture, args.images, args.score)
    console = Console()
    print_table(metrics, Path(evaluator.ann_file).stem, console)
    for name in ('metrics.json', 'curves.png', 'predictions.png', 'last_checkpoint'):
        path = args.work_dir / name
        if not path.is_file():  # no checkpoint, of a run that was only tested
            continue
        shown = path.read_text() if name == 'last_checkpoint' else path.resolve()
        console.print(f'{name:>16}  {shown}', soft_wrap=True, highlight=False)


if __name__ == '__main__':
    main()
