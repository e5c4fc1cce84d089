from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from mlxgpt import api
from mlxgpt.config import Config, override_config
from mlxgpt.data.holdout import hold_out_from_train
from mlxgpt.experiments import registry
from mlxgpt.experiments.registry import Registry
from mlxgpt.experiments.variants import weight_affecting
from mlxgpt.utils.errors import UserError


def test_save_and_load(tmp_path: Path) -> None:
    assert registry.open_registry(tmp_path) == Registry(tmp_path)
    saved = Registry(tmp_path, {"a": 5}, [3, 5], 2, ["b"])
    saved.save()
    assert registry.open_registry(tmp_path) == saved


@pytest.mark.parametrize(
    "change", [(b'"final_looks":', b'"final_look":'), (b"2", b"0"), (b"{", b"")]
)
def test_a_changed_registry_is_refused(tmp_path: Path, change: tuple[bytes, bytes]) -> None:
    """So the number of evaluations on the validation text cannot be reset."""
    Registry(tmp_path, {"a": 5}, [3], 2, []).save()
    path = tmp_path / "ledger.json"
    content = path.read_bytes()
    assert change[0] in content
    path.write_bytes(content.replace(*change, 1))
    with pytest.raises(UserError, match=r"ledger\.json is damaged"):
        registry.open_registry(tmp_path)


def test_a_key_is_unchanged_by_the_renamed_schedule(
    home: Path, text_file: Path, tiny: Config
) -> None:
    """Schedule `wsd` was called `linear` when the first keys were computed."""
    data = hold_out_from_train(api.prepare(text_file))
    config = override_config(tiny, {"schedule": "wsd"})
    defaults, settings = weight_affecting(Config()), weight_affecting(config)
    hashed = {name: value for name, value in settings.items() if value != defaults[name]}
    hashed |= {"schedule": "linear", "data": data.meta.fingerprint}
    expected = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:16]
    assert registry.training_key(config, data) == expected


def test_a_key_depends_only_on_weight_affecting_settings_and_data(
    home: Path, text_file: Path, tiny: Config
) -> None:
    data = hold_out_from_train(api.prepare(text_file))
    key = registry.training_key(tiny, data)
    changes: list[dict[str, object]] = [{"seed": 8}, {"n_layer": 3}, {"beta2": 0.9}]
    for change in changes:
        assert registry.training_key(override_config(tiny, change), data) != key
    changes = [{"log_interval": 3}, {"source": "x"}, {"keep_checkpoints": 9}]
    for change in changes:
        assert registry.training_key(override_config(tiny, change), data) == key
    assert registry.training_key(tiny, api.prepare(text_file)) != key, "with the held-out part"
