"""`longtail correct`: corrections for logits of anyone's, from files to files (longtail.posthoc)."""

import argparse
import ast
import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax

from longtail import posthoc
from longtail.evaluation import metrics
from longtail.posthoc import tables
from longtail.posthoc.inputs import warn_of_probabilities
from longtail.workflow import files

CORRECTIONS: dict[str, type[posthoc.Correction]] = {
    "energy": posthoc.EnergyAligning,
    "rebalancing": posthoc.PredictionRebalancing,
    "adjustment": posthoc.LogitAdjustment,
    "known-prior": posthoc.KnownPrior,
    "unknown-prior": posthoc.ExpectationMaximization,
    "temperature": posthoc.TemperatureScaling,
    "vector": posthoc.VectorScaling,
}
ECE_BINS = 15
NEAR, EXACT = 0.1, 5e-3  # of 1: sums of rounded probabilities, and those that posthoc takes for probabilities
EXAMPLE = """
examples:
  longtail correct test.npy --labels test_labels.npy --fit train.npy --fit-labels train_labels.npy --fitted-on train \\
      --out corrected.npy --shift shift.json
  longtail correct test.npy --by rebalancing --fitted-on test --out corrected.npy      # fitted on what it corrects
  longtail correct new.parquet --apply shift.json --out corrected.parquet               # a shift from before
"""


def main(argv: Sequence[str]) -> None:
    """The command with these arguments; ends with a message where something is wrong."""
    parser = argparse.ArgumentParser(
        prog="longtail correct", description=__doc__, epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("logits", help="to correct: N x C numbers in .npy, .npz (FILE.npz:NAME), .csv or .parquet")
    parser.add_argument(
        "--labels", help="their classes, 0 to C - 1: for the table, and to fit on where --fit is not given"
    )
    parser.add_argument("--by", default="energy", choices=[*CORRECTIONS], help="which correction (default: energy)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of it, e.g. tau=1.5"
    )
    parser.add_argument("--fit", help="logits to fit on (default: those to correct)")
    parser.add_argument("--fit-labels", help="the labels of --fit")
    parser.add_argument("--fitted-on", choices=posthoc.FITTED_ON, help="what the logits that it is fitted on are")
    parser.add_argument("--apply", metavar="SHIFT.json", help="take a correction from a file in place of fitting one")
    parser.add_argument("--out", help="where the corrected logits go")
    parser.add_argument("--shift", metavar="SHIFT.json", help="where scale and shift go")
    with warnings.catch_warnings():
        warnings.simplefilter("once")
        warnings.filterwarnings("ignore", "these logits are probabilities")  # `_check` names the file
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            run(parser.parse_args(argv))
        except ValueError as error:
            sys.exit(f"error: {files.without_advice(str(error))}")
        except OSError as error:
            sys.exit(f"error: {files.said(error)}")


def run(args: argparse.Namespace) -> None:
    """Fit or read a correction, print what it changes, write what was asked for.

    Raises ValueError and OSError that name file, row and class; nothing is written then.
    """
    if args.fit_labels and not args.fit:
        raise ValueError("--fit-labels needs --fit")
    if args.out:
        tables.kind_of(Path(args.out))
    for target in filter(None, (args.out, args.shift)):
        files.check_target(target)
    with ExitStack() as stack:
        logits, labels = (_open(stack, given) for given in (args.logits, args.labels))
        assert logits is not None
        _check(args.logits, logits, args.labels, labels)
        if args.apply:
            correction: posthoc.Correction = _read(args.apply)
            if len(correction.shift_) != logits.shape[1]:
                raise ValueError(
                    f"{args.apply} has {len(correction.shift_)} classes, {args.logits} has {logits.shape[1]}"
                )
        else:
            correction = _fit(stack, args, logits, labels)
        try:
            correction.transform(logits[:1])
        except ValueError as error:
            raise ValueError(f"{args.apply or args.fit or args.logits}: {error}") from error
        print(f"{args.apply or _described(correction)}; fitted on {_fitted_on(args, correction)}"
              + "".join(f"; {flag}" for flag in correction.flags))  # fmt: skip
        if labels is not None:
            print(table(logits, labels, correction))
        if args.out:
            with _naming(args.out):
                _write(args.out, logits, correction, tables.class_names(args.logits))
            print(f"corrected logits: {args.out}")
        if args.shift:
            with _naming(args.shift):
                files.write_json(args.shift, correction.to_dict())
            print(f"scale and shift:  {args.shift}")


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Whatever stops the writing of a file is said with its name: a full disk tells none."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: {error.strerror or error}") from error


def _write(out: str, logits: np.ndarray, correction: posthoc.Correction, names: Sequence[str] | None) -> None:
    """The corrected logits, a slice at a time."""
    with tables.written(out, logits.shape, _float(logits), names) as write:
        for _, part in posthoc.slices(logits):
            write(correction.transform(part))


def _open(stack: ExitStack, given: str | None) -> np.ndarray | None:
    if given is None:
        return None
    path, _, array = given.partition(".npz:")
    return stack.enter_context(tables.opened(f"{path}.npz" if array else given, array=array or None))


def _check(path: str, logits: np.ndarray, labels_path: str | None, labels: np.ndarray | None) -> None:
    """posthoc.check, with the names of the files; a slice at a time, so that nothing is read at once."""
    try:
        if logits.ndim != 2 or 0 in logits.shape:
            posthoc.check(logits)
        for where, part in posthoc.slices(logits):
            if not where.start:
                warn_of_probabilities(part, f"{path}: these logits")
                _warn_of_rounded(path, part)
            try:
                posthoc.check(part)
            except ValueError as error:
                raise ValueError(f"rows {where.start} to {where.start + len(part) - 1}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if labels is not None:
        try:
            posthoc.check_labels(posthoc.as_labels(labels), *logits.shape)
        except ValueError as error:
            header = str(labels_path).endswith(".csv") and labels.shape == (len(logits) + 1,)
            hint = f"; is its first line, {labels[0]:g}, a header? give the column a name" if header else ""
            raise ValueError(f"{labels_path}: {error}{hint}") from error


def _warn_of_rounded(path: str, logits: np.ndarray) -> None:
    """Warn of probabilities that were rounded, or are percent: none is negative, and sums of rows are near 1 or 100."""
    sums = logits.sum(1, dtype=np.float64)
    for whole, called in ((1, "rounded probabilities"), (100, "percentages")):
        near = abs(sums / whole - 1)
        if logits.shape[1] > 1 and logits.min() >= 0 and logits.max() <= whole and near.max() < NEAR:
            if whole > 1 or near.max() > EXACT:  # else it has been said
                said = f"look like {called} (none is negative, each row sums to about {whole})"
                print(
                    f"warning: {path}: these {said}, not logits: corrections are of logits; take logarithms of what "
                    "was not rounded",
                    file=sys.stderr,
                )
            return


def _fit(
    stack: ExitStack, args: argparse.Namespace, logits: np.ndarray, labels: np.ndarray | None
) -> posthoc.Correction:
    settings = _settings(args.by, args.set)
    made = CORRECTIONS[args.by](**settings)
    if args.by == "known-prior" and "test_prior" not in settings:
        raise ValueError(
            "--by known-prior needs the prior of the test set: --set test_prior=FILE.npy (C numbers, any scale), or "
            "--set test_prior=uniform; --set model_prior=FILE.npy where the logits are not of a uniform one"
        )
    if args.by == "unknown-prior" and args.fit:
        raise ValueError(
            "--by unknown-prior estimates the prior of the logits that it is fitted on, and that is to be the one of "
            f"{args.logits}: leave --fit out"
        )
    path, fit_logits, fit_labels = args.logits, logits, labels
    if args.fit:
        path, fit_labels = args.fit, _open(stack, args.fit_labels)
        opened = _open(stack, args.fit)
        assert opened is not None
        fit_logits = opened
        _check(args.fit, fit_logits, args.fit_labels, fit_labels)
        if fit_logits.shape[1] != logits.shape[1]:
            raise ValueError(f"{args.fit} has {fit_logits.shape[1]} classes, {args.logits} has {logits.shape[1]}")
    if made.needs_labels and fit_labels is None:
        raise ValueError(f"--by {args.by} is fitted on labels: give --{'fit-' if args.fit else ''}labels")
    try:
        return made.fit(fit_logits, fit_labels, fitted_on=args.fitted_on)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _fitted_on(args: argparse.Namespace, correction: posthoc.Correction) -> str:
    """What the head of the table says of where a correction comes from; a fit on the scored labels is called one."""
    if correction.fitted_on_ or args.apply:
        return correction.fitted_on_ or "unsaid"
    if args.fit:
        return f"{args.fit} (--fitted-on says what that is)"
    if correction.needs_test_prior or correction.get_params().get("prior") is not None:
        return "nothing: its prior is given"
    if correction.needs_labels:
        return "the labels that it is scored by: 'after' is too good (--fit and --fit-labels take others)"
    return "the logits that it corrects, without labels"


def _settings(by: str, given: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` as keyword arguments; a value that is a file of numbers is read."""
    allowed = [*inspect.signature(CORRECTIONS[by]).parameters]
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name not in allowed:
            raise ValueError(
                f"--set {text}: allowed for {by} are {', '.join(f'{key}=...' for key in allowed) or 'none'}"
            )
        if Path(value).suffix in tables.KINDS:
            with tables.opened(value) as array:
                found[name] = np.array(array)
            continue
        if value in ("true", "false"):  # as in params.yaml
            found[name] = value == "true"
            continue
        try:
            found[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            found[name] = value  # a word, as in reading=normalized
    return found


def _read(path: str) -> posthoc.Affine:
    fitted = files.read_json(path)
    try:
        if not isinstance(fitted, Mapping):
            raise ValueError(f"holds a {type(fitted).__name__}; expected what to_dict or --shift writes")
        return posthoc.from_dict(fitted)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _described(correction: posthoc.Correction) -> str:
    settings = {key: value for key, value in correction.get_params().items() if not isinstance(value, np.ndarray)}
    return f"{type(correction).__name__}({', '.join(f'{key}={value!r}' for key, value in settings.items())})"


def _float(logits: np.ndarray) -> np.dtype:
    return logits.dtype if logits.dtype in (np.float16, np.float32, np.float64) else np.dtype(np.float64)


def measures(logits: np.ndarray, labels: np.ndarray, correction: posthoc.Correction | None) -> dict[str, float]:
    """Accuracy, mean over classes of class accuracy, worst class, nll and ece of the logits, a slice at a time."""
    labels = posthoc.as_labels(labels)
    predicted, confidence, nll = np.empty(len(labels), dtype=int), np.empty(len(labels)), 0.0
    for where, part in posthoc.slices(logits):
        log_p = log_softmax((part if correction is None else correction.transform(part)).astype(np.float64), axis=1)
        predicted[where], confidence[where] = log_p.argmax(1), np.exp(log_p.max(1))
        nll -= float(log_p[np.arange(len(part)), labels[where]].sum())
    by_class = metrics.class_accuracy(predicted, labels, logits.shape[1])
    right = predicted == labels
    return {
        "accuracy (%)": 100 * float(right.mean()),
        "mean over classes (%)": 100 * float(np.nanmean(by_class)),
        "worst class (%)": 100 * float(np.nanmin(by_class)),
        "NLL (nats)": nll / len(labels),
        "ECE (%)": 100 * metrics.ece(confidence, right, bins=ECE_BINS),
    }


def table(logits: np.ndarray, labels: np.ndarray, correction: posthoc.Correction) -> str:
    """The measures before and after."""
    before, after = measures(logits, labels, None), measures(logits, labels, correction)
    width = max(map(len, before))
    lines = [f"{'':{width}}  {'before':>9}  {'after':>9}"]
    return "\n".join(lines + [f"{name:{width}}  {before[name]:9.3f}  {after[name]:9.3f}" for name in before])
