"""Models that others wrote: Keras applications and Hugging Face, at test size."""

from typing import Any

import tensorflow as tf

from tests.models.script import (
    Script,
    ScriptCase,
    classes,
    cross_entropy,
    tokens,
    train,
    trainable,
)

applications = tf.keras.applications


def _application(name: str, size: int, **options: Any) -> ScriptCase:
    def build(base: type) -> Script:
        class Wrapped(base):
            def __init__(self) -> None:
                super().__init__(name="wrapped")
                self.inner = getattr(applications, name)(
                    weights=None, input_shape=(size, size, 3), classes=6, **options
                )

            def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
                return tf.math.log(self.inner(x, training=training) + 1e-6)

        return train(Wrapped())

    return ScriptCase(
        name, build, lambda r, n: r.rand(n, size, size, 3).astype("f"), classes()
    )


APPLICATIONS = [
    _application("MobileNetV2", 32, alpha=0.35),
    _application("ResNet50", 32),
]

LARGE_APPLICATIONS = [
    _application("DenseNet121", 32),
    _application("InceptionV3", 75),
]


def _hugging_face(name: str, config: str, options: dict[str, Any], **data: Any) -> Any:
    """A case that calls a transformers model inside a model's ``call``."""

    def build(base: type) -> Script:
        import transformers

        settings = getattr(transformers, config)(**options)

        class Wrapped(base):
            def __init__(self) -> None:
                super().__init__(name="wrapped")
                self.inner = getattr(transformers, name)(settings)

            def call(self, x: Any, training: bool | None = None) -> Any:
                return self.inner(x, training=training)

        model = Wrapped()

        def step(x: Any, y: Any) -> Any:
            with tf.GradientTape() as tape:
                outputs = model(x, training=True)
                loss = cross_entropy(y, outputs.logits)
            gradients = tape.gradient(loss, model.trainable_variables)
            return {"gradients": gradients, "loss": loss, "logits": outputs.logits}

        return Script(step, [model], lambda: {"gradients": trainable(model)})

    features = data.get("features") or (
        lambda r, n: {
            "input_ids": r.randint(3, 40, (n, 6)).astype("i4"),
            "attention_mask": (r.rand(n, 6) > 0.2).astype("i4"),
        }
    )
    return ScriptCase(name, build, features, data.get("labels") or classes())


_SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_labels": 6,
}

HUGGING_FACE = [
    _hugging_face("TFBertForSequenceClassification", "BertConfig", _SMALL),
    _hugging_face("TFBertForMaskedLM", "BertConfig", _SMALL, labels=tokens(6)),
    _hugging_face(
        "TFAlbertForSequenceClassification",
        "AlbertConfig",
        {**_SMALL, "embedding_size": 8},
    ),
    _hugging_face(
        "TFGPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 16},
        labels=tokens(6),
    ),
    _hugging_face(
        "TFT5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 40,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
            "use_cache": False,
        },
        features=lambda r, n: {
            "input_ids": r.randint(3, 40, (n, 6)).astype("i4"),
            "decoder_input_ids": r.randint(3, 40, (n, 5)).astype("i4"),
        },
        labels=tokens(5),
    ),
    _hugging_face(
        "TFViTForImageClassification",
        "ViTConfig",
        {
            **{k: v for k, v in _SMALL.items() if k != "vocab_size"},
            "image_size": 8,
            "patch_size": 4,
        },
        features=lambda r, n: r.rand(n, 3, 8, 8).astype("f"),
    ),
]
