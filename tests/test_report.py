"""The report on hand-made cells: its numbers, its gaps, its complaints, and the page it writes."""

import base64
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from longtail.evaluation import cell as evaluation
from longtail.report import answers, differences, document, outcomes, plots
from longtail.report import page as report
from longtail.workflow import files
from longtail.workflow.cells import Cell

PLAN = {
    "datasets": ["toy_if10"],
    "recipes": ["plain"],
    "methods": ["ce", "balpoe"],
    "seeds": [0, 1],
}
ACCURACY = {("ce", 0): 0.50, ("ce", 1): 0.54, ("balpoe", 0): 0.60, ("balpoe", 1): 0.66}
NAMES = ("cat", "<b>dog</b>", "a|b $x$")
ROOT = Path(__file__).parents[1]


def measures(accuracy, **other):
    block = dict.fromkeys(outcomes.MEASURES, 0.25) | {
        "accuracy": accuracy,
        "many": accuracy + 0.1,
        "medium": None,
        "few": accuracy - 0.1,
        "balanced_error": 1 - accuracy,
        "nll": 1.5,
        "ece": 0.05,
        "standard_error": dict.fromkeys(outcomes.RESAMPLED, 0.01),
    }
    return block | other


def make_cell(folder, accuracy, *, held_out=True, names=NAMES, test_accuracy=None, more=()):
    """The files of a cell whose aligned accuracy is 0.02 (train) and 0.04 (held-out) higher.

    `test_accuracy` holds what the history saw after each of its three epochs, `more` other corrections' gains.
    """
    kinds = {"raw": 0.0, "aligned_on_train": 0.02}
    if held_out:
        kinds["aligned_on_held_out"] = 0.04
    kinds |= dict(more)
    metrics = {"last": {"epoch": 3} | {kind: measures(accuracy + gain) for kind, gain in kinds.items()}}
    if held_out:
        metrics["best_on_held_out"] = {"epoch": 2} | {
            kind: measures(accuracy + gain - 0.01) for kind, gain in kinds.items()
        }
    files.write_json(folder / "metrics.json", metrics)
    by_class = [
        {"class": i, "name": name, "train_images": 100 // 10**i}
        | {kind: accuracy + gain for kind, gain in kinds.items()}
        | {f"energy_{when}_{split}": span * i for when, span in (("before", 2.0), ("after", 0.5))
           for split in ("train", "held_out") if split == "train" or held_out}
        for i, name in enumerate(names)
    ]  # fmt: skip
    files.write_csv(folder / "classes.csv", by_class, list(by_class[0]))
    history = [
        {"epoch": epoch, "lr": 0.1, "loss": 1 / epoch, "train_accuracy": 0.9,
         "held_out_accuracy": accuracy if held_out else None, "test_accuracy": (test_accuracy or [None] * 3)[epoch - 1]}
        for epoch in (1, 2, 3)
    ]  # fmt: skip
    files.write_csv(folder / "history.csv", history, list(history[0]))
    shifted = [
        {"distribution": name, "images": 50, "correction": "raw", "accuracy": accuracy - 0.1 * place,
         "accuracy_sd": 0.01, "known_prior": accuracy, "known_prior_sd": 0.01}
        for place, name in enumerate(("forward5", "uniform", "backward5"))
    ]  # fmt: skip
    files.write_csv(folder / "distributions.csv", shifted, outcomes.DISTRIBUTIONS)
    bins = [
        {"correction": kind, "low": 0.4, "high": 0.6, "images": 100, "confidence": 0.5, "accuracy": accuracy + gain}
        for kind, gain in kinds.items()
    ]
    files.write_csv(folder / "reliability.csv", bins, outcomes.RELIABILITY)
    right = [
        {"correction": kind, "images": 100, "right": evaluation.pack(np.arange(100) < round(100 * (accuracy + gain)))}
        for kind, gain in kinds.items()
    ]
    files.write_csv(folder / "right.csv", right, evaluation.RIGHT)


@pytest.fixture
def cells(tmp_path):
    for (method, seed), accuracy in ACCURACY.items():
        make_cell(tmp_path / "cells/toy_if10/plain" / method / str(seed), accuracy)
    return tmp_path / "cells"


@pytest.fixture
def published(tmp_path):
    known = quoted(value=0.60, sd=0.005, runs=5, optimistic="true", same_recipe="false")
    rebalanced = quoted(correction="prediction_rebalancing", value=0.61, transductive="true")
    return write_published(tmp_path, known, rebalanced)


def quoted(**other):
    row = {
        "dataset": "toy_if10", "recipe": "plain", "method": "balpoe", "correction": "none",
        "measure": "accuracy", "group": "all", "value": 0.6, "sd": None, "runs": None, "optimistic": "false",
        "transductive": "false", "same_recipe": "true", "source": "a paper",
        "url": "https://example.org/p", "note": "a note",
    }  # fmt: skip
    return row | other


def write_published(folder, *rows):
    return files.write_csv(folder / "published.csv", rows, outcomes.PUBLISHED)


def table_of(cells, plan=PLAN, published=()):
    return outcomes.rows(outcomes.read("toy", plan, cells), published)


def find(table, method, correction="raw"):
    (row,) = [row for row in table if (row.method, row.correction) == (method, correction)]
    return row


def markdown_of(results, published):
    return document.markdown(report.build(results, published))


def page_of(results, published):
    return document.html(report.build(results, published))


def test_a_page_runs_nothing_that_its_inputs_say(cells, tmp_path):
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    for path in cells.rglob("classes.csv"):
        path.write_text(path.read_text().replace("cat", hostile))
    known = write_published(tmp_path, quoted(value=0.60, source=hostile, note=hostile))
    html = page_of(outcomes.read("toy", PLAN, cells), outcomes.read_published(known))
    assert "&lt;script&gt;" in html and "<script" not in html and "<img src=x" not in html
    with pytest.raises(ValueError, match="url"):
        outcomes.read_published(write_published(tmp_path, quoted(value=0.60, url="javascript:alert(1)")))


def written(cells, published, out, plan=PLAN):
    report.write("toy", plan, cells_dir=cells, published=published, out_dir=out)
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


# ------------------------------------------------------------------------------------------- the numbers


def test_rows_have_the_means_and_sample_deviations_of_the_seeds(cells):
    table = table_of(cells)
    assert [(row.method, row.correction) for row in table] == [
        (method, correction)
        for method in ("ce", "balpoe")
        for correction in ("raw", "aligned_on_train", "aligned_on_held_out")
    ]
    row = find(table, "ce")
    assert (row.n, row.planned, row.seeds) == (2, 2, [0, 1])
    assert row.accuracy == pytest.approx(0.52)
    assert row.measures["accuracy"].sd == pytest.approx(0.02 * 2**0.5)  # |0.54 - 0.50| / sqrt 2
    assert row.measures["few"].mean == pytest.approx(0.42)
    assert row.measures["balanced_error"].mean == pytest.approx(0.48)
    assert row.best_on_held_out.mean == pytest.approx(0.51)
    assert (row.measures["medium"].mean, row.measures["medium"].sd) == (None, None)  # a group without classes
    assert find(table, "ce", "aligned_on_train").accuracy == pytest.approx(0.54)
    assert find(table, "ce", "aligned_on_held_out").accuracy == pytest.approx(0.56)


def test_best_on_test_is_shown_beside_the_last_epoch_and_called_optimistic(cells):
    table = markdown_of(outcomes.read("toy", PLAN, cells), [])
    assert "Best on test" not in table and "(published" not in table  # what has nothing is left out
    make_cell(cells / "toy_if10/plain/ce/0", 0.50, test_accuracy=[0.4, 0.58, 0.50])
    make_cell(cells / "toy_if10/plain/ce/1", 0.54, test_accuracy=[None, 0.56, 0.54])
    row = find(table_of(cells), "ce")
    assert row.accuracy == pytest.approx(0.52)
    assert row.best_on_test.mean == pytest.approx(0.57)
    assert find(table_of(cells), "ce", "aligned_on_train").best_on_test.mean is None
    make_cell(cells / "toy_if10/plain/ce/1", 0.57, test_accuracy=[None, 0.53, 0.56])  # bf16 in training, fp32 after
    assert find(table_of(cells), "ce").best_on_test.mean == pytest.approx((0.58 + 0.57) / 2)
    make_cell(cells / "toy_if10/plain/ce/1", 0.54, test_accuracy=[None, 0.56, 0.54])
    table = markdown_of(outcomes.read("toy", PLAN, cells), [])
    lines = [
        line.strip("| ").split(" | ") for line in table.split("### Every number")[1].splitlines() if line[:1] == "|"
    ]
    assert lines[2][0] == "Cross-entropy"
    assert lines[2][lines[0].index("Best on test")] == "57.0 ± 1.4"
    assert (
        "the best epoch on the test images would have had up to 5.0 points more (Cross-entropy, recipe plain)" in table
    )
    assert "Optimistic, for it is chosen on the test images" in table


def test_rebalancing_stands_beside_its_published_value_and_never_in_bold(cells, published):
    for (method, seed), accuracy in ACCURACY.items():
        make_cell(cells / "toy_if10/plain" / method / str(seed), accuracy, more={"rebalanced_on_test": 0.1})
    known = outcomes.read_published(published)
    row = find(table_of(cells, published=known), "balpoe", "rebalanced_on_test")
    assert (row.accuracy, row.published.value) == (pytest.approx(0.73), 0.61)
    assert row.published.flags == ["transductive: uses all test images at once"]
    table = markdown_of(outcomes.read("toy", PLAN, cells), known)
    assert "**63.0 ± 4.2**" in table and "**73.0" not in table  # not even in the table of corrections
    assert "is then BalPoE (3 experts), recipe plain, aligned on held-out: 67.0 ± 4.2 % (2 seeds)" in table
    assert "re-balanced on test (transductive) | 2 | 73.0 ± 4.2" in table
    assert "with prediction rebalancing" not in table  # it is in the table itself
    assert outcomes.summary(table_of(cells))["toy_if10"]["plain"]["balpoe"]["aligned"] == pytest.approx(0.65)


def test_other_test_distributions_stand_beside_what_was_published(cells, tmp_path):
    theirs = [
        quoted(group="backward5", value=0.45),
        quoted(group="backward5", correction="known_prior", value=0.5),
        quoted(group="forward5", recipe="another", value=0.7),
    ]
    known = outcomes.read_published(write_published(tmp_path, *theirs))
    results = outcomes.read("toy", PLAN, cells)
    table = markdown_of(results, known)
    assert "| Method | Recipe | Test prior | forward5 | uniform | backward5 |" in table
    assert "| BalPoE (3 experts) | plain | prior unknown | 63.0 ± 4.2 | 53.0 ± 4.2 | 43.0 ± 4.2 (45.0) |" in table
    assert "| BalPoE (3 experts) | plain | prior known | 63.0 ± 4.2 | 63.0 ± 4.2 | 63.0 ± 4.2 (50.0) |" in table
    assert "backward5 45.0" not in table  # not among 'also published' as well
    page = Page(page_of(results, known))
    assert "prior known" in page.words
    assert any("from forward5 to backward5: Cross-entropy 52.0 to 32.0 %" in image["alt"] for image in page.images)


def test_one_seed_has_no_deviation(cells):
    results = outcomes.read("toy", PLAN | {"seeds": [0]}, cells)
    table = outcomes.rows(results, [])
    assert find(table, "ce").measures["accuracy"].sd is None
    first, second = answers.headline(results, table), answers.answers(results, table)[0].text
    assert (
        "(1 seed), 10.0 points above the next method, Cross-entropy (50.0 %): settled for these networks" in first.text
    )
    assert "difference: 4.0 to 16.0 points, over test images alone." in first.more[0]
    assert first.more[1].startswith("To do: more seeds would tell, `plans.toy.seeds` in params.yaml")
    # 60 of 100 images against 50, the same ones: 10 differ; sqrt(.1 * .9 / 99) is 3.0 points
    assert "The lead over Cross-entropy: 95 % interval 4.0 to 16.0 points (p = 0.001), over test images alone" in second
    assert "settled for these networks, not for the methods." in second


def test_a_lead_below_a_tenth_of_a_point_is_called_one(tmp_path):
    for seed in PLAN["seeds"]:
        for method in PLAN["methods"]:
            make_cell(tmp_path / "toy_if10/plain" / method / str(seed), 0.5)
    results = outcomes.read("toy", PLAN, tmp_path)
    text = answers.headline(results, outcomes.rows(results, [])).text
    assert "but its lead is below a tenth of a point, and over the next method, " in text
    assert text.endswith("it is not settled.") and "0.0 points" not in text


def test_only_the_plan_is_read(cells):
    make_cell(cells / "toy_if10/plain/dead/0", 0.99)
    (cells / "toy_if10/plain/dead/0/metrics.json").write_text("not even JSON")
    make_cell(cells / "toy_if10/plain/ce/7", 0.99)
    assert find(table_of(cells), "ce").accuracy == pytest.approx(0.52)
    assert [row.method for row in table_of(cells, PLAN | {"methods": ["balpoe"]})] == ["balpoe"] * 3


def test_without_held_out_images(tmp_path):
    for seed in PLAN["seeds"]:
        for method in PLAN["methods"]:
            make_cell(tmp_path / "toy_if10/plain" / method / str(seed), 0.5, held_out=False)
    table = table_of(tmp_path)
    assert [row.correction for row in table] == ["raw", "aligned_on_train"] * 2
    assert table[0].best_on_held_out.mean is None
    results = outcomes.read("toy", PLAN, tmp_path)
    assert {row["aligned_on"] for row in outcomes.classes(results)} == {"train"}
    assert {row["held_out_accuracy"] for row in outcomes.curves(results)} == {None}
    assert not any("held-out" in answer.text for answer in answers.answers(results, table))
    assert page_of(results, [])


def test_published_value_stands_beside_raw_rows_only(cells, published):
    table = table_of(cells, published=outcomes.read_published(published))
    row = find(table, "balpoe")
    assert (row.published.value, row.published.sd) == (0.6, 0.005)
    assert row.difference == pytest.approx(0.63 - 0.6)
    assert [flag.split(":")[0] for flag in row.published.flags] == [
        "optimistic",
        "recipe differs from ours or is not known",
    ]
    for other in (find(table, "ce"), find(table, "balpoe", "aligned_on_train")):
        assert other.published is None and other.difference is None


def test_published_values_of_another_cut_stand_beside_a_plan_that_asks_for_them_and_say_so(cells, tmp_path):
    known = outcomes.read_published(
        write_published(tmp_path, quoted(dataset="toy_field_if10", value=0.6), quoted(dataset="elsewhere", value=0.9))
    )
    results = outcomes.read("toy", PLAN, cells)
    assert outcomes.beside(PLAN, known) == [] and "60.0 (a)" not in markdown_of(results, known)
    asks = PLAN | {"published": {"toy_if10": "toy_field_if10"}}
    text = markdown_of(outcomes.read("toy", asks, cells), known)
    assert "60.0 (a)" in text and "recipe plain: of another cut of these images; a note; source" in text
    assert "90.0" not in text


def test_a_loss_below_zero_is_one(cells):
    """LADE's has a term that is."""
    path = cells / "toy_if10/plain/ce/1/history.csv"
    rows = [row | {"loss": "-0.02"} for row in files.read_csv(path)]
    files.write_csv(path, rows, list(rows[0]))
    cell = outcomes.read("toy", PLAN, cells).cells
    assert {one.history[0]["loss"] for one in cell.values()} > {-0.02}


def test_curves_and_classes_are_tidy(cells):
    results = outcomes.read("toy", PLAN, cells)
    lines = outcomes.curves(results)
    assert len(lines) == 4 * 3
    assert [line["epoch"] for line in lines[:3]] == [1, 2, 3]
    assert list(outcomes.CURVES) == list(lines[0]) and lines[0]["loss"] == 1.0
    rows = outcomes.classes(results)
    assert len(rows) == 2 * 3 and list(rows[0]) == list(outcomes.CLASSES)
    assert rows[0]["train_images"] == 100 and rows[0]["raw"] == pytest.approx(0.52)
    assert rows[0]["aligned"] == pytest.approx(0.54) and rows[0]["aligned_on"] == "train"


def test_summary_is_small_and_takes_the_alignment_on_train(cells):
    summary = outcomes.summary(table_of(cells))
    assert summary == {
        "toy_if10": {
            "plain": {
                "ce": {"accuracy": pytest.approx(0.52), "aligned": pytest.approx(0.54)},
                "balpoe": {"accuracy": pytest.approx(0.63), "aligned": pytest.approx(0.65)},
            }
        }
    }


# -------------------------------------------------------------------------------------------- the answer


def answer_of(cells, plan=PLAN):
    """What is said of the whole data set, and of its one recipe."""
    results = outcomes.read("toy", plan, cells)
    table = outcomes.rows(results, [])
    whole, (said,) = answers.headline(results, table), answers.answers(results, table)
    return [whole.text, *whole.more, said.text]


def test_answer_names_the_winner_the_margin_and_what_is_not_settled(cells):
    whole, interval, to_do, said = answer_of(cells)
    assert whole == (
        "BalPoE (3 experts) has the highest accuracy, 63.0 ± 4.2 % with recipe plain (2 seeds), but its 11.0 points "
        "above the next method, Cross-entropy (52.0 ± 2.8 %), are not settled."
    )
    # variance over seeds 0.0013 with 2 degrees of freedom, over images 0.000736: 4.9 degrees, t = 2.59
    assert interval == "95 % interval of that difference: -0.7 to 22.7 points, over test images and seeds."
    assert to_do.startswith("To do: more seeds would tell") and to_do.endswith("take the one that costs less.")
    assert "BalPoE (3 experts) has the highest accuracy: 63.0 ± 4.2 %, 11.0 points above" in said
    assert "Cross-entropy (52.0 ± 2.8 %); 2 seeds for each method" in said
    assert "95 % interval -0.7 to 22.7 points (p = 0.060), over test images and seeds: not settled" in said
    assert "change accuracy by +2.0 points;" in said


def test_logit_adjusted_cross_entropy_is_a_method_of_its_own(cells):
    for seed in PLAN["seeds"]:
        make_cell(cells / "toy_if10/plain/ce" / str(seed), 0.3, more={"logit_adjusted": 0.4})
        make_cell(cells / "toy_if10/plain/balpoe" / str(seed), 0.5, more={"logit_adjusted": 0.3})
    whole, _, to_do, said = answer_of(cells)
    assert whole.startswith("Cross-entropy with logit adjustment wins: 70.0 ± 0.0 % with recipe plain (2 seeds), 20.0 ")
    assert to_do == "To do: take it; `longtail run toy --only 'toy_if10-plain-ce-*'` makes it again."
    assert "Cross-entropy with logit adjustment has the highest accuracy" in said
    text = markdown_of(outcomes.read("toy", PLAN, cells), [])
    first = [line for line in text.split("### ")[0].splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0].strip("| ") for line in first[2:]] == [
        "Cross-entropy with logit adjustment", "BalPoE (3 experts)", "Cross-entropy",
    ]  # fmt: skip
    assert "the highest of all is then BalPoE (3 experts), recipe plain, logit adjustment: 80.0" in text


def test_a_plan_of_one_method_has_no_others_to_run_once_it_is_whole(cells):
    alone = PLAN | {"methods": ["ce"]}
    whole, said = answer_of(cells, alone)
    assert whole == "Only Cross-entropy is in this plan: 52.0 ± 2.8 % with recipe plain (2 seeds)."
    assert "longtail run" not in said
    more = answer_of(cells, alone | {"seeds": [*PLAN["seeds"], 7]})[:2]
    assert more == [f"Only Cross-entropy has run: {whole.split(': ')[1]}", "The rest: `longtail run toy`."]


def test_missing_seeds_are_what_to_do_and_another_recipe_is_said(tmp_path):
    results, table, *_ = two_recipes(tmp_path, 2)
    said = answers.headline(results, table)
    assert said.text.startswith("Cross-entropy is ahead with 8 of 12 runs in: 80.5 ± 0.7 % with recipe long (2 to 3 ")
    assert "BalPoE (3 experts) (42.3 ± 2.5 %, recipe plain): settled." in said.text
    assert "Epochs: long 3, plain 3; the rest of" in markdown_of(results, [])
    assert "with the same one (plain, 3 seeds) it is 10.0 points below BalPoE (3 experts): " in said.more[0]
    (tmp_path / "toy_if10/plain/ce/0/metrics.json").unlink()
    (tmp_path / "toy_if10/long/ce/1/metrics.json").unlink()
    results = outcomes.read("toy", results.plan, tmp_path)
    to_do = answers.headline(results, outcomes.rows(results, [])).more[1]
    assert to_do == "To do: run the seeds that are missing, `longtail run toy --only 'toy_if10-long-ce-*'`."


def test_a_lead_beyond_images_and_seeds_is_settled(tmp_path):
    for seed in PLAN["seeds"]:
        for method, accuracy in (("ce", 0.3), ("balpoe", 0.6)):
            make_cell(tmp_path / "toy_if10/plain" / method / str(seed), accuracy + 0.01 * seed)
    whole, *_, said = answer_of(tmp_path)
    assert whole.endswith(": settled.") and ": settled." in said
    text = markdown_of(outcomes.read("toy", PLAN, tmp_path), [])
    assert "| BalPoE (3 experts) | plain | none | 2 | 60.5 | 1.0 | +30.0 (" in text
    assert "| Cross-entropy | plain | none | 2 | 30.5 | 1.0 | - | -30.0 (" in text and "| < 0.001 | behind |" in text


def test_the_grid_says_what_a_method_and_what_a_recipe_buys(cells):
    make_cell(cells / "toy_if10/long/ce/0", 0.7)
    results = outcomes.read("toy", PLAN | {"recipes": ["plain", "long", "never"]}, cells)
    text = markdown_of(results, [])
    assert "| Method | plain | Method buys | long | Method buys | Recipe buys |" in text
    assert "| Cross-entropy | 52.0 ± 2.8 | - | 70.0 | - | +18.0 |" in text
    assert "| BalPoE (3 experts) | 63.0 ± 4.2 | +11.0 | - | - | - |" in text
    assert "Method buys" not in markdown_of(outcomes.read("toy", PLAN, cells), [])


@pytest.mark.parametrize(
    ("value", "sd", "said"),
    [(0.60, 0.005, "agrees"), (0.10, 0.005, "higher"), (0.99, 0.005, "lower"), (0.99, None, "lower, these networks")],
)
def test_the_verdict_on_a_published_value(cells, tmp_path, value, sd, said):
    """Ours is 63.0: standard error 4.8 over 100 images, 2.5 over two seeds (two methods, df 2)."""
    known = outcomes.read_published(write_published(tmp_path, quoted(value=value, sd=sd, runs=5 if sd else None)))
    results = outcomes.read("toy", PLAN, cells)
    table = outcomes.rows(results, known)
    assert differences.to_published(results, find(table, "balpoe")).said("higher", "agrees", "lower") == said
    assert differences.to_published(results, find(table, "ce")) is None
    text = markdown_of(results, known)
    assert f"| {said} |" in text and "'Verdict': ours agrees" in text


def test_the_interval_around_a_published_value_by_hand(cells, tmp_path):
    """Terms over images, over our two seeds with the recipe's spread, and over their five runs."""
    known = outcomes.read_published(write_published(tmp_path, quoted(value=0.5, sd=0.02, runs=5)))
    results = outcomes.read("toy", PLAN, cells)
    row = find(outcomes.rows(results, known), "balpoe")
    right = [(int(i < 60) + int(i < 66)) / 2 - 0.5 for i in range(100)]
    terms = [(np.var(right, ddof=1) / 100, 99), ((0.02**2 * 2 + 0.03**2 * 2) / 2 / 2, 2), (0.02**2 / 5, 4)]
    variance = sum(term for term, _ in terms)
    half = stats.t.ppf(0.975, variance**2 / sum(term**2 / df for term, df in terms)) * variance**0.5
    found = differences.to_published(results, row)
    assert (found.low, found.value, found.high, found.seeds) == pytest.approx((0.13 - half, 0.13, 0.13 + half, True))
    alone = outcomes.read("toy", PLAN | {"seeds": [0]}, cells)
    found = differences.to_published(alone, find(outcomes.rows(alone, known), "balpoe"))
    assert not found.seeds  # one seed of ours: theirs widen the interval, but it claims no seeds


def two_recipes(folder, seeds_of_long):
    """A plan of the recipes plain (three seeds of two methods) and long (some seeds of one of them), and its table."""
    gains = {0: 0.0, 1: 0.02, 2: 0.05}
    for seed, gain in gains.items():
        make_cell(folder / "toy_if10/plain/ce" / str(seed), 0.3 + gain)
        make_cell(folder / "toy_if10/plain/balpoe" / str(seed), 0.4 + gain)
    for seed in range(seeds_of_long):
        make_cell(folder / "toy_if10/long/ce" / str(seed), 0.8 + gains[seed] / 2)
    results = outcomes.read("toy", PLAN | {"recipes": ["plain", "long"], "seeds": [0, 1, 2]}, folder)
    table = outcomes.rows(results, [])
    long = next(row for row in table if (row.recipe, row.method, row.correction) == ("long", "ce", "raw"))
    return results, table, long, find([row for row in table if row.recipe == "plain"], "balpoe")


def test_one_seed_never_claims_seeds_whatever_other_recipes_have(tmp_path):
    """What was false in results/paper-cifar100/table.md: the spread of another recipe stood for that of one seed."""
    results, table, long, plain = two_recipes(tmp_path, 1)
    assert not differences.compared(results, long, plain).seeds
    whole = answers.headline(results, table)
    assert whole.text.endswith("settled for these networks, not yet for the methods (one seed).")
    assert "over test images alone" in whole.more[0] and "and seeds" not in whole.text


def test_two_recipes_of_unequal_seeds_have_each_its_own_spread(tmp_path):
    """The twin: two seeds of long, its one method; three of plain, pooled over its two methods."""
    results, table, long, plain = two_recipes(tmp_path, 2)
    found = differences.compared(results, long, plain)
    d = [(int(i < 80) + int(i < 81)) / 2 - (int(i < 40) + int(i < 42) + int(i < 45)) / 3 for i in range(100)]
    terms = [
        (np.var(d, ddof=1) / 100, 99),
        (np.var([0.8, 0.81], ddof=1) / 2, 1),
        (np.var([0.0, 0.02, 0.05], ddof=1) / 3, 4),  # two methods with the same gains
    ]
    variance = sum(term for term, _ in terms)
    half = stats.t.ppf(0.975, variance**2 / sum(term**2 / df for term, df in terms)) * variance**0.5
    assert (found.low, found.high) == pytest.approx((np.mean(d) - half, np.mean(d) + half))
    whole = answers.headline(results, table)
    assert found.seeds and whole.text.endswith(": settled.") and "over test images and seeds" in whole.more[0]


def test_headline_and_table_have_the_same_verdict(tmp_path):
    """Three methods behind the highest: Holm's p, not the interval alone, decides in both."""
    plan = PLAN | {"methods": ["ce", "balpoe", "gala", "crt"], "seeds": [0]}
    for method, accuracy in (("ce", 0.55), ("balpoe", 0.60), ("gala", 0.55), ("crt", 0.55)):
        make_cell(tmp_path / "toy_if10/plain" / method / "0", accuracy)
    results = outcomes.read("toy", plan, tmp_path)
    table = outcomes.rows(results, [])
    raw = [row for row in table if row.correction == "raw"]
    second = differences.lines(results, raw)[1].to_best
    assert second.high < 0 and not second.settled  # the interval excludes 0, three comparisons do not
    assert ": not settled." in answers.answers(results, table)[0].text
    assert "are not settled." in answers.headline(results, table).text
    first = markdown_of(results, []).split("### ")[0]
    assert first.count(" ≈ |") == 3 and "≈: not settled" in first


def three_methods(folder, third):
    """ce, balpoe and gala, far apart, with the recipe plain; crt, of these accuracies, with the recipe long."""
    for seed in range(4):
        make_cell(folder / "toy_if10/plain/ce" / str(seed), 0.20 + 0.005 * seed)
        make_cell(folder / "toy_if10/plain/balpoe" / str(seed), 0.50 + 0.005 * seed)
        make_cell(folder / "toy_if10/plain/gala" / str(seed), 0.80 + 0.005 * seed)
        make_cell(folder / "toy_if10/long/crt" / str(seed), third[seed])
    plan = PLAN | {"methods": ["ce", "balpoe", "gala", "crt"], "recipes": ["plain", "long"], "seeds": [0, 1, 2, 3]}
    results = outcomes.read("toy", plan, folder)
    return answers.headline(results, outcomes.rows(results, []))


def test_who_leads_the_next_one_does_not_win_while_a_third_may_be_level(tmp_path):
    said = three_methods(tmp_path, [0.84, 0.2, 0.2, 0.7])
    assert said.text.startswith("GALA (released form) has the highest accuracy: 80.8 ± 0.6 % with recipe plain")
    assert (
        "above the next method, BalPoE (3 experts) (50.8 ± 0.6 %): settled, but it cannot be told apart from"
        in said.text
    )
    assert said.text.endswith("(48.5 ± 33.4 %, recipe long).") and said.more[1].startswith(
        "To do: more seeds would tell"
    )
    sure = three_methods(tmp_path, [0.4, 0.4, 0.41, 0.4])
    assert sure.text.startswith("GALA (released form) is ahead with 16 of 32 runs in") and "told apart" not in sure.text
    assert sure.more[1] == "To do: run the rest, `longtail run toy`."


def test_the_best_of_several_with_the_same_recipe_is_judged_as_such(tmp_path):
    """The interval of one comparison would settle it; of three, Holm's p does not, as in the table below it."""
    plan = PLAN | {"methods": ["ce", "balpoe", "gala", "crt"], "recipes": ["plain", "long"], "seeds": [0]}
    make_cell(tmp_path / "toy_if10/long/balpoe/0", 0.85)
    for method, accuracy in (("ce", 0.55), ("balpoe", 0.60), ("gala", 0.55), ("crt", 0.55)):
        make_cell(tmp_path / "toy_if10/plain" / method / "0", accuracy)
    results = outcomes.read("toy", plan, tmp_path)
    table = outcomes.rows(results, [])
    mine, rival = (find([row for row in table if row.recipe == "plain"], name) for name in ("balpoe", "ce"))
    assert differences.compared(results, mine, rival).low > 0
    assert "it is 5.0 points above Cross-entropy: not settled." in answers.headline(results, table).more[0]


def test_the_lowest_ece_is_that_of_a_method_as_it_is(tmp_path):
    """Cross-entropy with logit adjustment is one; results/posthoc-long named a higher one the lowest."""
    make_cell(tmp_path / "toy_if10/plain/ce/0", 0.3, more={"logit_adjusted": 0.4})
    path = tmp_path / "toy_if10/plain/ce/0/metrics.json"
    metrics = json.loads(path.read_text())
    metrics["last"]["raw"]["ece"], metrics["last"]["logit_adjusted"]["ece"] = 0.4, 0.3
    files.write_json(path, metrics)
    results = outcomes.read("toy", PLAN | {"methods": ["ce"], "seeds": [0]}, tmp_path)
    assert part_of(results, "Calibration").says.endswith(
        "of the methods as they are the lowest ECE has Cross-entropy, recipe plain, logit adjustment: 30.0."
    )


def test_best_on_test_is_a_trained_network_s_own(tmp_path):
    """A second stage has the history of cross-entropy, from which it starts."""
    for method, accuracy in (("ce", 0.3), ("crt", 0.2)):
        make_cell(tmp_path / "toy_if10/plain" / method / "0", accuracy, test_accuracy=[0.35, 0.3, 0.3])
    plan = PLAN | {"methods": ["ce", "crt"], "trained": ["ce"], "refit": ["crt"], "seeds": [0]}
    table = table_of(tmp_path, plan)
    assert find(table, "ce").best_on_test.mean == 0.35 and find(table, "crt").best_on_test.mean is None


def test_what_is_level_has_no_minus(tmp_path):
    for method in ("ce", "balpoe"):
        make_cell(tmp_path / "toy_if10/plain" / method / "0", 0.5)
    results = outcomes.read("toy", PLAN | {"seeds": [0]}, tmp_path)
    table = outcomes.rows(results, [])
    said = " ".join([*answers.headline(results, table).more, answers.answers(results, table)[0].text])
    assert "0.0 to 0.0 points" in said and "-0.0" not in said


def test_cells_measured_on_other_test_distributions_are_refused(cells):
    path = cells / "toy_if10/plain/balpoe/0/distributions.csv"
    path.write_text(path.read_text().replace("forward5", "forward10"))
    with pytest.raises(
        ValueError, match=r"distributions\.csv: other test distributions than in .*; `longtail run toy`"
    ):
        outcomes.read("toy", PLAN, cells)


def test_a_published_value_of_something_else_does_not_say_that_nothing_has_run(cells, tmp_path):
    rows = [quoted(group="few", value=0.5)]
    assert "Nothing of what was published" not in markdown_of(
        outcomes.read("toy", PLAN, cells), outcomes.read_published(write_published(tmp_path, *rows))
    )


def test_best_row_is_bold_once_and_recipes_are_answered_apart(cells):
    for seed in PLAN["seeds"]:
        make_cell(cells / "toy_if10/long/ce" / str(seed), 0.7 + 0.01 * seed)
        make_cell(cells / "toy_if10/long/balpoe" / str(seed), 0.8 + 0.01 * seed)
    results = outcomes.read("toy", PLAN | {"recipes": ["plain", "long"]}, cells)
    text = markdown_of(results, [])
    bold = re.findall(r"\| \*\*(.+?)\*\*", text)
    assert bold[:2] == ["80.5 ± 0.7", "63.0 ± 4.2"]  # of each recipe in the first table
    assert set(bold[2:]) == {"56.0 ± 2.8", "67.0 ± 4.2", "74.5 ± 0.7", "84.5 ± 0.7"}  # of each line of corrections
    assert text.count("has the highest accuracy") == 2 and text.count("BalPoE (3 experts) wins: 80.5 ± 0.7 %") == 1


def test_markdown_row(cells, published):
    results = outcomes.read("toy", PLAN, cells)
    text = markdown_of(results, outcomes.read_published(published))
    assert "| BalPoE (3 experts) | **63.0 ± 4.2** (published [60.0 ± 0.5](https://example.org/p)) |" in text
    assert (
        "| BalPoE (3 experts) | plain | none | 2 | 63.0 ± 4.2 | 73.0 ± 4.2 | - | 53.0 ± 4.2 "
        "| 1.500 ± 0.000 | 5.0 ± 0.0 | 62.0 ± 4.2 |"
    ) in text
    assert "| BalPoE (3 experts) | plain | none | 2 | 63.0 ± 4.2 | 60.0 ± 0.5 (a) | +3.0 | agrees |" in text
    assert "1 of 1 agree with the published accuracy." in text and "source: [a paper](https://example.org/p)." in text
    assert "- (a) BalPoE (3 experts), recipe plain: optimistic: epoch chosen on the test set; " in text
    assert "with prediction rebalancing, recipe plain (transductive: uses all test images at once): all 61.0" in text
    assert differences.points(-0.0004) == "0.0" and differences.points(0.0006) == "+0.1"
    assert (
        "| BalPoE (3 experts) | plain | none | 25.0 ± 0.0 | 37.0 ± 4.2 | 25.0 ± 0.0 | 25.0 ± 0.0 | 25.0 ± 0.0 "
        "| 0.250 ± 0.000 |"
    ) in text
    assert "- [toy_if10-plain-ce-0](cells/toy_if10/plain/ce/0/metrics.json): 50.00 %, epoch 3; [history](cells/" in text
    assert "`dvc repro stages/toy/dvc.yaml:evaluate-toy@toy_if10-plain-ce-0`" in text


# ---------------------------------------------------------------------------------------------- the gaps


def test_missing_cells_are_listed_and_do_not_stop_the_report(cells, published, tmp_path):
    (cells / "toy_if10/plain/ce/1/history.csv").unlink()  # half a cell is none
    plan = PLAN | {"methods": ["ce", "balpoe", "gala"]}
    results = outcomes.read("toy", plan, cells)
    assert results.missing == [
        Cell("toy", "toy_if10", "plain", "ce", "1"),
        Cell("toy", "toy_if10", "plain", "gala", "0"),
        Cell("toy", "toy_if10", "plain", "gala", "1"),
    ]
    table = outcomes.rows(results, [])
    assert find(table, "ce").n == 1 and find(table, "gala").n == 0
    text = markdown_of(results, [])
    assert "| Cross-entropy | plain | none | 1 of 2 | 50.0 |" in text and "| Cross-entropy | 50.0 (1 seed) |" in text
    assert "| GALA" not in text  # a row of dashes says nothing, unless there is a published value to reach
    assert "- Not run yet, recipe plain: Cross-entropy seed 1; GALA (released form) seeds 0, 1." in text
    known = outcomes.read_published(published)
    asked = [row for row in known if row.method == "balpoe"]
    assert asked
    text = markdown_of(results, [replace(row, method="gala") for row in asked])
    assert "| GALA (released form) | not run yet (published [60.0 ± 0.5](https://example.org/p)) |" in text
    assert "| GALA (released form) | plain | none | 0 of 2 | not run yet | 60.0 ± 0.5 (a) | - | - |" in text
    assert "gala" not in outcomes.summary(table)["toy_if10"]["plain"]
    page = written(cells, published, tmp_path / "out", plan)["report.html"].decode()
    assert "3 of 6 runs are in" in page


def test_a_data_set_without_any_run_is_shown_as_such(cells):
    results = outcomes.read("toy", PLAN | {"datasets": ["toy_if10", "other"]}, cells)
    text = markdown_of(results, [])
    assert "## other\n\n**No run is in yet.**\n\nStart with `longtail run toy`." in text
    assert page_of(results, [])


def test_no_cell_at_all_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.*'toy'.*4 in the plan"):
        outcomes.read("toy", PLAN, tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------- the complaints


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_measure_that_some_cells_do_not_have_yet_is_a_dash_there(cells, published, tmp_path):
    """A new measure must not make the cells of other plans unreadable."""
    for path in (cells / "toy_if10/plain/ce").rglob("metrics.json"):
        edit(path, lambda m: [block.pop("aurc") for block in m["last"].values() if isinstance(block, dict)])
    table = outcomes.rows(outcomes.read("toy", PLAN, cells), [])
    known = {row.method: row.measures["aurc"].mean for row in table if row.n and row.recipe == "plain"}
    assert known["ce"] is None and known["balpoe"] is not None
    assert "| AURC |" in written(cells, published, tmp_path / "out")["table.md"].decode()


def test_methods_made_of_the_same_trainings_are_paired_by_seed(cells):
    """The slow twin is in test_differences.py; here, which rows are: what cells say of their trainings decides."""

    def trained(method, seed, *first_epochs):
        steps = [{"step": "train", "first_epoch": one} for one in first_epochs] + [{"step": "predict"}]
        edit(cells / f"toy_if10/plain/{method}/{seed}/metrics.json", lambda m: m.update(provenance=steps))

    def paired():
        results = outcomes.read("toy", PLAN, cells)
        table = outcomes.rows(results, [])
        a, b = find(table, "ce"), find(table, "balpoe")
        found = differences.compared(results, a, b)
        right = [differences._right(results, row) for row in (a, b)]
        own, loose = differences.of_corrections(*right), differences.over_seeds(results, a, b)
        assert own != loose
        same = differences.same_trainings(results, a, b)
        assert found == differences.difference(*right, own if same else loose)
        return same

    assert not paired()  # not recorded
    for seed in (0, 1):
        trained("ce", seed, f"weights of {seed}")
        trained("balpoe", seed, f"weights of {seed}")
    assert paired()
    trained("balpoe", 1, "weights of another")
    assert not paired()
    trained("balpoe", 1, "weights of 1", "weights of another")  # experts trained apart, one of them that network
    assert not paired()
    trained("balpoe", 1, None)
    trained("ce", 1, None)
    assert not paired()


def test_what_computed_the_cells_is_said_of_each_and_not_recorded_where_it_was_not(cells, published, tmp_path):
    by = {"device": "cpu", "instructions": "AVX2", "kernels": False, "threads": 2, "processes": 1}
    steps = [
        {"step": "train", "precision": "bf16", "versions": {"torch": "2.9"}, **by, "instructions": "AVX512 bf16"},
        {"step": "refit", "precision": "fp32", "versions": {"torch": "2.9"}, **by},
    ]
    edit(cells / "toy_if10/plain/ce/0/metrics.json", lambda m: m.update(provenance=steps))
    edit(cells / "toy_if10/plain/ce/1/metrics.json", lambda m: m.update(provenance=[steps[0], steps[0] | by]))
    text = written(cells, published, tmp_path / "out")["table.md"].decode()
    rows = [line for line in text.split("### What computed the cells")[1].split("###")[0].splitlines() if "|" in line]
    assert rows[2:] == [
        "| plain | bf16 | cpu, AVX512 bf16 | PyTorch's | 2 | torch 2.9 | 1 |",
        "| plain | bf16 | cpu, AVX512 bf16 / cpu, AVX2 | PyTorch's | 2 | torch 2.9 | 1 |",
        *(line for line in rows if "not recorded" in line),
    ]
    assert any("| plain | not recorded | - | - | - | - |" in line for line in rows)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("last"), "no key 'last'"),
        (lambda m: m["last"].pop("raw"), "last: no key 'raw'"),
        (lambda m: m["last"]["raw"].pop("ece"), "last.raw.ece: missing"),
        (lambda m: m["last"]["raw"].update(accuracy="high"), "last.raw.accuracy: 'high' is not a number"),
        (lambda m: m["last"]["raw"].update(accuracy=True), "last.raw.accuracy: True is not a number"),
        (lambda m: m["last"]["raw"].update(accuracy=63.0), "last.raw.accuracy: 63.0, but allowed is 0 to 1"),
        (lambda m: m["last"]["raw"].update(accuracy=None), "last.raw.accuracy: None is not a number"),
        (lambda m: m["last"]["raw"].update(nll=float("inf")), "last.raw.nll: inf"),
        (lambda m: m["last"]["raw"].update(nll=float("nan")), "last.raw.nll: nan"),
        (lambda m: m.update(last=[1]), "last: "),
        (
            lambda m: m.update(last={"epoch": 1, "raw": 3, "aligned_on_train": 3}),
            "last.raw.accuracy: missing",
        ),
        (lambda m: m["best_on_held_out"].pop("epoch"), "best_on_held_out: no key 'epoch'"),
        (lambda m: m["last"]["raw"].update(brier=2.5), "last.raw.brier: 2.5, but allowed is 0 to 2"),
        (lambda m: m["last"]["raw"].pop("standard_error"), "last.raw.standard_error.accuracy: None is not a number"),
    ],
)
def test_wrong_metrics_name_the_file_and_the_key(cells, change, words):
    path = cells / "toy_if10/plain/ce/0/metrics.json"
    edit(path, change)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + re.escape(words)):
        outcomes.read("toy", PLAN, cells)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metrics.json", "{", "not a JSON file"),
        ("classes.csv", "class,name\n0,cat\n", "no column 'train_images'"),
        ("classes.csv", "class,name,train_images,raw,aligned_on_train\n", "no rows"),
        ("history.csv", "epoch,loss\n1,2\n", "no column 'lr'"),
        ("reliability.csv", "correction,low\nraw,0.1\n", "no column 'high'"),
        ("right.csv", "correction,images,right\nraw,100,xy\n", "row 1, right: not hexadecimal digits"),
        ("right.csv", "correction,images,right\nraw,100,ffff\n", "row 1, right: 16 places for 100 images"),
        ("right.csv", f"correction,images,right\nraw,100,{'f' * 26}\n", "no row for 'aligned_on_train'"),
        (
            "history.csv",
            "epoch,lr,loss,train_accuracy,held_out_accuracy,test_accuracy\n1,0.1,2,x,,\n",
            "row 1, train_accuracy: 'x' is not a number",
        ),
    ],
)
def test_wrong_files_are_named(cells, name, text, words):
    path = cells / "toy_if10/plain/ce/0" / name
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + re.escape(words)):
        outcomes.read("toy", PLAN, cells)


def test_cells_that_disagree_on_the_classes_are_refused(cells):
    make_cell(cells / "toy_if10/plain/balpoe/1", 0.5, names=("cat", "cow", "hen"))
    with pytest.raises(ValueError, match=r"balpoe/1/classes\.csv: other classes.*ce/0/classes\.csv"):
        outcomes.read("toy", PLAN, cells)


def test_cells_that_disagree_on_the_number_of_images_are_refused(cells):
    path = cells / "toy_if10/plain/balpoe/1/right.csv"
    kinds = ("raw", "aligned_on_train", "aligned_on_held_out")
    rows = [{"correction": kind, "images": 16, "right": "ffff"} for kind in kinds]
    files.write_csv(path, rows, evaluation.RIGHT)
    with pytest.raises(ValueError, match=r"balpoe/1/right\.csv: another number of test images.*ce/0/right\.csv"):
        outcomes.read("toy", PLAN, cells)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (quoted(value=52.0), "row 1, value: '52.0', but allowed is 0 to 1"),
        (quoted(value=None), "row 1, value: empty"),
        (quoted(optimistic="maybe"), "row 1, optimistic: 'maybe'"),
        (quoted(sd=0.01, runs=1), "row 1, runs: 1, but a deviation (sd) takes two"),
    ],
)
def test_wrong_published_rows_are_named(tmp_path, row, words):
    path = write_published(tmp_path, row)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {words}")):
        outcomes.read_published(path)


def test_a_number_published_twice_is_refused(tmp_path):
    path = write_published(tmp_path, quoted(), quoted(value=0.7))
    with pytest.raises(ValueError, match="row 2: a second row for toy_if10, plain, balpoe"):
        outcomes.read_published(path)


# ------------------------------------------------------------------------------------------ what we quote


def test_our_published_rows_are_readable_and_flagged():
    known = {row.key: row for row in outcomes.read_published(ROOT / "data/published.csv")}
    gala = known["cifar100_ldam_if100", "gala", "gala", "none", "accuracy", "all"]
    assert gala.value == 0.521 and gala.optimistic and gala.same_recipe
    balpoe = known["cifar100_ldam_if100", "balpoe", "balpoe", "none", "accuracy", "all"]
    assert (balpoe.value, balpoe.sd, balpoe.optimistic) == (0.52, 0.005, False)
    assert all(row.source for row in known.values())
    assert all(row.note for row in known.values() if not row.same_recipe)
    rebalanced = [row for row in known.values() if row.correction == "prediction_rebalancing"]
    assert rebalanced and all(row.transductive for row in rebalanced)


# ---------------------------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """Collects what a browser would fetch or run, and the text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.fetched, self.images, self.words, self.styles = [], [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.fetched += [attributes[key] for key in ("src", "href", "srcset", "data", "action") if key in attributes]
        if tag == "img":
            self.images.append(attributes)
        assert not any(name.startswith("on") for name in attributes)

    def handle_data(self, data):
        (self.styles if self.tags and self.tags[-1] == "style" else self.words).append(data)


def test_page_is_self_contained(cells, published, tmp_path):
    raw = written(cells, published, tmp_path / "out")["report.html"]
    page = Page(raw.decode())
    assert len(raw) < 5_000_000
    assert not {"script", "iframe", "link", "object", "form"} & set(page.tags)
    local = [address for address in page.fetched if address != "https://example.org/p"]  # the source, a link
    assert len(local) < len(page.fetched)
    assert all(address.startswith(("data:image/png;base64,", "#", "cells/")) for address in local)
    assert "url(" not in "".join(page.styles) and "@import" not in "".join(page.styles)
    assert "@media print" in "".join(page.styles)
    assert "@media screen and (prefers-color-scheme: dark)" in "".join(page.styles)


def test_pictures_have_sizes_and_words(cells, published, tmp_path):
    page = Page(written(cells, published, tmp_path / "out")["report.html"].decode())
    # all on one axis, corrections, other distributions, reliability, energies, loss, held-out, counts, two by class
    assert len(page.images) == 10
    for image in page.images:
        data = base64.b64decode(image["src"].partition(",")[2])
        pixels = (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"))
        assert data[:4] == b"\x89PNG" and b"Software" not in data and b"tIME" not in data
        assert pixels == (2 * int(image["width"]), 2 * int(image["height"]))
        assert len(image["alt"]) > 40
    assert page.images[0]["alt"] == (
        "Test accuracy, the highest method first. BalPoE (3 experts): plain 63.0 %, published for plain 60.0 %; "
        "Cross-entropy: plain 52.0 %."
    )
    assert "Cross-entropy 52.0 %" in page.images[1]["alt"]


def test_training_time_is_drawn_where_it_is_known(cells, published, tmp_path):
    times = tmp_path / "times.csv"
    rows = [
        {"dataset": "toy_if10", "recipe": "plain", "method": "ce", "seed": 1, "seconds": 600, "memory_mib": ""},
        {"dataset": "toy_if10", "recipe": "plain", "method": "balpoe", "seed": 0, "seconds": 60, "memory_mib": 900.5},
        {"dataset": "another", "recipe": "plain", "method": "ce", "seed": 1, "seconds": 60, "memory_mib": 1},
    ]
    files.write_csv(times, rows, list(rows[0]))
    results = outcomes.read("toy", PLAN, cells, times)
    assert results.cost == {
        Cell("toy", "toy_if10", "plain", "ce", "1"): {"minutes": 10, "memory_mib": None},
        Cell("toy", "toy_if10", "plain", "balpoe", "0"): {"minutes": 1, "memory_mib": 900.5},
    }
    page = Page(page_of(results, outcomes.read_published(published)))
    assert [image["alt"] for image in page.images if image["alt"].startswith("What")] == [
        "What training time buys: Cross-entropy, recipe plain, 10 min 54.0 %; BalPoE (3 experts), recipe plain, 1 min "
        "60.0 %.",
        "What memory buys: BalPoE (3 experts), recipe plain, 900 MiB 60.0 %.",
    ]
    files.write_csv(times, rows[:1], list(rows[0]))
    assert "A training took 10 minutes: Cross-entropy, plain, has 54.0 % for 10." in markdown_of(
        outcomes.read("toy", PLAN, cells, times), []
    )
    times.write_text("dataset,recipe\nx,y\n")
    with pytest.raises(ValueError, match=r"times\.csv: no column 'method'"):
        outcomes.read("toy", PLAN, cells, times)


def test_page_has_the_table_and_the_command_of_every_cell(cells, published, tmp_path):
    found = written(cells, published, tmp_path / "out")
    words = " ".join(" ".join(Page(found["report.html"].decode()).words).split())
    for seed in PLAN["seeds"]:
        for method in PLAN["methods"]:
            assert f"dvc repro stages/toy/dvc.yaml:evaluate-toy@toy_if10-plain-{method}-{seed}" in words.replace(
                "_ ", "_"
            )
            for name in outcomes.CELL_FILES:
                assert f'href="cells/toy_if10/plain/{method}/{seed}/{name}"' in found["report.html"].decode()
    for text in ("63.0 ± 4.2", "published 60.0 ± 0.5", "(a)", "+3.0", "has the highest accuracy"):
        assert text in words.replace("\u00a0", " ")


def test_names_are_escaped(cells, tmp_path):
    plan = PLAN | {"methods": ["ce", "<i>x</i> & |y"]}
    for seed in plan["seeds"]:
        make_cell(cells / "toy_if10/plain/<i>x<" / "i> & |y" / str(seed), 0.6)
    results = outcomes.read("<u>toy", plan, cells)
    page = page_of(results, [])
    assert "<b>dog" not in page and "<i>x" not in page and "<u>toy" not in page
    assert "&lt;i&gt;x&lt;/i&gt; &amp; |y" in page
    assert "<i>x</i> & \\|y" in markdown_of(results, [])


def test_two_runs_write_the_same_bytes(cells, published, tmp_path):
    first = written(cells, published, tmp_path / "one")
    assert sorted(first) == ["classes.csv", "curves.csv", "report.html", "summary.json", "table.md"]
    assert first == written(cells, published, tmp_path / "two")
    make_cell(cells / "toy_if10/plain/ce/0", 0.51)  # and another number gives others
    third = written(cells, published, tmp_path / "three")
    assert all(first[name] != third[name] for name in first if name != "classes.csv")


def test_what_is_said_is_computed_once_and_written_twice(cells, published, tmp_path, monkeypatch):
    asked = []
    for name in ("rows", "answers"):
        real = getattr(report, name)
        monkeypatch.setattr(report, name, lambda *args, n=name, real=real: asked.append(n) or real(*args))
    found = written(cells, published, tmp_path / "out")
    assert asked == ["rows", "answers"]
    assert all("has the highest accuracy" in found[name].decode() for name in ("table.md", "report.html"))


def test_many_classes_are_summed_up(tmp_path):
    names = [f"class {i}" for i in range(60)]
    for seed in PLAN["seeds"]:
        for method in PLAN["methods"]:
            make_cell(tmp_path / "toy_if10/plain" / method / str(seed), 0.5, names=names)
    page = page_of(outcomes.read("toy", PLAN, tmp_path), [])
    assert "lines join the means of 10 groups of classes" in page


@pytest.mark.parametrize("name", ["by_epoch", "by_class"])
def test_dvc_templates_fill_without_leftovers(cells, name):
    """The templates of `dvc plots` take what DVC gives: columns as text, one revision a row."""
    from dvc_render.vega import VegaRenderer

    results = outcomes.read("toy", PLAN, cells)
    rows, x, y = {
        "by_epoch": (outcomes.curves(results), "epoch", "held_out_accuracy"),
        "by_class": (outcomes.classes(results), "train_images", "raw"),
    }[name]
    points = [{key: str(value) for key, value in row.items()} | {"rev": "workspace"} for row in rows]
    filled = VegaRenderer(
        points, name, template=name, template_dir=str(ROOT / ".dvc/plots"), x=x, y=y, title="t"
    ).get_filled_template()
    assert "DVC_METRIC" not in json.dumps(filled)
    assert filled["data"]["values"] == points
    used = set(re.findall(r"'(\w+)'\]", json.dumps(filled["transform"])))
    assert used == {x, y}


def record_ratios(folder, few):
    """Give a cell's history gradient ratios: one for the large class, `few` for the small one."""
    rows = [row | {"gradient_ratio_0": 1.0, "gradient_ratio_1": few} for row in files.read_csv(folder / "history.csv")]
    files.write_csv(folder / "history.csv", rows, list(rows[0]))


def test_gradient_ratios_are_drawn_where_they_were_recorded_and_of_those_that_trained(cells):
    for seed, few in ((0, 0.25), (1, 0.5)):
        record_ratios(cells / f"toy_if10/plain/ce/{seed}", few)
        record_ratios(cells / f"toy_if10/plain/balpoe/{seed}", few)
    results = outcomes.read("toy", PLAN, cells)
    found = [row for row in outcomes.gradients(results) if (row["method"], row["epoch"], row["class"]) == ("ce", 3, 1)]
    assert [(row["train_images"], row["ratio"]) for row in found] == [(10, pytest.approx(math.sqrt(0.25 * 0.5)))]
    drawn = part_of(results, "Gradient ratios").figures
    assert [figure.alt for figure in drawn] == [
        f"Gradient ratio by epoch, {name}, recipe plain: at the last epoch 0.35 for the classes with fewest images "
        "and 1 for those with most." for name in ("Cross-entropy", "BalPoE (3 experts)")
    ]  # fmt: skip
    page = Page(page_of(results, []))
    assert [image["alt"] for image in page.images[-2:]] == [figure.alt for figure in drawn]
    second_stage = outcomes.read("toy", PLAN | {"trained": ["ce"], "refit": ["balpoe"]}, cells)
    assert len(part_of(second_stage, "Gradient ratios").figures) == 1
    assert "BalPoE" not in part_of(second_stage, "Training curves").figures[0].alt


def part_of(results, title):
    """A part of the report's only section."""
    (section,) = report.build(results, []).sections
    return next(part for part in section.parts if part.title == title)


def test_pictures_of_many_methods_without_cross_entropy_say_so(tmp_path):
    methods = [f"m{i}" for i in range(10)]
    for i, method in enumerate(methods):
        make_cell(tmp_path / "toy_if10/plain" / method / "0", 0.3 + 0.04 * i)
    results = outcomes.read("toy", PLAN | {"methods": methods, "seeds": [0]}, tmp_path)
    for figure in part_of(results, "Training curves").figures:
        assert figure.caption.endswith("The eight methods with the highest accuracy, raw, mean over recipes.")


def test_pictures_of_many_methods_show_the_leading_ones(tmp_path):
    methods = ["ce", *(f"m{i}" for i in range(10))]
    plan = PLAN | {"methods": methods, "seeds": [0]}
    for i, method in enumerate(methods):
        make_cell(tmp_path / "toy_if10/plain" / method / "0", 0.3 + 0.04 * i)
    results = outcomes.read("toy", plan, tmp_path)
    table = outcomes.rows(results, [])
    leading = plots.leading([report.drawn_line(row) for row in table], "ce")
    assert leading == ["ce", *(f"m{i}" for i in range(3, 10))]
    for title in ("Corrections", "Calibration", "Other test distributions", "Training curves"):
        for figure in part_of(results, title).figures:
            assert "m3" in figure.alt and "m2" not in figure.alt and figure.caption.endswith(report.LEADING)
    (section,) = report.build(results, []).sections
    assert "m0" in section.picture.alt and "aligned" not in section.picture.alt
    assert len({plots.colours(leading)[method] for method in leading}) == len(leading)


def test_cells_without_shifted_test_sets_have_no_such_part(cells):
    """As where each class has three test images."""
    for path in cells.rglob("distributions.csv"):
        files.write_csv(path, files.read_csv(path)[1:2], outcomes.DISTRIBUTIONS)
    results = outcomes.read("toy", PLAN, cells)
    (section,) = report.build(results, []).sections
    assert "Other test distributions" not in [part.title for part in section.parts]
