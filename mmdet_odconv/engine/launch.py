"""Runs mmdet's own train and test scripts with the plugin registered and errors made plain."""
import contextlib
import difflib
import errno
import inspect
import os
import re
import runpy
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, Dict, Iterator, Optional

import mmdet
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.registry import HOOKS, MODELS

from ..errors import DivergenceError, InputError
from ..names import find_config, nearest
from .checkpointing import SafeCheckpointHook
from .data_check import check_annotations, unreadable
from .distributed import add_cfg_options, config_argument, prepare_cpu_processes
from .resuming import AUTO, interruption, no_space

# What reading another JSON, or none, as COCO raises.
NOT_COCO = (AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError)

OPTIONAL = {  # packages of OpenMMLab that some configs inherit from, and how to install them
    'mmpretrain': "pip install '.[imagenet]' in a checkout",
    'mmpose': 'make keypoints-env in a checkout, or as docs/guides/keypoints.md says',
}


def run_mmdet_tool(name: str) -> None:
    """Run mmdet's ``tools/{name}`` on ``sys.argv``; exits with one sentence on a user's mistake.

    A config that is no path is looked up by file name among the plugin's configs.
    """
    script = Path(mmdet.__file__).parent / '.mim' / 'tools' / name
    if not script.is_file():
        script = Path(mmdet.__file__).parents[1] / 'tools' / name  # a source checkout
    with errors_explained():
        if not script.is_file():
            raise InputError(f"mmdet's {name} was found neither in {Path(mmdet.__file__).parent} "
                             'nor beside it: install mmdet from a wheel or a whole checkout.')
        _resolve_config(sys.argv)
        if name == 'train.py':
            _resume_by_hook(sys.argv)
        prepare_cpu_processes(sys.argv)
        runpy.run_path(str(script), run_name='__main__')


@contextlib.contextmanager
def errors_explained() -> Iterator[None]:
    """Exit with one sentence on a mistake that the user can mend, or when interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        if is_main_process():
            again = ('again' if f'resume={AUTO}' in sys.argv else 'again with --resume alone'
                     if '--resume' in sys.argv else 'again with --resume')
            print(interruption(again), file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        sys.exit(f'error: {sentence}')


def _resolve_config(argv) -> None:
    """Put the path of a config that was given by file name in its place."""
    given = config_argument(argv)
    if given is not None and not os.path.exists(given):
        argv[argv.index(given, 1)] = str(find_config(given))


def _resume_by_hook(argv) -> None:
    """Put a setting in the place of --resume without a file, by which mmdet forgets load_from.

    SafeCheckpointHook alone reads it, and MMEngine's FlexibleRunner asks it too late.
    """
    path = config_argument(argv)
    for i, arg in enumerate(argv):
        following = argv[i + 1] if i + 1 < len(argv) else '-'
        if arg == '--resume' and (following == AUTO or following.startswith('-')):
            if path is not None and _resumes_safely(Config.fromfile(path)):
                del argv[i:i + (2 if following == AUTO else 1)]
                add_cfg_options(argv, [f'resume={AUTO}'])
            return


def _resumes_safely(config: Config) -> bool:
    hook = (config.get('default_hooks') or {}).get('checkpoint', dict(type='CheckpointHook'))
    kind = (hook or {}).get('type')
    kind = HOOKS.get(kind) if isinstance(kind, str) else kind
    return 'runner_type' not in config and isinstance(kind, type) and issubclass(
        kind, SafeCheckpointHook)


def explain(error: BaseException) -> Optional[str]:
    """One sentence for a mistake that the user can mend; None for anything else."""
    if isinstance(error, (InputError, DivergenceError)):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return no_space('')
    if isinstance(error, ValueError) and 'SyncBatchNorm layers only work' in str(error):
        return ('The config synchronises BatchNorm (SyncBN), which torch does on GPUs alone: on '
                'CPUs, run one process without --launcher, or choose another norm_cfg.')
    sentence = _explain_argument(error)
    if sentence is not None:
        return sentence
    directory = _locals_of(error, 'mkdir_or_exist').get('dir_name')
    if directory is not None and isinstance(error, OSError):
        return (f'Directory {directory} cannot be made ({error.strerror}): give another '
                '--work-dir.')
    unknown = re.search(r'(\S+) is not in the \S+::(\S+) registry', str(error))
    layer = str(_locals_of(error, 'build_conv_layer').get('layer_type', ''))  # which mmcv omits
    known = _known_types()
    if isinstance(error, KeyError) and (unknown or layer and layer.split('.')[-1] not in known):
        name, kind = unknown.groups() if unknown else (layer, 'layer')
        name = name.strip('\'"')
        near = difflib.get_close_matches(name, known, n=3)
        hint = f'did you mean {" or ".join(near)}?' if near else 'check it and custom_imports.'
        return f'No {kind} is registered as {name}: {hint}'
    package = _locals_of(error, '_get_cfg_path').get('package')
    if isinstance(error, ModuleNotFoundError) and package is not None:
        return (f'The config inherits from {package}, which is not installed: '
                f'{OPTIONAL.get(package, f"pip install {package}")}.')
    module = _locals_of(error, 'import_modules_from_strings').get('imp')
    if isinstance(error, ImportError) and module is not None:
        package = str(module).split('.')[0]
        return (f"{module} of the config's custom_imports could not be imported "
                f'({error.__context__ or error}): check its name, or '
                f'{OPTIONAL.get(package, "install what is missing")}.')
    config = _locals_of(error, '_file2dict').get('filename')
    if config is not None and isinstance(error, (SyntaxError, OSError)):
        return f'Config {config} could not be read ({error}): check it and its _base_.'
    dataset = _locals_of(error, 'load_data_list').get('self')
    if dataset is not None:
        ann_file = getattr(dataset, 'ann_file', None)
        if isinstance(error, FileNotFoundError) and error.filename == ann_file:
            return (f'Annotation file {ann_file} does not exist: set data_root and ann_file of '
                    'the dataset in the config, or put the dataset there.')
        if isinstance(dataset, CocoDataset) and isinstance(error, NOT_COCO):
            faults = _faults(dataset)
            if faults is not None:
                return faults
            return (f'Annotation file {ann_file} could not be read as COCO '
                    f'({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ""}'
                    '): expected a JSON object with images, annotations and categories.')
    dataset = _locals_of(error, '_serialize_data').get('self')
    if dataset is not None and not dataset.data_list:
        classes, found = dataset.metainfo.get('classes', ()), getattr(dataset, 'cat_ids', None)
        faults = _faults(dataset) if found is not None and len(found) == len(classes) else None
        if faults is not None:
            return faults
        counts = '' if found is None else (
            f'it has {len(found)} of the {len(classes)} classes that the config names '
            f'({", ".join(map(str, classes[:5]))}): ')
        return (f"{dataset.ann_file} leaves no image to use: {counts}set the dataset's "
                'metainfo=dict(classes=...) to names that its categories have.')
    image = _locals_of(error, 'transform').get('results', {}).get('img_path')
    if image is not None and isinstance(_locals_of(error, 'transform')['self'], LoadImageFromFile):
        return unreadable(image, error)
    if 'in DataLoader worker process' in str(error):
        return _unreadable_in_worker(str(error))
    if isinstance(error, OSError) and error.filename:
        reason = ('does not exist' if isinstance(error, FileNotFoundError) else
                  f'cannot be used ({error.strerror})')
        return f'{error.filename} {reason}: check the paths in the config.'
    return None


def _explain_argument(error: BaseException) -> Optional[str]:
    """A sentence for an argument that a class of the config does not take, or not so."""
    built = _locals_of(error, 'build_from_cfg').get('obj_cls')
    message = str(error).rstrip('.')
    if not isinstance(built, type):
        return None
    unknown = re.search(r"(?:(\w+)\.)?__init__\(\) got an unexpected keyword argument '(\w+)'$",
                        message)
    if isinstance(error, TypeError) and unknown:
        owner, argument = unknown.groups()
        if owner not in {None, *(base.__name__ for base in built.__mro__)}:
            built = _registered(owner)  # what it built itself, such as a layer by conv_cfg
        if built is None:
            return None
        known = {name for base in built.__mro__
                 for name in inspect.signature(base.__init__).parameters}  # type: ignore[misc]
        hint = nearest(argument, sorted(known - {'self', 'args', 'kwargs'}),
                       'take it out of the config')
        return f'{built.__name__} takes no argument {argument}: {hint}'
    package = Path(__file__).parents[1]
    raised_in = [Path(frame.f_code.co_filename).parent
                 for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    if isinstance(error, ValueError) and raised_in in (package / 'layers', package / 'backbones'):
        end = '' if message.endswith('?') else '; correct it in the config.'
        return f'{built.__name__}: {message}{end}'
    return None


def _registered(name: Optional[str]) -> Optional[type]:
    for registry in (MODELS, *MODELS.children.values(), HOOKS, *HOOKS.children.values()):
        cls = registry.module_dict.get(name)
        if isinstance(cls, type):
            return cls
    return None


def _faults(dataset: CocoDataset) -> Optional[str]:
    """What keeps annotations from training, where that is more than that they are not COCO."""
    try:
        check_annotations(dataset)
    except InputError as error:
        return str(error)
    except Exception:  # whatever a file of another kind answers
        return None
    return None


def _unreadable_in_worker(text: str) -> Optional[str]:
    """The same of an image that a worker read, whose frames are text; None for other errors."""
    found = re.findall(r"(failed to load image|No such file or directory|Is a directory"
                       r"|Permission denied): '?(.+?)'?$", text, re.MULTILINE)
    if found and ('fileio.get' in text or 'failed to load' in text):
        what, path = found[-1]  # before it, lines of source
        return unreadable(path, FileNotFoundError() if 'No such' in what else None)
    if 'imfrombytes' in text:
        return ('An image is empty, damaged or of another kind, and the worker that read it does '
                'not say which: run with train_dataloader.num_workers=0 '
                'train_dataloader.persistent_workers=False to learn its name.')
    return None


def _known_types() -> list:
    registries = (MODELS, *MODELS.children.values())
    return sorted({name for registry in registries for name in registry.module_dict})


def _locals_of(error: BaseException, function: str) -> Dict[str, Any]:
    """Local variables of the innermost frame of ``function`` that the error passed through."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)
              if frame.f_code.co_name == function]
    return frames[-1].f_locals if frames else {}
