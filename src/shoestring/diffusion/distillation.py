"""Losses that teach a model to do in few steps what a teacher does in many.

All are written for levels (alpha, sigma) of any process and for the estimate of x0, so they serve every
network. Where tokens are dropped, teacher and student see the same ones; places that nobody estimates are
taken from the clean picture, so that a step moves them as the forward process would.

Sources: consistency distillation, arXiv 2303.01469; CoDi, arXiv 2310.01407; guided distillation, arXiv
2210.03142; progressive distillation, arXiv 2202.00512; pseudo-Huber distance, arXiv 2310.14189.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from shoestring.diffusion.process import Process, visible_tokens
from shoestring.interfaces import Conditioning, Denoised, Denoiser, NoiseLevel
from shoestring.tensors import Float, Int

Solver = Literal["euler", "heun"]


@dataclass(frozen=True)
class Sample:
    """What a loss looks at."""

    x0: Float[Tensor, "B C H W"]
    noise: Float[Tensor, "B C H W"]
    conditioning: Conditioning
    uniform_B: Float[Tensor, " B"]
    """Chooses the noise level: uniform in [0, 1)."""
    scale_B: Float[Tensor, " B"]
    """Of guidance."""
    visible_BK: Int[Tensor, "B K"] | None = None
    """Tokens that teacher and student see; ``None`` = all."""


def whole_estimate(denoised: Denoised, clean: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """An estimate as pictures; what was not estimated is taken from the clean ones."""
    if denoised.visible_BK is None or denoised.dropped_x0_BJG is not None:
        return denoised.image()
    there = replace(denoised, x0_BKG=torch.ones_like(denoised.x0_BKG)).image()
    return torch.where(there > 0, denoised.image(), clean)


def guided_estimate(
    denoiser: Denoiser,
    xt: Float[Tensor, "B C H W"],
    level: NoiseLevel,
    sample: Sample,
) -> Float[Tensor, "B C H W"]:
    """A denoiser's estimate of x0 under classifier-free guidance, each picture at a scale of its own.

    Args:
        denoiser: a model that takes the scale as an input, or one that is called with and without condition.
        xt: noisy latents.
        level: their noise levels.
        sample: condition, scales, tokens that are seen.

    Returns:
        w + scale (s - w) with s the estimate with the condition and w that without.
    """
    if denoiser.guidance_input:
        asked = replace(sample.conditioning, guidance_B=sample.scale_B)
        return whole_estimate(denoiser(xt, level, asked, sample.visible_BK), sample.x0)
    if bool((sample.scale_B == 1).all()):
        return whole_estimate(denoiser(xt, level, sample.conditioning, sample.visible_BK), sample.x0)
    both = sample.conditioning.cat(sample.conditioning.null())
    twice = NoiseLevel(level.alpha_B.repeat(2), level.sigma_B.repeat(2))
    visible = None if sample.visible_BK is None else sample.visible_BK.repeat(2, 1)
    denoised = denoiser(torch.cat([xt, xt]), twice, both, visible)
    strong, weak = whole_estimate(denoised, sample.x0.repeat(2, 1, 1, 1)).chunk(2)
    return weak + sample.scale_B[:, None, None, None] * (strong - weak)


def ode_step(
    x: Float[Tensor, "B C H W"], x0: Float[Tensor, "B C H W"], level: NoiseLevel, following: NoiseLevel
) -> Float[Tensor, "B C H W"]:
    """Euler's step of the probability-flow ODE (DDIM), each picture between levels of its own."""
    alpha, sigma = level.images()
    alpha_s, sigma_s = following.images()
    return alpha_s * x0 + sigma_s * (x - alpha * x0) / sigma


def teacher_step(
    teacher: Denoiser,
    x: Float[Tensor, "B C H W"],
    level: NoiseLevel,
    following: NoiseLevel,
    sample: Sample,
    solver: Solver,
) -> Float[Tensor, "B C H W"]:
    """One step of the teacher along its guided path.

    Args:
        teacher: estimates x0.
        x: noisy latents at ``level``.
        level: where they are.
        following: where to; sigma may be 0.
        sample: condition, scales, tokens that are seen.
        solver: ``euler``, or ``heun``, which is Euler into sigma 0 (arXiv 2206.00364, algorithm 1).

    Returns:
        Latents at ``following``.
    """
    x0 = guided_estimate(teacher, x, level, sample)
    ahead = ode_step(x, x0, level, following)
    if solver == "euler":
        return ahead
    last_B = following.sigma_B == 0
    safe = NoiseLevel(following.alpha_B, torch.where(last_B, level.sigma_B, following.sigma_B))
    x0_ahead = guided_estimate(teacher, ahead, safe, sample)
    alpha, sigma = level.images()
    alpha_s, sigma_s = safe.images()
    eps = (x - alpha * x0) / sigma
    eps_ahead = (ahead - alpha_s * x0_ahead) / sigma_s
    corrected = x + (alpha_s - alpha) * (x0 + x0_ahead) / 2 + (sigma_s - sigma) * (eps + eps_ahead) / 2
    return torch.where(last_B[:, None, None, None], ahead, corrected)


def path_levels(
    grid: Sequence[tuple[float, float]], uniform_B: Float[Tensor, " B"], stride: int
) -> tuple[NoiseLevel, ...]:
    """A random stretch of a grid for every picture: ``stride + 1`` levels one after another.

    Args:
        grid: (alpha, sigma) pairs, noisiest first, ending at (1, 0).
        uniform_B: chooses among the stretches, which begin at multiples of ``stride``.
        stride: levels of a stretch beside its first.

    Returns:
        The levels, the noisiest first.
    """
    table = torch.tensor(grid, device=uniform_B.device, dtype=uniform_B.dtype)
    stretches = (len(grid) - 1) // stride
    first_B = stride * (uniform_B * stretches).long().clamp(max=stretches - 1)
    return tuple(NoiseLevel(*table[first_B + i].unbind(1)) for i in range(stride + 1))


def _error(denoised: Denoised, target: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """Mean squared error of the visible patches of each picture."""
    wanted = visible_tokens(target, denoised.patch_size, denoised.visible_BK)
    return (denoised.x0_BKG - wanted).square().mean(dim=(1, 2))


def _asked(sample: Sample, student: Denoiser) -> Conditioning:
    """The student's condition: with the scale of guidance where that is an input."""
    return (
        replace(sample.conditioning, guidance_B=sample.scale_B)
        if student.guidance_input
        else (sample.conditioning)
    )


@torch.no_grad()
def _end_of_path(
    target: Denoiser, x: Float[Tensor, "B C H W"], level: NoiseLevel, asked: Conditioning, sample: Sample
) -> Float[Tensor, "B C H W"]:
    """Where the path through ``x`` ends, as the target says; ``x`` itself where it is there already."""
    there_B = level.sigma_B == 0
    safe = NoiseLevel(level.alpha_B, torch.where(there_B, torch.ones_like(level.sigma_B), level.sigma_B))
    x0 = whole_estimate(target(x, safe, asked, sample.visible_BK), sample.x0)
    return torch.where(there_B[:, None, None, None], x, x0)


def consistency_loss(
    process: Process,
    student: Denoiser,
    target: Denoiser,
    teacher: Denoiser,
    sample: Sample,
    grid: Sequence[tuple[float, float]],
    solver: Solver,
    huber: float,
) -> Float[Tensor, " B"]:
    """Consistency distillation: the estimate at a level equals that one teacher's step nearer to the data.

    A denoiser returns its input at sigma 0, so it is a consistency function as it stands; at the last step
    the target is the teacher's own estimate. The pseudo-Huber distance is weighted by :func:`step_weight`,
    the squared one by its square.

    Args:
        process: noise process.
        student: learns.
        target: estimates at the less noisy end; without gradient.
        teacher: makes the step.
        sample: pictures, condition and random numbers.
        grid: levels of the path.
        solver: of the step.
        huber: c of the distance, per value; 0 = squared.

    Returns:
        One number a sample.

    Source: arXiv 2303.01469, algorithm 2; weight and distance: arXiv 2310.14189, section 3.
    """
    level, following = path_levels(grid, sample.uniform_B, 1)
    xt = process.add_noise(sample.x0, sample.noise, level)
    asked = _asked(sample, student)
    with torch.no_grad():
        xs = teacher_step(teacher, xt, level, following, sample, solver)
    wanted = _end_of_path(target, xs, following, asked, sample)
    error_B = _error(student(xt, level, asked, sample.visible_BK), wanted)
    return _distance(error_B, huber, step_weight(level, following))


def step_weight(level: NoiseLevel, following: NoiseLevel) -> Float[Tensor, " B"]:
    """What the distance at a step of the path counts: 1 / (t - t').

    With alpha 1 (EDM) t is sigma, as published. Other processes begin where the signal is gone, or nearly so,
    and t is sigma / (alpha + sigma), the time of flow matching: the ratio of the two would leave the first
    step, from which every picture starts, no weight.

    Args:
        level: where the step begins.
        following: where it ends.

    Returns:
        Positive numbers.
    """

    def time(at: NoiseLevel) -> Tensor:
        bounded_B = at.sigma_B / (at.alpha_B + at.sigma_B)
        return torch.where((level.alpha_B == 1) & (following.alpha_B == 1), at.sigma_B, bounded_B)

    return 1 / (time(level) - time(following))


def _distance(error_B: Tensor, huber: float, weight_B: Tensor) -> Tensor:
    if not huber:
        return weight_B.square() * error_B
    return weight_B * ((error_B + huber**2).sqrt() - huber)


def codi_loss(
    process: Process,
    student: Denoiser,
    target: Denoiser,
    sample: Sample,
    grid: Sequence[tuple[float, float]],
    huber: float,
    data_weight: float,
) -> Float[Tensor, " B"]:
    """Conditional diffusion distillation: the same noise is seen at both ends of the model's own step.

    There is no teacher beside the initial weights. The step from t to s is DDIM's with the model's own
    estimate; the noise seen at s is (alpha_s / sigma_s) (x0(t) - x0(s)) away from that seen at t. The second
    term is the distance to the data, weighted as in training.

    Args:
        process: noise process.
        student: learns.
        target: estimates at the less noisy end; without gradient.
        sample: pictures, condition and random numbers.
        grid: levels of the path; its last, sigma 0, has no noise to see and is left out.
        huber: c of the distance in the noise, per value; 0 = squared.
        data_weight: of the second term.

    Returns:
        One number a sample.

    Source: arXiv 2310.01407, as we read it; the paper's weights and schedules are not published.
    """
    level, following = path_levels(grid[:-1], sample.uniform_B, 1)
    xt = process.add_noise(sample.x0, sample.noise, level)
    asked = _asked(sample, student)
    denoised = student(xt, level, asked, sample.visible_BK)
    with torch.no_grad():
        xs = ode_step(xt, whole_estimate(denoised, sample.x0), level, following)
    wanted = _end_of_path(target, xs, following, asked, sample)
    loss_B = _distance(_error(denoised, wanted), huber, following.alpha_B / following.sigma_B)
    return loss_B + data_weight * process.weight(level) * _error(denoised, sample.x0)


def guided_loss(
    process: Process, student: Denoiser, teacher: Denoiser, sample: Sample, level: NoiseLevel
) -> Float[Tensor, " B"]:
    """Guided distillation, first stage: the teacher's guided estimate in one pass, at any scale.

    Args:
        process: noise process.
        student: takes the scale as an input.
        teacher: called with and without the condition.
        sample: pictures, condition and random numbers.
        level: noise levels, drawn as in training.

    Returns:
        One number a sample.

    Source: arXiv 2210.03142, algorithm 1.
    """
    xt = process.add_noise(sample.x0, sample.noise, level)
    with torch.no_grad():
        wanted = guided_estimate(teacher, xt, level, sample)
    denoised = student(xt, level, _asked(sample, student), sample.visible_BK)
    return process.weight(level) * _error(denoised, wanted)


def progressive_loss(
    process: Process,
    student: Denoiser,
    teacher: Denoiser,
    sample: Sample,
    grid: Sequence[tuple[float, float]],
    sigma_data: float,
) -> Float[Tensor, " B"]:
    """Progressive distillation: one DDIM step of the student goes where two of the teacher go.

    From the latents z_s after the teacher's two steps follows the estimate whose single step leads there:
    x = (z_s - r z_t) / (alpha_s - r alpha_t) with r = sigma_s / sigma_t. Its squared error is weighted by
    max(1, SNR).

    Args:
        process: noise process.
        student: learns.
        teacher: makes two steps, guided.
        sample: pictures, condition and random numbers.
        grid: the teacher's levels, an even number of steps; the student has every other one.
        sigma_data: deviation of the data, of which the signal-to-noise ratio is taken.

    Returns:
        One number a sample.

    Source: arXiv 2202.00512, algorithm 2 and section 4 (truncated SNR weighting).
    """
    level, between, following = path_levels(grid, sample.uniform_B, 2)
    zt = process.add_noise(sample.x0, sample.noise, level)
    with torch.no_grad():
        zu = teacher_step(teacher, zt, level, between, sample, "euler")
        zs = teacher_step(teacher, zu, between, following, sample, "euler")
        alpha_t, sigma_t = level.images()
        alpha_s, sigma_s = following.images()
        ratio = sigma_s / sigma_t
        wanted = (zs - ratio * zt) / (alpha_s - ratio * alpha_t)
    denoised = student(zt, level, _asked(sample, student), sample.visible_BK)
    snr_B = (level.alpha_B * sigma_data / level.sigma_B).square()
    return snr_B.clamp(min=1) * _error(denoised, wanted)
