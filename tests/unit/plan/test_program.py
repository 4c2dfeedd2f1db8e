"""Programs: run by a small interpreter, they compute what the uncut step computes."""

import collections
import itertools
import random

import pytest

from smp_tf.plan.comm import add_messages
from smp_tf.plan.graph import TensorSpec, node_of
from smp_tf.plan.program import (
    RECEIVE_AHEAD,
    Channel,
    Instruction,
    Operation,
    go_together,
    lower_program,
    num_channels,
)
from smp_tf.plan.schedules import build
from smp_tf.plan.state_order import order_state
from tests.unit.plan.example_graphs import (
    Builder,
    analyse,
    chain,
    random_step,
    tied,
    with_metric,
)

FIRST_CHANNEL = 100
SEND = Operation.SEND


def programs(plan, name="interleaved", microbatches=3, active=3, piece_of=None):
    pipeline = plan.pipeline()
    schedule = add_messages(build(name, pipeline, microbatches, active), pipeline)
    return [
        lower_program(
            plan, schedule, rank, microbatches, FIRST_CHANNEL, piece_of or {}
        )
        for rank in range(plan.num_partitions)
    ]


# --- the truth: symbolic values of the uncut graph ------------------------------------


def value_of(graph, name, given, mb, known):
    """A node's value as the hash of all that went into it."""
    if name in given:
        return given[name]
    if name not in known:
        node = graph.by_name[name]
        if name in graph.captures:
            known[name] = hash(("capture", name))
        elif f"{name}:0" in graph.arguments:
            known[name] = hash(("argument", name, mb))
        else:
            known[name] = hash(
                (
                    name,
                    *(
                        (value_of(graph, node_of(t), given, mb, known), t[-1])
                        for t in node.inputs
                    ),
                )
            )
    return known[name]


def run(step, plan, all_programs, order):
    """Interpret the programs of all ranks; returns made[rank][mb][tensor].

    ``order`` shuffles which rank goes on: the result must not depend on it.
    """
    graph = step.graph
    made = [
        [{} for _ in range(p.num_microbatches)] for p in all_programs
    ]
    links, position = {}, [0] * len(all_programs)
    posted = [set() for _ in all_programs]
    while True:
        ready = []
        for rank, program in enumerate(all_programs):
            if position[rank] < len(program.instructions):
                i = program.instructions[position[rank]]
                is_waiting = i.operation is Operation.WAIT
                if not is_waiting or i.channel.number in links:
                    ready.append((rank, i))
        if not ready:
            break
        rank, i = order.choice(ready)
        position[rank] += 1
        here = made[rank][i.mb]
        if i.operation is Operation.POST:
            assert i.channel.number not in posted[rank]
            posted[rank].add(i.channel.number)
        elif i.operation is Operation.SEND:
            assert i.channel.number not in links, "a channel number is used twice"
            links[i.channel.number] = (rank, i.channel, here[i.channel.tensor])
        elif i.operation is Operation.WAIT:
            assert i.channel.number in posted[rank], "waited for without a post"
            source, sent, value = links[i.channel.number]
            assert (source, sent.peer) == (i.channel.peer, rank)
            assert (sent.tensor, sent.spec) == (i.channel.tensor, i.channel.spec)
            here[i.channel.tensor] = value
        else:
            call(graph, plan.segments[i.stage], rank, here, i.mb)
    done = [len(p.instructions) for p in all_programs]
    assert position == done, "the ranks wait for each other"
    return made


def call(graph, segment, rank, here, mb):
    assert segment.partition == rank
    given = {node_of(t): here[t] for t in segment.inputs}
    known, nodes = {}, set(segment.nodes)
    allowed = nodes | set(segment.captures) | {node_of(t) for t in segment.arguments}
    for name in segment.nodes:
        for tensor in graph.by_name[name].inputs:
            assert node_of(tensor) in given or node_of(tensor) in allowed
    for tensor in segment.outputs:
        here[tensor] = value_of(graph, node_of(tensor), given, mb, known)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("name", ["interleaved", "simple"])
def test_programs_compute_what_the_uncut_step_computes(seed, name):
    chance = random.Random(seed)
    step = analyse(random_step(seed))
    partitions, microbatches = chance.randint(1, 4), chance.randint(1, 5)
    chosen = [chance.randrange(partitions) for _ in step.atoms.atoms]
    plan = step.cut(chosen, partitions)
    all_programs = programs(plan, name, microbatches, chance.randint(1, 4))
    made = run(step, plan, all_programs, chance)
    for tensor, ranks in plan.return_stage.items():
        for mb in range(microbatches):
            want = value_of(step.graph, node_of(tensor), {}, mb, {})
            for rank in ranks:
                assert made[rank][mb][tensor] == want, (tensor, rank, mb)
    every = [i for p in all_programs for i in p.instructions if i.channel is not None]
    ends = collections.Counter((i.channel.number, i.operation) for i in every)
    assert set(ends.values()) <= {1}
    numbers = {number for number, _ in ends}
    assert len(ends) == 3 * len(numbers)  # SEND, POST and WAIT of each
    first, last = FIRST_CHANNEL, FIRST_CHANNEL + num_channels(plan, microbatches)
    assert numbers == set(range(first, last))


def test_order_of_instructions():
    """1F1B on two ranks, as text: sends directly after calls, posts before waits."""
    first, second = programs(analyse(chain(2)).cut([0, 1]), microbatches=2)
    assert list(map(str, first.instructions)) == [
        "call stage 0 microbatch 0",
        "send stage 0 microbatch 0 dense_0/tanh:0",
        "post stage 1 microbatch 0 loss:0",  # read at the end, but sent first
        "post stage 2 microbatch 0 grad/dense_1/dx:0",
        "call stage 0 microbatch 1",
        "send stage 0 microbatch 1 dense_0/tanh:0",
        "post stage 1 microbatch 1 loss:0",
        "post stage 2 microbatch 1 grad/dense_1/dx:0",
        "wait stage 2 microbatch 0 grad/dense_1/dx:0",
        "call stage 3 microbatch 0",
        "wait stage 2 microbatch 1 grad/dense_1/dx:0",
        "call stage 3 microbatch 1",
        "wait stage 1 microbatch 0 loss:0",
        "wait stage 1 microbatch 1 loss:0",
    ]
    calls = [str(i) for i in second.instructions if i.operation is Operation.CALL]
    assert calls == [
        f"call stage {stage} microbatch {mb}" for mb in range(2) for stage in (1, 2)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_sends_follow_their_call_and_posts_are_no_sooner_than_needed(seed):
    step = analyse(random_step(seed))
    partitions = min(3, len(step.atoms.atoms))
    plan = step.cut([i % partitions for i in range(len(step.atoms.atoms))])
    every = programs(plan, microbatches=4)
    for program in every:
        last_call, previous, calls = None, None, 0
        posted_at, wanted_at = {}, {}
        for i in program.instructions:
            if i.operation is Operation.CALL:
                last_call, calls = (i.stage, i.mb), calls + 1
            elif i.operation is Operation.SEND:
                assert (i.stage, i.mb) == last_call
                assert previous in (Operation.CALL, Operation.SEND)
            elif i.operation is Operation.POST:
                posted_at[i.channel.number] = calls
            else:
                # at most RECEIVE_AHEAD calls between: bounds the buffers
                wanted_at[i.channel.number] = max(calls - RECEIVE_AHEAD, 0)
            previous = i.operation
        for peer in range(partitions):
            sent = numbers(every[peer], Operation.SEND, program.pp_rank)
            for place, number in enumerate(sent):
                # ... but for what must not overtake it
                soonest = min(wanted_at[each] for each in sent[place:])
                assert posted_at[number] == soonest


def numbers(program, operation, peer):
    return [
        i.channel.number
        for i in program.instructions
        if i.operation is operation and i.channel.peer == peer
    ]


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("name", ["interleaved", "simple", "zero_bubble"])
def test_receives_are_posted_in_the_order_of_sends(seed, name):
    """As NCCL needs it, whichever pieces of its segment a tensor comes from."""
    chance = random.Random(seed)
    step = analyse(random_step(seed))
    partitions, microbatches = chance.randint(2, 4), chance.randint(1, 5)
    chosen = [chance.randrange(partitions) for _ in step.atoms.atoms]
    plan = step.cut(chosen, partitions)
    piece_of = {(cut.stage, cut.tensor): chance.randrange(3) for cut in plan.cuts}
    every = programs(plan, name, microbatches, chance.randint(1, 4), piece_of)
    run(step, plan, every, chance)
    for sender in range(partitions):
        for receiver in range(partitions):
            sent = numbers(every[sender], Operation.SEND, receiver)
            posted = numbers(every[receiver], Operation.POST, sender)
            assert sent == posted
            # what one call sends leaves by pieces
            sends = [i for i in every[sender].instructions if i.operation is SEND]
            for _, group in itertools.groupby(
                sends, key=lambda i: (i.stage, i.mb, i.channel.peer)
            ):
                pieces = [piece_of[i.stage, i.channel.tensor] for i in group]
                assert pieces == sorted(pieces)


def groups(program):
    """channel -> channels of the receives that travel with it."""
    found = {}
    for i, after in itertools.zip_longest(
        program.instructions, program.instructions[1:]
    ):
        if i.operation is Operation.POST:
            found.setdefault(i.channel.number, [i.channel.number])
            if after is not None and go_together(i, after):
                found[after.channel.number] = found[i.channel.number]
                found[i.channel.number].append(after.channel.number)
    return found


def random_programs(seed, name):
    chance = random.Random(seed)
    step = analyse(random_step(seed))
    partitions, microbatches = chance.randint(2, 4), chance.randint(1, 5)
    chosen = [chance.randrange(partitions) for _ in step.atoms.atoms]
    plan = step.cut(chosen, partitions)
    return programs(plan, name, microbatches, chance.randint(1, 4))


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("name", ["interleaved", "simple", "zero_bubble"])
def test_ranks_that_wait_for_whole_groups_come_to_the_end(seed, name):
    """On GPUs the end of a group is that of its last message."""
    every = random_programs(seed, name)
    together = [groups(program) for program in every]
    sent, left = set(), [collections.deque(p.instructions) for p in every]

    def is_stuck(rank):
        first = left[rank][0]
        return first.operation is Operation.WAIT and not sent.issuperset(
            together[rank][first.channel.number]
        )

    while goes := [r for r, each in enumerate(left) if each and not is_stuck(r)]:
        instruction = left[goes[0]].popleft()
        if instruction.operation is SEND:
            sent.add(instruction.channel.number)
    assert not any(left)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("name", ["interleaved", "simple", "zero_bubble"])
def test_first_calls_that_need_an_idle_device_come_to_the_end(seed, name):
    """CUDA may load the kernels of a call only once no receive is under way. In a first
    step one begins when it, or one behind it, is waited for (p2p_gpu_kernels.cc)."""
    every = random_programs(seed, name)
    sent, left = set(), [collections.deque(p.instructions) for p in every]
    posted = collections.defaultdict(list)  # (rank, peer) -> not begun
    begun, loaded = [set() for _ in every], set()

    def is_stuck(rank):
        first = left[rank][0]
        loads = first.operation is Operation.CALL and (rank, first.stage) not in loaded
        return loads and not begun[rank] <= sent

    while goes := [r for r, each in enumerate(left) if each and not is_stuck(r)]:
        rank = goes[0]
        i = left[rank].popleft()
        if i.operation is Operation.CALL:
            loaded.add((rank, i.stage))
            continue
        number, held = i.channel.number, posted[rank, i.channel.peer]
        if i.operation is SEND:
            sent.add(number)
        elif i.operation is Operation.POST:
            held.append(number)
        elif number in held:
            place = held.index(number) + 1
            begun[rank].update(held[:place])
            del held[:place]
    assert not any(left)


def test_messages_of_one_call_and_one_rank_go_together():
    spec = TensorSpec("float32", (4,))
    post, wait = Operation.POST, Operation.WAIT
    one = Instruction(post, 1, 0, Channel(0, "a", 2, spec))
    assert go_together(one, Instruction(post, 1, 0, Channel(1, "b", 2, spec)))
    for other in (
        Instruction(wait, 1, 0, Channel(1, "b", 2, spec)),
        Instruction(post, 2, 0, Channel(1, "b", 2, spec)),
        Instruction(post, 1, 1, Channel(1, "b", 2, spec)),
        Instruction(post, 1, 0, Channel(1, "b", 3, spec)),
        Instruction(Operation.CALL, 1, 0),
    ):
        assert not go_together(one, other) and not go_together(other, one)


def test_one_rank_has_calls_only():
    (program,) = programs(analyse(tied()).cut([0, 0]))
    assert {i.operation for i in program.instructions} == {Operation.CALL}
    assert num_channels(analyse(tied()).cut([0, 0]), 3) == 0


# --- state ----------------------------------------------------------------------------


def counting(uses):
    """A counter that is not the model's, written by ``uses`` stages of each rank."""
    b = Builder()
    total = b.variable("total", (), in_model=False)
    x = b.argument("x")
    for i in range(2):
        x, _ = b.dense(f"d{i}", x, b.variable(f"w{i}"))
        if i < uses:
            b.write(f"count{i}", "AssignAddVariableOp", total, x)
            b.effects.append(f"count{i}")
    b.returns.append(x)
    return b.build()


def order(step, partitions, microbatches, forwards_first=False):
    plan = step.cut(partitions)
    return order_state(
        step.graph, plan, microbatches, forwards_first=forwards_first
    ).segments


def test_state_used_in_one_stage_of_each_rank_waits_for_nothing():
    for step in (analyse(with_metric()), analyse(counting(1))):
        assert not any(s.after for s in order(step, [0, 1], 4, forwards_first=True))


def test_state_used_in_two_stages_of_a_rank_keeps_the_order_of_microbatches():
    """count1 must wait on rank 0 for rank 1: a second stage there."""
    step = analyse(counting(2))
    segments = order(step, [0, 1], 2)
    first = next(s for s in segments if s.after)
    last = segments[first.after[0]]
    assert first.partition == last.partition == 0 and first.stage in last.needs
    assert not any(s.after for s in order(step, [0, 1], 1))
    assert not any(s.after for s in order(step, [0, 0], 4))


def test_state_that_is_only_read_is_fine():
    step = analyse(tied())  # embedding is used in four stages of rank 0
    assert not any(s.after for s in order(step, [0, 1], 4, forwards_first=True))
