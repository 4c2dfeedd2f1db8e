"""``model.summary()``: Keras's table, and where each layer is."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from smp_tf.keras.whole_weights import showing_all
from smp_tf.report.columns import aligned
from smp_tf.runtime import session
from smp_tf.runtime.placement import Placement

_UNITS = ("Byte", "KB", "MB", "GB", "TB")


class Summary(tf.keras.Model):
    """The part of ``DistributedModel`` that prints what it consists of."""

    def summary(
        self,
        line_length: int | None = None,
        positions: Any = None,
        print_fn: Callable[[str], Any] | None = None,
        expand_nested: bool = False,
        show_trainable: bool = False,
        layer_range: Sequence[str] | None = None,
    ) -> None:
        """Print the layers of the whole model with their partitions.

        The column Partition has the partitions that a layer's variables and operations
        are on, "-" before that is decided and for layers that no step has called, "all"
        for what every rank has. Totals are of the whole model, and then of each
        partition. Any rank may call it.

        Args:
            line_length: characters of the rules, if more than the table takes.
            positions: not used; columns are as wide as what is in them.
            print_fn: called with each line, on every rank; without it world rank 0
                prints.
            expand_nested: list the layers of nested models too.
            show_trainable: one more column.
            layer_range: names of the first and the last layer to list, or patterns.

        Raises:
            ValueError: the model is not built, or no layer matches ``layer_range``.
        """
        if not self.built:
            raise ValueError(
                "a model is built before its layers can be listed:"
                f" model={self.name!r}; call build, or run a step"
            )
        with showing_all():  # on every rank, as errors are the same on all
            lines = _lines(
                self, line_length or 0, expand_nested, show_trainable, layer_range
            )
        if print_fn is None:
            if session.is_initialized() and session.rank() != 0:
                return
            print_fn = print
        for line in lines:
            print_fn(line)


def _lines(
    model: Any,
    line_length: int,
    expand_nested: bool,
    show_trainable: bool,
    layer_range: Sequence[str] | None,
) -> list[str]:
    places = _Places(model)
    connections = _connections(model)
    header = ["Layer (type)", "Output Shape", "Param #", "Partition"]
    header += ["Connected to"] if connections else []
    header += ["Trainable"] if show_trainable else []
    rows = [header]
    for layer, path in _listed(model, expand_nested, layer_range):
        depth = len(path) - 2
        row = [
            f"{'|' * depth} {layer.name} ({type(layer).__name__})",
            _output_shape(layer),
            _params(layer),
            places.of_layer(layer, path),
        ]
        row += [", ".join(connections.get(id(layer), ()))] if connections else []
        row += ["Y" if layer.trainable else "N"] if show_trainable else []
        rows.append(row)
    left = [i for i, name in enumerate(header) if name not in ("Param #", "Partition")]
    table = aligned(rows, left)
    width = max(line_length, *(len(line) for line in table))
    return [
        f'Model: "{model.name}"',
        "_" * width,
        table[0],
        "=" * width,
        *table[1:],
        "=" * width,
        *_totals(model, places),
        "_" * width,
    ]


def _listed(
    model: Any, expand_nested: bool, layer_range: Sequence[str] | None
) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Layers to list, each with its path of names from the model on."""

    def below(
        layers: Sequence[Any], path: tuple[str, ...]
    ) -> Iterator[tuple[Any, tuple[str, ...]]]:
        for layer in layers:
            here = (*path, layer.name)
            yield layer, here
            if expand_nested:
                yield from below(getattr(layer, "layers", None) or (), here)

    yield from below(_in_range(model.layers, layer_range), (model.name,))


def _in_range(layers: Sequence[Any], layer_range: Sequence[str] | None) -> list[Any]:
    if layer_range is None:
        return list(layers)
    if len(layer_range) != 2 or not all(isinstance(name, str) for name in layer_range):
        raise ValueError(f"layer_range takes two names: layer_range={layer_range!r}")
    ends = [
        [i for i, layer in enumerate(layers) if re.match(pattern, layer.name)]
        for pattern in layer_range
    ]
    if not all(ends):
        raise ValueError(
            f"no layer matches: layer_range={layer_range!r};"
            f" layers={[layer.name for layer in layers]}"
        )
    starts, stops = ends
    if min(starts) > max(stops):  # named the other way round
        starts, stops = stops, starts
    return list(layers[min(starts) : max(stops) + 1])


def _connections(model: Any) -> Mapping[int, list[str]]:
    """Id of a layer -> the tensors it takes; empty where layers follow each other."""
    if not hasattr(model, "inputs") or not model.inputs:
        return {}
    layers = model.layers
    known = {id(layer) for layer in layers}
    found: dict[int, list[str]] = {}
    is_chain = True
    for i, layer in enumerate(layers):
        taken = [
            (source, f"{source.name}[{node_index}][{tensor_index}]")
            for node in layer.inbound_nodes
            for source, node_index, tensor_index, _ in node.iterate_inbound()
            if id(source) in known
        ]
        found[id(layer)] = [text for _, text in taken]
        before = [layers[i - 1]] if i else []
        is_chain = is_chain and [source for source, _ in taken] in ([], before)
    return {} if is_chain else found


def _output_shape(layer: Any) -> str:
    try:
        return str(layer.output_shape)
    except AttributeError:
        return "multiple"
    except RuntimeError:  # Keras does not know it
        return "?"


def _params(layer: Any) -> str:
    # A functional model is as good as built before it says so.
    if not layer.built and not getattr(layer, "inputs", None):
        return "0 (unused)"
    return str(layer.count_params())


class _Places:
    """Where the variables and the layers of a model are."""

    def __init__(self, model: Any) -> None:
        placement: Placement | None = model.placement
        self._is_decided = placement is not None
        self._owner = {} if placement is None else placement.owner
        self._layers = {} if placement is None else placement.partition_of_layer

    def of_variable(self, variable: tf.Variable) -> int | None:
        """The partition; None before it is decided and for what every rank has."""
        return self._owner.get(id(variable.handle))

    def of_layer(self, layer: Any, path: tuple[str, ...]) -> str:
        """The cell for a layer.

        Args:
            path: names of the models around the layer, and its own.
        """
        if not self._is_decided:
            return "-"
        owners = {self.of_variable(variable) for variable in layer.weights}
        partitions = {owner for owner in owners if owner is not None}
        partitions |= self._of_operations(path)
        if partitions:
            return _span(partitions)
        return "all" if owners else "-"

    def _of_operations(self, path: tuple[str, ...]) -> set[int]:
        """Of a layer that was called through the models around it, or by the model
        itself, which leaves them out."""
        exact = "/".join(path)
        found = {p for name, p in self._layers.items() if _is_in(name, exact)}
        return found or {
            partition
            for name, partition in self._layers.items()
            if path[-1] in name.split("/")[1:]
        }


def _is_in(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}/")


def _span(partitions: Collection[int]) -> str:
    first, last = min(partitions), max(partitions)
    if len(partitions) > 2 and len(partitions) == last - first + 1:
        return f"{first}..{last}"
    return ", ".join(map(str, sorted(partitions)))


def _totals(model: Any, places: _Places) -> Iterator[str]:
    every = model.global_variables
    trained = {id(variable) for variable in model.global_trainable_variables}
    for name, chosen in (
        ("Total", every),
        ("Trainable", [v for v in every if id(v) in trained]),
        ("Non-trainable", [v for v in every if id(v) not in trained]),
    ):
        yield f"{name} params: {_counted(chosen)}"
    if model.placement is None:
        return
    for partition in range(session.pp_size()):
        held = [v for v in every if places.of_variable(v) in (partition, None)]
        yield f"Partition {partition} params: {_counted(held)}"


def _counted(variables: Sequence[tf.Variable]) -> str:
    """Scalars and bytes, as Keras writes them; an unknown dimension counts as 0."""
    counts = [v.shape.num_elements() or 0 for v in variables]
    size: float = sum(
        n * v.dtype.size for n, v in zip(counts, variables, strict=True)
    )
    unit = 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{sum(counts)} ({size:.2f} {_UNITS[unit]})"
