"""Checkpoints by URL and by MMEngine's other schemes, from a server on this machine."""
import functools
import http.server
import os
import pathlib
import re
import sys
import threading

import pytest
import torch
from mmengine.optim import scheduler
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader

from mmdet_odconv import InputError
from mmdet_odconv.checkpoints import loading


class Malicious:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path('ran'), )


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A directory and the URL at which it is served; downloads stay in another."""
    files = tmp_path / 'files'
    files.mkdir()
    torch.save({'state_dict': {'weight': torch.ones(2)}}, files / 'good.pth')
    torch.save({'state_dict': {}, 'meta': Malicious()}, files / 'evil.pth')
    (files / 'page.pth').write_text('<html>not found</html>')
    (files / 'cut.pth').write_bytes((files / 'good.pth').read_bytes()[:-200])

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), functools.partial(Handler, directory=str(files)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path / 'mmengine'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.chdir(tmp_path)
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


MESSAGES = {
    'evil': r'evil\S* was refused, and nothing in it was run, because it holds \S*(Path|touch)',
    'page': r'page\S* is not a checkpoint that torch can read',
    'cut': r'cut\S* is cut short or damaged: remove the copy in \S+checkpoints to download it',
}


@pytest.mark.parametrize('name', MESSAGES)
def test_a_bad_checkpoint_by_url(served, name):
    with pytest.raises(InputError, match=MESSAGES[name]):
        CheckpointLoader.load_checkpoint(f'{served}/{name}.pth')
    assert not pathlib.Path('ran').exists()


@pytest.mark.parametrize(('scheme', 'models'), [
    ('modelzoo', 'get_torchvision_models'), ('torchvision', 'get_torchvision_models'),
    ('open-mmlab', 'get_external_models'), ('openmmlab', 'get_external_models'),
    ('mmcls', 'get_mmcls_models')])
def test_every_scheme_reads_weights_only(served, monkeypatch, scheme, models):
    urls = {name: f'{served}/{name}.pth' for name in ('good', *MESSAGES)}
    monkeypatch.setattr(mmengine_checkpoint, models, lambda: urls)
    assert 'state_dict' in CheckpointLoader.load_checkpoint(f'{scheme}://good')
    for name, message in MESSAGES.items():
        with pytest.raises(InputError, match=message):
            CheckpointLoader.load_checkpoint(f'{scheme}://{name}')
    assert not pathlib.Path('ran').exists()


def test_no_scheme_was_left_out():
    assert all(load.__module__ == 'mmengine.runner.checkpoint' and hasattr(load, '__wrapped__')
               for load in CheckpointLoader._schemes.values())


def test_a_users_own_switch_is_set_aside_and_restored(served, monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    assert 'state_dict' in CheckpointLoader.load_checkpoint('files/good.pth')
    with pytest.raises(InputError, match=MESSAGES['evil']):
        CheckpointLoader.load_checkpoint('files/evil.pth')
    assert os.environ['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'] == '1'
    assert 'TORCH_FORCE_WEIGHTS_ONLY_LOAD' not in os.environ


@pytest.mark.parametrize('make', [
    lambda optimizer: scheduler.OneCycleLR(optimizer, eta_max=1.0, total_steps=9),
    lambda optimizer: scheduler.OneCycleLR(optimizer, eta_max=1.0, total_steps=9,
                                           anneal_strategy='linear'),
    lambda optimizer: scheduler.MultiStepLR(optimizer, milestones=[3, 3, 7]),
    lambda optimizer: scheduler.CosineRestartLR(optimizer, periods=[3, 4], restart_weights=[1, 0.5],
                                             eta_min=0.0),
    lambda optimizer: scheduler.ReduceOnPlateauLR(optimizer),
    lambda optimizer: scheduler.PolyLR(optimizer),
])
def test_schedules_that_checkpoints_hold(tmp_path, make):
    def optimizer():
        return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)

    before = make(optimizer()).state_dict()
    torch.save({'state_dict': {}, 'param_schedulers': [before]}, tmp_path / 'checkpoint.pth')
    read = CheckpointLoader.load_checkpoint(str(tmp_path / 'checkpoint.pth'))
    make(optimizer()).load_state_dict(read['param_schedulers'][0])
    assert str(read['param_schedulers'][0]) == str(before)


def test_addresses_of_torchvision_need_no_torchvision(monkeypatch):
    asked = []
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    monkeypatch.setattr(loading, 'load_from_http', lambda address, map_location=None:
                        asked.append(address) or {'conv1.weight': torch.ones(1)})
    state = CheckpointLoader.load_checkpoint('torchvision://resnet50')
    assert 'conv1.weight' in state
    address, = asked
    assert re.fullmatch(r'https://\S+/resnet50-[0-9a-f]{8}\.pth', address)
    with pytest.raises(InputError, match='could not be imported .* install the torchvision of'):
        CheckpointLoader.load_checkpoint('torchvision://nosuchnet')
