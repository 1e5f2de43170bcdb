"""The ``uq`` command: compare methods, fit one, predict with it, and report how calibrated it is.

Exit codes: 0 done, 1 the data, a file or the fit failed, or Ctrl-C or SIGTERM ended it, 2 the
command line is wrong. An error is one line on stderr. With ``--json`` stdout holds exactly one JSON
document; with ``--json-progress`` stderr holds one JSON object a line while a model is fitted.
"""

from __future__ import annotations

# torch, pandas and the estimators are imported by the handlers: `uq --help` answers at once.
import argparse
import ast
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from uq.errors import DataError, FitInterruptedWarning, SaveError, UQError
from uq.texts import visible

if TYPE_CHECKING:
    import pandas as pd

    from uq.data import Dataset
    from uq.distributions import Predictive


_BATCH_ROWS = 8192  # predicted at once
_GROUP_VALUES = 10  # distinct numbers that are groups as they are


class UsageError(UQError):
    """The command line itself is wrong; nothing was started."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``uq`` command and return its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; by default those of the process.

    Examples
    --------
    >>> from uq.cli import main
    >>> main(["--version"])
    uq ...
    0
    """
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    try:
        with warnings.catch_warnings(), _terminable():
            # An estimator that is interrupted keeps what it has; a command stops instead.
            warnings.simplefilter("error", FitInterruptedWarning)
            warnings.showwarning = _show_warning
            args = _parser().parse_args(argv)
            args.handler(args)
        sys.stdout.flush()
        return 0
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except BrokenPipeError:  # the reader has seen enough, as in `uq predict … | head`
        _drop_stdout()
        return 0
    except (KeyboardInterrupt, FitInterruptedWarning) as stop:
        going_on = str(stop) if "--resume" in str(stop) else ""
        return _fail(going_on or "interrupted", 1)
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _fail(_describe(error), 2 if isinstance(error, UsageError) else 1)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does, so that no file is left half-written."""

    def note_stop(number: int, frame: Any) -> None:  # known by this name to a fit, which may wait
        raise KeyboardInterrupt

    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.getsignal(signal.SIGTERM)
        if before is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, note_stop)
    try:
        yield
    finally:
        if before is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return where + error.strerror
    if isinstance(error, UQError | ValueError | OSError):
        return str(error)
    return f"{type(error).__name__}: {error} (unexpected; --debug shows where)"


def _fail(message: str, code: int) -> int:
    print("uq: error:", visible(" ".join(message.split())), file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        _drop_stdout()
    return code


def _drop_stdout() -> None:
    """Send what is still buffered nowhere, so that the interpreter's last flush cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print("uq: warning:", visible(" ".join(str(message).split())), file=sys.stderr)


# -- command line --------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    from uq import __version__
    from uq.data import DATASETS

    parser = _Parser(prog="uq", description="Predictive uncertainty, from the command line.")
    parser.add_argument("--version", action="version", version=f"uq {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    data_help = f"CSV or Parquet file, or one of {', '.join(DATASETS)}"

    def command(name: str, handler: Callable[[argparse.Namespace], None], text: str) -> _Parser:
        added: _Parser = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:]
        )
        added.set_defaults(handler=handler)
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return added

    compare = command("compare", _compare, "fit several methods, report on held-out rows")
    compare.add_argument("data", metavar="DATA", help=data_help)
    _add_target(compare)
    compare.add_argument(
        "--methods", metavar="A,B", help="default: the quick ones; 'all', or see `uq methods`"
    )
    compare.add_argument("--test-size", type=_share, default=0.25, metavar="SHARE", help="0.25")
    compare.add_argument("--seed", type=_natural, default=0, metavar="N", help="0")
    compare.add_argument("--max-epochs", type=_positive, metavar="N", help="of every fit")
    _add_report(compare, "reports/<data>")
    compare.add_argument("--quiet", action="store_true", help="no progress on stderr")

    fit = command("fit", _fit, "fit one method on all rows and save the model")
    fit.add_argument("data", metavar="DATA", help=data_help)
    _add_target(fit)
    fit.add_argument("--method", required=True, metavar="METHOD", help="see `uq methods`")
    fit.add_argument("--out", required=True, type=Path, metavar="FILE", help="such as model.uq")
    fit.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="parameter of the estimator, such as hidden=64,64 or device=cpu; may be repeated",
    )
    fit.add_argument("--seed", type=_natural, default=0, metavar="N", help="0")
    fit.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="folder to write to now and then"
    )
    fit.add_argument("--resume", action="store_true", help="go on from what --checkpoint holds")
    fit.add_argument(
        "--json-progress", action="store_true", help="one JSON object a line on stderr"
    )

    predict = command("predict", _predict, "predict the rows of a table, one line each")
    predict.add_argument("model", metavar="MODEL", help="file that `uq fit` wrote")
    predict.add_argument("data", metavar="DATA", help=data_help)
    predict.add_argument(
        "--out", type=Path, metavar="FILE", help=".csv or .parquet; default: CSV on stdout"
    )
    predict.add_argument(
        "--coverage", type=_share, default=0.9, metavar="SHARE", help="of the interval; 0.9"
    )

    report = command("report", _report, "report on a saved model with the labels of a table")
    report.add_argument("model", metavar="MODEL", help="file that `uq fit` wrote")
    report.add_argument("data", metavar="DATA", help=data_help)
    report.add_argument("--target", metavar="COL", help="column with the truth")
    _add_report(report, "reports/<model>")

    pretrain = command("pretrain", _pretrain, "train a prior-data fitted network on a prior")
    pretrain.add_argument(
        "--prior",
        required=True,
        metavar="NAME",
        help="gp, gp-hyper, bnn, scm, tabular-regression or tabular-classification",
    )
    pretrain.add_argument("--out", required=True, type=Path, metavar="FILE", help=".safetensors")
    pretrain.add_argument("--steps", required=True, type=_positive, metavar="N")
    pretrain.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    pretrain.add_argument("--init", metavar="FILE", help="finished network to start from")
    pretrain.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of uq.inference.pretrain_pfn, such as d_model=96; may be repeated",
    )
    pretrain.add_argument("--seed", type=_natural, default=0, metavar="N", help="0")
    pretrain.add_argument("--quiet", action="store_true", help="no progress on stderr")

    methods = command("methods", _methods, "list the methods")
    methods.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", metavar="COL", help="column to predict, needed for a file")
    parser.add_argument(
        "--task", choices=("classification", "regression"), help="default: told by the target"
    )


def _add_report(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help=f"folder, .html, .json or .md; default: {default}"
    )
    parser.add_argument("--ood", metavar="FILE", help="table of out-of-distribution rows")
    parser.add_argument(
        "--groups", metavar="A,B", help="columns by which to group rows; numbers go by quarters"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def _share(text: str) -> float:
    return _number(text, float, lambda value: 0 < value < 1, "a number between 0 and 1")


def _natural(text: str) -> int:
    return _number(text, int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2^32 - 1")


def _positive(text: str) -> int:
    return _number(text, int, lambda value: value > 0, "a whole number from 1 on")


def _number(text: str, kind: Callable[[str], Any], fits: Callable[[Any], bool], wanted: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"needs {wanted}, got {text!r}")
    return value


# -- commands ------------------------------------------------------------------------------------


def _compare(args: argparse.Namespace) -> None:
    names = _chosen_methods(args.methods)
    data = _open(args)
    out = _folder(args.out or Path("reports") / data.name)
    ood = _ood(args.ood, data)
    groups = _groups(args.groups, data)
    from uq import calibration
    from uq.data import DATASETS, split_rows
    from uq.models.registry import METHODS

    if args.methods == "all":
        names = [name for name in names if data.task in METHODS[name].tasks]
    guessed = args.task is None and args.data not in DATASETS
    if guessed and data.task == "classification" and data.y.dtype.kind in "iuf":
        _progress(
            args,
            f"{data.y.nunique()} whole numbers in the target are taken as classes; "
            "--task regression predicts them as numbers",
        )
    X_train, X_test, y_train, y_test = split_rows(
        data.X, data.y, data.task, test_size=args.test_size, seed=args.seed
    )
    settings = {} if args.max_epochs is None else {"max_epochs": args.max_epochs}
    dists: dict[str, Predictive] = {}
    ood_dists: dict[str, Predictive] = {}
    fit_seconds: dict[str, float] = {}
    predict_seconds: dict[str, float] = {}
    _warm_up()
    for name in names:
        model = _model(name, data.task, settings, args.seed)
        _progress(args, f"{name}: fitting {len(y_train)} rows")
        start = time.perf_counter()
        model.fit(X_train, y_train)
        fitted = time.perf_counter()
        dists[name] = model.predict_distribution(X_test)
        fit_seconds[name] = round(fitted - start, 3)
        predict_seconds[name] = round(time.perf_counter() - fitted, 3)
        _progress(args, f"{name}: fitted in {fit_seconds[name]:.1f} s")
        if ood is not None:
            ood_dists[name] = model.predict_distribution(ood)
    notes = {
        **_facts(data),
        "rows to fit": len(y_train),
        "held-out rows": len(y_test),
        "seed": args.seed,
        "seconds to fit": fit_seconds,
        "seconds to predict": predict_seconds,
        **({} if ood is None else {"out of distribution": args.ood or data.ood_name}),
    }
    report = calibration.compare(
        dists,
        y_test.to_numpy(),
        ood=ood_dists or None,
        groups=None if groups is None else groups.loc[y_test.index],
        title=data.name,
        notes=notes,
    )
    _publish(report, out, as_json=args.json)


def _fit(args: argparse.Namespace) -> None:
    name = _known_method(args.method)
    settings = dict(_setting(text) for text in args.set)
    if args.resume and args.checkpoint is None:
        raise UsageError("--resume needs --checkpoint, the folder that the fit before wrote to")
    if args.checkpoint is not None:
        settings["checkpoint_dir"] = args.checkpoint
    data = _open(args)
    start = time.perf_counter()

    def tell(event: str, **facts: Any) -> None:
        if args.json_progress:
            seconds = round(time.perf_counter() - start, 3)
            line = {"event": event, "method": name, **facts, "seconds": seconds}
            print(json.dumps(line), file=sys.stderr, flush=True)

    def each_epoch(state: Any) -> None:
        losses = {"train_loss": state.train_loss, "held_out_loss": state.held_out_loss}
        tell("epoch", epoch=state.epoch, **losses)

    model = _model(name, data.task, {**settings, "callbacks": (each_epoch,)}, args.seed)
    _check_file(args.out)
    tell("start", rows=len(data.y), columns=data.X.shape[1])
    try:
        model.fit(data.X, data.y, resume=args.resume)
    except (KeyboardInterrupt, FitInterruptedWarning) as error:
        tell("interrupted")
        if args.checkpoint is None:
            raise
        raise FitInterruptedWarning(
            f"interrupted; the same command with --resume goes on from {args.checkpoint}"
        ) from error
    fitted = model.estimator_
    tell("end", stop_reason=fitted.stop_reason_, epochs=fitted.n_epochs_)
    model.save(args.out)
    print(
        f"{args.out}: {type(model.estimator).__name__} fitted on {len(data.y)} rows, "
        f"{data.X.shape[1]} columns in {time.perf_counter() - start:.1f} s"
    )


def _predict(args: argparse.Namespace) -> None:
    if args.out is not None:
        if args.out.suffix.lower() not in (".csv", ".parquet"):
            raise UsageError(f"--out must end in .csv or .parquet, got {args.out}")
        _check_file(args.out)
    from uq.files import writing

    model = _load(args.model)
    frames = _prediction_frames(model, args)
    first, named = next(frames)  # a mistake shows before a file is touched
    every = itertools.chain([first], (frame for frame, _ in frames))
    if args.out is None:
        for i, frame in enumerate(every):
            frame.to_csv(
                sys.stdout,
                index=named,
                header=i == 0,
                float_format="%.9g",
                lineterminator="\n",
            )
        return
    with writing(args.out) as file:
        if args.out.suffix.lower() == ".csv":
            for i, frame in enumerate(every):
                frame.to_csv(file, index=named, header=i == 0, float_format="%.9g")
        else:
            _write_parquet(file, every, named)


def _prediction_frames(model: Any, args: argparse.Namespace) -> Iterator[tuple[pd.DataFrame, bool]]:
    """Predictions of a few thousand rows at a time, and whether the rows have labels."""
    import pandas as pd

    from uq.data import DATASETS, load_dataset
    from uq.distributions import ClassPredictive
    from uq.streams import TableStream, row_batches

    # A file may be larger than memory, and its predictions are larger than it.
    rows = load_dataset(args.data).X if args.data in DATASETS else TableStream(args.data)
    named, start = False, 0
    for i, part in enumerate(row_batches(rows, _BATCH_ROWS)):
        dist = model.predict_distribution(part)
        labels = isinstance(dist, ClassPredictive)
        frame = _label_frame(dist) if labels else _number_frame(dist, args.coverage)
        if i == 0:
            # Row labels are worth a column; a plain count of the rows is not.
            named = dist.index is not None and not _is_row_number(dist.index)
        if named and frame.index.name is None:
            frame.index.name = "row"
        if not named:
            frame.index = pd.RangeIndex(start, start + len(frame))
            start += len(frame)
        yield frame, named


def _write_parquet(file: Any, frames: Iterable[pd.DataFrame], named: bool) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    for frame in frames:
        table = pa.Table.from_pandas(frame, preserve_index=named)
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table.cast(writer.schema))
    if writer is not None:
        writer.close()


def _report(args: argparse.Namespace) -> None:
    from uq import calibration
    from uq.data import open_dataset

    model = _load(args.model)
    data = open_dataset(args.data, target=_target(args), task=_task_of(model))
    name = Path(args.model).stem
    out = _folder(args.out or Path("reports") / name)
    ood = _ood(args.ood, data)
    groups = _groups(args.groups, data)
    report = calibration.report(
        model.predict_distribution(data.X),
        data.y.to_numpy(),
        ood=None if ood is None else model.predict_distribution(ood),
        groups=groups,
        name=name,
        title=f"{name} on {data.name}",
        notes={
            **_facts(data),
            "model": args.model,
            **({} if ood is None else {"out of distribution": args.ood or data.ood_name}),
            "mind": "rows that the model was fitted on make it look better than it is",
        },
    )
    _publish(report, out, as_json=args.json)


def _pretrain(args: argparse.Namespace) -> None:
    settings = dict(_setting(text) for text in args.set)
    if args.out.suffix != ".safetensors":
        raise UsageError(f"--out must end in .safetensors, got {args.out}")
    _check_file(args.out)
    import inspect

    from uq.data import suggest
    from uq.files import write_atomically
    from uq.inference.pfn import pretrain_pfn
    from uq.inference.pfn_card import model_card

    own = {"prior", "out", "steps", "resume", "init", "random_state", "callbacks", "command"}
    known = set(inspect.signature(pretrain_pfn).parameters) - own - {"verbose"}
    for key in settings:
        if key not in known:
            raise UsageError(f"--set: pretraining has no setting {key!r}{suggest(key, known)}")
    model, meta = pretrain_pfn(
        args.prior,
        steps=args.steps,
        out=args.out,
        resume=args.resume,
        init=args.init,
        random_state=args.seed,
        command=_pretrain_command(args),
        verbose=0 if args.quiet else 1,
        **settings,
    )
    card = args.out.with_suffix(".md")
    write_atomically({card: model_card(model, meta, name=args.out.stem).encode()})
    run = meta["runs"][-1]
    print(
        f"{args.out}: {sum(p.numel() for p in model.parameters())} weights after "
        f"{run['steps_done']} steps in {run['seconds'] / 60:.1f} min; held-out loss "
        f"{run['log'][-1]['held_out']['mean']:.4f} nats; described in {card}"
    )


def _pretrain_command(args: argparse.Namespace) -> str:
    """The command as another would type it: files by their names, without their folders."""
    parts = [f"uq pretrain --prior {args.prior} --steps {args.steps} --seed {args.seed}"]
    parts += [f"--out {args.out.name}"]
    parts += [f"--init {Path(args.init).name}"] if args.init else []
    return " ".join(parts + [f"--set {text}" for text in args.set])


def _methods(args: argparse.Namespace) -> None:
    from uq.models.registry import methods

    table = methods()
    if args.json:
        print(json.dumps(table.reset_index().to_dict("records"), indent=2))
        return
    width = max(map(len, table.index)) + 2
    for name, row in table.iterrows():
        print(f"{name:{width}}{row['cost']}")
        print(f"{'':{width}}needs {row['needs']}")
        print(f"{'':{width}}{row['paper']}")


# -- models --------------------------------------------------------------------------------------


def _known_method(name: str) -> str:
    from uq.data import suggest
    from uq.models.registry import METHODS

    if name.lower() not in METHODS:
        raise UsageError(f"method {name!r} is unknown{suggest(name, METHODS)}")
    return name.lower()


def _chosen_methods(text: str | None) -> list[str]:
    from uq.models.registry import METHODS, QUICK

    if text is None:
        return list(QUICK)
    names = list(METHODS) if text == "all" else [n.strip() for n in text.split(",") if n.strip()]
    if not names:
        raise UsageError("--methods names no method; see `uq methods`")
    return list(dict.fromkeys(map(_known_method, names)))


def _model(name: str, task: Any, settings: dict[str, Any], seed: int) -> Any:
    from uq.data import suggest
    from uq.models.registry import estimator_class
    from uq.models.table import TableModel

    estimator = estimator_class(name, task)()
    known = estimator.get_params(deep=False)
    for key in settings:
        if key not in known:
            raise UsageError(
                f"{type(estimator).__name__} has no parameter {key!r}{suggest(key, known)}"
            )
    return TableModel(estimator.set_params(**{"random_state": seed, **settings}))


def _warm_up() -> None:
    """Pay what torch does once in a process before the clock of the first method runs."""
    import numpy as np

    from uq.models.map import MAPRegressor

    MAPRegressor(max_epochs=1, patience=None, random_state=0).fit(np.eye(4), np.arange(4.0))


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (equals and name.strip() and value.strip()):
        raise UsageError(f"--set takes NAME=VALUE, got {text!r}")
    try:
        return name.strip(), ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        # A bare word is text, so that the shell's quotes need no quotes around them.
        if value.strip().replace(":", "").replace("-", "").isidentifier():
            return name.strip(), value.strip()
    raise UsageError(f"--set {text}: the value is neither a Python literal nor a word")


def _load(path: str) -> Any:
    from uq.io import load

    if Path(path).suffix.lower() in (".csv", ".tsv", ".txt", ".parquet", ".pq"):
        raise DataError(f"{path} looks like data, not a model; the model comes first: MODEL DATA.")
    model = load(path)
    if not hasattr(model, "predict_distribution"):
        raise DataError(f"{path}: holds a {type(model).__name__}, which is not a model.")
    return model


def _task_of(model: Any) -> Any:
    from sklearn.base import is_classifier

    return "classification" if is_classifier(model) else "regression"


# -- data ----------------------------------------------------------------------------------------


def _target(args: argparse.Namespace) -> str | None:
    """Check that there is a target exactly where DATA is a file; a mistake in usage otherwise."""
    from uq.data import DATASETS

    if args.data in DATASETS and args.target is not None:
        raise UsageError(f"{args.data} is bundled with its target; leave --target out")
    if args.data not in DATASETS and args.target is None and Path(args.data).exists():
        raise UsageError(f"{args.data} is a file: name the column to predict with --target")
    target: str | None = args.target
    return target


def _open(args: argparse.Namespace) -> Dataset:
    from uq.data import open_dataset

    return open_dataset(args.data, target=_target(args), task=args.task)


def _features(source: str) -> pd.DataFrame:
    from uq.data import DATASETS, load_dataset, read_table

    return load_dataset(source).X if source in DATASETS else read_table(source)


def _ood(source: str | None, data: Dataset) -> pd.DataFrame | None:
    if source is None:
        return data.ood
    frame = _features(source)
    absent = [name for name in data.X.columns if name not in frame.columns]
    if absent:  # said before the fits rather than after the first
        raise DataError(f"{source}: there is no column {absent[0]!r}, which {data.name} has.")
    return frame


def _groups(names: str | None, data: Dataset) -> pd.DataFrame | None:
    """Columns that group the rows; numbers of many values by quarters."""
    if names is None:
        return None
    import pandas as pd

    chosen = list(dict.fromkeys(name.strip() for name in names.split(",")))
    absent = [name for name in chosen if name not in data.X]
    if absent:
        raise DataError(
            f"--groups: {data.name} has no column {absent[0]!r}; it has "
            f"{', '.join(map(str, data.X.columns))}."
        )
    frame = data.X[chosen].copy()
    for name in chosen:
        if pd.api.types.is_numeric_dtype(frame[name]) and frame[name].nunique() > _GROUP_VALUES:
            frame[name] = pd.qcut(frame[name], 4, duplicates="drop", precision=3)
    return frame


# -- output --------------------------------------------------------------------------------------


def _number_frame(dist: Any, coverage: float) -> pd.DataFrame:
    if len(dist.batch_shape) > 1:
        raise DataError(f"uq predict writes one target; the model has {dist.batch_shape[1]}.")
    frame = dist.to_frame()
    lower, upper = dist.interval(coverage)
    frame["lower"], frame["upper"] = lower.cpu().numpy(), upper.cpu().numpy()
    return frame[["mean", "std", "lower", "upper", "aleatoric", "epistemic"]]


def _label_frame(dist: Any) -> pd.DataFrame:
    frame = dist.to_frame().add_prefix("p_")
    frame.insert(0, "label", dist.classes[dist.mode.cpu().numpy()])
    return frame.assign(entropy=dist.entropy().cpu().numpy())


def _is_row_number(index: pd.Index) -> bool:
    import pandas as pd

    return index.equals(pd.RangeIndex(len(index)))


def _facts(data: Dataset) -> dict[str, str]:
    """What a report says of its data."""
    facts = {"data": data.description or data.name, "target": f"{data.y.name} ({data.task})"}
    return facts | ({"target unit": data.target_unit} if data.target_unit else {})


def _publish(report: Any, out: Path, *, as_json: bool) -> None:
    html = report.save(out)
    if as_json:
        print(json.dumps({"html": str(html), **report.to_dict()}, indent=2, allow_nan=False))
    else:
        print(report, f"\n{html}", sep="\n")


def _progress(args: argparse.Namespace, line: str) -> None:
    if not args.quiet:
        print(visible(line), file=sys.stderr, flush=True)


def _folder(path: Path) -> Path:
    """Create the folder before anything is fitted, so that a wrong path costs no time."""
    folder = path.parent if path.suffix in (".html", ".json", ".md") else path
    folder.mkdir(parents=True, exist_ok=True)
    return path


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise SaveError(f"{path}: is a folder; name a file in it.")
    if not path.parent.is_dir():
        raise SaveError(f"{path}: the folder {path.parent} does not exist.")
