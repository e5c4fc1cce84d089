"""TinyStories, web pages and other datasets from the hub, from an empty cache to token arrays."""

from __future__ import annotations

import signal
from pathlib import Path

from mlxgpt.config import override_config, toml
from mlxgpt.data.dataset import open_dataset
from mlxgpt.data.hub import HUB_DATASETS
from tests.helpers.fake_hub import (
    PARQUET_BRANCH,
    Files,
    GitHub,
    Hub,
    Repository,
    make_shakespeare_repos,
    to_parquet,
)
from tests.helpers.offline_machine import REFUSED_ADDRESS, SMALL_TEXT, run_offline_machine
from tests.helpers.texts import decode_splits

STORIES = [f"Once upon a time, there were {n} cats.\n" for n in range(300)]
# Two of them are also training stories, one of these with different newlines.
VAL_STORIES = [f"Once upon a time, there were {n} cats." for n in (7, 8, 300, 301)]


def make_tinystories_repos() -> dict[str, Repository]:
    """Make the hub's TinyStories repository."""
    files = {
        "README.md": b"---\nlicense: cdla-sharing-1.0\ntask_categories:\n- text-generation\n---\n",
        "Evaluation prompts.yaml": b"- Once upon a time",
        "MLP_input_output.npy": b"numbers",
        "TinyStories-train.txt": b"stories of GPT-3.5",
        "TinyStoriesV2-GPT4-train.txt": b"stories of GPT-4",
        "TinyStories_all_data.tar.gz": b"everything",
        "data/train-00000-of-00002-2d5a1467fff1081b.parquet": to_parquet(STORIES[:100]),
        "data/train-00001-of-00002-5852b56a2bd28fd9.parquet": to_parquet(STORIES[100:]),
        "data/validation-00000-of-00001-869c898b519ad725.parquet": to_parquet(VAL_STORIES),
    }
    return {"roneneldan/TinyStories": Repository({"main": files})}


# Stories.


def test_tinystories_gets_a_bpe_and_disjoint_splits(tmp_path: Path) -> None:
    command = ("prepare", "tinystories", "--vocab-size", "300")
    with run_offline_machine(tmp_path, Hub(make_tinystories_repos())) as client:
        code, out, err = client.run(*command)
        assert code == 0, err
        assert "downloading roneneldan/TinyStories (1,900 MB of text) from" in err
        assert "vocabulary 300" in out
        train, val = decode_splits(open_dataset(tmp_path / "data" / "tinystories-bpe300"))
        assert val == VAL_STORIES
        assert train == [story.strip() for story in STORIES if story.strip() not in val]
        assert len(train) == 298
        # A prepared dataset needs no hub, and is not used for another tokenizer.
        client.hub = REFUSED_ADDRESS
        assert client.run(*command)[:2] == (0, out)
        code, _, err = client.run(*command[:2], "--name", "tinystories-bpe300")
        assert code == 2
        assert "or with a different tokenizer" in err


def test_both_splits_come_from_the_same_commit(tmp_path: Path) -> None:
    """The dataset on the hub changes during the download."""
    hub = Hub(make_tinystories_repos(), "moves")
    with run_offline_machine(tmp_path, hub) as client:
        code, _, err = client.run("prepare", "tinystories", "--vocab-size", "300")
        assert code == 0, err
    train, val = decode_splits(open_dataset(tmp_path / "data" / "tinystories-bpe300"))
    assert len({story.partition("commit")[2] for story in train + val}) == 1
    assert (len(train), len(val)) == (300, 150)
    assert len(hub.repositories["roneneldan/TinyStories"].commits) > 1


def test_xet_failure_suggests_disabling_xet(tmp_path: Path) -> None:
    hub, command = (
        Hub(make_tinystories_repos(), "xet"),
        ("prepare", "tinystories", "--vocab-size", "300"),
    )
    with run_offline_machine(tmp_path, hub) as client:
        code, _, err = client.run(*command, HF_XET_CLIENT_RETRY_MAX_ATTEMPTS="1")
        assert code == 2, err
        assert f"roneneldan/TinyStories {DOWNLOAD_FAILED}RuntimeError: " in err
        assert "set HF_HUB_DISABLE_XET=1" in err.splitlines()[-1]
        assert any("/reconstructions/" in request for request in hub.cdn.requests), "it was tried"
        code, _, err = client.run(*command, HF_HUB_DISABLE_XET="1")
        assert code == 0, err
        assert (
            decode_splits(open_dataset(tmp_path / "data" / "tinystories-bpe300"))[1] == VAL_STORIES
        )


def test_shakespeare_comes_from_its_mirror_if_xet_fails(tmp_path: Path) -> None:
    hub, github = Hub(make_shakespeare_repos(SMALL_TEXT), "xet"), GitHub(SMALL_TEXT)
    with run_offline_machine(tmp_path, hub, github) as client:
        code, _, err = client.run("prepare", "shakespeare", HF_XET_CLIENT_RETRY_MAX_ATTEMPTS="1")
        assert code == 0, err
        assert client.read_splits() == (SMALL_TEXT[:900], SMALL_TEXT[900:])
    assert any("/reconstructions/" in request for request in hub.cdn.requests), "it was tried"
    assert len(github.requests) == 1


def test_single_split_is_divided_by_rows(tmp_path: Path) -> None:
    """The card of tinystories-gpt4-clean assigns 10,000 rows to test, 10,000 to validation."""
    stories = [f"Story {n}." for n in range(20_250)]
    files = {"README.md": b"# Clean\n", "tinystories_gpt4_clean.parquet": to_parquet(stories)}
    hub = Hub({"karpathy/tinystories-gpt4-clean": Repository({"main": files})})
    with run_offline_machine(tmp_path, hub) as client:
        code, _, err = client.run("prepare", "tinystories-gpt4", "--vocab-size", "260")
        assert code == 0, err
    train, val = decode_splits(open_dataset(tmp_path / "data" / "tinystories-gpt4-bpe260"))
    assert train == stories[20_000:]
    assert val == stories[10_000:20_000]


def test_openwebtext_pages_are_split_into_train_and_val(tmp_path: Path) -> None:
    pages = [f"Page {n} of the web." for n in range(400)]
    files = {
        f"data/train-{n:05}-of-00004.parquet": to_parquet(pages[100 * n : 100 * n + 100])
        for n in range(4)
    }
    hub = Hub({"vietgpt/openwebtext_en": Repository({"main": files})})
    with run_offline_machine(tmp_path, hub) as client:
        code, _, err = client.run("prepare", "openwebtext", "--vocab-size", "270")
        assert code == 0, err
    train, val = decode_splits(open_dataset(tmp_path / "data" / "openwebtext-bpe270"))
    assert sorted(train + val) == sorted(pages)
    assert 0 < len(val) < 40


def test_rate_limit_error_suggests_waiting_or_logging_in(tmp_path: Path) -> None:
    with run_offline_machine(tmp_path, Hub(make_tinystories_repos(), "429")) as client:
        code, out, err = client.run("prepare", "tinystories")
    assert (code, out) == (2, "")
    assert f"mlxgpt: roneneldan/TinyStories {DOWNLOAD_FAILED}HTTP status 429)\n" in err
    assert "wait a few minutes, or log in with hf auth login" in err.splitlines()[-1]


def test_rate_limit_during_a_download_without_mirror_is_waited_for(
    tmp_path: Path,
) -> None:
    with run_offline_machine(
        tmp_path, Hub(make_tinystories_repos(), "429", path_filter="data/")
    ) as client:
        process = client.start("prepare", "tinystories")
        assert process.stderr
        assert any("Waiting 301.0s" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
        assert process.returncode == 130
        assert "Traceback" not in err


# Portuguese.

ARTICLES = [f"A região número {n} é uma das nações do coração da América." for n in range(400)]
PORTUGUESE_CARD = """---
license: cc-by-sa-3.0
language:
- pt
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
---
"""


def make_portuguese_hub(column: str = "text", failure: str = "") -> Hub:
    """Make a hub with the Portuguese Wikipedia: one split in several files, as its card says."""
    files = {
        "README.md": PORTUGUESE_CARD.encode(),
        "data/train-00000-of-00002.parquet": to_parquet(ARTICLES[:250], column),
        "data/train-00001-of-00002.parquet": to_parquet(ARTICLES[250:], column),
    }
    return Hub({"TucanoBR/wikipedia-PT": Repository({"main": files})}, failure)


TRAIN_PORTUGUESE = ("train", "--config", "tier2-pt", "--vocab-size", "320")


def test_portuguese_config_trains_with_one_command(tmp_path: Path) -> None:
    small = ("--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--block-size", "16")
    short = ("--max-steps", "2", "--warmup-steps", "1", "--batch-size", "2", "--run", "pt")
    with run_offline_machine(tmp_path, make_portuguese_hub()) as client:
        code, _, err = client.run(*TRAIN_PORTUGUESE, *small, *short)
        assert code == 0, err
        client.hub = REFUSED_ADDRESS
        code, out, err = client.run("generate", "O coração é", "--run", "pt", "--max-tokens", "4")
        assert code == 0, err
        assert "O coração é" in out
    dataset = open_dataset(tmp_path / "data" / "TucanoBR-wikipedia-PT-bpe320")
    train, val = decode_splits(dataset)
    assert sorted(train + val) == sorted(ARTICLES)
    assert 0 < len(val) < 40
    assert dataset.meta.origin["hub"] == "TucanoBR/wikipedia-PT"
    # Letters with accents are merged as others are.
    assert len(dataset.tokenizer.encode(" coração")) == 1


def test_portuguese_config_differs_from_tier2_only_in_its_source() -> None:
    portuguese = toml.load_config(toml.find_builtin_configs()["tier2-pt"])
    assert list(portuguese.data.source) == ["hf:TucanoBR/wikipedia-PT"]
    assert override_config(portuguese, {"source": "tinystories"}) == toml.load_tier_config(2)


def test_failed_download_of_the_portuguese_text_leaves_nothing(tmp_path: Path) -> None:
    renamed = "TucanoBR/wikipedia-PT has no text column 'text'; available: texto"
    limited = f"TucanoBR/wikipedia-PT {DOWNLOAD_FAILED}HTTP status 429)"
    for name, hub, problem, remedy in (
        ("renamed", make_portuguese_hub("texto"), renamed, "hf:TucanoBR/wikipedia-PT:COLUMN"),
        ("limited", make_portuguese_hub(failure="429"), limited, "--source FILE"),
    ):
        with run_offline_machine(tmp_path / name, hub) as client:
            code, out, err = client.run(*TRAIN_PORTUGUESE)
        assert (code, out) == (2, ""), err
        assert f"mlxgpt: {problem}" in err
        assert remedy in err.splitlines()[-1]
        assert not (tmp_path / name / "data").exists()
        assert not (tmp_path / name / "runs").exists()


# Any dataset.

FABLES = [f"A fox and {n} grapes." for n in range(120)]


def make_fables_repo(column: str = "text", *splits: str) -> Repository:
    texts = {name: FABLES[n::2] for n, name in enumerate(splits or ("train", "validation"))}
    files = {f"{name}.parquet": to_parquet(part, column) for name, part in texts.items()}
    return Repository({"main": {"README.md": b"# Fables\n", **files}})


def test_any_hub_dataset_can_be_prepared(tmp_path: Path) -> None:
    (tmp_path / "aesop" / "fables").mkdir(parents=True)  # a local folder of that name is ignored
    with run_offline_machine(tmp_path, Hub({"aesop/fables": make_fables_repo("fable")})) as client:
        command = ("prepare", "hf:aesop/fables:fable", "--vocab-size", "280")
        code, out, err = client.run(*command)
        assert code == 0, err
        dataset = open_dataset(tmp_path / "data" / "aesop-fables-fable-bpe280")
        assert decode_splits(dataset) == (FABLES[::2], FABLES[1::2])
        assert dataset.meta.origin["hub"] == "aesop/fables"
        assert dataset.meta.origin["column"] == "fable"
        client.hub = REFUSED_ADDRESS
        assert client.run(*command)[:2] == (0, out)


def test_hub_dataset_without_a_validation_split_is_split(tmp_path: Path) -> None:
    with run_offline_machine(
        tmp_path, Hub({"aesop/fables": make_fables_repo("text", "all")})
    ) as client:
        code, _, err = client.run("prepare", "hf:aesop/fables", "--tokenizer", "char")
        assert code == 0, err
    train, val = decode_splits(open_dataset(tmp_path / "data" / "aesop-fables"))
    assert sorted(train + val) == sorted(FABLES[::2])


def test_hub_dataset_with_a_converted_script_can_be_prepared(tmp_path: Path) -> None:
    converted = {f"default/{s}/0000.parquet": to_parquet(FABLES) for s in ("train",)}
    repository = Repository({"main": {"fables.py": b"import os"}, PARQUET_BRANCH: converted})
    with run_offline_machine(tmp_path, Hub({"aesop/fables": repository})) as client:
        assert client.run("prepare", "hf:aesop/fables", "--tokenizer", "char")[0] == 0


DOWNLOAD_FAILED = "could not be downloaded (the Hugging Face hub: "
REFUSED_SOURCES = {
    "hf:aesop/fables:title": "aesop/fables has no text column 'title'; available: text",
    "hf:aesop/numbers": "aesop/numbers has no text column 'text'; available: none",
    "hf:aesop/parts": "aesop/parts has no split 'train'; available: one, two",
    "hf:aesop/nothing": f"aesop/nothing {DOWNLOAD_FAILED}HTTP status 401)",
    "hf:aesop/gated": f"aesop/gated {DOWNLOAD_FAILED}the dataset does not exist, or is private "
    "or gated)",
    "hf:aesop/many": f"aesop/many {DOWNLOAD_FAILED}ValueError: Config name is missing. Please "
    "pick one among "
    "the available configs: ['greek', 'latin']",
    "hf:fables": "'hf:fables' is not a valid dataset name",
}


def make_card(*lines: str) -> Files:
    """Make a dataset card with these lines in its YAML header."""
    return {"README.md": "\n".join(["---", "configs:", *lines, "---", ""]).encode()}


def test_unusable_hub_datasets_are_refused(tmp_path: Path) -> None:
    numbers = Repository({"main": {"train.parquet": to_parquet(range(3), "number")}})
    parts = make_fables_repo("text", "one", "two")
    (files,) = parts.commits.values()
    splits = [f"  - {{split: {name}, path: {name}.parquet}}" for name in ("one", "two")]
    parts.push("main", files | make_card("- config_name: default", "  data_files:", *splits))
    configs = [
        f"- {{config_name: {name}, data_files: {path}.parquet}}"
        for name, path in (("greek", "one"), ("latin", "two"))
    ]
    many_configs = Repository({"main": files | make_card(*configs)})
    gated = Repository({"main": {}}, gated=True)
    hub = Hub(
        {
            "aesop/fables": make_fables_repo(),
            "aesop/numbers": numbers,
            "aesop/parts": parts,
            "aesop/gated": gated,
            "aesop/many": many_configs,
        }
    )
    with run_offline_machine(tmp_path, hub) as client:
        for source, problem in REFUSED_SOURCES.items():
            code, out, err = client.run("prepare", source)
            assert code == 2, source
            assert out == ""
            assert f"mlxgpt: {problem}" in err
            assert len(err.splitlines()[-1]) > 20
            assert ("hf auth login" in err) == (source in ("hf:aesop/nothing", "hf:aesop/gated"))
    assert not (tmp_path / "data").exists()


def test_fake_repositories_match_the_known_hub_datasets() -> None:
    assert HUB_DATASETS["shakespeare"].repo_id in make_shakespeare_repos(SMALL_TEXT)
    assert HUB_DATASETS["tinystories"].repo_id in make_tinystories_repos()
    assert {text.repo_id for text in HUB_DATASETS.values()} == {
        "karpathy/tiny_shakespeare",
        "roneneldan/TinyStories",
        "karpathy/tinystories-gpt4-clean",
        "vietgpt/openwebtext_en",
    }
