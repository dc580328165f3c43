"""MkDocs hook: what pages name outside docs/ becomes a name, or is brought along."""
import json
import re
from pathlib import Path

from mkdocs.structure.files import File

DOCS = Path(__file__).parent
ROOT = DOCS.parent


def on_files(files, config):
    """Pictures of resources/ are part of the site, and so is the notebook, as a page."""
    files.append(File.generated(config, 'tutorial.md', content=notebook_as_markdown()))
    for path in sorted((ROOT / 'resources').iterdir()):
        files.append(File.generated(config, f'resources/{path.name}', abs_src_path=str(path)))
    return files


def notebook_as_markdown():
    """The tutorial's cells, code with what it printed and drew."""
    parts = []
    for cell in json.loads((DOCS / 'tutorial.ipynb').read_text())['cells']:
        source = ''.join(cell['source'])
        parts.append(source if cell['cell_type'] == 'markdown' else f'```python\n{source}\n```')
        for output in cell.get('outputs', []):
            picture = output.get('data', {}).get('image/png')
            if picture:
                parts.append(f'![What the cell draws](data:image/png;base64,{picture.strip()})')
            elif 'text' in output:
                parts.append(f'```text\n{"".join(output["text"])}```')
    return '\n\n'.join(parts)


def on_page_markdown(markdown, page, **_):
    """The changelog is the repository's; links out of docs/ are for readers of the repository."""
    folder = (DOCS / page.file.src_uri).parent
    if page.file.src_uri == 'changelog.md':
        markdown, folder = (ROOT / 'CHANGELOG.md').read_text(), ROOT

    def rewrite(found):
        text, link = found.groups()
        path, _, anchor = link.partition('#')
        target = (folder / path).resolve()
        if path.endswith('.ipynb'):  # a page of the site
            return f'[{text}]({link.replace(".ipynb", ".md")})'
        is_record = DOCS / 'results' in target.parent.parents  # kept out of the site
        if not path or '://' in link or (
                target.is_relative_to(DOCS) and folder != ROOT and not is_record):
            return found.group(0)
        inside = target.relative_to(ROOT)
        if inside.parts[0] == 'docs' and not is_record:
            return f'[{text}]({inside.relative_to("docs").as_posix()})'
        if inside.parts[0] == 'resources':
            up = '../' * (len(Path(page.file.src_uri).parts) - 1)
            return f'[{text}]({up}{inside.as_posix()})'
        name = f'`{inside.as_posix()}`'
        return name if text.strip('`') in (inside.as_posix(), inside.name) else f'{text} ({name})'

    return re.sub(r'\[([^\]]*)\]\(([^)\s]+)\)', rewrite, markdown)


def on_page_content(html, **_):
    """Docstrings have Sphinx's roles, which other tools read too; here they are code."""
    html = re.sub(r':[a-z]+:(?=<code>)', '', html)
    return re.sub(r'<p>\.\. math::\s*(.+?)</p>', lambda found: (
        f'<pre><code>{found.group(1)}</code></pre>'.replace('\\,', ' ').replace('\\sum', 'sum')),
        html, flags=re.DOTALL)
