"""ONNX of frozen modules, run by onnxruntime, against ours: every option, several routes, open sizes, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dsts_kernels import deploy
from dsts_kernels.testing import assert_close

from .support.classifiers import Classifier, frozen_classifier
from .support.modules import features_for, pair, reference_output
from .test_deploy import CENTRED, OPTIONS

pytestmark = pytest.mark.needs("onnx", "onnxscript", "onnxruntime")


def run(path, *inputs: Tensor) -> list[Tensor]:
    """What onnxruntime computes, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {given.name: x.numpy() for given, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feed)]


class Beside(nn.Module):
    """Modules on the same features, for one export of all: output, neurons and scores of each."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> list[Tensor]:
        results = []
        for module in self.each:
            y, routing = module(x, return_routing=True)
            results += [y, routing.neuron, routing.scores]
        return results


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_every_option(dtype, tmp_path):
    """Each sample takes its own route through every kind of module: outputs, neurons and scores of ours."""
    kinds = [dict(num_neurons=4) | options | dict(num_layers=1) for options in OPTIONS.values()]
    pairs = [pair(8, dtype, **options) for options in kinds]
    model = Beside([fused.eval().freeze() for _, fused in pairs]).eval()
    x = torch.randn(4, 8, 3, 4, 5).to(dtype)
    x = torch.cat([x, -x])  # whose scores in the first layer are opposite
    for ref, _ in pairs:
        x = features_for(ref, x)
    deploy.to_onnx(model, x, tmp_path / "model.onnx")
    wanted, got = model(x), run(tmp_path / "model.onnx", x)
    for index, name in enumerate(OPTIONS):
        (y, neuron, scores), (own_y, own_neuron, own_scores) = (r[3 * index : 3 * index + 3] for r in (got, wanted))
        assert y.dtype == dtype and torch.equal(neuron, own_neuron), name
        assert name == "one-neuron" or len(neuron.unique()) > 1, name
        assert_close(y, own_y, name=name, factor=2)
        assert_close(scores, own_scores, dtype=dtype, name=f"scores of {name}", factor=2)


def test_classifier_of_any_size(tmp_path):
    """A whole model: opset 18, every size open, nothing of ours in the file, no file half written."""
    import onnx

    model, path = frozen_classifier(num_layers=2), tmp_path / "sub" / "model.onnx"
    sizes = [{0: "batch", 2: "frames", 3: "height", 4: "width"}]
    path.parent.mkdir()
    (path.parent / "model.onnx.data").write_text("weights of an older file")
    deploy.to_onnx(model, torch.randn(2, 3, 4, 8, 8), path, dynamic_shapes=sizes)
    written = onnx.load(path)
    onnx.checker.check_model(written, full_check=True)
    assert {entry.domain: entry.version for entry in written.opset_import}[""] >= 18
    assert {node.domain for node in written.graph.node} <= {""}
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    for size in ((1, 3, 4, 8, 8), (5, 3, 4, 8, 8), (3, 3, 6, 12, 10), (2, 3, 1, 2, 2)):
        x = torch.randn(size)
        assert_close(run(path, x)[0], model(x), factor=2)


def test_a_centre_of_scores(tmp_path):
    """Neurons and scores less the centre, of summed and of averaged scores."""
    pairs = [pair(8, torch.float32, num_layers=1, num_neurons=4, **options) for options in CENTRED.values()]
    x = torch.randn(8, 8, 3, 4, 5)
    for ref, _ in pairs:
        x = features_for(ref, x)
    model = Beside([fused.eval().freeze() for _, fused in pairs]).eval()
    deploy.to_onnx(model, x, tmp_path / "model.onnx")
    got = run(tmp_path / "model.onnx", x)
    for index, (ref, _) in enumerate(pairs):
        y, neuron, scores = got[3 * index : 3 * index + 3]
        wanted, routing = reference_output(ref, x)
        assert torch.equal(neuron, routing.neuron)
        assert_close(y, wanted, factor=2)
        assert_close(scores, routing.scores, dtype=torch.float32, factor=2)


@pytest.mark.slow
def test_one_clip_leaves_the_batch_open(tmp_path):
    """An example of one clip does not fix the batch."""
    model = frozen_classifier(num_layers=1)
    deploy.to_onnx(model, torch.randn(1, 3, 2, 4, 4), tmp_path / "model.onnx")
    x = torch.randn(4, 3, 2, 4, 4)
    assert_close(run(tmp_path / "model.onnx", x)[0], model(x), factor=2)


def test_refuses(tmp_path):
    """bfloat16, by the name of the weight, and what cannot be deployed at all; the file that was there stays."""
    path = tmp_path / "model.onnx"
    path.write_text("before")
    x = torch.randn(2, 3, 2, 4, 4)
    with pytest.raises(TypeError, match=r"stem\.0\.weight: got torch.bfloat16, wanted float32, float64 or float16"):
        deploy.to_onnx(frozen_classifier().bfloat16(), x.bfloat16(), path)
    with pytest.raises(TypeError, match=r"stem\.0\.weight: got torch.float64, wanted float32 or float16"):
        deploy.to_onnx(frozen_classifier().double(), x.double(), path)
    with pytest.raises(ValueError, match=r"model\.dsts\.layers\.0: got a DSTSLayer"):
        deploy.to_onnx(Classifier().eval(), x, path)
    with pytest.raises(ValueError, match=r"path: got the folder '.*', wanted the name of a file"):
        deploy.to_onnx(frozen_classifier(), x, tmp_path)
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1
