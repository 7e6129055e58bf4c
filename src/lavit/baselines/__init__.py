"""Rivals of LaVIT in its own frame: same encoder, LM, data and steps, one thing swapped.

A configuration names them (`language.reader`, `visual_tokenizer.rival`); only `storage.baseline`
looks here for a name, and nothing else but studies knows them.
"""

from __future__ import annotations

from typing import Any

from lavit.baselines.emu import EmuReader
from lavit.baselines.readers import LinearReader, QFormer, Resampler
from lavit.baselines.registers import Registers
from lavit.baselines.regression import GoalReader
from lavit.baselines.selectors import Attended, Clusters
from lavit.baselines.vqgan import Vqgan

READERS = (LinearReader, Resampler, QFormer, EmuReader, GoalReader)
TOKENIZERS = (Attended, Clusters, Registers, Vqgan)
RIVALS: dict[str, type[Any]] = {kind.__name__: kind for kind in (*READERS, *TOKENIZERS)}
