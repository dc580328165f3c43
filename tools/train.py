"""Train a detector: mmdet's own train.py, options and all, with mmdet_odconv registered."""
from mmdet_odconv.engine.launch import run_mmdet_tool

if __name__ == '__main__':
    run_mmdet_tool('train.py')
