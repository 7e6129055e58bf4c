"""The converter: parity on shipped and generated fixtures, the published folder there and back."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, ViTConfig

import published
from conftest import toy_picture
from lavit.cli import main
from lavit.config import InputError
from lavit.convert import check_fixture, convert_published, convert_reverse, names
from lavit.convert import published as layout
from lavit.convert.smoothing import relative_difference, rows_both_ways, smoothing_effect
from lavit.convert.tensors import read_pickle
from lavit.files import load_tensors, save_tensors
from lavit.model import LaVIT
from lavit.presets import lavit_7b
from lavit.vision.encoder import load_vision

DATA = Path(__file__).parent / "data"
PARITY = DATA / "parity.safetensors"
FULL = json.loads((DATA / "checkpoint_layout.json").read_text())
NAMES = {file: list(tensors) for file, tensors in FULL.items()} | {layout.NULL: [""]}
PREFIX = {"selector": "token_predictor.", "merger": "causal_encoder.", "vq": "quantize."}
FILES = {
    "vit": layout.EVA,
    "selector": layout.ENCODER,
    "merger": layout.ENCODER,
    "vq": layout.ENCODER,
    "encode_task_layer": layout.ENCODER,
    "decoder": layout.DECODER,
    "highres_decoder": layout.HIGHRES_DECODER,
}


def shrink(shape: list[int], sizes: dict[int, int]) -> list[int]:
    return [sizes.get(side, side) for side in shape]


def toy_layout(
    *, dim: int, grid: int, codes: int, code_dim: int, depth: int, width: int = 64, patch: int = 14
) -> dict[str, dict[str, list[int]]]:
    """The published layout at another size; blocks beyond `depth` go."""
    patches = grid**2
    hidden = int(4.3637 * dim)
    sizes = {
        1408: dim,
        6144: hidden,
        4224: 3 * dim,
        704: dim // 2,
        352: dim // 4,
        256: patches,
        257: patches + 1,
    }
    sizes |= {16384: codes, 32: code_dim, 4096: width, 1024: 24, 14: patch}
    small = {}
    for file, tensors in FULL.items():
        kept = {
            name: shape
            for name, shape in tensors.items()
            if names.depth_of([name.split("encoder.")[-1]]) <= depth
        }
        small[file] = {name: shrink(shape, sizes) for name, shape in kept.items()}
    return small


def fixture_parts(shapes: dict[str, dict[str, list[int]]]) -> dict[str, dict[str, list[int]]]:
    """The layout by the parts of a fixture."""
    parts = {}
    for part, file in FILES.items():
        prefix = PREFIX.get(part, "encode_task_layer." if part == "encode_task_layer" else "")
        parts[part] = {
            n[len(prefix) :]: shape for n, shape in shapes[file].items() if n.startswith(prefix)
        }
    return parts


SIZES = {
    "wider": {
        "dim": 48,
        "heads": 6,
        "depth": 1,
        "grid": 5,
        "codes": 100,
        "code_dim": 16,
        "batch": 2,
        "patch_size": 14,
    },
    "deeper": {
        "dim": 64,
        "heads": 4,
        "depth": 3,
        "grid": 3,
        "codes": 33,
        "code_dim": 4,
        "batch": 4,
        "patch_size": 8,
    },
}


@pytest.fixture(scope="module", params=list(SIZES))
def generated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fixture of another size by the oracle; one picture keeps all patches, another just one."""
    sizes = dict(SIZES[request.param])
    sizes |= {"seed": 3, "mlp_ratio": "4.3637", "image_size": sizes["grid"] * sizes["patch_size"]}
    shapes = toy_layout(
        **{n: sizes[n] for n in ("dim", "grid", "codes", "code_dim", "depth")},
        patch=sizes["patch_size"],
    )
    keep = (
        torch.rand(sizes["batch"], sizes["grid"] ** 2, generator=torch.Generator().manual_seed(1))
        < 0.4
    )
    keep[0], keep[1] = True, torch.arange(sizes["grid"] ** 2) == 2
    keep[:, 2] = True
    path = tmp_path_factory.mktemp(request.param) / "fixture.safetensors"
    published.fixture(path, fixture_parts(shapes), keep, sizes)
    return path


def test_shipped_fixture_is_reproduced():
    results = check_fixture(PARITY)
    assert len(results) == 10
    assert all(result.ok and result.error < 1e-5 for result in results), results


def test_generated_fixtures_of_other_sizes_are_reproduced(generated: Path):
    results = check_fixture(generated)
    assert len(results) == 10
    assert all(result.ok for result in results), results


def test_the_oracle_agrees_with_the_shipped_fixture():
    tensors = load_file(PARITY)
    parts = {part: {} for part in FILES}
    for name, value in tensors.items():
        if name.startswith("weights/"):
            _, part, rest = name.split("/")
            parts[part][rest] = value
    found = published.outputs(
        parts, tensors["in/pixels"], tensors["in/keep"] > 0.5, heads=4, depth=2
    )
    for name, value in found.items():
        torch.testing.assert_close(value, tensors[f"out/{name}"], rtol=1e-4, atol=1e-5)


def rewrite(path: Path, change, metadata: dict[str, str] | None = None) -> Path:
    """A changed copy of the shipped fixture."""
    tensors = load_file(PARITY)
    with safe_open(PARITY, "pt") as file:
        sizes = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata=sizes | (metadata or {}))
    return path


@pytest.mark.parametrize(
    "name",
    [
        "merger/blocks.1.token_causal_attn.proj.weight",
        "vit/blocks.0.attn.q_bias",
        "selector/out_conv.4.bias",
        "highres_decoder/unet_attnpool.c_proj.weight",
    ],
)
def test_one_changed_weight_is_noticed(tmp_path: Path, name: str):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"weights/{name}"][0] += 0.1

    results = check_fixture(rewrite(tmp_path / "f.safetensors", change))
    assert not all(result.ok for result in results)


def test_one_changed_id_or_nan_is_noticed(tmp_path: Path):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["out/code_ids"][3] += 1
        tensors["out/context_512"][0, 0, 0] = torch.nan

    failed = {
        result.name
        for result in check_fixture(rewrite(tmp_path / "f.safetensors", change))
        if not result.ok
    }
    assert failed == {"code_ids", "context_512"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("weights/merger/norm.bias"), "missing.*norm.bias"),
        (lambda t: t.update({"weights/merger/extra.weight": torch.ones(2)}), "not expected.*extra"),
        (lambda t: t.update({"weights/stranger/x": torch.ones(2)}), "unknown tensors"),
        (lambda t: t.update({"in/keep": torch.zeros(3, 16)}), "keeps nothing"),
        (lambda t: t.update({"in/pixels": torch.zeros(3, 3, 28, 28)}), "in/pixels"),
        (lambda t: t.update({"weights/vq/embedding.weight": torch.ones(64, 9)}), "vectors"),
        (
            lambda t: [t.pop(n) for n in list(t) if n.startswith("weights/decoder/")],
            "no weights/decoder",
        ),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith("out/")], "no outputs"),
    ],
)
def test_a_fixture_that_is_none_is_named(tmp_path: Path, change, message: str):
    with pytest.raises(InputError, match=message):
        check_fixture(rewrite(tmp_path / "f.safetensors", change))


def test_files_that_are_no_fixture_are_named(tmp_path: Path):
    (tmp_path / "text").write_text("hello")
    save_file({"x": torch.ones(2)}, tmp_path / "plain.safetensors")
    for path in (tmp_path / "text", tmp_path / "plain.safetensors", tmp_path / "absent", tmp_path):
        with pytest.raises(InputError):
            check_fixture(path)
    for metadata in ({"heads": "5"}, {"dim": "many"}, {"grid": "7"}):
        with pytest.raises(InputError):
            check_fixture(rewrite(tmp_path / "f.safetensors", lambda t: None, metadata))


def test_parts_at_the_end_of_the_chain_may_be_absent(tmp_path: Path):
    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if "decoder" in name or "context" in name or "pooled" in name:
                del tensors[name]

    results = check_fixture(rewrite(tmp_path / "f.safetensors", change))
    assert [r.name for r in results][-1] == "codes" and all(r.ok for r in results)


# names -------------------------------------------------------------------------------------------


def full_renames() -> dict[str, names.Renames]:
    every = layout.routes(NAMES)
    return {
        file: tuple(r for route in every if route.theirs == file for r in route.renames)
        for file in FULL
    }


def test_the_full_layout_is_mapped_one_to_one():
    for file, renames in full_renames().items():
        theirs = [name for rename in renames for name in rename.theirs]
        assert len(set(theirs)) == len(theirs)
        assert set(FULL[file]) - set(theirs) == (
            {"head.weight", "head.bias"} if file == layout.EVA else set()
        )
        assert set(theirs) <= set(FULL[file])
    for route in layout.routes(NAMES):
        ours = [rename.ours for rename in route.renames]
        assert len(set(ours)) == len(ours)


def test_the_full_size_fits_our_modules_without_memory():
    with torch.device("meta"):
        files = {
            file: {n: torch.empty(s) for n, s in tensors.items()} for file, tensors in FULL.items()
        }
        files[layout.NULL] = {"": torch.empty(1, 77, 768)}
        ours = layout.map_tensors(files)
    found = layout.configs(files, ours)  # raises where a name or a shape differs
    preset = lavit_7b().model
    assert found[""].visual_tokenizer == preset.visual_tokenizer
    assert found[""].pixels == preset.pixels
    assert found[""].vision == preset.vision
    fine = found["highres/"].pixels
    assert (fine.condition_dim, fine.pooled_dim, fine.pool_heads, fine.size) == (
        768,
        1280,
        16,
        1024,
    )


def test_renames_are_inverses_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    for rename in (
        names.Rename(("a", "b"), "ours", "qkv_bias"),
        names.Rename(("a",), "ours", "squeeze"),
        names.Rename(("a",), "ours"),
    ):
        shape = (1, 3, 4) if rename.kind == "squeeze" else (5,)
        tensors = {name: torch.randn(shape, generator=generator).half() for name in rename.theirs}
        back = names.ours_to_theirs(rename, names.theirs_to_ours(rename, tensors))
        assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    with pytest.raises(InputError, match="key bias"):
        names.ours_to_theirs(names.Rename(("a", "b"), "ours", "qkv_bias"), torch.ones(6))


def test_safetensors_are_written_and_read_bit_for_bit(tmp_path: Path):
    tensors = {
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "ids": torch.arange(4),
        "mask": torch.tensor([True, False, True]),
        "one": torch.tensor(2.5),
        "none": torch.empty(0, 3),
        "turned": torch.randn(4, 6).T,
    }
    save_tensors(tensors, tmp_path / "x.safetensors")
    for found in (
        load_file(tmp_path / "x.safetensors"),
        load_tensors(tmp_path / "x.safetensors"),
    ):
        assert set(found) == set(tensors)
        for name, value in tensors.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value)


# the published folder ----------------------------------------------------------------------------

DIM, GRID, CODES, TEXT, WIDTH = 32, 3, 40, 60, 48


def write_language(folder: Path) -> None:
    """A LLaMA with joint rows in two pickled shards and an index, as old checkpoints have it."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=TEXT + 2 + CODES,
        hidden_size=WIDTH,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    tensors = LlamaForCausalLM(config).state_dict()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(6)
    tensors = {name: value.half() for name, value in tensors.items()}
    config.save_pretrained(folder)
    shards = {
        f"pytorch_model-0000{i + 1}-of-00002.bin": dict(list(tensors.items())[i::2])
        for i in range(2)
    }
    for name, shard in shards.items():
        torch.save(shard, folder / name)
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {n: name for name, shard in shards.items() for n in shard},
    }
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    words = {
        word: i
        for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(TEXT - 3))])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def write_diffusion(folder: Path, *, context: int, pooled: int | None) -> None:
    """A tiny UNet, autoencoder and scheduler; the UNet as a pickle."""
    torch.manual_seed(2)
    extra = {}
    if pooled is not None:
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": pooled + 6 * 8,
        }
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=context,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **extra,
    )
    unet.save_pretrained(folder / "unet", safe_serialization=False)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4)
    vae.save_pretrained(folder / "vae")
    DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False).save_pretrained(
        folder / "scheduler"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy published folder; its tokenizer file holds the encoder too, in half precision."""
    folder = tmp_path_factory.mktemp("published")
    generator = torch.Generator().manual_seed(5)
    shapes = toy_layout(dim=DIM, grid=GRID, codes=CODES, code_dim=8, depth=2, width=WIDTH)
    for file, tensors in shapes.items():
        weights = published.random_weights(tensors, generator)
        if file == layout.ENCODER:
            table = weights["quantize.embedding.weight"]
            weights["quantize.embedding.weight"] = torch.nn.functional.normalize(table, dim=-1)
            eva = published.random_weights(shapes[layout.EVA], generator)
            weights |= {f"encoder.{name}": value.half() for name, value in eva.items()}
        (folder / file).parent.mkdir(exist_ok=True)
        torch.save(weights, folder / file)
    write_language(folder / "language_model")
    write_diffusion(folder / "pixel_decoding", context=768, pooled=None)
    write_diffusion(folder / "highres_pixel_decoding", context=768 + 1280, pooled=1280)
    torch.save(torch.randn(1, 5, 768, generator=generator).half(), folder / layout.NULL)
    (folder / "pixel_decoding" / "feature_extractor").mkdir()
    (folder / "pixel_decoding" / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    (folder / "README.md").write_text("published\n")
    return folder


@pytest.fixture(scope="module")
def converted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "lavit"
    summary = convert_published(folder, out)
    aside = {line.split(": ")[1] for line in summary.aside}
    assert {name for name in aside if not name.startswith("encoder.")} == {
        "head.weight",
        "head.bias",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    }
    return out


def test_the_converted_folder_is_a_model_and_agrees_with_the_oracle(folder: Path, converted: Path):
    model = LaVIT.from_pretrained(converted)
    files = {path: torch.load(folder / path) for path in FILES.values()}
    parts = {}
    for part, path in FILES.items():
        prefix = PREFIX.get(part, "encode_task_layer." if part == "encode_task_layer" else "")
        parts[part] = {n[len(prefix) :]: v for n, v in files[path].items() if n.startswith(prefix)}
    pixels = torch.randn(2, 3, GRID * 14, GRID * 14, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[1, 0, 1, 0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 1, 0]]).bool()
    theirs = published.outputs(parts, pixels, keep, heads=16, depth=2)
    patches = model.vision(pixels)
    tokens = model.visual_tokenizer.encode(patches, keep=keep)
    assert torch.equal(tokens.codes, theirs["code_ids"])
    close = {"rtol": 1e-4, "atol": 1e-4}
    with torch.no_grad():
        features = model.visual_tokenizer.decode(tokens.codes, tokens.lengths)
        torch.testing.assert_close(
            model.pixels.condition.to_context(features), theirs["context_512"], **close
        )
        fine = LaVIT.from_pretrained(converted / "highres")
        assert torch.equal(fine.visual_tokenizer.encode(patches, keep=keep).codes, tokens.codes)
        features = fine.visual_tokenizer.decode(tokens.codes, tokens.lengths)
        condition = fine.pixels.condition_of(features, (8, 8))
    torch.testing.assert_close(condition.context, theirs["context_1024"], **close)
    torch.testing.assert_close(condition.pooled, theirs["pooled_1024"], **close)
    null = torch.load(folder / layout.NULL)[0].float()
    torch.testing.assert_close(model.pixels.condition.null(1, (8, 8)).context[0, :5], null)
    inputs = model.visual_tokenizer.prepare(patches)
    merger = model.visual_tokenizer.merger
    assert relative_difference(*rows_both_ways(merger, inputs, keep)) < 1e-4


def test_the_effect_of_smoothing_is_printed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name in ("red dot", "blue bar"):
        toy_picture(name).save(tmp_path / f"{name}.png")
    pictures = [str(tmp_path / f"{name}.png") for name in ("red dot", "blue bar")]
    main(["convert", "published", str(folder), "--out", str(tmp_path / "new"), "--pictures",
          *pictures])  # fmt: skip
    *_, first, second = capsys.readouterr().out.splitlines()
    effects = smoothing_effect(tmp_path / "new", pictures)
    for line, effect in zip((first, second), effects, strict=True):
        assert line.split()[2:] == [
            str(effect.kept), f"{effect.written:.1e}", f"{effect.read:.1e}", str(effect.codes)
        ]  # fmt: skip
        assert 0 < effect.written < 1e-4 and 0 < effect.read < 1e-4 and effect.codes == 0


def test_the_converted_language_model_reads_and_has_the_joint_rows(folder: Path, converted: Path):
    model = LaVIT.from_pretrained(converted)
    shards = [
        torch.load(path) for path in sorted((folder / "language_model").glob("pytorch_model-*.bin"))
    ]
    tensors = {name: value.float() for shard in shards for name, value in shard.items()}
    language = model.language
    assert language.vocabulary.text_size == TEXT and language.vocabulary.codes == CODES
    torch.testing.assert_close(language.rows.detach(), tensors["model.embed_tokens.weight"][TEXT:])
    torch.testing.assert_close(language.head_rows.detach(), tensors["lm_head.weight"][TEXT:])
    visual = torch.load(folder / layout.READER)
    patches = torch.randn(1, GRID**2, DIM, generator=torch.Generator().manual_seed(0))
    keep = torch.arange(GRID**2)[None] % 2 == 0
    merger = {n.removeprefix("causal_encoder."): v for n, v in visual.items()}
    rows = published.merger(patches[0], keep[0], merger, heads=16, depth=2)[keep[0]]
    expected = published.linear(rows, visual, "vit_proj")
    torch.testing.assert_close(
        language.read(patches, keep).detach(), expected, rtol=1e-4, atol=1e-4
    )
    text = model.text_tokenizer
    assert text.decode(text("w1 w2", add_special_tokens=False)["input_ids"]) == "w1 w2"


def test_reverse_is_equal_to_the_bit(folder: Path, converted: Path, tmp_path: Path):
    convert_reverse(converted, tmp_path / "back")
    original = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert original == sorted(
        p.relative_to(tmp_path / "back") for p in (tmp_path / "back").rglob("*") if p.is_file()
    )
    for path in original:
        if path.suffix != ".bin":
            assert (folder / path).read_bytes() == (tmp_path / "back" / path).read_bytes(), path
            continue
        ours, theirs = read_pickle(tmp_path / "back" / path), read_pickle(folder / path)
        assert list(ours) == list(theirs), path
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), (path, name)


def test_reverse_follows_what_was_trained_since(converted: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(converted, folder, symlinks=True)
    model = LaVIT.from_pretrained(folder)
    with torch.no_grad():
        model.visual_tokenizer.selector.local.bias += 1
        model.language.reader.to_language.bias += 1
    model.save_pretrained(folder, parts=("visual_tokenizer", "language"))
    convert_reverse(folder, tmp_path / "back")
    back = torch.load(tmp_path / "back" / layout.ENCODER)
    bias = model.visual_tokenizer.selector.local.bias.detach()
    torch.testing.assert_close(back["token_predictor.in_conv.1.bias"], bias)
    back = torch.load(tmp_path / "back" / layout.READER)
    torch.testing.assert_close(
        back["vit_proj.bias"], model.language.reader.to_language.bias.detach()
    )


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy of the published folder to break."""
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def change_file(path: Path, change) -> None:
    tensors = torch.load(path)
    change(tensors)
    torch.save(tensors, path)


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def remove(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.unlink()


class Evil:
    """A pickle that would run code."""

    def __reduce__(self):
        return (print, ("ran",))


def test_nobody_is_advised_to_open_a_pickle(tmp_path: Path) -> None:
    """Neither a file of ours nor one of a folder of transformers."""
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTConfig(**shape).save_pretrained(tmp_path)
    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError) as of_file:
        read_pickle(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError) as of_folder:
        load_vision(replace(lavit_7b().model.vision, source=str(tmp_path)))
    for found in (of_file, of_folder):
        said = str(found.value)
        assert "more than tensors (print)" in said and "\n" not in said
        assert said.endswith("that you trust, with torch.load(weights_only=True)")
        assert "False" not in said


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda f: change_file(f / layout.EVA, lambda t: t.pop("blocks.1.attn.v_bias")),
            "missing.*v_bias",
        ),
        (
            lambda f: change_file(f / layout.ENCODER, lambda t: t.update(x=torch.ones(1))),
            "not expected.*x",
        ),
        (
            lambda f: change_file(
                f / layout.ENCODER, lambda t: t.update({"encoder.x": torch.ones(1)})
            ),
            "encoder.x",
        ),
        (
            lambda f: change_file(
                f / layout.DECODER, lambda t: t.update({"norm.bias": torch.ones(9)})
            ),
            "norm.bias",
        ),
        (
            lambda f: change_file(f / layout.READER, lambda t: t.pop("vit_proj.bias")),
            "vit_proj.bias",
        ),
        (lambda f: torch.save({"a": Evil()}, f / layout.DECODER), "more than tensors"),
        (lambda f: torch.save({"a": {"b": 1}}, f / layout.DECODER), "no plain dictionary"),
        (lambda f: (f / layout.DECODER).write_bytes(b"nothing"), "tokenizer_decoder.bin"),
        (lambda f: (f / layout.HIGHRES_DECODER).unlink(), "only one of"),
        (lambda f: (f / layout.ENCODER).unlink(), "missing"),
        (
            lambda f: (f / "language_model" / "pytorch_model-00002-of-00002.bin").unlink(),
            "language_model: missing",
        ),
        (
            lambda f: torch.save({}, f / "visual_tokenizer" / "more.bin"),
            "more.bin is an unknown weight file",
        ),
        (lambda f: shutil.rmtree(f / "pixel_decoding" / "unet"), "unet"),
        (lambda f: (f / layout.ENCODER).write_bytes(b""), "encoder.bin is not a readable.*empty"),
        (
            lambda f: change_file(
                f / layout.ENCODER, lambda t: t.update({n: t[n].int() for n in t})
            ),
            "torch.int32, expected torch.float32",
        ),
        (lambda f: remove(f, "pixel_decoding/unet/*.bin"), "pixel_decoding/unet: missing"),
        (
            lambda f: remove(f, "highres_pixel_decoding/vae/*.safetensors"),
            "highres_pixel_decoding/vae: missing",
        ),
        (
            lambda f: change_json(f / "pixel_decoding/unet/config.json", _class_name="Nope"),
            "pixel_decoding: .*unknown unet class 'Nope'",
        ),
        (
            lambda f: change_json(f / "pixel_decoding/unet/config.json", norm_num_groups=0),
            "pixel_decoding has a unet/config.json that no unet is built of",
        ),
        (
            lambda f: change_json(f / "pixel_decoding/unet/config.json", in_channels=5),
            "pixel_decoding/unet: conv_in.weight is",
        ),
        (
            lambda f: (f / "pixel_decoding/scheduler/scheduler_config.json").write_text("nope"),
            "pixel_decoding/scheduler/scheduler_config.json is not valid JSON",
        ),
        (lambda f: remove(f, "language_model/tokenizer*"), "language_model has no tokenizer"),
        (
            lambda f: (f / "language_model/tokenizer.json").write_text("junk"),
            "language_model has no tokenizer that opens",
        ),
        (
            lambda f: change_json(f / "language_model/config.json", vocab_size="x"),
            "language_model has a config.json.*vocab_size",
        ),
        (
            lambda f: change_json(f / "language_model/config.json", num_attention_heads=0),
            "language_model has a config.json that names no language model",
        ),
        (
            lambda f: (f / "language_model/pytorch_model.bin.index.json").write_text("{}"),
            "index.json has no weight_map",
        ),
    ],
)
def test_a_broken_folder_is_named_and_leaves_nothing(
    broken: Path, tmp_path: Path, break_it, message: str
):
    break_it(broken)
    with pytest.raises(InputError, match=message) as refused:
        convert_published(broken, tmp_path / "out")
    assert ".out.new" not in str(refused.value) and "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (lambda noted: noted.clear(), "not what a conversion wrote"),
        (lambda noted: noted.pop("files"), "not what a conversion wrote"),
        (lambda noted: noted["tensors"].update(x={"shapes": {}}), "not what a conversion wrote"),
        (
            lambda noted: noted["files"].update({"../evil.txt": "config.json"}),
            "not what a conversion wrote",
        ),
        (lambda noted: noted["tensors"].pop(layout.NULL), "does not know pixel_decoding/uncond"),
        (
            lambda noted: noted["tensors"][layout.NULL]["shapes"].update({"": [1, 2]}),
            "tensors of pixel_decoding/uncond_embeddings.bin have changed",
        ),
    ],
)
def test_a_forged_manifest_is_refused(converted: Path, tmp_path: Path, forge, message: str):
    folder = Path(shutil.copytree(converted, tmp_path / "forged"))
    noted = json.loads((folder / "published" / "manifest.json").read_text())
    forge(noted)
    (folder / "published" / "manifest.json").write_text(json.dumps(noted))
    with pytest.raises(InputError, match=message):
        convert_reverse(folder, tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["forged"]


def test_nothing_is_overwritten(folder: Path, tmp_path: Path):
    (tmp_path / "precious").write_text("mine")
    for call in (convert_published, convert_reverse):
        with pytest.raises(InputError, match="not empty"):
            call(folder, tmp_path)
    with pytest.raises(InputError, match="no folder"):
        convert_published(tmp_path / "absent", tmp_path / "out")


def test_the_highres_decoder_may_be_absent(broken: Path, tmp_path: Path):
    (broken / layout.HIGHRES_DECODER).unlink()
    shutil.rmtree(broken / "highres_pixel_decoding")
    convert_published(broken, tmp_path / "out")
    assert not (tmp_path / "out" / "highres").exists()
    assert LaVIT.from_pretrained(tmp_path / "out").pixels.config.size == 512
