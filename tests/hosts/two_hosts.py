"""Two hosts on one machine: namespaces of Linux, joined by a virtual cable.

    this machine           hostA 192.0.2.1          hostB 192.0.2.2
    pytest  --nsenter-->   sshd  [eth0]---veth---[eth0]  sshd
                           [docker0]                [docker0]

Each host has what tells two machines apart: a network, a name, processes, System V
memory, a /dev/shm, and the boot id of its kernel. It also has what misleads programs: a
docker0 of the same address as the other's, which leads nowhere. They share the file
system, as hosts of a cluster do. What a host must have for itself (/etc/hosts, /etc/ssh
and so on) is mounted over it, so that nothing of the machine is changed. All that runs
on a host ends with its first process, its sshd, and that with whoever started it.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence

import psutil

from tests.ranks import ROOT

ADDRESSES = {"hostA": "192.0.2.1", "hostB": "192.0.2.2"}  # reserved for examples
INTERFACE = "eth0"
_DECOY, _DECOY_ADDRESS = "docker0", "172.17.0.1/16"
_SSHD = "/usr/sbin/sshd"  # which sshd insists on being called by its whole path
_PROGRAMS = ("unshare", "nsenter", "setpriv", "mount", "ip", "ssh", "ssh-keygen", _SSHD)
_NAMESPACES = ["--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child"]
_SECONDS = 20.0  # for a host to be ready, and for a command of the set-up

# The first process of a host; $1 is the folder with its files, $2 its name.
_BOOT = f"""
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
if [ -d ~/.ssh ]; then mount -t tmpfs tmpfs ~/.ssh; fi
for file in hosts shadow ssh; do mount --bind "$1/$file" /etc/$file; done
mount --bind "$1/boot_id" /proc/sys/kernel/random/boot_id
echo "$2" >/proc/sys/kernel/hostname
ip link set lo up
exec {_SSHD} -D -E "$1/sshd.log"
"""
_SSHD_CONFIG = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/../key.pub
StrictModes no
UsePAM no
PidFile none
MaxStartups 100
"""
_SSH_CONFIG = """\
IdentityFile {folder}/../key
IdentitiesOnly yes
BatchMode yes
LogLevel ERROR
UserKnownHostsFile {folder}/known_hosts
"""


def missing() -> str | None:
    """Why two hosts cannot be had here, or None if they can."""
    if os.geteuid() != 0:
        return "hosts made of namespaces need root"
    absent = [program for program in _PROGRAMS if shutil.which(program) is None]
    if absent:
        return (
            f"not installed: {', '.join(absent)}; on Debian: "
            "apt install iproute2 openssh-client openssh-server"
        )
    # Each as it will be used: containers often permit some of this and not the rest.
    tries = [
        ["unshare", *_NAMESPACES, "--mount-proc", "mount", "-t", "tmpfs", "x", "/run"],
        ["unshare", "--net", "ip", "link", "add", "type", "veth"],
    ]
    for command in tries:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        if done.returncode != 0:
            return f"not permitted here: {' '.join(command)}: {done.stderr.strip()}"
    return None


@dataclasses.dataclass(frozen=True)
class Host:
    """One of the hosts; ``pid`` is that of its first process, seen from the machine."""

    name: str
    folder: pathlib.Path
    pid: int

    def start(
        self, command: Sequence[str], env: Mapping[str, str], output: pathlib.Path
    ) -> subprocess.Popen[bytes]:
        """Run a program on the host; its output, both kinds, goes to a file."""
        with output.open("wb") as file:
            return subprocess.Popen(
                ["nsenter", f"--target={self.pid}", "--all", f"--wd={ROOT}", *command],
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def do(self, *command: str) -> None:
        """Run a short command on the host, to the end."""
        _do("nsenter", f"--target={self.pid}", "--all", *command)

    def processes(self) -> list[psutil.Process]:
        """What runs here but for the ssh service, which is the machine's own."""
        return [process for process in self._all() if process.info["name"] != "sshd"]

    def kill_all(self) -> None:
        """Kill everything but the service itself."""
        for process in self._all():
            if process.pid != self.pid:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def _all(self) -> list[psutil.Process]:
        mine = os.stat(f"/proc/{self.pid}/ns/pid").st_ino
        found = []
        for process in psutil.process_iter(["name"]):
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if os.stat(f"/proc/{process.pid}/ns/pid").st_ino == mine:
                    found.append(process)
        return found


@contextlib.contextmanager
def two_hosts(folder: pathlib.Path) -> Iterator[dict[str, Host]]:
    """Bring up both hosts, by name; their files are in ``folder``. Root is needed."""
    _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key"))
    with contextlib.ExitStack() as stack:
        hosts = {
            name: Host(name, folder / name, stack.enter_context(_boot(folder / name)))
            for name in ADDRESSES
        }
        first, second = hosts.values()
        _do(
            *("ip", "link", "add", "name", INTERFACE, "netns", str(first.pid)),
            *("type", "veth", "peer", "name", INTERFACE, "netns", str(second.pid)),
        )
        for host in hosts.values():
            host.do("ip", "link", "add", _DECOY, "type", "veth", "peer", "name", "end")
            host.do("ip", "link", "set", "end", "up")
            devices = {_DECOY: _DECOY_ADDRESS, INTERFACE: f"{ADDRESSES[host.name]}/24"}
            for device, address in devices.items():
                host.do("ip", "address", "add", address, "dev", device)
                host.do("ip", "link", "set", device, "up")
        for host in hosts.values():
            for name in hosts:
                host.do("ssh", "-o", "StrictHostKeyChecking=no", name, "true")
        yield hosts


def set_link(host: Host, state: str) -> None:
    """Plug the cable of the host in ("up") or out ("down")."""
    host.do("ip", "link", "set", INTERFACE, state)


@contextlib.contextmanager
def _boot(folder: pathlib.Path) -> Iterator[int]:
    """Start the first process of a host, without a network yet; yields its number."""
    _write_files(folder)
    with (folder / "boot.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL"),
                *("unshare", *_NAMESPACES, "--mount-proc"),
                *("sh", "-e", "-c", _BOOT, "boot", str(folder), folder.name),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield _first_process(process, folder)
    finally:
        # The child first: as an orphan it would stay a zombie where nobody reaps those.
        for child in psutil.Process(process.pid).children():
            child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS)
        process.kill()
        process.wait()


def _write_files(folder: pathlib.Path) -> None:
    (folder / "ssh").mkdir(parents=True)
    _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key"))
    names = "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
    files = {
        "hosts": f"127.0.0.1 localhost\n{names}",
        "shadow": "root:*:19000:0:99999:7:::\n",  # no password, but not locked
        "boot_id": f"{uuid.uuid4()}\n",
        "ssh/sshd_config": _SSHD_CONFIG.format(folder=folder),
        "ssh/ssh_config": _SSH_CONFIG.format(folder=folder),
    }
    for name, text in files.items():
        (folder / name).write_text(text)


def _first_process(unshare: subprocess.Popen[bytes], folder: pathlib.Path) -> int:
    deadline = time.monotonic() + _SECONDS
    while unshare.poll() is None and time.monotonic() < deadline:
        for child in psutil.Process(unshare.pid).children():
            if child.name() == "sshd":  # it has become it, so all before is done
                return child.pid
        time.sleep(0.02)
    raise RuntimeError(f"no {folder.name}: {(folder / 'boot.log').read_text()}")


def _do(*command: str) -> None:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
