"""``mmdet_odconv COMMAND ...``: the tools by name, and what can be said without importing torch."""
import ast
from pathlib import Path
from typing import List

from .errors import InputError
from .names import find_config, find_tools, nearest

SHORT = {'demo': 'image-demo'}
# Positional arguments that a command reads before anything else.
READS = {
    'train': ('config',),
    'test': ('config', 'file'),
    'export': ('config', 'file'),
    'image-demo': ('file', 'config'),
    'get-model-stats': ('config',),
    'swap-backbone': ('mmdet config',),
    'static-to-dynamic': ('config', 'file'),
    'published-to-mmdet': ('file',),
    'publish-model': ('file',),
}
READ_BY_OPTION = ('--weights', '--checkpoint')


def tool_and_arguments(argv: List[str]) -> List[str]:
    """What Python is to run; empty after help, which is printed.

    Raises:
        InputError: for an unknown command, config or missing file.
    """
    tools = find_tools()
    if not argv or argv[0] in ('-h', '--help', 'help'):
        print(_help(tools))
        return []
    if argv[0] == '--version':
        from .version import __version__
        print(__version__)
        return []
    name = SHORT.get(argv[0], argv[0]).replace('_', '-')
    if name not in tools:
        raise InputError(f'mmdet_odconv has no command {argv[0]}: '
                         f'{nearest(name, (*tools, *SHORT), "see mmdet_odconv --help")}')
    arguments = argv[1:]
    if not {'-h', '--help'} & set(arguments):
        arguments = _checked(name, arguments)
    return [str(tools[name]), *arguments]


def _help(tools) -> str:
    lines = ['usage: mmdet_odconv COMMAND ...', '',
             'Each command explains itself: mmdet_odconv COMMAND --help.', '']
    for name, path in tools.items():
        said = ast.get_docstring(ast.parse(path.read_text())) or ''
        also = ''.join(f' ({short})' for short, long in SHORT.items() if long == name)
        lines.append(f'  {name + also:<22} {said.splitlines()[0]}')
    return '\n'.join(lines)


def _checked(name: str, argv: List[str]) -> List[str]:
    """The arguments, a config of the plugin by its path; InputError for what is not there."""
    for option, value in zip(argv, argv[1:]):
        if option in READ_BY_OPTION and value != 'none':
            _check_file(value)
    checked = list(argv)
    for i, (kind, argument) in enumerate(zip(READS.get(name, ()), argv)):
        if argument.startswith('-'):
            break  # what follows may be an option's value
        if kind == 'file':
            _check_file(argument)
        elif not Path(argument).exists() and '::' not in argument:
            if kind == 'mmdet config':
                raise InputError(f'Config {argument} does not exist: give a file, or mmdet::NAME '
                                 'for one of mmdet.')
            checked[i] = str(find_config(argument if argument.endswith('.py')
                                         else f'{argument}.py'))
    return checked


def _check_file(name: str) -> None:
    if '://' not in name and not Path(name).exists():
        raise InputError(f'{name} does not exist: check its path, which is seen from {Path.cwd()}.')
