"""What this machine can do: the constants of a roofline, measured on it.

A plan is chosen by the time that it would take,

    seconds = flops / throughput + bytes / bandwidth + calls * overhead

and none of the constants is written down from one machine: they are measured the first time that
a device computes in a dtype, in less than 0.1 s (half a second where a CPU emulates the dtype), and
kept in the user's cache directory, so that later processes on the machine choose alike. What a CPU
does beside other work is not kept, long after that work has ended: :data:`NOMINAL` stands for it,
and the next process looks again.
``MMDET_ODCONV_MACHINE`` in the environment says otherwise: ``nominal`` measures nothing and takes
:data:`NOMINAL`; the name of a file has the constants read from it, or measured and written to it
where it is not there yet.

    python -m mmdet_odconv.ops    # measure anew, print and save
"""
import contextlib
import functools
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, Dict, Optional

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

VARIABLE = 'MMDET_ODCONV_MACHINE'
# What makes one processor compute like another: part of a measurement's name.
INSTRUCTION_SETS = ('ATEN_CPU_CAPABILITY', 'MKL_ENABLE_INSTRUCTIONS', 'ONEDNN_MAX_CPU_ISA')
TRIES, LONGEST = 4, 0.08  # s, after which no other try begins
CALLS = 10  # tiny ones, to be told apart from a clock's
# Of a product's measured speed, what is counted on: blocks, transposed factors and odd sizes reach
# less than one whole product. What convolves as a static layer does so wins where they are close.
PRODUCT_SHARE = 0.8
# Of a measurement, how long its thread must have had a processor: all the time (1.00) where nothing
# else ran on 2 cores, and a third to four fifths of it beside other jobs.
LEAST_SHARE = 0.95


@dataclass(frozen=True)
class Machine:
    """Constants of the roofline of one device in one dtype.

    Args:
        convolution: flop/s of one image's convolution, by the backend of static ones.
        grouped: flop/s of one convolution grouped by image.
        product: flop/s that a batched matrix product is counted on for.
        patches: bytes/s at which F.unfold writes, and F.fold reads, patches of one image's map.
        bandwidth: bytes/s of a copy, read and written.
        overhead: seconds that a call costs beside its work.
    """
    convolution: float
    grouped: float
    product: float
    patches: float
    bandwidth: float
    overhead: float


# No machine's: one whose convolutions go as static ones do unless bytes or calls speak against it.
NOMINAL = Machine(convolution=1e11, grouped=5e10, product=9e10, patches=5e9, bandwidth=2e10,
                  overhead=1e-5)

_set: Optional[Machine] = None


def set_machine(machine: Optional[Machine]) -> None:
    """Choose plans for this machine from now on, whatever is measured; ``None`` for the usual."""
    global _set
    _set = machine


def machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The constants by which plans are chosen for tensors of a device and dtype.

    Under ``torch.use_deterministic_algorithms`` they are those set, those of the file that
    ``MMDET_ODCONV_MACHINE`` names, or the nominal ones: never measured on the way.
    """
    if _set is not None:
        return _set
    return _kept(device, dtype, torch.get_num_threads(),
                 torch.are_deterministic_algorithms_enabled())


@functools.lru_cache(maxsize=64)
def _kept(device: torch.device, dtype: torch.dtype, threads: int, deterministic: bool) -> Machine:
    choice = os.environ.get(VARIABLE, '')
    if choice == 'nominal' or device.type not in ('cpu', 'cuda') or deterministic and not choice:
        return NOMINAL
    path = Path(choice) if choice else cache_file()
    key = describe(device, dtype)
    kept = read(path)
    if key not in kept:
        if deterministic:
            return NOMINAL
        start, running = time.perf_counter(), time.thread_time()
        measured = measure(device, dtype)
        share = (time.thread_time() - running) / (time.perf_counter() - start)
        if device.type == 'cpu' and share < LEAST_SHARE:
            return NOMINAL
        kept = read(path)  # of two processes that measure at once, both take what the first wrote
        if key not in kept:
            kept[key] = measured
            save(kept, path)
    return kept[key]


def cache_file() -> Path:
    """Where measurements are kept unless ``MMDET_ODCONV_MACHINE`` says otherwise."""
    try:
        cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    except RuntimeError:  # a user without a home, as a container may have
        cache = Path(tempfile.gettempdir())
    return cache / 'mmdet_odconv' / 'machine.json'


def read(path: Path) -> Dict[str, Machine]:
    """Measurements by the description of what was measured; none of a file that is not sound."""
    try:
        kept = json.loads(path.read_text())
        found = {key: Machine(**constants) for key, constants in kept.items()}
        return {key: m for key, m in found.items() if all(v > 0 for v in asdict(m).values())}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def save(machines: Dict[str, Machine], path: Path) -> None:
    """Write measurements whole, or not at all where the directory cannot be written."""
    text = json.dumps({key: asdict(m) for key, m in machines.items()}, indent=1)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, 'w') as file:
                file.write(text)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise


def describe(device: torch.device, *more) -> str:
    """The device in words: model, threads, torch's release, and instruction sets if limited."""
    if device.type == 'cuda':
        words = [torch.cuda.get_device_name(device)]
    else:
        words = [cpu_model(), f'{torch.get_num_threads()} threads']
        words += [f'{name}={os.environ[name]}' for name in INSTRUCTION_SETS if os.environ.get(name)]
    return ', '.join([*words, f'torch {torch.__version__}', *map(str, more)])


def cpu_model() -> str:
    """The CPU's model name, e.g. 'AMD EPYC', with the widest vectors that torch uses."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        model = next(line.split(':')[1].strip() for line in lines if line.startswith('model name'))
    return f'{model} ({torch.backends.cpu.get_cpu_capability()})'


@torch.no_grad()
@_disable_current_modes()  # of whoever counts, records or traces the call that asked first
def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """The constants of a device in a dtype, each from the quickest of a few interleaved tries."""
    channels, size, batch = 160, 20, 2

    def ones(*shape: int, dtype=dtype) -> torch.Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    x = ones(batch, channels, size, size)
    kernels = ones(batch, channels, channels, 3, 3)
    patches = ones(batch, channels * 9, size * size)
    large = ones(2**23, dtype=torch.uint8)
    copy, tiny = torch.empty_like(large), ones(1, 1, 1, 1)
    grouped = x.view(1, -1, size, size), kernels.flatten(0, 1)
    work: Dict[str, Callable] = dict(
        convolution=lambda: F.conv2d(x[:1], kernels[0], padding=1),
        grouped=lambda: F.conv2d(*grouped, padding=1, groups=batch),
        product=lambda: torch.bmm(kernels.flatten(2), patches),
        patches=lambda: F.fold(F.unfold(x[:1], 3, padding=1), (size, size), 3, padding=1),
        bandwidth=lambda: copy.copy_(large),
        overhead=lambda: [F.conv2d(tiny, tiny) for _ in range(CALLS)])
    seconds = {name: float('inf') for name in work}
    begun = _clock(device)
    for _ in range(TRIES):
        if _clock(device) - begun > LONGEST:
            break
        for name, call in work.items():
            start = _clock(device)
            with torch.autocast(device.type, enabled=False):  # whoever asked first may be in one
                call()
            seconds[name] = min(seconds[name], _clock(device) - start)
    flops = 2 * size**2 * kernels[0].numel()
    return Machine(convolution=flops / seconds['convolution'],
                   grouped=batch * flops / seconds['grouped'],
                   product=PRODUCT_SHARE * batch * flops / seconds['product'],
                   # Of one image, written and read.
                   patches=2 * patches[0].numel() * patches.element_size() / seconds['patches'],
                   bandwidth=2 * large.numel() / seconds['bandwidth'],
                   overhead=seconds['overhead'] / CALLS)


def _clock(device: torch.device) -> float:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()
