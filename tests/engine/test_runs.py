"""Real runs of the command-line tools on real images: train, resume, test, and their errors."""
import errno
import json
import pathlib
import pickle
import re
import shutil
import subprocess
import sys

import digits
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.runner import Runner, load_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader

from mmdet_odconv import InputError
from mmdet_odconv.deployment.export import load_detector
from mmdet_odconv.engine.checkpointing import WholeFileBackend
from mmdet_odconv.engine.launch import explain, find_config


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A directory with the data and a run of three epochs in run/, and what it printed."""
    root = tmp_path_factory.mktemp('trained')
    digits.make(root)
    result = digits.tool(root, 'train.py', digits.CONFIG, '--work-dir', 'run', '--cfg-options',
                         'default_hooks.checkpoint.max_keep_ckpts=3', *digits.TINY)
    return root, result.stdout


def maps(output):
    return re.findall(r'coco/bbox_mAP: (\S+)', output)


def test_training_ends_with_a_coco_table_and_checkpoints(trained):
    root, output = trained
    assert 'Average Precision  (AP) @[ IoU=0.50:0.95' in output
    assert len(maps(output)) == 3
    assert {p.name for p in (root / 'run').glob('*.pth')} == {f'epoch_{i}.pth' for i in (1, 2, 3)}


def test_testing_gives_what_training_last_evaluated(trained):
    root, output = trained
    result = digits.tool(root, 'test.py', 'run/' + digits.CONFIG, 'run/epoch_3.pth', '--work-dir',
                         'run', '--out', 'run/predictions.pkl', '--cfg-options',
                         'test_evaluator.classwise=True')
    assert maps(result.stdout) == maps(output)[-1:]
    config = Config.fromfile(root / 'run' / digits.CONFIG)
    config.test_dataloader.dataset.data_root = f'{root}/data/digits/'
    model, _ = load_detector(config, str(root / 'run/epoch_3.pth'))
    loader = Runner.build_dataloader(config.test_dataloader)
    expected = [sample.pred_instances for data in loader for sample in model.test_step(data)]
    found = [one['pred_instances'] for one in load(root / 'run/predictions.pkl')]
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected):
        torch.testing.assert_close(one['scores'], other.scores)
        torch.testing.assert_close(one['bboxes'], other.bboxes)
    assert re.search(r'\| category \| +mAP', result.stdout)
    report = digits.tool(root, 'analysis_tools/report.py', 'run')
    assert 'AP @ IoU 0.50:0.95' in report.stdout
    metrics = json.loads((root / 'run/metrics.json').read_text())
    assert metrics['bbox_mAP'] == float(maps(output)[-1])
    for name in ('curves.png', 'predictions.png'):
        assert (root / 'run' / name).read_bytes().startswith(b'\x89PNG')
        assert name in report.stdout


def test_resuming_continues_where_the_run_stopped(trained, tmp_path):
    root, output = trained
    shutil.copytree(root / 'data', tmp_path / 'data')
    work = tmp_path / 'run'
    work.mkdir()
    shutil.copy(root / 'run/epoch_1.pth', work)
    (work / 'last_checkpoint').write_text(str(work / 'epoch_1.pth'))
    result = digits.tool(tmp_path, 'train.py', digits.CONFIG, '--work-dir', 'run', '--resume',
                         '--cfg-options', *digits.TINY)
    assert 'resumed epoch: 1, iter: 1' in result.stdout
    assert not re.search(r'Epoch\(train\) +\[1\]', result.stdout)
    resumed, whole = (CheckpointLoader.load_checkpoint(str(path / 'run/epoch_3.pth'))
                      for path in (tmp_path, root))
    for state in (resumed, whole):
        assert state['meta']['iter'] == 3
        assert {s['step'].item() for s in state['optimizer']['state'].values()} == {3}
    assert resumed['param_schedulers'] == whole['param_schedulers']
    assert len(resumed['message_hub']['log_scalars']['train/loss'].data[0]) == 3


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(),
                                reason='MMEngine has AMP on accelerators alone')


@pytest.mark.parametrize('option', ['--auto-scale-lr', pytest.param('--amp', marks=needs_cuda)])
def test_options_of_mmdet(trained, option):
    root, _ = trained
    digits.tool(root, 'train.py', digits.CONFIG, '--work-dir', 'options', option, '--cfg-options',
                *digits.TINY, 'train_cfg.max_epochs=1', 'train_dataloader.batch_size=2')
    saved = CheckpointLoader.load_checkpoint(str(root / 'options/epoch_1.pth'))
    lr = saved['optimizer']['param_groups'][0]['initial_lr']
    assert lr == (0.0005 if option == '--auto-scale-lr' else 0.001)


def test_temperature_reaches_the_visualiser(trained):
    root, _ = trained
    (root / 'annealed.py').write_text(
        f"_base_ = '{find_config(digits.CONFIG)}'\n"
        "custom_hooks = [dict(type='TemperatureAnnealingHook', begin=31, end_epoch=3)]\n")
    digits.tool(root, 'train.py', 'annealed.py', '--work-dir', 'annealed', '--cfg-options',
                *digits.TINY)
    scalars, = (root / 'annealed').glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in scalars.read_text().splitlines()]
    assert [r['temperature'] for r in records if 'temperature' in r] == pytest.approx([31, 21, 11])


def test_mask_rcnn_reports_both_maps(trained):
    root, _ = trained
    result = digits.tool(root, 'train.py', digits.CONFIG.replace('faster', 'mask'), '--work-dir',
                         'mask', '--cfg-options', *digits.TINY, 'train_cfg.max_epochs=1')
    assert 'coco/bbox_mAP: ' in result.stdout and 'coco/segm_mAP: ' in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason='MMEngine launches on GPUs')
def test_two_processes_train_on_cpus_with_no_unused_parameter(trained):
    root, _ = trained
    result = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2',
         str(digits.ROOT / 'tools/train.py'), digits.CONFIG, '--work-dir', 'ddp', '--launcher',
         'pytorch', '--cfg-options', *digits.TINY, 'train_cfg.max_epochs=2',
         'train_dataloader.batch_size=2'], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(re.findall(r'Epoch\(train\) +\[\d\]\[1/1\]', result.stdout)) == 2
    saved = CheckpointLoader.load_checkpoint(str(root / 'ddp/epoch_2.pth'))
    assert len(saved['random_states']) == 2


@pytest.mark.parametrize(('options', 'message'), [
    (['data_root=nowhere/', 'train_dataloader.dataset.data_root=nowhere/'],
     r'Annotation file nowhere/annotations/train\.json does not exist: set data_root'),
    (['train_dataloader.dataset.ann_file=bad.json'],
     r'Annotation file data/digits/bad\.json could not be read as COCO \(JSONDecodeError: .*\): '),
    (['train_dataloader.dataset.ann_file=list.json'],
     r'Annotation file data/digits/list\.json could not be read as COCO \(.*\): expected a JSON'),
    (['train_dataloader.dataset.ann_file=keys.json'],
     r'Annotation file data/digits/keys\.json could not be read as COCO \(.*\): expected a JSON'),
    (['train_dataloader.dataset.data_prefix.img=elsewhere/'],
     r'Image data/digits/elsewhere/\d+\.jpg does not exist: set data_root'),
    (['val_evaluator.ann_file=nosuch.json'], r'nosuch\.json does not exist: check the paths'),
    (['model.roi_head.bbox_head.num_classes=7'],
     r'roi_head\.bbox_head has num_classes=7 but .*train\.json has 10 classes: set num_classes=10'),
    (['train_dataloader.dataset.ann_file=renamed.json'],
     r'renamed\.json has 9 of the 10 classes that the config names \(0, 1, 2, 3, 4, \.\.\.\): set'),
    (['train_dataloader.dataset.metainfo.classes="dog","cat"'],
     r'train\.json leaves no image to use: it has 0 of the 2 classes that the config names'),
    (['model.backbone.type=ODResnet'],
     r'No model is registered as ODResnet: did you mean ODResNet'),
    (['model.neck.conv_cfg.type=ODConv'],
     r'No layer is registered as ODConv: did you mean ODConv2d'),
    (['load_from=nosuch.pth'], r'Checkpoint nosuch\.pth does not exist: give the path'),
    (['load_from=run/epoch_1.pth', 'model.backbone.kernel_num=4'],
     r'has a bank of kernel_num=4, .* but the checkpoint holds a bank of kernel_num=2'),
])
def test_a_users_mistake_is_answered_by_one_sentence(trained, options, message):
    root, _ = trained
    (root / 'data/digits/bad.json').write_text('<html>not found</html>')
    (root / 'data/digits/list.json').write_text('[1, 2]')
    (root / 'data/digits/keys.json').write_text('{"pictures": []}')
    content = json.loads((root / 'data/digits/annotations/train.json').read_text())
    content['categories'][9]['name'] = 'nine'
    (root / 'data/digits/renamed.json').write_text(json.dumps(content))
    before = {p: p.stat().st_mtime_ns for p in (root / 'run').glob('*.pth')}
    result = digits.tool(root, 'train.py', digits.CONFIG, '--work-dir', 'mistaken', '--cfg-options',
                         *digits.TINY, *options, check=False)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and last.startswith('error: '), result.stderr[-2000:]
    assert re.search(message, last), last
    assert 'Traceback' not in result.stderr
    assert before == {p: p.stat().st_mtime_ns for p in (root / 'run').glob('*.pth')}
    assert not list((root / 'mistaken').glob('*.pth'))


def test_divergence_is_told_to_the_shell(trained):
    root, _ = trained
    result = digits.tool(root, 'train.py', digits.CONFIG, '--work-dir', 'diverged', '--cfg-options',
                         *digits.TINY, 'optim_wrapper.optimizer.lr=1e30', check=False)
    assert result.returncode == 1
    assert re.search(r'(?m)^error: Training diverged at iteration \d, learning rate \S+: \S+ is '
                     r'(nan|inf); .*(was saved before|last good checkpoint): lower', result.stderr)
    assert 'Traceback' not in result.stderr
    for path in (root / 'diverged').glob('*.pth'):
        state = CheckpointLoader.load_checkpoint(str(path))['state_dict']
        assert all(value.isfinite().all() for value in state.values())


def test_testing_a_checkpoint_of_another_architecture(trained):
    root, _ = trained
    result = digits.tool(root, 'test.py', 'run/' + digits.CONFIG, 'run/epoch_3.pth', '--work-dir',
                         'other', '--cfg-options', 'model.roi_head.bbox_head.fc_out_channels=64',
                         check=False)
    last = result.stderr.strip().splitlines()[-1]
    assert re.search(r'another architecture than FasterRCNN in the config: of \d+ tensors 0 are '
                     r'missing and \d+ have another shape \(roi_head\.bbox_head\.', last), last


def test_config_not_found_suggests_the_nearest(tmp_path):
    result = digits.tool(tmp_path, 'train.py', 'faster-rcnn_od-r50-k2_fpn_1x_coco.py', check=False)
    assert result.stderr.strip().startswith('error: Config faster-rcnn_od-r50-k2_fpn_1x_coco.py')
    assert 'did you mean faster-rcnn_od-r50-k' in result.stderr


@pytest.fixture
def tiny_model(trained):
    root, _ = trained
    return MODELS.build(Config.fromfile(root / 'run' / digits.CONFIG).model)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path, )


def test_a_malicious_pickle_is_refused_and_does_not_run(tiny_model, tmp_path):
    planted = tmp_path / 'ran'
    torch.save({'state_dict': {}, 'meta': Malicious(planted)}, tmp_path / 'evil.pth')
    with pytest.raises(InputError, match='was refused, and nothing in it was run, because it '
                       r'holds \S*(Path|touch)\S*, where'):
        load_checkpoint(tiny_model, str(tmp_path / 'evil.pth'))
    assert not planted.exists()
    torch.load(tmp_path / 'evil.pth', weights_only=False)  # it would have run
    assert planted.exists()


def test_a_run_is_read_whole_and_by_mmengines_loader_alone(trained):
    path = trained[0] / 'run/epoch_1.pth'
    read = CheckpointLoader.load_checkpoint(str(path))
    info = read['message_hub']['runtime_info']
    assert info['cfg'] == read['meta']['cfg'] and 'ODResNet' in info['cfg']  # literals all
    assert read['message_hub']['log_scalars']['train/loss'].current() > 0
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize(('content', 'message'), [
    (b'<html>404</html>', 'is not a checkpoint that torch can read'),
    (b'', 'is (cut short or damaged|not a checkpoint)'),
    (None, r'is cut short or damaged \(\d+ bytes\)'),
])
def test_a_damaged_checkpoint(tiny_model, trained, tmp_path, content, message):
    if content is None:
        content = (trained[0] / 'run/epoch_1.pth').read_bytes()[:-5000]
    (tmp_path / 'bad.pth').write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_checkpoint(tiny_model, str(tmp_path / 'bad.pth'))


def test_a_checkpoint_that_is_no_dict(tiny_model, tmp_path):
    torch.save([1, 2], tmp_path / 'list.pth')
    with pytest.raises(InputError, match='holds a list, where a dict of weights was expected'):
        load_checkpoint(tiny_model, str(tmp_path / 'list.pth'))


def test_no_space_left_leaves_no_partial_checkpoint(tmp_path, monkeypatch):
    error = OSError(errno.ENOSPC, 'No space left on device')

    def full(descriptor):
        raise error

    path = tmp_path / 'epoch_1.pth'
    path.write_bytes(b'whole')
    monkeypatch.setattr('os.fsync', full)
    with pytest.raises(InputError, match=f'while writing {path}: free some .* with --resume'):
        WholeFileBackend().put(b'x', str(path))
    assert path.read_bytes() == b'whole' and list(tmp_path.iterdir()) == [path]
    assert 'No space was left on the disk: free some' in explain(error)
