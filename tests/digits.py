"""A digits dataset and a detector small enough for tests, for whatever needs a real run."""
import subprocess
from pathlib import Path

import warm
from warm import ROOT

# Three iterations of four images, evaluated on four more.
TINY = [
    'train_cfg.max_epochs=3', 'train_dataloader.batch_size=4', 'val_dataloader.batch_size=4',
    'test_dataloader.batch_size=4', 'model.backbone.base_channels=8',
    'model.backbone.stem_channels=8', 'model.neck.in_channels=[8,16,32,64]',
    'default_hooks.logger.interval=1', 'model.backbone.kernel_num=2'
]
CONFIG = 'faster-rcnn_od-r18-k4_fpn_digits.py'


def make(root: Path) -> None:
    """Write root/data/digits: 4 images to train on and 4 to evaluate."""
    tool(root, 'dataset_converters/digits.py', 'data/digits', '--train', '4', '--val', '4',
         '--size', '96')


def tool(root: Path, name: str, *args: str, check: bool = True) -> subprocess.CompletedProcess:
    """Run a script of tools/ in root."""
    result = warm.run(ROOT / 'tools' / name, *args, cwd=root)
    if check and result.returncode:
        raise AssertionError(result.stdout[-3000:] + result.stderr[-3000:])
    return result
