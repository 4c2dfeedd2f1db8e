"""Pipelines that the tests of schedules share."""

import dataclasses
import random

from smp_tf.plan.action import Kind, Message, Pipeline, Stage


def ring(num_ranks, head_seconds=1.0):
    """Tied embeddings: rank 0 holds the first forward stage and the last one.

    ring(2) visits F@0 F@1 F@0 B@0 B@1 B@0.
    """
    visits = [*range(num_ranks), 0]
    seconds = [1.0] * num_ranks + [head_seconds]
    stages = [
        Stage(Kind.F, rank, (index - 1,) if index else (), seconds[index])
        for index, rank in enumerate(visits)
    ]
    for index in reversed(range(len(visits))):
        later = (len(stages) - 1,) if index < len(visits) - 1 else ()
        stages.append(Stage(Kind.B, visits[index], (index, *later), seconds[index]))
    return Pipeline.from_stages(stages, num_ranks)


def two_towers():
    """Two towers on ranks 0 and 1, joined on rank 2; the loss returns to 0 and 1.

    F@0  F@1
      \\  /
      F@2 -> B@2
            /  \\
          B@0  B@1
    """
    stages = [
        Stage(Kind.F, 0),
        Stage(Kind.F, 1),
        Stage(Kind.F, 2, (0, 1)),
        Stage(Kind.B, 2, (2,)),
        Stage(Kind.B, 0, (0, 3)),
        Stage(Kind.B, 1, (1, 3)),
    ]
    return Pipeline.from_stages(stages, 3, returns=[Message(2, 0), Message(2, 1)])


def towers_on_one_rank():
    """Both towers on rank 0, with costs that drive them apart."""
    stages = [
        Stage(Kind.F, 0, (), 1.0),
        Stage(Kind.F, 1, (0,), 4.0),
        Stage(Kind.F, 0, (), 1.0),
        Stage(Kind.F, 1, (1, 2), 1.0),
        Stage(Kind.B, 1, (3, 1), 2.0),
        Stage(Kind.B, 0, (0, 4), 1.0),
        Stage(Kind.B, 0, (2, 4), 1.0),
    ]
    return Pipeline.from_stages(stages, 2)


def forward_only(num_ranks):
    """Evaluation: a chain without backward."""
    stages = [
        Stage(Kind.F, rank, (rank - 1,) if rank else ()) for rank in range(num_ranks)
    ]
    return Pipeline.from_stages(stages, num_ranks)


def random_pipeline(seed):
    """Make a random pipeline: any graph of stages, any rank, any cost.

    Some forward stages have no backward (metrics), some backwards read no
    activation of their own rank, some ranks may have no stage at all.
    """
    draw = random.Random(seed)
    num_ranks = draw.randint(1, 6)
    stages = []
    for index in range(draw.randint(1, 9)):
        needs = draw.sample(range(index), min(index, draw.choice([0, 1, 1, 1, 2, 3])))
        seconds = draw.choice([0.0, 0.3, 1.0, 1.0, 2.5])
        stages.append(
            Stage(Kind.F, draw.randrange(num_ranks), tuple(sorted(needs)), seconds)
        )
    forwards = len(stages)
    backward_of = {}
    for index in reversed(range(forwards if draw.random() < 0.9 else 0)):
        if draw.random() < 0.2:
            continue
        needs = {
            back for other, back in backward_of.items() if index in stages[other].needs
        }
        if not needs or draw.random() < 0.8:
            needs.add(index)
        backward_of[index] = len(stages)
        stages.append(
            Stage(
                Kind.B,
                stages[index].rank,
                tuple(sorted(needs)),
                draw.choice([0.0, 0.5, 2.0, 2.0]),
            )
        )
    returns = {
        Message(stage, peer)
        for stage in range(len(stages))
        for peer in range(num_ranks)
        if peer != stages[stage].rank and draw.random() < 0.1
    }
    return Pipeline.from_stages(stages, num_ranks, returns)


def with_message_seconds(pipeline, seconds):
    """Give every message a time: a number, or a function of the message."""
    return dataclasses.replace(
        pipeline,
        messages=tuple(
            dataclasses.replace(
                message, seconds=seconds(message) if callable(seconds) else seconds
            )
            for message in pipeline.messages
        ),
    )


def split_backwards(pipeline, is_split=lambda stage: True):
    """Split each B into I and W of the same seconds each; who needed B needs I."""
    stages, place = [], {}
    for index, stage in enumerate(pipeline.stages):
        needs = tuple(place[need] for need in stage.needs)
        place[index] = len(stages)
        if stage.kind is not Kind.B or not is_split(index):
            stages.append(dataclasses.replace(stage, needs=needs))
            continue
        stages.append(dataclasses.replace(stage, kind=Kind.I, needs=needs))
        own = {n for n in needs if not stages[n].kind.is_backward}
        own = {n for n in own if stages[n].rank == stage.rank}
        weight_needs = (*sorted(own), place[index])
        stages.append(Stage(Kind.W, stage.rank, weight_needs, stage.seconds))
    returns = [
        dataclasses.replace(message, stage=place[message.stage])
        for message in pipeline.messages
    ]
    return Pipeline.from_stages(stages, pipeline.num_ranks, returns)


def measured(num_ranks):
    """Seconds like those of a machine; nobody waits for rank 0, so it has one B.

    measured(2) has 0:F@0 1:F@1 2:I@1 3:W@1 4:B@0.
    """
    chain = Pipeline.chain(num_ranks, 52.0, 109.0, 48.0)
    stages = chain.stages[:-2] + (
        dataclasses.replace(chain.stages[-2], kind=Kind.B, seconds=157.0),
    )
    return Pipeline.from_stages(stages, num_ranks)


def uneven(seed, num_ranks, is_split):
    """Make a chain of which every stage takes 1 to 9 seconds."""
    draw = random.Random(seed)
    chain = Pipeline.chain(num_ranks, weight_seconds=1.0 if is_split else None)
    stages = [
        dataclasses.replace(stage, seconds=float(draw.randint(1, 9)))
        for stage in chain.stages
    ]
    return Pipeline.from_stages(stages, num_ranks)


def skips(num_ranks):
    """Make a chain in which every F reads all F before it, and so back."""
    chain = Pipeline.chain(num_ranks, 1.0, 2.0)
    stages = []
    for index, stage in enumerate(chain.stages):
        start = 0 if stage.kind is Kind.F else num_ranks
        needs = {*stage.needs, *range(start, index)}
        stages.append(dataclasses.replace(stage, needs=tuple(sorted(needs))))
    return Pipeline.from_stages(stages, num_ranks)


def random_pipeline_of_all_kinds(seed, name="simple"):
    """Make a random pipeline with messages that take time, and some I and W.

    Variables that the step writes make some stages wait for others of their rank.
    `simple` cannot let a forward wait for a backward of the microbatch before.
    """
    draw = random.Random(seed)
    pipeline = random_pipeline(seed)
    pipeline = split_backwards(pipeline, lambda stage: draw.random() < 0.6)
    stages = list(pipeline.stages)
    for index, stage in enumerate(stages):
        others = [
            other
            for other, given in enumerate(stages)
            if given.rank == stage.rank
            and (name != "simple" or given.kind.is_backward <= stage.kind.is_backward)
        ]
        if draw.random() < 0.2:
            stages[index] = dataclasses.replace(stage, after=(draw.choice(others),))
    pipeline = dataclasses.replace(pipeline, stages=tuple(stages))
    times = [0.0, 0.0, 0.4, 1.0, 3.0]
    return with_message_seconds(pipeline, lambda message: draw.choice(times))
