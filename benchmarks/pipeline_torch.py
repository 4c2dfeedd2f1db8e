"""The processes of `pipeline_speedup.py` that run PyTorch: see `pipeline_teams.py`.

    pipeline_torch.py RANK STORE ADDRESS     a rank; STORE is a file they meet at

The same stack, cut into equal stages by hand, through torch.distributed.pipelining over
Gloo. Rank 0 also runs it uncut, one microbatch after the other.
"""

from __future__ import annotations

import gc
import inspect
import math
import os
import sys
from collections import OrderedDict
from typing import Any

import pipeline_teams as teams

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ["OMP_NUM_THREADS"] = "1"
RANK = int(sys.argv[1])
teams.pin(RANK)

import torch  # isort: skip  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed import pipelining  # noqa: E402
from torch.distributed.pipelining import schedules  # noqa: E402
from torch.nn import functional  # noqa: E402

SEED = 1

# name -> (class, the stages of each rank, all of the same number of blocks)
SCHEDULES = {
    "gpipe": ("ScheduleGPipe", ((0,), (1,))),
    "1f1b": ("Schedule1F1B", ((0,), (1,))),
    "interleaved_1f1b": ("ScheduleInterleaved1F1B", ((0, 2), (1, 3))),
    "zbv": ("ScheduleZBVZeroBubble", ((0, 3), (1, 2))),
}


class Block(torch.nn.Module):
    """As in smp_tf.examples.char_gpt."""

    def __init__(self) -> None:
        super().__init__()
        dim = teams.DIM
        self.norm1 = torch.nn.LayerNorm(dim)
        self.qkv = torch.nn.Linear(dim, 3 * dim)
        self.out = torch.nn.Linear(dim, dim)
        self.norm2 = torch.nn.LayerNorm(dim)
        self.dense1 = torch.nn.Linear(dim, 4 * dim)
        self.dense2 = torch.nn.Linear(4 * dim, dim)
        future = torch.full([teams.LENGTH, teams.LENGTH], -1e9).triu(1)
        self.register_buffer("future", future, persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.norm1(hidden))
        return hidden + self.dense2(functional.gelu(self.dense1(self.norm2(hidden))))

    def attention(self, hidden: torch.Tensor) -> torch.Tensor:
        head_dim = teams.DIM // teams.HEADS
        heads = self.qkv(hidden).unflatten(-1, [3 * teams.HEADS, head_dim])
        query, key, value = heads.transpose(1, 2).chunk(3, dim=1)
        scores = query @ key.transpose(-1, -2) / math.sqrt(head_dim)
        mixed = torch.softmax(scores + self.future, -1) @ value
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Player:
    """`prepare` for a schedule, or for "plain", then `run` it by its name."""

    def __init__(self) -> None:
        torch.manual_seed(SEED)
        # All blocks on both ranks: which ones a rank trains differs by schedule.
        self._blocks = OrderedDict((str(i), Block()) for i in range(teams.BLOCKS))
        self._whole = torch.nn.Sequential(self._blocks)
        self._steps: dict[str, Any] = {}

    def prepare(self, name: str, num_microbatches: int) -> bool:
        """Whether there is such a schedule for so many microbatches."""
        self._steps.pop(name, None)
        gc.collect()
        inputs, targets = map(torch.from_numpy, teams.batch(num_microbatches))
        if name == "plain":
            self._steps[name] = lambda: self._plain(inputs, targets, num_microbatches)
            return True
        kind, places = SCHEDULES[name]
        count = sum(map(len, places))
        stages = [self._stage(index, count) for index in places[RANK]]
        try:
            schedule = getattr(schedules, kind)(
                stages if len(stages) > 1 else stages[0],
                num_microbatches,
                loss_fn=functional.mse_loss,
            )
        except ValueError as error:
            print(f"{name}, {num_microbatches} microbatches: {error}", flush=True)
            return False
        first, last = 0 in places[RANK], count - 1 in places[RANK]
        options: dict[str, Any] = {"target": targets} if last else {}
        if "return_outputs" in inspect.signature(schedule.step).parameters:
            options["return_outputs"] = False

        def step() -> float:
            losses: list[torch.Tensor] = []
            more = {"losses": losses} if last else {}
            schedule.step(*([inputs] if first else []), **options, **more)
            return float(torch.stack(losses).mean()) if last else math.nan

        self._steps[name] = step
        return True

    def run(self, name: str) -> tuple[float, float, float]:
        self._whole.zero_grad(set_to_none=True)
        return teams.timed(self._steps[name])

    def results(self, name: str) -> tuple[float, dict[str, Any]]:
        """Loss, NaN on ranks without it, and gradient of each parameter trained."""
        self._whole.zero_grad(set_to_none=True)
        loss = self._steps[name]()
        return loss, {
            key: parameter.grad.numpy().copy()
            for key, parameter in self._whole.named_parameters()
            if parameter.grad is not None
        }

    def names(self) -> list[str]:
        return [name for name, _ in self._whole.named_parameters()]

    def version(self) -> str:
        return str(torch.__version__)

    def _plain(
        self, inputs: torch.Tensor, targets: torch.Tensor, num_microbatches: int
    ) -> float:
        total = 0.0
        for given, target in zip(
            inputs.chunk(num_microbatches), targets.chunk(num_microbatches)
        ):
            loss = functional.mse_loss(self._whole(given), target) / num_microbatches
            loss.backward()
            total += float(loss)
        return total

    def _stage(self, index: int, count: int) -> Any:
        size = teams.BLOCKS // count
        blocks = list(self._blocks.items())[index * size : (index + 1) * size]
        module = torch.nn.Sequential(OrderedDict(blocks))
        device = torch.device("cpu")
        return pipelining.PipelineStage(module, index, count, device)


def main() -> None:
    _, store, address = sys.argv[1:]
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=RANK, world_size=teams.RANKS
    )
    teams.serve(address, RANK, Player())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
