"""Hooks: annealing of attention, and checks before hours are spent on a mistaken input."""
import logging
import math
import re
from typing import List, Optional

from mmdet.datasets.samplers import MultiSourceSampler
from mmdet.evaluation import CocoMetric
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner
from torch import nn

from ..checkpoints.contents import check_resumable
from ..checkpoints.published import check_finite, few, strip_prefix
from ..errors import InputError
from ..layers import DynamicConv2d, set_temperature, set_warm_up
from .data_check import check_data, unwrapped
from .divergence import nonfinite_tensors


class AnnealingHook(Hook):
    """Lets a value in the model change linearly as training begins; a subclass says which.

    The value follows from the iteration alone, so that a resumed run continues with the right one;
    it is logged under the subclass's ``name``.

    Args:
        begin: value of the first iteration.
        end_epoch: number of epochs after which it is ``end``, > 0; may be fractional.
        by_epoch: change the value at epochs only rather than at every iteration.
        end_iter: number of iterations after which it is ``end``, > 0, in place of epochs.

    Raises:
        ValueError: if ``end_iter`` is not greater than 0.
    """

    name: str
    end: float

    def __init__(self, begin: float, end_epoch: float, by_epoch: bool = False,
                 end_iter: Optional[float] = None) -> None:
        if end_iter is not None and not end_iter > 0:
            raise ValueError(f'end_iter must be greater than 0, got {end_iter}')
        self.begin, self.end_epoch, self.by_epoch = begin, end_epoch, by_epoch
        self.end_iter = end_iter

    def set_value(self, model: nn.Module, value: float) -> int:
        """Set it; in how many modules."""
        raise NotImplementedError

    def before_train(self, runner: Runner) -> None:
        if not self._anneal(runner):
            print_log(f'{type(self).__name__} finds nothing in a {type(runner.model).__name__} to '
                      f'change: it has no {self.name}.', logger='current', level=logging.WARNING)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        self._anneal(runner)  # also after validation

    def _anneal(self, runner: Runner) -> int:
        loader = runner.train_dataloader
        length = len(loader)
        # The length of a sampler without an end is the whole data set's in each process.
        if isinstance(getattr(loader, 'sampler', None), (InfiniteSampler, MultiSourceSampler)):
            length = math.ceil(length / get_world_size())
        epoch = runner.iter / length
        progress = (runner.iter / self.end_iter if self.end_iter is not None else
                    (int(epoch) if self.by_epoch else epoch) / self.end_epoch)
        value = self.begin + (self.end - self.begin) * min(1.0, progress)
        count = self.set_value(runner.model, value)
        if count:
            runner.message_hub.update_scalar(f'train/{self.name}', value)
        return count


@HOOKS.register_module()
class TemperatureAnnealingHook(AnnealingHook):
    """Lets the temperature of all dynamic convolutions fall linearly to 1 as training begins.

    Near-uniform attention at first trains every kernel of the bank (Dynamic Convolution, CVPR
    2020, section 3.3; ODConv trains so from scratch too). The value follows from the iteration
    alone, so that a resumed run continues with the right one; it is logged as ``temperature``.

    Validation and testing are at 1, annealed or not: it is the temperature at which the
    checkpoint of that moment would be tested. Figures of the first epochs are low for it.

    Args:
        begin: temperature of the first iteration, > 0.
        end_epoch: number of epochs after which it is 1, > 0; may be fractional.
        by_epoch: change the value at epochs only rather than at every iteration.
        end_iter: number of iterations after which it is 1, > 0, in place of epochs.

    Raises:
        ValueError: if ``begin``, ``end_epoch`` or ``end_iter`` is not greater than 0.
    """

    name, end = 'temperature', 1.0

    def __init__(self, begin: float = 30.0, end_epoch: float = 10, by_epoch: bool = False,
                 end_iter: Optional[float] = None) -> None:
        if not (begin > 0 and end_epoch > 0):
            raise ValueError('begin and end_epoch must be greater than 0, got '
                             f'{begin} and {end_epoch}')
        super().__init__(begin, end_epoch, by_epoch, end_iter)

    def set_value(self, model: nn.Module, value: float) -> int:
        return set_temperature(model, value)

    def before_val(self, runner: Runner) -> None:
        set_temperature(runner.model, self.end)

    before_test = after_train = before_val


@HOOKS.register_module()
class WarehouseWarmUpHook(AnnealingHook):
    """Lets the attention over warehouses of cells come into effect linearly as training begins.

    At first each cell of a kernel is one cell of the warehouse, so that all of them learn
    (KernelWarehouse, ICML 2024): the paper's tau falls from ``begin`` to 0. It is logged as
    ``tau`` and is in the model's state: a checkpoint, a copy by ``EMAHook`` and validation have
    the tau of their moment, and where ``EMAHook`` averages buffers, their average.

    Args:
        begin: tau of the first iteration, above 0 to 1.
        end_epoch: number of epochs after which it is 0, > 0; may be fractional. The release has 20
            of 300 for ResNets, and 15 of 150 for MobileNetV2.
        by_epoch: change the value at epochs only rather than at every iteration.
        end_iter: number of iterations after which it is 0, > 0, in place of epochs.

    Raises:
        ValueError: if ``begin``, ``end_epoch`` or ``end_iter`` is out of range.
    """

    name, end = 'tau', 0.0

    def __init__(self, begin: float = 1.0, end_epoch: float = 20, by_epoch: bool = False,
                 end_iter: Optional[float] = None) -> None:
        if not (0 < begin <= 1 and end_epoch > 0):
            raise ValueError('begin must be above 0 to 1 and end_epoch greater than 0, got '
                             f'{begin} and {end_epoch}')
        super().__init__(begin, end_epoch, by_epoch, end_iter)

    def set_value(self, model: nn.Module, value: float) -> int:
        return set_warm_up(model, value)


@HOOKS.register_module()
class InputCheckHook(Hook):
    """Refuses what MMEngine would only log, or fail on much later.

    A dataset whose annotations lack classes that the config names, have them in another order, or
    cannot be trained on; a head whose num_classes is not their number (unless the dataset is
    panoptic, where some heads know things alone, or the classes are named by text); a checkpoint
    with NaNs, of which nothing fits, or, when testing or resuming, one of another architecture.

    Args:
        strict: refuse annotations and images that cannot be used as they are; else warn of them.

    Raises:
        InputError: with the values found and expected.
    """

    def __init__(self, strict: bool = True) -> None:
        self.strict = strict

    def before_train(self, runner: Runner) -> None:
        self._check_classes(runner, runner.train_dataloader.dataset)
        check_data(runner.train_dataloader.dataset, self.strict)
        if runner.val_loop is not None:  # rather than after the first epoch
            self._check_evaluated(runner, runner.val_dataloader.dataset, runner.val_loop)
        _check_decay(runner)

    def before_val(self, runner: Runner) -> None:
        self._check_classes(runner, runner.val_dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        self._check_evaluated(runner, runner.test_dataloader.dataset, runner.test_loop)

    def _check_evaluated(self, runner: Runner, dataset, loop: BaseLoop) -> None:
        self._check_classes(runner, dataset)
        check_data(dataset, self.strict, trained=False, by_coco=any(
            isinstance(metric, CocoMetric) and metric._coco_api is not None
            for metric in getattr(getattr(loop, 'evaluator', None), 'metrics', ())))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        state = checkpoint.get('state_dict', checkpoint)
        state = strip_prefix(state, 'module.')
        model = getattr(runner.model, 'module', runner.model)
        by_design = set(nonfinite_tensors(model))  # a mask of -inf, say
        check_finite({name: state[name] for name in model.state_dict()
                      if name in state and name not in by_design})
        mismatched: List[str] = []
        try:
            missing = model.load_state_dict(state, strict=False).missing_keys
        except RuntimeError as error:
            mismatched = re.findall(r'size mismatch for ([^:\s]+):', str(error))
            if not mismatched:
                raise
            missing = [name for name in model.state_dict() if name not in state]
        training = isinstance(runner._train_loop, BaseLoop)
        if training and runner._resume:
            check_resumable(checkpoint)  # where no CheckpointHook does
        if training and not runner._resume:
            # Fine-tuning may replace a head; a file of which nothing fits is a mistake. Counters
            # are never missing: torch makes those that a file lacks.
            if any(name not in missing and name not in mismatched for name in model.state_dict()
                   if not name.endswith('num_batches_tracked')):
                return
        elif not missing and not mismatched:
            return

        def among(names: List[str]) -> str:
            return f' ({few(names)})' if names else ''

        raise InputError(
            f'The checkpoint is of another architecture than {type(model).__name__} in the config: '
            f'of {len(model.state_dict())} tensors {len(missing)} are missing{among(missing)} and '
            f'{len(mismatched)} have another shape{among(mismatched)}; give the config that the '
            'checkpoint was trained with.')

    @staticmethod
    def _check_classes(runner: Runner, dataset) -> None:
        datasets = {}
        for leaf in unwrapped(dataset):
            metainfo = getattr(leaf, 'metainfo', {})
            classes, found = metainfo.get('classes'), getattr(leaf, 'cat_ids', None)
            if classes is None:
                continue
            name = getattr(leaf, 'ann_file', None) or type(leaf).__name__
            if found is not None and len(found) != len(classes):
                raise InputError(
                    f'{name} has {len(found)} of the {len(classes)} classes that the config names '
                    f'({", ".join(classes[:5])}{", ..." if len(classes) > 5 else ""}): '
                    "set the dataset's metainfo=dict(classes=...) to names that its categories "
                    'have.')
            is_panoptic = 'stuff_classes' in metainfo
            is_prompted = getattr(leaf, 'return_classes', False)
            if not (is_panoptic or is_prompted):
                datasets[len(classes)] = name
        if not datasets:
            return
        expected = max(datasets)
        for name, module in runner.model.named_modules():
            num_classes = getattr(module, 'num_classes', None)
            # A region proposal head knows one class, object, whatever the dataset's are.
            if (re.search(r'(^|\.)((bbox|mask)_)?head(\.\d+)?$', name) and num_classes is not None
                    and num_classes != expected):
                raise InputError(
                    f'{name} has num_classes={num_classes} but {datasets[expected]} has '
                    f'{expected} classes: set num_classes={expected} in the config.')


def _check_decay(runner: Runner) -> None:
    """Warn that MMEngine knows depthwise convolutions by nn.Conv2d, and so not dynamic ones."""
    config = getattr(runner, 'cfg', {}).get('optim_wrapper') or {}
    paramwise = config.get('paramwise_cfg') or {}
    decay, named = paramwise.get('dwconv_decay_mult'), paramwise.get('custom_keys') or {}
    model = getattr(runner.model, 'module', runner.model)
    layers = [name for name, module in model.named_modules()
              if isinstance(module, DynamicConv2d) and module.groups == module.in_channels > 1
              and not any(key in f'{name}.weight' for key in named)]
    if decay is not None and layers:
        print_log(f'paramwise_cfg.dwconv_decay_mult={decay} does not reach {len(layers)} depthwise '
                  f'dynamic layers ({few(layers)}), which are no nn.Conv2d: name their weights in '
                  f"custom_keys, such as {{'{layers[0]}.weight': dict(decay_mult={decay})}}.",
                  logger='current', level=logging.WARNING)
