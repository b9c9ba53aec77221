"""Bad input of insert_dsts, remove_dsts, freeze_dsts: the argument, what came, what was wanted; nothing is changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dsts_kernels import FusedDSTS, freeze_dsts, insert_dsts, remove_dsts

from .models import CHANNELS, CLIP, FRAMES, GRID, OPTIONS, Clips, Frames, Tokens, inserted


class Odd(nn.Module):
    """Submodules that no DSTS goes behind."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv3d(3, 4, 1)
        self.listed = nn.ModuleList([nn.Conv3d(4, 4, 1)])
        self.idle = nn.Conv3d(4, 4, 1)
        self.twice = nn.ReLU()
        self.walks = Walks()
        self.empty = nn.Sequential()
        self.text = Text()
        self.full = Full()
        self.pool = nn.Flatten()

    def forward(self, x):
        x = self.empty(self.walks(self.twice(self.listed[0](self.twice(self.body(x))))))
        self.text(x)
        return self.pool(self.full(x).mean((2, 3, 4)))


class Walks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(4, 4, 1), nn.ReLU()

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


class Text(nn.Module):
    def forward(self, x):
        return "text"


class Full(nn.Module):
    dsts = "taken"

    def forward(self, x):
        return x


def shared() -> nn.Module:
    act = nn.ReLU()
    return nn.Sequential(nn.Conv3d(3, 4, 1), nn.Sequential(act, act))


GIVEN = {"example": (1, 3, 4, 8, 8)}
TOKENS = {"grid": GRID, "class_tokens": 1, "example": CLIP}
REFUSED = {
    "no module": (lambda: "model", "stem", {}, r"model: got str 'model', wanted a torch.nn.Module"),
    "no name": (Clips, 3, {}, r"where: got int 3, wanted the name of a submodule"),
    "near": (
        Clips,
        "stage11",
        {},
        r"where: got 'stage11', wanted a submodule of Clips, such as 'stage1.1' or 'stage1'",
    ),
    "near within": (Clips, "stage1.0.cnv", {}, r"such as 'stage1.0.conv'"),
    "far": (Clips, "xyz", {}, r"where: got 'xyz', wanted a submodule of Clips, in 'stem', 'stage1', 'stage2', 'head'"),
    "list": (Odd, "listed", GIVEN, r"where: got 'listed', ModuleList, which never runs, .* such as 'listed.0'"),
    "idle": (
        Odd,
        "idle",
        GIVEN,
        r"where: got 'idle', which did not run in the dry run, wanted one that the model calls",
    ),
    "twice": (Odd, "twice", GIVEN, r"where: got 'twice', which runs 2 times in a pass, .*or both layout and channels"),
    "walks": (Odd, "walks", GIVEN, r"where: got 'walks', whose forward calls all its children in turn"),
    "empty": (Odd, "empty", GIVEN, r"where: got 'empty', Sequential without a child of its own to hold DSTS"),
    "shared": (shared, "1", GIVEN, r"where: got '1', Sequential without a child of its own to hold DSTS"),
    "text": (Odd, "text", GIVEN, r"where: got 'text', which returns str, wanted one that returns a tensor"),
    "taken": (Odd, "full", GIVEN, r"where: got 'full', whose 'full' has an attribute 'dsts'"),
    "pooled": (Odd, "pool", GIVEN, r"features behind 'pool': got a tensor of shape \(1, 4\), .*before pooling"),
    "layout": (Clips, "stem", {"layout": "BTCHW"}, r"layout: got 'BTCHW', wanted None or 'BCTHW' or 'BTHWC' or 'BNC'"),
    "channels": (Clips, "stem", {"channels": 0}, r"channels: got 0, wanted at least 1"),
    "channels type": (Clips, "stem", {"channels": "6"}, r"channels: got str '6', wanted an int"),
    "other channels": (
        Clips,
        "stem",
        {"layout": "BCTHW", "channels": 9} | GIVEN,
        r"channels: got 9, wanted 6 for feat",
    ),
    "no channels": (Clips, "stem", {"channels": 9} | GIVEN, r"layout: got None and channels=9, which fit none of them"),
    "other layout": (
        Clips,
        "stem",
        {"layout": "BNC", "grid": (1, 2, 3)} | GIVEN,
        r"layout: got 'BNC', wanted 'BCTHW' or",
    ),
    "TSN": (Frames, "stem", {"layout": "TSN"}, r"frames: got None, wanted the frames of a clip for layout 'TSN'"),
    "no frames": (
        Frames,
        "stem",
        {"example": FRAMES},
        r"frames: got None, .*'TSN' with channels=6, or 'BTHWC' with cha",
    ),
    "no example": (Frames, "stem", {}, r"example: got None for Frames, which has a 2-d convolution first, and frames"),
    "frames": (
        Frames,
        "stem",
        {"frames": 3, "example": FRAMES},
        r"got a tensor of shape \(8, .*wanted \(3\*B, 6, H, W\)",
    ),
    "frames of 5": (Clips, "stem", {"frames": 4} | GIVEN, r"frames: got 4, wanted None for features behind 'stem'"),
    "frames BCTHW": (Clips, "stem", {"frames": 4, "layout": "BCTHW"}, r"frames: got 4, wanted None for layout 'BCTHW'"),
    "no grid": (
        Tokens,
        "layer",
        {"example": CLIP},
        r"grid: got None, wanted \(T, H, W\) .*such as grid=\(2, 4, 4\), class_tokens=1",
    ),
    "BNC": (Tokens, "layer", {"layout": "BNC"}, r"grid: got None, wanted \(T, H, W\) of the tokens for layout 'BNC'"),
    "grid": (Tokens, "layer", TOKENS | {"grid": (4, 4)}, r"grid: got \(4, 4\), wanted 3 ints, \(T, H, W\)"),
    "grid size": (Tokens, "layer", TOKENS | {"grid": (2, 4, 0)}, r"grid: got 0, wanted at least 1"),
    "other grid": (
        Tokens,
        "layer",
        TOKENS | {"class_tokens": 0},
        r"features behind 'layer': got a tensor of shape \(2, 33, 6\), .*wanted \(B, 2\*4\*4, 6\), layout 'BNC'",
    ),
    "grid of 5": (
        Clips,
        "stem",
        GIVEN | {"grid": GRID},
        r"grid: got \(2, 4, 4\), wanted none for features behind 'stem'",
    ),
    "grid TSN": (Frames, "stem", {"layout": "TSN", "frames": 4, "grid": (2, 2)}, r"grid: got \(2, 2\), wanted None"),
    "class tokens": (Clips, "stem", {"layout": "BCTHW", "class_tokens": 1}, r"class_tokens: got 1, wanted 0"),
    "output": (Clips, "stem", GIVEN | {"output": 0}, r"output: got 0, wanted None: 'stem' returns a tensor"),
    "no place": (
        lambda: Tokens(lambda x: (x, 1)),
        "layer",
        TOKENS | {"output": 2},
        r"output: got 2, wanted the place of the features in the tuple that 'layer' returns: 0: a tensor of .*, 1: int",
    ),
    "example": (Clips, "stem", {"example": "clip"}, r"example: got str 'clip', wanted a clip, its shape"),
    "example sizes": (Clips, "stem", {"example": (1, 3, 4, 0, 8)}, r"example: got \(1, 3, 4, 0, 8\), wanted a shape"),
    "example taken": (
        Clips,
        "stem",
        {"example": (1, 9, 4, 8, 8)},
        r"example: got tuple \(1, 9.*that Clips takes: Runtim",
    ),
    "example keyword": (Clips, "stem", {"example": {"clip": 3}}, r"example: got \{'clip': int 3\}, wanted .*TypeError"),
    "option": (Clips, "stem", GIVEN | {"neurons": 3}, r"FusedDSTS: got an argument 'neurons', wanted one of"),
    "option value": (Clips, "stem", GIVEN | {"num_neurons": 0}, r"num_neurons: got 0, wanted at least 1"),
    "dsts": (Clips, "stem", GIVEN | {"dsts": nn.ReLU()}, r"dsts: got ReLU ReLU\(\), wanted FusedDSTS, FrozenDSTS"),
    "dsts options": (
        Clips,
        "stem",
        GIVEN | {"dsts": FusedDSTS(6, num_neurons=2), "num_neurons": 2},
        r"num_neurons: got an option beside dsts",
    ),
    "dsts channels": (
        Clips,
        "stem",
        GIVEN | {"dsts": FusedDSTS(4, num_neurons=2), "layout": "BCTHW"},
        r"channels: got 4, wanted 6 for features",
    ),
    "lazy": (lambda: nn.Sequential(nn.LazyConv3d(4, 1)), "0", GIVEN, r"model: got '0.weight' without values"),
}


@pytest.mark.parametrize("make, where, options, says", REFUSED.values(), ids=REFUSED)
def test_refused(make, where, options, says):
    """Each by its own words, and the model is as it was."""
    model = make()
    before = repr(model)
    if isinstance(model, nn.Module):
        keys = list(dict(model.named_modules())), list(model.state_dict())
    with pytest.raises((TypeError, ValueError), match=says):
        insert_dsts(model, where, **({"num_neurons": 2} if "dsts" not in options else {}) | options)
    if isinstance(model, nn.Module):
        assert (list(dict(model.named_modules())), list(model.state_dict())) == keys and repr(model) == before
        assert not any(m._forward_hooks for m in model.modules())


def test_ambiguous():
    """Features that may be read in two ways: both are offered, and either may be taken."""
    model = nn.Sequential(nn.Conv3d(3, 4, 1))
    says = r"layout: got None, which fit several .* wanted layout='BCTHW' with channels=4 or 'BTHWC' with channels=8"
    with pytest.raises(ValueError, match=says):
        insert_dsts(model, "0", example=(1, 3, 8, 8, 8), num_neurons=2)
    for chosen, channels in (({"layout": "BTHWC"}, 8), ({"channels": 4}, 4), ({"layout": "BCTHW"}, 4)):
        dsts = insert_dsts(model, "0", example=(1, 3, 8, 8, 8), num_neurons=2, **chosen)
        assert dsts.layers[0].in_channels == channels
        remove_dsts(model)


def test_behind_one_already():
    """Twice behind one submodule, or where one stands already: the first stays."""
    model, dsts, _ = inserted("BCTHW")
    with pytest.raises(
        ValueError, match=r"where: got 'stage1', which has DSTS behind it, wanted remove_dsts\(model, 's"
    ):
        insert_dsts(model, "stage1", example=CLIP, **OPTIONS)
    with pytest.raises(ValueError, match=r"where: got 'stage1.1', whose 'stage1.1' has an attribute 'dsts'"):
        insert_dsts(model, "stage1.1", example=CLIP, **OPTIONS)
    assert model.stage1[1].dsts is dsts


USES = {
    "grid": (
        "BNC",
        torch.randn(2, 3, 4, 8, 6),
        r"features behind 'layer': got .*wanted \(B, 1 \+ 2\*4\*4, 6\), layout",
    ),
    "frames": (
        "TSN",
        torch.randn(6, 3, 8, 8),
        r"features behind 'stage': got .*wanted \(4\*B, 6, H, W\), layout 'TSN'",
    ),
}


@pytest.mark.parametrize("kind, x, says", USES.values(), ids=USES)
def test_features_that_differ_at_use(kind, x, says):
    """Another grid or number of frames than in the dry run."""
    model, _, _ = inserted(kind)
    with pytest.raises(ValueError, match=says):
        model(x)


def test_rank_that_differs_at_use():
    """``nn.Conv3d`` takes one clip without a batch; DSTS does not, and says where it stands."""
    model = nn.Sequential(nn.Conv3d(3, 6, 1))
    insert_dsts(model, "0", example=CLIP, **OPTIONS)
    with pytest.raises(
        ValueError, match=r"features behind '0': got .*\(6, 4, 8, 8\).*wanted \(B, 6, T, H, W\), layout"
    ):
        model(torch.randn(CLIP[1:]))


def test_channels_that_differ_at_use():
    """A submodule that was exchanged afterwards."""
    model, _, x = inserted("BTHWC")
    model.patches, model.norm.normalized_shape = nn.Conv3d(3, 5, 2, stride=2), (5,)
    model.norm.weight, model.norm.bias = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    with pytest.raises(ValueError, match=r"features behind 'norm': got .*2, 4, 4, 5\).*wanted \(B, T, H, W, 6\)"):
        model(x)


def test_a_submodule_that_runs_twice():
    """With layout and channels given it is watched by one DSTS at every run."""
    model = Odd()
    dsts = insert_dsts(model, "twice", layout="BCTHW", channels=4, num_neurons=2)
    runs = []
    dsts.register_forward_hook(lambda m, args, out: runs.append(1))
    model(torch.randn(1, 3, 2, 4, 4))
    assert len(runs) == 2


def test_nothing_to_remove_or_freeze():
    """None at all, none there, none of that name; those that are there are named."""
    with pytest.raises(ValueError, match=r"model: got Clips, wanted .*the model has none that insert_dsts\(\) put in"):
        remove_dsts(Clips())
    with pytest.raises(ValueError, match=r"model: got Clips without FusedDSTS, wanted one with FusedDSTS in it"):
        freeze_dsts(Clips())
    with pytest.raises(ValueError, match=r"model: got FusedDSTS, wanted a model that holds one"):
        freeze_dsts(FusedDSTS(4, num_neurons=2))
    for function in (remove_dsts, freeze_dsts):
        with pytest.raises(TypeError, match=r"model: got NoneType None, wanted a torch.nn.Module"):
            function(None)
    model, dsts, _ = inserted("BCTHW")
    with pytest.raises(ValueError, match=r"where: got 'stage2', wanted .*the model has it behind 'stage1'"):
        remove_dsts(model, "stage2")
    with pytest.raises(ValueError, match=r"where: got 'stage', wanted a submodule of Clips, such as"):
        remove_dsts(model, "stage")
    freeze_dsts(model.eval())
    with pytest.raises(ValueError, match=r"model: got Clips, whose DSTS is frozen already"):
        freeze_dsts(model)
    assert dsts not in list(model.modules())


WRAPPERS = {
    "compiled": (lambda model: torch.compile(model, backend="eager"), "_orig_mod.", "OptimizedModule"),
    "compiled in place": (lambda model: model.compile(backend="eager") or model, "", "compiled code"),
    "data parallel": (nn.DataParallel, "module.", "DataParallel"),
}


@pytest.mark.parametrize("wrap, prefix, kind", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_models(wrap, prefix, kind):
    """What took down parameters or code of the model would not see DSTS come or go."""
    model, _, _ = inserted("BCTHW")
    wrapped = wrap(copy.deepcopy(model).eval())
    says = rf"model: got {kind} at '', wanted the model before it is wrapped or compiled"
    for change in (
        lambda: insert_dsts(wrapped, f"{prefix}stage2", layout="BCTHW", channels=CHANNELS, **OPTIONS),
        lambda: insert_dsts(wrapped, "stage2"),
        lambda: remove_dsts(wrapped),
        lambda: remove_dsts(wrapped, "stage2"),
        lambda: freeze_dsts(wrapped),
    ):
        with pytest.raises(ValueError, match=says):
            change()
    assert sum(isinstance(m, FusedDSTS) for m in wrapped.modules()) == 1


@pytest.mark.parametrize("inside", ["", ".layers", ".layers.0"])
def test_no_dsts_behind_dsts(inside):
    """Freezing takes the outer one's parts away, and would take such a one along."""
    model, dsts, _ = inserted("BCTHW")
    name = next(name for name, module in model.named_modules() if module is dsts)
    with pytest.raises(ValueError, match=rf"where: got '{name}{inside}', which is '{name}' or in it, a DSTS module"):
        insert_dsts(model, name + inside, layout="BCTHW", channels=CHANNELS, **OPTIONS)
    assert sum(isinstance(m, FusedDSTS) for m in model.modules()) == 1


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_freezing_drops_no_hook(hook):
    model, dsts, x = inserted("BCTHW")
    handle = getattr(dsts.eval(), hook)(lambda *args: None)
    name = next(name for name, module in model.named_modules() if module is dsts)
    with pytest.raises(ValueError, match=rf"model: got a forward hook on '{name}', wanted none"):
        freeze_dsts(model.eval())
    assert any(module is dsts for module in model.modules())
    handle.remove()
    assert freeze_dsts(model)(x).isfinite().all()


def test_freezing_wants_evaluation():
    model, dsts, _ = inserted("BCTHW")
    with pytest.raises(ValueError, match=r"model: got Clips in training mode, wanted evaluation: model\.eval\(\)"):
        freeze_dsts(model.train())
    assert any(module is dsts for module in model.modules())


class ChannelsLast(nn.Sequential):
    """Features ``(B, T, H, W, 6)`` behind ``"last"``, and pooled ones behind ``"pooled"``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 6, 1)
        self.last = nn.Identity()
        self.pooled = nn.AdaptiveAvgPool3d(1)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        x = self.last(self.stem(clip).permute(0, 2, 3, 4, 1))
        return self.pooled(x.permute(0, 4, 1, 2, 3))


def test_a_layout_that_the_clip_speaks_against():
    """Channels-last features under ``layout="BCTHW"`` would be frames for channels, and run without a word."""
    clip = (1, 3, 4, 16, 16)
    with pytest.raises(ValueError, match=r"layout: got 'BCTHW', whose T, H, W are not .*wanted 'BTHWC', or channels="):
        insert_dsts(ChannelsLast(), "last", num_neurons=2, example=clip, layout="BCTHW")
    taken = insert_dsts(ChannelsLast(), "last", num_neurons=2, layout="BCTHW", channels=4)  # both: it is so
    assert taken.layers[0].in_channels == 4
    last = insert_dsts(ChannelsLast(), "last", num_neurons=2, example=clip, layout="BTHWC")
    assert last.layers[0].in_channels == 6


def test_features_of_one_position():
    """Behind pooling a convolution sees nothing beside its own position."""
    with pytest.warns(UserWarning, match=r"features behind 'pooled': got .* of one position, .*before pooling") as seen:
        insert_dsts(ChannelsLast(), "pooled", num_neurons=2, example=(1, 3, 4, 16, 16))
    assert seen[0].filename == __file__
