"""A stand-in for an accelerator without float64 (Apple's MPS), on any machine."""

import torch
from torch.overrides import TorchFunctionMode


class OnHost(torch.Tensor):
    """A tensor that was moved to the CPU by name, and all that is computed from it."""


class NoFloat64(TorchFunctionMode):
    """Refuses float64 tensors, except on what was moved to the CPU by name: `x.cpu()`, or a factory with `device="cpu"`.

    Every other tensor stands for one of the accelerator, which on this machine may be the CPU too.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function is torch.Tensor.cpu or kwargs.get("device") == "cpu":
            return result.as_subclass(OnHost)
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64 and not isinstance(tensor, OnHost):
                raise TypeError(f"{function.__name__} makes a float64 tensor on the accelerator")
        return result
