"""Chapters of the course in docs/learn."""

from __future__ import annotations

from typing import NamedTuple


class Chapter(NamedTuple):
    """A chapter: name of its notebooks, and its title in both languages."""

    slug: str
    english: str
    portuguese: str


CHAPTERS = (
    Chapter("01-bigrams", "Counting bigrams", "Contando bigramas"),
    Chapter(
        "02-gradient-descent", "The same by gradient descent", "O mesmo, por descida de gradiente"
    ),
    Chapter("03-attention", "One attention head", "Uma cabeça de atenção"),
    Chapter("04-block", "Heads, MLP, block", "Cabeças, MLP, bloco"),
    Chapter("05-first-loss", "The stack and the first loss", "A pilha de blocos e a primeira loss"),
    Chapter("06-adamw", "AdamW by hand", "AdamW à mão"),
    Chapter(
        "07-training",
        "Schedule, batch size, overfitting",
        "Schedule, tamanho do batch, overfitting",
    ),
    Chapter("08-sampling", "Sampling", "Amostragem"),
    Chapter("09-kv-cache", "The KV cache", "O KV cache"),
    Chapter("10-scaling", "Tier 2: BPE and scaling", "Tier 2: BPE e escala"),
)
