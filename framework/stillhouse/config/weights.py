"""Where a student's weights begin, and adapters in their place: the tables [student.init] and
[student.lora]."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from stillhouse.config.fields import Count, CountOrZero, Name, Section, shown


class CutSection(Section):
    """A student that begins as a part of another model."""

    layers: Annotated[tuple[CountOrZero, ...], Field(min_length=1)] = Field(
        description="the layers of student.model to begin with, numbered from 0, in their order"
    )
    intermediate_size: Count | None = Field(
        None,
        description="the channels that each gated MLP keeps, those of the greatest weights; none: "
        "all of them",
    )

    @field_validator("layers")
    @classmethod
    def _are_in_order(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if list(layers) != sorted(set(layers)):
            raise ValueError(f"wanted each layer once, in ascending order; found {shown(layers)}")
        return layers


class LoraSection(Section):
    """Low-rank adapters, trained in place of the student's weights (LoRA, arXiv 2106.09685)."""

    rank: Annotated[int, Field(ge=1, le=1 << 14)] = Field(
        16, description="rank of the product that is added to each adapted matrix"
    )
    alpha: Annotated[float, Field(gt=0.0, le=1e6)] | None = Field(
        None, description="that product is scaled by alpha / rank; none: alpha is twice the rank"
    )
    targets: tuple[Name, ...] = Field(
        (),
        description="names of the linear layers to adapt, or the last parts of their names; none: "
        "all but the head",
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="share of an adapter's inputs that a training step leaves out"
    )
    quantise: Literal["none", "nf4"] = Field(
        "none",
        description="nf4: the frozen linear layers but the head in 4.5 bits a weight (QLoRA, arXiv "
        "2305.14314); needs the extra 'bits'",
    )
