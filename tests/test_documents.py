"""Links, commands and code in the documents: what they name is there, and is what tests run."""
import ast
import importlib
import itertools
import re
import shlex
from pathlib import Path

import pytest

from mmdet_odconv.names import CONFIGS, TOOLS, find_tools

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / 'README.md', ROOT / 'CHANGELOG.md', *sorted(ROOT.glob('docs/**/*.md')),
             *sorted(ROOT.glob('configs/*/README.md'))]
NAMES = {path.name for path in CONFIGS.rglob('*.py')}
THEIRS = {'my_config.py', 'my.py', 'dynamic.py', 'fd.py', 'main.py'}  # the reader's own


def anchors(document):
    """What headings are called in a link, as GitHub and MkDocs do."""
    found = re.findall(r'^#+ (.+)$', document.read_text(), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).strip().replace(' ', '-') for heading in found}


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(document):
    text = re.sub(r'```.*?```', '', document.read_text(), flags=re.DOTALL)
    for link in re.findall(r'\]\((?!\w+:)([^)\s]+)\)', text):
        path, _, anchor = link.partition('#')
        target = document.parent / path if path else document
        assert target.exists(), f'{document}: {link}'
        assert not anchor or anchor in anchors(target), f'{document}: {link}'


def commands(text):
    """Lines of shell in blocks and in backticks, continued lines joined."""
    blocks = re.findall(r'```(?:bash|shell)\n(.*?)```', text, re.DOTALL)
    lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
    return lines + [' '.join(code.split()) for code in re.findall(
        r'(?<!`)`((?:mim|mmdet_odconv|python|make|torchrun) [^`]+)`(?!`)', text)]


def expanded(word):
    """What a shell makes of {a,b} in a word."""
    found = re.search(r'\{([^{}]*,[^{}]*)\}', word)
    if not found:
        return [word]
    return list(itertools.chain(*(expanded(word[:found.start()] + part + word[found.end():])
                                  for part in found[1].split(','))))


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_name_tools_targets_and_configs_that_are_there(document):
    targets = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
    tools = find_tools()
    for line in commands(document.read_text()):
        words = shlex.split(line, comments=True)
        for first, second in zip(words, words[1:]):
            if first == 'mmdet_odconv' and re.fullmatch(r'[a-z][\w-]*', second):
                assert {'demo': 'image-demo'}.get(second, second).replace('_', '-') in tools, line
            if re.fullmatch(r'(tools|tests)/\S+\.py', second):
                assert (ROOT / second).is_file(), line
        if words[:1] == ['make']:
            wanted = {word for word in words[1:] if '=' not in word}
            assert wanted <= targets, line
        for word in itertools.chain(*map(expanded, words)):
            name = Path(word.split(',')[0]).name
            if name.endswith('.py') and '{' not in word and '/' not in word:
                known = NAMES | THEIRS | {path.name for path in TOOLS.rglob('*.py')}
                assert name in known or document.parent.joinpath(word).is_file(), line
            if word.startswith('configs/') and '*' not in word:
                assert (ROOT / word).exists(), line


# What mim and torchrun take for themselves, of the commands here.
THEIR_OPTIONS = {'--launcher', '--gpus', '--gpus-per-node', '--partition', '--checkpoint'}


def tool_and_options(line):
    """The tool of ours that a command runs, or None, and the options that it is given."""
    words = shlex.split(line, comments=True)
    scripts = [i for i, word in enumerate(words) if re.fullmatch(r'tools/\S+\.py', word)]
    if scripts:
        first = scripts[0]
        name = next(name for name, path in find_tools().items() if path == ROOT / words[first])
    else:
        found = re.match(r'(?:\S+=\S+ )*(?:mim run mmdet_odconv|mim(?= \w+ mmdet_odconv)|'
                         r'mmdet_odconv) ([a-z][\w-]*)', ' '.join(words))
        if not found:
            return None, set()
        first, name = 0, {'demo': 'image-demo'}.get(found[1], found[1]).replace('_', '-')
    return name, {word.partition('=')[0] for word in words[first:] if word.startswith('--')}


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_have_options_of_their_tools_and_tests_run_them(document):
    tests = ''.join(path.read_text() for path in ROOT.glob('tests/*/*.py'))
    mmdet = Path(importlib.import_module('mmdet').__file__).parent / '.mim/tools'
    for line in commands(document.read_text()):
        name, options = tool_and_options(line)
        if name is None or name == '--help':
            continue
        tool = find_tools()[name]
        assert re.search(rf"\b{tool.stem}(\.py|')", tests), f'{line}: no test runs {tool.name}'
        source = tool.read_text()
        if name in ('train', 'test'):
            source += (mmdet / tool.name).read_text()
        known = set(re.findall(r"'(--[\w-]+)'", source)) | THEIR_OPTIONS | {'--help'}
        assert options <= known, f'{line}: {sorted(options - known)}'


@pytest.mark.parametrize('document', [ROOT / 'README.md', *sorted(ROOT.glob('docs/**/*.md'))],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_what_no_test_can_run_says_what_it_needs(document):
    text = document.read_text()
    blocks = re.findall(r'```bash\n(.*?)```', text, re.DOTALL)
    inline = commands(re.sub(r'```.*?```', '', text, flags=re.DOTALL))
    for part, where in [*((block, block) for block in blocks), *((line, text) for line in inline)]:
        large = re.search(r'(train|test) .*_(coco|in1k)\.py', part.replace('\\\n', ' '))
        if large or re.search(r'--(gpus|nnodes)|--nproc-per-node [3-9]', part):
            assert re.search(r'needs (COCO|ImageNet|\d+ GPUs)', where), f'{document}: {part}'


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_parses_and_imports_what_is_there(document):
    for block in re.findall(r'```python\n(.*?)```', document.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name), f'{document}: {node.module}.{name.name}'


def test_the_readme_fits_a_page():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 160


def test_every_page_is_in_the_contents():
    contents = (ROOT / 'mkdocs.yml').read_text()
    pages = [path.relative_to(ROOT / 'docs').as_posix() for path in ROOT.glob('docs/**/*.md')]
    assert [page for page in pages if f': {page}' not in contents
            and not re.match(r'results/.+/', page)] == []
