"""One exception tree; the checks that every module shares."""

import numpy as np
import pytest
import torch

import sdeflow
from sdeflow import errors
from sdeflow.errors import ArgumentError, all_finite, did_you_mean, one_of, positive_int

CLASSES = [value for value in vars(errors).values() if isinstance(value, type)]
BUILT_IN = {
    errors.ArgumentError: ValueError,
    errors.ShapeError: ValueError,
    errors.GridError: ValueError,
    errors.PairingError: TypeError,
    errors.NonFiniteError: ArithmeticError,
    errors.SolverError: RuntimeError,
    errors.PluginError: RuntimeError,
    errors.UnknownNameError: LookupError,
}


def test_every_error_hangs_on_one_tree_and_on_its_builtin():
    ours = [kind for kind in CLASSES if issubclass(kind, Exception)]
    assert all(issubclass(kind, errors.SdeflowError) for kind in ours)
    assert set(ours) == {errors.SdeflowError, *BUILT_IN}
    for kind, builtin in BUILT_IN.items():
        assert issubclass(kind, builtin)


def test_every_error_can_be_caught_from_the_top_package():
    assert all(kind.__name__ in sdeflow.__all__ for kind in BUILT_IN)


@pytest.mark.parametrize("value", [1, 20, np.int64(7), torch.tensor(3)])
def test_whole_numbers_pass(value):
    number = positive_int("steps", value)
    assert type(number) is int and number == int(value)


@pytest.mark.parametrize(
    "value",
    [0, -1, 2.5, 2.0, True, False, "ten", None, [3], np.array([1, 2]), torch.tensor(2.5)],
    ids=repr,
)
def test_other_values_are_refused_by_name_with_a_remedy(value):
    with pytest.raises(ArgumentError, match="such as 20") as caught:
        positive_int("steps", value)
    assert str(caught.value).startswith(f"steps={value!r} ")


def test_one_of_names_the_argument_the_value_and_the_close_matches():
    assert one_of("prediction", "noise", ["noise", "data"]) == "noise"
    with pytest.raises(ArgumentError, match="prediction='nois' is unknown; did you mean 'noise'"):
        one_of("prediction", "nois", ["noise", "data"])


def test_close_matches_come_first_then_everything():
    assert did_you_mean("VP", ["vp", "sub_vp", "edm"]) == (
        "; did you mean 'sub_vp' or 'vp'? there are: edm, sub_vp, vp"
    )
    assert did_you_mean("qqq", ["vp"]) == "; there are: vp"
    assert did_you_mean("vp", []) == "; there are: none"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_finite_sees_one_bad_number_and_forgives_a_sum_that_overflows(dtype):
    x = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(x)
    assert all_finite(x.new_empty(0, 5))
    for bad in (float("nan"), float("inf"), float("-inf")):
        x[1, 2] = bad
        assert not all_finite(x)
    assert not all_finite(torch.tensor([float("inf"), float("-inf")], dtype=dtype))
