"""Measure this machine, print what was found, and keep it for the choice of plans.

    python -m mmdet_odconv.ops
"""
import os
import time
from pathlib import Path

import torch

from .machine import VARIABLE, cache_file, describe, measure, read, save

choice = os.environ.get(VARIABLE, '')
path = Path(choice) if choice not in ('', 'nominal') else cache_file()
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
machines = read(path)
for dtype in (torch.float32, torch.float16) if device.type == 'cuda' else (torch.float32, ):
    start = time.perf_counter()
    machine = machines[describe(device, dtype)] = measure(device, dtype)
    print(f'{describe(device, dtype)}, measured in {(time.perf_counter() - start) * 1e3:.0f} ms:\n'
          f'  convolution of an image {machine.convolution / 1e9:8.0f} Gflop/s\n'
          f'  grouped by image        {machine.grouped / 1e9:8.0f} Gflop/s\n'
          f'  product, counted on for {machine.product / 1e9:8.0f} Gflop/s\n'
          f'  patches of maps         {machine.patches / 1e9:8.1f} GB/s\n'
          f'  bandwidth of a copy     {machine.bandwidth / 1e9:8.1f} GB/s\n'
          f'  overhead of a call      {machine.overhead * 1e6:8.1f} us')
save(machines, path)
print(f'kept in {path}' if read(path) else f'{path} cannot be written: not kept')
