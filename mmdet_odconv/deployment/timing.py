"""A dynamic network and its static counterpart, side by side in every way to run them."""
import copy
import importlib.util
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from mmdet.models import BaseDetector
from mmengine.config import Config
from torch import Tensor, nn

from ..checkpoints.inflation import load_static
from ..checkpoints.swapping import build_model, make_static
from ..errors import InputError
from .detector import TensorDetector
from .evaluation import ExportedDetector, evaluate
from .export import Runtime, check_exportable, load_detector, write_onnx
from .fusion import fuse
from .nchwc import block_channels

FORMATS = ('eager', 'compile', 'onnxruntime', 'onnxruntime-nchwc', 'openvino')
NCHWC = '-nchwc'
MACHINES_OWN = ('compile', 'onnxruntime-nchwc')  # what not every machine can run
TOLERANCE = 1e-3  # of a map, relative to its largest value


def counterparts(config: Config, part: str,
                 checkpoints: Optional[Mapping[str, str]] = None) -> Dict[str, nn.Module]:
    """A config's backbone or detector with static layers, 'static', and as it is, 'dynamic'.

    Both are fused. Without checkpoints the weights are random, those of the dynamic one inflated
    from the static ones, so that both find the same.

    Args:
        config: of a detector with dynamic layers.
        part: 'backbone' or 'detector'.
        checkpoints: by name, of the detectors whose weights are to be read.
    """
    checkpoints = checkpoints or {}
    config = copy.deepcopy(config)
    config.model.backbone.init_cfg = None
    if 'dynamic' in checkpoints:
        dynamic, _ = load_detector(config, checkpoints['dynamic'])
    else:
        dynamic = build_model(config)
    make_static(config.model)
    if 'static' in checkpoints:
        static, _ = load_detector(config, checkpoints['static'])
    else:
        static = build_model(config)
        for module in static.modules():
            if isinstance(module, nn.Conv2d):  # so that maps neither vanish nor overflow
                nn.init.kaiming_normal_(module.weight, nonlinearity='relu')
    if 'dynamic' not in checkpoints:
        load_static(dynamic, static.state_dict())
    models: Dict[str, BaseDetector] = dict(static=fuse(static.eval()), dynamic=fuse(dynamic.eval()))
    return {name: model.backbone if part == 'backbone' else TensorDetector(model)
            for name, model in models.items()}


def time_formats(models: Dict[str, nn.Module], image: Tensor, formats: Sequence[str] = FORMATS,
                 rounds: int = 10, score: Optional[Callable] = None) -> List[dict]:
    """Run each model in each format, in turn, and compare what it answers with torch's own.

    Args:
        models: functions of one image, in evaluation mode.
        image: (1, 3, H, W).
        formats: of :data:`FORMATS`.
        rounds: how often each is run.
        score: what is run is given to it at last, for the row's mAP.

    Returns:
        A row for each format and model: format, model, ms (median over rounds), MB (of weights,
        or of the file), error (largest of any output, relative to the output's largest value; None
        where nothing was detected, and so compared) and what ``score`` says. Formats whose runtime
        is not installed have none; of a format that does not take the model, a row says only why
        it was ``refused``.

    Raises:
        InputError: if a format's runtime answers something else.
    """
    formats = [kind for kind in formats if is_installed(kind)]
    rows: List[dict] = []
    refused: List[dict] = []
    runs: List[Callable] = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name, model in models.items():
            expected = model(image)
            path = Path(folder) / f'{name}.onnx'
            for kind in formats:
                try:
                    run, size = _prepared(kind, model, image, path)
                    found = run(image)
                except Exception as reason:
                    # A compiler may be missing, and onnxruntime's blocked layout on a CPU.
                    if not isinstance(reason, InputError) and kind not in MACHINES_OWN:
                        raise
                    refused.append(dict(format=kind, model=name,
                                        refused=str(reason).strip().splitlines()[0]))
                    continue
                error = torch.tensor([
                    _error(a, b) for a, b in zip(found, expected)]).max().item()
                if not error <= TOLERANCE:  # nor NaN, which a tensor's maximum keeps
                    raise InputError(f'{name} in {kind} differs from torch by {error:.2g} of its '
                                     'largest value.')
                rows.append(dict(format=kind, model=name, ms=[], MB=size / 1e6,
                                 error=error if expected[0].numel() else None))
                runs.append(run)
        for _ in range(rounds):
            for row, run in zip(rows, runs):
                start = time.perf_counter()
                run(image)
                row['ms'].append(1000 * (time.perf_counter() - start))
    for row in rows:
        row['ms'] = statistics.median(row['ms'])
    if score is not None:
        for row, run in zip(rows, runs):
            row['mAP'] = score(run)
    return rows + refused


def is_installed(kind: str) -> bool:
    """Whether what runs a format is here."""
    return kind in ('eager', 'compile') or (
        importlib.util.find_spec(kind.removesuffix(NCHWC)) is not None)


def check_evaluator(config: Config) -> None:
    """InputError if the config's test set is not evaluated by COCO's box mAP."""
    evaluators = config.get('test_evaluator') or []
    evaluators = evaluators if isinstance(evaluators, list) else [evaluators]
    if not any(one['type'] in ('CocoMetric', 'mmdet.CocoMetric') and 'bbox' in one.get(
            'metric', 'bbox') and not one.get('prefix') for one in evaluators):
        raise InputError("The config's test_evaluator is not one of COCO's box mAP, which the "
                         "table has: expected dict(type='CocoMetric', metric='bbox', ...).")


def mean_average_precision(config: Config, model: TensorDetector, run: Callable) -> float:
    """Box mAP, by the config's evaluator on its test set, of what runs a detector of its."""
    detector = ExportedDetector(run, model.model.data_preprocessor)
    with tempfile.TemporaryDirectory() as work_dir:
        (metrics, _), = evaluate(config, {'': detector}, work_dir).values()
    return metrics.get('coco/bbox_mAP', 0.0)  # of no detections MMDetection says nothing


def _prepared(kind: str, model: nn.Module, image: Tensor, path: Path) -> Tuple[Callable, int]:
    """What runs the model in a format, and the bytes of its weights or file."""
    if kind in ('eager', 'compile'):
        size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        return (model if kind == 'eager' else torch.compile(model)), size
    if not path.exists():
        check_exportable(model, 'onnx')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            names = getattr(model, 'output_names', None)
            axes = {0: 'detections'} if names else {2: 'rows', 3: 'columns'}
            names = names or [f'map{i}' for i in range(len(model(image)))]
            write_onnx(model, image, path, names, axes)
    engine = kind.removesuffix(NCHWC)
    if engine != kind:
        plain, path = path, path.with_stem(f'{path.stem}{NCHWC}')
        shutil.copyfile(plain, path)
        block_channels(path)
    return Runtime(path, engine), path.stat().st_size


def _error(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float('inf')
    if not expected.numel():
        return 0.0
    difference = (found.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp(min=1e-12)).item()
