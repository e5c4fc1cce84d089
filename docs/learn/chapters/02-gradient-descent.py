# %% [markdown] lang="en"
# # 2. The same by gradient descent
#
# **Can a model find the table of bigrams without counting?**
#
# Counting works for bigrams, but not for long contexts. Gradient descent works for any model whose loss can
# be differentiated. Here it has to find a table that we already know, so that each step can be checked: the
# loss must fall from ln V to that of the counts, and the learned table must be the counted one.

# %% [markdown] lang="pt"
# # 2. O mesmo, por descida de gradiente
#
# **Um modelo consegue descobrir a tabela de bigramas sem contar?**
#
# Contar serve para bigramas, mas não para contextos longos. A descida de gradiente (*gradient descent*) serve
# para qualquer modelo cuja loss possa ser derivada. Aqui ela precisa encontrar uma tabela que já conhecemos,
# o que nos permite conferir cada passo: a loss tem que cair de ln V até a da contagem, e a tabela aprendida
# tem que ser a contada.

# %%
import math

import matplotlib.pyplot as plt
import mlx.core as mx
from course import CharTokenizer, check, expect, load_text
from my_gpt import bigram_loss, count_bigrams

text = load_text()
tokenizer = CharTokenizer(text)
V = tokenizer.vocab_size
ids = tokenizer.encode(text)
counts = count_bigrams(ids, V)  # [V, V]

# %% [markdown] lang="en"
# ## Logits
#
# Gradient descent adds something to each value at each step. Probabilities would not survive that: they must
# stay positive and have sum 1. So the model holds *logits* instead, any real numbers, and *softmax* turns a
# row z of them into probabilities: pₖ = e^zₖ / Σⱼ e^zⱼ. Only differences between logits matter: adding a
# constant c to all of them multiplies numerator and denominator by e^c.
#
# The loss of a target y is then -ln p_y = ln Σⱼ e^zⱼ - z_y, the *cross-entropy*. Written like that, it
# overflows: the largest float32 is about e^88.7. Because a constant does not matter, we subtract the largest
# logit of the row. Then the largest term of the sum is e^0 = 1, and no other is larger.

# %% [markdown] lang="pt"
# ## Logits
#
# A descida de gradiente soma alguma coisa a cada valor em cada passo. Probabilidades não sobreviveriam a
# isso: elas precisam continuar positivas e somar 1. Por isso o modelo guarda *logits*, números reais
# quaisquer, e a *softmax* transforma uma linha z deles em probabilidades: pₖ = e^zₖ / Σⱼ e^zⱼ. Só importam as
# diferenças entre logits: somar uma constante c a todos multiplica numerador e denominador por e^c.
#
# A loss de um alvo (*target*) y é então -ln p_y = ln Σⱼ e^zⱼ - z_y, a entropia cruzada (*cross-entropy*).
# Calculada assim, ela estoura (*overflow*): o maior float32 é cerca de e^88,7. Como uma constante não faz
# diferença, subtraímos o maior logit da linha. O maior termo da soma passa a ser e^0 = 1, e nenhum
# outro é maior.


# %% tags=["my_gpt"]
def cross_entropy(logits, targets):
    """-ln(softmax(logits)[target]): logits [..., V], targets [...] -> [...]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    chosen = mx.take_along_axis(shifted, targets[..., None], axis=-1)[..., 0]
    return mx.log(mx.exp(shifted).sum(axis=-1)) - chosen


# %%
z, y = mx.array([2.0, 1.0, 0.0]), mx.array(1)
for logits in (z, z + 1000):
    naive = mx.log(mx.exp(logits).sum()) - logits[y]
    print(f"without subtracting: {naive.item():.4f}; with: {cross_entropy(logits, y).item():.4f}")
table = mx.zeros((V, V))  # row: the token before, column: logit of the next one
print("first loss:", cross_entropy(table[ids[:9]], ids[1:10]).mean().item(), "ln V:", math.log(V))

# %% [markdown] lang="en"
# A table of zeros gives all tokens the same probability. The first loss is ln V, as promised.
#
# Is this a neural network? Yes: `table[x]` is the same as `one_hot(x) @ table`, one linear layer without bias
# and without activation, whose input is a single 1 among zeros. Looking up the row is only faster. From
# chapter 3 on, such a table is called an *embedding*.
#
# ## The gradient, by hand
#
# For one example, L = ln Σⱼ e^zⱼ - z_y. The derivative of the first term by zₖ is e^zₖ / Σⱼ e^zⱼ, which is
# pₖ. The second gives -1 if k is the target, else 0. So
#
# ∂L/∂zₖ = pₖ - [k = y]
#
# It reads: the target should have had probability 1, all others 0; the gradient is the error. It has sum 0:
# what the target gains, the others lose. The mean over N examples divides by N.

# %% [markdown] lang="pt"
# Uma tabela de zeros dá a mesma probabilidade a todos os tokens. A primeira loss é ln V, como prometido.
#
# Isso é uma rede neural? É: `table[x]` é o mesmo que `one_hot(x) @ table`, uma camada linear sem bias e sem
# ativação cuja entrada é um único 1 entre zeros. Buscar a linha direto só é mais rápido. Do capítulo 3 em
# diante, uma tabela assim se chama *embedding*.
#
# ## O gradiente, à mão
#
# Para um exemplo, L = ln Σⱼ e^zⱼ - z_y. A derivada do primeiro termo em relação a zₖ é e^zₖ / Σⱼ e^zⱼ, ou
# seja, pₖ. O segundo termo dá -1 se k é o alvo e 0 se não é. Portanto
#
# ∂L/∂zₖ = pₖ - [k = y]
#
# Lê-se assim: o alvo deveria ter probabilidade 1, e os outros, 0; o gradiente é o erro. A soma dele é 0: o
# que o alvo ganha, os outros perdem. Na média de N exemplos, divide-se por N.


# %% tags=["my_gpt"]
def cross_entropy_gradient(logits, targets):
    """Gradient of the mean loss: logits [N, V], targets [N] -> [N, V]."""
    one_hot = mx.arange(logits.shape[-1]) == targets[:, None]
    return (mx.softmax(logits, axis=-1) - one_hot) / len(targets)


# %% [markdown] lang="en"
# Two ways to check a gradient. MLX differentiates the loss itself (`mx.grad`), and a finite difference needs
# no calculus at all: move one logit a little to both sides, and see how much the loss changes.

# %% [markdown] lang="pt"
# Há dois jeitos de conferir um gradiente. O MLX deriva a própria loss (`mx.grad`), e a diferença finita
# (*finite difference*) dispensa derivadas: mexemos um pouco num logit, para os dois lados, e vemos
# quanto a loss muda.

# %%
h = 0.01
differences = [
    (cross_entropy(z + h * e, y) - cross_entropy(z - h * e, y)).item() / (2 * h) for e in mx.eye(3)
]
print("softmax:          ", mx.softmax(z))
print("by hand:          ", cross_entropy_gradient(z[None], y[None])[0])
print("mx.grad:          ", mx.grad(cross_entropy)(z, y))
print("finite difference:", [round(d, 4) for d in differences])

# %% [markdown] lang="en"
# ## What the minimum must be
#
# Add up the gradients of all n examples whose token before is a. They have the same row of logits, so their
# sum is n · pₖ - (how often k followed a), divided by N. At the minimum it is 0, that is **pₖ = count / n**.
# The best that gradient descent can find is the counted table, without the `+ 1`.
#
# ## Descent
#
# Each step takes 1,024 random places of the text, the *batch*, and moves the table against the gradient. MLX
# computes the gradient, since later models have layers between the weights and the logits; but the first part
# of that computation, from the loss back to the logits, is always your formula. How far to move is the
# *learning rate*. Let us try three.

# %% [markdown] lang="pt"
# ## Como tem que ser o mínimo
#
# Some os gradientes de todos os n exemplos cujo token anterior é a. Eles têm a mesma linha de logits, e a
# soma é n · pₖ - (quantas vezes k veio depois de a), dividida por N. No mínimo ela vale 0, isto é, **pₖ =
# contagem / n**. O melhor que a descida de gradiente pode encontrar é a tabela contada, sem o `+ 1`.
#
# ## A descida
#
# Cada passo pega 1.024 posições aleatórias do texto, o *batch*, e move a tabela contra o gradiente. O
# gradiente fica por conta do MLX, já que os próximos modelos terão camadas entre os pesos e os logits; mas a
# primeira parte desse cálculo, da loss até os logits, é sempre a sua fórmula. O quanto mover é a taxa de
# aprendizado (*learning rate*). Vamos testar três.


# %%
def table_loss(table, inputs, targets):
    return cross_entropy(table[inputs], targets).mean()


loss_and_gradient = mx.compile(mx.value_and_grad(table_loss))


def train(table, learning_rate, n_steps, seed):
    losses = []
    for key in mx.random.split(mx.random.key(seed), n_steps):
        places = mx.random.randint(0, len(ids) - 1, (1024,), key=key)
        loss, gradient = loss_and_gradient(table, ids[places], ids[places + 1])
        table = table - learning_rate * gradient
        losses.append(loss.item())
    return table, losses


curves, tables = {}, {}
for rate, expected, tolerance in ((1, 3.35, 0.01), (100, 2.52, 0.02), (500, 6.75, 0.3)):
    tables[rate], curves[rate] = train(mx.zeros((V, V)), rate, 300, seed=0)
    print(f"learning rate {rate}: mean of the last 100 losses ", end="")
    expect(sum(curves[rate][-100:]) / 100, expected, tolerance)

# %% [markdown] lang="en"
# With 1, the loss falls, but slowly. With 500, each step overshoots: the loss climbs above ln V and stays
# there, worse than knowing nothing. 100 falls fast. Such a large learning rate is a peculiarity of this
# table: a logit only gets a gradient from the few examples of the batch that have its row.
#
# At a constant rate the table then fluctuates around the minimum, because each batch is a bit different. We
# continue with 100, then take smaller steps to let it settle. The loss of the whole text, not of a batch:

# %% [markdown] lang="pt"
# Com 1, a loss cai, mas devagar. Com 500, cada passo vai longe demais: a loss sobe acima de ln V e fica por
# lá, pior do que não saber nada. Com 100 ela cai depressa. Uma taxa tão grande é uma peculiaridade desta
# tabela: um logit só recebe gradiente dos poucos exemplos do batch que têm a linha dele.
#
# Com a taxa constante, a tabela passa a oscilar em torno do mínimo, porque cada batch é um pouco diferente.
# Continuamos com 100 e depois damos passos menores, para ela assentar. A loss do texto inteiro, e não de um
# batch:

# %%
table, _ = train(tables[100], 100, 500, seed=1)
expect(bigram_loss(mx.softmax(table, axis=-1), ids), 2.50, 0.02)
table, _ = train(table, 10, 200, seed=2)
expect(bigram_loss(mx.softmax(table, axis=-1), ids), 2.465, 0.004)
expect(bigram_loss(counts / counts.sum(axis=1, keepdims=True), ids), 2.453, 0.001)  # counted

# %% [markdown] lang="en"
# From 4.17 to 2.47; counting gives 2.453 without the `+ 1`, which is the minimum. No pair was ever counted.
# Has it found the same table? On the right, each point is one of the 800 most frequent pairs: ln of its
# counted probability, and ln of its learned one.

# %% [markdown] lang="pt"
# De 4,17 para 2,47; contando sem o `+ 1` chega-se a 2,453, que é o mínimo. Nenhum par foi contado. Será que o
# modelo achou a mesma tabela? À direita, cada ponto é um dos 800 pares mais frequentes: o ln da probabilidade
# contada e o ln da aprendida.

# %%
totals = counts.sum(axis=1, keepdims=True)  # [V, 1]
counted = mx.log(counts / totals)  # [V, V]
learned = mx.log(mx.softmax(table, axis=-1))
share = mx.log10(mx.broadcast_to(totals / totals.sum(), (V, V)))
pairs = mx.argsort(-counts.flatten())[:800]
x, y, color = counted.flatten()[pairs], learned.flatten()[pairs], share.flatten()[pairs]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for rate, losses in curves.items():
    axes[0].plot(losses, linewidth=0.7, label=f"learning rate {rate}")
axes[0].axhline(math.log(V), color="gray", linestyle=":")
axes[0].axhline(2.453, color="gray", linestyle="--")
axes[0].set(xlabel="step", ylabel="loss of the batch, nats")
axes[0].legend()
points = axes[1].scatter(x, y, s=4, c=color, cmap="viridis")
axes[1].plot([-7.5, 0], [-7.5, 0], color="gray", linewidth=0.7)
axes[1].set(xlabel="ln of the counted probability", ylabel="ln of the learned one")
figure.colorbar(points, ax=axes[1], label="log10 of the row's share of the text")
plt.show()
print("mean difference of the two logarithms ", end="")
expect(mx.abs(x - y).mean(), 0.11, 0.02)
print("largest sum of a row of the table:", mx.abs(table.sum(axis=1)).max().item())

# %% [markdown] lang="en"
# On the left, the three learning rates (dotted: ln V; dashed: the minimum). On the right, the points are on
# the diagonal, with some scatter: it is the same table. The color is how frequent the first character is.
#
# We compared probabilities, not logits, since the logits of a row may all differ from ln p by one constant.
# The start determines this constant: the gradient of a row has sum 0, so the sum of its logits stays 0, up to
# rounding.
#
# ## Check
#
# Your cross-entropy equals the library's, also where e^z would overflow, and your gradient equals MLX's.

# %% [markdown] lang="pt"
# À esquerda, as três taxas (pontilhada: ln V; tracejada: o mínimo). À direita, os pontos estão na diagonal,
# com alguma dispersão: é a mesma tabela. A cor mostra quão frequente é o primeiro caractere.
#
# Comparamos probabilidades, e não logits, porque os logits de uma linha podem diferir todos de ln p por uma
# mesma constante. Essa constante é determinada pelo ponto de partida: o gradiente de uma linha soma 0, e por
# isso a soma dos logits dela continua em 0, a menos de arredondamento.
#
# ## Verificação
#
# A sua entropia cruzada é igual à da biblioteca, mesmo onde e^z estouraria, e o seu gradiente é igual ao do
# MLX.

# %%
check(2, globals())

# %% [markdown] lang="en"
# ## In mlxgpt
#
# `token_losses` in [`mlxgpt/model/losses.py`](../../../mlxgpt/model/losses.py) gives the loss of every token,
# [B, T]. It first converts the logits to float32: a model may compute in bfloat16, whose 8 significant bits
# would be too coarse for a loss. Then it calls `cross_entropy` of
# [`mlxgpt/backend/ops.py`](../../../mlxgpt/backend/ops.py). On a GPU, that is MLX's own
# `nn.losses.cross_entropy`, in recent versions one fused kernel. On a CPU it is
# [`mlxgpt/backend/cpu/kernels.py`](../../../mlxgpt/backend/cpu/kernels.py): the formula of this chapter, with
# the gradient written by hand, softmax minus one-hot, because it can then reuse the exponentials that the
# loss has already computed.
#
# ## Exercises
#
# Write both functions to your own `my_gpt.py`, then run `mlxgpt learn check 2`.
#
# 1. Start from `3 * mx.random.normal((V, V))` instead of zeros. What is the first loss, and why?
#
# <details><summary>Answer</summary>
#
# About 7.9, far above ln V = 4.17. The table does not know more than zeros do, but it is confident, and
# wrong: some tokens get a very small probability, and -ln p of those is large. That is why the initial
# weights of a GPT are small (chapter 5).
# </details>
#
# 2. With a learning rate of 1, the probability of `t` after a space is 0.13 after 300 steps (counted: 0.14),
#    but that of `u` after `q` is 0.018, hardly more than 1/65 (counted: 1). Why?
#
# <details><summary>Answer</summary>
#
# In a batch of 1,024 characters there are about 156 spaces, but on average 0.56 times a `q`. Its row gets a
# gradient 280 times smaller, so one learning rate cannot suit both. AdamW divides the gradient of each weight
# by its usual size (chapter 6).
# </details>
#
# 3. Why the cross-entropy, and not the squared error of the probabilities?
#
# <details><summary>Answer</summary>
#
# A model should learn most where it is confident and wrong. The gradient of the cross-entropy for the target
# is p - 1, about -1 for p near 0. The derivative of (1 - p)² by the same logit is -2 p (1 - p)², which
# vanishes for p near 0: the worst errors would hardly be corrected.
# </details>

# %% [markdown] lang="pt"
# ## No mlxgpt
#
# `token_losses`, em [`mlxgpt/model/losses.py`](../../../mlxgpt/model/losses.py), dá a loss de cada token, [B,
# T]. Antes, ela converte os logits para float32: o modelo pode calcular em bfloat16, cujos 8 bits
# significativos seriam pouco para uma loss. Depois chama a `cross_entropy` de
# [`mlxgpt/backend/ops.py`](../../../mlxgpt/backend/ops.py). Na GPU, é a do próprio MLX,
# `nn.losses.cross_entropy`, um único kernel fundido nas versões recentes. Na CPU, é a de
# [`mlxgpt/backend/cpu/kernels.py`](../../../mlxgpt/backend/cpu/kernels.py): a fórmula deste capítulo, com o
# gradiente escrito à mão, softmax menos one-hot, porque assim ele aproveita as exponenciais que a loss já
# calculou.
#
# ## Exercícios
#
# Escreva as duas funções no seu próprio `my_gpt.py` e rode `mlxgpt learn check 2`.
#
# 1. Comece com `3 * mx.random.normal((V, V))` em vez de zeros. Qual é a primeira loss, e por quê?
#
# <details><summary>Resposta</summary>
#
# Cerca de 7,9, muito acima de ln V = 4,17. A tabela não sabe mais do que a de zeros, mas está convicta, e
# errada: alguns tokens recebem uma probabilidade muito pequena, e o -ln p deles é grande. É por isso que os
# pesos iniciais de um GPT são pequenos (capítulo 5).
# </details>
#
# 2. Com taxa de aprendizado 1, a probabilidade de `t` depois de um espaço está em 0,13 após 300 passos
#    (contada: 0,14), mas a de `u` depois de `q` está em 0,018, pouco mais que 1/65 (contada: 1). Por quê?
#
# <details><summary>Resposta</summary>
#
# Num batch de 1.024 caracteres há uns 156 espaços, mas em média só 0,56 `q`. A linha dele recebe um
# gradiente 280 vezes menor, e uma única taxa não serve para as duas. O AdamW divide o gradiente de cada peso
# pelo tamanho habitual dele (capítulo 6).
# </details>
#
# 3. Por que a entropia cruzada, e não o erro quadrático das probabilidades?
#
# <details><summary>Resposta</summary>
#
# Quando o modelo está convicto e errado é que ele mais deveria aprender. O gradiente da entropia cruzada
# no logit do alvo é p - 1, quase -1 para p perto de 0. A derivada de (1 - p)² em relação ao mesmo logit é
# -2 p (1 - p)², que some para p perto de 0: os piores erros quase não seriam corrigidos.
# </details>
