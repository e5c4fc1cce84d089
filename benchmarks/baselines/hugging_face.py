"""transformers: `generate` with its cache."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from baselines.pytorch import device, ids_of, with_torch
from baselines.tasks import Result, Task, prompt_of, timed_texts


def generate(task: Task) -> Result:
    """`generate` with its cache, greedy."""
    model = AutoModelForCausalLM.from_pretrained(task.folder).to(device())
    ids = ids_of(np.tile(prompt_of(task), (task.texts, 1)))

    def run() -> list[float]:
        times: list[float] = []

        def drawn(ids: Any, scores: Any, **_: Any) -> Any:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        with torch.no_grad():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=task.new_tokens,
                max_new_tokens=task.new_tokens,
                pad_token_id=0,
                stopping_criteria=[drawn],
            )
        return times

    return timed_texts(task, run) | {**with_torch("transformers")}
