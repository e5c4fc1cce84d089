# %% [markdown] lang="en"
# # 4. Heads, MLP, block
#
# **What does a transformer do besides attention?**
#
# One attention head moves information between tokens, with one pattern of weights. A transformer block adds
# what is missing: several heads, a small network that works on each token alone, and two devices that let a
# dozen blocks be trained on top of each other: layer norm and the residual stream.

# %% [markdown] lang="pt"
# # 4. Cabeças, MLP, bloco
#
# **O que um transformer faz além da atenção?**
#
# Uma cabeça de atenção leva informação de um token a outro, com um único padrão de pesos. O bloco do
# transformer acrescenta o que falta: várias cabeças, uma pequena rede que trabalha em cada token isoladamente
# e dois recursos que permitem treinar uma dúzia de blocos empilhados: a normalização de camada (*layer norm*)
# e o fluxo residual (*residual stream*).

# %%
import math

import matplotlib.pyplot as plt
import mlx.core as mx
import mlx.nn as nn
from course import CharTokenizer, check, expect, load_text
from mlx.utils import tree_flatten, tree_map
from my_gpt import attend

from mlxgpt.config import ModelConfig
from mlxgpt.model.gpt import GPT

# %% [markdown] lang="en"
# ## Each token alone
#
# Three small functions work on every vector separately. A *linear layer* is a matrix product; its weight has
# shape [outputs, inputs], so the product needs the transpose. A bias is not needed: nanoGPT found a model
# without biases slightly better and faster, and this course has none.
#
# *Layer norm* (Ba et al., 2016) subtracts a vector's mean and divides by its standard deviation: whatever the
# scale of the input, the next layer sees values around ±1. The 1e-5 avoids a division by zero, and the weight
# allows training to scale each dimension again.

# %% [markdown] lang="pt"
# ## Cada token por si
#
# Três funções pequenas trabalham em cada vetor separadamente. A *camada linear* (*linear layer*) é um produto
# de matrizes; o peso tem forma [saídas, entradas], e por isso o produto usa a transposta. O viés (*bias*) é
# dispensável: segundo o nanoGPT, o modelo fica até um pouco melhor e mais rápido sem ele; aqui não há nenhum.
#
# A *layer norm* (Ba et al., 2016) subtrai a média do vetor e divide pelo desvio padrão: qualquer que seja a
# escala da entrada, a camada seguinte recebe valores em torno de ±1. O 1e-5 evita a divisão por zero, e o
# peso permite que o treino volte a ajustar a escala de cada dimensão.


# %% tags=["my_gpt"]
def linear(x, weights):
    """Linear layer without bias: x [..., I] -> [..., O]."""
    return x @ weights["weight"].T


def layer_norm(x, weights):
    """Each vector with mean 0 and variance 1, times a weight: [..., C] -> [..., C]."""
    x = x - x.mean(axis=-1, keepdims=True)
    return x * mx.rsqrt(mx.square(x).mean(axis=-1, keepdims=True) + 1e-5) * weights["weight"]


# %%
x = mx.array([1.0, 2.0, 3.0, 6.0])
ones = {"weight": mx.ones(4)}
print("layer norm of x:      ", layer_norm(x, ones))
print("layer norm of 100·x+7:", layer_norm(100 * x + 7, ones))

# %% [markdown] lang="en"
# Between two linear layers there must be something that is not linear, or both together are one matrix. GPT-2
# uses *GELU* (Hendrycks & Gimpel, 2016): x · P(Z ≤ x) for a standard normal Z, a smooth ReLU. GPT-2's formula
# approximates that probability with a tanh:
#
# gelu(x) = ½ · x · (1 + tanh z), with z = √(2/π) · (x + 0.044715 · x³)
#
# Since tanh z = 2 σ(2z) - 1, with σ the sigmoid, ½ · (1 + tanh z) = σ(2z): the whole is x · σ(2z), which is
# shorter.

# %% [markdown] lang="pt"
# Entre duas camadas lineares é preciso haver algo não linear; senão, as duas juntas equivalem a uma matriz
# só. O GPT-2 usa a *GELU* (Hendrycks & Gimpel, 2016): x · P(Z ≤ x), com Z normal padrão, uma ReLU suave. A
# fórmula do GPT-2 aproxima essa probabilidade com uma tanh:
#
# gelu(x) = ½ · x · (1 + tanh z), com z = √(2/π) · (x + 0,044715 · x³)
#
# Como tanh z = 2 σ(2z) - 1, sendo σ a sigmoide, ½ · (1 + tanh z) = σ(2z), e tudo se reduz a x · σ(2z), que é
# mais curto.


# %% tags=["my_gpt"]
def gelu(x):
    """GELU in GPT-2's form; any shape."""
    return x * mx.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


# %%
x = mx.linspace(-6, 6, 1001)
z = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
tanh_form = 0.5 * x * (1 + mx.tanh(z))
print(f"largest difference from the tanh form: {mx.abs(gelu(x) - tanh_form).max().item():.1e}")
print(f"from the exact x · P(Z ≤ x):           {mx.abs(gelu(x) - nn.gelu(x)).max().item():.1e}")

# %% [markdown] lang="en"
# ## Several heads, one matrix product
#
# A softmax gives one set of weights: a head that looks at the previous token cannot also look at the start of
# the word. So the C dimensions are divided among H heads with D = C/H each, and each head has its own
# weights. The matrices are as large as those of one head with C dimensions.
#
# GPT-2 computes queries, keys and values in one product: `c_attn` has shape [3C, C], the three matrices on
# top of each other. The result is split into three, and each part into heads. The order of the two steps in
# `split_heads` matters: first divide the C dimensions of each token, then swap heads and tokens.

# %% [markdown] lang="pt"
# ## Várias cabeças, um só produto de matrizes
#
# Uma softmax produz um único conjunto de pesos: a cabeça que olha para o token anterior não pode olhar também
# para o começo da palavra. Por isso as C dimensões são repartidas entre H cabeças, com D = C/H cada uma, e
# cada cabeça tem os seus próprios pesos. As matrizes têm o mesmo tamanho que as de uma cabeça de C dimensões.
#
# O GPT-2 calcula queries, keys e values num produto só: `c_attn` tem forma [3C, C], as três matrizes
# empilhadas. O resultado é dividido em três, e cada parte, em cabeças. A ordem dos dois passos de
# `split_heads` importa: primeiro se dividem as C dimensões de cada token, depois se trocam os eixos de
# cabeças e tokens.


# %% tags=["my_gpt"]
def split_heads(x, n_head):
    """[B, T, C] -> [B, H, T, C / H]"""
    B, T, C = x.shape
    return x.reshape(B, T, n_head, C // n_head).swapaxes(1, 2)


def merge_heads(x):
    """[B, H, T, D] -> [B, T, H * D]"""
    return x.swapaxes(1, 2).flatten(2)


# %%
x = mx.arange(6).reshape(1, 2, 3)  # [B, T, C]
print("tokens:", x[0].tolist(), "-> heads:", split_heads(x, 3)[0].tolist())
print("merged again:", merge_heads(split_heads(x, 3))[0].tolist())

# %% [markdown] lang="en"
# `c_proj`, the last matrix of attention, mixes the results of the heads. The *MLP* is a linear layer from C
# to 4C, GELU, and a linear layer back.

# %% [markdown] lang="pt"
# `c_proj`, a última matriz da atenção, mistura os resultados das cabeças. O *MLP* é uma camada linear de C
# para 4C, a GELU e uma camada linear de volta.


# %% tags=["my_gpt"]
def attention(x, weights, n_head):
    """Multi-head attention: [B, T, C] -> [B, T, C]."""
    q, k, v = mx.split(linear(x, weights["c_attn"]), 3, axis=-1)
    y = attend(split_heads(q, n_head), split_heads(k, n_head), split_heads(v, n_head))
    return linear(merge_heads(y), weights["c_proj"])


def mlp(x, weights):
    """[..., C] -> [..., C]"""
    return linear(gelu(linear(x, weights["c_fc"])), weights["c_proj"])


# %% [markdown] lang="en"
# ## The block
#
# A block does not replace the vector of a token: it *adds* to it. That sum is the *residual stream*.
# Attention and MLP each read it through a layer norm, and add their result. (`drop` does nothing until
# chapter 7.)

# %% [markdown] lang="pt"
# ## O bloco
#
# O bloco não substitui o vetor de um token: ele *soma* algo a esse vetor. Essa soma é o *residual stream*. A
# atenção e o MLP o leem, cada um através de uma layer norm, e somam o seu resultado. (`drop` não faz nada até
# o capítulo 7.)


# %% tags=["my_gpt"]
def block(x, weights, n_head, drop=lambda x: x):
    """Transformer block: [B, T, C] -> [B, T, C]; `drop` is for chapter 7."""
    x = x + drop(attention(layer_norm(x, weights["ln_1"]), weights["attn"], n_head))
    return x + drop(mlp(layer_norm(x, weights["ln_2"]), weights["mlp"]))


# %% [markdown] lang="en"
# The weights have GPT-2's names, as in the library's model. So a block of it can be called with our
# functions:

# %% [markdown] lang="pt"
# Os pesos têm os nomes do GPT-2, como no modelo da biblioteca. Por isso podemos passar um bloco dela às
# nossas funções:

# %%
tokenizer = CharTokenizer(load_text())
T, C, n_head = 32, 64, 4
config = ModelConfig(
    n_layer=12,
    n_head=n_head,
    n_embd=C,
    block_size=T,
    vocab_size=tokenizer.vocab_size,
    dropout=0.0,
    bias=False,
)
model = GPT(config)
layers = model.parameters()["h"]
ids = tokenizer.encode(load_text()[: 4 * T]).reshape(4, T)
x = layer_norm(model.wte(ids) + model.wpe.weight, {"weight": mx.ones(C)})  # [B, T, C]
difference = mx.abs(block(x, layers[0], n_head) - model.h[0](x)).max().item()
print(f"largest difference from the library's block: {difference:.1e}")
for name, weight in tree_flatten(layers[0]):
    print(f"{name:20} {weight.shape!s:10} {weight.size:>6,}")

# %% [markdown] lang="en"
# `c_attn` has 3·C², the two `c_proj` C² and 4·C², `c_fc` 4·C²: together 12·C², two thirds of them in the MLP.
# The norms add only 2·C. GPT-2 small has 12 blocks with C = 768: 12 · 12 · 768² = 84.9M of its 124M
# parameters; most of the others are the token embedding.

# %% [markdown] lang="pt"
# `c_attn` tem 3·C², os dois `c_proj`, C² e 4·C², e `c_fc`, 4·C²: ao todo 12·C², dois terços deles no MLP. As
# normas só acrescentam 2·C. O GPT-2 small tem 12 blocos com C = 768: 12 · 12 · 768² = 84,9 milhões dos seus
# 124 milhões de parâmetros; a maior parte do resto é o embedding dos tokens.

# %%
count = sum(weight.size for _, weight in tree_flatten(layers[0]))
print(f"{count:,} parameters in a block; 12·C² + 2·C = {12 * C**2 + 2 * C:,}")
print(f"GPT-2 small: {12 * 12 * 768**2 / 1e6:.1f}M in the matrices of its blocks")

# %% [markdown] lang="en"
# ## Why the sum and the norm
#
# With y = x + f(x), the gradient of y with respect to x is 1 + f′(x). However small f′ is, the 1 carries the
# gradient down to the first block. Without the sum, twelve blocks multiply twelve small (or large) factors.
#
# The experiment: 12 blocks, with and without the sum, with and without the norm. To get the gradient before
# each block, a zero is added there. On the left the weights are GPT-2's initial ones, on the right all
# matrices have a standard deviation of 1/√C = 0.125, larger weights, as training may make them.

# %% [markdown] lang="pt"
# ## Por que a soma e a norma
#
# Com y = x + f(x), a derivada de y em relação a x é 1 + f′(x). Por menor que seja f′, o 1 leva o gradiente
# até o primeiro bloco. Sem a soma, doze blocos multiplicam doze fatores pequenos (ou grandes).
#
# O experimento: 12 blocos, com e sem a soma, com e sem a norma. Para obter o gradiente antes de cada bloco,
# somamos ali um zero. À esquerda, os pesos são os iniciais do GPT-2; à direita, todas as matrizes têm desvio
# padrão 1/√C = 0,125, pesos maiores, como o treino pode deixá-los.


# %%
def run_stack(taps, layers, residual, norm):
    y = x
    for tap, weights in zip(taps, layers, strict=True):
        y = y + tap
        read = layer_norm(y, weights["ln_1"]) if norm else y
        y = attention(read, weights["attn"], n_head) + (y if residual else 0)
        read = layer_norm(y, weights["ln_2"]) if norm else y
        y = mlp(read, weights["mlp"]) + (y if residual else 0)
    return y


direction = mx.random.normal(x.shape, key=mx.random.key(1))  # the gradient after the last block
gradient_function = mx.grad(lambda *args: (run_stack(*args) * direction).sum())
large = tree_map(lambda p: p * (0.125 / mx.std(p)) if p.ndim == 2 else p, layers)
taps = [mx.zeros_like(x)] * len(layers)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
first_gradient, cosine = {}, {}
for axis, title, weights in ((axes[0], "initial", layers), (axes[1], "large", large)):
    for residual, norm in ((True, True), (True, False), (False, True), (False, False)):
        gradients = gradient_function(taps, weights, residual, norm)
        sizes = [mx.sqrt(mx.square(g).mean()).item() for g in gradients]
        first_gradient[title, residual, norm] = sizes[0]
        label = f"{'sum' if residual else 'no sum'}, {'norm' if norm else 'no norm'}"
        style = {"color": "C0" if residual else "C1", "linestyle": "-" if norm else "--"}
        axis.semilogy(range(1, 13), [max(size, 1e-12) for size in sizes], label=label, **style)
        y = run_stack(taps, weights, residual, norm)[:, 16:]  # the second half of the tokens
        y = y / mx.maximum(mx.linalg.norm(y, axis=-1, keepdims=True), 1e-30)
        cosine[title, residual, norm] = mx.mean(y @ y.swapaxes(1, 2)).item()
    axis.set(xlabel="block", title=f"{title} weights")
axes[0].set_ylabel("gradient before the block, RMS")
axes[0].legend(fontsize="small")
plt.show()

# %%
expect(math.log10(first_gradient["initial", False, True]), -2.3, 0.4)
expect(math.log10(first_gradient["large", True, False]), 7.0, 0.7)
expect(first_gradient["large", True, True], 6.0, 0.7)
expect(cosine["initial", False, True], 1.0, 0.001)
expect(cosine["large", False, True], 1.0, 0.001)
expect(cosine["initial", True, True], 0.1, 0.02)
expect(cosine["large", True, True], 0.55, 0.2)

# %% [markdown] lang="en"
# Without sum and norm, initial weights give no gradient at all: the curve ends at the lower edge of the plot
# (values below 1e-12 are drawn there), and before the first block the gradient is rounded to 0 in float32.
# With the sum, it stays at 1, with or without norm (the two lines cover each other). But with large weights,
# the sum without norm grows from block to block, and the gradient before the first block is millions of times
# what it was at the end: each block reads a larger stream, and adds still more. With both, the gradient stays
# between 1 and 7.
#
# The norm alone seems to do well, too: except before the first block, its line stays above 0.3. The
# gradient's size is not all, though. The last figures are the mean cosine between the vectors of two tokens
# (the later 16 of each text) after 12 blocks. Without the sum it is 1.000: all tokens have become one and the
# same vector, since each attention is a mean over tokens, and nothing keeps what was there before. Dong et
# al. (2021) prove that attention alone does this. With the sum, tokens stay different.

# %% [markdown] lang="pt"
# Sem soma e sem norma, os pesos iniciais não deixam gradiente algum: a curva termina na borda inferior do
# gráfico (onde desenhamos os valores abaixo de 1e-12) e, antes do primeiro bloco, o gradiente é arredondado
# para 0 em float32. Com a soma, ele fica em 1, com ou sem norma (as duas linhas se cobrem). Com pesos
# grandes, porém, a soma sem a norma cresce de bloco em bloco, e o gradiente chega a milhões de vezes o do
# final: cada bloco lê um fluxo maior e soma mais ainda. Com as duas, o gradiente fica entre 1 e 7.
#
# A norma sozinha também parece dar conta: a não ser antes do primeiro bloco, a sua linha fica acima de 0,3.
# Mas o tamanho do gradiente não é tudo. Os últimos números são o cosseno médio entre os vetores de dois
# tokens (os 16 finais de cada texto) depois de 12 blocos. Sem a soma, ele é 1,000: todos os tokens viraram um
# único vetor, porque cada atenção é uma média sobre tokens, e nada guarda o que havia antes. Dong et al.
# (2021) provam que a atenção sozinha faz isso. Com a soma, os tokens continuam diferentes.

# %% [markdown] lang="en"
# ## Check
#
# Layer norm, GELU and the whole block equal the library's within 1e-6.

# %% [markdown] lang="pt"
# ## Verificação
#
# A layer norm, a GELU e o bloco inteiro são iguais aos da biblioteca, com diferença de até 1e-6.

# %%
check(4, globals())

# %% [markdown] lang="en"
# ## In mlxgpt
#
# `CausalSelfAttention`, `MLP` and `Block` in [`mlxgpt/model/gpt.py`](../../../mlxgpt/model/gpt.py) are the
# same functions as MLX modules. The heads are split in one `reshape` to [B, T, 3, H, D] and one `transpose`.
# `Block` also passes on the KV cache of chapter 9, and a random key for dropout. Options in the config
# replace parts: biases (which GPT-2 has), RMSNorm, SwiGLU, rotary positions. The operations are in
# [`mlxgpt/backend/ops.py`](../../../mlxgpt/backend/ops.py): on a GPU, MLX's own kernels, such as
# `mx.fast.layer_norm`; on a CPU, kernels of the project, since some of MLX's operations, such as tanh, are
# slow there.
#
# ## Exercises
#
# Write the functions to your own `my_gpt.py`, then run `mlxgpt learn check 4`.
#
# 1. Someone writes `x.reshape(B, n_head, T, C // n_head)` and saves the `swapaxes`. The shape is right. What
#    is wrong?
#
# <details><summary>Answer</summary>
#
# It cuts the memory in another order: a row of a head then has parts of other tokens. With the example above
# (T = 2, C = 3), head 0 would get 0 and 1, both from the first token, instead of 0 and 3. The causal mask
# then masks the wrong things, and tokens see later ones: there is no error message, but the check of the
# block fails.
# </details>
#
# 2. How do the parameters of a block change with twice as many heads?
#
# <details><summary>Answer</summary>
#
# Not at all: the heads share the same C dimensions, and each gets half as many.
# </details>
#
# 3. The original transformer (Vaswani et al., 2017) normalizes after the sum: norm(x + f(x)). Which advantage
#    of the residual stream is lost?
#
# <details><summary>Answer</summary>
#
# The unchanged path: there, the norms are on the path from the first block to the last, and rescale what
# passes, in both directions. GPT-2 moved the norm to the input of each part, so that only sums remain on the
# path. Training is then less sensitive to learning rate and warmup (Xiong et al., 2020).
# </details>

# %% [markdown] lang="pt"
# ## No mlxgpt
#
# `CausalSelfAttention`, `MLP` e `Block`, em [`mlxgpt/model/gpt.py`](../../../mlxgpt/model/gpt.py), são as
# mesmas funções, como módulos do MLX. As cabeças se dividem com um só `reshape` para [B, T, 3, H, D] e um
# `transpose`. `Block` também leva adiante o KV cache do capítulo 9 e uma chave aleatória para o dropout.
# Opções da configuração trocam partes: bias (que o GPT-2 tem), RMSNorm, SwiGLU, posições rotativas. As
# operações ficam em [`mlxgpt/backend/ops.py`](../../../mlxgpt/backend/ops.py): na GPU, os kernels do próprio
# MLX, como `mx.fast.layer_norm`; na CPU, kernels do projeto, porque algumas operações do MLX são lentas ali,
# como a tanh.
#
# ## Exercícios
#
# Escreva as funções no seu próprio `my_gpt.py` e rode `mlxgpt learn check 4`.
#
# 1. Alguém escreve `x.reshape(B, n_head, T, C // n_head)` e economiza o `swapaxes`. A forma está certa. O que
#    está errado?
#
# <details><summary>Resposta</summary>
#
# A memória é cortada em outra ordem: uma linha de uma cabeça recebe pedaços de outros tokens. No exemplo
# acima (T = 2, C = 3), a cabeça 0 receberia 0 e 1, ambos do primeiro token, em vez de 0 e 3. A máscara causal
# passa a esconder as coisas erradas, e alguns tokens enxergam os posteriores: nenhuma mensagem de erro
# aparece, mas a verificação do bloco falha.
# </details>
#
# 2. O que acontece com os parâmetros de um bloco se o número de cabeças dobrar?
#
# <details><summary>Resposta</summary>
#
# Nada: as cabeças repartem as mesmas C dimensões, e cada uma fica com a metade.
# </details>
#
# 3. O transformer original (Vaswani et al., 2017) normaliza depois da soma: norm(x + f(x)). Que vantagem do
#    residual stream se perde?
#
# <details><summary>Resposta</summary>
#
# O caminho livre: todas as normas ficam entre o primeiro e o último bloco e mudam a escala do que passa, nos
# dois sentidos. O GPT-2 levou a norma para a entrada de cada parte, e no caminho só restam somas. O treino
# fica menos sensível à taxa de aprendizado e ao warmup (Xiong et al., 2020).
# </details>
