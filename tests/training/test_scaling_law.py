from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from mlxgpt import api
from mlxgpt.config import Config, override_config
from mlxgpt.data.dataset import Dataset
from mlxgpt.training.scaling_law import (
    ScalingLaw,
    find_scaling_law,
    law_path,
    write_scaling_law,
)

LAW = ScalingLaw(0.5, 0.1, 0.35, 0.35, 0.4)


def test_the_loss_of_a_law() -> None:
    assert ScalingLaw(0.5, 0.1, 0.5, 0.4, 1.0).predict(4_000_000, 2_000_000) == pytest.approx(0.75)


def test_a_law_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "laws" / "one.json"
    assert find_scaling_law(path) is None
    write_scaling_law(path, LAW)
    assert find_scaling_law(path) == LAW


def test_a_damaged_law_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    path = tmp_path / "law.json"
    write_scaling_law(path, LAW)
    path.write_text(path.read_text().replace("0.35", "0.36"))
    assert find_scaling_law(path) is None
    assert "mlxgpt scale writes it again" in caplog.text


def test_a_law_belongs_to_a_text_and_an_architecture(
    home: Path, tiny: Config, text_file: Path
) -> None:
    words = api.prepare(text_file)

    def path(config: Config = tiny, data: Dataset = words) -> Path:
        return law_path(home, config, data)

    assert path(override_config(tiny, {"n_layer": 9, "n_head": 1, "n_embd": 64})) == path()
    assert path(override_config(tiny, {"vocab_size": 9999})) == path(), "it is the data's"
    assert path(override_config(tiny, {"smear": True})) != path()
    other_meta = replace(words.meta, train=replace(words.meta.train, sha256="other"))
    assert path(data=replace(words, meta=other_meta)) != path()
