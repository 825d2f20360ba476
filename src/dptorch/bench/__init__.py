"""Measure what a private step costs, beside other libraries' and the ordinary one, on one machine.

workloads         models, fixed batches and losses
engines, peers    training engines: ours, other libraries', the ordinary step
timing, memory    measure one workload
exactness         compare an engine's gradient with a loop
suite             goes through workloads and engines
cost_page         writes the results
cost_plots        draws them
"""
