"""The other way round: noise, steps and rate for a target ε; budgets; the price of tuning."""
