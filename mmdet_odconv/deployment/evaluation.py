"""COCO mAP through an exported file, by MMDetection's own test loop."""
import copy
import time
from typing import Callable, Dict, List, Optional, Tuple

import torch
from mmdet.models import BaseDetector, FCNMaskHead
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.model import BaseDataPreprocessor
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import Tensor, nn

from .preprocessing import Preprocessing, as_taken, read_image


class Timed(nn.Module):
    """Measures a detector, by calls of its ``test_step``."""

    def __init__(self, model: BaseDetector) -> None:
        super().__init__()
        self.model = model
        self.seconds, self.images = 0.0, 0

    def test_step(self, data: dict) -> List[DetDataSample]:
        start = time.perf_counter()
        samples = self.model.test_step(data)
        self.seconds += time.perf_counter() - start
        self.images += len(samples)
        return samples


class ExportedDetector(nn.Module):
    """An exported file where MMDetection expects a detector.

    Args:
        runtime: the file (a :class:`~.export.Runtime`), or another that answers as it does.
        data_preprocessor: of the detector; what it does to an image, but for padding, is done.
        normalize: whether the file does that itself.
        resize: whether the file resizes, too; then images are read again, as they are.
        batched: whether the file takes several images of one size, and names them.
        mask_threshold: probability from which a pixel belongs to a mask; the config's
            ``test_cfg.rcnn.mask_thr_binary``, which export's JSON file repeats.
    """

    def __init__(self, runtime: Callable, data_preprocessor: BaseDataPreprocessor,
                 normalize: bool = False, mask_threshold: Optional[float] = None,
                 resize: bool = False, batched: bool = False) -> None:
        super().__init__()
        self.runtime, self.resize, self.batched = runtime, resize, batched
        self.preprocessing = Preprocessing(data_preprocessor, normalize=normalize or resize)
        self.mask_cfg = Config(dict(
            mask_thr_binary=0.5 if mask_threshold is None else mask_threshold))
        self.paster = FCNMaskHead(num_convs=0, class_agnostic=True)

    def test_step(self, data: dict) -> List[DetDataSample]:
        """Detect in each image of a batch; predictions in pixels of the original images."""
        samples = data['data_samples']
        images = [as_taken(self.preprocessing, read_image(sample.img_path) if self.resize else
                           image, [sample]) for image, sample in zip(data['inputs'], samples)]
        together: Dict[tuple, List[int]] = {}
        for i, image in enumerate(images):
            together.setdefault(tuple(image.shape) if self.batched else (i, ), []).append(i)
        for indices in together.values():
            outputs = self.runtime(torch.cat([images[i] for i in indices]))
            if self.batched:
                of_image = outputs.pop(3)
            for place, i in enumerate(indices):
                self._fill(samples[i], [output[of_image == place] for output in outputs]
                           if self.batched else outputs)
        return samples

    def _fill(self, sample: DetDataSample, outputs: List[Tensor]) -> None:
        boxes, scores, labels, *masks = outputs
        found = InstanceData(bboxes=boxes, scores=scores, labels=labels)
        metainfo = dict(sample.metainfo)
        if self.resize:
            metainfo.update(scale_factor=(1.0, 1.0))
        if masks:  # which brings the boxes to the original image too
            found, = self.paster.predict_by_feat(
                [masks[0][:, None]], [found], [metainfo], self.mask_cfg, rescale=True,
                activate_map=True)
        if not masks or not len(boxes):
            found.bboxes = boxes / boxes.new_tensor(metainfo['scale_factor']).repeat(2)
        sample.pred_instances = found


def evaluate(config: Config, models: Dict[str, nn.Module],
             work_dir: str) -> Dict[str, Tuple[dict, float]]:
    """Metrics and milliseconds per image of each model on the config's test set."""
    config = copy.deepcopy(config)
    config.work_dir, config.load_from = work_dir, None
    # MMEngine keeps a visualizer by its name, and with it the first directory that it wrote to.
    config.visualizer = dict(type='Visualizer', vis_backends=[], name=work_dir)
    runner = Runner.from_cfg(config)
    results = {}
    for name, model in models.items():
        runner.model = Timed(model)
        with torch.no_grad():
            metrics = runner.test()
        results[name] = metrics, 1000 * runner.model.seconds / max(1, runner.model.images)
    return results
