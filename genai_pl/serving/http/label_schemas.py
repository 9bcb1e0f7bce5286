"""Bodies and answers of the routes of classifiers and rerankers, in the forms of vLLM's and Jina's API."""

from typing import Annotated

from pydantic import AliasChoices, BaseModel, Field, model_validator

from genai_pl.serving.http.messages import Text
from genai_pl.serving.http.schemas import Body, Inputs, Tokens

Texts = Annotated[list[Text], Field(fail_fast=True, min_length=1)]


class ClassifyBody(Body):
    """Body of POST /classify: texts or token ids, and perhaps the second text of each."""

    input: Text | Tokens | Inputs
    text_pair: Text | Texts | None = Field(
        None, description="second texts of a classifier of pairs, one for each input"
    )
    model: Text | None = None

    @property
    def items(self) -> list[str | list[int]]:
        """The inputs as a list."""
        is_one = isinstance(self.input, str) or isinstance(self.input[0], int)
        return [self.input] if is_one else list(self.input)

    @property
    def pairs(self) -> list[str] | None:
        """The second texts as a list; None without them."""
        return [self.text_pair] if isinstance(self.text_pair, str) else self.text_pair

    @model_validator(mode="after")
    def _check_pairs(self) -> "ClassifyBody":
        if self.pairs is not None and len(self.pairs) != len(self.items):
            raise ValueError(f"{len(self.pairs)} texts in text_pair for {len(self.items)} inputs")
        if self.pairs is not None and not all(isinstance(item, str) for item in self.items):
            raise ValueError("text_pair goes with texts, not with token ids")
        return self


class ClassEntry(BaseModel):
    """Label and probabilities of one input; of several labels the likeliest, of one output its name."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class LabelUsage(BaseModel):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class ClassifyAnswer(BaseModel):
    """Answer of POST /classify."""

    id: str
    object: str = "list"
    created: int
    model: str
    data: list[ClassEntry]
    usage: LabelUsage


class Document(BaseModel):
    """A document as an object with a text."""

    text: Text


class RerankBody(Body):
    """Body of POST /rerank: a query and the documents to put in order."""

    query: Text
    documents: Annotated[list[Text | Document], Field(fail_fast=True, min_length=1)]
    top_n: Annotated[int, Field(ge=0, le=2**31)] = Field(0, description="documents in the answer; 0: all")
    return_documents: bool = Field(True, description="whether the answer repeats the texts")
    model: Text | None = None

    @property
    def texts(self) -> list[str]:
        """The documents as texts."""
        return [item if isinstance(item, str) else item.text for item in self.documents]


class RankedDocument(BaseModel):
    """A document's place in the request, and its relevance to the query."""

    index: int
    relevance_score: float
    document: Document | None = None


class RerankAnswer(BaseModel):
    """Answer of POST /rerank, the most relevant document first."""

    id: str
    model: str
    usage: LabelUsage
    results: list[RankedDocument]


class PairScoreBody(Body):
    """Body of POST /v1/score: one text or several, each with its second text; one first text goes with all second ones."""

    text_1: Text | Texts = Field(validation_alias=AliasChoices("text_1", "queries"), description="also queries")
    text_2: Text | Texts = Field(validation_alias=AliasChoices("text_2", "documents"), description="also documents")
    model: Text | None = None

    @property
    def pairs(self) -> tuple[list[str], list[str]]:
        """First and second texts (N each)."""
        first = [self.text_1] if isinstance(self.text_1, str) else self.text_1
        second = [self.text_2] if isinstance(self.text_2, str) else self.text_2
        return first * len(second) if len(first) == 1 else first, second

    @model_validator(mode="after")
    def _check_pairs(self) -> "PairScoreBody":
        first, second = self.pairs
        if len(first) != len(second):
            raise ValueError(f"{len(first)} texts in text_1 for {len(second)} in text_2: give one, or as many")
        return self


class PairScore(BaseModel):
    """Relevance of the second text of a pair to the first."""

    index: int
    object: str = "score"
    score: float


class PairScoreAnswer(BaseModel):
    """Answer of POST /v1/score."""

    id: str
    object: str = "list"
    created: int
    model: str
    data: list[PairScore]
    usage: LabelUsage
