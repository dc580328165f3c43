"""Evaluate a detector: mmdet's own test.py, options and all, with mmdet_odconv registered.

    mim test mmdet_odconv CONFIG --checkpoint FILE [--fuse]

--fuse folds norms into convolutions first: see mmdet_odconv.fuse.
"""
import sys

from mmdet_odconv.engine.distributed import add_cfg_options
from mmdet_odconv.engine.launch import run_mmdet_tool

if __name__ == '__main__':
    # A run's own copy of its config may say that it resumes.
    add_cfg_options(sys.argv, ['resume=False'])
    if '--fuse' in sys.argv:
        sys.argv.remove('--fuse')
        add_cfg_options(sys.argv, ['default_hooks.fusion.type=FusionHook'])
    run_mmdet_tool('test.py')
