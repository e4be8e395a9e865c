"""The ``log`` section of a configuration: where the report of each step goes."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

_Text = Annotated[str, Field(min_length=1)]
_Bound = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]

PLACES = ("jsonl", "tensorboard", "wandb", "mlflow", "trackio", "accelerate")
"""Keys that name a place; one of them has to be there."""


class StatesConfig(BaseModel):
    """Bounds for what is called normal, exploding and vanishing."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    normal: Annotated[list[_Bound], Field(min_length=2, max_length=2)] = Field(
        default=[1.0, 10.0], description="Norms between these are ordinary."
    )
    exploding: _Bound = Field(default=100.0, description="Norms from here on are large.")
    vanishing: _Bound = Field(default=0.01, description="Norms below this are small.")

    @model_validator(mode="after")
    def _in_order(self) -> StatesConfig:
        low, high = self.normal
        if not self.vanishing <= low <= high <= self.exploding:
            raise ValueError("expected vanishing <= normal[0] <= normal[1] <= exploding")
        return self


class NoiseConfig(BaseModel):
    """The gradient noise scale, from the gradients of the data-parallel ranks."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    batch: Annotated[int, Field(ge=2)] = Field(
        description="Samples of one step, over all micro-batches and ranks."
    )
    micro_batches: Annotated[int, Field(ge=1)] = Field(
        default=1, description="Backwards of one step."
    )
    every: Annotated[int, Field(ge=1)] = Field(default=10, description="Sample every n-th step.")
    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.95, description="Of the moving averages, per sampled step."
    )

    @model_validator(mode="after")
    def _of_one_sample_at_least(self) -> NoiseConfig:
        if self.batch < self.micro_batches:
            raise ValueError("batch counts the samples of all micro_batches, and is fewer")
        return self


class LogConfig(BaseModel):
    """Where the report of each step is written."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        json_schema_extra={"anyOf": [{"required": [place]} for place in PLACES]},
    )

    jsonl: _Text | None = Field(
        default=None,
        description="File that gets one JSON object a line; relative to the working directory. "
        "Only the main rank writes; an existing file is appended to.",
    )
    tensorboard: _Text | None = Field(
        default=None, description="Folder of TensorBoard's event files."
    )
    wandb: _Text | None = Field(
        default=None,
        description="Project of Weights & Biases; a run that is active is used as it is.",
    )
    mlflow: _Text | None = Field(
        default=None, description="Experiment of MLflow; a run that is active is used as it is."
    )
    trackio: _Text | None = Field(
        default=None, description="Project of Trackio; a run that is active is used as it is."
    )
    accelerate: bool = Field(
        default=False, description="Log to the trackers of the Accelerator, whatever they are."
    )
    every: Annotated[int, Field(ge=1)] = Field(default=1, description="Write every n-th step.")
    per_parameter: bool = Field(
        default=False, description="Write each parameter's norm and coefficient too."
    )
    modules: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Write the joint norms of the parameters whose names begin alike too, up to "
        "this many parts of the name (2: layers.0, layers.1).",
    )
    noise_scale: NoiseConfig | None = Field(
        default=None,
        description="Write the gradient noise scale too: about how many samples a step can use. "
        "Needs data-parallel ranks (DDP, FSDP2) or micro-batches; one small all-reduce every n "
        "steps.",
    )
    states: StatesConfig = Field(
        default_factory=StatesConfig,
        description="Bounds for what is called normal, exploding and vanishing.",
    )

    @model_validator(mode="after")
    def _somewhere(self) -> LogConfig:
        if not any(getattr(self, place) for place in PLACES):
            raise ValueError(f"names no place to write to; give one of {', '.join(PLACES)}")
        return self
