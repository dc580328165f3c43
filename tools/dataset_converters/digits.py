"""Write a small COCO detection and instance segmentation dataset without any download.

    python digits.py OUT_DIR [--train 1000] [--val 200] [--test 0] [--size 192] [--seed 0]
                     [--hard | --classification | --keypoints]

The 1797 handwritten digits of ``sklearn.datasets.load_digits`` are composited onto random crops
of the two photographs of ``sklearn.datasets.load_sample_images``. OUT_DIR receives::

    train/000001.jpg ...   val/000001.jpg ...   annotations/{train,val}.json   digits.json

``--hard`` makes twice as many digits of half the size, among strokes that are parts of digits and
belong to no class: for small networks and long budgets, where the plain images teach little more.
``--keypoints`` turns each digit by up to 45 degrees either way and labels the four corners of its
box, in the digit's own order, in pixel centres: a COCO keypoint dataset of one category, for poses.
Its boxes hold the corners, some of which lie beyond the ink.
With ``--classification`` there is one digit an image, white on black, in a folder for each class::

    train/0/000001.jpg ...   val/0/000001.jpg ...   digits.json

Train and val use disjoint source digits (see ``split_digits``) and share the two photographs. With
``--test`` a third split halves val's source digits, to report on what nothing was chosen by. The
same options and library versions give the same bytes, and an image depends on the seed, its split
and its number only, never on how many are asked for. ``digits.json`` holds the options, so that a
second call with the same ones reuses the dataset; no other existing files are ever replaced.
"""

import argparse
import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as mask_utils
from rich.console import Console
from rich.progress import track

MADE_BY = 'mmdet_odconv tools/dataset_converters/digits.py'
DESCRIPTION = 'scikit-learn digits composited onto scikit-learn sample photographs'
MARKER = 'digits.json'
SPLITS = ('train', 'val', 'test')
PLACEMENT_TRIES = 30
STROKES = 12  # in a hard image, of no class
CORNERS = ('top left', 'top right', 'bottom right', 'bottom left')


class DatasetError(Exception):
    """A reason not to write the dataset, told to the user in one sentence."""


def load_sources():
    """Return ink (1797, 8, 8) in 0..1, labels (1797,) and two BGR photographs (427, 640, 3)."""
    packages = {'sklearn': 'scikit-learn', 'PIL': 'Pillow'}
    missing = [name for module, name in packages.items() if find_spec(module) is None]
    if missing:
        raise DatasetError(
            f'The source images need {" and ".join(missing)}, not installed here: '
            'run pip install "mmdet_odconv[quickstart]".'
        )
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    photos = [photo[..., ::-1] for photo in load_sample_images().images]
    return (digits.images / 16).astype(np.float32), digits.target, photos


def split_digits(labels, has_test=False):
    """Return the source digit indices of each split: the last fifth of every class is val.

    Where there is a test split, it has the last tenth. The digits are stored writer by writer, so
    a cut by position also keeps most writers apart.
    """
    by_class = [np.flatnonzero(labels == label) for label in range(10)]

    def part(begin, end):
        return np.concatenate([members[len(members) * begin // 10 : len(members) * end // 10]
                               for members in by_class])

    if has_test:
        return {'train': part(0, 8), 'val': part(8, 9), 'test': part(9, 10)}
    return {'train': part(0, 8), 'val': part(8, 10)}


def crop_background(photos, size, rng):
    """Return a random, contrast-damped crop, float32 (size, size, 3) in 0..255."""
    photo = photos[rng.integers(len(photos))]
    height, width = photo.shape[:2]
    side = rng.integers(height // 3, height + 1)
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    crop = photo[top : top + side, left : left + side]
    crop = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32)
    # Strokes a few pixels wide drown in full-contrast foliage and roof tiles.
    return crop.mean() + rng.uniform(0.4, 0.7) * (crop - crop.mean())


def upscale_ink(ink, side):
    """Turn ink (8, 8) in 0..1 into alpha (h, w) in 0..1, h and w up to ``side`` px, trimmed."""
    # Many strokes touch the 8x8 border, where they would end in a hard edge without a margin.
    ink = cv2.resize(np.pad(ink, 1), (side, side), interpolation=cv2.INTER_CUBIC)
    alpha = np.clip((ink - 0.25) / 0.4, 0, 1)
    x, y, width, height = cv2.boundingRect((alpha > 0).astype(np.uint8))
    return alpha[y : y + height, x : x + width]


def turn(alpha, degrees):
    """Turn ``alpha`` (h, w) about its centre, counterclockwise, into an array that holds all of it.

    Returns it and where the centres of its corner pixels went, as ``CORNERS``: x, y (4, 2) px.
    """
    height, width = alpha.shape
    right, bottom = width - 1, height - 1
    matrix = cv2.getRotationMatrix2D((right / 2, bottom / 2), degrees, 1)
    corners = np.array([(0, 0), (right, 0), (right, bottom), (0, bottom)]) @ matrix[:, :2].T
    corners += matrix[:, 2]
    low, high = np.floor(corners.min(0)), np.ceil(corners.max(0))
    matrix[:, 2] -= low
    columns, rows = (high - low).astype(int) + 1
    return cv2.warpAffine(alpha, matrix, (int(columns), int(rows))), corners - low


def find_free_window(occupied, shape, rng):
    """Return slices of a random ``shape`` (h, w) window free in (size, size), None if crowded."""
    for _ in range(PLACEMENT_TRIES):
        top, left = (rng.integers(full - part + 1) for full, part in zip(occupied.shape, shape))
        window = np.s_[top : top + shape[0], left : left + shape[1]]
        if not occupied[window].any():
            return window
    return None


def pick_colour(background, rng):
    """Return a random BGR colour (3,), dark on a bright background (h, w, 3) and bright on dark."""
    return rng.uniform(0, 75, 3) if background.mean() > 120 else rng.uniform(180, 255, 3)


def paint(canvas, occupied, alpha, rng):
    """Put ``alpha`` (h, w) where it is free, in one colour; its window, None if it is crowded."""
    window = find_free_window(occupied, alpha.shape, rng)
    if window is not None:
        occupied[window] = True
        colour = pick_colour(canvas[window], rng)
        canvas[window] += alpha[..., None] * (colour - canvas[window])
    return window


def compose_image(ink, pool, photos, size, rng, hard=False, keypoints=False):
    """Composite 3 to 8 digits of ``pool`` (source indices), fewer if they do not fit.

    In a hard image, 6 to 16 of half the size, after strokes cut from other digits.

    Returns the BGR image, uint8 (size, size, 3), and a list of (source index, mask, corners), masks
    uint8 (size, size) in {0, 1}, corners (4, 2) px with ``keypoints`` and else None. Digits may
    touch, but none covers another: masks are disjoint.
    """
    canvas = crop_background(photos, size, rng)
    occupied = np.zeros((size, size), bool)
    digits = []
    times = 2 if hard else 1
    smallest, largest = size // 6 // times, size // 3 // times
    for source in rng.choice(pool, STROKES if hard else 0):
        stroke = upscale_ink(ink[source], int(rng.integers(smallest, largest + 1)))
        height, width = stroke.shape
        stroke = np.rot90(stroke[: height // 2, : width * 2 // 3], rng.integers(4))
        paint(canvas, occupied, stroke, rng)
    for source in rng.choice(pool, times * rng.integers(3, 9)):
        alpha, corners = upscale_ink(ink[source], int(rng.integers(smallest, largest + 1))), None
        if keypoints:
            alpha, corners = turn(alpha, rng.uniform(-45, 45))
        window = paint(canvas, occupied, alpha, rng)
        if window is None:
            continue
        mask = np.zeros((size, size), np.uint8)
        mask[window] = alpha > 0.5
        if keypoints:
            corners += window[1].start, window[0].start
        digits.append((source, mask, corners))
    return canvas.round().clip(0, 255).astype(np.uint8), digits


def annotate_digit(mask, source, label):
    """Return the COCO fields of a uint8 mask (size, size): box x, y, w, h and area in px, RLE."""
    rle = mask_utils.encode(np.asfortranarray(mask))
    return {
        'category_id': int(label) + 1,
        'bbox': list(cv2.boundingRect(mask)),
        'area': int(mask.sum()),
        'iscrowd': 0,
        'source_digit': int(source),
        'segmentation': {'size': rle['size'], 'counts': rle['counts'].decode('ascii')},
    }


def annotate_corners(corners):
    """Return the COCO fields of corners (4, 2): their box, and the area of the turned one."""
    (left, top), (right, bottom) = corners.min(0), corners.max(0)
    sides = np.linalg.norm(corners[1] - corners[0]), np.linalg.norm(corners[2] - corners[1])
    return {
        'category_id': 1,
        'bbox': [float(value) for value in (left, top, right - left + 1, bottom - top + 1)],
        'area': float((sides[0] + 1) * (sides[1] + 1)),
        'num_keypoints': len(CORNERS),
        'keypoints': [value for x, y in corners for value in (float(x), float(y), 2)],
    }


def write_jpeg(path, image):
    """Write BGR ``image``, raising OSError on a full disk, where cv2.imwrite returns False."""
    encoded, data = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    if not encoded:
        raise DatasetError(f'OpenCV could not encode {path.name} as JPEG: reinstall it.')
    path.write_bytes(data.tobytes())


def write_split(root, split, settings, sources):
    """Write the images and the annotation file of ``split`` under ``root``."""
    ink, labels, photos = sources
    pool = split_digits(labels, 'test' in settings)[split]
    size, seed = settings['size'], settings['seed']
    keypoints = 'keypoints' in settings
    images, annotations = [], []
    (root / split).mkdir()
    console = Console(stderr=True)
    silent = not console.is_terminal
    for index in track(range(settings[split]), split, console=console, disable=silent):
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        image, digits = compose_image(ink, pool, photos, size, rng, 'hard' in settings, keypoints)
        name, image_id = f'{index + 1:06d}.jpg', index + 1
        write_jpeg(root / split / name, image)
        images.append({'id': image_id, 'file_name': name, 'width': size, 'height': size})
        for source, mask, corners in digits:
            ids = {'id': len(annotations) + 1, 'image_id': image_id}
            annotations.append({**ids, **annotate_digit(mask, source, labels[source])})
            if keypoints:
                annotations[-1].update(annotate_corners(corners))
    content = {
        'info': {'description': DESCRIPTION, 'made_by': MADE_BY, 'split': split, 'seed': seed},
        'images': images,
        'annotations': annotations,
        'categories': [{'id': label + 1, 'name': str(label)} for label in range(10)],
    }
    if keypoints:
        skeleton = [[1, 2], [2, 3], [3, 4], [4, 1]]
        content['categories'] = [
            {'id': 1, 'name': 'digit', 'keypoints': CORNERS, 'skeleton': skeleton}]
    (root / 'annotations' / f'{split}.json').write_text(json.dumps(content), encoding='utf-8')


def write_classes(root, split, settings, sources):
    """Write the images of ``split`` under ``root``, one folder for each class."""
    ink, labels, _ = sources
    size, rng = settings['size'], np.random.default_rng([settings['seed'], SPLITS.index(split)])
    # Each source digit once, in random order, before any comes twice.
    pool = rng.permutation(split_digits(labels, 'test' in settings)[split])
    for label in range(10):
        (root / split / str(label)).mkdir(parents=True)
    for index in range(settings[split]):
        source = pool[index % len(pool)]
        image = cv2.resize(ink[source], (size, size), interpolation=cv2.INTER_CUBIC)
        write_jpeg(root / split / str(labels[source]) / f'{index + 1:06d}.jpg',
                   (255 * image).round().clip(0, 255).astype(np.uint8))


def read_marker(out_dir):
    """Return the settings ``out_dir`` was made with, None if this tool did not make it."""
    marker = out_dir / MARKER
    if not marker.is_file():
        return None
    try:
        settings = json.loads(marker.read_text(encoding='utf-8'))
    except ValueError:  # Some other tool's digits.json.
        return None
    ours = isinstance(settings, dict) and settings.get('made_by') == MADE_BY
    return settings if ours else None


def can_reuse(out_dir, settings):
    """Tell a dataset made with ``settings`` from a free place, refusing anything else."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return False
    found = read_marker(out_dir)
    if found is None:
        raise DatasetError(
            f'{out_dir} exists and is not a dataset of this tool, where a new or empty directory '
            'was expected: pick another OUT_DIR or move it away.'
        )
    if found != settings:
        raise DatasetError(
            f'{out_dir} holds a dataset made with {describe(found)}, where {describe(settings)} '
            'was asked for: pick another OUT_DIR or delete it.'
        )
    return True


def describe(settings):
    """Return the settings as the options that give them."""
    return ' '.join(f'--{name}' if value is True else f'--{name} {value}'
                    for name, value in settings.items() if name != 'made_by')


def estimate_bytes(settings):
    """Return a generous estimate of the disk space of the dataset, in bytes."""
    # JPEGs take about half a byte per px; file system blocks and annotations come on top.
    return sum(settings.get(split, 0) for split in SPLITS) * (settings['size'] ** 2 + 8192)


def check_disk_space(out_dir, needed):
    """Refuse to start when the file system of ``out_dir`` has fewer than ``needed`` bytes free."""
    existing = next(path for path in (out_dir, *out_dir.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DatasetError(
            f'{existing} has {free / 1e6:.0f} MB free, where about {needed / 1e6:.0f} MB are '
            'needed: free some space or pick another OUT_DIR.'
        )


def write_dataset(out_dir, settings):
    """Write the dataset beside ``out_dir`` and move it there once it is complete."""
    sources = load_sources()
    partial = out_dir.with_name(f'{out_dir.name}.partial-{os.getpid()}')
    partial.mkdir(parents=True)
    try:
        if 'classification' in settings:
            write = write_classes
        else:
            write = write_split
            (partial / 'annotations').mkdir()
        for split in filter(settings.__contains__, SPLITS):
            write(partial, split, settings, sources)
        (partial / MARKER).write_text(json.dumps(settings), encoding='utf-8')
        if out_dir.exists():
            out_dir.rmdir()  # Fails unless still empty; Windows renames onto no directory at all.
        partial.rename(out_dir)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def make_dataset(out_dir, settings):
    """Write or reuse the dataset; return what was done as a sentence."""
    needed = estimate_bytes(settings)
    try:
        if can_reuse(out_dir, settings):
            return f'{out_dir} already holds this dataset and is reused.'
        check_disk_space(out_dir, needed)
        write_dataset(out_dir, settings)
    except OSError as error:
        raise DatasetError(
            f'Making {out_dir} failed with "{error.strerror or error}" and was undone: see that '
            f'its parent directory is writable and has about {needed / 1e6:.0f} MB free.'
        ) from error
    images = [f'{settings[split]} {split}' for split in SPLITS if split in settings]
    return f'{out_dir} holds {", ".join(images[:-1])} and {images[-1]} images.'


def parse_args(argv=None):
    """Parse the command line and refuse values below their minimum."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out_dir', metavar='OUT_DIR', type=Path, help='new or empty directory')
    parser.add_argument('--train', type=int, default=1000, help='number of train images')
    parser.add_argument('--val', type=int, default=200, help='number of val images')
    parser.add_argument('--test', type=int, default=0, help='number of test images')
    parser.add_argument('--size', type=int, default=192, help='side of the square images in px')
    parser.add_argument('--seed', type=int, default=0, help='seed of every random choice')
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument('--hard', action='store_true', help='smaller digits, among parts of others')
    kind.add_argument('--classification', action='store_true',
                      help='one digit an image, a folder a class')
    kind.add_argument('--keypoints', action='store_true', help='turned digits and their corners')
    args = parser.parse_args(argv)
    smallest = 32 if args.classification else 64
    for name, minimum in {'train': 1, 'val': 1, 'test': 0, 'size': smallest, 'seed': 0}.items():
        if getattr(args, name) < minimum:
            parser.error(f'--{name} must be at least {minimum}')
    return args


def main(argv=None):
    """Run the command line; every expected failure is one sentence and exit status 1."""
    args = parse_args(argv)
    settings = {'made_by': MADE_BY, **vars(args)}
    for name in ('hard', 'classification', 'keypoints', 'test'):
        if not settings[name]:
            del settings[name]  # so that datasets made before there was it are reused
    out_dir = settings.pop('out_dir').resolve()
    try:
        print(make_dataset(out_dir, settings))
    except DatasetError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit('Interrupted; what had been written was removed.')


if __name__ == '__main__':
    main()
