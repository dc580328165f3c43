"""What a detector costs: parameters, multiply-adds and activation memory, part by part.

    python get_model_stats.py CONFIG [--shape 800 1333] [--out stats.json]

CONFIG is a path or the bare name of one of the plugin's. One image passes through backbone, neck
and dense heads, and as many random proposals as the test configuration allows through the RoI
heads. Convolutions and matrix products are counted by torch's own counter as the operations run,
so that a static model has the figures of any other counter. To a dynamic convolution come the
multiplications and additions that its published formulation (ODConv, eq. 3) does elementwise:

    mixing   (2 n - 1) elements of a kernel, for a bank of n > 1
    scaling  the input by the channel attention, the output by the filter attention, the kernel
             by the spatial attention

Other layers have their own, such as FDConv's Fourier transforms: see their elementwise_madds().
Products by which a layer makes its kernels, as KernelWarehouse's of cells, are mixing.

'activations' is the memory that a training step's forward pass keeps for its backward pass.
"""
import argparse
import collections
import contextlib
import json
import sys
from pathlib import Path

import torch
from benchmark import saved_bytes
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from mmdet_odconv import InputError, config_path
from mmdet_odconv.checkpoints.files import writing
from mmdet_odconv.engine.launch import errors_explained
from mmdet_odconv.layers import DynamicConv2d
from mmdet_odconv.ops import force_plan, set_machine
from mmdet_odconv.ops.machine import NOMINAL

KINDS = ('convolution', 'attention', 'mixing', 'scaling', 'other')


def detector_stats(config, shape, activations=True):
    """:func:`model_stats` of the detector of a config for one image of shape (H, W), px.

    Raises:
        InputError: if the config has no model.
    """
    if 'model' not in config:
        raise InputError('The config has no model: give the config of a detector.')
    init_default_scope(config.get('default_scope', 'mmdet'))
    model = revert_sync_batchnorm(MODELS.build(config.model))  # which trains on no CPU
    height, width = shape
    image = torch.zeros(1, 3, height, width)
    sample = DetDataSample(metainfo=dict(
        img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape,
        scale_factor=(1.0, 1.0)))
    return model_stats(model, lambda: detect(model, image, sample), activations)


def detect(model, image, sample):
    """Outputs of all parts, with a fixed number of proposals where there are RoI heads."""
    if not getattr(model, 'with_rpn', False):
        return model(image, [sample], mode='tensor')
    levels = model.extract_feat(image)
    outputs = [model.rpn_head(levels)]
    if model.with_roi_head:
        corners = torch.rand(model.test_cfg.rpn.max_per_img, 4) / 2
        corners[:, 2:] += 0.5
        boxes = corners * corners.new_tensor(image.shape[:1:-1] * 2)
        outputs.append(model.roi_head.forward(levels, [InstanceData(bboxes=boxes)], [sample]))
    return outputs


def model_stats(model, forward, activations=True):
    """Statistics of any model: what calling ``forward`` runs of it.

    Returns a dict with 'params' and 'madds', counts of the whole; 'activations', bytes, or None
    where not asked for; and 'parts', for each child of the model its 'params' and its multiply-adds
    of each of KINDS.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()  # a single image has no statistics of its pooled values
    saved = saved_bytes(model, forward) if activations else None
    model.eval()
    elementwise, handles = {}, []
    for name, layer in model.named_modules():
        if isinstance(layer, DynamicConv2d):
            counter = ElementwiseCounter(layer)
            elementwise[name] = counter
            handles += [layer.attention.register_forward_hook(counter.see_attentions),
                        layer.register_forward_hook(counter.see_convolution)]
    set_machine(NOMINAL)  # none whose convolutions go by matrix products, which others would count
    try:
        with torch.no_grad(), force_plan('published'), FlopCounterMode(display=False) as flops:
            Root(model, forward)()
    finally:
        set_machine(None)
    for handle in handles:
        handle.remove()
    counts = {name: {str(op): count // 2 for op, count in ops.items()}
              for name, ops in flops.get_flop_counts().items()}
    parts = {}
    for part, module in model.named_children():
        found = total(counts, f'Root.model.{part}')
        madds, products = dict.fromkeys(KINDS, 0), 0
        madds['convolution'] = found.get('aten.convolution', 0)
        for name, counter in elementwise.items():
            if name == part or name.startswith(f'{part}.'):
                madds['mixing'] += counter.mixing
                madds['scaling'] += counter.scaling
                attention = counts.get(f'Root.model.{name}.{counter.attention_name}', {})
                madds['attention'] += sum(attention.values())
                own = total(counts, f'Root.model.{name}')
                products += sum(own.values()) - own['aten.convolution'] - sum(attention.values())
        madds['mixing'] += products
        madds['other'] = (
            sum(found.values()) - madds['convolution'] - madds['attention'] - products)
        parts[part] = {'params': sum(p.numel() for p in module.parameters()), **madds}
    return {
        'params': sum(p.numel() for p in model.parameters()),
        'madds': (sum(counts.get('Global', {}).values())
                  + sum(counter.mixing + counter.scaling for counter in elementwise.values())),
        'activations': saved, 'parts': parts
    }


def total(counts, name):
    """Counts of a module by operation; where only its children were called, theirs."""
    if name in counts:
        return collections.Counter(counts[name])
    depth = name.count('.') + 2
    children = {'.'.join(other.split('.')[:depth])
                for other in counts if other.startswith(f'{name}.')}
    return sum((total(counts, child) for child in children), collections.Counter())


class Root(torch.nn.Module):
    """What torch's counter needs to name the modules that a bare function calls."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self):
        return self.function()


class ElementwiseCounter:
    """Multiply-adds that one dynamic convolution does elementwise."""

    mixing = scaling = 0

    def __init__(self, layer):
        self.attention_name = next(name for name, module in layer.named_children()
                                   if module is layer.attention)

    def see_attentions(self, attention, inputs, attentions):
        self.attentions = set(attentions)

    def see_convolution(self, layer, inputs, output):
        mixing, scaling = layer.elementwise_madds(inputs[0], output, self.attentions)
        self.mixing += mixing
        self.scaling += scaling


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('--shape', type=int, nargs=2, default=(800, 1333), metavar=('H', 'W'))
    parser.add_argument('--out', type=Path, help='JSON file to write')
    args = parser.parse_args()
    if min(args.shape) < 1:
        parser.error(f'--shape must be at least 1 1, got {args.shape[0]} {args.shape[1]}')
    with errors_explained():
        path = Path(config_path(args.config))
        with writing(args.out, True) if args.out else contextlib.nullcontext() as temporary:
            stats = detector_stats(Config.fromfile(path), tuple(args.shape))
            if temporary:
                temporary.write_text(json.dumps(stats, indent=1))
    table = Table(title=f'{path.stem}, one image of {args.shape[0]}x{args.shape[1]}')
    for column in ('part', 'params, M', 'MAdds, G', *KINDS):
        table.add_column(column, justify='left' if column == 'part' else 'right')
    for part, values in stats['parts'].items():
        if any(values.values()):
            kinds = [values[kind] for kind in KINDS]
            table.add_row(part, f'{values["params"] / 1e6:.2f}',
                          *(f'{count / 1e9:.2f}' for count in (sum(kinds), *kinds)))
    table.add_section()
    totals = [sum(values[kind] for values in stats['parts'].values()) for kind in KINDS]
    table.add_row('whole', f'{stats["params"] / 1e6:.2f}',
                  *(f'{count / 1e9:.2f}' for count in (stats['madds'], *totals)))
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table)
    console.print(f'activations kept for backward: {stats["activations"] / 1e6:.0f} MB')


if __name__ == '__main__':
    main()
