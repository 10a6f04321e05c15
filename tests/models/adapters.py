"""Tiny random LoRA adapters, written by peft, and what they make of a model, merged by peft."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save_adapter(
    directory: Path, model: Any, *, seed: int, rank: int = 4, targets: Sequence[str] = ALL_LINEAR, **settings: Any
) -> Any:
    """Writes a random adapter for a transformers model, which stays as it is; returns the model with it merged."""
    config = peft.LoraConfig(r=rank, target_modules=list(targets), task_type="CAUSAL_LM", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers in a way of the past
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:  # peft starts with B = 0, which would change nothing
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    adapted.save_pretrained(directory)
    return adapted.merge_and_unload().eval()
