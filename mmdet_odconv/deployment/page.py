"""One HTML file, without any other, of a detector's attentions, detections and worst mistakes."""
import base64
import html
import io
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import cv2
import mmcv
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from .attentions import Image, by_class, mistakes, most_and_least_alike, spread

# BGR, of colours that a colour-blind reader tells apart (Okabe and Ito)
BLUE, ORANGE, PURPLE = (233, 180, 86), (0, 159, 230), (167, 121, 204)
WIDTH = 260  # px of a picture
MOST_NAMED = 10  # kernels that colours tell apart
STYLE = """body{font:15px/1.45 sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
h1,h2{font-weight:600}figure{display:inline-block;margin:4px;vertical-align:top;width:260px}
figcaption{font-size:12px;color:#555}img{max-width:100%}table{border-collapse:collapse}
td,th{padding:2px 10px;text-align:right;border-bottom:1px solid #ddd}td:first-child{text-align:left}
.dead{color:#b00020}"""


def write_page(path: Path, title: str, images: List[Image], attentions: Dict[str, Tensor],
               classes: Sequence[str], score: float = 0.5, most: int = 8,
               curves: Optional[Path] = None) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        title: its heading.
        images, attentions: what :func:`~.attentions.record_attentions` gave.
        classes: names by label.
        score: least score of a detection that is drawn and counted.
        most: pictures in each section.
        curves: a picture of the training's curves, such as report.py draws.
    """
    spreads = {name: spread(attention) for name, attention in attentions.items()}
    parts = [f'<h1>{html.escape(title)}</h1><p>{len(images)} images. Objects are blue, detections '
             f'from a score of {score:g} on orange, mistakes purple.</p>']
    parts += ['<h2>Attention over kernels</h2>',
              '<p>Entropy is 1 where all kernels of a bank are mixed alike and 0 where an image '
              'takes one; variation is 0 where all images get the same mixture. A kernel is dead '
              'if no image takes more of it than a twentieth of an equal share.</p>',
              _chart(_draw_spreads(spreads)),
              '<table><tr><th>layer<th>entropy<th>variation<th>shares of the kernels<th>dead</tr>']
    for name, found in spreads.items():
        shares = ' '.join(f'{share:.2f}' for share in found.shares.tolist())
        dead = ', '.join(map(str, found.dead)) or 'none'
        parts.append(f'<tr><td>{html.escape(name)}<td>{found.entropy:.3f}<td>{found.variation:.4f}'
                     f'<td>{shares}<td{" class=dead" if found.dead else ""}>{dead}</tr>')
    parts.append('</table>')
    varied = max(spreads, key=lambda name: spreads[name].variation)
    parts += [f'<h2>Kernels by class</h2><p>Of {html.escape(varied)}, the layer that varies most: '
              'mean share of each kernel in images that hold the class, less its mean in all.</p>',
              _chart(_draw_classes(attentions[varied], images, classes))]
    if len(images) > 1:
        for pair, how in zip(most_and_least_alike(attentions), ('most', 'least')):
            parts += [f'<h2>The two images that all layers treat {how} alike</h2>',
                      *(_picture(images[i], classes, score) for i in pair)]
    parts += ['<h2>Detections</h2>', *(_picture(image, classes, score) for image in images[:most])]
    for kind, worst in mistakes(images, list(classes), score).items():
        parts += [f'<h2>{kind.capitalize()}: {len(worst)}</h2>', *(
            _picture(images[one.image], classes, None, one) for one in worst[:most])]
    if curves is not None:
        parts += ['<h2>Training</h2>', _img(curves.read_bytes(), 'image/png')]
    path.write_text(f'<!doctype html><html lang="en"><meta charset="utf-8"><title>'
                    f'{html.escape(title)}</title><style>{STYLE}</style><body>'
                    + '\n'.join(parts) + '</body></html>\n', encoding='utf-8')


def _picture(image: Image, classes: Sequence[str], score: Optional[float], mistake=None) -> str:
    """Objects and detections on an image; of a mistake, that and the objects."""
    pixels = mmcv.imread(image.path)
    scale = WIDTH / pixels.shape[1]
    pixels = cv2.resize(pixels, None, fx=scale, fy=scale)

    def draw(box, colour, text=''):
        x1, y1, x2, y2 = (round(value * scale) for value in box.tolist())
        cv2.rectangle(pixels, (x1, y1), (x2, y2), colour, 2)
        if text:
            cv2.putText(pixels, text, (x1, y1 - 3 if y1 > 14 else y2 + 12),
                        cv2.FONT_HERSHEY_SIMPLEX, 0.4, colour, 1, cv2.LINE_AA)

    for box in image.boxes:
        draw(box, BLUE)
    if mistake is not None:
        draw(mistake.box, PURPLE, mistake.text)
    elif score is not None:
        for i in (image.found_scores >= score).nonzero()[:, 0]:
            draw(image.found_boxes[i], ORANGE,
                 f'{classes[int(image.found_labels[i])]} {image.found_scores[i]:.2f}')
    caption = Path(image.path).name + ('' if mistake is None else f': {mistake.text}')
    encoded = cv2.imencode('.jpg', pixels)[1].tobytes()
    return (f'<figure>{_img(encoded, "image/jpeg")}<figcaption>{html.escape(caption)}'
            '</figcaption></figure>')


def _img(content: bytes, kind: str) -> str:
    return f'<img alt="" src="data:{kind};base64,{base64.b64encode(content).decode()}">'


def _chart(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format='png', dpi=90)
    return f'<p>{_img(file.getvalue(), "image/png")}</p>'


def _draw_spreads(spreads) -> Figure:
    """Entropy of each layer, and beneath it the share of each kernel, over depth."""
    figure = Figure(figsize=(10, 4.5), layout='constrained')
    top, bottom = figure.subplots(2, 1, sharex=True)
    at = np.arange(len(spreads))
    top.bar(at, [found.entropy for found in spreads.values()], color='#0072b2')
    top.set(ylim=(0, 1.05), ylabel='entropy')
    base = np.zeros(len(spreads))
    kernels = max(len(found.shares) for found in spreads.values())
    colours = colormaps['tab10' if kernels <= MOST_NAMED else 'viridis']
    for kernel in range(kernels):
        height = np.array([found.shares[kernel].item() if kernel < len(found.shares) else 0
                           for found in spreads.values()])
        bottom.bar(at, height, bottom=base, label=f'kernel {kernel}', color=colours(
            kernel if kernels <= MOST_NAMED else kernel / (kernels - 1)))
        base += height
    bottom.set(ylim=(0, 1), ylabel='share', xlabel='dynamic layer, from the input')
    if kernels <= MOST_NAMED:
        figure.legend(*bottom.get_legend_handles_labels(), loc='outside right center',
                      frameon=False)
    return figure


def _draw_classes(attention: Tensor, images: List[Image], classes: Sequence[str]) -> Figure:
    """Share of each kernel by class, less the mean of all images."""
    shares = (by_class(attention, images, len(classes)) - attention.mean(0)).T.numpy()
    figure = Figure(figsize=(max(5, 0.5 * len(classes)), 2.6), layout='constrained')
    axis = figure.subplots()
    largest = np.nanmax(np.abs(shares)) if np.isfinite(shares).any() else 1
    drawn = axis.imshow(shares, cmap='RdBu', vmin=-largest, vmax=largest, aspect='auto')
    axis.set_xticks(range(len(classes)), classes, rotation=90 if len(classes) > 20 else 0)
    axis.set(ylabel='kernel', yticks=range(len(shares)))
    figure.colorbar(drawn)
    return figure
