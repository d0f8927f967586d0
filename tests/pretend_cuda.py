"""A GPU that is not there: tensors in main memory that say they are on `cuda`, and fail where a real one would.

Inside `PretendCuda()`, `.to("cuda")` and factories with `device="cuda"` label the result's storage. Labels follow every
operation; operations that mix devices raise, and those for which the host of a real GPU waits are counted. Values are
computed on the CPU, so code whose control flow depends on the data runs as it is.

It does not know kernels that exist for one device only, streams, or pinned memory.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measure import storages

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
aten = torch.ops.aten
# the size of the result, or a number for Python, depends on values
WAITING = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.bincount, aten.equal, aten.is_nonzero),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave, aten._coalesce),
}
INDEXING = {
    aten.index,
    aten.index_put,
    aten.index_put_,
    aten._index_put_impl_,
}  # take indices on the CPU, and copy them
COPIES = {aten.copy_, aten._to_copy}


class PretendCuda(TorchFunctionMode):
    """See the docstring of this module.

    Attributes:
        waits: where the host waited for the GPU, one line of source each, since the last `waits.clear()`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._operations = _Operations(self)
        self._grouped = Optimizer._group_tensors_by_device_and_dtype
        self._apply = BackwardCFunction.apply

    def __enter__(self) -> PretendCuda:
        def apply(ctx: Any, *args: Any) -> Any:
            """A backward function in this mode, which the engine's caller had left."""
            TorchFunctionMode.__enter__(self)
            try:
                return self._apply(ctx, *args)
            finally:
                TorchFunctionMode.__exit__(self, None, None, None)

        BackwardCFunction.apply = apply  # type: ignore[method-assign]
        Optimizer._group_tensors_by_device_and_dtype = staticmethod(self._groups)  # type: ignore[method-assign]
        self._operations.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._operations.__exit__(*error)
        BackwardCFunction.apply = self._apply  # type: ignore[method-assign]
        Optimizer._group_tensors_by_device_and_dtype = staticmethod(self._grouped)  # type: ignore[method-assign]

    def _groups(self, tensors: Any, with_indices: bool = False) -> Any:
        """The optimisers' groups, which C++ makes without asking this mode."""
        found = self._grouped(tensors, with_indices)
        return {(value[0][0][0].device, dtype): value for (_, dtype), value in found.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return GPU if on_gpu(args[0]) else func(*args)
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return on_gpu(args[0])
        if func is Tensor.numpy and on_gpu(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
        if func is Tensor.cpu:
            return self._moved(args[0], CPU)
        if func is Tensor.cuda:
            return self._moved(args[0], GPU)
        if func is Tensor.to:
            wanted = next((_device(a) for a in [*args[1:], *kwargs.values()] if _device(a) is not None), None)
            rest = [CPU if _device(a) is not None and not isinstance(a, Tensor) else a for a in args[1:]]
            if "device" in kwargs:
                kwargs["device"] = None if wanted is None else CPU
            return self._moved(args[0], wanted, lambda x: func(x, *rest, **kwargs))
        wanted = _device(kwargs.get("device"))
        # transformers builds models on "meta"; `_parse_to` takes the arguments of `Module.to`
        if wanted is None or wanted.type == "meta" or func is torch._C._nn._parse_to:
            return func(*args, **kwargs)
        kwargs.pop("pin_memory", None)  # without a driver there is none
        out = func(*args, **{**kwargs, "device": CPU})
        if wanted.type == "cuda" and func in (torch.tensor, torch.as_tensor):
            self.wait()
        label(out, wanted)
        return out

    def _moved(self, x: Tensor, to: torch.device | None, cast: Any = lambda x: x) -> Tensor:
        out = cast(x)
        if to is None or (to.type == "cuda") == on_gpu(x):
            return out
        self.wait()
        out = out.clone() if out.untyped_storage() is x.untyped_storage() else out
        label(out, to)
        return out

    def wait(self) -> None:
        """Note that the host waits here."""
        frames = [f for f in traceback.extract_stack() if "/crosslens/" in f.filename or "/sae_lens/" in f.filename]
        self.waits.append(f"{frames[-1].name}: {frames[-1].line}" if frames else "a test")


class _Operations(TorchDispatchMode):
    """Labels of results, and the rules of a real GPU, for every operation that reaches a kernel."""

    def __init__(self, pretend: PretendCuda) -> None:
        super().__init__()
        self.pretend = pretend

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        packet, kwargs = func.overloadpacket, kwargs or {}
        given = _tensors((args, kwargs))
        indices = _tensors(args[1]) if packet in INDEXING else []
        gpu = any(on_gpu(x) for x in given)
        # a scalar of the CPU may meet a GPU, and indices of the CPU are copied to it
        copied = {id(x) for x in indices} if indices and on_gpu(args[0]) else set()
        elsewhere = any(x.ndim and not on_gpu(x) and id(x) not in copied for x in given)
        if gpu and elsewhere and packet not in COPIES:
            where = ", ".join(f"{'cuda' if on_gpu(x) else 'cpu'} {tuple(x.shape)}" for x in given)
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {where}")
        if gpu and (packet in WAITING or any(x.dtype == torch.bool or not on_gpu(x) for x in indices)):
            self.pretend.wait()
        if packet is aten.copy_ and on_gpu(args[0]) != on_gpu(args[1]):
            self.pretend.wait()
        out = func(*args, **kwargs)
        if gpu and packet is not aten.copy_:
            for tensor in tree_leaves(out):
                label(tensor, GPU)
        return out


class Pretended:
    """What tests ask of a GPU, answered by `PretendCuda`."""

    real = False

    def __init__(self, mode: PretendCuda) -> None:
        self.mode = mode

    def waits(self, call: Callable[[], Any]) -> list[str]:
        """Where the host waited for the GPU during `call`."""
        self.mode.waits.clear()
        call()
        return list(self.mode.waits)


class Real:
    """The same of a GPU that is there."""

    real = True

    def waits(self, call: Callable[[], Any]) -> list[str]:
        """Where the host waited for the GPU during `call`; PyTorch warns of each."""
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]


def on_gpu(x: Tensor) -> bool:
    """Whether a tensor says it is on the GPU."""
    return any(getattr(storage, "on_gpu", False) for storage in storages(x))


def label(x: Any, device: torch.device) -> None:
    """Move a tensor in name; storages keep their Python attributes as long as they live."""
    for storage in storages(x):
        storage.on_gpu = device.type == "cuda"  # type: ignore[attr-defined]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _device(value: Any) -> torch.device | None:
    if isinstance(value, Tensor):
        return GPU if on_gpu(value) else CPU
    if isinstance(value, str):
        return torch.device(value)
    return value if isinstance(value, torch.device) else None
