"""Every private hook into TensorFlow and Keras, and a self-test of each.

=================  ===================================================================
``recording``      what is remembered of a step while it is traced
``graphs``         tracing a graph, leaving graphs and tapes, calling a function often
``initial_values`` variables whose initializer runs later
``self_test``      whether all of them still do what this library needs
=================  ===================================================================

Nothing else in ``smp_tf`` imports what TensorFlow or Keras keep for themselves.
"""
