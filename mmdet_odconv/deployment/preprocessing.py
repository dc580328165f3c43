"""What is done to an image before a detector: in an exported file's graph, and beside it."""
import copy
import json
import logging
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import mmcv
import torch
import torch.nn.functional as F
from mmcv.transforms import Compose
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import DATASETS
from torch import Tensor, nn
from torch.onnx.operators import shape_as_tensor

from ..checkpoints.files import writing
from ..errors import InputError

# Steps of a pipeline that a graph can take the place of, with what they must be told if anything.
PLAIN_STEPS: Dict[str, Dict[str, Any]] = dict(
    LoadImageFromFile=dict(color_type='color', imdecode_backend='cv2', to_float32=False),
    LoadAnnotations={}, PackDetInputs={}, Resize=dict(backend='cv2', interpolation='bilinear'))


class Resize:
    """MMCV's ``Resize`` of images of one size, as a function of tensors.

    Args:
        scale: (width, height) in px; with ``keep_ratio`` the most that the longer and the shorter
            side may have, in any order.
        keep_ratio: whether an image keeps its ratio of sides.
    """

    def __init__(self, scale: Tuple[int, int], keep_ratio: bool) -> None:
        self.scale, self.keep_ratio = scale, keep_ratio

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), resized as OpenCV does, but not rounded to whole values.

        Rounding, a runtime would put what another has at a half on the other side of it.
        """
        size = size_of(images).double()  # as in Python, where MMCV computes it
        if self.keep_ratio:
            # A number by a tensor would be the tensor's reciprocal in ONNX, in single precision.
            most = torch.tensor([max(self.scale), min(self.scale)], dtype=torch.float64,
                                device=size.device)
            factor = (most / torch.stack([size.max(), size.min()])).min()
            height, width = (size * factor + 0.5).long()
        else:
            width, height = torch.tensor(self.scale)
        if not torch.jit.is_tracing():
            height, width = height.item(), width.item()
        return F.interpolate(images, (height, width), mode='bilinear')


class Preprocessing(nn.Module):
    """The part of preparing images that is a function of tensors, in front of a backbone.

    Args:
        data_preprocessor: the detector's.
        divisor: of which both sides become multiples.
        normalize: whether images are as they were read, BGR values from 0 to 255, and are
            normalised here; otherwise they are normalised already.
        resize: how images are resized here; otherwise they are resized already.
    """

    def __init__(self, data_preprocessor: BaseDataPreprocessor, divisor: int = 1,
                 normalize: bool = False, resize: Optional[Resize] = None) -> None:
        super().__init__()
        self.data_preprocessor, self.divisor = data_preprocessor, divisor
        self.normalize, self.resize = normalize, resize

    def forward(self, images: Tensor) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
        """Of images (B, 3, H, W): what a backbone takes, and by what its boxes are to be read.

        Returns:
            Prepared images; the size before padding, (width, height, width, height) px, in which
            boxes end; how many times larger than the given image's its sides are, (4,), if it
            was resized here.
        """
        factors = None
        if self.resize is not None:
            given = size_of(images)
            images = self.resize(images)
            factors = _as_limit(size_of(images), images) / _as_limit(given, images)
        limit = _as_limit(size_of(images), images)
        preprocessor = self.data_preprocessor
        if self.normalize:
            if preprocessor._channel_conversion:
                images = images.flip(1)
            if preprocessor._enable_normalize:
                images = (images - preprocessor.mean) / preprocessor.std
        if self.divisor != 1:
            below, right = ((self.divisor - n % self.divisor) % self.divisor
                            for n in images.shape[2:])
            images = F.pad(images, (0, right, 0, below), value=preprocessor.pad_value)
        return images, limit, factors


def size_of(images: Tensor) -> Tensor:
    """Height and width, (2,) int64, of the graph where one is drawn."""
    if torch.jit.is_tracing():
        return shape_as_tensor(images)[2:]
    return torch.stack([torch.scalar_tensor(n, dtype=torch.int64, device=images.device)
                        for n in images.shape[2:]])


def _as_limit(size: Tensor, images: Tensor) -> Tensor:
    return size[[1, 0, 1, 0]].to(images.dtype)


def resize_of(config: Config) -> Resize:
    """How a config's test pipeline resizes images.

    Raises:
        InputError: if it does not, does it in a way that is not known here, or changes the image
            otherwise, too.
    """
    steps = test_pipeline(config)
    unknown = [dict(step) for step in steps if _kind(step) not in PLAIN_STEPS or any(
        step.get(key, value) != value for key, value in PLAIN_STEPS[_kind(step)].items())]
    found = [step for step in steps if _kind(step) == 'Resize']
    scale = found[0].get('scale') if len(found) == 1 else None
    if unknown or not (isinstance(scale, (tuple, list)) and len(scale) == 2):
        raise InputError(f'The test pipeline prepares images by {unknown or found or "no Resize"}, '
                         'which the graph cannot: expected one bilinear Resize with scale=(width, '
                         'height) and nothing else. Leave --resize out, and prepare images before '
                         'the file.')
    return Resize((scale[0], scale[1]), found[0].get('keep_ratio', False))


def described(config: Config, preprocessing: Preprocessing, classes: Sequence[str],
              mask_threshold: Optional[float] = None, images: bool = False) -> dict:
    """What is to be done to an image before the file, and what comes out, for a JSON file.

    How it is resized is None where the config has no test set.

    Args:
        config: whose test pipeline prepares images.
        preprocessing: what is done in the file.
        classes: the detector's.
        mask_threshold: probability from which a pixel belongs to a mask, of a mask head.
        images: whether detections come with the index of their image.
    """
    inside, preprocessor = preprocessing, preprocessing.data_preprocessor
    steps = _resizing(config)
    done = dict(
        resize='in the file' if inside.resize else steps and [
            {key: _kind(step) if key == 'type' else value for key, value in step.items()
             if key != '_scope_'} for step in steps],
        channels='BGR' if inside.normalize or not preprocessor._channel_conversion else 'RGB',
        layout=f'({"images" if images else 1}, 3, height, width), float32', values='0 to 255')
    if preprocessor._enable_normalize and not inside.normalize:
        done.update(values='(value - mean) / std, of values from 0 to 255',
                    mean=preprocessor.mean.flatten().tolist(),
                    std=preprocessor.std.flatten().tolist())
    kind = 'given' if inside.resize else 'resized'
    outputs = dict(boxes=f'(N, 4): x1, y1, x2, y2 in pixels of the {kind} image',
                   scores='(N,), falling' + ' within an image' * images,
                   labels='(N,): indices of classes')
    if images:
        outputs['images'] = '(N,): indices of images, rising'
    outputs['masks'] = ('(N, h, w), where there is a mask head: probabilities on a grid over each '
                        'box')
    return dict(input=done, classes=list(classes), outputs=outputs,
                **({} if mask_threshold is None else dict(mask_threshold=mask_threshold)))


def write_description(description: dict, path: Path, force: bool) -> None:
    """Write :func:`described` to a file; InputError if it exists and ``force`` is not set."""
    with writing(path, force) as temporary:
        temporary.write_text(json.dumps(description, indent=2) + '\n')


def first_test_set(config: Config) -> ConfigDict:
    """The config of the test set, or of the first of several that it is made of.

    Raises:
        InputError: if there is none.
    """
    if not config.get('test_dataloader'):
        raise InputError('The config has no test_dataloader, whose pipeline prepares images: give '
                         'one that has.')
    found = config.test_dataloader.dataset
    while 'datasets' in found or 'dataset' in found:
        found = found.datasets[0] if 'datasets' in found else found.dataset
    return found


def test_pipeline(config: Config) -> List[dict]:
    """Steps of the pipeline of :func:`first_test_set`."""
    return [step.to_dict() for step in first_test_set(config).pipeline]


def _resizing(config: Config) -> Optional[List[dict]]:
    """The steps that change an image's size; None if there is no test set."""
    return [step for step in test_pipeline(config) if _kind(step) in (
        'Resize', 'FixScaleResize', 'Pad')] if config.get('test_dataloader') else None


def _kind(step: dict) -> str:
    """The name of a step's type, which pure Python configs give as a class."""
    kind = step['type']
    return (kind if isinstance(kind, str) else kind.__name__).rpartition('.')[2]


def example_images(config: Config, preprocessing: Preprocessing,
                   files: Sequence[str]) -> List[Tensor]:
    """Images of two sizes, (1, 3, H, W) each, as an exported file takes them.

    Args:
        config: whose test pipeline resizes them.
        preprocessing: what is done in the file.
        files: images; the first of the test set if empty, and noise if there is none, or it is
            not here, of which the log warns.

    Raises:
        InputError: if there are files and no test pipeline.
    """
    if files:
        inputs = [_prepared(config, preprocessing, file) for file in files]
    else:
        inputs, why = [], 'the config has no test_dataloader'
        if config.get('test_dataloader'):
            try:
                data_set = DATASETS.build(config.test_dataloader.dataset)
                inputs = [read_image(data_set.get_data_info(0)['img_path']) if preprocessing.resize
                          else data_set[0]['inputs']]
            except OSError as error:
                why = str(error)
        if not inputs:
            print_log(f'No image of a test set is here ({why}): noise takes its place, in which a '
                      'detector may find nothing. Give --image.', logger='current',
                      level=logging.WARNING)
            inputs = [torch.randint(0, 256, (3, 224, 320))]
    images = [as_taken(preprocessing, image) for image in inputs]
    smaller = F.interpolate(images[0], scale_factor=(0.9, 0.75), mode='bilinear')
    return [*images, smaller]


def _prepared(config: Config, preprocessing: Preprocessing, file: str) -> Tensor:
    """An image before MMDetection's preprocessor, (3, H, W)."""
    if preprocessing.resize:
        return read_image(file)
    pipeline = Compose([step for step in test_pipeline(config) if _kind(step) != 'LoadAnnotations'])
    return pipeline(dict(img_path=str(file), img_id=0))['inputs']


def read_image(file: str) -> Tensor:
    """An image as it is in its file, (3, H, W), BGR.

    Raises:
        InputError: if it cannot be read.
    """
    image = mmcv.imread(file)
    if image is None:
        raise InputError(f'{file} could not be read as an image: give another.')
    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def as_taken(preprocessing: Preprocessing, image: Tensor, samples: Optional[list] = None) -> Tensor:
    """An image before MMDetection's preprocessor, (3, H, W), as the file takes it: (1, 3, H, W)."""
    if preprocessing.normalize:
        return image[None].float()
    preprocessor = copy.deepcopy(preprocessing.data_preprocessor)
    preprocessor.pad_size_divisor = 1
    return preprocessor(dict(inputs=[image], data_samples=samples))['inputs']
