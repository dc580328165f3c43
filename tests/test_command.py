"""The console command: what it answers at once, and what it hands on."""
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmdet_odconv.command import READS, tool_and_arguments
from mmdet_odconv.errors import InputError
from mmdet_odconv.names import find_config, find_tools

ROOT = Path(__file__).parents[1]
CONFIG = 'faster-rcnn_od-r18-k4_fpn_digits.py'


@pytest.mark.parametrize(('arguments', 'message'), [
    (['tarin', CONFIG], 'mmdet_odconv has no command tarin: did you mean train?'),
    (['train', 'faster-rcnn_od-r18-k5_fpn_digits'], 'did you mean faster-rcnn_od-r18-k4'),
    (['test', CONFIG, 'nosuch.pth'], 'nosuch.pth does not exist: check its path'),
    (['export', CONFIG, 'nosuch.pth', '--out', 'a.onnx'], 'nosuch.pth does not exist'),
    (['demo', 'nosuch.jpg', CONFIG, '--weights', 'a.pth'], 'does not exist: check its path'),
    (['swap-backbone', 'nosuch.py'], 'nosuch.py does not exist: give a file, or mmdet::NAME'),
    (['new-config', '--weights', 'nosuch.pth'], 'nosuch.pth does not exist'),
])
def test_a_mistake_costs_no_import(tmp_path, arguments, message):
    # Importing any of them would fail, with another message.
    code = ('import sys\nfor name in ("torch", "mmcv", "mmdet", "mmengine"): sys.modules[name] = '
            'None\nimport mmdet_odconv_command as c\nc.main()')
    start = time.monotonic()
    result = subprocess.run([sys.executable, '-c', code, *arguments], cwd=tmp_path, text=True,
                            capture_output=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert result.returncode == 1 and time.monotonic() - start < 10  # 0.2 s where nothing else runs
    assert result.stderr.startswith('error: ') and len(result.stderr.splitlines()) == 1
    assert message in result.stderr


def test_a_config_is_found_by_its_bare_name_and_the_rest_is_handed_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(find_config(CONFIG))
    for name in (CONFIG, CONFIG[:-3]):
        arguments = tool_and_arguments(['train', name, '--cfg-options', 'a=b'])
        assert arguments == [str(find_tools()['train']), path, '--cfg-options', 'a=b']
    assert tool_and_arguments(['train', '--resume', 'x.py'])[1:] == ['--resume', 'x.py']
    assert tool_and_arguments(['get_model_stats', CONFIG])[0].endswith('get_model_stats.py')
    assert tool_and_arguments(['demo', '--help'])[0].endswith('image_demo.py')
    with pytest.raises(InputError, match='has no command nothing-like-it: see mmdet_odconv --help'):
        tool_and_arguments(['nothing-like-it'])


def test_a_config_of_another_folder_is_not_the_plugins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = find_config(CONFIG)
    for folder in ('', './', f'{found.parent.name}/', f'configs/{found.parent.name}/'):
        assert find_config(folder + CONFIG) == found
    with pytest.raises(InputError, match=f'^Config mine/{CONFIG} does not exist, .* {CONFIG}'):
        find_config(f'mine/{CONFIG}')


def test_help_names_every_tool(capsys):
    assert tool_and_arguments(['--help']) == []
    printed = capsys.readouterr().out
    tools = find_tools()
    assert set(READS) <= set(tools) and all(f'  {name}' in printed for name in tools)
    assert len(tools) == len(list((ROOT / 'tools').rglob('*.py')))


def test_the_tool_runs_in_the_place_of_the_command(tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / 'mmdet_odconv_command.py'), 'digits', 'data', '--train', '2',
         '--val', '1', '--size', '96'], cwd=tmp_path, text=True, capture_output=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / 'data/train').iterdir())) == 2


def test_every_tool_has_a_name_of_its_own():
    tools = find_tools()
    assert {path.relative_to(ROOT / 'tools') for path in tools.values()} == {
        path.relative_to(ROOT / 'tools') for path in (ROOT / 'tools').rglob('*.py')}
    assert tools['benchmark'].parent.name == 'analysis_tools'
    assert tools['deployment-benchmark'].parent.name == 'deployment'
