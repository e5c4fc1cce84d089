# %% [markdown] lang="en"
# # 8. Sampling
#
# **Why is the most likely text not the best text?**
#
# A trained GPT does not write. It gives 65 probabilities for the next character, and something has to choose
# one of the characters. That choice is made outside the model, without any training, and it decides whether
# the text is dull, readable or noise.

# %% [markdown] lang="pt"
# # 8. Amostragem
#
# **Por que o texto mais provável não é o melhor texto?**
#
# Um GPT treinado não escreve. Ele dá 65 probabilidades para o próximo caractere, e alguém precisa escolher um
# deles: é a amostragem (*sampling*). Essa escolha acontece fora do modelo, sem treino nenhum, e decide se o
# texto sai monótono, legível ou puro ruído.

# %%
import re

import matplotlib.pyplot as plt
import mlx.core as mx
from course import CharTokenizer, check, expect, load_text
from my_gpt import (
    cross_entropy,
    evaluate,
    get_batch,
    gpt,
    init_state,
    init_weights,
    learning_rate,
    split_ids,
    update_weights,
)

text = load_text()
tokenizer = CharTokenizer(text)
train_ids, val_ids = split_ids(tokenizer.encode(text))
T, N_HEAD, STEPS = 32, 4, 400


def loss(weights, inputs, targets):
    return cross_entropy(gpt(inputs, weights, N_HEAD), targets).mean()


@mx.compile
def training_step(weights, state, inputs, targets, n, rate):
    gradients = mx.grad(loss)(weights, inputs, targets)
    return update_weights(weights, gradients, state, n, rate)


weights = init_weights(tokenizer.vocab_size, T, n_layer=2, n_embd=64, key=mx.random.key(0))
state = init_state(weights)
for step in range(STEPS):
    batch = get_batch(train_ids, 32, T, mx.random.key(step))
    rate = mx.array(learning_rate(step, 5e-3, 100, STEPS))
    weights, state = training_step(weights, state, *batch, mx.array(step + 1), rate)
    mx.eval(weights, state)
expect(evaluate(weights, val_ids, N_HEAD, T), 2.16, 0.05)

# %% [markdown] lang="en"
# That was 400 steps as in chapter 7. Now the model is fixed, and everything below only chooses.
#
# ## A random number becomes a token
#
# To draw from probabilities, lay them end to end on a line from 0 to 1 and throw a uniform random number at
# it: the token whose piece it hits is the sample. The ends of the pieces are the cumulative sum, and the
# token is the first one whose end lies above the number. This is *inverse transform sampling*. (The number
# is scaled by the last end, which rounding may leave a little off 1.)

# %% [markdown] lang="pt"
# Foram 400 passos como no capítulo 7. Agora o modelo está fixo, e tudo o que vem abaixo só escolhe.
#
# ## De um número aleatório a um token
#
# Para sortear de acordo com as probabilidades, coloque-as lado a lado numa reta de 0 a 1 e jogue ali um
# número aleatório uniforme: o token cujo pedaço for atingido é o sorteado. As pontas dos pedaços são a soma
# acumulada, e o token é o primeiro cuja ponta fica acima do número. É o método da transformada inversa
# (*inverse transform sampling*). (O número é multiplicado pela última ponta, que o arredondamento pode
# deixar um pouco fora de 1.)


# %% tags=["my_gpt"]
def sample(logits, key):
    """One token per row from the softmax of logits [B, V] -> [B]."""
    cumulative = mx.cumsum(mx.softmax(logits, axis=-1), axis=-1)
    threshold = mx.random.uniform(shape=(len(logits), 1), key=key) * cumulative[:, -1:]
    return mx.argmax(cumulative > threshold, axis=-1)


# %%
probabilities = mx.array([0.5, 0.2, 0.3])
print("ends of the pieces:", mx.cumsum(probabilities), "so 0.6 hits token 1")
drawn = sample(mx.broadcast_to(mx.log(probabilities), (10_000, 3)), mx.random.key(0))
for token in range(3):
    expect((drawn == token).mean(), round(probabilities[token].item(), 1), 0.015)

# %% [markdown] lang="en"
# ## Changing the probabilities first
#
# *Temperature* divides the logits. Probabilities are proportional to e^logit, so a division by 0.5 squares
# them before they are normalized: 0.6 and 0.2 were 3 to 1, and become 9 to 1. Below 1 the likely tokens win
# more, above 1 all come closer to each other. At 0 only the most likely one would be left, which is *greedy*
# decoding.
#
# The many unlikely tokens are a problem of their own: each of them is rare, but one in ten or twenty is
# not, and a single wrong character breaks a word. *Top-k* keeps the k most likely tokens. *Top-p* (Holtzman
# et al., 2020) keeps the smallest set of most likely tokens that has a total probability of p: a token
# stays if those before it have not reached p yet. For 0.5, 0.3, 0.15, 0.05 and p = 0.9 the totals before
# each are 0, 0.5, 0.8, 0.95: three stay.

# %% [markdown] lang="pt"
# ## Antes, mexer nas probabilidades
#
# A temperatura (*temperature*) divide os logits. As probabilidades são proporcionais a e^logit; dividir por
# 0,5 equivale a elevá-las ao quadrado antes de normalizar: 0,6 e 0,2 estavam em 3 para 1 e passam a 9 para 1.
# Abaixo de 1, os tokens prováveis ganham ainda mais; acima de 1, todos se aproximam. Em 0 sobraria só o mais
# provável: é a decodificação gulosa (*greedy*).
#
# Os muitos tokens improváveis são um problema à parte: cada um é raro, mas sair algum deles, uma vez em dez
# ou vinte, não é, e um único caractere errado quebra uma palavra. O *top-k* fica com os k tokens mais
# prováveis. O *top-p* (Holtzman et al., 2020) fica com o menor conjunto de tokens mais prováveis cuja
# probabilidade total chega a p: um token permanece se os anteriores a ele ainda não alcançaram p. Com 0,5,
# 0,3, 0,15, 0,05 e p = 0,9, os totais antes de cada um são 0, 0,5, 0,8 e 0,95: ficam três.


# %% tags=["my_gpt"]
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


# %%
print(mx.softmax(filter_logits(mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]])), top_p=0.9), axis=-1))


def next_logits(prompt):
    return gpt(tokenizer.encode(prompt)[None], weights, N_HEAD)[:, -1]  # [1, V]


for prompt in ("ROMEO:\nI ", "the q"):
    for settings in ({"top_k": 5}, {"top_p": 0.9}):
        kept = mx.isfinite(filter_logits(next_logits(prompt), **settings)).sum().item()
        print(f"{prompt!r}: {settings} keeps {kept}")
logits = next_logits("ROMEO:\nI ")
top = mx.argsort(-logits[0])[:12]
figure, axis = plt.subplots(figsize=(9, 3.2), layout="constrained")
for n, temperature in enumerate((0.5, 1.0, 1.5)):
    probabilities = mx.softmax(filter_logits(logits, temperature), axis=-1)[0, top]
    places = [place + 0.27 * (n - 1) for place in range(12)]
    axis.bar(places, probabilities.tolist(), 0.27, label=f"temperature {temperature}")
axis.set_xticks(range(12), list(tokenizer.decode(top)))
axis.set(xlabel="next character", ylabel="probability")
axis.legend()
plt.show()

# %% [markdown] lang="en"
# The same distribution at three temperatures, its 12 most likely characters: at 0.5 it is steep, at 1.5
# nearly flat. The order never changes.
#
# The counts above show why top-p is more than top-k. After a space nearly any letter can begin a word, and
# top-p keeps many; after `q` it keeps a few. A fixed k is too small for the one and too large for the other.
#
# ## Generating
#
# A text is generated token by token: logits of the last position, filter, sample, append, and again. The
# model knows T positions, so it sees the last T tokens only.

# %% [markdown] lang="pt"
# A mesma distribuição em três temperaturas, com os 12 caracteres mais prováveis: em 0,5 ela é íngreme; em
# 1,5, quase plana. A ordem nunca muda.
#
# As contagens acima mostram o que o top-p tem a mais que o top-k. Depois de um espaço, quase qualquer letra
# pode começar uma palavra, e o top-p mantém muitas; depois de `q`, mantém poucas. Um k fixo é pequeno demais
# para um caso e grande demais para o outro.
#
# ## Gerando texto
#
# O texto é gerado token a token: logits da última posição, filtro, sorteio, acrescenta-se o token, e de novo.
# O modelo conhece T posições, e por isso vê só os últimos T tokens.


# %% tags=["my_gpt"]
def generate(weights, ids, n_tokens, n_head, key, **settings):
    """Continue ids [B, T] by n_tokens -> [B, T + n_tokens]."""
    block_size = len(weights["wpe"]["weight"])
    for token_key in mx.random.split(key, n_tokens):
        logits = gpt(ids[:, -block_size:], weights, n_head)[:, -1]
        token = sample(filter_logits(logits, **settings), token_key)
        ids = mx.concatenate([ids, token[:, None]], axis=1)
        mx.eval(ids)
    return ids


# %%
real_texts, _ = get_batch(val_ids, 32, 88, mx.random.key(0))
prompts = real_texts[:, :8]
all_settings = [{"top_k": 1}, *({"temperature": t} for t in (0.5, 0.75, 1, 1.5)), {"top_p": 0.9}]
texts = []
for settings in all_settings:
    texts.append(generate(weights, prompts, 80, N_HEAD, mx.random.key(1), **settings))
    print(settings, *(repr(tokenizer.decode(row)) for row in texts[-1][:2]), "", sep="\n")

# %% [markdown] lang="en"
# Top-k with k = 1 is greedy, and it repeats itself. After `the `, the most likely text is one more `the `;
# once the context is the same again, so is the answer, forever. At 1.5 there are hardly words.
#
# ## Measured
#
# Three figures for the 32 texts of each setting, and for the real texts that have the same prompts; the
# prompts themselves do not count:
#
# - the loss of the first 25 characters under the model itself: how likely does it find them?
# - of the words with three letters or more, the share that occur in the training text,
# - and the share of different words among all: repetition makes it small.

# %% [markdown] lang="pt"
# Top-k com k = 1 é a decodificação gulosa, e ela se repete. Depois de `the `, o mais provável é outro `the `;
# quando o contexto volta a ser o mesmo, a resposta também volta, para sempre. Em 1,5, quase não há palavras.
#
# ## Medindo
#
# Três números para os 32 textos de cada ajuste e para os textos reais que têm os mesmos prompts; os prompts
# em si não contam:
#
# - a loss dos primeiros 25 caracteres segundo o próprio modelo: quão prováveis ele os acha?
# - das palavras com três letras ou mais, a fração que ocorre no texto de treino;
# - e a fração de palavras diferentes entre todas: a repetição a torna pequena.


# %%
def find_words(rows):
    words = []
    for row in rows:
        text = tokenizer.decode(row).lower().rsplit(maxsplit=1)[0]  # the last word may be cut off
        words += re.findall("[a-z']{3,}", text)
    return words


def measure(rows):
    words = find_words(rows[:, 8:])
    losses = cross_entropy(gpt(rows[:, :T], weights, N_HEAD), rows[:, 1 : T + 1])
    return (
        losses[:, 7:].mean().item(),
        sum(w in known for w in words) / len(words),
        len(set(words)) / len(words),
    )


known = set(find_words([train_ids]))
names = ["real text", "greedy", "0.5", "0.75", "1", "1.5", "top-p 0.9"]
measured = [measure(rows) for rows in (real_texts, *texts)]
for name, (own_loss, known_share, different) in zip(names, measured, strict=True):
    print(f"{name:9}  loss {own_loss:.2f}  known {known_share:4.0%}  different {different:4.0%}")
expect(measured[0][0], 2.11, 0.05)
expect(measured[1][0], 1.06, 0.2)
expect(measured[2][1] - measured[4][1], 0.4, 0.15)

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
temperatures, columns = (0, 0.5, 0.75, 1, 1.5), list(zip(*measured, strict=True))
labels = ("loss", "words that occur in the training text", "different words")
for n, (column, label) in enumerate(zip(columns, labels, strict=True)):
    axis, color = axes[min(n, 1)], f"C{n}"
    axis.plot(temperatures, column[1:6], "o-", color=color, label=label)
    axis.axhline(column[0], color=color, linestyle="--")
axes[0].set(xlabel="temperature (0: greedy)", ylabel="loss of the text, nats per character")
axes[1].set(xlabel="temperature (0: greedy)", ylabel="share of all words", ylim=(0, 1.3))
axes[1].legend()
plt.show()

# %% [markdown] lang="en"
# The dashed lines are real text. On the left is the answer to the question: to the model, real text costs
# 2.11 nats per character, and its own greedy text 1.06. People do not write the most likely next character,
# and what they write is worth reading because it cannot be foreseen (Holtzman et al. show the same for
# GPT-2). Between 0.75 and 1, the model's own text becomes as surprising as the real one.
#
# On the right is the trade-off. As the temperature rises, the share of known words falls, from nearly all
# (greedy uses few words, but real ones) to 1 in 10, and the share of different words rises. Real text has 95%
# known words *and* variety: no temperature gets both from this small model. What to give up is up to you;
# top-p 0.9 lies between 0.75 and 1 here.
#
# ## Check
#
# The filters equal the library's, and tokens come as often as their probability says.

# %% [markdown] lang="pt"
# As linhas tracejadas são o texto real. À esquerda está a resposta à pergunta: para o modelo, o texto real
# custa 2,11 nats por caractere; o seu próprio texto guloso, 1,06. Ninguém escreve sempre o caractere mais
# provável, e o que se escreve vale a leitura justamente porque não dá para adivinhar (Holtzman et al. mostram
# o mesmo com o GPT-2). Entre 0,75 e 1, o texto do modelo fica tão surpreendente quanto o real.
#
# À direita, os dois lados da troca. Com a temperatura, a fração de palavras conhecidas cai, de quase todas (o
# guloso usa poucas palavras, mas reais) para 1 em 10, e a de palavras diferentes sobe. O texto real tem 95%
# de palavras conhecidas *e* variedade: nenhuma temperatura tira as duas coisas deste modelo pequeno. Do que
# abrir mão é escolha sua; aqui, top-p 0,9 fica entre 0,75 e 1.
#
# ## Verificação
#
# Os filtros são iguais aos da biblioteca, e os tokens saem com a frequência que a sua probabilidade indica.

# %%
check(8, globals())

# %% [markdown] lang="en"
# ## In mlxgpt
#
# [`mlxgpt/inference/sampling.py`](../../../mlxgpt/inference/sampling.py) has the same filters and the same
# inverse transform, as one compiled function, and three things more:
#
# - Each text has its own random key (`categorical` takes keys [B, 2]), so that a text does not depend on the
#   others of its batch.
# - *Min-p* (Nguyen et al., 2024) keeps tokens at least p times as likely as the most likely one.
# - The *repetition penalty* (Keskar et al., 2019) makes tokens that have already occurred less likely.
#
# On the command line: `mlxgpt generate "ROMEO:" --temperature 0.7 --top-p 0.9 --seed 1`; the other options
# are `--top-k`, `--min-p` and `--repetition-penalty`. There, temperature 0 is allowed: it takes the argmax
# instead of dividing.
#
# ## Exercises
#
# Write `filter_logits`, `sample` and `generate` to your own `my_gpt.py`, then run `mlxgpt learn check 8`.
#
# 1. Two tokens have the probabilities 0.8 and 0.2. What are they at temperature 2?
#
# <details><summary>Answer</summary>
#
# The square roots, normalized: 0.894 and 0.447, divided by their sum 1.342, are 0.667 and 0.333. The ratio 4
# to 1 has become 2 to 1.
# </details>
#
# 2. Does it matter whether the temperature is applied before or after top-p? And top-k?
#
# <details><summary>Answer</summary>
#
# For top-p, yes: the temperature changes the total of the likely tokens, so a different number of tokens
# reaches p. For top-k, no: the order stays the same.
# </details>
#
# 3. `sample` draws one uniform number for each row. What if all rows shared one?
#
# <details><summary>Answer</summary>
#
# Each row alone would still get its tokens as often as their probability says. But rows with the same prompt
# would give the same text, however many samples you ask for.
# </details>

# %% [markdown] lang="pt"
# ## No mlxgpt
#
# [`mlxgpt/inference/sampling.py`](../../../mlxgpt/inference/sampling.py) tem os mesmos filtros e a mesma
# transformada inversa, numa só função compilada, e três coisas a mais:
#
# - Cada texto tem a sua própria chave aleatória (`categorical` recebe chaves [B, 2]); assim, um texto não
#   depende dos outros do batch.
# - O *min-p* (Nguyen et al., 2024) mantém os tokens pelo menos p vezes tão prováveis quanto o mais provável.
# - A penalidade de repetição (*repetition penalty*, Keskar et al., 2019) torna menos prováveis os tokens que
#   já apareceram.
#
# Na linha de comando: `mlxgpt generate "ROMEO:" --temperature 0.7 --top-p 0.9 --seed 1`; as outras opções são
# `--top-k`, `--min-p` e `--repetition-penalty`. Lá, a temperatura 0 é permitida: em vez de dividir, ele pega
# o argmax.
#
# ## Exercícios
#
# Escreva `filter_logits`, `sample` e `generate` no seu próprio `my_gpt.py` e rode `mlxgpt learn check 8`.
#
# 1. Dois tokens têm probabilidades 0,8 e 0,2. Quanto elas valem com temperatura 2?
#
# <details><summary>Resposta</summary>
#
# As raízes quadradas, normalizadas: 0,894 e 0,447, divididas pela soma 1,342, dão 0,667 e 0,333. A razão de 4
# para 1 passou a ser de 2 para 1.
# </details>
#
# 2. Faz diferença aplicar a temperatura antes ou depois do top-p? E do top-k?
#
# <details><summary>Resposta</summary>
#
# No top-p, faz: a temperatura muda o total dos tokens prováveis, e outro número deles alcança p. No top-k,
# não: a ordem continua a mesma.
# </details>
#
# 3. `sample` sorteia um número uniforme para cada linha. E se todas as linhas usassem o mesmo?
#
# <details><summary>Resposta</summary>
#
# Cada linha, sozinha, ainda receberia os tokens com a frequência certa. Mas linhas com o mesmo prompt dariam
# o mesmo texto, por mais amostras que você pedisse.
# </details>
