import os

# Test workers share the cores; more threads than that only wait for each other.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch
import warm
from warm import ROOT

if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')  # read when Triton is first imported

warm.spare_repetition()
torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def data():
    return ROOT / 'tests' / 'data'
