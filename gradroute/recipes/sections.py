"""The sections of a recipe's config: one a stage, every key with its type, bounds, default and meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .reading import option


@dataclass(frozen=True)
class Model:
    """The model that the recipe begins with."""

    path: str = option(
        meaning="a folder of save_pretrained, a GGUF file, or package:NAME/FILE in an installed package",
        path=True,
    )
    tokenizer: str | None = option(None, "a folder with the tokenizer; default: the model's own", path=True)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "float32", "the dtype of the parameters"
    )
    device: str | None = option(None, "such as cpu or cuda:0; default: a GPU where there is one")
    attention: str | None = option(None, "transformers' attn_implementation; default: its own choice")


@dataclass(frozen=True)
class Source:
    """Texts of one kind: files of one format, under one name."""

    path: str = option(
        meaning="a file, a folder or a pattern such as texts/*.jsonl, package:NAME/*.py, distribution:NAME,NAME/*.md",
        path=True,
    )
    format: Literal["auto", "jsonl", "parquet", "text", "datasets"] = option(
        "auto", "auto: by the name's ending, and a folder of save_to_disk is datasets"
    )
    text: str = option("text", "the column with the text; text files have none")
    prompt: str | None = option(None, "the column with what comes before the text, such as a question")
    messages: str | None = option(
        None,
        "the column with conversations, lists of {role, content}, instead of text: the tokenizer's chat template "
        "writes them out",
    )
    learn: Literal["completions", "all"] = option(
        "completions",
        "completions: of a prompt with its text, the text, and of messages, the assistant's; the rest is read, but "
        "neither learnt nor counted in losses",
    )
    label: str | None = option(None, "the column with each document's label, for labels.by: column")
    split: Literal["file", "blank_lines", "paragraphs", "characters"] = option(
        "file",
        "how text files are cut into documents: one a file, at blank lines, whole paragraphs until they have "
        "`characters`, or every `characters`",
    )
    characters: int = option(
        2000, "the length of a document where split is paragraphs or characters", at_least=1
    )
    repeats: Literal["keep", "drop"] = option(
        "keep",
        "drop: texts, and paragraphs where split is paragraphs, are left out if half of their runs of eight words "
        "stood earlier in the source",
    )
    most: int | None = option(None, "the most documents that are taken, in their order", at_least=1)


@dataclass(frozen=True)
class Data:
    """Texts to tokenised documents, some of them held out."""

    sources: Mapping[str, Source] = option(
        meaning="name → source; reports show losses by these names", at_least=1
    )
    heldout: float = option(
        0.1, "the share of documents held out, by a hash of their text", above=0, at_most=0.9
    )
    length: int = option(512, "the most tokens of a document", at_least=2)
    overlong: Literal["split", "cut"] = option(
        "split", "a longer text becomes several documents, or loses what is beyond"
    )
    end_token: bool = option(True, "whether the tokenizer's end token closes every text")


@dataclass(frozen=True)
class Frequency:
    """Soft labels of tokens that one source has more often than another (arXiv 2410.04332, section 4.2.2)."""

    route: str | None = option(None, "the route that takes them; default: the second one")
    forget: str = option("forget", "the source whose frequent tokens are routed")
    retain: str = option("retain", "the source that they are compared with")
    smoothing: tuple[float, ...] = option(
        (1.0,), "added to every count: one number, or forget's and retain's"
    )
    scale: float = option(1.0, "the weight is 1 - sigmoid(scale * (r - 1/r) + bias)", above=0)
    bias: float = option(-4.0, "see scale")
    everywhere: bool = option(False, "whether the retain source's documents are labelled too")


@dataclass(frozen=True)
class LabelErrors:
    """Labels of the training documents that are made wrong on purpose."""

    false_negative: float = option(0.0, "the share of the route's that are missed", at_least=0, at_most=1)
    false_positive: float = option(
        0.0, "the share of the base route's that are taken for it", at_least=0, at_most=1
    )
    route: str | None = option(None, "the route; default: the second one")
    of: Literal["documents", "tokens"] = option("documents", "what is counted and mislabelled")


@dataclass(frozen=True)
class Labels:
    """Documents to a route for every token."""

    by: Literal["source", "frequency", "words", "regex", "column"] = option("source", "what decides")
    routes: Mapping[str, str] = option(
        {}, "source or column's value → route, * for all others; default: the route of the same name"
    )
    words: Mapping[str, tuple[str, ...]] = option({}, "route → words or phrases, for by: words")
    patterns: Mapping[str, str] = option({}, "route → regular expression, for by: regex")
    sources: tuple[str, ...] = option(
        (), "the sources that words and patterns are looked for in; default: all"
    )
    ignore_case: bool = option(True, "whether words and patterns match in upper and lower case")
    whole_words: bool = option(True, "whether words are matched as whole words only")
    frequency: Frequency = option(Frequency, "for by: frequency")
    share: float = option(1.0, "the share of training documents whose label is known", at_least=0, at_most=1)
    unlabelled: str | None = option(None, "the route of those whose label is not; default: the base route")
    errors: LabelErrors = option(LabelErrors, "labels made wrong on purpose")


@dataclass(frozen=True)
class Evaluate:
    """Held-out losses, generations, differences of tokens, harness tasks."""

    documents: int | None = option(None, "the most held-out documents a source; default: all", at_least=1)
    batch_tokens: int = option(4096, "tokens of a batch with padding", at_least=1)
    prompts: tuple[str, ...] = option((), "what every checkpoint continues, before prompts_each")
    prompts_each: int = option(2, "openings of held-out documents a source that are prompts too", at_least=0)
    prompt_tokens: int = option(32, "tokens of such an opening", at_least=1)
    new_tokens: int = option(40, "how many tokens a checkpoint adds", at_least=1)
    sample: bool = option(False, "whether tokens are drawn, rather than the likeliest taken")
    temperature: float = option(1.0, "logits are divided by it, where tokens are drawn", above=0)
    top_p: float = option(1.0, "the share of probability that tokens are drawn from", above=0, at_most=1)
    top: int = option(20, "how many of the tokens and contexts that moved most are shown", at_least=1)
    context: int = option(8, "tokens shown on each side of one that moved", at_least=1)
    tasks: tuple[str, ...] = option((), "tasks of lm-evaluation-harness, such as wmdp_bio and mmlu")
    tasks_folder: str | None = option(None, "a folder with YAML files of tasks of one's own", path=True)
    tasks_limit: int | None = option(None, "the first examples of a task alone; default: all", at_least=1)
    num_fewshot: int | None = option(None, "examples in a task's prompt; default: as it says", at_least=0)


@dataclass(frozen=True)
class Report:
    """The page."""

    title: str | None = option(None, "its heading; default: the recipe and the model")
