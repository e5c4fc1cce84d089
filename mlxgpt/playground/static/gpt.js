// The model in plain JavaScript, one token at a time; see mlxgpt/model/gpt.py, whose names it has.

const NORM_EPS = 1e-5, ROPE_BASE = 10_000;

const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const gelu = (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));

// Product of a matrix [O, I] and x [I], plus a bias [O] if there is one: [O].
function linear(weight, x, bias) {
  const O = weight.length / x.length, I = x.length, out = new Float32Array(O);
  for (let o = 0, w = 0; o < O; o += 1) {
    let a = bias ? bias[o] : 0, b = 0, c = 0, d = 0, i = 0;
    for (; i + 3 < I; i += 4, w += 4) {
      a += weight[w] * x[i];
      b += weight[w + 1] * x[i + 1];
      c += weight[w + 2] * x[i + 2];
      d += weight[w + 3] * x[i + 3];
    }
    for (; i < I; i += 1, w += 1) a += weight[w] * x[i];
    out[o] = a + b + c + d;
  }
  return out;
}

function rmsNorm(x, weight) {
  let sum = 0;
  for (const value of x) sum += value * value;
  const scale = 1 / Math.sqrt(sum / x.length + NORM_EPS);
  return x.map((value, i) => value * scale * (weight ? weight[i] : 1));
}

function layerNorm(x, weight, bias) {
  let mean = 0, variance = 0;
  for (const value of x) mean += value / x.length;
  for (const value of x) variance += (value - mean) ** 2 / x.length;
  const scale = 1 / Math.sqrt(variance + NORM_EPS);
  return x.map((value, i) => (value - mean) * scale * weight[i] + (bias ? bias[i] : 0));
}

function add(x, y, scale = 1) {
  for (let i = 0; i < x.length; i += 1) x[i] += scale * y[i];
}

export function softmax(logits) {
  let max = -Infinity, sum = 0;
  for (const logit of logits) if (logit > max) max = logit;
  const probs = new Float64Array(logits.length);
  for (let i = 0; i < logits.length; i += 1) sum += probs[i] = Math.exp(logits[i] - max);
  for (let i = 0; i < probs.length; i += 1) probs[i] /= sum;
  return probs;
}

export class GPT {
  // config: as in config.toml, with the layers that have value embeddings. weights: Float32Arrays
  // by dotted names.
  constructor(config, weights) {
    Object.assign(this, { config, weights });
    this.rms = config.norm === "rms";
  }

  // A cache: of each layer, one entry per token; with smear, also of the embeddings.
  newCache() {
    const layers = Array.from({ length: this.config.n_layer }, () => ({ keys: [], values: [], inputs: [], rawKeys: [] }));
    return { embeddings: [], layers };
  }

  // Keeps only the first tokens of a cache.
  truncate(cache, length) {
    for (const entries of [cache.embeddings, ...cache.layers.flatMap(Object.values)]) entries.length = Math.min(entries.length, length);
  }

  // Runs one token [] and adds it to the cache; returns the residual stream [C].
  // With a recorder, {attention, residuals} get this token's row of each layer; disabled heads
  // {layer * n_head + head} give zeros.
  step(cache, id, recorder = null, disabledHeads = null) {
    const { config, weights } = this, C = config.n_embd;
    let x = weights["wte.weight"].slice(id * C, (id + 1) * C);
    if (config.embedding_norm) x = rmsNorm(x);
    if (config.smear) {
      cache.embeddings.push(x);
      x = this.smear("smear", x, cache.embeddings.at(-2));
    }
    const position = cache.layers[0].keys.length;
    if (config.position === "learned") add(x, weights["wpe.weight"].subarray(position * C, (position + 1) * C));
    for (let layer = 0; layer < config.n_layer; layer += 1) {
      recorder?.residuals.push(x.slice());
      const name = `h.${layer}`;
      add(x, this.attend(layer, this.norm(`${name}.ln_1`, x), id, cache, recorder, disabledHeads));
      add(x, this.mlp(`${name}.mlp`, this.norm(`${name}.ln_2`, x)));
    }
    recorder?.residuals.push(x.slice());
    return x;
  }

  // Logits [V] of the residual stream [C]: after the last block the model's, before it a logit lens.
  logits(x) {
    const head = this.weights[this.config.tied ? "wte.weight" : "lm_head.weight"];
    return linear(head, this.norm("ln_f", x));
  }

  norm(name, x) {
    const weight = this.weights[`${name}.weight`];
    return this.rms ? rmsNorm(x, weight) : layerNorm(x, weight, this.weights[`${name}.bias`]);
  }

  linear(name, x) {
    return linear(this.weights[`${name}.weight`], x, this.weights[`${name}.bias`]);
  }

  // Adds a gated share of the previous token's vector.
  smear(name, x, previous) {
    if (!previous) return x.slice();
    const gate = this.weights[`${name}.gate.weight`];
    const share = sigmoid(linear(gate, x.subarray(0, gate.length))[0]);
    return x.map((value, i) => value + share * previous[i]);
  }

  attend(layer, input, id, cache, recorder, disabledHeads) {
    const { config, weights } = this, C = config.n_embd, H = config.n_head, D = C / H;
    const name = `h.${layer}.attn`, past = cache.layers[layer];
    let x = input;
    if (config.token_shift) {
      past.inputs.push(input);
      x = this.smear(`${name}.smear`, input, past.inputs.at(-2));
    }
    const qkv = this.linear(`${name}.c_attn`, x);
    const q = qkv.slice(0, C), v = qkv.slice(2 * C);
    let k = qkv.slice(C, 2 * C);
    const valueLayer = config.value_layers.indexOf(layer);
    if (valueLayer >= 0) {
      const values = weights[`wve.${valueLayer}.weight`].subarray(id * C, (id + 1) * C);
      const gate = weights[`${name}.value_gate.weight`];
      const gates = gate && linear(gate, x.subarray(0, gate.length / H));
      for (let i = 0; i < C; i += 1) v[i] += values[i] * (gate ? 3 * sigmoid(gates[Math.floor(i / D)]) : 1);
    }
    if (config.qk_norm) {
      for (let h = 0; h < H; h += 1) {
        for (const vector of [q, k]) vector.set(rmsNorm(vector.subarray(h * D, (h + 1) * D)), h * D);
      }
    }
    if (config.token_shift) { // the slowly rotated half of a key is the previous token's
      past.rawKeys.push(k);
      const previous = past.rawKeys.at(-2);
      k = k.map((value, i) => (i % D % (D / 2) >= D / 4 ? previous?.[i] ?? 0 : value));
    }
    if (config.position === "rope") {
      this.rotate(q, past.keys.length);
      this.rotate(k, past.keys.length);
    }
    past.keys.push(k);
    past.values.push(v);
    // With rotary positions, a full context moves on by a token.
    const first = Math.max(0, past.keys.length - config.block_size);
    const y = new Float32Array(C), T = past.keys.length - first, scores = new Float64Array(T);
    for (let h = 0; h < H; h += 1) {
      for (let t = 0; t < T; t += 1) {
        const key = past.keys[first + t];
        let score = 0;
        for (let i = h * D; i < (h + 1) * D; i += 1) score += q[i] * key[i];
        scores[t] = score / Math.sqrt(D);
      }
      const shares = softmax(scores);
      recorder?.attention[layer][h].push(shares);
      if (disabledHeads?.has(layer * H + h)) continue;
      for (let t = 0; t < T; t += 1) {
        const value = past.values[first + t], share = shares[t];
        for (let i = h * D; i < (h + 1) * D; i += 1) y[i] += share * value[i];
      }
    }
    return this.linear(`${name}.c_proj`, y);
  }

  rotate(x, position) {
    const D = this.config.n_embd / this.config.n_head, half = D / 2;
    for (let i = 0; i < half; i += 1) {
      const angle = position * ROPE_BASE ** (-i / half), cos = Math.cos(angle), sin = Math.sin(angle);
      for (let h = 0; h < x.length; h += D) {
        const a = x[h + i], b = x[h + i + half];
        x[h + i] = a * cos - b * sin;
        x[h + i + half] = a * sin + b * cos;
      }
    }
  }

  mlp(name, input) {
    let x = this.linear(`${name}.c_fc`, input);
    if (this.config.mlp === "gelu") {
      x = x.map(gelu);
    } else if (this.config.mlp === "relu2") {
      x = x.map((value) => Math.max(0, value) ** 2);
    } else {
      const half = x.length / 2;
      x = x.subarray(0, half).map((gate, i) => gate * sigmoid(gate) * x[half + i]);
    }
    return this.linear(`${name}.c_proj`, x);
  }
}

// Logits with the filters of mlxgpt/inference/sampling.py, in the same order.
export function filterLogits(logits, { temperature = 1, top_k = 0, top_p = 1, min_p = 0 }) {
  if (temperature < 1e-5) {
    const best = logits.indexOf(Math.max(...logits));
    return logits.map((_, i) => (i === best ? 0 : -Infinity));
  }
  let filtered = Float64Array.from(logits, (logit) => logit / temperature);
  const keep = (threshold, values) => { filtered = filtered.map((logit, i) => (values[i] >= threshold ? logit : -Infinity)); };
  if (top_k > 0 && top_k < logits.length) keep(Float64Array.from(filtered).sort().at(-top_k), filtered);
  if (top_p < 1) {
    const probs = softmax(filtered), sorted = Float64Array.from(probs).sort().reverse();
    let total = 0, count = 0;
    while (count < sorted.length && (count === 0 || total < top_p)) total += sorted[count++];
    keep(sorted[count - 1], probs);
  }
  if (min_p > 0) {
    const probs = softmax(filtered);
    keep(min_p * Math.max(...probs), probs);
  }
  return filtered;
}

// Random numbers in [0, 1) from a seed (mulberry32, Tommy Ettinger, public domain).
export function randomNumbers(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6D2B79F5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

export function sample(logits, random) {
  const probs = softmax(logits);
  let rest = random();
  for (let id = 0; id < probs.length; id += 1) {
    rest -= probs[id];
    if (rest < 0 && probs[id] > 0) return id;
  }
  return probs.indexOf(Math.max(...probs));
}
