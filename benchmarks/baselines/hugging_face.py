"""transformers: `generate` with a KV cache."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from baselines.pytorch import to_tensor, torch_device, torch_metadata
from baselines.tasks import Result, Task, make_prompt, time_generation


def generate(task: Task) -> Result:
    """Greedy generation with a KV cache."""
    model = AutoModelForCausalLM.from_pretrained(task.folder).to(torch_device())
    ids = to_tensor(np.tile(make_prompt(task), (task.texts, 1)))

    def run() -> list[float]:
        times: list[float] = []

        def record_time(input_ids: Any, scores: Any, **_: Any) -> Any:
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        with torch.no_grad():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=task.new_tokens,
                max_new_tokens=task.new_tokens,
                pad_token_id=0,
                stopping_criteria=[record_time],
            )
        return times

    return time_generation(task, run) | {**torch_metadata("transformers")}
