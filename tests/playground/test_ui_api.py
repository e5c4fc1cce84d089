from __future__ import annotations

import base64
import json
import shutil
import threading
import time
from typing import Any

import numpy as np
import pytest

from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.loaded_model import LoadedModel, load
from mlxgpt.playground import ui_api
from mlxgpt.playground.ui_api import _example_prompt, _label_prompt_tokens, _token_label
from tests.helpers.play_server import PlayServer


@pytest.fixture(scope="module")
def model(served: PlayServer) -> LoadedModel:
    return load(str(served.folder))


def test_run_info(served: PlayServer, model: LoadedModel) -> None:
    result = served.get("/api/run").json()
    assert (result["name"], result["step"]) == ("done", model.step)
    assert (result["n_layer"], result["n_head"], result["block_size"]) == (2, 2, 8)
    assert result["snapshots"] == model.run.saved_steps() == [0, 8, 12]


def test_generate_matches_the_python_api(served: PlayServer, model: LoadedModel) -> None:
    for settings in ({"temperature": 0.5}, {"top_k": 3}, {"temperature": 0, "min_p": 0.1}):
        first, *events, last = served.post_stream(
            "/api/generate", text="to be", seed=5, max_tokens=20, **settings
        )
        assert [id for id, _, _ in first["prompt"]] == model.encode("to be").tolist()
        assert "".join(text for _, text, _ in first["prompt"]) == "to be"
        assert (first["seed"], first["step"], last) == (5, model.step, {"finish_reason": "length"})
        text = "to be" + "".join(event["text"] for event in events)
        assert [text] == model.generate("to be", seed=5, max_tokens=20, **settings).texts
        for event in events:
            ids, names, shares = zip(*event["alternatives"], strict=True)
            assert len(ids) == ui_api.TOP_TOKEN_COUNT
            assert list(shares) == sorted(shares, reverse=True)
            assert list(names) == [_token_label(model.tokenizer, id) for id in ids]
            if event["id"] in ids:
                assert event["probability"] == shares[ids.index(event["id"])]


def test_generate_continues_from_ids(served: PlayServer, model: LoadedModel) -> None:
    first, *events, _ = served.post_stream("/api/generate", text="to", seed=5, max_tokens=6)
    prompt_ids = [id for id, _, _ in first["prompt"]]
    kept_ids = [event["id"] for event in events[:2]]
    branch_id = events[2]["alternatives"][3][0]
    resumed, *rest, _ = served.post_stream(
        "/api/generate", ids=[*prompt_ids, *kept_ids, branch_id], seed=9, max_tokens=4
    )
    assert [id for id, _, _ in resumed["prompt"]] == [*prompt_ids, *kept_ids, branch_id]
    expected = list(model.iter_tokens([*prompt_ids, *kept_ids, branch_id], seed=9, max_tokens=4))
    assert [event["id"] for event in rest] == [event.id for event in expected]


def test_generate_replies_to_messages(own_server: PlayServer, model: LoadedModel) -> None:
    """With the run's chat template; the oldest messages are dropped if they do not fit."""
    assert own_server.get("/api/run").json()["has_chat_template"] is False
    template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    (own_server.folder / "chat_template.jinja").write_text(template)
    assert own_server.get("/api/run").json()["has_chat_template"] is True
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": "to"} for role in roles]
    first, *events, last = own_server.post_stream(
        "/api/generate", messages=messages, seed=5, max_tokens=4
    )
    assert "".join(text for _, text, _ in first["prompt"]) == "to\n"  # half of the block is 4 ids
    assert last == {"finish_reason": "length"}
    text = "to\n" + "".join(event["text"] for event in events)
    expected = model.iter_tokens(model.tokenizer.encode("to\n").tolist(), seed=5, max_tokens=4)
    assert text == "to\n" + "".join(output.text for output in expected)


def test_generate_at_a_step(served: PlayServer) -> None:
    texts = {
        step: "".join(
            event.get("text", "")
            for event in served.post_stream(
                "/api/generate", text="to", step=step, seed=1, max_tokens=30
            )
        )
        for step in (0, 8, 12)
    }
    assert len(set(texts.values())) == 3
    assert "no checkpoint '5'" in served.post_error("/api/generate", text="to", step=5)


def test_next_tokens_before_and_after_sampling_settings(
    served: PlayServer, model: LoadedModel
) -> None:
    candidates = served.post_ok("/api/next_tokens", text="to be", temperature=1, top_k=3)[
        "top_tokens"
    ]
    logits = model.logits(model.encode("to be"))[-1, : model.tokenizer.vocab_size]
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    assert [id for id, *_ in candidates] == np.argsort(-shares)[: ui_api.TOP_TOKEN_COUNT].tolist()
    np.testing.assert_allclose(
        [row[2] for row in candidates], np.sort(shares)[::-1][:12], atol=1e-5
    )
    probabilities = [row[3] for row in candidates]
    assert sum(share > 0 for share in probabilities) == 3
    assert sum(probabilities) == pytest.approx(1, abs=1e-5)
    unfiltered = served.post_ok("/api/next_tokens", text="to be", temperature=1)["top_tokens"]
    assert [row[3] for row in unfiltered] == pytest.approx([row[2] for row in unfiltered])


def test_attention_and_disabled_heads(served: PlayServer, model: LoadedModel) -> None:
    ids = model.encode("to be or").tolist()
    result = served.post_ok("/api/attention", ids=ids, layer=1)
    attention = np.frombuffer(base64.b64decode(result["attention"]), np.uint8).reshape(
        2, len(ids), -1
    )
    expected = model.trace_forward(ids).attention[1]
    np.testing.assert_allclose(attention / 255, expected, atol=0.5 / 255 + 1e-6)
    assert [tuple(token) for token in result["tokens"]] == _label_prompt_tokens(
        model.tokenizer, ids
    )
    assert result["baseline_next_tokens"] == result["next_tokens"]
    ablated = served.post_ok("/api/attention", ids=ids, layer=1, disabled_heads=[1])
    assert ablated["baseline_next_tokens"] == result["next_tokens"] != ablated["next_tokens"]
    expected = model.trace_forward(ids, [(0, 1)]).next_tokens(ui_api.TOP_TOKEN_COUNT)
    assert [(id, share) for id, _, share in ablated["next_tokens"]] == expected
    assert "no such attention head" in served.post_error(
        "/api/attention", ids=ids, disabled_heads=[4]
    )
    assert "layer = 2 is not valid" in served.post_error("/api/attention", ids=ids, layer=2)


def test_logit_lens_and_neighbors(served: PlayServer, model: LoadedModel) -> None:
    ids = model.encode("to be or").tolist()
    layers = served.post_ok("/api/lens", ids=ids, position=3)["layers"]
    assert len(layers) == 3
    expected = model.trace_forward(ids).logit_lens(3, 5)
    assert [[(id, share) for id, _, share in layer] for layer in layers] == expected
    neighbors = served.post_ok("/api/neighbors", token_id=2)["neighbors"]
    assert [(id, share) for id, _, share in neighbors] == model.find_neighbors(
        2, ui_api.TOP_TOKEN_COUNT
    )


def test_attention_uses_the_last_tokens_of_a_long_text(served: PlayServer) -> None:
    result = served.post_ok("/api/attention", text="to be or not to be")
    assert "".join(text for _, text, _ in result["tokens"]) == "ot to be"[-8:]


@pytest.mark.parametrize(
    ("path", "body", "why"),
    [
        ("/api/generate", {"text": 7}, "text = 7 is not valid"),
        ("/api/generate", {"text": "Ж"}, "does not know these characters: 'Ж'"),
        ("/api/generate", {"ids": [99]}, "is not in 0 to"),
        ("/api/generate", {"ids": "a"}, "send a list of at most 20,000 token ids"),
        ("/api/generate", {"text": "t", "max_tokens": 10**6}, "max_tokens = 1000000 is not valid"),
        ("/api/generate", {"text": "t", "temperature": -1}, "temperature"),
        ("/api/generate", {"text": "t", "temperature": "hot"}, 'temperature = "hot" is not valid'),
        ("/api/generate", {"text": "t" * 100_001}, "a string of at most 100,000 characters"),
        ("/api/next_tokens", {"text": "t", "top_k": True}, "top_k = true is not valid"),
        ("/api/lens", {"text": "t", "position": 1}, "position = 1 is not valid"),
        ("/api/neighbors", {"token_id": 10**6}, "token_id = 1000000 is not valid"),
    ],
)
def test_invalid_fields_are_refused(
    served: PlayServer, path: str, body: dict[str, Any], why: str
) -> None:
    message = served.post_error(path, **body)
    assert why in message
    assert "→" in message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_body_that_is_not_an_object_is_refused(served: PlayServer, content: bytes) -> None:
    with served.client() as client:
        assert client.post("/api/next_tokens", content=content).status_code == 400


def test_curves_come_from_the_run_files(own_server: PlayServer) -> None:
    result = own_server.get("/api/curves").json()
    assert (result["step"], result["max_steps"]) == (12, 12)
    assert [step for step, _ in result["val_loss"]] == [4, 8, 12]
    assert [step for step, _ in result["samples"]] == [4, 8, 12]
    line = {"step": 14, "loss": 1.25, "tokens_per_second": 10.0}
    with (own_server.folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    result = own_server.get("/api/curves").json()
    assert (result["step"], result["loss"][-1]) == (14, [14, 1.25])


def test_long_curves_are_downsampled(own_server: PlayServer) -> None:
    lines = [{"step": n, "loss": 1 / n} for n in range(1, 20_001)]
    (own_server.folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in lines)
    )
    assert 500 < len(own_server.get("/api/curves").json()["loss"]) < 1300


def test_run_without_a_checkpoint(own_server: PlayServer) -> None:
    for name in ("checkpoints", "snapshots"):
        shutil.rmtree(own_server.folder / name)
    result = own_server.get("/api/run").json()
    assert (result["step"], result["snapshots"]) == (None, [])
    assert "no checkpoint yet" in own_server.post_error("/api/generate", text="to")


def test_run_deleted_while_it_is_served(own_server: PlayServer) -> None:
    """Cached models still work; others raise an error."""
    events = own_server.post_stream("/api/generate", text="to", seed=1, max_tokens=9)
    shutil.rmtree(own_server.folder)
    assert own_server.post_stream("/api/generate", text="to", seed=1, max_tokens=9) == events
    for path in ("/api/run", "/api/curves"):
        response = own_server.get(path)
        assert response.status_code == 400
        assert "no longer exists" in response.json()["error"]["message"]
    assert "no longer exists" in own_server.post_error("/api/generate", text="to", step=4)


def test_concurrent_generations_take_turns(served: PlayServer) -> None:
    """A short one that starts later finishes before a long one."""
    finished: list[str] = []

    def generate(name: str, count: int) -> None:
        events = served.post_stream("/api/generate", text="to", seed=1, max_tokens=count)
        assert len(events) == count + 2
        finished.append(name)

    thread = threading.Thread(target=generate, args=("long", 1500))
    thread.start()
    time.sleep(0.05)
    generate("short", 10)
    thread.join(300)
    assert finished == ["short", "long"]


def test_disconnecting_stops_generation(
    served: PlayServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_ids: list[int] = []
    original = LoadedModel.iter_tokens

    def counting(self: LoadedModel, *args: Any, **kwargs: Any) -> Any:
        for token in original(self, *args, **kwargs):
            token_ids.append(token.id)
            time.sleep(0.002)
            yield token

    monkeypatch.setattr(LoadedModel, "iter_tokens", counting)
    body = {"text": "to", "max_tokens": 4000}
    with served.client() as client, client.stream("POST", "/api/generate", json=body) as response:
        for _ in response.iter_text():
            if token_ids:
                break
    deadline = time.monotonic() + 300
    count = -1
    while count != len(token_ids) and time.monotonic() < deadline:
        count = len(token_ids)
        time.sleep(1)
    assert 0 < count == len(token_ids) < 3000


def test_characters_of_several_tokens() -> None:
    tokenizer = BPETokenizer([])  # no merges
    ids = tokenizer.encode("a🙂é").tolist()
    pieces = _label_prompt_tokens(tokenizer, ids)
    assert [text for _, text, _ in pieces] == ["a", "", "", "", "🙂", "", "é"]
    assert [name for _, _, name in pieces][1:4] == ["<F0>", "<9F>", "<99>"]


def test_example_prompt_fits_the_vocabulary(served: PlayServer, model: LoadedModel) -> None:
    assert _example_prompt(model.tokenizer) == ""  # its vocabulary has no capital T
    assert _example_prompt(BPETokenizer([])) == "Once upon a time"


def test_a_tuned_run_is_compared_with_the_run_it_was_initialized_from(
    tuned_server: PlayServer, own_server: PlayServer
) -> None:
    reference = tuned_server.get("/api/run").json()["reference"]
    assert reference == {"name": "fox", "has_chat_template": False}
    folder = tuned_server.folder
    models = {name: load(str(folder.parent / name)) for name in ("tuned", "fox")}
    prompt = "There were 3"
    request: dict[str, Any] = {"text": prompt, "seed": 5, "max_tokens": 8}
    texts, probabilities = [], []
    for name, model in models.items():
        body = request | {"reference": name == "fox"}
        _, *events, _ = tuned_server.post_stream("/api/generate", **body)
        text = prompt + "".join(event["text"] for event in events)
        assert [text] == model.generate(prompt, seed=5, max_tokens=8).texts
        texts.append(text)
        rows = tuned_server.post_ok("/api/next_tokens", **body)["top_tokens"]
        expected, _ = model.next_token_probs(model.encode(prompt).tolist(), 3)
        assert [id for id, *_ in rows[:3]] == [id for id, _ in expected]
        assert [row[2] for row in rows[:3]] == pytest.approx([share for _, share in expected])
        probabilities.append(rows[0][2])
    assert probabilities[0] != probabilities[1]
    assert own_server.get("/api/run").json()["reference"] is None
    message = own_server.post_error("/api/generate", text="to be", reference=True)
    assert "not in the same folder" in message


def test_curves_explain_the_first_loss(tuned_server: PlayServer, served: PlayServer) -> None:
    """It is ln 2 for preference pairs, and ln(vocabulary size) for text."""
    start = tuned_server.get("/api/curves").json()["start"]
    assert start["loss"] == pytest.approx(np.log(2))
    assert tuned_server.get("/api/curves").json()["loss_unit"] == "nats per pair"
    model = load(str(served.folder))
    start = served.get("/api/curves").json()["start"]
    assert start["loss"] == pytest.approx(np.log(model.run.config.model.vocab_size))
