import argparse
import importlib
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import digits
import pytest
import torch
from digits import ROOT
from mmengine.config import Config
from records import record

from mmdet_odconv import InputError
from mmdet_odconv.ops.machine import cpu_model

TINY = """_base_ = '{base}'
model = dict(backbone=dict(base_channels=8, stem_channels=8),
             neck=dict(in_channels=[8, 16, 32, 64]))
train_dataloader = dict(batch_size=2)
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


@pytest.mark.slow
def test_runs_are_compared_once_and_a_failed_one_stops_none(root):
    # A finished run is not run again: its result is believed.
    for name, score in (('r18', 0.75), ('od-r18-k1', 0.5)):
        finished = root / f'out/tiny_{name}_seed0_2iterations'
        finished.mkdir(parents=True)
        (finished / 'result.json').write_text(json.dumps(
            dict(map=score, seconds=1.0, curve=[[1, 0.25], [2, score]], loss=[[2, 3.0]])))
    result = compare(root, 'tiny_r18.py', 'tiny_od-r18-k1.py', '--seeds', '0', '1', '--jobs', '2')
    assert result.returncode == 0, result.stdout
    assert not (finished / 'log.txt').exists()
    found = json.loads((root / 'out/compare.json').read_text())
    assert len(found['failed']) == 0 and len(found['rows']) == 2
    static, dynamic = found['rows']
    assert static['config'] == 'tiny_r18' and static['seeds'] == [0, 1]
    assert 0.375 <= static['map'] <= 0.875 and static['spread'] >= 0 and static['seconds'] > 0
    assert dynamic['params'] > static['params'] and dynamic['gmadds'] > static['gmadds']
    table = (root / 'out/compare.md').read_text()
    assert '| r18 |' in table and '| od-r18-k1 |' in table
    for picture in ('compare.png', 'curves.png'):
        assert (root / 'out' / picture).read_bytes().startswith(b'\x89PNG')
    assert static['difference'] is None and dynamic['difference'][2] == 2
    assert ' ± ' in table.splitlines()[3].split('|')[4]

    # The records alone make the same again.
    record = json.loads((root / 'out/records/tiny_r18_seed1_2iterations.json').read_text())
    assert [i for i, _ in record['curve']] == [1, 2] and record['images']['val'] == 4
    digits.tool(root, 'analysis_tools/compare.py', '--redraw', 'out/records')
    assert (root / 'out/records/compare.md').read_text() == table
    assert (root / 'out/records/curves.png').is_file()

    # An interrupted one, after its checkpoint and before its result, goes on from there.
    interrupted = root / 'out/tiny_od-r18-k1_seed1_2iterations'
    (interrupted / 'result.json').unlink()
    # And each seed's own detector can be fine-tuned. What fails is named.
    start = 'out/tiny_r18_seed{seed}_2iterations/iter_2.pth'
    configs = 'tiny_r18.py', 'tiny_broken.py', 'tiny_od-r18-k1.py', f'tiny_r18.py,load_from={start}'
    result = compare(root, *configs, '--seeds', '1')
    assert result.returncode == 1 and 'tiny_broken, seed 1, failed:' in result.stdout
    found = json.loads((root / 'out/compare.json').read_text())
    assert len(found['failed']) == 1 and len(found['rows']) == 3
    assert '| r18, loaded |' in (root / 'out/compare.md').read_text()  # not from which file
    log = next((root / 'out').glob('*load_from*')) / 'log.txt'
    assert f'Load checkpoint from {start.format(seed=1)}' in log.read_text()
    log = (interrupted / 'log.txt').read_text()
    assert 'resumed epoch: 0, iter: 2' in log
    assert log.count('Iter(train)') == 1  # and not longer than its budget


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'tools/analysis_tools')
    return importlib.import_module('compare')


@pytest.fixture
def forked(root, module, monkeypatch):
    """The tool as a module, whose trainings are forked: to import takes longer than they do."""

    def tool(name, *args, log, threads):
        result = digits.tool(root, name, *args, check=False)
        with log.open('a') as file:
            file.write(result.stdout + result.stderr)
        result.check_returncode()

    monkeypatch.setattr(module, 'tool', tool)
    monkeypatch.chdir(root)
    return module


def test_any_coco_directory_a_test_split_options_and_equal_time(root, forked, monkeypatch):
    data = root / 'coco'
    digits.tool(root, 'dataset_converters/digits.py', data, '--train', '4', '--val', '2', '--test',
                '3', '--size', '96')
    for path in (data / 'annotations').glob('*.json'):  # two classes, under COCO's names
        content = json.loads(path.read_text())
        content['categories'] = [dict(id=1, name='even'), dict(id=2, name='odd')]
        for annotation in content['annotations']:
            annotation['category_id'] = 1 + annotation['category_id'] % 2
        path.with_name(f'instances_{path.stem}2017.json').write_text(json.dumps(content))
        path.unlink()
        (data / path.stem).rename(data / f'{path.stem}2017')
    static = root / 'out/tiny_r18_coco_batch4_seed0_2iterations'
    static.mkdir(parents=True)
    run = dict(cpu=cpu_model(), threads=len(os.sched_getaffinity(0)), torch=torch.__version__)
    (static / 'result.json').write_text(json.dumps({'map': 0.75, 'seconds': 1e-9, **run}))
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(sys, 'argv', [
        'compare.py', 'tiny_r18.py', 'tiny_od-r18-k1.py,model.backbone.init=he', '--data', 'coco',
        '--batch-size', '4', '--equal-time', '--work-dir', 'out', '--iterations', '2'])
    with pytest.raises(SystemExit) as ended:
        forked.main()
    assert ended.value.code == 0
    name = 'tiny_od-r18-k1,init=he_coco_batch4_seed0_2iterations'
    record = json.loads((root / f'out/records/{name}.json').read_text())
    assert record['images'] == dict(train=4, val=2, test=3) and record['split'] == 'test'
    assert record['options'] == {'model.backbone.init': 'he'} and record['batch_size'] == 4
    config = (root / 'out' / name / 'config.py').read_text()
    assert 'num_classes=2' in config and "init='he'" in config
    # In the time of a static network that costs nothing, the least: one iteration.
    assert '(1 iterations)' in (root / 'out/compare.md').read_text()


def test_two_configs_of_one_name(forked, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['compare.py', 'tiny_r18.py,load_from=a/1.pth',
                                      'tiny_r18.py,load_from=b/1.pth'])
    with pytest.raises(SystemExit, match='2 configs are called tiny_r18,load_from=1.pth, after'):
        forked.main()


def test_a_value_that_holds_a_comma(module, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [
        'compare.py', 'faster-rcnn_r18_fpn_digits.py,test_pipeline.1.scale=(192,192)'])
    with pytest.raises(SystemExit, match=r'an option 192\), but KEY=VALUE is expected after each'):
        module.main()


def test_a_run_of_another_config_is_not_taken_for_its_own(module, tmp_path, monkeypatch):
    trained = []

    def fail(*args, **options):
        raise OSError('no such network')

    def train(name, given, _, directory, *resume, log, threads):
        trained.append(Config.fromfile(given).load_from)
        (directory / 'config.py').write_text(  # as MMEngine leaves it
            f'load_from = {None if resume else trained[-1]!r}\nresume = {bool(resume)}\n'
            "train_cfg = dict(max_iters=2)\nlauncher = 'none'\nwork_dir = 'elsewhere'\n")
        (directory / 'last_checkpoint').write_text('iter_2.pth')
        log = directory / '1/vis_data/scalars.json'
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text('{"loss": 3, "iter": 2, "time": 1}\n{"coco/bbox_mAP": 0.5, "step": 2}\n')

    directory = tmp_path / 'run'
    a, b = (Config(dict(load_from=f'{name}/iter_500.pth', train_cfg=dict(max_iters=2)))
            for name in 'ab')
    # One that failed before it trained anything may be mended.
    monkeypatch.setattr(module, 'tool', fail)
    assert module.run(b, directory, {}) == {'error': 'no such network'}
    monkeypatch.setattr(module, 'tool', train)
    assert module.run(a, directory, {})['map'] == 0.5

    def only_a_is_found():
        with pytest.raises(InputError, match='run holds a run of another config, which differs in '
                                             r'load_from: give another --work-dir \(and'):
            module.run(b, directory, {})
        assert module.run(a, directory, {})['map'] == 0.5

    only_a_is_found()
    assert trained == ['a/iter_500.pth']
    (directory / 'result.json').unlink()  # interrupted: resumed by the same one alone
    only_a_is_found()
    only_a_is_found()
    assert trained == ['a/iter_500.pth'] * 2
    # Of older runs there is MMEngine's copy, without load_from if it was resumed.
    (directory / 'given/config.py').unlink()
    assert module.run(a, directory, {})['map'] == 0.5
    a.train_cfg.max_iters = 3
    with pytest.raises(InputError, match='differs in train_cfg: '):
        module.run(a, directory, {})


def test_options_are_read_as_cfg_options_are(module):
    assert [module.parse(value) for value in ('false', 'True', 'None', '1e-3', 'LN')] == [
        False, True, None, 1e-3, 'LN']


def test_more_seeds_leave_the_iterations_of_equal_time(module, monkeypatch):
    seconds = {'static': (1.0, 0.9), 'dynamic': (1.25, 1.26)}

    def run_entry(entry, seed, iterations, stats, args, budget='iterations'):
        kind = 'dynamic' if entry.place else 'static'
        return {**record(kind, seed, iterations, budget, seconds=seconds[kind][seed]),
                'config': entry.name}

    monkeypatch.setattr(module, 'run_entry', run_entry)
    monkeypatch.setattr(module, 'size_of', lambda config, data: {})
    for seeds in ([0], [0, 1]):
        records = module.train_all(argparse.Namespace(
            configs=[f'faster-rcnn_{name}_fpn_digits.py' for name in ('r18', 'od-r18-k1')],
            seeds=seeds, iterations=750, equal_time=True, jobs=1, data=None, batch_size=None))
        assert [(run['seed'], run['iterations']) for run in records
                if run['budget'] == 'time'] == [(seed, 600) for seed in seeds]


def test_equal_time_of_runs_that_were_timed_unlike(module, monkeypatch, capsys):
    def run_entry(entry, seed, iterations, stats, args):
        return {**record('', seed), 'config': entry.name, 'threads': 1 + entry.place}

    monkeypatch.setattr(module, 'run_entry', run_entry)
    monkeypatch.setattr(module, 'size_of', lambda config, data: {})
    module.train_all(argparse.Namespace(
        configs=[f'faster-rcnn_{name}_fpn_digits.py' for name in ('r18', 'od-r18-k1')],
        seeds=[0], iterations=750, equal_time=True, jobs=1, data=None, batch_size=None))
    assert ('faster-rcnn_od-r18-k1_fpn_digits: equal time is not known, since no seed of it was '
            'run as faster-rcnn_r18_fpn_digits was' in capsys.readouterr().err)


def test_what_is_queued_when_it_is_interrupted_is_not_begun(module, monkeypatch, capsys):
    begun, running, cancelled = [], threading.Event(), threading.Event()
    shutdown = ThreadPoolExecutor.shutdown

    def cancel_and_wait(pool, wait=True, *, cancel_futures=False):
        shutdown(pool, wait=False, cancel_futures=cancel_futures)
        cancelled.set()
        shutdown(pool, wait=wait)

    monkeypatch.setattr(ThreadPoolExecutor, 'shutdown', cancel_and_wait)

    def run_entry(entry, seed, iterations, stats, args):
        begun.append(seed)
        running.set()
        if seed == 0:
            cancelled.wait(60)  # as a training that was interrupted, too, takes time to end
        return {**record('static', seed), 'error': 'interrupted'}

    monkeypatch.setattr(module, 'run_entry', run_entry)

    def interrupted(runs, **options):
        assert running.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, 'track', interrupted)
    monkeypatch.setattr(module, 'size_of', lambda config, data: {})
    monkeypatch.setattr(sys, 'argv', ['compare.py', 'faster-rcnn_r18_fpn_digits.py', '--seeds',
                                      '0', '1', '2', '3'])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 130 and begun == [0]
    assert 'interrupted: run the same command again to go on' in capsys.readouterr().err


def test_a_detector_that_nothing_counts_is_compared(module, tmp_path):
    runs = [record('static', 0), record('dynamic', 0)]
    del runs[1]['params'], runs[1]['gmadds']
    rows, _ = module.report(runs, tmp_path, Mock())
    assert rows[1]['params'] is None and (tmp_path / 'compare.png').is_file()
    assert '| dynamic | 0.500 | 0 | +0.000 |  |  | 1.00 |' in (tmp_path / 'compare.md').read_text()


def test_configs_that_their_backbones_do_not_tell_apart_go_by_their_files(module, tmp_path):
    """As a config and what swap_backbone makes of it, or two detectors of one backbone."""
    names = ('faster-rcnn_r18_fpn_digits', 'faster-rcnn_r18_fpn_digits_odconv-k4,load_from=a.pth')
    assert list(module.short_names(names).values()) == [
        'faster-rcnn_r18_fpn_digits', 'faster-rcnn_r18_fpn_digits_odconv-k4, loaded']
    assert list(module.short_names([names[0], 'faster-rcnn_od-r18-k1_fpn_digits']).values()) == [
        'r18', 'od-r18-k1']
    runs = [{**record(name, 0), 'place': place} for place, name in enumerate(names)]
    module.report(runs, tmp_path, Mock())
    assert '| faster-rcnn_r18_fpn_digits_odconv-k4, loaded |' in (
        tmp_path / 'compare.md').read_text()


def test_a_run_interrupted_before_its_last_evaluation_is_evaluated(module, tmp_path, monkeypatch):
    """Its last checkpoint is there, and no iteration is left to train."""
    seen = []

    def tool(name, given, *rest, log, threads):
        config = Config.fromfile(given)
        if name == 'train.py':
            (tmp_path / 'last_checkpoint').write_text('iter_2.pth')
            scalars = tmp_path / '1/vis_data/scalars.json'
            scalars.parent.mkdir(parents=True, exist_ok=True)
            scalars.write_text('{"loss": 3, "iter": 2, "time": 1}\n'
                               '{"coco/bbox_mAP": 0.2, "step": 1}\n')
            return
        seen.append(config.test_dataloader)
        metrics = Path(rest[-1]) / '1/1.json'
        metrics.parent.mkdir(parents=True)
        metrics.write_text(json.dumps({'coco/bbox_mAP': 0.5 if seen[-1] == 'val' else 0.4}))

    monkeypatch.setattr(module, 'tool', tool)
    config = Config(dict(train_cfg=dict(max_iters=2), **{
        f'{split}_{part}': split for split in ('val', 'test')
        for part in ('dataloader', 'evaluator')}))
    result = module.run(config, tmp_path, dict(val=2, test=3))
    assert result['map'] == 0.4 and result['curve'] == [(1, 0.2), (2, 0.5)]
    assert seen == ['val', 'test']


def trains(directory, scalars):
    """What stands for the tools: a training that logs these lines, and no test set."""

    def tool(name, *args, log, threads):
        (directory / 'last_checkpoint').write_text('iter_2.pth')
        file = directory / '1/vis_data/scalars.json'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"loss": 3, "iter": 2, "time": 1}\n' + scalars)

    return tool


def test_a_detector_that_finds_nothing_counts(module, tmp_path, monkeypatch):
    """MMDetection logs no mAP for it; left out, a collapsed seed would raise the mean."""
    monkeypatch.setattr(module, 'tool', trains(
        tmp_path, '{"coco/bbox_mAP": 0.1, "step": 1}\n{"time": 0.1, "step": 2}\n'))
    result = module.run(Config(dict(train_cfg=dict(max_iters=2))), tmp_path, dict(val=2))
    assert result['map'] == 0 and result['curve'] == [(1, 0.1), (2, 0.0)]


def test_a_result_is_of_the_images_that_it_was_of(module, tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'tool', trains(tmp_path, '{"coco/bbox_mAP": 0.1, "step": 2}\n'))
    config = Config(dict(train_cfg=dict(max_iters=2)))
    module.run(config, tmp_path, dict(train=9, val=2))
    assert module.run(config, tmp_path, dict(train=9, val=2))['map'] == 0.1
    with pytest.raises(InputError, match='result of 9 train, 2 val images, where there are 90'):
        module.run(config, tmp_path, dict(train=90, val=2))


def test_a_run_of_two_machines_is_not_timed(module, tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'tool', Mock(side_effect=OSError('interrupted')))
    config = Config(dict(train_cfg=dict(max_iters=2)))
    module.run(config, tmp_path, {}, threads=1)
    monkeypatch.setattr(module, 'tool', trains(tmp_path, '{"coco/bbox_mAP": 0.1, "step": 2}\n'))
    assert module.run(config, tmp_path, {}, threads=2)['cpu'] == 'unknown'


def test_one_comparison_trains_on_one_data_set(module, tmp_path, monkeypatch):
    base = ROOT / 'configs/quickstart/faster-rcnn_r18_fpn_digits.py'
    (tmp_path / 'other.py').write_text(
        f"_base_ = {str(base)!r}\ntrain_dataloader = dict(batch_size=2)\n")
    monkeypatch.setattr(module, 'run_entry', None)  # nothing is begun
    monkeypatch.setattr(sys, 'argv', ['compare.py', base.name, str(tmp_path / 'other.py')])
    with pytest.raises(SystemExit, match='faster-rcnn_r18_fpn_digits trains on 4 images of '
                                         'data/digits, other trains on 2 images of data/digits: '
                                         'give --data or --batch-size'):
        module.main()


def test_what_intervals_need_is_asked_for_before_hours_of_training(module, monkeypatch):
    monkeypatch.setitem(sys.modules, 'scipy', None)
    monkeypatch.setattr(module, 'train_all', None)
    monkeypatch.setattr(sys, 'argv', ['compare.py', 'faster-rcnn_r18_fpn_digits.py'])
    with pytest.raises(SystemExit, match='Intervals need SciPy, not installed here'):
        module.main()


def test_an_interval_of_fewer_seeds_than_its_row_says_so(module):
    assert module.signed((0.1, 0.02, 3), [0, 1, 2]) == '+0.100 ± 0.020'
    assert module.signed((0.1, 0.02, 2), [0, 1, 2]) == '+0.100 ± 0.020 of 2 seeds'
    assert module.signed((0.1, float('nan'), 1), [0, 1]) == '+0.100 of 1 seed'


def test_a_curve_is_of_the_same_seeds_all_along(module, tmp_path, monkeypatch):
    monkeypatch.setattr(module.plt, 'close', lambda figure: None)
    runs = [{**record('static', seed), 'curve': curve} for seed, curve in enumerate(
        ([(1, 0.2), (2, 0.4)], [(1, 0.4), (2, 0.6)], [(2, 0.9)]))]
    module.draw_curves(runs, tmp_path / 'curves.png')
    line = module.plt.gcf().axes[0].lines[0]
    assert list(line.get_xdata()) == [1, 2]
    assert list(line.get_ydata()) == pytest.approx([0.3, 0.5])
    monkeypatch.undo()
    module.plt.close('all')


def test_what_is_written_is_json(module, tmp_path, monkeypatch, capsys):
    """One seed has no interval, which JSON has no word for; nor is half a record read as one."""
    monkeypatch.setattr(module, 'run_entry', lambda entry, seed, *_: {
        **record('', seed), 'config': entry.name, 'place': entry.place})
    monkeypatch.setattr(module, 'size_of', lambda config, data: {})
    monkeypatch.setattr(sys, 'argv', [
        'compare.py', *(f'faster-rcnn_{name}_fpn_digits.py' for name in ('r18', 'od-r18-k1')),
        '--work-dir', str(tmp_path)])
    with pytest.raises(SystemExit):
        module.main()
    text = (tmp_path / 'compare.json').read_text()
    assert 'NaN' not in text and json.loads(text)['rows'][1]['difference'][1] is None
    (tmp_path / 'half').mkdir()
    (tmp_path / 'half/a.json').write_text('{"config": "stat')
    monkeypatch.setattr(sys, 'argv', ['compare.py', '--redraw', str(tmp_path / 'half')])
    with pytest.raises(SystemExit, match='half holds JSON that cannot be read'):
        module.main()


def test_a_seed_that_is_named_twice(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['compare.py', 'x.py', '--seeds', '1', '0', '1'])
    with pytest.raises(SystemExit):
        module.main()
    assert '--seeds names a seed twice: 1 0 1' in capsys.readouterr().err


@pytest.mark.parametrize(('option', 'value'), [
    ('--jobs', 0), ('--evaluations', 0), ('--batch-size', 0)])
def test_options_out_of_range(module, monkeypatch, capsys, option, value):
    monkeypatch.setattr(sys, 'argv', ['compare.py', 'x.py', option, str(value)])
    with pytest.raises(SystemExit):
        module.main()
    assert f'{option} must be at least 1, got {value}' in capsys.readouterr().err


@pytest.mark.parametrize(('other', 'differs'), [
    (record('dynamic', 0, 250), r'iterations \(250, 750\)'),
    ({**record('dynamic', 0), 'data': 'cells'}, r'data \(cells, digits\)'),
    ({**record('dynamic', 0), 'images': dict(train=8, test=9)},
     r'images \(8 train 9 test, 9 train 9 test\)'),
    ({**record('dynamic', 0), 'batch_size': 2}, r'batch size \(2, 4\)'),
    ({**record('dynamic', 0), 'place': 0}, r'the config given first \(dynamic, static\)')])
def test_records_of_two_comparisons(module, tmp_path, monkeypatch, other, differs):
    for name, content in (('a', record('static', 0)), ('b', other)):
        (tmp_path / f'{name}.json').write_text(json.dumps(content))
    monkeypatch.setattr(sys, 'argv', ['compare.py', '--redraw', str(tmp_path)])
    with pytest.raises(SystemExit, match=f'holds records that differ in {differs}, but a table'):
        module.main()


def test_the_table_names_every_machine(module, tmp_path):
    """Runs of one seed end differently on two CPUs, so a reader must see that there were two."""
    runs = [record('static', 0), record('dynamic', 0), {**record('static', 1), 'cpu': 'Xeon'}]
    module.report(runs, tmp_path, Mock())
    table = (tmp_path / 'compare.md').read_text()
    assert 's / iteration' not in table  # of two machines they are not to be compared
    assert table.endswith(
        'EPYC, 1 threads a run, torch 2.13.0; Xeon, 1 threads a run, torch 2.13.0.\n')


def test_data_that_are_absent(tmp_path):
    result = compare(tmp_path, 'faster-rcnn_r18_fpn_digits.py')
    assert result.returncode == 1
    assert 'data/digits' in result.stdout and 'digits.py' in result.stdout
