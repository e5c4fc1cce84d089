from __future__ import annotations

import pytest

from mlxgpt.config import Config, override_config
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import flatten_params, load_parameters
from mlxgpt.utils.errors import UserError


def test_weights_of_different_shapes_are_refused(tiny_model: Config) -> None:
    wider = GPT(override_config(tiny_model, {"n_embd": 32}).model)
    with pytest.raises(UserError, match="do not match the architecture"):
        load_parameters(GPT(tiny_model.model), flatten_params(wider.parameters()))
