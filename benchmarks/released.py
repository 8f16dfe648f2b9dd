"""Times our baseline step against one as the released code of the field takes it.

    python benchmarks/released.py --rounds 5 --json OUT.json

The other step is written anew from what published DiT and SiT training scripts do: eager float32,
modulation and gates as separate products and sums, labels dropped and timesteps drawn
independently, AdamW as PyTorch's default on the device, gradients clipped by norm, the running
average tensor by tensor. Same sizes as DiT-S/2 on latents 4x32x32, same rows. Ours is the step of
step.py, eager in float32 and compiled in bf16. A ratio is per round.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path
from types import MethodType

import torch
from common import about, synchronize, write_json
from timed import Setting, Timed
from torch import Tensor, nn

from w2s_train.cli import keep_freed_memory
from w2s_train.models import DiT
from w2s_train.models.dit import DiTBlock


def modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """As published."""
    return h * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def block(self: DiTBlock, h: Tensor, cond: Tensor) -> Tensor:
    """A block as published."""
    part = self.adaLN_modulation(cond).chunk(6, dim=1)
    h = h + part[2].unsqueeze(1) * self.attn(modulated(self.norm1(h), part[0], part[1]))
    return h + part[5].unsqueeze(1) * self.mlp(modulated(self.norm2(h), part[3], part[4]))


class Released:
    """Its network, average and optimizer.

    Args:
        batch: Rows.
        device: Where.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.network = DiT(hidden_size=384, depth=12, num_heads=6).to(device)
        for each in self.network.blocks:
            each.forward = MethodType(block, each)  # type: ignore[method-assign]
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.learned = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learned, lr=1e-4, weight_decay=0.0)
        self.x = torch.randn(batch, 4, 32, 32, device=device)
        self.y = torch.randint(1000, (batch,), device=device)

    def block(self) -> float:
        """Seconds of a step."""
        synchronize()
        began = time.perf_counter()
        dropped = torch.rand(len(self.x), device=self.x.device) < 0.1
        y = torch.where(dropped, 1000, self.y)
        t, noise = torch.rand(len(self.x), device=self.x.device), torch.randn_like(self.x)
        time_ = t.view(-1, 1, 1, 1)
        out = self.network((1 - time_) * self.x + time_ * noise, t, y).velocity
        loss = ((out - (noise - self.x)) ** 2).flatten(1).mean(1).mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.learned, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            weights = dict(self.network.named_parameters())
            for name, value in self.average.named_parameters():
                value.mul_(0.9999).add_(weights[name], alpha=1 - 0.9999)
        synchronize()
        return time.perf_counter() - began


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="at least 3")
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    if args.rounds < 3:
        raise SystemExit(f"error: rounds={args.rounds}: must be at least 3")
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps: dict[str, Released | Timed] = {"released, eager 32-true": Released(args.batch, device)}
    for precision, how in (("32-true", False), ("bf16-mixed", "blocks"), ("bf16-mixed", True)):
        setting = Setting("s2", precision, how, args.batch, 1, [], device)
        steps[f"ours, {precision}, compile={how}"] = Timed("none", setting)
    for each in steps.values():
        each.block()
        each.block()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(args.rounds):
        print(f"round {i + 1} of {args.rounds}", flush=True)
        for name, each in steps.items():
            times[name].append(each.block())
    base, entries = next(iter(times.values())), []
    for name, seconds in times.items():
        ratios = [mine / theirs for mine, theirs in zip(seconds, base, strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        numbers = dict(seconds=statistics.median(seconds), ratio=ratio, ratio_quartiles=[low, high])
        entries.append({"step": name, "batch": args.batch, "rounds": args.rounds, **numbers})
        print(f"{name:36} {numbers['seconds']:.3f} s  {ratio:.3f} ({low:.3f} to {high:.3f})")
    if args.json:
        write_json(args.json, [entry | about() for entry in entries])


if __name__ == "__main__":
    main()
