# %% [markdown] lang="en"
# # 6. AdamW by hand
#
# **Why not plain gradient descent?**
#
# Chapter 2 subtracted a multiple of the gradient from the weights. For a GPT this works badly: one learning
# rate must do for the embedding of a rare letter and for the weight of a norm, whose gradients differ by
# orders of magnitude. AdamW gives each weight a step size of its own. It takes six lines.

# %% [markdown] lang="pt"
# # 6. AdamW à mão
#
# **Por que não a descida de gradiente simples?**
#
# O capítulo 2 subtraía dos pesos um múltiplo do gradiente. Num GPT isso funciona mal: uma única taxa de
# aprendizado (*learning rate*) precisa servir para o embedding de uma letra rara e para o peso de uma norma,
# cujos gradientes diferem em ordens de grandeza. O AdamW dá a cada peso o seu próprio tamanho de passo. São
# seis linhas.

# %%
import matplotlib.pyplot as plt
import mlx.core as mx
import mlx.optimizers as optim
from course import CharTokenizer, check, expect, load_text
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from my_gpt import cross_entropy, gpt, init_weights

# %% [markdown] lang="en"
# ## AdamW
#
# Adam (Kingma & Ba, 2015) keeps two running means per weight, its *moments*: m of the gradient, v of its
# square. A weight moves by m/√v times the learning rate: the gradient, divided by its own usual size.
#
# - **Bias correction.** Both moments start at 0, so they are too small at first: after t steps with the same
#   gradient g, m = (1 - β₁ᵗ)·g and v = (1 - β₂ᵗ)·g². Divided by these factors, they are right from the first
#   step, and that step is g/√g² = ±1 times the learning rate.
# - **eps**, here 1e-8, avoids 0/0 where the gradient is 0.
# - **Weight decay** pulls each weight towards 0, by the fraction learning rate × decay. It is *decoupled*
#   (Loshchilov & Hutter, 2019): not part of the gradient. That is the W in AdamW.

# %% [markdown] lang="pt"
# ## O AdamW
#
# O Adam (Kingma & Ba, 2015) mantém duas médias móveis por peso, os *momentos* (*moments*): m, do gradiente, e
# v, do quadrado dele. O peso anda m/√v vezes a taxa de aprendizado: o gradiente dividido pelo seu próprio
# tamanho habitual.
#
# - **Correção de viés** (*bias correction*). Os dois momentos começam em 0 e, por isso, são pequenos demais
#   no início: depois de t passos com o mesmo gradiente g, m = (1 - β₁ᵗ)·g e v = (1 - β₂ᵗ)·g². Divididos por
#   esses fatores, ficam certos desde o primeiro passo, que vale g/√g² = ±1 vezes a taxa de aprendizado.
# - **eps**, aqui 1e-8, evita 0/0 onde o gradiente é 0.
# - **Weight decay** puxa cada peso em direção a 0, na fração taxa de aprendizado × decay. Ele é *desacoplado*
#   (*decoupled*; Loshchilov & Hutter, 2019): não faz parte do gradiente. É esse o W de AdamW.


# %% tags=["my_gpt"]
def adamw(weight, gradient, moments, step, learning_rate, weight_decay=0.1, beta1=0.9, beta2=0.99):
    """One step of AdamW, `step` counted from 1. Returns the new weight and the new moments."""
    m = beta1 * moments[0] + (1 - beta1) * gradient
    v = beta2 * moments[1] + (1 - beta2) * mx.square(gradient)
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    weight = weight - learning_rate * weight_decay * weight
    return weight - learning_rate * m_hat / (mx.sqrt(v_hat) + 1e-8), (m, v)


# %%
tokenizer = CharTokenizer(load_text())
ids = tokenizer.encode(load_text())
zero = mx.zeros(4)
gradient = mx.array([1.0, -1e-4, 1e-8, 1e-12])
new_weight, _ = adamw(zero, gradient, (zero, zero), 1, 0.01, weight_decay=0.0)
print("gradients: ", gradient)
print("first step:", new_weight)

# %% [markdown] lang="en"
# From 1 to 1e-4 the size of the gradient does not matter; at the size of eps the step shrinks.
#
# ## The valley
#
# A loss of two weights: (x² + 100·y²)/2, steep in y, flat in x. Gradient descent multiplies x by 1 - lr and y
# by 1 - 100·lr in each step. Above lr = 0.02 y grows without end; so x shrinks by less than 2% per step.
# Momentum adds up the steps: back and forth in y cancels, the way along x accumulates. Adam divides each
# direction by its own size.

# %% [markdown] lang="pt"
# De 1 a 1e-4, o tamanho do gradiente não importa; quando chega perto do eps, o passo encolhe.
#
# ## O vale
#
# Uma loss de dois pesos: (x² + 100·y²)/2, íngreme em y, quase plana em x. A cada passo, a descida de
# gradiente multiplica x por 1 - lr e y por 1 - 100·lr. Acima de lr = 0,02, y cresce sem fim; logo, x encolhe
# menos de 2% por passo. O *momentum* acumula os passos: o vaivém em y se cancela, o avanço em x se soma. O
# Adam divide cada direção pelo seu próprio tamanho.

# %%
scales = mx.array([1.0, 100.0])


def valley_loss(w):
    return (scales * mx.square(w)).sum(axis=-1) / 2


paths = {}
for method in ("gradient descent", "momentum", "Adam"):
    w, velocity, moments = mx.array([-2.0, 0.3]), mx.zeros(2), (mx.zeros(2), mx.zeros(2))
    path = [w]
    for step in range(1, 61):
        gradient = scales * w
        if method == "gradient descent":
            w = w - 0.019 * gradient
        elif method == "momentum":
            velocity = 0.9 * velocity + gradient
            w = w - 0.01 * velocity
        else:
            w, moments = adamw(w, gradient, moments, step, 0.1, weight_decay=0.0)
        path.append(w)
    paths[method] = mx.stack(path)

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
x, y = mx.linspace(-2.3, 0.9, 80), mx.linspace(-0.4, 0.4, 80)
grid = mx.stack(mx.meshgrid(x, y, indexing="xy"), axis=-1)
axes[0].contour(x, y, valley_loss(grid), levels=[0.05, 0.2, 0.5, 1, 2, 4, 8], colors="lightgray")
for method, path in paths.items():
    axes[0].plot(path[:, 0], path[:, 1], marker=".", linewidth=0.8, markersize=3, label=method)
    axes[1].semilogy(valley_loss(path), label=method)
axes[0].set(xlabel="x", ylabel="y")
axes[1].set(xlabel="step", ylabel="loss")
axes[1].legend()
plt.show()
for path, final_loss in zip(paths.values(), (0.2, 0.004, 0.007), strict=True):
    expect(valley_loss(path[-1]), final_loss, 0.001)

# %% [markdown] lang="en"
# Gradient descent (blue) jumps from side to side and is still far from the minimum after 60 steps, at a loss
# of 0.2. Momentum overshoots, but gets down to 0.004. Adam gets to 0.007; it sets out diagonally, since at
# first both coordinates move by the learning rate, however steep they are.
#
# ## Without bias correction
#
# With a constant gradient, the step without the correction is (1 - β₁ᵗ)/√(1 - β₂ᵗ) times the learning rate,
# with it always 1. For β₂ = 0.999 the first step is 0.1/√0.001 = 3.2 times too large. With our β₂ = 0.99 it
# is 0.1/√0.01 = 1, as if nothing were wrong, but later steps are up to 2.1 times as large as they should be:

# %% [markdown] lang="pt"
# A descida de gradiente (azul) pula de um lado para o outro e, depois de 60 passos, ainda está longe do
# mínimo, com loss 0,2. O momentum passa do ponto, mas chega a 0,004. O Adam chega a 0,007; ele parte em
# diagonal, porque no início as duas coordenadas andam uma taxa de aprendizado, por mais íngremes que sejam.
#
# ## Sem a correção de viés
#
# Com gradiente constante, o passo sem a correção vale (1 - β₁ᵗ)/√(1 - β₂ᵗ) vezes a taxa de aprendizado; com
# ela, vale sempre 1. Com β₂ = 0,999, o primeiro passo é 0,1/√0,001 = 3,2 vezes maior do que deveria. Com o
# nosso β₂ = 0,99, é 0,1/√0,01 = 1, como se nada houvesse de errado, mas os passos seguintes chegam a 2,1
# vezes o que deveriam ser:

# %%
for beta2 in (0.95, 0.99, 0.999):
    steps = (1, 2, 5, 10, 20, 100)
    factors = [(1 - 0.9**t) / (1 - beta2**t) ** 0.5 for t in steps]
    print(f"β₂ = {beta2}:", *(f"step {t}: {f:.2f}" for t, f in zip(steps, factors, strict=True)))

# %% [markdown] lang="en"
# ## Decoupled weight decay
#
# The older way, L2, adds decay × weight to the gradient. In Adam that is then divided by √v: weights with
# large gradients hardly decay, others far too much. Two groups of weights, all 1 at first, with gradients
# that are only noise, of size 10 in one and 0.01 in the other. After 300 steps with learning rate 0.01 and
# decay 0.1, all should be at (1 - 0.001)³⁰⁰ = 0.74:

# %% [markdown] lang="pt"
# ## Weight decay desacoplado
#
# A forma antiga, L2, soma decay × peso ao gradiente. No Adam, isso é depois dividido por √v: pesos de
# gradiente grande quase não decaem, os outros decaem demais. Dois grupos de pesos, todos 1 no início, com
# gradientes que são puro ruído, de tamanho 10 num grupo e 0,01 no outro. Depois de 300 passos com taxa de
# aprendizado 0,01 e decay 0,1, todos deveriam estar em (1 - 0,001)³⁰⁰ = 0,74:

# %%
noise_size = mx.array([[10.0], [0.01]])
decoupled = l2 = mx.ones((2, 2000))
decoupled_moments = l2_moments = (mx.zeros((2, 2000)), mx.zeros((2, 2000)))
for step in range(1, 301):
    noise = noise_size * mx.random.normal((2, 2000), key=mx.random.key(step))
    decoupled, decoupled_moments = adamw(decoupled, noise, decoupled_moments, step, 0.01)
    l2, l2_moments = adamw(l2, noise + 0.1 * l2, l2_moments, step, 0.01, weight_decay=0.0)
    mx.eval(decoupled, l2)
for name, weight, expected in (("decoupled", decoupled, (0.74, 0.74)), ("L2", l2, (0.97, 0.0))):
    print(f"{name}:")
    for value, target in zip(weight.mean(axis=1), expected, strict=True):
        expect(value, target, 0.02)

# %% [markdown] lang="en"
# ## Compared with MLX's
#
# Ten steps with the same gradients, from weights as small as a GPT's. MLX's AdamW leaves out the bias
# correction unless asked for it. (Equal here means equal except for rounding: with weights around 1, whose
# float32 steps are larger, single weights differ by 1.2e-6 after these ten steps.)

# %% [markdown] lang="pt"
# ## Comparado com o AdamW do MLX
#
# Dez passos com os mesmos gradientes, a partir de pesos pequenos como os de um GPT. O AdamW do MLX só faz a
# correção de viés se for pedida. (Igual, aqui, quer dizer igual a menos de arredondamento: com pesos em torno
# de 1, cujos passos em float32 são maiores, alguns pesos diferem em 1,2e-6 depois desses dez passos.)

# %%
for bias_correction in (True, False):
    optimizer = optim.AdamW(
        0.01, betas=[0.9, 0.99], weight_decay=0.1, bias_correction=bias_correction
    )
    weight = 0.02 * mx.random.normal((50, 40), key=mx.random.key(0))
    mlx_weights = {"w": weight}
    moments = (mx.zeros_like(weight), mx.zeros_like(weight))
    for step in range(1, 11):
        gradient = mx.random.normal(weight.shape, key=mx.random.key(step))
        weight, moments = adamw(weight, gradient, moments, step, 0.01)
        mlx_weights = optimizer.apply_gradients({"w": gradient}, mlx_weights)
    difference = mx.abs(weight - mlx_weights["w"]).max().item()
    print(f"bias_correction={bias_correction}: largest difference {difference:.1e}")

# %% [markdown] lang="en"
# ## All weights of a GPT
#
# The moments are stored under the names of the weights. As in nanoGPT, only matrices and embeddings decay:
# the weight of a norm starts at 1, and pulling it to 0 would only weaken its layer.

# %% [markdown] lang="pt"
# ## Todos os pesos de um GPT
#
# Os momentos são guardados pelos nomes dos pesos. Como no nanoGPT, só matrizes e embeddings decaem: o peso de
# uma norma começa em 1, e puxá-lo para 0 só enfraqueceria a sua camada.


# %% tags=["my_gpt"]
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


# %% [markdown] lang="en"
# A GPT of one block with 32 dimensions, 250 steps: plain gradient descent (on random batches: *stochastic*,
# SGD) with learning rate 0.3, the best of 0.1, 0.3 and 1, against AdamW with 0.01, the best of 0.003, 0.01
# and 0.03. Same initial weights, same batches.

# %% [markdown] lang="pt"
# Um GPT de um bloco com 32 dimensões, 250 passos: a descida de gradiente simples (em batches sorteados:
# *estocástica*, SGD) com taxa de aprendizado 0,3, a melhor entre 0,1, 0,3 e 1, contra o AdamW com 0,01, a
# melhor entre 0,003, 0,01 e 0,03. Os mesmos pesos iniciais, os mesmos batches.


# %%
T, n_head = 32, 4


def gpt_loss(weights, inputs, targets):
    return cross_entropy(gpt(inputs, weights, n_head), targets).mean()


loss_and_gradients = mx.value_and_grad(gpt_loss)


def sgd_step(weights, state, step, inputs, targets):
    loss, gradients = loss_and_gradients(weights, inputs, targets)
    return loss, tree_map(lambda w, g: w - 0.3 * g, weights, gradients), state


def adamw_step(weights, state, step, inputs, targets):
    loss, gradients = loss_and_gradients(weights, inputs, targets)
    return loss, *update_weights(weights, gradients, state, step, 0.01)


curves = {}
for name, train_step in (("SGD", sgd_step), ("AdamW", adamw_step)):
    train_step = mx.compile(train_step)
    weights = init_weights(tokenizer.vocab_size, T, 1, 32, mx.random.key(0))
    state, losses = init_state(weights), []
    for step in range(1, 251):
        starts = mx.random.randint(0, len(ids) - T, (16, 1), key=mx.random.key(step))
        positions = starts + mx.arange(T)
        batch = ids[positions], ids[positions + 1]
        loss, weights, state = train_step(weights, state, mx.array(step), *batch)
        mx.eval(loss, weights, state)
        losses.append(loss.item())
    curves[name] = losses
figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
for name, losses in curves.items():
    axis.plot(losses, linewidth=0.8, label=name)
axis.set(xlabel="step", ylabel="loss, nats per character")
axis.legend()
plt.show()
expect(sum(curves["SGD"][-50:]) / 50, 2.65, 0.04)
expect(sum(curves["AdamW"][-50:]) / 50, 2.54, 0.07)

# %% [markdown] lang="en"
# For about 40 steps both are alike. Then AdamW pulls away, and ends about 0.1 lower: over the last 50 steps
# 2.51 against 2.66 here, and 2.58 against 2.64 on average over two other seeds. In so small a model that is
# not much. What the plot does not show: SGD with learning rate 1 has spikes far above 4.17. AdamW's rate must
# be chosen, too (0.03 ends at 2.66, no better than SGD), but the size of its steps does not depend on the
# size of the gradients.
#
# ## Check
#
# Ten steps equal MLX's, and norms do not decay.

# %% [markdown] lang="pt"
# Por uns 40 passos, os dois andam juntos. Depois o AdamW se destaca e termina cerca de 0,1 abaixo: nos
# últimos 50 passos, 2,51 contra 2,66 aqui, e 2,58 contra 2,64 na média de duas outras seeds. Num modelo tão
# pequeno, não é muito. O que o gráfico não mostra: com taxa de aprendizado 1, o SGD tem picos bem acima de
# 4,17. A taxa do AdamW também precisa ser escolhida (com 0,03 ele termina em 2,66, não melhor que o SGD), mas
# o tamanho dos seus passos não depende do tamanho dos gradientes.
#
# ## Verificação
#
# Dez passos são iguais aos do MLX, e as normas não decaem.

# %%
check(6, globals())

# %% [markdown] lang="en"
# ## In mlxgpt
#
# `OptimizerGroups` in [`mlxgpt/training/optimizer.py`](../../../mlxgpt/training/optimizer.py) computes the
# same update, in an order with fewer operations per weight. It differs in two ways:
#
# - **Groups.** Instead of one `if`, parameters belong to groups with their own learning rate and decay:
#   matrices, all others, and, if the config says so, embeddings.
# - **Skipped steps.** If a loss or gradient is not finite, the step must change nothing, moments included. An
#   `if` would have to wait for the GPU, and a `where` around the results would keep `mx.compile` from fusing
#   the update. So its inputs change: gradient 0, learning rate 0, and moments multiplied by 1.
#
# The betas are settings there: β₂ is 0.95 as in nanoGPT, but 0.99 in `tier1.toml`, for small batches.
# [`muon.py`](../../../mlxgpt/training/muon.py) is an alternative for the matrices of the blocks: Muon (Jordan
# et al., 2024) brings the singular values of a whole matrix of momentum near 1, where Adam scales each value.
#
# ## Exercises
#
# Write the functions to your own `my_gpt.py`, then run `mlxgpt learn check 6`.
#
# 1. How much memory does AdamW need for a model with N parameters in float32, gradients included?
#
# <details><summary>Answer</summary>
#
# 16·N bytes: weight, gradient, m and v with 4 bytes each. SGD needs half.
# </details>
#
# 2. All losses are multiplied by 1,000. What changes for SGD, and what for AdamW?
#
# <details><summary>Answer</summary>
#
# For SGD each step is 1,000 times as long, and training diverges. For AdamW m and √v both grow by 1,000, so
# the step stays the same, except for the eps. With L2 in the gradient it would change: the decay would weigh
# 1,000 times less.
# </details>
#
# 3. Turn the valley by 45°. Which of the three methods does worse?
#
# <details><summary>Answer</summary>
#
# Only Adam. Gradient descent and momentum do not know axes: their paths turn with the valley. Adam scales
# each coordinate separately; now both have gradients of the same size, dominated by the steep direction, and
# there is nothing to even out. That is the point of methods such as Muon, which look at a matrix as a whole.
# </details>

# %% [markdown] lang="pt"
# ## No mlxgpt
#
# `OptimizerGroups`, em [`mlxgpt/training/optimizer.py`](../../../mlxgpt/training/optimizer.py), calcula a
# mesma atualização, numa ordem com menos operações por peso. Há duas diferenças:
#
# - **Grupos.** Em vez de um `if`, os parâmetros pertencem a grupos, com taxa de aprendizado e decay próprios:
#   matrizes, todo o resto e, se a configuração pedir, embeddings.
# - **Passos pulados.** Se uma loss ou um gradiente não é finito, o passo não pode mudar nada, nem os
#   momentos. Um `if` teria de esperar pela GPU, e um `where` em volta dos resultados impediria o `mx.compile`
#   de fundir a atualização. Por isso mudam as entradas: gradiente 0, taxa de aprendizado 0 e momentos
#   multiplicados por 1.
#
# Lá, os betas são configuráveis: β₂ é 0,95, como no nanoGPT, mas 0,99 em `tier1.toml`, para batches pequenos.
# [`muon.py`](../../../mlxgpt/training/muon.py) é uma alternativa para as matrizes dos blocos: o Muon (Jordan
# et al., 2024) leva os valores singulares de toda uma matriz de momentum para perto de 1, enquanto o Adam
# ajusta cada valor.
#
# ## Exercícios
#
# Escreva as funções no seu próprio `my_gpt.py` e rode `mlxgpt learn check 6`.
#
# 1. De quanta memória o AdamW precisa para um modelo com N parâmetros em float32, gradientes incluídos?
#
# <details><summary>Resposta</summary>
#
# 16·N bytes: peso, gradiente, m e v, com 4 bytes cada um. O SGD precisa da metade.
# </details>
#
# 2. Todas as losses são multiplicadas por 1.000. O que muda para o SGD, e o que muda para o AdamW?
#
# <details><summary>Resposta</summary>
#
# No SGD, cada passo fica 1.000 vezes mais longo, e o treino diverge. No AdamW, m e √v crescem ambos 1.000
# vezes, e o passo continua o mesmo, a não ser pelo eps. Com L2 no gradiente mudaria: o decay pesaria 1.000
# vezes menos.
# </details>
#
# 3. Gire o vale em 45°. Qual dos três métodos piora?
#
# <details><summary>Resposta</summary>
#
# Só o Adam. A descida de gradiente e o momentum não conhecem eixos: os caminhos giram junto com o vale. O
# Adam ajusta cada coordenada por si; agora as duas têm gradientes do mesmo tamanho, dominados pela direção
# íngreme, e não há o que equilibrar. É a ideia de métodos como o Muon, que olham para a matriz inteira.
# </details>
