"""Settings of how a run goes: what it writes, what it watches, how many processes share it."""

from __future__ import annotations

from typing import Literal

from shoestring.config.base import Frozen, Positive, setting


class LoggingConfig(Frozen):
    """What is written while training, and how often. Intervals are in images seen."""

    log_nimg: int = setting("a line in log.jsonl and TensorBoard", 2_048, gt=0)
    validate_nimg: int = setting("validation loss on pinned noise, per noise level", 50_000, gt=0)
    validation_images: int = setting("held-out pictures of the validation loss", 64, gt=0)
    sample_nimg: int = setting("a sample grid", 50_000, gt=0)
    kid_nimg: int | None = setting(
        "the kernel distance of drawn pictures to held-out ones (KID); null = never", None, gt=0
    )
    kid_pictures: int = setting("pictures drawn for it", 256, ge=4)
    checkpoint_nimg: int = setting("a checkpoint", 50_000, gt=0)
    keep_checkpoints: int = setting("the last checkpoints kept", 2, ge=1)
    milestone_nimg: int | None = setting(
        "checkpoints at each so many images, and at each stage's end, are kept for good; null = none",
        None,
        gt=0,
    )
    prompts: tuple[str, ...] = setting("captions of the sample grids; empty = from the data", ())
    tensorboard: bool = setting("write TensorBoard files when it is installed", True)
    wandb: str | None = setting(
        "project on Weights & Biases (a package of its own); null = none", None, min_length=1
    )
    trackio: str | None = setting(
        "project in trackio (a package of its own); null = none", None, min_length=1
    )
    usd_per_hour: float = setting("price of the machine, for the cost so far", 0.0, ge=0)


class ParallelConfig(Frozen):
    """How the network is spread over several processes; it does not change what is computed."""

    sharding: Literal["auto", "ddp", "fsdp", "hybrid"] = setting(
        "auto = ddp (a copy on every rank); fsdp: shared out; hybrid: a copy per group of ranks", "auto"
    )
    shard_ranks: int | None = setting("hybrid: ranks that share one copy", None, ge=2)


class GuardConfig(Frozen):
    """What happens when training goes wrong. A step that is not finite never changes anything."""

    max_skips: int = setting("so many steps of a window that are not finite roll the run back", 5, ge=1)
    window: int = setting("steps over which losses are compared, the last quarter with the rest", 128, ge=16)
    warmup: int = setting("first steps of a stage or mask ratio, whose losses are not compared", 128, ge=0)
    spike: Positive = setting("a loss is a spike so many spreads above the usual (of logarithms)", 8.0)
    good_after: int = setting("a checkpoint is good if so many good steps followed it", 64, ge=0)
    max_rollbacks: int = setting("times a diverged run is rolled back before it stops", 3, ge=0)
    lr_cut: float = setting("factor of the learning rate after each roll-back", 0.5, gt=0, le=1)
    dead_step: int = setting("step at which parameters that never had a gradient are named", 20, ge=8)
    stall_s: Positive = setting("seconds without a batch after which the source of the data is named", 60.0)
