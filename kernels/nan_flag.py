"""Whether scores held NaN: a flag on each GPU, which selections raise there so that the host need not wait for them."""

import torch
from torch import Tensor

_flags: dict[torch.device, Tensor] = {}


def _numbered(device: torch.device) -> torch.device:
    """The device with its number: "cuda" is the current one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def flag(device: torch.device) -> Tensor:
    """The flag of a device, int32 of shape (1,): a selection sets it to 1 and never clears it.

    It is made at the device's first selection, which must not be one that a CUDA graph captures.
    """
    device = _numbered(device)
    if device not in _flags:
        _flags[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return _flags[device]


def seen(device: torch.device) -> bool:
    """Whether a selection on the device has met NaN scores since this was last asked; waits for the device."""
    device = _numbered(device)
    if device not in _flags:
        return False
    found = bool(_flags[device])
    _flags[device].zero_()
    return found
