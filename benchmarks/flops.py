"""Floating-point operations of a network, counted from its architecture, and of a machine.

Per image, with N tokens of width D, MLPs of width M and p^2 C numbers per patch, the matrix
products take, in multiply-adds,

    patches    N p^2 C D
    timestep   256 D + D^2
    a block    4 N D^2 (queries, keys, values, projection) + 2 N^2 D (scores, values)
               + 2 N D M (MLP) + 6 D^2 (adaLN)
    last layer N D p^2 C_out + 2 D^2 (adaLN)

and an operation is an addition or a multiplication: twice as many. "Gflops" in the DiT paper
(Peebles & Xie, 2023, table 4) are multiply-adds. What is done per element (norms, softmax,
activations) is not counted.
"""

import time

import torch
from common import synchronize

from w2s_train.models import DiT

# Dense bf16 with float32 sums, per second: NVIDIA's data sheets of H100, H200 and A100, which print
# twice as much for the first two, "with sparsity". The PCIe H100 is another one: it is measured.
PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}


def forward_flops(network: DiT) -> int:
    """Operations of one pass over one image."""
    size = network.arguments
    width, patch = size["hidden_size"], size["patch_size"] ** 2
    tokens = size["input_size"] ** 2 // patch
    mlp = int(width * size["mlp_ratio"])
    block = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * mlp + 6 * width**2
    ends = tokens * width * patch * (size["in_channels"] + size["out_channels"]) + 2 * width**2
    timestep = 256 * width + width**2
    return 2 * (size["depth"] * block + ends + timestep)


def step_flops(network: DiT, batch: int) -> int:
    """Operations of a training step that the baseline needs: the strong pass, forward and backward.

    The backward pass takes two products for each of the forward pass. Weak passes and what gradient
    checkpointing computes again are *not* counted, so that a recipe that costs more has a lower
    utilization (MFU, Chowdhery et al., 2022).
    """
    return 3 * batch * forward_flops(network)


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """Operations per second that the device is good for in a precision, and where that is from.

    What is measured is lower while others use the machine.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if name in PEAKS and precision == "bf16-mixed":
        return PEAKS[name], f"data sheet of {name}, dense bf16"
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    side = 8192 if device.type == "cuda" else 1024
    found, began = list[float](), time.perf_counter()
    # A CPU without units for bfloat16 takes seconds for one.
    while not found or len(found) < 20 and time.perf_counter() - began < 2:
        found.append(_product(side, dtype, device))
    kind = str(dtype).removeprefix("torch.")
    source = f"measured: best of {len(found)} products of {side}x{side} matrices in {kind}"
    return max(found), source


def _product(side: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of one product of square matrices."""
    a = torch.randn(side, side, dtype=dtype, device=device)
    synchronize()
    began = time.perf_counter()
    a @ a
    synchronize()
    return 2 * side**3 / (time.perf_counter() - began)
