"""LoRA and DoRA adapters, by us, PEFT and mlx-lm: logits, gradients, both directions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_unflatten

import mlxgpt
from mlxgpt import api
from mlxgpt.config import Config, override_config
from mlxgpt.convert.adapters import AdapterModel
from mlxgpt.data.token_array import Batch
from mlxgpt.model.lora import add_lora
from mlxgpt.model.parameters import flatten_params
from mlxgpt.storage import run as runs
from mlxgpt.storage.loading import load_model
from mlxgpt.training.step import TrainStep
from tests.helpers.training_runs import QWEN3_PARTS, train_fox_model

torch = pytest.importorskip("torch", reason="torch is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers")
mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
tuner = pytest.importorskip("mlx_lm.tuner.utils")

# PEFT uses an attribute that transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

KINDS = {"classic": {"tied": True}, "modern": {**QWEN3_PARTS, "bias": False}}
LORA = {"lora_rank": 4, "lora_alpha": 6.0}
TUNING: dict[str, Any] = {
    **LORA,
    "learning_rate": 1e-2,
    "warmup_steps": 1,
    "gradient_accumulation_steps": 2,
    "max_steps": 30,
    "eval_interval": 30,
    "sample_tokens": 0,
}
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=KINDS)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny: Config
) -> Path:
    """A folder with a base run, its export, and texts to tune it on."""
    folder = tmp_path_factory.mktemp("adapters")
    shape = {"n_embd": 32, "n_layer": 3, "block_size": 128, "dropout": 0.0}
    train_fox_model(folder, override_config(tiny, {**shape, **KINDS[request.param]}), stories=120)
    api.export(to="hf", run="fox", output=folder / "exports/fox-hf", runs_dir=folder / "runs")
    stories = [f"Once upon a time there were {n} cats." for n in range(120)]
    (folder / "cats.txt").write_text("<|endoftext|>".join(stories))
    talks = [
        {
            "prompt": [{"role": "user", "content": f"{n}?"}],
            "completion": [{"role": "assistant", "content": f"{n} cats."}],
        }
        for n in range(20)
    ]
    (folder / "talk.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(params=[False, True], ids=["lora", "dora"])
def dora(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def tune(source: str = "cats.txt", **settings: Any) -> runs.Run:
    return runs.open_run(
        api.train(init_from="fox", source=source, run="tuned", **TUNING, **settings).run
    )


def load_peft(folder: str, vocab_size: int | None = None) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained("exports/fox-hf")
    if vocab_size:
        model.resize_token_embeddings(vocab_size)
    return peft.PeftModel.from_pretrained(model, folder).eval()


def make_ids(vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, (2, 24))


def compare_with_peft(run: str, model: Any) -> float:
    """Largest difference of the logits."""
    loaded = mlxgpt.load(run)
    vocab_size = loaded.tokenizer.vocab_size
    ids = make_ids(vocab_size)
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits.numpy()
    return float(abs(loaded.logits(ids)[..., :vocab_size] - theirs[..., :vocab_size]).max())


def compare_with_mlx_lm(run: str, model: Any) -> float:
    loaded = mlxgpt.load(run)
    vocab_size = loaded.tokenizer.vocab_size
    ids = make_ids(vocab_size)
    theirs = np.array(model(mx.array(ids)).astype(mx.float32))
    return float(abs(loaded.logits(ids)[..., :vocab_size] - theirs).max())


@pytest.mark.parametrize("layers", [0, 2])
def test_peft_and_mlx_lm_load_our_adapters(here: Path, dora: bool, layers: int) -> None:
    run = tune(dora=dora, lora_layers=layers)
    base_logits = mlxgpt.load("tuned", adapter=False).logits(make_ids(100))
    assert abs(base_logits - mlxgpt.load("tuned").logits(make_ids(100))).max() > 0.1
    prompt = "Once upon"
    ours = mlxgpt.generate(prompt, run="tuned", temperature=0, max_tokens=12).texts[0]

    api.export(to="peft", adapters=True, run="tuned")
    model = load_peft("exports/tuned-peft")
    assert compare_with_peft("tuned", model) < TOLERANCE
    tokenizer = transformers.AutoTokenizer.from_pretrained("exports/tuned-peft")
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(output[0], skip_special_tokens=True) == ours

    api.export(to="mlx-lm", adapters=True, run="tuned")
    model, tokenizer = mlx_lm.load("exports/fox-hf", adapter_path="exports/tuned-mlx-lm")
    assert compare_with_mlx_lm("tuned", model) < TOLERANCE
    ids = tokenizer.encode(prompt)
    stream = list(mlx_lm.stream_generate(model, tokenizer, ids, max_tokens=12))
    new_ids = [response.token for response in stream]
    assert run.tokenizer.decode([*ids, *new_ids]).removeprefix("<|endoftext|>") == ours

    expected = run.load_first_valid([run.checkpoint_path()]).parameters
    for runtime in ("peft", "mlx-lm"):
        back = api.import_model(f"exports/tuned-{runtime}", base="fox", run=f"from-{runtime}")
        assert back.config.lora == run.config.lora
        arrays = back.load_first_valid([back.checkpoint_path()]).parameters
        assert arrays.keys() == expected.keys()
        for name, value in arrays.items():
            np.testing.assert_array_equal(np.array(value), np.array(expected[name]))


def test_gradients_are_pefts(here: Path, dora: bool) -> None:
    """Of lora_a, lora_b and m, at values other than the initial ones."""
    run = tune(dora=dora)
    api.export(to="peft", adapters=True, run="tuned")
    theirs = load_peft("exports/tuned-peft").train()
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad = "lora_" in name
    ids = make_ids(run.tokenizer.vocab_size)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    logits = theirs(torch.tensor(inputs)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())
    loss.backward()
    model, _ = load_model(runs.open_run(Path("runs/fox")))
    add_lora(model, run.config.lora)
    adapters = run.load_first_valid([run.checkpoint_path()]).parameters
    model.update(tree_unflatten(list(adapters.items())))
    step = TrainStep(model, run.config)
    batch = Batch(mx.array(inputs[None]), mx.array(targets[None]), None)
    our_loss, gradients = step.compute_gradients(batch, mx.random.key(0))
    assert float(our_loss) == pytest.approx(loss.item(), abs=1e-5)
    # Gradients of q, k and v add up in the shared a, and are parts of b's and m's.
    their_gradients = {
        name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector"): p.grad
        for name, p in theirs.named_parameters()
        if p.grad is not None
    }
    exported = AdapterModel(run.config.model, run.config.lora, gradients, range(0), "fox")
    sums: dict[int, Any] = {}
    compared = 0
    for name, arrays in exported.split():
        for kind, ours in arrays.items():
            suffix = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}.get(kind)
            key = f".{name}.{suffix or 'lora_magnitude_vector'}"
            (gradient,) = [g for n, g in their_gradients.items() if n.endswith(key)]
            gradient = gradient.numpy().T
            compared += 1
            if kind == "lora_a":
                _, total = sums.get(id(ours), (ours, 0))
                sums[id(ours)] = (ours, total + gradient)
            else:
                np.testing.assert_allclose(np.array(ours), gradient, atol=1e-5, rtol=1e-3)
    assert compared == len(their_gradients)
    for ours, gradient in sums.values():
        np.testing.assert_allclose(np.array(ours), gradient, atol=1e-5, rtol=1e-3)


def test_adapters_trained_elsewhere_come_in(here: Path, dora: bool) -> None:
    """Separate ranks of q, k and v, and only some layers, as PEFT and mlx-lm do by default."""
    is_modern = runs.open_run(Path("runs/fox")).config.model.position == "rope"
    targets = ["q_proj", "v_proj", "up_proj"] if is_modern else ["c_attn"]
    base = transformers.AutoModelForCausalLM.from_pretrained("exports/fox-hf")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=targets,
        use_dora=dora,
        fan_in_fan_out=not is_modern,
        use_rslora=not dora,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained("theirs")
    run = api.import_model("theirs", base="fox")
    assert run.config.lora.lora_rank == (8 if is_modern else 4)
    assert compare_with_peft("theirs", model) < TOLERANCE
    api.export(to="hf", run="theirs")
    fused = transformers.AutoModelForCausalLM.from_pretrained("exports/theirs-hf")
    assert compare_with_peft("theirs", fused) < TOLERANCE

    model, _ = mlx_lm.load("exports/fox-hf")
    keys = [f"{'self_attn' if is_modern else 'attn'}.{targets[0]}"]
    parameters = {"rank": 3, "scale": 2.5, "dropout": 0.0, "keys": keys}
    tuner.linear_to_lora_layers(model, 2, parameters, use_dora=dora)
    arrays = {
        name: value + 0.2 * mx.random.normal(value.shape)
        for name, value in flatten_params(model.parameters()).items()
        if name.rpartition(".")[2] in ("lora_a", "lora_b", "m")
    }
    model.load_weights(list(arrays.items()), strict=False)
    Path("mlx").mkdir()
    mx.save_safetensors("mlx/adapters.safetensors", arrays)
    Path("mlx/adapter_config.json").write_text(
        json.dumps(
            {
                "fine_tune_type": "dora" if dora else "lora",
                "num_layers": 2,
                "lora_parameters": parameters,
            }
        )
    )
    run = api.import_model("mlx", base="fox")
    assert run.config.lora.lora_layers == 2
    assert compare_with_mlx_lm("mlx", model) < TOLERANCE


def test_rows_of_new_tokens_are_pefts_trainable_tokens(here: Path) -> None:
    run = tune("talk.jsonl")
    before = mlxgpt.load("fox")
    assert run.tokenizer.vocab_size == before.tokenizer.vocab_size + 2
    arrays = run.load_first_valid([run.checkpoint_path()]).parameters
    assert "wte.new_rows" in arrays
    with pytest.raises(mlxgpt.UserError, match="which mlx-lm's adapters cannot hold"):
        api.export(to="mlx-lm", adapters=True, run="tuned")
    api.export(to="peft", adapters=True, run="tuned")
    model = load_peft("exports/tuned-peft", run.tokenizer.vocab_size)
    assert compare_with_peft("tuned", model) < TOLERANCE
    with pytest.raises(mlxgpt.UserError, match="trainable_token_indices"):
        api.import_model("exports/tuned-peft", base="fox", run="back")


@pytest.mark.parametrize("source", ["cats.txt", "talk.jsonl"])
def test_the_example_of_the_card_runs(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    run = tune(source)
    api.export(to="peft", adapters=True, run="tuned")
    card = Path("exports/tuned-peft/README.md").read_text()
    assert ("resize_token_embeddings" in card) == run.has_chat_template
    monkeypatch.chdir("exports/tuned-peft")
    code = card.partition("```python\n")[2].partition("```")[0]
    exec(code, {})
    assert capsys.readouterr().out.strip()
