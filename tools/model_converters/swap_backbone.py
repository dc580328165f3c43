"""Write the config of any detector of mmdet with its backbone made dynamic.

    python swap_backbone.py CONFIG [--checkpoint static.pth] [--out dynamic.py]

CONFIG is a file or mmdet::NAME. ResNet, ResNetV1d, ResNeXt and MobileNetV2 become ODResNet and so
on, of ODConv or of another --layer; another backbone gets it by conv_cfg if it takes one. With
--checkpoint, the static detector's weights are converted beside the config, which loads them;
without, ImageNet weights that the config starts from are converted when training starts.
"""
import argparse
from pathlib import Path

import torch
from mmengine.config import Config

from mmdet_odconv import InputError
from mmdet_odconv.checkpoints import load_static, read_weights, save_checkpoint
from mmdet_odconv.checkpoints.files import refuse_existing, writing
from mmdet_odconv.checkpoints.swapping import (
    base_as_seen_from,
    build_model,
    converted,
    dynamic_config,
    layer_config,
    layer_name,
    locate_config,
    swap_backbone,
)
from mmdet_odconv.engine.launch import errors_explained


def refuse_outputs(args, path, out, weights):
    """InputError if they would not be written, or over what is read."""
    if out.suffix != '.py':
        raise InputError(f'--out is {out}, where the name of a config, such as {out.stem}.py, was '
                         'expected; the weights are written beside it.')
    outputs = {out: path, **({weights: Path(args.checkpoint)} if args.checkpoint else {})}
    for output, source in outputs.items():
        if output.resolve() == source.resolve():
            raise InputError(f'{output} is what is to be swapped: give another name to --out.')
        refuse_existing(output, args.force)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', metavar='CONFIG', help='a file, or mmdet::NAME')
    parser.add_argument('--checkpoint', help='of the static detector, converted to OUT.pth')
    parser.add_argument('--layer', default='ODConv2d', help='e.g. FDConv2d; ODConv2d if not given')
    parser.add_argument('--out', type=Path, help='config to write; NAME_LAYER-kN.py if not given')
    parser.add_argument('--kernel-num', type=int,
                        help="number of kernels in each bank; the layer's own if not given")
    parser.add_argument('--force', action='store_true', help='replace outputs that exist')
    parser.add_argument('--seed', type=int, default=0, help='of what the static weights leave free')
    args = parser.parse_args()
    if args.kernel_num is not None and args.kernel_num < 1:
        parser.error(f'--kernel-num must be at least 1, got {args.kernel_num}')
    with errors_explained():
        path, base = locate_config(args.config)
        conv_cfg = layer_config(args.layer, args.kernel_num)
        out = args.out or Path(f'{path.stem}_{layer_name(conv_cfg)}.py')
        weights = out.with_suffix('.pth')
        refuse_outputs(args, path, out, weights)
        config = Config.fromfile(path)
        changes = swap_backbone(config, args.kernel_num,
                                None if args.checkpoint else 'StaticPretrained', args.layer)
        text = dynamic_config(config, base_as_seen_from(out, base), changes,
                              weights if args.checkpoint else None)
        if args.checkpoint:
            state, checkpoint = read_weights(args.checkpoint)
        with writing(out, args.force) as temporary:
            temporary.write_text(text)
            dynamic = Config.fromfile(temporary)  # what is renamed is known to load and build
            torch.manual_seed(args.seed)
            model = build_model(dynamic)
            if args.checkpoint:
                load_static(model, state, strict=True)
                save_checkpoint(converted(model, dynamic, checkpoint, args.checkpoint,
                                          Path(__file__).name), weights, args.force)
        print(f'{out} is {args.config} with a dynamic backbone'
              f'{f", starting from {weights}" if args.checkpoint else ""}.')


if __name__ == '__main__':
    main()
