"""What a private step costs: ours, our peers' and the ordinary one, on the same models and machine.

`workloads.py` says what is trained and `engines.py` and `peers.py` by what; `timing.py` and
`memory.py` measure one workload, `exactness.py` asks whether an engine's gradient is the right one;
`suite.py` goes through them all, `cost_page.py` writes what was found. `dptorch bench` is the command.
"""
