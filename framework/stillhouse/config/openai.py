"""The table [teacher.openai]: a server that scores a prompt by its token ids, and what it may
cost."""

import re
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from stillhouse.config.fields import Name, Seconds, Section

_URL = re.compile(r"https?://[^\s/?#@]+(?:/[^\s?#@]*)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class OpenAISection(Section):
    """A server with the routes of OpenAI's API, whose completions know `prompt_logprobs`."""

    base_url: Name = Field(description="its address, up to /v1")
    served_model: Name | None = Field(
        None, description="the name under which it has the teacher; none: the only one it lists"
    )
    api_key_env: Name = Field(
        "OPENAI_API_KEY", description="the environment variable that has its key, if it wants one"
    )
    max_logprobs: Annotated[int, Field(ge=1, le=4096)] = Field(
        20, description="entries a token that it gives at most; of vLLM, its --max-logprobs"
    )
    max_in_flight: Annotated[int, Field(ge=1, le=4096)] = Field(
        32, description="requests that each actor has on their way at one time"
    )
    timeout_s: Seconds = Field(
        600.0, description="seconds without an answer after which a request is sent again"
    )
    usd_per_million_tokens: Annotated[float, Field(ge=0.0, le=1e6)] = Field(
        0.0, description="its price; above 0, answers are kept until their chunk is published"
    )
    max_cost_usd: Annotated[float, Field(gt=0.0, le=1e6)] | None = Field(
        None, description="what the targets of one recipe may cost, over all runs; none: no limit"
    )

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
    def _the_limit_can_be_kept(self) -> "OpenAISection":
        if self.max_cost_usd is not None and self.usd_per_million_tokens == 0:
            raise ValueError(
                f"max_cost_usd is {self.max_cost_usd:g}, but usd_per_million_tokens is 0, so "
                "nothing would be counted; set the price, or leave max_cost_usd out"
            )
        return self
