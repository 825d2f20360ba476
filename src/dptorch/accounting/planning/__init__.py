"""Planning: noise, steps and sampling rate for a target ε; budgets; what tuning costs."""
