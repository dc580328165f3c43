"""Detections on one's own pictures and videos, and the plugin's configs by name."""
import json
from pathlib import Path
from typing import Dict, Optional, Tuple

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from rich.progress import track

from ..checkpoints import read_weights
from ..checkpoints.files import refuse_existing, writing
from ..engine.launch import find_config
from ..errors import InputError
from .export import classes_of, load_weights
from .preprocessing import first_test_set

CODECS = {'.mp4': 'mp4v', '.avi': 'MJPG'}  # of videos, by how their files end


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
           batch_size: int = 1, device: Optional[str] = None, force: bool = False) -> int:
    """Write pictures with detections to ``out_dir``/vis, and predictions as JSON to /preds.

    Args:
        inputs: an image, a folder of images, or a video, of which a video with detections is
            written, and a list of predictions, one a frame.
        config: a path, or the name of one of the plugin's.
        weights: checkpoint of the config's detector.
        out_dir: folder to write to.
        score: from which a detection is drawn; the JSON holds all.
        batch_size: images at a time; of a video, one.
        device: such as 'cuda:0'; a GPU if there is one, where not given.
        force: replace files that exist.

    Returns:
        The number of images or frames.

    Raises:
        InputError: if there is no image, or a file of that kind cannot be read; if the weights are
            not those of the config's detector, or the device is not here; if a file would be
            written over, or two images' predictions be one file.
    """
    from mmdet.apis.det_inferencer import IMG_EXTENSIONS, DetInferencer  # slow to import
    if not Path(inputs).exists():
        raise InputError(f'{inputs} does not exist: give an image, a folder of images or a video.')
    kind = Path(inputs).suffix.lower()
    if Path(inputs).is_file() and kind not in (*IMG_EXTENSIONS, *CODECS):
        raise InputError(f'{inputs} is neither an image nor a video in MP4 or AVI: convert it.')
    if Path(out_dir).is_file():
        raise InputError(f'{out_dir} is a file: give a folder to write to.')
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f'The device {device} is not here ({str(error).splitlines()[0]}): give '
                         'another, such as cpu, or none.') from error
    if batch_size < 1:
        raise InputError(f'batch_size is {batch_size}, where at least one image at a time was '
                         'expected.')
    cfg = Config.fromfile(config_path(config))
    # Which is all that the inferencer reads of it.
    cfg.test_dataloader.dataset = first_test_set(cfg)
    read_weights(weights)  # which refuses in one sentence what MMEngine fails on or only logs
    source = Path(inputs) if Path(inputs).is_dir() else Path(inputs).parent
    if source.resolve() == (Path(out_dir) / 'vis').resolve():
        raise InputError(f'{source} is where pictures with detections are written: give another '
                         '--out, since they would take the place of your own.')
    files = [Path(inputs)] if Path(inputs).is_file() else sorted(
        path for path in Path(inputs).iterdir() if path.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        raise InputError(f'{inputs} holds no image: give an image, a folder of images or a video.')
    first: Dict[str, Path] = {}
    for file in files:
        other = first.setdefault(file.stem, file)
        if other != file:
            raise InputError(f'Predictions of {file} and {other} would be one file, '
                             f'preds/{file.stem}.json: rename one of them.')
        for written in _outputs(file, Path(out_dir)):
            refuse_existing(written, force)
    inferencer = (_of_frames(DetInferencer) if kind in CODECS else DetInferencer)(
        cfg, weights, device)
    # Of what does not fit MMEngine only logs; and without classes in a file it takes COCO's.
    checkpoint = load_weights(inferencer.model, weights)
    meta = inferencer.model.dataset_meta
    meta['classes'] = classes_of(inferencer.cfg, checkpoint)
    if not isinstance(meta.get('palette'), str) and (
            len(meta.get('palette') or ()) < len(meta['classes'])):
        meta['palette'] = 'random'  # where COCO's 80 colours, inherited, do not reach
    if kind in CODECS:
        return _detect_in_video(inferencer, Path(inputs), Path(out_dir), score, force)
    inferencer.show_progress = False  # of each batch
    # Of what it is given at once, it keeps every picture.
    for start in track(range(0, len(files), batch_size), 'Inference'):
        inferencer([str(file) for file in files[start:start + batch_size]], batch_size=batch_size,
                   out_dir=str(out_dir), pred_score_thr=score, no_save_pred=False)
    return len(files)


def _of_frames(inferencer: type) -> type:
    """An inferencer whose pictures are arrays, which it detects in as BGR and draws on as RGB."""

    class OfFrames(inferencer):  # type: ignore[misc, valid-type]

        def visualize(self, inputs, *args, **kwargs):
            drawn = super().visualize([frame[..., ::-1] for frame in inputs], *args, **kwargs)
            return [np.ascontiguousarray(frame[..., ::-1]) for frame in drawn]

    return OfFrames


def _outputs(path: Path, out_dir: Path) -> Tuple[Path, Path]:
    """Files that are written of an image or video: with detections, and the predictions."""
    return out_dir / 'vis' / path.name, out_dir / 'preds' / f'{path.stem}.json'


def _detect_in_video(inferencer, path: Path, out_dir: Path, score: float, force: bool) -> int:
    """As :func:`detect`."""
    video = mmcv.VideoReader(str(path))
    if video.frame_cnt < 1:
        raise InputError(f'{path} could not be read as a video: give one in MP4 or AVI.')
    drawn, written = _outputs(path, out_dir)
    for file in (drawn, written):
        file.parent.mkdir(parents=True, exist_ok=True)
    inferencer.show_progress = False  # of each frame
    predictions = []
    with writing(drawn, force) as temporary:
        writer = cv2.VideoWriter(str(temporary),
                                 cv2.VideoWriter.fourcc(*CODECS[path.suffix.lower()]), video.fps,
                                 video.resolution)
        if not writer.isOpened():
            raise InputError(f'OpenCV here cannot write {path.suffix} videos: convert {path} to '
                             'AVI, or give its frames as a folder of images.')
        for frame in track(video, 'Inference'):
            found = inferencer(frame, return_vis=True, pred_score_thr=score)
            predictions += found['predictions']
            writer.write(found['visualization'][0])
        writer.release()
    with writing(written, force) as temporary:
        temporary.write_text(json.dumps(predictions))
    return len(predictions)
