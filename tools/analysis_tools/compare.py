"""Trains detectors under one budget, with several seeds each, and sets their results side by side.

    python compare.py CONFIG... --seeds 0 1 2 --iterations 250 --jobs 2

Each config is a path or the bare name of one of the plugin's; data, iterations, optimiser and
schedule are equal, whatever a config says of them: a linear warm-up, a constant rate and, in the
second half, a cosine. Where a config anneals its attention, it does so over the first third.

A run that is finished is not run again and an interrupted one is resumed, so the same command
goes on after a break, and with more configs or seeds it runs only what is new. A failed run is
reported and does not stop the others. WORK_DIR receives compare.md, compare.json and compare.png.
"""
import argparse
import concurrent.futures
import json
import os
import re
import statistics
import subprocess
import sys
import threading
from pathlib import Path

import matplotlib
from get_model_stats import detector_stats
from mmengine.config import Config
from report import read_scalars
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)

from mmdet_odconv import InputError  # noqa: E402
from mmdet_odconv.engine.launch import find_config  # noqa: E402

TRAIN = Path(__file__).parents[1] / 'train.py'
READING = threading.Lock()


def read_config(path):
    """A config read by one thread at a time: pkg_resources, which MMEngine asks, needs that."""
    with READING:
        return Config.fromfile(path)


def equal_budget(config, iterations, seed):
    """The config, trained for so many iterations from this seed and evaluated at their end."""
    annotations = Path(config.data_root) / config.train_dataloader.dataset.ann_file
    if not annotations.is_file():
        raise InputError(f'{annotations} does not exist: write the data first, '
                         f'python tools/dataset_converters/digits.py {config.data_root}')
    # By iteration, because MMEngine resumes an epoch at its beginning and would train longer.
    config.train_cfg = dict(
        type='IterBasedTrainLoop', max_iters=iterations, val_interval=iterations)
    config.param_scheduler = [
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0,
             end=max(1, iterations // 10)),
        dict(type='CosineAnnealingLR', by_epoch=False, begin=iterations // 2, end=iterations,
             T_max=iterations - iterations // 2, eta_min=1e-6)
    ]
    config.randomness = dict(seed=seed)
    config.resume = False
    config.log_processor.by_epoch = False
    config.default_hooks.checkpoint.update(
        by_epoch=False, interval=max(1, iterations // 4), max_keep_ckpts=1)
    for hook in config.get('custom_hooks', []):
        if hook['type'] in ('TemperatureAnnealingHook', 'WarehouseWarmUpHook'):
            images = len(json.loads(annotations.read_text())['images'])
            epoch = -(-images // config.train_dataloader.batch_size)
            hook['end_epoch'] = iterations / epoch / 3
    return config


def run(config, directory, threads=1):
    """Train and evaluate unless done: box mAP and seconds an iteration, or what went wrong."""
    result_file = directory / 'result.json'
    if result_file.is_file():
        return json.loads(result_file.read_text())
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / 'log.txt'
    try:
        config.dump(directory / 'config.py')
        # mmdet's --resume forgets load_from, so it is for runs that have begun.
        resume = ['--resume'] if (directory / 'last_checkpoint').is_file() else []
        with log.open('a') as file:
            subprocess.run(
                [sys.executable, str(TRAIN), str(directory / 'config.py'), '--work-dir',
                 str(directory), *resume], check=True, stdout=file, stderr=subprocess.STDOUT,
                env={**os.environ, 'OMP_NUM_THREADS': str(threads)})
    except (OSError, subprocess.CalledProcessError) as error:
        last = [line for line in log.read_text().splitlines() if line] if log.is_file() else []
        return {'error': last[-1] if last else str(error)}
    train, val = read_scalars(directory)
    if not val:
        return {'error': 'it was interrupted before its evaluation: remove '
                f'{directory} and run it again'}
    # Time of the quietest logged window, 50 iterations: other work on the machine counts least.
    result = {'map': val[max(val)]['coco/bbox_mAP'],
              'seconds': min(record['time'] for record in train.values())}
    partial = result_file.with_suffix('.tmp')
    partial.write_text(json.dumps(result))
    partial.replace(result_file)
    return result


def run_named(path, seed, iterations, work_dir, threads):
    """``run`` of one config with one seed, named in the result."""
    directory = work_dir / f'{path.stem}_seed{seed}_{iterations}iterations'
    try:
        result = run(equal_budget(read_config(path), iterations, seed), directory, threads)
    except Exception as error:  # whatever a config may raise, the other runs go on
        result = {'error': str(error)}
    return {'config': path.stem, 'seed': seed, **result}


def summarise(results, paths):
    """A row for each config: mean and spread of its runs' mAP, its size and its cost."""
    rows = []
    for path in paths:
        runs = [r for r in results if r['config'] == path.stem and 'error' not in r]
        if not runs:
            continue
        config = Config.fromfile(path)
        stats = detector_stats(config, config.image_size)
        scores = [r['map'] for r in runs]
        rows.append({
            'config': path.stem, 'seeds': sorted(r['seed'] for r in runs),
            'map': statistics.mean(scores),
            'spread': statistics.stdev(scores) if len(scores) > 1 else None,
            'params': stats['params'] / 1e6, 'gmadds': stats['madds'] / 1e9,
            'seconds': min(r['seconds'] for r in runs)})
    return rows


def short_name(row):
    """The backbone alone where the detector, neck and data are the same for all."""
    return row['config'].split('_')[1]


def markdown(rows, args, threads):
    lines = ['| backbone | box mAP | seeds | params, M | MAdds, G | s / iteration |',
             '| --- | --- | --- | --- | --- | --- |']
    for row in rows:
        spread = '' if row['spread'] is None else f' ± {row["spread"]:.3f}'
        lines.append(f'| {short_name(row)} | {row["map"]:.3f}{spread} | '
                     f'{", ".join(map(str, row["seeds"]))} | {row["params"]:.2f} | '
                     f'{row["gmadds"]:.2f} | {row["seconds"]:.2f} |')
    return '\n'.join([*lines, '', f'Whole detectors; ± is the standard deviation over seeds; '
                      f'budget: {args.iterations} iterations; {args.jobs} runs at a time of '
                      f'{threads} threads each.', ''])


def draw(rows, path):
    """mAP against MAdds, a colour for each family and a panel for each static backbone."""
    families = {'od': '#1f6fd6', 'dy': '#c2410c', 'cond': '#7c3aed', 'dcd': '#0f766e',
                'kw': '#be185d', 'se': '#b45309'}
    panels = {}
    for row in rows:
        family, _, rest = short_name(row).partition('-')
        host = re.sub(r'-k\d+$', '', rest if family in families else short_name(row))
        panels.setdefault(host, []).append((families.get(family, '0.35'), row))
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.5), squeeze=False,
                                layout='constrained')
    for axis, (host, points) in zip(axes.flat, panels.items()):
        # Labels in a column beside the points, spread so that none covers another.
        points.sort(key=lambda point: point[1]['map'])
        low, high = points[0][1]['map'], points[-1][1]['map']
        step = max(high - low, 0.02) / max(1, len(points) - 1)
        right = max(row['gmadds'] for _, row in points)
        width = max(right - min(row['gmadds'] for _, row in points), 0.05 * right)
        for i, (colour, row) in enumerate(points):
            axis.errorbar(row['gmadds'], row['map'], row['spread'], fmt='o', color=colour,
                          capsize=3)
            axis.annotate(short_name(row), (row['gmadds'], row['map']),
                          (right + 0.15 * width, low + i * step), color=colour, va='center',
                          arrowprops=dict(arrowstyle='-', color='0.8', lw=0.6))
        axis.set(title=host, xlabel='MAdds of the detector, G', ylabel='box mAP',
                 xlim=(None, right + 1.2 * width))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', metavar='CONFIG')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--iterations', type=int, default=250, help='the budget of each run')
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time; they share the cores')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/compare'))
    args = parser.parse_args()
    paths = [Path(config) if Path(config).is_file() else find_config(config)
             for config in args.configs]
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(run_named, path, seed, args.iterations, args.work_dir, threads)
                for seed in args.seeds for path in paths]
        results = [done.result() for done in track(
            concurrent.futures.as_completed(runs), description='Runs', total=len(runs),
            console=Console(stderr=True))]
    # Lines cut to a pipe's 80 columns could not be read.
    console = Console() if sys.stdout.isatty() else Console(width=150)
    failed = [result for result in results if 'error' in result]
    rows = summarise(results, paths)
    if rows:
        text = markdown(rows, args, threads)
        (args.work_dir / 'compare.md').write_text(text)
        (args.work_dir / 'compare.json').write_text(json.dumps(
            {'iterations': args.iterations, 'rows': rows, 'failed': failed}, indent=1))
        draw(rows, args.work_dir / 'compare.png')
        console.print(Markdown(text))
    for result in failed:
        console.print(f'{result["config"]}, seed {result["seed"]}, failed: {result["error"]}',
                      style='red', markup=False, soft_wrap=True)
    sys.exit(bool(failed))


if __name__ == '__main__':
    main()
