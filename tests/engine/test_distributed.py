"""Several processes on CPUs, with gloo, against one process with the same images."""
import copy
import itertools

import digits
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

from mmdet_odconv.layers import CondConv2d, DCDConv2d, DyConv2d, ODConv2d

STEPS, IMAGES = 3, 8


class Detector(BaseModel):
    """Every kind of bank, and norms whose statistics are those of all processes."""

    def __init__(self):
        super().__init__()
        sync = dict(type='SyncBN')
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.Sequential(
            ODConv2d(8, 8, 3, padding=1, kernel_num=4, norm_cfg=sync), nn.SyncBatchNorm(8),
            nn.ReLU(), ODConv2d(8, 9, 1, kernel_num=1, norm_cfg=sync),
            DyConv2d(9, 8, 3, padding=1), CondConv2d(8, 8, 3, groups=8, padding=1),
            DCDConv2d(8, 8, 1))

    def forward(self, inputs, mode='loss'):
        return dict(loss=self.layers(self.stem(inputs)).square().mean())


def make_model(seed=0):
    torch.manual_seed(seed)
    return Detector().double()


def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, IMAGES, 3, 6, 6, generator=generator, dtype=torch.float64)


def optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def frozen_norms(model):
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.eval()
    return model


def ddp(model, batches, accumulative_counts=1, prepare=lambda model: None):
    """Train as MMEngine's loop does; returns the state dict."""
    wrapped = model
    if dist.is_initialized():
        wrapped = MMDistributedDataParallel(model, broadcast_buffers=False)
        prepare(wrapped)
    wrapper = OptimWrapper(optimizer(wrapped), accumulative_counts=accumulative_counts)
    wrapper.initialize_count_status(wrapped, 0, len(batches))
    for batch in batches:
        wrapped.train_step(dict(inputs=batch), wrapper)
    return model.state_dict()


def mine(batches):
    """This process's part of each batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return [batch.chunk(world)[rank] for batch in batches]


def halves(batches):
    return list(itertools.chain(*(batch.chunk(2) for batch in batches)))


def synchronised(self, x):
    """nn.SyncBatchNorm, whose own kernels are CUDA's."""
    if not self.training:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight,
                                        self.bias, False, 0.0, self.eps)
    count = all_reduce(torch.tensor(float(x.numel() // x.shape[1]), dtype=x.dtype))
    mean = all_reduce(x.sum((0, 2, 3))) / count
    variance = all_reduce((x - mean[:, None, None]).square().sum((0, 2, 3))) / count
    with torch.no_grad():
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        self.num_batches_tracked.add_(1)
    normal = (x - mean[:, None, None]) / (variance[:, None, None] + self.eps).sqrt()
    return normal * self.weight[:, None, None] + self.bias[:, None, None]


def compress(model):
    from types import SimpleNamespace

    from mmdet_odconv.engine import GradientCompressionHook
    GradientCompressionHook('bf16').before_train(SimpleNamespace(model=model, distributed=True))


def fsdp(model, batches, directory):
    """The same with every layer sharded, saved and read back; its state dict, whole."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def sharded(model):
        mesh = init_device_mesh('cpu', (dist.get_world_size(),))
        for layer in (*model.layers, model):
            fully_shard(layer, mesh=mesh)
        return model

    def whole(model):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(model, options=options)

    sharded(model)
    bank = model.layers[0].weight
    assert bank.shape == (4, 8, 8, 3, 3) and bank.to_local().shape == (2, 8, 8, 3, 3)
    steps = optimizer(model)
    for batch in batches:
        model(batch)['loss'].backward()
        steps.step()
        steps.zero_grad()
    dcp.save(dict(model=model.state_dict()), checkpoint_id=directory)
    again = dict(model=sharded(make_model(seed=1)).state_dict())
    dcp.load(again, checkpoint_id=directory)
    model.load_state_dict(again['model'])
    return whole(model)


def process(rank, world, directory, parts):
    dist.init_process_group('gloo', init_method=f'file://{directory}/store', rank=rank,
                            world_size=world)
    nn.SyncBatchNorm.forward = synchronised
    DistributedDataParallel._passing_sync_batchnorm_handle = lambda *args: None  # refuses on CPUs
    batches = mine(images())
    runs = dict(
        ddp=lambda: ddp(make_model(), batches),
        accumulated=lambda: ddp(frozen_norms(make_model()), halves(batches), 2),
        compressed=lambda: ddp(make_model(), batches, prepare=compress),
        fsdp=lambda: fsdp(make_model(), batches, f'{directory}/shards'))
    states = {name: copy.deepcopy(runs[name]()) for name in parts}
    if rank == 0:
        torch.save(states, f'{directory}/states.pth')
    dist.destroy_process_group()


def spawned(world, directory, *parts):
    mp.spawn(process, (world, str(directory), parts), nprocs=world)
    return torch.load(directory / 'states.pth')


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MMDET_ODCONV_LAYERS_ONLY', '1')  # they need no mmdet, and start faster
        return spawned(2, tmp_path_factory.mktemp('two'), 'ddp', 'accumulated', 'compressed',
                       'fsdp')


def largest_difference(state, expected):
    assert state.keys() == expected.keys()
    return torch.stack([  # whose maximum is NaN where one is
        (state[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)
        for name, value in expected.items() if value.is_floating_point()]).max().item()


@pytest.fixture(scope='module')
def alone():
    return ddp(make_model(), list(images()))


def test_two_processes_are_one_with_their_images(two, alone):
    assert largest_difference(two['ddp'], alone) < 1e-10


def test_four_processes_are_one_with_their_images(tmp_path, alone, monkeypatch):
    monkeypatch.setenv('MMDET_ODCONV_LAYERS_ONLY', '1')
    assert largest_difference(spawned(4, tmp_path, 'ddp')['ddp'], alone) < 1e-10


def test_accumulated_gradients_are_those_of_the_images_at_once(two):
    at_once = ddp(frozen_norms(make_model()), list(images()))
    assert largest_difference(two['accumulated'], at_once) < 1e-10


def test_sharded_banks_train_and_are_read_back(two, alone):
    assert largest_difference(two['fsdp'], alone) < 1e-10
    make_model(seed=1).load_state_dict(two['fsdp'])


def test_gradients_in_16_bits_are_rounded_and_no_more(two, alone):
    start = make_model().state_dict()
    names = [name for name, _ in Detector().named_parameters()]
    # Of all parameters at once: a bias before a norm moves by rounding alone.
    found, expected = (
        torch.cat([(state[name] - start[name]).flatten() for name in names])
        for state in (two['compressed'], alone))
    assert 1e-6 < (found - expected).norm() / expected.norm() < 2**-7


def test_bad_dtype():
    from mmdet_odconv.engine import GradientCompressionHook
    with pytest.raises(ValueError, match='dtype must be one of bf16, fp16, got int8'):
        GradientCompressionHook('int8')


@pytest.mark.parametrize(('launcher', 'message'), [
    ('slurm', '--launcher slurm needs a CUDA device on each machine, and this one has none'),
    ('pytorch', '--launcher pytorch is for processes that torchrun starts: torchrun --nproc'),
])
@pytest.mark.skipif(torch.cuda.is_available(), reason='MMEngine launches on GPUs')
def test_launching_without_a_gpu_or_a_launcher(tmp_path, monkeypatch, launcher, message):
    monkeypatch.delenv('RANK', raising=False)
    result = digits.tool(tmp_path, 'train.py', digits.CONFIG, '--launcher', launcher, check=False)
    assert result.returncode == 1
    assert f'error: {message}' in result.stderr and 'Traceback' not in result.stderr
