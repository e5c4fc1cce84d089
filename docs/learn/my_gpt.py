"""The functions of all chapters, as they are at the end of the course."""

import math
from collections import Counter
from itertools import pairwise

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map, tree_unflatten

# Chapter 1


def count_bigrams(ids, vocab_size):
    """How often each token follows each: ids [N] -> counts [V, V]."""
    pairs = ids[:-1] * vocab_size + ids[1:]
    return mx.zeros(vocab_size**2).at[pairs].add(1).reshape(vocab_size, vocab_size)


def bigram_probabilities(counts):
    """Probability of each next token: counts [V, V] -> [V, V], rows with sum 1."""
    counts = counts + 1
    return counts / counts.sum(axis=1, keepdims=True)


def bigram_loss(probabilities, ids):
    """Mean of -ln(probability) of the tokens that follow, in nats."""
    return -mx.log(probabilities[ids[:-1], ids[1:]]).mean()


# Chapter 2


def cross_entropy(logits, targets):
    """-ln(softmax(logits)[target]): logits [..., V], targets [...] -> [...]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    chosen = mx.take_along_axis(shifted, targets[..., None], axis=-1)[..., 0]
    return mx.log(mx.exp(shifted).sum(axis=-1)) - chosen


def cross_entropy_gradient(logits, targets):
    """Gradient of the mean loss: logits [N, V], targets [N] -> [N, V]."""
    one_hot = mx.arange(logits.shape[-1]) == targets[:, None]
    return (mx.softmax(logits, axis=-1) - one_hot) / len(targets)


# Chapter 3


def attend(q, k, v):
    """Causal attention: q, k, v [..., T, D] -> [..., T, D]."""
    T, D = q.shape[-2:]
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(D)  # [..., T, T]
    is_past = mx.arange(T) <= mx.arange(T)[:, None]
    return mx.softmax(mx.where(is_past, scores, -mx.inf), axis=-1) @ v


# Chapter 4


def linear(x, weights):
    """Linear layer without bias: x [..., I] -> [..., O]."""
    return x @ weights["weight"].T


def layer_norm(x, weights):
    """Each vector with mean 0 and variance 1, times a weight: [..., C] -> [..., C]."""
    x = x - x.mean(axis=-1, keepdims=True)
    return x * mx.rsqrt(mx.square(x).mean(axis=-1, keepdims=True) + 1e-5) * weights["weight"]


def gelu(x):
    """GELU in GPT-2's form; any shape."""
    return x * mx.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


def split_heads(x, n_head):
    """[B, T, C] -> [B, H, T, C / H]"""
    B, T, C = x.shape
    return x.reshape(B, T, n_head, C // n_head).swapaxes(1, 2)


def merge_heads(x):
    """[B, H, T, D] -> [B, T, H * D]"""
    return x.swapaxes(1, 2).flatten(2)


def attention(x, weights, n_head):
    """Multi-head attention: [B, T, C] -> [B, T, C]."""
    q, k, v = mx.split(linear(x, weights["c_attn"]), 3, axis=-1)
    y = attend(split_heads(q, n_head), split_heads(k, n_head), split_heads(v, n_head))
    return linear(merge_heads(y), weights["c_proj"])


def mlp(x, weights):
    """[..., C] -> [..., C]"""
    return linear(gelu(linear(x, weights["c_fc"])), weights["c_proj"])


def block(x, weights, n_head, drop=lambda x: x):
    """Transformer block: [B, T, C] -> [B, T, C]; `drop` is for chapter 7."""
    x = x + drop(attention(layer_norm(x, weights["ln_1"]), weights["attn"], n_head))
    return x + drop(mlp(layer_norm(x, weights["ln_2"]), weights["mlp"]))


# Chapter 5


def init_weights(vocab_size, block_size, n_layer, n_embd, key):
    """Initial weights of a GPT, with the names of GPT-2."""
    keys = iter(mx.random.split(key, 2 + 4 * n_layer))

    def normal(rows, columns, scale=0.02):
        return {"weight": scale * mx.random.normal((rows, columns), key=next(keys))}

    def ones():
        return {"weight": mx.ones(n_embd)}

    small = 0.02 / math.sqrt(2 * n_layer)
    C = n_embd
    return {
        "wte": normal(vocab_size, C),
        "wpe": normal(block_size, C),
        "h": [
            {
                "ln_1": ones(),
                "attn": {"c_attn": normal(3 * C, C), "c_proj": normal(C, C, small)},
                "ln_2": ones(),
                "mlp": {"c_fc": normal(4 * C, C), "c_proj": normal(C, 4 * C, small)},
            }
            for _ in range(n_layer)
        ],
        "ln_f": ones(),
    }


def gpt(ids, weights, n_head, drop=lambda x: x):
    """Token ids [B, T] -> logits of the next tokens [B, T, V]."""
    x = weights["wte"]["weight"][ids] + weights["wpe"]["weight"][: ids.shape[1]]
    x = drop(x)
    for layer in weights["h"]:
        x = block(x, layer, n_head, drop)
    return linear(layer_norm(x, weights["ln_f"]), weights["wte"])


# Chapter 6


def adamw(weight, gradient, moments, step, learning_rate, weight_decay=0.1, beta1=0.9, beta2=0.99):
    """One step of AdamW, `step` counted from 1. Returns the new weight and the new moments."""
    m = beta1 * moments[0] + (1 - beta1) * gradient
    v = beta2 * moments[1] + (1 - beta2) * mx.square(gradient)
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    weight = weight - learning_rate * weight_decay * weight
    return weight - learning_rate * m_hat / (mx.sqrt(v_hat) + 1e-8), (m, v)


def init_state(weights):
    """Moments of all weights, zero, by name."""
    return {name: (mx.zeros_like(w), mx.zeros_like(w)) for name, w in tree_flatten(weights)}


def update_weights(weights, gradients, state, step, learning_rate):
    """AdamW for all weights; only matrices decay. Returns the new weights and the new state."""
    gradients, new_weights, new_state = dict(tree_flatten(gradients)), [], {}
    for name, weight in tree_flatten(weights):
        decay = 0.1 if weight.ndim > 1 else 0.0
        weight, new_state[name] = adamw(
            weight, gradients[name], state[name], step, learning_rate, decay
        )
        new_weights.append((name, weight))
    return tree_unflatten(new_weights), new_state


# Chapter 7


def split_ids(ids):
    """The first 90% for training, the rest for validation."""
    n = len(ids) * 9 // 10
    return ids[:n], ids[n:]


def get_batch(ids, batch_size, block_size, key):
    """Inputs and targets, each [B, T], from random places of ids [N]."""
    starts = mx.random.randint(0, len(ids) - block_size, (batch_size, 1), key=key)
    positions = starts + mx.arange(block_size)
    return ids[positions], ids[positions + 1]


def masked_loss(logits, targets, mask):
    """Mean loss of the tokens whose mask is 1; 0 marks padding. All [B, T] but logits [B, T, V]."""
    return (cross_entropy(logits, targets) * mask).sum() / mask.sum()


def learning_rate(step, peak, warmup_steps, max_steps):
    """Linear warmup, then a cosine from the peak to a tenth of it; `step` counted from 0."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_dropout(rate, key):
    """Function that sets each value to 0 with probability `rate`, and scales the others."""

    def drop(x):
        nonlocal key
        key, mask_key = mx.random.split(key)
        keep = mx.random.uniform(shape=x.shape, key=mask_key) >= rate
        return mx.where(keep, x / (1 - rate), 0)

    return drop


def evaluate(weights, ids, n_head, block_size):
    """Mean loss over all windows of ids [N], without dropout."""
    n = (len(ids) - 1) // block_size
    inputs = ids[: n * block_size].reshape(n, block_size)
    targets = ids[1 : n * block_size + 1].reshape(n, block_size)
    return cross_entropy(gpt(inputs, weights, n_head), targets).mean()


def accumulate_gradients(loss_and_gradients, weights, micro_batches):
    """Mean loss and mean gradients over micro-batches of equal size."""
    total_loss, total_gradients = 0.0, None
    for micro_batch in micro_batches:
        loss, gradients = loss_and_gradients(weights, *micro_batch)
        total_loss = total_loss + loss
        if total_gradients is None:
            total_gradients = gradients
        else:
            total_gradients = tree_map(mx.add, total_gradients, gradients)
    n = len(micro_batches)
    return total_loss / n, tree_map(lambda g: g / n, total_gradients)


# Chapter 8


def sample(logits, key):
    """One token per row from the softmax of logits [B, V] -> [B]."""
    cumulative = mx.cumsum(mx.softmax(logits, axis=-1), axis=-1)
    threshold = mx.random.uniform(shape=(len(logits), 1), key=key) * cumulative[:, -1:]
    return mx.argmax(cumulative > threshold, axis=-1)


def filter_logits(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Logits [B, V] with temperature; tokens outside the top k, or the top p, get -inf."""
    logits = logits / temperature
    if top_k:
        kth = mx.sort(logits, axis=-1)[..., -top_k, None]
        logits = mx.where(logits < kth, -mx.inf, logits)
    if top_p < 1:
        probabilities = mx.softmax(logits, axis=-1)
        ordered = -mx.sort(-probabilities, axis=-1)
        before = mx.cumsum(ordered, axis=-1) - ordered  # total of all more likely tokens
        smallest = mx.where(before < top_p, ordered, mx.inf).min(axis=-1, keepdims=True)
        logits = mx.where(probabilities < smallest, -mx.inf, logits)
    return logits


def generate(weights, ids, n_tokens, n_head, key, **settings):
    """Continue ids [B, T] by n_tokens -> [B, T + n_tokens]."""
    block_size = len(weights["wpe"]["weight"])
    for token_key in mx.random.split(key, n_tokens):
        logits = gpt(ids[:, -block_size:], weights, n_head)[:, -1]
        token = sample(filter_logits(logits, **settings), token_key)
        ids = mx.concatenate([ids, token[:, None]], axis=1)
        mx.eval(ids)
    return ids


# Chapter 9


def attention_step(x, weights, n_head, cache):
    """Attention of one new token, x [B, 1, C], to all tokens so far. Returns the new cache, too."""
    q, k, v = (split_heads(y, n_head) for y in mx.split(linear(x, weights["c_attn"]), 3, axis=-1))
    if cache is not None:
        k = mx.concatenate([cache[0], k], axis=2)
        v = mx.concatenate([cache[1], v], axis=2)
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])  # [B, H, 1, T]
    y = mx.softmax(scores, axis=-1) @ v
    return linear(merge_heads(y), weights["c_proj"]), (k, v)


def gpt_step(ids, weights, n_head, cache=None):
    """One new token per text, ids [B] -> logits [B, V], and the new cache."""
    cache = cache or [None] * len(weights["h"])
    position = 0 if cache[0] is None else cache[0][0].shape[2]
    x = (weights["wte"]["weight"][ids] + weights["wpe"]["weight"][position])[:, None]
    new_cache = []
    for layer, layer_cache in zip(weights["h"], cache, strict=True):
        y, layer_cache = attention_step(
            layer_norm(x, layer["ln_1"]), layer["attn"], n_head, layer_cache
        )
        x = x + y
        x = x + mlp(layer_norm(x, layer["ln_2"]), layer["mlp"])
        new_cache.append(layer_cache)
    return linear(layer_norm(x, weights["ln_f"]), weights["wte"])[:, 0], new_cache


# Chapter 10


def merge_pair(ids, pair, new_id):
    """Replace each pair of neighbors in a list of ids by a new id."""
    merged = []
    for token in ids:
        if merged and (merged[-1], token) == pair:
            merged[-1] = new_id
        else:
            merged.append(token)
    return merged


def train_bpe(text, n_merges):
    """The pairs to merge, in order: each the most frequent one; pair n becomes the id 256 + n."""
    ids, merges = list(text.encode()), []
    for new_id in range(256, 256 + n_merges):
        counts = Counter(pairwise(ids))
        pair = max(counts, key=counts.get)
        ids = merge_pair(ids, pair, new_id)
        merges.append(pair)
    return merges


def encode(text, merges):
    """Text -> list of ids, by the merges in their order."""
    ids = list(text.encode())
    for n, pair in enumerate(merges):
        ids = merge_pair(ids, pair, 256 + n)
    return ids


def decode(ids, merges):
    """List of ids -> text."""
    tokens = [bytes([n]) for n in range(256)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return b"".join(tokens[token] for token in ids).decode(errors="replace")


def fit_power_law(sizes, losses):
    """The a and b of loss = a * size ** -b: a straight line through the logarithms."""
    x, y = [math.log(n) for n in sizes], [math.log(loss) for loss in losses]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((p - mean_x) * (q - mean_y) for p, q in zip(x, y, strict=True)) / sum(
        (p - mean_x) ** 2 for p in x
    )
    return math.exp(mean_y - slope * mean_x), -slope
