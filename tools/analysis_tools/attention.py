"""Show how kernel attention spreads over a data set, with the detections and worst mistakes there.

    python tools/analysis_tools/attention.py CONFIG CHECKPOINT [--data ANNOTATIONS IMAGES]

CONFIG is a path or the bare name of one of the plugin's; its test set is read, or the COCO
annotation file and image folder of --data. Prints a line for each layer and writes one HTML file
that needs no other.
"""
import argparse
from pathlib import Path

from mmengine.config import Config

from mmdet_odconv import InputError, config_path
from mmdet_odconv.checkpoints.files import refuse_existing, writing
from mmdet_odconv.deployment.attentions import record_attentions, spread
from mmdet_odconv.deployment.export import load_detector
from mmdet_odconv.deployment.page import write_page
from mmdet_odconv.deployment.preprocessing import test_pipeline
from mmdet_odconv.engine.launch import errors_explained
from mmdet_odconv.layers import DynamicConv2d


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', metavar='CONFIG')
    parser.add_argument('checkpoint', metavar='CHECKPOINT')
    parser.add_argument('--data', nargs=2, metavar=('ANNOTATIONS', 'IMAGES'))
    parser.add_argument('--images', type=int, default=100, help='most images to read')
    parser.add_argument('--score', type=float, default=0.5, help='from which detections count')
    parser.add_argument('--curves', type=Path, metavar='PNG', help="report.py's, to put in")
    parser.add_argument('--out', type=Path, default=Path('attention.html'), metavar='FILE')
    parser.add_argument('--force', action='store_true', help='replace a file that exists')
    args = parser.parse_args()
    if args.images < 1:
        parser.error(f'--images is {args.images}, where at least one was expected')
    with errors_explained():
        refuse_existing(args.out, args.force)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        if args.curves and not args.curves.is_file():
            raise InputError(f'{args.curves} does not exist: give a picture, or no --curves.')
        config = Config.fromfile(config_path(args.config))
        model, classes = load_detector(config, args.checkpoint)
        if args.data:
            annotations, folder = (str(Path(path).resolve()) for path in args.data)
            if not Path(annotations).is_file() or not Path(folder).is_dir():
                raise InputError(f'{annotations} or the folder {folder} does not exist: give '
                                 "COCO's annotations and the folder of their images.")
            config.test_dataloader = dict(
                batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
                dataset=dict(type='CocoDataset', ann_file=annotations, test_mode=True,
                             data_prefix=dict(img=folder), metainfo=dict(classes=classes),
                             pipeline=test_pipeline(config)))
        images, attentions = record_attentions(model, config, args.images)
        for name, attention in attentions.items():
            found = spread(attention)
            shares = ' '.join(f'{share:.2f}' for share in found.shares.tolist())
            print(f'{name}: entropy {found.entropy:.3f}, variation {found.variation:.4f}, '
                  f'shares {shares}, dead {found.dead or "none"}')
        kinds = sorted({type(module).__name__ for name, module in model.named_modules()
                        if isinstance(module, DynamicConv2d) and name not in attentions})
        if kinds:
            print(f'not shown, of one kernel, run several times or mixed otherwise: '
                  f'{", ".join(kinds)}')
        with writing(args.out, args.force) as temporary:
            write_page(temporary, f'{Path(args.config).stem}, {Path(args.checkpoint).name}', images,
                       attentions, classes, args.score, curves=args.curves)
    print(f'{args.out}: open it in a browser')


if __name__ == '__main__':
    main()
