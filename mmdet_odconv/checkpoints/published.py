"""Names of released weights in MMDetection's backbones.

The ODConv release names ResNets as MMDetection does and MobileNetV2 as torchvision does, with
``module.`` before the names of its classifiers and ``backbone.`` before those of its detectors'
backbones; the classifier stays in both. The KernelWarehouse release does so too, without
``module.``, and its classifiers' files hold their weights as ``model``.
"""
import collections
import re
from typing import Dict, List, Mapping, Optional, Tuple

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor

from ..errors import InputError
from ..layers import DynamicConv2d

CLASSIFIERS = ('fc', 'classifier')
RESNET_BLOCKS = {
    # (blocks a stage, whether they are bottlenecks): depth
    ((1, 1, 1, 1), False): 10, ((2, 2, 2, 2), False): 18, ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50, ((3, 4, 23, 3), True): 101, ((3, 8, 36, 3), True): 152,
}
MOBILENET_V2_STAGES = [f'layer{stage}.{block}'
                       for stage, blocks in enumerate((1, 2, 3, 4, 3, 3, 1), 1)
                       for block in range(blocks)]
# Heads and norms that only one layer's attention has.
LAYERS = {
    'ODConv2d': 'attention.channel_fc.weight', 'DCDConv2d': 'attention.fusion_fc.weight',
    'FDConv2d': 'KSM_Global.channel_fc.weight', 'KWConv2d': 'attention.fc2.weight',
    'DyConv2d': 'attention.fc.weight', 'CondConv2d': 'attention.kernel_fc.weight',
}


def our_name(name: str) -> Optional[str]:
    """Name in MMDetection's backbone of a tensor of the release or of torchvision.

    Returns:
        ``None`` for the classifier, which has no place there; names that are not torchvision's
        of a MobileNetV2 as they are.
    """
    if name.split('.')[0] in CLASSIFIERS:
        return None
    found = re.fullmatch(r'features\.(\d+)\.([01])\.(.+)', name)
    if found:  # the first and the last convolution, with their BatchNorms
        index, kind, leaf = found.groups()
        return f'{"conv1" if index == "0" else "conv2"}.{("conv", "bn")[int(kind)]}.{leaf}'
    found = re.fullmatch(r'features\.(\d+)\.conv\.(\d)\.(.+)', name)
    if not found or not 1 <= int(found[1]) <= len(MOBILENET_V2_STAGES):
        return name
    index, step, leaf = int(found[1]), int(found[2]), found[3]
    convs = ('expand_conv', 'depthwise_conv', 'linear_conv')[index == 1:]
    if step < len(convs) - 1:  # torchvision wraps all but the last, which has no activation
        kind, _, leaf = leaf.partition('.')
    else:
        step, kind = len(convs) - 1, step - len(convs) + 1
    return f'{MOBILENET_V2_STAGES[index - 1]}.{convs[step]}.{("conv", "bn")[int(kind)]}.{leaf}'


def convert_published(state: Mapping[str, Tensor]) -> Tuple[Dict[str, Tensor], List[str]]:
    """Released weights, of a classifier or of a detector, under MMDetection's names.

    Returns:
        The weights, and the names of the classifier's, which are left out.
    """
    state = strip_prefix(state, 'module.')
    prefix = 'backbone.' if any(name.startswith('backbone.') for name in state) else ''
    converted: Dict[str, Tensor] = {}
    left_out: List[str] = []
    for name, tensor in state.items():
        ours: Optional[str] = name
        if name.startswith(prefix):
            ours = our_name(name[len(prefix):])
            ours = None if ours is None else prefix + ours
        if ours is None:
            left_out.append(name)
        else:
            converted[ours] = tensor
    return converted, left_out


def weights_of(checkpoint: Mapping) -> Mapping:
    """The weights in what a file holds: under a name, or by themselves."""
    for name in ('state_dict', 'model'):
        if isinstance(checkpoint.get(name), Mapping):
            return checkpoint[name]
    return checkpoint


def strip_prefix(state: Mapping[str, Tensor], prefix: str) -> Dict[str, Tensor]:
    """``state`` with ``prefix`` taken off the names that begin with it."""
    return {name[len(prefix):] if name.startswith(prefix) else name: tensor
            for name, tensor in state.items()}


def read_published_names(backbone: BaseModule) -> None:
    """Let ``backbone`` load released weights as they are, by whichever loader they come.

    Raises (when weights are loaded):
        InputError: if they are of another network, with the values of both, or hold NaN.
    """
    backbone._register_load_state_dict_pre_hook(_rename, with_module=True)


def _rename(backbone: BaseModule, state: Dict[str, Tensor], prefix: str, *_) -> None:
    """Put our names in place of the released ones in ``state``, which torch loads from next."""
    theirs: Mapping[str, Tensor] = {name[len(prefix):]: state.pop(name) for name in list(state)
              if name.startswith(prefix)}
    if not theirs:
        return
    theirs = weights_of(theirs)
    total = len(theirs)
    theirs = strip_prefix(theirs, 'module.')
    left_out = {}
    if any(name.startswith('backbone.') for name in theirs):
        rest = sorted({name.split('.')[0] for name in theirs} - {'backbone'})
        if rest:
            left_out['rest of the network'] = rest
        theirs = {name[len('backbone.'):]: tensor for name, tensor in theirs.items()
                  if name.startswith('backbone.')}
    ours, classifier = convert_published(theirs)
    own = backbone.state_dict()
    _check_architecture(type(backbone).__name__, own, ours)
    _check_shapes(own, ours)
    # What is given for a dynamic layer is for it to check: it may take a static kernel.
    layers = {name for name, module in backbone.named_modules()
              if isinstance(module, DynamicConv2d)}
    unknown = [name for name in ours if name not in own and name.rpartition('.')[0] not in layers]
    if len(unknown) == len(ours):
        raise InputError(f'The checkpoint has none of the weights of {type(backbone).__name__}, '
                         f'its {total} tensors are {few(list(theirs))}: give weights of the same '
                         'network.')
    check_finite(ours)
    left_out.update({'classifier': classifier, 'unknown here': unknown})
    message = f'{type(backbone).__name__} loads {len(ours) - len(unknown)} of {total} tensors'
    reasons = [f'{few(names)} ({reason})' for reason, names in left_out.items() if names]
    if reasons:
        message += f'; left out: {"; ".join(reasons)}'
    # A Runner's checks load a checkpoint before the Runner does.
    if message != getattr(backbone, '_said_of_checkpoint', None):
        backbone._said_of_checkpoint = message
        print_log(f'{message}.', logger='current')
    state.update({prefix + name: tensor for name, tensor in ours.items()})


def check_finite(state: Mapping[str, Tensor]) -> None:
    """InputError that names the first tensor with a NaN or infinite value."""
    for name, tensor in state.items():
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        stored = _stored(name, tensor)
        if not stored.isfinite().all():
            bad = int((~stored.isfinite()).sum())
            raise InputError(f'{name} of the checkpoint has {bad} NaN or infinite values, of '
                             f'{stored.numel()}: give one that was saved before training diverged.')


def _stored(name: str, tensor: Tensor) -> Tensor:
    """The values of ``tensor``, each once where it is expanded.

    Raises:
        InputError: if it is sparse or nested, or says that it is more than its storage holds.
    """
    if tensor.layout != torch.strided or tensor.is_nested:
        raise InputError(f'{name} of the checkpoint is sparse or nested, where a dense tensor was '
                         'expected: save it as one.')
    once = tensor.detach()[tuple(slice(1) if stride == 0 else slice(None)
                                 for stride in tensor.stride())]
    held = tensor.untyped_storage().nbytes() // tensor.element_size()
    if once.numel() > held:
        raise InputError(f'{name} of the checkpoint has the shape {tuple(tensor.shape)}, but only '
                         f'{held} values: save it anew.')
    return once


def _check_architecture(kind: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    # By what both have: a network may have fewer stages than the weights, or the weights fewer.
    shared = set.intersection(*({name.split('.')[0] for name in state} for state in (own, given)))
    ours, theirs = (architecture({name: tensor for name, tensor in state.items()
                                  if name.split('.')[0] in shared}) for state in (own, given))
    for name, value in ours.items():
        found = theirs.get(name, value)
        if found != value:
            raise InputError(f'{kind} has {name} {value}, but the checkpoint {name} {found}: give '
                             'weights of the same network, or the config of these weights.')


def _check_shapes(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raised, because MMEngine only logs what torch would collect, and trains on."""
    # What is given for a bank is for its layer to check: it may take a static kernel.
    layers = tuple(name[:-len('weight')] for name, tensor in given.items() if name in own
                   and name.endswith('.weight') and own[name].dim() == 5
                   and own[name].shape != tensor.shape)
    for name, tensor in given.items():
        expected = own.get(name, tensor)
        if expected.shape != tensor.shape and not name.startswith(layers):
            hint = ''
            if name.startswith('warehouse_manager.'):
                hint = ', of the same budget'
            elif tensor.dim() == 5:
                hint = ', one with the same dynamic_convs'
            raise InputError(
                f'{name} of the checkpoint has the shape {tuple(tensor.shape)}, where '
                f'{tuple(expected.shape)} was expected: give weights of the same network{hint}.')


def check_released(weights: Mapping[str, Tensor]) -> None:
    """InputError unless ``weights``, under MMDetection's names, are of a network of a release."""
    found = architecture(strip_prefix(weights, 'backbone.'))
    if 'family' not in found or found.get('layer') not in ('ODConv2d', 'KWConv2d'):
        raise InputError(f'The file holds {few(list(weights))}, where a ResNet or MobileNetV2 with '
                         'ODConv was expected: give a file of the ODConv release, or of '
                         "KernelWarehouse's.")


def architecture(state: Mapping[str, Tensor]) -> Dict[str, object]:
    """What names and shapes tell of a ResNet or MobileNetV2; what they do not tell is absent.

    The size of the bank is left to each layer's own check.
    """
    found: Dict[str, object] = {}
    if any(name.startswith('layer1.0.conv1.') for name in state):
        found['family'] = 'ResNet'
        bottleneck = any(name.startswith('layer1.0.conv3.') for name in state)
        of_stage = collections.Counter(stage for stage, _ in {
            tuple(name.split('.')[:2]) for name in state if name.startswith('layer')})
        blocks = tuple(of_stage[stage] for stage in sorted(of_stage))
        depths = [str(depth) for (of_depth, kind), depth in RESNET_BLOCKS.items()
                  if kind == bottleneck and of_depth[:len(blocks)] == blocks]
        found['depth'] = ' or '.join(depths) or f'of {blocks} blocks'
        width = _out_channels(state, 'layer1.0.conv1', 'layer1.0.bn1')
        if width is not None:
            found['width'] = width
    elif any(name.startswith('layer1.0.depthwise_conv.conv.') for name in state):
        found['family'] = 'MobileNetV2'
        width = _out_channels(state, 'layer7.0.linear_conv.conv', 'layer7.0.linear_conv.bn')
        if width is not None:
            found['widen_factor'] = round(width / 320, 2)
    layer = next((layer for layer, head in LAYERS.items()
                  if any(name.endswith(f'.{head}') for name in state)), None)
    if layer is not None:
        found['layer'] = layer
    return found


def _out_channels(state: Mapping[str, Tensor], conv: str, norm: str) -> Optional[int]:
    """Of a convolution, or of the norm behind one that stores no kernels."""
    if f'{conv}.weight' in state:
        return state[f'{conv}.weight'].shape[-4]
    return len(state[f'{norm}.weight']) if f'{norm}.weight' in state else None


def few(names: List[str]) -> str:
    """The first three names, and the number of the others."""
    return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')
