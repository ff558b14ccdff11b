"""What code gets in place of logits, and what happens when it calls a function of it.

Two kinds, because neither serves alone:

    LazyObject    where gradients are recorded, and in code that torch.compile traces. No Tensor:
                  the compiler traces objects with __torch_function__, but not the making of tensor
                  subclasses; and hooks that put autograd nodes around every Tensor that a module
                  returns (ZeRO-3) would cut the graph of a subclass.
    LazyTensor    elsewhere. A Tensor: evaluation code checks for one.

Both have every method of Tensor, and ``dense()``: the plain logits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, make_dataclass
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node, tree_map

import memeff.lazy.losses  # these five fill the table
import memeff.lazy.metadata
import memeff.lazy.pointwise
import memeff.lazy.reductions
import memeff.lazy.views  # noqa: F401
from memeff.lazy.node import Node
from memeff.lazy.state import State
from memeff.lazy.table import TABLE, Row


class Carrier:
    """What LazyObject and LazyTensor share: a node, and the writes to its storage it has seen."""

    _node: Node
    _writes: int

    def _hold(self, node: Node) -> None:
        self._node = node
        self._writes = node.storage.writes

    def _wrote(self) -> None:
        """Note a write into the logits, which exist."""
        self._node.storage.writes += 1
        self._writes = self._node.storage.writes

    def _rewrote(self, node: Node) -> None:
        """Note a write that leaves this carrier with `node`, whose logits need not exist."""
        self._node = node
        self._wrote()
        node.version = node.storage.rewritten = self._writes

    @property
    def node(self) -> Node:
        node = self._node
        if self._writes != node.storage.writes and (
            self._writes < node.storage.rewritten or not node.is_dense
        ):
            raise RuntimeError(
                "these lazy logits share memory with others that were modified in place before "
                "anybody looked at these, so that their values are lost; call .dense() on them "
                "before that"
            )
        return node

    def dense(self) -> Tensor:
        """The plain logits, part of the graph as they would be; computed once."""
        return call(Carrier.dense, (self,), {})

    def __iter__(self) -> Iterator[Any]:
        return iter(self.unbind(0))  # type: ignore[attr-defined]

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        state = self._node.state
        made = "computed" if self._node.is_dense else "not computed"
        grad = ", requires_grad=True" if state.requires_grad else ""
        return (
            f"{type(self).__name__}({state.kind} of {tuple(state.shape)}, {state.dtype}, "
            f"device='{state.hidden.device}'{grad}; {made})"
        )


def call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """function(*args, **kwargs), where some arguments are carriers."""
    row = TABLE.get(function)
    if row is not None:
        result = _lazily(row, function, args, kwargs)
        if result is not NotImplemented:
            return result
    return _densely(function, args, kwargs)


def _lazily(row: Row, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call by its row, or NotImplemented."""
    if "input" in kwargs and not args:  # as in F.cross_entropy(input=..., target=...)
        kwargs = dict(kwargs)
        args = (kwargs.pop("input"),)
    if row.commutes and len(args) == 2 and not isinstance(args[0], Carrier):
        lazy, *others = reversed(args)
    elif args:
        lazy, *others = args
    else:
        return NotImplemented
    if not isinstance(lazy, Carrier) or not row.reads(args, kwargs):
        return NotImplemented
    node = lazy.node
    if node.state.grad and not torch.is_grad_enabled():
        _refuse_functions_of_autograd(lazy)
        if row.writes is not None:  # of which autograd does not know
            return NotImplemented
    if row.silent:
        return row.rule(node.state, *others, **kwargs)
    if node.is_dense:
        return NotImplemented
    for position, other in enumerate(others):
        if isinstance(other, Carrier):
            if not row.several or other.node.is_dense:
                return NotImplemented
            others[position] = other.node.state
    if kwargs and any(isinstance(value, Carrier) for value in kwargs.values()):
        return NotImplemented

    result = row.rule(node.state, *others, **kwargs)
    if result is NotImplemented:
        return result
    node.state.source.report.ran(row.name)
    if result is node.state:
        return lazy
    if isinstance(result, Tensor):
        return result
    recorded = tuple([arg.node if isinstance(arg, Carrier) else arg for arg in args])
    if isinstance(result, State):
        if row.writes is None:
            return _carry(row, lazy, result, function, recorded, kwargs)
        lazy._rewrote(Node(result, row.writes, recorded, kwargs, storage=node.storage))
        return lazy
    if isinstance(result, tuple) and result and isinstance(result[0], State):
        return tuple(
            _carry(row, lazy, state, function, recorded, kwargs, part=part)
            for part, state in enumerate(result)
        )
    return result


def _carry(
    row: Row, lazy: Carrier, state: State, function: Any, args: Any, kwargs: Any, **options: Any
) -> Carrier:
    """A carrier of what a row made of `lazy`."""
    source = lazy._node
    before, after = source.state.hidden, state.hidden
    storage = None
    if row.aliases and (after is before or _share_memory(before, after)):
        storage = source.storage
    if not torch.is_grad_enabled():
        state.grad = False
    made = Node(state, function, args, kwargs, storage=storage, **options)
    # In training the kind stays; finding out which takes time.
    kind: Any = type(lazy) if state.grad and source.state.grad else carrier_of
    carrier: Carrier = kind(made)
    return carrier


def _share_memory(a: Tensor, b: Tensor) -> bool:
    if torch.compiler.is_compiling():  # which cannot tell, and traces no late writes
        return True
    return torch._C._is_alias_of(a, b)  # type: ignore[attr-defined]


def _densely(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call on plain logits."""

    def plain(value: Any) -> Any:
        return _logits(value, function) if isinstance(value, Carrier) else value

    if function is torch.autograd.grad:
        _check_differentiable(args, kwargs)
    dense_args, dense_kwargs = tree_map(
        plain, (args, kwargs), is_leaf=lambda value: isinstance(value, Carrier)
    )
    if function is Carrier.dense:
        return dense_args[0]
    result = function(*dense_args, **dense_kwargs)
    written = args[0] if _writes(function, kwargs) else kwargs.get("out")
    if isinstance(written, Carrier):
        written._wrote()
    return result


def _logits(lazy: Carrier, function: Any) -> Tensor:
    """The plain logits, which `function` needs."""
    node = lazy.node
    if not node.is_dense:
        if node.state.grad and not torch.is_grad_enabled():
            _refuse_functions_of_autograd(lazy)
        node.state.source.report.needs_logits(function, training=node.state.requires_grad)
    return node.dense()


def _refuse_functions_of_autograd(lazy: Carrier) -> None:
    """Raise RuntimeError in the forward of a torch.autograd.Function that was given `lazy`.

    Autograd has seen no Tensor: what the function returns would have no gradient.
    """
    if torch.compiler.is_compiling() or not lazy._node.state.requires_grad:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _APPLY and any(arg is lazy for arg in frame.f_locals["args"]):
            raise RuntimeError(
                f"{frame.f_locals['cls'].__name__}.apply, a torch.autograd.Function, was given "
                "lazy logits, which are no torch.Tensor: their gradient would be lost; give it "
                "logits.dense()"
            )
        frame = frame.f_back


_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


def _names_in_place(home: Any) -> list[str]:
    operators = [n for n in dir(home) if n.startswith("__i") and n[:2] + n[3:] in dir(home)]
    return operators + [n for n in dir(home) if n.endswith("_") and not n.startswith("_")]


# Functions that write into their first argument.
_METHODS_IN_PLACE = {getattr(Tensor, name) for name in [*_names_in_place(Tensor), "__setitem__"]}
_FUNCTIONS_IN_PLACE = {getattr(torch, name) for name in _names_in_place(torch)}


def _writes(function: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call writes into its first argument."""
    if function in _METHODS_IN_PLACE or kwargs.get("inplace") is True:
        return True
    # A compiler cannot look for those of torch.
    return not torch.compiler.is_compiling() and function in _FUNCTIONS_IN_PLACE


def _check_differentiable(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    inputs = args[1] if len(args) > 1 else kwargs.get("inputs")
    for value in inputs if isinstance(inputs, (tuple, list)) else (inputs,):
        if isinstance(value, Carrier) and not value.node.is_dense:
            raise RuntimeError(
                "torch.autograd.grad with respect to lazy logits: what ran without them has no "
                "gradient for them; call .dense() on the logits before the loss"
            )


class LazyTensor(Carrier, Tensor):  # type: ignore[misc]
    """Lazy logits that are a Tensor."""

    @staticmethod
    def __new__(cls, node: Node) -> LazyTensor:
        state = node.state
        self: LazyTensor = Tensor._make_wrapper_subclass(
            cls, state.shape, dtype=state.dtype, device=state.hidden.device
        )
        self._hold(node)
        return self

    def __init__(self, node: Node) -> None:
        pass

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _OF_THE_WRAPPER:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        in_graphs = _with_a_graph_of_their_own(args, kwargs)
        if not in_graphs:
            return call(function, tuple(args), kwargs)
        row = TABLE.get(function)
        if row is None or not row.silent:
            # While autograd records what they are made from; below it nothing is recorded.
            for lazy in in_graphs:
                _logits(lazy, function)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _densely(function, tuple(args), kwargs or {})


# What makes the wrapper itself a leaf of a graph.
_OF_THE_WRAPPER = {
    Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
    Tensor.requires_grad_,
}


def _with_a_graph_of_their_own(args: Any, kwargs: dict[str, Any]) -> list[LazyTensor]:
    """The wrappers that somebody made part of a graph, as an autograd.Function does whose forward
    returned one. Autograd then records calls of the wrappers themselves."""
    return [
        value
        for arg in (*args, *kwargs.values())
        for value in (arg if isinstance(arg, (tuple, list)) else (arg,))
        if isinstance(value, LazyTensor) and _wrapper_requires_grad(value)
    ]


def _wrapper_requires_grad(wrapper: LazyTensor) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        return wrapper.requires_grad


class LazyObject(Carrier):
    """Lazy logits that are no Tensor."""

    def __init__(self, node: Node) -> None:
        self._hold(node)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return call(function, tuple(args), kwargs or {})


class LazyOutput(LazyObject):
    """A LazyObject that DDP and FSDP can look into; made where there is a process group.

    They walk through the dataclasses and pytrees that a module returns, to register hooks on
    tensors and to search their graphs. This is one: of its node and its `tensors`.
    """

    __dataclass_fields__: ClassVar = {
        field.name: field for field in fields(make_dataclass("_", ["_node", "tensors"]))
    }

    def __init__(self, _node: Node, tensors: list[Tensor] | None = None) -> None:
        super().__init__(_node)
        if tensors is not None:
            self.tensors = tensors

    @property
    def tensors(self) -> list[Tensor]:
        """The hidden states, and a number in whose graph the weights are, too."""
        inputs = self.node.inputs()
        used = [*inputs, *self.node.state.source.parameters()]
        return [*inputs, torch.stack([t[:0].sum(dtype=torch.float32) for t in used]).sum()]

    @tensors.setter
    def tensors(self, tensors: list[Tensor]) -> None:
        """What code that maps tensors does to these it does to the logits: a cast, a detach."""
        _check_stand_ins(self.node, tensors)
        if tensors[0].dtype != self.node.inputs()[0].dtype:
            self._hold(self.to(tensors[0].dtype).node)  # type: ignore[attr-defined]
        if self.node.state.requires_grad and not any(t.requires_grad for t in tensors):
            self._hold(self.detach().node)  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: Any) -> LazyOutput:
        return LazyOutput(self.node)


def _unflatten(tensors: Iterable[Any], node: Node) -> Any:
    """What `node` stands for, made from what code has mapped `Node.inputs` to."""
    mapped = list(tensors)
    if all(tensor is None for tensor in mapped):  # code that only looks
        return None
    _check_stand_ins(node, mapped)
    first, before = mapped[0], node.inputs()[0]
    result = _on_inputs(node, iter(mapped))
    if first.dtype != before.dtype:
        result = call(Tensor.to, (result, first.dtype), {})
    if before.requires_grad and not first.requires_grad:
        result = call(Tensor.detach, (result,), {})
    return result


def _check_stand_ins(node: Node, mapped: list[Any]) -> None:
    """Raise RuntimeError if code computed something of hidden states, as if they were the logits.

    Hooks, casts, detached and copied tensors do to the logits what they do to hidden states.
    """
    if node.is_dense or all(map(_is_same, mapped, node.inputs())):
        return
    raise RuntimeError(
        "a function was mapped over the tensors of a model's output, by torch.utils._pytree or "
        "over a dataclass, and computed something of the hidden states that stand for lazy logits "
        "where there is a process group; map it over logits.dense()"
    )


def _is_same(mapped: Any, before: Tensor) -> bool:
    if mapped is before:
        return True
    if not isinstance(mapped, Tensor) or mapped.shape != before.shape:
        return False
    if mapped.dtype != before.dtype or mapped.device != before.device:
        return True
    if mapped.data_ptr() == before.data_ptr():
        return True
    # As bytes, since NaN is not NaN.
    mapped, before = (t.detach().contiguous().view(torch.uint8) for t in (mapped, before))
    return torch.equal(mapped, before)


def _on_inputs(node: Node, tensors: Iterator[Any]) -> Any:
    """What `node` stands for, made from other inputs than `Node.inputs`."""
    if node.is_dense:
        return next(tensors)
    if node.function is None:
        return carrier_of(Node(node.state.replace(hidden=next(tensors))))
    args = [_on_inputs(arg, tensors) if isinstance(arg, Node) else arg for arg in node.args]
    result = call(node.function, tuple(args), node.kwargs)
    return result if node.part is None else result[node.part]


register_pytree_node(
    LazyOutput,
    lambda lazy: (lazy.node.inputs(), lazy.node),
    _unflatten,
)


def carrier_of(node: Node) -> Carrier:
    """The carrier for a node."""
    if torch.compiler.is_compiling():
        return LazyObject(node)
    if node.state.grad:
        shared = torch.distributed.is_available() and torch.distributed.is_initialized()
        return LazyOutput(node) if shared else LazyObject(node)
    return LazyTensor(node)


def _give_tensor_methods() -> None:
    """Give LazyObject every method and property of Tensor."""
    for name in dir(Tensor):
        own = name in LazyObject.__dict__ or name in Carrier.__dict__
        if own or name in _OF_OBJECTS or name.startswith("__torch_"):
            continue
        member = getattr(Tensor, name)
        if isinstance(member, (type(Tensor.requires_grad), property)):
            setattr(LazyObject, name, _property(member))
        elif callable(member) and not isinstance(member, type):
            setattr(LazyObject, name, _method(member))


_OF_OBJECTS = {
    "__class__", "__delattr__", "__dict__", "__dir__", "__doc__", "__getattribute__", "__hash__",
    "__init__", "__init_subclass__", "__module__", "__new__", "__setattr__", "__subclasshook__",
    "__weakref__", "__sizeof__", "__str__", "__getstate__", "__reduce__", "__annotations__",
}  # fmt: skip


def _method(function: Any) -> Any:
    def method(self: LazyObject, *args: Any, **kwargs: Any) -> Any:
        return call(function, (self, *args), kwargs)

    method.__name__ = method.__qualname__ = getattr(function, "__name__", "method")
    return method


def _property(member: Any) -> Any:
    read, write = member.__get__, member.__set__
    return property(
        lambda self: call(read, (self,), {}), lambda self, v: call(write, (self, v), {})
    )


_give_tensor_methods()
