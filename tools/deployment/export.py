"""Write a detector to one file that runs without MMDetection, and check it.

    mim run mmdet_odconv export CONFIG CHECKPOINT --out model.onnx [--fuse] [--evaluate]

CONFIG is a path or the bare name of one of the plugin's. Beside the file, a JSON file of the same
name says how images are to be prepared and what the outputs mean. The file is run in its runtime
on images of two sizes and compared with the detector; --evaluate computes COCO mAP through it.
"""
import argparse
import copy
import tempfile
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmdet_odconv import InputError, config_path, fuse
from mmdet_odconv.checkpoints.files import refuse_existing
from mmdet_odconv.deployment.detector import TensorDetector
from mmdet_odconv.deployment.evaluation import ExportedDetector, evaluate
from mmdet_odconv.deployment.export import (
    FORMATS,
    Runtime,
    export_detector,
    load_detector,
    mask_threshold,
)
from mmdet_odconv.deployment.preprocessing import (
    described,
    example_images,
    resize_of,
    write_description,
)
from mmdet_odconv.engine.launch import errors_explained


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', metavar='CONFIG')
    parser.add_argument('checkpoint', metavar='CHECKPOINT')
    parser.add_argument('--out', type=Path, required=True, metavar='FILE')
    parser.add_argument('--format', choices=FORMATS, default='onnx')
    parser.add_argument('--opset', type=int, default=17, help="ONNX's, 16 to 20")
    parser.add_argument('--fuse', action='store_true', help='fold norms into convolutions first')
    parser.add_argument('--half', action='store_true',
                        help='fuse, and store weights in half precision')
    parser.add_argument('--nchwc', action='store_true',
                        help="keep maps in onnxruntime's blocked layout: faster there, on x86-64 "
                        'alone, above all depthwise layers')
    parser.add_argument('--batch', choices=['1', 'dynamic'], default='1',
                        help='dynamic: several images of one size at once')
    parser.add_argument('--normalize', action='store_true',
                        help='take BGR images of 0 to 255 and normalise them in the graph')
    parser.add_argument('--resize', action='store_true',
                        help='take BGR images as they are, and resize and normalise them in the '
                        'graph')
    parser.add_argument('--image', action='append', default=[], metavar='FILE',
                        help='to check with; if not given, the first of the test set, or noise '
                        'where that is not here')
    parser.add_argument('--no-check', action='store_true', help='do not run the file')
    parser.add_argument('--evaluate', action='store_true',
                        help="mAP on the config's test set, through the file and without")
    parser.add_argument('--force', action='store_true', help='replace files that exist')
    args = parser.parse_args()
    with errors_explained():
        for image in args.image:
            if not Path(image).is_file():
                raise InputError(f'{image} does not exist: give another --image.')
        description = args.out.parent / f'{args.out.stem}.json'
        for file in (args.out, description):
            refuse_existing(file, args.force)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        config = Config.fromfile(config_path(args.config))
        init_default_scope(config.get('default_scope', 'mmdet'))
        model, classes = load_detector(config, args.checkpoint)
        # --half rounds the weights in place.
        given = copy.deepcopy(model) if args.half and args.evaluate else model
        detector = TensorDetector(fuse(model) if args.fuse or args.half else model,
                                  args.normalize or args.resize,
                                  resize_of(config) if args.resize else None,
                                  args.batch == 'dynamic')
        images = example_images(config, detector.preprocessing, args.image)
        checked = export_detector(detector, args.out, images, args.format, args.opset,
                                  not args.no_check, args.force, args.half, args.nchwc)
        write_description(described(config, detector.preprocessing, classes, mask_threshold(model),
                                    detector.batched), description, args.force)
        print(f'{args.out}: {args.out.stat().st_size / 1e6:.1f} MB')
        for found in checked:
            print('{size}: {compared} detections equal, boxes within {boxes:.1g} px, scores '
                  'within {scores:.1g}'.format(**found))
        if checked and not any(found['detections'] for found in checked):
            print('Nothing was detected in them, so that no box was compared: give --image.')
        if args.evaluate:
            exported = ExportedDetector(Runtime(args.out), model.data_preprocessor, args.normalize,
                                        mask_threshold(model), args.resize, detector.batched)
            with tempfile.TemporaryDirectory() as work_dir:
                results = evaluate(config, {'PyTorch': given, args.out.name: exported}, work_dir)
            for name, (metrics, milliseconds) in results.items():
                figures = ', '.join(f'{key.split("/")[-1]} {value:.4f}'
                                    for key, value in metrics.items() if key.endswith('mAP'))
                print(f'{name}: {figures}, {milliseconds:.1f} ms an image with '
                      f'{torch.get_num_threads()} threads')


if __name__ == '__main__':
    main()
