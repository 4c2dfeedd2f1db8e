"""The methods of a ``DistributedModel`` that are about the weights of the whole model.

Plain Keras does the work, on one rank that reads and sets the values of all partitions
where they are (``runtime.whole_values``): files are those of plain Keras, both ways.
"""

import contextlib
import contextvars
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from smp_tf.errors import SmpError
from smp_tf.frontend.hooks import tracking
from smp_tf.keras.load_status import LoadStatus, checks_of
from smp_tf.runtime import session, whole_values
from smp_tf.runtime.placement import Placement

_is_showing_all = contextvars.ContextVar("_is_showing_all", default=False)
"""True while global variables are listed; for the DistributedModels inside of one."""

_OPTIMIZERS = (tf.keras.optimizers.Optimizer, tf.keras.optimizers.legacy.Optimizer)


@contextlib.contextmanager
def showing_all() -> Iterator[None]:
    """``variables`` and friends of DistributedModels are those of all partitions."""
    token = _is_showing_all.set(True)
    try:
        yield
    finally:
        _is_showing_all.reset(token)


def is_showing_all() -> bool:
    """True inside ``showing_all``."""
    return _is_showing_all.get()


@dataclasses.dataclass(frozen=True)
class VariableSpec:
    """A variable of a model.

    Attributes:
        shape: None for an unknown dimension.
        partition: that has the value; None before that is decided, and where every
            partition has it.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    partition: int | None


class WholeWeights(tf.keras.Model):
    """The part of ``DistributedModel`` that reads, sets, saves and loads weights.

    All of it is about the whole model, in the order of the whole model, however it is
    partitioned. After partitioning, with ``pp_size() > 1``:

    ====================================  =============================================
    ``get_weights``                       every rank of the mp_group must call it
    ``save_weights``, ``save``,           every rank of the job must; rank 0 writes
    ``save_model``
    ``load_weights``                      every rank of the job must; rank 0 reads
    ``set_weights``, ``count_params``     any rank may
    ====================================  =============================================

    A rank that does not come is named by a TransportError after the configuration's
    timeout_s, and so long may rank 0 work on a file without a word. With several
    processes it is rank 0 that writes also before that and without partitions.

    Files hold no state of optimizers where there are partitions, or replicas divide it,
    and none is read: each rank's optimizer has the state of its own variables only.
    """

    if TYPE_CHECKING:  # of the DistributedModel

        @property
        def placement(self) -> Placement | None: ...

        @property
        def global_variables(self) -> list[tf.Variable]: ...

    @property
    def global_variable_specs(self) -> list[VariableSpec]:
        """Name, shape, dtype and partition of all variables, of all partitions."""
        owner = self._owners()
        return [
            VariableSpec(
                variable.name,
                tuple(variable.shape.as_list()),
                variable.dtype.name,
                owner.get(id(variable.handle)),
            )
            for variable in self.global_variables
        ]

    def count_params(self) -> int:
        """Scalars in all weights of the whole model.

        Raises:
            ValueError: the model is not built.
        """
        with showing_all():
            count: int = super().count_params()
        return count

    def get_weights(self) -> list[Any]:
        """The values of all weights of the whole model, as NumPy arrays, on every rank.

        That is a copy of the whole model in the memory of each host process;
        ``[v.numpy() for v in model.weights]`` are those of this rank's partition.

        Raises:
            SmpError: the ranks call it for different models.
            TransportError: a rank failed, or did not call it within timeout_s.
        """
        if not self._is_split():
            return list(super().get_weights())
        return whole_values.everywhere(
            f"{self.name}.get_weights", self.global_variables, self._owners()
        )

    def set_weights(self, weights: Any) -> None:
        """Set all weights of the whole model; each rank keeps those of its partition.

        Args:
            weights: NumPy arrays, as ``get_weights`` returns them, the same list on
                every rank.

        Raises:
            ValueError: their number or a shape is not as in the model; nothing was set.
        """
        keras = super().set_weights
        if not self._is_split():
            keras(weights)
            return
        with showing_all():
            whole_values.set_own(
                self.global_variables, self._owners(), lambda: keras(weights)
            )

    def save_weights(
        self,
        filepath: Any,
        overwrite: bool = True,
        save_format: str | None = None,
        options: Any = None,
    ) -> None:
        """Write the weights of the whole model, as ``tf.keras.Model.save_weights``.

        Every rank of the job must call it; rank 0 writes, and all return when the file
        is there. In TensorFlow's format, ``.h5``, ``.weights.h5`` and ``.keras``.

        Raises:
            Exception: what Keras raises on rank 0, on every rank.
            SmpError: the file exists and ``overwrite`` is False.
            TransportError: a rank failed, or did not come within timeout_s.
        """
        keras = super().save_weights
        self._write(
            "save_weights",
            filepath,
            overwrite,
            lambda: keras(filepath, overwrite, save_format, options),
        )

    def load_weights(
        self,
        filepath: Any,
        skip_mismatch: bool = False,
        by_name: bool = False,
        options: Any = None,
    ) -> Any:
        """Read the weights of the whole model, as ``tf.keras.Model.load_weights``.

        After partitioning every rank of the job must call it; rank 0 reads the file,
        and sends the others their part. Before that each rank reads it for itself, and
        variables that do not exist yet get their values when they are created.

        Returns:
            For TensorFlow's format, a status with the methods of that of
            ``tf.train.Checkpoint.restore``.

        Raises:
            Exception: what Keras raises on rank 0, on every rank; nothing was set.
            TransportError: a rank failed, or did not come within timeout_s.
        """
        keras = super().load_weights
        if not self._is_split():
            with self._without_optimizers(is_reading=True):
                return keras(filepath, skip_mismatch, by_name, options)
        found: list[Any] = [None]

        def read() -> dict[str, str | None] | None:
            found[0] = keras(filepath, skip_mismatch, by_name, options)
            return None if found[0] is None else checks_of(found[0])

        checks = self._on_first_rank("load_weights", read, is_reading=True)
        return None if checks is None else LoadStatus(checks, found[0])

    # --- how

    def _is_state_divided(self) -> bool:
        """Whether each rank's optimizer has a part of the state only."""
        if not session.is_initialized():
            return False
        is_sharded = session.config().shard_optimizer_state and session.dp_size() > 1
        return session.pp_size() > 1 or is_sharded

    def _is_split(self) -> bool:
        return self.placement is not None and session.pp_size() > 1

    def _owners(self) -> Mapping[int, int]:
        """Id of a variable's handle -> partition."""
        return {} if self.placement is None else self.placement.owner

    def _write(
        self,
        name: str,
        filepath: Any,
        overwrite: bool,
        keras: Callable[[], None],
        is_known: bool = False,
    ) -> None:
        if not session.is_initialized() or session.size() == 1:
            keras()
            return

        def write() -> None:
            if not overwrite:
                _refuse_prompt(filepath)
            keras()

        self._on_first_rank(name, write, is_known=is_known)

    def _on_first_rank(
        self,
        name: str,
        function: Callable[[], Any],
        is_reading: bool = False,
        is_known: bool = False,
    ) -> Any:
        with showing_all(), self._without_optimizers(is_reading, is_known):
            return whole_values.on_first_rank(
                f"{self.name}.{name}", self._reachable(), self._owners(), function
            )

    def _reachable(self) -> list[tf.Variable]:
        """All variables that can be in a file: also those that are no weights."""
        found = {id(variable.handle): variable for variable in self.global_variables}
        others = [v for metric in self.metrics for v in metric.variables]
        for each in [*others, *tf.train.TrackableView(self).descendants()]:
            if isinstance(each, tf.Variable):
                found.setdefault(id(each.handle), each)
        return list(found.values())

    @contextlib.contextmanager
    def _without_optimizers(
        self, is_reading: bool, is_known: bool = False
    ) -> Iterator[None]:
        """No file has to do with the optimizers, where each has a part of the state.

        Args:
            is_reading: nor is what a file has of them kept for one that ``compile``
                makes later.
            is_known: a file may say what they are.
        """
        if not self._is_state_divided():
            yield
            return
        names = {
            name for name, value in vars(self).items() if isinstance(value, _OPTIMIZERS)
        }
        with tracking.without_attributes(
            self, {*names, "optimizer"}, is_reading, is_known
        ):
            yield


def _refuse_prompt(filepath: Any) -> None:
    """Keras would ask the person at rank 0's terminal, and the other ranks wait."""
    path = os.fspath(filepath)
    for each in (path, f"{path}.index"):
        if os.path.isfile(each):
            raise SmpError(
                "several ranks cannot ask whether to write over a file:"
                f" file={each!r} overwrite=False; remove it, or say overwrite=True"
            )
