"""Kills training runs at random moments, resumes them, and compares bits with runs left alone.

``make soak MINUTES=10``. A third of the kills fall anywhere, a third while a checkpoint is being
written, and a third when it has its name but is not yet named by last_checkpoint. Runs are by epoch
without and with data workers, and by iteration. Exits with 1 if anything was lost or differs.
"""
import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Callable, Optional

os.environ.setdefault('OMP_NUM_THREADS', '1')

import digits
import torch
from rich.console import Console

from mmdet_odconv.engine.launch import find_config, run_mmdet_tool
from mmdet_odconv.engine.resuming import newest_whole, step
from mmdet_odconv.errors import InputError

CONFIG = '''
_base_ = '{base}'
train_pipeline = _base_.train_pipeline
train_pipeline.insert(2, dict(type='RandomFlip', prob=0.5))
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_evaluator = dict(type='CocoMetric')
'''
BY_EPOCH = 'train_cfg = dict(max_epochs=4)\n'
BY_ITERATION = '''
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=16, val_interval=8)
train_dataloader['sampler'] = dict(type='InfiniteSampler')
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=3))
'''
KINDS = {  # names of checkpoints, and what is added to the config
    'epochs': ('epoch_{}.pth', BY_EPOCH),
    'workers': ('epoch_{}.pth',
                BY_EPOCH + 'train_dataloader.update(num_workers=2, persistent_workers=True)\n'),
    'iterations': ('iter_{}.pth', BY_ITERATION),
}


def start(root: Path, work_dir: Path, kind: str) -> int:
    """Begin or resume a run in a fork, which spares it the imports; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        log = os.open(f'{work_dir}.log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(root)
        options = [option for option in digits.TINY if 'max_epochs' not in option]
        sys.argv = ['train.py', f'{kind}.py', '--work-dir', str(work_dir), '--resume',
                    '--cfg-options', *options, 'train_dataloader.batch_size=2']
        run_mmdet_tool('train.py')
        status = 0
    except SystemExit as error:
        print(error)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(status)


def wait(pid: int, is_time: Callable[[], bool]) -> Optional[int]:
    """Kill the run when it is time; its exit status if it ended before, else ``None``."""
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if is_time():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.0005)


def moments(work_dir: Path, duration: float, template: str):
    """When to kill next: each is a name and a function that says whether it is time."""
    files = template.format('*')
    while True:
        end = time.monotonic() + random.uniform(0, duration)
        yield 'anywhere', lambda end=end: time.monotonic() > end
        delay = random.uniform(0, 0.01)

        def writing(begun=[], delay=delay) -> bool:  # noqa: B006
            if not begun and next(work_dir.glob(f'.{files}'), None):
                begun.append(time.monotonic())
            return bool(begun) and time.monotonic() > begun[0] + delay

        yield 'writing', writing
        before = set(work_dir.glob(files))
        yield 'naming', lambda before=before: not before >= set(work_dir.glob(files))


def newest(work_dir: Path, template: str) -> int:
    """Step of the newest whole checkpoint; 0 if there is none yet, -1 if all are damaged."""
    try:
        path, _ = newest_whole(work_dir, work_dir, template)
    except InputError:
        return -1
    return 0 if path is None else step(path, template)


def trained(work_dir: Path, template: str) -> list:
    """All tensors of the last checkpoint's weights and optimizer."""
    path, _ = newest_whole(work_dir, work_dir, template)
    checkpoint = torch.load(path, weights_only=False)
    return [*checkpoint['state_dict'].values(),
            *(value for state in checkpoint['optimizer']['state'].values()
              for value in state.values())]


def soak(root: Path, minutes: float) -> int:
    console = Console()
    digits.tool(root, 'dataset_converters/digits.py', 'data/digits', '--train', '8', '--val', '2',
                '--size', '96')
    alone, durations = {}, {}
    for kind, (template, added) in KINDS.items():
        (root / f'{kind}.py').write_text(CONFIG.format(base=find_config(digits.CONFIG)) + added)
        begun, work_dir = time.monotonic(), root / f'alone-{kind}'
        if wait(start(root, work_dir, kind), lambda: False) != 0:
            console.print(Path(f'{work_dir}.log').read_text()[-3000:])
            return 1
        durations[kind] = time.monotonic() - begun
        alone[kind] = trained(work_dir, template)
    end = time.monotonic() + 60 * minutes
    kills = dict(anywhere=0, writing=0, naming=0)
    runs = lost = mismatched = 0
    while time.monotonic() < end:
        kind = random.choice(list(KINDS))
        template, _ = KINDS[kind]
        work_dir = root / f'{runs}-{kind}'
        work_dir.mkdir()
        saved, status = 0, None
        moment = moments(work_dir, durations[kind], template)
        for left in reversed(range(random.randint(2, 8))):  # and then it may end
            name, is_time = next(moment) if left else ('end', lambda: False)
            status = wait(start(root, work_dir, kind), is_time)
            if status is not None:
                break
            kills[name] += 1
            step_now = newest(work_dir, template)
            if step_now < saved:
                console.print(f'{work_dir}: {saved} was saved, {step_now} is left', style='red')
                lost += 1
            saved = step_now
        if status:
            console.print(Path(f'{work_dir}.log').read_text()[-2000:], style='red')
            lost += 1
        elif not all(torch.equal(one, other) for one, other in
                     zip(alone[kind], trained(work_dir, template))):
            console.print(f'{work_dir} differs from {kind} left alone', style='red')
            mismatched += 1
        runs += 1
    console.print(f'{sum(kills.values())} kills ({kills["anywhere"]} anywhere, {kills["writing"]} '
                  f'while writing, {kills["naming"]} while naming a checkpoint) of {runs} runs: '
                  f'{lost} lost, {mismatched} not bit-equal to the run left alone.')
    return int(bool(lost or mismatched))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--minutes', type=float, default=10)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as directory:
        sys.exit(soak(Path(directory), args.minutes))
