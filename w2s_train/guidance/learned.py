"""A guidance scale that a small network learns, and the objective that teaches it.

After Galashov et al. (2025, "Learn to Guide Your Diffusion Model"): the scale depends on the class,
on the time t of a step and on the time s that it leads to, and is trained so that one guided step
from true noisy samples x_t gives the distribution of true noisy samples x_s. The network is frozen.
"""

import torch
from torch import Tensor, nn

from w2s_train.checkpoint_file import read_checkpoint
from w2s_train.errors import UserError, require
from w2s_train.guidance.base import Guidance, VelocityField, evaluate_both, extrapolate
from w2s_train.interpolant import Interpolant, NoisySample, right_pad
from w2s_train.log import Log
from w2s_train.models import Network, offered
from w2s_train.objective import Objective
from w2s_train.timesteps import TimestepDistribution, Uniform
from w2s_train.weak.base import Step

PREFIX = "objective.scales."


class ScaleNetwork(nn.Module):
    """scale = ReLU(MLP(logSNR(s), logSNR(t), class)); 1, which is unguided, before training.

    Args:
        num_classes: Number of classes; the null class has an embedding, too.
        hidden_size: Width of the class embedding and of the two hidden layers.
        vectors: Length of vectors that stand in the place of labels, such as a prompt's; None if
            labels do.
    """

    def __init__(self, num_classes: int, hidden_size: int = 64, vectors: int | None = None) -> None:
        super().__init__()
        self.embedding: nn.Embedding | nn.Linear = (
            nn.Embedding(num_classes + 1, hidden_size)
            if vectors is None
            else nn.Linear(vectors, hidden_size, bias=False)
        )
        last = nn.Linear(hidden_size, 1)
        nn.init.zeros_(last.weight)
        nn.init.ones_(last.bias)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size + 2, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.SiLU(),
            last,
        )

    def forward(self, s: Tensor, t: Tensor, y: Tensor, interpolant: Interpolant) -> Tensor:
        """Scales (B,) for steps from times t (B,) to s (B,) with labels (B,) or vectors (B, D)."""
        levels = [log_snr(time.float(), interpolant) / 10 for time in (s, t)]
        return self.mlp(torch.cat([torch.stack(levels, 1), self.embedding(y)], 1)).squeeze(1).relu()


def log_snr(t: Tensor, interpolant: Interpolant) -> Tensor:
    """log(alpha^2 / sigma^2) at times (B,), within [-20, 20]."""
    alpha, sigma, *_ = interpolant.coefficients(t)
    return 2 * (alpha.clamp(min=0).log() - sigma.clamp(min=0).log()).clamp(-10, 10)


def energy_distance(one: Tensor, other: Tensor) -> Tensor:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased, for particles (B, M, D) each: (B,).

    Distances are divided by sqrt(D).
    """
    m, d = one.shape[1:]

    def within(x: Tensor) -> Tensor:
        pairs = torch.triu_indices(m, m, offset=1, device=x.device)
        return (x[:, pairs[0]] - x[:, pairs[1]]).norm(dim=2).mean(1)

    between = torch.cdist(one, other).mean((1, 2))
    return (2 * between - within(one) - within(other)) / d**0.5


def step_distance(
    velocity: Tensor, noisy: NoisySample, s: Tensor, x_s: Tensor, particles: int
) -> Tensor:
    """The energy distance between x_t after one Euler step to times s (B,), and x_s: one number
    for each ``particles`` rows.
    """
    stepped = noisy.x_t + right_pad(s - noisy.t, x_s) * velocity
    groups = [a.flatten(1).unflatten(0, (-1, particles)) for a in (stepped, x_s)]
    return energy_distance(*groups)


class GuidanceObjective(Objective):
    """Trains a `ScaleNetwork` on a frozen network.

    Of every x, ``particles`` samples x_t and as many x_s are drawn, s being up to ``longest_step``
    below t; the loss is the energy distance between the x_t after one guided Euler step and the
    x_s.

    Args:
        interpolant: How data and noise are mixed.
        timesteps: Where t is drawn from; None is uniform.
        particles: At least 2; 4 or more are advised.
        longest_step: Longest step t - s, in (0, 1).
        hidden_size: Width of the scale network.

    Raises:
        UserError: A number out of its range.
    """

    def __init__(
        self,
        interpolant: Interpolant,
        timesteps: TimestepDistribution | None = None,
        particles: int = 4,
        longest_step: float = 0.1,
        hidden_size: int = 64,
    ) -> None:
        super().__init__(interpolant, timesteps or Uniform())
        self.particles = require("particles", particles, "[2, inf)")
        self.longest_step = require("longest_step", longest_step, "(0, 1)")
        self.hidden_size = hidden_size

    def bind(self, network: Network, label_dropout: float | None = None) -> None:
        network.requires_grad_(False)
        classes = offered(network, "GuidanceObjective", "num_classes")
        self.scales = ScaleNetwork(classes, self.hidden_size)

    def forward(self, network: Network, x: Tensor, y: Tensor, step: Step, log: Log) -> Tensor:
        t = self.timesteps.draw(len(x), x.device, self.interpolant)
        s = (t - self.longest_step * torch.rand_like(t)).clamp(min=0)
        x, y, t, s = (a.repeat_interleave(self.particles, 0) for a in (x, y, t, s))
        noisy = self.interpolant.corrupt(x, torch.randn_like(x), t)
        x_s = self.interpolant.corrupt(x, torch.randn_like(x), s).x_t
        null = torch.full_like(y, network.null_class)
        with torch.no_grad():
            v_class, v_null = (network(noisy.x_t, t, label).velocity.float() for label in (y, null))
        scale = self.scales(s, t, y, self.interpolant)
        velocity = extrapolate(v_null, v_class, right_pad(scale, x))
        loss = step_distance(velocity, noisy, s, x_s, self.particles)
        log.add(("loss",), loss[None])
        log.add(("guidance_scale",), scale[None])
        return loss


class Learned(Guidance):
    """Classifier-free guidance with the scale of a `ScaleNetwork`.

    Args:
        path: Checkpoint of a fit with `GuidanceObjective`; None during that fit, or when scoring
            its own checkpoint.

    Raises:
        UserError: A file without such a network; in `bind`, another number of classes, or no path
            where the objective does not train one.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.loaded = _read_scales(path) if path is not None else None

    def bind(self, network: Network, objective: Objective) -> None:
        self.interpolant = objective.interpolant
        if self.loaded is not None:
            self.scales = self.loaded
        elif isinstance(objective, GuidanceObjective):
            self.scales = objective.scales
        else:
            raise UserError(
                "path=None: must be a checkpoint of a fit with w2s_train.guidance.GuidanceObjective"
            )
        classes = len(self.scales.embedding.weight) - 1
        known = offered(network, "Learned", "num_classes")
        if classes != known:
            raise UserError(f"path={self.path}: has {classes} classes, must have {known}")

    def field(self, network: Network, y: Tensor, times: list[float]) -> VelocityField:
        scales, ends = self.scales.to(y.device), dict(zip(times, times[1:], strict=False))

        def velocity(x_t: Tensor, t: float, start: float) -> Tensor:
            s, now = (torch.full((len(y),), time, device=y.device) for time in (ends[start], start))
            scale = right_pad(scales(s, now, y, self.interpolant), x_t).to(x_t.dtype)
            v_class, v_null = evaluate_both(network, x_t, t, y)
            return extrapolate(v_null, v_class, scale)

        return velocity

    def describe(self) -> str:
        return f"learned({self.path})" if self.path else "learned"


def _read_scales(path: str) -> ScaleNetwork:
    state = read_checkpoint(path)["state_dict"]
    state = {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
    if not state:
        raise UserError(f"path={path}: must come from a fit with GuidanceObjective")
    try:
        classes, hidden_size = state["embedding.weight"].shape
        scales = ScaleNetwork(classes - 1, hidden_size)
        scales.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"path={path}: must hold a whole ScaleNetwork") from error
    return scales.requires_grad_(False)
