"""Train a Hugging Face BERT to tell which package a piece of source code is from.

    horovodrun -np 2 python -m smp_tf.examples.hf_bert
    python -m smp_tf.examples.hf_bert                    (one process, no launcher)

The lines marked with <- are all that differs from plain Keras. The model is made from a
configuration, and the text is that of Python's standard library: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import collections
import re
import sysconfig
from pathlib import Path
from typing import Any

import smp_tf as smp  # isort: skip  (first: it selects Keras 2)  # <- new

import numpy as np
import tf_keras as keras

try:
    import transformers
except ImportError as error:
    raise SystemExit(
        "this example needs Hugging Face's transformers:"
        ' pip install "transformers>=4.57,<4.58"'
    ) from error

PACKAGES = ("asyncio", "email", "http", "importlib", "multiprocessing", "unittest")
TOKENS_OF_PACKAGE = 60_000
UNKNOWN = 0  # a word that is not among the most frequent ones


def read_words(package: str) -> list[str]:
    """Words and signs of all modules of a package."""
    folder = Path(sysconfig.get_path("stdlib"), package)
    files = sorted(folder.glob("*.py"))
    text = "\n".join(file.read_text("utf-8", errors="replace") for file in files)
    return re.findall(r"[a-z_]+|\d|[^\w\s]", text.lower())[:TOKENS_OF_PACKAGE]


def load_pieces(length: int, vocabulary: int) -> dict[str, Any]:
    """Pieces of source as word numbers [pieces, length], and packages [pieces].

    The last tenth of each package is held out, and nothing is learnt from it, not even
    which words are frequent.
    """
    texts = [read_words(package) for package in PACKAGES]
    ends = [len(words) * 9 // 10 for words in texts]
    counts = collections.Counter(
        word for words, end in zip(texts, ends) for word in words[:end]
    )
    number = {
        word: i for i, (word, _) in enumerate(counts.most_common(vocabulary - 1), 1)
    }

    def pieces(parts: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        numbers = [
            np.array([number.get(word, UNKNOWN) for word in words], np.int32)
            for words in parts
        ]
        found = [
            each[: len(each) // length * length].reshape(-1, length) for each in numbers
        ]
        labels = [np.full(len(each), i, np.int32) for i, each in enumerate(found)]
        return np.concatenate(found), np.concatenate(labels)

    return {
        "train": pieces([words[:end] for words, end in zip(texts, ends)]),
        "test": pieces([words[end:] for words, end in zip(texts, ends)]),
    }


def build_model(options: argparse.Namespace) -> Any:
    """A small BERT with random weights; pieces [batch, length] to logits."""
    config = transformers.BertConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.dim,
        num_hidden_layers=options.blocks,
        num_attention_heads=options.heads,
        intermediate_size=4 * options.dim,
        max_position_embeddings=options.length,
        num_labels=len(PACKAGES),
    )
    return transformers.TFBertForSequenceClassification(config)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, help="per epoch; all batches if not said")
    parser.add_argument("--batch", type=int, default=64, help="pieces per step")
    parser.add_argument("--length", type=int, default=48, help="words per piece")
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    smp.init({"microbatches": options.microbatches})  # <- new
    keras.utils.set_random_seed(1)

    data = load_pieces(options.length, options.vocabulary)
    words, packages = data["train"]
    model = smp.distribute(build_model(options))  # <- was build_model(options)
    # No loss: the model has its own, as Hugging Face's models do.
    model.compile(keras.optimizers.Adam(1e-3), metrics=["accuracy"])
    model.fit(
        words,
        packages,
        batch_size=options.batch,
        epochs=options.epochs,
        steps_per_epoch=options.steps,
        verbose=2,
    )
    loss, accuracy = model.evaluate(*data["test"], batch_size=options.batch, verbose=0)
    if smp.rank() == 0:  # <- new
        chance = np.bincount(data["test"][1]).max() / len(data["test"][1])
        print(
            f"test_loss={loss:.4f} test_accuracy={accuracy:.4f} chance={chance:.4f}"
            f" ranks={smp.size()} microbatches={options.microbatches}",
            flush=True,
        )


if __name__ == "__main__":
    main()
