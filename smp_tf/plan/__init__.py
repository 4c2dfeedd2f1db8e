"""Decisions as data: what runs where and in which order. No TensorFlow here.

Everything in this package is an immutable value made by a pure function, so that
it prints, compares, and can be tested with a literal. Two sides share nothing but
the vocabulary of `pipeline`, and meet in `program` and `plan_step`:

    graph, roles, atoms, cost, problem, partition, segment     what runs where
    action, schedules, comm, dry_run, check                    in which order

`partition` asks `orders`, `stretches`, `packing`, `downsets` and `refine` for the best
solution of a `problem`. `memory`, `forecast`, `ranking` and `explain` say what a
`step_plan` means.
"""
