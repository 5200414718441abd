"""What read-outs need of every step, and no network any more: logits, features, head weights, labels.

predictions.npz has, of each step `t` (two digits), arrays `<t>_<set>_logits` (N, C), the mean over experts, in float32
and without augmentation, and `<t>_<set>_labels`, positions in the order. Sets: train, what the step was trained on;
memory, the exemplars that are kept after it; held_out, what no training saw; test, all classes seen. Features
(`<t>_memory_features`, `<t>_test_features`: N, D) are there for the nearest mean.
"""

import json
from pathlib import Path

import numpy as np
import torch

from longtail.incremental import networks
from longtail.incremental.data import Chain, Memory
from longtail.incremental.train import Images
from longtail.networks import product
from longtail.training import inference, provenance
from longtail.training.refit import features
from longtail.workflow import files


def predict(
    data: str, model: str, out: str, *, order: dict, protocol: dict, training: dict, seed: int
) -> None:  # fmt: skip
    """Write the predictions of all steps.

    Args:
        data: data/long_tail/<dataset>.npz.
        model: folder of a chain, as longtail.incremental.train leaves it.
        order, protocol, training: the blocks of params.yaml that it was trained with.

    Raises ValueError when networks or memory do not fit the data.
    """
    arrays = files.load_arrays(data)
    names = arrays["class_names"]
    chain = Chain.of(len(names), order, protocol)
    train = Images(arrays["train_images"], chain.positions(arrays["train_labels"]))
    test = Images(arrays["test_images"], chain.positions(arrays["test_labels"]))
    of_chain(chain, names, train, test, model, out, training=training, seed=seed)


def of_chain(
    chain: Chain, names: np.ndarray, train: Images, test: Images, model: str, out: str, *, training: dict, seed: int
) -> None:
    """The same for images wherever they are; `names` of the classes, in the data set's own order."""
    device = inference.find_device()
    inference.set_up(0)  # nothing is drawn; deterministic algorithms
    kept = files.load_arrays(Path(model) / "memory.npz")
    if not np.array_equal(kept["order"], chain.order_C):
        raise ValueError(f"{model}: trained in another class order than {chain.order_C.tolist()}")
    memory = Memory(chain, train.labels_N, seed)
    made: dict[str, np.ndarray] = {"order": chain.order_C, "class_names": names[chain.order_C]}
    made["ends"] = np.array([step.seen for step in chain.steps])
    for step in chain.steps:
        network = networks.load(Path(model) / f"step_{step.number:02}.safetensors", device)
        rows = memory.rows(step, replay=training["replay"])  # before the step's own exemplars are known
        for label in range(step.old, step.seen):
            memory.ranked[label] = kept[f"ranked_{label}"]
        after = memory.exemplars(step.seen, chain.budget.held_out_per_class(step.seen))
        seen = np.flatnonzero(test.labels_N < step.seen)
        sets = {
            "train": (train, rows.train), "memory": (train, after), "held_out": (train, rows.held_out),
            "test": (test, seen),
        }  # fmt: skip
        for name, (images, which) in sets.items():
            split = images.split(which, step.seen, device)
            made[f"{step.number:02}_{name}_labels"] = images.labels_N[which]
            if not len(which):
                continue
            logits_NC = product(inference.logits(network, split, precision="fp32"))
            made[f"{step.number:02}_{name}_logits"] = logits_NC.numpy()
            if name in ("memory", "test"):
                made[f"{step.number:02}_{name}_features"] = torch.cat(features(network, split), 1).numpy()
        weight_ECD, bias_EC = networks.head_arrays(network)
        made[f"{step.number:02}_weight"], made[f"{step.number:02}_bias"] = weight_ECD.numpy(), bias_EC.numpy()
    by = [*provenance.read(model), provenance.record("predict", device, precision="fp32")]
    made["provenance"] = np.array(json.dumps(by))
    made["sizes"] = np.array(json.dumps(files.read_json(Path(model) / "steps.json")))
    files.save_arrays(out, **made)
