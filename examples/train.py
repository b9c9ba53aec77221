"""Train a video classifier with or without DSTS, jointly or by Upstream-Downstream Learning.

    python examples/train.py                                    # the synthetic task, a few minutes on two cores
    python examples/train.py --recipe ours                      # neurons that specialise
    python examples/train.py --learning joint --no-dsts
    python examples/train.py --backbone tpn --width 8 --size 64
    torchrun --nproc-per-node 2 examples/train.py --out runs/two
    python examples/train.py --resume                           # from the end of the last whole epoch

One epoch at a time: train, count the routing, evaluate, write TensorBoard's events and one checkpoint, atomically.
``python -m dsts_kernels plot runs/synthetic/checkpoint.pt`` draws what the neurons specialise in, and
``python -m dsts_kernels classify CLIP --model runs/synthetic/checkpoint.pt`` classifies a video.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dsts_kernels import files
from dsts_kernels.backbones import classification_loss
from dsts_kernels.classify.classifier import usable
from dsts_kernels.classify.config import CLASSIFIER
from dsts_kernels.data.named import SYNTHETIC, build_data
from dsts_kernels.learning import (
    RoutingMonitor,
    UpstreamDownstream,
    both_ways,
    generator_states,
    load_checkpoint,
    restore_generators,
    save_checkpoint,
    split_train_val,
)
from examples import start
from examples.options import classifier_config, parse, parser

WARM_UP = 0.15  # of the steps, to the full learning rate
SHOWN, ALIKE = 6, 2  # classes, and test clips of each, whose frames go into a checkpoint


def rate_share(step: int, steps: int) -> float:
    """Linear to 1, then a half cosine to 0."""
    done = (step + 1) / steps
    if done < WARM_UP:
        return done / WARM_UP
    angle = torch.tensor((done - WARM_UP) / (1 - WARM_UP) * torch.pi, device="cpu")
    return 0.5 * (1 + torch.cos(angle).item())


def cycled(loader: DataLoader) -> Iterator[list[Tensor]]:
    while True:
        yield from loader


PACKAGES = ("torchmetrics.classification", "torch.utils.tensorboard", "tqdm")


def import_packages(options: argparse.Namespace) -> None:
    """What is needed later, now: before any work is done that would be lost.

    Raises:
        ImportError: names what is missing, or does not load, and how to get it.
    """
    packages = PACKAGES if options.data in SYNTHETIC else (*PACKAGES, "av")
    missing = []
    for name in packages:
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision made for another torch
            absent = getattr(error, "name", None)
            if not isinstance(error, ModuleNotFoundError) or absent not in (name.split(".")[0], "tensorboard"):
                raise ImportError(
                    f"{name}: cannot be imported ({error}), wanted: pip install -e '.[train]' -c constraints.txt; "
                    "where the error names torchvision, one made for the torch that is installed, or none"
                ) from error
            missing.append(absent)
    if missing:
        raise ImportError(
            f"not installed: {', '.join(missing)}; wanted the extra train: pip install -e '.[train]' -c constraints.txt"
        )


def prepare(options: argparse.Namespace) -> None:
    """Packages, device and threads, before any work.

    Raises:
        ImportError: a package is missing.
        ValueError: no such device.
    """
    import_packages(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    if "LOCAL_RANK" in os.environ and options.device.startswith("cuda"):
        options.device = f"cuda:{int(os.environ['LOCAL_RANK'])}"
    try:
        found = usable(options.device)
    except ValueError as error:
        raise ValueError(f"--{error}") from error
    if found.type == "cuda":
        torch.cuda.set_device(found)


class Trainer:
    """Model, data, optimizers and the loop; everything that a checkpoint holds."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.device = torch.device(options.device)
        torch.manual_seed(options.seed)
        self.train_set, self.test_set = build_data(options)
        self.config = classifier_config(options, self.train_set.class_names)
        weights = None if options.resume else options.weights  # a checkpoint has all weights
        self.model = self.config.build(weights=weights, literal=options.literal).to(self.device)
        if options.init is not None and not options.resume:
            start.take_weights(self.model, options.init)
        if options.freeze_backbone:
            for p in start.backbone_parameters(self.model, options.backbone):
                p.requires_grad_(False)
        self.monitor = RoutingMonitor(self.model, keep=True) if options.dsts and not options.literal else None
        self.wrapped: nn.Module = self.model
        if self.world > 1:
            if self.device.type == "cuda":
                self.model = self.wrapped = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
            self.wrapped = DistributedDataParallel(self.model)
        self.optimizers = start.optimizers(self.model, options)
        self.learner = None
        if options.learning == "upstream-downstream":
            self.learner = UpstreamDownstream(
                self.wrapped,
                classification_loss,
                upstream_optimizer=self.optimizers[1],
                downstream_optimizer=self.optimizers[0],
                clip_norm=options.clip_norm,
                balance=options.balance,
                balance_on=options.balance_on,
                warm_up=options.warm_up,
                second_order=options.second_order,
            )
            parts = split_train_val(self.train_set, options.fraction, options.seed)
            self.loaders = [self.loader(part, shuffle=False) for part in parts]  # drawn anew by set_epoch
        else:
            self.loaders = [self.loader(self.train_set, shuffle=True)]
        self.steps = len(self.loaders[0]) * (2 if options.both_ways else 1)
        if not min(map(len, self.loaders)):
            size = len(self.train_set)
            raise ValueError(f"--batch: got {options.batch}, wanted at most what {size} clips give each process")
        self.schedule = start.noise_schedule(self.model, options, self.steps * options.epochs)
        self.rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        self.epoch, self.history = 0, []
        torch.manual_seed(options.seed + 7919 * (self.rank + 1))  # noise of its own in every process

    def loader(self, data: Dataset, shuffle: bool) -> DataLoader:
        """This process's share of a dataset, in batches of one size."""
        sampler = DistributedSampler(data, self.world, self.rank, shuffle, self.options.seed, drop_last=True)
        return DataLoader(data, self.options.batch, sampler=sampler, drop_last=True, num_workers=self.options.workers)

    def to_device(self, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        clips, labels = batch
        return clips.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def set_rates(self, step: int) -> None:
        share = rate_share(step, self.steps * self.options.epochs)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate * share

    def losses(self) -> Iterator[tuple[float, float]]:
        """One epoch, a step at a time: training loss, and validation loss where there is one."""
        for loader in self.loaders:
            for part in (loader.dataset, loader.sampler):
                if hasattr(part, "set_epoch"):
                    part.set_epoch(self.epoch)
        parts = [self.loaders[0], *map(cycled, self.loaders[1:])]  # the validation part is the smaller one
        batches_of_steps = zip(*parts, strict=False)
        for index, batches in enumerate(both_ways(batches_of_steps) if self.options.both_ways else batches_of_steps):
            self.set_rates(self.epoch * self.steps + index)
            pairs = [self.to_device(batch) for batch in batches]
            if self.learner is not None:
                result = self.learner.step(*pairs)
                self.end_step()
                yield result.train_loss, result.val_loss
                continue
            loss = classification_loss(self.wrapped(pairs[0][0]), pairs[0][1])
            if not loss.isfinite():
                raise FloatingPointError(f"loss: is {loss.item()} in epoch {self.epoch}; a lower --rate may help")
            total = loss
            if self.options.balance:
                total = loss + self.options.balance * self.monitor.balance(self.options.balance_on == "evaluation")
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            total.backward()
            if self.options.clip_norm:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
            for optimizer in self.optimizers:
                optimizer.step()
            self.end_step()
            yield loss.item(), float("nan")

    def end_step(self) -> None:
        if self.schedule is not None:
            self.schedule.step()

    def run_epoch(self) -> dict[str, Any]:
        """Train and evaluate one epoch; its record."""
        from tqdm import tqdm

        self.wrapped.train()
        if self.options.freeze_backbone:
            start.still(self.model, self.options.backbone)
        if self.monitor is not None:
            self.monitor.reset()
        began, seen = time.perf_counter(), []
        unseen = self.rank > 0 or self.options.quiet or not sys.stderr.isatty()  # report() has a line for each epoch
        with tqdm(total=self.steps, desc=f"epoch {self.epoch}", disable=unseen) as bar:
            for train_loss, val_loss in self.losses():
                seen.append((train_loss, val_loss))
                bar.update()
                bar.set_postfix(loss=f"{train_loss:.3f}")
        train_loss, val_loss = torch.tensor(seen, dtype=torch.float64, device="cpu").nanmean(0).tolist()
        record = {"epoch": self.epoch, "train_loss": train_loss, "seconds": time.perf_counter() - began}
        if val_loss == val_loss:
            record["val_loss"] = val_loss
        record |= {} if self.schedule is None else self.schedule.values
        if self.monitor is not None:
            found = self.monitor.statistics()
            record |= {name: getattr(found, name).tolist() for name in found._fields if name != "samples"}
        return record

    @torch.no_grad()
    def evaluate(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Top-1 and class-wise accuracy on the test set, and what it was routed to."""
        from torchmetrics.classification import MulticlassAccuracy

        self.model.eval()
        if self.monitor is not None:
            self.monitor.reset()
        classes = self.train_set.num_classes
        top1 = MulticlassAccuracy(classes, average="micro", sync_on_compute=False).to(self.device)
        each = MulticlassAccuracy(classes, average="none", sync_on_compute=False).to(self.device)
        neurons, labels = [], []
        for batch in DataLoader(self.test_set, self.options.batch, num_workers=self.options.workers):
            clips, target = self.to_device(batch)
            logits = self.model(clips)
            top1.update(logits, target)
            each.update(logits, target)
            labels.append(target.cpu())
            if self.monitor is not None:
                neurons.append(torch.stack([r.neuron.cpu() for r in self.monitor.last]))
        label = torch.cat(labels)
        there = torch.bincount(label, minlength=classes) > 0
        by_class = [
            found if any_ else None for found, any_ in zip(each.compute().tolist(), there.tolist(), strict=True)
        ]
        known = [found for found in by_class if found is not None]
        metrics = {"top1": top1.compute().item(), "class_accuracy": by_class}
        metrics["mean_class_accuracy"] = sum(known) / len(known)  # of classes that the test set has
        if self.monitor is not None:
            found = self.monitor.statistics()
            metrics |= {f"test_{name}": getattr(found, name).tolist() for name in ("usage", "entropy", "dead")}
        # Where a clip went away since the set was made, places in the batches are no longer those in the set.
        whole = len(label) == len(self.test_set)
        return metrics, self.routing(torch.cat(neurons, 1), label, pictures=whole) if neurons else None

    def routing(self, neuron: Tensor, label: Tensor, *, pictures: bool = True) -> dict[str, Any]:
        """Which neurons the test set activated, with a few clips' frames, as ``dsts_kernels.viz`` draws them."""
        classes = label.unique()
        count = min(SHOWN, len(classes))
        classes = classes[torch.linspace(0, len(classes) - 1, count, device=classes.device).long()]
        shown = torch.cat([(label == c).nonzero()[:ALIKE, 0] for c in classes])
        frames = None
        if pictures:
            clips = torch.stack([self.test_set[int(i)][0] for i in shown])
            low, high = clips.amin((1, 2, 3, 4), keepdim=True), clips.amax((1, 2, 3, 4), keepdim=True)
            frames = ((clips - low) / (high - low).clamp_min(1e-6) * 255).to(torch.uint8).permute(0, 2, 3, 4, 1)

        def of_class(values: Tensor) -> Tensor:
            """An attribute by class, not by clip: a clip that cannot be read is not in a batch."""
            empty = torch.zeros(self.test_set.num_classes, dtype=torch.int64, device=values.device)
            return empty.scatter(0, self.test_set.labels, values)

        return {
            "neuron": neuron,
            "label": label,
            "class_names": list(self.test_set.class_names),
            "attributes": {name: of_class(values)[label] for name, values in self.test_set.attributes.items()},
            "attribute_names": {name: list(values) for name, values in self.test_set.attribute_names.items()},
            "frames": frames.contiguous() if pictures else None,
            "frame_samples": shown if pictures else None,
        }

    def save(self, path: Path, routing: dict[str, Any] | None) -> None:
        """A checkpoint of the end of an epoch; every process's generators are in it."""
        generators = [generator_states(self.device)]
        if self.world > 1:
            generators = [None] * self.world
            dist.all_gather_object(generators, generator_states(self.device))
        if self.rank == 0:
            state = {
                "options": {k: v for k, v in vars(self.options).items() if k != "resume"},
                "epoch": self.epoch,
                "model": self.model.state_dict(),
                CLASSIFIER: self.config.to_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "exact_second_order": self.learner is None or self.learner.exact_second_order,
                "learner_steps": 0 if self.learner is None else self.learner.steps,
                "schedule": None if self.schedule is None else self.schedule.state_dict(),
                "generators": generators,
                "history": self.history,
            }
            if self.monitor is not None:
                state["gates_at_start"] = dict(zip(self.monitor.layers, self.monitor.start, strict=True))
            save_checkpoint(path, state if routing is None else {**state, "routing": routing})

    def load(self, path: Path) -> None:
        """Continue from the epoch after a checkpoint's."""
        state = load_checkpoint(path)
        free = ("resume", "out", "quiet", "device", "workers", "recipe")  # a recipe is other options' defaults
        mine = {k: v for k, v in vars(self.options).items() if k not in free}
        theirs = vars(parser().parse_args([])) | state["options"]  # it may be of a time that had fewer
        changed = [k for k, v in mine.items() if theirs[k] != v]
        if changed:
            listed = ", ".join(f"{k} {theirs[k]} there and {mine[k]} here" for k in changed)
            raise ValueError(f"--resume: got a checkpoint of another run ({listed}), wanted the same options")
        if len(state["generators"]) != self.world:
            count = len(state["generators"])
            raise ValueError(f"--resume: got a checkpoint of {count} processes, wanted one of {self.world}")
        self.model.load_state_dict(state["model"])
        if self.monitor is not None and "gates_at_start" in state:
            self.monitor.start = list(state["gates_at_start"].values())
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        restore_generators(state["generators"][self.rank], self.device)
        if self.learner is not None:
            self.learner.exact_second_order = state["exact_second_order"]
            self.learner.steps = state.get("learner_steps", 0)
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.history = state["epoch"] + 1, state["history"]

    def fit(self) -> dict[str, Any]:
        """All epochs that are left; the last one's record."""
        out = Path(self.options.out)
        path, writer = out / "checkpoint.pt", None
        if self.options.resume:
            self.load(path)
            if self.rank == 0:
                self.write_metrics(out)  # it may be an epoch behind the checkpoint
        if self.rank == 0 and not self.options.quiet:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(out, purge_step=self.epoch)
            sets = f"{len(self.train_set)} clips to train, {len(self.test_set)} to test"
            print(f"{self.options.data}: {sets}, {self.options.epochs} epochs; results go to {out}", flush=True)
        while self.epoch < self.options.epochs:
            record = self.run_epoch()
            metrics, routing = self.evaluate()
            self.history.append(record | metrics)
            self.save(path, routing)
            if self.rank == 0:
                self.report(writer, out)
            self.epoch += 1
        if writer is not None:
            writer.close()
        if self.rank == 0 and hasattr(self.test_set, "report"):
            print(*(data.report() for data in (self.train_set, self.test_set)), sep="\n")
        return self.history[-1]

    def write_metrics(self, out: Path) -> None:
        """The history as ``metrics.json``, in one piece."""
        with files.replacing(out / "metrics.json") as beside:
            beside.write_text(json.dumps(self.history, indent=1))

    def report(self, writer: Any, out: Path) -> None:
        """The newest record: a line, TensorBoard, ``metrics.json``."""
        record = self.history[-1]
        self.write_metrics(out)
        if self.options.quiet:
            return
        unused = ""
        if self.monitor is not None:
            unused = f", unused neurons by layer {record['dead']}, in evaluation {record['test_dead']}"
        told = f"epoch {record['epoch']}: loss {record['train_loss']:.3f}, top-1 {record['top1']:.1%}"
        print(told + unused, flush=True)
        for name in ("train_loss", "val_loss", "top1", "mean_class_accuracy", "seconds"):
            if name in record:
                writer.add_scalar(name, record[name], record["epoch"])
        for name in ("entropy", "dead", "saturated"):
            for layer, value in enumerate(record.get(name, ())):
                writer.add_scalar(f"{name}/layer {layer}", value, record["epoch"])
        writer.flush()


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        prepare(options)
        if "LOCAL_RANK" in os.environ:
            dist.init_process_group("nccl" if options.device.startswith("cuda") else "gloo")
        Trainer(options).fit()
    except (ValueError, FileNotFoundError, FloatingPointError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        whole = (Path(options.out) / "checkpoint.pt").exists()
        hint = f"{options.out} has the last whole epoch; --resume goes on from there" if whole else "no epoch was whole"
        print(f"interrupted: {hint}", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
