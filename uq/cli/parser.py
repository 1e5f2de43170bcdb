"""The grammar of the ``uq`` command."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import shtab

from uq.cli import commands
from uq.cli.inputs import UsageError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    """Build the parser; every command sets its ``handler``."""
    from uq import __version__
    from uq.data import DATASETS

    uq = _Parser(
        prog="uq",
        description="Predictive uncertainty, from the command line.",
        epilog="start with:\n  uq compare digits\n  uq compare --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    uq.add_argument("--version", action="version", version=f"uq {__version__}")
    uq.set_defaults(handler=lambda _: uq.print_help())
    subparsers = uq.add_subparsers(title="commands", metavar="COMMAND")
    data_help = f"CSV or Parquet file, or one of {', '.join(DATASETS)}"

    def command(
        name: str, handler: Callable[[argparse.Namespace], None], text: str, *examples: str
    ) -> _Parser:
        added: _Parser = subparsers.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:],
            epilog="\n".join(["examples:", *(f"  uq {name} {line}".rstrip() for line in examples)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(handler=handler)
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return added

    compare = command(
        "compare",
        commands.compare,
        "fit several methods, report on held-out rows",
        "digits",
        "flats.csv --target price --budget 60s",
        "flats.csv --target price --methods vbll,ivon,gp --out reports/flats.html",
    )
    _add_file(compare, "data", metavar="DATA", help=data_help)
    _add_target(compare)
    compare.add_argument(
        "--methods",
        metavar="A,B",
        help="names of `uq methods`, or all (default: ivon,vbll,ensemble,map)",
    )
    compare.add_argument(
        "--budget",
        type=_duration,
        metavar="TIME",
        help="for all fits, such as 60s or 5min; picks from --methods, or from all methods",
    )
    compare.add_argument(
        "--test-size",
        type=_share,
        default=0.25,
        metavar="SHARE",
        help="share of the rows to hold out (default: 0.25)",
    )
    _add_seed(compare)
    compare.add_argument(
        "--max-epochs",
        type=_positive,
        metavar="N",
        help="epochs of every fit at most (default: the method's own)",
    )
    compare.add_argument(
        "--jobs",
        type=_positive,
        default=1,
        metavar="N",
        help="methods to fit at a time, each in a process (default: 1)",
    )
    _add_report(compare, "reports/<data>")
    compare.add_argument("--quiet", action="store_true", help="no progress on stderr")

    fit = command(
        "fit",
        commands.fit,
        "fit one method on all rows and save the model",
        "flats.csv --target price --method vbll --out flats.uq",
        "big.parquet --target y --method ivon --out big.uq --set hidden=256,256 --checkpoint run",
    )
    _add_file(fit, "data", metavar="DATA", help=data_help)
    _add_target(fit)
    fit.add_argument("--method", required=True, metavar="METHOD", help="see `uq methods`")
    _add_file(fit, "--out", required=True, type=Path, metavar="FILE", help="such as model.uq")
    fit.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="parameter of the estimator, such as hidden=64,64 or device=cpu; may be repeated",
    )
    _add_seed(fit)
    fit.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="folder to write to now and then, for --resume",
    )
    fit.add_argument("--resume", action="store_true", help="go on from what --checkpoint holds")
    fit.add_argument(
        "--json-progress", action="store_true", help="one JSON object a line on stderr"
    )

    predict = command(
        "predict",
        commands.predict,
        "predict the rows of a table, one line each",
        "flats.uq new.csv",
        "flats.uq new.parquet --out predictions.parquet --coverage 0.95",
    )
    _add_file(predict, "model", metavar="MODEL", help="file that `uq fit` wrote")
    _add_file(predict, "data", metavar="DATA", help=data_help)
    _add_file(
        predict, "--out", type=Path, metavar="FILE", help=".csv or .parquet; default: CSV on stdout"
    )
    predict.add_argument(
        "--coverage",
        type=_share,
        default=0.9,
        metavar="SHARE",
        help="probability that lower and upper enclose (default: 0.9)",
    )

    report = command(
        "report",
        commands.report,
        "report on a saved model with the labels of a table",
        "flats.uq sold.csv --target price --groups city",
    )
    _add_file(report, "model", metavar="MODEL", help="file that `uq fit` wrote")
    _add_file(report, "data", metavar="DATA", help=data_help)
    report.add_argument("--target", metavar="COL", help="column with the truth")
    _add_report(report, "reports/<model>")

    pretrain = command(
        "pretrain",
        commands.pretrain,
        "train a prior-data fitted network on a prior",
        "--prior gp --out gp.safetensors --steps 2000",
        "--prior tabular-regression --out mine.safetensors --steps 20000 --resume",
    )
    pretrain.add_argument(
        "--prior",
        required=True,
        metavar="NAME",
        help="gp, gp-hyper, bnn, scm, tabular-regression or tabular-classification; a prior of "
        "your own is for uq.inference.pretrain_pfn in Python",
    )
    _add_file(pretrain, "--out", required=True, type=Path, metavar="FILE", help=".safetensors")
    pretrain.add_argument("--steps", required=True, type=_positive, metavar="N")
    pretrain.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    _add_file(pretrain, "--init", metavar="FILE", help="finished network to start from")
    pretrain.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of uq.inference.pretrain_pfn, such as d_model=96; may be repeated",
    )
    _add_seed(pretrain)
    pretrain.add_argument("--quiet", action="store_true", help="no progress on stderr")

    methods = command(
        "methods",
        commands.methods,
        "list the methods",
        "",
        "--json",
    )
    methods.add_argument("--json", action="store_true", help="one JSON document on stdout")

    doctor = command(
        "doctor",
        commands.doctor,
        "look at versions, optional parts, device and threads, and fit a small model",
        "",
        "--json",
    )
    doctor.add_argument("--json", action="store_true", help="one JSON document on stdout")

    completion = command(
        "completion",
        commands.completion,
        "print the completion of this command for a shell",
        "bash > ~/.local/share/bash-completion/completions/uq",
        "zsh > ~/.zfunc/_uq",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    return uq


def _add_file(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """Add an argument that the shell completes by files."""
    parser.add_argument(name, **options).complete = shtab.FILE  # type: ignore[attr-defined]


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", metavar="COL", help="column to predict, needed for a file")
    parser.add_argument(
        "--task",
        choices=("classification", "regression"),
        help="default: text, and whole numbers of few values, are classes",
    )


def _add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed", type=_natural, default=0, metavar="N", help="of all that is random (default: 0)"
    )


def _add_report(parser: argparse.ArgumentParser, default: str) -> None:
    _add_file(
        parser,
        "--out",
        type=Path,
        metavar="PATH",
        help=f"folder, .html, .json or .md; default: {default}",
    )
    _add_file(parser, "--ood", metavar="FILE", help="table of out-of-distribution rows")
    parser.add_argument(
        "--groups", metavar="A,B", help="columns by which to group rows; numbers go by quarters"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def _share(text: str) -> float:
    return _number(text, float, lambda value: 0 < value < 1, "a number between 0 and 1")


def _duration(text: str) -> float:
    number, unit = re.fullmatch(r"(.*?)(s|m|min|h)?", text, re.DOTALL).groups()  # type: ignore[union-attr]
    size = {None: 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}[unit]
    seconds: float = _number(
        text,
        lambda _: size * float(number),
        lambda value: 0 < value < math.inf,
        "a time such as 60s, 5min or 1h",
    )
    return seconds


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
