# %% [markdown] lang="en"
# # 5. The stack and the first loss
#
# **What loss should a model that knows nothing have?**
#
# Before the first training step, a GPT can already be wrong: a mask that is missing, targets in the wrong
# place, weights that are too large. Its first loss reveals some of these in a second, if you know what it
# should be. This chapter builds the whole model, derives its first loss, and breaks it three times.

# %% [markdown] lang="pt"
# # 5. A pilha de blocos e a primeira loss
#
# **Que loss deve ter um modelo que não sabe nada?**
#
# Antes do primeiro passo de treino, um GPT já pode estar errado: falta a máscara, os alvos estão no lugar
# errado, os pesos são grandes demais. A primeira loss revela parte disso em um segundo, desde que se saiba
# quanto ela deve valer. Este capítulo monta o modelo inteiro, deduz a sua primeira loss e o quebra três
# vezes.

# %%
import math

import matplotlib.pyplot as plt
import mlx.core as mx
import my_gpt
from course import CharTokenizer, check, expect, load_text
from mlx.utils import tree_flatten, tree_map
from my_gpt import block, cross_entropy, layer_norm, linear

from mlxgpt.config import ModelConfig
from mlxgpt.model.stats import count_parameters

# %% [markdown] lang="en"
# ## The stack
#
# A GPT is short now: the embedding of each token plus that of its position, the blocks, a last layer norm,
# and a head that turns C values into V logits. The head is the token embedding once more (Press & Wolf, 2017:
# a *tied* head): the logit of a token is the dot product of its row of `wte` with the final vector.
#
# The initial weights are GPT-2's: normal, with standard deviation 0.02; the weights of the norms are 1. The
# two matrices of a block that write to the residual stream, both named `c_proj`, get 0.02/√(2·n_layer); why
# is measured below.

# %% [markdown] lang="pt"
# ## A pilha
#
# Agora um GPT é curto: o embedding de cada token mais o da sua posição, os blocos, uma última layer norm e
# uma saída (*head*) que transforma C valores em V logits. A saída é o próprio embedding dos tokens, usado
# outra vez (Press & Wolf, 2017: *tied head*): o logit de um token é o produto escalar da sua linha de `wte`
# com o vetor final.
#
# Os pesos iniciais são os do GPT-2: normais, com desvio padrão 0,02; os pesos das normas valem 1. As duas
# matrizes do bloco que escrevem no residual stream, ambas chamadas `c_proj`, recebem 0,02/√(2·n_layer); o
# porquê vamos medir mais abaixo.


# %% tags=["my_gpt"]
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


# %% tags=["my_gpt"]
def gpt(ids, weights, n_head, drop=lambda x: x):
    """Token ids [B, T] -> logits of the next tokens [B, T, V]."""
    x = weights["wte"]["weight"][ids] + weights["wpe"]["weight"][: ids.shape[1]]
    x = drop(x)
    for layer in weights["h"]:
        x = block(x, layer, n_head, drop)
    return linear(layer_norm(x, weights["ln_f"]), weights["wte"])


# %% [markdown] lang="en"
# Parameters: V·C in `wte`, T·C in `wpe`, 12·C² + 2·C in each block, C in the last norm. The head adds none.

# %% [markdown] lang="pt"
# Parâmetros: V·C em `wte`, T·C em `wpe`, 12·C² + 2·C em cada bloco, C na última norma. A saída não acrescenta
# nenhum.

# %%
tokenizer = CharTokenizer(load_text())
ids = tokenizer.encode(load_text())
V, T, C, n_layer, n_head = tokenizer.vocab_size, 32, 64, 2, 4
weights = init_weights(V, T, n_layer, C, mx.random.key(0))
config = ModelConfig(n_layer, n_head, C, T, V, bias=False)
print(f"counted: {sum(w.size for _, w in tree_flatten(weights)):,}")
print(f"formula: {V * C + T * C + n_layer * (12 * C**2 + 2 * C) + C:,}")
print(f"library: {count_parameters(config):,}")

# %% [markdown] lang="en"
# ## The first loss
#
# A model that knows nothing gives each of V tokens the probability 1/V. Its loss is -ln(1/V) = ln V, for 65
# characters 4.174. A fresh GPT is not quite that: its logits are not equal, but random. Let logits have mean
# 0 and a small variance σ². The target has nothing to do with them, so the mean of its logit is 0, and the
# loss is that of the denominator: ln Σ e^z. For normal z the mean of e^z is e^(σ²/2), so the sum is about
# V·e^(σ²/2), and
#
# **loss ≈ ln V + σ²/2**
#
# And σ? The last norm gives a vector of length √C; its product with a row of `wte`, with standard deviation
# 0.02, has the variance 0.02²·C, here 0.0256.

# %% [markdown] lang="pt"
# ## A primeira loss
#
# Quem não sabe nada dá a cada um dos V tokens a probabilidade 1/V: a loss é -ln(1/V) = ln V, ou 4,174 para 65
# caracteres. Um GPT recém-criado não é bem isso: os logits não são iguais, e sim aleatórios. Sejam eles de
# média 0 e variância pequena σ². O alvo nada tem a ver com eles; o seu logit é 0 em média, e sobra o
# denominador: ln Σ e^z. Para z normal, a média de e^z é e^(σ²/2); a soma vale cerca de V·e^(σ²/2), e
#
# **loss ≈ ln V + σ²/2**
#
# E o σ? A última norma entrega um vetor de comprimento √C; o produto dele com uma linha de `wte`, de desvio
# padrão 0,02, tem variância 0,02²·C, aqui 0,0256.

# %%
starts = mx.random.randint(0, len(ids) - T, (64, 1), key=mx.random.key(1))
positions = starts + mx.arange(T)
inputs, targets = ids[positions], ids[positions + 1]  # [B, T]
logits = gpt(inputs, weights, n_head)
variance = mx.var(logits, axis=-1).mean().item()
print(f"ln V:          {math.log(V):.3f}")
print(f"ln V + σ²/2:   {math.log(V) + variance / 2:.3f}, measured σ² = {variance:.4f}")
loss = cross_entropy(logits, targets).mean()
expect(loss, 4.18, 0.03)
own_logit = mx.take_along_axis(logits, inputs[..., None], axis=-1).mean()
expect(own_logit, 0.73, 0.05)

# %% [markdown] lang="en"
# The measured variance is a third above 0.0256. The reason is the tied head: the vector of a token still
# contains its own row of `wte`, so the logit of the *input* token is 0.73 on average (the last number above),
# not 0. One of 65 logits that is 0.73 too high adds about 0.73²/65 = 0.008 to the variance.
#
# ## Why `c_proj` starts smaller
#
# Each block adds two random vectors to the stream. Variances add up: after n blocks it is 2n times that of
# one vector, so the standard deviation grows with √(2n). Divided by √(2·n_layer), what all blocks add
# together has the same size, for any depth. On the left: 12 blocks with and without. On the right: the first
# loss if all matrices are scaled to another standard deviation than 0.02, compared with the formula.

# %% [markdown] lang="pt"
# A variância medida fica um terço acima de 0,0256. A causa é a saída ligada ao embedding: o vetor de um token
# ainda contém a sua própria linha de `wte`, e por isso o logit do token de *entrada* é 0,73 em média (o
# último número acima), e não 0. Um logit em 65 que é 0,73 alto demais soma cerca de 0,73²/65 = 0,008 à
# variância.
#
# ## Por que `c_proj` começa menor
#
# Cada bloco soma dois vetores aleatórios ao fluxo. As variâncias se acumulam: depois de n blocos, temos 2n
# vezes a de um vetor, e o desvio padrão cresce com √(2n). Com a divisão por √(2·n_layer), o que todos os
# blocos somam juntos tem o mesmo tamanho em qualquer profundidade. À esquerda: 12 blocos, com e sem ela. À
# direita: a primeira loss quando todas as matrizes têm outro desvio padrão que não 0,02, comparada com a
# fórmula.


# %%
def scale_matrices(weights, factor):
    return tree_map(lambda p: factor * p if p.ndim == 2 else p, weights)


deep = init_weights(V, T, 12, C, mx.random.key(0))
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for label, factor in (("0.02/√24", 1), ("0.02", math.sqrt(24))):
    x = deep["wte"]["weight"][inputs] + deep["wpe"]["weight"]
    stream = [mx.sqrt(mx.square(x).mean()).item()]
    for layer in deep["h"]:
        parts = {name: dict(layer[name]) for name in ("attn", "mlp")}
        for part in parts.values():
            part["c_proj"] = scale_matrices(part["c_proj"], factor)
        x = block(x, layer | parts, n_head)
        stream.append(mx.sqrt(mx.square(x).mean()).item())
    axes[0].plot(stream, marker=".", label=f"c_proj: {label}")
    expect(stream[-1] / stream[0], {1: 1.2, math.sqrt(24): 4.0}[factor], 0.2)
axes[0].set(xlabel="block", ylabel="residual stream, RMS", ylim=(0, None))
axes[0].legend()

deviations = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]
losses, formula = [], []
for deviation in deviations:
    scaled_logits = gpt(inputs, scale_matrices(weights, deviation / 0.02), n_head)
    losses.append(cross_entropy(scaled_logits, targets).mean().item())
    formula.append(math.log(V) + mx.var(scaled_logits, axis=-1).mean().item() / 2)
axes[1].loglog(deviations, losses, marker=".", label="first loss")
axes[1].loglog(deviations, formula, linestyle="--", label="ln V + σ²/2")
axes[1].axhline(math.log(V), color="gray", linewidth=0.7)
axes[1].set(
    xlabel="standard deviation of the weights", ylabel="loss, nats", yticks=[4, 6, 10, 20, 40]
)
axes[1].yaxis.set_major_formatter("{x:g}")
axes[1].yaxis.minorticks_off()
axes[1].legend()
plt.show()
expect(losses[-1], 18.5, 1.5)
expect(formula[-1], 35, 4)

# %% [markdown] lang="en"
# The stream of 12 blocks grows to 1.2 times its first size with the smaller `c_proj`, to 4 times without: the
# blocks would drown the embedding. The first loss sees none of this, since `ln_f` normalizes the stream. On
# the right, the formula is close up to a standard deviation of 0.2; at 0.02 the loss is still ln V to the
# eye.
#
# ## Broken three times
#
# **(a) A standard deviation of 1.** The right end of the plot: 18 nats instead of 4.2. The model is not
# ignorant: it is confident, and wrong. The formula fails there, since σ, about 8, is not small: of 65 values
# e^z, the largest is nearly the whole sum, so the loss is about the largest logit, less that of the target,
# which is 0 on average.

# %% [markdown] lang="pt"
# O fluxo de 12 blocos cresce para 1,2 vez o tamanho inicial com o `c_proj` menor, e para 4 vezes sem ele: os
# blocos afogariam o embedding. A primeira loss não vê nada disso, porque `ln_f` normaliza o fluxo. À direita,
# a fórmula acompanha a loss até um desvio padrão de 0,2; em 0,02, a olho nu, a loss ainda é ln V.
#
# ## Quebrado três vezes
#
# **(a) Desvio padrão 1.** É a ponta direita do gráfico: 18 nats em vez de 4,2. O modelo não é ignorante: tem
# certeza, e erra. Ali a fórmula falha, porque σ, cerca de 8, não é pequeno: entre 65 valores de e^z, o maior
# é quase a soma inteira, e a loss vale mais ou menos o maior logit menos o do alvo, que em média é 0.

# %%
large_logits = gpt(inputs, scale_matrices(weights, 50), n_head)
print(
    f"loss {losses[-1]:.1f}; largest logit {large_logits.max(axis=-1).mean().item():.1f} on average"
)

# %% [markdown] lang="en"
# **(b) Targets not shifted.** The targets are the inputs themselves. The logit of the input token is 0.73
# higher than the others, so the loss is lower by about as much:

# %% [markdown] lang="pt"
# **(b) Alvos sem deslocamento.** Os alvos são as próprias entradas. O logit do token de entrada é 0,73 mais
# alto que os outros, e a loss fica menor mais ou menos nessa medida:

# %%
expect(cross_entropy(logits, inputs).mean(), 3.46, 0.04)

# %% [markdown] lang="en"
# Clearly below ln V, before any training. A model that knows nothing cannot be better than chance: a first
# loss well below ln V means that it sees the answer.
#
# **(c) No mask.** Each token attends to all, the later ones included. Only `attend` changes, in `my_gpt`,
# where `attention` looks it up:

# %% [markdown] lang="pt"
# Bem abaixo de ln V, antes de qualquer treino. Um modelo que não sabe nada não pode ser melhor que o acaso:
# uma primeira loss claramente menor que ln V significa que ele enxerga a resposta.
#
# **(c) Sem máscara.** Cada token dá atenção a todos, inclusive aos posteriores. Só muda `attend`, dentro de
# `my_gpt`, que é onde `attention` a procura:


# %%
def attend_to_all(q, k, v):
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    return mx.softmax(scores, axis=-1) @ v


def largest_leak():
    """Largest change of the logits before token 16, if that token is changed."""
    changed = mx.array(inputs)
    changed[:, 16] = (inputs[:, 16] + 1) % V
    change = gpt(changed, weights, n_head) - gpt(inputs, weights, n_head)
    return mx.abs(change[:, :16]).max().item()


print(f"with the mask: largest change of an earlier logit {largest_leak()}")
my_gpt.attend, masked_attend = attend_to_all, my_gpt.attend
loss_without_mask = cross_entropy(gpt(inputs, weights, n_head), targets).mean()
expect(loss_without_mask - loss, 0.0, 0.005)
expect(largest_leak(), 0.018, 0.008)
my_gpt.attend = masked_attend

# %% [markdown] lang="en"
# The same loss, to a few thousandths. The answer is there to be read, but untrained weights do not know how;
# training would learn it quickly. The first loss cannot see this bug. The causality check can: change one
# token, and no earlier logit may move. With the mask the change is exactly 0.
#
# ## Check
#
# Your GPT and its gradients equal the library's, and the first loss of a new one is ln V.

# %% [markdown] lang="pt"
# A mesma loss, com diferença de poucos milésimos. A resposta está ali para ser lida, mas pesos não treinados
# não sabem como; o treino logo aprenderia. A primeira loss não enxerga esse erro. A verificação de
# causalidade enxerga: mude um token, e nenhum logit anterior pode se mexer. Com a máscara, a mudança é
# exatamente 0.
#
# ## Verificação
#
# O seu GPT e os gradientes dele são iguais aos da biblioteca, e um modelo novo tem loss ln V.

# %%
check(5, globals())

# %% [markdown] lang="en"
# ## In mlxgpt
#
# `GPT` in [`mlxgpt/model/gpt.py`](../../../mlxgpt/model/gpt.py) is `gpt`; its weights come from
# [`mlxgpt/model/init_weights.py`](../../../mlxgpt/model/init_weights.py), which recognizes the smaller
# matrices by their names, with 0 for biases where there are any. Both have options for newer models, such as
# an untied head.
#
# `mlxgpt check`, which also runs before training, is
# [`mlxgpt/training/selfcheck.py`](../../../mlxgpt/training/selfcheck.py). It computes the first loss of the
# full model (in [`full_size_check.py`](../../../mlxgpt/training/full_size_check.py)) on random tokens,
# compares it with ln V plus the two terms of this chapter, and explains it. Its `check_causality` is our
# `largest_leak` on a smaller model, whose weights it first scales up, so that attention contributes more and
# a leak cannot be missed. `check_tied_head`, and `check_overfitting`, which trains on a single batch, find
# other bugs.
#
# ## Exercises
#
# Write the functions to your own `my_gpt.py`, then run `mlxgpt learn check 5`.
#
# 1. What first loss do you expect from GPT-2 small, with V = 50,257 and C = 768?
#
# <details><summary>Answer</summary>
#
# ln 50,257 = 10.825, plus σ²/2 = 0.02² · 768 / 2 = 0.15: about 10.98. The raised logit of the input token
# hardly counts among 50,257.
# </details>
#
# 2. With a separate output head, what would the first loss of (b) be?
#
# <details><summary>Answer</summary>
#
# About ln V: the rows of the head have nothing to do with the embeddings, so the logit of the input token is
# 0 on average. The bug shows later, when the loss falls to nearly 0: copying the input is easy.
# </details>
#
# 3. Why is the first loss of (c) not lower, although every token sees its target?
#
# <details><summary>Answer</summary>
#
# For a lower loss, the logit of the target must be higher than the others. The target is only a small part of
# a mean over 32 tokens, through random matrices that point nowhere in particular: it moves by a hundredth or
# two at most, up or down.
# </details>

# %% [markdown] lang="pt"
# ## No mlxgpt
#
# `GPT`, em [`mlxgpt/model/gpt.py`](../../../mlxgpt/model/gpt.py), é a nossa `gpt`; os pesos vêm de
# [`mlxgpt/model/init_weights.py`](../../../mlxgpt/model/init_weights.py), que reconhece pelo nome as matrizes
# menores e põe 0 nos bias, onde existem. Ambos têm opções para modelos mais novos, como uma saída separada do
# embedding.
#
# O `mlxgpt check`, que também roda antes do treino, está em
# [`mlxgpt/training/selfcheck.py`](../../../mlxgpt/training/selfcheck.py). Ele calcula a primeira loss do
# modelo completo (em [`full_size_check.py`](../../../mlxgpt/training/full_size_check.py)) com tokens
# aleatórios, compara-a com ln V mais os dois termos deste capítulo, e a explica. O seu `check_causality` é o
# nosso `largest_leak` num modelo menor, cujos pesos ele antes aumenta, para que a atenção contribua mais e
# nenhum vazamento escape. `check_tied_head` e `check_overfitting`, que treina com um único batch, encontram
# outros erros.
#
# ## Exercícios
#
# Escreva as funções no seu próprio `my_gpt.py` e rode `mlxgpt learn check 5`.
#
# 1. Que primeira loss você espera do GPT-2 small, com V = 50.257 e C = 768?
#
# <details><summary>Resposta</summary>
#
# ln 50.257 = 10,825, mais σ²/2 = 0,02² · 768 / 2 = 0,15: cerca de 10,98. O logit mais alto do token de
# entrada mal conta entre 50.257.
# </details>
#
# 2. Com uma saída separada do embedding, quanto daria (b) no início?
#
# <details><summary>Resposta</summary>
#
# Cerca de ln V: as linhas da saída não têm relação com os embeddings, e o logit do token de entrada é 0 em
# média. O erro aparece depois, quando a loss cai para quase 0: copiar a entrada é fácil.
# </details>
#
# 3. Por que a primeira loss de (c) não é menor, se cada token enxerga o seu alvo?
#
# <details><summary>Resposta</summary>
#
# Para a loss cair, o logit do alvo precisa ser maior que os outros. Ele entra com uma pequena parcela numa
# média de 32 tokens, através de matrizes aleatórias que não apontam para lugar nenhum: muda no máximo um ou
# dois centésimos, para cima ou para baixo.
# </details>
