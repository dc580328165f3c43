"""Data sets of one's own: where their splits are, what is in them, and detectors that fit them."""
import collections
import copy
import json
import math
import statistics
from pathlib import Path
from typing import Dict, Iterable, List, NamedTuple, Tuple
from xml.etree import ElementTree

from mmengine.config import Config

from ..checkpoints.files import writing
from ..errors import InputError

# Where the annotations of a split are, and its images: the quickstart's, COCO's own, Roboflow's,
# and what convert_voc writes.
LAYOUTS = (
    ('annotations/{}.json', '{}/'),
    ('annotations/instances_{}2017.json', '{}2017/'),
    ('{}/_annotations.coco.json', '{}/'),
    ('annotations/voc_{}.json', 'JPEGImages/'),
)
VOC_LISTS = 'ImageSets/Main'
SPLITS = dict(train=('train',), val=('val', 'valid'), test=('test',))


def find_splits(root: Path) -> Dict[str, Tuple[str, str]]:
    """Annotation file and image folder of each split of a COCO-format directory, relative to it.

    Raises:
        InputError: if there is no train or no val split; test may be absent.
    """
    found = {}
    for split, names in SPLITS.items():
        for annotations, images in ((a.format(n), i.format(n)) for n in names for a, i in LAYOUTS):
            if split not in found and (root / annotations).is_file():
                found[split] = annotations, images
    for split in ('train', 'val'):
        if split in found:
            continue
        listed = root / VOC_LISTS / f'{split}.txt'
        if listed.parent.is_dir() and not listed.is_file():
            raise InputError(f'{listed} does not exist, where a Pascal VOC folder lists the images '
                             f'of {split}: write it, one name a line.')
        expected = ', '.join(annotations.format(split) for annotations, _ in LAYOUTS)
        digits = '' if root.is_dir() and any(root.iterdir()) else (
            f', or write the digits there, python tools/dataset_converters/digits.py {root}')
        raise InputError(f'{root} has none of {expected}: give a directory in COCO format{digits}')
    return found


class Split(NamedTuple):
    """What one annotation file holds, crowds left out."""
    images: int
    empty: int
    boxes: Dict[str, int]
    image_sizes: List[Tuple[float, float]]
    box_sizes: List[float]

    @property
    def kinds(self) -> str:
        """Share of boxes that COCO calls small, medium and large: below 32, 96 pixels, above."""
        n = max(1, len(self.box_sizes))
        small = sum(size < 32 for size in self.box_sizes) / n
        large = sum(size >= 96 for size in self.box_sizes) / n
        return f'{small:.0%} small, {1 - small - large:.0%} medium, {large:.0%} large'

    def __str__(self) -> str:
        widths, heights = zip(*self.image_sizes) if self.image_sizes else ((0,), (0,))
        return (f'{self.images} images ({self.empty} empty) of {statistics.median(widths):.0f} x '
                f'{statistics.median(heights):.0f} pixels (the median), '
                f'{sum(self.boxes.values())} boxes: {self.kinds}')


def read_split(path: Path) -> Split:
    """Count what a COCO-format file holds.

    Raises:
        InputError: if it is no such file.
    """
    try:
        content = json.loads(path.read_text('utf-8'))
        names = {category['id']: category['name'] for category in content['categories']}
        boxes = dict.fromkeys(names.values(), 0)
        if len(boxes) < len(names):
            twice = next(n for n, c in collections.Counter(names.values()).items() if c > 1)
            raise InputError(f'{path} has two categories named {twice}: give each its own name.')
        annotated, sizes = set(), []
        for annotation in content['annotations']:
            name = names.get(annotation['category_id'])
            if name is None or annotation.get('iscrowd') or annotation.get('ignore'):
                continue
            boxes[name] += 1
            annotated.add(annotation['image_id'])
            width, height = annotation['bbox'][2:]
            sizes.append(max(0, width * height)**0.5)
        images = content['images']
        return Split(len(images), len(images) - len(annotated), boxes,
                     [(image['width'], image['height']) for image in images], sizes)
    except (OSError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f'{path} could not be read as COCO ({type(error).__name__}: {error}): '
                         'expected a JSON object with images, annotations and categories.'
                         ) from error


def check_categories(split: str, names: Iterable[str], train: Iterable[str]) -> None:
    """Refuse a split whose categories, those that count, are not those of train in its order."""
    names, train = list(names), list(train)
    if names != train:
        raise InputError(
            f'The categories of {split} ({", ".join(names)}) are not those of train '
            f'({", ".join(train)}) in their order: give all splits the same, since MMDetection '
            'numbers them as each file does.')


def use_data(config: Config, root: Path) -> Dict[str, int]:
    """Train and evaluate on a COCO-format directory, in place; number of images of each split.

    The classes are those of the training annotations, and every head gets their number. A test
    split becomes the config's test data; without one, val is.

    Raises:
        InputError: if the directory has no train or val split, or they differ in their categories.
    """
    splits, images = find_splits(root), {}
    for split, loader in (('train', 'train_dataloader'), ('val', 'val_dataloader'),
                          ('test', 'test_dataloader')):
        annotations, folder = splits.get(split, splits['val'])
        content = json.loads((root / annotations).read_text('utf-8'))
        if split in splits:
            images[split] = len(content['images'])
        names = tuple(category['name'] for category in content['categories'])
        if split == 'train':
            classes = names
        check_categories(split, [name for name in names if name in classes], classes)
        config[loader] = copy.deepcopy(config[loader])  # val's may be the very same as test's
        nested(config[loader]['dataset'])[-1].update(
            data_root=f'{root}/', ann_file=annotations, data_prefix=dict(img=folder),
            metainfo=dict(classes=classes))
        if split != 'train':
            config[f'{split}_evaluator'] = dict(config[f'{split}_evaluator'],
                                                ann_file=str(root / annotations))
    set_num_classes(config.model, len(classes))
    return images


def nested(dataset: dict) -> List[dict]:
    """The config of a data set after those of its wrappers, RepeatDataset and its like."""
    return [dataset, *nested(dataset['dataset'])] if 'dataset' in dataset else [dataset]


def set_num_classes(part, num_classes: int) -> int:
    """Set it in every head of a model's config, in place; how many there were.

    A proposal head knows objects alone, and keeps its own.
    """
    found = 0
    if isinstance(part, dict):
        if 'num_classes' in part:
            part['num_classes'] = num_classes
            found = 1
        part = [child for name, child in part.items() if name != 'rpn_head']
    if isinstance(part, (list, tuple)):
        found += sum(set_num_classes(child, num_classes) for child in part)
    return found


def convert_voc(root: Path) -> List[Path]:
    """Write COCO annotations of a Pascal VOC folder to ``root``/annotations/voc_SPLIT.json.

    They are written again where a list or an annotation changed since.

    Its splits are ImageSets/Main/{train,val,test}.txt. What VOC calls difficult becomes COCO's
    crowd: neither trained on nor counted as missed. Corners, which VOC counts from 1, include
    their pixels. Segmentations are left behind.

    Returns:
        The files written; none if ``root`` is no VOC folder, or none of it changed.

    Raises:
        InputError: that names an annotation that cannot be read.
    """
    lists = [root / VOC_LISTS / f'{split}.txt' for split in SPLITS]
    lists = [path for path in lists if path.is_file()]
    outs = [root / f'annotations/voc_{path.stem}.json' for path in lists]
    annotations = [[_voc_annotation(root, line.strip())
                    for line in _lines(path) if line.strip()] for path in lists]
    # Images that come later, or go, change a folder, and which of them an annotation is of.
    changed = max((path.stat().st_mtime_ns for paths in [lists, *annotations, [
        root / 'JPEGImages']] for path in paths if path.exists()), default=0)
    if all(out.is_file() and out.stat().st_mtime_ns > changed for out in outs):
        return []
    parsed = [_read_voc(root, paths) for paths in annotations]
    # One numbering of classes for all splits.
    names = sorted({name for images in parsed for *_, objects in images for name, *_ in objects})
    for out, images in zip(outs, parsed):
        try:
            out.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f'{out.parent}, where annotations in COCO format go, cannot be made '
                             f'({error.strerror}): make {root} writable, or give a copy of it.'
                             ) from error
        with writing(out, True) as temporary:
            temporary.write_text(json.dumps(_as_coco(images, names)))
    return outs


def _lines(path: Path) -> List[str]:
    try:
        return path.read_text(encoding='utf-8-sig').splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f'{path} is no text in UTF-8 ({error}): save it as that.') from error


def _voc_annotation(root: Path, line: str) -> Path:
    """What a line of a list names: an image, whose name may have spaces, and perhaps a flag."""
    path = root / f'Annotations/{line}.xml'
    return path if path.is_file() else root / f'Annotations/{line.rsplit(maxsplit=1)[0]}.xml'


def _read_voc(root: Path, paths: Iterable[Path]) -> list:
    """(file name, width, height, objects) of each image; an object is (name, box, difficult)."""
    images = []
    files: Dict[str, List[str]] = {}  # names by what is before the suffix
    for file in sorted((root / 'JPEGImages').rglob('*')):
        image = file.relative_to(root / 'JPEGImages')
        files.setdefault(image.with_suffix('').as_posix(), []).append(image.as_posix())
    for path in paths:
        try:
            tree = ElementTree.parse(path).getroot()
            objects = []
            for found in tree.iter('object'):
                left, top, right, bottom = (
                    _number(found, f'bndbox/{corner}') for corner in (
                        'xmin', 'ymin', 'xmax', 'ymax'))
                left, top = max(left - 1, 0), max(top - 1, 0)
                kind = (found.findtext('name') or '').strip()
                if not kind:
                    raise ValueError('an object has no name')
                objects.append((kind, [left, top, right - left, bottom - top],
                                (found.findtext('difficult') or '').strip() == '1'))
            name = Path(tree.findtext('filename') or '').name
            stem = path.relative_to(root / 'Annotations').with_suffix('').as_posix()
            own = files.get(stem, [])
            if own and name not in own:
                name = own[0]  # copies, and augmented ones, often keep another's name
            elif not own and not (name and (root / 'JPEGImages' / name).is_file()):
                name = f'{stem}.jpg'
            width, height = (int(_number(tree, f'size/{side}')) for side in ('width', 'height'))
            if width < 1 or height < 1:
                raise ValueError(f'its size is {width} x {height}')
        except (OSError, ElementTree.ParseError, ValueError) as error:
            raise InputError(f'{path} could not be read as a Pascal VOC annotation ({error}): mend '
                             'it, or take it out of ImageSets/Main.') from error
        images.append((name, width, height, objects))
    return images


def _number(element: ElementTree.Element, path: str) -> float:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f'it has no {path}')
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f'its {path} is {text.strip()}')
    return number


def _as_coco(images: list, names: List[str]) -> dict:
    annotations = [
        dict(image_id=i, category_id=names.index(name), bbox=box, area=box[2] * box[3],
             iscrowd=int(difficult))
        for i, (*_, objects) in enumerate(images) for name, box, difficult in objects]
    return dict(
        images=[dict(id=i, file_name=name, width=width, height=height)
                for i, (name, width, height, _) in enumerate(images)],
        # From 1: pycocotools takes a match with 0 for none.
        annotations=[dict(annotation, id=i) for i, annotation in enumerate(annotations, 1)],
        categories=[dict(id=i, name=name) for i, name in enumerate(names)])
