"""Decisions as data: what runs where and in which order. No TensorFlow here.

Everything in this package is an immutable value made by a pure function, so that
it prints, compares, and can be tested with a literal. Two sides share nothing but
the vocabulary of `pipeline`, and meet in `program` and `step_plan`:

    graph, roles, atoms, cost, partition, segment     what runs where
    action, schedules, comm, dry_run, check           in which order
"""
