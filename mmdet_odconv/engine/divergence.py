"""Noticing that training has diverged, before a checkpoint says so for good."""
from typing import Any, Dict, FrozenSet, Iterator, Optional

import torch
from mmengine.runner import Runner
from torch import nn

from ..errors import DivergenceError


class DivergenceCheck:
    """Stops a run whose loss or weights are no longer finite.

    A loss that is not finite alone is no divergence as long as the weights are: a gradient
    scaler's skipped steps are such. The weights are looked at only then, and before saving.

    Args:
        patience: consecutive iterations without a finite loss after which the run stops even if
            its weights are finite; ``None`` never stops it.
    """

    def __init__(self, patience: Optional[int]) -> None:
        self.patience = patience
        self.iteration = 0
        self.since: Optional[str] = None  # the first of them, in words
        self.count = 0
        self.expected: FrozenSet[str] = frozenset()

    def begin(self, model: nn.Module) -> None:
        """Take note of tensors that are not finite by design, such as a mask of -inf."""
        self.expected = frozenset(nonfinite_tensors(model))

    def after_iteration(self, runner: Runner, outputs: Optional[Dict[str, Any]]) -> None:
        """Look at the losses of an iteration.

        Raises:
            DivergenceError: if they and a weight, or they for too long, are not finite.
        """
        self.iteration = runner.iter + 1
        if self.patience is None or not outputs or _is_finite(outputs.get('loss', 0.0)):
            self.since, self.count = None, 0
            return
        # The total comes first and is the consequence of one of the others.
        name = next((name for name, value in outputs.items()
                     if name != 'loss' and not _is_finite(value)), 'loss')
        value = torch.as_tensor(outputs[name]).detach()
        self.since = self.since or self._moment(runner, f'{name} is {value.item()}')
        self.count += 1
        if self.count > self.patience or self._first_weight(runner) is not None:
            raise self._error(runner, self.since)

    def before_saving(self, runner: Runner) -> None:
        """Look at the weights of a model that is about to be saved.

        Raises:
            DivergenceError: if one is not finite.
        """
        name = None if self.patience is None else self._first_weight(runner)
        if name is not None:
            raise self._error(runner, self.since or self._moment(runner, f'{name} is not finite'))

    def _first_weight(self, runner: Runner) -> Optional[str]:
        return next((name for name in nonfinite_tensors(runner.model)
                     if name not in self.expected), None)

    def _moment(self, runner: Runner, what: str) -> str:
        rates = {f'{rate[0]:.3g}' for rate in runner.optim_wrapper.get_lr().values() if rate}
        return (f'iteration {self.iteration}, learning rate {" and ".join(sorted(rates))}: '
                f'{what}')

    @staticmethod
    def _error(runner: Runner, moment: str) -> DivergenceError:
        last = runner.message_hub.runtime_info.get('last_ckpt')
        kept = f'{last} is the last good checkpoint' if last else 'no checkpoint was saved before'
        return DivergenceError(
            f'Training diverged at {moment}; {kept}: lower optim_wrapper.optimizer.lr, clip '
            'gradients (optim_wrapper.clip_grad) or look at the data of that iteration, and run '
            'again; --cfg-options default_hooks.checkpoint.nonfinite_losses=None trains on '
            'regardless.')


def nonfinite_tensors(model: nn.Module) -> Iterator[str]:
    """Names of parameters and buffers that hold NaN or infinity; of sharded ones, in this part."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            local = tensor.to_local() if hasattr(tensor, 'to_local') else tensor
            if not torch.isfinite(local.detach()).all():
                yield name[len('module.'):] if name.startswith('module.') else name


def _is_finite(value: Any) -> bool:
    return not isinstance(value, (float, torch.Tensor)) or bool(
        torch.isfinite(torch.as_tensor(value)).all())
