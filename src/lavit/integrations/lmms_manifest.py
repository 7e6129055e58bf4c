"""What lmms-eval learns of us when it starts (entry points, group `lmms_eval.models`).

It reads the entry points of every installed package at once, and one that fails to import takes all
others down: so this file imports nothing, and names the model by its path.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """lmms-eval's `ModelManifest` of `lmms_model.LaVITEval`, which is imported when it is used."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("lavit", simple_class_path="lavit.integrations.lmms_model.LaVITEval")
