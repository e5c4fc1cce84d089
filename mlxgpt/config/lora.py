"""Settings of low-rank adapters."""

from __future__ import annotations

from dataclasses import dataclass

from mlxgpt.config.fields import config_field


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (LoRA, Hu et al., 2021): fine-tuning without changing the weights."""

    lora_rank: int = config_field(
        0, "with --init-from, train adapters of this rank only; 0: train all weights", low=0
    )
    lora_alpha: float = config_field(16.0, "adapters are scaled by lora_alpha / lora_rank", low=0.0)
    lora_layers: int = config_field(
        0, "number of blocks with adapters, from the last one on; 0: all", low=0
    )
    dora: bool = config_field(
        False, "also train the norm of each row of the adapted weights (DoRA, Liu et al., 2024)"
    )

    @property
    def lora_scale(self) -> float:
        """Factor of the adapters' output."""
        return self.lora_alpha / self.lora_rank

    def describe(self, n_layer: int) -> str:
        """Describe the adapters of a model with `n_layer` blocks."""
        return (
            f"{'DoRA' if self.dora else 'LoRA'}, rank {self.lora_rank}, alpha {self.lora_alpha:g}, "
            f"in {len(self.adapted_blocks(n_layer))} of {n_layer} blocks"
        )

    def adapted_blocks(self, n_layer: int) -> range:
        """Indices of the blocks with adapters."""
        return range(n_layer - (self.lora_layers or n_layer), n_layer)
