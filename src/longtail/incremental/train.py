"""A chain of trainings, one a step. It may be killed at any moment: what is finished stays, and the bytes are the same.

A finished step leaves its network and the exemplars that it chose; a step under way, a checkpoint of the engine. The
images of later steps and the test images are not even read.
"""

import json
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longtail.data import batches
from longtail.incremental import memory, networks, teaching
from longtail.incremental.data import Chain, Memory
from longtail.incremental.objective import Objective, Teacher, class_loss
from longtail.incremental.protocol import Step
from longtail.losses import BaseLoss
from longtail.networks import Network, product
from longtail.training import engine, inference, machine, provenance
from longtail.training.cell import Progress
from longtail.training.checkpoints import Checkpoint
from longtail.training.refit import features
from longtail.workflow import files, processes

HISTORY = ["step", "epoch", "lr", "loss", "train_accuracy"]


@dataclass
class Images:
    """The training images of a data set, with classes as positions in the order."""

    images_N: np.ndarray
    labels_N: np.ndarray

    @property
    def channels(self) -> int:
        """Of an image."""
        return int(self.images_N.shape[3])

    def split(self, rows: np.ndarray, seen: int, device: torch.device) -> batches.Split:
        """Those rows on the device. Raises ValueError as batches.Split, so for the label of a class not yet seen."""
        return batches.Split.from_arrays(self.images_N[rows], self.labels_N[rows], seen, device)


def recipe_of(recipe: dict[str, Any], step: Step) -> dict[str, Any]:
    """The training recipe of a step: the first one's, or with what `later` has in its place."""
    whole: dict[str, Any] = dict(recipe["first"])
    if step.number:
        whole |= recipe["later"] or {}
        if recipe["weight_decay_by_step"]:
            optimizer = dict(whole["optimizer"])
            optimizer["weight_decay"] /= step.number + 1
            whole["optimizer"] = optimizer
    return whole


def step_seed(seed: int, step: Step) -> int:
    """The seed of a step's draws: those of two steps have nothing to do with each other."""
    return int(np.random.SeedSequence([seed, step.number]).generate_state(1)[0]) >> 1


def run(
    cell: dict[str, str],
    fingerprint: str,
    *,
    data: str,
    order: dict[str, Any],
    protocol: dict[str, Any],
    recipe: dict[str, Any],
    training: dict[str, Any],
    model: str,
    history: str,
) -> None:
    """Train all steps; write their networks and exemplars (folder `model`) and a row an epoch (`history`).

    Args:
        cell: the cell's coordinates by name, for messages; its `seed`.
        fingerprint: of everything that determines the result; what is kept between two runs goes by it.
        data: data/long_tail/<dataset>.npz; only its training images are read.
        order, protocol, recipe, training: the blocks of params.yaml.

    Raises ValueError for arrays or settings that do not fit each other, FloatingPointError for a loss that is not
    finite.
    """
    device = inference.find_device()
    processes.start(device)
    inference.set_up(int(cell["seed"]))  # finished steps are looked at, too, before one is trained
    arrays = files.load_arrays(data, "train_images", "train_labels", "class_names")
    chain = Chain.of(len(arrays["class_names"]), order, protocol)
    images = Images(arrays["train_images"], chain.positions(arrays["train_labels"]))
    follow(Walk(cell, chain, images, recipe, training, device, fingerprint), Path(model), history)
    processes.stop()


class Walk:
    """The steps of a chain, one after the other, each from files where it is finished."""

    def __init__(
        self,
        cell: dict[str, str],
        chain: Chain,
        images: Images,
        recipe: dict[str, Any],
        training: dict[str, Any],
        device: torch.device,
        fingerprint: str,
    ):
        self.cell, self.chain, self.images, self.device = cell, chain, images, device
        self.recipe, self.training, self.fingerprint = recipe, training, fingerprint
        self.kept = Path("runs/.checkpoints") / fingerprint
        self.seed = int(cell["seed"])
        self.memory = Memory(chain, images.labels_N, self.seed)
        self.network: Network | None = None  # of the last step, raw
        self.scale_C = self.shift_C = torch.empty(0)  # the correction that its logits have as a teacher's
        self.rows: list[dict[str, Any]] = []
        self.sizes: list[dict[str, int]] = []
        self.seconds = 0.0
        self.first_epoch = ""

    def take(self, step: Step) -> None:
        """Do a step, or read what it left."""
        weights, left = self.kept / f"step_{step.number:02}.safetensors", self.kept / f"step_{step.number:02}.npz"
        rows = self.memory.rows(step, replay=self.training["replay"])
        if not left.exists():
            self._train(step, rows.train, weights, left)
        found = files.load_arrays(left)
        self.network = networks.load(weights, self.device)
        for label in range(step.old, step.seen):
            self.memory.ranked[label] = found[f"ranked_{label}"]
        said = json.loads(str(found["said"]))
        self.rows += said["history"]
        self.seconds += said["seconds"]
        self.first_epoch = self.first_epoch or said["first_epoch"]
        self.sizes.append(self._sizes(step, rows.train, rows.held_out))
        self.scale_C, self.shift_C = self._teaches(step, rows.held_out)

    def _sizes(self, step: Step, train: np.ndarray, held_out: np.ndarray) -> dict[str, int]:
        """How many images a step saw; printed, as memory is what two papers differ in without saying so."""
        kept = len(self.memory.exemplars(step.seen, self.chain.budget.held_out_per_class(step.seen)))
        aside = self.chain.budget.held_out_per_class(step.seen)
        kept += sum(len(self.memory.aside[label][:aside]) for label in range(step.seen))
        budget = self.chain.budget.limit(step.seen)
        if kept > budget:
            raise AssertionError(f"step {step.number}: {kept} images in a memory of {budget}")
        sizes = {
            "step": step.number, "old": step.old, "seen": step.seen, "train_images": len(train),
            "held_out_images": len(held_out), "memory_after": kept, "memory_budget": budget,
        }  # fmt: skip
        print(
            f"{' '.join(self.cell.values())}  step {step.number}: {step.seen} classes, {len(train)} images trained on, "
            f"{len(held_out)} held out; {kept} of {budget} kept",
            flush=True,
        )
        return sizes

    def _train(self, step: Step, train_rows: np.ndarray, weights: Path, left: Path) -> None:
        recipe = recipe_of(self.recipe, step)
        train = self.images.split(train_rows, step.seen, self.device)
        seed = step_seed(self.seed, step)
        inference.set_up(seed)
        network = self._student(step, recipe)
        teacher = None
        if step.number and self.training["distillation"] != "none":
            assert self.network is not None
            teacher = Teacher(self.network, self.scale_C.to(self.device), self.shift_C.to(self.device))
            teacher.watch(network)
        counts = torch.bincount(train.labels, minlength=step.seen)
        if self.training["loss"] not in ("ce", "bce") and not bool((counts > 0).all()):
            raise ValueError(
                f"step {step.number}: {int((counts == 0).sum())} classes have no image to train on, which "
                f"{self.training['loss']} needs of every class; allowed are ce and bce, or replay with a larger memory"
            )
        objective = Objective(
            class_loss(
                self.training["loss"], counts, self.training["arguments"], recipe["network"]["scale"]
            ),
            kind=self.training["distillation"],
            temperature=self.training["temperature"],
            teacher=teacher,
            old=step.old,
            positive=(lambda: [expert.head.weight for expert in networks.each(network)])
            if self.recipe["positive_weights"] else list,
        )  # fmt: skip
        checkpoint = Checkpoint(
            self.kept / f"step_{step.number:02}.pt",
            f"{self.fingerprint} step {step.number} torch {torch.__version__}",
        )
        name = f"{' '.join(self.cell.values())}  step {step.number}"
        first = processes.rank() == 0
        with Progress(name, recipe["epochs"]) if first else nullcontext() as progress:
            fitted = self._fit(
                network, objective, train, recipe, seed=seed, checkpoint=checkpoint,
                on_epoch=progress.show if progress else lambda row: None,
            )  # fmt: skip
        ranked = self._select(step, network)
        history = [{"step": step.number} | {key: row[key] for key in HISTORY[1:]} for row in fitted.history]
        said = {"history": history, "seconds": fitted.seconds, "first_epoch": fitted.first_epoch}
        if first:
            files.write_bytes(weights, fitted.last)
            files.save_arrays(left, said=np.array(json.dumps(said)), **ranked)  # last: it says that the step is done
            checkpoint.remove()
        processes.add_up(torch.zeros(1, device=self.device))  # wait: all read what the first one has written

    def _fit(
        self, network: Network, objective: BaseLoss, train: batches.Split, recipe: dict[str, Any], **how: Any
    ) -> engine.Fitted:
        """One step's training. Images that are files are told here what comes next (longtail.streaming.chain)."""
        settings = {key: value for key, value in recipe.items() if key not in ("network", "normalization")}
        return engine.fit(network, objective, train, None, None, **how, **settings)

    def _student(self, step: Step, recipe: dict[str, Any]) -> Network:
        """The network that a step starts from."""
        if self.network is None:
            loss = class_loss(self.training["loss"], torch.ones(step.seen), self.training["arguments"], 1.0)
            made = networks.build(
                channels=self.images.channels, classes=step.seen, experts=loss.experts if loss else 1,
                body=self.recipe["body"], **recipe["network"], **recipe["normalization"],
            )  # fmt: skip
            if not self.recipe["bias"]:
                made = networks.build(**{**made.settings, "head": "bare_linear"})
        else:
            known = self.network.cpu()
            if self.training["start"] == "teacher":
                known = networks.folded(known, self.scale_C, self.shift_C)
            made = networks.grown(known, step.seen, head=self.recipe["new_head"])
            self.network.to(self.device)
        return made.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _select(self, step: Step, network: Network) -> dict[str, np.ndarray]:
        """Exemplars of the new classes by rank, {ranked_<class>: rows}."""
        ranked, count = {}, self.memory.needed(step)
        for label in range(step.old, step.seen):
            rows = self.memory.own(label)
            known = features(network, self.images.split(rows, step.seen, self.device))
            features_ND = torch.cat(known, 1).numpy()  # experts side by side
            generator = np.random.default_rng([self.seed, step.number, label])
            chosen = memory.select(features_ND, count, way=self.chain.selection, generator=generator)
            ranked[f"ranked_{label}"] = rows[chosen]
        return ranked

    def _teaches(self, step: Step, held_out: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift (C,) of the logits with which this network teaches the next step."""
        assert self.network is not None
        weight_ECD, bias_EC = networks.head_arrays(self.network)
        split = self.images.split(held_out, step.seen, self.device)
        logits_NC = np.empty((0, step.seen))
        if len(held_out):
            logits_NC = product(inference.logits(self.network, split, precision="fp32")).numpy()
        scale_C, shift_C = teaching.correction(
            self.training["teacher"], step.old, weight_ECD=weight_ECD.numpy(), bias_EC=bias_EC.numpy(),
            logits_NC=logits_NC, labels_N=split.labels.cpu().numpy(),
        )  # fmt: skip
        return torch.from_numpy(scale_C).float(), torch.from_numpy(shift_C).float()


def follow(walk: Walk, model: Path, history: str) -> None:
    """Take all steps, and write what they leave."""
    lock = Checkpoint(walk.kept / "chain.pt", walk.fingerprint)
    with lock.alone() if processes.rank() == 0 else nullcontext():
        for step in walk.chain.steps:
            walk.take(step)
        processes.add_up(torch.zeros(1, device=walk.device))  # wait: nobody reads any more what is removed below
        if processes.rank() == 0:
            write(walk, model, history)
            shutil.rmtree(walk.kept)


def write(walk: Walk, folder: Path, history: str) -> None:
    """The chain's outs: the networks, rows of memory, what is known of how they were made."""
    for step in walk.chain.steps:
        name = f"step_{step.number:02}.safetensors"
        files.write_bytes(folder / name, (walk.kept / name).read_bytes())
    files.save_arrays(
        folder / "memory.npz",
        order=walk.chain.order_C,
        **{f"ranked_{label}": rows for label, rows in sorted(walk.memory.ranked.items())},
    )
    files.write_json(folder / "steps.json", walk.sizes)
    files.write_csv(history, walk.rows, HISTORY)
    precision = inference.precision_on(walk.device, walk.recipe["first"]["precision"])
    provenance.write(
        folder, [provenance.record("train", walk.device, precision=precision, first_epoch=walk.first_epoch)]
    )
    images = sum(
        sizes["train_images"] * recipe_of(walk.recipe, step)["epochs"]
        for sizes, step in zip(walk.sizes, walk.chain.steps, strict=True)
    )
    machine.write(
        folder, walk.fingerprint, walk.device, seconds=walk.seconds, precision=precision,
        images_per_s=images / walk.seconds,
    )  # fmt: skip
