"""Export to one HTML file that contains the model: weights, tokenizer, and the page that runs them.

The page's modules are those of `mlxgpt play`, with file_api.js instead of the server. Modules of a
file opened from disk cannot import each other, so they are joined into one script.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import mlxgpt
from mlxgpt.config import ModelConfig, SamplingParams
from mlxgpt.config.resolve import PathLike, resolve_folder
from mlxgpt.convert.exporting import ExportResult, find_validation_data
from mlxgpt.convert.model_card import choose_example_prompt, describe_architecture
from mlxgpt.data.chat_template import split_conversation
from mlxgpt.evaluation.loss import EvalDataset, Evaluator, compile_eval_step
from mlxgpt.inference.engine import CompiledModel
from mlxgpt.inference.generate import generate_texts, prepend_bos
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import VOCAB_MATRICES, flatten_params, load_parameters
from mlxgpt.model.stats import find_value_layers
from mlxgpt.storage.loading import load_model, load_run_model
from mlxgpt.storage.run import Run
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

STATIC_DIR = Path(mlxgpt.__file__).parent / "playground" / "static"
HTML_BITS = (8, 4, 16, 32)  # bits per weight; the first is the default
MAX_HTML_BYTES = 60_000_000  # more takes seconds and a gigabyte of memory to open


@dataclass(frozen=True)
class PackedWeights:
    """Weights as the page reads them.

    Attributes:
        bits: bits per weight of the matrices.
        content: all arrays, aligned to 4 bytes.
        index: name, shape, bits and offsets in bytes of each array.
        rounded: the arrays that the page computes with, float32, by name.
    """

    bits: int
    content: bytes
    index: list[dict[str, Any]]
    rounded: dict[str, mx.array]


def pack_weights(parameters: Mapping[str, mx.array], bits: int) -> PackedWeights:
    """Pack a model's parameters: matrices with `bits` bits per value and, for 8 and 4 bits, a
    float32 scale per row; vectors as float32.
    """
    content, index, rounded = bytearray(), [], {}
    for name, parameter in parameters.items():
        array = np.array(parameter.astype(mx.float32))
        array_bits = bits if array.ndim > 1 else 32
        stored, scale, restored = _round(array, array_bits)
        if not np.isfinite(restored).all():
            raise UserError(
                f"{name} contains values that {bits} bits cannot represent",
                "use --quantize 32, or another checkpoint if the loss is not finite.",
            )
        entry = {"name": name, "shape": array.shape, "bits": array_bits, "scales": None}
        if scale is not None:
            entry["scales"] = len(content)
            content += _little_endian(scale).tobytes()
        index.append({**entry, "offset": len(content)})
        content += _pack_nibbles(stored) if array_bits == 4 else _little_endian(stored).tobytes()
        content += bytes(-len(content) % 4)
        rounded[name] = mx.array(restored)
    return PackedWeights(bits, bytes(content), index, rounded)


def _round(array: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Round a float32 array: the stored values, their scale per row if they have one, and the
    values that they stand for; not finite where that is impossible.
    """
    if bits == 32:
        return array, None, array
    with np.errstate(over="ignore", invalid="ignore"):
        if bits == 16:
            halves = array.astype(np.float16)
            return halves, None, halves.astype(np.float32)
        largest = 2 ** (bits - 1) - 1
        scale = (np.abs(array).max(axis=-1, keepdims=True) / largest).astype(np.float32)
        integers = np.rint(array / np.where(scale, scale, 1)).astype(np.int8)
        return integers, scale, integers * scale


def _little_endian(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder("<"))


def _pack_nibbles(values: np.ndarray) -> bytes:
    """Pack values from −8 to 7 in pairs, the first in the lower half of a byte."""
    halves = (values.flatten() + 8).astype(np.uint8)
    halves = np.append(halves, np.zeros(halves.size % 2, np.uint8))
    packed: bytes = (halves[0::2] | halves[1::2] << 4).tobytes()
    return packed


def make_page_info(
    run: Run, step: int, config: ModelConfig, packed: PackedWeights
) -> dict[str, Any]:
    """What the page needs: the same as `mlxgpt play` sends, and the model.

    Args:
        config: with the vocabulary size of the packed weights.
    """
    tokenizer, conversation = run.tokenizer, None
    if run.has_chat_template:
        conversation = split_conversation(run.chat_template(), tokenizer)
        if conversation is None:
            logger.info("the file has no chat: its template cannot be split into messages")
    return {
        "is_file": True,
        "name": run.name,
        "step": step,
        "parameters": sum(array.size for array in packed.rounded.values()),
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "block_size": config.block_size,
        "vocab_size": config.vocab_size,
        "example_prompt": choose_example_prompt(run, EXAMPLE_PROMPT_TOKENS),
        "has_chat_template": conversation is not None,
        "reference": None,
        "config": {**asdict(config), "value_layers": find_value_layers(config)},
        "weights": packed.index,
        "end_of_text": tokenizer.end_of_text,
        "bos": run.bos,
        "empty_prompt": prepend_bos(np.array([], dtype=int), tokenizer, run.bos).tolist(),
        "conversation": conversation,
    }


def describe_model(
    run: Run, step: int, packed: PackedWeights, losses: tuple[float, float] | None
) -> dict[str, str]:
    """What the page says about the model: title -> text.

    Args:
        losses: validation loss with the original and with the packed weights, if measured.
    """
    best, rows = run.best(), {"architecture": describe_architecture(run.config.model)}
    if run.data_name:
        names = ", ".join(Path(source).name for source in run.config.data.source)
        rows["trained on"] = names
        rows["training steps"] = f"{step:,}"
        rows["training tokens"] = f"{step * run.tokens_per_step:,.0f}"
    if run.origin:
        rows["initialized from"] = ", ".join(f"{key} {value}" for key, value in run.origin.items())
    if best and best["step"] == step:
        rows[f"validation loss, {run.config.loss_unit}"] = f"{best['val_loss']:.4f}"
    rows["weights"] = f"{packed.bits} bits, {len(packed.content) / 1e6:.1f} MB"
    if losses:
        rows["loss of these weights"] = f"{losses[1]:.4f}"
        rows["loss with 32 bits"] = f"{losses[0]:.4f}"
    rows["exported"] = f"{date.today().isoformat()}, mlxgpt {mlxgpt.__version__}"
    return rows


def export_html(
    *,
    run: str | None = None,
    checkpoint: str = "best",
    quantize: int = HTML_BITS[0],
    snapshots: int = 0,
    output: PathLike | None = None,
    runs_dir: PathLike | None = None,
    data_dir: PathLike | None = None,
) -> ExportResult:
    """Export a run's model to one HTML file, which contains the model and a page that runs it in a
    browser, offline.

    Args:
        quantize: bits per weight: 8, 4, 16 or 32.
        snapshots: show what the model wrote at this many saved steps.
        output: file to write; default: exports/RUN.html.
        run, checkpoint: see `load`.

    Raises:
        UserError: if the file exists, would be too large or cannot be written.
    """
    if quantize not in HTML_BITS:
        raise UserError(
            f"--quantize {quantize} is not one of {', '.join(map(str, HTML_BITS))}",
            "use one of these.",
        )
    opened_run, model, step = load_run_model(run, checkpoint, runs_dir, fall_back=False)
    path = Path(output) if output else Path("exports") / f"{opened_run.name}.html"
    if files.exists(path):
        raise UserError(f"{path} already exists", "choose another file: --output FILE.html.")
    vocab_size = opened_run.tokenizer.vocab_size
    # Rows of padding are dropped: they are never sampled.
    parameters = {
        name: value[:vocab_size] if name in VOCAB_MATRICES else value
        for name, value in flatten_params(model.parameters()).items()
    }
    size = sum(value.size for value in parameters.values()) * quantize / 8 * 4 / 3  # base64
    if size > MAX_HTML_BYTES:
        raise UserError(
            f"the file would have {size / 1e6:,.0f} MB, and browsers have trouble with more than "
            f"{MAX_HTML_BYTES / 1e6:.0f} MB",
            "use fewer bits, such as --quantize 4, or a smaller model.",
        )
    packed = pack_weights(parameters, quantize)
    config = replace(opened_run.config.model, vocab_size=vocab_size)
    val, losses = find_validation_data(opened_run, resolve_folder("data", data_dir)), None
    if val is not None:
        rounded = GPT(config)
        load_parameters(rounded, packed.rounded)
        dataset = EvalDataset(val, opened_run.tokenizer, opened_run.bos)
        losses = _measure_loss(model, dataset), _measure_loss(rounded, dataset)
    info = make_page_info(opened_run, step, config, packed)
    info["about"] = list(describe_model(opened_run, step, packed, losses).items())
    info["texts"] = write_snapshot_texts(opened_run, info["example_prompt"], snapshots)
    page = render_html(info, opened_run.tokenizer.to_json(), packed.content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, page)
    except OSError as error:
        raise files.to_user_error(error, "write", path, "choose another --output.") from error
    return ExportResult(path, step, *(losses or (None, None)))


MAX_EVAL_TOKENS = 100_000
EVAL_BATCH_SIZE = 8


def _measure_loss(model: GPT, dataset: EvalDataset) -> float:
    """Validation loss of a model, on at most MAX_EVAL_TOKENS."""
    step = compile_eval_step(model, mx.float32)
    evaluator = Evaluator(model, dataset, step, batch_size=EVAL_BATCH_SIZE, limit=MAX_EVAL_TOKENS)
    return evaluator().loss


SNAPSHOT_TOKENS = 120
EXAMPLE_PROMPT_TOKENS = 8


def write_snapshot_texts(run: Run, prompt: str, count: int) -> list[tuple[int, str]]:
    """Texts after a prompt by the models of `count` saved steps: (step, text)."""
    if not count:
        return []
    steps = run.saved_steps()
    indices = np.unique(np.linspace(0, len(steps) - 1, min(count, len(steps))).round().astype(int))
    sampling = SamplingParams(max_tokens=SNAPSHOT_TOKENS, temperature=0.8, seed=1)
    texts = []
    for step in (steps[index] for index in indices):
        model = CompiledModel(load_model(run, str(step))[0], run.tokenizer.vocab_size)
        output = generate_texts(model, run.tokenizer, [prompt], sampling, bos=run.bos)
        texts.append((step, output.texts[0]))
    return texts


MODULES = {"./api.js": "file_api.js", "./training.js": "about.js"}  # other ones in a file
IMPORT = re.compile(r'^import (?:\* as (\w+)|(\{[^}]*\})) from "([^"]+)";\n', re.MULTILINE)
EXPORT = re.compile(r"^export ((?:async )?function\*? |const |class )(\w+)", re.MULTILINE)


def bundle_modules(entry: str = "app.js") -> str:
    """Join a module and those it imports into one script."""
    bodies: dict[str, str] = {}

    def add(name: str) -> None:
        if name in bodies:
            return
        source = (STATIC_DIR / name).read_text(encoding="utf-8")
        paths = {path: MODULES.get(path, path[2:]) for *_, path in IMPORT.findall(source)}
        for module in paths.values():
            add(module)
        body = IMPORT.sub(
            lambda match: f"const {match[1] or match[2]} = modules['{paths[match[3]]}'];\n", source
        )
        names = ", ".join(name for _, name in EXPORT.findall(source))
        body = EXPORT.sub(r"\1\2", body)
        bodies[name] = f"modules['{name}'] = (() => {{\n{body}return {{ {names} }};\n}})();\n"

    add(entry)
    return "const modules = {};\n" + "\n".join(bodies.values())


def render_html(info: Mapping[str, Any], tokenizer_json: str, weights: bytes) -> str:
    """Render the page that contains a model.

    Args:
        info: what the page shows and needs, see file_api.js.
        tokenizer_json: contents of tokenizer.json.
    """
    script, style = bundle_modules(), (STATIC_DIR / "play.css").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src '{_source_hash(script)}'; "
        f"style-src '{_source_hash(style)}'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    page = (STATIC_DIR / "index.html").read_text(encoding="utf-8")
    page = re.sub(r"<!-- server -->.*?<!-- /server -->\n?", "", page, flags=re.DOTALL)
    page = re.sub(r"<!-- file\n(.*?)/file -->\n", r"\1", page, flags=re.DOTALL)
    head = (
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{style}</style>\n'
    )
    body = "".join(
        f'<script type="{kind}" id="{id}">{text}</script>\n'
        for kind, id, text in (
            ("application/json", "model-info", _to_script_json(info)),
            ("application/json", "model-tokenizer", _escape(tokenizer_json)),
            ("text/plain", "model-weights", base64.b64encode(weights).decode()),
        )
    )
    return page.replace("</head>", f"{head}</head>").replace(
        "</body>", f"{body}<script>{script}</script>\n</body>"
    )


def _source_hash(content: str) -> str:
    digest = hashlib.sha256(content.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _to_script_json(tree: Any) -> str:
    return _escape(json.dumps(tree))


def _escape(text: str) -> str:
    """Escape JSON so that it cannot end its script element."""
    return text.replace("<", "\\u003c")
