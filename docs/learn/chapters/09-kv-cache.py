# %% [markdown] lang="en"
# # 9. The KV cache
#
# **Why compute everything again for each token?**
#
# `generate` of chapter 8 runs the whole text through the model, keeps the logits of the last position, and
# throws the rest away. For the next token it does all of that again, with one token more. This chapter finds
# out which part of it stays the same, stores that part, and gets the same text for much less work.

# %% [markdown] lang="pt"
# # 9. O KV cache
#
# **Por que calcular tudo de novo a cada token?**
#
# A função `generate` do capítulo 8 passa o texto inteiro pelo modelo, aproveita os logits da última posição e
# joga o resto fora. No token seguinte, repete tudo, com um token a mais. Neste capítulo vamos descobrir o que
# não muda de um passo para o outro, guardar essa parte e obter o mesmo texto com muito menos trabalho.

# %%
import math
import time

import matplotlib.pyplot as plt
import mlx.core as mx
from course import CharTokenizer, check, expect, load_text
from mlx.utils import tree_flatten, tree_map
from my_gpt import (
    block,
    filter_logits,
    generate,
    gpt,
    init_weights,
    layer_norm,
    linear,
    merge_heads,
    mlp,
    sample,
    split_heads,
)

# %% [markdown] lang="en"
# ## The price of forgetting
#
# Count multiplications. In a product with a matrix, each weight is used once per token: 12·C² weights per
# layer (3C² + C² in attention, 4C² + 4C² in the MLP), and V·C in the output head. Attention adds, in each
# layer and for each token, C multiplications per token that it is compared with, and C more to add up the
# values.
#
# - Without a cache, step t sends t tokens through the matrices, and `attend` compares t × t pairs of them.
# - If only the new token had to be computed, step t would send one, and compare it with t.
#
# Over n tokens, the first is 1 + 2 + … + n ≈ n²/2 passes of a token, the second n.

# %% [markdown] lang="pt"
# ## O preço de esquecer
#
# Vamos contar multiplicações. No produto com uma matriz, cada peso é usado uma vez por token: são 12·C² pesos
# por camada (3C² + C² na atenção, 4C² + 4C² no MLP) e V·C na camada de saída (*output head*). A atenção
# acrescenta, em cada camada e para cada token, C multiplicações por token com que ele é comparado e outras C
# para somar os values.
#
# - Sem cache, o passo t manda t tokens pelas matrizes, e `attend` compara t × t pares.
# - Se bastasse calcular o token novo, o passo t mandaria um só e o compararia com t.
#
# Em n tokens, o primeiro caso soma 1 + 2 + … + n ≈ n²/2 passagens de um token; o segundo, n.


# %%
def count_multiplications(n_layer, n_embd, vocab_size, n_tokens):
    matrices = 12 * n_layer * n_embd**2 + vocab_size * n_embd  # of one token
    pair = 2 * n_layer * n_embd  # of one token attending to one token
    lengths = range(1, n_tokens + 1)
    without = sum(t * matrices + t * t * pair for t in lengths)
    return without, sum(matrices + t * pair for t in lengths)


print("GPT-2 124M    without     with      ratio")
lengths = [1, 4, 16, 64, 256, 1024]
counts = [count_multiplications(12, 768, 50257, n) for n in lengths]
for n, (without, with_cache) in zip(lengths, counts, strict=True):
    print(f"{n:5} tokens   {without:.1e}    {with_cache:.1e}  {without / with_cache:5.1f}")

# %% [markdown] lang="en"
# For 1,024 tokens, 525 times as many multiplications without a cache. (That is more than n/2, because
# `attend` computes the masked half, too.)
#
# ## What stays the same
#
# A later token has no influence on an earlier one: that is the causal mask of chapter 3. So everything that
# was computed for the first tokens, in every layer, is still right when another one is appended. Check it
# with a small model: the keys and values of 12 tokens, alone and as the start of 24.
#
# The model is not trained, as the cache does not depend on it. But its matrices are 5 times as large as
# `init_weights` makes them: with small ones all tokens are about equally likely, and a mistake in the cache
# would hardly be seen.

# %% [markdown] lang="pt"
# Com 1.024 tokens, são 525 vezes mais multiplicações sem o cache. (Passa de n/2 porque `attend` também
# calcula a metade mascarada.)
#
# ## O que não muda
#
# Um token posterior não influencia um anterior: é a máscara causal do capítulo 3. Portanto, tudo o que foi
# calculado para os primeiros tokens, em todas as camadas, continua certo quando mais um entra no fim.
# Confira num modelo pequeno: as keys e os values de 12 tokens, sozinhos e como começo de 24.
#
# O modelo não está treinado, porque o cache não depende disso. Mas as suas matrizes são 5 vezes maiores do
# que `init_weights` as faz: com pesos pequenos, todos os tokens são quase igualmente prováveis, e um erro no
# cache mal apareceria.

# %%
tokenizer = CharTokenizer(load_text())
ids = tokenizer.encode(load_text()[:64])[None]  # [1, 64]
n_layer, n_head, n_embd, block_size = 4, 4, 64, 64
weights = init_weights(tokenizer.vocab_size, block_size, n_layer, n_embd, mx.random.key(0))
weights = tree_map(lambda w: 5 * w if w.ndim > 1 else w, weights)


def keys_and_values(ids, weights, n_head):
    """Keys and values of each layer, each [B, H, T, D], for ids [B, T]."""
    x = weights["wte"]["weight"][ids] + weights["wpe"]["weight"][: ids.shape[1]]
    layers = []
    for layer in weights["h"]:
        qkv = linear(layer_norm(x, layer["ln_1"]), layer["attn"]["c_attn"])
        layers.append(tuple(split_heads(y, n_head) for y in mx.split(qkv, 3, axis=-1)[1:]))
        x = block(x, layer, n_head)
    return layers


short, long = (keys_and_values(ids[:, :n], weights, n_head) for n in (12, 24))
for n, (a, b) in enumerate(zip(short, long, strict=True)):
    differences = [mx.abs(x - y[:, :, :12]).max().item() for x, y in zip(a, b, strict=True)]
    print(
        f"layer {n}: largest difference of keys {differences[0]:.0e}, values {differences[1]:.0e}"
    )
changed = mx.array(ids)
changed[0, 8] = (changed[0, 8] + 1) % tokenizer.vocab_size
change = [
    mx.sqrt(mx.square(a[0] - b[0])[0].sum(axis=(0, 2)))
    for a, b in zip(long, keys_and_values(changed[:, :24], weights, n_head), strict=True)
]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
axes[0].loglog(lengths, [c[0] for c in counts], "o-", label="without a cache")
axes[0].loglog(lengths, [c[1] for c in counts], "o-", label="with a cache")
axes[0].set(xlabel="tokens generated", ylabel="multiplications, GPT-2 124M")
axes[0].legend()
image = axes[1].imshow(mx.stack([c / c.max() for c in change]), cmap="Blues", aspect="auto")
axes[1].set(xlabel="position", ylabel="layer", yticks=range(n_layer))
figure.colorbar(image, label="change of the key")
plt.show()

# %% [markdown] lang="en"
# Left: for long texts, the slope is about 2 without a cache, and 1 with one. Right: the token at position 8
# was replaced by another one; the color shows how much each key changes, relative to the largest change in
# its layer. In layer 0, only the key of that token changes. In later layers, the keys after it change a
# little as well, since their tokens have attended to it. The keys before it never change.
#
# ## One token at a time
#
# So only the new token passes through the matrices. What does it need of the earlier ones? Its query is
# compared with their keys, and their values are added up. Their queries are not needed again, and the MLP
# does not look at other tokens. The cache therefore stores, per layer, keys and values.
#
# A mask is not needed: the only query is that of the last token, and all that is in the cache lies before it.

# %% [markdown] lang="pt"
# À esquerda, em textos longos, a inclinação é cerca de 2 sem cache e 1 com cache. À direita, o token da
# posição 8 foi trocado por outro, e a cor mostra quanto cada key muda em relação à maior mudança da sua
# camada. Na camada 0, só muda a key desse token. Nas seguintes, as que vêm depois também mudam um pouco,
# porque os seus tokens deram atenção a ele. As anteriores não mudam nunca.
#
# ## Um token por vez
#
# Então só o token novo passa pelas matrizes. Do que ele precisa dos anteriores? A sua query é comparada com
# as keys deles, e os values deles são somados. As queries antigas não servem para mais nada, e o MLP não olha
# para outros tokens. Por isso o cache guarda, em cada camada, keys e values.
#
# A máscara não é necessária: a única query é a do último token, e tudo o que está no cache vem antes dele.


# %% tags=["my_gpt"]
def attention_step(x, weights, n_head, cache):
    """Attention of one new token, x [B, 1, C], to all tokens so far. Returns the new cache, too."""
    q, k, v = (split_heads(y, n_head) for y in mx.split(linear(x, weights["c_attn"]), 3, axis=-1))
    if cache is not None:
        k = mx.concatenate([cache[0], k], axis=2)
        v = mx.concatenate([cache[1], v], axis=2)
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])  # [B, H, 1, T]
    y = mx.softmax(scores, axis=-1) @ v
    return linear(merge_heads(y), weights["c_proj"]), (k, v)


# %% [markdown] lang="en"
# The rest is `gpt` of chapter 5 with T = 1. Only the position must come from elsewhere: it is the number of
# tokens in the cache.

# %% [markdown] lang="pt"
# O resto é o `gpt` do capítulo 5 com T = 1. Só a posição precisa vir de outro lugar: ela é o número de tokens
# no cache.


# %% tags=["my_gpt"]
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


# %% [markdown] lang="en"
# ## The same logits, the same text
#
# At every position, the logits must be those of `gpt` over the whole text, except for rounding: a product of
# one row may be added up in another order than one of 64 rows. On a CPU the difference is at most a few 1e-6;
# some GPUs round products of several rows more coarsely, which is why the cell allows for more. Then generate
# with the cache. The loop feeds the model what the cache has not seen: first the prompt, then each new token.

# %% [markdown] lang="pt"
# ## Os mesmos logits, o mesmo texto
#
# Em cada posição, os logits têm de ser os de `gpt` sobre o texto inteiro, a menos de arredondamento: o
# produto de uma linha pode ser somado em outra ordem que o de 64 linhas. Numa CPU, a diferença é de no máximo
# alguns 1e-6; algumas GPUs arredondam mais os produtos de várias linhas, e por isso a célula tolera mais.
# Depois, geramos com o cache. O laço passa ao modelo o que o cache ainda não viu: primeiro o prompt, depois
# cada token novo.


# %%
def generate_with_cache(weights, ids, n_tokens, n_head, key, **settings):
    cache, unseen = None, ids
    for token_key in mx.random.split(key, n_tokens):
        for position in range(unseen.shape[1]):
            logits, cache = gpt_step(unseen[:, position], weights, n_head, cache)
        unseen = sample(filter_logits(logits, **settings), token_key)[:, None]
        ids = mx.concatenate([ids, unseen], axis=1)
        mx.eval(ids, cache)
    return ids


cache, rows, expected = None, [], gpt(ids, weights, n_head)
for position in range(block_size):
    logits, cache = gpt_step(ids[:, position], weights, n_head, cache)
    rows.append(logits)
difference = mx.abs(mx.stack(rows, axis=1) - expected).max()
print(f"largest logit {expected.max().item():.1f}, largest difference {difference.item():.0e}")
expect(difference, 0, 0.01)

texts = [
    tokenizer.decode(function(weights, ids[:, :16], 48, n_head, mx.random.key(1), top_k=10)[0])
    for function in (generate, generate_with_cache)
]
print(f"{texts[0]!r}\nthe same text: {texts[0] == texts[1]}")

# %% [markdown] lang="en"
# It is nonsense, but the same both times: with the same random keys, the same tokens are drawn.
#
# ## The time of a token
#
# A model of four layers and 128 dimensions, with room for 1,024 tokens. How long does the next token take,
# depending on the length of the text? The fastest of several tries counts, and in the plot all times are
# relative to a step with a cache of 32 tokens.

# %% [markdown] lang="pt"
# Não faz sentido, mas sai igual nas duas vezes: com as mesmas chaves aleatórias, os tokens sorteados são os
# mesmos.
#
# ## O tempo de um token
#
# Um modelo de quatro camadas e 128 dimensões, com lugar para 1.024 tokens. Quanto demora o próximo token,
# conforme o comprimento do texto? De várias tentativas vale a mais rápida, e no gráfico todos os tempos são
# relativos a um passo com um cache de 32 tokens.

# %%
large = init_weights(tokenizer.vocab_size, 1024, 4, 128, mx.random.key(0))
long_ids = tokenizer.encode(load_text()[:1024])[None]


def fastest(function, tries):
    times = []
    for _ in range(tries):
        begin = time.perf_counter()
        mx.eval(function())
        times.append(time.perf_counter() - begin)
    return min(times)


lengths, times = [32, 64, 128, 256, 512, 1024], []
for n in lengths:
    start, last = long_ids[:, :n], long_ids[:, n - 1]
    cache = keys_and_values(start[:, :-1], large, 4)
    mx.eval(cache)
    without = fastest(lambda start=start: gpt(start, large, 4)[:, -1], 5)
    step = fastest(lambda last=last, cache=cache: gpt_step(last, large, 4, cache), 200)
    times.append((without, step))
    print(f"{n:5} tokens: without the cache {without / step:6.1f} times as long")
figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
for column, label in enumerate(("without the cache", "with the cache")):
    axis.loglog(lengths, [t[column] / times[0][1] for t in times], "o-", label=label)
axis.set(xlabel="tokens so far", ylabel="time of the next token, relative")
axis.set_xticks(lengths, lengths, minor=False)
axis.legend()
plt.show()

# %% [markdown] lang="en"
# Without the cache, a token takes longer the longer the text is. With it, the time rises much less than the
# length; the rise comes from attention, and from copying the cache in `mx.concatenate`. (These times were
# measured on one machine, on its CPU; yours will differ. Programs that run at the same time slow down the
# passes without the cache more, since these use several cores. A GPU computes many tokens at once: there, a
# model this small may show the difference only at greater lengths.)
#
# ## The price of remembering
#
# Memory: a key and a value (2) per layer and token, each of C dimensions with 4 bytes in float32. That is
# 2 · n_layer · n_embd · T · 4 bytes for every text in the batch.

# %% [markdown] lang="pt"
# Sem o cache, quanto maior o texto, mais demora um token. Com ele, o tempo cresce bem menos que o
# comprimento; o que cresce vem da atenção e da cópia do cache em `mx.concatenate`. (Os tempos são de uma
# máquina, com CPU; os seus serão outros. Programas rodando ao mesmo tempo atrasam mais as passagens sem o
# cache, porque elas usam vários núcleos. Uma GPU calcula muitos tokens de uma vez: nela, um modelo tão
# pequeno talvez só mostre a diferença em comprimentos maiores.)
#
# ## O preço de lembrar
#
# Memória: uma key e um value (2) por camada e por token, cada um com C dimensões de 4 bytes em float32. São
# 2 · n_layer · n_embd · T · 4 bytes para cada texto do batch.


# %%
predicted = 2 * 4 * 128 * 1023 * 4
print(predicted, "=", sum(array.nbytes for _, array in tree_flatten(cache)), "bytes")
gpt2 = 2 * 12 * 768 * 1024 * 4
print(f"GPT-2 124M, 1,024 tokens: {gpt2 / 1e6:.1f} MB; its weights: {124.4e6 * 4 / 1e6:.0f} MB")

# %% [markdown] lang="en"
# 75.5 MB for one text, 4.8 GB for a batch of 64: from a batch of 7 on, the cache is larger than the weights.
# That is why newer models let several query heads share one key and value head (grouped-query attention,
# Ainslie et al., 2023).
#
# ## The end of the context
#
# `wpe` has block_size rows. After that many tokens there is no position for the next one, and MLX does not
# check the index. `generate` cuts the text to its last block_size tokens, which all move one position to the
# left. Does the cache survive that?

# %% [markdown] lang="pt"
# São 75,5 MB para um texto e 4,8 GB para um batch de 64: a partir de um batch de 7, o cache é maior que os
# pesos. Por isso, em modelos mais novos, várias cabeças de query dividem uma só cabeça de key e value
# (*grouped-query attention*, Ainslie et al., 2023).
#
# ## O fim do contexto
#
# `wpe` tem block_size linhas. Depois disso não há posição para o próximo token, e o MLX não confere o índice.
# `generate` corta o texto nos últimos block_size tokens, e todos andam uma posição para a esquerda. O cache
# sobrevive a isso?

# %%
before = keys_and_values(ids[:, :-1], weights, n_head)
after = keys_and_values(ids[:, 1:], weights, n_head)
for n, ((old, _), (new, _)) in enumerate(zip(before, after, strict=True)):
    change = mx.sqrt(mx.square(new[:, :, :-1] - old[:, :, 1:]).mean() / mx.square(old).mean())
    print(
        f"layer {n}: the keys of the same tokens, one position earlier, change by {change.item():.0%}"
    )

# %% [markdown] lang="en"
# It does not: position is a part of every key, and from layer 1 on so are the tokens that fell out. With
# learned positions the cache must be computed again. To do that for each token would be as slow as having no
# cache. The way out is to compute it again for the last half of the block only, which leaves room for another
# half: on average, one extra token is computed per new token. (The text then differs from `generate`'s, which
# always sees a whole block.)
#
# ## Check
#
# Your `gpt_step` gives the same logits as the library's model without a cache, at each position.

# %% [markdown] lang="pt"
# Não: a posição faz parte de cada key e, da camada 1 em diante, também os tokens que saíram. Com posições
# aprendidas, é preciso recalcular o cache. Fazer isso a cada token seria tão lento quanto não ter cache. A
# saída é recalcular só a última metade do bloco e ficar com a outra metade livre: em média, calcula-se um
# token a mais por token novo. (O texto então difere do de `generate`, que sempre vê um bloco inteiro.)
#
# ## Verificação
#
# O seu `gpt_step` dá os mesmos logits que o modelo da biblioteca sem cache, em cada posição.

# %%
check(9, globals())

# %% [markdown] lang="en"
# ## In mlxgpt
#
# [`mlxgpt/model/kv_cache.py`](../../../mlxgpt/model/kv_cache.py) does not append to the cache. Arrays that
# grow change their shape at every token, and a compiled function would be traced again each time. There, a
# cache has room from the start (`pad_cache`), the new keys and values are written to the slot of their
# position, and a mask hides the slots that are still empty. A step reads only as many slots as needed,
# rounded up to one of at most eight lengths (`round_up_to_bucket` in
# [`engine.py`](../../../mlxgpt/inference/engine.py)).
#
# [`mlxgpt/inference/decode.py`](../../../mlxgpt/inference/decode.py) processes a prompt at once (*prefill*):
# one pass of the model with the causal mask, which also returns the keys and values. Prompts of a batch may
# differ in length: they are padded, each row has its own position, and equal prompts are computed once. A
# full cache with learned positions is prefilled again from the last half block (`refill`). With rotary
# positions (RoPE), which depend on distances only, the new token just overwrites the oldest.
#
# ## Exercises
#
# Write `attention_step` and `gpt_step` to your own `my_gpt.py`, then run `mlxgpt learn check 9`.
#
# 1. Why is there no cache of queries?
#
# <details><summary>Answer</summary>
#
# The query of a token is used once: to compute that token's own output. Keys and values are used by all later
# tokens.
# </details>
#
# 2. What must change in `attention_step` so that it takes a whole prompt, x [B, T, C], and why is that faster
# than T steps, although there is no less to compute?
#
# <details><summary>Answer</summary>
#
# It needs the causal mask again: the T queries come with the keys of tokens after them. It is faster since
# each weight is read from memory once for T tokens instead of once for each; in a step
# with one text, a weight is read for a single multiplication.
# </details>
#
# 3. How large is GPT-2's cache if four query heads share one key and value head, in bfloat16?
#
# <details><summary>Answer</summary>
#
# 12 heads become 3, and a dimension takes 2 bytes instead of 4: an eighth, 9.4 MB for 1,024 tokens.
# </details>

# %% [markdown] lang="pt"
# ## No mlxgpt
#
# [`mlxgpt/model/kv_cache.py`](../../../mlxgpt/model/kv_cache.py) não concatena. Arrays que crescem mudam de
# forma a cada token, e uma função compilada teria de ser traçada de novo todas as vezes. Lá, o cache já nasce
# com espaço (`pad_cache`), as keys e os values novos são escritos no lugar da sua posição, e uma máscara
# esconde os lugares ainda vazios. Um passo lê só os lugares necessários, arredondados para um de no máximo
# oito comprimentos (`round_up_to_bucket`, em [`engine.py`](../../../mlxgpt/inference/engine.py)).
#
# [`mlxgpt/inference/decode.py`](../../../mlxgpt/inference/decode.py) processa o prompt de uma vez
# (*prefill*): uma passagem do modelo com a máscara causal, que devolve também as keys e os values. Os prompts
# de um batch podem ter comprimentos diferentes: são completados com padding, cada linha tem a sua posição, e
# prompts iguais são calculados uma vez só. Um cache cheio com posições aprendidas é recalculado a partir do
# último meio bloco (`refill`). Com posições rotativas (RoPE), que dependem só das distâncias, o token novo
# apenas toma o lugar do mais antigo.
#
# ## Exercícios
#
# Escreva `attention_step` e `gpt_step` no seu próprio `my_gpt.py` e rode `mlxgpt learn check 9`.
#
# 1. Por que não existe cache de queries?
#
# <details><summary>Resposta</summary>
#
# A query de um token é usada uma vez: para calcular a saída desse próprio token. Keys e values são usados por
# todos os tokens seguintes.
# </details>
#
# 2. O que precisa mudar em `attention_step` para receber um prompt inteiro, x [B, T, C], e por que isso é
# mais rápido que T passos, se não há menos contas a fazer?
#
# <details><summary>Resposta</summary>
#
# A máscara causal volta a ser necessária: as T queries chegam junto com keys de tokens posteriores a elas. É
# mais rápido porque cada peso é lido da memória uma vez para T tokens, e não uma vez para cada um; num passo
# com um só texto, um peso é lido para uma única multiplicação.
# </details>
#
# 3. De que tamanho fica o cache do GPT-2 se quatro cabeças de query dividirem uma cabeça de key e value, em
# bfloat16?
#
# <details><summary>Resposta</summary>
#
# De 12 cabeças restam 3, e uma dimensão ocupa 2 bytes em vez de 4: um oitavo, 9,4 MB para 1.024 tokens.
# </details>
