"""Static networks made dynamic without a change of their output."""
import contextlib
import re
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Union

from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.model.weight_init import PretrainedInit, update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import Tensor, nn

from ..errors import InputError
from ..layers import DynamicConv2d, ODConv2d, replace_convs
from .files import read_weights
from .published import few, strip_prefix

Patterns = Union[str, Sequence[str]]

# Whole names of what is best left static, in the words of torchvision, timm and MMDetection.
STATIC = (
    r'(.*\.)?(conv_)?stem\w*(\..*)?', r'(.*\.)?patch_embed\w*(\..*)?',  # stems
    r'(.*\.)?(downsample|shortcut|skip)\w*(\..*)?',  # shortcuts
    r'(.*\.)?\w*(head|classifier|predictor)\w*(\..*)?', r'(.*\.)?fc(\..*)?',  # heads
)
IMAGE_CHANNELS = 4


def to_dynamic(model: nn.Module,
               conv_cfg: dict,
               include: Patterns = '.*',
               exclude: Optional[Patterns] = None) -> nn.Module:
    """Replace static convolutions of any torch model, in place, by dynamic ones of equal output.

    ``to_dynamic(torchvision.models.resnet50(), dict(type='ODConv2d', kernel_num=4))`` computes
    what it computed before, in training and evaluation mode, and learns on from there.

    Args:
        model: the model; its convolutions keep their mode, dtype and device, and stay frozen where
            they were. Subclasses of :class:`torch.nn.Conv2d` are left alone.
        conv_cfg: the layer, e.g. ``dict(type='ODConv2d', kernel_num=4, gate_scale=2)``, whose bank
            begins as the static kernel, and not as 4 or 8 times it.
        include: regular expression or several; convolutions whose whole name, such as
            'backbone.layer1.0.conv2', matches one become dynamic,
        exclude: unless it matches one of these. By default stems (a convolution that reads an
            image of up to 4 channels, whatever its name, among them), shortcuts and heads, by
            the names that torchvision, timm and MMDetection give them; ``()`` excludes nothing.

    Returns:
        ``model``.

    Raises:
        ValueError: if no convolution is left to replace, if a pattern is no regular expression,
            if ``conv_cfg`` names no dynamic convolution, or if a convolution has hooks or shares
            its weight with another. ``model`` is then as it was.
    """
    included = _compile(include)
    spares_stem = exclude is None
    excluded = _compile(STATIC if exclude is None else exclude)
    names: Dict[nn.Conv2d, List[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Conv2d and name:
            names.setdefault(module, []).append(name)

    def matches(patterns: List[re.Pattern], conv: nn.Conv2d) -> bool:
        return any(pattern.fullmatch(name) for pattern in patterns for name in names[conv])

    chosen = {name for conv in names for name in names[conv]
              if matches(included, conv) and not matches(excluded, conv)
              and not (spares_stem and conv.in_channels <= IMAGE_CHANNELS)}
    if not chosen:
        found = few([name for of_conv in names.values() for name in of_conv]) or 'it has none'
        raise ValueError(f'of the {len(names)} nn.Conv2d in {type(model).__name__} include chooses '
                         f'none that exclude leaves: {found}')
    replace_convs(model, chosen.__contains__, conv_cfg, inflate=True)
    return model


def _compile(patterns: Patterns) -> List[re.Pattern]:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    try:
        return [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise ValueError(f'{error.pattern!r} is no regular expression ({error}).') from error


def load_static(model: nn.Module, state: Mapping[str, Tensor], strict: bool = False) -> List[str]:
    """Load weights of a static network into the dynamic one of the same shape: same outputs.

    Args:
        model: a dynamic backbone or detector.
        state: of the static one, under MMDetection's or torchvision's names.
        strict: refuse weights that leave any tensor of ``model`` unset, or that the parts which
            ``model`` has would leave out; else, what has no place among dynamic layers may keep
            its initialisation, and one line of the log names it.

    Returns:
        Names of the weights that were left out.

    Raises:
        InputError: that names dynamic layers without a static kernel, or kernels of another shape.
    """
    kind = type(model).__name__
    layers = {name: module for name, module in model.named_modules()
              if isinstance(module, DynamicConv2d)}
    if not layers:
        raise InputError(f'{kind} has no dynamic convolution to inflate: give a dynamic config.')
    state = strip_prefix(state, 'module.')
    try:
        with _inflating([m for m in model.modules() if hasattr(m, 'takes_static')]):
            result = model.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:
        shapes = re.findall(r'size mismatch for (.+?): copying a param with shape '
                            r'torch.Size\((.+?)\) .* torch.Size\((.+?)\)', str(error))
        if not shapes:
            raise
        raise InputError(f'{len(shapes)} tensors of the static weights have another shape than in '
                         f'{kind}, the first {shapes[0][0]}, {shapes[0][1]} where {shapes[0][2]} '
                         'was expected: give weights of the same network.') from error
    missing = [name for name in result.missing_keys if not name.endswith('num_batches_tracked')]
    without = [name for name in layers if any(key.startswith(f'{name}.') for key in missing)]
    if without:
        raise InputError(f'{len(without)} of the {len(layers)} dynamic layers of {kind} have no '
                         f'static counterpart: {few(without)}; give weights of the same network.')
    if missing and strict:
        raise InputError(f'The static weights lack {len(missing)} tensors of {kind}: '
                         f'{few(missing)}; give weights of the same network.')
    parts = dict(model.named_children())
    surplus = [name for name in result.unexpected_keys if name.split('.')[0] in parts]
    if surplus and strict:
        raise InputError(f'{kind} has no place for {len(surplus)} of the static weights: '
                         f'{few(surplus)}; give weights of the same network.')
    message = f'{kind}: {len(layers)} dynamic layers inflated from static kernels'
    for names, what in ((missing, 'as initialised, for want of weights'),
                        (result.unexpected_keys, 'left out, unknown here')):
        if names:
            message += f'; {what}: {few(names)}'
    if any(isinstance(layer, ODConv2d) and layer.attention.gate_scale == 1
           for layer in layers.values()):
        message += ("; gates of 1/2 ask for banks of four or eight times these kernels, which a "
                    'learning rate changes less: conv_cfg=dict(gate_scale=2) has them as they are')
    print_log(f'{message}.', logger='current')
    return result.unexpected_keys


@contextlib.contextmanager
def _inflating(layers) -> Iterator[None]:
    for layer in layers:
        layer.takes_static = True
    try:
        yield
    finally:
        for layer in layers:
            del layer.takes_static


@WEIGHT_INITIALIZERS.register_module(name='StaticPretrained')
class StaticPretrainedInit(PretrainedInit):
    """Weights of a static network for the dynamic one of the same shape.

    ``init_cfg=dict(type='StaticPretrained', checkpoint='torchvision://resnet50')``.

    Args:
        checkpoint, prefix, map_location: as MMEngine's ``Pretrained`` takes them; of a whole
            detector's file, a dynamic backbone finds its part without a prefix.

    In a list of initialisers it comes last, since MMEngine applies them in turn.
    """

    def __call__(self, module: BaseModule) -> None:
        # MMEngine initialises children last, but for its own Pretrained: not over these weights.
        for child in module.children():
            if hasattr(child, 'init_weights') and not getattr(child, 'is_init', False):
                child.init_weights()
            child.is_init = True
        state, _ = read_weights(self.checkpoint, self.map_location)
        if self.prefix:
            prefix = self.prefix.rstrip('.') + '.'  # with a dot or without, as Pretrained has it
            state = {name[len(prefix):]: tensor for name, tensor in state.items()
                     if name.startswith(prefix)}
            if not state:
                raise InputError(f'Checkpoint {self.checkpoint} has no weights whose names begin '
                                 f'with {prefix}')
        load_static(module, state)
        if hasattr(module, '_params_init_info'):
            update_init_info(module, init_info=self._get_init_info())
