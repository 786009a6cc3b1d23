"""Which linear gets how many bits: scores of sensitivity, solvers of the allocation problem, and plans."""

from ptq.allocation.job import PlanOptions, make_planner, plan
from ptq.allocation.plan import Plan, read_plan
from ptq.allocation.planner import Planner
from ptq.allocation.use import recipe_from_plan

__all__ = ["Plan", "PlanOptions", "Planner", "make_planner", "plan", "read_plan", "recipe_from_plan"]
