"""Pixels: saving, seeds, guidance, null conditions, SD 1.5 and SDXL at toy size, learning."""

import json
from dataclasses import replace

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor

from lavit.config import InputError, PixelsConfig, from_json, to_json
from lavit.pixels.condition import GridCondition
from lavit.pixels.decoder import Pixels
from lavit.pixels.denoiser import GridDenoiser
from lavit.pixels.diffusion import clean_latents
from lavit.pixels.perceptual import Perceptual

# diffusers' solvers hand torch tensors to np.array, which numpy 2 is unhappy with
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FEATURES, PATCHES = 12, 16
CROSS_BLOCKS = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
SIZES = [
    (64, 64),
    (56, 72),
    (52, 76),
    (48, 84),
    (76, 52),
    (72, 56),
]  # the six aspect ratios, 16 times smaller


@pytest.fixture(autouse=True)
def one_thread():
    """The networks here are too small to share: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def unet(*, kind: str, inputs: int, outputs: int, **options: object) -> dict:
    return {
        "_class_name": kind,
        "in_channels": inputs,
        "out_channels": outputs,
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    } | options


def autoencoder() -> dict:
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [4, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
    }


def grid_config(**changes: object) -> PixelsConfig:
    sizes = {"in_channels": 12 + 6, "out_channels": 12, "width": 8, "depth": 2}
    config = PixelsConfig(
        size=16,
        features_dim=FEATURES,
        patches=PATCHES,
        condition="grid",
        condition_dim=6,
        direction=True,
        unet={"_class_name": "GridDenoiser", **sizes},
        patch=2,
        steps=3,
    )
    return replace(config, **changes)


def sd15_config(**changes: object) -> PixelsConfig:
    network = unet(
        kind="UNet2DConditionModel", inputs=4, outputs=4, cross_attention_dim=10, **CROSS_BLOCKS
    )
    config = PixelsConfig(
        size=32,
        features_dim=FEATURES,
        patches=PATCHES,
        condition_dim=10,
        unconditional="text",
        null_tokens=5,
        unet=network,
        vae=autoencoder(),
        sampler="ddim",
        steps=2,
        guidance=5.0,
    )
    return replace(config, **changes)


def sdxl_config() -> PixelsConfig:
    network = unet(
        kind="UNet2DConditionModel",
        inputs=4,
        outputs=4,
        cross_attention_dim=10 + 14,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 14,
        **CROSS_BLOCKS,
    )
    return PixelsConfig(
        size=64,
        features_dim=FEATURES,
        patches=PATCHES,
        condition="pooled",
        condition_dim=10,
        pooled_dim=14,
        pool_heads=3,
        unconditional="zeros",
        unet=network,
        vae=autoencoder(),
        sampler="ddim",
        steps=2,
        guidance=7.0,
    )


def built(config: PixelsConfig) -> Pixels:
    torch.manual_seed(0)
    pixels = Pixels.build(config).eval()
    for name, tensor in pixels.condition.named_buffers():
        if name == "null_context":
            tensor.normal_()
    for tensor in pixels.unet.parameters():
        if not tensor.any():  # a new block is the identity: nothing would depend on anything
            torch.nn.init.normal_(tensor, std=0.2)
    return pixels


def some_features(images: int, seed: int = 1) -> Tensor:
    return torch.randn(images, PATCHES, FEATURES, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[grid_config, sd15_config, sdxl_config])
def config(request: pytest.FixtureRequest) -> PixelsConfig:
    return request.param()


def test_saved_decoder_paints_the_same_bits_and_opens_in_diffusers(config, tmp_path):
    pixels = built(config)
    if pixels.vae is not None:
        pixels.vae.register_to_config(latents_mean=[0.5] * 4, latents_std=[2.0] * 4)
    before = pixels.sample(some_features(2), seeds=[3, 4])
    pixels.save(tmp_path)
    config = from_json(PixelsConfig, json.loads(json.dumps(to_json(config))))
    assert torch.equal(
        Pixels.load(tmp_path, config).eval().sample(some_features(2), seeds=[3, 4]), before
    )
    kind = type(pixels.unet)
    assert kind is GridDenoiser or kind.__module__.startswith("diffusers.")
    opened = kind.from_pretrained(tmp_path / "unet").state_dict()
    assert all(
        torch.equal(opened[name], tensor) for name, tensor in pixels.unet.state_dict().items()
    )
    assert (
        diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler").config.beta_start == 0.00085
    )
    if config.vae:
        assert (
            len(diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae").config.latents_mean) == 4
        )


def test_loading_is_strict(tmp_path):
    config = grid_config()
    built(config).save(tmp_path)
    with pytest.raises(InputError, match="block_out_channels"):
        Pixels.load(tmp_path, replace(config, unet=config.unet | {"block_out_channels": [8, 24]}))
    with pytest.raises(InputError, match="condition"):
        Pixels.load(tmp_path, replace(config, unconditional="zeros"))
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    del tensors["conv_in.bias"]
    save_file(tensors, weights)
    with pytest.raises(InputError, match=r"conv_in\.bias"):
        Pixels.load(tmp_path, config)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="unet"):
        Pixels.load(tmp_path, config)
    weights.unlink()
    with pytest.raises(InputError, match="unet"):
        Pixels.load(tmp_path, config)


@pytest.mark.parametrize("sampler", ["dpm", "ddim"])
def test_a_picture_depends_on_its_seed_and_not_on_its_batch(config, sampler):
    pixels, features = built(config), some_features(3)
    together = pixels.sample(features, seeds=[5, 6, 5], sampler=sampler)
    alone = pixels.sample(features[1:2], seeds=[6], sampler=sampler)
    torch.testing.assert_close(together[1:2], alone, atol=2e-4, rtol=0)
    other = pixels.sample(features[1:2], seeds=[7], sampler=sampler)
    assert (other - alone).abs().max() > 0.01


def test_stochastic_scheduler_draws_per_picture():
    pixels, features = built(grid_config()), some_features(2)
    sampler = diffusers.EulerAncestralDiscreteScheduler.from_config(pixels.scheduler.config)
    together = pixels.sample(features, seeds=[5, 6], sampler=sampler)
    torch.testing.assert_close(
        together[1:], pixels.sample(features[1:], seeds=[6], sampler=sampler), atol=2e-4, rtol=0
    )


def test_batched_guidance_equals_two_passes(config):
    pixels, features, size = built(config), some_features(2), (8, 8)
    told, null = pixels.condition_of(features, size), pixels.condition.null(2, size)
    latents, time = torch.randn(2, pixels.latent_channels, *size), torch.tensor(300)
    with torch.no_grad():
        one = pixels._guided(latents, time, told.followed_by(null), 3.0)
        with_features = pixels._predict(latents, time, told)
        without = pixels._predict(latents, time, null)
    torch.testing.assert_close(one, without + 3.0 * (with_features - without), atol=1e-4, rtol=1e-4)
    assert (with_features - without).abs().max() > 1e-4


def test_guidance_of_one_runs_no_second_half():
    pixels, rows = built(grid_config()), []
    pixels.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    pixels.sample(some_features(2), seeds=[0, 1], guidance=1.0)
    pixels.sample(some_features(2), seeds=[0, 1], guidance=2.0)
    assert rows == [2] * 3 + [4] * 3


@pytest.mark.parametrize("null_tokens", [5, 20])
def test_padding_behind_the_null_text_is_masked(null_tokens):
    pixels = built(sd15_config(null_tokens=null_tokens))
    null = pixels.condition.null(1, (8, 8))
    told = pixels.condition_of(some_features(1), (8, 8))
    longest = max(null_tokens, PATCHES)
    assert null.context.shape == told.context.shape == (1, longest, 10)
    assert null.valid.sum() == null_tokens and told.valid.sum() == PATCHES
    assert torch.equal(null.context[0, :null_tokens], pixels.condition.null_context)
    assert not null.context[0, null_tokens:].any()
    latents, time = torch.randn(1, 4, 8, 8), torch.tensor(10)
    with torch.no_grad():
        for condition, rows in ((null, null_tokens), (told, PATCHES)):
            short = pixels.unet(latents, time, condition.context[:, :rows]).sample
            torch.testing.assert_close(
                pixels._predict(latents, time, condition), short, atol=1e-5, rtol=1e-5
            )


def test_sdxl_null_is_zeros_and_the_pool_is_clips():
    """The attention pool equals torch's multi-head attention with the mean as the only query."""
    pixels, features = built(sdxl_config()), some_features(2)
    null = pixels.condition.null(2, (8, 8))
    assert null.context.shape == (2, PATCHES, 24) and not null.context.any()
    assert null.pooled.shape == (2, 14) and not null.pooled.any()
    pool = pixels.condition.pool
    rows = (torch.cat([features.mean(1, keepdim=True), features], 1) + pool.positions).transpose(
        0, 1
    )
    parts = (pool.query, pool.key, pool.value)
    expected, _ = torch.nn.functional.multi_head_attention_forward(
        rows[:1],
        rows,
        rows,
        FEATURES,
        3,
        in_proj_weight=None,
        in_proj_bias=torch.cat([part.bias for part in parts]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=pool.out.weight,
        out_proj_bias=pool.out.bias,
        use_separate_proj_weight=True,
        q_proj_weight=pool.query.weight,
        k_proj_weight=pool.key.weight,
        v_proj_weight=pool.value.weight,
        need_weights=False,
    )
    torch.testing.assert_close(pool(features), expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_six_aspect_ratios(size):
    pixels, seen = built(sdxl_config()), []
    pixels.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"]),
        with_kwargs=True,
    )
    pictures = pixels.sample(some_features(1), seeds=[0], size=size)
    assert (
        pictures.shape == (1, 3, *size) and pictures.isfinite().all() and pictures.abs().max() <= 1
    )
    assert seen[0][0].tolist() == [*size, 0, 0, *size] and len(seen[0]) == 2
    assert built(sd15_config()).sample(some_features(1), seeds=[0], size=size).shape == (
        1,
        3,
        *size,
    )


def test_folding_is_exactly_inverted_and_the_autoencoder_standardises():
    pictures = torch.rand(5, 3, 16, 16) * 2 - 1
    folded = built(grid_config())
    assert folded.encode(pictures).shape == (5, 12, 8, 8)
    assert torch.equal(folded.decode(folded.encode(pictures)), pictures)
    pixels = built(sd15_config())
    with torch.no_grad():
        raw = pixels.vae.encode(pictures).latent_dist.mode()
    std, mean = (moment.tolist() for moment in torch.std_mean(raw, dim=(0, 2, 3)))
    pixels.vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0)
    latents = pixels.encode(pictures)
    deviation, mean = torch.std_mean(latents, dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(deviation, torch.ones(4), atol=1e-3, rtol=0)
    with torch.no_grad():
        plain = pixels.vae.decode(pixels.vae.encode(pictures).latent_dist.mode()).sample
    torch.testing.assert_close(pixels.decode(latents), plain, atol=1e-5, rtol=1e-4)


def test_half_precision_autoencoder_decodes_in_full():
    pixels = built(sdxl_config())
    pixels.vae.to(torch.float16)
    assert pixels.decode(torch.randn(1, 4, 8, 8, dtype=torch.float16)).dtype == torch.float16
    assert pixels.vae.dtype == torch.float32


@pytest.mark.parametrize("weighting", ["equal", "min-snr"])
def test_loss_falls_on_eight_pictures_and_its_gradient_reaches_all(weighting):
    pixels = built(grid_config(weighting=weighting)).train()
    noise = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(2)) * 2 - 1
    latents, features = (
        pixels.encode(torch.nn.functional.interpolate(noise, (16, 16))),
        some_features(8),
    )

    def mean_loss() -> float:
        with torch.no_grad():
            return (
                sum(
                    pixels(latents, features, generator=torch.Generator().manual_seed(s)).item()
                    for s in range(8)
                )
                / 8
            )

    first, generator = mean_loss(), torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW(pixels.parameters(), lr=1e-2)
    for _ in range(120):
        loss = pixels(latents, features, generator=generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert mean_loss() < 0.6 * first
    pixels(latents.repeat(8, 1, 1, 1), features.repeat(8, 1, 1), generator=generator).backward()
    assert all(p.grad is not None and p.grad.any() for p in pixels.parameters())


def test_each_latent_on_a_patch_has_a_projection_of_its_own():
    """2 x 2 latents a patch where the map fits; other sizes resize the same map."""
    head = GridCondition(grid_config())
    features = some_features(2)
    side = round(PATCHES**0.5)
    grid = head(features, (2 * side, 2 * side)).grid
    for row, column in ((0, 0), (1, 0), (1, 1)):
        own = torch.arange(6) * 4 + 2 * row + column
        found = F.linear(features, head.to_map.weight[own], head.to_map.bias[own])
        expected = found.transpose(1, 2).unflatten(2, (side, side))
        assert torch.allclose(grid[:, :, row::2, column::2], expected, atol=1e-6)
    wide = head(features, (2 * side, 3 * side)).grid
    assert torch.equal(wide, F.interpolate(grid, (2 * side, 3 * side), mode="bilinear"))


def test_dropped_conditions_hide_the_features(config):
    config = replace(config, condition_dropout=1.0)
    pixels, latents = built(config), torch.randn(3, 12 if config.condition == "grid" else 4, 8, 8)
    losses = [
        pixels(latents, some_features(3, s), generator=torch.Generator().manual_seed(0))
        for s in (1, 2)
    ]
    assert losses[0] == losses[1]
    object.__setattr__(config, "condition_dropout", 0.0)
    losses = [
        pixels(latents, some_features(3, s), generator=torch.Generator().manual_seed(0))
        for s in (1, 2)
    ]
    assert losses[0] != losses[1]


def test_direction_ignores_the_length_of_features():
    pixels, features = built(grid_config()), some_features(2)
    one, two = (pixels.condition_of(f, (8, 8)).grid for f in (features, features * 7))
    torch.testing.assert_close(one, two)


def test_velocity_is_a_configuration():
    noise = {
        "_class_name": "DDIMScheduler",
        "prediction_type": "v_prediction",
        "clip_sample": False,
    }
    pixels = built(grid_config(scheduler=noise, weighting="min-snr"))
    latents, features = torch.randn(2, 12, 8, 8), some_features(2)
    with torch.no_grad():
        pixels.unet.conv_out.weight.zero_()
        pixels.unet.conv_out.bias.zero_()
    plain = built(grid_config(scheduler=noise))
    plain.load_state_dict(pixels.state_dict())
    loss = plain(latents, features, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    drawn, times = (
        torch.randn(latents.shape, generator=generator),
        torch.randint(1000, (2,), generator=generator),
    )
    torch.testing.assert_close(
        loss, plain.scheduler.get_velocity(latents, drawn, times).square().mean()
    )
    assert pixels.sample(features, seeds=[0, 1]).isfinite().all()


def test_latents_of_every_step_are_seen_and_may_be_changed():
    pixels, features = built(grid_config()), some_features(1)
    seen = [tuple(latents.shape) for latents in pixels.denoise(features, seeds=[0])]
    assert seen == [(1, 12, 8, 8)] * 3
    run = pixels.denoise(features, seeds=[0])
    other = torch.zeros_like(next(run))
    changed = run.send(other)
    assert not torch.equal(changed, [*pixels.denoise(features, seeds=[0])][1])
    last = [*pixels.denoise(features, seeds=[0])][-1]
    assert torch.equal(pixels.pictures(last), pixels.sample(features, seeds=[0]))


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1001}, "1 to 1000"),
        ({"guidance": -1.0}, "guidance is -1"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"seeds": [1]}, "1 seeds for 2 pictures"),
        ({"size": (16, 17)}, "multiples of 2"),
        ({"sampler": "euler"}, "no sampler 'euler'"),
        ({"features": torch.zeros(2, PATCHES, FEATURES + 1)}, r"expected \[pictures, 16, 12\]"),
        ({"features": torch.zeros(2, PATCHES + 1, FEATURES)}, r"expected \[pictures, 16, 12\]"),
    ],
)
def test_bad_requests_say_what_was_expected(request_, says):
    options = {"features": some_features(2), "seeds": [0, 1]} | request_
    with pytest.raises(InputError, match=says):
        built(grid_config()).sample(**options)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"condition_dim": 7}, "takes 18 channels"),
        ({"patches": 15}, "square number"),
        ({"unconditional": "text"}, "no null text"),
        ({"unet": {"_class_name": "Tree"}}, "unknown unet class 'Tree'"),
        ({"scheduler": {"_class_name": "UNet2DModel"}}, "unknown scheduler class"),
    ],
)
def test_configurations_that_do_not_fit(changes, says):
    with pytest.raises(InputError, match=says):
        Pixels.build(grid_config(**changes))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_clean_latents_are_found_again(kind):
    scheduler = DDIMScheduler(prediction_type=kind)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(4, 3, 8, 8, generator=generator) for _ in range(2))
    times = torch.tensor([0, 10, 300, 600])
    noisy = scheduler.add_noise(clean, noise, times)
    answer = {"epsilon": noise, "sample": clean}.get(
        kind, scheduler.get_velocity(clean, noise, times)
    )
    torch.testing.assert_close(
        clean_latents(scheduler, noisy, answer, times), clean, atol=1e-3, rtol=1e-3
    )


def test_perceptual_distance_tells_blur_from_edge():
    """Two pictures equally far in squared error: the one that keeps the edges is nearer."""
    perceptual = Perceptual()
    sharp = -torch.ones(1, 3, 64, 64)
    sharp[:, :, 16:48, 16:48] = 1
    blurred = torch.nn.functional.avg_pool2d(sharp, 9, 1, 4, count_include_pad=False)
    darker = sharp - (blurred - sharp).square().mean().sqrt() * torch.sign(sharp)
    torch.testing.assert_close((darker - sharp).square().mean(), (blurred - sharp).square().mean())
    assert perceptual(sharp, sharp) == 0
    assert perceptual(darker, sharp) < 0.5 * perceptual(blurred, sharp)
    darker.requires_grad_(True)
    perceptual(darker, sharp).backward()
    assert darker.grad.abs().sum() > 0
