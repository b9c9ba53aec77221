"""The short examples as their head says to run them: each learns, and says what is wrong with its options."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch

from dsts_kernels import FrozenDSTS

ROOT = Path(__file__).resolve().parents[2]
ALONE = ("amp", "gaternet", "discrete_bottleneck")  # need nothing but the package


@pytest.fixture
def example(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(f"examples.{request.param}")


def tenths(losses: list[float]) -> tuple[float, float]:
    """Means over the first and the last tenth of the steps."""
    count = max(len(losses) // 10, 1)
    return sum(losses[:count]) / count, sum(losses[-count:]) / count


def assert_learns(losses: list[float], share: float) -> None:
    """The loss falls to this share of what it was: about twice what was seen with several seeds."""
    first, last = tenths(losses)
    assert last < share * first, losses


def printed(capsys: pytest.CaptureFixture, pattern: str) -> list[float]:
    """The numbers that an example prints in this place."""
    found = re.search(pattern, text := capsys.readouterr().out)
    assert found is not None, text
    return [float(number) for number in found.groups()]


@pytest.mark.parametrize("learning", ["joint", "upstream-downstream"])
def test_amp(learning, monkeypatch):
    """Both ways; DSTS gets bfloat16 features inside autocast, and its weights stay float32."""
    from examples import amp

    seen = []

    def watched() -> torch.nn.Module:
        model = small_model()
        model.dsts.register_forward_hook(lambda module, args, y: seen.append((y.dtype, module.layers[0].spatial.dtype)))
        return model

    small_model = amp.small_model
    monkeypatch.setattr(amp, "small_model", watched)
    assert_learns(amp.main(["--learning", learning]), 0.7)
    assert set(seen) == {(torch.bfloat16, torch.float32)}


@pytest.mark.gpu
@pytest.mark.parametrize("learning", ["joint", "upstream-downstream"])
def test_amp_on_a_gpu(learning):
    """float16 with a gradient scaler."""
    from examples import amp

    assert_learns(amp.main(["--learning", learning, "--device", "cuda"]), 0.7)


def test_gaternet(capsys):
    """The gates choose by image, and enough of them to tell the directions."""
    from examples import gaternet

    assert_learns(gaternet.main([]), 0.3)
    top1, opened, chosen = printed(capsys, r"top-1 (\S+)%; (\d+)% of the gates are open; (\d+) of 48 filters by image")
    assert top1 > 80 and 5 < opened < 95 and chosen > 4


def test_gaternet_penalty(capsys):
    """It closes gates."""
    from examples import gaternet

    opened = []
    for penalty in ("0", "3"):
        gaternet.main(["--penalty", penalty])
        opened += printed(capsys, r"(\d+)% of the gates are open")
    assert opened[1] < opened[0] - 10


def test_discrete_bottleneck(capsys):
    """Letters come back from bits alone, so words have codes of their own."""
    from examples import discrete_bottleneck

    assert_learns(discrete_bottleneck.main([]), 0.2)
    right, codes = printed(capsys, r"(\S+)% of the letters come back from bits; 32 words have (\d+) codes of 8 bits")
    assert right > 90 and codes > 28


def test_too_few_bits(capsys):
    """Two bits are four codes: no decoder tells 32 words from them."""
    from examples import discrete_bottleneck

    discrete_bottleneck.main(["--bits", "2"])
    right, codes = printed(capsys, r"(\S+)% of the letters come back from bits; 32 words have (\d+) codes of 2 bits")
    assert right < 50 and codes <= 4


@pytest.mark.needs("timm")
def test_timm_frames(torchvision, monkeypatch):
    """Trained with DSTS on clips, evaluated frozen."""
    from examples import timm_frames

    frozen = []
    freeze = timm_frames.freeze_dsts
    monkeypatch.setattr(timm_frames, "freeze_dsts", lambda model: frozen.append(freeze(model)))
    assert_learns(timm_frames.main([]), 0.7)
    (model,) = frozen
    assert [name for name, part in model.named_modules() if isinstance(part, FrozenDSTS)] == ["act1.dsts"]


@pytest.mark.needs("timm")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--where", "layer9"], "where: got 'layer9', wanted a submodule of ResNet, such as"),
        (["--where", "fc"], "wanted"),
        (["--model", "no_such"], "--model: got 'no_such', wanted one of timm.list_models()"),
    ],
)
def test_timm_options(torchvision, options, says, capsys):
    from examples import timm_frames

    assert_refused(timm_frames, options, says, capsys)


@pytest.mark.needs("lightning", "torchvision")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("learning", ["joint", "upstream-downstream"])
def test_lightning(torchvision, learning):
    """As many steps as the trainer was asked for: it counts those of manual optimisation, too."""
    from examples import lightning_module

    losses = lightning_module.main(["--learning", learning, "--steps", "50"])
    assert len(losses) == 50
    assert_learns(losses, 0.75)


@pytest.mark.needs("lightning", "torchvision")
def test_lightning_in_several_processes(torchvision):
    """Where Lightning wraps the module the learner would not average gradients: an error says what does."""
    from examples import lightning_module

    model = lightning_module.DSTSClassifier(1e-2)
    model._trainer = Mock(world_size=2)
    with pytest.raises(ValueError, match=r"devices: got 2 processes, wanted one: examples/distributed.py"):
        model.on_fit_start()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no process groups")
@pytest.mark.parametrize("wrap, learning", [("ddp", "joint"), ("fsdp", "upstream-downstream")])
def test_distributed(wrap, learning):
    """Two processes over gloo, by torchrun."""
    if wrap == "fsdp" and not hasattr(torch.cpu.current_stream(), "record_event"):
        pytest.skip("fully_shard of this torch (2.6) has no CPU")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / "distributed.py"), "--wrap", wrap, "--learning", learning]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = re.findall(r"loss: (\S+) at first, (\S+) after 40 steps", done.stdout)  # of one process alone
    assert float(found[1]) < 0.75 * float(found[0])


def test_distributed_without_torchrun(monkeypatch, capsys):
    from examples import distributed

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert_refused(distributed, [], "wanted: torchrun --nproc-per-node 2 examples/distributed.py", capsys)


@pytest.mark.parametrize("example", ALONE, indirect=True)
def test_same_seed_same_losses(example, capsys):
    """Twice the same; another seed differs."""
    first, second, other = (example.main(["--steps", "3", "--seed", seed]) for seed in ("1", "1", "2"))
    assert first == second != other and len(first) == 3


@pytest.mark.parametrize("example", ALONE, indirect=True)
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--steps", "0"], "argument --steps: got '0', wanted an integer of at least 1"),
        (["--rate", "nan"], "argument --rate: got 'nan', wanted a number above 0"),
        (["--device", "toaster"], "argument --device: got 'toaster', wanted cpu or cuda"),
        (["--device", "meta"], "argument --device: got 'meta', wanted cpu or cuda"),
    ],
)
def test_options(example, options, says, capsys):
    assert_refused(example, options, says, capsys)


def test_no_gpu(monkeypatch, capsys):
    from examples import amp

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(amp, ["--device", "cuda"], "argument --device: got 'cuda', wanted cpu: torch sees no GPU", capsys)


def test_bad_penalty(capsys):
    from examples import gaternet

    assert_refused(gaternet, ["--penalty", "-1"], "--penalty: got -1.0, wanted a number of at least 0", capsys)


def assert_refused(example: ModuleType, options: list[str], says: str, capsys: pytest.CaptureFixture) -> None:
    """Exit code 2, one line of error, nothing run."""
    with pytest.raises(SystemExit) as stop:
        example.main(options)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("error:") == 1 and says in error
