"""MaskDiT and DiT: published check sums, counts, losses written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from shoestring import recipes
from shoestring.config import (
    DecoderConfig,
    NoiseConfig,
    OptimizerConfig,
    SamplingConfig,
    StageConfig,
    TokensConfig,
    TransformerConfig,
)
from shoestring.diffusion.losses import denoising_loss, noisy_reconstruction
from shoestring.diffusion.process import EDMProcess
from shoestring.interfaces import Conditioning, NoiseLevel
from shoestring.models.files import FAMILIES, build_network
from shoestring.models.maskdit import MaskDiT
from shoestring.models.released_config import maskdit_config
from shoestring.models.transformer import DiffusionTransformer, parameter_counts
from shoestring.planning import model_flops
from shoestring.recipes.maskdit import DENSE, MASKDIT, SIZES, dit, maskdit
from shoestring.runtime import Workers
from shoestring.sampling.guidance import GuidedDenoiser
from shoestring.tensors import visible_from_noise
from shoestring.training.schedule import Position
from shoestring.training.step import Learner, TrainingBatch, train_step
from test_fill_values import X, assert_summary, fill

SMALL = maskdit_config(
    dim=32, depth=2, heads=2, patch_size=2, classes=5, decoder=DecoderConfig(depth=2, dim=16, head_dim=8)
)
CONDITIONS = {
    "class": SMALL,
    "text": SMALL.model_copy(update={"condition": "text", "caption_dim": 6}),
    "none": SMALL.model_copy(update={"condition": "none"}),
}
PROCESS = EDMProcess(0.5)


def on_meta(config: TransformerConfig, tokens: TokensConfig | None = None) -> DiffusionTransformer:
    with torch.device("meta"):
        return FAMILIES[config.kind](config, tokens)


def randomized(config: TransformerConfig, tokens: TokensConfig = MASKDIT, seed: int = 0) -> MaskDiT:
    """Every parameter drawn anew: gates that start at zero make any comparison pass."""
    network, generator = MaskDiT(config, tokens), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim in (2, 4) else parameter.shape[-1]
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return network


def condition(config: TransformerConfig) -> Conditioning:
    if config.condition == "text":
        return Conditioning(torch.randn(2, 3, config.caption_dim))
    if config.condition == "class":
        return Conditioning(class_B=torch.tensor([3, config.classes - 1]))
    return Conditioning.nothing(2)


def levels(*sigma: float) -> NoiseLevel:
    return NoiseLevel(torch.ones(len(sigma)), torch.tensor(sigma))


# ------------------------------------------------ published check sums (specification, section 2.4)


@pytest.fixture(scope="module")
def small2() -> MaskDiT:
    """DiT-S/2 with decoder, filled with the specification's numbers."""
    network = on_meta(maskdit("S"), MASKDIT).to_empty(device="cpu")
    assert isinstance(network, MaskDiT)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(0.1 * fill(f"model.{name}", *parameter.shape))
    return network.requires_grad_(False)


LABELS = Conditioning(class_B=torch.tensor([3, 999]))


def test_fill_values_of_the_denoiser(small2):
    denoiser = PROCESS.denoiser(small2)
    out = denoiser(X, levels(0.5, 5.0), LABELS).image()
    assert_summary(
        out, 4.740739e-3, 0.4466257, 2931.815, 0.693407, -0.393158, -0.731762, -0.320725, tolerance=2e-6
    )
    guided = GuidedDenoiser(denoiser, SamplingConfig(guidance=1.5))
    out = guided(X, levels(2.0, 2.0), LABELS).image()
    assert_summary(
        out, 1.088021e-2, 0.3131652, 2060.337, -0.0535331, -0.102075, -0.0864109, -0.116784, tolerance=2e-6
    )


def test_fill_values_of_the_masked_pass(small2):
    visible = visible_from_noise(torch.rand(2, 256, generator=torch.Generator().manual_seed(0)), 0.5)
    denoised = PROCESS.denoiser(small2)(X, levels(0.5, 5.0), LABELS, visible)
    numbers = (1.934473e-2, 0.4462075, 2950.953, 0.938241, 0.0328204, -0.624293, -0.0221796)
    assert_summary(denoised.image(), *numbers, tolerance=2e-6)
    mae_B = noisy_reconstruction(denoised, X)  # the specification takes x itself as the target
    assert mae_B.tolist() == pytest.approx([0.2947551, 1.0365443], rel=2e-6)


@pytest.mark.parametrize(
    ("mask_ratio", "coefficient", "expected"),
    [
        (0.5, 0.0, (4.3585944, 1.9704548)),
        (0.5, 0.1, (4.4357953, 1.9797181)),
        (0.0, 0.1, (4.3488221, 1.9865663)),
    ],
)
def test_fill_values_of_the_loss(small2, mask_ratio, coefficient, expected):
    g = torch.Generator().manual_seed(0)
    normal, noise = torch.randn(2, 1, 1, 1, generator=g).flatten(), torch.randn(X.shape, generator=g)
    visible = visible_from_noise(torch.rand(2, 256, generator=g), mask_ratio)
    level = PROCESS.level_from_normal(normal, NoiseConfig(mean=-1.2, std=1.2))
    tokens = TokensConfig(method="maskdit", reconstruction=coefficient)
    denoiser = PROCESS.denoiser(small2)
    loss_B = denoising_loss(PROCESS, denoiser, X, noise, level, LABELS, visible, tokens=tokens)
    assert loss_B.tolist() == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------------------------------- counts

PUBLISHED = {
    "S": 68_116_880,
    "B": 175_581_968,
    "L": 509_783_056,
    "XL": 730_115_216,
    "H": 1_009_543_440,
}


@pytest.mark.parametrize("size", SIZES)
def test_released_sizes_have_the_published_parameters(size):
    assert parameter_counts(on_meta(maskdit(size), MASKDIT)) == (PUBLISHED[size], PUBLISHED[size])


def test_dit_is_maskdit_without_decoder():
    assert parameter_counts(on_meta(dit("XL"), DENSE))[0] == 674_815_120
    network = on_meta(maskdit("XL"), MASKDIT)
    parts = {"blocks.": 669_344_256, "decoder_blocks.": 53_538_816, "decoder_layer.": 3_246_848}
    for part, count in parts.items():
        own = (p.numel() for name, p in network.named_parameters() if name.startswith(part))
        assert sum(own) == count
    assert len(list(network.parameters())) + 2 == 378  # released entries: position tables are two


@pytest.mark.parametrize(("size", "patch_size"), [("S", 4), ("S", 8), ("B", 8)])
def test_patches_change_the_ends_only(size, patch_size):
    network, fine = on_meta(maskdit(size, patch_size), MASKDIT), on_meta(maskdit(size), MASKDIT)
    changed = {"x_embedder.proj.weight", "final_layer.linear.weight", "final_layer.linear.bias"}
    shapes = {name: p.shape for name, p in fine.named_parameters()}
    assert {name for name, p in network.named_parameters() if p.shape != shapes[name]} == changed


@pytest.mark.parametrize(
    ("config", "tokens", "side", "mask_ratio", "gflop"),
    [
        (maskdit("XL"), MASKDIT, 32, 0.0, 251.55),
        (maskdit("XL"), MASKDIT, 32, 0.5, 130.91),
        (maskdit("XL"), MASKDIT, 32, 0.75, 72.17),
        (maskdit("XL"), MASKDIT, 64, 0.5, 560.33),
        (dit("XL"), DENSE, 32, 0.0, 237.24),
        (dit("XL"), TokensConfig(method="naive"), 32, 0.5, 116.74),
        (dit("XL"), DENSE, 64, 0.0, 1049.04),
    ],
)
def test_flops_are_the_published_ones_and_those_that_torch_counts(config, tokens, side, mask_ratio, gflop):
    grid = (side // 2, side // 2)
    flops = model_flops(config, grid, 0, mask_ratio, tokens)
    # The released class embedding is a product with a one-hot vector, ours a lookup.
    assert flops.forward / 1e9 == pytest.approx(gflop, rel=1e-4)
    network = on_meta(config.model_copy(update={"attention": "explicit"}), tokens)
    with torch.device("meta"):
        visible = visible_from_noise(torch.zeros(1, grid[0] * grid[1]), mask_ratio)
        classes = Conditioning(class_B=torch.zeros(1, dtype=torch.long))
        with FlopCounterMode(display=False) as forward:
            output = network(torch.zeros(1, 4, side, side), torch.zeros(1), classes, visible)
        everything = [output.visible_BKG] + ([output.dropped_BJG] if output.dropped_BJG is not None else [])
        with FlopCounterMode(display=False) as backward:
            torch.cat(everything, dim=1).sum().backward()
    assert forward.get_total_flops() == flops.forward
    assert forward.get_total_flops() + backward.get_total_flops() == pytest.approx(flops.training, rel=1e-3)


def test_recipes_are_the_released_schedules():
    rows = {
        name: [
            (s.mask_ratio, s.steps, s.batch, s.micro_batch, s.resolution, s.lr, s.ema_decay, s.keep_optimizer)
            for s in recipes.get(name).stages
        ]
        for name in ("maskdit-xl2-256", "maskdit-xl2-512", "dit-xl2-256")
    }
    assert rows == {
        "maskdit-xl2-256": [
            (0.5, 2_000_000, 1024, 128, 256, 1e-4, 0.9999, True),
            (0.0, 100_000, 512, 64, 256, 5e-5, 0.9999, False),
        ],
        "maskdit-xl2-512": [
            (0.5, 1_050_000, 1024, 32, 512, 1e-4, 0.9999, True),
            (0.0, 30_000, 512, 16, 512, 5e-5, 0.9999, False),
        ],
        "dit-xl2-256": [(0.0, 2_000_000, 1024, 128, 256, 1e-4, 0.9999, True)],
    }
    for name in rows:
        config = recipes.get(name)
        assert config.optimizer.weight_decay == 0
        assert (config.process.kind, config.process.sigma_data) == ("edm", 0.5)
        assert (config.data.codec, config.data.caption_drop, config.data.split) == (
            "autoencoder-kl",
            0.1,
            "pictures",
        )
        for stage in config.stages:
            assert (stage.noise.mean, stage.noise.std, stage.position_scale) == (-1.2, 1.2, 1.0)
            assert (stage.lr_schedule, stage.warmup_nimg, stage.clip_norm) == ("constant", 0, None)
            assert (stage.ema_start_nimg, stage.ema_rampup, stage.mask_ratio_end) == (0, None, None)


@pytest.mark.parametrize(
    ("name", "parameters", "gflop"),
    [
        ("maskdit-xl2-256", 730_115_216, (392.7, 754.6)),
        ("maskdit-xl2-512", 730_115_216, (1680.9, 3357.0)),
        ("dit-xl2-256", 674_815_120, (711.7,)),
        ("maskdit-b2-text", 212_819_472, (132.0, 214.9)),
        ("maskdit-b2-unconditional", 174_813_968, (109.6, 180.6)),
    ],
)
def test_recipes_cost_what_their_predictions_start_from(name, parameters, gflop):
    config = recipes.get(name)
    with torch.device("meta"):
        assert parameter_counts(build_network(config))[0] == parameters
    for stage, expected in zip(config.stages, gflop, strict=True):
        grid, ratio = (stage.resolution // 16,) * 2, stage.mask_ratio
        flops = model_flops(config.model, grid, config.data.max_tokens, ratio, config.tokens)
        assert flops.training / 1e9 == pytest.approx(expected, rel=1e-3)


# -------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("decoder", [True, False])
def test_network_starts_at_zero_and_the_denoiser_at_its_skip(name, decoder):
    config = CONDITIONS[name]
    if not decoder:
        config = config.model_copy(update={"decoder": DecoderConfig(depth=0)})
    network = MaskDiT(config, MASKDIT if decoder else DENSE)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(float("nan"))  # whatever initialize forgets
    network.initialize(torch.Generator().manual_seed(0))
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    x = torch.randn(2, 4, 8, 8)
    assert not network(x, torch.zeros(2), condition(config)).visible_BKG.any()
    level = levels(0.3, 4.0)
    skip, _ = NoiseLevel(PROCESS.coefficients(level).skip_B, level.sigma_B).images()
    assert torch.equal(PROCESS.denoiser(network)(x, level, condition(config)).image(), skip * x)


def test_initial_spreads_are_the_released_ones():
    network = MaskDiT(maskdit("S").model_copy(update={"depth": 1}), MASKDIT)
    network.initialize(torch.Generator().manual_seed(0))
    assert network.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert network.t_embedder.linears[0].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert network.mask_token.std().item() == pytest.approx(0.02, rel=0.2)
    qkv = network.blocks[0].attn.qkv.weight
    assert qkv.abs().max().item() == pytest.approx((6 / (384 + 3 * 384)) ** 0.5, rel=1e-3)
    zero = ["decoder_layer.linear", "final_layer.linear", "blocks.0.adaLN_modulation.1"]
    zero += ["decoder_blocks.7.adaLN_modulation.1", "decoder_layer.adaLN_modulation.1"]
    for name in zero:
        assert not network.get_parameter(f"{name}.weight").any(), name
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name


@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("reconstruction", [0.0, 0.1])
def test_every_parameter_gets_a_gradient(name, reconstruction):
    config = CONDITIONS[name]
    tokens = TokensConfig(method="maskdit", reconstruction=reconstruction)
    network = randomized(config, tokens)
    x, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    visible = visible_from_noise(torch.rand(2, 16), 0.5)
    given = (PROCESS, PROCESS.denoiser(network), x, noise, levels(0.5, 2.0), condition(config))
    denoising_loss(*given, visible, tokens=tokens).mean().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.norm() > 0, key


def test_dropped_patches_reach_the_decoder_as_mask_tokens_only():
    network, classes = randomized(SMALL), condition(SMALL)
    visible = torch.tensor([[9, 2, 5], [0, 15, 7]])
    x = torch.randn(2, 4, 8, 8)
    denoiser = PROCESS.denoiser(network)
    before = network(x, torch.zeros(2), classes, visible)
    assert torch.equal(before.visible_BK, visible)
    assert before.dropped_BJG.shape == (2, 13, 16)
    changed = x.clone()
    changed[0, :, :2, :2] += 5  # patch 0: dropped in the first picture only
    changed[1, :, :2, :2] += 5
    after = network(changed, torch.zeros(2), classes, visible)
    assert torch.equal(before.visible_BKG[0], after.visible_BKG[0])
    assert torch.equal(before.dropped_BJG[0], after.dropped_BJG[0])
    assert not torch.equal(before.dropped_BJG[1], after.dropped_BJG[1])
    with torch.no_grad():
        network.mask_token += 1
        assert not torch.equal(network(x, torch.zeros(2), classes, visible).visible_BKG, before.visible_BKG)
        # Nothing dropped, no mask token; the order in which patches are named does not matter.
        whole = denoiser(x, levels(1.0, 1.0), classes).image()
        shuffled = torch.stack([torch.randperm(16), torch.randperm(16)])
        some = denoiser(x, levels(1.0, 1.0), classes, shuffled).image()
    torch.testing.assert_close(some, whole, rtol=1e-5, atol=1e-5)


def test_the_decoder_can_do_without_any_visible_patch():
    network = randomized(SMALL).eval()
    none = torch.empty(2, 0, dtype=torch.long)
    image = PROCESS.denoiser(network)(
        torch.randn(2, 4, 8, 8), levels(1.0, 2.0), condition(SMALL), none
    ).image()
    assert image.isfinite().all()
    assert image.shape == (2, 4, 8, 8)


# ------------------------------------------------------------------------------------------- losses


def written_out_loss(
    estimate: Tensor, x0: Tensor, xt: Tensor, sigma: float, visible: list[int], tokens: TokensConfig
) -> float:
    """The loss of one picture, patch by patch and value by value, in float64."""
    side, patch = x0.shape[-1], 2
    columns = side // patch
    visible_errors, dropped_errors, reconstructed = [], [], []
    for place in range(columns * columns):
        top, left = place // columns * patch, place % columns * patch
        window = (slice(None), slice(top, top + patch), slice(left, left + patch))
        mine, clean, noisy = (t[window].double().flatten().tolist() for t in (estimate, x0, xt))
        error = sum((a - b) ** 2 for a, b in zip(mine, clean, strict=True)) / len(mine)
        if place in visible:
            visible_errors.append(error)
            continue
        dropped_errors.append(error)
        target = clean
        if tokens.reconstruction_target == "noisy":
            mean = sum(noisy) / len(noisy)
            variance = sum((v - mean) ** 2 for v in noisy) / (len(noisy) - 1)
            target = [(v - mean) / (variance + 1e-6) ** 0.5 for v in noisy]
        reconstructed.append(sum((a - b) ** 2 for a, b in zip(mine, target, strict=True)) / len(mine))
    scored = visible_errors + (dropped_errors if tokens.score_dropped else [])
    weight = (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2
    loss = weight * sum(scored) / len(scored)
    if reconstructed:
        loss += tokens.reconstruction * sum(reconstructed) / len(reconstructed)
    return loss


@pytest.mark.parametrize("target", ["noisy", "clean"])
@pytest.mark.parametrize("score_dropped", [False, True])
@pytest.mark.parametrize("reconstruction", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.9])
def test_loss_is_the_one_written_out(target, score_dropped, reconstruction, ratio):
    tokens = TokensConfig(
        method="maskdit",
        reconstruction=reconstruction,
        reconstruction_target=target,
        score_dropped=score_dropped,
    )
    denoiser = PROCESS.denoiser(randomized(SMALL, tokens))
    x0, noise = 0.5 * torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    sigmas = (0.3, 4.0)
    visible_BK = visible_from_noise(torch.rand(2, 16), ratio)
    level, classes = levels(*sigmas), condition(SMALL)
    with torch.no_grad():
        loss_B = denoising_loss(PROCESS, denoiser, x0, noise, level, classes, visible_BK, tokens=tokens)
        xt = x0 + torch.tensor(sigmas)[:, None, None, None] * noise
        estimate = denoiser(xt, level, classes, visible_BK).image()
    for i, sigma in enumerate(sigmas):
        visible = list(range(16)) if visible_BK is None else visible_BK[i].tolist()
        expected = written_out_loss(estimate[i], x0[i], xt[i], sigma, visible, tokens)
        assert loss_B[i].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("target", ["noisy", "clean"])
def test_a_ratio_that_drops_nothing_divides_by_nothing(target):
    tokens = TokensConfig(method="maskdit", reconstruction=0.1, reconstruction_target=target)
    denoiser = PROCESS.denoiser(randomized(SMALL, tokens))
    assert visible_from_noise(torch.rand(2, 1), 0.9) is None  # at least one patch stays
    x0, noise, level, classes = (
        torch.randn(2, 4, 4, 4),
        torch.randn(2, 4, 4, 4),
        levels(1, 2),
        condition(SMALL),
    )
    without = denoising_loss(PROCESS, denoiser, x0, noise, level, classes, None, tokens=tokens)
    every = torch.tensor([[3, 1, 0, 2], [0, 1, 2, 3]])  # all patches named, none dropped
    named = denoising_loss(PROCESS, denoiser, x0, noise, level, classes, every, tokens=tokens)
    assert without.isfinite().all()
    torch.testing.assert_close(named, without, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONDITIONS)
def test_every_condition_trains(name):
    torch.manual_seed(3)
    config, tokens = CONDITIONS[name], MASKDIT
    network = MaskDiT(config, tokens)
    network.initialize(torch.Generator().manual_seed(0))
    learner = Learner.build(network, tokens, PROCESS, OptimizerConfig(weight_decay=0.0), Workers(1))
    batch = TrainingBatch(
        x0=0.5 * torch.randn(2, 4, 8, 8),
        conditioning=condition(config).drop(torch.tensor([False, True])),
        noise=torch.randn(2, 4, 8, 8),
        level_B=torch.zeros(2),
        mask_BL=torch.rand(2, 16),
    )
    stage = StageConfig(name="s", nimg=2, batch=2, lr=3e-3, noise=NoiseConfig(mean=-1.2, std=1.2))
    here = Position(0, stage, 0, 0, 0)
    ratios = [0.5] * 25 + [0.0] * 25
    losses = [train_step(learner, batch, 2, 3e-3, ratio, here).loss.item() for ratio in ratios]
    assert losses[24] < 0.8 * losses[0]
    assert losses[-1] < 0.9 * losses[25]
