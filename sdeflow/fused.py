"""Running a tableau: a few fused in-place operations a step, and no schedule arithmetic."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser, checked_output
from .noise import Noise, area
from .reverse import ReverseSDE
from .tableau import Draw, Tableau, Terms

_THE_STATE: Terms = ((0, 1.0),)
_LARGE = 2**16
"""Bytes from which a buffer is worth its bookkeeping: memory for a smaller one is had sooner."""
_storage_users: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


def run(
    tableau: Tableau, process: ReverseSDE, x: Tensor, noise: Noise
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (t, x_t) after each row, every state a tensor of its own."""
    registers = [x]
    for s in _advance(tableau, process, registers, noise, reuse=False):
        yield s, registers[0]


def finish(
    tableau: Tableau, process: ReverseSDE, x: Tensor, noise: Noise, final: list[Tensor]
) -> Iterator[Tensor]:
    """Yield s after each row; the last state is put into `final`.

    Buffers are reused where nobody else holds them; x itself is left alone.
    """
    registers = [x]
    yield from _advance(tableau, process, registers, noise, reuse=_storage_users is not None)
    final.append(registers[0])


def _advance(
    tableau: Tableau, process: ReverseSDE, registers: list[Tensor], noise: Noise, reuse: bool
) -> Iterator[Tensor]:
    """Run the rows; between them `registers` holds the state and the memory."""
    first = registers[0]
    shape, dtype = first.shape, first.dtype
    ask, times = _asker(tableau, process.score, first)
    spare: list[Tensor] = []
    references, storage_users = sys.getrefcount, _storage_users or len
    counts = _storage_users is not None
    k = 0
    program = _program(tableau, dtype)
    recycles = reuse and first.nbytes >= _LARGE and any(_takes_buffers(row) for row in program)
    for s, operations, memory, (i, scale, rest) in program:
        held = len(registers)
        lent: list[Tensor] = []
        for terms, interval, lasts in operations:
            if interval is not None:
                start, end, of_area = interval
                registers.append(area(noise, start, end) if of_area else noise(start, end))
                if lasts:
                    _own(registers)
                continue
            if terms is None:
                answer = ask(registers[0], times[k])
            else:
                lent.append(_combine(terms, registers, spare))
                answer = ask(lent[-1], times[k])
            k += 1
            if answer.__class__ is not Tensor or answer.shape != shape or answer.dtype != dtype:
                answer = checked_output("score", answer, first)
            registers.append(answer)
            del answer
            if lasts and not (
                counts
                and references(registers[-1]) == _ONE_HOLDER
                and storage_users(registers[-1].untyped_storage()._cdata) == 2
            ):
                registers[-1] = registers[-1].clone()
        if memory:
            kept = [
                registers[m] if m.__class__ is int else _combine(m, registers, spare)
                for m in memory
            ]
        if (
            reuse
            and i == 0
            and references(registers[0]) == _ONE_HOLDER
            and storage_users(registers[0].untyped_storage()._cdata) == 2
        ):
            x = registers[0] if scale is None else registers[0].mul_(scale)
        else:
            x = registers[i].clone() if scale is None else torch.mul(registers[i], scale)
        for i, c in rest:
            x.add_(registers[i], alpha=c)
        if recycles:
            lent += registers[1:held]
        if memory:
            registers[:] = (x, *kept)
            del x, kept
        else:
            registers[:] = (x,)
            del x
        if lent and recycles:
            spare += [lent[j] for j in range(len(lent)) if len(spare) < 2 and _alone(lent, j)]
        yield s


def _program(tableau: Tableau, dtype: torch.dtype) -> Any:
    """The rows, flattened for the loop: (s, operations, memory, state). An operation is
    (combination, or None for the state; None; lasts) or a draw (None; its interval; lasts), where
    `lasts` says whether its answer is needed after the next of its kind; a memory is a
    combination, or the number of a register as it is."""
    if dtype not in tableau.programs:
        rows, held = [], 1
        for row in tableau.rows:
            memory = tuple(
                terms[0][0] if len(terms) == 1 and terms[0][1] == 1.0 else _compiled(terms, dtype)
                for terms in row.memory
            )
            kinds = [type(op) for op in row.operations]
            operations = tuple(
                (
                    None
                    if isinstance(op, Draw) or op.terms == _THE_STATE
                    else _compiled(op.terms, dtype),
                    op if isinstance(op, Draw) else None,
                    held + j in memory or kinds[j] in kinds[j + 1 :],
                )
                for j, op in enumerate(row.operations)
            )
            held = 1 + len(memory)
            rows.append((row.s, operations, memory, _compiled(row.state, dtype)))
        tableau.programs[dtype] = tuple(rows)
    return tableau.programs[dtype]


def _compiled(terms: Terms, dtype: torch.dtype) -> tuple[int, Any, Terms]:
    """(i, c, rest) of c register_i + rest; None for c = 1. A 0-dim tensor multiplies a small state
    twice as fast as a number does; half precision keeps numbers, which are not rounded to it."""
    (i, c), *rest = terms
    scale: Any = c
    if c == 1.0:
        scale = None
    elif dtype in (torch.float32, torch.float64):
        scale = torch.tensor(c, dtype=dtype)
    return i, scale, tuple(rest)


def _takes_buffers(row: Any) -> bool:
    _, operations, memory, _ = row
    return any(terms for terms, *_ in operations) or any(not isinstance(m, int) for m in memory)


def _combine(terms: Any, registers: list[Tensor], spare: list[Tensor]) -> Tensor:
    """c register_i + rest, in a spare buffer if there is one."""
    i, scale, rest = terms
    if scale is None:
        if not rest:
            return registers[i]
        (j, b), *rest = rest
        total = torch.add(registers[i], registers[j], alpha=b, out=spare.pop() if spare else None)
    else:
        total = torch.mul(registers[i], scale, out=spare.pop() if spare else None)
    for j, b in rest:
        total.add_(registers[j], alpha=b)
    return total


def _alone(held: list[Tensor], i: int) -> bool:
    """Whether this list is the only holder of its i-th tensor, and that of its storage."""
    if sys.getrefcount(held[i]) != _ONE_HOLDER:
        return False
    assert _storage_users is not None
    return _storage_users(held[i].untyped_storage()._cdata) == 2


def _own(registers: list[Tensor]) -> None:
    """Copy the last register if its maker, a network with one output buffer say, holds it too."""
    if _storage_users is None or not _alone(registers, -1):
        registers[-1] = registers[-1].clone()


def _holders(held: list[Tensor], i: int) -> int:
    return sys.getrefcount(held[i])


_ONE_HOLDER = _holders([torch.empty(0)], 0)


def _asker(tableau: Tableau, score: Any, x: Tensor) -> tuple[Callable[..., Any], Any]:
    """What was traced (the bare network, the denoiser or the score), and its times.

    A network sees times of shape (B,) in the dtype and on the device of x: sent there at once.
    """
    if type(score) is Denoiser:
        column = tableau.host_times.to(dtype=x.dtype, device=x.device)
        return score.net, column.unsqueeze(1).repeat(1, x.shape[0]).unbind(0)
    if callable(getattr(score, "denoise", None)):
        return score.denoise, tableau.times
    return score, tableau.times
