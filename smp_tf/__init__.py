"""Model parallelism for TensorFlow and Keras: ``import smp_tf as smp``.

The public names are listed by hand below and loaded at first use (PEP 562), so that the
parts which need no TensorFlow (``smp_tf.plan``, ``smp_tf.config``) import without it.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "smp_tf.errors": (
        "ConfigError",
        "MicrobatchError",
        "NotInitializedError",
        "PartitionError",
        "ScheduleError",
        "SmpError",
        "TraceError",
        "TransportError",
    ),
    "smp_tf.runtime.session": (
        "CommGroup",
        "DP_GROUP",
        "DP_RANK",
        "MP_GROUP",
        "MP_RANK",
        "PP_GROUP",
        "PP_RANK",
        "RDP_GROUP",
        "RDP_RANK",
        "RankType",
        "TP_GROUP",
        "TP_RANK",
        "WORLD",
        "WORLD_RANK",
        "allgather",
        "barrier",
        "broadcast",
        "config",
        "dp_barrier",
        "dp_rank",
        "dp_size",
        "get_dp_group",
        "get_mp_group",
        "get_pp_group",
        "get_rdp_group",
        "get_tp_group",
        "get_world_group",
        "init",
        "is_initialized",
        "local_rank",
        "local_size",
        "mp_barrier",
        "mp_rank",
        "mp_size",
        "pp_barrier",
        "pp_rank",
        "pp_size",
        "rank",
        "rdp_rank",
        "rdp_size",
        "recv_from",
        "send",
        "shutdown",
        "size",
        "tp_rank",
        "tp_size",
    ),
    "smp_tf.data_parallel.allreduce": ("allreduce",),
    "smp_tf.checkpoint.manager": ("CheckpointManager",),
    "smp_tf.checkpoint.full_weights": ("load_full_weights",),
    "smp_tf.data_parallel.shard_dataset": ("shard_dataset",),
    "smp_tf.frontend.variables": ("delay_param_initialization",),
    "smp_tf.runtime.clipping": ("clip_by_global_norm",),
    "smp_tf.runtime.placement": ("partition", "register_post_partition_hook"),
    "smp_tf.report.forecast_table": ("forecast_table",),
    "smp_tf.report.partition_table": ("partition_table",),
    "smp_tf.report.plan_page": ("plan_page",),
    "smp_tf.report.profile_table": ("profile_table",),
    "smp_tf.runtime.planning": ("plan",),
    "smp_tf.runtime.stats": ("last_step_stats",),
    "smp_tf.runtime.step": ("step",),
    "smp_tf.runtime.step_output": ("StepOutput",),
    "smp_tf.keras.distribute": ("distribute",),
    "smp_tf.keras.distributed_optimizer": ("DistributedOptimizer",),
    "smp_tf.keras.model": ("DistributedModel",),
}
_MODULES = {"callbacks": "smp_tf.keras.callbacks"}  # public name -> module
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted([*_HOME, *_MODULES])


def _require_legacy_keras() -> None:
    """Make ``tf.keras`` mean Keras 2 (tf_keras), or say why it is too late."""
    loaded = sys.modules.get("keras")
    version = getattr(loaded, "__version__", "2")
    if os.environ.get("TF_USE_LEGACY_KERAS") != "1" and version.split(".")[0] >= "3":
        raise ImportError(
            "smp_tf needs Keras 2 (tf_keras), but Keras 3 is already loaded:"
            f" keras={version}. Put this line first in the script, before any other"
            " import:\n    import smp_tf as smp"
        )
    os.environ["TF_USE_LEGACY_KERAS"] = "1"


_require_legacy_keras()

# Importing a submodule binds its name here, once, when it is loaded. smp.config and
# smp.plan are the public functions, so the modules of these names are loaded before the
# names are taken back.
for _name in ("config", "plan"):
    importlib.import_module(f"{__name__}.{_name}")
    del globals()[_name]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    # Submodules stay reachable as attributes without being public names.
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:  # the same names for type checkers and editors
    from smp_tf.checkpoint.full_weights import load_full_weights  # noqa: F401
    from smp_tf.checkpoint.manager import CheckpointManager  # noqa: F401
    from smp_tf.data_parallel.allreduce import allreduce  # noqa: F401
    from smp_tf.data_parallel.shard_dataset import shard_dataset  # noqa: F401
    from smp_tf.errors import (  # noqa: F401
        ConfigError,
        MicrobatchError,
        NotInitializedError,
        PartitionError,
        ScheduleError,
        SmpError,
        TraceError,
        TransportError,
    )
    from smp_tf.frontend.variables import delay_param_initialization  # noqa: F401
    from smp_tf.keras import callbacks  # noqa: F401
    from smp_tf.keras.distribute import distribute  # noqa: F401
    from smp_tf.keras.distributed_optimizer import DistributedOptimizer  # noqa: F401
    from smp_tf.keras.model import DistributedModel  # noqa: F401
    from smp_tf.runtime.clipping import clip_by_global_norm  # noqa: F401
    from smp_tf.runtime.placement import partition  # noqa: F401
    from smp_tf.runtime.stats import last_step_stats  # noqa: F401
    from smp_tf.runtime.step import step  # noqa: F401
