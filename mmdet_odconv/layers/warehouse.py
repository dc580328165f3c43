"""KernelWarehouse: Rethinking Dynamic Convolution, Li and Yao, ICML 2024.

https://arxiv.org/abs/2406.07879
"""
import dataclasses
import math
from typing import Dict, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..ops import convolve_images, mix_cells, mixture_count, split_into_cells
from ..ops.kernels import sum_dtype
from .attention import Attention, PooledLinear, hidden_channels
from .base import DynamicConv2d, PaddingMode, in_range, on_banks
from .odconv import build_pooled_norm, normalise_pooled

MIN_HIDDEN_CHANNELS = 16
MIN_BASIS = 16
EPSILON = 1e-3


class WarehouseManager(nn.Module):
    """The warehouses of a network, which holds this module once, after the layers that share them.

    ``weights`` are the warehouses' cells, (n, co, ci, 1, 1) each. ``tau``, from 1 to 0, is how much
    of every mixture is yet fixed (:func:`set_warm_up`); files without it, as the release's, are of
    trained networks, where it is 0.
    """

    tau: Tensor
    takes_static = False  # whether the cells come from static kernels that the layers are loading

    def __init__(self, device=None, dtype=None) -> None:
        super().__init__()
        self.weights = nn.ParameterList()
        self.register_buffer('tau', torch.zeros((), device=device, dtype=dtype))

    def add(self, kernel_shapes: Sequence[torch.Size], budget: float = 1) -> 'Warehouse':
        """A new warehouse for convolutions with kernels of these shapes.

        Its cells are as large as divides all kernels, co x ci x 1 x 1, and half that each way
        (where it is even) for a ``budget`` below 1; they are ``budget`` times as many as the
        kernels have.

        Args:
            kernel_shapes: (Cout, Cin / groups, kh, kw) of each, in the order in which the layers
                will be constructed.
            budget: b, a whole number or one over a whole number.

        Raises:
            ValueError: for another budget.
        """
        if not budget > 0 or not any(math.isclose(share, round(share))
                                     for share in (budget, 1 / budget)):
            raise ValueError('budget must be a whole number or one over a whole number, got '
                             f'{budget}')
        sides = [math.gcd(*(shape[axis] for shape in kernel_shapes)) for axis in (0, 1)]
        if budget < 1:
            sides = [side if side % 2 else side // 2 for side in sides]
        cell_shape = (*sides, 1, 1)
        cells = sum(own_cells(mixture_count(shape, cell_shape), budget) for shape in kernel_shapes)
        tau = self.tau
        self.weights.append(nn.Parameter(
            torch.empty(cells, *cell_shape, device=tau.device, dtype=tau.dtype)))
        return Warehouse(self, len(self.weights) - 1, budget)

    def init_weights(self) -> None:
        """Nothing is fixed, until a hook says so: of cells, the layers have their own."""
        self.tau.zero_()

    def _apply(self, fn, *args, **kwargs):
        return super()._apply(on_banks(fn), *args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        if self.takes_static:  # the layers have filled it
            state_dict.update(self.state_dict(prefix=prefix))
        device = None if self.tau.is_meta else self.tau.device  # assigned, it is to be somewhere
        state_dict.setdefault(prefix + 'tau', torch.zeros((), dtype=self.tau.dtype, device=device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@dataclasses.dataclass
class Warehouse:
    """One warehouse as its layers know it: no module, so that each parameter is registered once."""

    manager: WarehouseManager
    index: int
    budget: float
    taken: int = 0  # cells that have been some layer's own

    @property
    def cells(self) -> nn.Parameter:
        """(n, co, ci, 1, 1)."""
        return self.manager.weights[self.index]

    def assign(self, count: int) -> Tuple[slice, Tensor]:
        """The next layer's own cells, and beta, (count, n): the cell that each mixture begins as.

        For a budget of b >= 1 each mixture begins as the first of b cells; below 1, one in
        r = 1 / b mixtures has a cell, and the others begin as zeros.
        """
        cells = len(self.cells)
        own = slice(self.taken, self.taken + own_cells(count, self.budget))
        if own.stop > cells:
            raise ValueError(f'a warehouse of {cells} cells has none left for one more layer of '
                             f'{count} mixtures: give all kernel_shapes when it is added')
        self.taken = own.stop
        return own, self.beta(count, own)

    def beta(self, count: int, own: slice) -> Tensor:
        """The beta of a layer of so many mixtures with these cells of its own."""
        step, each = max(int(self.budget), 1), inverse(self.budget)
        having = [i for i in range(count) if i % each == i // each % each]
        beta = torch.zeros(count, len(self.cells))
        beta[having, range(own.start, own.stop, step)] = 1
        return beta


def own_cells(count: int, budget: float) -> int:
    """How many cells of its warehouse are a layer's own, of ``count`` mixtures: b times as many.

    Below 1 the first of every r mixtures has one, then the second of the next r, and so on, which
    is more than b * count where r * r does not divide it.
    """
    each = inverse(budget)
    return max(int(budget), 1) * sum(i % each == i // each % each for i in range(count))


def inverse(budget: float) -> int:
    """r = 1 / b for a budget below 1, else 1."""
    return max(round(1 / budget), 1)


class KWConv2d(DynamicConv2d):
    r"""Convolution whose kernel is put together from mixtures of a warehouse's cells.

    Every cell :math:`w_i` of the kernel of an image x is, by the paper's contrasting-driven
    attention function,

    .. math:: w_i = \sum_j \alpha_{ij} e_j, \qquad
              \alpha_{ij} = \tau \beta_{ij} + (1 - \tau)
              \frac{z_{ij}(x)}{\sum_p |z_{ip}(x)| + 10^{-3}}

    over all cells e of the warehouse, which other layers mix too. Mixing costs n |W| multiply-adds
    an image, |W| the elements of the kernel, whatever the resolution.

    It belongs into a backbone (``KWResNet``), which knows what shares a warehouse, and is in no
    registry: no ``conv_cfg`` could say that.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as in :class:`torch.nn.Conv2d`.
        warehouse: of :meth:`WarehouseManager.add`; the layer takes the next of its cells.
        reduction: the attention's hidden width is max(int(Cin * reduction), 16); in (0, 1].
        basis_ratio: below 1, the logits of other layers' cells are linear in
            max(int(their number * basis_ratio), 16) values, which saves parameters.
        norm_cfg: normalisation inside the attention, as :class:`ODConv2d` takes it.

    Raises:
        ValueError: if an argument is out of range.
    """

    attention: 'CellAttention'
    filters = {}  # the cells, which other layers mix too, take no norm
    has_temperature = False  # but the warehouse's tau

    def __init__(self,
                 in_channels: int,
                 out_channels: int,
                 kernel_size,
                 stride=1,
                 padding=0,
                 dilation=1,
                 groups: int = 1,
                 bias: bool = True,
                 padding_mode: PaddingMode = 'zeros',
                 device=None,
                 dtype=None,
                 *,
                 warehouse: Warehouse,
                 reduction: float = 1 / 16,
                 basis_ratio: float = 1.0,
                 norm_cfg: Optional[dict] = None) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                         bias, padding_mode, device, dtype, kernel_num=1, init='he')
        if not basis_ratio > 0:
            raise ValueError(f'basis_ratio must be greater than 0, got {basis_ratio}')
        self.warehouse = warehouse
        cell_shape = warehouse.cells.shape[1:3]
        if any(size % side for size, side in zip(self.kernel_shape, cell_shape)):
            raise ValueError(f'a kernel of shape {tuple(self.kernel_shape)} is not made of cells '
                             f'of {tuple(cell_shape)}: give its shape to the warehouse when it is '
                             'added')
        count = mixture_count(self.kernel_shape, warehouse.cells.shape[1:])
        self.own, beta = warehouse.assign(count)
        self._set_attention(CellAttention(in_channels, beta, self.own, reduction, basis_ratio,
                                          norm_cfg), device, dtype)
        self.reset_parameters()

    def make_bank(self, device, dtype) -> None:
        self.register_parameter('weight', None)  # it is in the warehouse

    def reset_parameters(self) -> None:
        """The layer's own cells, by He initialisation of them all as one kernel, as released."""
        if hasattr(self, 'own'):  # else the base class, which knows of no cells, is at work
            cells = self.warehouse.cells.detach()[self.own]
            nn.init.kaiming_normal_(cells.flatten(0, 1), mode='fan_out', nonlinearity='relu')
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def inflate(self, kernel: Tensor, bias: Optional[Tensor] = None) -> None:
        """Compute what a static convolution computes, on every input, and learn from there.

        The attention answers every input with beta, one cell to each mixture, and that cell is the
        kernel's, where tau is 0; during a warm-up it is up to a thousandth more. The other cells of
        a budget above 1 stay as they are.

        Args:
            kernel, bias: see :meth:`DynamicConv2d.inflate`.

        Raises:
            ValueError: also for a budget below 1, whose cells are fewer than the kernels'.
        """
        if self.warehouse.budget < 1:
            raise ValueError(f'a warehouse of budget {self.warehouse.budget:g} has fewer cells '
                             'than the static kernels: take a budget of 1x or more, which has as '
                             'many')
        super().inflate(kernel, bias)

    def fill_bank(self, kernel: Tensor, multiple: float) -> None:
        cells = self.warehouse.cells
        static = split_into_cells(kernel.to(cells), cells.shape[1:])
        cells[self.own][::int(self.warehouse.budget)] = static / multiple

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        if prefix + 'weight' in state_dict and not self.takes_static:
            # Raised, because MMEngine only logs what torch would collect, and trains on.
            raise InputError(
                f'{prefix[:-1] or type(self).__name__} mixes its kernel from a warehouse, but the '
                'checkpoint holds a weight of its own: give weights of the same dynamic network, '
                "convert static ones (init_cfg=dict(type='StaticPretrained', checkpoint=...)), or "
                'give none (init_cfg=None, frozen_stages=-1) to train from scratch.')
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        like = self.attention.fc1.weight
        # What is on 'meta' yet may be assigned from the file.
        self._place_beta(state_dict.get(prefix + 'attention.fc1.weight', like) if like.is_meta
                         else like)

    def init_weights(self) -> None:
        self._place_beta(self.attention.fc1.weight)
        super().init_weights()

    def _place_beta(self, like: Tensor) -> None:
        """Make anew what is in no file, and of a layer made on 'meta' nowhere else."""
        self.attention.beta = self.warehouse.beta(self.attention.mixtures, self.own).to(like)

    def convolve(self, x: Tensor, padding, *,  # type: ignore[override]  # of its own attention
                 cell_attention: Tensor) -> Tensor:
        beta, tau = self.attention.beta, self.warehouse.manager.tau
        attention = cell_attention + tau * (beta - cell_attention)
        cells = self.warehouse.cells
        dtype = sum_dtype(cells.dtype)
        kernels = in_range(mix_cells, attention.to(dtype), cells.to(dtype), self.kernel_shape)
        kernels = kernels.to(x.dtype)
        return convolve_images(x, kernels, self.stride, padding, self.dilation, self.groups,
                               self.bias)

    def extra_repr(self) -> str:
        """As of the other layers, with what it takes from its warehouse in the place of a bank."""
        cells = self.warehouse.cells
        return super().extra_repr().replace(
            f'kernel_num={self.kernel_num}', f'mixtures={len(self.attention.beta)}, warehouse='
            f'{self.warehouse.index}, cells={len(cells)}x{tuple(cells.shape[1:3])}')


class CellAttention(Attention):
    """Attention over the cells of a warehouse for every cell of a kernel.

    fc1 -> norm -> ReLU -> fc2, m x (n + 1) values, divided by the sum of their moduli for each of
    the m mixtures: signed, unlike a softmax. The last of the n + 1 is of a cell of zeros. With a
    basis, fc2 answers for the layer's own cells alone and fc3 maps a few values more to the others.
    """

    beta: Tensor

    def __init__(self, in_channels: int, beta: Tensor, own: slice, reduction: float,
                 basis_ratio: float, norm_cfg: Optional[dict]) -> None:
        super().__init__()
        self.register_buffer('beta', beta, persistent=False)
        self.mixtures, cells = beta.shape
        self.own = own
        hidden = hidden_channels(in_channels, reduction, MIN_HIDDEN_CHANNELS)
        self.fc1 = MatrixLinear(in_channels, hidden, bias=False)
        self.norm1 = build_pooled_norm(norm_cfg or dict(type='BN'), hidden)
        self.fc3: Optional[MatrixLinear] = None
        count = own.stop - own.start
        if basis_ratio < 1 and cells > count:
            basis = max(int((cells - count) * basis_ratio), MIN_BASIS)
            self.fc2 = MatrixLinear(hidden, self.mixtures * (count + basis + 1), bias=False)
            self.fc3 = MatrixLinear(basis, cells - count, bias=False)
            self.basis_bias = nn.Parameter(torch.zeros(self.mixtures * (cells + 1)))
        else:
            self.fc2 = MatrixLinear(hidden, self.mixtures * (cells + 1))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.fc3 is not None:
            nn.init.zeros_(self.basis_bias)

    def reset_to_constant(self) -> float:
        """Answer every input with beta, times what is returned."""
        self.fc2.reset_to_zero()
        bias = self.fc2.bias if self.fc3 is None else self.basis_bias
        bias.detach().view(self.mixtures, -1)[:, :-1] = self.beta
        return 1 / (1 + EPSILON)

    def forward(self, average: Tensor, temperature: float) -> Dict[str, Tensor]:
        """Attention (B, m, n) of maps with this average, (B, Cin); it has no temperature."""
        hidden = F.relu(normalise_pooled(self.norm1, self.fc1(average)))
        logits = self.fc2(hidden)
        logits = logits.reshape(-1, self.mixtures, logits.shape[1] // self.mixtures)
        if self.fc3 is not None:
            count = self.own.stop - self.own.start
            own, basis, zero = logits.split([count, self.fc3.in_channels, 1], 2)
            others = self.fc3(basis)
            logits = torch.cat([others[..., :self.own.start], own, others[..., self.own.start:],
                                zero], 2)
            logits = logits + self.basis_bias.view(self.mixtures, -1)
        attention = logits / (logits.abs().sum(2, keepdim=True) + EPSILON)
        return dict(cell_attention=attention[..., :-1])


class MatrixLinear(PooledLinear):
    """Stored as the matrix, (Cout, Cin), that this release has."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.weight = nn.Parameter(self.weight.detach().flatten(1))


def set_warm_up(model: nn.Module, tau: float) -> int:
    """Set how much of the mixtures of every warehouse in ``model`` is fixed: tau.

    Returns:
        How many managers of warehouses there are.

    Raises:
        ValueError: if it is not from 0 to 1.
    """
    if not 0 <= tau <= 1:
        raise ValueError(f'tau must be from 0 to 1, got {tau}')
    managers = [module for module in model.modules() if isinstance(module, WarehouseManager)]
    for manager in managers:
        manager.tau.fill_(tau)
    return len(managers)
