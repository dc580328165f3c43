"""The one decision that makes a static backbone dynamic: which of its convolutions are."""
from typing import Optional

from ..checkpoints import read_published_names
from ..layers import replace_convs


class DynamicBackbone:
    """Mixin put before a backbone of MMDetection; the subclass names its dynamic convolutions.

    Released weights load as they are, by any loader: see ``checkpoints/published.py``.

    Args:
        *args, **kwargs: those of the backbone that is extended.
        kernel_num: number of kernels in each bank.
        reduction: width of the attention relative to the layer's input channels.
        conv_cfg: another dynamic layer, or more of its arguments; stem and shortcut convolutions
            stay static whatever it says.
    """

    dynamic_conv_cfg = dict(type='ODConv2d')
    dynamic_convs: str  # regular expression of module names

    def __init__(self,
                 *args,
                 kernel_num: int = 4,
                 reduction: float = 1 / 16,
                 conv_cfg: Optional[dict] = None,
                 **kwargs) -> None:
        super().__init__(*args, **kwargs)
        conv_cfg = {**self.dynamic_conv_cfg, 'kernel_num': kernel_num, 'reduction': reduction,
                    **(conv_cfg or {})}
        replace_convs(self, self.dynamic_convs, conv_cfg)
        read_published_names(self)
        self._freeze_stages()  # mmdet froze the convolutions that were here before
