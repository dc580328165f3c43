"""Does a converted detector repay its conversion? Quickstart data, equal budgets, several seeds.

    python inflation.py WORK_DIR [--seeds 0 1 2] [--epochs 3] [--finetune 1]

For each seed: a static ResNet-18 detector is trained, then converted; both are evaluated, and both
fine-tuned for the same budget; and a dynamic one is trained from scratch for the sum of the
budgets. Runs that are done are kept, so that the command can be interrupted and given again.
WORK_DIR/inflation.md is the table, with box mAP of the last epoch, mean and range over the seeds.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[1]
QUICKSTART = TOOLS.parent / 'configs/quickstart/faster-rcnn_od-r18-k4_fpn_digits.py'
CONFIG = """_base_ = {base!r}
model = dict(backbone=dict({backbone}))
custom_hooks = {hooks}
load_from = {load_from!r}
train_cfg = dict(max_epochs={epochs}, val_interval={epochs})
optim_wrapper = dict(optimizer=dict(lr={lr}))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True,
         begin={epochs} / 2, end={epochs}, T_max={epochs} / 2, eta_min=1e-6)
]
randomness = dict(seed={seed})
"""
STATIC = ('_delete_=True, type="ResNet", depth=18, frozen_stages=-1, norm_eval=False, '
          'init_cfg=None')
CHECK, ANNEAL = "dict(type='InputCheckHook')", (
    "dict(type='TemperatureAnnealingHook', begin=30, end_epoch=1)")
ROWS = {
    'static': 'static, trained', 'converted': 'converted from it, before fine-tuning',
    'static-finetuned': 'static, fine-tuned', 'converted-finetuned': 'converted, fine-tuned',
    'scratch': 'dynamic, from scratch',
}


def run(*command):
    subprocess.run([sys.executable, *map(str, command)], check=True)


def train(work, name, seed, epochs, lr, backbone='', anneal=False, load_from=None):
    """Train as named, unless done; returns the box mAP and the checkpoint."""
    work = work / name
    config, checkpoint = work.parent / f'{name}.py', work / f'epoch_{epochs}.pth'
    if not checkpoint.is_file() or not list(work.glob('*/vis_data/scalars.json')):
        hooks = f'[{CHECK}, {ANNEAL}]' if anneal else f'[{CHECK}]'
        work.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(CONFIG.format(
            base=str(QUICKSTART), backbone=backbone, hooks=hooks, epochs=epochs, lr=lr, seed=seed,
            load_from=None if load_from is None else str(load_from)))
        run(TOOLS / 'train.py', config, '--work-dir', work)
    return last_map(work), checkpoint


def last_map(work):
    """Box mAP that the newest run under ``work`` logged last."""
    logs = sorted((*work.glob('*/vis_data/scalars.json'), *work.glob('*/*.json')))
    found = [json.loads(line).get('coco/bbox_mAP') for path in logs
             for line in path.read_text().splitlines()]
    return [value for value in found if value is not None][-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('work_dir', type=Path)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--epochs', type=int, default=3, help='of the static detector')
    parser.add_argument('--finetune', type=int, default=1, help='epochs of fine-tuning')
    args = parser.parse_args()
    results = {name: [] for name in ROWS}
    for seed in args.seeds:
        work = args.work_dir.resolve() / f'seed{seed}'
        found = {}
        found['static'], static = train(work, 'static', seed, args.epochs, 1e-3, STATIC)
        converted, config = work / 'converted.pth', work / 'converted.py'
        if not converted.is_file():
            run(TOOLS / 'model_converters/swap_backbone.py', work / 'static.py', '--checkpoint',
                static, '--out', config, '--force')
        evaluated = work / 'converted'
        if not list(evaluated.glob('*/*.json')):
            run(TOOLS / 'test.py', config, converted, '--work-dir', evaluated)
        found['converted'] = last_map(evaluated)
        for name, backbone, start in (('static-finetuned', STATIC, static),
                                      ('converted-finetuned', '', converted)):
            found[name], _ = train(work, name, seed, args.finetune, 3e-4, backbone,
                                   load_from=start)
        found['scratch'], _ = train(work, 'scratch', seed, args.epochs + args.finetune, 1e-3,
                                    anneal=True)
        for name, value in found.items():
            results[name].append(value)
    budgets = dict(zip(ROWS, (args.epochs, args.epochs, *[args.epochs + args.finetune] * 3)))
    lines = [f'| detector | epochs in all | box mAP, mean of {len(args.seeds)} seeds | range |',
             '| --- | --- | --- | --- |']
    for name, values in results.items():
        lines.append(f'| {ROWS[name]} | {budgets[name]} | {statistics.mean(values):.3f} | '
                     f'{min(values):.3f} to {max(values):.3f} |')
    (args.work_dir / 'inflation.md').write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines))


if __name__ == '__main__':
    main()
