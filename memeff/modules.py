"""``LinearCrossEntropyLoss``: the loss together with its classifier."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from memeff._checks import check_flag, check_floats, check_int
from memeff._dtensor import is_dtensor
from memeff._linear_map import LinearMap, read
from memeff._logit_scale import take_scale
from memeff._options import LossOptions, check_torch_options, parse_options, show_options
from memeff.functional import linear_cross_entropy
from memeff.statistics import TokenStatistics

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LinearCrossEntropyLoss"]

_PARAMETERS = inspect.signature(linear_cross_entropy).parameters
# The options of linear_cross_entropy that a module keeps, as attributes, and their defaults.
OPTIONS = {name: _PARAMETERS[name].default for name in LossOptions.__annotations__}


class LinearCrossEntropyLoss(nn.Module):
    """Cross entropy of a linear classifier's logits, which are not stored.

    Constructed like `torch.nn.LinearCrossEntropyLoss`, it owns its classifier,
    ``self.linear`` (and has the same state dict). Given ``linear`` or ``linear_weight``, it shares
    the classifier of a model instead: its parameters stay those of the model, and appear neither
    among the parameters nor in the state dict of this module.

    Args:
        in_features: D. With a shared classifier it may be left out, and must otherwise agree.
        num_classes: V, likewise.
        out_features: (d1, ..., dK) for K-dimensional losses; the classifier then has
            V * d1 * ... * dK rows.
        bias: whether an owned classifier has a bias.
        device, dtype: of an owned classifier.
        linear: the module to share: an nn.Linear; the nn.Embedding that the classifier is tied to;
            or what PEFT's LoRA makes of an nn.Linear, whose adapters become further features
            (``[W, B]`` over ``[x; s A x]``) and get their gradients. Its weight may be replaced
            later on, as ``to_empty`` and FSDP do, and adapters may come and go. A module that
            computes anything else (another ``forward``, hooks) is refused, here and at each call.
        linear_weight: the tensor [V, D] to share, where there is no such module.
        linear_bias: the bias [V] that belongs to ``linear_weight``.
        weight: class weights [V], kept as a buffer.
        **options: those of `memeff.linear_cross_entropy`, from ``reduction`` to ``backend``. They
            become attributes of the module.

    Under FSDP, wrap this module (or what contains it) so that its forward is where the weight is
    gathered.

    Raises:
        TypeError, ValueError: ``linear`` computes more than its weight and bias say.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int | None = None,
        num_classes: int | None = None,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        linear: nn.Module | None = None,
        linear_weight: Tensor | None = None,
        linear_bias: Tensor | None = None,
        weight: Tensor | None = None,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__()
        if not isinstance(out_features, (tuple, list)):
            raise TypeError(
                f"out_features must be a tuple of ints, got {type(out_features).__name__} "
                f"{out_features!r}"
            )
        check_flag("bias", bias)
        positions = math.prod(out_features)
        shared = {"linear": linear, "linear_weight": linear_weight}
        given = [name for name, value in shared.items() if value is not None]
        if len(given) > 1:
            raise ValueError("linear and linear_weight are both given, expected only one of them")
        if linear_bias is not None and linear_weight is None:
            raise ValueError("linear_bias is given without linear_weight, expected both or neither")
        # Not registered (what is shared has an owner that registers it): see _share.
        self.linear: nn.Module | None
        self._shared: tuple[Tensor, Tensor | None] | None = None
        if not given:
            if in_features is None or num_classes is None:
                raise TypeError(
                    f"in_features is {in_features} and num_classes is {num_classes}, expected two "
                    "ints, or a linear to share"
                )
            check_int("in_features", in_features, "a number of features >= 0", 0)
            check_int("num_classes", num_classes, "a number of classes >= 0", 0)
            self.linear = nn.Linear(
                in_features, num_classes * positions, bias=bias, device=device, dtype=dtype
            )
        else:
            if bias or device is not None or dtype is not None:
                raise ValueError(
                    f"bias is {bias}, device {device} and dtype {dtype}, expected none of them "
                    f"together with {given[0]}, which has its own"
                )
            self._share(linear, linear_weight, linear_bias)
        if self.linear_weight.dim() != 2:
            raise RuntimeError(
                f"{given[0]} has a weight of shape {tuple(self.linear_weight.shape)}, expected "
                "[V, D]. Where FSDP or ZeRO has sharded it, construct this module before that, or "
                "inside of FSDP.summon_full_params or deepspeed.zero.GatheredParameters"
            )
        rows, features = self.linear_weight.shape
        if in_features not in (None, features):
            raise ValueError(
                f"in_features is {in_features}, expected that of the classifier, {features}"
            )
        classes, rest = divmod(rows, positions) if positions else (num_classes or 0, rows)
        if rest or num_classes not in (None, classes):
            raise ValueError(
                f"num_classes is {num_classes} with out_features {out_features}, expected their "
                f"product to be the {rows} rows of the classifier"
            )
        if weight is not None:
            check_floats("weight", weight)
        if weight is not None and weight.shape != (classes,):
            raise RuntimeError(
                f"weight has shape {tuple(weight.shape)}, expected ({classes},), a value per class"
            )
        self.num_classes = classes
        self.out_features = tuple(out_features)
        self.register_buffer("weight", weight)
        for name in options:
            if name not in OPTIONS:
                raise TypeError(
                    f"LinearCrossEntropyLoss got an unexpected keyword argument {name!r}"
                )
        for name, default in OPTIONS.items():
            setattr(self, name, options.get(name, default))
        checked, _ = take_scale(self._options())
        torch_options = checked.pop("options")
        if torch_options is not None:
            check_torch_options(torch_options)
        parse_options(**checked)

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in OPTIONS}

    def _share(
        self, linear: nn.Module | None, linear_weight: Tensor | None, linear_bias: Tensor | None
    ) -> None:
        """Keeps what is shared in __dict__, where nn.Module does not look for parameters."""
        if isinstance(linear, Tensor):
            raise TypeError(
                "linear must be a module, an nn.Linear for example, got "
                f"{type(linear).__name__}; a tensor [V, D] goes by linear_weight"
            )
        if linear_weight is not None:
            tensors = {"linear_weight": (linear_weight, 2), "linear_bias": (linear_bias, 1)}
            for name, (tensor, dimensions) in tensors.items():
                if tensor is None:
                    continue
                if not is_dtensor(tensor):  # a vocabulary that ranks share
                    check_floats(name, tensor)
                if tensor.dim() != dimensions or len(tensor) != len(linear_weight):
                    raise RuntimeError(
                        f"{name} has shape {tuple(tensor.shape)}, expected linear_weight [V, D] "
                        "and linear_bias [V]"
                    )
            self.__dict__["_shared"] = linear_weight, linear_bias
        self.__dict__["linear"] = linear

    @property
    def linear_weight(self) -> Tensor:
        """The classifier's weight, [V * d1 * ... * dK, D]; that of the base, under LoRA."""
        return self._linear_map().weight

    @property
    def linear_bias(self) -> Tensor | None:
        """The classifier's bias, [V * d1 * ... * dK], or None."""
        return self._linear_map().bias

    def _linear_map(self) -> LinearMap:
        if self.linear is None:
            assert self._shared is not None
            return LinearMap(*self._shared)
        return read(self.linear, "linear")

    def reset_parameters(self) -> None:
        """Initialise the classifier's module anew (also one that is shared)."""
        if self.linear is None:
            raise RuntimeError(
                "linear_weight is shared: expected its owner to initialise it, as this module does "
                "not know how"
            )
        self.linear.reset_parameters()  # type: ignore[operator]

    @overload
    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        token_weight: Tensor | None = ...,
        num_items: int | float | Tensor | None = ...,
        return_statistics: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        token_weight: Tensor | None = ...,
        num_items: int | float | Tensor | None = ...,
        return_statistics: Literal[True],
    ) -> tuple[Tensor, TokenStatistics]: ...

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        token_weight: Tensor | None = None,
        num_items: int | float | Tensor | None = None,
        return_statistics: bool = False,
    ) -> Tensor | tuple[Tensor, TokenStatistics]:
        """Loss of input [..., D] against target; arguments and result as in the function."""
        input, linear_weight, linear_bias = self._linear_map().extend(input)
        if self.out_features:
            classes = (self.num_classes, *self.out_features)
            linear_weight = linear_weight.reshape(*classes, linear_weight.shape[-1])
            linear_bias = None if linear_bias is None else linear_bias.reshape(classes)
        result: Tensor | tuple[Tensor, TokenStatistics] = linear_cross_entropy(  # type: ignore[call-overload]
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=self.weight,
            token_weight=token_weight,
            num_items=num_items,
            return_statistics=return_statistics,
            **self._options(),
        )
        return result

    def extra_repr(self) -> str:
        """The classifier's shape, the reduction, and every setting that is not the default."""
        shown: dict[str, Any] = {
            "in_features": self.linear_weight.shape[1],
            "num_classes": self.num_classes,
        }
        if self.out_features:
            shown["out_features"] = self.out_features
        shown["bias"] = self.linear_bias is not None
        if self.weight is not None:
            shown["weight"] = tuple(self.weight.shape)
        for name, value in self._options().items():
            if name == "reduction" or value != OPTIONS[name]:
                shown[name] = value
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


show_options(LinearCrossEntropyLoss.__init__, OPTIONS, of=linear_cross_entropy)
