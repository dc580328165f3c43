"""Trains detectors under one budget, with several seeds each, and sets their results side by side.

    python compare.py CONFIG... --seeds 0 1 2 --iterations 250 --jobs 2
    python compare.py --redraw docs/results/NAME

Each config is a path or the bare name of one of the plugin's, with options of its own after
commas: ``faster-rcnn_od-r18-k1_fpn_digits.py,model.backbone.init=he``. ``{seed}`` in an option is
the run's: ``load_from=static_{seed}.pth`` fine-tunes each seed's own detector. Data, iterations and
schedule are equal, whatever a config says of them: a linear warm-up, a constant rate and, in the
second half, a cosine. Where a config anneals its attention, it does so over the first third.

The first config is what the others are compared with: differences are paired by seed, with 95%
intervals (Student's t), at equal iterations and, with --equal-time, also at equal training time:
the dearer ones are trained once more, for as many iterations as the first one's time allows.

Data are the config's, or any directory in COCO format (--data): annotations/{train,val,test}.json
beside train/, val/ and test/, COCO's own names, or Roboflow's. val gives the curves and is what to
choose by; the table reports on test, where there is one.

A run that is finished is not run again and an interrupted one is resumed, so the same command
goes on after a break, and with more configs or seeds it runs only what is new. A failed run is
reported and does not stop the others. WORK_DIR receives compare.md, compare.json, compare.png and
curves.png, and RECORDS one small file for each run, from which --redraw makes the same again.
"""
import argparse
import ast
import collections
import concurrent.futures
import copy
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
from pathlib import Path

import matplotlib
import torch
from get_model_stats import detector_stats
from mmengine.config import Config
from report import read_scalars
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)

from mmdet_odconv import InputError, config_path  # noqa: E402
from mmdet_odconv.checkpoints.files import writing  # noqa: E402
from mmdet_odconv.engine.comparison import (  # noqa: E402
    TIMED_BY,
    UNKNOWN,
    affordable,
    check_one_comparison,
    equal_budget,
    finished,
    paired_difference,
    summarise,
)
from mmdet_odconv.engine.data_sets import use_data  # noqa: E402
from mmdet_odconv.engine.launch import errors_explained  # noqa: E402
from mmdet_odconv.ops.machine import cpu_model  # noqa: E402

TOOLS = Path(__file__).parents[1]
FAMILIES = ('od', 'dy', 'cond', 'dcd', 'fd', 'kw', 'se')
LOADED = 'loaded'  # how names end of what did not start from scratch
READING = threading.Lock()


def read_config(path):
    """A config read by one thread at a time: pkg_resources, which MMEngine asks, needs that."""
    with READING:
        return Config.fromfile(path)


def parse(value):
    """An option's value: a number, true, false, None, or else the text itself."""
    if value.lower() in ('true', 'false'):  # as --cfg-options have it
        return value.lower() == 'true'
    try:
        return ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return value


class Entry:
    """A config of the command line, with the options given after it."""

    def __init__(self, place, text):
        self.place = place  # the first is what the others are compared with
        name, *options = text.split(',')
        for option in options:
            if '=' not in option:
                raise InputError(f'{text} has an option {option}, but KEY=VALUE is expected after '
                                 'each comma: what holds a comma goes into a config file of its '
                                 'own.')
        self.path = Path(config_path(name))
        self.options = {key: parse(value) for key, _, value in (o.partition('=') for o in options)}
        self.name = ','.join([self.path.stem, *(
            f'{key.rpartition(".")[2]}={str(value).rpartition("/")[2]}'
            for key, value in self.options.items())])

    def read(self, batch_size=None, seed=0):
        config = read_config(self.path)
        config.merge_from_dict({
            key: value.replace('{seed}', str(seed)) if isinstance(value, str) else value
            for key, value in self.options.items()})
        if batch_size:
            config.train_dataloader.batch_size = batch_size
        return config


def tool(name, *args, log, threads):
    """Run a script of tools/, its output appended to ``log``."""
    with log.open('a') as file:
        subprocess.run([sys.executable, str(TOOLS / name), *map(str, args)], check=True,
                       stdout=file, stderr=subprocess.STDOUT,
                       env={**os.environ, 'OMP_NUM_THREADS': str(threads)})


def changed(config, path):
    """The settings in which a config differs from the one at ``path``, of an earlier run."""
    earlier, config = read_config(path).to_dict(), config.to_dict()
    ours = {'launcher', 'resume', 'work_dir'}  # of train.py's own copy, all that older runs have
    if earlier.get('resume'):
        ours.add('load_from')  # which --resume empties
    return sorted(key for key in {*earlier, *config} - ours
                  if earlier.get(key) != config.get(key))


def run(config, directory, images, threads=1):
    """Train and evaluate unless done: box mAP, curves, seconds, or what went wrong.

    Args:
        images: how many there are of each split; without a test split, val stands in.

    Raises:
        InputError: if the directory holds what another config, of an equal name, has trained, or
            a result on other images.
    """
    result_file = directory / 'result.json'
    last_checkpoint = directory / 'last_checkpoint'
    given = directory / 'given' / 'config.py'  # apart from the copy that train.py leaves
    machine_file = given.with_name('machine.json')
    if result_file.is_file() or last_checkpoint.is_file():
        earlier = [path for path in (given, directory / 'config.py') if path.is_file()]
        differing = changed(config, earlier[0]) if earlier else []
        if differing:
            raise InputError(
                f'{directory} holds a run of another config, which differs in '
                f'{", ".join(differing)}: give another --work-dir (and --records), or the config '
                'as it was.')
    if result_file.is_file():
        result = json.loads(result_file.read_text())
        if result.setdefault('images', images) != images:
            raise InputError(f'{directory} holds the result of {counted(result["images"])} images, '
                             f'where there are {counted(images)} now: give another --work-dir '
                             '(and --records), or the data as they were.')
        return {**dict.fromkeys(TIMED_BY, UNKNOWN), **result}
    given.parent.mkdir(parents=True, exist_ok=True)
    log = directory / 'log.txt'
    machine = {'cpu': cpu_model(), 'threads': threads, 'torch': torch.__version__}
    if not machine_file.is_file():
        replace_text(machine_file, json.dumps(machine))
    elif json.loads(machine_file.read_text()) != machine:  # begun there, and resumed here
        machine = dict.fromkeys(TIMED_BY, UNKNOWN)
    try:
        replace_text(given, config.pretty_text)
        tool('train.py', given, '--work-dir', directory, '--resume', log=log, threads=threads)
        train, val = read_scalars(directory)
        checkpoint = last_checkpoint.read_text().strip()
        if config.train_cfg.max_iters not in val:  # interrupted between training and evaluation
            on_val = copy.deepcopy(config)
            on_val.test_dataloader, on_val.test_evaluator = (
                config.val_dataloader, config.val_evaluator)
            on_val.dump(given.with_name('on_val.py'))
            val[config.train_cfg.max_iters] = evaluate(
                given.with_name('on_val.py'), checkpoint, directory / 'val', log, threads)
        # Time of the quietest logged window, 50 iterations: other work counts least.
        result = {**machine, 'images': images, 'map': box_map(val[max(val)]),
                  'seconds': min(record['time'] for record in train.values()),
                  'curve': [(i, box_map(val[i])) for i in sorted(val)],
                  'loss': [(i, round(train[i]['loss'], 4)) for i in sorted(train)]}
        if 'test' in images:
            result['map'] = box_map(evaluate(given, checkpoint, directory / 'test', log, threads))
    except (OSError, subprocess.CalledProcessError) as error:
        last = [line for line in log.read_text().splitlines() if line] if log.is_file() else []
        return {'error': last[-1] if last else str(error)}
    replace_text(result_file, json.dumps(result))
    return result


def replace_text(path, text):
    """Write a file whole, or not at all."""
    with writing(path, True) as temporary:
        temporary.write_text(text, encoding='utf-8')


def box_map(metrics):
    """Of an evaluation; where nothing was detected, MMDetection gives no metrics."""
    return metrics.get('coco/bbox_mAP', 0.0)


def counted(images):
    return ', '.join(f'{number} {split}' for split, number in images.items())


def evaluate(config, checkpoint, directory, log, threads):
    """The metrics of a checkpoint on the test set of a config's file."""
    tool('test.py', config, checkpoint, '--work-dir', directory, log=log, threads=threads)
    return json.loads(max(directory.glob('*/*.json')).read_text())


def run_entry(entry, seed, iterations, stats, args, budget='iterations'):
    """The record of one config with one seed."""
    batch = f'_batch{args.batch_size}' if args.batch_size else ''
    data = f'_{args.data.resolve().name}' if args.data else ''
    name = f'{entry.name}{data}{batch}_seed{seed}_{iterations}iterations'
    record = {'config': entry.name, 'place': entry.place, 'options': entry.options, 'seed': seed,
              'budget': budget, 'iterations': iterations}
    try:
        config = entry.read(args.batch_size, seed)
        root = args.data or Path(config.data_root)
        images = use_data(config, root)
        equal_budget(config, iterations, seed, args.evaluations)
        result = run(config, args.work_dir / name, images, args.threads)
    except Exception as error:  # whatever a config may raise, the other runs go on
        result = {'error': str(error)}
    if 'error' not in result:
        record.update(stats[entry.name], batch_size=config.train_dataloader.batch_size,
                      data=root.resolve().name,
                      split='test' if 'test' in images else 'val')
        records = args.records or args.work_dir / 'records'
        records.mkdir(parents=True, exist_ok=True)
        replace_text(records / f'{name}.json', json.dumps({**record, **result}) + '\n')
    return {**record, **result}


def size_of(config, data):
    """Parameters and multiply-adds of the whole detector, for the classes of its data."""
    use_data(config, data or Path(config.data_root))
    stats = detector_stats(config, config.get('image_size', (800, 1333)), activations=False)
    return {'params': round(stats['params'] / 1e6, 3), 'gmadds': round(stats['madds'] / 1e9, 4)}


def short_names(configs):
    """By config, the backbone alone where that tells all apart, or else its file's whole name."""
    configs = list(configs)
    files = {config.partition(',')[0] for config in configs}
    is_short = len({_name(file, True) for file in files}) == len(files)
    return {config: _name(config, is_short) for config in configs}


def _name(config, is_short):
    stem, *options = config.split(',')
    parts = stem.split('_')
    # A file's name says nothing in a table: that weights were loaded does.
    loaded = [LOADED] if any(option.startswith('load_from=') for option in options) else []
    return ', '.join([parts[1] if is_short and len(parts) > 1 else stem, *(
        option for option in options if not option.startswith('load_from=')), *loaded])


def signed(difference, seeds):
    """Mean and 95% interval, '+0.012 ± 0.034', and of how many seeds if not of all."""
    if difference is None:
        return ''
    mean, half, count = difference
    return (f'{mean:+.3f}' + ('' if math.isnan(half) else f' ± {half:.3f}')
            + ('' if count == len(seeds) else f' of {count} seed{"s" * (count > 1)}'))


def markdown(rows, records):
    timed = any(record['budget'] == 'time' for record in records)
    machines = dict.fromkeys(f'{record["cpu"]}, {record["threads"]} threads a run, torch '
                             f'{record["torch"]}' for record in records)
    is_one = len(machines) == 1  # seconds of two are not to be compared
    titles = ['backbone', 'box mAP', 'seeds', 'to the first',
              *(['at equal time'] if timed else []), 'params, M', 'MAdds, G',
              *(['s / iteration'] if is_one else [])]
    lines = [f'| {" | ".join(titles)} |', '|' + ' --- |' * len(titles)]
    names = short_names(row['config'] for row in rows)
    for row in rows:
        spread = '' if row['spread'] is None else f' ± {row["spread"]:.3f}'
        equal_time = signed(row['at_equal_time'], row['seeds'])
        if equal_time:
            equal_time += f' ({row["iterations_at_equal_time"]} iterations)'
        lines.append(' | '.join([
            f'| {names[row["config"]]}', f'{row["map"]:.3f}{spread}',
            ', '.join(map(str, row['seeds'])),
            signed(row['difference'], row['seeds']), *([equal_time] if timed else []),
            *('' if row[size] is None else f'{row[size]:.2f}' for size in ('params', 'gmadds')),
            *([f'{row["seconds"]:.2f}'] if is_one else [])]) + ' |')
    done = next(r for r in records if 'error' not in r and r['budget'] == 'iterations')
    return '\n'.join([
        *lines, '', f'{done["iterations"]} iterations of {done["batch_size"]} images of '
        f'{done["data"]} ({counted(done["images"])} images); box mAP on {done["split"]}, ± its '
        'standard deviation over seeds; differences are paired by seed, ± half their 95% interval '
        f'(t). {"; ".join(machines)}.', ''])


def draw(rows, path):
    """Box mAP of each, sorted, ± its spread over seeds; a panel for each static backbone.

    The static one's own mAP and spread are a line and a band; parameters and MAdds are beside the
    names.
    """
    panels = {}
    names = short_names(row['config'] for row in rows)
    for row in rows:
        backbone = _name(row['config'], True).partition(',')[0]
        family, _, rest = backbone.partition('-')
        host = re.sub(r'-k\d+$', '', rest if family in FAMILIES else backbone)
        panels.setdefault(host, []).append(row)
    tallest = max(map(len, panels.values()))
    widest = max(map(len, names.values()))
    figure, axes = plt.subplots(
        1, len(panels), figsize=((5 + 0.09 * widest) * len(panels), 1.2 + 0.38 * tallest),
        squeeze=False, layout='constrained')
    for axis, (host, found) in zip(axes.flat, panels.items()):
        found.sort(key=lambda row: row['map'])
        for place, row in enumerate(found):
            name = names[row['config']]
            is_static = row['place'] == 0 or name.removesuffix(f', {LOADED}') == host
            colour = '0.3' if is_static else '#0072b2'
            axis.errorbar(row['map'], place, xerr=row['spread'], fmt='D' if is_static else 'o',
                          color=colour, capsize=3)
            if is_static:
                axis.axvline(row['map'], color='0.6', lw=0.8, zorder=0)
                if row['spread']:
                    axis.axvspan(row['map'] - row['spread'], row['map'] + row['spread'],
                                 color='0.92', zorder=-1)
        axis.set_yticks(range(len(found)), [names[row['config']] + (
            '' if row['params'] is None else f'  ({row["params"]:.1f}M, {row["gmadds"]:.2f}G)')
            for row in found])
        axis.set(xlabel='box mAP\n(in brackets: parameters, multiply-adds)', title=host,
                 ylim=(-0.6, len(found) - 0.4))
        axis.margins(x=0.1)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_curves(records, path):
    """Box mAP on val, and training loss, over iterations; bands are ± a standard deviation.

    Of each config those runs are drawn that were evaluated most often: a mean over other seeds at
    another iteration would bend the curve.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout='constrained')
    names = short_names(dict.fromkeys(record['config'] for record in records))
    styles = [dict(color=colour, ls=style) for style in ('-', '--', ':') for colour in (
        '#0072b2', '#e69f00', '#009e73', '#d55e00', '#cc79a7', '#56b4e9', '0')]  # Okabe and Ito's
    for config, style in zip(names, itertools.cycle(styles)):
        runs = [record for record in records
                if record['config'] == config and record['budget'] == 'iterations']
        for axis, kind in zip(axes, ('curve', 'loss')):
            curves = [record.get(kind, []) for record in runs]
            points = collections.defaultdict(list)
            for curve in curves:
                if len(curve) == max(map(len, curves)):
                    for iteration, value in curve:
                        points[iteration].append(value)
            x = sorted(points)
            mean = [statistics.mean(points[i]) for i in x]
            spread = [statistics.stdev(points[i]) if len(points[i]) > 1 else 0 for i in x]
            line, = axis.plot(x, mean, marker='o' if kind == 'curve' else '', ms=3, **style,
                              label=names[config] if kind == 'curve' else None)
            axis.fill_between(x, [m - s for m, s in zip(mean, spread)],
                              [m + s for m, s in zip(mean, spread)], color=line.get_color(),
                              alpha=0.15, lw=0)
    axes[0].set(xlabel='iteration', ylabel='box mAP on val', ylim=(0, None))
    axes[1].set(xlabel='iteration', ylabel='training loss')
    widest = max(map(len, names.values()))
    figure.legend(loc='outside upper center', ncols=max(1, min(4, 110 // (widest + 8))),
                  frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def report(records, directory, console):
    """Write the table and the pictures of these runs and print the table; whether all were done."""
    rows = summarise(records)
    failed = [record for record in records if 'error' in record]
    if rows:
        done = [record for record in records if 'error' not in record]
        text = markdown(rows, done)
        (directory / 'compare.md').write_text(text, encoding='utf-8')
        draw(rows, directory / 'compare.png')
        draw_curves(done, directory / 'curves.png')
        console.print(Markdown(text))
    for record in failed:
        console.print(f'{record["config"]}, seed {record["seed"]}, failed: {record["error"]}',
                      style='red', markup=False, soft_wrap=True)
    return rows, failed


def train_all(args):
    """Records of every config with every seed, in the order in which they were given."""
    entries = [Entry(*numbered) for numbered in enumerate(args.configs)]
    baseline, *others = entries
    for name, count in collections.Counter(entry.name for entry in entries).items():
        if count > 1:
            raise InputError(f'{count} configs are called {name}, after a file and the ends of its '
                             'options: give files of other names.')
    stats, trained_on = {}, {}
    for entry in entries:
        try:
            config = entry.read(args.batch_size)
            trained_on[entry.name] = (f'{config.train_dataloader.batch_size} images of '
                                      f'{Path(args.data or config.data_root)}')
            stats[entry.name] = size_of(config, args.data)
        except Exception:  # the run itself says what is wrong
            stats[entry.name] = {}
    if len(set(trained_on.values())) > 1:
        raise InputError('One comparison is on the same data, in batches of one size, but '
                         + ', '.join(f'{name} trains on {what}' for name, what in
                                     trained_on.items()) + ': give --data or --batch-size.')
    console = Console(stderr=True)
    pool = concurrent.futures.ThreadPoolExecutor(args.jobs)

    def results(runs, description):
        for _ in track(concurrent.futures.as_completed(runs), description=description,
                       total=len(runs), console=console):
            pass
        return [done.result() for done in runs]

    try:
        records = results([
            pool.submit(run_entry, entry, seed, args.iterations, stats, args)
            for seed in args.seeds for entry in entries], 'Runs')
        if args.equal_time:
            done = finished(records)
            first = done[baseline.name]['iterations']
            shorter = [(entry, affordable(done[entry.name]['iterations'], first))
                       for entry in others]
            for entry, iterations in shorter:
                if iterations is None and first and done[entry.name]['iterations']:
                    print(f'{entry.name}: equal time is not known, since no seed of it was run as '
                          f'{baseline.name} was, by as many threads of the same CPU: run both '
                          'anew, in another work directory.', file=sys.stderr)
            records += results([
                pool.submit(run_entry, entry, seed, iterations, stats, args, 'time')
                for seed in args.seeds for entry, iterations in shorter
                if iterations and iterations < args.iterations], 'At equal time')
    finally:  # interrupted, it would still begin whatever is queued
        pool.shutdown(cancel_futures=True)
    return records


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='*', metavar='CONFIG[,KEY=VALUE...]')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--iterations', type=int, default=250, help='the budget of each run')
    parser.add_argument('--equal-time', action='store_true',
                        help='compare at equal training time, too')
    parser.add_argument('--batch-size', type=int, help="images an iteration, if not the config's")
    parser.add_argument('--data', type=Path, help='a directory in COCO format')
    parser.add_argument('--evaluations', type=int, default=5, help='points of a curve')
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time; they share the cores')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/compare'))
    parser.add_argument('--records', type=Path, help='WORK_DIR/records if absent')
    parser.add_argument('--redraw', type=Path, nargs='+', metavar='RECORDS',
                        help='train nothing: write the tables and pictures of these runs again')
    args = parser.parse_args()
    if bool(args.configs) == bool(args.redraw):
        parser.error('give configs to train, or --redraw with the records of runs')
    for option in ('iterations', 'evaluations', 'jobs', 'batch_size'):
        value = getattr(args, option)
        if value is not None and value < 1:
            parser.error(f'--{option.replace("_", "-")} must be at least 1, got {value}')
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f'--seeds names a seed twice: {" ".join(map(str, args.seeds))}')
    # Lines cut to a pipe's 80 columns could not be read.
    console = Console() if sys.stdout.isatty() else Console(width=150)
    with errors_explained():
        if args.redraw:
            for directory in args.redraw:
                try:
                    records = [json.loads(path.read_text()) for path in directory.glob('*.json')]
                except ValueError as error:
                    raise InputError(f'{directory} holds JSON that cannot be read ({error}): '
                                     'remove it, or run that again.') from error
                if not records or not all('config' in record for record in records):
                    raise InputError(f'{directory} holds no records of runs, or other JSON beside '
                                     'them: give a folder such as WORK_DIR/records.')
                check_one_comparison(records, directory)
                records.sort(key=lambda record: (record['place'], record['seed']))
                report(records, directory, console)
            return
        cores = len(os.sched_getaffinity(0)) // args.jobs
        threads = os.environ.get('OMP_NUM_THREADS', '')
        args.threads = int(threads) if threads.isdecimal() and int(threads) else max(1, cores)
        paired_difference({}, {})  # hours before it is needed: is what it needs installed?
        try:
            records = train_all(args)
        except KeyboardInterrupt:
            print('interrupted: run the same command again to go on with what is not finished.',
                  file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        args.work_dir.mkdir(parents=True, exist_ok=True)
        check_one_comparison([record for record in records if 'error' not in record],
                             args.records or args.work_dir / 'records')
        rows, failed = report(records, args.work_dir, console)
        (args.work_dir / 'compare.json').write_text(json.dumps(
            json.loads(json.dumps({'iterations': args.iterations, 'rows': rows, 'failed': failed}),
                       parse_constant=lambda _: None), indent=1))  # JSON has no NaN
    sys.exit(bool(failed))


if __name__ == '__main__':
    main()
