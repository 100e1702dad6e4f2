"""The tables of servers, and what they may cost: [teacher.openai], which scores prompts by their
token ids, and [writer.openai], which writes."""

import re
from abc import abstractmethod
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from stillhouse.config.fields import Name, Seconds, Section

_URL = re.compile(r"https?://[^\s/?#@]+(?:/[^\s?#@]*)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

Price = Annotated[float, Field(ge=0.0, le=1e6)]
MostCost = Annotated[float, Field(gt=0.0, le=1e6)]


class ServerSection(Section):
    """A server with the routes of OpenAI's API."""

    base_url: Name = Field(description="its address, up to /v1")
    served_model: Name | None = Field(
        None, description="the name under which it has the model; none: the only one it lists"
    )
    api_key_env: Name = Field(
        "OPENAI_API_KEY", description="the environment variable that has its key, if it wants one"
    )
    max_in_flight: Annotated[int, Field(ge=1, le=4096)] = Field(
        32, description="requests that each actor has on their way at one time"
    )
    timeout_s: Seconds = Field(
        600.0, description="seconds without an answer after which a request is sent again"
    )
    max_cost_usd: MostCost | None = Field(
        None, description="what one recipe's blocks may cost, over all commands; none: no limit"
    )

    @property
    @abstractmethod
    def usd_in_and_out(self) -> tuple[float, float]:
        """The price of a million tokens: of prompts, and of what is written to them."""

    @property
    def is_paid(self) -> bool:
        return any(self.usd_in_and_out)

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        if not _URL.fullmatch(url):  # which is not shown: it may hold a password
            raise ValueError(
                "wanted http:// or https:// with host, port and path, such as "
                "http://10.0.0.5:8000/v1, without a user, a key or a query; a key belongs into the "
                "variable that api_key_env names"
            )
        return url.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _is_a_variable(cls, name: str) -> str:
        if not _VARIABLE.fullmatch(name):  # which is not shown: it may be the key itself
            raise ValueError(
                "wanted the NAME of an environment variable, such as OPENAI_API_KEY; set that "
                "variable to the key, which no config should hold"
            )
        return name

    @model_validator(mode="after")
    def _the_limit_can_be_kept(self) -> Self:
        if self.max_cost_usd is not None and not self.is_paid:
            raise ValueError(
                f"max_cost_usd is {self.max_cost_usd:g}, but the price is 0, so nothing would be "
                "counted; set the price (usd_per_million_...), or leave max_cost_usd out"
            )
        return self


class ScoringSection(ServerSection):
    """A server whose completions know `prompt_logprobs`, as vLLM's own do."""

    max_logprobs: Annotated[int, Field(ge=1, le=4096)] = Field(
        20, description="entries a token that it gives at most; of vLLM, its --max-logprobs"
    )
    usd_per_million_tokens: Price = Field(
        0.0, description="its price; above 0, answers are kept until their chunk is published"
    )

    @property
    def usd_in_and_out(self) -> tuple[float, float]:
        return self.usd_per_million_tokens, self.usd_per_million_tokens


class ChatSection(ServerSection):
    """A server that answers: its chat completions for conversations, its completions for texts."""

    request: dict[str, str | bool | int | float] = Field(
        {},
        description="more fields of each request, or others in place of ours, such as "
        '{reasoning_effort = "low", max_completion_tokens = 4096}; part of what identifies it',
    )

    usd_per_million_input_tokens: Price = Field(
        0.0, description="the price of prompts; above 0, answers are kept until they are published"
    )
    usd_per_million_output_tokens: Price = Field(
        0.0, description="the price of what is written, thinking included"
    )

    @property
    def usd_in_and_out(self) -> tuple[float, float]:
        return self.usd_per_million_input_tokens, self.usd_per_million_output_tokens


class WritingSection(ChatSection):
    """A server that writes samples."""

    top_logprobs: Annotated[int, Field(ge=0, le=20)] = Field(
        0,
        description="the likeliest tokens at each place whose log-probabilities are asked for; a "
        "student can learn from them where each is one id of `model`'s tokenizer; 0: text alone",
    )
