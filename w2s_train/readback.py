"""Small numbers between host and device, without waiting for what the device has still to do."""

import torch
from torch import Tensor


class Readback:
    """Numbers on their way from a device to the host.

    An accelerator works behind the host's back; to look at a result as soon as it is asked for
    stops both. The copy that begins here waits in the device's queue, and who takes the numbers a
    step later finds them there. On the CPU they are there at once.

    Args:
        values: (n,), or () for one.
    """

    def __init__(self, values: Tensor) -> None:
        self.values, self.arrival = values.reshape(-1), None
        if values.is_cuda:
            source, self.values = self.values, torch.empty(values.numel(), pin_memory=True)
            self.values.copy_(source, non_blocking=True)
            self.arrival = torch.cuda.Event()
            self.arrival.record()

    @property
    def there(self) -> bool:
        """Whether `take` would not wait."""
        return self.arrival is None or self.arrival.query()

    def take(self) -> list[float]:
        """The numbers."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.values.tolist()


def send(numbers: list[float], device: torch.device) -> Tensor:
    """Numbers of the host as a tensor (n,) float32 on ``device``."""
    pinned = torch.tensor(numbers, dtype=torch.float32, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)
