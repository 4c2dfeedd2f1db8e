"""The GPU of this rank: chosen, given to TensorFlow alone, compared with the others'.

What counts is what this process sees. The launcher may have narrowed that (with
CUDA_VISIBLE_DEVICES) and so may the script (tf.config.set_visible_devices):

    GPUs seen              the rank takes
    none                   none, and computes on the CPU
    1                      that one
    local_size or more     number local_rank
    in between             none, an error; with share_gpu: number local_rank, in turn

No two ranks of a job get the same one, unless share_gpu is true. A rank by itself
cannot know, so what it has taken, or why it cannot, goes to all others with its
address; then every rank comes to the same end.
"""

import collections
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smp_tf.errors import ConfigError
from smp_tf.launch import Launch, gpus_are_hidden

# Made by the driver: of Linux, and of Windows for Linux.
_DEVICES = Path("/dev")
_DEVICE_FILES = ("nvidia[0-9]*", "dxg")

logger = logging.getLogger("smp_tf")


@dataclass(frozen=True)
class Pinned:
    """What a rank has taken.

    Attributes:
        ordinal: of the GPU, as CUDA counts those that the process sees; None: the rank
            has no GPU.
        uuid: "GPU-..", the same for everybody; "" if it is not known.
        name: as its maker calls it; "" if it is not known.
        refusal: why the rank cannot go on; "" if it can.
    """

    ordinal: int | None = None
    uuid: str = ""
    name: str = ""
    refusal: str = ""


def may_have_gpus() -> bool:
    """Whether the machine has files of a driver; costs nothing and imports nothing."""
    if gpus_are_hidden():
        return False
    return any(next(_DEVICES.glob(name), None) for name in _DEVICE_FILES)


def choose(gpus: int, local_rank: int, local_size: int, share_gpu: bool) -> int | None:
    """Which of the GPUs that a rank sees it takes; see the table above.

    Args:
        gpus: how many it sees.

    Raises:
        ConfigError: too few for the ranks of the host.
    """
    if gpus == 0:
        return None
    if gpus == 1:
        return 0
    if gpus >= local_size or share_gpu:
        return local_rank % gpus
    raise ConfigError(
        "`share_gpu`: each rank needs a GPU of its own; "
        f"GPUs={gpus}, ranks on the host={local_size}, share_gpu=False; launch at most "
        f"{gpus} ranks on each host, or set share_gpu to true"
    )


def pin(launch: Launch, share_gpu: bool) -> Pinned:
    """Take the GPU of this rank: TensorFlow sees no other, and takes memory as needed.

    What the script has chosen stays: a single GPU, how memory grows, logical devices.

    Raises:
        ConfigError: there are too few GPUs, or TensorFlow has started with others.
    """
    import tensorflow as tf

    seen = tf.config.get_visible_devices("GPU")
    place = choose(len(seen), launch.local_rank, launch.local_size, share_gpu)
    if place is None:
        return Pinned()
    mine = seen[place]
    try:
        tf.config.set_visible_devices([mine], "GPU")
    except RuntimeError:
        # TensorFlow computes on the first that it sees, but takes memory on all.
        if launch.local_size > 1 or place != 0:
            raise ConfigError(
                "TensorFlow was in use before smp.init(), with GPUs of other ranks; "
                f"GPUs={_ordinals(seen)}, local_rank={launch.local_rank}, "
                f"local_size={launch.local_size}, this rank's GPU={_ordinal(mine)}; "
                "call smp.init() before TensorFlow is first used"
            ) from None
    _let_memory_grow(mine)
    return Pinned(_ordinal(mine))


def _let_memory_grow(gpu: Any) -> None:
    """Without it TensorFlow takes all memory: of a shared GPU, and what NCCL needs."""
    import tensorflow as tf

    chosen = tf.config.experimental.get_memory_growth(gpu) is not None
    if chosen or tf.config.get_logical_device_configuration(gpu) is not None:
        return
    try:
        tf.config.experimental.set_memory_growth(gpu, True)
    except RuntimeError:
        logger.warning(
            "TensorFlow was in use before smp.init(), so it takes all memory of the "
            "GPU at once; GPU=%d. Call smp.init() before the first TensorFlow "
            "operation.",
            _ordinal(gpu),
        )


def pin_and_tell(launch: Launch, share_gpu: bool) -> Pinned:
    """``pin`` for a job of several ranks: all ranks are to learn why one cannot.

    Raises:
        TransportError: the kernel library, which knows the names of GPUs, does not
            load.
    """
    try:
        pinned = pin(launch, share_gpu)
    except ConfigError as error:
        return Pinned(refusal=str(error))
    if pinned.ordinal is None:
        return pinned
    # Asks CUDA's driver, which a rank without a GPU leaves alone.
    from smp_tf.transport import nccl

    for gpu in nccl.gpus():
        if gpu.ordinal == pinned.ordinal:
            return Pinned(gpu.ordinal, gpu.uuid, gpu.name)
    logger.warning(
        "rank %d: whether other ranks use the same GPU is not known, for CUDA's driver "
        "does not tell which one it is; GPU=%d, driver: %s",
        launch.rank,
        pinned.ordinal,
        nccl.driver().why_not or f"{len(nccl.gpus())} GPUs",
    )
    return pinned


def compare(pinned: Sequence[Pinned], hosts: Sequence[str], share_gpu: bool) -> None:
    """Check what all ranks have taken.

    Args:
        pinned, hosts: of every rank of the job.

    Raises:
        ConfigError: on every rank alike, if one of them cannot go on or two of them
            have the same GPU.
    """
    refusals = _ranks_by(enumerate(each.refusal for each in pinned))
    if refusals:
        raise ConfigError(
            ". ".join(f"{_name(ranks)}: {text}" for text, ranks in refusals.items())
        )
    users = _ranks_by(enumerate(each.uuid for each in pinned))
    shared = {uuid: ranks for uuid, ranks in users.items() if len(ranks) > 1}
    if not shared or share_gpu:
        return
    each = "; ".join(
        f"{_name(ranks)} on host {hosts[ranks[0]]}: {uuid} ({pinned[ranks[0]].name})"
        for uuid, ranks in shared.items()
    )
    raise ConfigError(
        f"`share_gpu`: each rank needs a GPU of its own; {each}; share_gpu=False; "
        "launch at most as many ranks on a host as it has GPUs, give each its own in "
        "CUDA_VISIBLE_DEVICES, or set share_gpu to true"
    )


def _ranks_by(texts: Iterable[tuple[int, str]]) -> dict[str, list[int]]:
    """text -> the ranks that have it; those with none are left out."""
    ranks = collections.defaultdict(list)
    for rank, text in texts:
        if text:
            ranks[text].append(rank)
    return ranks


def _name(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _ordinal(gpu: Any) -> int:
    """Of a tf.config.PhysicalDevice; TensorFlow names them by CUDA's numbers."""
    return int(gpu.name.rpartition(":")[2])


def _ordinals(gpus: Sequence[Any]) -> str:
    return ", ".join(str(_ordinal(gpu)) for gpu in gpus)
