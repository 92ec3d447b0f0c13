"""The ``gradient_mask:`` section of an Axolotl config, as Axolotl's validation sees it."""

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gmt_tune.integrations.transformers import GradientMaskCallback
from gmt_tune.integrations.transformers.compact import state_bits_of
from gmt_tune.masking.parameters import DEFAULT_DENSE


class GradientMaskSection(BaseModel):
    """Options of ``GradientMaskCallback``, under their own names. Unknown keys and wrong types are refused."""

    # Strict: YAML's true is no density, and "4" no number of steps
    model_config = ConfigDict(extra="forbid", strict=True)

    density: float = Field(description="Fraction of the gradient's entries that stay, in (0, 1].")
    score: str = Field("magnitude", description="What entries are ranked by: magnitude, saliency or random.")
    scope: str = Field("tensor", description="Top fraction of each tensor, or global: of all together.")
    refresh_every: int | None = Field(1, description="Optimizer steps between selections; null selects once.")
    dense: list[str] | None = Field(list(DEFAULT_DENSE), description="Name patterns of what is updated in full.")
    frozen: list[str] = Field(default_factory=list, description="Name patterns of what is not updated at all.")
    seed: int = Field(0, description="Of the random score.")
    error_if_nonfinite: bool = Field(True, description="Raise if a gradient holds NaN or infinity.")
    track_selection_every: int | None = Field(None, description="Optimizer steps between looks at the overlap.")
    log_by_group: bool = Field(True, description="Give the mask by module and layer to reporters.")
    compact: bool = Field(False, description="CompactAdamW: gradients and states of selected entries alone.")
    state_bits: int | str | None = Field(None, description="Of it: 32, 8, 4 or fp8; null: as optimizer says.")
    bf16_stochastic_round: bool = Field(False, description="Of it: bfloat16 weights are rounded by chance.")

    @model_validator(mode="after")
    def _accepted_by_the_callback(self):
        GradientMaskCallback(**self.model_dump())  # its own checks and sentences; patterns need the model
        return self


class GradientMaskArgs(BaseModel):
    """What the plugin adds to Axolotl's config."""

    gradient_mask: GradientMaskSection | None = None

    @model_validator(mode="before")
    @classmethod
    def _plugin_can_work(cls, data):
        if not isinstance(data, dict):
            return data
        if data.get("gradient_mask") is None:
            # Axolotl ignores keys that it does not know: a misspelt section would train without a mask
            raise ValueError(
                "the plugin GradientMaskPlugin needs a section gradient_mask with at least a density, such as "
                "density: 0.2; for plain full fine-tuning take it out of plugins"
            )
        fsdp = data.get("fsdp_config") or {}
        version = data.get("fsdp_version") or fsdp.get("fsdp_version") or fsdp.get("version")
        if (fsdp or data.get("fsdp")) and str(version) != "2":  # Axolotl takes a version left out to be 1
            raise ValueError(
                "FSDP version 1 flattens parameters together, where gradient_mask finds no tensor's threshold: set "
                "fsdp_version: 2"
            )
        if isinstance(data["gradient_mask"], dict) and data["gradient_mask"].get("compact") is True:
            state_bits_of(str(data.get("optimizer") or "adamw_torch_fused"))
            if data.get("fp16") or data.get("float16"):
                raise ValueError(
                    "fp16 scales gradients, and gradient_mask with compact: true would take them still scaled: set "
                    "bf16: true"
                )
            if data.get("deepspeed"):
                raise ValueError(
                    "gradient_mask with compact: true takes gradients before DeepSpeed reduces them: leave compact "
                    "out, or leave deepspeed out and set fsdp_version: 2 with an fsdp_config"
                )
        return data
