"""A detector written to a file that runs without MMDetection, and compared with the detector."""
import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from mmcv.ops import DeformConv2d, ModulatedDeformConv2d, MultiScaleDeformableAttention
from mmdet.models import BaseDetector
from mmengine.config import Config
from mmengine.registry import DATASETS
from torch import Tensor, nn

from ..checkpoints import read_weights
from ..checkpoints.files import halved, writing
from ..checkpoints.swapping import build_model
from ..errors import InputError
from ..layers import FDConv2d
from .detector import TensorDetector
from .nchwc import block_channels
from .operators import NEWEST_OPSET, OPSET, linspace_of_one_step
from .preprocessing import first_test_set

FORMATS = {'onnx': '.onnx', 'pt2': '.pt2', 'torchscript': '.pt'}  # and how their files end
MIN_HALVED = 64  # elements, from which a cast is worth its node
# What a runtime's rounding may change of a box (px) and of a score or a mask's pixel.
BOX_TOLERANCE, SCORE_TOLERANCE = 0.1, 1e-3
# Scores so near are equal but for rounding; and of how many of the last it may decide.
TIED, MOST_TIED = 1e-5, 3


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
        data_set = DATASETS.build(dict(first_test_set(config), lazy_init=True))
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
                    force: bool = False, half: bool = False,
                    nchwc: bool = False) -> List[Dict[str, float]]:
    """Write a detector to ``path``, whole and right or not at all; for images of any size.

    Args:
        detector: what is written.
        path: file to write.
        images: (1, 3, H, W) each: the graph is drawn on the first, and checked on all; of a
            ``batched`` detector it is drawn on two of the first, and checked on one and on three.
        format: 'onnx'; or 'pt2', a program of torch.export, or 'torchscript', which both need
            ``import mmdet_odconv`` where they are loaded. A program fixes which levels of the
            pyramid are one cell wide or high, as they are for the first image.
        opset: ONNX's version of operators, 16 to 20.
        check: run the file and :func:`compare` it with the detector.
        force: replace a file that exists.
        half: store weights in half precision, which a runtime makes single again as it loads them;
            those of the detector are rounded so, in place. Fuse it first: an exporter folds norms
            into rounded weights, which then are no halves.
        nchwc: keep maps in onnxruntime's blocked layout, for it alone and x86-64: see
            :mod:`.nchwc`.

    Returns:
        What :func:`compare` found.

    Raises:
        InputError: if the file cannot be written, differs from the detector, or has a name that
            does not end as its format's do, if ``opset`` is out of range, if what writes or checks
            it is not installed, or if the detector has a layer, batches or a resizing that the
            format does not take.
    """
    if not OPSET <= opset <= NEWEST_OPSET:
        raise InputError(f'opset is {opset}, where {OPSET}, the first whose RoiAlign knows where '
                         f'pixels are, to {NEWEST_OPSET} was expected.')
    for name, given in ('half', half), ('nchwc', nchwc):
        if given and format != 'onnx':
            raise InputError(f'{name} is for onnx, and the format is {format}: leave it out.')
    if nchwc and detector.batched:
        raise InputError('nchwc is for one image, whose kernels a Conv takes, and not for '
                         'batches: leave one of them out.')
    if path.suffix != FORMATS[format]:
        raise InputError(f'{path} is to be of {format}, whose files end in {FORMATS[format]} here: '
                         'give such a name.')
    check_exportable(detector.model, format)
    if format == 'pt2' and (detector.batched or detector.preprocessing.resize):
        raise InputError('A program of torch.export takes one image that is resized already: '
                         'leave --batch dynamic and --resize out, or use onnx.')
    if format == 'onnx' and (check or nchwc) and (
            importlib.util.find_spec('onnxruntime') is None):
        raise InputError("onnxruntime is not installed, which checks the file: pip install "
                         "'.[deploy]' in a checkout, or give --no-check, and no --nchwc.")
    if half:
        detector.load_state_dict(halved(detector.state_dict()))
    with writing(path, force) as temporary, torch.no_grad(), warnings.catch_warnings():
        # Of branches on shapes, which are the same for every image.
        warnings.simplefilter('ignore')
        image = images[0]
        if detector.batched:
            image = image.repeat(2, 1, 1, 1)
            images = [*images, torch.cat([images[0], images[0].flip(3), images[0]])]
        if format == 'torchscript':
            torch.jit.trace(detector, image, check_trace=False).save(str(temporary))
        elif format == 'pt2':
            torch.export.save(as_program(detector, image), temporary)
        else:
            write_onnx(detector, image, temporary, detector.output_names, {0: 'detections'}, opset,
                       detector.batched)
            if nchwc:
                block_channels(temporary)
            if half:
                store_halves(temporary)
        if not check:
            return []
        try:
            return compare(detector, Runtime(temporary), images)
        except Exception as error:
            if not nchwc or isinstance(error, InputError):
                raise
            raise InputError('onnxruntime does not run the graph that keeps maps blocked '
                             f'({str(error).splitlines()[0]}): leave nchwc out.') from error


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
               output_axes: Dict[int, str], opset: int = 17, batched: bool = False) -> None:
    """Write a function of images, (1 or B, 3, H, W) of any size; its outputs' names and axes."""
    axes = {'image': {**({0: 'images'} if batched else {}), 2: 'height', 3: 'width'},
            **dict.fromkeys(names, output_axes)}
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
        """What the exported module answers, of images as it takes them.

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
    """How far a file is from its detector on each image or batch: detections, px, score, mask.

    Where an image has as many detections as it may, a runtime's rounding decides which of those
    of equal score are the last; up to :data:`MOST_TIED` such are not compared, and ``compared`` is
    how many are.

    Raises:
        InputError: if they differ by more than a runtime's rounding.
    """
    found = []
    for image in images:
        with torch.no_grad():
            expected = detector(image)
        got = runtime(image)
        size = f'{image.shape[3]}x{image.shape[2]}'
        # By place, label and image: scores that differ by a rounding may change places.
        apart = torch.cdist(expected[0].double(), got[0].double(), p=float('inf'))
        for a, b in list(zip(expected, got))[2:3 + detector.batched]:
            apart = apart + (a[:, None] != b) * 1e6
        number = len(got[0])
        if number != len(expected[0]):
            raise InputError(f'The file detects {number} objects in an image of {size}, and '
                             f'not the {len(expected[0])} of the detector: it was not exported '
                             'rightly.')
        if number:
            alone = [apart.amin(i) > BOX_TOLERANCE for i in (1, 0)]
            last = [_last_of_many(detector, outputs) for outputs in (expected, got)]
            if alone[0].sum() == alone[1].sum() <= MOST_TIED and all(
                    (of | ~one).all() for of, one in zip(last, alone)):
                expected, got = ([output[~one] for output in outputs]
                                 for outputs, one in zip((expected, got), alone))
                apart = apart[~alone[0]][:, ~alone[1]]
        same = apart.argmin(1) if len(got[0]) else got[2]
        if len(same.unique()) != len(same):
            raise InputError(f'The file differs from the detector in an image of {size}, where it '
                             'detects as many objects, but others: it was not exported rightly.')
        errors = {name: (a[same].double() - b.double()).abs().max().item() if len(a) else 0.0
                  for name, a, b in zip(detector.output_names, got, expected)}
        # NaNs are not within any tolerance.
        if not (errors['boxes'] <= BOX_TOLERANCE and errors['labels'] == 0 and all(
                errors.get(name, 0) <= SCORE_TOLERANCE for name in ('scores', 'masks', 'images'))):
            raise InputError(f'The file differs from the detector in an image of {size}, by '
                             f'{errors["boxes"]:.2g} px and {errors["scores"]:.2g} in score: it '
                             'was not exported rightly.')
        found.append(dict(size=size, detections=number, compared=len(same), **errors))
    return found


def _last_of_many(detector: TensorDetector, outputs: Sequence[Tensor]) -> Tensor:
    """Which detections, (N,), are as likely as the last of an image that has all that it may."""
    scores, labels = outputs[1:3]
    of_image = outputs[3] if detector.batched else torch.zeros_like(labels)
    found = torch.zeros_like(labels, dtype=torch.bool)
    for image in of_image.unique():
        own = of_image == image
        if own.sum() == detector.most:
            found |= own & (scores <= scores[own].min() + TIED)
    return found


def mask_threshold(model: BaseDetector) -> Optional[float]:
    """Probability from which a pixel belongs to a mask; None where there is no mask head."""
    head = getattr(model, 'roi_head', None)
    return head.test_cfg.mask_thr_binary if head is not None and head.with_mask else None
