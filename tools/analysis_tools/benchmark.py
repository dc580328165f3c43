"""Time and memory of dynamic convolution, as ratios to alternatives measured in the same run.

    python benchmark.py layer --channels 256 --size 26 42 --batch 2
    python benchmark.py backbone ODResNet --depth 50 --batch 1 2 --size 416 672
    python benchmark.py backbone ODResNet --batch 1 --fuse
    python benchmark.py backbone ODResNet --layer FDConv2d --layer-options fbm=False
    python benchmark.py backbone KWResNet --batch 2
    python benchmark.py model torchvision.models.resnet50 --include 'layer.*conv.'
    python benchmark.py detector faster-rcnn_od-r50-k4_fpn_1x_coco.py --mode iteration
    python benchmark.py --suite

Alternatives, interleaved round by round: ``static`` (nn.Conv2d), ``published`` (the formulation of
the published code, a plan of dynamic_conv2d; DCD and KernelWarehouse have none) and ``ours`` (the
plan that dynamic_conv2d chooses). Milliseconds are medians over the rounds. Modes: 'inference', a
forward pass; 'training', a forward and a backward pass; 'iteration', of a detector, both with its
losses on random boxes, and the step of its config's optimizer. 'saved' is the memory that autograd
keeps for the backward pass beyond parameters, each storage counted once; 'peak', on CUDA, what a
training step takes at most beyond what was there before it, the parameters of all alternatives;
'reduced', the gradients that each GPU sends and receives in an iteration of a distributed run.

On a CPU the process starts itself again with glibc's allocator told to keep freed memory
(``--allocator settled``), as a GPU's does: else the first touch of each large temporary's pages
is measured beside the work. ``--allocator both`` prints both kinds.
"""
import argparse
import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
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
from mmdet_odconv.errors import InputError
from mmdet_odconv.names import nearest
from mmdet_odconv.ops import force_plan
from mmdet_odconv.ops.machine import describe as describe_machine

COCO, IMAGENET = (416, 672), (224, 224)
SUITE = [('backbone', name, '--kernel-num', n, '--batch', batch, '--size', *size)
         for name in ('ODResNet', 'ODMobileNetV2')
         for n, batch, size in ((4, 1, COCO), (4, 2, COCO), (1, 1, COCO), (1, 2, COCO),
                                (4, 16, IMAGENET))]
SUITE += [('backbone', 'ODResNet', '--layer', layer, '--batch', 2, '--size', *COCO)
          for layer in ('DyConv2d', 'CondConv2d', 'DCDConv2d')]
SUITE += [('backbone', 'ODResNet', '--layer', 'FDConv2d', '--batch', 2, '--size', *COCO, *options)
          for options in ((), ('--layer-options', 'fbm=False'),
                          ('--layer-options', 'fbm=False', 'local=False'))]
SUITE += [('backbone', 'KWResNet', '--batch', 2, '--size', *COCO)]
SUITE += [('backbone', name, '--batch', 1, '--size', *COCO, '--fuse')
          for name in ('ODResNet', 'ODMobileNetV2')]
DETECTORS = [('detector', f'faster-rcnn_{name}_fpn_1x_coco.py', '--batch', batch, '--size', *COCO)
             for name in ('od-r50-k4', 'od-r50-k1', 'od-mobilenet-v2-k4', 'od-mobilenet-v2-k1')
             for batch in (1, 2)]
DETECTORS += [('detector', f'faster-rcnn_od-r18-{k}_fpn_digits.py', '--batch', 4,
               '--size', 192, 192) for k in ('k1', 'k4')]
# Freed memory stays with the process, so that no page is touched for the first time twice.
ALLOCATOR = dict(MALLOC_MMAP_THRESHOLD_=2**33, MALLOC_TRIM_THRESHOLD_=2**34, MALLOC_TOP_PAD_=2**28)
MEGABYTES = ('saved', 'peak', 'reduced')
LAYER = {'layer', 'layer_options', 'kernel_num'}
READ_BY = {  # options that not every kind of case reads
    'layer': {*LAYER, 'batch', 'size', 'channels', 'out_channels', 'kernel_size', 'stride',
              'groups'},
    'backbone': {*LAYER, 'batch', 'size', 'depth', 'widen_factor', 'fuse'},
    'model': {*LAYER, 'batch', 'size', 'include'},
    'detector': {'batch', 'size'},
    '--suite': set(),
}
DTYPES = {'fp32': None, 'fp16': torch.float16, 'bf16': torch.bfloat16}


class Case:
    """One model in its three guises, on one input."""

    def __init__(self, label, static, dynamic, x, dtype, forward=None, step=None):
        self.label, self.x, self.dtype = label, x, dtype
        self.forward = forward or (lambda model, x: model(x))
        self.step = step
        self.models = {'static': (static, None), 'published': (dynamic, 'published'),
                       'ours': (dynamic, None)}
        if any(isinstance(module, (layers.DCDConv2d, layers.KWConv2d))
               for module in dynamic.modules()):
            del self.models['published']

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

    def iteration(self, alternative):
        """Seconds of a training iteration of a detector, its optimizer's step included."""
        model = self.models[alternative][0]
        model.train()
        start = self._clock()
        with self._plan(alternative):
            self.step(model)
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
                record['saved'] = self.saved_bytes(alternative) / 1e6
                peak = self.peak_bytes(alternative)
                record['peak'] = None if peak is None else peak / 1e6
            if 'iteration' in modes:
                parameters = self.models[alternative][0].parameters()
                record['reduced'] = sum(p.numel() * p.element_size() for p in parameters
                                        if p.requires_grad) / 1e6
            records.append(record)
        for record in records:
            for base in records[:-1]:
                record[f'to_{base["alternative"]}'] = {
                    key: record[key] / base[key] for key in (*modes, *MEGABYTES) if record.get(key)}
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
    known = [other for other in backbones.__all__
             if other[:2] in ('OD', 'Dy', 'KW') and other != 'DynamicBackbone']
    if name not in known:
        raise InputError(f'{name} is no dynamic backbone: '
                         f'{nearest(name, known, "give one of " + ", ".join(known))}')
    kind = name[len('OD'):]  # mmdet's, or ours where mmdet has none
    arguments = {'depth': args.depth} if is_resnet else {} if kind == 'MobileNetV3' else {
        'widen_factor': args.widen_factor}
    arguments['norm_eval'] = False
    static = (getattr(static_backbones, kind, None) or getattr(backbones, kind))(**arguments)
    shares = name.startswith('KW')  # its layers share a warehouse, which no conv_cfg could say
    dynamic = getattr(backbones, name)(**arguments, **(
        args.layer_options if shares else {'conv_cfg': layer_config(args, kernel_num)}))
    if args.fuse:
        from mmdet_odconv import fuse
        for model in (static, dynamic):
            model.eval()  # whose result MMDetection's backbones leave out
            fuse(model)
    x = torch.randn(batch, 3, *args.size, device=args.device)
    label = f'{name[2:]}{args.depth if is_resnet else ""}{" fused" if args.fuse else ""}'
    return Case(describe(f'{label} KW' if shares else label, batch, args.size, args, kernel_num),
                static.to(args.device), dynamic.to(args.device), x, DTYPES[args.dtype])


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
    """A detector of a config against the same with static convolutions.

    Forward and backward passes are of backbone, neck and dense head; an iteration is whole.
    """
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs
    from mmengine.config import Config
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import DefaultScope

    from mmdet_odconv import config_path
    from mmdet_odconv.checkpoints.swapping import make_static
    path = Path(config_path(args.target))
    DefaultScope.get_instance('benchmark', scope_name='mmdet')
    config = Config.fromfile(path)
    # Fine-tuning's frozen stages need pretrained weights, which are not at hand.
    config.model.backbone.init_cfg = None
    dynamic = MODELS.build(config.model)
    make_static(config.model)
    static = MODELS.build(config.model)
    # Of which classes the boxes are changes no time, and every detector has a first and a second.
    data = demo_mm_inputs(batch, [(3, *args.size)] * batch, num_items=[5] * batch, num_classes=2,
                          with_mask=dynamic.with_mask, device=args.device)
    wrappers = {model: build_optim_wrapper(model, config.optim_wrapper)
                for model in (static.to(args.device), dynamic.to(args.device))}
    # Random weights on random boxes diverge at a rate made for trained ones.
    for wrapper in wrappers.values():
        for group in wrapper.optimizer.param_groups:
            group['lr'] = 1e-8
    x = torch.randn(batch, 3, *args.size, device=args.device)

    def forward(model, x):
        levels = model.extract_feat(x)
        dense = getattr(model, 'rpn_head', None) or model.bbox_head
        return [*levels, *(y for outputs in dense(levels) for y in outputs)]

    return Case(describe(path.stem, batch, args.size), static, dynamic, x, DTYPES[args.dtype],
                forward, lambda model: model.train_step(data, wrappers[model]))


def describe(label, batch, size, args=None, kernel_num=None):
    if args is not None:
        label += '' if args.layer == 'ODConv2d' else f' {args.layer[:-len("2d")]}'
        label += '' if kernel_num is None else f' k{kernel_num}'
        label += ''.join(f' {name}={value}' for name, value in args.layer_options.items())
    return f'{label}, {batch}x{size[0]}x{size[1]}'


def cases(args):
    """The cases asked for, built one at a time; InputError if one cannot be."""
    try:
        yield from built(args)
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f'{args.kind} {args.target or ""} could not be built '
                         f'({type(error).__name__}: {error}): see --help.') from error


def built(args):
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


def suite(args, modes):
    """Records of the suite, each case in its own process: in a used heap the next is slower."""
    cases = DETECTORS if 'iteration' in modes else SUITE
    if modes == ['training']:
        cases = [case for case in cases if '--fuse' not in case]
    for i, case in enumerate(cases):
        out = args.out / 'suite' / str(i)
        options = dict(mode=args.mode, device=args.device, dtype=args.dtype, rounds=args.rounds,
                       allocator=args.allocator, out=out)
        if args.threads:
            options['threads'] = args.threads
        command = [sys.executable, __file__, *map(str, case)]
        for option, value in options.items():
            command += [f'--{option}', str(value)]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:  # its reason is printed
            print(f'{" ".join(map(str, case))} failed and has no row.', file=sys.stderr)
            continue
        print(f'{i + 1} of {len(cases)}', flush=True)
        yield from json.loads((out / 'benchmark.json').read_text())['records']


def print_table(records, modes, machine, console):
    table = Table(title=f'Dynamic convolution, ratio to static: {machine}')
    table.add_column('case')
    table.add_column('alternative')
    sizes = [key for key in MEGABYTES if any(record.get(key) for record in records)]
    for mode in modes:
        table.add_column(f'{mode}, ms', justify='right')
        table.add_column('to static', justify='right')
        table.add_column('to published', justify='right')
    for key in sizes:
        table.add_column(f'{key}, MB', justify='right')
        table.add_column('to static', justify='right')
    for record in records:
        first, last = record['alternative'] == 'static', record['alternative'] == 'ours'
        row = [record['case'] if first else '', record['alternative']]
        for mode in modes:
            row += [f'{record[mode]:.1f}', f'{record["to_static"][mode]:.2f}',
                    f'{record["to_published"][mode]:.2f}' if 'to_published' in record else ''
                    ] if mode in record else [''] * 3  # what is fused is not trained
        for key in sizes:
            row += [f'{record[key]:.0f}', f'{record["to_static"][key]:.2f}'
                    ] if record.get(key) else [''] * 2
        table.add_row(*row, end_section=last)
    console.print(table)


def draw(records, modes, path):
    """Bars of the ratio to static, a panel each for the modes and the saved memory."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    panels = [*modes, *(['saved'] if 'training' in modes else [])]
    labels = list(dict.fromkeys(record['case'] for record in records))
    size = 4 * len(panels) + 0.07 * max(map(len, labels)), 1.2 + 0.5 * len(labels)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False,
                                layout='constrained')
    titles = {'inference': 'inference, time', 'training': 'training step, time',
              'iteration': "iteration with optimizer's step, time",
              'saved': 'memory saved for backward'}
    names = {'published': 'published formulation', 'ours': 'ours'}
    for axis, panel in zip(axes.flat, panels):
        for offset, alternative, colour in ((-0.2, 'published', '#e69f00'),
                                            (0.2, 'ours', '#0072b2')):
            values = {r['case']: r['to_static'][panel] for r in records
                      if r['alternative'] == alternative and panel in r['to_static']}
            bars = axis.barh([labels.index(case) + offset for case in values], values.values(),
                             0.38, color=colour, label=names[alternative])
            for label in axis.bar_label(bars, fmt='%.2f', fontsize=7, padding=3):
                label.set_bbox(dict(facecolor='white', edgecolor='none', pad=0.5))
        axis.axvline(1, color='0.3', lw=1, zorder=0.5)
        axis.set(title=titles[panel], xlabel='ratio to static')
        axis.margins(x=0.18)
    axes[0, 0].set_yticks(range(len(labels)), labels)
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside upper center', ncols=2,
                  frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def machine_name(device, allocator):
    """The machine in words, with its backends and, on a CPU, how memory is kept."""
    device = torch.device(device)
    if device.type == 'cuda':
        return f'{describe_machine(device)}, cuDNN {torch.backends.cudnn.version()}'
    backends = [name for name, backend in (('MKL', torch.backends.mkl),
                                           ('oneDNN', torch.backends.mkldnn))
                if backend.is_available()]
    return f'{describe_machine(device)}, {" and ".join(backends)}, {allocator} allocator'


def settle_allocator(args):
    """Start this process again under ALLOCATOR if that is asked for and not so yet."""
    if args.allocator != 'settled' or args.device != 'cpu' or not sys.platform.startswith('linux'):
        return
    settings = {name: str(value) for name, value in ALLOCATOR.items()}
    if any(os.environ.get(name) != value for name, value in settings.items()):
        print('Starting again with', *(f'{name}={value}' for name, value in settings.items()),
              flush=True)
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})


def both_allocators(out):
    """Run this command with each kind of allocator, into folders of ``out``; the worse status."""
    environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
    # Of an option given twice the last counts.
    return max(subprocess.run([sys.executable, __file__, *sys.argv[1:], '--allocator', kind,
                               '--out', str(out / kind)], env=environment).returncode
               for kind in ('default', 'settled'))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('kind', nargs='?', choices=['layer', 'backbone', 'model', 'detector'])
    parser.add_argument('target', nargs='?', help='backbone class, model function or config')
    parser.add_argument('--suite', action='store_true',
                        help='OD-ResNet-50 and OD-MobileNetV2 at COCO and ImageNet sizes and '
                        'the other layers; with --mode iteration, whole detectors')
    parser.add_argument('--mode', choices=['inference', 'training', 'both', 'iteration'],
                        default='both')
    parser.add_argument('--allocator', choices=['settled', 'default', 'both'], default='settled')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', choices=DTYPES, default='fp32', help='of autocast')
    parser.add_argument('--batch', type=int, nargs='+', default=[2])
    parser.add_argument('--size', type=int, nargs=2, default=(416, 672), metavar=('H', 'W'))
    parser.add_argument('--layer', default='ODConv2d', help='the dynamic convolution', choices=[
        name for name in layers.__all__ if name.endswith('2d') and name != 'DynamicConv2d'])
    parser.add_argument('--layer-options', nargs='+', action=DictAction, default={},
                        help='more of its arguments, such as fbm=False, or budget=4x of KWResNet')
    parser.add_argument('--kernel-num', type=int, nargs='+',
                        help="4 of ODConv2d if not given, or another layer's own")
    parser.add_argument('--depth', type=int, default=50, help='of a ResNet')
    parser.add_argument('--widen-factor', type=float, default=1.0, help='of a MobileNet')
    parser.add_argument('--fuse', action='store_true',
                        help='of a backbone: fold the norms of all alternatives; inference alone')
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
    what = '--suite' if args.suite else args.kind
    if what is None:
        parser.error('say what to measure: layer, backbone, model, detector or --suite')
    if args.suite and args.kind:
        parser.error(f'--suite measures its own cases, and no {args.kind}: give one of the two')
    for name in sorted(set.union(*READ_BY.values()) - READ_BY[what]):
        if getattr(args, name) != parser.get_default(name):
            parser.error(f'{what} does not read --{name.replace("_", "-")}: leave it out')
    for name in ('batch', 'size', 'kernel_num', 'channels', 'out_channels', 'kernel_size', 'stride',
                 'groups', 'rounds', 'threads'):
        given = getattr(args, name)
        for number in given if isinstance(given, (list, tuple)) else [given]:
            if number is not None and number < 1:
                parser.error(f'--{name.replace("_", "-")} must be at least 1, got {number}')
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        parser.error(f'--device {args.device}: torch {torch.__version__} sees no such device here')
    if args.kind == 'backbone' and str(args.target).startswith('KW'):
        if args.kernel_num or args.layer != 'ODConv2d':
            parser.error(f'{args.target} has layers of its own and takes neither --layer nor '
                         '--kernel-num: its size is --layer-options budget=4x')
        args.kernel_num = [None]
    if args.kernel_num is None:
        args.kernel_num = [4 if args.layer == 'ODConv2d' else None]
    if args.kind in ('backbone', 'model', 'detector') and args.target is None:
        parser.error(f'{args.kind} needs a target')
    if args.fuse and args.mode in ('training', 'iteration'):
        parser.error('--fuse is for the inference of a backbone')
    if args.mode == 'iteration' and args.kind not in ('detector', None):
        parser.error('--mode iteration is for a detector or --suite')
    return args


def main():
    args = parse_args()
    if args.allocator == 'both':
        sys.exit(both_allocators(args.out))
    settle_allocator(args)
    warnings.filterwarnings('ignore', 'An attention is training')  # nobody learns here
    if args.threads:
        torch.set_num_threads(args.threads)
    modes = ['inference', 'training'] if args.mode == 'both' else [args.mode]
    modes = ['inference'] if args.fuse else modes
    # A table cut to a pipe's 80 columns could not be read.
    console = Console() if sys.stdout.isatty() else Console(width=150)
    try:
        records = list(suite(args, modes) if args.suite else measure(args, modes, console))
    except InputError as error:  # errors_explained needs mmdet
        sys.exit(f'error: {error}')
    if not records:
        sys.exit('error: nothing was measured.')
    machine = machine_name(args.device, args.allocator)
    print_table(records, modes, machine, console)
    args.out.mkdir(parents=True, exist_ok=True)
    result = {'machine': machine, 'records': records}
    (args.out / 'benchmark.json').write_text(json.dumps(result, indent=1))
    draw(records, modes, args.out / 'benchmark.png')
    console.print(f'{args.out / "benchmark.json"}  {args.out / "benchmark.png"}', highlight=False)


if __name__ == '__main__':
    main()
