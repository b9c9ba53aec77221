"""DSTS in a LightningModule that trains jointly or, by manual optimisation, with Upstream-Downstream Learning.

    python examples/lightning_module.py
    python examples/lightning_module.py --learning joint

Joint training is Lightning's own loop over one optimizer. The paper's Algorithm 1 is three passes a step over two
batches, so there the module optimises by itself: ``UpstreamDownstream`` takes the step, the loader gives both parts.

Needs lightning: ``pip install -e '.[examples]' -c constraints.txt``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dsts_kernels.learning import UpstreamDownstream, downstream_parameters, split_train_val, upstream_parameters
from examples.small import parser, report, small_model, stripes


class DSTSClassifier(lightning.LightningModule):
    """A model with DSTS in it; ``by_sides`` trains it with Upstream-Downstream Learning."""

    def __init__(self, rate: float, by_sides: bool = True) -> None:
        super().__init__()
        self.model, self.rate, self.learner = small_model(), rate, None
        self.automatic_optimization = not by_sides
        self.losses: list[float] = []

    def configure_optimizers(self):
        downstream = torch.optim.AdamW(downstream_parameters(self.model), self.rate)
        gates = {"params": upstream_parameters(self.model), "lr": self.rate / 4, "weight_decay": 0.0}
        if self.automatic_optimization:
            downstream.add_param_group(gates)
            return downstream
        return torch.optim.AdamW([gates]), downstream

    def on_fit_start(self) -> None:
        if self.automatic_optimization:
            return
        if self.trainer.world_size > 1:  # Lightning wraps this module, and the learner would not see it
            count = self.trainer.world_size
            raise ValueError(f"devices: got {count} processes, wanted one: examples/distributed.py has a way for more")
        upstream, downstream = self.optimizers(use_pl_optimizer=False)
        self.learner = UpstreamDownstream(
            self.model, F.cross_entropy, upstream_optimizer=upstream, downstream_optimizer=downstream, clip_norm=5.0
        )

    def training_step(self, batch, index: int):
        if self.automatic_optimization:
            clips, labels = batch
            loss = F.cross_entropy(self.model(clips), labels)
            self.losses.append(loss.item())
        else:
            loss = None  # nothing is left for Lightning to do
            self.losses.append(self.learner.step(batch["train"], batch["val"]).train_loss)
            # It counts steps of optimizers that it wraps, though; max_steps and checkpoints go by this number.
            self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.increment_completed()
        self.log("train_loss", self.losses[-1], prog_bar=True)
        return loss


def loader(by_sides: bool, batch: int):
    """All clips, or both parts side by side, the smaller one again from its start."""
    data = TensorDataset(*stripes(512))
    if not by_sides:
        return DataLoader(data, batch, shuffle=True)
    train, val = (DataLoader(part, batch, shuffle=True) for part in split_train_val(data, 0.25, seed=0))
    return CombinedLoader({"train": train, "val": val}, "max_size_cycle")


def main(arguments: list[str] | None = None) -> list[float]:
    this = parser(__doc__, steps=60)
    this.add_argument("--learning", choices=("joint", "upstream-downstream"), default="upstream-downstream")
    options = this.parse_args(arguments)
    lightning.seed_everything(options.seed, verbose=False)
    by_sides = options.learning == "upstream-downstream"
    model = DSTSClassifier(options.rate, by_sides)
    accelerator = "gpu" if options.device.type == "cuda" else "cpu"
    length = {"max_steps": options.steps, "max_epochs": options.steps}  # whichever is reached first
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator=accelerator, devices=1, **length, **quiet)
    trainer.fit(model, loader(by_sides, batch=16))
    return report(model.losses)


if __name__ == "__main__":
    main()
