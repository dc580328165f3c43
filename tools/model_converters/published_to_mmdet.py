"""Write a checkpoint of the ODConv release under MMDetection's names, without what is of no use.

    python published_to_mmdet.py od_resnet50_4x.pth.tar od-r50-k4.pth

Released files load as they are; this one is smaller, since the optimizer and the classifier are
left out, and says in its meta where it is from. The first eight digits of its sha256 are put at
the end of its name, as OpenMMLab does.
"""
import argparse
import tempfile
from pathlib import Path

from mmdet_odconv.checkpoints import convert_published, read_weights, save_checkpoint
from mmdet_odconv.checkpoints.files import provenance, sha256, writing
from mmdet_odconv.checkpoints.published import few
from mmdet_odconv.engine.launch import errors_explained


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', metavar='IN', help='a classifier or a detector of the release')
    parser.add_argument('out', metavar='OUT.pth', type=Path)
    parser.add_argument('--force', action='store_true', help='replace an output that exists')
    args = parser.parse_args()
    state, checkpoint = read_weights(args.source)
    state, left_out = convert_published(state)
    meta = checkpoint.get('meta', {}) if 'state_dict' in checkpoint else {}
    meta = {name: meta[name] for name in ('CLASSES', 'PALETTE', 'dataset_meta') if name in meta}
    for name in ('epoch', 'acc', 'best_acc'):  # of a classifier
        if isinstance(checkpoint.get(name), (int, float)):
            meta[name] = checkpoint[name]
    checkpoint = dict(
        meta={**meta, 'provenance': provenance(args.source, Path(__file__).name)},
        state_dict=state)
