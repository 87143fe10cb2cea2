"""A flag on each GPU that tells whether scores were NaN. Selections set it, so that the host need not wait for them."""

import torch
from torch import Tensor

_flags: dict[torch.device, Tensor] = {}


def _numbered(device: torch.device) -> torch.device:
    """The device with its number; "cuda" alone means the current one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def capturing() -> bool:
    """Whether a CUDA graph is being captured. Its replays change tensors without Python."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def flag(device: torch.device) -> Tensor:
    """The flag of a device, int32 of shape (1,). A selection sets it to 1 and never clears it.

    It is allocated at the device's first selection.

    Raises:
        RuntimeError: If a CUDA graph would capture the allocation.
    """
    device = _numbered(device)
    if device not in _flags:
        if capturing():
            raise RuntimeError(
                f"the first selection on {device} is captured in a CUDA graph: make one step before the capture, as "
                "exssnet.graphed does"
            )
        _flags[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return _flags[device]


def seen(device: torch.device) -> bool:
    """Whether a selection on the device has met NaN since the last call, which clears the flag. Synchronises."""
    device = _numbered(device)
    if device not in _flags:
        return False
    raised = bool(_flags[device])
    _flags[device].zero_()
    return raised
