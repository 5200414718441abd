"""The three large sets through the whole pipeline: trees in the official layouts, small, with generated images."""

from pathlib import Path

import large_trees
import pytest
import yaml
from test_pipeline import Clone

from longtail.workflow import files

PLANS = {"frozen-imagenet-lt": "imagenet_lt", "frozen-places-lt": "places_lt", "frozen-inaturalist": "inaturalist_2018"}
TRAINED = {  # plan: recipe, data set, methods
    "imagenet-lt": ("imagenet_balpoe", "imagenet_lt", ["ce", "balpoe_imagenet", "crt"]),
    "places-lt": ("places_tune", "places_lt", ["balpoe"]),
    "inaturalist": ("inaturalist_balpoe", "inaturalist_2018", ["balpoe_inaturalist"]),
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A copy of the working tree whose large sets are small ones, with a small network without pretrained weights."""
    clone = Clone(tmp_path_factory.mktemp("large"), *PLANS, *TRAINED, "incremental-imagenet-1000")
    for make in large_trees.MAKERS.values():
        make(clone.root / "data/large")
    params = yaml.safe_load((clone.root / "params.yaml").read_text())
    params["backbones"]["small"] = {
        "library": "torchvision",
        "network": "resnet18",
        "weights": "none",
        "resolution": 32,
    }
    for block in params["indexed"].values():
        block["backbone"] = "small"
    for plan in PLANS:
        params["plans"][plan] |= {"methods": ["ce", "balpoe", "crt"], "trained": ["ce", "balpoe"]}
    params["recipes"]["probe"] |= {"epochs": 6, "batch_size": 16}
    for block in params["streams"].values():
        block["side"] = 32
    params["streams"]["places_lt"]["stored"] = 36
    for plan, (recipe, _, methods) in TRAINED.items():
        trained = [method for method in methods if method != "crt"]
        params["plans"][plan] |= {"methods": methods, "trained": trained, "refit": methods[len(trained) :]}
        params["recipes"][recipe] |= {"epochs": 8, "batch_size": 16, "precision": "fp32"}
        params["recipes"][recipe]["optimizer"]["lr"] = 0.05
    params["recipes"]["places_tune"]["network"]["backbone"] = "small"
    for recipe in ("imagenet_balpoe", "inaturalist_balpoe"):
        params["recipes"][recipe]["network"]["architecture"] = "resnet10"
    chains = params["incremental"]
    chains["plans"]["incremental-imagenet-1000"] |= {"trainings": ["distilled", "bic"]}
    chains["protocols"]["imagenet_b0_10_held_out"] |= {
        "first_classes": 2, "step_classes": 2, "memory": 16, "held_out": 0.25,
    }  # fmt: skip
    chains["recipes"]["imagenet_bic"]["first"] |= {"epochs": 4, "batch_size": 8, "drop_last": True, "precision": "fp32"}
    chains["recipes"]["imagenet_bic"]["first"]["schedule"] |= {"milestones": [3], "factors": [0.1]}
    chains["recipes"]["imagenet_bic"]["first"]["optimizer"]["lr"] = 0.02
    (clone.root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    for plan in (*TRAINED, "incremental-imagenet-1000"):  # other methods, another backbone
        run(clone, "plan", plan)
    return clone


def run(clone: Clone, *command: str, workers: str = "1") -> str:
    return clone.run("python", "-m", "longtail.cli", *command, LONGTAIL_WORKERS=workers)


@pytest.mark.slow
def test_a_set_that_is_not_there_says_what_to_put_where_and_one_that_is_small_is_not_the_release(clone: Clone) -> None:
    out = clone.root / "data/large/inaturalist2018"
    hidden = out.rename(out.with_name("hidden"))
    with pytest.raises(AssertionError, match=r"iNaturalist18_train\.txt: no such list. Put .* there"):
        run(clone, "run", "frozen-inaturalist")
    hidden.rename(out)
    with pytest.raises(AssertionError, match=r"5 classes; iNaturalist 2018 has 8,142|too short: 54 rows"):
        run(clone, "run", "frozen-inaturalist")


@pytest.mark.slow
def test_each_goes_to_its_report_and_what_is_wrong_with_a_list_stops_it_first(clone: Clone) -> None:
    text = (clone.root / "params.yaml").read_text().replace("edition: official", "edition: other")
    (clone.root / "params.yaml").write_text(text)
    for plan, index in PLANS.items():
        run(clone, "run", plan, "--jobs", "2")
        table = (clone.root / f"results/{plan}/table.md").read_text()
        assert all(name in table for name in ("Cross-entropy", "BalPoE", "cRT"))
        cells = Path(f"results/{plan}/cells/{index}_lite0/probe")
        accuracy = files.read_json(clone.root / cells / "ce/1/metrics.json")["last"]["raw"]["accuracy"]
        assert accuracy > 0.4  # of five classes, each a colour
        assert f"{plan}: 3 done of 3 cells" in run(clone, "status", plan)
    run(clone, "track")
    path = clone.root / "data/large/places365/Places_LT_test.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    with pytest.raises(AssertionError, match=r"Places_LT_test\.txt: 20 of its lines end with CRLF"):
        clone.run("dvc", "repro", "-f", "-s", "stages/dvc.yaml:index@places_lt")


@pytest.mark.slow
def test_trainings_on_images_go_to_their_report_and_out_of_the_house(clone: Clone, tmp_path: Path) -> None:
    text = (clone.root / "params.yaml").read_text().replace("edition: official", "edition: other")
    (clone.root / "params.yaml").write_text(text)
    places = clone.root / "data/large/places365/Places_LT_test.txt"
    places.write_bytes(places.read_bytes().replace(b"\r\n", b"\n"))
    for plan, (recipe, dataset, methods) in TRAINED.items():
        run(clone, "run", plan, "--jobs", "2", workers="1" if plan == "places-lt" else "0")
        cells = clone.root / f"results/{plan}/cells/{dataset}/{recipe}"
        for name in methods:
            found = files.read_json(cells / name / "1/metrics.json")["last"]
            assert {"raw", "aligned_on_train", "logit_adjusted", "rebalanced_on_test"} <= found.keys()
            assert found["raw"]["accuracy"] > 0.4  # of five classes, each a colour
        assert f"{plan}: {len(methods)} done of {len(methods)} cells" in run(clone, "status", plan)
        assert "BalPoE" in (clone.root / f"results/{plan}/table.md").read_text()
    run(clone, "track")
    cell = "imagenet_lt-imagenet_balpoe-balpoe_imagenet-1"
    run(clone, "export", "imagenet-lt", cell, "--out", str(tmp_path / "network.pt2"))
    assert (tmp_path / "network.pt2").is_file()
    with pytest.raises(AssertionError, match="what is served would decode files otherwise"):
        run(clone, "register", "imagenet-lt", cell, "--name", "x")
    # a changed correction neither trains nor looks at an image
    params = clone.root / "params.yaml"
    text = params.read_text()
    params.write_text(text.replace("strength: 1.0", "strength: 0.9"))
    said = clone.run("dvc", "status", "stages/imagenet-lt/dvc.yaml")
    params.write_text(text)
    assert "align-imagenet-lt" in said and "train-imagenet-lt" not in said and "predict-imagenet-lt" not in said


@pytest.mark.slow
def test_classes_of_imagenet_arrive_in_steps(clone: Clone) -> None:
    params = clone.root / "params.yaml"
    params.write_text(params.read_text().replace("edition: official", "edition: other"))
    plan, cell = "incremental-imagenet-1000", "imagenet_1000/seed_1993/imagenet_b0_10_held_out/imagenet_bic"
    run(clone, "run", plan, "--jobs", "2", workers="0")
    assert f"{plan}: 2 done of 2 cells" in run(clone, "status", plan)
    for training in ("distilled", "bic"):
        summary = files.read_json(clone.root / f"results/{plan}/cells/{cell}/{training}/1/summary.json")
        assert summary["ends"] == [2, 4, 5] and sorted(summary["order"]) == [*range(5)]
        assert {"none", "weight_aligning", "bias_layer", "energy_chosen", "nearest_mean"} <= summary["readouts"].keys()
        assert summary["readouts"]["none"]["average"] > 0.3  # of five classes, each a colour
    assert "BiC's layer" in (clone.root / f"results/{plan}/table.md").read_text()
    run(clone, "track", plan)
    text = params.read_text()
    params.write_text(text.replace("l2: 0.1", "l2: 0.2"))  # a changed correction trains nothing, looks at no image
    said = clone.run("dvc", "status", f"stages/{plan}/dvc.yaml")
    assert f"readout-{plan}" in said and f"train-{plan}" not in said and f"predict-{plan}" not in said
    changed = yaml.safe_load(text)  # another order is its own chain
    changed["incremental"]["plans"][plan]["orders"].append("as_numbered")
    params.write_text(yaml.safe_dump(changed, sort_keys=False))
    run(clone, "plan", plan)
    said = clone.run("dvc", "status", f"stages/{plan}/dvc.yaml")
    stages = [line for line in said.splitlines() if f"train-{plan}@" in line]
    assert len(stages) == 2 and all("as_numbered" in stage for stage in stages)
    params.write_text(text)
    run(clone, "plan", plan)
