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
import mmengine
import numpy as np
from mmengine.config import Config
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from rich.console import Console
from rich.table import Table

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)
from matplotlib.patches import Rectangle  # noqa: E402

TRUE_COLOUR, PREDICTED_COLOUR = '#00e08a', '#ff9a1f'
KINDS = {'bbox_mAP': 'box', 'segm_mAP': 'mask', 'AP': 'keypoint'}  # as the logs call their mAP
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

    Returns two dicts: iteration -> record, and epoch -> record.
    """
    train, val = {}, {}
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if 'loss' in record:
                train[record['iter']] = record
            elif any(f'coco/{name}' in record for name in KINDS):
                val[record['step']] = record
    return train, val


def draw_curves(train, val, path):
    """Loss over iterations, and mAP of boxes, masks or keypoints after every epoch."""
    iterations = sorted(train)
    figure, loss_axis = plt.subplots(figsize=(8, 4.5), layout='constrained')
    loss_axis.plot(iterations, [train[i]['loss'] for i in iterations], color='0.45', label='loss')
    loss_axis.set(xlabel='iteration', ylabel='training loss', ylim=(0, None))
    last_of_epoch = {train[i]['epoch']: i for i in iterations}
    epochs = sorted(epoch for epoch in val if epoch in last_of_epoch)
    map_axis = loss_axis.twinx()
    for (name, kind), colour in zip(KINDS.items(), ('#1f6fd6', '#c2410c', '#1f6fd6')):
        points = [(last_of_epoch[epoch], val[epoch][f'coco/{name}']) for epoch in epochs
                  if f'coco/{name}' in val[epoch]]
        if points:
            map_axis.plot(*zip(*points), color=colour, marker='o', label=f'{kind} mAP')
            for x, y in points:
                map_axis.annotate(f'{y:.2f}', (x, y), (0, -14 if kind == 'mask' else 6),
                                  textcoords='offset points', color=colour, ha='center')
    map_axis.set(ylabel='COCO mAP on val', ylim=(0, 1))
    figure.legend(loc='outside upper center', ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_box(axis, box, text, colour, style):
    """One box, (x, y, w, h) in px, with its text above it, or below it at the image's top."""
    x, y, width, height = box
    axis.add_patch(Rectangle((x, y), width, height, fill=False, color=colour, ls=style, lw=1.4))
    if text:
        below = y < 14
        axis.text(x, y + height if below else y, text, color='black', fontsize=7,
                  va='top' if below else 'bottom',
                  bbox=dict(facecolor=colour, edgecolor='none', pad=0.8))


def contact_sheet(paths):
    """A figure with the images at ``paths``, and the axes that they are on."""
    columns = min(4, len(paths))
    rows = -(-len(paths) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 3.2 * rows + 0.5),
                                squeeze=False, layout='constrained')
    for axis in axes.flat:
        axis.axis('off')
    for axis, path in zip(axes.flat, paths):
        axis.imshow(plt.imread(path))
    return figure, axes.flat


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
        for instances, colour, style in ((true, TRUE_COLOUR, '-'),
                                         (predicted, PREDICTED_COLOUR, '--')):
            for points in instances:
                for link in skeleton:
                    axis.plot(*points[list(link)].T, color=colour, ls=style, lw=1.2)
                axis.plot(*points.T, 'o', color=colour, ms=2.5)
                axis.plot(*points[0], 's', color=colour, ms=4.5)  # which way round it is
    figure.suptitle('true points: solid green; predicted: dashed orange; the first point is square')
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_predictions(predictions, coco, path, images, min_score):
    """Contact sheet of the first validation images with true and predicted boxes and masks."""
    names = [category['name'] for category in coco.loadCats(coco.getCatIds())]
    predictions = predictions[:images]
    figure, axes = contact_sheet([prediction['img_path'] for prediction in predictions])
    for axis, prediction in zip(axes, predictions):
        for truth in coco.loadAnns(coco.getAnnIds(prediction['img_id'])):
            draw_box(axis, truth['bbox'], None, TRUE_COLOUR, '-')
        found = prediction['pred_instances']
        for i in np.flatnonzero(np.asarray(found['scores']) >= min_score):
            x1, y1, x2, y2 = np.asarray(found['bboxes'][i])
            text = f'{names[int(found["labels"][i])]} {float(found["scores"][i]):.2f}'
            draw_box(axis, (x1, y1, x2 - x1, y2 - y1), text, PREDICTED_COLOUR, '--')
            if 'masks' in found:
                mask = mask_utils.decode(found['masks'][i]).astype(float)
                axis.contour(mask, [0.5], colors=PREDICTED_COLOUR, linewidths=0.8)
    figure.suptitle(f'true boxes: solid green; predicted, score >= {min_score}: dashed orange')
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


def print_table(metrics, console):
    """COCO's summary, a column each for boxes and masks, or one for keypoints."""
    kinds = {name: kind for name, kind in KINDS.items() if name in metrics}
    table = Table(title='COCO evaluation on val')
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
    configs = sorted(args.work_dir.glob('*.py'))
    predictions = args.work_dir / 'predictions.pkl'
    if not configs or not predictions.is_file():
        sys.exit(f'error: {args.work_dir} lacks a config or predictions.pkl: train into it, then '
                 f'run tools/test.py with --work-dir {args.work_dir} --out {predictions}.')
    metrics = read_metrics(args.work_dir)
    (args.work_dir / 'metrics.json').write_text(json.dumps(metrics, indent=1))
    draw_curves(*read_scalars(args.work_dir), args.work_dir / 'curves.png')
    evaluator = Config.fromfile(configs[0]).test_evaluator
    if isinstance(evaluator, list):  # MMPose's --dump adds to it, and saves that
        evaluator = evaluator[0]
    coco = COCO(evaluator.ann_file)
    predictions, picture = mmengine.load(predictions), args.work_dir / 'predictions.png'
    if 'keypoints' in predictions[0]['pred_instances']:
        draw_points(predictions, coco, picture, args.images)
    else:
        draw_predictions(predictions, coco, picture, args.images, args.score)
    console = Console()
    print_table(metrics, console)
    for name in ('metrics.json', 'curves.png', 'predictions.png', 'last_checkpoint'):
        path = args.work_dir / name
        shown = path.read_text() if name == 'last_checkpoint' and path.is_file() else path.resolve()
        console.print(f'{name:>16}  {shown}', soft_wrap=True, highlight=False)


if __name__ == '__main__':
    main()
