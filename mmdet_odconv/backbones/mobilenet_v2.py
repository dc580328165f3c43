"""MobileNetV2 whose every convolution but the first, or the first and last, is dynamic."""
import re
from typing import Dict, Iterator, Tuple

from mmcv.cnn import ConvModule
from mmdet.models.backbones import MobileNetV2
from mmengine.registry import MODELS

from .dynamic import DynamicBackbone


@MODELS.register_module(name=['ODMobileNetV2', 'OD_MobileNetV2'])
class ODMobileNetV2(DynamicBackbone, MobileNetV2):
    """OD-MobileNetV2 of the ODConv paper (Table 2), any widen_factor.

    Takes the arguments of :class:`mmdet.models.MobileNetV2` and of :class:`DynamicBackbone`.
    State dicts with torchvision's names, as the paper's release has them, load as they are.
    """

    dynamic_convs = r'(layer\d\.\d+\.\w+_conv|conv2)\.conv'

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._register_load_state_dict_pre_hook(self._rename_torchvision_keys)

    def _rename_torchvision_keys(self, state_dict: Dict, prefix: str, *_) -> None:
        if prefix + 'features.0.0.weight' not in state_dict:
            return
        names = dict(self._torchvision_names())
        for key in [key for key in state_dict if key.startswith(f'{prefix}features.')]:
            theirs, leaf = re.fullmatch(
                r'(features(?:\.conv|\.\d+)+\.)(.*)', key[len(prefix):]).groups()
            if theirs in names:
                state_dict[prefix + names[theirs] + leaf] = state_dict.pop(key)

    def _torchvision_names(self) -> Iterator[Tuple[str, str]]:
        """Pairs of torchvision's and mmdet's names of each convolution and its BatchNorm."""
        yield from (('features.0.0.', 'conv1.conv.'), ('features.0.1.', 'conv1.bn.'))
        index = 0
        for stage in self.layers[:-1]:
            for i, block in enumerate(getattr(self, stage)):
                index += 1
                convs = [name for name, m in block.named_children() if isinstance(m, ConvModule)]
                for j, name in enumerate(convs):
                    # torchvision wraps all but the last, which has no activation.
                    theirs = (f'{j}.0', f'{j}.1') if name != convs[-1] else (f'{j}', f'{j + 1}')
                    for number, kind in zip(theirs, ('conv', 'bn')):
                        yield (f'features.{index}.conv.{number}.',
                               f'{stage}.{i}.{name}.{kind}.')
        yield from ((f'features.{index + 1}.0.', 'conv2.conv.'),
                    (f'features.{index + 1}.1.', 'conv2.bn.'))


@MODELS.register_module()
class DyMobileNetV2(DynamicBackbone, MobileNetV2):
    """DY-MobileNetV2 of Dynamic Convolution, CVPR 2020 (Table 3), any widen_factor.

    Takes the arguments of :class:`mmdet.models.MobileNetV2` and of :class:`DynamicBackbone`. The
    parameters that the paper states are those of a static last 1x1 convolution, the default.
    ``dynamic_convs='(layer|conv2).*'`` is every convolution but the first, as the ODConv paper
    counts DyConv.
    """

    dynamic_conv_cfg = dict(type='DyConv2d')
    dynamic_convs = r'layer\d\.\d+\.\w+_conv\.conv'
