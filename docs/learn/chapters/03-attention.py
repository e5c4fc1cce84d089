# %% [markdown] lang="en"
# # 3. One attention head
#
# **How can a token use what came before it, if it does not know where that is?**
#
# The bigram model sees one token. The letter after `h` depends on whether `t` or `s` came before, but how
# far back to look differs from text to text. Attention lets each token decide: it compares a *query* ("what
# am I looking for?") with the *key* of every earlier token ("what do I have?"), and takes a mean of their
# *values* ("what do I pass on?"), weighted by how well query and key match.

# %% [markdown] lang="pt"
# # 3. Uma cabeça de atenção
#
# **Como um token pode usar o que veio antes dele, se não sabe onde isso está?**
#
# O modelo de bigramas enxerga um único token. A letra depois de `h` depende de ter vindo antes um `t` ou um
# `s`, mas a distância até a pista muda de texto para texto. Na atenção (*attention*), é o próprio token que
# decide: ele compara a sua *query* ("o que procuro?") com a *key* de cada token anterior ("o que eu tenho?")
# e calcula uma média dos *values* ("o que passo adiante?"), com pesos maiores onde query e key combinam.

# %%
import math

import matplotlib.pyplot as plt
import mlx.core as mx
from course import CharTokenizer, check, expect, load_text
from my_gpt import cross_entropy

# %% [markdown] lang="en"
# ## The mean of everything before
#
# Start without any decision: each token takes the plain mean of itself and all earlier ones. As a matrix
# product, this is one line: row t of `weights` has 1/(t+1) in its first t+1 columns, and 0 after them. That
# triangle of zeros is the *causal mask*: token t must not see what it has to predict.

# %% [markdown] lang="pt"
# ## A média de tudo que veio antes
#
# Comecemos sem nenhuma decisão: cada token recebe a média simples de si mesmo e de todos os anteriores. Como
# produto de matrizes, é uma linha só: a linha t de `weights` tem 1/(t+1) nas primeiras t+1 colunas e zero no
# resto. Esse triângulo de zeros é a *máscara causal* (*causal mask*): o token t não pode ver o que ele mesmo
# precisa prever.

# %%
T, D = 6, 4
values = mx.random.normal((T, D), key=mx.random.key(0))
is_past = mx.arange(T) <= mx.arange(T)[:, None]  # [T, T]: column <= row
weights = is_past / is_past.sum(axis=1, keepdims=True)
print(weights)
print("mean of the first three values:", values[:3].mean(axis=0))
print("row 2 of weights @ values:     ", (weights @ values)[2])

# %% [markdown] lang="en"
# ## Weights from queries and keys
#
# Now the weights depend on the tokens. The match of a query with a key is their dot product; `softmax` turns
# the matches of one token into positive weights with sum 1. A masked place gets -inf, since e^-inf = 0.
#
# Why divide by √D? The dot product of two random vectors, whose D values have variance 1, has variance D.
# With D = 64, the matches are around ±8, softmax gives nearly everything to the largest, and its gradient
# vanishes. Divided by √D, the variance is 1 again.

# %% [markdown] lang="pt"
# ## Pesos a partir de queries e keys
#
# Agora os pesos dependem dos tokens. A afinidade entre uma query e uma key é o produto escalar das duas; a
# `softmax` transforma as afinidades de um token em pesos positivos que somam 1. Uma posição mascarada recebe
# -inf, porque e^-inf = 0.
#
# Por que dividir por √D? O produto escalar de dois vetores aleatórios, cujos D valores têm variância 1, tem
# variância D. Com D = 64, as afinidades ficam em torno de ±8, a softmax entrega quase tudo à maior delas e o
# gradiente some. Dividindo por √D, a variância volta a ser 1.


# %% tags=["my_gpt"]
def attend(q, k, v):
    """Causal attention: q, k, v [..., T, D] -> [..., T, D]."""
    T, D = q.shape[-2:]
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(D)  # [..., T, T]
    is_past = mx.arange(T) <= mx.arange(T)[:, None]
    return mx.softmax(mx.where(is_past, scores, -mx.inf), axis=-1) @ v


# %%
q, k = mx.random.normal((2, 1000, 64), key=mx.random.key(1))
products = (q * k).sum(axis=1)
print(
    f"variance of q·k: {mx.var(products).item():.0f}; of q·k/√D: {mx.var(products / 8).item():.2f}"
)
for scale in (1, 8):
    share = mx.softmax(scale * mx.random.normal((1000, 32), key=mx.random.key(2)), axis=1).max(
        axis=1
    )
    print(
        f"scores around ±{scale}: the largest of 32 weights is {share.mean().item():.2f} on average"
    )

# %% [markdown] lang="en"
# ## What it learns
#
# One head on Tiny Shakespeare. Each token begins as a vector of C values, the sum of two embeddings, which
# are tables as in chapter 2: a row of `wte` for the token, and a row of `wpe` for its position. Then come one
# `attend` and a linear layer to logits. Plain gradient descent would take long, so this uses Adam from MLX;
# chapter 6 explains it.

# %% [markdown] lang="pt"
# ## O que ela aprende
#
# Uma cabeça no Tiny Shakespeare. Cada token começa como um vetor de C valores, a soma de dois embeddings, que
# são tabelas como a do capítulo 2: uma linha de `wte` para o token e uma linha de `wpe` para a posição.
# Depois vêm uma chamada de `attend` e uma camada linear até os logits. A descida de gradiente simples
# demoraria demais; por isso usamos o Adam do MLX, que o capítulo 6 explica.

# %%
import mlx.optimizers as optim

tokenizer = CharTokenizer(load_text())
ids = tokenizer.encode(load_text())
V, C, T = tokenizer.vocab_size, 32, 16
shapes = {"wte": (V, C), "wpe": (T, C), "q": (C, C), "k": (C, C), "v": (C, C), "head": (C, V)}
keys = mx.random.split(mx.random.key(0), len(shapes))
weights = {
    name: mx.random.normal(shape, key=key) / math.sqrt(C)
    for (name, shape), key in zip(shapes.items(), keys, strict=True)
}


def head_loss(weights, inputs, targets):
    x = weights["wte"][inputs] + weights["wpe"]  # [B, T, C]
    y = attend(x @ weights["q"], x @ weights["k"], x @ weights["v"])
    return cross_entropy((x + y) @ weights["head"], targets).mean()


loss_and_gradients = mx.compile(mx.value_and_grad(head_loss))
optimizer, losses = optim.Adam(1e-2), []
for step in range(300):
    starts = mx.random.randint(0, len(ids) - T, (64, 1), key=mx.random.key(step))
    positions = starts + mx.arange(T)
    loss, gradients = loss_and_gradients(weights, ids[positions], ids[positions + 1])
    weights = optimizer.apply_gradients(gradients, weights)
    mx.eval(weights)
    losses.append(loss.item())
expect(sum(losses[-50:]) / 50, 2.27, 0.04)

# %% [markdown] lang="en"
# Below 2.45, the loss of the counted bigrams, which no model that sees one token can beat on this text. Where
# does the head look? Each row is a token, each column what it attends to.

# %% [markdown] lang="pt"
# Abaixo de 2,45, a loss dos bigramas contados, que nenhum modelo que vê um só token supera neste texto. Para
# onde a cabeça olha? Cada linha é um token; cada coluna, a que ele dá atenção.

# %%
text = "the king and his"
x = weights["wte"][tokenizer.encode(text)] + weights["wpe"]
scores = (x @ weights["q"]) @ (x @ weights["k"]).T / math.sqrt(C)
is_past = mx.arange(T) <= mx.arange(T)[:, None]
pattern = mx.softmax(mx.where(is_past, scores, -mx.inf), axis=-1)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
axes[0].plot(losses, linewidth=0.7)
axes[0].axhline(2.455, color="gray", linestyle="--")
axes[0].set(xlabel="step", ylabel="loss, nats per character")
axes[1].imshow(pattern, cmap="Blues", vmin=0, vmax=1)
axes[1].set_xticks(range(T), list(text.replace(" ", "␣")))
axes[1].set_yticks(range(T), list(text.replace(" ", "␣")))
plt.show()

# %% [markdown] lang="en"
# The head looks at the previous token: with it, a bigram becomes a trigram. Only position embeddings make
# that possible. (The dashed line is the loss of the counted bigrams.)
#
# ## Check
#
# Your `attend` equals the library's, and no token sees a later one.

# %% [markdown] lang="pt"
# A cabeça olha para o token anterior: com ele, o bigrama vira trigrama. Só os embeddings de posição tornam
# isso possível. (A linha tracejada é a loss dos bigramas contados.)
#
# ## Verificação
#
# O seu `attend` é igual ao da biblioteca, e nenhum token enxerga um posterior.

# %%
check(3, globals())

# %% [markdown] lang="en"
# ## In mlxgpt
#
# `causal_attention` in [`mlxgpt/backend/ops.py`](../../../mlxgpt/backend/ops.py) computes the same. On a GPU
# it is one call of MLX: `mx.fast.scaled_dot_product_attention(q, k, v, scale=1/√D, mask="causal")`. MLX's
# fused kernel, used where possible, does not store the T × T weights, which at 1,024 tokens would be a
# million values per head. On a CPU, [`mlxgpt/backend/cpu/kernels.py`](../../../mlxgpt/backend/cpu/kernels.py)
# stores them, because the gradient, written by hand as in chapter 2, uses them again.
#
# ## Exercises
#
# Write `attend` to your own `my_gpt.py`, then run `mlxgpt learn check 3`.
#
# 1. What happens to the loss if you remove the mask, and why is that not progress?
#
# <details><summary>Answer</summary>
#
# It falls far below what is possible: the token to predict is one of those attended to, so the head learns to
# copy it. During generation that token does not exist yet, and the samples are noise.
# </details>
#
# 2. Without `wpe`, can the head tell `th` from `ht`?
#
# <details><summary>Answer</summary>
#
# Only by the last token, whose query differs. A weighted mean does not depend on the order of what it sums:
# the earlier tokens are a set. Positions must come from an embedding (GPT-2) or a rotation of queries and
# keys (RoPE).
# </details>

# %% [markdown] lang="pt"
# ## No mlxgpt
#
# `causal_attention`, em [`mlxgpt/backend/ops.py`](../../../mlxgpt/backend/ops.py), calcula o mesmo. Na GPU, é
# uma só chamada do MLX: `mx.fast.scaled_dot_product_attention(q, k, v, scale=1/√D, mask="causal")`. O kernel
# fundido do MLX, usado onde possível, não guarda os T × T pesos, que com 1.024 tokens seriam um milhão de
# valores por cabeça. Na CPU, [`mlxgpt/backend/cpu/kernels.py`](../../../mlxgpt/backend/cpu/kernels.py) os
# guarda, porque o gradiente, escrito à mão como no capítulo 2, volta a usá-los.
#
# ## Exercícios
#
# Escreva `attend` no seu próprio `my_gpt.py` e rode `mlxgpt learn check 3`.
#
# 1. O que acontece com a loss se você tirar a máscara, e por que isso não é um avanço?
#
# <details><summary>Resposta</summary>
#
# Ela cai muito abaixo do possível: o token a prever está entre os que recebem atenção, e a cabeça aprende a
# copiá-lo. Na hora de gerar, ele ainda não existe, e as amostras são ruído.
# </details>
#
# 2. Sem `wpe`, a cabeça consegue distinguir `th` de `ht`?
#
# <details><summary>Resposta</summary>
#
# Só pelo último token, que determina a query. Uma média ponderada não depende da ordem das parcelas: os
# tokens anteriores formam um conjunto. A posição precisa vir de um embedding (GPT-2) ou de uma rotação de
# queries e keys (RoPE).
# </details>
