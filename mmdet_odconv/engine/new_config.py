"""A short config that trains a supplied detector on a data set of one's own."""
import contextlib
import copy
import io
import json
import math
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from torch import Tensor

from ..backbones.dynamic import DynamicBackbone
from ..checkpoints import read_weights
from ..checkpoints.files import refuse_existing, writing
from ..checkpoints.swapping import (
    base_as_seen_from,
    importing_plugin,
    locate_config,
    norm_of_few,
    parameters_of,
)
from ..errors import InputError
from ..layers import DynamicConv2d
from ..names import CONFIGS, find_config
from .data_check import check_images, find_faults, reads_coco, unwrapped
from .data_sets import (
    Split,
    check_categories,
    convert_voc,
    find_splits,
    nested,
    read_split,
    set_num_classes,
)

FEW = 10  # boxes of a class, fewer than which hardly teach it
LOADERS = dict(train='train_dataloader', val='val_dataloader', test='test_dataloader')


class NewConfig(NamedTuple):
    """What was found in a data set, and what looks wrong."""
    splits: Dict[str, Split]
    classes: Tuple[str, ...]
    written: List[Path]
    warnings: List[str]


def new_config(data: Path, base: str, out: Path, weights: Optional[str] = None,
               force: bool = False) -> NewConfig:
    """Write a config that trains ``base`` on ``data``, and say what looks wrong.

    The file is known to load, and its data sets to be read, before it is there.

    Args:
        data: a folder in COCO format (:data:`~.data_sets.LAYOUTS`) or in Pascal VOC's, to which
            COCO annotations are added.
        base: a file, the name of one of the plugin's configs, or ``mmdet::NAME``.
        out: the config to write.
        weights: what training starts from. A checkpoint's file or URL; an address such as
            ``torchvision://resnet50``, for the backbone; 'none', to train it from scratch;
            ``None``, what the base says.
        force: replace ``out`` if it exists.

    Raises:
        InputError: for data that cannot be trained on, a base that this is not possible with, or
            weights that cannot be read.
    """
    if out.suffix != '.py':
        raise InputError(f'{out} is no name of a config: give one in .py, such as {out}.py.')
    refuse_existing(out, force)
    if not data.is_dir():
        raise InputError(f'{data} is no directory: give the folder of a data set in COCO or '
                         "Pascal VOC format, with its images and their annotations.")
    path, name = _locate(base, out)
    if path.resolve() == out.resolve():
        raise InputError(f'{out} is the base itself: give another name to --out.')
    config = _read(path, base)
    written = convert_voc(data)
    folders = find_splits(data)
    splits = {split: read_split(data / annotations)
              for split, (annotations, _) in folders.items()}
    classes, warnings = _classes(splits)
    if not classes:
        raise InputError(f'{data / folders["train"][0]} has {len(splits["train"].boxes)} '
                         'categories, and no split a box of any: give a data set with objects to '
                         'learn.')
    start, said = _start(config, weights)
    text = _text(config, name, data, folders, classes, start)
    with writing(out, force) as temporary:
        temporary.write_text(text, encoding='utf-8')
        made = Config.fromfile(temporary)
        warnings += _faults_of(made, folders)
    return NewConfig(splits, classes, written, [
        *warnings, *_shared(data, folders), *said, *_length(made, splits['train'])])


def _locate(base: str, out: Path) -> Tuple[Path, str]:
    """Path of the base, and what the new config's ``_base_`` calls it."""
    if '::' not in base and not Path(base).is_file():
        path = find_config(base if base.endswith('.py') else f'{base}.py')
        return path, f'mmdet_odconv::{path.relative_to(CONFIGS.resolve()).as_posix()}'
    path, name = locate_config(base)
    return path, base_as_seen_from(out, name)


def _read(path: Path, base: str) -> Config:
    """The base, if it is one that trains and evaluates a detector, and can be inherited from."""
    if Config._is_lazy_import(str(path)):
        raise InputError(f"{base} is one of MMEngine's pure Python configs, from which a text "
                         'config cannot inherit: give a text config.')
    config = Config.fromfile(path)
    for key in ('model', *LOADERS.values(), 'val_evaluator', 'test_evaluator'):
        if not config.get(key):
            raise InputError(f'{base} has no {key}: give the config of a detector that is trained, '
                             'validated and tested.')
    return config


def _classes(splits: Dict[str, Split]) -> Tuple[Tuple[str, ...], List[str]]:
    """Classes to learn, and what is to be said of them."""
    train = splits['train'].boxes
    used = {name for split in splits.values() for name, boxes in split.boxes.items() if boxes}
    classes = tuple(name for name in train if name in used)
    for split, found in splits.items():
        check_categories(split, [name for name in found.boxes if name in used], classes)
    warnings = []

    def say(names: List[str], what: str) -> None:
        if names:
            warnings.append(f'{", ".join(names)} {what}')

    say([name for name in train if name not in classes], 'without a box in any split: left out')
    for split, found in splits.items():
        say([name for name in classes if not found.boxes[name]], f'without a box in {split}')
    say([f'{name} ({train[name]})' for name in classes if 0 < train[name] < FEW],
        f'with fewer than {FEW} boxes to learn from')
    return classes, warnings


def _start(config: Config, weights: Optional[str]) -> Tuple[Dict[str, Any], List[str]]:
    """What the new config says of where training starts, and warnings."""
    backbone = config.model.get('backbone', {})
    if weights is not None and not backbone:
        raise InputError(f"The base's model ({config.model.get('type')}) has no backbone of its "
                         'own to start from weights or from none: leave --weights out.')
    cls = MODELS.get(backbone['type']) if 'type' in backbone else None
    conv_cfg = {**getattr(cls, 'dynamic_conv_cfg', {}), **(backbone.get('conv_cfg') or {})}
    layer = conv_cfg.get('type')
    layer = MODELS.get(layer) if isinstance(layer, str) else layer
    is_dynamic = any(isinstance(part, type) and issubclass(
        part, (DynamicBackbone, DynamicConv2d)) for part in (cls, layer))
    # Of an attention that is not loaded, but learns anew.
    norm = norm_of_few(layer, conv_cfg, config.train_dataloader.get('batch_size')) if (
        is_dynamic) else {}
    # As the class has them where the config is silent.
    defaults = {name: parameter.default for name, parameter in (
        parameters_of(cls) if isinstance(cls, type) else {}).items()}
    given = {**defaults, **backbone}
    if weights is None:
        init = backbone.get('init_cfg') or {}
        file = init.get('checkpoint', '') if isinstance(init, dict) else ''
        missing = file and '://' not in file and not Path(file).is_file()
        anew = not init and not config.get('load_from') and not given.get('norm_eval')
        return dict(backbone=dict(conv_cfg=norm)) if anew and norm else {}, [
            f'the base starts from {file}, which is not here: put it there, or choose another '
            'start with --weights'] if missing else []
    # A detector's weights, which the base may start from, would come over a backbone's.
    no_detector = dict(load_from=None) if config.get('load_from') else {}
    if weights == 'none':
        # EfficientNet counts its stages from 1, so that 0 is none.
        none_frozen = 0 if defaults.get('frozen_stages') == 0 else -1
        start: Dict[str, Any] = {'init_cfg': None, **{
            key: value for key, value in (('frozen_stages', none_frozen), ('norm_eval', False))
            if given.get(key, value) != value}}
        if (backbone.get('norm_cfg') or {}).get('requires_grad') is False:
            start['norm_cfg'] = dict(requires_grad=True)
        if norm:
            start['conv_cfg'] = norm
        return dict(backbone=start, **no_detector), []
    state = {} if '://' in weights else read_weights(weights)[0]
    inflated = is_dynamic and not any(
        _is_dynamic(name, tensor) for name, tensor in state.items())
    prefixed = any(key.startswith('backbone.') for key in state)
    # So are the names of MMPretrain's classifiers, whose head is no detector's.
    is_classifier = not prefixed or any(key.startswith('head.') for key in state)
    if weights.startswith(('http://', 'https://')) or not is_classifier:
        if inflated and state:
            raise InputError(f'{weights} is of a static detector, where the base has dynamic '
                             'convolutions: make it dynamic by mmdet_odconv swap-backbone '
                             f'ITS_CONFIG --checkpoint {weights} --out FILE.py, and give '
                             'new-config that FILE.py and FILE.pth.')
        return dict(backbone=dict(init_cfg=None), load_from=weights), []
    start = dict(init_cfg=_in_place(backbone, dict(
        type='StaticPretrained' if inflated else 'Pretrained', checkpoint=weights,
        **(dict(prefix='backbone.') if prefixed else {}))))
    # Gates that begin at 1 leave a static kernel, and what an optimizer does to it, as it is.
    if inflated and conv_cfg.get('type') == 'ODConv2d' and 'gate_scale' not in conv_cfg:
        start['conv_cfg'] = dict(gate_scale=2)
    if inflated and norm and not given.get('norm_eval'):
        start['conv_cfg'] = {**start.get('conv_cfg', {}), **norm}
    return dict(backbone=start, **no_detector), []


def _is_dynamic(name: str, tensor: Tensor) -> bool:
    """Whether a tensor of a checkpoint is one that dynamic layers alone have."""
    return tensor.dim() == 5 or any(
        part in name for part in ('attention.', 'KSM_Global.', 'warehouse'))


def _in_place(backbone: Dict[str, Any], init_cfg: Dict[str, Any]) -> Dict[str, Any]:
    """``init_cfg`` in the place of the base's, whose absence ``_delete_`` would survive."""
    return dict(_delete_=True, **init_cfg) if 'init_cfg' in backbone else init_cfg


def _text(config: Config, base: str, data: Path, folders: Dict[str, Tuple[str, str]],
          classes: Tuple[str, ...], start: Dict[str, Any]) -> str:
    """The new config: how it differs from its base, and nothing else."""
    changed = copy.deepcopy(config.model.to_dict())
    if any('num_things_classes' in head for head in changed.values() if isinstance(head, dict)):
        raise InputError(f'{base} tells things from stuff (num_things_classes), which a data set '
                         'of boxes does not: give a detector with num_classes.')
    if not set_num_classes(changed, len(classes)):
        raise InputError(f'{base} has no head with num_classes: give the config of a detector.')
    heads = _heads(config.model.to_dict(), changed, 'model') or 'dict()'
    lines = [f'_base_ = {base!r}', '', f'data_root = {data.as_posix() + "/"!r}',
             f'metainfo = dict(classes={classes!r})', '',
             f'model = {heads}']
    backbone = start.pop('backbone', None)
    if backbone:
        arguments = (f'    {key}={_source(value)}' for key, value in backbone.items())
        lines += ["model['backbone'] = dict(", ',\n'.join(arguments) + ')']
    for split, loader in LOADERS.items():
        annotations, images = folders.get(split, folders['val'])
        if split not in folders and config[loader] == config[LOADERS['val']]:
            lines.append(f'{loader} = {LOADERS["val"]}')
            continue
        dataset = ('\n    data_root=data_root, metainfo=metainfo,\n'
                   f'    ann_file={annotations!r}, data_prefix=dict(')
        *wrappers, inner = nested(config[loader]['dataset'])
        if 'datasets' in inner:
            raise InputError(f'{base} trains on several data sets in one ({inner["type"]}): give '
                             'one with a single data set.')
        if inner['type'] in ('CocoDataset', 'mmdet.CocoDataset'):
            dataset += f'_delete_=True, img={images!r})'
        else:  # which has arguments of its own
            dataset += f'img={images!r})'
            place = f'_base_.{loader}' + '.dataset' * (len(wrappers) + 1)
            kept = ''.join(f' {key}={place}.{key},' for key in (
                'pipeline', 'filter_cfg', 'backend_args') if key in inner)
            kept += '' if split == 'train' else ' test_mode=True,'
            dataset = f"\n    _delete_=True, type='CocoDataset',{kept}{dataset}"
        for _ in range(len(wrappers) + 1):
            dataset = f'dataset=dict({dataset})'
        lines.append(f'{loader} = dict({dataset})')
    for split in ('val', 'test'):
        given = config[f'{split}_evaluator']
        annotations, _ = folders.get(split, folders['val'])
        coco: Dict[str, Any] = next(
            (one for one in (given if isinstance(given, list) else [given])
             if one.get('type') in ('CocoMetric', 'mmdet.CocoMetric')), {})
        metric = '' if given is coco else (
            f"_delete_=True, type='CocoMetric', metric={coco.get('metric', 'bbox')!r}, ")
        lines.append(f'{split}_evaluator = dict({metric}ann_file=data_root + {annotations!r})')
    if 'base_batch_size' in (config.get('auto_scale_lr') or {}):
        lines += ['', '# The base\'s learning rate is for '
                  f'{config.auto_scale_lr.base_batch_size} images at a time, all GPUs together.',
                  'auto_scale_lr = dict(enable=True)']
    lines += [f'{key} = {value!r}' for key, value in start.items()]
    hooks = config.get('custom_hooks') or []
    if not any(hook['type'] == 'InputCheckHook' for hook in hooks):
        before = '*_base_.custom_hooks, ' if hooks else ''
        lines += ['', f'custom_imports = {_source(importing_plugin(config))}',
                  f"custom_hooks = [{before}dict(type='InputCheckHook')]"]
    return '\n'.join(lines) + '\n'


def _heads(before, after, path: str) -> str:
    """Source of what differs between two configs of a model; empty if nothing does."""
    if isinstance(before, dict):
        sources = {key: _heads(before[key], after[key], f'{path}.{key}') for key in before}
        changes = [f'{key}={source}' for key, source in sources.items() if source]
        return f'dict({", ".join(changes)})' if changes else ''
    if isinstance(before, (list, tuple)) and before != after:
        # What MMEngine inherits it merges by key, and a list has none.
        n = next((part['num_classes'] for part in after if 'num_classes' in part), None)
        if n is not None and after == [dict(part, num_classes=n) for part in before]:
            return f'[dict(head, num_classes={n}) for head in _base_.{path}]'
        return _source(after)
    return _source(after) if before != after else ''


def _source(value) -> str:
    """Python source of a config's value, dicts as configs write them."""
    if isinstance(value, dict):
        return f'dict({", ".join(f"{key}={_source(child)}" for key, child in value.items())})'
    if isinstance(value, list):
        return f'[{", ".join(map(_source, value))}]'
    return repr(value)


def _faults_of(config: Config, folders) -> List[str]:
    """What training leaves out of each split; InputError for what it cannot be done with."""
    init_default_scope(config.get('default_scope', 'mmdet'))
    warnings = []
    for split in folders:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells how it is doing
            dataset, = unwrapped(DATASETS.build(config[LOADERS[split]]['dataset']))
        if not reads_coco(dataset):
            continue
        evaluator = config.get(f'{split}_evaluator', {})
        faults, left_out = find_faults(dataset, 'segm' in evaluator.get('metric', ()))
        if faults:
            raise InputError(f'{dataset.ann_file} cannot be used: {"; ".join(faults)}. Mend the '
                             'file, or take these out of it.')
        check_images(dataset)
        warnings += [f'{dataset.ann_file}: {what}' for what in left_out]
    return warnings


def _shared(data: Path, folders: Dict[str, Tuple[str, str]]) -> List[str]:
    """Images that are trained on and evaluated on: listed twice, or of one name and content."""
    files = {split: {p.name: p for p in (data / images).rglob('*') if p.is_file()}
             for split, (_, images) in folders.items() if (data / images).is_dir()}
    warnings = []
    for split in ('val', 'test'):
        if split not in files:
            continue
        if folders[split][1] == folders['train'][1]:  # their lists alone tell them apart
            lists = [json.loads((data / folders[part][0]).read_text('utf-8'))['images']
                     for part in ('train', split)]
            both = sorted(set.intersection(*({image['file_name'] for image in images}
                                             for images in lists)))
        else:
            both = [name for name, path in files[split].items() if name in files['train']
                    and path.stat().st_size == files['train'][name].stat().st_size
                    and path.read_bytes() == files['train'][name].read_bytes()]
        if both:
            warnings.append(f'{len(both)} images are in both train and {split} (the first: '
                            f'{both[0]}): figures on {split} will flatter')
    return warnings


def _length(config: Config, train: Split) -> List[str]:
    """A warning where the schedule, made for a larger data set, is over before it began."""
    epochs, batch = config.train_cfg.get('max_epochs'), config.train_dataloader.get('batch_size')
    if not epochs or not batch:
        return []
    times = (wrapper.get('times', 1) for wrapper in nested(config.train_dataloader.dataset))
    images = math.prod(times, start=train.images - train.empty)
    iterations = epochs * -(-images // batch)
    warm_up = max((step.get('end', 0) for step in config.get('param_scheduler') or []
                   if step.get('type') == 'LinearLR' and not step.get('by_epoch', True)),
                  default=0)
    if iterations >= 4 * warm_up:
        return []
    return [f'{epochs} epochs are {iterations} iterations of {batch} images, of which the '
            f'learning rate rises for {warm_up}: repeat the data, or shorten the rise, as in '
            f'--cfg-options param_scheduler.0.end={max(1, iterations // 10)}']
