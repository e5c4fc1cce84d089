// What api.js does, in a file that contains the model: no server, nothing fetched.

import { filterLogits, GPT, randomNumbers, sample, softmax } from "./gpt.js";
import { t } from "./language.js";
import { Tokenizer, UnknownCharacters } from "./tokenizer.js";

const TOP_TOKENS = 12, MAX_ATTENTION_TOKENS = 128;
const PAUSE_MS = 30; // the page stays responsive: longer computations pause

export class RequestError extends Error {}

const info = JSON.parse(document.getElementById("model-info").textContent);
const tokenizer = new Tokenizer(JSON.parse(document.getElementById("model-tokenizer").textContent), info.end_of_text);
let loadedModel = null;

// The model, decoded from base64 at the first use.
function model() {
  if (!loadedModel) {
    const text = atob(document.getElementById("model-weights").textContent.trim());
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i);
    loadedModel = new GPT(info.config, readWeights(bytes.buffer, info.weights));
  }
  return loadedModel;
}

// Float32Arrays by name. A matrix of 8 or 4 bits has a scale for each row; two values of 4 bits are
// in a byte, the first in the lower half.
export function readWeights(buffer, weights) {
  const arrays = {};
  for (const { name, shape, bits, offset, scales } of weights) {
    const size = shape.reduce((a, b) => a * b), columns = shape.at(-1);
    const data = arrays[name] = new Float32Array(size);
    if (bits === 32) {
      data.set(new Float32Array(buffer, offset, size));
      continue;
    }
    const rowScales = scales === null ? null : new Float32Array(buffer, scales, size / columns);
    if (bits === 16) {
      const halves = new Uint16Array(buffer, offset, size);
      for (let i = 0; i < size; i += 1) data[i] = halfToNumber(halves[i]);
    } else if (bits === 8) {
      const values = new Int8Array(buffer, offset, size);
      for (let i = 0; i < size; i += 1) data[i] = values[i] * rowScales[Math.floor(i / columns)];
    } else {
      const pairs = new Uint8Array(buffer, offset, Math.ceil(size / 2));
      for (let i = 0; i < size; i += 1) {
        const value = i % 2 ? pairs[i >> 1] >> 4 : pairs[i >> 1] & 15;
        data[i] = (value - 8) * rowScales[Math.floor(i / columns)];
      }
    }
  }
  return arrays;
}

function halfToNumber(half) {
  const sign = half >> 15 ? -1 : 1, exponent = (half >> 10) & 31, fraction = half & 1023;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

// The tokens that the model has read, with its cache, to continue from.
let context = { ids: [], cache: null, x: null };

let lastPause = 0;
async function pause(signal) {
  if (performance.now() - lastPause > PAUSE_MS) {
    await new Promise((resolve) => { setTimeout(resolve); });
    lastPause = performance.now();
  }
  if (signal?.aborted) throw new DOMException("stopped", "AbortError");
}

// Logits after some tokens. One call at a time: all of them share the context.
let lastCall = Promise.resolve();
function readTokens(ids, signal) {
  const call = lastCall.then(() => readNewTokens(ids, signal));
  lastCall = call.catch(() => {});
  return call;
}

// Reads only the tokens that were not read yet.
async function readNewTokens(allIds, signal) {
  // Learned positions end at the block size: then the last half block is read again from position 0.
  const { block_size, position } = info.config, stride = block_size + 1 - Math.max(1, block_size >> 1);
  const start = position === "rope" ? 0 : Math.max(0, Math.ceil((allIds.length - block_size) / stride) * stride);
  const ids = allIds.slice(start);
  let common = 0;
  while (common < ids.length - 1 && context.ids[common] === ids[common]) common += 1;
  const cache = context.cache ?? model().newCache();
  model().truncate(cache, common);
  context = { ids: ids.slice(0, common), cache, x: null };
  for (const id of ids.slice(common)) {
    await pause(signal);
    context.x = model().step(cache, id);
    context.ids.push(id);
  }
  return model().logits(context.x);
}

function encodePrompt(body) {
  if (body.ids?.length) return body.ids;
  try {
    if (body.messages) return encodeConversation(body);
    const ids = tokenizer.encode(body.text ?? "");
    return ids.length ? [...(info.bos === null ? [] : [info.bos]), ...ids] : info.empty_prompt;
  } catch (error) {
    if (!(error instanceof UnknownCharacters)) throw error;
    throw new RequestError(t`The model does not know these characters: ${error.message}`);
  }
}

// Messages with the texts of the chat template around them, in which ids of special tokens are
// between NULs. The oldest exchanges are dropped if there are too many tokens.
function encodeConversation({ messages, max_tokens }) {
  const { start, answer, question, reply } = info.conversation, { block_size } = info.config;
  let text = "";
  messages.forEach(({ role, content }, n) => {
    text += n === 0 ? start : role === "user" ? question : answer;
    text += content.replaceAll("\0", "");
  });
  const ids = (text + reply).split("\0").flatMap((part, n) => (n % 2 ? [Number(part)] : tokenizer.encode(part)));
  if (ids.length <= block_size - Math.min(max_tokens, block_size >> 1) || messages.length < 3) return ids;
  return encodeConversation({ messages: messages.slice(2), max_tokens });
}

function labelPrompt(ids) {
  const decode = tokenizer.decoder();
  return ids.map((id) => [id, decode(id), tokenizer.label(id)]);
}

function topTokens(values, count = TOP_TOKENS) {
  const ids = []; // in descending order
  for (let id = 0; id < values.length; id += 1) {
    if (ids.length === count && values[id] <= values[ids.at(-1)]) continue;
    const place = ids.findIndex((other) => values[other] < values[id]);
    ids.splice(place < 0 ? ids.length : place, 0, id);
    ids.length = Math.min(ids.length, count);
  }
  return ids.map((id) => [id, tokenizer.label(id), values[id]]);
}

export const getRun = async () => info;

export async function* streamTokens(body, signal) {
  const ids = [...encodePrompt(body)];
  const seed = body.seed ?? Math.floor(Math.random() * 2 ** 31), random = randomNumbers(seed);
  const decode = tokenizer.decoder();
  const prompt = labelPrompt(ids);
  ids.forEach(decode);
  yield { prompt, seed, step: info.step };
  for (let n = 0; n < body.max_tokens; n += 1) {
    const logits = await readTokens(ids, signal), probs = softmax(logits);
    const id = sample(filterLogits(logits, body), random);
    yield { id, text: decode(id), label: tokenizer.label(id), probability: probs[id], alternatives: topTokens(probs) };
    if (id === info.end_of_text) {
      yield { finish_reason: "stop" };
      return;
    }
    ids.push(id);
  }
  yield { finish_reason: "length" };
}

// Each call replaces the one before it, which then returns null.
function latest(compute) {
  let running = null;
  return async (body) => {
    running?.abort();
    const controller = running = new AbortController();
    try {
      return await compute(body, controller.signal);
    } catch (error) {
      if (error.name === "AbortError") return null;
      throw error;
    }
  };
}

export const fetchNextTokens = latest(async (body, signal) => {
  const logits = await readTokens(encodePrompt(body), signal);
  const sampled = softmax(filterLogits(logits, body));
  return { top_tokens: topTokens(softmax(logits)).map(([id, label, prob]) => [id, label, prob, sampled[id]]) };
});
export const fetchReferenceNextTokens = async () => null;

// A forward pass whose attention [layer][head][T][T] and residuals [T][layer] are kept.
let trace = null;
async function traceForward(ids, disabled, signal) {
  const key = JSON.stringify([ids, disabled]);
  if (trace?.key === key) return trace;
  const { n_layer, n_head } = info.config, cache = model().newCache(), heads = new Set(disabled);
  const attention = Array.from({ length: n_layer }, () => Array.from({ length: n_head }, () => []));
  const residuals = [];
  for (const id of ids) {
    await pause(signal);
    residuals.push([]);
    model().step(cache, id, { attention, residuals: residuals.at(-1) }, heads);
  }
  trace = { key, attention, residuals };
  return trace;
}

const lastIds = (body) => encodePrompt(body).slice(-Math.min(MAX_ATTENTION_TOKENS, info.config.block_size));
const nextTokens = ({ residuals }) => topTokens(softmax(model().logits(residuals.at(-1).at(-1))));

export const fetchAttention = latest(async (body, signal) => {
  const ids = lastIds(body), T = ids.length;
  const baseline = await traceForward(ids, [], signal), baselineNext = nextTokens(baseline);
  const traced = body.disabled_heads.length ? await traceForward(ids, body.disabled_heads, signal) : baseline;
  const heads = traced.attention[body.layer], bytes = new Uint8Array(heads.length * T * T);
  heads.forEach((rows, h) => rows.forEach((row, t) => bytes.set(Array.from(row, (share) => Math.round(share * 255)), (h * T + t) * T)));
  return {
    tokens: labelPrompt(ids), attention: btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join("")),
    baseline_next_tokens: baselineNext, next_tokens: nextTokens(traced),
  };
});

export const fetchLogitLens = latest(async (body, signal) => {
  const { residuals } = await traceForward(lastIds(body), body.disabled_heads, signal);
  return { layers: residuals[body.position ?? residuals.length - 1].map((x) => topTokens(softmax(model().logits(x)), 5)) };
});

export const fetchNeighbors = latest(async ({ token_id }) => {
  const C = info.config.n_embd, table = model().weights["wte.weight"];
  const row = (id) => table.subarray(id * C, (id + 1) * C);
  const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
  const own = row(token_id), norm = Math.sqrt(dot(own, own));
  const cosines = tokenizer.tokens.map((_, id) => dot(own, row(id)) / Math.max(norm * Math.sqrt(dot(row(id), row(id))), 1e-30));
  return { neighbors: topTokens(cosines, TOP_TOKENS + 1).filter(([id]) => id !== token_id).slice(0, TOP_TOKENS) };
});
