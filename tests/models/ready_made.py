"""Models that are made on plain Keras, and then distributed: one kind each."""

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

import smp_tf as smp
from tests.models.script import Script, ScriptCase, tokens, trainable, vectors

layers = tf.keras.layers
Features = Callable[[np.random.RandomState, int], Any]


def _case(name: str, make: Callable[[], Any], features: Features) -> ScriptCase:
    """The plain model for the truth; the same, distributed, for the step."""

    def build(base: type) -> Script:
        is_plain = base is tf.keras.Model
        model = make() if is_plain else smp.distribute(make())

        def step(x: Any, y: Any) -> Any:
            with tf.GradientTape() as tape:
                outputs = model(x, training=True)
                floats = [
                    tf.cast(each, tf.float32)
                    for each in tf.nest.flatten(outputs)
                    if each.dtype.is_floating
                ]
                target = tf.reduce_mean(y)
                errors = [tf.reduce_mean((each - target) ** 2) for each in floats]
                loss = tf.add_n(errors)
            gradients = tape.gradient(loss, model.trainable_variables)
            return {"gradients": gradients, "loss": loss, "outputs": floats}

        return Script(step, [model], lambda: {"gradients": trainable(model)})

    return ScriptCase(name, build, features, lambda r, n: r.rand(n).astype("f"))


def _images(size: int = 32) -> Features:
    return lambda r, n: r.rand(n, size, size, 3).astype("f")


def with_loaded_weights(model: Any) -> Any:
    """Weights that no initializer draws."""
    random = np.random.RandomState(9)
    model.set_weights(
        [np.abs(random.normal(0, 0.3, w.shape)) for w in model.get_weights()]
    )
    return model


def functional() -> Any:
    """Two inputs, two outputs, a layer used twice, a model inside, plain operations."""
    left, right = tf.keras.Input([6], name="left"), tf.keras.Input([6], name="right")
    shared = layers.Dense(8, activation="relu")
    inner = tf.keras.Sequential(
        [layers.Dense(12, activation="tanh"), layers.Dense(8)], name="inner"
    )
    mixed = inner(layers.concatenate([shared(left), shared(right)]))
    mixed = tf.nn.relu(mixed + 0.1) * shared(right)
    outputs = {"label": layers.Dense(3)(mixed), "value": layers.Dense(1)(mixed)}
    return with_loaded_weights(tf.keras.Model([left, right], outputs))


class FunctionalSubclass(tf.keras.Model):
    """A class of its own that hands its graph to Keras; its ``call`` is Keras's."""

    def __init__(self, units: int = 8) -> None:
        inputs = tf.keras.Input([6])
        hidden = layers.Dense(units, activation="relu", name="hidden")(inputs)
        super().__init__(inputs, layers.Dense(3, name="head")(hidden))
        self.units = units

    def get_config(self) -> dict[str, Any]:
        return {"units": self.units}


class Subclass(tf.keras.Model):
    """Half of its variables are made by a ``build`` of its own, half in ``call``."""

    def __init__(self) -> None:
        super().__init__(name="subclass")
        self.hidden = [layers.Dense(n, activation="relu") for n in (8, 12)]
        self.head = layers.Dense(3)

    def build(self, input_shape: Any) -> None:
        self.scale = self.add_weight("scale", [input_shape[-1]], initializer="uniform")
        self.hidden[0].build(input_shape)
        self.built = True

    def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        x = x * self.scale
        for layer in self.hidden:
            x = layer(x)
        return self.head(x)


class OwnCall(Subclass):
    """It changes how it is called, and inherits ``build``."""

    def __call__(self, x: tf.Tensor, *args: Any, **kwargs: Any) -> tf.Tensor:
        return super().__call__(x * 2.0, *args, **kwargs)


def sequential() -> Any:
    """Has no input shape, so the first call builds it. Without a dropout: the plain
    model would be traced twice then, and it takes a new seed in each trace."""
    return tf.keras.Sequential(
        [
            layers.Dense(8, activation="relu"),
            layers.BatchNormalization(),
            layers.Dense(12, activation="tanh"),
            layers.Dense(3),
        ]
    )


def used_before() -> Any:
    """Trained by Keras before it is distributed; with a frozen layer."""
    model = tf.keras.Sequential(
        [tf.keras.Input([6]), layers.Dense(8), layers.Dense(8), layers.Dense(3)]
    )
    model.layers[1].trainable = False
    model.compile("sgd", "mse", metrics=["mae"])
    random = np.random.RandomState(1)
    model.fit(random.rand(8, 6), random.rand(8, 3), verbose=0, shuffle=False)
    model.predict(random.rand(8, 6), verbose=0)
    return model


def recurrent() -> Any:
    return tf.keras.Sequential(
        [
            layers.Embedding(20, 8, mask_zero=True),
            layers.Bidirectional(layers.LSTM(6, return_sequences=True)),
            layers.TimeDistributed(layers.Dense(5)),
            layers.GRU(4),
            layers.Dense(3),
        ]
    )


def attention() -> Any:
    inputs = tf.keras.Input([6], dtype=tf.int32)
    hidden = layers.Embedding(20, 8)(inputs)
    hidden = layers.Attention()([hidden, hidden]) + hidden
    hidden = layers.Dropout(0.3, seed=3)(hidden)
    hidden = layers.MultiHeadAttention(2, 4)(hidden, hidden) + hidden
    hidden = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(hidden))
    return tf.keras.Model(inputs, layers.Dense(3)(hidden))


def preprocessing() -> Any:
    """Normalization with statistics of data, and rescaled numbers."""
    normal = layers.Normalization()
    normal.adapt(np.random.RandomState(3).normal(2, 3, (50, 6)))
    return tf.keras.Sequential(
        [normal, layers.Rescaling(0.5), layers.Dense(8), layers.Dense(3)]
    )


def text() -> Any:
    """Strings and the tables of a TextVectorization stay on one partition."""
    vector = layers.TextVectorization(output_sequence_length=4)
    vector.adapt(["a b c", "d e f g", "a c e g"])
    inputs = tf.keras.Input([], dtype=tf.string)
    hidden = layers.Embedding(vector.vocabulary_size(), 8)(vector(inputs))
    hidden = layers.Dense(8, activation="relu")(layers.Flatten()(hidden))
    return tf.keras.Model(inputs, layers.Dense(3)(hidden))


def mixed_precision() -> Any:
    return tf.keras.Sequential(
        [
            tf.keras.Input([6]),
            layers.Dense(8, activation="relu", dtype="mixed_bfloat16"),
            layers.Dense(8, dtype="mixed_bfloat16"),
            layers.Dense(3, dtype="float32"),
        ]
    )


def deferred() -> Any:
    """Never has all its weights on one rank."""
    with smp.delay_param_initialization():
        return tf.keras.Sequential(
            [tf.keras.Input([6]), *(layers.Dense(8, "relu") for _ in range(4))]
        )


KINDS = [
    _case(
        "functional",
        functional,
        lambda r, n: [r.rand(n, 6).astype("f"), r.rand(n, 6).astype("f")],
    ),
    _case("functional_subclass", FunctionalSubclass, vectors(6)),
    _case("subclass", Subclass, vectors(6)),
    _case("own_call", OwnCall, vectors(6)),
    _case("sequential", sequential, vectors(6)),
    _case("used_before", used_before, vectors(6)),
    _case("recurrent", recurrent, tokens(6)),
    _case("attention", attention, tokens(6)),
    _case("preprocessing", preprocessing, vectors(6)),
    _case("text", text, lambda r, n: r.choice(["a b", "c d e f", "g a x"], n)),
    _case("mixed_precision", mixed_precision, vectors(6)),
    _case("deferred", deferred, vectors(6)),
]


def _application(name: str, **options: Any) -> ScriptCase:
    def make() -> Any:
        return getattr(tf.keras.applications, name)(
            weights=None, input_shape=(32, 32, 3), classes=5, **options
        )

    return _case(name, make, _images())


APPLICATIONS = [
    _application("MobileNetV2", alpha=0.35),
    _application("EfficientNetB0"),
]

BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_labels": 3,
}


def _hugging_face(name: str, config: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        settings = getattr(transformers, config)(**options)
        return getattr(transformers, name)(settings)

    return make


def pretrained() -> Any:
    """Weights from a folder."""
    import transformers

    kind = transformers.TFBertForSequenceClassification
    first = kind(transformers.BertConfig(**BERT))
    first(first.dummy_inputs)
    with tempfile.TemporaryDirectory() as folder:
        with_loaded_weights(first).save_pretrained(folder)
        return kind.from_pretrained(folder)


def _ids(r: np.random.RandomState, n: int) -> Any:
    return {
        "input_ids": r.randint(3, 40, (n, 6)).astype("i4"),
        "attention_mask": (r.rand(n, 6) > 0.2).astype("i4"),
    }


HUGGING_FACE = [
    _case(
        "TFBertForMaskedLM",
        _hugging_face("TFBertForMaskedLM", "BertConfig", **BERT),
        _ids,
    ),
    _case("pretrained", pretrained, _ids),
    _case(
        "TFGPT2LMHeadModel",
        _hugging_face(
            "TFGPT2LMHeadModel",
            "GPT2Config",
            vocab_size=40,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=16,
        ),
        _ids,
    ),
]
