// Portuguese for browsers that prefer it, or as `mlxgpt play --lang` says; English otherwise.

const PORTUGUESE = {
  "step {}": "passo {}",
  "{} parameters, {} layers × {} heads, vocabulary {}, block size {}": "{} parâmetros, {} camadas × {} cabeças, vocabulário de {}, contexto de {} tokens",
  "; checkpoint at step {}": "; checkpoint do passo {}",
  "You": "Você",
  "Model": "Modelo",
  "stopped": "parado",
  "reached max tokens": "chegou ao máximo de tokens",
  "The model does not know these characters: {}": "O modelo não conhece estes caracteres: {}",
  "{} tokens, {} tok/s, {}; seed {}": "{} tokens, {} tok/s, {}; semente {}",
  "ended with end-of-text": "terminou com o fim de texto",
  "The model": "O modelo",
  "Alternatives to “{}”": "Alternativas a “{}”",
  "This token is part of the prompt.": "Este token faz parte do prompt.",
  "{} gave it a probability of {}.": "{} deu a ele uma probabilidade de {}.",
  "Select another token to continue from there.": "Escolha outro token para continuar a partir dele.",
  "all": "todos",
  "Temperature 0: always the most likely token (greedy).": "Temperatura 0: sempre o token mais provável.",
  "Below 1: likely tokens become more likely; less varied text.": "Abaixo de 1: tokens prováveis ficam mais prováveis; texto menos variado.",
  "Above 1: unlikely tokens become more likely; more varied text.": "Acima de 1: tokens improváveis ficam mais prováveis; texto mais variado.",
  "1: sampled from the model's own distribution.": "1: amostrado da distribuição do próprio modelo.",
  "Layer": "Camada",
  "the last {} tokens of the text": "os últimos {} tokens do texto",
  "the text from the Generate tab": "o texto da aba Gerar",
  "This is {}. Select a layer and a head, then hover over a token to see what it attends to.": "Mostrando {}. Escolha uma camada e uma cabeça e aponte para um token para ver a que ele dá atenção.",
  "head {}": "cabeça {}",
  "disable head {} of layer {}": "desligar a cabeça {} da camada {}",
  "disable": "desligar",
  "itself": "si mesmo",
  "the previous token": "o token anterior",
  "the first token": "o primeiro token",
  "mostly attends to {} ({})": "atenção sobretudo a {} ({})",
  "spread over many tokens": "espalhada por muitos tokens",
  "after “{}”": "depois de “{}”",
  "layer {}": "camada {}",
  "embedding": "embedding",
  "Layer {}, head {}: “{}” attends to {}.": "Camada {}, cabeça {}: “{}” dá atenção a {}.",
  "no token with more than {}": "nenhum token com mais de {}",
  "Page error: {}": "Erro da página: {}",
  "a model": "um modelo",
  "Views": "Visões",
  "Generate": "Gerar",
  "Chat": "Conversa",
  "Inspect": "Inspecionar",
  "About": "Sobre",
  "Prompt": "Prompt",
  "Continue": "Continuar",
  "Stop": "Parar",
  "max": "máx.",
  "tokens": "tokens",
  "seed": "semente",
  "random": "aleatória",
  "Compare with": "Comparar com",
  ", which this run was initialized from: same prompt, same seed": ", de onde este modelo partiu: mesmo prompt, mesma semente",
  "Text": "Texto",
  "Shading shows each token's probability:": "A cor mostra a probabilidade de cada token:",
  "high": "alta",
  "medium": "média",
  "low": "baixa",
  ". Hover over a token, or use the arrow keys, to see the alternatives.": ". Aponte para um token, ou use as setas, para ver as alternativas.",
  "Text, token by token": "Texto, token por token",
  "Text of": "Texto de",
  "The same prompt and seed, before this run's training.": "O mesmo prompt e a mesma semente, antes deste treino.",
  "The reference's text, token by token": "Texto da referência, token por token",
  "Alternatives": "Alternativas",
  "Hover over a token of the text, then select an alternative to continue from there.": "Aponte para um token do texto e escolha uma alternativa para continuar a partir dela.",
  "Next token": "Próximo token",
  "Thin bar: the model's probability for each candidate. Thick bar: the probability after the sampling settings, from which the next token is sampled.": "Barra fina: a probabilidade que o modelo dá a cada candidato. Barra grossa: a probabilidade depois dos ajustes de amostragem, da qual o próximo token é sorteado.",
  "temperature": "temperatura",
  "top-k": "top-k",
  "top-p": "top-p",
  "min-p": "min-p",
  "Most likely next tokens": "Próximos tokens mais prováveis",
  "From": "De",
  ", after the same text": ", depois do mesmo texto",
  "The reference's most likely next tokens": "Próximos tokens mais prováveis da referência",
  "Conversation": "Conversa",
  "Message": "Mensagem",
  "Send": "Enviar",
  "New conversation": "Nova conversa",
  "Also show the reply of": "Mostrar também a resposta de",
  ", which this run was initialized from": ", de onde este modelo partiu",
  "Replies use the sampling settings and the maximum length of the Generate tab.": "As respostas usam os ajustes de amostragem e o tamanho máximo da aba Gerar.",
  "Attention weights of each head: one row per token (query), one column per attended token (key); darker is higher.": "Pesos de atenção de cada cabeça: uma linha por token (query), uma coluna por token que recebe atenção (key); mais escuro é maior.",
  "Show attention as": "Mostrar a atenção como",
  "lines": "linhas",
  "a heat map over the text": "mapa de calor sobre o texto",
  "Inspected text": "Texto inspecionado",
  "Logit lens": "Logit lens",
  "The output layer applied to the residual stream after each block: what each layer would predict.": "A camada de saída aplicada ao fluxo residual depois de cada bloco: o que cada camada preveria.",
  "layer": "camada",
  "most likely": "mais provável",
  "followed by": "seguido de",
  "Next-token probabilities": "Probabilidades do próximo token",
  "After the last token. Disable heads above to see their effect: thin bar, all heads; thick bar, without the disabled heads.": "Depois do último token. Desligue cabeças acima para ver o efeito: barra fina, todas as cabeças; barra grossa, sem as desligadas.",
  "Most likely next tokens, with and without the disabled heads": "Próximos tokens mais prováveis, com e sem as cabeças desligadas",
  "Nearest neighbors": "Vizinhos mais próximos",
  "Tokens with the embeddings most similar to that of": "Tokens com os embeddings mais parecidos com o de",
  ", by cosine similarity.": ", pela similaridade de cosseno.",
  "Nearest neighbors in the embedding": "Vizinhos mais próximos no embedding",
  "This file is a language model: its weights, its tokenizer and the program that runs them. It works without a network, sends nothing and stores nothing.": "Este arquivo é um modelo de linguagem: os pesos, o tokenizador e o programa que os executa. Funciona sem rede, não envia nem guarda nada.",
  "What it wrote during its training": "O que ele escreveu durante o treino",
  "trained on": "treinado com",
  "training steps": "passos de treino",
  "training tokens": "tokens de treino",
  "initialized from": "partiu de",
  "validation loss, nats per token": "loss de validação, nats por token",
  "validation loss, nats per pair": "loss de validação, nats por par",
  "architecture": "arquitetura",
  "weights": "pesos",
  "loss of these weights": "loss com estes pesos",
  "loss with 32 bits": "loss com 32 bits",
  "exported": "exportado",
  "This page needs its API key: open the full address that mlxgpt play printed.": "Esta página precisa da chave da API: abra o endereço completo que o mlxgpt play mostrou.",
  "mlxgpt play is not responding.\n→ restart it and open the address it prints.": "O mlxgpt play não responde.\n→ inicie-o de novo e abra o endereço que ele mostrar.",
  "request failed: {}": "a requisição falhou: {}",
  "; no checkpoint yet": "; ainda sem checkpoint",
  "no checkpoint yet; see the Training tab for progress": "ainda sem checkpoint; veja o andamento na aba Treino",
  "Training": "Treino",
  "Training curve": "Curva de treino",
  "Loss over training steps": "Loss ao longo dos passos de treino",
  "Snapshot": "Snapshot",
  "Generated text at each snapshot": "Texto gerado em cada snapshot",
  "Generate at every snapshot": "Gerar em todos os snapshots",
  "Samples from training": "Amostras durante o treino",
  "Samples logged at each evaluation, newest first.": "Amostras registradas a cada avaliação, as mais recentes primeiro.",
  "Step {} of {}, {} min of training.": "Passo {} de {}, {} min de treino.",
  "This page updates every 2 s during training.": "Durante o treino, esta página se atualiza a cada 2 s.",
  "No training metrics have been logged for this run.": "Não há métricas de treino registradas.",
  "step 0 (untrained)": "passo 0 (sem treino)",
  "generating at step {}": "gerando no passo {}",
  "done: same prompt, same seed": "pronto: mesmo prompt, mesma semente",
  "steps": "passos",
  "loss, {}": "loss, {}",
  "nats per token": "nats por token",
  "nats per pair": "nats por par",
  "uniform guess": "palpite uniforme",
  "An untrained model gives every token the same probability; its loss is ln(vocabulary size).": "Um modelo sem treino dá a mesma probabilidade a todos os tokens; a sua loss é ln(tamanho do vocabulário).",
  "the reference": "a referência",
  "The reference prefers neither answer to itself; its DPO loss is ln 2.": "Comparada consigo mesma, a referência não prefere nenhuma das respostas; a sua loss de DPO é ln 2.",
  "Loss over {} steps: from {}, {}, to a validation loss of {}.": "Loss ao longo de {} passos: de {}, {}, até uma loss de validação de {}.",
  "Loss over {} steps: from {}, {}, to a training loss of {}.": "Loss ao longo de {} passos: de {}, {}, até uma loss de treino de {}.",
};

let isPortuguese = false;

export const translate = (text) => (isPortuguese ? PORTUGUESE[text] ?? text : text);

// t`…` translates a text; values fill its places in order.
export function t(strings, ...values) {
  const parts = translate(strings.join("{}")).split("{}");
  return parts.map((part, n) => part + (n < values.length ? values[n] : "")).join("");
}

// 1,234.5 in English, 1.234,5 in Portuguese.
export const localize = (figure) => (isPortuguese ? figure.replace(/[.,]/g, (mark) => (mark === "." ? "," : ".")) : figure);
export const number = (value) => localize(Math.round(value).toLocaleString("en"));
export const decimal = (value, digits) => localize(value.toFixed(digits));

// Translates the page if Portuguese was asked for, or else if the browser prefers it.
export function setLanguage() {
  const { lang } = document.documentElement.dataset;
  isPortuguese = (lang ?? navigator.language).toLowerCase().startsWith("pt");
  if (!isPortuguese) return;
  document.documentElement.lang = "pt-BR";
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = texts.nextNode(); node; node = texts.nextNode()) {
    const text = node.data.replace(/\s+/g, " "), words = text.trim();
    if (node.parentElement.tagName !== "SCRIPT" && words in PORTUGUESE) node.data = text.replace(words, PORTUGUESE[words]);
  }
  for (const name of ["aria-label", "placeholder"]) {
    for (const element of document.querySelectorAll(`[${name}]`)) element.setAttribute(name, translate(element.getAttribute(name)));
  }
}
