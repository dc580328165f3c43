"""Several processes: gradients sent in half the bytes, and CPUs where there is no GPU."""
import os
from typing import Any, Callable, List, Optional

import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from ..errors import InputError


def _bf16(group, bucket):
    """torch's own, under a name that DistributedDataParallel does not keep for NCCL alone."""
    return default_hooks.bf16_compress_hook(group, bucket)


COMPRESSIONS = dict(bf16=_bf16, fp16=default_hooks.fp16_compress_hook)


@HOOKS.register_module()
class GradientCompressionHook(Hook):
    """Sends the gradients of DistributedDataParallel in 16 bits: half the bytes of a step.

    A bank of n kernels has n times the gradients of the convolution that it replaces. They are
    rounded, averaged over the processes in that precision, and used as float32 again; bf16 has
    float32's range, fp16 three bits more of precision and may overflow. One process alone sends
    nothing, and goes on as it is.

    Args:
        dtype: 'bf16' or 'fp16'.

    Raises:
        ValueError: for another dtype.
        InputError: if the model of several processes is no DistributedDataParallel.
    """

    def __init__(self, dtype: str = 'bf16') -> None:
        if dtype not in COMPRESSIONS:
            raise ValueError(f'dtype must be one of {", ".join(COMPRESSIONS)}, got {dtype}')
        self.dtype = dtype

    def before_train(self, runner: Runner) -> None:
        if isinstance(runner.model, DistributedDataParallel):
            runner.model.register_comm_hook(None, COMPRESSIONS[self.dtype])
        elif runner.distributed:
            raise InputError('GradientCompressionHook compresses what DistributedDataParallel '
                             f'sends, and the model is a {type(runner.model).__name__}: leave the '
                             'hook out, and set the reduction dtype of that wrapper instead.')


def by_main_process(function: Callable, *args) -> Any:
    """What ``function`` returns in the main process, for all; all raise its InputError."""
    said: List[Any] = [None, None]
    if is_main_process():
        try:
            said[0] = function(*args)
        except InputError as error:
            said[1] = str(error)
    broadcast_object_list(said)
    returned, refusal = said
    if refusal is not None:
        raise InputError(refusal)
    return returned


def prepare_cpu_processes(argv: List[str]) -> None:
    """Let ``--launcher pytorch`` train on CPUs where MMEngine would ask for a CUDA device.

    The process group is made with gloo before MMEngine looks for one, and a config without a
    ``model_wrapper_cfg`` gets MMEngine's default without its device. Does nothing where there is
    an accelerator, or no launcher.

    Args:
        argv: arguments of mmdet's train.py or test.py, changed in place.

    Raises:
        InputError: for another launcher, or if no launcher started this process.
    """
    launcher = next((value.partition('=')[2] or following
                     for value, following in zip(argv, [*argv[1:], ''])
                     if value.split('=')[0] == '--launcher'), 'none')
    if launcher == 'none' or get_device() != 'cpu':
        return
    if launcher != 'pytorch':
        raise InputError(f'--launcher {launcher} needs a CUDA device on each machine, and this one '
                         'has none: on CPUs, start the processes by torchrun and give --launcher '
                         'pytorch.')
    if 'RANK' not in os.environ:
        raise InputError('--launcher pytorch is for processes that torchrun starts: torchrun '
                         '--nproc-per-node 2 tools/train.py CONFIG --launcher pytorch, or mim '
                         'train mmdet_odconv CONFIG --launcher pytorch --gpus 2.')
    path = config_argument(argv)
    if path is None:
        return  # mmdet's own usage says what is missing
    dist.init_process_group('gloo')
    config = Config.fromfile(path)
    if config.get('model_wrapper_cfg') is not None:
        return
    add_cfg_options(argv, [
        'model_wrapper_cfg.device_ids=None', 'model_wrapper_cfg.broadcast_buffers=False',
        'model_wrapper_cfg.find_unused_parameters='
        f'{config.get("find_unused_parameters", False)}'])


def config_argument(argv: List[str]) -> Optional[str]:
    """The config in Python among the arguments of mmdet's tools."""
    return next((arg for arg in argv[1:] if arg.endswith('.py') and not arg.startswith('-')), None)


def add_cfg_options(argv: List[str], options: List[str]) -> None:
    """Put settings of the config before the user's own, in the arguments of mmdet's tools."""
    if '--cfg-options' not in argv:
        argv.append('--cfg-options')
    at = argv.index('--cfg-options') + 1
    argv[at:at] = options
