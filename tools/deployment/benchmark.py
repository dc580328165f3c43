"""Time a config's network in every way to run it, beside its static counterpart.

    python tools/deployment/benchmark.py CONFIG [--part backbone|detector] [--size 224 320]
    python tools/deployment/benchmark.py CONFIG --checkpoint FILE --static FILE

Both are fused, have random weights and take one image; each answers what it does in PyTorch, or
the command says so. Milliseconds are medians of rounds in which all take turns. --checkpoint is
of the config's detector and --static of its counterpart; then whole detectors are timed on the
first image of the test set, and COCO mAP on that set is computed through each format. Without
--checkpoint, the dynamic detector is inflated from the static one, which may be given alone.
"""
import argparse
import functools

import torch
import torch.nn.functional as F
from mmengine.config import Config
from rich.console import Console
from rich.table import Table

from mmdet_odconv import config_path
from mmdet_odconv.deployment.preprocessing import example_images
from mmdet_odconv.deployment.timing import (
    FORMATS,
    check_evaluator,
    counterparts,
    is_installed,
    mean_average_precision,
    time_formats,
)
from mmdet_odconv.engine.launch import errors_explained


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', metavar='CONFIG')
    parser.add_argument('--part', choices=['backbone', 'detector'], default='backbone')
    parser.add_argument('--size', type=int, nargs=2, metavar=('H', 'W'),
                        help="224 320, or with weights that of the test set's image")
    parser.add_argument('--formats', nargs='+', choices=FORMATS, default=FORMATS)
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--checkpoint', metavar='FILE', help='of the dynamic detector')
    parser.add_argument('--static', metavar='FILE', help='checkpoint of the static detector')
    args = parser.parse_args()
    checkpoints = {name: file for name, file in (('dynamic', args.checkpoint),
                                                 ('static', args.static)) if file}
    if args.checkpoint and not args.static:
        parser.error('--checkpoint was given without --static: beside a trained detector, a '
                     'random one would stand')
    if args.rounds < 1:
        parser.error(f'--rounds is {args.rounds}, where at least one was expected')
    if args.size and min(args.size) < 1:
        parser.error(f'--size is {args.size[0]} {args.size[1]}, where at least 1 1 was expected')
    with errors_explained():
        torch.manual_seed(0)
        config = Config.fromfile(config_path(args.config))
        if checkpoints:
            args.part = 'detector'
            check_evaluator(config)
        models = counterparts(config, args.part, checkpoints)
        score = functools.partial(mean_average_precision, config, models['dynamic'])
        if checkpoints:
            image = example_images(config, models['dynamic'].preprocessing, [])[0]
            image = F.interpolate(image, args.size, mode='bilinear') if args.size else image
        else:
            image = torch.randn(1, 3, *(args.size or (224, 320)))
        rows = time_formats(models, image, args.formats, args.rounds,
                            score if checkpoints else None)
    refused = [row for row in rows if 'refused' in row]
    rows = [row for row in rows if 'refused' not in row]
    static = {row['format']: row['ms'] for row in rows if row['model'] == 'static'}
    table = Table(title=f'{args.part}, one image of {image.shape[2]}x{image.shape[3]}, '
                        f'{torch.get_num_threads()} threads')
    for column in ('format', 'model', 'ms', 'of static', 'MB', 'error', *(
            ['mAP'] if checkpoints else [])):
        table.add_column(column, justify='left' if column in ('format', 'model') else 'right')
    for row in rows:
        table.add_row(row['format'], row['model'], f'{row["ms"]:.1f}',
                      f'{row["ms"] / static[row["format"]]:.2f}', f'{row["MB"]:.1f}',
                      'none found' if row['error'] is None else f'{row["error"]:.0e}',
                      *([f'{row["mAP"]:.3f}'] if checkpoints else []))
    for kind in args.formats:
        if not is_installed(kind):
            table.add_row(kind, 'not installed')
    for row in refused:
        table.add_row(row['format'], row['model'], 'refused')
    console = Console()
    console.print(table)
    for sentence in dict.fromkeys(row['refused'] for row in refused):
        console.print(sentence)


if __name__ == '__main__':
    main()
