"""Detectors set side by side: one data set and one budget for all, differences paired by seed."""
import math
import statistics
from typing import Mapping, Optional, Tuple

from mmengine.config import Config

from ..errors import InputError


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
