"""Detectors set side by side: one data set and one budget for all, differences paired by seed."""
import copy
import json
import math
import statistics
from pathlib import Path
from typing import Dict, Mapping, Optional, Tuple

from mmengine.config import Config

from ..errors import InputError

# Where the annotations of a split are, and its images: the quickstart's, COCO's own, Roboflow's.
LAYOUTS = (
    ('annotations/{}.json', '{}/'),
    ('annotations/instances_{}2017.json', '{}2017/'),
    ('{}/_annotations.coco.json', '{}/'),
)
SPLITS = dict(train=('train',), val=('val', 'valid'), test=('test',))


def find_splits(root: Path) -> Dict[str, Tuple[str, str]]:
    """Annotation file and image folder of each split of a COCO-format directory, relative to it.

    Raises:
        InputError: if there is no train or no val split; test may be absent.
    """
    found = {}
    for split, names in SPLITS.items():
        for annotations, images in ((a.format(n), i.format(n)) for n in names for a, i in LAYOUTS):
            if split not in found and (root / annotations).is_file():
                found[split] = annotations, images
    for split in ('train', 'val'):
        if split not in found:
            expected = ', '.join(annotations.format(split) for annotations, _ in LAYOUTS)
            raise InputError(
                f'{root} has none of {expected}: give a directory in COCO format, or write the '
                f'digits there, python tools/dataset_converters/digits.py {root}')
    return found


def use_data(config: Config, root: Path) -> Dict[str, int]:
    """Train and evaluate on a COCO-format directory, in place; number of images of each split.

    The classes are those of the training annotations, and every head gets their number. A test
    split becomes the config's test data; without one, val is.

    Raises:
        InputError: if the directory has no train or val split.
    """
    splits, images = find_splits(root), {}
    for split, loader in (('train', 'train_dataloader'), ('val', 'val_dataloader'),
                          ('test', 'test_dataloader')):
        annotations, folder = splits.get(split, splits['val'])
        content = json.loads((root / annotations).read_text())
        if split in splits:
            images[split] = len(content['images'])
        if split == 'train':
            classes = tuple(category['name'] for category in content['categories'])
        config[loader] = copy.deepcopy(config[loader])  # val's may be the very same as test's
        dataset = config[loader]['dataset']
        while 'dataset' in dataset:
            dataset = dataset['dataset']
        dataset.update(data_root=f'{root}/', ann_file=annotations, data_prefix=dict(img=folder),
                       metainfo=dict(classes=classes))
        if split != 'train':
            config[f'{split}_evaluator'] = dict(config[f'{split}_evaluator'],
                                                ann_file=str(root / annotations))
    _set_num_classes(config.model, len(classes))
    return images


def _set_num_classes(part, num_classes: int) -> None:
    if isinstance(part, dict):
        if 'num_classes' in part:
            part['num_classes'] = num_classes
        part = list(part.values())
    if isinstance(part, (list, tuple)):
        for child in part:
            _set_num_classes(child, num_classes)


def equal_budget(config: Config, iterations: int, seed: int, images: int,
                 evaluations: int = 1) -> Config:
    """The config, trained for so many iterations from this seed.

    A linear warm-up, a constant rate and, in the second half, a cosine; where the config anneals
    its attention, it does so over the first third.

    Args:
        config: changed in place.
        iterations, seed: the budget, and the seed of weights and order.
        images: number of training images.
        evaluations: how often it is evaluated, evenly spread, the last time at the end.
    """
    # By iteration, because MMEngine resumes an epoch at its beginning and would train longer.
    config.train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations,
                            val_interval=max(1, iterations // evaluations))
    config.param_scheduler = [
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0,
             end=max(1, iterations // 10)),
        dict(type='CosineAnnealingLR', by_epoch=False, begin=iterations // 2, end=iterations,
             T_max=iterations - iterations // 2, eta_min=1e-6)
    ]
    config.randomness = dict(seed=seed)
    config.resume = False
    config.log_processor.by_epoch = False
    # Evaluations are logged at their iteration; by epoch, all of them would be at 0.
    config.default_hooks.logger.log_metric_by_epoch = False
    config.default_hooks.checkpoint.update(
        by_epoch=False, interval=max(1, iterations // 4), max_keep_ckpts=1)
    for hook in config.get('custom_hooks', []):
        if hook['type'] in ('TemperatureAnnealingHook', 'WarehouseWarmUpHook'):
            epoch = -(-images // config.train_dataloader.batch_size)
            hook['end_epoch'] = iterations / epoch / 3
    return config


def paired_difference(scores: Mapping[int, float],
                      baseline: Mapping[int, float]) -> Optional[Tuple[float, float, int]]:
    """Mean difference over the seeds that both have, and half its 95% interval (Student's t).

    Args:
        scores, baseline: seed -> score.

    Returns:
        Mean, half the interval (nan for one seed) and the number of seeds; ``None`` without one.

    Raises:
        InputError: if SciPy is not installed.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise InputError('Intervals need SciPy, not installed here: run pip install '
                         '"mmdet_odconv[quickstart]".') from error
    differences = [scores[seed] - baseline[seed] for seed in scores if seed in baseline]
    n = len(differences)
    if not n:
        return None
    half = math.nan
    if n > 1:
        half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return statistics.mean(differences), half, n
