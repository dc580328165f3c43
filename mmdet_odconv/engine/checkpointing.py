"""Checkpoints of a run that may be killed at any moment, written and resumed from."""
import contextlib
import errno
import os
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

from mmengine.dist import all_gather_object, get_rank, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner

from ..checkpoints.contents import check_resumable, forget_paths
from ..checkpoints.files import writing
from ..errors import InputError
from .distributed import by_main_process
from .divergence import DivergenceCheck
from .lock import lock_directory, release_directory
from .randomness import (
    RestoredAfter,
    random_state,
    reseed_data,
    restart_workers,
    seed_workers_by_epoch,
    set_random_state,
)
from .resuming import AUTO, newest_whole, no_space, pattern, step

STATES = 'random_states'  # in a checkpoint: a list, one of random_state() per process
REPLACED = 'replaces'  # in its meta: names of the checkpoints that are removed for it


@register_backend('whole', force=True)
class WholeFileBackend(LocalBackend):
    """Local files that are written under another name, flushed to the disk, and then renamed."""

    def put(self, obj: bytes, filepath: Union[str, Path]) -> None:
        path = Path(os.path.realpath(filepath))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with writing(path, force=True) as temporary, open(temporary, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
        except InputError as error:
            if getattr(error.__cause__, 'errno', None) != errno.ENOSPC:
                raise
            raise InputError(no_space(f' while writing {filepath}')) from error.__cause__


# Under MMEngine's own name too, so that every config that saves checkpoints has it.
@HOOKS.register_module(name=['SafeCheckpointHook', 'CheckpointHook'], force=True)
class SafeCheckpointHook(CheckpointHook):
    """MMEngine's CheckpointHook, of which a kill costs no more than what was not yet saved.

    - A checkpoint is whole or not there; ``last_checkpoint`` names it after that, and those that
      it replaces are removed last, and only from the directory of checkpoints.
    - ``--resume`` without a file takes the newest that is whole, and says what it passed over;
      where there is none, the run begins, from the config's ``load_from`` if there is one.
    - The states of random generators are saved and restored, validation leaves them as they were,
      and data workers are seeded anew each epoch: a run that was killed and resumed ends as the
      one that was not, bit for bit on CPU.
    - Of a checkpoint that is resumed from, no word on which files to remove is taken but of those
      that this run wrote.
    - A run that diverges stops before it saves.
    - The work directory is locked for one run at a time.

    Args:
        nonfinite_losses: consecutive iterations without a finite loss that are let pass as long
            as the weights are finite; ``None`` trains, and saves, whatever comes.
        **kwargs: MMEngine's.

    Raises:
        InputError: if another run has the work directory, none of its checkpoints is whole, or the
            one to resume from holds no run.
        DivergenceError: with iteration, learning rate and the first tensor that is not finite.
    """

    backend_args: Optional[dict]
    file_backend: Any

    def __init__(self, *args, nonfinite_losses: Optional[int] = 20, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.divergence = DivergenceCheck(nonfinite_losses)
        self._states: Optional[List[Dict[str, Any]]] = None  # to save, or that were saved
        self._before_validation: Any = None  # a random_state()
        self._replaced: List[str] = []
        self._seed: Optional[int] = None  # by which the data loader was made

    def before_run(self, runner: Runner) -> None:
        if not isinstance(runner._train_loop, BaseLoop):
            return
        self._seed = runner.seed
        by_main_process(lock_directory, runner.work_dir)
        if runner._has_loaded or not runner._resume:
            return
        start = runner._load_from if runner._resume == AUTO else None
        if runner._resume == AUTO:
            runner._resume, runner._load_from = True, None
        # Elsewhere than on a local disk MMEngine finds the last.
        if self._is_local(runner) and runner._load_from is None:
            runner._load_from = self._agreed(runner)
            if runner._load_from is None:
                runner._resume, runner._load_from = False, start

    def _agreed(self, runner: Runner) -> Optional[str]:
        """The newest whole checkpoint that the first process finds, for all to resume from."""
        path, passed = by_main_process(newest_whole, Path(runner.work_dir),
                                       self._directory(runner), self.filename_tmpl)
        if passed:
            runner.logger.warning(f'Passed over {", ".join(passed)}.')
        found = all_gather_object(path is None or path.exists())
        if not all(found):
            raise InputError(f'{path}, from which the first process resumes, does not exist for '
                             f'process {found.index(False)}: give a --work-dir that all share.')
        return None if path is None else str(path)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if not (runner._resume and isinstance(runner._train_loop, BaseLoop)):
            return
        check_resumable(checkpoint)
        self._states = checkpoint.get(STATES)
        source, directory = Path(str(runner._load_from)), self._directory(runner)
        is_own = source.parent.resolve() == directory.resolve()
        forget_paths(checkpoint, str(directory), is_own)
        replaced = checkpoint.get('meta', {}).get(REPLACED, [])
        if is_own:
            self._replaced = [name for name in map(str, replaced)
                              if Path(name).name == name != source.name
                              and step(Path(name), self.filename_tmpl) is not None]

    def before_train(self, runner: Runner) -> None:
        is_local = self._is_local(runner)
        if is_local and self.backend_args is None and self.file_client_args is None:
            self.backend_args = dict(backend='whole')
        super().before_train(runner)
        if is_local and is_main_process():
            self._tidy()
        self.divergence.begin(runner.model)
        if runner.seed != self._seed:  # the checkpoint's, which MMEngine gives to all but the data
            reseed_data(runner)
        if not isinstance(runner.train_loop, IterBasedTrainLoop):
            seed_workers_by_epoch(runner.train_dataloader, get_rank())
        if runner.iter:
            self._restore(runner)

    def _is_local(self, runner: Runner) -> bool:
        return '://' not in str(self.out_dir or runner.work_dir)

    def before_train_epoch(self, runner: Runner) -> None:
        if not isinstance(runner.train_loop, IterBasedTrainLoop):
            restart_workers(runner.train_dataloader)

    def before_val(self, runner: Runner) -> None:
        self._before_validation = random_state()

    def after_val(self, runner: Runner) -> None:
        set_random_state(self._before_validation)
        self._before_validation = None

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None,
                         outputs: Optional[dict] = None) -> None:
        self.divergence.after_iteration(runner, outputs)
        super().after_train_iter(runner, batch_idx, data_batch, outputs)

    def after_run(self, runner: Runner) -> None:
        release_directory(runner.work_dir)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint['meta'] = _without_config_dicts(checkpoint['meta'])
        if 'optimizer' in checkpoint and isinstance(self.file_backend, _Deferring):
            checkpoint[STATES] = self._states
            checkpoint['meta'][REPLACED] = [Path(path).name for _, path in self.file_backend.due]

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        self.divergence.before_saving(runner)
        self._states = all_gather_object(self._before_validation or random_state())
        with self._removing_last():
            super()._save_checkpoint_with_step(runner, step, meta)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        with self._removing_last():
            super()._save_best_checkpoint(runner, metrics)

    @contextlib.contextmanager
    def _removing_last(self) -> Iterator[None]:
        """What the block removes is removed when it is done, unless it was written anew."""
        backend = self.file_backend
        self.file_backend = _Deferring(backend)
        try:
            yield
        finally:
            deferred, self.file_backend = self.file_backend, backend
        written = {self.last_ckpt, getattr(self, 'best_ckpt_path', None),
                   *getattr(self, 'best_ckpt_path_dict', {}).values()}
        for remove, path in deferred.due:
            # A path may be a checkpoint's word, read when it was resumed from.
            inside = os.path.dirname(os.path.realpath(path)) == os.path.realpath(self.out_dir)
            if path not in written and (inside or '://' in path):
                remove(path)

    def _directory(self, runner: Runner) -> Path:
        """Where checkpoints will be, known before MMEngine's before_train."""
        if self.out_dir is None:
            return Path(runner.work_dir)
        return Path(self.out_dir) / os.path.basename(runner.work_dir.rstrip(os.sep))

    def _tidy(self) -> None:
        """Remove what a killed run was about to remove, or had written a part of."""
        directory = Path(self.out_dir)
        for name in self._replaced:
            (directory / name).unlink(missing_ok=True)
        for template in (pattern(self.filename_tmpl), 'best_*.pth'):
            stem, suffix = os.path.splitext(template)
            for path in directory.glob(f'.{stem}-????????{suffix}'):
                path.unlink(missing_ok=True)

    def _restore(self, runner: Runner) -> None:
        """Put the generators of a resumed run where its checkpoint left them."""
        states = self._states if isinstance(self._states, (list, tuple)) else []
        try:
            if len(states) != runner.world_size:
                raise ValueError(f'of {len(states)} processes instead of {runner.world_size}')
            set_random_state(states[get_rank()])
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            runner.logger.warning(
                f'The random states in the checkpoint do not fit ({error}): the run goes on, but '
                'not as one that was not interrupted would.')
            return
        if getattr(runner.train_loop, 'fast_forward_on_resume', False):  # onedl-mmengine's alone
            return  # it reads no batch of the run that went before
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            runner.train_loop.dataloader_iterator = RestoredAfter(
                runner.train_loop.dataloader_iterator, runner.iter, states[get_rank()])
        elif runner.iter % len(runner.train_dataloader):
            runner.logger.warning(
                f'The checkpoint is of the middle of an epoch: epoch {runner.epoch + 1} begins '
                f'anew, its first {runner.iter % len(runner.train_dataloader)} iterations are '
                'repeated.')


class _Deferring:
    """A file backend of which what it is asked to remove is kept in ``due``."""

    def __init__(self, backend) -> None:
        self._backend = backend
        self.due: List[Tuple[Callable, str]] = []

    def __getattr__(self, name: str):
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self.due.append((self._backend.remove, path))

    def rmtree(self, path: str) -> None:
        self.due.append((self._backend.rmtree, path))


def _without_config_dicts(value):
    """``value``, as of a data set's metainfo, in what reads back without MMEngine's classes."""
    if isinstance(value, dict):
        return {key: _without_config_dicts(child) for key, child in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_without_config_dicts, value))
    return value
