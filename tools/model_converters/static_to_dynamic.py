"""Make a dynamic detector of a trained static one, with the same outputs to begin with.

    python static_to_dynamic.py CONFIG static.pth dynamic.pth

CONFIG is the dynamic detector's, such as one that swap_backbone.py wrote; fine-tune from
dynamic.pth by its load_from.
"""
import argparse
from pathlib import Path

import torch
from mmengine.config import Config

from mmdet_odconv import config_path
from mmdet_odconv.checkpoints import load_static, read_weights, save_checkpoint
from mmdet_odconv.checkpoints.files import refuse_existing
from mmdet_odconv.checkpoints.published import few
from mmdet_odconv.checkpoints.swapping import build_model, converted
from mmdet_odconv.engine.launch import errors_explained


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', metavar='CONFIG', help='of the dynamic detector')
    parser.add_argument('static', metavar='STATIC.pth', help='checkpoint of the static detector')
    parser.add_argument('out', metavar='OUT.pth', type=Path)
    parser.add_argument('--force', action='store_true', help='replace an output that exists')
    parser.add_argument('--seed', type=int, default=0, help='of what the static weights leave free')
    args = parser.parse_args()
    with errors_explained():
        refuse_existing(args.out, args.force)
        config = Config.fromfile(config_path(args.config))
        state, checkpoint = read_weights(args.static)
        torch.manual_seed(args.seed)
        model = build_model(config)
        left_out = load_static(model, state, strict=True)
        save_checkpoint(converted(model, config, checkpoint, args.static, Path(__file__).name),
                        args.out, args.force)
        print(f'{args.out} holds {len(model.state_dict())} tensors, of {len(state)} static ones; '
              f'left out: {few(left_out) or "none"}.')


if __name__ == '__main__':
    main()
