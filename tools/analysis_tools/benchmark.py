"""Time and memory of dynamic convolution, as ratios to alternatives measured in the same run.

    python benchmark.py layer --channels 256 --size 26 42 --batch 2
    python benchmark.py backbone ODResNet --depth 50 --batch 1 2 --size 416 672
    python benchmark.py backbone ODResNet --layer FDConv2d --layer-options fbm=False
    python benchmark.py model torchvision.models.resnet50 --include 'layer.*conv.'
    python benchmark.py detector faster-rcnn_od-r50-k4_fpn_1x_coco.py --size 416 672
    python benchmark.py --suite

Alternatives, interleaved round by round: ``static`` (nn.Conv2d), ``grouped`` (the formulation of
the published code, a plan of dynamic_conv2d) and ``ours`` (the plan that dynamic_conv2d chooses).
Milliseconds are medians over the rounds. 'saved' is the memory that autograd keeps for the
backward pass beyond parameters, each storage counted once; 'peak', on CUDA, what a training step
takes at most beyond what was there before it, the parameters of all alternatives.
"""
import argparse
import contextlib
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

try:
    import mmdet  # noqa: F401
except ImportError:
    # The layer and any-model benchmarks run where mmdet and mmcv are not.
    os.environ.setdefault('MMDET_ODCONV_LAYERS_ONLY', '1')

import torch
from mmengine.config import DictAction
from rich.console import Console
from rich.table import Table
from torch import nn

from mmdet_odconv import layers
from mmdet_odconv.ops import force_plan

SUITE = [(name, 'ODConv2d', {}, kernel_num, batch, size)
         for name in ('ODResNet', 'ODMobileNetV2')
         for kernel_num, batch, size in ((4, 1, (416, 672)), (4, 2, (416, 672)), (1, 1, (416, 672)),
                                         (1, 2, (416, 672)), (4, 16, (224, 224)))]
SUITE += [('ODResNet', 'FDConv2d', options, 64, 2, (416, 672)) for options in (
    {}, {'fbm': False}, {'fbm': False, 'local': False})]
DTYPES = {'fp32': None, 'fp16': torch.float16, 'bf16': torch.bfloat16}


class Case:
    """One model in its three guises, on one input."""

    def __init__(self, label, static, dynamic, x, dtype, forward=None):
        self.label, self.x, self.dtype = label, x, dtype
        self.forward = forward or (lambda model, x: model(x))
        self.models = {'static': (static, None), 'grouped': (dynamic, 'grouped'),
                       'ours': (dynamic, None)}

    @contextlib.contextmanager
    def _plan(self, alternative):
        plan = self.models[alternative][1]
        autocast = torch.autocast(self.x.device.type, self.dtype, enabled=self.dtype is not None)
        with force_plan(plan) if plan else contextlib.nullcontext(), autocast:
            yield self.models[alternative][0]

    def _outputs(self, model):
        outputs = self.forward(model, self.x)
        return [outputs] if torch.is_tensor(outputs) else list(outputs)

    def inference(self, alternative):
        """Seconds of one forward pass in evaluation mode."""
        model = self.models[alternative][0].eval() or self.models[alternative][0]
        with self._plan(alternative), torch.no_grad():
            start = self._clock()
            self._outputs(model)
            return self._clock() - start

    def training(self, alternative):
        """Seconds of forward and backward in training mode, gradients of all parameters."""
        model = self.models[alternative][0]
        model.train()
        model.zero_grad(set_to_none=True)
        start = self._clock()
        with self._plan(alternative):
            outputs = self._outputs(model)
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        return self._clock() - start

    def saved_bytes(self, alternative):
        """Bytes that one forward pass in training mode keeps for backward."""
        model = self.models[alternative][0]
        model.train()
        with self._plan(alternative):
            return saved_bytes(model, lambda: self._outputs(model))

    def peak_bytes(self, alternative):
        """CUDA bytes that a training step takes at its peak beyond parameters and input.

        None on the CPU, where torch counts none.
        """
        if self.x.device.type != 'cuda':
            return None
        for model, _ in self.models.values():
            model.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.training(alternative)
        return torch.cuda.max_memory_allocated() - before

    def _clock(self):
        if self.x.device.type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter()

    def run(self, modes, rounds):
        """Records, one an alternative: ms of each mode, saved and peak MB, ratios to static."""
        times = {(a, mode): [] for a in self.models for mode in modes}
        for mode in modes:
            for i in range(rounds + 1):  # the first round warms up
                # Forwards and backwards in turn: each follows the other two equally often.
                for alternative in list(self.models)[::1 if i % 2 else -1]:
                    seconds = getattr(self, mode)(alternative)
                    if i:
                        times[alternative, mode].append(seconds)
        records = []
        for alternative in self.models:
            record = {'case': self.label, 'alternative': alternative}
            for mode in modes:
                record[mode] = statistics.median(times[alternative, mode]) * 1e3
            if 'training' in modes:
                record['saved'] = self.saved_bytes(alternative) / 2**20
                peak = self.peak_bytes(alternative)
                record['peak'] = None if peak is None else peak / 2**20
            records.append(record)
        for record in records:
            for other in ('static', 'grouped'):
                base = next(r for r in records if r['alternative'] == other)
                record[f'to_{other}'] = {
                    key: record[key] / base[key] for key in (*modes, 'saved') if record.get(key)}
        return records


def saved_bytes(model, forward):
    """Bytes of the distinct storages, beyond parameters, that a call keeps for backward."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()  # held, so that no storage is freed and its address used again
    del outputs
    return sum(saved.values())


def layer_case(args, batch, kernel_num):
    x = torch.randn(batch, args.channels, *args.size, device=args.device, requires_grad=True)
    arguments = (args.channels, args.out_channels or args.channels, args.kernel_size, args.stride,
                 args.kernel_size // 2, 1, args.groups, False)
    conv_cfg = layer_config(args, kernel_num)
    label = f'{arguments[0]}->{arguments[1]} {args.kernel_size}x{args.kernel_size}'
    dynamic = getattr(layers, conv_cfg.pop('type'))(*arguments, **conv_cfg)
    return Case(describe(label, batch, args.size, args, kernel_num),
                nn.Conv2d(*arguments).to(args.device), dynamic.to(args.device), x,
                DTYPES[args.dtype])


def layer_config(args, kernel_num):
    """``conv_cfg`` of --layer with its --layer-options."""
    bank = {} if kernel_num is None else {'kernel_num': kernel_num}
    return {'type': args.layer, **bank, **args.layer_options}


def backbone_case(args, batch, kernel_num):
    import mmdet.models.backbones as static_backbones

    from mmdet_odconv import backbones
    name, is_resnet = args.target, 'ResN' in args.target
    arguments = {'depth': args.depth} if is_resnet else {'widen_factor': args.widen_factor}
    arguments['norm_eval'] = False
    static = getattr(static_backbones, name[len('OD'):])(**arguments)
    dynamic = getattr(backbones, name)(conv_cfg=layer_config(args, kernel_num), **arguments)
    x = torch.randn(batch, 3, *args.size, device=args.device)
    label = f'{name[2:]}{args.depth if is_resnet else ""}'
    return Case(describe(label, batch, args.size, args, kernel_num), static.to(args.device),
                dynamic.to(args.device), x, DTYPES[args.dtype])


def model_case(args, batch, kernel_num):
    from mmdet_odconv.layers import replace_convs
    module, _, function = args.target.rpartition('.')
    build = getattr(importlib.import_module(module), function)
    static, dynamic = build(), build()
    replaced = replace_convs(dynamic, args.include, layer_config(args, kernel_num))
    if not replaced:
        sys.exit(f'error: --include {args.include} matches no nn.Conv2d of {args.target}.')
    x = torch.randn(batch, 3, *args.size, device=args.device)
    return Case(describe(function, batch, args.size, args, kernel_num), static.to(args.device),
                dynamic.to(args.device), x, DTYPES[args.dtype])


def detector_case(args, batch):
    """Backbone, neck and dense head of a config against the same with static convolutions."""
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    from mmdet_odconv.engine.launch import find_config
    path = Path(args.target) if Path(args.target).exists() else find_config(args.target)
    DefaultScope.get_instance('benchmark', scope_name='mmdet')
    config = Config.fromfile(path).model
    dynamic = MODELS.build(config)
    make_static(config)
    static = MODELS.build(config)
    x = torch.randn(batch, 3, *args.size, device=args.device)

    def forward(model, x):
        levels = model.extract_feat(x)
        dense = getattr(model, 'rpn_head', None) or model.bbox_head
        return [*levels, *(y for outputs in dense(levels) for y in outputs)]

    return Case(describe(path.stem, batch, args.size), static.to(args.device),
                dynamic.to(args.device), x, DTYPES[args.dtype], forward)


def make_static(config):
    """Take the dynamic convolutions and backbones out of a model's config, in place."""
    from mmdet.registry import MODELS

    from mmdet_odconv.backbones.dynamic import DynamicBackbone
    from mmdet_odconv.layers import DynamicConv2d

    def bases(value):
        kind = value.get('type') if isinstance(value, dict) else None
        kind = MODELS.get(kind) if isinstance(kind, str) else kind
        return kind.__mro__ if isinstance(kind, type) else ()

    if DynamicBackbone in bases(config):
        config.type = bases(config)[bases(config).index(DynamicBackbone) + 1]
        for argument in ('kernel_num', 'reduction', 'dynamic_convs', 'frozen_except'):
            config.pop(argument, None)
    for key, value in list(config.items()):
        if DynamicConv2d in bases(value):
            del config[key]
            continue
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(part, dict):
                make_static(part)


def describe(label, batch, size, args=None, kernel_num=None):
    if args is not None:
        label += '' if args.layer == 'ODConv2d' else f' {args.layer[:-len("2d")]}'
        label += '' if kernel_num is None else f' k{kernel_num}'
        label += ''.join(f' {name}={value}' for name, value in args.layer_options.items())
    return f'{label}, {batch}x{size[0]}x{size[1]}'


def cases(args):
    """The cases asked for, built one at a time."""
    for batch in args.batch:
        if args.kind == 'detector':
            yield detector_case(args, batch)
            continue
        for kernel_num in args.kernel_num:
            if args.kind == 'layer':
                yield layer_case(args, batch, kernel_num)
            elif args.kind == 'backbone':
                yield backbone_case(args, batch, kernel_num)
            else:
                yield model_case(args, batch, kernel_num)


def measure(args, modes, console):
    for case in cases(args):
        console.print(case.label, style='dim')
        yield from case.run(modes, args.rounds)


def suite(args):
    """Records of SUITE, each case in a process of its own: in a used heap the next is slower."""
    for i, (name, layer, layer_options, kernel_num, batch, size) in enumerate(SUITE):
        out = args.out / 'suite' / str(i)
        options = dict(layer=layer, kernel_num=kernel_num, batch=batch, mode=args.mode,
                       device=args.device, dtype=args.dtype, rounds=args.rounds, out=out)
        if args.threads:
            options['threads'] = args.threads
        command = [sys.executable, __file__, 'backbone', name, '--size', *map(str, size)]
        for option, value in options.items():
            command += [f'--{option.replace("_", "-")}', str(value)]
        if layer_options:
            command += ['--layer-options', *(f'{k}={v}' for k, v in layer_options.items())]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        print(f'{i + 1} of {len(SUITE)}', flush=True)
        yield from json.loads((out / 'benchmark.json').read_text())['records']


def print_table(records, modes, machine, console):
    table = Table(title=f'Dynamic convolution, ratio to static: {machine}')
    table.add_column('case')
    table.add_column('alternative')
    has_peak = any(record.get('peak') for record in records)
    for mode in modes:
        table.add_column(f'{mode}, ms', justify='right')
        table.add_column('to static', justify='right')
        table.add_column('to grouped', justify='right')
    if 'training' in modes:
        table.add_column('saved, MB', justify='right')
        table.add_column('to static', justify='right')
        if has_peak:
            table.add_column('peak, MB', justify='right')
    for i, record in enumerate(records):
        row = [record['case'] if i % 3 == 0 else '', record['alternative']]
        for mode in modes:
            row += [f'{record[mode]:.1f}', f'{record["to_static"][mode]:.2f}',
                    f'{record["to_grouped"][mode]:.2f}']
        if 'training' in modes:
            row += [f'{record["saved"]:.0f}', f'{record["to_static"]["saved"]:.2f}']
            if has_peak:
                row.append(f'{record["peak"]:.0f}')
        table.add_row(*row, end_section=i % 3 == 2)
    console.print(table)


def draw(records, modes, path):
    """Bars of the ratio to static, a panel each for the modes and the saved memory."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    panels = [*modes, *(['saved'] if 'training' in modes else [])]
    labels = [record['case'] for record in records[::3]]
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 1.2 + 0.5 * len(labels)),
                                sharey=True, squeeze=False, layout='constrained')
    titles = {'inference': 'inference, time', 'training': 'training step, time',
              'saved': 'memory saved for backward'}
    for axis, panel in zip(axes.flat, panels):
        for offset, alternative, colour in ((-0.2, 'grouped', '#c2a35a'), (0.2, 'ours', '#1f6fd6')):
            values = [r['to_static'][panel] for r in records if r['alternative'] == alternative]
            bars = axis.barh([i + offset for i in range(len(values))], values, 0.38, color=colour,
                             label=alternative)
            axis.bar_label(bars, fmt='%.2f', fontsize=7, padding=2)
        axis.axvline(1, color='0.3', lw=1)
        axis.set(title=titles[panel], xlabel='ratio to static')
        axis.margins(x=0.12)
    axes[0, 0].set_yticks(range(len(labels)), labels)
    axes[0, 0].invert_yaxis()
    axes[0, -1].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def machine_name(device):
    if device == 'cuda':
        return f'{torch.cuda.get_device_name()}, torch {torch.__version__}'
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        info = Path('/proc/cpuinfo').read_text().splitlines()
        model = next(line.split(':')[1].strip() for line in info if line.startswith('model name'))
    return f'{model}, {torch.get_num_threads()} threads, torch {torch.__version__}'


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('kind', nargs='?', choices=['layer', 'backbone', 'model', 'detector'])
    parser.add_argument('target', nargs='?', help='backbone class, model function or config')
    parser.add_argument('--suite', action='store_true',
                        help='OD-ResNet-50 and OD-MobileNetV2 at COCO and ImageNet sizes, and '
                        'ResNet-50 with FDConv')
    parser.add_argument('--mode', choices=['inference', 'training', 'both'], default='both')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', choices=DTYPES, default='fp32', help='of autocast')
    parser.add_argument('--batch', type=int, nargs='+', default=[2])
    parser.add_argument('--size', type=int, nargs=2, default=(416, 672), metavar=('H', 'W'))
    parser.add_argument('--layer', default='ODConv2d', help='the dynamic convolution', choices=[
        name for name in layers.__all__ if name.endswith('2d') and name != 'DynamicConv2d'])
    parser.add_argument('--layer-options', nargs='+', action=DictAction, default={},
                        help='more of its arguments, such as fbm=False')
    parser.add_argument('--kernel-num', type=int, nargs='+',
                        help="4 of ODConv2d if not given, or another layer's own")
    parser.add_argument('--depth', type=int, default=50, help='of a ResNet')
    parser.add_argument('--widen-factor', type=float, default=1.0, help='of a MobileNet')
    parser.add_argument('--include', default='.*', help='names of convolutions made dynamic')
    parser.add_argument('--channels', type=int, default=256, help='of a layer')
    parser.add_argument('--out-channels', type=int)
    parser.add_argument('--kernel-size', type=int, default=3)
    parser.add_argument('--stride', type=int, default=1)
    parser.add_argument('--groups', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--threads', type=int, help='of the CPU')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmark'),
                        help='directory of benchmark.json and benchmark.png')
    args = parser.parse_args()
    if args.kernel_num is None:
        args.kernel_num = [4 if args.layer == 'ODConv2d' else None]
    if not args.suite and args.kind is None:
        parser.error('say what to measure: layer, backbone, model, detector or --suite')
    if args.kind in ('backbone', 'model', 'detector') and args.target is None:
        parser.error(f'{args.kind} needs a target')
    return args


def main():
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    modes = ['inference', 'training'] if args.mode == 'both' else [args.mode]
    # A table cut to a pipe's 80 columns could not be read.
    console = Console() if sys.stdout.isatty() else Console(width=150)
    records = list(suite(args) if args.suite else measure(args, modes, console))
    machine = machine_name(torch.device(args.device).type)
    print_table(records, modes, machine, console)
    args.out.mkdir(parents=True, exist_ok=True)
    result = {'machine': machine, 'records': records}
    (args.out / 'benchmark.json').write_text(json.dumps(result, indent=1))
    draw(records, modes, args.out / 'benchmark.png')
    console.print(f'{args.out / "benchmark.json"}  {args.out / "benchmark.png"}', highlight=False)


if __name__ == '__main__':
    main()
