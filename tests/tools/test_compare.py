import json
from pathlib import Path

import digits
import pytest
from digits import ROOT

TINY = """_base_ = '{base}'
model = dict(backbone=dict(base_channels=8, stem_channels=8),
             neck=dict(in_channels=[8, 16, 32, 64]))
train_dataloader = dict(batch_size=2)
default_hooks = dict(logger=dict(interval=1))
"""


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('compare')
    digits.make(root)
    for name in ('r18', 'od-r18-k1'):
        base = ROOT / f'configs/quickstart/faster-rcnn_{name}_fpn_digits.py'
        (root / f'tiny_{name}.py').write_text(TINY.format(base=base))
    broken = (root / 'tiny_r18.py').read_text().replace('[8, 16, 32, 64]', '[9, 16, 32, 64]')
    (root / 'tiny_broken.py').write_text(broken)
    return root


def compare(root: Path, *args):
    return digits.tool(root, 'analysis_tools/compare.py', *args, '--work-dir', 'out',
                        '--iterations', '2', check=False)


def test_runs_are_compared_once_and_a_failed_one_stops_none(root):
    configs = ['tiny_r18.py', 'tiny_broken.py', 'tiny_od-r18-k1.py']
    result = compare(root, *configs, '--seeds', '0', '1', '--jobs', '2')
    assert result.returncode == 1
    assert 'tiny_broken, seed 0, failed:' in result.stdout
    found = json.loads((root / 'out/compare.json').read_text())
    assert len(found['failed']) == 2 and len(found['rows']) == 2
    static, dynamic = found['rows']
    assert static['config'] == 'tiny_r18' and static['seeds'] == [0, 1]
    assert 0 <= static['map'] <= 1 and static['spread'] >= 0 and static['seconds'] > 0
    assert dynamic['params'] > static['params'] and dynamic['gmadds'] > static['gmadds']
    table = (root / 'out/compare.md').read_text()
    assert '| r18 |' in table and '| od-r18-k1 |' in table
    assert (root / 'out/compare.png').read_bytes().startswith(b'\x89PNG')

    # A finished run is not run again: its result is believed.
    finished = root / 'out/tiny_r18_seed0_2iterations'
    (finished / 'result.json').write_text(json.dumps({'map': 0.75, 'seconds': 1.0}))
    # An interrupted one, after its checkpoint and before its result, goes on from there.
    interrupted = root / 'out/tiny_od-r18-k1_seed0_2iterations'
    (interrupted / 'result.json').unlink()
    assert compare(root, 'tiny_r18.py', 'tiny_od-r18-k1.py').returncode == 0
    assert json.loads((root / 'out/compare.json').read_text())['rows'][0]['map'] == 0.75
    log = (interrupted / 'log.txt').read_text()
    assert 'resumed epoch: 0, iter: 2' in log
    assert log.count('Iter(train)') == 2  # and not longer than its budget


def test_data_that_are_absent(tmp_path):
    result = compare(tmp_path, 'faster-rcnn_r18_fpn_digits.py')
    assert result.returncode == 1
    assert 'data/digits' in result.stdout and 'digits.py' in result.stdout
