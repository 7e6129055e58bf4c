"""Pictures about pictures: merge maps say where patches went, galleries show their data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from conftest import toy_picture
from lavit.cli import main
from lavit.visual_tokenizer.merger import Merger
from lavit.visualize import bars, code_gallery, merge_map, occurrences


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(heads: int, depth: int) -> tuple[Merger, Tensor, Tensor]:
    """A merger with uneven attention, patches, uneven masks; the last picture keeps everything."""
    torch.manual_seed(0)
    merger = Merger(16, heads, depth, 2.0)
    for parameter in merger.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=seeded(1)))
    keep = torch.rand(3, 9, generator=seeded(3)) < 0.4
    keep[0, 0], keep[2] = True, True
    return merger, torch.randn(3, 9, 16, generator=seeded(2)), keep


def test_flow_is_the_attention_of_kept_over_dropped_patches() -> None:
    merger, patches, keep = make(heads=2, depth=3)
    flow = merger.flow(patches, keep)
    torch.testing.assert_close(flow.sum(-1), keep.float())
    assert (flow[:2][~keep[:2]] == 0).all()
    assert (flow[:2].transpose(1, 2)[keep[:2]] == 0).all()  # kept patches flow nowhere
    torch.testing.assert_close(flow[2], torch.full((9, 9), 1 / 9))
    for number in range(3):  # the same whatever the batch
        torch.testing.assert_close(
            merger.flow(patches[number, None], keep[number, None])[0], flow[number]
        )


def test_flow_is_what_the_fast_path_mixes() -> None:
    """With one head and block, flow times values enters the cross-attention's last projection."""
    merger, patches, keep = make(heads=1, depth=1)
    cross = merger.blocks[0].cross_attention
    seen: list[Tensor] = []
    cross.out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    merger(patches, keep)
    mixed = merger.flow(patches, keep) @ cross.value(merger.norm_patches(patches))
    torch.testing.assert_close(mixed[keep], seen[0], rtol=1e-4, atol=1e-5)


def test_merge_map_colours_a_patch_as_the_token_it_flowed_into() -> None:
    keep = torch.tensor([True, False, False, True])
    flow = torch.zeros(4, 4)
    flow[0, 1], flow[0, 2], flow[3, 1], flow[3, 2] = 0.9, 0.2, 0.1, 0.8
    picture = np.asarray(
        merge_map(Image.new("RGB", (40, 40), "white"), keep, flow, size=80)
    ).astype(int)
    kept_0, into_0, into_3, kept_3 = (
        picture[y, x] for y, x in ((8, 8), (8, 72), (72, 8), (72, 72))
    )
    assert abs(kept_0 - kept_3).max() > 40
    for kept, into, other in ((kept_0, into_0, kept_3), (kept_3, into_3, kept_0)):
        assert abs(into - kept).sum() < abs(into - other).sum()


def test_occurrences_are_most_used_codes_first_and_from_many_pictures() -> None:
    codes = [torch.tensor([5, 5, 1]), torch.tensor([5, 2]), torch.tensor([5])]
    keep = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0], [0, 0, 0, 1]]).bool()
    found = occurrences(codes, keep, codes=2, each=2)
    assert found == {5: [(0, 0), (1, 1)], 1: [(0, 3)]}  # (picture, patch)


def test_gallery_shows_the_patch_itself() -> None:
    halves = np.zeros((64, 64, 3), dtype=np.uint8)
    halves[:32, :32] = (200, 10, 10)
    found = {7: [(0, 0)], 9: [(0, 3)]}
    page = np.asarray(
        code_gallery(found, {7: 3, 9: 1}, [Image.fromarray(halves)].__getitem__, grid=2, cell=32)
    )
    red = (abs(page.astype(int) - (200, 10, 10)).sum(-1) < 30).sum()
    black = (page.sum(-1) < 30).sum()
    assert red > 200 and black > 400


def test_charts_show_high_bars() -> None:
    page = np.asarray(bars([1.0, 4.0, 2.0], title="three", low="0", high="2"))
    ink = (page.sum(-1) < 600).sum(0)
    third = len(ink) // 3
    assert ink[third : 2 * third].sum() > ink[2 * third :].sum() > ink[:third].sum()


def test_verbs_write_pictures(
    toy_tokenizer: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_picture("red square").save(tmp_path / "in.png")
    model = ("--model", str(toy_tokenizer))
    main(["inspect", str(tmp_path / "in.png"), "--out", str(tmp_path / "seen.png"), *model])
    main(
        [
            "gallery",
            str(toy_data),
            "--out",
            str(tmp_path / "all"),
            "--codes",
            "5",
            "--patches",
            "3",
            "--json",
            *model,
        ]
    )
    said = json.loads(
        next(line for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    )
    assert said["pictures"] == 8 and 0 < said["live_codes"] <= 1 and said["tokens"] >= 8
    for name in ("seen.png", "all/codes.png", "all/use.png", "all/lengths.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 50
            assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 2, (
                name
            )
