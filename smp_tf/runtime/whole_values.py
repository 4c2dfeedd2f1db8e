"""The values of all partitions in one place, for as long as something needs them.

``on_first_rank`` runs a function on world rank 0 that reads and sets all variables, as
one does that saves or loads a model:

    world rank 0     reads a variable      -> asks its owner, and gets the value
    its mp_group     answers, until rank 0 is done
    world rank 0     the function is over  -> sends the owners what it has set
    each of those    passes it on to the other replicas' ranks with its partition

Only what the function itself keeps takes memory on rank 0, and only of the host. What
it sets changes nothing until it has ended well; if it fails, it fails on all ranks.
"""

import contextlib
import contextvars
import copy
import hashlib
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from smp_tf.errors import SmpError, TransportError
from smp_tf.frontend import variables as frontend_variables
from smp_tf.frontend.stand_ins import standing_in
from smp_tf.runtime import session

_READ, _SET, _DONE = "read", "set", "done"

_is_alone = contextvars.ContextVar("_is_alone", default=False)


def is_alone() -> bool:
    """True in what ``on_first_rank`` runs: other ranks take part in nothing else."""
    return _is_alone.get()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    token = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(token)


class _Values:
    """The values of some variables, of this rank and of others, and those to be set."""

    def __init__(self, variables: Sequence[Any], owner: Mapping[int, int]) -> None:
        self._variables = variables
        self._owners = [owner.get(id(variable.handle)) for variable in variables]
        self.written: dict[int, Any] = {}

    def owner(self, index: int) -> int | None:
        """The partition; None if every one has the variable."""
        return self._owners[index]

    def is_here(self, index: int) -> bool:
        return self._owners[index] in (None, session.pp_rank())

    def local(self, index: int) -> Any:
        return frontend_variables.value_of(self._variables[index]).numpy()

    def set(self, index: int, value: Any) -> None:
        self._variables[index].assign(value)

    def read(self, index: int) -> Any:
        if index in self.written:
            return copy.copy(self.written[index])
        if self.is_here(index):
            return self.local(index)
        return self._from_owner(index)

    def _from_owner(self, index: int) -> Any:
        owner = self._owners[index]
        assert owner is not None
        session.send((_READ, index, None), owner, session.PP_RANK)
        value, error = session.recv_from(owner, session.PP_RANK)
        if error is not None:
            raise error
        return value

    def answer(self, index: int) -> tuple[Any, Exception | None]:
        """What the owner says to rank 0, which must not wait if it cannot read."""
        try:
            return self.local(index), None
        except Exception as error:
            return None, _portable(error)

    def write(self, index: int, value: Any) -> None:
        self.written[index] = value

    def digest(self) -> str:
        """The same on ranks with the same variables, for names may differ."""
        text = [
            f"{variable.shape} {variable.dtype.name} {owner}"
            for variable, owner in zip(self._variables, self._owners, strict=True)
        ]
        return hashlib.sha256("\n".join(text).encode()).hexdigest()


class _OwnValues(_Values):
    """Keeps of what is set the part of this rank, and asks nobody."""

    def _from_owner(self, index: int) -> Any:
        return self.local(index)  # raises and names the owner

    def write(self, index: int, value: Any) -> None:
        if self.is_here(index):
            super().write(index, value)


def on_first_rank(
    call: str,
    variables: Sequence[Any],
    owner: Mapping[int, int],
    function: Callable[[], Any],
) -> Any:
    """Run ``function`` on world rank 0, where it can read and set all of ``variables``.

    Every rank of the job must call this. A rank waits timeout_s for the next word of
    rank 0, and as long for one that does not come.

    Args:
        call: what is done, the same on all ranks.
        variables: the same on all ranks.
        owner: id of a variable's handle -> partition; one that is missing is on every
            partition.
        function: its result can be pickled.

    Returns:
        The result of ``function``, on every rank.

    Raises:
        Exception: what ``function`` has raised, on every rank; nothing was set.
        SmpError: the ranks do not make the same call for the same variables.
        TransportError: a rank failed, or did not come within timeout_s.
    """
    if _is_alone.get():  # where it can read and set all of them already
        return function()
    values = _Values(variables, owner)
    _agree(call, values, session.WORLD)
    if session.rank() != 0:
        return _follow(values)
    try:
        with standing_in(variables, values), _alone():
            result = function()
    except BaseException as error:
        with contextlib.suppress(TransportError):  # they know of a failed rank
            _tell_all((_DONE, None, _portable(error)))
        raise
    for index, value in values.written.items():
        _tell_owners(values, index, value)
    _tell_all((_DONE, result, None))
    return result


def everywhere(
    call: str, variables: Sequence[Any], owner: Mapping[int, int]
) -> list[Any]:
    """All values, as NumPy arrays, on every rank of the mp_group; all must call this.

    Args and errors as for ``on_first_rank``.
    """
    if _is_alone.get():
        return [variable.numpy() for variable in variables]
    values = _Values(variables, owner)
    if session.pp_size() > 1:
        _agree(call, values, session.PP_GROUP)
    found = []
    for index in range(len(variables)):
        source = values.owner(index)
        if not values.is_here(index):
            assert source is not None
            found.append(session.recv_from(source, session.PP_RANK))
            continue
        found.append(values.local(index))
        if source is not None:
            session.broadcast(found[-1], session.PP_GROUP)
    return found


def set_own(
    variables: Sequence[Any], owner: Mapping[int, int], function: Callable[[], None]
) -> None:
    """Run ``function``, which sets ``variables``, and keep this rank's part of it.

    No messages: ranks that run the same function have the same variables afterwards.
    Nothing is set if it fails. Args as for ``on_first_rank``.
    """
    values = _OwnValues(variables, owner)
    with standing_in(variables, values):
        function()
    for index, value in values.written.items():
        values.set(index, value)


def _agree(call: str, values: _Values, group: session.CommGroup) -> None:
    found = session.allgather((call, values.digest()), group)
    if all(each == found[0] for each in found):
        return
    ranks = session.current(call).messages.members(group)
    calls = ", ".join(f"rank {r}: {name}" for r, (name, _) in zip(ranks, found))
    raise SmpError(
        "all ranks must make the same calls for the same model, in the same order:"
        f" {calls}; the names or the variables of the models differ"
    )


def _follow(values: _Values) -> Any:
    """What the other ranks do meanwhile; the result of rank 0's function."""
    is_first_replica = session.rdp_rank() == 0
    group = session.PP_RANK if is_first_replica else session.RDP_RANK
    while True:
        message = session.recv_from(0, group)
        kind, index, content = message
        if kind == _READ:
            session.send(values.answer(index), 0, session.PP_RANK)
            continue
        if is_first_replica:
            session.broadcast(message, session.RDP_GROUP)
        if kind == _SET:
            values.set(index, content)
        elif content is not None:
            raise content
        else:
            return index


def _tell_owners(values: _Values, index: int, value: Any) -> None:
    """On rank 0: set a variable where it is, on all replicas."""
    message, owner = (_SET, index, value), values.owner(index)
    if owner is None:
        _tell_all(message)
    elif owner != 0:
        session.send(message, owner, session.PP_RANK)
    else:
        session.broadcast(message, session.RDP_GROUP)
    if values.is_here(index):
        values.set(index, value)


def _tell_all(message: tuple[str, Any, Any]) -> None:
    session.broadcast(message, session.PP_GROUP)
    session.broadcast(message, session.RDP_GROUP)


def _portable(error: BaseException) -> Exception:
    """The error as other ranks raise it: of the same class where that can travel."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, Exception):
        with contextlib.suppress(Exception):
            other = pickle.loads(pickle.dumps(error))
            if type(other) is type(error) and str(other) == str(error):
                return error
    return SmpError(f"rank {session.rank()} failed: {text}")
