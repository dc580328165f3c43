import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import digits
import mmcv
import mmdet
import mmengine
import pytest
import torch

import mmdet_odconv
from mmdet_odconv import stack

ROOT = Path(__file__).parents[1]


def python(code, **env):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, **env})


def test_importing_prints_nothing_and_costs_little_beyond_mmdet():
    result = python(
        'import contextlib, io, time\n'
        'import mmcv.ops, mmdet.datasets, mmdet.engine, mmdet.models\n'  # OneDL's datasets print
        'out, start = io.StringIO(), time.process_time()\n'
        'with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):\n'
        '    import mmdet_odconv\n'
        'assert time.process_time() - start < 1\n'
        'assert out.getvalue() == "", out.getvalue()')
    assert result.returncode == 0, result.stderr
    assert mmdet_odconv.__name__ not in result.stdout + result.stderr


@pytest.mark.parametrize(('module', 'version', 'message'), [
    (torch, '2.3.1+cu121', 'needs torch>=2.4.0,<3.0.0, found 2.3.1+cu121: pip install "torch>=2'),
    (mmdet, '2.28.0', 'needs mmdet>=3.1.0,<4.0.0, found 2.28.0: pip install "mmdet>=3.1,<4"'),
    (mmcv, '1.7.1', 'needs mmcv>=2.0.0,<2.4.0, found 1.7.1: pip install "mmcv'),
    (mmengine, '1.0.0', 'needs mmengine>=0.10.0,<1.0.0, found 1.0.0: pip install "mmengine'),
])
def test_a_package_out_of_range(monkeypatch, module, version, message):
    monkeypatch.setattr(module, '__version__', version)
    with pytest.raises(ImportError, match=re.escape(message)):
        stack.check_stack()


def importing(monkeypatch, name, error):
    """Make the import of ``name`` raise ``error``."""
    def import_module(module):
        if module == name:
            raise error
        return sys.modules[module]

    monkeypatch.setattr(stack.importlib, 'import_module', import_module)


@pytest.mark.parametrize('name', ['torch', 'mmcv', 'mmdet', 'mmengine'])
def test_a_missing_package(monkeypatch, name):
    importing(monkeypatch, name, ModuleNotFoundError(f'No module named {name!r}', name=name))
    with pytest.raises(ImportError, match=f'needs {name}>=.*, but it is not installed: pip'):
        stack.check_stack()


@pytest.mark.parametrize(('name', 'error'), [
    ('mmdet', ModuleNotFoundError("No module named 'pycocotools'", name='pycocotools')),
    ('mmcv', ImportError('libGL.so.1: cannot open shared object file: No such file or directory')),
])
def test_a_package_that_lacks_something(monkeypatch, name, error):
    importing(monkeypatch, name, error)
    with pytest.raises(ImportError) as caught:
        stack.check_stack()
    assert f'needs {name}>=' in str(caught.value)
    assert f'installed but could not be imported ({error}): install what' in str(caught.value)


def test_mmcv_without_ops(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmcv.ops', None)
    with pytest.raises(ImportError, match='needs mmcv with its ops .* MMCV_WITH_OPS=1 pip install'):
        stack.check_stack()


def test_mmdet_that_refuses_its_mmcv(monkeypatch):
    importing(monkeypatch, 'mmdet', AssertionError('MMCV==2.2.0 is used but incompatible.'))
    with pytest.raises(ImportError, match='mmdet.* that fits the others: MMCV==2.2.0 is used'):
        stack.check_stack()


def test_ops_need_torch_alone_and_layers_mmengine():
    block = ('import sys\nfor name in {}: sys.modules[name] = None\n'
             'import torch, mmdet_odconv.{} as m\n')
    run = 'print(m.dynamic_conv2d(torch.ones(1, 2, 4, 4), torch.ones(1, 3, 2, 3, 3)).shape)'
    result = python(block.format(['mmcv', 'mmdet', 'mmengine'], 'ops') + run,
                    MMDET_ODCONV_LAYERS_ONLY='1')
    assert 'torch.Size([1, 3, 2, 2])' in result.stdout, result.stderr
    run = 'print(m.ODConv2d(2, 3, 3)(torch.ones(2, 2, 4, 4)).shape)'
    result = python(block.format(['mmcv', 'mmdet'], 'layers') + run, MMDET_ODCONV_LAYERS_ONLY='1')
    assert 'torch.Size([2, 3, 2, 2])' in result.stdout, result.stderr


def test_requirements_drag_in_no_stack():
    names = re.findall(r'^[\w.-]+', (ROOT / 'requirements/runtime.txt').read_text(), re.M)
    assert names and not {'torch', 'mmcv', 'mmengine', 'mmdet'} & set(names)


def test_the_wheel_trains_by_bare_config_name_from_anywhere(tmp_path):
    source, site, work = tmp_path / 'source', tmp_path / 'site', tmp_path / 'work'
    tracked = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT,
                             capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name, follow_symlinks=False) if not (
            ROOT / name).is_dir() else (source / name).symlink_to(os.readlink(ROOT / name))
    pip = [sys.executable, '-m', 'pip', '-q', '--disable-pip-version-check']
    subprocess.run([*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp_path, source],
                   check=True)
    wheel, = tmp_path.glob('mmdet_odconv-*.whl')
    subprocess.run([*pip, 'install', '--no-deps', '--target', site, wheel], check=True)
    mim = site / 'mmdet_odconv/.mim'
    assert not any(path.is_symlink() for path in mim.rglob('*'))
    assert (mim / 'model-index.yml').is_file() and (mim / 'tools/train.py').is_file()
    installed, ours = ({path.name for path in root.glob('configs/[a-z]*/*.py')}
                       for root in (mim, ROOT))
    assert installed == ours

    work.mkdir()
    env = {**os.environ, 'PYTHONPATH': str(site)}
    program = str(Path(sys.executable).with_name('mim'))
    run, train = [program, 'run', 'mmdet_odconv', 'digits'], [program, 'train', 'mmdet_odconv']
    is_onedl = 'onedl-mim' in {found.name for found in importlib.metadata.distributions()}
    if is_onedl:
        # 0.5.1 takes the first file of an installed package for its place: here, its command.
        run, train = ([sys.executable, '-m', 'mmdet_odconv_command', name]
                      for name in ('digits', 'train'))
    subprocess.run([*run, 'data/digits', '--train', '4', '--val', '4', '--size', '96'], cwd=work,
                   env=env, check=True)
    result = subprocess.run([*train, digits.CONFIG, '--cfg-options', *digits.TINY,
                             'train_cfg.max_epochs=1'], cwd=work, env=env, capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    shown = result.stdout + result.stderr  # mim shows the path of the script that it runs
    if is_onedl:
        shown = subprocess.run([sys.executable, '-c', 'import mmdet_odconv; print(mmdet_odconv)'],
                               cwd=work, env=env, capture_output=True, text=True).stdout
    assert str(site) in shown
    assert (work / 'work_dirs' / Path(digits.CONFIG).stem / 'epoch_1.pth').is_file()


def test_files_that_the_documents_name_exist():
    # The reader's own, and the release's.
    theirs = {'my_config.py', 'my.py', 'dynamic.py', 'fd.py', 'main.py'}
    ours = {path.name for path in (*ROOT.glob('*.*'), *ROOT.glob('[a-z]*/**/*.*'))}
    for document in (ROOT / 'README.md', ROOT / 'CHANGELOG.md', *ROOT.glob('configs/*/README.md'),
                     *ROOT.glob('docs/**/*.md')):
        text = document.read_text()
        for link in re.findall(r'\]\((?!https?:|#)([^)#]+)', text):
            assert (document.parent / link).exists(), f'{document}: {link}'
        named = re.sub(r'\S*\{.*\}\S*', '', text)  # the shell's alternatives
        named = re.sub(r'\[[^\]]*\]\(https?:[^)]*\)', '', named)  # files of others, on the web
        for script in re.findall(r'(?<![\w*])(?:tools|configs|tests)/[\w./-]+\.py\b', named):
            assert (ROOT / script).is_file(), f'{document}: {script}'
        names = {Path(name).name for name in re.findall(r'[\w./-]+\.py\b', named)}
        assert names - theirs <= ours, f'{document}: {names - theirs - ours}'
