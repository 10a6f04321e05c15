"""Random LoRA adapters in the format of PEFT: for runs in which only their size and their coming and going matter."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from agentserve.models.config import ModelConfig
from agentserve.models.lora import CONFIG_FILE, WEIGHTS_FILE, linear_shapes

_SCALE = 0.02
"""Of the weights: outputs stay close to those of the model."""


def write_adapters(directory: Path, names: Iterable[str], model: ModelConfig, *, rank: int) -> None:
    """Writes a directory with an adapter of all linear layers for each name; the same name gives the same weights."""
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for layer in range(model.num_layers):
            for linear, (num_outputs, num_inputs) in linear_shapes(model).items():
                block = "self_attn" if linear[0] in "qkvo" else "mlp"
                prefix = f"base_model.model.model.layers.{layer}.{block}.{linear}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, num_inputs, generator=generator) * _SCALE
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(num_outputs, rank, generator=generator) * _SCALE
        (directory / name).mkdir(parents=True)
        save_file(tensors, directory / name / WEIGHTS_FILE)
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank}
        (directory / name / CONFIG_FILE).write_text(json.dumps(settings), encoding="utf-8")
