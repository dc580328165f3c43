"""The plugin's own configs and tools by name; needs nothing, so that a misspelt one costs nothing.
"""
import difflib
from pathlib import Path
from typing import Dict, Iterable

from .errors import InputError

CONFIGS = Path(__file__).parent / '.mim' / 'configs'
TOOLS = Path(__file__).parent / '.mim' / 'tools'


def find_config(name: str) -> Path:
    """The plugin's config of that file name; InputError with the nearest names if none."""
    configs = {path.name: path for path in CONFIGS.rglob('*.py') if path.parent.name != '_base_'}
    basename, parts = Path(name).name, Path(name).parts
    if basename in configs:
        path = configs[basename].resolve()
        # Of a path that names another folder it is not the config: that one may have been edited.
        if path.parts[-len(parts):] == parts:
            return path
    raise InputError(f'Config {name} does not exist, neither as a path nor among the '
                     f'{len(configs)} configs of mmdet_odconv: '
                     f'{nearest(basename, configs, "see the configs folder")}')


def find_tools() -> Dict[str, Path]:
    """Path of each of the plugin's tools, by the name that the command line gives it.

    Of two that are called alike, the later one's is told by its folder: ``deployment-benchmark``.
    """
    tools: Dict[str, Path] = {}
    for path in sorted(TOOLS.rglob('*.py')):
        name = path.stem.replace('_', '-')
        tools[f'{path.parent.name}-{name}' if name in tools else name] = path.resolve()
    return tools


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """The end of a sentence about an unknown name: what was meant, or what to do."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f'did you mean {" or ".join(near)}?' if near else f'{otherwise}.'
