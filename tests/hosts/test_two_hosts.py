"""Two hosts train as one does, over the network between them; its loss is an error.

The job is the digits example, two replicas of two partitions, started by `horovodrun`
over ssh as README says. What `tests.hosts.two_hosts` cannot set up here is a skip.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.hosts.two_hosts import INTERFACE, Host, missing, set_link, two_hosts
from tests.ranks import ROOT

HOSTS = {0: "hostA", 1: "hostA", 2: "hostB", 3: "hostB"}  # of each rank
TIMEOUT_S = 20
START_SECONDS = 120.0  # until all ranks are in the middle of training
RUN_SECONDS = 140.0
END_SECONDS = 20.0  # from the error until nothing runs any more; horovodrun takes 5

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Host]]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with two_hosts(tmp_path_factory.mktemp("hosts")) as running:
        yield running


@dataclasses.dataclass(frozen=True)
class Job:
    """Four ranks that train, started from hostA."""

    hosts: dict[str, Host]
    folder: pathlib.Path
    launcher: subprocess.Popen[bytes]

    def output(self, rank: int) -> str:
        file = self.folder / f"output.{rank}"
        return file.read_text(errors="replace") if file.exists() else ""

    def process(self, rank: int) -> psutil.Process:
        for process in self.hosts[HOSTS[rank]].processes():
            with contextlib.suppress(psutil.Error):
                # Horovod and a shell run others, but none of them with these.
                is_python = process.cmdline()[:1] == [sys.executable]
                if is_python and process.environ().get("HOROVOD_RANK") == str(rank):
                    return process
        raise AssertionError(f"rank {rank} does not run\n{self}")

    def left(self) -> list[psutil.Process]:
        return [left for host in self.hosts.values() for left in host.processes()]

    def wait(self, ready: Callable[[], object], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, f"not in {seconds} s: {what}\n{self}"
            time.sleep(0.1)

    def wait_for_end(self, seconds: float) -> None:
        """The launcher has ended, and nothing of the job runs on either host."""
        self.wait(lambda: self.launcher.poll() is not None, seconds, "its end")
        self.wait(lambda: not self.left(), END_SECONDS, f"nothing left: {self.left()}")

    def wait_for_steps(self) -> None:
        def begun() -> bool:
            assert self.launcher.poll() is None, f"it has ended\n{self}"
            return "epoch 1/" in self.output(0)  # with the bar of its first step

        self.wait(begun, START_SECONDS, "the first step")

    def __str__(self) -> str:
        texts = [self.folder / "launcher", *sorted(self.folder.glob("output.*"))]
        return "\n".join(f"--- {one.name}\n{one.read_text()[-6000:]}" for one in texts)


@contextlib.contextmanager
def training(
    hosts: dict[str, Host],
    folder: pathlib.Path,
    *options: str,
    slots: str = "hostA:2,hostB:2",
    epochs: int = 1000,
    **config: object,
) -> Iterator[Job]:
    """The example while it runs; at the end nothing of it does."""
    python = pathlib.Path(sys.executable)
    rank = [sys.executable, str(ROOT / "tests/hosts/rank_main.py"), str(folder)]
    example = [*rank, "smp_tf.examples.digits", "--partitions", "2"]
    env = {
        "PATH": f"{python.parent}{os.pathsep}{os.defpath}:/usr/sbin:/sbin",
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),  # horovodrun keeps what it found out about hosts there
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_USE_LEGACY_KERAS": "1",
        "SMP_CONFIG": json.dumps({"timeout_s": TIMEOUT_S, **config}),
    }
    launch = [str(python.with_name("horovodrun")), "--gloo", "-np", "4", "-H", slots]
    launch += options
    launcher = hosts["hostA"].start(
        [*launch, *example, "--epochs", str(epochs)], env, folder / "launcher"
    )
    try:
        yield Job(hosts, folder, launcher)
    finally:
        for host in hosts.values():
            host.kill_all()
        launcher.wait()


def test_two_hosts_train_as_one_does(
    hosts: dict[str, Host], tmp_path: pathlib.Path
) -> None:
    """Bit for bit: two replicas add up the same whatever carries their gradients."""
    found = []
    # On two hosts Horovod looks for the network by itself.
    for slots in ("hostA:2,hostB:2", "hostA:4"):
        folder = tmp_path / slots.replace(":", "").replace(",", "-")
        folder.mkdir()
        with training(hosts, folder, slots=slots, epochs=3) as job:
            job.wait_for_end(RUN_SECONDS)
            assert job.launcher.returncode == 0, job
            losses = re.findall(r"epoch \d/3 \[=+\] \S+ loss (\S+)", job.output(0))
            accuracies = re.findall(r"test_accuracy=(\S+) .*replicas=2", job.output(0))
            assert len(losses) == 3 and len(accuracies) == 1, job
            found.append((losses, accuracies))
        if slots == "hostA:4":
            continue
        assert "4 ranks on 2 host(s)" in job.output(0), job
        for rank, peer in itertools.permutations(HOSTS, 2):
            routes = json.loads((folder / f"routes.{rank}").read_text())
            data = routes[str(peer)].partition(";")[0]
            shared = HOSTS[rank] == HOSTS[peer]
            assert ("posix/" in data) == shared, routes
            assert (f"tcp/{INTERFACE}" in data) != shared, routes
    assert found[0] == found[1]
    assert float(found[0][1][0]) > 0.9


def test_a_broken_link_ends_every_rank_by_name(
    hosts: dict[str, Host], tmp_path: pathlib.Path
) -> None:
    """Ranks wait for their replica on the other host in Horovod, which names nobody."""
    options = ["--network-interface", INTERFACE]
    with training(hosts, tmp_path, *options, placement_strategy="cluster") as job:
        job.wait_for_steps()
        set_link(hosts["hostB"], "down")
        try:
            job.wait_for_end(TIMEOUT_S + END_SECONDS)
        finally:
            set_link(hosts["hostB"], "up")
    assert job.launcher.returncode != 0, job
    for rank, host in HOSTS.items():
        others = "".join(str(peer) for peer in HOSTS if HOSTS[peer] != host)
        assert re.search(rf"rank [{others}] died or is cut off", job.output(rank)), job


def test_a_rank_that_is_killed_is_named_on_both_hosts(
    hosts: dict[str, Host], tmp_path: pathlib.Path
) -> None:
    """Here the pipelines cross the network, and each dp_group is on one host."""
    options = ["--network-interface", INTERFACE]
    with training(hosts, tmp_path, *options, placement_strategy="spread") as job:
        job.wait_for_steps()
        job.process(3).kill()
        job.wait_for_end(END_SECONDS)
    assert job.launcher.returncode != 0, job
    for rank in (0, 1, 2):
        assert "rank 3 died" in job.output(rank), job
