"""Prior-data fitted network: a set transformer that maps a data set to predictive distributions.

Rows are tokens. A context row (x, y) enters as E_x(x) + E_y(y), a query row as E_x(x) + a learned
vector. Every row attends to the context rows only, and to a few learned context rows, so that
queries do not see one another, the order of the context does not matter, and one pass over the
context can be cached. There is no mask: an attention is one product of all rows with the context.

Why learned context rows: softmax attention is a weighted mean, and the mean over a context equals
that over the context twice. Without a row that is not duplicated with the rest, a network cannot
count, and its posterior cannot contract when data repeat themselves.

References
----------
S. Müller, N. Hollmann, S. Pineda Arango, J. Grabocka, F. Hutter, "Transformers Can Do Bayesian
Inference", ICLR 2022. The attention pattern is that of N. Hollmann et al., "TabPFN", ICLR 2023.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from uq.errors import LoadError, ParameterError
from uq.files import write_atomically
from uq.nn.pfn_tables import PFNConfig, PFNScaling, preprocess

FORMAT = "uq-pfn"
FORMAT_VERSION = 1
__all__ = [
    "PFN",
    "PFNCache",
    "PFNConfig",
    "PFNScaling",
    "load_pfn",
    "preprocess",
    "save_pfn",
]

SHIPPED = ("tabular-regression", "tabular-classification")

# Far above any sensible network, far below exhausted memory.
_MAX_HEADER = 16 << 20  # characters
_MAX_FILE = 4 << 30  # bytes


@dataclass(frozen=True)
class PFNCache:
    """Keys and values of a context, in every layer: all that a query needs of it.

    Attributes
    ----------
    keys, values : tuple of Tensor
        One a layer, each of shape (B, heads, context tokens + n, d_model / heads).
    n_context : int or Tensor
        Rows of the context; with weights their sums, (B, 1, 1, 1).
    bias : Tensor, optional
        Log weights of the rows, (B, 1, 1, context tokens + n).
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    n_context: int | Tensor
    bias: Tensor | None = None


def _normal(std: float, *shape: int) -> Tensor:
    """Draw Normals; on the meta device only their shape, since torch._dynamo takes seconds then."""
    tensor = torch.empty(*shape)
    return tensor if tensor.is_meta else tensor.normal_(0, std)


class _Block(nn.Module):
    """Pre-norm attention to the context and MLP, both 0 at first: the network starts linear."""

    def __init__(self, d_model: int, n_heads: int, d_ff: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm_attention = nn.LayerNorm(d_model)
        self.query = nn.Linear(d_model, d_model)
        self.key_value = nn.Linear(d_model, 2 * d_model)
        self.out = nn.Linear(d_model, d_model)
        # Attention flattens as the context grows; a head may sharpen with log n ("scalable
        # softmax"). 0 is the usual attention.
        self.sharpening = nn.Parameter(torch.zeros(n_heads))
        self.norm_mlp = nn.LayerNorm(d_model)
        self.up = nn.Linear(d_model, d_ff)
        self.down = nn.Linear(d_ff, d_model)
        for layer in (self.out, self.down):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def keys_values(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, n, head size) of context rows (B, n, d_model)."""
        k, v = self.key_value(normed).chunk(2, -1)
        return self._heads(k), self._heads(v)

    def forward(
        self,
        z: Tensor,
        normed: Tensor,
        k: Tensor,
        v: Tensor,
        n: int | Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Let rows ``z`` (B, T, d_model), ``normed`` already, look at a context of n rows."""
        size = n.log1p() if isinstance(n, Tensor) else math.log1p(n)
        q = self._heads(self.query(normed)) * (1 + self.sharpening[:, None, None] * size)
        seen = F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)
        z = z + self.out(seen)
        return z + self.down(F.gelu(self.up(self.norm_mlp(z))))


class PFN(nn.Module):
    """Prior-data fitted network.

    Parameters
    ----------
    config : PFNConfig
        Sizes.
    borders : Tensor of shape (n_outputs + 1,), optional
        Borders of the bars, for regression, in the units of the prepared target.

    Raises
    ------
    ParameterError
        If a regression network has no fitting borders.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import PFN, PFNConfig, preprocess
    >>> config = PFNConfig("classification", max_features=3, n_outputs=4, d_model=16, n_layers=2)
    >>> network = PFN(config)
    >>> X, y = torch.randn(1, 20, 2), torch.randint(4, (1, 20))
    >>> Xc, yc, Xq, _ = preprocess(X, y, torch.randn(1, 5, 2), config)
    >>> network(Xc, yc, Xq).shape
    torch.Size([1, 5, 4])
    """

    borders: Tensor | None
    embed_y: nn.Module
    embed_x: nn.Module
    hidden_out: nn.Module
    norm_out: nn.Module
    out: nn.Module

    def __init__(self, config: PFNConfig, borders: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        d = config.d_model
        if config.task == "regression":
            if borders is None or tuple(borders.shape) != (config.n_outputs + 1,):
                raise ParameterError(
                    f"PFN: a regression network of {config.n_outputs} bars needs "
                    f"{config.n_outputs + 1} borders, got "
                    f"{None if borders is None else tuple(borders.shape)}."
                )
            borders = borders.detach().float().clone()
            self.embed_y = nn.Linear(1, d)
        else:
            borders = None
            drawn = _normal(1.0, config.n_outputs, d)
            self.embed_y = nn.Embedding.from_pretrained(drawn, freeze=False)
        self.register_buffer("borders", borders)
        self.embed_x = nn.Linear(2 * config.max_features, d)
        self.query_mark: nn.Parameter = nn.Parameter(torch.zeros(d))
        self.context_rows: nn.Parameter = nn.Parameter(_normal(0.5, config.context_tokens, d))
        self.blocks: nn.ModuleList = nn.ModuleList(
            _Block(d, config.n_heads, config.d_ff) for _ in range(config.n_layers)
        )
        self.norm_out = nn.LayerNorm(d)
        self.hidden_out = nn.Linear(d, config.d_ff)
        self.out = nn.Linear(config.d_ff, config.n_outputs)

    def _blocks(self) -> list[_Block]:
        return cast("list[_Block]", list(self.blocks))

    def _context(self, X: Tensor, y: Tensor) -> Tensor:
        """Tokens of the context (B, c + n, d_model), the learned ones first."""
        labels = y.long() if self.config.task == "classification" else y.to(X.dtype)[..., None]
        rows = self.embed_x(X) + self.embed_y(labels)
        return torch.cat([self.context_rows.expand(len(X), -1, -1), rows], 1)

    def _queries(self, X: Tensor) -> Tensor:
        return self.embed_x(X) + self.query_mark

    def _logits(self, z: Tensor) -> Tensor:
        return self.out(F.gelu(self.hidden_out(self.norm_out(z))))

    def _sizes(self, X: Tensor, weight: Tensor | None) -> tuple[int | Tensor, Tensor | None]:
        """Number of context rows and bias of the attention to them.

        A bias of log w on a row is the same as that row w times.
        """
        if weight is None:
            return X.shape[1], None
        bias = F.pad(weight.to(X.dtype).log(), (self.config.context_tokens, 0))
        return weight.to(X.dtype).sum(1)[:, None, None, None], bias[:, None, None, :]

    def forward(
        self,
        X_context: Tensor,
        y_context: Tensor,
        X_query: Tensor,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Predict queries from contexts, all prepared by :func:`preprocess`.

        Parameters
        ----------
        X_context : Tensor of shape (B, n, 2 * max_features)
            Context rows of B data sets; n = 0 is allowed and gives the prior predictive.
        y_context : Tensor of shape (B, n)
            Their targets, or class positions.
        X_query : Tensor of shape (B, m, 2 * max_features)
            Query rows.
        weight : Tensor of shape (B, n), optional
            Weights of the context rows: a row of weight 2 counts as if it were there twice.

        Returns
        -------
        Tensor of shape (B, m, n_outputs)
            Unnormalised log probabilities of the bars or classes. A class that the context does not
            have must be cut off before normalising.
        """
        context = self._context(X_context, y_context)
        c = context.shape[1]
        n, bias = self._sizes(X_context, weight)
        z = torch.cat([context, self._queries(X_query)], 1)
        last = len(self.blocks) - 1
        for i, block in enumerate(self._blocks()):
            normed = block.norm_attention(z)
            k, v = block.keys_values(normed[:, :c])
            if i == last:  # nobody looks at the context after it
                z, normed = z[:, c:], normed[:, c:]
            z = block(z, normed, k, v, n, bias)
        return self._logits(z)

    def encode(
        self, X_context: Tensor, y_context: Tensor, weight: Tensor | None = None
    ) -> PFNCache:
        """Run the context alone, for :meth:`query`; arguments as for :meth:`forward`."""
        z = self._context(X_context, y_context)
        n, bias = self._sizes(X_context, weight)
        keys, values = [], []
        for i, block in enumerate(self._blocks()):
            normed = block.norm_attention(z)
            k, v = block.keys_values(normed)
            keys.append(k)
            values.append(v)
            if i < len(self.blocks) - 1:
                z = block(z, normed, k, v, n, bias)
        return PFNCache(tuple(keys), tuple(values), n, bias)

    def query(self, cache: PFNCache, X_query: Tensor) -> Tensor:
        """Logits (B, m, n_outputs) of queries against an encoded context, O(n) each.

        Equal to :meth:`forward` to rounding.
        """
        z = self._queries(X_query)
        for block, k, v in zip(self._blocks(), cache.keys, cache.values, strict=True):
            normed = block.norm_attention(z)
            z = block(z, normed, k, v, cache.n_context, cache.bias)
        return self._logits(z)


# -- files ---------------------------------------------------------------------------------------


def save_pfn(
    path: str | Path, model: PFN, meta: dict[str, Any], *, dtype: torch.dtype = torch.float16
) -> None:
    """Write a network to one safetensors file: its weights, and a JSON header with the rest.

    Parameters
    ----------
    path : str or Path
        File to write, atomically, by habit with the suffix ``.safetensors``.
    model : PFN
        Network; its borders are stored in float32.
    meta : dict
        What is known about it (prior, runs, log), plain JSON.
    dtype : torch.dtype, default=torch.float16
        Of the stored weights. Half precision halves the file and changes predictions by about 1e-3
        of a logit; ``torch.float32`` keeps every bit.

    Raises
    ------
    SaveError
        If the file cannot be written; whatever was there before is unchanged.
    ParameterError
        If ``meta`` is not plain JSON, or a weight is too large for ``dtype``.

    Examples
    --------
    >>> import tempfile, torch
    >>> from uq.nn import PFN, PFNConfig, load_pfn, save_pfn
    >>> network = PFN(PFNConfig("classification", 3, 4, d_model=16, n_layers=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pfn(f"{folder}/mine.safetensors", network, {"prior": "mine"})
    ...     network, meta = load_pfn(f"{folder}/mine.safetensors")
    >>> network.config.n_outputs, meta["prior"]
    (4, 'mine')
    """
    try:
        header = json.dumps(
            {
                "format": FORMAT,
                "version": FORMAT_VERSION,
                "config": asdict(model.config),
                "meta": meta,
            },
            allow_nan=False,
        )
    except (TypeError, ValueError) as error:
        raise ParameterError(f"save_pfn: meta must be plain JSON: {error}.") from error
    tensors = {}
    for name, t in model.state_dict().items():
        kept = t.detach().cpu().to(torch.float32 if name == "borders" else dtype)
        if not bool(kept.isfinite().all()):
            raise ParameterError(f"save_pfn: {name} is not finite in {dtype}; nothing was written.")
        tensors[name] = kept.contiguous().clone()
    write_atomically({Path(path): to_bytes(tensors, {"uq": header})})


def load_pfn(path: str | Path) -> tuple[PFN, dict[str, Any]]:
    """Read a network that :func:`save_pfn` wrote; nothing in the file is executed.

    Parameters
    ----------
    path : str or Path
        File, or the name of one that comes with the package: "tabular-regression" or
        "tabular-classification".

    Returns
    -------
    model : PFN
        In float32 and eval mode, without gradients.
    meta : dict
        What the file says about it.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    LoadError
        If the file is damaged, is not a prior-data fitted network of uq, or its tensors do not fit
        the sizes that it states.

    Examples
    --------
    >>> from uq.nn import load_pfn
    >>> network, meta = load_pfn("tabular-classification")
    >>> network.config.task, network.config.max_features, network.config.n_outputs
    ('classification', 10, 10)
    """
    if str(path) in SHIPPED:
        packaged = files("uq").joinpath("weights", f"{path}.safetensors")
        if not packaged.is_file():
            raise FileNotFoundError(f"this uq comes without the weights {str(path)!r}.")
        with as_file(packaged) as file:
            return _read(Path(file))
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no network file at {str(path)!r}; it is neither a path nor one of "
            f"{', '.join(SHIPPED)}."
        )
    return _read(path)


def _read(path: Path) -> tuple[PFN, dict[str, Any]]:
    def refuse(why: str) -> LoadError:
        return LoadError(
            f"{str(path)!r} is not a usable prior-data fitted network of uq: {why}. Expected is a "
            "file written by `uq pretrain` or uq.nn.save_pfn."
        )

    if path.stat().st_size > _MAX_FILE:
        raise refuse(f"it has {path.stat().st_size} bytes, the limit is {_MAX_FILE}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("uq", "")
            if not text:
                raise refuse("a safetensors file without the header of uq")
            if len(text) > _MAX_HEADER:
                raise refuse(f"its header has {len(text)} characters")
            header = json.loads(text)
            if not isinstance(header, dict) or header.get("format") != FORMAT:
                raise refuse("its header is that of something else")
            if header.get("version") != FORMAT_VERSION:
                raise refuse(
                    f"format version {header.get('version')!r}; this uq reads {FORMAT_VERSION}"
                )
            config = _config(header.get("config"))
            meta = header.get("meta", {})
            if not isinstance(meta, dict):
                raise refuse("its description is not a table")
            # On the meta device only shapes are made: no memory for sizes that a header makes up.
            with torch.device("meta"):
                bars = torch.empty(config.n_outputs + 1) if config.task == "regression" else None
                model = PFN(config, bars)
            wanted = {k: list(t.shape) for k, t in model.state_dict().items()}
            found = {k: list(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
            if wanted != found:
                names = sorted(k for k in wanted | found if wanted.get(k) != found.get(k))
                k = names[0]
                raise refuse(f"tensor {k!r} is {found.get(k)}, but should be {wanted.get(k)}")
            state = {k: file.get_tensor(k).float().clone() for k in found}
    except (SafetensorError, RecursionError, OSError, ValueError, TypeError) as error:
        if isinstance(error, LoadError):
            raise
        raise refuse(str(error)) from error
    for name, t in state.items():
        if not bool(t.isfinite().all()):
            raise refuse(f"tensor {name!r} holds NaN or infinite values")
    if "borders" in state and not bool((state["borders"].diff() > 0).all()):
        raise refuse("its borders do not increase")
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval(), meta


def _config(values: Any) -> PFNConfig:
    if not isinstance(values, dict):
        raise ValueError("it states no sizes")
    known = {f.name for f in fields(PFNConfig)}
    if set(values) != known:
        raise ValueError(f"its sizes are {sorted(values)}, but should be {sorted(known)}")
    return PFNConfig(**values)
