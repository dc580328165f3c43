"""ResNets and MobileNetV2 of KernelWarehouse, whose convolutions share warehouses by stage.

Li and Yao, ICML 2024, https://arxiv.org/abs/2406.07879
"""
import fractions
import re
from typing import Dict, Hashable, List, Optional, Tuple

from mmdet.models.backbones import MobileNetV2, ResNet
from mmdet.models.backbones.resnet import Bottleneck
from mmengine.registry import MODELS
from torch import nn

from ..errors import InputError
from ..layers import KWConv2d, WarehouseManager, replace_convs
from .dynamic import DynamicBackbone
from .resnet import ARCH_SETTINGS

BUDGETS = ('1/4', '1/2', '1x', '2x', '4x')


class WarehouseBackbone(DynamicBackbone):
    """Mixin put before a backbone of MMDetection; the subclass says what shares a warehouse.

    The cells are in ``warehouse_manager``, which the backbone registers once. A frozen stage
    freezes the warehouses that it reads, whatever else reads them too, unless ``frozen_except`` is
    found in their own names, ``warehouse_manager.weights.0`` and so on.

    Args:
        *args, **kwargs: those of the backbone that is extended, and of :class:`DynamicBackbone`.
        budget: convolutional parameters relative to the static network's, one of ``budgets``.

    Raises:
        InputError: for another budget or layer, or if ``dynamic_convs`` matches no convolution.
    """

    dynamic_conv_cfg = dict(type=KWConv2d)
    budgets: Tuple[str, ...] = BUDGETS

    def __init__(self, *args, budget: str = '1x', conv_cfg: Optional[dict] = None,
                 **kwargs) -> None:
        if budget not in self.budgets:
            raise InputError(f'{type(self).__name__} has the budgets '
                             f'{", ".join(map(repr, self.budgets))}, got {budget!r}.')
        if isinstance(conv_cfg or {}, dict):  # else refused below
            kind = (conv_cfg or {}).get('type', KWConv2d)
            if kind not in (KWConv2d, 'KWConv2d'):
                raise InputError(f'{type(self).__name__} is of KWConv2d alone, got conv_cfg of '
                                 f'type {kind}: take ODResNet or ODMobileNetV2 for another layer.')
            conv_cfg = dict(conv_cfg or {}, type=KWConv2d, budget=budget)
        super().__init__(*args, conv_cfg=conv_cfg, **kwargs)

    def make_dynamic(self, pattern: str, conv_cfg: dict) -> List[str]:
        budget = float(fractions.Fraction(conv_cfg.pop('budget').rstrip('x')))
        conv_cfg = {**self.attention_cfg(budget), **conv_cfg}
        shared: Dict[Tuple[Hashable, float], List[str]] = {}
        for name, module in self.named_modules():
            if type(module) is nn.Conv2d and re.fullmatch(pattern, name):
                key = self.warehouse_of(name, budget)
                if key is not None:
                    shared.setdefault(key, []).append(name)
        manager = WarehouseManager()
        for (_, its_budget), names in shared.items():
            shapes = [self.get_submodule(name).weight.shape for name in names]
            warehouse = manager.add(shapes, its_budget)
            replace_convs(self, names.__contains__, dict(conv_cfg, warehouse=warehouse))
        self.warehouse_manager = manager
        return [name for names in shared.values() for name in names]

    def attention_cfg(self, budget: float) -> dict:
        """Arguments of the layers that follow from the budget."""
        return {}

    def warehouse_of(self, name: str, budget: float) -> Optional[Tuple[Hashable, float]]:
        """What stands for the warehouse of that convolution, and its budget; None if static."""
        raise NotImplementedError

    def freeze_whole_stages(self) -> None:
        trained = [layer for layer in self.modules() if isinstance(layer, KWConv2d)
                   and layer.attention.fc1.weight.requires_grad]  # or else somebody froze that
        super().freeze_whole_stages()
        for layer in trained:
            if not layer.attention.fc1.weight.requires_grad:
                layer.warehouse.cells.requires_grad_(False)


@MODELS.register_module()
class KWResNet(WarehouseBackbone, ResNet):
    """KW-ResNet: depth 10, 18, 34, 50, 101 or 152; the release has 18 and 50.

    Takes the arguments of :class:`mmdet.models.ResNet` and of :class:`WarehouseBackbone`. One
    warehouse a stage. The first convolution of a stage and its shortcut share the warehouse of the
    stage before; where there is none, those of bottlenecks are static, as the stem is.
    """

    arch_settings = ARCH_SETTINGS
    dynamic_convs = r'layer\d\.\d+\.(conv\d|downsample\.\d)'

    def attention_cfg(self, budget: float) -> dict:
        return dict(basis_ratio=1 / 16) if budget < 1 and self.block is Bottleneck else {}

    def warehouse_of(self, name: str, budget: float) -> Optional[Tuple[Hashable, float]]:
        found = re.match(r'layer(\d)\.(\d+)\.(\w+)', name)
        if found is None:
            return None
        stage = int(found[1])
        if found[2] == '0' and found[3] in ('conv1', 'downsample'):
            stage -= 1
            if stage == 0 and self.block is not Bottleneck:
                stage = 1
        return (stage, budget) if stage > 0 else None


@MODELS.register_module()
class KWMobileNetV2(WarehouseBackbone, MobileNetV2):
    """KW-MobileNetV2 at the budgets of the release, any widen_factor.

    Takes the arguments of :class:`mmdet.models.MobileNetV2` and of :class:`WarehouseBackbone`.
    Warehouses of 1x1 and of depthwise convolutions for each of six stages, to which the first
    block of the next belongs, and one for the stem. At 1x expansions and projections share theirs.
    At 1/2 the 1x1 convolutions of all stages but the last are static, and all but those of the last
    stage keep a budget of 1.
    """

    budgets = ('1/2', '1x', '4x')
    dynamic_convs = r'conv[12]\.conv|layer\d\.\d+\.\w+_conv\.conv'
    stages = (1, 2, 3, 4, 5, 6, 6)  # of the release, for MMDetection's layer1 to layer7

    def attention_cfg(self, budget: float) -> dict:
        return dict(reduction=1 / 32) if budget < 1 else {}

    def warehouse_of(self, name: str, budget: float) -> Optional[Tuple[Hashable, float]]:
        if name == 'conv1.conv':
            return 'stem', max(budget, 1)
        if name == 'conv2.conv':
            stage, kind = self.stages[-1], 'linear_conv'
        else:
            layer, block, kind = name.split('.')[:3]
            index = int(layer[len('layer'):]) - 1
            stage = self.stages[max(index - 1, 0) if block == '0' else index]
        if kind == 'depthwise_conv':
            return (stage, kind), max(budget, 1)
        if budget < 1 and stage < self.stages[-1]:
            return None
        return (stage, '1x1' if budget == 1 else kind), budget
