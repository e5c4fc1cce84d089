"""Portuguese texts of the reports."""

from __future__ import annotations

# English → Portuguese. `#` stands for a number and `{}` for any text, which is translated, too.
PORTUGUESE = {
    # run_page.py
    "summary of the runs": "resumo dos treinos",
    "parameters": "parâmetros",
    "#, # trained": "{}, {} treinados",
    "data": "dados",
    "imported": "importado",
    "steps": "passos",
    "# of #": "{} de {}",
    "# of #, not finished": "{} de {}, não terminado",
    "tokens": "tokens",
    "minutes of training": "minutos de treino",
    "best val loss": "melhor loss de validação",
    "# nats per token, at step #": "{} nats por token, no passo {}",
    "# nats per pair, at step #": "{} nats por par, no passo {}",
    "last training loss": "última loss de treino",
    "median tokens/s": "mediana de tokens/s",
    "Loss": "Loss",
    "nats per token": "nats por token",
    "nats per pair": "nats por par",
    "nats per token, nats per pair": "nats por token, nats por par",
    "nats per pair, nats per token": "nats por par, nats por token",
    "training loss": "loss de treino",
    "{}, training loss": "{}, loss de treino",
    "val loss": "loss de validação",
    "{}, val loss": "{}, loss de validação",
    "val loss on the base model's data, nats per token": (
        "loss de validação nos dados do modelo base, nats por token"
    ),
    "{}, val loss on the base model's data, nats per token": (
        "{}, loss de validação nos dados do modelo base, nats por token"
    ),
    "Training loss, smoothed, with the logged values faint behind it; and validation loss at each "
    "evaluation.": "Loss de treino suavizada, com os valores registrados mais claros ao fundo; e "
    "loss de validação em cada avaliação.",
    "{}, training loss: from # at step # to # at step #": (
        "{}, loss de treino: de {} no passo {} a {} no passo {}"
    ),
    "{}, validation loss: from # at step # to # at step #": (
        "{}, loss de validação: de {} no passo {} a {} no passo {}"
    ),
    "{}, validation loss on the base model's data: from # at step # to # at step #": (
        "{}, loss de validação nos dados do modelo base: de {} no passo {} a {} no passo {}"
    ),
    "{}, by steps": "{}, por passos",
    "{}, by million tokens": "{}, por milhões de tokens",
    "{}, by minutes": "{}, por minutos",
    "Empty plot: nothing has been logged yet": "Gráfico vazio: nada foi registrado ainda",
    "x axis": "eixo x",
    "million tokens": "milhões de tokens",
    "minutes": "minutos",
    "Training metrics": "Métricas do treino",
    "DPO's reward margin between chosen and rejected answers": (
        "Margem de recompensa do DPO entre respostas escolhidas e rejeitadas"
    ),
    "Pairs with the higher reward for the chosen answer": (
        "Pares com a recompensa maior para a resposta escolhida"
    ),
    "KL divergence from the reference": "Divergência KL em relação à referência",
    "Learning rate": "Taxa de aprendizado",
    "Gradient norm before clipping": "Norma do gradiente antes do clipping",
    "Speed": "Velocidade",
    "Fraction of the measured matmul peak": "Fração do pico medido de matmul",
    "{}: # to #": "{}: {} a {}",
    "margin": "margem",
    "fraction": "fração",
    "learning rate": "taxa de aprendizado",
    "grad norm": "norma do gradiente",
    "tokens/s": "tokens/s",
    "Events": "Eventos",
    "events": "eventos",
    "step": "passo",
    "event": "evento",
    "# skipped": "passos pulados: {}",
    "rolled back from step #": "voltou atrás a partir do passo {}",
    "resumed": "retomado",
    "And # more.": "E mais {}.",
    "Estimated and measured": "Estimado e medido",
    "estimated and measured": "estimado e medido",
    "estimated": "estimado",
    "measured": "medido",
    "ms per step": "ms por passo",
    "minutes (measured: without evaluations)": "minutos (medido: sem as avaliações)",
    "memory, MB": "memória, MB",
    "Samples": "Amostras",
    "Step #": "Passo {}",
    "Sample quality metrics": "Métricas de qualidade das amostras",
    "generated samples compared with real text and controls": (
        "amostras geradas comparadas com texto real e controles"
    ),
    "model": "modelo",
    "real": "real",
    "shuffled words": "palavras embaralhadas",
    "n-gram": "n-gramas",
    "higher": "maior",
    "lower": "menor",
    "like real": "como o real",
    "complete sentences": "frases completas",
    "complete sentences per story": "frases completas por história",
    "grammar errors per 100 words": "erros de gramática por 100 palavras",
    "dictionary words": "palavras do dicionário",
    "distinct 3-grams": "3-gramas distintos",
    "copied 8-grams": "8-gramas copiados",
    "quotes balanced": "aspas fechadas",
    "names that stay": "nomes que permanecem",
    "ended": "terminaram",
    "Settings": "Configurações",
    "Same as {}.toml.": "Iguais às de {}.toml.",
    "setting": "configuração",
    "this run": "este treino",
    "differences from {}.toml": "diferenças em relação a {}.toml",
    "Environment": "Ambiente",
    "environment": "ambiente",
    "device": "dispositivo",
    "ranks": "processos",
    "backend": "backend",
    "BLAS": "BLAS",
    "BLAS threads": "threads da BLAS",
    "compiler": "compilador",
    "none": "nenhum",
    "Reproduce": "Como reproduzir",
    # bench_page.py, bench/report.py, bench/side_by_side.py, bench/chips.py
    "Benchmarks on {}": "Benchmarks em {}",
    "Training speed, measured and estimated": "Velocidade de treino, medida e estimada",
    "training tokens per second (log scale)": "tokens de treino por segundo (escala logarítmica)",
    "{}: filled markers are measured, hollow markers are estimated.": (
        "{}: marcadores cheios são medidos, marcadores vazados são estimados."
    ),
    "{}, training tokens per second.": "{}, tokens de treino por segundo.",
    "Measured: {}.": "Medido: {}.",
    "Estimated: from # on an {} to # on an {}": "Estimado: de {} num {} a {} num {}",
    "Measured on {} with `mlxgpt bench`, one process per config.": (
        "Medido em {} com `mlxgpt bench`, um processo por configuração."
    ),
    "machine": "máquina",
    "chip": "chip",
    "cores": "núcleos",
    "# (# performance cores)": "{} ({} núcleos de desempenho)",
    "memory": "memória",
    "system": "sistema",
    "MLX device": "dispositivo do MLX",
    "memory bandwidth": "largura de banda da memória",
    "commit": "commit",
    "{} + changes": "{} + mudanças",
    "not a git checkout": "fora de um repositório git",
    "load average before": "carga média antes",
    "time": "tempo",
    "Results": "Resultados",
    "dtype": "dtype",
    "tokens per step": "tokens por passo",
    "training FLOPs per token": "FLOPs de treino por token",
    "training, tokens/s": "treino, tokens/s",
    "training, ms per step": "treino, ms por passo",
    "measured matmul peak": "pico medido de matmul",
    "training, % of the measured matmul peak": "treino, % do pico medido de matmul",
    "training, peak memory": "treino, pico de memória",
    "generation, time to first token, ms": "geração, tempo até o primeiro token, ms",
    "generation, tokens/s": "geração, tokens/s",
    "# (# to #)": "{} ({} a {})",
    "# to #": "{} a {}",
    "Values are medians (minimum to maximum):": "Os valores são medianas (mínimo a máximo):",
    "{}, training: # repeats of # steps after # warmup steps; memory of {}.": (
        "{}, treino: {} repetições de {} passos depois de {} passos de aquecimento; memória de {}."
    ),
    "the whole process": "todo o processo",
    "MLX's arrays": "arrays do MLX",
    "{}, generation: # samples of # tokens after a prompt of #, and one warmup sample.": (
        "{}, geração: {} amostras de {} tokens depois de um prompt de {}, e uma de aquecimento."
    ),
    "The matmul peak is the faster of two measurements, one before and one after the benchmark.": (
        "O pico de matmul é a mais rápida de duas medições, uma antes e outra depois do benchmark."
    ),
    "How to reproduce": "Como reproduzir",
    "In a checkout of the commit above, with nothing else running:": (
        "Num checkout do commit acima, sem mais nada rodando:"
    ),
    "Apple chips: *estimated*": "Chips da Apple: *estimativas*",
    "None of this was measured with mlxgpt.": "Nada disto foi medido com o mlxgpt.",
    "Training is *estimated* at #% of the float32 peak: published measurements report 24% (3.5M "
    "parameters, M3 Air) and 25% (15.7M, M4 Max) for small models, and 31% to 43% for a 154M model "
    "with MLX on M1 Pro to M1 Ultra.": "O treino é *estimado* a {}% do pico em float32: medições "
    "publicadas relatam 24% (3.5M parâmetros, M3 Air) e 25% (15.7M, M4 Max) em modelos pequenos, e "
    "de 31% a 43% num modelo de 154M com o MLX, do M1 Pro ao M1 Ultra.",
    "*Whole run*: all steps of the config, without evaluations.": (
        "*Treino inteiro*: todos os passos da configuração, sem avaliações."
    ),
    "Generation is an upper bound: memory bandwidth divided by the bytes read per token.": (
        "A geração é um limite superior: largura de banda da memória dividida pelos bytes lidos "
        "por token."
    ),
    "Small models do not reach it: launching the kernels takes longer than reading the weights.": (
        "Modelos pequenos não chegam a ele: lançar os kernels demora mais do que ler os pesos."
    ),
    "{}, *estimated*": "{}, *estimativa*",
    "This model is smaller than any of those measured; expect less.": (
        "Este modelo é menor do que todos os medidos; espere menos."
    ),
    "peak, TFLOPS": "pico, TFLOPS",
    "memory, GB/s": "memória, GB/s",
    "*estimated* tokens/s": "tokens/s *estimados*",
    "*estimated* whole run": "treino inteiro *estimado*",
    "*estimated* generation, upper bound": "geração *estimada*, limite superior",
    "day": "dia",
    "measured memory bandwidth": "largura de banda medida da memória",
    # compare_page.py, experiments/report.py, experiments/verdict.py
    "Comparison: {}": "Comparação: {}",
    "Difference from {}": "Diferença em relação a {}",
    "difference in bits per byte (negative is better)": (
        "diferença em bits por byte (negativo é melhor)"
    ),
    "Mean difference over seeds with its #% confidence interval.": (
        "Diferença média entre as seeds, com o seu intervalo de confiança de {}%."
    ),
    "An interval that contains 0 is inconclusive.": "Um intervalo que contém 0 é inconclusivo.",
    "Differences from {}: {}": "Diferenças em relação a {}: {}",
    "{}: #, {}": "{}: {}, {}",
    "Learning curves": "Curvas de aprendizado",
    "Mean over seeds; the band spans minimum to maximum.": (
        "Média das seeds; a faixa vai do mínimo ao máximo."
    ),
    "The table lists # more variants.": "A tabela lista mais {} variantes.",
    "bits per byte": "bits por byte",
    "Bits per byte by million tokens: {}": "Bits por byte por milhões de tokens: {}",
    "Bits per byte by minutes: {}": "Bits por byte por minutos: {}",
    "{}: from # to #": "{}: de {} a {}",
    "a table": "uma tabela",
    "variant": "variante",
    "seeds": "seeds",
    "difference": "diferença",
    "verdict": "veredito",
    "baseline": "baseline",
    "diverged": "divergiu",
    "not trained yet": "ainda não treinada",
    "one seed": "uma seed",
    "identical": "idêntica",
    "better": "melhor",
    "worse": "pior",
    "undecided": "indefinido",
    "uncertain": "incerto",
    "{}: {} needed to confirm that it is {} by #.": (
        "{}: faltam {} para confirmar que é {} por {}."
    ),
    "{}: p = # after correction for multiple variants; {} needed to confirm that it is {} by #.": (
        "{}: p = {} depois da correção para várias variantes; faltam {} para confirmar "
        "que é {} por {}."
    ),
    "more than # seeds": "mais de {} seeds",
    "about # more seeds": "cerca de {} seeds a mais",
    "about # more seed": "cerca de {} seed a mais",
    "{}: one seed is not enough: another seed may reverse the result.": (
        "{}: uma seed não basta: outra seed pode inverter o resultado."
    ),
    "Bits per byte on the validation text of {}, with a budget of {} per run.": (
        "Bits por byte no texto de validação de {}, com um orçamento de {} por treino."
    ),
    "Bits per byte on # bytes held out of the training text of {}, with a budget of {} per run.": (
        "Bits por byte em {} bytes separados do texto de treino de {}, com um orçamento de {} por "
        "treino."
    ),
    "Differences are relative to {}, paired by seed; negative is better.": (
        "As diferenças são em relação a {}, pareadas por seed; negativo é melhor."
    ),
    "± is a #% confidence interval.": "± é um intervalo de confiança de {}%.",
    "± is a #% confidence interval, corrected for repeated looks and multiple variants.": (
        "± é um intervalo de confiança de {}%, corrigido para verificações repetidas e várias "
        "variantes."
    ),
    "Tokens and time: speedup in reaching the final loss of {}, although the schedule was not "
    "planned to end there.": "Tokens e tempo: quanto antes se chega à loss final de {}, embora o "
    "schedule não tenha sido planejado para terminar ali.",
    "Training speed compared with each variant's median: {} to {}.": (
        "Velocidade de treino em relação à mediana de cada variante: {} a {}."
    ),
    "Results were checked after {} seeds.": "Os resultados foram verificados depois de {} seeds.",
    "Repeated checks find false differences more often than the intervals suggest; --until-decided "
    "corrects for this.": "Verificações repetidas encontram diferenças falsas com mais frequência "
    "do que os intervalos sugerem; --until-decided corrige isso.",
    "The validation text was evaluated once in this comparison.": (
        "O texto de validação foi avaliado uma vez nesta comparação."
    ),
    "The validation text was evaluated # times in this comparison.": (
        "O texto de validação foi avaliado {} vezes nesta comparação."
    ),
    "The comparison was interrupted; the same command resumes it.": (
        "A comparação foi interrompida; o mesmo comando a retoma."
    ),
    "differs in": "difere em",
    "seconds": "segundos",
    "per seed": "por seed",
    "Seconds: median training time, without evaluation, checkpoints and compilation.": (
        "Segundos: tempo mediano de treino, sem avaliação, checkpoints e compilação."
    ),
    "Machine: {}.": "Máquina: {}.",
    # scaling_page.py, experiments/scaling_report.py
    "Scaling: {}": "Lei de escala: {}",
    "Loss over tokens": "Loss por tokens",
    "Loss over parameters": "Loss por parâmetros",
    "#M tokens": "{}M de tokens",
    "million parameters": "milhões de parâmetros",
    "Bits per byte by million parameters: {}": "Bits por byte por milhões de parâmetros: {}",
    "Lines without markers: the law, which is not fitted to the largest size, {}.": (
        "Linhas sem marcadores: a lei, que não foi ajustada ao maior tamanho, {}."
    ),
    "size": "tamanho",
    "epochs": "épocas",
    "law": "lei",
    "{} (test)": "{} (teste)",
    "Recipe {}, {}, {} in all.": "Receita {}, {}, {} no total.",
    "Bits per byte on # bytes held out of the training text, mean of the seeds.": (
        "Bits por byte em {} bytes separados do texto de treino, média das seeds."
    ),
    "The study was interrupted; the same command resumes it.": (
        "O estudo foi interrompido; o mesmo comando o retoma."
    ),
    "No law was fitted, since a run diverged.": (
        "Nenhuma lei foi ajustada, porque um treino divergiu."
    ),
    "Law: bits per byte = # + # / N^# + # / D^#, with N million parameters and D million tokens.": (
        "Lei: bits por byte = {} + {} / N^{} + {} / D^{}, com N milhões de parâmetros e D milhões "
        "de tokens."
    ),
    "95% intervals: # to #; # to #; # to #; # to #; # to #.": (
        "Intervalos de 95%: {} a {}; {} a {}; {} a {}; {} a {}; {} a {}."
    ),
    "The losses scatter around it by #.": "As losses se espalham em torno dela por {}.",
    "Test: for {}, which it was not fitted to, the law predicts # to #; measured: #, {}.": (
        "Teste: para {}, ao qual não foi ajustada, a lei prevê {} a {}; medido: {}, {}."
    ),
    "inside": "dentro",
    "outside: do not rely on the law": "fora: não confie na lei",
    "In this range the loss depends on the number of parameters or of tokens alone.": (
        "Nesta faixa a loss depende só do número de parâmetros ou só do número de tokens."
    ),
    "For the FLOPs of the test, # tokens per parameter give the lowest loss (95% interval "
    "# to #).": "Com os FLOPs do teste, {} tokens por parâmetro dão a menor loss (intervalo de "
    "95%: {} a {}).",
    "Which size for which time": "Qual tamanho para quanto tempo",
    "bits per byte, predicted": "bits por byte, previsto",
    "One run of that time, without evaluations, at the speed that was measured before.": (
        "Um treino desse tempo, sem avaliações, na velocidade medida antes."
    ),
    "Predictions far from the measured sizes and lengths are less certain than they look.": (
        "Previsões longe dos tamanhos e durações medidos são menos certas do que parecem."
    ),
    "Beyond # epochs the law does not hold: text that is seen again teaches less than new text.": (
        "Além de {} épocas a lei não vale: um texto já visto ensina menos do que um texto novo."
    ),
    "Use more text for such a time.": "Para tanto tempo, use mais texto.",
}
