"""Write a checkpoint for others to use: no optimizer, weights in half precision.

    python publish_model.py work_dirs/NAME/epoch_12.pth NAME.pth

Models load it as any other checkpoint, and compute in single precision as before, with weights
rounded by at most 5e-4 of themselves (those below 6e-5, by at most 3e-8). A
tensor that half precision cannot hold stays as it is.
"""
import argparse
from pathlib import Path

from mmdet_odconv.checkpoints import read_weights
from mmdet_odconv.checkpoints.files import halved, kept_meta, provenance, publish
from mmdet_odconv.engine.launch import errors_explained


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', metavar='IN.pth')
    parser.add_argument('out', metavar='OUT.pth', type=Path)
    parser.add_argument('--fp32', action='store_true', help='keep the precision of the weights')
    parser.add_argument('--force', action='store_true', help='replace an output that exists')
    args = parser.parse_args()
    with errors_explained():
        state, checkpoint = read_weights(args.source)
        meta = dict(kept_meta(checkpoint),
                    provenance=provenance(args.source, Path(__file__).name))
        if (checkpoint.get('meta') or {}).get('cfg'):
            meta['cfg'] = checkpoint['meta']['cfg']
        state = state if args.fp32 else halved(state)
        out = publish(dict(meta=meta, state_dict=state), args.out, args.force)
        was = Path(args.source)  # or an address
        print(f'{out}: {out.stat().st_size / 1e6:.1f} MB'
              + (f', of {was.stat().st_size / 1e6:.1f} MB' if was.is_file() else ''))


if __name__ == '__main__':
    main()
