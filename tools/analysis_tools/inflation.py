"""Does a converted detector repay its conversion? Quickstart data, equal budgets, several seeds.

    python inflation.py --seeds 0 1 2 --iterations 500 --finetune 125 --jobs 2

For each seed: a static ResNet-18 detector is trained and converted, both are evaluated, and both
fine-tuned with the same budget; and a dynamic one is trained from scratch with the sum of the
budgets. What is done is kept, so that the same command goes on after a break. WORK_DIR receives
inflation.md and inflation.json: box mAP, mean and standard deviation over the seeds.
"""
import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from compare import read_config, run
from rich.console import Console
from rich.markdown import Markdown

from mmdet_odconv import InputError
from mmdet_odconv.engine.comparison import equal_budget
from mmdet_odconv.engine.data_sets import use_data
from mmdet_odconv.engine.launch import errors_explained, find_config

TOOLS = Path(__file__).parents[1]
STATIC, DYNAMIC = (f'faster-rcnn_{name}_fpn_digits.py' for name in ('r18', 'od-r18-k4'))


def train(config, iterations, seed, directory, threads, start=None):
    """Box mAP after this budget, from the detector ``start`` where one is given."""
    images = use_data(config, Path(config.data_root))
    equal_budget(config, iterations, seed, images['train'])
    if start is not None:
        config.load_from = str(start)
        config.optim_wrapper.optimizer.lr *= 0.3  # fine-tuning
    result = run(config, directory, threads)
    if 'error' in result:
        raise InputError(f'{directory.name} failed: {result["error"]}')
    return result['map']


def convert(static, checkpoint, dynamic, seed):
    """Write the config ``dynamic`` and its checkpoint, unless done; its box mAP as converted."""
    if not dynamic.with_suffix('.pth').is_file():
        tool('model_converters/swap_backbone.py', static, '--checkpoint', checkpoint,
             '--out', dynamic, '--seed', seed, '--force')
    evaluated = dynamic.parent / 'converted'
    if not list(evaluated.glob('*/*.json')):
        tool('test.py', dynamic, dynamic.with_suffix('.pth'), '--work-dir', evaluated)
    return json.loads(max(evaluated.glob('*/*.json')).read_text())['coco/bbox_mAP']


def tool(name, *args):
    result = subprocess.run([sys.executable, str(TOOLS / name), *map(str, args)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode:
        raise InputError(f'{name} failed: {result.stdout.strip().splitlines()[-1]}')


def pretrained(seed, args, threads):
    """The static detector, its conversion, and both fine-tuned."""
    work = args.work_dir.resolve() / f'seed{seed}'
    static, dynamic = work / 'static', work / 'converted.py'
    checkpoint = static / f'iter_{args.iterations}.pth'
    found = {'static, trained': train(
        read_config(find_config(STATIC)), args.iterations, seed, static, threads)}
    found['converted from it'] = convert(static / 'config.py', checkpoint, dynamic, seed)
    for name, path, start in (('static', static / 'config.py', checkpoint),
                              ('converted', dynamic, dynamic.with_suffix('.pth'))):
        found[f'{name}, fine-tuned'] = train(
            read_config(path), args.finetune, seed, work / f'{name}-finetuned', threads, start)
    return found


def from_scratch(seed, args, threads):
    """The dynamic detector, trained with the sum of the budgets."""
    directory = args.work_dir.resolve() / f'seed{seed}' / 'scratch'
    return {'dynamic, from scratch': train(
        read_config(find_config(DYNAMIC)), args.iterations + args.finetune, seed, directory,
        threads)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--iterations', type=int, default=500, help='of the static detector')
    parser.add_argument('--finetune', type=int, default=125, help='iterations of fine-tuning')
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time; they share the cores')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/inflation'))
    args = parser.parse_args()
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    with errors_explained(), concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(part, seed, args, threads)
                for seed in args.seeds for part in (from_scratch, pretrained)]
        found = [done.result() for done in runs]
    total = args.iterations + args.finetune
    budgets = {'static, trained': args.iterations, 'converted from it': args.iterations}
    rows = {name: [result[name] for result in found if name in result]
            for name in (*found[1], *found[0])}
    lines = ['| detector | iterations in all | box mAP |', '| --- | --- | --- |']
    for name, scores in rows.items():
        spread = f' ± {statistics.stdev(scores):.3f}' if len(scores) > 1 else ''
        lines.append(f'| {name} | {budgets.get(name, total)} | '
                     f'{statistics.mean(scores):.3f}{spread} |')
    text = '\n'.join([*lines, ''])
    (args.work_dir / 'inflation.md').write_text(text)
    (args.work_dir / 'inflation.json').write_text(json.dumps(rows, indent=1))
    Console().print(Markdown(text))


if __name__ == '__main__':
    main()
