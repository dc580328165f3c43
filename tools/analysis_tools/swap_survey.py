"""Try swap_backbone.py on every config that mmdet ships, or on some, and write a table.

    python swap_survey.py OUT_DIR [PATTERN ...] [--shard 0/4]

For each config: is its backbone one that can be made dynamic; does the dynamic detector build; are
the static one's weights (random, all alike) converted; do both detect on one small image, and how
far apart are their features. Configs with the same model are tried once. OUT_DIR/results.jsonl
is continued where it stopped; OUT_DIR/table.md sums it up, with the reason for each that fell out.
"""
import argparse
import collections
import contextlib
import copy
import fnmatch
import json
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from pathlib import Path

import torch
from mmdet.testing import demo_mm_inputs, demo_track_inputs
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.utils import get_installed_path

from mmdet_odconv import InputError
from mmdet_odconv.checkpoints import load_static
from mmdet_odconv.checkpoints.swapping import build_model, swap_backbone

SECONDS = 300  # for one config; 13204 classes of random weights take hours of NMS
STEPS = ('eligible', 'built', 'converted', 'ran forward', 'same features')
TOLERANCE = 1e-3  # largest difference of features, relative to the largest feature, in float32


def try_config(path, kernel_num, size):
    """The last of STEPS that the config reached, and why it went no further."""
    reached = None
    try:
        config = Config.fromfile(path)
        changes = swap_backbone(config, kernel_num, None)
        reached = 'eligible'
        static = build_model(config)
        dynamic = copy.deepcopy(config)
        dynamic.merge_from_dict(dict(model=changes))
        dynamic = build_model(dynamic)
        reached = 'built'
        load_static(dynamic, static.state_dict(), strict=True)
        reached = 'converted'
        tracks = hasattr(static, 'detector') and hasattr(static, 'tracker')
        data = demo_track_inputs(1, 1, image_shapes=(3, size, size)) if tracks else demo_mm_inputs(
            1, [(3, size, size)], with_semantic=True, with_mask=True)
        for model in (static, dynamic):
            model.eval()
        with torch.no_grad():
            try:
                static.test_step(copy.deepcopy(data))
            except Exception as error:
                raise InputError(f'the static one fails: {in_short(error)}') from error
            dynamic.test_step(copy.deepcopy(data))
            reached = 'ran forward'
            images = static.data_preprocessor(data, False)['inputs']
            ours, theirs = (flat(model.detector.extract_feat(images[:, 0]) if tracks else
                                 model.extract_feat(images)) for model in (dynamic, static))
            if not all(tensor.any() for tensor in theirs):
                raise InputError('the static one has features of zeros')
            difference = max(map(relative_difference, ours, theirs))
        if not difference <= TOLERANCE:
            return reached, f'features differ by {difference:.1e}'
        return 'same features', f'{difference:.1e}'
    except InputError as error:
        return reached, str(error)
    except Exception as error:  # whatever it is, it is a row of the table
        return reached, in_short(error)


def give_up(*_):
    raise TimeoutError(f'not done after {SECONDS} s')


def in_short(error):
    frame = traceback.extract_tb(error.__traceback__)[-1]
    # Not whose machine it is.
    message = re.sub(r'/\S*/(?=mm(?:det|cv))', '', ' '.join(str(error).split()))
    return f'{type(error).__name__}: {message[:150]} ({Path(frame.filename).name})'


def model_of(path):
    """Text that configs with the same model have in common."""
    try:
        config = Config.fromfile(path)
    except Exception:
        return str(path)  # tried, and reported, alone
    given = Config({name: config.get(name) for name in ('model', 'data_preprocessor')})
    return json.dumps(given.to_dict(), sort_keys=True, default=str)


def flat(features):
    if isinstance(features, torch.Tensor):
        return [features]
    return [tensor for part in features for tensor in flat(part)]


def relative_difference(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


def read_results(log):
    """What is known of each config; a line that was cut short is tried again."""
    results = []
    for line in log.read_text().splitlines() if log.is_file() else []:
        with contextlib.suppress(ValueError):
            results.append(json.loads(line))
    return results


def write_table(results, path):
    """Counts of configs that reached each step, and of each reason for which others did not."""
    lines = ['| | configs |', '| --- | --- |', f'| tried | {len(results)} |']
    for i, step in enumerate(STEPS):
        count = sum(result['reached'] in STEPS[i:] for result in results)
        lines.append(f'| {step} | {count} |')
    reasons = collections.Counter((result['reached'] or 'tried', result['why'])
                                  for result in results if result['reached'] != STEPS[-1])
    lines += ['', '| went no further than | why | configs |', '| --- | --- | --- |']
    lines += [f'| {step} | {why} | {count} |' for (step, why), count in reasons.most_common()]
    path.write_text('\n'.join(lines) + '\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out_dir', type=Path)
    parser.add_argument('patterns', nargs='*', default=['*'], help='such as retinanet/*')
    parser.add_argument('--kernel-num', type=int, default=2)
    parser.add_argument('--size', type=int, default=128, help='side of the image')
    parser.add_argument('--shard', default='0/1', help='I/N: every Nth model, from the Ith on')
    args = parser.parse_intermixed_args()
    if not re.fullmatch(r'\d+/[1-9]\d*', args.shard):
        parser.error(f'--shard must be I/N, such as 0/2, got {args.shard}')
    warnings.simplefilter('ignore')
    with contextlib.suppress(ImportError):  # some backbones are MMPretrain's
        import mmdet_odconv.pretraining  # noqa: F401
    torch.distributed.init_process_group(  # MMSyncBN is not constructed without
        'gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    signal.signal(signal.SIGALRM, give_up)
    MMLogger.get_instance('swap_survey', log_level=logging.ERROR)
    root = Path(get_installed_path('mmdet')) / '.mim' / 'configs'
    alike = collections.defaultdict(list)
    for path in sorted(root.glob('*/*.py')):
        name = path.relative_to(root).as_posix()
        if path.parent.name != '_base_' and any(fnmatch.fnmatch(name, p) for p in args.patterns):
            alike[model_of(path)].append(name)
    if not alike:
        sys.exit(f'error: no config of mmdet is named like {" or ".join(args.patterns)}: give the '
                 'folder too, such as retinanet/*.')
    args.out_dir = args.out_dir.resolve()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    os.chdir(root.parent)  # some configs name their teacher's, relative to mmdet's checkout
    index, count = map(int, args.shard.split('/'))
    log = args.out_dir / 'results.jsonl'
    finished = {result['config'] for result in read_results(log)}
    for names in list(alike.values())[index::count]:
        if names[0] in finished:
            continue
        signal.alarm(SECONDS)
        reached, why = try_config(root / names[0], args.kernel_num, args.size)
        signal.alarm(0)
        print(f'{names[0]} (and {len(names) - 1} alike): {reached}; {why}', flush=True)
        with open(log, 'a') as file:
            for name in names:
                file.write(json.dumps(dict(config=name, reached=reached, why=why)) + '\n')
    write_table(read_results(log), args.out_dir / 'table.md')


if __name__ == '__main__':
    main()
