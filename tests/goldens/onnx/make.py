"""ONNX files made elsewhere, for `cotk plan`: exports of torch and onnxruntime, and what they should be read as.

Made with Python 3.11, torch 2.9.1, torchvision 0.24.1, onnx 1.19.1, onnxruntime 1.23.2 (seed 0): python make.py
Weights are random. Those of the large networks are left out (their tensors say "external data", and no such file exists):
a plan needs shapes only. `expected.json` holds, per file, multiply-adds counted by torch's own modules while they run
(not from the ONNX graph) and the shape of every value by onnx's shape inference, at the batch given.
"""

import json
from pathlib import Path

import numpy as np
import onnx
import torch
import torchvision
from onnx import TensorProto, helper, numpy_helper, shape_inference
from onnx.external_data_helper import set_external_data
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn

HERE = Path(__file__).parent
BATCH = 2


class Squeeze(nn.Module):
    """Squeeze and excite, as networks write it by hand."""

    def __init__(self, channels):
        super().__init__()
        self.reduce = nn.Conv2d(channels, 8, 1)
        self.expand = nn.Conv2d(8, channels, 1)

    def forward(self, x):
        s = torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.expand(s))


class Tiny(nn.Module):
    """Every shape of layer that the readers must know, in 30 KB of weights."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.left = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.Conv2d(16, 20, 1), nn.ReLU())
        self.right = nn.Conv2d(16, 12, (1, 5), 1, (0, 2))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.excite = Squeeze(32)
        self.body = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 2, dilation=2), nn.BatchNorm2d(32))
        self.last = nn.Conv2d(32, 32, 3, 1, 1, groups=4)
        self.head = nn.Linear(32 * 2 * 2, 10)

    def forward(self, x):
        x = self.stem(x)
        x = self.pool(torch.cat([self.left(x), self.right(x)], 1))
        x = self.excite(x)
        x = torch.relu(self.body(x) + x)
        x = nn.functional.hardswish(self.last(x))
        x = nn.functional.adaptive_avg_pool2d(x, 2)
        x = x.view(x.shape[0], -1)
        return torch.softmax(self.head(x), 1)


def macs(model, x):
    """Multiply-adds of each convolution and linear layer, in running order."""
    found = []

    def hook(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            kh, kw = module.kernel_size
            found.append(output.numel() * module.in_channels // module.groups * kh * kw)
        else:
            found.append(output.numel() * module.in_features)

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


def export(model, x, path, dynamo):
    if dynamo:
        program = torch.onnx.export(
            model, (x,), dynamo=True, external_data=False, dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        program.save(path)
    else:
        axes = {"input": {0: "batch"}, "output": {0: "batch"}}
        torch.onnx.export(
            model,
            x,
            path,
            dynamo=False,
            opset_version=17,
            do_constant_folding=True,
            input_names=["input"],
            output_names=["output"],
            dynamic_axes=axes,
        )


def shapes(model):
    """Shape of every value at batch `BATCH`."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = BATCH
    del model.graph.value_info[:]
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    inferred = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    found = {}
    for value in [*inferred.value_info, *inferred.output]:
        dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
        if all(dims):
            found[value.name] = dims
    return found


def lighten(model, keep):
    """Notes away; unless `keep`, large weights too."""
    del model.metadata_props[:]
    del model.graph.value_info[:]
    model.graph.ClearField("doc_string")
    del model.graph.metadata_props[:]
    for node in model.graph.node:
        node.ClearField("doc_string")
        del node.metadata_props[:]
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]
        if not keep and len(tensor.raw_data) > 256:
            set_external_data(tensor, "weights-that-are-not-there.bin")
            tensor.ClearField("raw_data")


class Images(CalibrationDataReader):
    def __init__(self, name, shape):
        rng = np.random.default_rng(0)
        self.left = [{name: rng.standard_normal(shape).astype(np.float32)} for _ in range(4)]

    def get_next(self):
        return self.left.pop() if self.left else None


def network(name, model, size, expected, dynamo=False, keep=False):
    model.eval()
    x = torch.randn(BATCH, 3, size, size)
    counted = macs(model, x)
    path = HERE / f"{name}.onnx"
    export(model, x, path, dynamo)
    proto = onnx.load(path)
    found = shapes(proto)
    lighten(proto, keep)
    onnx.save(proto, path)
    expected[name] = {
        "batch": BATCH,
        "macs": counted,
        "params": sum(p.numel() for p in model.parameters()),
        "shapes": found,
    }


def unknown(expected):
    """A network with one operator that nobody reads (Det), and one that is mostly of that kind."""
    for name, copies in [("unknown-few", 1), ("unknown-many", 6)]:
        weight = numpy_helper.from_array(np.ones((8, 3, 3, 3), np.float32), "w")
        nodes = [helper.make_node("Conv", ["input", "w"], ["c0"], name="conv0", pads=[1, 1, 1, 1])]
        nodes += [helper.make_node("Relu", [f"c{i}"], [f"c{i + 1}"], name=f"relu{i}") for i in range(7)]
        last = "c7"
        for i in range(copies):
            nodes.append(helper.make_node("Mystery", [last], [f"m{i}"], name=f"mystery{i}", domain="example.org"))
            last = f"m{i}"
        nodes.append(helper.make_node("GlobalAveragePool", [last], ["output"], name="pool"))
        graph = helper.make_graph(
            nodes,
            name,
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 16, 16])],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 8, 1, 1])],
            [weight],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("example.org", 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), HERE / f"{name}.onnx")


def main():
    torch.manual_seed(0)
    np.random.seed(0)
    models = torchvision.models
    expected = {}
    network("tiny", Tiny(), 32, expected, keep=True)
    network("tiny-dynamo", Tiny(), 32, expected, dynamo=True)
    network("resnet18", models.resnet18(weights=None), 224, expected)
    network("mobilenet-v2", models.mobilenet_v2(weights=None), 224, expected)
    network("mobilenet-v3-small", models.mobilenet_v3_small(weights=None), 224, expected, dynamo=True)
    network("squeezenet", models.squeezenet1_1(weights=None), 224, expected)
    network("vgg11", models.vgg11(weights=None), 224, expected)
    for name, form in [("tiny-qdq", QuantFormat.QDQ), ("tiny-qlinear", QuantFormat.QOperator)]:
        quantize_static(
            HERE / "tiny.onnx",
            HERE / f"{name}.onnx",
            Images("input", (BATCH, 3, 32, 32)),
            quant_format=form,
            per_channel=form == QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        proto = onnx.load(HERE / f"{name}.onnx")
        lighten(proto, keep=True)
        onnx.save(proto, HERE / f"{name}.onnx")
        expected[name] = {"batch": BATCH, "macs": expected["tiny"]["macs"]}
    unknown(expected)
    (HERE / "expected.json").write_text(json.dumps(expected, separators=(",", ":"), sort_keys=True) + "\n")


main()
