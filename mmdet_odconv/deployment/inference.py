"""Detections on one's own pictures, and the plugin's configs by name."""
from pathlib import Path
from typing import Optional

from mmengine.config.utils import MODULE2PACKAGE

from ..checkpoints import read_weights
from ..engine.launch import find_config
from ..errors import InputError


def config_path(name: str) -> str:
    """Path of a config, given as one or as the name of one of the plugin's, with or without .py.

    For what takes a path, such as ``DetInferencer(config_path(name), weights)``.

    Raises:
        InputError: with the nearest names, if there is none.
    """
    if Path(name).is_file():
        return str(name)
    return str(find_config(name if name.endswith('.py') else f'{name}.py'))


def allow_base_configs() -> None:
    """Let ``_base_ = 'mmdet_odconv::odconv/NAME.py'`` name a config of the plugin.

    MMEngine knows the packages of OpenMMLab alone, by a table. What such a config names it looks up
    in the scope that :mod:`mmdet_odconv.registry` makes.
    """
    MODULE2PACKAGE['mmdet_odconv'] = 'mmdet_odconv'


def detect(inputs: str, config: str, weights: str, out_dir: str, score: float = 0.3,
           batch_size: int = 1, device: Optional[str] = None) -> int:
    """Write pictures with detections to ``out_dir``/vis, and predictions as JSON to /preds.

    Args:
        inputs: an image, or a folder of images.
        config: a path, or the name of one of the plugin's.
        weights: checkpoint of the config's detector.
        out_dir: folder to write to.
        score: from which a detection is drawn; the JSON holds all.
        batch_size: images at a time.
        device: such as 'cuda:0'; a GPU if there is one, where not given.

    Returns:
        The number of images.

    Raises:
        InputError: if there is no image, or a file of that kind cannot be read.
    """
    from mmdet.apis import DetInferencer  # slow to import
    if not Path(inputs).exists():
        raise InputError(f'{inputs} does not exist: give an image, or a folder of images.')
    path = config_path(config)
    read_weights(weights)  # which refuses in one sentence what MMEngine fails on or only logs
    inferencer = DetInferencer(path, weights, device)
    files = inferencer._inputs_to_list(str(inputs))
    if not files:
        raise InputError(f'{inputs} holds no image: give an image, or a folder of images.')
    inferencer(files, batch_size=batch_size, out_dir=str(out_dir), pred_score_thr=score,
               no_save_pred=False)
    return len(files)
