"""One pass over a data set before it is trained on: what would train nothing, or the wrong thing.

MMDetection leaves out boxes and images that it cannot use without a word, takes NaN for a number
and fails on the rest when it comes to it, hours later perhaps.
"""
import contextlib
import gc
import json
import logging
import math
import os
from itertools import compress
from typing import Iterator, List, Optional, Tuple

import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmengine.fileio import get_local_path
from mmengine.logging import print_log

from ..errors import InputError
from .distributed import by_main_process

IMAGE_KEYS = ('id', 'file_name', 'width', 'height')
ANNOTATION_KEYS = ('id', 'image_id', 'category_id', 'bbox', 'area')
NUMBERS = {int, float}  # as JSON has them: True is none
SAMPLE = 64  # images that are read before training begins, evenly spaced


def check_data(dataset, strict: bool = True, trained: bool = True, by_coco: bool = False) -> None:
    """Check annotations and images, on the main process for all of them.

    Args:
        dataset: one or several, in any wrapper.
        strict: refuse what is wrong; else warn of it.
        trained: it is trained on; if not, the order of its categories alone is checked,
        by_coco: and what pycocotools, which evaluates it, needs.

    Raises:
        InputError: in every process.
    """

    def check() -> None:
        for part in unwrapped(dataset):
            if trained:
                check_annotations(part)
                check_images(part)
            elif reads_coco(part):
                content = read_annotations(part)
                check_order(part, content)
                faults = _faults_of_evaluation(content['annotations']) if by_coco else []
                if faults:
                    raise InputError(f'{part.ann_file} cannot be evaluated on: '
                                     f'{"; ".join(faults)}. Mend the file.')

    try:
        by_main_process(check)
    except InputError as error:
        if strict:
            raise
        print_log(str(error), logger='current', level=logging.WARNING)


def unwrapped(dataset) -> Iterator:
    """The datasets under RepeatDataset, ConcatDataset, MultiImageMixDataset and their like."""
    if hasattr(dataset, 'datasets'):
        for part in dataset.datasets:
            yield from unwrapped(part)
    elif hasattr(dataset, 'dataset'):
        yield from unwrapped(dataset.dataset)
    else:
        yield dataset


def check_annotations(dataset) -> None:
    """Refuse annotations that cannot be trained on, and warn of those that are left out.

    Args:
        dataset: any; what is no COCO data set of MMDetection's own reading is passed over.

    Raises:
        InputError: with counts and the first example.
    """
    if not reads_coco(dataset):
        return
    with no_garbage_collection():
        faults, left_out = find_faults(dataset)
    if faults:
        raise InputError(f'{dataset.ann_file} cannot be trained on: {"; ".join(faults)}. Mend '
                         'the file, or take these out of it.')
    if left_out:
        print_log(f'Of {dataset.ann_file} training leaves out: {"; ".join(left_out)}.',
                  logger='current', level=logging.WARNING)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For reading millions of objects of which none is garbage: looking for it doubles the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def reads_coco(dataset) -> bool:
    """Whether MMDetection's CocoDataset reads its annotations, rather than a subclass."""
    return isinstance(dataset, CocoDataset) and all(
        getattr(type(dataset), name) is getattr(CocoDataset, name)
        for name in ('load_data_list', 'parse_data_info'))


def read_annotations(dataset: CocoDataset) -> dict:
    """The content of a data set's annotation file."""
    with get_local_path(dataset.ann_file, backend_args=dataset.backend_args) as path, \
            open(path, 'rb') as file:
        return json.load(file)


def check_order(dataset: CocoDataset, content: dict) -> None:
    """Refuse a file that numbers the classes of the config in another way, as MMDetection will.

    Detections would have each other's names, and where files differ an mAP of 0.

    Raises:
        InputError: with the first class that differs. A class that is not there is not looked for.
    """
    classes = list(dataset.metainfo['classes'])
    listed = [category['name'] for category in content['categories'] if category['name'] in classes]
    if len(listed) == len(classes) and listed != classes:
        i = next(i for i, name in enumerate(classes) if name != listed[i])
        raise InputError(
            f"{dataset.ann_file} lists {listed[i]} where the config's classes have {classes[i]}, "
            'and MMDetection numbers them as each file does: put the categories of all files of '
            "the data set, and the dataset's metainfo=dict(classes=...), in one order.")


def find_faults(dataset: CocoDataset, with_masks: bool = False) -> Tuple[List[str], List[str]]:
    """What keeps the annotations of ``dataset`` from training, and what training leaves out.

    Args:
        dataset: one data set, without its wrappers.
        with_masks: its masks are evaluated on, whether or not it loads them.

    Returns:
        Two lists of phrases, such as '2 of 9 annotations have a box that ..., the first ...'.

    Raises:
        InputError: if its categories are in another order than the classes.
    """
    content = read_annotations(dataset)
    faults: List[str] = []
    left_out: List[str] = []
    images, annotations = content['images'], content['annotations']
    faults += _lacking('image', images, IMAGE_KEYS)
    faults += _lacking('annotation', annotations, ANNOTATION_KEYS)
    if faults:
        return faults, left_out
    check_order(dataset, content)

    def say(into: List[str], what: str, of: list, wrong, show=None) -> None:
        found = list(compress(of, wrong))
        if found:
            kind = 'image' if of is images else 'annotation'
            name = found[0]['file_name'] if of is images else found[0]['id']
            shown = '' if show is None else f', {found[0][show]}'
            into.append(f'{len(found)} of {len(of)} {kind}s {what} (the first: {name}{shown})')

    sizes = np.array([_numbers([image['width'], image['height']], 2) for image in images])
    sizes = sizes.reshape(-1, 2)
    say(faults, 'have a width or height that is no positive number', images,
        ~(np.isfinite(sizes) & (sizes > 0)).all(1))
    say(faults, 'have the id of another', images, _repeated([image['id'] for image in images]))
    say(faults, "lie outside the data set's folder", images,
        [_leaves(dataset, image['file_name']) for image in images])
    say(faults, 'have the id of another', annotations,
        _repeated([annotation['id'] for annotation in annotations]))
    boxes = np.array([_numbers(annotation['bbox'], 4) for annotation in annotations])
    boxes = boxes.reshape(-1, 4)
    finite = np.isfinite(boxes).all(1)
    say(faults, 'have a box that is not four finite numbers', annotations, ~finite, 'bbox')
    masks: List[Optional[str]] = []
    if with_masks or _loads_masks(dataset):
        of_image = {image['id']: image for image in images}
        masks = [_fault_of_mask(annotation, of_image.get(annotation['image_id']))
                 for annotation in annotations]
        say(faults, 'have a segmentation that is neither polygons nor the RLE of their image',
            annotations, [fault == 'damaged' for fault in masks])
        say(left_out, 'have no polygon of three points or more, and train no mask', annotations,
            [fault == 'short' for fault in masks])
    if faults:
        return faults, left_out

    index = {image['id']: i for i, image in enumerate(images)}
    where = np.array([index.get(annotation['image_id'], -1) for annotation in annotations], int)
    names = {category['id']: category['name'] for category in content['categories']}
    classes = dataset.metainfo['classes']
    kinds = [names.get(annotation['category_id']) for annotation in annotations]
    # An image that is not there has no size; the last stands in for it.
    size = sizes[where] if len(sizes) else np.ones((len(where), 2))
    x, y, width, height = boxes.T
    inside = np.minimum([x + width, y + height], size.T) - np.maximum([x, y], 0)
    small = (width < 1) | (height < 1)
    areas = np.array([annotation['area'] for annotation in annotations], float)
    reasons = {
        'are of an image that the file does not list': where < 0,
        'are of a category that the file does not define': np.array(
            [kind is None for kind in kinds], bool),
        'have a box less than one pixel wide or high': small,
        'have a box outside their image': ~small & (inside <= 0).any(0),
        'have an area that is not above 0': ~small & ~(areas > 0),
    }
    shows = dict(zip(reasons, ('image_id', 'category_id', 'bbox', 'bbox', 'area')))
    for what, wrong in reasons.items():
        say(left_out, what, annotations, wrong, shows[what])
    if dataset.test_mode:
        say(left_out, 'have the id 0, which pycocotools takes for no match, so that its detection '
            'counts as wrong: number them from 1', annotations,
            [annotation['id'] == 0 for annotation in annotations])
        faults += _faults_of_evaluation(annotations)
    learnt = set(classes)
    usable = np.array([kind in learnt for kind in kinds], bool)
    usable &= np.array([not (annotation.get('ignore') or annotation.get('iscrowd'))
                        for annotation in annotations], bool)
    for wrong in reasons.values():
        usable &= ~wrong
    if masks:
        # Crowds need one too, and what is evaluated on all of those that training passes over.
        needed = np.array([kind in learnt for kind in kinds]) & (where >= 0)
        if not dataset.test_mode:
            ignored = np.array([bool(annotation.get('ignore')) for annotation in annotations])
            needed &= ~np.any([*reasons.values(), ignored], axis=0)
        say(faults, 'have no segmentation, which the config learns from, and one of boxes alone, '
            'such as a Faster R-CNN, does not', annotations,
            needed & [fault == 'missing' for fault in masks])
    if not usable.any():
        faults.append(f'none of its {len(annotations)} annotations, of {len(images)} images, is a '
                      f'box of {_few(classes)} to learn from'
                      + (f' ({"; ".join(left_out)})' if left_out else ''))
        return faults, []
    min_size = (dataset.filter_cfg or {}).get('min_size', 0)
    kept = sizes[where[usable]].min(1) >= min_size
    if not kept.any():
        faults.append(f'all images with a box are less than min_size={min_size} wide or high')
    return faults, left_out


def _faults_of_evaluation(annotations: list) -> List[str]:
    """What pycocotools fails on, after an epoch of training."""
    faults = []
    for what, wrong in (
            ('have no iscrowd of 0 or 1, which pycocotools evaluates by',
             [one.get('iscrowd') not in (0, 1) for one in annotations]),
            ('have an id that is no number', [type(one.get('id')) not in NUMBERS
                                              for one in annotations])):
        found = list(compress(annotations, wrong))
        if found:
            faults.append(f'{len(found)} of {len(annotations)} annotations {what} '
                          f'(the first: {found[0].get("id")})')
    return faults


def _lacking(kind: str, entries, keys: Tuple[str, ...]) -> Iterator[str]:
    for key in keys:
        found = [i for i, entry in enumerate(entries)
                 if not isinstance(entry, dict) or entry.get(key) is None]
        if found:
            yield (f'{len(found)} of {len(entries)} {kind}s have no {key} '
                   f'(the first: number {found[0]})')
            return


def _numbers(values, length: int) -> List[float]:
    """``length`` numbers as floats; NaN for each if that is not what ``values`` is."""
    if isinstance(values, list) and len(values) == length and NUMBERS.issuperset(map(type, values)):
        try:
            return [float(value) for value in values]
        except OverflowError:  # an integer of more than 308 digits
            pass
    return [math.nan] * length


def _repeated(ids: list) -> List[bool]:
    seen: set = set()
    repeated = []
    for identity in map(str, ids):
        repeated.append(identity in seen)
        seen.add(identity)
    return repeated


def _leaves(dataset: CocoDataset, name) -> bool:
    """Whether an image of that name is neither in the folder of images nor below data_root."""
    prefix = dataset.data_prefix['img']
    if not isinstance(name, str):
        return True
    if '..' not in name and not os.path.isabs(name) or '://' in prefix:
        return False
    path = os.path.abspath(os.path.join(prefix, name))  # of either kind, as data_root may be
    folders = [folder for folder in (prefix, dataset.data_root) if folder]
    return bool(folders) and not any(
        path.startswith(os.path.join(os.path.abspath(folder), '')) for folder in folders)


def _loads_masks(dataset: CocoDataset) -> bool:
    return any(getattr(transform, 'with_mask', False) for transform in dataset.pipeline.transforms)


def _fault_of_mask(annotation: dict, image: Optional[dict]) -> Optional[str]:
    """'missing', 'damaged', 'short' of points, or None for what MMDetection can use."""
    mask = annotation.get('segmentation')
    if not mask:
        return 'missing'
    if image is None:
        return None
    if isinstance(mask, list):
        points: list = [np.asarray(polygon) if isinstance(polygon, list)
                        and NUMBERS.issuperset(map(type, polygon)) else None for polygon in mask]
        if not all(polygon is not None and (polygon.size == 0 or polygon.dtype.kind in 'iuf')
                   and polygon.ndim == 1 and np.isfinite(polygon).all() for polygon in points):
            return 'damaged'
        return None if any(len(polygon) >= 6 and len(polygon) % 2 == 0
                           for polygon in points) else 'short'
    if not isinstance(mask, dict) or mask.get('size') != [image['height'], image['width']]:
        return 'damaged'
    counts = mask.get('counts')
    if isinstance(counts, list):
        is_whole = all(type(count) is int and count >= 0 for count in counts)
        return None if is_whole and sum(counts) == math.prod(mask['size']) else 'damaged'
    return None if isinstance(counts, str) and counts else 'damaged'


def _few(names) -> str:
    return ', '.join(map(str, names[:3])) + (', ...' if len(names) > 3 else '')


def check_images(dataset) -> None:
    """Read a sample of the images of ``dataset``, all of a small one.

    Raises:
        InputError: that names the first that cannot be read, or that is not of the size that the
            annotations give, since then their boxes are another image's.
    """
    transforms = getattr(getattr(dataset, 'pipeline', None), 'transforms', ())
    load = next((transform for transform in transforms
                 if isinstance(transform, LoadImageFromFile)), None)
    if load is None:
        return
    for i in range(0, len(dataset), -(-len(dataset) // SAMPLE)):
        info = dataset.get_data_info(i)
        if 'img_path' not in info:
            return
        try:
            loaded = load(dict(info))
        except Exception as error:  # as many as there are libraries that read images
            raise InputError(unreadable(info['img_path'], error)) from error
        found = (loaded or {}).get('ori_shape')  # none where the config ignores what is empty
        said = info.get('height'), info.get('width')
        if found is not None and None not in said and found != said:
            raise InputError(
                f'Image {info["img_path"]} is {found[1]} x {found[0]} pixels, where '
                f'{dataset.ann_file} says {said[1]} x {said[0]}: its boxes are those of another '
                'image, or were not scaled with it; mend the file, or put the image there that it '
                'is about.')


def unreadable(path: str, error: Optional[BaseException] = None) -> str:
    """A sentence for an image that could not be read."""
    if isinstance(error, FileNotFoundError):
        return (f'Image {path} does not exist: set data_root and data_prefix of the dataset in '
                'the config to where the images are.')
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    else:
        reason = 'it is empty, damaged or no image'
    return (f'Image {path} could not be read ({reason}): replace it, or take it out of the '
            'annotations.')
