"""Detectors set side by side: one data set and one budget for all, differences paired by seed.

The *record* of a run is a dict: its ``config``, the config's ``place`` among those compared (0 is
what others are compared with), ``seed``, ``iterations`` and ``budget`` ('iterations', or 'time' if
it was trained once more for as long as the first one's time allows); ``batch_size``, ``data``,
``images`` (split -> number) and the ``split`` of its box ``map``; ``seconds`` an iteration, and
what they were taken on (``TIMED_BY``); ``params`` and ``gmadds`` where they were counted. Of a
failed run there is an ``error``.
"""
import collections
import math
import statistics
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from mmengine.config import Config

from ..errors import InputError

TIMED_BY = ('cpu', 'threads', 'torch')  # whose seconds are comparable
UNKNOWN = 'unknown'  # of older records, and of a run that was resumed on another machine


def equal_budget(config: Config, iterations: int, seed: int, evaluations: int = 1) -> Config:
    """The config, trained for so many iterations from this seed.

    A linear warm-up, a constant rate and, in the second half, a cosine; where the config anneals
    its attention, it does so over the first third.

    Args:
        config: changed in place.
        iterations, seed: the budget, and the seed of weights and order.
        evaluations: how often it is evaluated, evenly spread, the last time at the end.
    """
    # By iteration, because MMEngine resumes an epoch at its beginning and would train longer.
    config.train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations,
                            val_interval=math.ceil(iterations / evaluations))
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
    # What is not logged once leaves neither a loss nor a time to report.
    config.default_hooks.logger.interval = min(
        config.default_hooks.logger.get('interval', 10), iterations)  # 10 is MMEngine's
    config.default_hooks.checkpoint.update(
        by_epoch=False, interval=max(1, iterations // 4), max_keep_ckpts=1)
    for hook in config.get('custom_hooks', []):
        if hook['type'] in ('TemperatureAnnealingHook', 'WarehouseWarmUpHook'):
            hook['end_iter'] = iterations / 3
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


def finished(records: Sequence[Mapping]) -> Dict[str, Dict[str, Dict[int, Mapping]]]:
    """Runs that ended well: config -> budget -> seed -> record, in the order of the records."""
    groups: Dict[str, Any] = collections.defaultdict(lambda: collections.defaultdict(dict))
    for record in records:
        if 'error' not in record:
            groups[record['config']][record['budget']][record['seed']] = record
    return groups


def affordable(runs: Mapping[int, Mapping], baseline: Mapping[int, Mapping]) -> Optional[int]:
    """Iterations for which the first config's time suffices, in whole twentieths of the budget.

    Both are seed -> record, at equal iterations. A hundredth more is taken for the same: so much
    do seconds differ by themselves. The least seed's count, so that greater ones, added later,
    change no budget that others were trained for; None without a seed of both that was run alike,
    by as many threads of the same CPU.
    """
    for seed in sorted(runs.keys() & baseline.keys()):
        ours, first = runs[seed], baseline[seed]
        if all(ours.get(key, UNKNOWN) == first.get(key) != UNKNOWN for key in TIMED_BY):
            share = min(1, 1.01 * first['seconds'] / ours['seconds'])
            return max(1, int(20 * share) * ours['iterations'] // 20)
    return None


def summarise(records: Sequence[Mapping]) -> List[dict]:
    """A row for each config, in the order of the records; differences are to the first."""
    groups = finished(records)
    first = {record['seed']: record for record in records
             if record['place'] == 0 and 'error' not in record}
    baseline = {seed: record['map'] for seed, record in first.items()}
    rows = []
    for name, budgets in groups.items():
        runs = budgets['iterations']
        if not runs:
            continue
        scores = {seed: record['map'] for seed, record in runs.items()}
        any_run = next(iter(runs.values()))
        others = any_run['place'] > 0
        timed = budgets['time']
        # What costs no more than the first has no second training; if it failed, or was not asked
        # for, nothing is known of equal time.
        if affordable(runs, first) == any_run['iterations']:
            timed = timed or runs
        rows.append({
            'config': name, 'place': any_run['place'], 'seeds': sorted(runs),
            'map': statistics.mean(scores.values()),
            'spread': statistics.stdev(scores.values()) if len(scores) > 1 else None,
            'difference': paired_difference(scores, baseline) if others else None,
            'at_equal_time': paired_difference(
                {seed: record['map'] for seed, record in timed.items()}, baseline
            ) if others else None,
            'iterations_at_equal_time': max(
                (record['iterations'] for record in timed.values()), default=None),
            # Of some detectors, as of Sparse R-CNN, nothing counts them.
            'params': any_run.get('params'), 'gmadds': any_run.get('gmadds'),
            'seconds': min(record['seconds'] for record in runs.values())})
    return rows


def check_one_comparison(records: Sequence[Mapping], directory: Path) -> None:
    """Refuse records that no one table can hold: differences between them would mean nothing.

    Raises:
        InputError: if two are of the same run, or of other data, images or budgets.
    """
    found = collections.defaultdict(set)
    for (name, budget, seed), count in collections.Counter(
            (record['config'], record['budget'], record['seed']) for record in records).items():
        if count > 1:
            raise InputError(f'{directory} holds {count} records of {name} with seed {seed} at '
                             f'equal {budget}, but a table has one: move the others elsewhere.')
    for record in records:
        found['data'].add(record['data'])
        found['images'].add(' '.join(f'{n} {split}' for split, n in record['images'].items()))
        found['split'].add(record['split'])
        found['batch size'].add(record['batch_size'])
        found['iterations' if record['budget'] == 'iterations' else
              f'iterations at equal time of {record["config"]}'].add(record['iterations'])
        if record['place'] == 0:
            found['the config given first'].add(record['config'])
    for what, values in found.items():
        if len(values) > 1:
            raise InputError(
                f'{directory} holds records that differ in {what} '
                f'({", ".join(map(str, sorted(values)))}), but a table is of one comparison: move '
                'those of the others to directories of their own.')
