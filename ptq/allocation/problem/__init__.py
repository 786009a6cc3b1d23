"""The allocation problem: formats and their errors, what they cost, groups and limits, budgets, solvers."""
