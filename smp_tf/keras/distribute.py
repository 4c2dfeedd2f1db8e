"""``smp.distribute``: a Keras model that exists becomes a ``DistributedModel``.

    class of the model     Sequential(Functional(tf.keras.Model))
    becomes                Sequential(Functional(DistributedModel(tf.keras.Model)))

It stays the same object, with the same layers, variables, checkpoint paths and config,
and it behaves as if its class had been written on top of ``smp.DistributedModel``.
"""

import functools
import logging
import types
from typing import Any

import tensorflow as tf

from smp_tf.frontend import variables
from smp_tf.keras import hugging_face
from smp_tf.keras.model import DistributedModel

logger = logging.getLogger("smp_tf")


def distribute(model: Any) -> Any:
    """Make a Keras model a ``DistributedModel``, with the weights that it has.

        model = smp.distribute(tf.keras.applications.ResNet50())
        model.compile(..)
        model.fit(..)

    Takes functional, Sequential and subclassed models, those of
    ``tf.keras.applications``, and TensorFlow models of Hugging Face; built or not,
    compiled or not. Call it on every rank, after loading weights.

    The first step, or ``fit``, partitions the model. Then each weight stays on the rank
    that owns it, with its value there, and the other ranks free theirs; all ranks
    should have loaded the same ones. Until then every rank holds the whole model:
    where that is too much, build it inside ``smp.delay_param_initialization``. With
    ``enabled=False`` around this call every rank keeps all weights.

    Copies (``clone_model``, ``from_config``, ``copy.deepcopy``, pickles) are plain
    models again, and can be made while all weights are here.

    Args:
        model: is changed: from now on it is called inside ``smp.step``, and so are
            models that it is a part of.

    Returns:
        The same object. A ``DistributedModel`` comes back as it is.

    Raises:
        TypeError: not a model of Keras 2.
        ValueError: the model was built for a ``tf.distribute`` strategy.
    """
    if isinstance(model, DistributedModel):
        return model
    _require_keras_2(model)
    if model.distribute_strategy is not tf.distribute.get_strategy():
        raise ValueError(
            "smp.distribute takes a model without a tf.distribute strategy:"
            f" model={model.name!r}"
            f" strategy={type(model.distribute_strategy).__name__}; build the model"
            " outside of every strategy.scope()"
        )
    # Set past Keras, which would track it as part of the model.
    plain: Any = type(model)
    object.__setattr__(model, "__class__", _distributed(plain))
    with variables.deferring() as is_deferring:
        object.__setattr__(model, "_smp_is_deferring", is_deferring)
    if is_deferring:
        variables.make_movable(_existing_variables(model))
    # Traced for the whole model.
    model.train_function = model.test_function = model.predict_function = None
    _tell_of_state(model)
    return model


@functools.cache
def _distributed(plain: type) -> type:
    """The class of distributed models that were of class ``plain``.

    It has the name of ``plain``, for what is written of the model (a config, a
    checkpoint of Hugging Face) is of the plain model; and its instances are only made
    by ``distribute``: called as a class it gives a plain model.
    """

    def new(_: type, *args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    namespace = {
        "__new__": new,
        "_smp_plain": plain,
        "__doc__": plain.__doc__,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
    }
    build = getattr(plain, "build")
    if build is not tf.keras.Model.build:
        # DistributedModel wraps what it finds in a class, so that variables wait.
        namespace["build"] = build
    first = [hugging_face.HuggingFace] if hugging_face.trains_as_there(plain) else []
    return types.new_class(
        plain.__name__,
        (*first, plain, DistributedModel),
        exec_body=lambda found: found.update(namespace),
    )


def _require_keras_2(model: Any) -> None:
    if isinstance(model, tf.keras.Model):
        return
    modules = {base.__module__.partition(".")[0] for base in type(model).__mro__}
    if "keras" in modules:
        raise TypeError(
            "smp.distribute takes a model of Keras 2, this one is of Keras 3:"
            f" model={type(model).__module__}.{type(model).__name__}; import tf_keras"
            " instead of keras, or take tf.keras after `import smp_tf as smp`"
        )
    if "torch" in modules:
        remedy = "Hugging Face models are distributed in their TF* classes"
    elif isinstance(model, tf.keras.layers.Layer):
        remedy = "put the layer into a model: tf.keras.Sequential([layer])"
    elif isinstance(model, type):
        remedy = "make an instance, or write the class on smp.DistributedModel"
    else:
        remedy = "write the forward pass as one, on smp.DistributedModel"
    raise TypeError(f"smp.distribute takes a tf.keras.Model: model={model!r}; {remedy}")


def _existing_variables(model: Any) -> list[tf.Variable]:
    try:
        return list(model.global_variables)
    except ValueError:  # Keras lists none of a model that is not built
        return list(tf.Module.variables.fget(model))


def _tell_of_state(model: Any) -> None:
    """An optimizer that has trained the model, or was loaded with it."""
    optimizer = getattr(model, "optimizer", None)
    held = getattr(optimizer, "variables", ())
    every = held() if callable(held) else held
    # Not the scalars: those are its step and its learning rate.
    slots = [variable for variable in every if variable.shape.rank]
    num_bytes = sum(v.dtype.size * (v.shape.num_elements() or 0) for v in slots)
    if num_bytes:
        logger.warning(
            "model=%s: its optimizer already has state for the whole model, which every"
            " rank keeps: optimizer=%s bytes=%d. Compile again after smp.distribute to"
            " start with none; each rank then allocates that of its own partition.",
            model.name,
            getattr(optimizer, "name", ""),
            num_bytes,
        )
