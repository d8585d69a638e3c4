"""The polynomial degree of a function f(x, t) in x, proved by following every operation.

x and t are replaced by tensors whose values nobody can read. Each torch operation, below autograd,
passes on the degree in x of what it returns: sums and views keep it, products add it, tanh makes it
infinite. A degree of at most 1 is a proof, for all x and t, that f is affine in x; a larger one
proves nothing (x*x - x*x has degree 2), and code that reads a value to branch on it or to leave
torch cannot be followed at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Function = Callable[[Tensor, Tensor], Any]


class Untraceable(Exception):
    """The function read a value of x or t, or kept it where a trace cannot follow."""


class Degree(NamedTuple):
    """The degree in x, and the operation that made it infinite."""

    degree: float
    because: str = ""


def degree(function: Function, x: Tensor, t: Tensor) -> Degree:
    """The degree of function(x, t) in x for all x and t; `Untraceable` where it cannot be told.

    x, t: examples, of which shape and dtype matter alone.
    """
    try:
        with torch.no_grad(), _Factories():
            out = function(_Traced(x.clone(), _Cell(1.0)), _Traced(t.clone(), _Cell(0.0)))
    except Untraceable:
        raise
    except Exception as error:  # the user's code met a tensor it did not expect
        raise Untraceable(f"{type(error).__name__}: {error}".split("\n")[0]) from error
    if isinstance(out, _Traced):
        return Degree(out.cell.degree, out.cell.because)
    return Degree(0.0)  # nothing of x can be in a tensor that was never near it


class _Cell:
    """The degree of a piece of memory, shared by all its views. It only grows."""

    __slots__ = ("because", "degree")

    def __init__(self, degree: float, because: str = "") -> None:
        self.degree, self.because = degree, because


class _Traced(Tensor):
    """A tensor with a hidden value and a degree."""

    hidden: Tensor
    cell: _Cell

    @staticmethod
    def __new__(cls: type[_Traced], value: Tensor, cell: _Cell) -> _Traced:
        made = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, value.stride(), value.storage_offset(),
            dtype=value.dtype, device=value.device,
        )  # fmt: skip
        made.hidden, made.cell = value, cell
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"a traced tensor of shape {tuple(self.shape)}"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        plain = name.removesuffix("_") if not name.startswith("__") else name
        made = _rule(plain, func, args, kwargs)
        written = list(_written(func, args, kwargs))
        for tensor in written:
            if not isinstance(tensor, _Traced):
                raise Untraceable(f"{name} writes into a tensor from outside the function")
            if made.degree > tensor.cell.degree:
                tensor.cell.degree, tensor.cell.because = made
        with torch._C._DisableTorchDispatch():
            out = func(*_unwrap(args), **_unwrap(kwargs))
        if written:
            return written[0] if len(written) == 1 else written
        cells = {_memory(a.hidden): a.cell for a in _tensors((args, kwargs)) if type(a) is _Traced}
        return _wrap(out, name, made, cells)


class _Factories(TorchDispatchMode):
    """While active, fresh tensors of zeros and the like are traced, so that x may be written in."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in FRESH and type(out) is Tensor:
            return _Traced(out, _Cell(0.0))
        return out


def _wrap(out: Any, name: str, made: Degree, cells: dict[int, _Cell]) -> Any:
    if isinstance(out, Tensor):
        floating = out.is_floating_point() or out.is_complex()
        if made.degree and not floating:
            made = Degree(math.inf, name)
        cell = cells.get(_memory(out)) or _Cell(*made)
        if made.degree > cell.degree:
            cell.degree, cell.because = made
        return _Traced(out, cell)
    if isinstance(out, list | tuple):
        return type(out)(_wrap(each, name, made, cells) for each in out)
    if out is None:
        return None
    raise Untraceable(f"{name} reads a value")


def _memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr() or id(value)


def _unwrap(value: Any) -> Any:
    if isinstance(value, _Traced):
        return value.hidden
    if isinstance(value, dict):
        return {key: _unwrap(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_unwrap(each) for each in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from _tensors(value)


# ---- the rules: what each operation does to the degree


def _of(value: Any) -> float:
    """The largest degree in an argument; numbers and plain tensors have none."""
    return max((a.cell.degree for a in _tensors(value) if isinstance(a, _Traced)), default=0.0)


def _rule(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Degree:
    everything = _of((args, kwargs))
    if name == "rand_like" or name == "randn_like" or "bernoulli" in name:
        return Degree(math.inf, f"{name}, which is random")
    if not everything or name in LIKE:
        return Degree(0.0)
    named = {a.name: args[i] for i, a in enumerate(func._schema.arguments) if i < len(args)}
    named |= kwargs
    if name in LINEAR:
        found = everything
    elif name in PRODUCTS:
        added, left, right = PRODUCTS[name]
        found = max(_of(named.get(added)), _of(named.get(left)) + _of(named.get(right)))
    elif name in LINEAR_IN:
        free = _of([value for key, value in named.items() if key not in LINEAR_IN[name]])
        found = math.inf if free else everything
        if named.get("rounding_mode") or named.get("reduce"):
            found = math.inf
    elif name == "pow" and isinstance(exponent := named["exponent"], int | float):
        whole = exponent >= 0 and exponent == int(exponent)
        found = everything * exponent if whole else math.inf
    elif name == "addcdiv":
        found = math.inf if _of(named["tensor2"]) else everything
    elif name == "lerp":
        found = max(_of(named["self"]), _of(named["end"])) + _of(named.get("weight"))
    else:
        found = math.inf
    if found < math.inf:
        return Degree(found)
    inherited = [a.cell.because for a in _tensors((args, kwargs)) if isinstance(a, _Traced)]
    return Degree(math.inf, next((b for b in inherited if b), name))


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FRESH = _words("zeros ones empty full empty_strided eye new_zeros new_ones new_empty new_full")
"""Operations without a tensor argument that make memory x may be written into."""

LIKE = FRESH | _words("zeros_like ones_like empty_like full_like new_empty_strided zero")
"""Operations that look at the shape of a tensor alone."""

LINEAR = _words(
    # sums and copies
    "add sub rsub subtract neg negative sum mean nansum cumsum trace clone copy _to_copy "
    "lift_fresh detach alias positive conj _conj conj_physical resolve_conj real imag complex "
    "cat concat stack hstack vstack fill lift "
    # views, and their backward operations
    "view _unsafe_view reshape _reshape_alias expand expand_as permute transpose t squeeze "
    "unsqueeze select slice as_strided diagonal split split_with_sizes unbind chunk narrow "
    "unfold view_as_real view_as_complex movedim swapaxes select_backward slice_backward "
    "diagonal_backward unfold_backward select_scatter slice_scatter diagonal_scatter "
    "view_copy expand_copy permute_copy contiguous "
    # moving and repeating
    "roll flip fliplr flipud rot90 repeat repeat_interleave tile diag diag_embed tril triu "
    "constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
    "replication_pad2d replication_pad3d pixel_shuffle pixel_unshuffle im2col col2im "
    # filters
    "avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d upsample_nearest1d upsample_nearest2d "
    "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_nearest3d "
    "_fft_r2c _fft_c2r _fft_c2c"
)
"""Operations that are linear in all their tensors together."""

PRODUCTS: dict[str, tuple[str, str, str]] = {
    "mul": ("", "self", "other"),
    "multiply": ("", "self", "other"),
    "mm": ("", "self", "mat2"),
    "bmm": ("", "self", "mat2"),
    "mv": ("", "self", "vec"),
    "dot": ("", "self", "tensor"),
    "vdot": ("", "self", "other"),
    "addmm": ("self", "mat1", "mat2"),
    "addmv": ("self", "mat", "vec"),
    "addr": ("self", "vec1", "vec2"),
    "addbmm": ("self", "batch1", "batch2"),
    "baddbmm": ("self", "batch1", "batch2"),
    "addcmul": ("self", "tensor1", "tensor2"),
    "linear": ("bias", "input", "weight"),
    "convolution": ("bias", "input", "weight"),
    "linalg_cross": ("", "self", "other"),
}
"""added + left * right, by the names of the arguments: degrees of factors add."""

LINEAR_IN: dict[str, frozenset[str]] = {
    "div": _words("self"),
    "divide": _words("self"),
    "true_divide": _words("self"),
    "where": _words("self other"),
    "masked_fill": _words("self value"),
    "masked_select": _words("self"),
    "masked_scatter": _words("self source"),
    "index": _words("self"),
    "index_select": _words("self"),
    "index_put": _words("self values"),
    "_index_put_impl": _words("self values"),
    "_unsafe_index": _words("self"),
    "index_add": _words("self source"),
    "index_copy": _words("self source"),
    "index_fill": _words("self value"),
    "gather": _words("self"),
    "take": _words("self"),
    "scatter": _words("self src value"),
    "scatter_add": _words("self src"),
    "_linalg_solve_ex": _words("B"),
    "linalg_solve_triangular": _words("B"),
    "triangular_solve": _words("self"),
    "cholesky_solve": _words("self"),
    "linalg_lu_solve": _words("B"),
    "lu_solve": _words("self"),
}
"""Operations that are linear in the arguments named, where the others are free of x."""
