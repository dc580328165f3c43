import json
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmdet_odconv import ODConv2d
from mmdet_odconv.ops import machine as machines
from mmdet_odconv.ops.machine import NOMINAL, VARIABLE, Machine, machine, read, save, set_machine

CPU = torch.device('cpu')


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Nothing measured, nothing kept, and nobody else at work."""
    monkeypatch.setattr(machines.time, 'thread_time', time.perf_counter)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.delenv(VARIABLE, raising=False)
    machines._kept.cache_clear()
    yield
    machines._kept.cache_clear()


def count_measurements(monkeypatch):
    calls, measure = [], machines.measure
    monkeypatch.setattr(machines, 'measure', lambda *a: calls.append(a) or measure(*a))
    return calls


def test_measured_once_and_kept_for_later_processes(monkeypatch):
    calls = count_measurements(monkeypatch)
    first = machine(CPU, torch.float32)
    assert all(value > 0 for value in vars(first).values())
    machines._kept.cache_clear()  # as in another process
    assert machine(CPU, torch.float32) == first and len(calls) == 1
    machine(CPU, torch.float64)
    assert len(calls) == 2 and len(read(machines.cache_file())) == 2


def test_a_busy_cpu_is_not_measured_for_good(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(machines.time, 'thread_time', lambda: time.perf_counter() / 2)
        assert machine(CPU, torch.float32) == NOMINAL
    assert not machines.cache_file().exists()
    machines._kept.cache_clear()  # the next process, when the other work has ended
    assert machine(CPU, torch.float32) != NOMINAL and machines.cache_file().exists()


def test_other_instruction_sets_are_another_machine(monkeypatch):
    calls = count_measurements(monkeypatch)
    machine(CPU, torch.float32)
    monkeypatch.setenv('MKL_ENABLE_INSTRUCTIONS', 'AVX2')
    machines._kept.cache_clear()
    machine(CPU, torch.float32)
    assert len(calls) == 2


def test_a_file_of_ones_own(monkeypatch, tmp_path):
    calls, path = count_measurements(monkeypatch), tmp_path / 'new' / 'machine.json'
    monkeypatch.setenv(VARIABLE, str(path))
    first = machine(CPU, torch.float32)
    assert len(calls) == 1 and list(read(path).values()) == [first]
    torch.use_deterministic_algorithms(True)
    try:
        assert machine(CPU, torch.float32) == first
    finally:
        torch.use_deterministic_algorithms(False)


def test_no_choice_depends_on_a_measurement_where_that_is_asked(monkeypatch):
    calls = count_measurements(monkeypatch)
    torch.use_deterministic_algorithms(True)
    try:
        assert machine(CPU, torch.float32) == NOMINAL
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setenv(VARIABLE, 'nominal')
    machines._kept.cache_clear()
    assert machine(CPU, torch.float32) == NOMINAL
    set_machine(Machine(1, 2, 3, 4, 5, 6))
    try:
        assert machine(CPU, torch.float32) == Machine(1, 2, 3, 4, 5, 6)
    finally:
        set_machine(None)
    assert machine(torch.device('meta'), torch.float32) == NOMINAL and not calls


def test_a_file_that_lacks_the_machine_is_no_reason_to_measure(monkeypatch, tmp_path):
    calls, path = count_measurements(monkeypatch), tmp_path / 'machine.json'
    path.write_text('{}')
    monkeypatch.setenv(VARIABLE, str(path))
    torch.use_deterministic_algorithms(True)
    try:
        assert machine(CPU, torch.float32) == NOMINAL and not calls
    finally:
        torch.use_deterministic_algorithms(False)


def test_measuring_is_in_the_dtype_asked_for_and_draws_no_random_numbers(monkeypatch):
    dtypes, conv2d = set(), machines.F.conv2d
    monkeypatch.setattr(machines.F, 'conv2d', lambda *a, **k: (
        dtypes.add((output := conv2d(*a, **k)).dtype), output)[1])
    before = torch.get_rng_state()
    with torch.autocast('cpu', torch.bfloat16):
        machines.measure(CPU, torch.float32)
    assert dtypes == {torch.float32} and torch.equal(torch.get_rng_state(), before)


def test_measuring_is_no_part_of_what_a_mode_counts(monkeypatch):
    calls, layer, flops = count_measurements(monkeypatch), ODConv2d(16, 16, 3), []
    for _ in range(2):
        with FlopCounterMode(display=False) as mode, torch.no_grad():
            layer(torch.randn(2, 16, 8, 8))
        flops.append(mode.get_total_flops())
    assert len(calls) == 1 and flops[0] == flops[1]


@pytest.mark.parametrize('text', ['', '[]', '{"a": 1}', '{"a": {"convolution": 1}}', json.dumps(
    {'a': dict(vars(NOMINAL), bandwidth=0)})])
def test_a_damaged_file_is_measured_anew(text):
    machines.cache_file().parent.mkdir(parents=True)
    machines.cache_file().write_text(text)
    assert read(machines.cache_file()) == {}
    kept = machine(CPU, torch.float32)
    assert list(read(machines.cache_file()).values()) == [kept]


def test_a_directory_that_cannot_be_written_is_none(monkeypatch, tmp_path):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    assert machine(CPU, torch.float32) != NOMINAL
    save({}, tmp_path / 'file' / 'machine.json')


def test_what_could_not_be_put_in_its_place_is_removed(tmp_path):
    (tmp_path / 'taken').mkdir()
    save({}, tmp_path / 'taken')
    assert [path.name for path in tmp_path.iterdir()] == ['taken']


def test_a_user_without_a_home(monkeypatch, tmp_path):
    def home():
        raise RuntimeError('Could not determine home directory.')

    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setattr(machines.Path, 'home', home)
    monkeypatch.setattr(machines.tempfile, 'tempdir', str(tmp_path))
    kept = machine(CPU, torch.float32)
    assert list(read(tmp_path / 'mmdet_odconv/machine.json').values()) == [kept]


def test_command(tmp_path):
    result = subprocess.run([sys.executable, '-m', 'mmdet_odconv.ops'], capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr
    assert 'Gflop/s' in result.stdout and f'kept in {machines.cache_file()}' in result.stdout
    assert len(read(machines.cache_file())) == 1
