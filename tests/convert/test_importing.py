"""Import models from folders and from a fake hub laid out like the real one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from huggingface_hub import constants

import mlxgpt
from mlxgpt.cli import main as cli
from mlxgpt.convert import download, huggingface, importing
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.storage.loading import load_model
from mlxgpt.storage.run import open_run
from mlxgpt.utils.errors import UserError
from tests.helpers.commands import Capture, expect_error
from tests.helpers.external_models import MODEL_CONFIG, train_small_bpe, write_gpt2_folder
from tests.helpers.failing_files import failing_sync
from tests.helpers.fake_hub import Hub, Repository, run_servers
from tests.helpers.offline_machine import REFUSED_ADDRESS


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def connected(
    hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch, *, seconds: float = 2.0
) -> Iterator[Hub]:
    """Make this process use the fake hub, with an empty cache."""
    from huggingface_hub import hf_api

    with run_servers(hub), monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.address)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + TEMPLATE)
        patch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", seconds)
        patch.setattr(hf_api, "api", hf_api.HfApi(endpoint=hub.address))
        patch.setenv("NO_PROXY", "*")
        yield hub


TEMPLATE = "/{repo_id}/resolve/{revision}/{filename}"


def test_imported_folder_is_a_full_run(home: Path, capsys: Capture) -> None:
    expected = write_gpt2_folder(home / "somewhere" / "small")
    assert cli.main(["import", "somewhere/small"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("runs/small: ")
    assert "mlxgpt generate --run runs/small" in output.err
    run = open_run(home / "runs" / "small")
    assert run.config.model == MODEL_CONFIG
    assert (run.steps(), run.bos, run.data_name) == ([0], None, None)
    assert run.origin == {"folder": "small"}
    _, checkpoint = load_model(run)
    assert all(
        mx.array_equal(checkpoint.parameters[name], value) for name, value in expected.items()
    )
    assert mlxgpt.generate("once", run="small", max_tokens=3, seed=1).texts[0].startswith("once")
    assert mlxgpt.info(run="small").step == 0
    assert [(line.steps, line.data) for line in mlxgpt.runs()] == [(0, "–")]
    assert cli.main(["runs"]) == 0
    assert "imported" in capsys.readouterr().out
    (home / "text.txt").write_text("once upon a time " * 30)
    result = mlxgpt.evaluate(run="small", source=["text.txt"])
    # An end-of-text follows the text. No token precedes it, so its first token is not predicted.
    assert result.tokens == len(run.tokenizer.encode("once upon a time " * 30))
    problem = expect_error(capsys, "eval", "--run", "small")
    assert problem == "small is an imported model without validation data"
    with pytest.raises(UserError, match="small is an imported model"):
        mlxgpt.train(tier=1, run="small", source="text.txt", batch_size=1)
    assert expect_error(capsys, "import", "somewhere/small") == "runs/small already exists"


def test_invalid_imports_are_refused(home: Path, capsys: Capture) -> None:
    assert "is neither a folder nor a model name" in expect_error(capsys, "import", "gpt-2")
    write_gpt2_folder(home / "small")
    assert "--meta is for a nanoGPT" in expect_error(
        capsys, "import", "small", "--meta", "meta.pkl"
    )
    (home / "small" / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in expect_error(capsys, "import", "small")
    assert not Path("runs").exists()


def test_interrupted_import_is_started_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gpt2_folder(home / "small")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(importing.checkpoint, "save_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mlxgpt.import_model("small")
    assert open_run(home / "runs" / "small").steps() == []
    assert mlxgpt.import_model("small").steps() == [0]


def test_import_can_be_repeated_after_a_failed_sync(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gpt2_folder(home / "small")
    failing_sync(monkeypatch, "checkpoints")  # after the checkpoint was renamed
    with pytest.raises(UserError, match="cannot write"):
        mlxgpt.import_model("small")
    assert mlxgpt.import_model("small").steps() == [0]


def test_non_finite_weights_are_refused(home: Path, capsys: Capture) -> None:
    parameters = write_gpt2_folder(home / "small")
    parameters["h.1.ln_2.bias"][7] = float("nan")
    huggingface.write_gpt2_parameters(home / "small", MODEL_CONFIG, parameters)
    problem = expect_error(capsys, "import", "small")
    assert problem == "the model's h.1.ln_2.bias contains non-finite values (NaN or infinity)"
    assert not Path("runs").exists()


# Tokenizers.


@pytest.mark.parametrize("kind", ["pairs", "strings", "two files"])
def test_bpe_in_each_file_format(home: Path, kind: str) -> None:
    tokenizer = train_small_bpe()
    write_gpt2_folder(home / "m", tokenizer)
    path = home / "m" / "tokenizer.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    merges = [" ".join(pair) for pair in tree["model"]["merges"]]
    if kind == "strings":  # as in gpt2 on the hub, with fewer other fields
        tree["model"] = {"vocab": tree["model"]["vocab"] | {"<|endoftext|>": 279}, "merges": merges}
        tree["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False}
        tree["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True}
        path.write_text(json.dumps(tree), encoding="utf-8")
    elif kind == "two files":
        vocab = tree["model"]["vocab"] | {"<|endoftext|>": 279}
        (home / "m" / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        lines = "\n".join(["#version: 0.2", *merges, ""])
        (home / "m" / "merges.txt").write_text(lines, encoding="utf-8")
        path.unlink()
    imported = mlxgpt.import_model("m")
    assert isinstance(imported.tokenizer, BPETokenizer)
    assert imported.tokenizer.fingerprint == tokenizer.fingerprint
    assert not imported.add_bos_token


@pytest.mark.parametrize("end_of_text", [True, False])
def test_char_tokenizer_round_trip(home: Path, end_of_text: bool) -> None:
    tokenizer = CharTokenizer("abcÄ \n", end_of_text=end_of_text)
    write_gpt2_folder(home / "m", tokenizer)
    restored = mlxgpt.import_model("m").tokenizer
    assert restored.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("said", ["by its settings", "by its post-processor"])
def test_tokenizer_that_adds_a_bos_token(home: Path, said: str) -> None:
    from mlxgpt.convert import tokenizers

    write_gpt2_folder(home / "m")
    tokenizers.write_hf_tokenizer(home / "m", train_small_bpe(), 16, add_bos_token=True)
    settings = home / "m" / "tokenizer_config.json"
    if said == "by its post-processor":
        settings.unlink()
    assert mlxgpt.import_model("m").bos == 279


TOKENIZER_CHANGES: dict[str, Any] = {
    "a token twice": lambda tree: tree["model"]["vocab"].update({"!": 1}),
    "a token that no merge makes": lambda tree: tree["model"]["vocab"].update({"once upon": 280}),
    "a gap in the ids": lambda tree: tree["model"]["vocab"].update({"<pad>": 281}),
    "merges at random": lambda tree: tree["model"].update(dropout=0.1),
    "a word with the spaces around it": lambda tree: tree["added_tokens"].append(
        {"content": "cat", "id": 280, "lstrip": True}
    ),
    "another kind": lambda tree: tree["model"].update(type="Unigram"),
    "another cut": lambda tree: tree["pre_tokenizer"].update(add_prefix_space=True),
    "normalised": lambda tree: tree.update(normalizer={"type": "NFC"}),
    "a merge of nothing": lambda tree: tree["model"]["merges"].append(["€", "€"]),
    "two ids": lambda tree: tree["added_tokens"].append({"content": "<|endoftext|>", "id": 280}),
    "no model": lambda tree: tree.pop("model"),
}


@pytest.mark.parametrize("case", TOKENIZER_CHANGES)
def test_unsupported_tokenizers_are_refused(home: Path, case: str, capsys: Capture) -> None:
    write_gpt2_folder(home / "m")
    path = home / "m" / "tokenizer.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    TOKENIZER_CHANGES[case](tree)
    path.write_text(json.dumps(tree), encoding="utf-8")
    assert "is not supported" in expect_error(capsys, "import", "m")


# From a hub.


@pytest.fixture
def gpt2_repository(tmp_path: Path) -> Repository:
    write_gpt2_folder(tmp_path / "hubs")
    files = read_files(tmp_path / "hubs")
    shutil.rmtree(tmp_path / "hubs")
    other_files = {"README.md": b"a card", "pytorch_model.bin": b"a pickle", "64.tflite": b"x"}
    return Repository({"main": files | other_files})


def test_gpt2_is_downloaded_once_and_then_read_from_the_cache(
    home: Path,
    gpt2_repository: Repository,
    monkeypatch: pytest.MonkeyPatch,
    notes: list[str],
) -> None:
    hub = Hub({"models/openai-community/gpt2": gpt2_repository})
    with connected(hub, home, monkeypatch):
        run = mlxgpt.import_model("gpt2")
        assert run.folder == Path("runs/gpt2")
        commit = gpt2_repository.branches["main"]
        assert run.origin == {"hub": "openai-community/gpt2", "revision": commit}
        assert not any("pytorch_model" in line or "tflite" in line for line in hub.requests)
        assert any("MB) from the Hugging Face hub" in note for note in notes)
        request_count = len(hub.cdn.requests)
        mlxgpt.import_model("gpt2", run="again")
        assert len(hub.cdn.requests) == request_count, "what was fetched is not fetched again"
        with monkeypatch.context() as patch:
            patch.setattr(constants, "ENDPOINT", REFUSED_ADDRESS)
            assert mlxgpt.import_model("gpt2", run="offline").steps() == [0]
    assert notes[-1].endswith("; using openai-community/gpt2 from the cache")


def test_cache_is_used_with_hf_hub_offline(
    home: Path, gpt2_repository: Repository, monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> None:
    hub = Hub({"models/openai-community/gpt2": gpt2_repository})
    with connected(hub, home, monkeypatch):
        mlxgpt.import_model("gpt2")
        request_count = len(hub.requests)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert mlxgpt.import_model("gpt2", run="offline").steps() == [0]
        assert len(hub.requests) == request_count
        with pytest.raises(UserError, match=r"could not be downloaded \(.*HF_HUB_OFFLINE is set"):
            mlxgpt.import_model("distilgpt2")
    assert "the Hugging Face hub: HF_HUB_OFFLINE is set; using" in notes[-1]


@pytest.mark.parametrize(
    ("mood", "problem", "remedy"),
    [
        ("401", "HTTP status 401", "hf auth login"),
        ("403", "HTTP status 403", "accept its terms"),
        ("404", "HTTP status 404", "check the name"),
        ("login", "the response is not from the hub", "same command again"),
    ],
)
def test_hub_error_responses(
    home: Path,
    gpt2_repository: Repository,
    monkeypatch: pytest.MonkeyPatch,
    mood: str,
    problem: str,
    remedy: str,
) -> None:
    hub = Hub({"models/openai-community/gpt2": gpt2_repository}, mood)
    with connected(hub, home, monkeypatch), pytest.raises(UserError) as error:
        mlxgpt.import_model("gpt2")
    assert problem in error.value.problem
    assert remedy in error.value.remedy
    assert not Path("runs").exists()


def test_unknown_and_gated_models(
    home: Path, gpt2_repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt2_repository.gated = True
    with connected(Hub({"models/owner/gated": gpt2_repository}), home, monkeypatch):
        for name, remedy in (
            ("owner/unknown", "check the name"),
            ("owner/gated", "accept its terms"),
        ):
            with pytest.raises(UserError, match=f"{name} could not be downloaded") as error:
                mlxgpt.import_model(name)
            assert remedy in error.value.remedy


def test_unreachable_hub_and_empty_cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", REFUSED_ADDRESS)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
    with pytest.raises(UserError) as error:
        mlxgpt.import_model("distilgpt2")
    assert error.value.problem.startswith("distilbert/distilgpt2 could not be downloaded")
    assert "a model in a local folder needs none" in error.value.remedy


def test_interrupted_download_is_resumed(
    home: Path, gpt2_repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub({"models/openai-community/gpt2": gpt2_repository}, cdn="breaks")
    with connected(hub, home, monkeypatch):
        assert mlxgpt.import_model("gpt2").steps() == [0]
        assert hub.cdn.truncated_responses == 2


def test_damaged_download_is_reported_and_downloaded_again(
    home: Path, gpt2_repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub({"models/openai-community/gpt2": gpt2_repository})
    with connected(hub, home, monkeypatch):
        mlxgpt.import_model("gpt2")
        (blob,) = (p for p in (home / "cache").rglob("model.safetensors"))
        content = bytearray(blob.resolve().read_bytes())
        content[-1] ^= 1
        blob.resolve().write_bytes(content)
        with pytest.raises(UserError, match="was damaged in transit"):
            mlxgpt.import_model("gpt2", run="again")
        assert mlxgpt.import_model("gpt2", run="again").steps() == [0]


def test_too_little_disk_space_is_reported_before_the_download(
    home: Path, gpt2_repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub({"models/openai-community/gpt2": gpt2_repository})
    fake_shutil = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(download, "shutil", fake_shutil)
    with (
        connected(hub, home, monkeypatch),
        pytest.raises(UserError, match=r"needs 0\.00 GB of disk space, but only 0\.00"),
    ):
        mlxgpt.import_model("gpt2")
    assert not any("safetensors" in line for line in hub.cdn.requests)


def test_model_without_safetensors_is_refused(
    home: Path, gpt2_repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = dict(gpt2_repository.commits[gpt2_repository.branches["main"]])
    del files["model.safetensors"]
    hub = Hub({"models/owner/old": Repository({"main": files})})
    with connected(hub, home, monkeypatch), pytest.raises(UserError) as error:
        mlxgpt.import_model("owner/old")
    assert "has no model.safetensors" in error.value.problem
    assert "a pickle, which can run code" in error.value.remedy
