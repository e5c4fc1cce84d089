# %% [markdown] lang="en"
# # 7. Schedule, batch size, overfitting
#
# **When is more training worse?**
#
# The model of chapter 5 and the AdamW of chapter 6 are all it takes to train. What remains are decisions: on
# which text, with how many sequences at a time, with which learning rate, and when to stop. Each of them is
# a line or two of code, and each can ruin the result.

# %% [markdown] lang="pt"
# # 7. Schedule, tamanho do batch, overfitting
#
# **Quando treinar mais piora o modelo?**
#
# O modelo do capítulo 5 e o AdamW do capítulo 6 já bastam para treinar. O que falta são decisões: com qual
# texto, com quantas sequências de cada vez, com que taxa de aprendizado (*learning rate*) e até quando. Cada
# uma cabe em uma ou duas linhas de código, e qualquer uma pode estragar o resultado.

# %%
import math

import matplotlib.pyplot as plt
import mlx.core as mx
from course import CharTokenizer, check, expect, load_text
from mlx.utils import tree_flatten, tree_map
from my_gpt import cross_entropy, gpt, init_state, init_weights, update_weights

tokenizer = CharTokenizer(load_text())
ids = tokenizer.encode(load_text())
V, T, N_HEAD = tokenizer.vocab_size, 32, 4

# %% [markdown] lang="en"
# ## Text to train on, and text to measure on
#
# A model may have memorized a text that it was trained on. So the last 10% are held out, and used only to
# measure: this is the *validation* text. It must be one piece: if every tenth line were held out, its
# neighbors would have given much of it away.
#
# A batch is B windows of T tokens from random places. The targets are the same windows one token later, so
# each window gives T predictions at once.

# %% [markdown] lang="pt"
# ## Texto para treinar, texto para medir
#
# Um modelo que já viu um texto pode ter decorado esse texto. Por isso os últimos 10% ficam separados e só
# servem para medir: é a validação (*validation*). Precisa ser um trecho contínuo: se separássemos uma linha
# a cada dez, as vizinhas entregariam boa parte dela.
#
# Um batch são B janelas de T tokens, tiradas de lugares aleatórios. Os alvos são as mesmas janelas um token
# adiante; assim, cada janela rende T previsões de uma vez.


# %% tags=["my_gpt"]
def split_ids(ids):
    """The first 90% for training, the rest for validation."""
    n = len(ids) * 9 // 10
    return ids[:n], ids[n:]


def get_batch(ids, batch_size, block_size, key):
    """Inputs and targets, each [B, T], from random places of ids [N]."""
    starts = mx.random.randint(0, len(ids) - block_size, (batch_size, 1), key=key)
    positions = starts + mx.arange(block_size)
    return ids[positions], ids[positions + 1]


# %%
train_ids, val_ids = split_ids(ids)
inputs, targets = get_batch(train_ids, 2, 12, mx.random.key(0))
for row in range(2):
    print(repr(tokenizer.decode(inputs[row])), "->", repr(tokenizer.decode(targets[row])))

# %% [markdown] lang="en"
# Texts of different lengths, as in a chat, do not fill a rectangle: the shorter ones get *padding* at the
# end. A mask of ones and zeros takes it out of the loss. Here, the second text has two tokens only; the
# model is right about all real tokens and knows nothing about the padding.

# %% [markdown] lang="pt"
# Textos de tamanhos diferentes, como os de um chat, não preenchem um retângulo: os mais curtos recebem um
# enchimento (*padding*) no fim. Uma máscara de uns e zeros o tira da loss. Aqui, o segundo texto tem só dois
# tokens; o modelo acerta todos os tokens reais e não sabe nada sobre o padding.


# %% tags=["my_gpt"]
def masked_loss(logits, targets, mask):
    """Mean loss of the tokens whose mask is 1; 0 marks padding. All [B, T] but logits [B, T, V]."""
    return (cross_entropy(logits, targets) * mask).sum() / mask.sum()


# %%
mask = mx.array([[1, 1, 1, 1], [1, 1, 0, 0]])
targets = mx.array([[3, 1, 2, 1], [2, 4, 0, 0]])
logits = 10.0 * (mx.arange(5) == targets[..., None]) * mask[..., None]  # [2, 4, 5]
print(f"mean of all 8: {cross_entropy(logits, targets).mean().item():.3f}")
print(f"with the mask: {masked_loss(logits, targets, mask).item():.4f}")

# %% [markdown] lang="en"
# ## The learning rate over time
#
# At step 1, Adam has seen one gradient: m̂ = g and v̂ = g², so every weight moves by ± the full learning
# rate, whether its gradient is large or tiny. *Warmup* keeps these first steps small until the averages
# mean something. At the end, the noise of the batches is what keeps the loss from falling, and smaller
# steps average it out: the rate follows half a cosine (Loshchilov and Hutter, 2016) to a tenth of its peak.

# %% [markdown] lang="pt"
# ## A taxa de aprendizado ao longo do tempo
#
# No passo 1, o Adam viu um único gradiente: m̂ = g e v̂ = g², e então todo peso anda ± a taxa inteira, seja o
# gradiente grande ou minúsculo. O aquecimento (*warmup*) mantém esses primeiros passos pequenos até que as
# médias signifiquem alguma coisa. No fim, o que impede a loss de cair é o ruído dos batches, e passos
# menores fazem a média desse ruído: a taxa segue meio cosseno (Loshchilov e Hutter, 2016) até um décimo do
# pico.


# %% tags=["my_gpt"]
def learning_rate(step, peak, warmup_steps, max_steps):
    """Linear warmup, then a cosine from the peak to a tenth of it; `step` counted from 0."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


# %% [markdown] lang="en"
# ## The training loop
#
# Two more functions. `evaluate` measures the mean loss on a text, every window once. *Dropout* (Srivastava et
# al., 2014) sets random values to 0 during training, so that no prediction can depend on one of them alone;
# the others are scaled by 1/(1 - rate), which keeps the mean. We need it further down.

# %% [markdown] lang="pt"
# ## O laço de treino
#
# Faltam duas funções. `evaluate` mede a loss média em um texto, cada janela uma vez. O *dropout* (Srivastava
# et al., 2014) zera valores ao acaso durante o treino, para que nenhuma previsão dependa de um só deles; os
# outros são multiplicados por 1/(1 - rate), o que preserva a média. Vamos precisar dele mais abaixo.


# %% tags=["my_gpt"]
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


# %%
print([round(x, 2) for x in make_dropout(0.25, mx.random.key(2))(mx.ones(8)).tolist()])

# %% [markdown] lang="en"
# A step is then: loss and gradients, and AdamW. `mx.compile` traces it once and fuses what it can. Whatever
# changes from step to step must be an argument, also the step number, the rate and the random key: a Python
# number would be traced as a constant.

# %% [markdown] lang="pt"
# Um passo é, então: loss e gradientes, depois AdamW. O `mx.compile` percorre o passo uma única vez (*trace*)
# e funde as operações que puder. Tudo que muda de um passo para outro tem de ser argumento, inclusive o
# número do passo, a taxa e a chave aleatória: um número do Python ficaria gravado como constante.


# %%
def train(train_ids, max_steps, batch_size, dropout=0.0, peak=5e-3, warmup_steps=100, seed=0):
    @mx.compile
    def training_step(weights, state, inputs, targets, n, rate, key):
        drop = make_dropout(dropout, key) if dropout else lambda x: x

        def loss(weights):
            return cross_entropy(gpt(inputs, weights, N_HEAD, drop), targets).mean()

        gradients = mx.grad(loss)(weights)
        return update_weights(weights, gradients, state, n, rate)

    weights = init_weights(V, T, n_layer=2, n_embd=64, key=mx.random.key(seed))
    state, curve = init_state(weights), []
    for step in range(max_steps):
        batch_key, drop_key = mx.random.split(mx.random.key(1000 * seed + step))
        batch = get_batch(train_ids, batch_size, T, batch_key)
        n, rate = mx.array(step + 1), mx.array(learning_rate(step, peak, warmup_steps, max_steps))
        weights, state = training_step(weights, state, *batch, n, rate, drop_key)
        mx.eval(weights, state)
        if (step + 1) % 50 == 0:
            losses = [evaluate(weights, x[:10_000], N_HEAD, T).item() for x in (train_ids, val_ids)]
            curve.append((step + 1, *losses))
    return weights, curve


weights, curve = train(train_ids, 500, 32)
expect(evaluate(weights, val_ids, N_HEAD, T), 2.11, 0.05)

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
axes[0].plot([learning_rate(step, 5e-3, 100, 500) for step in range(500)])
axes[0].set(xlabel="step", ylabel="learning rate")
steps, train_losses, val_losses = zip(*curve, strict=True)
axes[1].plot(steps, train_losses, label="training text")
axes[1].plot(steps, val_losses, label="validation text")
axes[1].set(xlabel="step", ylabel="loss, nats per character")
axes[1].legend()
plt.show()

# %% [markdown] lang="en"
# The rate rises for 100 steps and falls for 400. The two losses, each of 10,000 characters, fall together:
# 500 batches of 1,024 characters are half of the training text, so little of it was seen twice, and nothing
# could be memorized. The loss of the whole validation text is 2.11, against 2.48 for bigrams counted on the
# training text (chapter 1, exercise 1).
#
# ## Batch size: the noise of the gradient
#
# The gradient of a batch is an estimate of the gradient of the whole text. The mean of B independent
# estimates has 1/√B of the standard deviation of one: to halve the noise, you need four times the work.
# Measured at the trained weights, over 32 batches of each size:

# %% [markdown] lang="pt"
# A taxa sobe por 100 passos e desce por 400. As duas losses, cada uma sobre 10.000 caracteres, caem juntas:
# 500 batches de 1.024 caracteres equivalem à metade do texto de treino; pouca coisa foi vista duas vezes, e
# não houve o que decorar. A loss no texto de validação inteiro é 2,11, contra 2,48 dos bigramas contados no
# texto de treino (capítulo 1, exercício 1).
#
# ## Tamanho do batch: o ruído do gradiente
#
# O gradiente de um batch é uma estimativa do gradiente do texto inteiro. A média de B estimativas
# independentes tem 1/√B do desvio padrão de uma só: para cortar o ruído pela metade, é preciso quatro vezes
# mais trabalho. Medido nos pesos treinados, com 32 batches de cada tamanho:


# %%
def batch_loss(weights, inputs, targets):
    return cross_entropy(gpt(inputs, weights, N_HEAD), targets).mean()


loss_and_gradients = mx.value_and_grad(batch_loss)
sizes, noise = (2, 8, 32), []
for B in sizes:
    rows = []
    for n in range(32):
        _, gradients = loss_and_gradients(weights, *get_batch(train_ids, B, T, mx.random.key(n)))
        rows.append(mx.concatenate([g.flatten() for _, g in tree_flatten(gradients)]))
        mx.eval(rows)
    rows = mx.stack(rows)  # [32, all weights]
    noise.append(math.sqrt(mx.var(rows, axis=0, ddof=1).sum().item()))
    mean_norm = mx.linalg.norm(rows.mean(axis=0)).item()
    print(f"B = {B:2}: noise {noise[-1]:.3f}, norm of the mean gradient {mean_norm:.3f}")
expect(noise[0] / noise[-1], 4.0, 0.4)
expect(noise[-1] / mean_norm, 2.1, 0.6)

# %% [markdown] lang="en"
# Four times the batch, half the noise. At B = 32 the noise is still about twice as long as the gradient it
# hides. That does no harm as long as it averages out over the steps. Only when it is clearly shorter than the
# gradient do larger batches stop paying: McCandlish et al. (2018) measure this to choose the batch size.
#
# If a batch does not fit in memory, it can be taken in parts: the mean of the gradients of equal
# *micro-batches* is the gradient of the batch. `loss_and_gradients` is evaluated after each part here, so
# that only one part's activations are in memory at a time.

# %% [markdown] lang="pt"
# Batch quatro vezes maior, metade do ruído. Com B = 32, o ruído ainda é cerca de duas vezes maior que o
# gradiente que ele esconde. Não faz mal, desde que se cancele ao longo dos passos. Só quando fica bem menor
# que o gradiente é que aumentar o batch deixa de compensar: McCandlish et al. (2018) medem isso para escolher
# o tamanho do batch.
#
# Se um batch não cabe na memória, dá para calculá-lo em partes: a média dos gradientes de *micro-batches*
# iguais é o gradiente do batch. Aqui `loss_and_gradients` é avaliada depois de cada parte, para que só as
# ativações de uma parte ocupem a memória de cada vez.


# %% tags=["my_gpt"]
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


# %%
def evaluated(*args):
    result = loss_and_gradients(*args)
    mx.eval(result)
    return result


inputs, targets = get_batch(train_ids, 64, T, mx.random.key(0))
results, peaks = [], []
for parts in (1, 8):
    micro_batches = list(zip(mx.split(inputs, parts), mx.split(targets, parts), strict=True))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    results.append(accumulate_gradients(evaluated, weights, micro_batches)[1])
    mx.eval(results)
    peaks.append(mx.get_peak_memory() - before)
differences = tree_map(lambda a, b: mx.abs(a - b).max(), *results)
print(f"largest difference: {max(d.item() for _, d in tree_flatten(differences)):.0e}")
print(f"8 micro-batches need {peaks[1] / peaks[0]:.0%} of the memory of the whole batch")

# %% [markdown] lang="en"
# ## Overfitting, on purpose
#
# Now the same model on the first 3,000 characters only. It sees each of them about 70 times, and has 100,000
# weights to remember them with.

# %% [markdown] lang="pt"
# ## Overfitting de propósito
#
# Agora o mesmo modelo, só com os primeiros 3.000 caracteres. Ele vê cada um cerca de 70 vezes e tem 100.000
# pesos para guardá-los.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
axes[0].loglog(sizes, noise, "o", label="measured")
axes[0].loglog(sizes, [noise[0] * math.sqrt(2 / B) for B in sizes], "--", label="1/√B")
axes[0].set(xlabel="batch size B", ylabel="standard deviation of the gradient")
axes[0].minorticks_off()
axes[0].set_xticks(sizes, sizes)
axes[0].set_yticks((1, 2, 4), (1, 2, 4))
for rate, color in ((0.0, "tab:red"), (0.2, "tab:blue")):
    _, small_curve = train(train_ids[:3000], 400, 16, dropout=rate)
    steps, train_losses, val_losses = zip(*small_curve, strict=True)
    axes[1].plot(steps, train_losses, ":", color=color, label=f"training, dropout {rate}")
    axes[1].plot(steps, val_losses, color=color, label=f"validation, dropout {rate}")
    print(f"dropout {rate}: best {min(val_losses):.2f}, at the end {val_losses[-1]:.2f}")
    if not rate:
        expect(val_losses[-1] - min(val_losses), 0.37, 0.12)
axes[1].set(xlabel="step", ylabel="loss, nats per character", ylim=(0, 3.6))
for axis in axes:
    axis.legend()
plt.show()

# %% [markdown] lang="en"
# On the left, the noise of the gradient follows 1/√B. On the right, without dropout (red), the training loss
# falls to 1.3, but the validation loss is lowest at about step 150 and rises by about 0.35 until the end:
# every further step only memorizes these 3,000 characters. With dropout (blue), it stays close to its lowest
# value. That value is no better than stopping the red run in time, and both are far from 2.11: the best
# remedy is more text.
#
# So this is when more training is worse: as soon as the validation loss rises, whatever the training loss
# says.
#
# ## Check
#
# All functions are compared with the library's, among them the learning rate of every step.

# %% [markdown] lang="pt"
# À esquerda, o ruído do gradiente segue 1/√B. À direita, sem dropout (vermelho), a loss de treino cai até
# 1,3, mas a de validação é mínima perto do passo 150 e sobe cerca de 0,35 até o fim: cada passo a mais só
# decora esses 3.000 caracteres. É o sobreajuste (*overfitting*). Com dropout (azul), ela fica perto do seu
# mínimo. Esse mínimo não é melhor que parar o treino vermelho na hora certa, e os dois estão longe de 2,11: o
# melhor remédio é mais texto.
#
# É aí, então, que treinar mais piora o modelo: quando a loss de validação começa a subir, diga a de treino o
# que disser.
#
# ## Verificação
#
# Todas as funções são comparadas com as da biblioteca, entre elas a taxa de aprendizado de cada passo.

# %%
check(7, globals())

# %% [markdown] lang="en"
# ## In mlxgpt
#
# - [`training/schedule.py`](../../../mlxgpt/training/schedule.py): the same warmup and cosine, made of MLX's
#   schedules; or `wsd` (warmup, stable, decay), which stays at the peak and ends with a linear cooldown.
# - [`data/token_array.py`](../../../mlxgpt/data/token_array.py): `get_batch(step)` shuffles the blocks of
#   each epoch (one pass over the text) instead of drawing places, so every token is seen about once per
#   epoch. It is a pure function of the step: a run that resumes at step 300 gets the batch it would have got,
#   without any saved state.
# - [`training/step.py`](../../../mlxgpt/training/step.py): the compiled step. It also clips the norm of the
#   gradient, skips a step whose loss is not finite, and waits after each micro-batch, to save memory.
# - [`evaluation/loss.py`](../../../mlxgpt/evaluation/loss.py): every window once, without dropout. The last,
#   shorter window is padded and masked; ours drops it. It also gives bits per byte, which can be compared
#   between tokenizers.
#
# `--patience` stops a run after some evaluations without a lower validation loss, and `generate` uses the
# best checkpoint unless you ask for another.
#
# ## Exercises
#
# Write the seven functions to your own `my_gpt.py`, then run `mlxgpt learn check 7`.
#
# 1. Two micro-batches of chat texts have 100 and 10 real tokens. Is the mean of their two masked losses the
#    masked loss of the whole batch?
#
# <details><summary>Answer</summary>
#
# No: each token of the short one counts ten times as much. Sum the losses and the masks over all
# micro-batches, and divide once at the end.
# </details>
#
# 2. Train with `peak=1e-2` and `warmup_steps=20`, then 100. What do you see?
#
# <details><summary>Answer</summary>
#
# With the short warmup, the loss ended about 0.2 higher in our runs, although only the first steps differ
# much: large steps in nearly random directions leave the weights in a place from which learning is slow.
# </details>
#
# 3. Why does the loop make its keys from the step number, instead of drawing from one global generator?
#
# <details><summary>Answer</summary>
#
# The batch of step 300 then does not depend on the steps before it. With a global generator, you would have
# to save its state, and one draw more or less anywhere would change all later batches.
# </details>

# %% [markdown] lang="pt"
# ## No mlxgpt
#
# - [`training/schedule.py`](../../../mlxgpt/training/schedule.py): o mesmo warmup e o mesmo cosseno, montados
#   com os schedules do MLX; ou `wsd` (*warmup, stable, decay*), que fica no pico e termina com uma queda
#   linear (*cooldown*).
# - [`data/token_array.py`](../../../mlxgpt/data/token_array.py): `get_batch(step)` embaralha os blocos de
#   cada época (uma passagem pelo texto) em vez de sortear posições; assim, cada token aparece mais ou menos
#   uma vez por época. É uma função pura do passo: um treino retomado no passo 300 recebe o batch que teria
#   recebido, sem nenhum estado salvo.
# - [`training/step.py`](../../../mlxgpt/training/step.py): o passo compilado. Ele também limita a norma do
#   gradiente (*clipping*), pula um passo cuja loss não seja finita e espera depois de cada micro-batch, para
#   poupar memória.
# - [`evaluation/loss.py`](../../../mlxgpt/evaluation/loss.py): cada janela uma vez, sem dropout. A última
#   janela, mais curta, recebe padding e máscara; a nossa função a descarta. Ele dá também os bits por byte,
#   comparáveis entre tokenizadores.
#
# `--patience` encerra o treino depois de algumas avaliações sem uma loss de validação menor, e o `generate`
# usa o melhor checkpoint, a não ser que você peça outro.
#
# ## Exercícios
#
# Escreva as sete funções no seu próprio `my_gpt.py` e rode `mlxgpt learn check 7`.
#
# 1. Dois micro-batches de textos de chat têm 100 e 10 tokens reais. A média das duas losses com máscara é a
#    loss com máscara do batch inteiro?
#
# <details><summary>Resposta</summary>
#
# Não: cada token do mais curto pesa dez vezes mais. Some as losses e as máscaras de todos os micro-batches e
# divida uma única vez, no fim.
# </details>
#
# 2. Treine com `peak=1e-2` e `warmup_steps=20`; depois, com 100. O que acontece?
#
# <details><summary>Resposta</summary>
#
# Com o warmup curto, a loss terminou cerca de 0,2 acima nos nossos testes, embora só os primeiros passos
# mudem muito: passos grandes em direções quase aleatórias deixam os pesos num lugar de onde se aprende
# devagar.
# </details>
#
# 3. Por que o laço cria as chaves a partir do número do passo, em vez de sortear de um gerador global?
#
# <details><summary>Resposta</summary>
#
# Assim o batch do passo 300 não depende dos passos anteriores. Com um gerador global, seria preciso salvar o
# estado dele, e um sorteio a mais ou a menos em qualquer lugar mudaria todos os batches seguintes.
# </details>
