"""SavedModels of distributed models: what Keras writes of a plain model.

    the model       may be called, as what it is, and lists all its variables
    Keras           traces it and its layers, writes the graphs, and a checkpoint with a
                    label for each value
    afterwards      a checkpoint with the values takes its place, one value at a time,
                    each from the rank that has it

Nothing that is written refers to this library.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from smp_tf.checkpoint.bundle import bundle_writer, text_of
from smp_tf.errors import SmpError
from smp_tf.frontend.hooks import exporting, initial_values
from smp_tf.frontend.stand_ins import labelled
from smp_tf.keras import one_by_one
from smp_tf.keras.replaced_folder import replaced_folder

_files = tf.io.gfile

_GRAPHS = "saved_model.pb"
_ENTRIES = (
    *("assets", "assets.extra", "variables", "debug", "fingerprint.pb"),
    *("keras_metadata.pb", "saved_model.cpb", "saved_model.pbtxt", _GRAPHS),
)


def write(path: str, model: Any, keras: Callable[[str], None]) -> None:
    """Write a SavedModel to ``path``, or leave there what is there.

    Args:
        model: calls of it are traced.
        keras: writes a SavedModel to a folder.

    Raises:
        SmpError: it cannot be written.
    """
    try:
        with replaced_folder(path, _ENTRIES, _GRAPHS) as folder:
            with as_a_plain_model(model), labelled() as labels:
                keras(folder)
            if labels:
                _fill(_files.join(folder, "variables"), labels)
                exporting.write_fingerprint(folder)
    except tf.errors.OpError as error:
        raise SmpError(
            f"cannot write the SavedModel, and nothing at its place has changed:"
            f" path={path!r}: {text_of(error)}; look at the free space and the"
            " permissions there, or choose another path"
        ) from error


@contextlib.contextmanager
def as_a_plain_model(model: Any) -> Iterator[None]:
    """Inside, a model may be traced: its class is that before ``smp.distribute``.

    Other ranks do not trace it now: seeds that are drawn inside do not count.
    """
    state = initial_values.RandomState()
    with contextlib.ExitStack() as stack:
        stack.callback(state.restore)
        stack.enter_context(initial_values.kept_layer_seeds(model))
        for layer in exporting.users_layers(model):
            stack.enter_context(exporting.without_functions_of_ranks(layer))
            stack.enter_context(exporting.converted_call(layer))
            plain = getattr(type(layer), "_smp_plain", None)
            if plain is not None:
                stack.callback(object.__setattr__, layer, "__class__", type(layer))
                object.__setattr__(layer, "__class__", plain)
        stack.enter_context(one_by_one.opened())
        yield


def _fill(folder: str, labels: Mapping[str, Any]) -> None:
    """Write the values in the place of their labels.

    Args:
        folder: of the checkpoint.
        labels: label -> variable.
    """
    written = _files.join(folder, "variables")
    filled = f"{folder}.filled"
    reader = tf.train.load_checkpoint(written)
    with bundle_writer(_files.join(filled, "variables")) as writer:
        for name, dtype in sorted(reader.get_variable_to_dtype_map().items()):
            value = reader.get_tensor(name)
            variable = labels.get(_text(value)) if dtype == tf.string else None
            writer.add(
                name,
                tf.constant(value, dtype)
                if variable is None
                else tf.constant(variable.numpy(), variable.dtype),
            )
    del reader
    _files.rmtree(folder)
    _files.rename(filled, folder)


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else ""


# --- what the model is called with ----------------------------------------------------


def arguments_of(model: Any, input_signature: Any) -> Sequence[Any]:
    """The checked signature.

    Raises:
        TypeError: it is not as for ``tf.function``.
    """
    if not isinstance(input_signature, list | tuple) or not input_signature:
        leaves = [None]
    else:
        leaves = tf.nest.flatten(list(input_signature))
    if not leaves or not all(isinstance(each, tf.TypeSpec) for each in leaves):
        raise TypeError(
            "input_signature is a list with a structure of tf.TensorSpecs for each"
            f" positional argument of the model: model={model.name!r}"
            f" input_signature={input_signature!r}; write"
            " [tf.TensorSpec([None, 28, 28], tf.float32)]"
        )
    return list(input_signature)


@contextlib.contextmanager
def called_with(model: Any, arguments: Sequence[Any] | None) -> Iterator[None]:
    """Inside, it is traced for these arguments; None for those it was called with."""
    if arguments is None:
        yield
        return
    with exporting.called_with(model, arguments):
        yield


def build(model: Any, arguments: Sequence[Any]) -> None:
    """Create the variables of a model that was never called, as a call of it does."""
    graph = tf.__internal__.FuncGraph("build_graph")  # as Keras calls its own
    with graph.as_default(), one_by_one.opened():
        tensors = tf.nest.map_structure(
            lambda spec: tf.compat.v1.placeholder(spec.dtype, spec.shape),
            list(arguments),
        )
        model(*tensors)


def require_known_arguments(model: Any) -> None:
    """
    Raises:
        SmpError: the model was never called, so that there is nothing to trace.
    """
    if model.save_spec() is None:
        raise SmpError(
            "a SavedModel has the graph of the model, which was never called:"
            f" model={model.name!r}; run a step first, or say what it is called with:"
            " save_model(path, input_signature=[tf.TensorSpec([None, 28, 28],"
            " tf.float32)])"
        )


def require_plain(model: Any, signatures: Any) -> None:
    """
    Raises:
        SmpError: a signature was traced with a step inside.
    """
    if any(exporting.needs_ranks(each) for each in tf.nest.flatten(signatures)):
        raise SmpError(
            "a signature calls the model itself, for it runs without other ranks; this"
            f" one calls a smp.step: model={model.name!r}; write"
            " tf.function(model, input_signature=[..])"
        )
