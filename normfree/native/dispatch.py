"""Whether a kernel may bypass PyTorch's dispatcher, and memory layouts; the only user of private torch APIs.

Each function that reads a private torch attribute has a test in `tests/native/test_dispatch.py`, so that a torch
release that changes the attribute fails there and not in a user's program.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.nn.modules import module as _module

# A key: a name would be looked up at each use, in 1.5 µs.
_VMAP_MODE = torch._C._parse_dispatch_key("VmapMode") or "VmapMode"

# --- who observes operations -------------------------------------------------------------------------


def functorch_is_active() -> bool:
    """Return True inside a transform of `torch.func`, such as `vmap`, `grad` or `jvp`."""
    return torch._C._are_functorch_transforms_active()


def batched_gradients_are_active() -> bool:
    """Return True inside `torch.autograd.grad(..., is_grads_batched=True)`, as in `jacobian(..., vectorize=True)`.

    It uses the vmap that PyTorch had before `torch.func`.
    """
    return torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)


def dispatch_mode_is_active() -> bool:
    """Return True inside a `TorchDispatchMode`, such as `FakeTensorMode` or `FlopCounterMode`."""
    return torch._C._len_torch_dispatch_stack() > 0


def forward_ad_is_active() -> bool:
    """Return True inside `torch.autograd.forward_ad.dual_level`."""
    return forward_ad._current_level >= 0


def fx_is_tracing() -> bool:
    """Return True while `torch.fx` traces a module with proxies in place of tensors."""
    return bool(_symbolic_trace.is_fx_symbolic_tracing())


def has_hooks(module: nn.Module) -> bool:
    """Return True if a hook will see the inputs, the outputs or their gradients when `module` is called."""
    return any(
        (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._backward_pre_hooks,
            module._backward_hooks,
            _module._global_forward_pre_hooks,
            _module._global_forward_hooks,
            _module._global_backward_pre_hooks,
            _module._global_backward_hooks,
        )
    )


def is_transformed() -> bool:
    """Return True inside a transform of `torch.func`, batched gradients, forward-mode AD, or a trace by `torch.fx`.

    They need PyTorch operations on the parameters of a module: no custom backward pass, and no saved results.
    """
    return not torch.compiler.is_compiling() and (
        functorch_is_active() or batched_gradients_are_active() or forward_ad_is_active() or fx_is_tracing()
    )


def can_bypass_dispatcher() -> bool:
    """Return True if no compiler, tracer, functorch transform, forward-mode AD or dispatch mode is active.

    A compiled kernel may then replace PyTorch operations. `torch.compile` must see this check first: it evaluates it to
    False and does not look at the conditions that follow.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit._trace.is_tracing()
        or dispatch_mode_is_active()
        or is_transformed()
    )


def eager_training() -> bool:
    """Return True if autograd records eager operations, so that a custom backward pass is used.

    It is not used without gradients, where nothing is saved; under `torch.compile`, which decides what to save; or
    where `is_transformed`, which needs plain operations.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_transformed()


# --- tensors in memory -------------------------------------------------------------------------------


def is_dense(tensor: Tensor) -> bool:
    """Return True if `tensor` is contiguous or channels_last: no gaps in memory, dimension 0 outermost."""
    return tensor.is_contiguous() or (
        tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def is_plain_cpu_tensor(tensor: Tensor) -> bool:
    """Return True if a compiled kernel can read `tensor`: no subclass, on the CPU, float32, and dense."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.is_cpu
        and tensor.dtype == torch.float32
        and is_dense(tensor)
    )


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Return True if each element has the same offset in `a` and `b`, which have the same shape.

    Strides of dimensions of size 1 are ignored.
    """
    if a.stride() == b.stride():
        return True
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def laid_out_as(like: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor` in the memory format of `like`, without a copy if it already has that format."""
    if same_layout(tensor, like):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def storage_id(storage: torch.UntypedStorage) -> int:
    """Return a number that identifies `storage` while it is alive; 0 bytes and fake storages have one too."""
    return storage._cdata


# --- oneDNN convolutions with packed weights ---------------------------------------------------------


def onednn_conv2d_is_available() -> bool:
    """Return True if oneDNN is enabled and torch has its convolution for packed weights."""
    return torch._C._get_mkldnn_enabled() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def pack_onednn_weight(
    weight: Tensor, shape: torch.Size, *, stride: int, padding: tuple[int, int], groups: int
) -> Tensor:
    """Return `weight` O I H W in the layout that oneDNN uses for inputs of `shape` B C H W on this machine."""
    packed: Tensor = torch.ops.aten.mkldnn_reorder_conv2d_weight(
        weight.contiguous().to_mkldnn(), list(padding), [stride, stride], [1, 1], groups, list(shape)
    )
    return packed


def onednn_conv2d(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    *,
    stride: int,
    padding: tuple[int, int],
    groups: int,
) -> Tensor:
    """Return the convolution of `x` B C H W by a weight of `pack_onednn_weight`, without a gradient."""
    y: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, packed, bias, list(padding), [stride, stride], [1, 1], groups, "none", [], ""
    )
    return y
