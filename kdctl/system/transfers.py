"""Numbers on their way to a device, which the host does not wait for."""

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device; on CUDA from page-locked memory, so that the copy joins the queue."""
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def fetch(*tensors: Tensor) -> list[list[float]]:
    """Read tensors from their device, all in one copy, which waits for the device."""
    numbers = torch.cat([tensor.flatten().double() for tensor in tensors]).cpu()
    return [part.tolist() for part in numbers.split([tensor.numel() for tensor in tensors])]
