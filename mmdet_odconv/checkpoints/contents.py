"""What MMEngine acts on in a checkpoint beside its weights, checked before it does.

The unpickler runs nothing. But MMEngine executes the text of the config that a checkpoint holds
(``Runner.resume``, and an inferencer that is given weights alone), and removes what the checkpoint
names as its best file (``CheckpointHook``).
"""
import ast
import inspect
import logging
import os
import sys
from importlib.util import find_spec
from typing import Any, Iterator, Mapping, Optional, Tuple

import torch
from mmengine.logging import print_log
from mmengine.registry import Registry, root
from torch import Tensor

from ..errors import InputError

# Where MMEngine looks for dicts with names as keys.
DICTS = ('state_dict', 'meta', 'meta.dataset_meta', 'message_hub', 'message_hub.log_scalars',
         'message_hub.runtime_info', 'message_hub.resumed_keys')
# Texts that MMEngine executes as configs.
CONFIGS = ('meta.config', 'meta.cfg', 'message_hub.runtime_info.cfg')
LONGEST = 1 << 22  # characters of such a text


def check_contents(checkpoint: dict, filename: str, on_meta: bool = False) -> None:
    """Leave in ``checkpoint``, read from ``filename``, nothing that makes MMEngine run or remove.

    A config's text that is more than literals, or that names what is not there yet, is left out
    with a warning; so is the best file, unless it lies beside ``filename`` under a name that
    MMEngine gives. ``on_meta`` says that tensors were asked for without their data.

    Raises:
        InputError: if it is no dict of weights, or what belongs to it is of another type.
    """
    if not isinstance(checkpoint, dict):
        raise InputError(f'Checkpoint {filename} holds a {type(checkpoint).__name__}, where a '
                         'dict of weights was expected: save model.state_dict().')
    _check_types(checkpoint, filename)
    if checkpoint.get('optimizer', {}) is None:
        del checkpoint['optimizer']  # which MMEngine would load
    _check_tensors(checkpoint, filename, on_meta)
    for path in CONFIGS:
        holder, name = _holder(checkpoint, path)
        if holder is None:
            continue
        reason = _why_not_literal(holder[name])
        if reason is not None:
            del holder[name]
            print_log(f'The config in {filename} ({path}) was left out, because it {reason}; '
                      'where it is needed, give the config itself.', logger='current',
                      level=logging.WARNING)
    directory = '' if '://' in filename else os.path.dirname(filename) or '.'
    forget_paths(checkpoint, directory, is_own=True)


def _holder(checkpoint: dict, path: str) -> Tuple[Optional[dict], str]:
    """The dict of ``checkpoint`` that has the last name of ``path``, and that name; or None."""
    *parents, name = path.split('.')
    holder: Any = checkpoint
    for parent in parents:
        holder = holder.get(parent)
        if not isinstance(holder, Mapping):
            return None, name
    return (holder if name in holder else None), name


def _check_types(checkpoint: dict, filename: str) -> None:
    for path in ('', *DICTS):
        holder, name = _holder(checkpoint, path) if path else ({'': checkpoint}, '')
        if holder is None or isinstance(holder[name], Tensor) and path != 'state_dict':
            continue  # a parameter of that name
        if holder[name] is None:
            del holder[name]
            continue
        if not isinstance(holder[name], Mapping):
            raise InputError(f'{path} of checkpoint {filename} is a {type(holder[name]).__name__}, '
                             'where a dict was expected: save model.state_dict().')
        wrong = next((key for key in holder[name] if not isinstance(key, str)), None)
        if wrong is not None:
            raise InputError(f'{path or "The dict"} of checkpoint {filename} has the key '
                             f'{wrong!r}, a {type(wrong).__name__}, where names were expected: '
                             'save model.state_dict().')


def _check_tensors(checkpoint: dict, filename: str, on_meta: bool) -> None:
    for name, value in checkpoint.get('state_dict', checkpoint).items():
        is_tensor = isinstance(value, Tensor)
        if is_tensor and (value.layout != torch.strided or value.is_nested
                          or value.is_meta and not on_meta):
            raise InputError(f'{name} of checkpoint {filename} is sparse, nested or without data, '
                             'where a dense tensor was expected: save it as one.')
        if not is_tensor and 'state_dict' in checkpoint and not name.endswith('_extra_state'):
            raise InputError(f'{name} of checkpoint {filename} is a {type(value).__name__}, where '
                             'a tensor was expected: save model.state_dict().')


def forget_paths(checkpoint: dict, directory: str, is_own: bool) -> None:
    """Take from ``checkpoint`` files that MMEngine would remove, unless it wrote them there.

    Args:
        checkpoint: changed in place: ``best_ckpt`` and ``keep_ckpt_ids`` of the message hub.
        directory: where files called ``best_*`` are MMEngine's; '' for nowhere.
        is_own: whether the checkpoint lies where its ``keep_ckpt_ids`` are looked for.
    """
    hub, _ = _holder(checkpoint, 'message_hub.runtime_info')
    info = {} if hub is None else hub['runtime_info']
    for name in [name for name in info if name.startswith('best_ckpt')]:
        parent, _, basename = str(info[name]).rpartition('/')
        if not (isinstance(info[name], str) and directory and basename.startswith('best_')
                and os.path.realpath(parent) == os.path.realpath(directory)):
            if info[name] is not None:
                print_log(f'{info[name]}, the best checkpoint so far, is not in '
                          f'{directory or "a directory of this run"}: it stays as it is.',
                          logger='current', level=logging.WARNING)
            del info[name]
    if not (is_own and _are_ints(info.get('keep_ckpt_ids', []))):
        info.pop('keep_ckpt_ids', None)


def _are_ints(value) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def check_resumable(checkpoint: dict) -> None:
    """InputError unless ``checkpoint`` holds the state of a run beside its weights."""
    meta = checkpoint.get('meta', {})
    lacking = [f'meta.{name}' for name in ('epoch', 'iter')
               if not (type(meta.get(name)) is int and meta[name] >= 0)]
    lacking += [path for path in DICTS
                if path.startswith('message_hub') and _holder(checkpoint, path)[0] is None]
    optimizer = checkpoint.get('optimizer', {})
    if not (isinstance(optimizer, Mapping) and all(isinstance(key, str) for key in optimizer)):
        lacking.append('an optimizer that is a dict')
    if lacking:
        raise InputError(f'The checkpoint holds no run to resume, for want of {lacking[0]}: give '
                         'one that training saved, or start from its weights by load_from.')


class _DictCalls(ast.NodeTransformer):
    """``dict(a=1)`` as ``{'a': 1}``, which ``ast.literal_eval`` reads.

    MMEngine writes ``dict({'a.b': 1}, c=1)`` where a key is no identifier.
    """

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        first, *more = node.args or [ast.Dict(keys=[], values=[])]
        if not (isinstance(node.func, ast.Name) and node.func.id == 'dict'
                and isinstance(first, ast.Dict) and not more):
            return node
        names = [keyword.arg for keyword in node.keywords]
        return ast.Dict(
            keys=first.keys + [ast.Constant(name) if name else None for name in names],
            values=first.values + [keyword.value for keyword in node.keywords])


def _why_not_literal(text) -> Optional[str]:
    """What MMEngine would run in a config's text; None if nothing."""
    try:
        if not isinstance(text, str) or len(text) > LONGEST:
            raise ValueError
        if '{{' in text:  # MMEngine puts other text in its place
            raise ValueError
        for statement in ast.parse(text).body:
            if not isinstance(statement, ast.Assign):
                raise ValueError
            target, = statement.targets
            if not isinstance(target, ast.Name) or target.id in ('_base_', 'dict'):
                raise ValueError
            value = ast.literal_eval(_DictCalls().visit(statement.value))
            for name in _names({target.id: value}):
                if not _is_here(name):
                    return f'names {name}, which is not registered or not imported'
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        return 'holds more than literals, which MMEngine would execute'
    return None


def _names(value) -> Iterator[str]:
    """Names in a config by which MMEngine imports modules."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key in ('type', '_scope_', 'default_scope', 'imports'):
                yield from (name for name in (item if isinstance(item, (list, tuple)) else [item])
                            if isinstance(name, str))
            yield from _names(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _names(item)


def _is_here(name: str) -> bool:
    """Whether MMEngine finds ``name`` among what is registered or imported, or nowhere at all."""
    registries = [registry for parent in vars(root).values() if isinstance(parent, Registry)
                  for registry in (parent, *parent.children.values())]
    package, _, rest = name.partition('.')
    if name in sys.modules or any(
            name in registry.module_dict
            or registry.scope == package and rest in registry.module_dict
            for registry in registries):
        return True
    if package in ('mmcv', 'torch', *(registry.scope for registry in registries)):
        found = _imported(name)
        return any(found is kind for registry in registries
                   for kind in registry.module_dict.values())
    try:
        return find_spec(package) is None
    except ValueError:
        return False


def _imported(name: str):
    """What a dotted name, as pure Python configs have, stands for among imported modules, or None.

    MMEngine's own look-up would import what the file names, and getattr what a module answers for.
    """
    parts = name.split('.')
    for count in range(len(parts), 0, -1):
        found: Any = sys.modules.get('.'.join(parts[:count]))
        if found is not None:
            for part in parts[count:]:
                found = inspect.getattr_static(found, part, None)
            return found
    return None
