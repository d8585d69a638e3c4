"""Guidance: a score drawn towards a class, or away from a weaker model.

    D = D_null + w (D_class - D_null)          classifier-free: `cfg`, for several at once `compose`
    D = D_weak + w (D - D_weak)                autoguidance: `guide`
    s = s + w grad_x log p(y | x, t)           classifier guidance: `classifier_guided`

w = 0 is no guidance by the class, w = 1 the conditional model itself, w > 1 goes beyond. At each t
the guided score is that of the tilted density p_t(x) (p_t(x|y)/p_t(x))^w. `Within` guides at some
noise levels only.

The weights of the first two sum to one. So, at the same (x, t), the combination of the scores is
that of the denoisers and that of the raw outputs F of every parametrisation, which is where it is
made: a guided `Denoiser` is a Denoiser, and runs with every solver, SDE, grid and prediction at
the speed of its network.
"""

from .arguments import CONVENTIONS, Label, Weight, check_label, null_label
from .classifier import classifier_guided
from .free import cfg, compose, labelled
from .interval import Within
from .pair import guide

__all__ = [
    "CONVENTIONS",
    "Label",
    "Weight",
    "Within",
    "cfg",
    "check_label",
    "classifier_guided",
    "compose",
    "guide",
    "labelled",
    "null_label",
]
