# %% [markdown] lang="en"
# # 11. Find the fault
#
# **The program runs, the loss falls, and something is wrong. What is it?**
#
# Here are twelve programs. Each is [my_gpt.py](../my_gpt.py) with one fault that people really make, and each
# trains. You get what you would have in practice: the curves, a sample, and the checks of the ten chapters.

# %% [markdown] lang="pt"
# # 11. Encontre a falha
#
# **O programa roda, a loss cai, e alguma coisa está errada. O que é?**
#
# Aqui estão doze programas. Cada um é o [my_gpt.py](../my_gpt.py) com uma falha que as pessoas cometem de
# verdade, e todos treinam. Você tem o que teria na prática: as curvas, uma amostra e as verificações dos dez
# capítulos.

# %%
import matplotlib.pyplot as plt
from course import expect, load_text
from faults import FAULTS, TEXT_LENGTH, load_program, run_program

text = load_text()[:TEXT_LENGTH]
sound = run_program(load_program(0), text)
programs = {number: run_program(load_program(number), text) for number in range(1, len(FAULTS) + 1)}
expect(sound.val[-1][1], 2.67, 0.1)

# %% [markdown] lang="en"
# The model is small (1 layer, 32 dimensions, a text of 20,000 characters, a quarter of each batch is padding,
# seen as ▯), so that all thirteen train in a minute. The sound program is gray, the faulty one red; the line
# is the training loss, the dots are the validation loss.

# %% [markdown] lang="pt"
# O modelo é pequeno (1 camada, 32 dimensões, um texto de 20.000 caracteres, um quarto de cada batch é
# padding, que aparece como ▯), para que os treze treinem em um minuto. Em cinza está o programa correto, em
# vermelho o que tem a falha; a linha é a loss de treino, e os pontos, a de validação.


# %%
def smooth(losses, n=20):
    return [
        sum(losses[max(0, i - n) : i + 1]) / (i + 1 - max(0, i - n)) for i in range(len(losses))
    ]


figure, axes = plt.subplots(3, 4, figsize=(11, 7), layout="constrained", sharex=True, sharey=True)
for axis, (number, curves) in zip(axes.flat, programs.items(), strict=True):
    for result, color in ((sound, "lightgray"), (curves, "tab:red")):
        axis.plot(smooth(result.train), color=color)
        axis.plot(*zip(*result.val, strict=True), "o", color=color, markersize=4)
    axis.set(title=f"program {number}", ylim=(0, 4.5))
figure.supxlabel("step")
figure.supylabel("loss, nats per character")
plt.show()

# %%
for number, curves in ((0, sound), *programs.items()):
    name = f"program {number}" if number else "sound"
    print(f"{name:11} val {curves.val[-1][1]:5.2f}  {curves.sample!r}")

# %% [markdown] lang="en"
# ## How to look
#
# Look at curve and sample first, and say what you suspect. Then write the program to a file and check it,
# chapter by chapter:
#
# ```
# python docs/learn/faults.py 3 > fault.py
# mlxgpt learn check 3 --file fault.py
# ```
#
# Seven of the twelve can hardly be seen in the curve and the sample. That is the lesson of this chapter: a
# falling loss proves little. What finds a fault is a comparison with something known: ln V, a second
# implementation, a token that must not matter, two ways to compute one thing.

# %% [markdown] lang="pt"
# ## Como procurar
#
# Olhe primeiro a curva e a amostra e diga de que você desconfia. Depois grave o programa num arquivo e
# verifique, capítulo por capítulo:
#
# ```
# python docs/learn/faults.py 3 > fault.py
# mlxgpt learn check 3 --file fault.py
# ```
#
# Sete das doze quase não aparecem na curva nem na amostra. É essa a lição do capítulo: uma loss que cai prova
# pouco. O que acha uma falha é a comparação com algo conhecido: ln V, uma segunda implementação, um token que
# não pode ter influência, duas maneiras de calcular a mesma coisa.

# %% [markdown] lang="en"
# ## Answers
#
# <details><summary>Program 1</summary>
#
# **Top-k keeps the least likely tokens.** The curves are those of the sound program, the sample is noise: so
# look at what comes after the model. Chapter 8: top-k 1 must be the most likely token.
# </details>
#
# <details><summary>Program 2</summary>
#
# **The causal mask is off by one.** Each token sees the one it has to predict. A loss of 0.3 nats per
# character is too good: the best model of mlxgpt has 1.40 on Tiny Shakespeare. The sample repeats itself,
# because during sampling the next token does not exist yet. Chapter 3: the first token must attend only to
# itself.
# </details>
#
# <details><summary>Program 3</summary>
#
# **The tied head is not tied.** The head uses the embedding's values, but no gradient flows back through it.
# The model learns more slowly at first; later, nothing can be seen. Chapter 5: the gradient of `wte` is not
# the library's, while all logits are.
# </details>
#
# <details><summary>Program 4</summary>
#
# **The validation text is also trained on.** In so short a run little is memorized, and the validation loss
# looks normal. In a longer one it would stay low however much the model memorized. No curve can show it.
# Chapter 7: both parts together must be the text, once.
# </details>
#
# <details><summary>Program 5</summary>
#
# **Dropout is on at evaluation.** The validation loss is 0.02 too high; with more dropout it would be more.
# Chapter 7: the validation loss must be the mean over the logits without dropout.
# </details>
#
# <details><summary>Program 6</summary>
#
# **Every token of the cache has position 0.** Training and evaluation do not use the cache, so the curves are
# perfect; only the sample is a bit worse than it should be. Chapter 9: logits with the cache must equal those
# without.
# </details>
#
# <details><summary>Program 7</summary>
#
# **Heads are cut out of the wrong axis.** `reshape` to [B, H, T, D] without `swapaxes` puts pieces of
# different tokens into one head, also of later ones: the loss is lower than it should be, as with the mask,
# and the sample is worse. Chapter 4: the block differs from the library's.
# </details>
#
# <details><summary>Program 8</summary>
#
# **Padding counts in the loss.** The training loss is far below the validation loss from the start, when
# nothing can be memorized yet: a quarter of the targets is padding, which is easy to predict. In this short
# run even its validation loss is lower than the sound program's: a fault may improve a number. Chapter 7: a
# masked token must not change the loss.
# </details>
#
# <details><summary>Program 9</summary>
#
# **The schedule is one step late.** The first step has a learning rate of 0, and changes nothing. Nothing
# else can be seen. Chapter 7: the rate of each step.
# </details>
#
# <details><summary>Program 10</summary>
#
# **Targets are not shifted.** The model learns to repeat its input: a training loss of 0. The validation
# loss, which is computed correctly, is far above ln V, and the sample repeats one character. Chapter 7:
# targets are the inputs, one token later.
# </details>
#
# <details><summary>Program 11</summary>
#
# **AdamW without bias correction.** The first steps have another size than they should. The curve looks like
# that of another learning rate. Chapter 6: ten steps must equal MLX's.
# </details>
#
# <details><summary>Program 12</summary>
#
# **The first micro-batch is used again instead of the others.** Half of the tokens are never seen: the loss
# falls more slowly, as with a smaller batch. Chapter 7: the gradient must be that of the whole batch.
# </details>
#
# Each of these faults, made in mlxgpt itself, is found by one of mlxgpt's own tests:
# [`tests/course/test_mutants.py`](../../../tests/course/test_mutants.py) makes them one after the other, and
# runs that test.

# %% [markdown] lang="pt"
# ## Respostas
#
# <details><summary>Programa 1</summary>
#
# **O top-k fica com os tokens menos prováveis.** As curvas são as do programa correto, e a amostra é ruído:
# procure, então, no que vem depois do modelo. Capítulo 8: o top-k 1 tem de ser o token mais provável.
# </details>
#
# <details><summary>Programa 2</summary>
#
# **A máscara causal está deslocada em um.** Cada token vê aquele que precisa prever. Uma loss de 0,3 nat por
# caractere é boa demais: o melhor modelo do mlxgpt tem 1,40 no Tiny Shakespeare. A amostra se repete, porque
# na geração o próximo token ainda não existe. Capítulo 3: o primeiro token só pode dar atenção a si mesmo.
# </details>
#
# <details><summary>Programa 3</summary>
#
# **A saída (*tied head*) não está ligada ao embedding.** Ela usa os valores dele, mas nenhum gradiente volta
# por ela. No começo, o modelo aprende mais devagar; depois, não se vê mais nada. Capítulo 5: o gradiente de
# `wte` não é o da biblioteca, embora todos os logits sejam.
# </details>
#
# <details><summary>Programa 4</summary>
#
# **O texto de validação também é usado no treino.** Num treino tão curto pouco se decora, e a loss de
# validação parece normal. Num mais longo, ela continuaria baixa por mais que o modelo decorasse o texto.
# Nenhuma curva mostra isso. Capítulo 7: as duas partes juntas têm de dar o texto, uma vez só.
# </details>
#
# <details><summary>Programa 5</summary>
#
# **O dropout está ligado na avaliação.** A loss de validação fica 0,02 alta demais; com mais dropout, seria
# mais. Capítulo 7: a loss de validação tem de ser a média sobre os logits sem dropout.
# </details>
#
# <details><summary>Programa 6</summary>
#
# **Todo token do cache tem a posição 0.** O treino e a avaliação não usam o cache, e por isso as curvas são
# perfeitas; só a amostra é um pouco pior do que deveria. Capítulo 9: os logits com o cache têm de ser iguais
# aos sem cache.
# </details>
#
# <details><summary>Programa 7</summary>
#
# **As cabeças são cortadas no eixo errado.** Um `reshape` para [B, H, T, D] sem `swapaxes` junta pedaços de
# tokens diferentes numa mesma cabeça, inclusive de tokens posteriores: a loss fica mais baixa do que deveria,
# como no caso da máscara, e a amostra, pior. Capítulo 4: o bloco é diferente do da biblioteca.
# </details>
#
# <details><summary>Programa 8</summary>
#
# **O padding entra na loss.** A loss de treino fica muito abaixo da de validação desde o começo, quando ainda
# não havia nada decorado: um quarto dos alvos é padding, fácil de prever. Neste treino curto, até a loss de
# validação é menor que a do programa correto: uma falha pode melhorar um número. Capítulo 7: um token
# mascarado não pode mudar a loss.
# </details>
#
# <details><summary>Programa 9</summary>
#
# **O schedule está um passo atrasado.** O primeiro passo tem taxa de aprendizado 0, e não muda nada. Fora
# isso, nada aparece. Capítulo 7: a taxa de cada passo.
# </details>
#
# <details><summary>Programa 10</summary>
#
# **Os alvos não estão deslocados.** O modelo aprende a repetir a entrada: loss de treino 0. A loss de
# validação, calculada direito, fica muito acima de ln V, e a amostra repete um só caractere. Capítulo 7: os
# alvos são as entradas, um token depois.
# </details>
#
# <details><summary>Programa 11</summary>
#
# **AdamW sem correção de viés (*bias correction*).** Os primeiros passos têm outro tamanho. A curva parece a
# de outra taxa de aprendizado. Capítulo 6: dez passos têm de ser iguais aos do MLX.
# </details>
#
# <details><summary>Programa 12</summary>
#
# **O primeiro micro-batch é usado de novo no lugar dos outros.** Metade dos tokens nunca é vista: a loss cai
# mais devagar, como num batch menor. Capítulo 7: o gradiente tem de ser o do batch inteiro.
# </details>
#
# Cada uma dessas falhas, feita no próprio mlxgpt, é encontrada por um dos testes do mlxgpt:
# [`tests/course/test_mutants.py`](../../../tests/course/test_mutants.py) faz uma por uma e roda esse teste.
