"""Time a config's network in every way to run it, beside its static counterpart.

    python tools/deployment/benchmark.py CONFIG [--part backbone|detector] [--size 224 320]

Both are fused, have random weights and take one image; each answers what it does in PyTorch, or
the command says so. Milliseconds are medians of rounds in which all take turns.
"""
import argparse

import torch
from mmengine.config import Config
from rich.console import Console
from rich.table import Table

from mmdet_odconv import config_path
from mmdet_odconv.deployment.timing import FORMATS, counterparts, time_formats
from mmdet_odconv.engine.launch import errors_explained


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', metavar='CONFIG')
    parser.add_argument('--part', choices=['backbone', 'detector'], default='backbone')
    parser.add_argument('--size', type=int, nargs=2, default=(224, 320), metavar=('H', 'W'))
    parser.add_argument('--formats', nargs='+', choices=FORMATS, default=FORMATS)
    parser.add_argument('--rounds', type=int, default=10)
    args = parser.parse_args()
    with errors_explained():
        torch.manual_seed(0)
        models = counterparts(Config.fromfile(config_path(args.config)), args.part)
        rows = time_formats(models, torch.randn(1, 3, *args.size), args.formats, args.rounds)
    static = {row['format']: row['ms'] for row in rows if row['model'] == 'static'}
    table = Table(title=f'{args.part}, one image of {args.size[0]}x{args.size[1]}, '
                        f'{torch.get_num_threads()} threads')
    for column in ('format', 'model', 'ms', 'of static', 'MB', 'error'):
        table.add_column(column, justify='left' if column in ('format', 'model') else 'right')
    for row in rows:
        table.add_row(row['format'], row['model'], f'{row["ms"]:.1f}',
                      f'{row["ms"] / static[row["format"]]:.2f}', f'{row["MB"]:.1f}',
                      f'{row["error"]:.0e}')
    Console().print(table)


if __name__ == '__main__':
    main()
