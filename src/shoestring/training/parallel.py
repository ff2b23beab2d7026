"""One process among several: who it is, how the network is spread, and what all must agree on.

Only this file knows DDP and FSDP2. A run of one process goes through the same calls, which then do nothing.
Processes are started by ``torchrun`` or by :mod:`shoestring.training.launch`; both set the environment that
is read here.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from shoestring.config import ParallelConfig, RunConfig
from shoestring.interfaces import Conditioning, Network, NetworkOutput
from shoestring.models.layers import ClassEmbedding
from shoestring.models.moe import ExpertChoice
from shoestring.models.network import BaseNetwork
from shoestring.planning import Sharding
from shoestring.runtime import SaidElsewhere, UserError, pick_device

# All of them are used: it is asked for to keep the buckets as they are.
warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
# Nothing is changed in place there.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

Value = TypeVar("Value")

PATIENCE_S = 1800.0
"""How long a rank waits for the others: the first rank may encode pictures meanwhile."""


class Parallel:
    """This process among those of the run.

    Args:
        config: how the network is spread.
        device: ``auto``, ``cpu``, ``cuda`` or another torch device.

    Raises:
        UserError: if the device is not there, or the ranks do not divide into groups that share a copy.
    """

    def __init__(self, config: ParallelConfig, device: str) -> None:
        self.config = config
        self.rank, self.ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.device = pick_device(self._own_device(device))
        self.control: dist.ProcessGroup | None = None
        self.files: dist.ProcessGroup | None = None
        self._mesh: DeviceMesh | None = None
        self._ddp: DistributedDataParallel | None = None
        self._sharded: FSDPModule | None = None
        self.sharding: Sharding = "single"
        if self.ranks == 1:
            return
        self.sharding = "ddp" if config.sharding == "auto" else config.sharding
        self._check()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        wait = timedelta(seconds=PATIENCE_S)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=wait)
        # What the hosts say to one another must not wait for the devices, nor for a checkpoint on its way.
        self.control = dist.new_group(backend="gloo", timeout=wait)
        self.files = dist.new_group(backend="gloo", timeout=wait)

    def _own_device(self, device: str) -> str:
        """The GPU of a rank is that of its number on its machine; not even a look at another one."""
        ours = device == "auto" or device.startswith("cuda")
        if self.ranks == 1 or not (ours and torch.cuda.is_available()):
            return device
        number, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if number >= gpus:
            raise UserError(
                f"rank {self.rank} is number {number} of its machine, which has {gpus} GPUs; start as many "
                "processes as there are GPUs"
            )
        return f"cuda:{number}"

    def _check(self) -> None:
        share = self.config.shard_ranks
        if self.sharding == "hybrid" and (share is None or self.ranks % share):
            raise self.mistake(
                f"parallel.shard_ranks is {share}; with parallel.sharding=hybrid it must divide the "
                f"{self.ranks} ranks: each group of so many holds one copy of the network"
            )
        if self.sharding != "hybrid" and share is not None:
            raise self.mistake(
                f"parallel.shard_ranks is {share}, but parallel.sharding is {self.config.sharding}; set it "
                "to null, or choose parallel.sharding=hybrid"
            )

    @property
    def first(self) -> bool:
        """Whether this is the rank that talks and writes."""
        return self.rank == 0

    def close(self) -> None:
        """Leave the other processes."""
        if self.ranks > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def copies(self) -> list[list[int]]:
        """Groups of ranks that hold the same: a whole network, or the same part of one."""
        parts = {"ddp": 1, "hybrid": self.config.shard_ranks}.get(self.sharding) or self.ranks
        return [list(range(first, self.ranks, parts)) for first in range(parts)]

    # -- the network -------------------------------------------------------------------------------------

    def spread(self, network: BaseNetwork, precision: torch.dtype) -> Network:
        """Copy the network to the ranks, or share it out among them; the first rank's weights count.

        Args:
            network: on the device, its blocks compiled if they are to be; changed in place where sharded.
            precision: of the products; weights travel in it, gradients in float32.

        Returns:
            What a training step calls; see :meth:`alone` for evaluation.
        """
        if self.ranks == 1:
            return network
        if self.sharding == "ddp":
            cuda = self.device.type == "cuda"
            self._ddp = DistributedDataParallel(
                network,
                device_ids=[self.device.index] if cuda else None,
                gradient_as_bucket_view=True,
                # Else DDP sorts its buckets anew after the first step, and with them the order in which more
                # than two ranks add up: a resumed run would differ from an undisturbed one in the last bits.
                find_unused_parameters=not cuda,
            )
            return _Spread(network, self._ddp)
        for tensor in [*network.parameters(), *network.buffers()]:
            dist.broadcast(tensor.detach(), 0)
        self._shard(network, precision)
        return network

    def alone(self, network: BaseNetwork) -> Network:
        """What evaluation calls, after :meth:`spread`: the network itself.

        Where its weights are shared out, all ranks must call it equally often.
        """
        return network if self._sharded is None else _Spread(network, network)

    def _shard(self, network: BaseNetwork, precision: torch.dtype) -> None:
        self._mesh = mesh = self._device_mesh()
        low = precision if precision == torch.bfloat16 else None
        # Inputs stay as they are: noise levels and the router's are float32; autocast lowers the products.
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        full = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        if next(network.parameters()).dtype == torch.float64:
            policy = full = MixedPrecisionPolicy(cast_forward_inputs=False)
        shards = mesh.size(mesh.ndim - 1)

        def placement(parameter: nn.Parameter) -> Shard:
            return Shard(shard_dimension(tuple(parameter.shape), shards))

        if isinstance(table := getattr(network, "y_embedder", None), ClassEmbedding) and low is not None:
            # A table is no factor of a product: its rows, and the sums of their gradients, stay in float32.
            fully_shard(table, mesh=mesh, mp_policy=full, shard_placement_fn=placement)
        for block in network.all_blocks():
            for module in block.modules():
                if isinstance(module, ExpertChoice) and low is not None:  # the router stays in float32
                    fully_shard(module.gate, mesh=mesh, mp_policy=full, shard_placement_fn=placement)
            fully_shard(block, mesh=mesh, mp_policy=policy, shard_placement_fn=placement)
        # By default the outermost parameters stay whole after a forward pass until the next backward one;
        # what runs beside the steps has none, and averages are written into the parts.
        fully_shard(
            network, mesh=mesh, mp_policy=policy, shard_placement_fn=placement, reshard_after_forward=True
        )
        assert isinstance(network, FSDPModule)
        self._sharded = network

    def _device_mesh(self) -> DeviceMesh:
        kind = self.device.type
        if self.sharding == "fsdp":
            return init_device_mesh(kind, (self.ranks,), mesh_dim_names=("shard",))
        share = self.config.shard_ranks
        assert share is not None
        shape = (self.ranks // share, share)
        return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))

    def put(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Write a whole tensor into a parameter that may be shared out; all ranks have the same value."""
        value = value.to(self.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.detach().copy_(value)

    @contextmanager
    def backward(self, network: nn.Module, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch: gradients travel in the last one only."""
        quiet: AbstractContextManager[Any] = nullcontext()
        if self._ddp is not None and not last:
            quiet = self._ddp.no_sync()
        if self._sharded is not None:
            self._sharded.set_is_last_backward(last)
            self._sharded.set_requires_gradient_sync(last)
        with quiet:
            yield

    def touched(self, network: nn.Module) -> Tensor | float:
        """Zero, made of the parameters that some stages do not use (mask tokens).

        DDP waits for the gradient of every parameter, where it does not look for those without; added to the
        loss, this gives them one of zero.
        """
        if self._ddp is None or self._ddp.find_unused_parameters:
            return 0.0
        rare = [p for name, p in network.named_parameters() if name.endswith("mask_token")]
        return sum((p.sum() * 0 for p in rare), start=torch.zeros((), device=self.device))

    # -- numbers -----------------------------------------------------------------------------------------

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a number over the ranks, on the device."""
        if self.ranks > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.ranks
        return value

    def largest(self, value: int) -> int:
        """The largest of the ranks' integers; hosts only, the devices are not waited for."""
        if self.ranks == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return int(tensor)

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks, in float64."""
        if self.ranks == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return [float(value) for value in tensor]

    def gathered(self, value: Value) -> list[Value]:
        """Every rank's value, in their order; small things only: they are pickled between our processes."""
        if self.ranks == 1:
            return [value]
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What the first rank makes, on every rank.

        Args:
            make: runs on the first rank; others wait.

        Returns:
            Its result everywhere.

        Raises:
            UserError: what ``make`` raises; on the other ranks as :class:`SaidElsewhere`.
        """
        if self.ranks == 1:
            return make()
        box: list[Any] = [None, None]
        error: UserError | None = None
        if self.first:
            try:
                box[0] = make()
            except UserError as mistake:
                error, box[1] = mistake, str(mistake)
        dist.broadcast_object_list(box, 0, group=self.control)
        if error is not None:
            raise error
        if box[1] is not None:
            raise SaidElsewhere(box[1])
        result: Value = box[0]
        return result

    def mistake(self, text: str) -> UserError:
        """A mistake that all ranks have found, to be raised: the first one says it."""
        return UserError(text) if self.first else SaidElsewhere(text)


class _Spread:
    """A network that is called in another way; all else is the network's own.

    Nothing is computed ahead: outside of a forward pass the weights may be in parts.
    """

    def __init__(self, network: BaseNetwork, call: nn.Module) -> None:
        self.call = call
        self.patch_size, self.in_channels = network.patch_size, network.in_channels
        self.predicts_all, self.guidance_input = network.predicts_all, network.guidance_input

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """The condition as it is."""
        return conditioning

    def __call__(
        self,
        x: Tensor,
        time_B: Tensor,
        conditioning: Conditioning,
        visible_BK: Tensor | None = None,
        path_dropped_B: Tensor | None = None,
    ) -> NetworkOutput:
        """See :class:`shoestring.interfaces.Network`."""
        output: NetworkOutput = self.call(x, time_B, conditioning, visible_BK, path_dropped_B)
        return output


def check_batches(config: RunConfig, ranks: int) -> None:
    """Refuse batches that the ranks cannot share evenly.

    Args:
        config: of the run; the batches of its stages are those of all ranks together.
        ranks: processes of the run.

    Raises:
        UserError: naming the first stage.
    """
    for stage in config.stages:
        if stage.batch % ranks:
            raise UserError(
                f"stage {stage.name!r}: batch is {stage.batch}, which {ranks} ranks cannot share evenly; "
                f"choose a multiple of {ranks}, or another number of ranks"
            )


def shard_dimension(shape: tuple[int, ...], shards: int) -> int:
    """Along which dimension a parameter is cut into shards.

    Stacks (of experts) along their widest dimension, so that every rank holds a part of every expert and the
    number of experts need not divide by the ranks; FSDP2 cuts other dimensions than the first evenly only.

    Args:
        shape: of the parameter.
        shards: ranks that share it.

    Returns:
        The widest dimension that divides evenly, for matrices and vectors the first.
    """
    if len(shape) < 3:
        return 0
    even = [d for d in range(len(shape)) if shape[d] % shards == 0]
    return max(even, key=lambda d: (shape[d], -d)) if even else 0


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is shared out, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is shared out, put together on every rank; all ranks must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill_missing_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Zero where a parameter got no gradient (a mask token in steps that drop nothing).

    So that an optimiser treats it in every step alike, on one rank as on many.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
