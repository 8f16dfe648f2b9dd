"""Scales as inputs of the network: laws that they are drawn from, and what is drawn per row."""

from w2s_train.inbuilt.laws import Drawn, IMeanFlow, OmegaPower, UniformScale

__all__ = ["Drawn", "IMeanFlow", "OmegaPower", "UniformScale"]
