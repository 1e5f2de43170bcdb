"""What each command of ``uq`` does."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uq.cli.inputs import (
    UsageError,
    chosen_methods,
    group_columns,
    known_method,
    labels_of,
    load_model,
    ood_rows,
    open_data,
    setting,
    table_model,
    target_of,
    task_of,
    warm_up,
)
from uq.cli.methods import fit_methods
from uq.cli.outputs import (
    check_file,
    facts,
    finding_table,
    is_row_number,
    label_frame,
    number_frame,
    on_terminal,
    progress,
    publish,
    report_folder,
)
from uq.errors import FitInterruptedWarning, UQError

if TYPE_CHECKING:
    import pandas as pd


_BATCH_ROWS = 8192  # predicted at once


def compare(args: argparse.Namespace) -> None:
    """Fit several methods on one split and report on its held-out rows."""
    # A budget chooses from all methods, unless some are named.
    asked = args.methods or ("all" if args.budget else None)
    names = chosen_methods(asked)
    data = open_data(args)
    out = report_folder(args.out or Path("reports") / data.name)
    ood = ood_rows(args.ood, data)
    groups = group_columns(args.groups, data)
    from uq import calibration
    from uq.data import split_rows
    from uq.models.registry import METHODS

    if asked == "all":
        names = [name for name in names if data.task in METHODS[name].tasks]
    X_train, X_test, y_train, y_test = split_rows(
        data.X, data.y, data.task, test_size=args.test_size, random_state=args.seed
    )
    settings = {} if args.max_epochs is None else {"max_epochs": args.max_epochs}
    left_out: dict[str, str] = {}
    if args.budget:
        names, left_out = _affordable(args, names, data.task, settings, X_train, y_train)
    bar = on_terminal() and not args.quiet and args.jobs == 1
    models = {name: table_model(name, data.task, settings, args.seed, bar=bar) for name in names}
    fitted = fit_methods(args, models, X_train, y_train, [X_test, *([] if ood is None else [ood])])
    dists = {name: fit.dists[0] for name, fit in fitted.items()}
    ood_dists = {} if ood is None else {name: fit.dists[1] for name, fit in fitted.items()}
    fit_seconds = {name: fit.fit_seconds for name, fit in fitted.items()}
    predict_seconds = {name: fit.predict_seconds for name, fit in fitted.items()}
    notes = {
        **facts(data),
        "rows to fit": len(y_train),
        "held-out rows": len(y_test),
        "seed": args.seed,
        "seconds to predict": predict_seconds,
        **({"left out for want of time": left_out} if left_out else {}),
        **({} if args.jobs == 1 else {"methods fitted at a time": args.jobs}),
        **({} if ood is None else {"out of distribution": args.ood or data.ood_name}),
    }
    progress(args, f"reporting on {len(y_test)} held-out rows")
    report = calibration.compare(
        dists,
        y_test.to_numpy(),
        ood=ood_dists or None,
        groups=None if groups is None else groups.loc[y_test.index],
        fit_seconds=fit_seconds,
        title=data.name,
        notes=notes,
    )
    publish(report, out, as_json=args.json)


def _affordable(
    args: argparse.Namespace,
    names: list[str],
    task: Any,
    settings: dict[str, Any],
    X: pd.DataFrame,
    y: pd.Series,
) -> tuple[list[str], dict[str, str]]:
    """Of the methods those that the budget allows, judged by a fit of MAP; and why not others."""
    from uq.cli.budget import affordable

    progress(args, "budget: a fit of map tells what this table costs")
    warm_up()
    pilot = table_model("map", task, settings, args.seed)
    start = time.perf_counter()
    pilot.fit(X, y)
    choice = affordable(
        names,
        n_rows=len(y),
        map_seconds=time.perf_counter() - start,
        budget=args.budget,
        jobs=args.jobs,
    )
    for name, why in choice.left_out.items():
        progress(args, f"{name}: left out, {why}")
    return choice.names, choice.left_out


def fit(args: argparse.Namespace) -> None:
    """Fit one method on all rows and save the model."""
    name = known_method(args.method)
    settings = dict(setting(text) for text in args.set)
    if args.resume and args.checkpoint is None:
        raise UsageError("--resume needs --checkpoint, the folder that the fit before wrote to")
    if args.checkpoint is not None:
        settings["checkpoint_dir"] = args.checkpoint
    data = open_data(args)
    start = time.perf_counter()

    def tell(event: str, **facts: Any) -> None:
        if args.json_progress:
            seconds = round(time.perf_counter() - start, 3)
            line = {"event": event, "method": name, **facts, "seconds": seconds}
            print(json.dumps(line), file=sys.stderr, flush=True)

    def each_epoch(state: Any) -> None:
        losses = {"train_loss": state.train_loss, "held_out_loss": state.held_out_loss}
        tell("epoch", epoch=state.epoch, **losses)

    settings["callbacks"] = (each_epoch,)
    bar = on_terminal() and not args.json_progress
    model = table_model(name, data.task, settings, args.seed, bar=bar)
    check_file(args.out)
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


def predict(args: argparse.Namespace) -> None:
    """Write a prediction for each row, a few thousand at a time."""
    if args.out is not None:
        if args.out.suffix.lower() not in (".csv", ".parquet"):
            raise UsageError(f"--out must end in .csv or .parquet, got {args.out}")
        check_file(args.out)
    from uq.files import writing

    model = load_model(args.model)
    frames = _prediction_frames(model, args)
    first, named = next(frames)  # a mistake shows before a file is touched
    every = itertools.chain([first], (frame for frame, _ in frames))
    if args.out is None:
        for i, frame in enumerate(every):
            _write_csv(sys.stdout, frame, named, header=i == 0, lineterminator="\n")
        return
    with writing(args.out) as file:
        if args.out.suffix.lower() == ".csv":
            for i, frame in enumerate(every):
                _write_csv(file, frame, named, header=i == 0)
        else:
            _write_parquet(file, every, named)


def _write_csv(file: Any, frame: pd.DataFrame, named: bool, **settings: Any) -> None:
    if "label" in frame:  # as it is: 1.0 is not to become 1
        frame = frame.assign(label=frame["label"].astype(str))
    frame.to_csv(file, index=named, float_format="%.9g", **settings)


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
        frame = label_frame(dist) if labels else number_frame(dist, args.coverage)
        if i == 0:
            # Row labels are worth a column; a plain count of the rows is not.
            named = dist.index is not None and not is_row_number(dist.index)
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


def report(args: argparse.Namespace) -> None:
    """Report on a saved model with the labels of a table."""
    from uq import calibration
    from uq.data import open_dataset

    model = load_model(args.model)
    data = open_dataset(args.data, target=target_of(args), task=task_of(model))
    name = Path(args.model).stem
    out = report_folder(args.out or Path("reports") / name)
    ood = ood_rows(args.ood, data)
    groups = group_columns(args.groups, data)
    report = calibration.report(
        model.predict_distribution(data.X),
        labels_of(model, data.y),
        ood=None if ood is None else model.predict_distribution(ood),
        groups=groups,
        name=name,
        title=f"{name} on {data.name}",
        notes={
            **facts(data),
            "model": args.model,
            **({} if ood is None else {"out of distribution": args.ood or data.ood_name}),
            "mind": "rows that the model was fitted on make it look better than it is",
        },
    )
    publish(report, out, as_json=args.json)


def pretrain(args: argparse.Namespace) -> None:
    """Train a prior-data fitted network, and describe it in a card beside its file."""
    settings = dict(setting(text) for text in args.set)
    if args.out.suffix != ".safetensors":
        raise UsageError(f"--out must end in .safetensors, got {args.out}")
    check_file(args.out)
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


def methods(args: argparse.Namespace) -> None:
    """List the methods."""
    from uq.models.registry import methods

    table = methods()
    if args.json:
        print(json.dumps(table.reset_index().to_dict("records"), indent=2))
        return
    width = max(map(len, table.index)) + 2
    for name, row in table.iterrows():
        print(f"{name:{width}}{row['cost']}")
        only = "" if row["regressor"] else "; classification only"
        print(f"{'':{width}}needs {row['needs']}{only}")
        print(f"{'':{width}}{row['paper']}")


def doctor(args: argparse.Namespace) -> None:
    """Print what is installed, what it runs on and whether it works; fail if it does not."""
    from uq.cli.doctor import examine

    findings = examine()
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print(finding_table(findings))
    if wrong := [finding.name for finding in findings if finding.state == "wrong"]:
        raise UQError(f"not in order: {', '.join(wrong)}; what to do stands beside each")


def completion(args: argparse.Namespace) -> None:
    """Print the completion script of a shell."""
    import shtab

    from uq.cli.parser import parser

    print(shtab.complete(parser(), args.shell))
