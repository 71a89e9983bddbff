"""Losses as functions of the label's log-odds and other statistics of a row.

`token` holds those of one token's own probability, `runner_up` those that also see the likeliest
other token, `statistics` those that see the whole row (cross-entropy with its regularisers),
`sequence` those of whole sequences; `base` says what an objective is and knows them by name.
"""

from unilogit_kernels.maths.elementwise import softplus, uniform_log_odds
from unilogit_kernels.objectives.base import (
    REGISTRY,
    Objective,
    by_name,
    parameter_names,
    per_sequence,
    per_token,
    register,
    resolve,
)
from unilogit_kernels.objectives.flat import FLAT, FLATKL, FLATJensenShannon, FLATPearson
from unilogit_kernels.objectives.mixture import Mixture, Packed, is_registered, pack, unpack
from unilogit_kernels.objectives.runner_up import LoKU, RunnerUpObjective
from unilogit_kernels.objectives.sequence import DPO, NPO, IdkDPO, SequenceObjective, SimNPO
from unilogit_kernels.objectives.statistics import (
    PDU,
    CrossEntropy,
    Entropy,
    MaxEntropy,
    RowStatistics,
    StatisticsFunction,
    of_statistics,
)
from unilogit_kernels.objectives.token import (
    CEU,
    TNPO,
    WGA,
    GradientAscent,
    Probability,
    SatImp,
    SelfUnDIAL,
    UnilogitForward,
    UnilogitReverse,
)

__all__ = [
    "CEU",
    "DPO",
    "FLAT",
    "FLATKL",
    "NPO",
    "PDU",
    "REGISTRY",
    "TNPO",
    "WGA",
    "CrossEntropy",
    "Entropy",
    "FLATJensenShannon",
    "FLATPearson",
    "GradientAscent",
    "IdkDPO",
    "LoKU",
    "MaxEntropy",
    "Mixture",
    "Objective",
    "Packed",
    "Probability",
    "RowStatistics",
    "RunnerUpObjective",
    "SatImp",
    "SelfUnDIAL",
    "SequenceObjective",
    "SimNPO",
    "StatisticsFunction",
    "UnilogitForward",
    "UnilogitReverse",
    "by_name",
    "is_registered",
    "of_statistics",
    "pack",
    "parameter_names",
    "per_sequence",
    "per_token",
    "register",
    "resolve",
    "softplus",
    "uniform_log_odds",
    "unpack",
]
