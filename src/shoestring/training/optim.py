"""Optimisers: which parameter is updated how. Groups are formed by module type and are never empty."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from shoestring.config import OptimizerConfig
from shoestring.models.layers import AdaLN, ClassEmbedding, CrossAttention, SelfAttention, TransformerBlock
from shoestring.models.lora import is_factor
from shoestring.models.moe import ExpertChoice
from shoestring.models.network import BaseNetwork
from shoestring.models.width import Widths
from shoestring.runtime import UserError, Workers
from shoestring.training.muon import Matrices, Muon
from shoestring.training.parallel import local

DECAYED = {"block_matrix", "expert", "matrix"}


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """The role of every parameter, by its name.

    ``block_matrix`` (linear weights inside blocks), ``expert`` (stacked expert matrices), ``matrix`` (other
    linear weights), ``router`` (expert gates), ``embedding`` (class table, mask tokens), ``vector`` (gains
    and biases). Only the first three are decayed. Patch embedding, caption maps and time map are ``matrix``:
    they multiply data, and every step looks at the whole of them. A class table is looked up: decay would
    shrink the rows of rare classes between their pictures. Positions are no parameters.
    """
    roles = {
        name: "matrix" if parameter.ndim >= 2 else "vector" for name, parameter in model.named_parameters()
    }
    for name in roles:
        if name.endswith("mask_token"):
            roles[name] = "embedding"
    for name, module in model.named_modules():
        if isinstance(module, ClassEmbedding):
            roles[f"{name}.embedding_table.weight"] = "embedding"
        if not isinstance(module, TransformerBlock):
            continue
        for inner_name, inner in module.named_modules():
            prefix = f"{name}.{inner_name}"
            if isinstance(inner, ExpertChoice):
                roles[f"{prefix}.w1"] = roles[f"{prefix}.w2"] = "expert"
                roles[f"{prefix}.gate.weight"] = "router"
            elif isinstance(inner, nn.Linear) and roles[f"{prefix}.weight"] == "matrix":
                # The modulation looks at one vector a sample: no hidden layer in Muon's sense.
                modulation = isinstance(module.get_submodule(inner_name.rpartition(".")[0]), AdaLN)
                roles[f"{prefix}.weight"] = "matrix" if modulation else "block_matrix"
    return roles


def fused_parts(model: nn.Module) -> dict[str, int]:
    """How many matrices lie one above the other in a weight, by its name: queries, keys and values."""
    parts = {}
    for name, module in model.named_modules():
        if isinstance(module, SelfAttention):
            parts[f"{name}.qkv.weight"] = 3
        elif isinstance(module, CrossAttention):
            parts[f"{name}.kv_linear.weight"] = 2
    return parts


@dataclass(frozen=True)
class Group:
    """Parameters that are updated alike."""

    role: str
    muon: bool
    lr_scale: float
    weight_decay: float
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[Group]:
    """Sort the trainable parameters into groups.

    With ``model.mup_base_dim`` the learning rate of a matrix whose inputs are r times as many as at the base
    width is divided by r in AdamW, as an aligned update sums over all inputs; in Muon by sqrt(r) under
    ``match_rms_adamw``, whose updates have a spectral norm that grows with the square root of the width, and
    under ``original`` not at all. Weight decay is multiplied by the same: what a step takes away stays.

    Args:
        model: the network.
        config: which optimiser and its constants.

    Returns:
        Groups, none of them empty.

    Raises:
        UserError: if a setting is of parameters that the model does not have.

    Source: Yang et al., arXiv 2203.03466, table 3 (AdamW); arXiv 2310.17813, spectral condition (Muon).
    """
    roles = parameter_roles(model)
    trained = {roles[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    widths = model.widths() if isinstance(model, BaseNetwork) else Widths({}, {})
    if config.expert_lr_scale != 1 and "expert" not in trained:
        raise UserError(
            f"optimizer.expert_lr_scale is {config.expert_lr_scale}, but the model has no experts to train; "
            "use 1"
        )
    groups: dict[tuple[str, float], Group] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        has_width = parameter.ndim >= 2 and not is_factor(name)
        role, ratio = roles[name], widths.inputs_ratio(name) if has_width else 1.0
        muon = config.kind == "muon" and role in {"block_matrix", "expert"}
        if muon:
            ratio = ratio**0.5 if config.muon_adjust == "match_rms_adamw" else 1.0
        if (role, ratio) not in groups:
            scale = (config.expert_lr_scale if role == "expert" else 1.0) / ratio
            decayed = config.decay_everything or role in DECAYED
            groups[role, ratio] = Group(
                role,
                muon,
                scale * (config.muon_lr_scale if muon else 1.0),
                config.weight_decay * ratio if decayed else 0.0,
            )
        groups[role, ratio].parameters[name] = parameter
    assert config.kind != "muon" or any(group.muon for group in groups.values()), "no block has a matrix"
    return list(groups.values())


class Optimizers:
    """AdamW, and Muon beside it where asked for: one object to step, save and schedule.

    All state is there from the start and is changed in place: a checkpoint is loaded by writing into
    :meth:`tensors`. Moments are shared out over the ranks like the weights, and are float32 as they are.

    Args:
        model: whose parameters to update.
        config: which optimiser and its constants.
        workers: threads that share Muon's work.

    Raises:
        UserError: if a setting is of parameters that the model does not have.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, workers: Workers) -> None:
        self.config, self.lr = config, 0.0
        self.groups = parameter_groups(model, config)
        self.parameters = [p for group in self.groups for p in group.parameters.values()]
        self.state: dict[str, dict[str, Tensor]] = {}
        muon = {name: group.muon for group in self.groups for name in group.parameters}
        for name, p in model.named_parameters():
            if name not in muon:
                continue
            if muon[name]:
                self.state[name] = {"momentum_buffer": torch.zeros_like(p, requires_grad=False)}
            else:
                step = torch.zeros((), dtype=torch.float32, device=p.device)
                first, second = (torch.zeros_like(p, requires_grad=False) for _ in range(2))
                self.state[name] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        self.muon: Muon | None = None
        if config.kind == "muon":
            matrices = _matrices(model, [group for group in self.groups if group.muon], self.state)
            self.muon = Muon(
                matrices, config.muon_momentum, config.muon_ns_steps, config.muon_adjust, workers
            )

    def set_lr(self, lr: float) -> None:
        """Set AdamW's learning rate; every group scales it."""
        self.lr = lr

    @torch.no_grad()
    def step(self, found_inf: Tensor | None = None) -> None:
        """Update all parameters that have a gradient, and drop the gradients.

        Args:
            found_inf: a float32 number on the parameters' device, the same on all ranks: 1 = change nothing,
                neither weights nor moments nor step counts. It is not waited for. ``None`` = 0.
        """
        for group in self.groups:
            if not group.muon:
                self._adamw(group, found_inf)
        if self.muon is not None:
            self.muon.step(self.lr, None if found_inf is None else found_inf.bool())
        self.zero_grad()

    def _adamw(self, group: Group, found_inf: Tensor | None) -> None:
        # On this rank's parts: the update is elementwise, and DTensors would only cost time.
        there = {name: p for name, p in group.parameters.items() if p.grad is not None}
        states = [self.state[name] for name in there]
        adamw(
            [local(p) for p in there.values()],
            [local(p.grad) for p in there.values() if p.grad is not None],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            found_inf=found_inf,
            amsgrad=False,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            lr=self.lr * group.lr_scale,
            weight_decay=group.weight_decay,
            eps=self.config.eps,
            maximize=False,
        )

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The live state by ``{parameter name}.{key}``, in the model's order."""
        return {f"{name}.{key}": value for name, state in self.state.items() for key, value in state.items()}


def _matrices(model: nn.Module, groups: list[Group], state: dict[str, dict[str, Tensor]]) -> list[Matrices]:
    """The matrices of groups, sorted by shape and by how they are shared out."""
    parts = fused_parts(model)
    found: dict[tuple[object, ...], Matrices] = {}
    for i, group in enumerate(groups):
        for name, p in group.parameters.items():
            spread = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
            key = (i, tuple(p.shape), parts.get(name, 1), spread)
            if key not in found:
                found[key] = Matrices([], [], parts.get(name, 1), group.lr_scale, group.weight_decay)
            found[key].parameters.append(p)
            found[key].momentum.append(state[name]["momentum_buffer"])
    return list(found.values())
