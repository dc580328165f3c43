"""Write a checkpoint of the ODConv release under MMDetection's names, without what is of no use.

    python published_to_mmdet.py od_resnet50_4x.pth.tar od-r50-k4.pth

Released files load as they are; this one is smaller, since the optimizer and the classifier are
left out, and says in its meta where it is from. The first eight digits of its sha256 are put at
the end of its name, as OpenMMLab does.
"""
import argparse
from pathlib import Path

from mmdet_odconv.checkpoints import convert_published, read_weights
from mmdet_odconv.checkpoints.files import kept_meta, provenance, publish
from mmdet_odconv.checkpoints.published import check_released, few
from mmdet_odconv.engine.launch import errors_explained


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', metavar='IN', help='a classifier or a detector of the release')
    parser.add_argument('out', metavar='OUT.pth', type=Path)
    parser.add_argument('--force', action='store_true', help='replace an output that exists')
    args = parser.parse_args()
    with errors_explained():
        state, checkpoint = read_weights(args.source)
        converted, left_out = convert_published(state)
        check_released(converted)
        meta = dict(kept_meta(checkpoint),
                    provenance=provenance(args.source, Path(__file__).name))
        out = publish(dict(meta=meta, state_dict=converted), args.out, args.force)
        print(f'{out} holds {len(converted)} of {len(state)} tensors; left out: '
              f'{few(left_out) or "none"}.')


if __name__ == '__main__':
    main()
