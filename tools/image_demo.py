"""Draw what a detector finds in your pictures or video, and write it down.

    mim run mmdet_odconv image_demo IMAGE_FOLDER_OR_VIDEO CONFIG --weights FILE --out DIR

CONFIG is a path or the bare name of one of the plugin's. Pictures go to DIR/vis, predictions (all
of them, boxes in pixels, masks run-length encoded) to DIR/preds; of a video, MP4 or AVI, a video,
and a list of predictions, one a frame.
"""
import argparse

from mmdet_odconv.deployment.inference import detect
from mmdet_odconv.engine.launch import errors_explained


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('inputs', metavar='IMAGE_FOLDER_OR_VIDEO')
    parser.add_argument('config', metavar='CONFIG')
    parser.add_argument('--weights', required=True, metavar='FILE')
    parser.add_argument('--out', default='outputs', metavar='DIR')
    parser.add_argument('--score', type=float, default=0.3, help='from which a detection is drawn')
    parser.add_argument('--batch-size', type=int, default=1)
    parser.add_argument('--device', help="such as 'cpu'; a GPU if there is one")
    parser.add_argument('--force', action='store_true', help='replace files that exist')
    args = parser.parse_args()
    with errors_explained():
        images = detect(args.inputs, args.config, args.weights, args.out, args.score,
                        args.batch_size, args.device, args.force)
        print(f'{images} images or frames: see {args.out}/vis and {args.out}/preds')


if __name__ == '__main__':
    main()
