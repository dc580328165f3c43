"""Seconds that the pass over the annotations adds to a run, for a file of the size of COCO's.

``python tests/annotation_time.py``. The file is made up: as many images, boxes and polygons of 20
points as annotations/instances_train2017.json has.
"""
import json
import tempfile
import time

import numpy as np
from mmdet.datasets import CocoDataset

from mmdet_odconv.engine.data_check import check_annotations

IMAGES, BOXES, CLASSES = 118287, 860001, 80


def write(file) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, IMAGES, BOXES).tolist()
    kinds = rng.integers(1, CLASSES + 1, BOXES).tolist()
    boxes = np.round(rng.uniform([0, 0, 8, 8], [400, 300, 200, 150], (BOXES, 4)), 2).tolist()
    points = np.round(rng.uniform(0, 400, (BOXES, 40)), 2).tolist()
    json.dump(dict(
        images=[dict(id=i, file_name=f'{i:012}.jpg', width=640, height=480)
                for i in range(IMAGES)],
        annotations=[dict(id=i, image_id=image, category_id=kind, iscrowd=0, bbox=box,
                          area=box[2] * box[3], segmentation=[polygon])
                     for i, (image, kind, box, polygon) in enumerate(
                         zip(images, kinds, boxes, points))],
        categories=[dict(id=i + 1, name=f'class {i}') for i in range(CLASSES)]), file)
    file.flush()


if __name__ == '__main__':
    with tempfile.NamedTemporaryFile('w', suffix='.json') as file:
        write(file)
        start = time.process_time()
        dataset = CocoDataset(
            ann_file=file.name, metainfo=dict(classes=[f'class {i}' for i in range(CLASSES)]),
            data_prefix=dict(img=''), pipeline=[])
        read = time.process_time()
        check_annotations(dataset)
        print(f'MMDetection reads {file.name} in {read - start:.1f} s; the pass over it takes '
              f'{time.process_time() - read:.1f} s, of one core.')
