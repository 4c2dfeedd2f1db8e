"""Arguments of a step: which tensors they hold and how each becomes microbatches."""

import copy
import dataclasses
import enum
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from smp_tf.errors import MicrobatchError
from smp_tf.frontend.returns import with_items


class Feed(enum.Enum):
    """How a tensor argument reaches the microbatches."""

    SPLIT = "split"  # along an axis
    WHOLE = "whole"  # every microbatch gets all of it (non_split_inputs)
    SLICED = "sliced"  # an object with smp_slice made one tensor per microbatch


@dataclasses.dataclass(frozen=True)
class TensorArgument:
    """One tensor position among the arguments.

    Attributes:
        name: of the parameter, with the path inside it, for errors.
        feed: how it becomes microbatches.
        axis: of the split.
        microbatch: spec of one microbatch, what the step is traced with.
    """

    name: str
    feed: Feed
    axis: int
    microbatch: tf.TensorSpec


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arguments of one call.

    Attributes:
        tensors: one TensorArgument per tensor position, in order.
        values: the tensors themselves: one per position, num_microbatches per SLICED
        one.
        value_specs: aligned with ``values``; what a trace for this key accepts.
        key: equal for calls that can share a trace.
        rebuild: (one tensor per position) -> (args, kwargs) for the user's function.
    """

    tensors: tuple[TensorArgument, ...]
    values: tuple[tf.Tensor, ...]
    value_specs: tuple[tf.TensorSpec, ...]
    key: Hashable
    rebuild: Callable[[Sequence[Any]], tuple[tuple[Any, ...], dict[str, Any]]]

    def num_examples(self, num_microbatches: int) -> int | None:
        """Length of the axis that the first split tensor is split along; None where the
        trace does not know it, or nothing is split."""
        for tensor in self.tensors:
            if tensor.feed is Feed.SPLIT:
                shape = tensor.microbatch.shape
                size = None if shape.rank is None else shape[tensor.axis]
                return None if size is None else size * num_microbatches
        return None


@dataclasses.dataclass(frozen=True)
class SplitRules:
    """What the decorator of a step says about its arguments."""

    num_microbatches: int
    non_split_inputs: frozenset[str] = frozenset()
    input_split_axes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def feed_of(self, parameter: str) -> tuple[Feed, int]:
        if parameter in self.non_split_inputs:
            return Feed.WHOLE, 0
        return Feed.SPLIT, self.input_split_axes.get(parameter, 0)


def read_arguments(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    names: Sequence[str],
    rules: SplitRules,
    signature: Sequence[Any] | None = None,
) -> Arguments:
    """Find the tensors in a call's arguments.

    Args:
        names: parameter name of each positional argument.
        signature: TensorSpecs for the positional arguments (``input_signature``).

    Raises:
        MicrobatchError: a batch does not divide into microbatches, or is empty.
        TypeError: an argument does not match the signature.
    """
    reader = _Reader(rules)
    rebuild_args = [
        reader.read(
            value, names[i], names[i], signature[i] if signature is not None else None
        )
        for i, value in enumerate(args)
    ]
    rebuild_kwargs = {
        name: reader.read(value, name, name, None)
        for name, value in sorted(kwargs.items())
    }

    def rebuild(tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (
            tuple(build(tensors) for build in rebuild_args),
            {name: build(tensors) for name, build in rebuild_kwargs.items()},
        )

    return Arguments(
        tuple(reader.tensors),
        tuple(reader.values),
        tuple(reader.value_specs),
        (tuple(kwargs), *reader.key),
        rebuild,
    )


_Build = Callable[[Sequence[Any]], Any]


class _Reader:
    """Walks the arguments of one call, collecting tensors and the cache key."""

    def __init__(self, rules: SplitRules) -> None:
        self.rules = rules
        self.tensors: list[TensorArgument] = []
        self.values: list[tf.Tensor] = []
        self.value_specs: list[tf.TensorSpec] = []
        self.key: list[Hashable] = []

    def read(self, value: Any, parameter: str, path: str, spec: Any) -> _Build:
        """Take in ``value``; returns how to build it again from microbatch tensors."""
        if hasattr(value, "smp_slice"):
            return self._read_sliced(value, parameter, path)
        if _is_tensor(value) or (isinstance(spec, tf.TensorSpec) and value is not None):
            return self._read_tensor(value, parameter, path, spec)
        if isinstance(value, Mapping):
            self.key.append((type(value), tuple(value)))
            builds = {
                k: self.read(v, parameter, f"{path}[{k!r}]", _part(spec, k, path))
                for k, v in value.items()
            }
            return lambda tensors: with_items(
                value, {k: build(tensors) for k, build in builds.items()}
            )
        if isinstance(value, (list, tuple, set, frozenset)):
            return self._read_sequence(value, parameter, path, spec)
        if isinstance(value, tf.__internal__.CompositeTensor) and not isinstance(
            value, tf.Variable
        ):
            raise MicrobatchError(
                f"a step splits dense tensors only: argument={path!r}"
                f" type={type(value).__name__}; pass its components as tensors, or give"
                " it a method smp_slice(num_mb, mb, axis)"
            )
        self.key.append(_constant_key(value))
        return lambda tensors: value

    def _read_sequence(
        self, value: Any, parameter: str, path: str, spec: Any
    ) -> _Build:
        kind = type(value)
        self.key.append((kind, len(value)))
        builds = [
            self.read(v, parameter, f"{path}[{i}]", _part(spec, i, path))
            for i, v in enumerate(value)
        ]
        if hasattr(value, "_fields"):
            return lambda tensors: kind(*(build(tensors) for build in builds))
        return lambda tensors: kind(build(tensors) for build in builds)

    def _read_tensor(self, value: Any, parameter: str, path: str, spec: Any) -> _Build:
        tensor = _to_tensor(value, path, spec)
        shape = tensor.shape
        if isinstance(spec, tf.TensorSpec):
            if not spec.is_compatible_with(tensor):
                raise TypeError(
                    f"an argument must match input_signature: argument={path!r}"
                    f" shape={shape} dtype={tensor.dtype.name} signature={spec}"
                )
            shape = spec.shape
            _check_divisible(path, tensor.shape, self.rules, parameter)
        feed, axis = self.rules.feed_of(parameter)
        whole = tf.TensorSpec(shape, tensor.dtype)
        if feed is Feed.SPLIT:
            _check_divisible(path, shape, self.rules, parameter)
            shape = _divide(shape, axis, self.rules.num_microbatches)
        one = tf.TensorSpec(shape, tensor.dtype)
        return self._add(path, feed, axis, one, [tensor], whole)

    def _add(
        self,
        path: str,
        feed: Feed,
        axis: int,
        spec: tf.TensorSpec,
        values: list[tf.Tensor],
        value_spec: tf.TensorSpec,
    ) -> _Build:
        position = len(self.tensors)
        self.tensors.append(TensorArgument(path, feed, axis, spec))
        self.values.extend(values)
        self.value_specs.extend([value_spec] * len(values))
        self.key.append((feed, axis, spec.dtype, _shape_key(spec.shape)))
        return lambda tensors: tensors[position]

    def _read_sliced(self, value: Any, parameter: str, path: str) -> _Build:
        """An object that splits itself: a slice per microbatch, all of one form."""
        feed, axis = self.rules.feed_of(parameter)
        count = self.rules.num_microbatches
        if feed is Feed.WHOLE:
            slices = [value] * count
        else:
            slices = [value.smp_slice(count, mb, axis) for mb in range(count)]
        parts = [_object_parts(piece) for piece in slices]
        forms = [_Reader(SplitRules(1)) for _ in parts]
        builds = [
            form.read(part, parameter, path, None) for form, part in zip(forms, parts)
        ]
        if any(form.key != forms[0].key for form in forms):
            raise MicrobatchError(
                "smp_slice must return slices of the same structure, shapes and"
                f" dtypes: argument={path!r} type={type(value).__name__}"
            )
        self.key.append((type(value), type(slices[0]), *forms[0].key))
        positions = [
            self._add(
                tensor.name,
                Feed.SLICED,
                axis,
                tensor.microbatch,
                [form.values[i] for form in forms],
                tensor.microbatch,
            )
            for i, tensor in enumerate(forms[0].tensors)
        ]
        build, template = builds[0], slices[0]

        def rebuild(tensors: Sequence[Any]) -> Any:
            part = build([position(tensors) for position in positions])
            return _with_parts(template, part)

        return rebuild


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (tf.Tensor, np.ndarray, np.generic))


def _to_tensor(value: Any, path: str, spec: Any) -> tf.Tensor:
    if isinstance(value, tf.Tensor) or not isinstance(spec, tf.TensorSpec):
        return tf.convert_to_tensor(value)
    try:
        return tf.convert_to_tensor(value, spec.dtype)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"an argument must match input_signature: argument={path!r}"
            f" value={value!r} signature={spec}: {error}"
        ) from None


def _part(spec: Any, key: Any, path: str) -> Any:
    """The signature of one element."""
    if spec is None:
        return None
    try:
        return spec[key]
    except (IndexError, KeyError, TypeError):
        raise TypeError(
            f"an argument must match input_signature: argument={path!r} has an element"
            f" {key!r}, signature={spec} has none"
        ) from None


class _Same:
    """A key that only the same object equals; it keeps the object alive, for another
    one in its place of memory would be taken for it."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def _object_parts(piece: Any) -> Any:
    """The attributes of an object, or a plain structure as it is."""
    if _is_tensor(piece) or isinstance(piece, (dict, list, tuple)):
        return piece
    return dict(vars(piece))


def _with_parts(template: Any, parts: Any) -> Any:
    if _is_tensor(template) or isinstance(template, (dict, list, tuple)):
        return parts
    rebuilt = copy.copy(template)
    vars(rebuilt).update(parts)
    return rebuilt


def _constant_key(value: Any) -> Hashable:
    """Python values are constants of the trace: equal ones share it."""
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return (type(value), value)


def _shape_key(shape: tf.TensorShape) -> Hashable:
    return None if shape.rank is None else tuple(shape.as_list())


def _divide(shape: tf.TensorShape, axis: int, parts: int) -> tf.TensorShape:
    if shape.rank is None:
        return shape
    dims = shape.as_list()
    if dims[axis] is not None:
        dims[axis] //= parts
    return tf.TensorShape(dims)


def _check_divisible(
    path: str, shape: tf.TensorShape, rules: SplitRules, parameter: str
) -> None:
    feed, axis = rules.feed_of(parameter)
    if feed is not Feed.SPLIT or shape.rank is None:
        return
    remedy = (
        f"; name {parameter!r} in non_split_inputs if every microbatch needs all of it"
    )
    if not -shape.rank <= axis < shape.rank:
        raise MicrobatchError(
            f"a tensor argument is split along an axis that it has: argument={path!r}"
            f" shape={shape} axis={axis}{remedy}"
        )
    size, count = shape.as_list()[axis], rules.num_microbatches
    if size is not None and (size % count or size == 0):
        raise MicrobatchError(
            "a batch must divide into microbatches of equal, non-zero size:"
            f" argument={path!r} shape={shape} axis={axis} microbatches={count}; change"
            f" the batch size, drop the remainder (drop_remainder=True){remedy}"
        )
