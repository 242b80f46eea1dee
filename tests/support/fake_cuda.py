# SPDX-License-Identifier: Apache-2.0
"""
A CUDA device for machines without one: tensors on it have real numbers, which the CPU computes, and operations on
tensors of two devices fail as on a GPU. (`FakeTensorMode` has no CUDA in torch's CPU build, and no numbers.)
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from endotrl.scoring import attention_kernels as kernels
from endotrl.scoring.attention_kernels import Lengths

from ..scoring.test_kernels import attention_of_each_sequence


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
# What takes tensors of two devices: copies, and, on a GPU, positions that are on the CPU.
COPIES = {Tensor.copy_, Tensor.to, Tensor.__setitem__, torch._has_compatible_shallow_copy_type}
PRODUCTS = {linear, torch.mm, torch.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm}


class FakeCuda(TorchFunctionMode):
    """Inside, there is a device `"cuda"`. A tensor on it is one of the CPU with a mark."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        of_property = getattr(func, "__self__", None)
        if of_property is Tensor.device and func.__name__ == "__get__":
            return device_of(args[0])
        if of_property in (Tensor.is_cuda, Tensor.is_cpu) and func.__name__ == "__get__":
            return device_of(args[0]).type == ("cuda" if of_property is Tensor.is_cuda else "cpu")
        if of_property is Tensor.data and func.__name__ == "__set__":
            func(*args)
            return mark(args[0], device_of(args[1]))
        if func is Tensor.get_device:
            return {"cuda": 0, "cpu": -1}[device_of(args[0]).type]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        check_devices(func, args, tensors)
        own = device_of(tensors[0]) if tensors else CPU
        target = own
        if func in (Tensor.cpu, Tensor.cuda):
            func, args, target = Tensor.to, (args[0],), CPU if func is Tensor.cpu else CUDA
        elif func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            target = device_of(args[1])
        elif named := [torch.device(leaf) for leaf in tree_leaves((args, kwargs)) if is_device(leaf)]:
            target = named[0]
            args, kwargs = tree_map_only((str, torch.device), on_cpu, (args, kwargs))
        if func is Tensor.numpy and own == CUDA:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if func in PRODUCTS and own == CUDA and torch.backends.cuda.matmul.fp32_precision == "tf32":
            args = tree_map_only(Tensor, as_tf32, args)
        if func is torch.ops.aten._flash_attention_forward:
            result: Any = flash_attention(*args, **kwargs)
        elif func is Tensor.to and args[1:] == () and not kwargs:
            result = args[0]
        else:
            result = func(*args, **kwargs)
        if target != own and any(result is tensor for tensor in tensors):
            result = result.clone()
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not any(leaf is tensor for tensor in tensors):
                mark(leaf, target)
        return result


def is_device(leaf: object) -> bool:
    return isinstance(leaf, torch.device) or (isinstance(leaf, str) and leaf.split(":")[0] in ("cuda", "cpu", "meta"))


def on_cpu(leaf: Any) -> Any:
    """The CPU in the place of the device."""
    return CPU if is_device(leaf) and torch.device(leaf).type == "cuda" else leaf


def device_of(tensor: Tensor) -> torch.device:
    """Where a tensor seems to be."""
    with torch._C.DisableTorchFunction():
        real = tensor.device
    return CUDA if "_on_cuda" in vars(tensor) and real == CPU else real


def mark(tensor: Tensor, device: torch.device) -> None:
    """Puts a tensor onto a device."""
    if device.type == "cuda":
        vars(tensor)["_on_cuda"] = True
    else:
        vars(tensor).pop("_on_cuda", None)


def check_devices(func: Callable[..., Any], args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """Raises what torch raises."""
    devices = {device_of(tensor).type for tensor in tensors if tensor.dim() > 0} - {"meta"}
    indexed = func is Tensor.__getitem__ and device_of(args[0]) == CUDA
    if len(devices) > 1 and func not in COPIES and not indexed:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, in {func}")


def as_tf32(tensor: Tensor) -> Tensor:
    """Rounded to 11 bits, as the units for products of a GPU do it, if allowed."""
    if tensor.dtype != torch.float32:
        return tensor
    return ((tensor.detach().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def flash_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """PyTorch's kernel for sequences of several lengths, whose arguments and shapes its own declaration checks."""
    shapes = torch.ops.aten._flash_attention_forward(
        *(arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args), **kwargs
    )
    query, key, value, query_offsets, key_offsets, longest_query, longest_key, _, causal, *_ = args
    assert query_offsets.dtype == key_offsets.dtype == torch.int32 and query.dtype in (torch.bfloat16, torch.float16)
    output, log_sum_exp = attention_of_each_sequence(
        *(states.float() for states in (query, key, value)),
        Lengths(query_offsets, longest_query),
        Lengths(key_offsets, longest_key),
        causal,
        query.shape[-1] ** -0.5 if kwargs["scale"] is None else kwargs["scale"],
    )
    assert (output.shape, log_sum_exp.shape) == (shapes[0].shape, shapes[1].shape)
    return output.to(query.dtype), log_sum_exp, *(torch.zeros(0) for _ in shapes[2:])


def block_mask(*args: Any, make: Callable[..., BlockMask] = BlockMask.from_kv_blocks, **kwargs: Any) -> BlockMask:
    """A mask, all of whose tensors must be on the device."""
    captured = [cell.cell_contents for cell in kwargs["mask_mod"].__closure__]
    assert {device_of(tensor) for tensor in (*args, *captured)} == {CUDA}
    with torch._C.DisableTorchFunction():
        return make(*args, **kwargs)


def flex_attention(query: Tensor, key: Tensor, value: Tensor, *, block_mask: BlockMask, **kwargs: Any) -> Tensor:
    """What the compiled kernel computes, from all scores."""
    assert {device_of(states) for states in (query, key, value)} == {CUDA}
    with torch._C.DisableTorchFunction():
        places = torch.arange(query.shape[2])
        visible = block_mask.mask_mod(*torch.zeros(2, dtype=torch.long), places[:, None], places[None])
        output = scaled_dot_product_attention(query, key, value, attn_mask=visible, **kwargs).nan_to_num()
    mark(output, CUDA)
    return output


def make_parameter(
    cls: Any, data: Any = None, requires_grad: bool = True, make: Any = torch.nn.Parameter.__new__
) -> torch.nn.Parameter:
    parameter: torch.nn.Parameter = make(cls, data, requires_grad)
    if data is not None:
        mark(parameter, device_of(data))
    return parameter


entered: list[torch.device] = []  # in which `torch.cuda.device` is now


@contextmanager
def current_device(device: torch.device) -> Iterator[None]:
    """As `torch.cuda.device`."""
    entered.append(device)
    yield
    entered.pop()


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Inside, a GPU of compute capability 9.0 with PyTorch's attention kernels."""
    with ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "get_device_capability", lambda *args: (9, 0)),
            (torch.cuda, "device", current_device),
            (torch.backends.cuda, "is_flash_attention_available", lambda: True),
            (torch.accelerator, "synchronize", lambda *args: None),
            (BlockMask, "from_kv_blocks", staticmethod(block_mask)),
            (kernels, "flex_kernel", lambda: flex_attention),
            (torch.nn.Parameter, "__new__", make_parameter),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(FakeCuda())
        yield
