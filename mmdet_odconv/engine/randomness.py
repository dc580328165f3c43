"""The random generators of a run: their states as a checkpoint holds them, and data workers."""
import functools
import random
from typing import Any, Callable, Dict, Iterator, Optional

import numpy as np
import torch
from mmengine.runner import IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader, get_worker_info


def random_state() -> Dict[str, Any]:
    """States of this process's generators: Python's, numpy's, torch's and its CUDA device's.

    Tensors and plain values only, so that a checkpoint with it is read with weights_only on.
    """
    generator: Any = np.random.get_state()
    kind, keys, *rest = generator
    return dict(
        python=random.getstate(),
        numpy=(kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state() if torch.cuda.is_available() else None)


def set_random_state(state: Dict[str, Any]) -> None:
    """Put generators back into what :func:`random_state` returned."""
    kind, keys, *rest = state['numpy']
    random.setstate(state['python'])
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'].cpu())
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


def reseed_data(runner: Runner) -> None:
    """Make the loader of training data again, by the runner's seed of now, of the same data set."""
    loop, config = runner.train_loop, runner._train_dataloader
    if not isinstance(config, dict):
        return  # a loader of the user's own
    config = dict(config, dataset=_NotCopied(loop.dataloader.dataset))
    config.pop('num_batch_per_epoch', None)  # by which the data set has been cut already
    loop.dataloader = runner.build_dataloader(
        config, runner.seed, runner._randomness_cfg.get('diff_rank_seed', False))
    if isinstance(loop, IterBasedTrainLoop):
        loop.dataloader_iterator = type(loop.dataloader_iterator)(loop.dataloader)


class _NotCopied:
    """Of which ``copy.deepcopy`` makes ``value`` itself."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict) -> Any:
        return self.value


def seed_workers_by_epoch(dataloader: DataLoader, rank: int) -> None:
    """Let data workers draw their seeds from torch's generator whenever an epoch begins.

    MMEngine gives them the same seeds in every epoch, and those that persist go on from wherever
    they are, which no checkpoint holds.
    """
    dataloader.worker_init_fn = functools.partial(
        _seed_worker, rank=rank, init_fn=dataloader.worker_init_fn)


def restart_workers(dataloader: DataLoader) -> None:
    """Have persistent workers started anew, and so seeded, with the next epoch."""
    if dataloader.num_workers and dataloader.persistent_workers:
        dataloader._iterator = None  # what the loader itself makes its next workers for


def _seed_worker(worker_id: int, rank: int, init_fn: Optional[Callable[[int], None]]) -> None:
    if init_fn is not None:
        init_fn(worker_id)
    info: Any = get_worker_info()  # None outside of a worker
    seed = info.seed + rank * info.num_workers
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class RestoredAfter:
    """``batches``, and once ``count`` of them have gone by, the generators as they were saved.

    For MMEngine's iteration-based loop, which on resuming reads the batches of a run that went
    before and throws them away: what follows them is as if it had not been interrupted.
    """

    def __init__(self, batches: Iterator, count: int, state: Dict[str, Any]) -> None:
        self.batches, self.count, self.state = batches, count, state

    def __iter__(self) -> 'RestoredAfter':
        return self

    def __next__(self) -> Any:
        if self.count == 0:
            set_random_state(self.state)
        self.count -= 1
        return next(self.batches)

    def skip_iter(self, num_iters: int) -> None:
        """Read ``num_iters`` batches: onedl-mmengine's loop asks for them in one call.

        Its own iterator would not read them, and data workers that have read nothing draw other
        numbers than those of the run that went before.
        """
        for _ in range(num_iters):
            next(self)
