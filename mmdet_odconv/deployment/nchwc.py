"""Computed convolutions in onnxruntime's blocked layout, its fast way through a network.

On x86-64 onnxruntime keeps maps in blocks of 8 or 16 channels (NCHWc) and convolves those of a
MobileNetV2 twice as fast; but it does so for constant weights alone. Its operators take computed
ones as well, as long as they are blocked when the graph runs. Both layouts of its weights are what
its own ReorderInput makes of some map, whatever the machine's block is:

- depthwise, (C, 1, kh, kw): of a map of C channels, kh high and kw wide;
- any other, (O, I, kh, kw): of maps of I channels, one for each filter, which puts I in blocks;
  then of one map of O channels in which those are the places.

These operators are onnxruntime's own: no other runtime reads the file, nor does onnxruntime on a
machine without that layout.
"""
import itertools
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

DOMAIN = 'com.microsoft.nchwc'
BLOCK = 16  # a multiple of every machine's block, to which channels are padded
MIN_CHANNELS = 8  # the smallest block: fewer are read as they are, by any machine


def block_channels(path: Path) -> None:
    """Rewrite an ONNX file of one image so that its maps stay blocked through computed weights.

    A file that has none stays as it is, for onnxruntime blocks constant ones itself, and once.
    """
    import onnx
    graph = _Blocking(tidied(path))
    if any(node.op_type == 'Conv' and node.input[1] not in graph.constants
           for node in graph.model.graph.node):
        onnx.save(graph.rewritten(), str(path))


def tidied(path: Path) -> Any:
    """The model of an ONNX file as onnxruntime has it after what is right on every machine."""
    import onnx
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / 'tidied.onnx')
        onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
        return onnx.load(options.optimized_model_filepath)


def padded(channels: int) -> int:
    """Channels of a map that any machine's blocks divide."""
    return -(-channels // BLOCK) * BLOCK


class _Blocking:
    """One pass through a graph, in which a map is known by its name and blocked under another."""

    def __init__(self, model) -> None:
        import onnx
        self.onnx, self.model = onnx, model
        inferred = onnx.shape_inference.infer_shapes(model).graph
        self.shapes = {value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
                       for value in inferred.value_info}
        self.constants = {tensor.name: onnx.numpy_helper.to_array(tensor)
                          for tensor in model.graph.initializer}
        self.constants.update({node.output[0]: onnx.numpy_helper.to_array(node.attribute[0].t)
                               for node in model.graph.node if node.op_type == 'Constant'
                               and node.attribute[0].name == 'value'})
        self.readers: Dict[str, list] = {}
        for node in model.graph.node:
            for name in self._read_by(node):
                self.readers.setdefault(name, []).append(node)
        self.outputs = {output.name for output in model.graph.output}
        self.nodes: List[Any] = []
        self.blocked: Dict[str, str] = {}  # maps, by name: their blocked selves
        self.channels: Dict[str, int] = {}  # of those that were made blocked, and may be padded
        self.sizes: Dict[str, tuple] = {}  # and what tells that maps are as high and wide
        self.made = {*self.constants, *(given.name for given in model.graph.input)}
        self.plain: set = set()  # blocked maps that are there unblocked as well
        self.numbers = itertools.count()

    def rewritten(self):
        done: set = set()
        for node in self.model.graph.node:
            if id(node) in done:
                continue
            source = node.input[0] if node.input else None
            if node.op_type == 'Conv' and self._is_taken(node):
                done.update(id(reader) for reader in self._convolve(node))
            elif (node.op_type == 'MaxPool' and source in self.channels
                  and len(node.output) == 1):
                self._keep(node.output[0], self.channels[source], self._add(
                    'MaxPool', [self.blocked[source]], DOMAIN, **self._attributes(node)),
                    self._size_after(node))
            elif node.op_type in ('Relu', 'Clip') and source in self.channels:
                self._keep(node.output[0], self.channels[source], self._add(
                    node.op_type, [self.blocked[source], *node.input[1:]],
                    **self._attributes(node)), self.sizes[source])
            elif (node.op_type == 'ReduceMean' and source in self.channels
                  and self._is_over_places(node)):
                self._average(node)
            else:
                for name in self._read_by(node):
                    self._unblock(name)
                self.nodes.append(node)
                self.made.update(node.output)
        for name in self.outputs:
            self._unblock(name)
        del self.model.graph.node[:]
        self.model.graph.node.extend(self.nodes)
        if not any(opset.domain == DOMAIN for opset in self.model.opset_import):
            self.model.opset_import.append(self.onnx.helper.make_opsetid(DOMAIN, 1))
        return self.model

    def _is_taken(self, node) -> bool:
        """Whether a convolution is blocked: it or its map is computed so, and its shape is right.

        onnxruntime itself sees to others of constant weights.
        """
        shape = self._shape(node.input[1])
        if len(shape) != 4 or not all(shape):
            return False
        filters, channels, *_ = shape
        groups = self._attributes(node).get('group', 1)
        if groups != 1 and not (groups == filters and channels == 1):
            return False
        if node.input[0] in self.blocked:
            return True
        # A map that is blocked here alone has no channels beyond its own.
        width = channels if groups == 1 else groups
        if node.input[1] in self.constants:
            return groups == 1 and channels < MIN_CHANNELS
        return width % BLOCK == 0 or groups == 1 and width < MIN_CHANNELS

    def _shape(self, name: str) -> List[int]:
        """Of a constant or computed tensor; sizes that depend on the image are 0."""
        return list(self.constants[name].shape if name in self.constants else
                    self.shapes.get(name, ()))

    def _convolve(self, node) -> list:
        """Add a convolution, and what follows it alone; the nodes that it stands for."""
        attributes = self._attributes(node)
        filters, channels, height, width = self._shape(node.input[1])
        depthwise = attributes.get('group', 1) > 1
        is_read = not depthwise and channels < MIN_CHANNELS  # as it is, unblocked
        weight = node.input[1]
        sizes = [padded(filters), channels if depthwise or is_read else padded(channels), height,
                 width]
        more = [sizes[0] - filters, sizes[1] - channels]
        if any(more):
            weight = self._add('Pad', [weight, self._constant([0, 0, 0, 0, *more, 0, 0])])
        if depthwise:
            attributes['group'] = sizes[0]
        elif not is_read and height * width > 1:
            weight = self._add('ReorderInput', [weight], DOMAIN)
        places = [height, width] if depthwise else [sizes[1] * height * width, 1]
        weight = self._reshaped(weight, [1, sizes[0], *places])
        weight = self._reshaped(self._add('ReorderInput', [weight], DOMAIN), sizes)
        source = node.input[0]
        if is_read:
            self._unblock(source)
        elif source not in self.blocked:
            self.blocked[source] = self._add('ReorderInput', [source], DOMAIN)
            self.plain.add(source)
        inputs = [source if is_read else self.blocked[source], weight]
        output, replaced = node.output[0], []
        bias = node.input[2] if len(node.input) > 2 else ''
        adding, other = self._addition(output)
        if other and not bias and (other in self.made or other in self.blocked) and (
                self._shape(other) in ([filters, 1, 1], [1, filters, 1, 1])):
            self._unblock(other)
            bias = self._reshaped(other, [filters])
            output = adding.output[0]
            replaced.append(adding)
            adding, other = self._addition(output)
        if bias and more[0]:
            bias = self._add('Pad', [bias, self._constant([0, more[0]])])
        inputs.append(bias)
        size = self._size_after(node)
        if other and self.channels.get(other) == filters and self.sizes[other] == size:
            inputs.append(self.blocked[other])
            output = adding.output[0]
            replaced.append(adding)
        activation = self._only_reader(output, ('Relu', 'Clip'))
        limits = [self.constants.get(name) for name in activation.input[1:]] if activation else []
        if activation and all(limit is not None for limit in limits):
            attributes['activation'] = activation.op_type
            if limits:
                attributes['activation_params'] = [float(limit) for limit in limits if (
                    limit is not None)]
            output = activation.output[0]
            replaced.append(activation)
        self._keep(output, filters, self._add('Conv', inputs, DOMAIN, **attributes), size)
        return replaced

    def _size_after(self, node) -> tuple:
        """By what the height and width of a convolution's or pooling's output are known.

        Of H places they leave (H + offset) // stride + 1: the same of maps of equal size.
        """
        attributes = self._attributes(node)
        kernel = attributes.get('kernel_shape') or self._shape(node.input[1])[2:]
        before = self.sizes.get(node.input[0], (node.input[0], ))
        if attributes.get('auto_pad', b'NOTSET') != b'NOTSET' or attributes.get('ceil_mode'):
            return (node.output[0], )
        pads = attributes.get('pads', [0, 0, 0, 0])
        strides, dilations = (attributes.get(name, [1, 1]) for name in ('strides', 'dilations'))
        steps = [(pads[i] + pads[i + 2] - dilations[i] * (kernel[i] - 1) - 1, strides[i])
                 for i in (0, 1)]
        return before if steps == [(-1, 1), (-1, 1)] else (before, *steps)

    def _is_over_places(self, node) -> bool:
        """Whether a mean of a map is over its rows and columns, and leaves no axes of them."""
        axes = self._attributes(node).get('axes')
        if axes is None and len(node.input) > 1:
            axes = self.constants.get(node.input[1])
        return (axes is not None and sorted(int(axis) % 4 for axis in axes) == [2, 3]
                and len(self._shape(node.output[0])) == 2)

    def _average(self, node) -> None:
        """The mean over places, (1, C): of one place, blocks are channels as they stand."""
        source = node.input[0]
        channels = self.channels[source]
        whole = padded(channels) == channels
        mean = self._reshaped(self._add('GlobalAveragePool', [self.blocked[source]], DOMAIN),
                              [1, padded(channels)], node.output[0] if whole else None)
        if not whole:
            self._first(mean, channels, node.output[0])

    def _addition(self, name: str) -> Tuple[Any, Optional[str]]:
        """What alone reads a map and adds something, and the name of that."""
        adding = self._only_reader(name, ('Add', ))
        others = [other for other in adding.input if other != name] if adding else []
        return adding, others[0] if others else None

    def _only_reader(self, name: str, kinds) -> Optional[Any]:
        readers = self.readers.get(name, [])
        alone = len(readers) == 1 and name not in self.outputs and readers[0].op_type in kinds
        return readers[0] if alone else None

    def _read_by(self, node) -> List[str]:
        """What a node reads, in the graphs of its branches, too."""
        names = list(node.input)
        for attribute in node.attribute:
            for inner in attribute.g.node:
                names += self._read_by(inner)
        return names

    def _keep(self, name: str, channels: int, blocked: str, size: tuple) -> None:
        self.blocked[name], self.channels[name], self.sizes[name] = blocked, channels, size

    def _unblock(self, name: str) -> None:
        if name in self.blocked and name not in self.plain:
            self.plain.add(name)
            channels = self.channels[name]
            whole = padded(channels) == channels
            # It leaves out no whole block, which on some machines padding is.
            plain = self._add('ReorderOutput', [self.blocked[name]], DOMAIN,
                              name if whole else None, channels=padded(channels))
            if not whole:
                self._first(plain, channels, name)

    def _first(self, name: str, channels: int, output: str) -> None:
        """The first channels, (1, C, ...)."""
        self._add('Slice', [name, *(self._constant([n]) for n in (0, channels, 1))], output=output)

    def _reshaped(self, name: str, sizes: List[int], output: Optional[str] = None) -> str:
        return self._add('Reshape', [name, self._constant(sizes)], output=output)

    def _constant(self, numbers: List[int]) -> str:
        name = f'nchwc/constant/{next(self.numbers)}'
        self.model.graph.initializer.append(self.onnx.numpy_helper.from_array(
            np.array(numbers, np.int64), name))
        return name

    def _add(self, kind: str, inputs: List[str], domain: str = '', output: Optional[str] = None,
             **attributes) -> str:
        output = output or f'nchwc/{kind}/{next(self.numbers)}'
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [output], domain=domain,
                                                     **attributes))
        self.made.add(output)
        return output

    def _attributes(self, node) -> Dict[str, Any]:
        return {attribute.name: self.onnx.helper.get_attribute_value(attribute)
                for attribute in node.attribute}
