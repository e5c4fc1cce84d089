# %% [markdown] lang="en"
# # 10. Tier 2: BPE and scaling
#
# **What changes from 65 characters to stories?**
#
# The model stays the same: Tier 2 is `gpt` with other numbers. Two things are new. Its tokens are no longer
# characters but frequent pieces of text, so that 256 tokens reach four times as far back as 256 characters.
# And it is so large that you cannot just try ten sizes: you need to predict from small models what a large
# one will do.
#
# | | Tier 1 | Tier 2 |
# | --- | --- | --- |
# | text | Tiny Shakespeare, 1.1 MB | TinyStories (Eldan and Li, 2023), 2.1M stories |
# | vocabulary | 65 characters | 4,096 tokens of a byte-level BPE |
# | context | 128 tokens | 256 tokens |
# | layers, width | 4, 144 | 6, 384 |
# | parameters | 1.0M | 12.3M |

# %% [markdown] lang="pt"
# # 10. Tier 2: BPE e escala
#
# **O que muda de 65 caracteres para histórias inteiras?**
#
# O modelo continua o mesmo: o Tier 2 é o `gpt` com outros números. As novidades são duas. Os tokens deixam de
# ser caracteres e passam a ser pedaços frequentes de texto, de modo que 256 tokens alcançam quatro vezes mais
# longe que 256 caracteres. E ele é grande demais para você experimentar dez tamanhos: é preciso prever, a
# partir de modelos pequenos, o que um grande vai fazer.
#
# | | Tier 1 | Tier 2 |
# | --- | --- | --- |
# | texto | Tiny Shakespeare, 1,1 MB | TinyStories (Eldan e Li, 2023), 2,1 milhões de histórias |
# | vocabulário | 65 caracteres | 4.096 tokens de um BPE em bytes |
# | contexto | 128 tokens | 256 tokens |
# | camadas, largura | 4, 144 | 6, 384 |
# | parâmetros | 1,0 milhão | 12,3 milhões |

# %%
import math
from collections import Counter
from itertools import pairwise

import matplotlib.pyplot as plt
import mlx.core as mx
from course import CharTokenizer, check, expect, load_text
from my_gpt import bigram_loss, bigram_probabilities, count_bigrams, split_ids

# %% [markdown] lang="en"
# ## Start from bytes
#
# A vocabulary of characters knows only those of its text. UTF-8 writes any text with 256 different bytes: a
# plain letter is one byte, `ç` two, an emoji four. With the bytes as the first 256 tokens nothing is ever
# unknown (*byte-level*, Radford et al., 2019).

# %% [markdown] lang="pt"
# ## Começando pelos bytes
#
# Um vocabulário de caracteres só conhece os do próprio texto. O UTF-8 escreve qualquer texto com 256 bytes
# diferentes: uma letra sem acento é um byte, `ç` são dois, um emoji são quatro. Se os bytes são os primeiros
# 256 tokens, nada fica desconhecido (*byte-level*, Radford et al., 2019).

# %%
text = load_text()
tokenizer = CharTokenizer(text)
try:
    tokenizer.encode("coração 🙂")
except KeyError as error:
    print("the characters of the text do not include", error)
print("coração 🙂".encode(), "has", len("coração 🙂".encode()), "bytes")

# %% [markdown] lang="en"
# ## Merge the most frequent pair
#
# Bytes alone make texts long. *Byte pair encoding* (BPE; Gage, 1994; for language models Sennrich et al.,
# 2016) takes the pair of neighbors that is most frequent, makes it a new token, and starts over. In `she
# sells sea shells` a space before `s` is the only pair that occurs three times, so it comes first.

# %% [markdown] lang="pt"
# ## Juntar o par mais frequente
#
# Só com bytes, os textos ficam longos. O *byte pair encoding* (BPE; Gage, 1994; em modelos de linguagem,
# Sennrich et al., 2016) pega o par de vizinhos mais frequente, faz dele um token novo e recomeça. Em `she
# sells sea shells`, o espaço seguido de `s` é o único par que aparece três vezes, e por isso vem primeiro.


# %% tags=["my_gpt"]
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


# %% [markdown] lang="en"
# To encode another text, the merges are applied in the same order. A token's bytes are those of its two
# parts, so decoding is a table. One token may end in the middle of a character: `errors="replace"` then shows
# `�`.

# %% [markdown] lang="pt"
# Para codificar outro texto, as junções (*merges*) são aplicadas na mesma ordem. Os bytes de um token são os
# das suas duas partes; para decodificar, basta uma tabela. Um token pode acabar no meio de um caractere:
# nesse caso, `errors="replace"` mostra `�`.


# %% tags=["my_gpt"]
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


# %%
small = "she sells sea shells"
for n in range(4):
    merges = train_bpe(small, n)
    print([decode([token], merges) for token in encode(small, merges)])

merges = train_bpe(text[:20_000], 100)
for n in range(0, 100, 25):
    print(f"{n:2}:", [decode([256 + i], merges) for i in range(n, n + 10)])
ids = encode("coração 🙂", merges)
print(ids, decode(ids, merges))

# %% [markdown] lang="en"
# The first merges of Shakespeare are letters that often meet, `e` before a space, `th`. Later come words
# (`the`, `of` with its space) and pieces of names and titles (`itizen`). `coração 🙂` comes back, too, though
# the text has no `ç`: where no merge fits, bytes remain.
#
# ## Bits per byte
#
# Is a model with longer tokens better? Its loss per token does not answer that: a token of three letters is
# harder to guess than one letter. Compare what both must do, the same bytes:
#
#     bits per byte = loss per token / bytes per token / ln 2
#
# (ln 2 turns nats into bits.) Take the cheapest model, the bigrams of chapter 1, and let only the tokenizer
# change: 0 to 100 of the merges above, bigrams counted on 100,000 characters, loss on the 40,000 after them.
# The four lines of Camões show what the merges of one language do for another.

# %% [markdown] lang="pt"
# As primeiras junções de Shakespeare são letras que andam juntas: `e` antes de espaço, `th`. Depois vêm
# palavras (`the`, `of` com o espaço) e pedaços de nomes e títulos (`itizen`). `coração 🙂` também volta igual,
# embora o texto não tenha `ç`: onde nenhuma junção serve, ficam os bytes.
#
# ## Bits por byte
#
# Um modelo com tokens mais longos é melhor? A loss por token não responde: um token de três letras é mais
# difícil de adivinhar do que uma letra. Compare a tarefa comum, os mesmos bytes:
#
#     bits por byte = loss por token / bytes por token / ln 2
#
# (O ln 2 converte nats em bits.) Vamos usar o modelo mais barato, os bigramas do capítulo 1, e mudar só o
# tokenizador: de 0 a 100 das junções acima, bigramas contados em 100.000 caracteres, loss nos 40.000
# seguintes. Os quatro versos de Camões mostram o que as junções de uma língua fazem por outra.

# %%
camoes = (
    "As armas e os barões assinalados,\nQue da ocidental praia lusitana,\n"
    "Por mares nunca dantes navegados,\nPassaram ainda além da Taprobana,"
)
parts = [list(part.encode()) for part in (text[:100_000], text[100_000:140_000], camoes)]
n_bytes = [len(part) for part in parts]
lengths, losses, bits = [], [], []
for n in range(101):
    if n:
        parts = [merge_pair(part, merges[n - 1], 255 + n) for part in parts]
    lengths.append([b / len(part) for b, part in zip(n_bytes, parts, strict=True)])
    probabilities = bigram_probabilities(count_bigrams(mx.array(parts[0]), 256 + n))
    losses.append(bigram_loss(probabilities, mx.array(parts[1])).item())
    bits.append(losses[-1] / lengths[-1][1] / math.log(2))
figure, axes = plt.subplots(1, 3, figsize=(9, 3.6), layout="constrained")
axes[0].plot([row[1] for row in lengths], label="Shakespeare")
axes[0].plot([row[2] for row in lengths], label="Camões")
axes[0].set(xlabel="merges", ylabel="bytes per token")
axes[0].legend()
axes[1].plot(losses)
axes[1].set(xlabel="merges", ylabel="loss of bigrams, nats per token")
axes[2].plot(bits)
axes[2].set(xlabel="merges", ylabel="bits per byte")
plt.show()
for n, *expected in ((0, 1.0, 2.512, 3.624), (100, 1.636, 3.678, 3.244)):
    print(f"{n} merges: bytes per token, loss per token, bits per byte")
    for value, target in zip((lengths[n][1], losses[n], bits[n]), expected, strict=True):
        expect(value, target, 0.01)

# %% [markdown] lang="en"
# The loss per token rises from 2.51 to 3.68 nats, and yet the model becomes better: 3.62 to 3.24 bits per
# byte. Two tokens are now more text, so a bigram sees further. The last merges bring nothing: there are 356²
# pairs to count, and the text is short. Portuguese gains less (1.39 bytes per token): a tokenizer should be
# trained on the language that it is used for.
#
# ## The price of a vocabulary
#
# Each token needs a row of C weights in the embedding. For Tier 2's model (6 layers, C = 384), with the bytes
# per token that were measured on TinyStories ([`configs/tier2.toml`](../../../configs/tier2.toml)):

# %% [markdown] lang="pt"
# A loss por token sobe de 2,51 para 3,68 nats, e mesmo assim o modelo melhora: de 3,62 para 3,24 bits por
# byte. Dois tokens agora são mais texto, e o bigrama enxerga mais longe. As últimas junções não trazem nada:
# há 356² pares para contar, e o texto é curto. O português ganha menos (1,39 byte por token): um tokenizador
# deve ser treinado na língua em que vai ser usado.
#
# ## O preço de um vocabulário
#
# Cada token precisa de uma linha de C pesos no embedding. Para o modelo do Tier 2 (6 camadas, C = 384), com
# os bytes por token medidos no TinyStories ([`configs/tier2.toml`](../../../configs/tier2.toml)):

# %%
n_layer, n_embd, block_size = 6, 384, 256
rest = 12 * n_layer * n_embd**2 + block_size * n_embd + (2 * n_layer + 1) * n_embd
for vocab_size, bytes_per_token in ((256, 1.0), (4096, 3.95), (50257, 4.06)):
    embedding = vocab_size * n_embd
    print(
        f"V = {vocab_size:6,}: {embedding / 1e6:5.1f}M + {rest / 1e6:.1f}M parameters, "
        f"{bytes_per_token} bytes per token"
    )

# %% [markdown] lang="en"
# 4,096 tokens make a text four times shorter than bytes, for 1.6M parameters. GPT-2's 50,257 would add
# another 17.7M, more than the rest of the model, for texts only 3% shorter in tokens on these simple stories.
#
# ## A law of scaling
#
# Train with more text, or a larger model, and the loss falls ever more slowly. A *power law* describes that:
# loss = a · size^-b. In logarithms it is a straight line, ln loss = ln a - b · ln size, so a linear fit
# through a few small runs gives a and b, and the line can be continued.

# %% [markdown] lang="pt"
# Com 4.096 tokens, um texto fica quatro vezes mais curto que em bytes, por 1,6 milhão de parâmetros. Os
# 50.257 do GPT-2 acrescentariam mais 17,7 milhões, mais que o resto do modelo, para textos só 3% mais curtos
# em tokens nessas histórias simples.
#
# ## Uma lei de escala
#
# Com mais texto, ou com um modelo maior, a loss cai cada vez mais devagar. Uma *lei de potência* (*power
# law*) descreve isso: loss = a · tamanho^-b. Em logaritmos é uma reta, ln loss = ln a - b · ln tamanho.
# Assim, um ajuste linear com poucos treinos pequenos dá a e b, e a reta pode ser prolongada.


# %% tags=["my_gpt"]
def fit_power_law(sizes, losses):
    """The a and b of loss = a * size ** -b: a straight line through the logarithms."""
    x, y = [math.log(n) for n in sizes], [math.log(loss) for loss in losses]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((p - mean_x) * (q - mean_y) for p, q in zip(x, y, strict=True)) / sum(
        (p - mean_x) ** 2 for p in x
    )
    return math.exp(mean_y - slope * mean_x), -slope


# %% [markdown] lang="en"
# Test it where measuring is cheap: bigrams of characters, counted on 1,000 to 1,000,000 of them (mean of 20
# places in the text). Fit the first four, predict the last.

# %% [markdown] lang="pt"
# Vamos testá-la onde medir custa pouco: bigramas de caracteres, contados em 1.000 a 1.000.000 deles (média de
# 20 lugares do texto). O ajuste usa os quatro primeiros pontos; a previsão é a do último.

# %%
train, val = split_ids(tokenizer.encode(text))
sizes, losses = [1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000], []
for size in sizes:
    starts = mx.random.randint(0, len(train) - size, (20,), key=mx.random.key(0))
    windows = [train[start : start + size] for start in starts.tolist()]
    tables = [bigram_probabilities(count_bigrams(w, tokenizer.vocab_size)) for w in windows]
    losses.append(sum(bigram_loss(table, val).item() for table in tables) / 20)
a, b = fit_power_law(sizes[:4], losses[:4])
counts = count_bigrams(val, tokenizer.vocab_size)
best = bigram_loss(counts / mx.maximum(counts.sum(axis=1, keepdims=True), 1), val)
print("measured; predicted by the straight line; the best table for the validation text itself:")
expect(losses[-1], 2.483, 0.01)
expect(a * sizes[-1] ** -b, 2.06, 0.03)
expect(best, 2.373, 0.01)

# %% [markdown] lang="en"
# Far off, and impossible (2.06): even the table counted on the validation text itself, which no bigram model
# can beat there, has 2.37. The loss has a limit E, and only what is above it falls as a power law: loss = E +
# a · size^-b. Which E? The one with which the same four points fit best:

# %% [markdown] lang="pt"
# Longe da verdade, e impossível (2,06): mesmo a tabela contada no próprio texto de validação, que nenhum
# modelo de bigramas supera ali, tem 2,37. A loss tem um limite E, e só o que está acima dele cai como lei de
# potência: loss = E + a · tamanho^-b. Qual E? Aquele com que os mesmos quatro pontos se ajustam melhor:


# %%
def fit_with_limit(sizes, losses):
    fits = []
    for step in range(200):
        E = min(losses) * step / 200
        a, b = fit_power_law(sizes, [loss - E for loss in losses])
        error = sum((E + a * n**-b - y) ** 2 for n, y in zip(sizes, losses, strict=True))
        fits.append((error, E, a, b))
    return min(fits)[1:]


E, a_E, b_E = fit_with_limit(sizes[:4], losses[:4])
expect(E + a_E * sizes[-1] ** -b_E, 2.50, 0.03)

# docs/scaling.md: million parameters, bits per byte, each after 0.74M tokens of stories
parameters = [0.31, 0.36, 0.93, 1.67, 2.61]
measured = [1.2600, 1.2260, 1.0838, 1.0395, 1.0204]
A, alpha = fit_power_law(parameters[:4], measured[:4])
print("\n2.61M parameters, predicted from the four smaller models:")
expect(A * parameters[-1] ** -alpha, 0.977, 0.001)

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
axes[0].loglog(sizes, losses, "ko", label="measured")
axes[0].loglog(sizes, [a * n**-b for n in sizes], "--", label="a · size^-b")
axes[0].loglog(sizes, [E + a_E * n**-b_E for n in sizes], label="E + a · size^-b")
axes[0].set(xlabel="characters counted", ylabel="loss of bigrams, nats")
axes[1].loglog(parameters, measured, "ko", label="measured")
axes[1].loglog(parameters, [A * n**-alpha for n in parameters], "--", label="a · size^-b")
axes[1].set(xlabel="parameters, millions", ylabel="bits per byte")
axes[0].set_yticks((2.0, 2.5, 3.0), (2.0, 2.5, 3.0))
axes[1].set_xticks((0.3, 0.6, 1.2, 2.4), (0.3, 0.6, 1.2, 2.4))
axes[1].set_yticks((1.0, 1.1, 1.2), (1.0, 1.1, 1.2))
for axis in axes:
    axis.minorticks_off()
    axis.legend()
plt.show()

# %% [markdown] lang="en"
# Left: both fits use the first four points. The straight line continues to 2.06, the curve with E to about
# 2.50; measured are 2.48. In between it is up to 0.03 too low: no law is exact. Right: GPTs of mlxgpt,
# measured for [docs/scaling.md](../../scaling.md). The line through the first four predicts 0.977 for the
# fifth; measured is 1.020. Here, too, the points bend away from the line: with only 0.74M tokens, a part of
# the loss remains that no size removes.
#
# What such a fit can do: say whether more is worth it, and about how much, a step beyond what was measured.
# What it cannot: be continued for long. Without E it predicts that the loss falls to zero. It also depends on
# one size only, and a larger model needs more text as well. Hoffmann et al. (2022) fit both, N parameters and
# D tokens:
#
#     loss = E + A / N^α + B / D^β
#
# In docs/scaling.md this law predicts 1.030 for the fifth model, with a 95% interval of 1.000 to 1.060.

# %% [markdown] lang="pt"
# À esquerda, os dois ajustes usam os quatro primeiros pontos. A reta continua até 2,06; a curva com E, até
# cerca de 2,50; o medido é 2,48. No meio, ela fica até 0,03 abaixo: nenhuma lei é exata. À direita, GPTs do
# mlxgpt, medidos para [docs/scaling.md](../../scaling.md). A reta pelos quatro primeiros prevê 0,977 para o
# quinto, que chegou a 1,020. Aqui também os pontos se afastam da reta: com só 0,74 milhão de tokens, sobra
# uma parte da loss que nenhum tamanho elimina.
#
# O que esse ajuste pode: dizer se mais vale a pena, e mais ou menos quanto, um passo além do que foi medido.
# O que não pode: ser prolongado para muito longe. Sem E, ele prevê que a loss cai até zero. Além disso,
# depende de um só tamanho, e um modelo maior também precisa de mais texto. Hoffmann et al. (2022) ajustam os
# dois, N parâmetros e D tokens:
#
#     loss = E + A / N^α + B / D^β
#
# Em docs/scaling.md, essa lei prevê 1,030 para o quinto modelo, com intervalo de 95% de 1,000 a 1,060.

# %% [markdown] lang="en"
# ## Tier 2 by commands
#
# From here on training takes minutes to hours, so it is done in a terminal:
#
# ```
# mlxgpt train --tier 2                        # TinyStories, BPE of 4,096, 12.3M parameters
# mlxgpt train --config tier2-pt               # the same model on the Portuguese Wikipedia
# mlxgpt train --source my.txt --max-minutes 30    # your text; the size is chosen for the time
# mlxgpt scale --budget 2h --source my.txt     # the scaling law of your text on your machine
# ```
#
# The first two download their text. Neither has been trained to its end yet; for an M1, 5.6 hours are
# estimated, from its peak speed, for Tier 2 ([`configs/tier2.toml`](../../../configs/tier2.toml),
# [`configs/tier2-pt.toml`](../../../configs/tier2-pt.toml)).
#
# ## Check
#
# Your BPE gives any text back, and encodes as tiktoken does with the same merges; your fit finds a known law.

# %% [markdown] lang="pt"
# ## O Tier 2 por comandos
#
# Daqui em diante, treinar leva de minutos a horas, e por isso se faz num terminal:
#
# ```
# mlxgpt train --tier 2                        # TinyStories, BPE de 4.096, 12,3 milhões de parâmetros
# mlxgpt train --config tier2-pt               # o mesmo modelo na Wikipédia em português
# mlxgpt train --source meu.txt --max-minutes 30   # o seu texto; o tamanho é escolhido pelo tempo
# mlxgpt scale --budget 2h --source meu.txt    # a lei de escala do seu texto na sua máquina
# ```
#
# Os dois primeiros baixam o texto. Nenhum deles foi treinado até o fim ainda; para o Tier 2, a estimativa num
# M1, pela velocidade de pico, é de 5,6 horas ([`configs/tier2.toml`](../../../configs/tier2.toml),
# [`configs/tier2-pt.toml`](../../../configs/tier2-pt.toml)).
#
# ## Verificação
#
# O seu BPE devolve qualquer texto e codifica como o tiktoken com as mesmas junções; o seu ajuste encontra uma
# lei conhecida.

# %%
check(10, globals())

# %% [markdown] lang="en"
# ## In mlxgpt
#
# [`mlxgpt/data/tokenizers/bpe.py`](../../../mlxgpt/data/tokenizers/bpe.py) first splits the text with GPT-2's
# pattern into words, numbers, and punctuation, and no merge crosses a split. That avoids tokens such as a
# speaker's name with its line break, which your BPE makes, and each different word is processed once per
# merge, instead of the whole text. The library `tokenizers` trains, `tiktoken` encodes, both in Rust; one
# more id marks the end of a document.
#
# [`mlxgpt/experiments/scaling.py`](../../../mlxgpt/experiments/scaling.py) trains four sizes for three
# lengths each, by default with three seeds, fits E, A, α, B and β with their errors, and tests the law on a
# fifth, larger size. [`mlxgpt/training/scaling_law.py`](../../../mlxgpt/training/scaling_law.py) stores it,
# if the test succeeds, so that `mlxgpt train --max-minutes` can choose the size by it.
#
# ## Exercises
#
# Write `merge_pair`, `train_bpe`, `encode`, `decode` and `fit_power_law` to your own `my_gpt.py`, then run
# `mlxgpt learn check 10`.
#
# 1. A model has a loss of 2.447 nats per token and 3.115 bytes per token. One of characters has 1.47 nats per
#    character, on the same English text. Which is better?
#
# <details><summary>Answer</summary>
#
# 2.447 / 3.115 / ln 2 = 1.133 bits per byte against 1.47 / 1 / ln 2 = 2.12: the first, by far. (English
# characters are one byte each.)
# </details>
#
# 2. Why can the merges not be applied in any order?
#
# <details><summary>Answer</summary>
#
# Later merges consist of the results of earlier ones, and pairs overlap: in `the`, merging `he` first takes
# the `h` from `th`. The model has only seen the tokens that result from the order of training.
# </details>
#
# 3. loss = a · N^-b with b = 0.1. How much larger must the model be to halve the loss? Why should you not
# believe it?
#
# <details><summary>Answer</summary>
#
# 2^(1 / 0.1) = 1,024 times. That is three powers of ten beyond the measured points; and the law lacks E, and
# the tokens that such a model would need.
# </details>

# %% [markdown] lang="pt"
# ## No mlxgpt
#
# [`mlxgpt/data/tokenizers/bpe.py`](../../../mlxgpt/data/tokenizers/bpe.py) primeiro divide o texto com o
# padrão do GPT-2 em palavras, números e pontuação, e nenhuma junção atravessa uma divisão. Isso evita tokens
# como o nome de um personagem com a quebra de linha, que o seu BPE faz, e a cada junção se percorre cada
# palavra diferente uma vez só, em vez do texto inteiro. A biblioteca `tokenizers` treina e a `tiktoken`
# codifica, ambas em Rust; um id a mais marca o fim de um documento.
#
# [`mlxgpt/experiments/scaling.py`](../../../mlxgpt/experiments/scaling.py) treina quatro tamanhos por três
# durações cada um, por padrão com três seeds, ajusta E, A, α, B e β com os seus erros e testa a lei num
# quinto tamanho, maior. [`mlxgpt/training/scaling_law.py`](../../../mlxgpt/training/scaling_law.py) guarda a
# lei, se o teste der certo, para que `mlxgpt train --max-minutes` possa escolher o tamanho por ela.
#
# ## Exercícios
#
# Escreva `merge_pair`, `train_bpe`, `encode`, `decode` e `fit_power_law` no seu próprio `my_gpt.py` e rode
# `mlxgpt learn check 10`.
#
# 1. Um modelo tem loss de 2,447 nats por token e 3,115 bytes por token. Outro, de caracteres, tem 1,47 nat
# por caractere no mesmo texto em inglês. Qual é melhor?
#
# <details><summary>Resposta</summary>
#
# 2,447 / 3,115 / ln 2 = 1,133 bit por byte contra 1,47 / 1 / ln 2 = 2,12: o primeiro, de longe. (Em inglês,
# cada caractere é um byte.)
# </details>
#
# 2. Por que as junções não podem ser aplicadas em qualquer ordem?
#
# <details><summary>Resposta</summary>
#
# As posteriores são feitas dos resultados das anteriores, e os pares se sobrepõem: em `the`, juntar `he`
# primeiro tira o `h` de `th`. O modelo só viu os tokens que resultam da ordem do treino.
# </details>
#
# 3. loss = a · N^-b, com b = 0,1. Quantas vezes maior o modelo precisa ser para a loss cair à metade? Por que
# não acreditar nisso?
#
# <details><summary>Resposta</summary>
#
# 2^(1 / 0,1) = 1.024 vezes. São três potências de dez além dos pontos medidos; faltam na lei o E e os tokens
# de que esse modelo precisaria.
# </details>

# %% [markdown] lang="en"
# ## What you have now
#
# Ten chapters ago there was a table of counts. `my_gpt.py` is now a whole GPT: the loss and its gradient,
# attention, blocks, the stack with GPT-2's names, AdamW, the parts of the training loop, sampling, a KV
# cache, and a tokenizer. You have written each line, and each was checked against a library that trains the
# same model.
#
# Where to go on:
#
# - [Find the fault](11-find-the-fault.ipynb): twelve changes of `my_gpt.py` that train and are wrong.
# - [The tutorial](../../tutorial.md): from your own text to a story, with checkpoints, plots and export.
# - [Fine-tuning](../../fine-tuning.md): start from trained weights, such as GPT-2's, instead of random ones.
# - The code of mlxgpt itself. It is the same model, with what makes it fast and robust.

# %% [markdown] lang="pt"
# ## O que você tem agora
#
# Dez capítulos atrás, havia uma tabela de contagens. Agora o `my_gpt.py` é um GPT inteiro: a loss e o
# gradiente dela, a atenção, os blocos, a pilha com os nomes do GPT-2, o AdamW, as peças do laço de treino, a
# amostragem, um KV cache e um tokenizador. Você escreveu cada linha, e cada uma foi conferida com uma
# biblioteca que treina o mesmo modelo.
#
# Para onde ir agora:
#
# - [Encontre a falha](11-find-the-fault.ipynb): doze mudanças em `my_gpt.py` que treinam e estão erradas.
# - [O tutorial](../../tutorial.md) (em inglês): do seu próprio texto até uma história, com checkpoints,
#   gráficos e exportação.
# - [Fine-tuning](../../fine-tuning.md) (em inglês): partir de pesos treinados, como os do GPT-2, e não
#   aleatórios.
# - O código do próprio mlxgpt. É o mesmo modelo, com o que o torna rápido e robusto.
