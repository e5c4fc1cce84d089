# %% [markdown] lang="en"
# # 1. Counting bigrams
#
# **How much can be known about the next letter from the one before?**
#
# A language model gives each possible next token a probability. The simplest one that deserves the name looks
# at a single token and has learned by counting: how often did each character follow this one? No neuron is
# needed for that. But everything a GPT does later is already here: ids, probabilities, a loss, sampling.

# %% [markdown] lang="pt"
# # 1. Contando bigramas
#
# **Quanto dá para saber sobre a próxima letra olhando só para a anterior?**
#
# Um modelo de linguagem dá uma probabilidade a cada token que pode vir em seguida. O mais simples que merece
# esse nome olha para um único token e aprendeu contando: quantas vezes cada caractere veio depois deste? Para
# isso não é preciso nenhum neurônio. Mas tudo o que um GPT fará mais tarde já está aqui: ids, probabilidades,
# uma loss e amostragem (*sampling*).

# %%
import math

import matplotlib.pyplot as plt
import mlx.core as mx
from course import CharTokenizer, check, expect, load_text

# %% [markdown] lang="en"
# ## Text as ids
#
# The text is Tiny Shakespeare: about a million characters from Shakespeare's plays (Karpathy, 2015). Our
# tokens are its characters, numbered in the order of Python's `sorted`. V is the size of the vocabulary.

# %% [markdown] lang="pt"
# ## O texto em ids
#
# O texto é o Tiny Shakespeare: cerca de um milhão de caracteres das peças de Shakespeare (Karpathy, 2015). Os
# nossos tokens são os caracteres dele, numerados na ordem do `sorted` do Python. V é o tamanho do
# vocabulário.

# %%
text = load_text()
tokenizer = CharTokenizer(text)
V = tokenizer.vocab_size
ids = tokenizer.encode(text)  # [N]
print(f"{len(text):,} characters, V = {V}:", "".join(tokenizer.characters))
print(repr(text[:14]), "->", ids[:14].tolist())

# %% [markdown] lang="en"
# ## Counts
#
# A *bigram* is a pair of neighbors. The text `hello` has four: `he`, `el`, `ll`, `lo`. We want a table
# [V, V] whose row is the first character of the pair, and whose column is the second. To count a million
# pairs in one operation, give each pair (a, b) the number a · V + b, its place in the table read row by row,
# and add 1 at each number.

# %% [markdown] lang="pt"
# ## Contagens
#
# Um *bigrama* é um par de vizinhos. O texto `hello` tem quatro: `he`, `el`, `ll`, `lo`. Queremos uma tabela
# [V, V] em que a linha é o primeiro caractere do par e a coluna é o segundo. Para contar um milhão de pares
# numa única operação, damos a cada par (a, b) o número a · V + b, que é a posição dele na tabela lida linha
# por linha, e somamos 1 em cada número.


# %% tags=["my_gpt"]
def count_bigrams(ids, vocab_size):
    """How often each token follows each: ids [N] -> counts [V, V]."""
    pairs = ids[:-1] * vocab_size + ids[1:]
    return mx.zeros(vocab_size**2).at[pairs].add(1).reshape(vocab_size, vocab_size)


# %%
print(count_bigrams(mx.array([1, 0, 2, 2, 3]), 4))  # hello, with e = 0, h = 1, l = 2, o = 3
counts = count_bigrams(ids, V)
t, h, k = tokenizer.encode("thk").tolist()
print(f"th: {counts[t, h].item():,.0f} times; tk: {counts[t, k].item():.0f}")
print(f"{(counts == 0).sum().item():,} of {V * V:,} pairs never occur")

# %% [markdown] lang="en"
# ## Probabilities
#
# Divide each row by its sum, and it holds the probabilities of the next character. One thing before that:
# most pairs never occur in this text. A count of 0 would mean "impossible", and a single `catkin` in another
# text would make that whole text impossible. So we count each pair once more than we saw it. This *add-one
# smoothing* (Laplace) hardly changes a row with thousands of counts. A rare character pays more: after `q`
# comes `u` in all of 609 cases, and its probability is now 610 / (609 + 65) = 0.905.

# %% [markdown] lang="pt"
# ## Probabilidades
#
# Se dividirmos cada linha pela sua soma, ela passa a conter as probabilidades do próximo caractere. Só uma
# coisa antes: a maioria dos pares nunca aparece neste texto. Uma contagem 0 significaria "impossível", e um
# único `catkin` em outro texto tornaria esse texto inteiro impossível. Por isso contamos cada par uma vez a
# mais do que o vimos. Essa suavização de Laplace (*add-one smoothing*) quase não muda uma linha com milhares
# de contagens. Um caractere raro paga mais caro: depois de `q` vem `u` em todos os 609 casos, e a
# probabilidade dele passa a ser 610 / (609 + 65) = 0,905.


# %% tags=["my_gpt"]
def bigram_probabilities(counts):
    """Probability of each next token: counts [V, V] -> [V, V], rows with sum 1."""
    counts = counts + 1
    return counts / counts.sum(axis=1, keepdims=True)


# %%
probabilities = bigram_probabilities(counts)
for character in "tq":
    row = probabilities[tokenizer.encode(character)[0]]  # [V]
    best = mx.argsort(-row)[:4].tolist()
    print(f"after {character}:", {tokenizer.characters[n]: round(row[n].item(), 3) for n in best})
frequent = mx.argsort(-counts.sum(axis=1))[:28]
labels = [{" ": "␣", "\n": "↵"}.get(c, c) for c in tokenizer.decode(frequent)]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
image = axes[0].imshow(probabilities[frequent][:, frequent], cmap="Blues", vmin=0, vmax=0.5)
axes[0].set_xticks(range(28), labels, fontsize=7)
axes[0].set_yticks(range(28), labels, fontsize=7)
axes[0].set(xlabel="next character", ylabel="character")
figure.colorbar(image, ax=axes[0], label="probability", extend="max")
axes[1].bar(range(28), probabilities[h, frequent])
axes[1].axhline(1 / V, color="gray", linestyle="--")
axes[1].set_xticks(range(28), labels, fontsize=7)
axes[1].set(xlabel="next character, after h", ylabel="probability")
plt.show()

# %% [markdown] lang="en"
# The 28 most frequent characters, from left to right and from top to bottom (␣ is the space, ↵ the end of a
# line). The rows differ a lot: after a comma comes a space or the end of the line, after `v` nearly always an
# `e` or an `i`, after `h` an `e`, another vowel or a space (on the right; the dashed line is 1/65, if all
# characters were equally likely). Each dark cell is something that the model knows.
#
# ## A text from the table
#
# To *sample* is to draw the next character with the probabilities of its row, then continue from the one that
# was drawn. Shannon did this in 1948, with a book and a random page instead of a table. For comparison, first
# a text from a table that knows nothing.

# %% [markdown] lang="pt"
# São os 28 caracteres mais frequentes, da esquerda para a direita e de cima para baixo (␣ é o espaço, ↵ o fim
# de linha). As linhas são bem diferentes entre si: depois de uma vírgula vem um espaço ou o fim da linha;
# depois de `v`, quase sempre um `e` ou um `i`; depois de `h`, um `e`, outra vogal ou um espaço (à direita; a
# linha tracejada é 1/65, como seria se todos os caracteres fossem igualmente prováveis). Cada célula escura é
# alguma coisa que o modelo sabe.
#
# ## Um texto tirado da tabela
#
# Amostrar é sortear o próximo caractere com as probabilidades da linha do atual e continuar a partir do que
# saiu. Shannon fez isso em 1948, abrindo um livro em páginas ao acaso no lugar da tabela. Para comparar,
# primeiro um texto de uma tabela que não sabe nada.


# %%
def sample_text(probabilities, length, key):
    token, tokens = tokenizer.encode("\n")[0], []
    for token_key in mx.random.split(key, length):
        token = mx.random.categorical(mx.log(probabilities[token]), key=token_key)
        tokens.append(token)
    return tokenizer.decode(tokens)


uniform = mx.full((V, V), 1 / V)
print(repr(sample_text(uniform, 80, mx.random.key(0))))
print(sample_text(probabilities, 300, mx.random.key(1)))

# %% [markdown] lang="en"
# Not English, but no longer noise: vowels and consonants alternate, words have a plausible length, capitals
# mostly start a line or a word. Whatever needs more than one character of memory is missing: words, names,
# sentences.
#
# ## The loss
#
# How good is the model, as one number? The better it is, the higher the probability p that it gave to what
# actually came next. The *loss* of one character is **-ln p**: 0 if the model was certain and right, and
# infinite if it held the truth to be impossible. Why the logarithm? The probability of a text is the product
# of those of its characters: a million factors below 1, a product too small for any float. The logarithm
# turns it into a sum, and the mean of that sum is a figure per character. Its unit with ln is the *nat*: a
# probability of 1/e costs one nat. A bit is the same with log₂, so 1 bit = ln 2 = 0.693 nats.

# %% [markdown] lang="pt"
# Não é inglês, mas já não é ruído: vogais e consoantes se alternam, as palavras têm um tamanho plausível, as
# maiúsculas quase sempre começam uma linha ou uma palavra. Falta tudo o que exige mais de um caractere de
# memória: palavras, nomes, frases.
#
# ## A loss
#
# Quão bom é o modelo, em um só número? Quanto melhor ele for, maior a probabilidade p que deu ao que de fato
# veio. A *loss* de um caractere é **-ln p**: 0 se o modelo tinha certeza e acertou, infinita se considerava
# impossível o que aconteceu. Por que o logaritmo? A probabilidade de um texto é o produto das probabilidades
# dos seus caracteres: um milhão de fatores menores que 1, um valor pequeno demais para qualquer float. O
# logaritmo transforma o produto em soma, e a média dessa soma é um valor por caractere. Com ln, a unidade é o
# *nat*: uma probabilidade de 1/e custa um nat. O bit é o mesmo com log₂; logo, 1 bit = ln 2 = 0,693 nats.


# %% tags=["my_gpt"]
def bigram_loss(probabilities, ids):
    """Mean of -ln(probability) of the tokens that follow, in nats."""
    return -mx.log(probabilities[ids[:-1], ids[1:]]).mean()


# %%
for p in (1.0, 0.5, 1 / math.e, 1 / V):
    print(f"p = {p:.3f}: {math.log(1 / p):.3f} nats, {math.log2(1 / p):.3f} bits")
shares = counts.sum(axis=0) / counts.sum()  # [V]: how frequent each character is
expect(math.log(V), 4.174, 0.001)  # all characters equally likely
expect(-(shares * mx.log(shares)).sum(), 3.313, 0.001)  # known: how frequent each one is
loss = bigram_loss(probabilities, ids)
expect(loss, 2.455, 0.001)  # known: the character before
print(f"perplexity: {V}, {math.exp(3.313):.1f}, {mx.exp(loss).item():.1f}")

# %% [markdown] lang="en"
# Three models, from one that knows nothing to one that knows one character:
#
# | the model knows | loss, nats | perplexity |
# |---|---|---|
# | nothing: p = 1/V | ln 65 = 4.174 | 65 |
# | how frequent each character is (*unigrams*) | 3.313 | 27.5 |
# | the character before (*bigrams*) | 2.455 | 11.6 |
#
# *Perplexity* is e^loss, and makes nats tangible: the bigram model is as uncertain as if it had to guess
# among 11.6 equally likely characters, instead of 65. That answers the question: one character is worth
# 4.174 - 2.455 = 1.72 nats, about half of it for merely knowing which characters are frequent.
#
# Remember **ln V**: a model that knows nothing gives each token 1/V, so its loss is ln V. This is where
# training should start: a table of zeros in the next chapter has exactly this loss, and a new GPT in chapter
# 5 nearly so. If the first loss of a training run is far above it, the model is wrong with confidence, and
# something is broken.
#
# ## Bits per byte
#
# A loss per token cannot be compared between tokenizers: the longer the tokens, the more there is to predict
# in each. So one counts the bits of the whole text, and divides them by its bytes, which do not depend on the
# tokenizer. Here each character is one byte.

# %% [markdown] lang="pt"
# Três modelos, do que não sabe nada ao que conhece um caractere:
#
# | o modelo conhece | loss, nats | perplexidade |
# |---|---|---|
# | nada: p = 1/V | ln 65 = 4,174 | 65 |
# | a frequência de cada caractere (*unigramas*) | 3,313 | 27,5 |
# | o caractere anterior (*bigramas*) | 2,455 | 11,6 |
#
# A perplexidade (*perplexity*) é e^loss e dá um sentido concreto aos nats: a incerteza do modelo de bigramas
# é a de quem precisa adivinhar entre 11,6 caracteres igualmente prováveis, em vez de 65. Está respondida a
# pergunta: um caractere vale 4,174 - 2,455 = 1,72 nats, cerca de metade só por saber quais caracteres são
# frequentes.
#
# Guarde o **ln V**: um modelo que não sabe nada dá 1/V a cada token, e a sua loss é ln V. É daí que o treino
# deve partir: a tabela de zeros do próximo capítulo tem exatamente essa loss, e o GPT novo do capítulo 5,
# quase. Se a primeira loss de um treino fica muito acima disso, o modelo erra com convicção, e alguma coisa
# está quebrada.
#
# ## Bits por byte
#
# Não dá para comparar a loss por token de dois tokenizadores: quem tem tokens mais longos precisa prever mais
# em cada um. Por isso contamos os bits do texto inteiro e dividimos pelos bytes dele, que não dependem do
# tokenizador. Aqui, cada caractere ocupa um byte.

# %%
bits = loss.item() * (len(ids) - 1) / math.log(2)
expect(bits / len(text.encode()), 3.542, 0.002)

# %% [markdown] lang="en"
# ## Check
#
# Your functions count every pair, give no pair a probability of 0, and find ln V for equal probabilities.

# %% [markdown] lang="pt"
# ## Verificação
#
# As suas funções contam todos os pares, não dão probabilidade 0 a nenhum e encontram ln V quando as
# probabilidades são iguais.

# %%
check(1, globals())

# %% [markdown] lang="en"
# ## In mlxgpt
#
# The tokenizer is [`mlxgpt/data/tokenizers/char.py`](../../../mlxgpt/data/tokenizers/char.py), with the same
# ids: characters in the order of their code points. It looks up all characters of a text in one NumPy call
# instead of one by one, reports characters that it does not know, and can have one token more, for the end of
# a document.
#
# The loss is computed in [`mlxgpt/evaluation/loss.py`](../../../mlxgpt/evaluation/loss.py): the total of all
# tokens, in nats, divided by the number of tokens (`loss`), and the same total divided by ln 2 and by the
# number of UTF-8 bytes of the predicted tokens (`bits_per_byte`). `mlxgpt eval` prints both, and the
# perplexity.
#
# ## Exercises
#
# Write the three functions to your own `my_gpt.py`, then run `mlxgpt learn check 1`.
#
# 1. We measured the loss on the text that we counted. Count only the first 90%, and measure on the rest. What
#    changes, and what would happen without the `+ 1`?
#
# <details><summary>Answer</summary>
#
# 2.482 instead of 2.455, a little worse: the end of the file is from other plays, and the counts fit the text
# they were taken from a little better than any other. In the last 10%, 23 different pairs occur that are not
# in the first 90%, 187 times in all; without `+ 1`, any of them makes the loss infinite. Measuring on text
# that was not used for training is called *validation* (chapter 7).
# </details>
#
# 2. Why not simply count longer contexts, say the 10 characters before?
#
# <details><summary>Answer</summary>
#
# With two characters it still works: 65³ = 274,625 entries, and the loss falls to 1.953. But only 11,556
# of these trigrams occur in the text. With 10 characters, the table would have 65¹¹ (about 10²⁰) entries,
# nearly all of them never seen, and each new sentence would be unknown. The table knows nothing about
# *similar* contexts; for that, a model must compute with what it sees instead of looking it up.
# </details>
#
# 3. The text file has 8 bits per byte. `gzip -9` needs 3.11. What does it know that our model does not?
#
# <details><summary>Answer</summary>
#
# Longer repetitions: whole words and names, which it replaces by a reference to where they last
# occurred. Predicting and compressing are the same task: with arithmetic coding, a model with 3.54 bits per
# byte can be turned into a compressor that needs 3.54 bits per byte.
# </details>

# %% [markdown] lang="pt"
# ## No mlxgpt
#
# O tokenizador está em [`mlxgpt/data/tokenizers/char.py`](../../../mlxgpt/data/tokenizers/char.py) e usa os
# mesmos ids: caracteres na ordem dos seus code points. Ele converte todos os caracteres de um texto numa
# chamada do NumPy, em vez de um por um, avisa quais caracteres não conhece e pode ter um token a mais, para o
# fim de um documento.
#
# A loss é calculada em [`mlxgpt/evaluation/loss.py`](../../../mlxgpt/evaluation/loss.py): o total de todos os
# tokens, em nats, dividido pelo número de tokens (`loss`), e o mesmo total dividido por ln 2 e pelo número de
# bytes UTF-8 dos tokens previstos (`bits_per_byte`). O `mlxgpt eval` mostra os dois, e também a perplexidade.
#
# ## Exercícios
#
# Escreva as três funções no seu próprio `my_gpt.py` e rode `mlxgpt learn check 1`.
#
# 1. Medimos a loss no mesmo texto em que contamos. Conte só os primeiros 90% e meça no resto. O que muda, e o
#    que aconteceria sem o `+ 1`?
#
# <details><summary>Resposta</summary>
#
# 2,482 em vez de 2,455, um pouco pior: o fim do arquivo vem de outras peças, e as contagens combinam um pouco
# melhor com o texto de onde saíram do que com qualquer outro. Nos últimos 10% há 23 pares diferentes que não
# aparecem nos primeiros 90%, ao todo 187 vezes; sem o `+ 1`, qualquer um deles tornaria a loss infinita.
# Medir num texto que não foi usado no treino se chama *validação* (capítulo 7).
# </details>
#
# 2. Por que não contar simplesmente contextos mais longos, por exemplo os 10 caracteres anteriores?
#
# <details><summary>Resposta</summary>
#
# Com dois caracteres ainda funciona: são 65³ = 274.625 entradas, e a loss cai para 1,953. Mas só
# 11.556 desses trigramas aparecem no texto. Com 10 caracteres, a tabela teria 65¹¹ (cerca de 10²⁰) entradas,
# quase todas nunca vistas, e toda frase nova seria desconhecida. A tabela não sabe nada sobre contextos
# *parecidos*; para isso, o modelo precisa calcular com o que vê, em vez de procurar numa tabela.
# </details>
#
# 3. O arquivo do texto tem 8 bits por byte. O `gzip -9` precisa de 3,11. O que ele sabe que o nosso modelo
#    não sabe?
#
# <details><summary>Resposta</summary>
#
# Repetições mais longas: palavras e nomes inteiros, que ele troca por uma referência ao lugar onde
# apareceram pela última vez. Prever e comprimir são a mesma tarefa: com codificação aritmética, um modelo de
# 3,54 bits por byte vira um compressor que precisa de 3,54 bits por byte.
# </details>
