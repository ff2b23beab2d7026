"""What a run costs, before it is run: FLOPs, memory, hours, dollars; and the machine's matmul peak."""

from shoestring.planning.cost import Machine, Measured, StageCost
from shoestring.planning.distillation import distillation_flops
from shoestring.planning.flops import model_flops
from shoestring.planning.flops_unet import Flops
from shoestring.planning.machines import GPU, GPUS, gpu
from shoestring.planning.measure import measured_peak_flops
from shoestring.planning.memory import MemoryForecast, Sharding, fitting_micro_batch, forecast_memory
from shoestring.planning.run import RunPlan, StagePlan, patch_grid, plan
from shoestring.planning.table import plan_table
from shoestring.planning.whole import Plan, whole_plan

__all__ = [
    "GPU",
    "GPUS",
    "Flops",
    "Machine",
    "Measured",
    "MemoryForecast",
    "Plan",
    "RunPlan",
    "Sharding",
    "StageCost",
    "StagePlan",
    "distillation_flops",
    "fitting_micro_batch",
    "forecast_memory",
    "gpu",
    "measured_peak_flops",
    "model_flops",
    "patch_grid",
    "plan",
    "plan_table",
    "whole_plan",
]
