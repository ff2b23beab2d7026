"""Optimisers: which parameter is updated how. Groups are formed by module type and are never empty."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shoestring.config.schema import OptimizerConfig
from shoestring.models.layers import AdaLN, TransformerBlock
from shoestring.models.moe import ExpertChoice
from shoestring.runtime import UserError, Workers
from shoestring.training.muon import Muon


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """The role of every parameter, by its name.

    ``block_matrix`` (linear weights inside blocks), ``expert`` (stacked expert matrices), ``matrix``
    (other linear weights), ``router`` (expert gates), ``vector`` (gains, biases and mask
    tokens).
    """
    roles = {
        name: "matrix" if parameter.ndim >= 2 and not name.endswith("mask_token") else "vector"
        for name, parameter in model.named_parameters()
    }
    for module_name, module in model.named_modules():
        if not isinstance(module, TransformerBlock):
            continue
        for inner_name, inner in module.named_modules():
            prefix = f"{module_name}.{inner_name}"
            if isinstance(inner, ExpertChoice):
                roles[f"{prefix}.w1"] = roles[f"{prefix}.w2"] = "expert"
                roles[f"{prefix}.gate.weight"] = "router"
            elif isinstance(inner, nn.Linear) and roles[f"{prefix}.weight"] == "matrix":
                # The modulation looks at one vector a sample: no hidden layer in Muon's sense.
                modulation = isinstance(module.get_submodule(inner_name.rpartition(".")[0]), AdaLN)
                roles[f"{prefix}.weight"] = "matrix" if modulation else "block_matrix"
    return roles


class Optimizers:
    """AdamW, and Muon beside it where asked for: one object to step, save and schedule.

    Args:
        model: whose parameters to update.
        config: which optimiser and its constants.
        workers: threads that share Muon's work.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, workers: Workers) -> None:
        self.config = config
        roles = parameter_roles(model)
        by_role: dict[str, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            by_role.setdefault(roles[name], []).append(parameter)
        if config.expert_lr_scale != 1 and "expert" not in by_role:
            raise UserError(
                f"optimizer.expert_lr_scale is {config.expert_lr_scale}, but the model has no experts; use 1"
            )
        muon_roles = {"block_matrix", "expert"} if config.kind == "muon" else set()
        adam_groups, muon_groups = [], []
        for role, parameters in by_role.items():
            scale = config.expert_lr_scale if role == "expert" else 1.0
            group: dict[str, Any] = {"params": parameters, "lr_scale": scale, "role": role}
            if role in muon_roles:
                muon_groups.append(group | {"lr_scale": scale * config.muon_lr_scale})
            else:
                decayed = config.decay_everything or role in {"block_matrix", "expert", "matrix"}
                adam_groups.append(group | {"weight_decay": config.weight_decay if decayed else 0.0})
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                adam_groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
            )
        ]
        if muon_groups:
            self.optimizers.append(
                Muon(
                    muon_groups,
                    lr=0.0,
                    weight_decay=config.weight_decay,
                    momentum=config.muon_momentum,
                    ns_steps=config.muon_ns_steps,
                    adjust=config.muon_adjust,
                    workers=workers,
                )
            )

    def set_lr(self, lr: float) -> None:
        """Set AdamW's learning rate; every group scales it."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

    def step(self) -> None:
        """Update all parameters and drop the gradients."""
        for optimizer in self.optimizers:
            optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """State of every optimiser, in order."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Inverse of :meth:`state_dict`."""
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
