"""A detector's config made one with a dynamic backbone."""
import copy
import inspect
import os
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Tuple

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import get_installed_path
from torch import nn

from ..backbones.dynamic import DynamicBackbone
from ..errors import InputError
from ..layers import DynamicConv2d, KWConv2d
from ..layers.odconv import FEW_IMAGES
from .files import kept_meta, provenance

SWAPS = {'ResNet': 'ODResNet', 'ResNetV1d': 'ODResNetV1d', 'ResNeXt': 'ODResNeXt',
         'MobileNetV2': 'ODMobileNetV2'}
WAREHOUSE_SWAPS = {'ResNet': 'KWResNet', 'MobileNetV2': 'KWMobileNetV2'}


def locate_config(name: str) -> Tuple[Path, str]:
    """Path of a config given as a file or as ``mmdet::name``, and what ``_base_`` calls it.

    Raises:
        InputError: if there is none of that name.
    """
    package, found, config = name.rpartition('::')
    if not found:
        if not Path(name).is_file():
            raise InputError(f'Config {name} does not exist: give a file, or mmdet::NAME for one '
                             'of mmdet.')
        return Path(name), str(Path(name).resolve())
    if package != 'mmdet':
        raise InputError(f'Config {name} is of package {package}: give a file, or mmdet::NAME.')
    root = Path(get_installed_path(package)) / '.mim' / 'configs'
    config = config[:-len('.py')] if config.endswith('.py') else config
    paths = sorted(root.glob(f'{config}.py') if '/' in config else root.glob(f'*/{config}.py'))
    if len(paths) != 1:
        raise InputError(f'mmdet has {len(paths)} configs named {config}: give one of '
                         f'{root.name}/ with its folder, such as '
                         'mmdet::retinanet/retinanet_r50_fpn_1x_coco.')
    return paths[0], f'{package}::{paths[0].relative_to(root).as_posix()}'


def base_as_seen_from(out: Path, base: str) -> str:
    """What ``_base_`` of a config at ``out`` calls the base: relative, so that both may be moved.

    Where a link leads to ``out``, MMEngine takes '..' now from the text and now from the disk.
    """
    folder = os.path.abspath(out.parent)
    if '::' in base or folder != os.path.realpath(folder):
        return base
    return os.path.relpath(base, folder)


def swap_backbone(config: Config, kernel_num: Optional[int] = None,
                  init_cfg: Optional[str] = 'StaticPretrained',
                  layer: str = 'ODConv2d') -> dict:
    """What to merge into ``config.model`` so that its backbone is dynamic.

    ResNet, ResNetV1d, ResNeXt and MobileNetV2 become their dynamic kind; another backbone gets
    the layer by ``conv_cfg`` if it takes one.

    Args:
        config: of a static detector; changed by nothing here.
        kernel_num: number of kernels in each bank; the layer's own default where not given.
        init_cfg: what a ``Pretrained`` of the backbone, or of what it is in, becomes; ``None``
            initialises nothing.
        layer: name of a dynamic convolution, such as 'FDConv2d'; 'KWConv2d' makes a ResNet or
            MobileNetV2 its KernelWarehouse kind, at a budget of 1x.

    Raises:
        InputError: with the reason, if the backbone cannot be made dynamic, if there is no such
            layer or it has no ``kernel_num``, or if the config starts from a whole static detector
            that ``init_cfg`` does not convert.
    """
    init_default_scope(config.get('default_scope', 'mmdet'))
    conv_cfg = layer_config(layer, kernel_num)
    if init_cfg is not None and config.get('load_from'):
        raise InputError(f'The config starts from a whole static detector, {config.load_from}: '
                         'give it as --checkpoint, with the config that it was trained with, or '
                         'set load_from=None.')
    batch_size = (config.get('train_dataloader') or {}).get('batch_size')
    changes: dict = {}
    for path, backbone in _backbones(config.get('model') or {}):
        part, given = changes, config.model
        for key in path:
            part.update(_init_of(given, init_cfg))
            part, given = part.setdefault(key, {}), given[key]
        part.update(_change_of(backbone, conv_cfg, batch_size), **_init_of(backbone, init_cfg))
    if not changes:
        raise InputError('The config has no model with a backbone.')
    return changes


def layer_config(layer: str, kernel_num: Optional[int] = None) -> dict:
    """``conv_cfg`` of a dynamic layer, its bank said; InputError if there is none such."""
    cls = _class_of(layer)
    if cls is None or not issubclass(cls, DynamicConv2d):
        known = sorted([KWConv2d.__name__, *(
            name for name, other in MODELS.module_dict.items()
            if isinstance(other, type) and issubclass(other, DynamicConv2d))])
        raise InputError(f'{layer} is no dynamic layer: give one of {", ".join(known)}.')
    parameters = inspect.signature(cls).parameters
    bank = parameters.get('kernel_num')
    if bank is None:
        if kernel_num is not None:
            raise InputError(f'{layer} has no kernel_num, got {kernel_num}: leave it out.')
        return dict(type=layer)
    # Gates that begin at 1 leave a static kernel, and what an optimizer does to it, as it is.
    gates = dict(gate_scale=2) if 'gate_scale' in parameters else {}
    return dict(type=layer, kernel_num=bank.default if kernel_num is None else kernel_num, **gates)


def _class_of(kind: str) -> Optional[type]:
    # Of KernelWarehouse no layer is registered alone, since layers share its cells.
    return KWConv2d if kind == KWConv2d.__name__ else MODELS.get(kind)


def norm_of_few(layer: Any, conv_cfg: dict, batch_size: Optional[int]) -> Dict[str, Any]:
    """``norm_cfg`` of a layer's attention that trains on so many images at once, if few.

    Of few pooled values BatchNorm's statistics are noise, from which a network learns little or
    the wrong thing; LayerNorm asks nothing of the other images.
    """
    takes_norm = isinstance(layer, type) and 'norm_cfg' in inspect.signature(layer).parameters
    if takes_norm and 'norm_cfg' not in conv_cfg and batch_size and batch_size <= FEW_IMAGES:
        return dict(norm_cfg=dict(type='LN'))
    return {}


def layer_name(conv_cfg: dict) -> str:
    """How file names spell a layer and its bank: odconv-k4, dcdconv."""
    name = conv_cfg['type'][:-len('2d')].lower()
    return f'{name}-k{conv_cfg["kernel_num"]}' if 'kernel_num' in conv_cfg else name


def _backbones(model: dict, path: Tuple[str, ...] = ()) -> Iterator[Tuple[Tuple[str, ...], dict]]:
    """Backbones in a model, or in a detector that it wraps, each with the keys that lead to it."""
    for key, value in model.items():
        if isinstance(value, dict):
            if key == 'backbone':
                yield (*path, key), value
            else:
                yield from _backbones(value, (*path, key))


def _init_of(module: dict, init_cfg: Optional[str]) -> Dict[str, object]:
    """What the ``init_cfg`` of a config's module becomes; empty where it stays."""
    given = module.get('init_cfg')
    if init_cfg is None:
        return dict(init_cfg=None) if given is not None else {}
    if isinstance(given, dict) and given['type'] == 'Pretrained':
        return dict(init_cfg=dict(given, type=init_cfg))
    if isinstance(given, (list, tuple)):  # applied in turn: the weights last, as MMEngine does
        others = [dict(cfg) for cfg in given if cfg['type'] != 'Pretrained']
        return dict(init_cfg=[*others, *(dict(cfg, type=init_cfg) for cfg in given
                                         if cfg['type'] == 'Pretrained')])
    return {}


def _change_of(backbone: dict, conv_cfg: dict, batch_size: Optional[int]) -> Dict[str, object]:
    kind = backbone.get('type')
    if kind is None:
        raise InputError("The config's backbone has no type: the model is not one of MMDetection.")
    if isinstance(kind, type):
        raise InputError(f"{kind.__name__} is given as a class, as in MMEngine's pure Python "
                         'configs, from which a text config cannot inherit: give a text config.')
    with MODELS.switch_scope_and_registry(None) as registry:
        cls = registry.get(kind)
    if cls is None:
        raise InputError(f'{kind} is registered nowhere: check it and custom_imports.')
    name = cls.__name__
    if name in SWAPS.values() or 'dynamic_convs' in vars(cls):
        raise InputError(f'{name} is dynamic already.')
    parameters = parameters_of(cls)
    parameter = parameters.get('conv_cfg')
    static = backbone.get('conv_cfg', getattr(parameter, 'default', None))
    if isinstance(static, dict):
        raise InputError(f'{name} has conv_cfg={static["type"]} already.')
    layer = _class_of(conv_cfg['type'])
    norm_eval = backbone.get('norm_eval', getattr(parameters.get('norm_eval'), 'default', False))
    norm = {} if norm_eval else norm_of_few(layer, conv_cfg, batch_size)
    if layer is KWConv2d:
        if name not in WAREHOUSE_SWAPS:
            raise InputError(f'{name} has no KernelWarehouse kind, which '
                             f'{" and ".join(WAREHOUSE_SWAPS)} have: give another layer.')
        dynamic = WAREHOUSE_SWAPS[name]
        return dict(_defaults_of(cls, MODELS.get(dynamic), backbone), type=dynamic,
                    **(dict(conv_cfg=norm) if norm else {}))
    conv_cfg = {**conv_cfg, **norm}
    if name in SWAPS:
        kept = _defaults_of(cls, MODELS.get(SWAPS[name]), backbone)
        return dict(kept, type=SWAPS[name], conv_cfg=conv_cfg)
    if backbone.get('dcn') is not None:  # mmdet's blocks assert that one of them is None
        raise InputError(f'{name} has dcn, and takes no conv_cfg with it.')
    if parameter is not None:
        return dict(conv_cfg=conv_cfg)
    raise InputError(f'{name} takes no conv_cfg.')


def parameters_of(cls: type) -> Dict[str, inspect.Parameter]:
    """Of a backbone and, as many leave what they share to their bases' signatures, of those."""
    return {name: parameter for base in reversed(cls.__mro__) if '__init__' in vars(base)
            for name, parameter in inspect.signature(
                base.__init__).parameters.items()}  # type: ignore[misc]


def _defaults_of(cls: type, dynamic: type, given: dict) -> Dict[str, object]:
    """What a backbone of MMPose or MMPretrain does by default and mmdet's of that name does not."""
    if issubclass(dynamic, cls):
        return {}
    theirs, ours = parameters_of(cls), parameters_of(next(
        base for base in dynamic.__mro__ if base.__name__ == cls.__name__))
    unknown = sorted(given.keys() - ours.keys() - {'type', '_scope_', '_delete_'})
    if unknown:
        raise InputError(f"{cls.__name__} has {', '.join(unknown)}, which {dynamic.__name__} of "
                         'MMDetection does not take: take it out of the config.')
    return {name: parameter.default for name, parameter in theirs.items()
            if name in ours and name not in given and name != 'init_cfg'
            and parameter.default not in (parameter.empty, ours[name].default)}


def make_static(config: dict) -> None:
    """Take the dynamic convolutions and backbones out of a model's config, in place."""

    def bases(value):
        kind = value.get('type') if isinstance(value, dict) else None
        kind = _class_of(kind) if isinstance(kind, str) else kind
        return kind.__mro__ if isinstance(kind, type) else ()

    if DynamicBackbone in bases(config):
        dynamic, *_ = bases(config)
        config['type'] = static = bases(config)[bases(config).index(DynamicBackbone) + 1]
        _name_size(config, dynamic, static)
        for argument in ('budget', 'kernel_num', 'reduction', 'init', 'dynamic_convs',
                         'frozen_except'):
            config.pop(argument, None)
        if 'type' not in (config.get('conv_cfg') or {'type': None}):
            del config['conv_cfg']  # arguments of the layer that the backbone itself names
    for key, value in list(config.items()):
        if DynamicConv2d in bases(value):
            del config[key]
            continue
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(part, dict):
                make_static(part)


def _name_size(backbone: dict, dynamic: type, static: type) -> None:
    """Ask the static class for what the dynamic one has under the same or another name."""
    parameters = inspect.signature(static).parameters
    for argument in {'arch', 'depth'} & parameters.keys():
        size = backbone.get(argument, parameters[argument].default)
        wanted = dynamic.arch_settings.get(size)  # type: ignore[attr-defined]
        found = [name for name, settings in static.arch_settings.items()  # type: ignore[attr-defined]
                 if settings == wanted]
        if not found:
            raise InputError(f'{static.__name__} has nothing like {dynamic.__name__} of '
                             f'{argument}={size!r}: give another {argument}.')
        backbone[argument] = found[0]


def build_model(config: Config) -> nn.Module:
    """The model of a config, with weights as constructed."""
    init_default_scope(config.get('default_scope', 'mmdet'))
    if not config.get('model'):
        raise InputError(f'{config.filename} has no model: give the config of a detector.')
    model = copy.deepcopy(config.model)  # some detectors change what they are given
    if config.get('data_preprocessor') is not None:
        model.setdefault('data_preprocessor', config.data_preprocessor)
    return MODELS.build(model)


def importing_plugin(config: Config) -> Dict[str, Any]:
    """The config's ``custom_imports``, a name or a list in MMEngine, with the plugin in it."""
    given = config.get('custom_imports') or dict(imports=[], allow_failed_imports=False)
    names = given['imports']
    names = [names] if isinstance(names, str) else list(names)
    return given if 'mmdet_odconv' in names else dict(given, imports=[*names, 'mmdet_odconv'])


def dynamic_config(config: Config, base: str, changes: dict, load_from: Optional[Path]) -> str:
    """Text of a config that says only how it differs from its static ``base``."""
    imports = importing_plugin(config)
    hooks = [hook.to_dict() for hook in config.get('custom_hooks') or []]
    given: Dict[str, Any] = {}
    if imports != config.get('custom_imports'):
        given['custom_imports'] = imports
    if not any(hook['type'] == 'InputCheckHook' for hook in hooks):
        given['custom_hooks'] = [*hooks, dict(type='InputCheckHook')]
    given['model'] = _replacing(changes, config.model)
    if load_from is not None:
        given['load_from'] = str(load_from)
        if config.get('resume'):
            given['resume'] = False  # a converted checkpoint is where training starts
    return f'_base_ = {base!r}\n\n{Config(given).pretty_text}'


def _replacing(changes: dict, base: dict) -> dict:
    """``changes`` that say where a dict replaces what is none in ``base``."""
    marked = {}
    for key, value in changes.items():
        if isinstance(value, dict):
            inside = base.get(key)
            value = (_replacing(value, inside) if isinstance(inside, dict) else
                     dict(_delete_=True, **value) if key in base else value)
        marked[key] = value
    return marked


def converted(model: nn.Module, config: Config, checkpoint: dict, source: str, tool: str) -> dict:
    """Checkpoint of ``model``, which was inflated from ``source``: no optimizer, own config."""
    return dict(meta=dict(kept_meta(checkpoint), cfg=config.pretty_text,
                          provenance=provenance(source, tool)),
                state_dict=model.state_dict())
