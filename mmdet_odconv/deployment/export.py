"""A detector written to a file that runs without MMDetection, and compared with the detector."""
import copy
import importlib
import importlib.util
import json
import logging
import warnings
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from mmcv.ops import DeformConv2d, ModulatedDeformConv2d, MultiScaleDeformableAttention
from mmcv.transforms import Compose
from mmdet.models import BaseDetector
from mmdet.utils import get_test_pipeline_cfg
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from torch import Tensor, nn

from ..checkpoints import read_weights
from ..checkpoints.files import halved, writing
from ..checkpoints.swapping import build_model
from ..errors import InputError
from ..layers import FDConv2d
from .detector import TensorDetector
from .operators import NEWEST_OPSET, OPSET, linspace_of_one_step

FORMATS = {'onnx': '.onnx', 'pt2': '.pt2', 'torchscript': '.pt'}  # and how their files end
MIN_HALVED = 64  # elements, from which a cast is worth its node
# What a runtime's rounding may change of a box (px) and of a score or a mask's pixel.
BOX_TOLERANCE, SCORE_TOLERANCE = 0.1, 1e-3


def load_detector(config: Config, checkpoint: str) -> Tuple[BaseDetector, Sequence[str]]:
    """The detector of a config with the weights of a checkpoint, for inference, and its classes.

    Raises:
        InputError: if the weights are not those of the config's detector.
    """
    model = build_model(config)
    whole = load_weights(model, checkpoint)
    model.eval()
    return model, classes_of(config, whole)


def classes_of(config: Config, checkpoint: dict) -> Tuple[str, ...]:
    """Classes that a checkpoint was trained for, or else those of its config's test set."""
    meta = checkpoint.get('meta') or {}
    meta = meta.get('dataset_meta') or meta  # where MMDetection 2.x, and so releases, has CLASSES
    found = meta.get('classes') or meta.get('CLASSES')
    if not found and config.get('test_dataloader'):
        data_set = DATASETS.build(dict(config.test_dataloader.dataset, lazy_init=True))
        found = data_set.metainfo.get('classes')
    return tuple(found or ())


def load_weights(model: BaseDetector, checkpoint: str) -> dict:
    """Load all of a detector's weights, none of them left as it was; the checkpoint's content.

    Raises:
        InputError: if they are another detector's.
    """
    state, whole = read_weights(checkpoint)
    try:
        missing = model.load_state_dict(state, strict=False).missing_keys
    except RuntimeError as error:
        raise InputError(f'{checkpoint} does not fit the config '
                         f'({str(error).splitlines()[-1].strip()}): give the config that it was '
                         'trained with.') from error
    if missing:
        raise InputError(f'{checkpoint} lacks {len(missing)} tensors of the config, such as '
                         f'{missing[0]}: give the config that it was trained with.')
    return whole


def export_detector(detector: TensorDetector, path: Path, images: Sequence[Tensor],
                    format: str = 'onnx', opset: int = 17, check: bool = True,
                    force: bool = False, half: bool = False) -> List[Dict[str, float]]:
    """Write a detector to ``path``, whole and right or not at all; any image size, one at a time.

    Args:
        detector: what is written.
        path: file to write.
        images: (1, 3, H, W) each: the graph is drawn on the first, and checked on all.
        format: 'onnx'; or 'pt2', a program of torch.export, or 'torchscript', which both need
            ``import mmdet_odconv`` where they are loaded. A program fixes which levels of the
            pyramid are one cell wide or high, as they are for the first image.
        opset: ONNX's version of operators, 16 to 20.
        check: run the file and :func:`compare` it with the detector.
        force: replace a file that exists.
        half: store weights in half precision, which a runtime makes single again as it loads them;
            those of the detector are rounded so, in place. Fuse it first: an exporter folds norms
            into rounded weights, which then are no halves.

    Returns:
        What :func:`compare` found.

    Raises:
        InputError: if the file cannot be written, differs from the detector, or has a name that
            does not end as its format's do, if ``opset`` is out of range, if what writes or checks
            it is not installed, or if the detector has a layer that the format does not take.
    """
    if not OPSET <= opset <= NEWEST_OPSET:
        raise InputError(f'opset is {opset}, where {OPSET}, the first whose RoiAlign knows where '
                         f'pixels are, to {NEWEST_OPSET} was expected.')
    if half and format != 'onnx':
        raise InputError(f'half is for onnx, and the format is {format}: leave half out.')
    if path.suffix != FORMATS[format]:
        raise InputError(f'{path} is to be of {format}, whose files end in {FORMATS[format]} here: '
                         'give such a name.')
    check_exportable(detector.model, format)
    if format == 'onnx' and check and importlib.util.find_spec('onnxruntime') is None:
        raise InputError("onnxruntime is not installed, which checks the file: pip install "
                         "'.[deploy]' in a checkout, or give --no-check.")
    if half:
        detector.load_state_dict(halved(detector.state_dict()))
    with writing(path, force) as temporary, torch.no_grad(), warnings.catch_warnings():
        # Of branches on shapes, which are the same for every image.
        warnings.simplefilter('ignore')
        image = images[0]
        if format == 'torchscript':
            torch.jit.trace(detector, image, check_trace=False).save(str(temporary))
        elif format == 'pt2':
            torch.export.save(as_program(detector, image), temporary)
        else:
            write_onnx(detector, image, temporary, detector.output_names, {0: 'detections'}, opset)
            if half:
                store_halves(temporary)
        return compare(detector, Runtime(temporary), images) if check else []


def check_exportable(model: nn.Module, format: str) -> None:
    """InputError that names the first layer that a format does not take, or what is missing."""
    if format == 'onnx' and importlib.util.find_spec('onnx') is None:
        raise InputError("onnx is not installed, which writes the file: pip install '.[deploy]' "
                         'in a checkout.')
    for name, module in model.named_modules():
        if isinstance(module, FDConv2d) and format != 'torchscript':
            raise InputError(f'{name} is an FDConv2d, whose Fourier transform of kernels (onnx) '
                             'and bands of a map of any size (pt2) the exporters do not take: use '
                             'torchscript.')
        if isinstance(module, (DeformConv2d, ModulatedDeformConv2d)):
            raise InputError(f'{name} is a deformable convolution, a kernel of mmcv that no '
                             'exporter takes: train a detector without it to export.')


def as_program(detector: TensorDetector, image: Tensor) -> torch.export.ExportedProgram:
    """A detector as torch.export draws it, for one image of other heights and widths, too.

    Raises:
        InputError: if it has multi-scale deformable attention, or torch is older than 2.7.
    """
    if not hasattr(torch.compiler, 'is_exporting'):
        raise InputError(f'pt2 needs torch 2.7, and this is {torch.__version__}: use onnx.')
    for name, module in detector.model.named_modules():
        if isinstance(module, MultiScaleDeformableAttention):
            raise InputError(f'{name} is multi-scale deformable attention, which takes sizes of '
                             'maps from tensors and cannot be exported as pt2: use onnx.')
    size = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        return torch.export.export(detector, (image, ), dynamic_shapes=({2: size, 3: size}, ),
                                   strict=False)


def write_onnx(module: nn.Module, image: Tensor, path: Path, names: Sequence[str],
               output_axes: Dict[int, str], opset: int = 17) -> None:
    """Write a function of one image, (1, 3, H, W) of any size, and its outputs' names and axes."""
    axes = {'image': {2: 'height', 3: 'width'}, **dict.fromkeys(names, output_axes)}
    with linspace_of_one_step(opset):
        torch.onnx.export(module, (image, ), str(path), dynamo=False, opset_version=opset,
                          input_names=['image'], output_names=list(names), dynamic_axes=axes)


def store_halves(path: Path) -> None:
    """Store in half precision every weight of an ONNX file that loses nothing by it."""
    import onnx  # as torch.onnx does, only where it is needed
    model = onnx.load(str(path))
    casts = []
    for weight in model.graph.initializer:
        if weight.data_type != onnx.TensorProto.FLOAT:
            continue
        values = onnx.numpy_helper.to_array(weight)
        with np.errstate(over='ignore'):
            halves = values.astype(np.float16)
        if values.size >= MIN_HALVED and (halves.astype(np.float32) == values).all():
            name = weight.name
            weight.CopyFrom(onnx.numpy_helper.from_array(halves, f'{name}/half'))
            casts.append(onnx.helper.make_node('Cast', [weight.name], [name],
                                               to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, str(path))


class Runtime:
    """An exported file, run on the CPU by as many threads as torch has.

    Args:
        path: of a file that ends in .onnx, or else in .pt2 or .pt, which torch runs.
        engine: of ONNX, 'onnxruntime' or 'openvino'.

    Raises:
        InputError: if the engine is not installed.
    """

    def __init__(self, path: Path, engine: str = 'onnxruntime') -> None:
        if path.suffix != FORMATS['onnx']:
            self._run = (torch.export.load(path).module() if path.suffix == FORMATS['pt2'] else
                         torch.jit.load(str(path)))
            return
        try:
            module = importlib.import_module(engine)
        except ImportError as error:
            raise InputError(f'{engine} is not installed, which runs the file: pip install '
                             f'{engine}, or leave it out.') from error
        threads = torch.get_num_threads()
        if engine == 'openvino':
            model = module.Core().compile_model(str(path), 'CPU', dict(
                INFERENCE_NUM_THREADS=threads, INFERENCE_PRECISION_HINT='f32'))
            self._run = lambda image: [torch.from_numpy(value.copy()) for value in model(
                [image.numpy()]).to_tuple()]
            return
        options = module.SessionOptions()
        options.intra_op_num_threads = threads
        session = module.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
        self._run = lambda image: [torch.from_numpy(value) for value in session.run(
            None, {'image': image.numpy()})]

    @torch.no_grad()
    def __call__(self, image: Tensor) -> List[Tensor]:
        """What the exported module answers, of an image (1, 3, H, W).

        Raises:
            InputError: if the file is a program that takes no image of that size.
        """
        try:
            return list(self._run(image))
        except AssertionError as error:  # so torch answers a size that it guards against
            raise InputError(f'The file takes no image of {image.shape[3]}x{image.shape[2]}: '
                             f'{error}. Give a larger first image.') from error


def compare(detector: TensorDetector, runtime: Runtime,
            images: Sequence[Tensor]) -> List[dict]:
    """How far a file is from its detector on each image: detections, px, score, mask.

    Raises:
        InputError: if they differ by more than a runtime's rounding.
    """
    found = []
    for image in images:
        with torch.no_grad():
            expected = detector(image)
        got = runtime(image)
        size = f'{image.shape[3]}x{image.shape[2]}'
        boxes, labels = (torch.cdist(a.double(), b.double(), p=float('inf')) for a, b in (
            (expected[0], got[0]), (expected[2][:, None], got[2][:, None])))
        # By place and label: scores that differ by a rounding may change places.
        same = (boxes + labels.sign() * 1e6).argmin(1) if len(got[0]) else got[2]
        if len(got[0]) != len(expected[0]):
            raise InputError(f'The file detects {len(got[0])} objects in an image of {size}, and '
                             f'not the {len(expected[0])} of the detector: it was not exported '
                             'rightly.')
        if len(same.unique()) != len(same):
            raise InputError(f'The file differs from the detector in an image of {size}, where it '
                             'detects as many objects, but others: it was not exported rightly.')
        errors = {name: (a[same].double() - b.double()).abs().max().item() if len(a) else 0.0
                  for name, a, b in zip(detector.output_names, got, expected)}
        # NaNs are not within any tolerance.
        if not (errors['boxes'] <= BOX_TOLERANCE and errors['labels'] == 0 and all(
                errors.get(name, 0) <= SCORE_TOLERANCE for name in ('scores', 'masks'))):
            raise InputError(f'The file differs from the detector in an image of {size}, by '
                             f'{errors["boxes"]:.2g} px and {errors["scores"]:.2g} in score: it '
                             'was not exported rightly.')
        found.append(dict(size=size, detections=len(got[0]), **errors))
    return found


def preprocessing(config: Config, model: BaseDetector, normalize: bool,
                  classes: Sequence[str]) -> dict:
    """What is to be done to an image before the file, and what comes out, for a JSON file.

    How it is resized is None where the config has no test set.
    """
    pipeline = _test_pipeline(config)
    preprocessor = model.data_preprocessor
    done = dict(
        resize=pipeline and [
            {key: _kind(step) if key == 'type' else value for key, value in step.items()
             if key != '_scope_'}
            for step in pipeline if _kind(step) in ('Resize', 'FixScaleResize', 'Pad')],
        channels='BGR' if normalize or not preprocessor._channel_conversion else 'RGB',
        layout='(1, 3, height, width), float32', values='0 to 255')
    if preprocessor._enable_normalize and not normalize:
        done.update(values='(value - mean) / std, of values from 0 to 255',
                    mean=preprocessor.mean.flatten().tolist(),
                    std=preprocessor.std.flatten().tolist())
    return dict(
        input=done, classes=list(classes),
        outputs=dict(
            boxes='(N, 4): x1, y1, x2, y2 in pixels of the resized image', scores='(N,), falling',
            labels='(N,): indices of classes',
            masks='(N, h, w), where there is a mask head: probabilities on a grid over each box'),
        **({} if mask_threshold(model) is None else dict(mask_threshold=mask_threshold(model))))


def mask_threshold(model: BaseDetector) -> Optional[float]:
    """Probability from which a pixel belongs to a mask; None where there is no mask head."""
    head = getattr(model, 'roi_head', None)
    return head.test_cfg.mask_thr_binary if head is not None and head.with_mask else None


def _test_pipeline(config: Config) -> Optional[List[dict]]:
    """Steps of the test set's pipeline, or of the first of several; None if there is none."""
    if not config.get('test_dataloader'):
        return None
    return [step.to_dict() for step in get_test_pipeline_cfg(config)]


def _kind(step: dict) -> str:
    """The name of a step's type, which pure Python configs give as a class."""
    kind = step['type']
    return (kind if isinstance(kind, str) else kind.__name__).rpartition('.')[2]


def write_preprocessing(described: dict, path: Path, force: bool) -> None:
    """Write :func:`preprocessing` to a file; InputError if it exists and ``force`` is not set."""
    with writing(path, force) as temporary:
        temporary.write_text(json.dumps(described, indent=2) + '\n')


def example_images(config: Config, model: BaseDetector, normalize: bool,
                   files: Sequence[str]) -> List[Tensor]:
    """Images of two sizes as an exported file takes them.

    Args:
        config: whose test pipeline resizes them.
        model: whose preprocessor normalises them.
        normalize: whether the file does that itself.
        files: images; the first of the test set if empty, and noise if there is none, or it is
            not here, of which the log warns.

    Raises:
        InputError: if there are files and no test pipeline.
    """
    if files:
        steps = _test_pipeline(config)
        if steps is None:
            raise InputError('The config has no test_dataloader, whose pipeline prepares images: '
                             'give one, or no image.')
        pipeline = Compose([step for step in steps if _kind(step) != 'LoadAnnotations'])
        inputs = [pipeline(dict(img_path=str(file), img_id=0))['inputs'] for file in files]
    else:
        try:
            inputs = [DATASETS.build(config.test_dataloader.dataset)[0]['inputs']]
        except (AttributeError, OSError) as error:
            why = error if isinstance(error, OSError) else 'the config has no test_dataloader'
            print_log(f'No image of a test set is here ({why}): noise takes its place, in which a '
                      'detector may find nothing. Give --image.', logger='current',
                      level=logging.WARNING)
            inputs = [torch.randint(0, 256, (3, 224, 320))]
    preprocessor = copy.deepcopy(model.data_preprocessor)
    preprocessor.pad_size_divisor = 1
    images = [image[None].float() if normalize else preprocessor(
        dict(inputs=[image], data_samples=None))['inputs'] for image in inputs]
    smaller = F.interpolate(images[0], scale_factor=(0.9, 0.75), mode='bilinear')
    return [*images, smaller]
