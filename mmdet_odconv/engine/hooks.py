"""Checks that need the model and the data side by side, before hours are spent on them."""
import re
from typing import List

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner

from ..errors import InputError


@HOOKS.register_module()
class InputCheckHook(Hook):
    """Refuses what MMEngine would only log, or fail on much later.

    A dataset whose annotations lack classes that the config names; a head whose num_classes is
    not their number; and, when testing or resuming, a checkpoint of another architecture.

    Raises:
        InputError: with the values found and expected.
    """

    def before_train(self, runner: Runner) -> None:
        self._check_classes(runner, runner.train_dataloader.dataset)

    def before_val(self, runner: Runner) -> None:
        self._check_classes(runner, runner.val_dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        self._check_classes(runner, runner.test_dataloader.dataset)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        state = checkpoint.get('state_dict', checkpoint)
        state = {re.sub(r'^module\.', '', name): value for name, value in state.items()}
        model = getattr(runner.model, 'module', runner.model)
        mismatched: List[str] = []
        try:
            missing = model.load_state_dict(state, strict=False).missing_keys
        except RuntimeError as error:
            mismatched = re.findall(r'size mismatch for ([^:\s]+):', str(error))
            if not mismatched:
                raise
            missing = [name for name in model.state_dict() if name not in state]
        training = isinstance(runner._train_loop, BaseLoop)
        if training and not runner._resume:
            # Fine-tuning may replace a head; a file of which nothing fits is a mistake.
            if len(missing) + len(mismatched) < len(model.state_dict()):
                return
        elif not missing and not mismatched:
            return
        raise InputError(
            f'The checkpoint is of another architecture than {type(model).__name__} in the config: '
            f'of {len(model.state_dict())} tensors {len(missing)} are missing{_few(missing)} and '
            f'{len(mismatched)} have another shape{_few(mismatched)}; give the config that the '
            'checkpoint was trained with.')

    @staticmethod
    def _check_classes(runner: Runner, dataset) -> None:
        dataset = getattr(dataset, 'dataset', dataset)  # RepeatDataset and its like
        classes = getattr(dataset, 'metainfo', {}).get('classes')
        if classes is None:
            return
        found = getattr(dataset, 'cat_ids', None)
        if found is not None and len(found) != len(classes):
            raise InputError(
                f'{dataset.ann_file} has {len(found)} of the {len(classes)} classes that the '
                f'config names ({", ".join(classes[:5])}{", ..." if len(classes) > 5 else ""}): '
                "set the dataset's metainfo=dict(classes=...) to names that its categories have.")
        for name, module in runner.model.named_modules():
            num_classes = getattr(module, 'num_classes', None)
            # A region proposal head knows one class, object, whatever the dataset's are.
            if (re.search(r'(^|\.)(bbox|mask)_head(\.\d+)?$', name) and num_classes is not None
                    and num_classes != len(classes)):
                raise InputError(
                    f'{name} has num_classes={num_classes} but {dataset.ann_file} has '
                    f'{len(classes)} classes: set num_classes={len(classes)} in the config.')


def _few(names: List[str]) -> str:
    return f' ({", ".join(names[:3])}{", ..." if len(names) > 3 else ""})' if names else ''
