"""The one decision that makes a static backbone dynamic: which of its convolutions are."""
import logging
import re
from typing import Any, Dict, List, Optional

from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import nn

from ..checkpoints import read_published_names
from ..errors import InputError
from ..layers import DynamicConv2d, replace_convs
from ..layers.odconv import NORM_TYPES


class DynamicBackbone(BaseModule):
    """Mixin put before a backbone of MMDetection; the subclass names its dynamic convolutions.

    Released weights load as they are, by any loader: see ``checkpoints/published.py``.

    Args:
        *args, **kwargs: those of the backbone that is extended.
        kernel_num: number of kernels in each bank; the layer's own default where not given.
        reduction: width of the attention relative to the layer's input channels, likewise.
        init: how the attention's heads begin, 'zero' or 'he', likewise.
        conv_cfg: another dynamic layer, such as ``dict(type='CondConv2d')``, or more of the
            layer's arguments; the other convolutions stay static whatever it says.
        dynamic_convs: which convolutions are dynamic: a regular expression that their whole
            names match; the class's own where not given.
        frozen_except: a regular expression of what stays as trainable as it is in frozen stages:
            parameters in whose name it is found. ``'KSM|FBM'`` is what FDConv's release trains
            there.

    Raises:
        InputError: if ``dynamic_convs`` or ``frozen_except`` is no regular expression or matches
            nothing.
        ValueError: if ``conv_cfg`` names no dynamic convolution, or one without these arguments.
    """

    dynamic_conv_cfg: Dict[str, Any] = dict(type='ODConv2d')
    dynamic_convs: str
    frozen_except: Optional[str]

    def __init__(self,
                 *args,
                 kernel_num: Optional[int] = None,
                 reduction: Optional[float] = None,
                 init: Optional[str] = None,
                 conv_cfg: Optional[dict] = None,
                 dynamic_convs: Optional[str] = None,
                 frozen_except: Optional[str] = None,
                 **kwargs) -> None:
        super().__init__(*args, **kwargs)
        given = dict(kernel_num=kernel_num, reduction=reduction, init=init)
        given = {name: value for name, value in given.items() if value is not None}
        pattern = self.dynamic_convs if dynamic_convs is None else dynamic_convs
        for argument, value in (('dynamic_convs', pattern), ('frozen_except', frozen_except)):
            try:
                re.compile(value or '')
            except (re.error, TypeError) as error:
                raise InputError(f'{argument}={value!r} is no regular expression '
                                 f'({error}).') from error
        if not isinstance(conv_cfg, (dict, type(None))):
            raise InputError(f"conv_cfg must be a dict such as dict(type='ODConv2d'), got "
                             f'{conv_cfg!r}')
        replaced = self.make_dynamic(pattern,
                                     {**self.dynamic_conv_cfg, **given, **(conv_cfg or {})})
        if not replaced:
            raise InputError(f'dynamic_convs={pattern!r} matches the name of no convolution of '
                             f'{type(self).__name__}: give a regular expression for whole names, '
                             f'such as {self.dynamic_convs!r}.')
        self._warn_of_unlike_norms((kwargs.get('norm_cfg') or {}).get('type', 'BN'))
        read_published_names(self)
        if frozen_except is not None and not any(
                re.search(frozen_except, name) for name, _ in self.named_parameters()):
            raise InputError(f'frozen_except={frozen_except!r} is in the name of no parameter of '
                             f'{type(self).__name__}: mend it, or leave it out.')
        self.frozen_except = frozen_except
        self._freeze_stages()

    def make_dynamic(self, pattern: str, conv_cfg: dict) -> List[str]:
        """Replace the convolutions whose names match; return those names."""
        return replace_convs(self, pattern, conv_cfg)

    def _warn_of_unlike_norms(self, kind: str) -> None:
        """Whoever leaves BatchNorm, for its batches, may not mean to keep it in the attention."""
        is_left = any(type(module) is nn.BatchNorm2d for layer in self.modules()
                      if isinstance(layer, DynamicConv2d) for module in layer.attention.modules())
        if kind in NORM_TYPES and kind != 'BN' and is_left:
            print_log(
                f'{type(self).__name__} has norm_cfg type {kind}, and the attention of its dynamic '
                f"layers keeps BatchNorm: conv_cfg=dict(norm_cfg=dict(type='{kind}')) gives it "
                "the same, conv_cfg=dict(norm_cfg=dict(type='BN')) is what published weights have.",
                logger='current', level=logging.WARNING)

    def _freeze_stages(self) -> None:
        if not hasattr(self, 'frozen_except'):
            return  # called by the constructor of the backbone, with nothing dynamic to except yet
        excepted = [parameter for name, parameter in self.named_parameters()
                    if self.frozen_except is not None and re.search(self.frozen_except, name)
                    and parameter.requires_grad]  # or else somebody froze it, and means it
        self.freeze_whole_stages()
        for parameter in excepted:
            parameter.requires_grad_(True)

    def freeze_whole_stages(self) -> None:
        """Freeze the stages that the backbone's own ``frozen_stages`` says, without exception."""
        super()._freeze_stages()
