"""Write a config that trains a supplied detector on your own data.

    mmdet_odconv new-config --data DIR --base faster-rcnn_od-r50-k4_fpn_1x_coco.py --out my.py

DIR is in COCO format: annotations/{train,val,test}.json beside train/, val/ and test/, COCO's own
names or Roboflow's; or in Pascal VOC's, to which annotations in COCO format are added. What is
found in it is said, and what looks wrong; data that cannot be trained on is refused.
"""
import argparse
import shlex
from pathlib import Path

from mmdet_odconv.engine.launch import errors_explained
from mmdet_odconv.engine.new_config import new_config


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, type=Path, metavar='DIR')
    parser.add_argument('--base', required=True, metavar='CONFIG',
                        help="a file, a name of the plugin's, or mmdet::NAME")
    parser.add_argument('--out', required=True, type=Path, metavar='FILE.py')
    parser.add_argument('--weights', metavar='FILE',
                        help="a checkpoint; torchvision://resnet50 for the backbone; 'none' for "
                        "no weights; the base's if not given")
    parser.add_argument('--force', action='store_true', help='replace FILE.py if it exists')
    args = parser.parse_args()
    with errors_explained():
        made = new_config(args.data, args.base, args.out, args.weights, args.force)
        for file in made.written:
            print(f'{file} was written from Pascal VOC annotations')
        for name, split in made.splits.items():
            print(f'{name}: {split}')
        counts = ', '.join(f'{name} ({made.splits["train"].boxes[name]})' for name in made.classes)
        print(f'{len(made.classes)} classes, with boxes to learn from: {counts}')
        for warning in made.warnings:
            print(f'warning: {warning}.')
        print(f'{args.out} was written. Train it:\n\n'
              f'    mmdet_odconv train {shlex.quote(str(args.out))}\n')


if __name__ == '__main__':
    main()
