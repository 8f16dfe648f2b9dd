"""Networks."""

from w2s_train.models.average import WeightAverage
from w2s_train.models.dit import DiT, DiTOutput, FinalLayer
from w2s_train.models.network import (
    Network,
    as_output,
    check_network,
    middle_blocks,
    offered,
    plain_tokens,
)
from w2s_train.models.prediction import check_prediction, to_velocity
from w2s_train.models.published import published_dit, published_lightningdit, published_sit
from w2s_train.models.saved import made_of, saved_network
from w2s_train.models.scale_embedder import ScaleInputs

__all__ = [
    "DiT",
    "DiTOutput",
    "FinalLayer",
    "Network",
    "ScaleInputs",
    "WeightAverage",
    "as_output",
    "check_network",
    "check_prediction",
    "made_of",
    "middle_blocks",
    "offered",
    "plain_tokens",
    "published_dit",
    "published_lightningdit",
    "published_sit",
    "saved_network",
    "to_velocity",
]
