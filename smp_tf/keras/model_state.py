"""The variables that a model's state is in, by names that are the same in each run."""

from typing import Any

import tensorflow as tf


def variables_of(model: Any) -> dict[str, tf.Variable]:
    """All variables of the whole model, but for those of its optimizer.

    Returns:
        "weight_3" for a weight, in the order of the whole model; "metric_0" for the
        state of a metric; "other_0" for what else the model refers to. On every rank
        the same, once a step has partitioned the model.
    """
    named = [("weight", variable) for variable in model.global_variables]
    named += [("metric", each) for metric in model.metrics for each in metric.variables]
    optimizers = _within(model.optimizer) if model.optimizer is not None else []
    seen = {id(each.handle) for each in optimizers}
    named += [("other", v) for v in _within(model) if id(v.handle) not in seen]
    found: dict[str, tf.Variable] = {}
    handles: set[int] = set()
    counts = {"weight": 0, "metric": 0, "other": 0}
    for kind, variable in named:
        if id(variable.handle) not in handles:
            handles.add(id(variable.handle))
            found[f"{kind}_{counts[kind]}"] = variable
            counts[kind] += 1
    return found


def _within(trackable: Any) -> list[tf.Variable]:
    every = tf.train.TrackableView(trackable).descendants()
    return [each for each in every if isinstance(each, tf.Variable)]
