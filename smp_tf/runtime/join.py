"""How this process joins the other ranks of its job.

resolve the configuration, read what the launcher set and the partition_file
hello     job id, configuration and cores of every rank, over the launcher's store, or
          through MPI where that is the launcher
compare   configurations; a difference fails on every rank, with the same text
threads   divide the cores of the host between its ranks
gpu       take the GPU of this rank, if it has one
address   open the transport, exchange addresses, connect, start
compare   GPUs; a rank without one of its own fails on every rank, with the same text
clock     ranks that booted apart from rank 0 ask it for the time
nccl      ranks with GPUs find out who can send to whom from GPU to GPU
horovod   make this rank's dp_group Horovod's world, where the configuration says so
"""

import collections
import dataclasses
import json
import logging
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smp_tf.config import Config, json_log, resolve
from smp_tf.errors import ConfigError, TransportError
from smp_tf.launch import Launch, launch, threads_requested
from smp_tf.plan.given import Given, given_by
from smp_tf.runtime import horovod_world, pinning
from smp_tf.runtime.failure import Guard
from smp_tf.runtime.gpu_links import GpuLinks, open_links
from smp_tf.runtime.horovod_world import HorovodWorld
from smp_tf.runtime.log import show_by_default
from smp_tf.runtime.pinning import Pinned
from smp_tf.runtime.timeline_clock import Clock, align, clock_name
from smp_tf.topology import Topology
from smp_tf.transport import mpi
from smp_tf.transport.engine import Engine
from smp_tf.transport.messages import Messages
from smp_tf.transport.mpi import MpiRendezvous
from smp_tf.transport.rendezvous import Rendezvous, pack, unpack

_GIVE_UP_SECONDS = 10.0  # for the news of a configuration that cannot be resolved

logger = logging.getLogger("smp_tf")


@dataclasses.dataclass(frozen=True)
class Session:
    """What ``smp.init`` made.

    Attributes:
        engine, guard: None in a world of one.
        given: files that steps follow.
        json_log: file for events as JSON, None if nobody asked, and off rank 0.
        name: random, for files; the same on all ranks, and no secret.
        started: when rank 0 began, in seconds since 1970.
        clock: what the clock of rank 0 shows more than this rank's.
        world: Horovod's, with ``horovod: true``.
        gpu: this rank's.
        gpu_links: what travels from GPU to GPU.
    """

    config: Config
    launch: Launch
    topology: Topology
    messages: Messages
    engine: Engine | None = None
    guard: Guard | None = None
    given: Given = Given()
    json_log: Path | None = None
    name: str = ""
    started: float = 0.0
    clock: Clock = Clock()
    world: HorovodWorld | None = None
    gpu: Pinned = Pinned()
    gpu_links: GpuLinks = GpuLinks()

    @property
    def rank(self) -> int:
        return self.launch.rank

    def leave(self) -> None:
        """End the session, and wait until the other ranks do."""
        if self.world is not None:
            self.world.close()
        if self.guard is not None:
            self.guard.leave()


def join(argument: Mapping[str, Any] | None, epoch: int) -> Session:
    """Make the session of this process; ``epoch`` counts its sessions.

    Raises:
        ConfigError: the configuration cannot work, or differs between the ranks.
        TransportError: a rank did not come within timeout_s, or failed on the way.
    """
    started = launch()
    try:
        config = resolve(argument, started.size)
        topology = Topology(
            size=started.size,
            pp_size=config.partitions,
            tp_size=config.tensor_parallel_degree,
            placement=config.placement_strategy,
        )
        given = given_by(config)
        log = json_log() if started.rank == 0 else None
        if config.horovod:
            horovod_world.require()
    except Exception as error:
        if started.size > 1:
            _rendezvous(started, epoch, _GIVE_UP_SECONDS).give_up(_reason(error))
        raise
    if started.rank == 0:
        show_by_default()
    if started.size == 1:
        alone = Messages(None, topology, started.rank, "", config.timeout_s)
        gpu = Pinned()
        if pinning.may_have_gpus():
            gpu = pinning.pin(started, config.share_gpu)
        world = None
        if config.horovod:
            world = HorovodWorld(None, alone, config.timeout_s)
            world.begin(started, [started.hostname])
        return Session(
            config,
            started,
            topology,
            alone,
            given=given,
            json_log=log,
            name=secrets.token_hex(4),
            started=time.time(),
            world=world,
            gpu=gpu,
        )
    rendezvous = _rendezvous(started, epoch, config.timeout_s)
    try:
        joined = _join_others(config, started, topology, rendezvous, given)
        return dataclasses.replace(joined, json_log=log)
    except ConfigError:  # found by every rank for itself
        raise
    except Exception as error:
        first = rendezvous.give_up(_reason(error))
        if first is None or first in str(error):
            raise
        raise TransportError(f"{first} (rank {started.rank}: {error})") from error


def _join_others(
    config: Config,
    launch: Launch,
    topology: Topology,
    rendezvous: Rendezvous | MpiRendezvous,
    given: Given,
) -> Session:
    hello = {
        "job": secrets.token_hex(16) if launch.rank == 0 else None,
        "config": _comparable(config, given),
        "host": launch.hostname,
        "cores": sorted(os.sched_getaffinity(0)),
        "clock": clock_name(),
        "name": secrets.token_hex(4),
        "time": time.time(),
    }
    values = rendezvous.exchange("hello", json.dumps(hello, default=str).encode())
    hellos = [json.loads(value) for value in values]
    compare_configs([hello["config"] for hello in hellos])
    has_replicas = config.horovod and topology.rdp_size > 1
    _set_threads(share_of_cores(hellos, launch.rank), has_replicas)
    gpu = pinning.pin_and_tell(launch, config.share_gpu)

    # Imports TensorFlow, which the library is linked with.
    from smp_tf.transport import ops

    job_id = hellos[0]["job"]
    engine = Engine(ops.load())
    one_host = launch.local_size == launch.size
    address = engine.open(
        rank=launch.rank,
        size=launch.size,
        timeout_s=config.timeout_s,
        job_id=job_id,
        net_devices="lo" if one_host else None,
    )
    try:
        mine = pack([address, json.dumps(dataclasses.asdict(gpu)).encode()])
        every = [unpack(each) for each in rendezvous.exchange("address", mine)]
        gpus = [Pinned(**json.loads(their_gpu)) for _, their_gpu in every]
        pinning.compare(gpus, [hello["host"] for hello in hellos], config.share_gpu)
        for peer, (theirs, _) in enumerate(every):
            if peer != launch.rank:
                engine.connect(peer, theirs)
        engine.start()
        messages = Messages(engine, topology, launch.rank, job_id, config.timeout_s)
        clock = align(messages, launch.rank, [hello["clock"] for hello in hellos])
        links = open_links(engine, messages, launch.rank, gpus, one_host)
    except BaseException:
        engine.close(0.0)
        raise
    guard = Guard(engine, launch.rank, config.timeout_s)
    if launch.mpi:
        mpi.finalize_if(lambda: not guard.failed)
    guard.install()
    if launch.rank == 0:
        hosts = len({hello["host"] for hello in hellos})
        logger.info(
            "%d ranks on %d host(s): %d partition(s) x %d replica(s), placement %s, "
            "%d microbatch(es), schedule %s, messages over %s",
            topology.size,
            hosts,
            topology.pp_size,
            topology.rdp_size,
            topology.placement,
            config.microbatches,
            config.pipeline,
            _carriers(engine, launch),
        )
        if topology.rdp_size > 1 and not config.horovod:
            logger.warning(
                "the %d replicas of the model train without knowing of each other; "
                "horovod=False. Set horovod to true, or partitions to the number of "
                "ranks.",
                topology.rdp_size,
            )
    world = None
    if config.horovod:
        world = HorovodWorld(engine, messages, config.timeout_s)
        guard.explain_with(world.explain)
        try:
            world.begin(launch, [hello["host"] for hello in hellos])
        except BaseException as error:
            guard.abort(_reason(error))
            guard.leave()
            raise
    return Session(
        config,
        launch,
        topology,
        messages,
        engine,
        guard,
        given,
        name=hellos[0]["name"],
        started=hellos[0]["time"],
        clock=clock,
        world=world,
        gpu=gpu,
        gpu_links=links,
    )


def _carriers(engine: Engine, launch: Launch) -> str:
    """What carries this rank's messages: "posix/memory cma/memory and tcp/eth0"."""
    peers = (peer for peer in range(launch.size) if peer != launch.rank)
    texts = {engine.describe(peer).partition(";")[0] for peer in peers}
    return " and ".join(sorted(text.removeprefix("data: ") for text in texts))


def _comparable(config: Config, given: Given) -> dict[str, Any]:
    """A configuration as ranks compare it: of a file, its content and not its path."""
    return {**dataclasses.asdict(config), **given.contents()}


def compare_configs(configs: Sequence[Mapping[str, Any]]) -> None:
    """Check that all ranks resolved the same configuration.

    Raises:
        ConfigError: names every key that differs, its values and their ranks.
    """
    differences = []
    for key in configs[0]:
        ranks = collections.defaultdict(list)
        for rank, config in enumerate(configs):
            ranks[repr(config.get(key))].append(str(rank))
        if len(ranks) > 1:
            values = "; ".join(
                f"{value} on rank{'s' * (len(where) > 1)} {', '.join(where)}"
                for value, where in ranks.items()
            )
            differences.append(f"`{key}`: {values}")
    if differences:
        raise ConfigError(
            f"the configuration differs between ranks: {'. '.join(differences)}. "
            f"Give every rank the same smp.init argument, SMP_CONFIG and files."
        )


def share_of_cores(hellos: Sequence[Mapping[str, Any]], rank: int) -> int:
    """Cores for one rank, at least 1: each core is shared by the ranks that may use it.

    That is cores // local_size where the ranks are not bound to cores, and all of its
    cores for a rank that the launcher has bound to cores of its own.
    """
    mine = hellos[rank]
    users = collections.Counter(
        core
        for hello in hellos
        if hello["host"] == mine["host"]
        for core in hello["cores"]
    )
    return max(1, int(sum(1 / users[core] for core in mine["cores"]) + 1e-6))


def _set_threads(threads: int, has_replicas: bool) -> None:
    """Limit TensorFlow to this rank's share of the cores.

    Where replicas average gradients, operations run in two threads at least: a single
    one would begin with what it has, and average when the step is over. Thread counts
    that the user has chosen stay, and so does everything where there is a GPU, for then
    the cores are not what computes.
    """
    import tensorflow as tf

    if tf.config.get_visible_devices("GPU"):
        return
    chosen = threads_requested()
    pools = tf.config.threading
    try:
        if not (chosen.intra_op or pools.get_intra_op_parallelism_threads()):
            pools.set_intra_op_parallelism_threads(threads)
        if not (chosen.inter_op or pools.get_inter_op_parallelism_threads()):
            pools.set_inter_op_parallelism_threads(max(threads, 1 + has_replicas))
    except RuntimeError:
        logger.warning(
            "TensorFlow was in use before smp.init(), so its thread pools take all "
            "cores instead of this rank's share; threads=%d. Call smp.init() before "
            "the first TensorFlow operation.",
            threads,
        )


def _rendezvous(
    launch: Launch, epoch: int, timeout_s: float
) -> Rendezvous | MpiRendezvous:
    if launch.mpi:
        return MpiRendezvous(
            rank=launch.rank, size=launch.size, epoch=epoch, timeout_s=timeout_s
        )
    if launch.store_host is None or launch.store_port is None:
        raise ConfigError(
            "a job of several ranks needs the launcher's store; "
            f"size={launch.size}, HOROVOD_GLOO_RENDEZVOUS_ADDR={launch.store_host}, "
            f"HOROVOD_GLOO_RENDEZVOUS_PORT={launch.store_port}. Launch with "
            f"`horovodrun --gloo -np {launch.size} python script.py`."
        )
    return Rendezvous(
        launch.store_host,
        launch.store_port,
        rank=launch.rank,
        size=launch.size,
        epoch=epoch,
        timeout_s=timeout_s,
    )


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
