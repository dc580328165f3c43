"""Checkpoints made to run code, remove files or crash the process; each is written on the spot."""
import copyreg
import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch

CANARY = 'ran'  # a file that appears in the working directory if anything of a checkpoint runs
TOUCH = f'__import__("pathlib").Path("{CANARY}").touch()'


class Calls:
    """Unpickles as a call of ``function``, or as ``cls.__new__`` of another class."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def write(path: Path, content) -> None:
    """A checkpoint of ``content``; bytes are the pickle inside."""
    torch.save({} if isinstance(content, bytes) else content, path)
    if isinstance(content, bytes):
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as archive:
            for name, part in parts.items():
                archive.writestr(name, content if name.endswith('data.pkl') else part)


def with_meta(value) -> dict:
    return dict(state_dict={}, meta=dict(epoch=1, iter=1, x=value))


def new_object_array() -> bytes:
    """``numpy.ndarray.__new__(numpy.ndarray, (1,), 'O', b'A' * 8)``: one forged pointer."""
    before = pickle.PROTO + b'\x02}X\x01\x00\x00\x00x' + b'cnumpy\nndarray\n'
    args = b'K\x01\x85X\x01\x00\x00\x00OU\x08' + b'A' * 8 + b'\x87'
    return before + args + pickle.NEWOBJ + b's.'


def deep(levels: int) -> bytes:
    return pickle.PROTO + b'\x02}X\x01\x00\x00\x00x' + b']' * levels + b'a' * (levels - 1) + b's.'


# Of these nothing is loaded, and the sentence matches.
REFUSED = {
    'call': (with_meta(Calls(Path.touch, Path(CANARY))), 'refused, and nothing in it was run'),
    'eval': (with_meta(Calls(eval, TOUCH)), r'holds \S*eval'),
    'exec by getattr': (with_meta(Calls(getattr, dict, 'clear')), r'holds \S*(dict|getattr)'),
    'state of a log': (with_meta(Calls(getattr, np.ndarray, 'tofile')), 'holds getattr'),
    'forged pointers': (with_meta(Calls(np.ndarray, (1, ), 'O', b'A' * 8)), 'holds numpy.ndarray'),
    'forged pointers by __new__': (new_object_array(), 'damaged'),
    'objects': (with_meta(np.array([None, 1])), 'holds numpy.dtype O8'),
    'fields': (with_meta(np.zeros(2, [('a', 'f4')])), 'holds numpy.dtype V4'),
    'longer than its bytes': (with_meta(Calls(np.float64(1).__reduce__()[0], np.dtype('f8'), b'')),
                              'damaged'),
    'class': (with_meta(Calls(copyreg._reconstructor, Path, object, None)), 'nothing in it was'),
    'nested': (deep(20_000), 'damaged'),
    'list': ([1, 2], 'holds a list, where a dict of weights was expected'),
    'state_dict a str': ({'state_dict': 'weights'}, 'state_dict of .* is a str, where a dict was'),
    'state_dict a tensor': ({'state_dict': torch.ones(1)}, 'state_dict of .* is a Tensor, where'),
    'keys that are numbers': ({'state_dict': {0: torch.ones(1)}}, 'has the key 0, a int, where'),
    'no names': ({0: torch.ones(1)}, 'has the key 0, a int, where'),
    'a weight that is a str': ({'state_dict': {'a': 'b'}}, 'a of .* is a str, where a tensor was'),
    'meta a str': ({'state_dict': {}, 'meta': 'epoch'}, 'meta of .* is a str, where a dict was'),
    'classes a str': ({'state_dict': {}, 'meta': dict(dataset_meta='cat')}, 'dataset_meta of .* i'),
    'message_hub a str': ({'state_dict': {}, 'message_hub': 'logs'}, 'message_hub of .* is a str'),
    'sparse': ({'state_dict': {'bn1.weight': torch.ones(8).to_sparse()}}, 'is sparse, nested or'),
    'without data': ({'state_dict': {'bn1.weight': torch.ones(8, device='meta')}}, 'without data'),
}

# Texts that MMEngine would execute as a config, wherever a checkpoint may hold one.
TEXTS = {
    'statement': TOUCH,
    'value': f'a = dict(b=[{TOUCH}])',
    'positional': f'a = dict({TOUCH})',
    'value of names': f"a = dict({{'b.c': {TOUCH}}})",
    'types of names': "model = dict({'type': 'planted.Model', 'b.c': 1})",
    'unpacked': f'a = dict(**{TOUCH})',
    'comprehension': f'a = [{TOUCH} for _ in (1, )]',
    'import': 'import planted',
    'custom_imports': "custom_imports = dict(imports=['planted'], allow_failed_imports=True)",
    'base': "_base_ = 'planted.py'\nmodel = dict()",
    'variable': "a = '{{$NOWHERE:\\');" + TOUCH.replace('"', '\\"') + "#}}'",
    'another function': f"model = dict(type='builtins.exec', source={TOUCH!r})",
    'module': "model = dict(type='planted')",
    'class of a module': "model = dict(type='planted.Model')",
    'scope': "default_scope = 'planted'\nmodel = dict(type='FasterRCNN')",
    'scope inside': "model = dict(type='FasterRCNN', _scope_='planted')",
    'of mmengine': f"model = dict(type='mmengine.Config.fromstring', cfg_str={TOUCH!r}, "
                   "file_format='.py')",
    'of torch, not imported': "model = dict(type='torch.utils.benchmark.examples.fuzzer.x')",
    'of torch, that exits': "model = dict(type='torch.utils.model_dump.__main__.x')",
    'deep': 'a = ' + '-' * 50_000 + '1',
    'not python': 'a = = 1',
}


def with_text(text: str, state: dict) -> dict:
    """A whole checkpoint of a run of one iteration, with a config's text in every place."""
    return dict(state_dict=state, meta=dict(epoch=0, iter=0, cfg=text, config=text),
                message_hub=dict(log_scalars={}, runtime_info=dict(cfg=text), resumed_keys={}))
