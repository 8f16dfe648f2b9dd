"""Networks."""

from w2s_train.models.average import WeightAverage
from w2s_train.models.dit import DiT, DiTOutput, FinalLayer
from w2s_train.models.published import published_dit, published_sit
from w2s_train.models.saved import saved_network

__all__ = [
    "DiT",
    "DiTOutput",
    "FinalLayer",
    "WeightAverage",
    "published_dit",
    "published_sit",
    "saved_network",
]
