"""What dynamic layers attend to over a data set, and what a detector finds and misses there."""
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Tuple

import torch
from mmdet.models import BaseDetector
from mmdet.structures.bbox import bbox_overlaps
from mmengine.config import Config
from mmengine.runner import Runner
from torch import Tensor, nn

from ..engine.data_check import check_data, read_annotations, unwrapped
from ..errors import InputError
from ..layers import DynamicConv2d

DEAD = 0.05  # of an equal share, which no image gives a kernel that is dead
MATCH = 0.5  # IoU from which a detection is of an object


@dataclass
class Image:
    """A picture with what is in it and what was found: boxes (N, 4) in its pixels, labels (N,).

    A detection of what is ``ignored``, (M, 4), such as a crowd, is neither right nor wrong.
    """
    path: str
    boxes: Tensor
    labels: Tensor
    found_boxes: Tensor
    found_scores: Tensor
    found_labels: Tensor
    ignored: Tensor = field(default_factory=lambda: torch.zeros(0, 4))


@dataclass
class Spread:
    """How the kernel attention of one layer spreads over its bank and over images.

    Attributes:
        shares: (n,), mean share of each kernel in the mixture.
        entropy: of an image's attention, the mean over images, in units of log n: 1 where all
            kernels are mixed alike, 0 where each image takes one.
        variation: standard deviation of a share over images, the mean over kernels; 0 where all
            images get the same mixture of the bank.
        dead: kernels that no image takes more of than a twentieth of an equal share.
    """
    shares: Tensor
    entropy: float
    variation: float
    dead: List[int]


@torch.no_grad()
def record_attentions(model: BaseDetector, config: Config, limit: int
                      ) -> Tuple[List[Image], Dict[str, Tensor]]:
    """Run a detector on its config's test set and keep each layer's kernel attention.

    Args:
        model: in evaluation mode.
        config: whose ``test_dataloader`` is read.
        limit: most images.

    Returns:
        The images, and by layer name the kernel attention of each, (images, n), summing to one.

    Raises:
        InputError: if no layer of the model has an attention over kernels, if the test set is not
            of COCO's format or names none of the config's classes, or numbers them in another
            order.
    """
    kept: Dict[str, List[Tensor]] = {}

    def keep(name):
        def hook(_, __, attentions):
            attention = attentions.get('kernel_attention')
            if attention is not None and attention.shape[1] > 1:
                kept.setdefault(name, []).append(attention.cpu())
        return hook

    hooks = [module.attention.register_forward_hook(keep(name))
             for name, module in model.named_modules()
             if isinstance(module, DynamicConv2d) and isinstance(
                 getattr(module, 'attention', None), nn.Module)]
    if not config.get('test_dataloader'):
        raise InputError('The config has no test_dataloader, whose images are to be read: give one '
                         'that has, or --data.')
    loader = Runner.build_dataloader(config.test_dataloader)
    check_data(loader.dataset, trained=False)
    truth = _truth(loader.dataset)
    images: List[Image] = []
    try:
        for data in loader:
            for sample in model.test_step(data):
                boxes, labels, ignored = truth[sample.img_id]
                found = sample.pred_instances.cpu()
                images.append(Image(sample.img_path, boxes, labels, found.bboxes, found.scores,
                                    found.labels, ignored))
            if len(images) >= limit:
                break
    finally:
        for hook in hooks:
            hook.remove()
    attentions = {name: torch.cat(values)[:limit] for name, values in kept.items()
                  if sum(map(len, values)) == len(images)}  # not of layers that run several times
    if not attentions:
        raise InputError('No layer of this detector mixes kernels by attention to one bank: give a '
                         'config with such layers (not DCD or KernelWarehouse), of more than one '
                         'kernel, which run once an image.')
    return images[:limit], {name: value / value.sum(1, keepdim=True).clamp(min=1e-12)
                            for name, value in attentions.items()}


def _truth(dataset) -> Dict[int, Tuple[Tensor, Tensor, Tensor]]:
    """By image id the boxes, their labels among the config's classes, and boxes to be ignored.

    MMDetection numbers as labels the classes that a file has; here they are those of the config.
    """
    result = {}
    names: set = set()
    for part in unwrapped(dataset):
        if not hasattr(part, 'cat2label'):
            raise InputError(f"The test set is a {type(part).__name__}, whose objects cannot be "
                             "read: give one of COCO's format, by --data.")
        classes = list(part.metainfo['classes'])
        named = {category['id']: category['name']
                 for category in read_annotations(part)['categories']}
        label_of = {label: classes.index(named[category])
                    for category, label in part.cat2label.items()}
        names |= label_of.keys()
        for i in range(len(part)):
            info = part.get_data_info(i)
            kept, ignored = ([one for one in info['instances'] if bool(one['ignore_flag']) is flag]
                             for flag in (False, True))
            result[info['img_id']] = (
                torch.tensor([one['bbox'] for one in kept]).reshape(-1, 4),
                torch.tensor([label_of[one['bbox_label']] for one in kept], dtype=torch.long),
                torch.tensor([one['bbox'] for one in ignored]).reshape(-1, 4))
    if not names:
        raise InputError("The annotations name none of the config's classes, "
                         f'{", ".join(classes[:5])}: give those of the data that the detector was '
                         'trained for.')
    return result


def spread(attention: Tensor) -> Spread:
    """:class:`Spread` of the attention of one layer, (images, n)."""
    attention = attention.double()
    entropy = torch.special.entr(attention).sum(1).mean() / torch.tensor(attention.shape[1]).log()
    return Spread(attention.mean(0), entropy.item(), attention.std(0, correction=0).mean().item(),
                  (attention.max(0).values < DEAD / attention.shape[1]).nonzero()[:, 0].tolist())


def by_class(attention: Tensor, images: List[Image], classes: int) -> Tensor:
    """Mean attention over the images that hold a class, (classes, n); NaN where none does."""
    rows = [[i for i, image in enumerate(images) if (image.labels == label).any()]
            for label in range(classes)]
    return torch.stack([attention[row].mean(0) for row in rows])


def most_and_least_alike(attentions: Dict[str, Tensor]) -> Tuple[Tuple[int, int], Tuple[int, int]]:
    """The two images whose attentions over all layers are nearest, and the two farthest."""
    vectors = torch.cat(list(attentions.values()), 1)
    distances = torch.cdist(vectors, vectors)
    first, second = torch.triu_indices(len(vectors), len(vectors), 1)
    pairs = distances[first, second]
    nearest, farthest = ((int(first[i]), int(second[i])) for i in (pairs.argmin(), pairs.argmax()))
    return nearest, farthest


@dataclass
class Mistake:
    """Where a detector errs: an image's index, a box of it, and how bad it is, from 0 to 1."""
    image: int
    box: Tensor
    text: str
    badness: float


def judge(image: Image, score: float) -> Tuple[Dict[int, Optional[int]], List[int]]:
    """What a detector's answer for an image is worth.

    A detection, by falling score, takes the free object that it overlaps most, from an IoU of one
    half on: of its own class if there is one, and else, when all have chosen so, of a wrong class.

    Args:
        image: with detections.
        score: least score of a detection that counts.

    Returns:
        By the index of each detection that counts that of the object taken, or None if it is of
        nothing; the right ones come first. And the objects that are missed, which none took. One
        that takes none and lies half in what is to be ignored does not count, as COCO has it.
    """
    free = torch.ones(len(image.boxes), dtype=torch.bool)
    counted = [int(i) for i in image.found_scores.argsort(descending=True)
               if image.found_scores[i] >= score]
    overlaps = bbox_overlaps(image.found_boxes.float(), image.boxes.float())
    excused = bbox_overlaps(image.found_boxes.float(), image.ignored.float(), mode='iof')
    taken: Dict[int, Optional[int]] = {}
    for own_class in (True, False):
        for i in counted:
            if i in taken:
                continue
            left = overlaps[i] * free
            if own_class:
                left = left * (image.labels == image.found_labels[i])
            if len(left) and left.max() >= MATCH:
                taken[i] = int(left.argmax())
                free[left.argmax()] = False
            elif not own_class and not (excused[i] >= MATCH).any():
                taken[i] = None
    return taken, free.nonzero()[:, 0].tolist()


def mistakes(images: List[Image], classes: List[str], score: float) -> Dict[str, List[Mistake]]:
    """False positives, wrong classes and misses, each the worst first.

    Args:
        images: what :func:`record_attentions` gave.
        classes: names by label.
        score: least score of a detection that counts: see :func:`judge`.
    """
    result: Dict[str, List[Mistake]] = {'false positives': [], 'wrong class': [], 'misses': []}
    for index, image in enumerate(images):
        taken, missed = judge(image, score)
        for i, true in taken.items():
            box, value = image.found_boxes[i], image.found_scores[i].item()
            text = f'{classes[image.found_labels[i]]} {value:.2f}'
            if true is None:
                result['false positives'].append(Mistake(index, box, text, value))
            elif image.labels[true] != image.found_labels[i]:
                text += f', is {classes[image.labels[true]]}'
                result['wrong class'].append(Mistake(index, box, text, value))
        overlaps = bbox_overlaps(image.found_boxes.float(), image.boxes.float())
        for true in missed:
            best = overlaps[:, true] * image.found_scores if len(image.found_scores) else [0.]
            result['misses'].append(Mistake(index, image.boxes[true],
                                            classes[image.labels[true]], 1 - float(max(best))))
    for found in result.values():
        found.sort(key=lambda mistake: -mistake.badness)
    return result
