"""GPUs that are not there: tf.config and CUDA's driver say what a test wants.

Only the questions and settings that ``smp.init`` uses are faked; nothing computes on
them. The rules of the settings are TensorFlow's: they are refused once it has started.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import tensorflow as tf

from smp_tf.transport import nccl


@dataclasses.dataclass
class FakeGpus:
    """What one process sees.

    Attributes:
        uuids: of the GPUs, in CUDA's order.
        has_started: TensorFlow has been used.
        has_driver: CUDA's driver tells of them as well.
        limited: those that the script has given logical devices.
    """

    uuids: tuple[str, ...]
    has_started: bool = False
    has_driver: bool = True
    limited: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.physical = [
            tf.config.PhysicalDevice(f"/physical_device:GPU:{i}", "GPU")
            for i in range(len(self.uuids))
        ]
        self.visible = list(self.physical)
        self.growth: dict[Any, bool] = {}

    @property
    def seen(self) -> list[int]:
        return [self.physical.index(gpu) for gpu in self.visible]

    @contextlib.contextmanager
    def installed(self) -> Iterator["FakeGpus"]:
        """TensorFlow and the driver tell of these."""
        settings = mock.patch.multiple(
            tf.config,
            list_physical_devices=lambda kind=None: list(self.physical),
            get_visible_devices=lambda kind=None: list(self.visible),
            set_visible_devices=self._set_visible,
            get_logical_device_configuration=self._logical,
            experimental=mock.Mock(
                get_memory_growth=self.growth.get, set_memory_growth=self._set_growth
            ),
        )
        with settings, mock.patch.object(nccl, "_rows", self._rows):
            yield self

    def _set_visible(self, gpus: list[Any], kind: str) -> None:
        assert kind == "GPU"
        if gpus != self.visible and self.has_started:
            raise RuntimeError("Visible devices cannot be modified")
        self.visible = gpus

    def _set_growth(self, gpu: Any, grows: bool) -> None:
        if self.has_started:
            raise RuntimeError("Physical devices cannot be modified")
        assert self.physical.index(gpu) not in self.limited  # a ValueError there
        self.growth[gpu] = grows

    def _logical(self, gpu: Any) -> list[str] | None:
        return ["some"] if self.physical.index(gpu) in self.limited else None

    def _rows(self) -> tuple[tuple[str, ...], ...]:
        why_not = "" if self.has_driver else "it is not there"
        rows = [("cuda", "12040", "", why_not), ("nccl", "0", "", "it is not there")]
        if self.has_driver:
            rows += [
                ("gpu", str(i), "Fake", uuid, f"0:{i}", str(2**34))
                for i, uuid in enumerate(self.uuids)
            ]
        return tuple(rows)
