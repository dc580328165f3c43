"""Links and commands in the documents: what they name is there."""
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
        for word in words:
            name = Path(word.split(',')[0]).name
            if name.endswith('.py') and '{' not in word and '/' not in word:
                known = NAMES | THEIRS | {path.name for path in TOOLS.rglob('*.py')}
                assert name in known or document.parent.joinpath(word).is_file(), line
            if word.startswith('configs/') and '*' not in word:
                assert (ROOT / word).exists(), line


def test_the_readme_fits_a_page():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 160


def test_every_page_is_in_the_contents():
    contents = (ROOT / 'mkdocs.yml').read_text()
    pages = [path.relative_to(ROOT / 'docs').as_posix() for path in ROOT.glob('docs/**/*.md')]
    assert [page for page in pages if f': {page}' not in contents
            and not re.match(r'results/.+/', page)] == []
