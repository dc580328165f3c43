"""What classifiers of MMPretrain need beside the backbones; their configs import it by name.

The plugin itself does not: MMPretrain is optional, ``pip install '.[imagenet]'`` in a checkout.
"""
from typing import Sequence

from mmengine.registry import MODELS
from torch import Tensor, nn

from .stack import optional_torchvision

with optional_torchvision():
    import mmpretrain.datasets  # noqa: F401
    import mmpretrain.evaluation  # noqa: F401
    from mmpretrain.models import LinearClsHead


@MODELS.register_module()
class DropoutLinearClsHead(LinearClsHead):
    """MMPretrain's LinearClsHead with dropout before the classifier, as the ODConv release has.

    Args:
        *args, **kwargs: those of :class:`mmpretrain.models.LinearClsHead`.
        dropout: probability of dropping a feature, from 0 to 1.

    Raises:
        ValueError: if ``dropout`` is not from 0 to 1.
    """

    def __init__(self, *args, dropout: float = 0.2, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.dropout = nn.Dropout(dropout)

    def pre_logits(self, feats: Sequence[Tensor]) -> Tensor:
        """Features (B, in_channels) that the classifier sees, of the last of ``feats``."""
        return self.dropout(super().pre_logits(feats))
