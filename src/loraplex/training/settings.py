"""What a training run is told: every option of `loraplex train`, and every key of its YAML file."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from loraplex.config import Budget, EitherCase, valid_device
from loraplex.errors import listed
from loraplex.problems import NumbersAreNoBooleans, wrong

OF_DEV = ("select", "patience", "golden")  # settings that say what is made of dev
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


def _each_once(given: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of a list in which several may stand with commas."""
    return tuple(dict.fromkeys(name.strip() for one in given for name in one.split(",") if name.strip()))


class TrainInputs(NumbersAreNoBooleans):
    """What is trained, from what and to where. Paths are relative to the working directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str | None = Field(None, description="the base to train adapters for: a folder, or an id on the hub")
    data: str | None = Field(None, description="labelled conversations: a .jsonl or .jsonl.gz file")
    out: str | None = Field(None, description="the folder to write the adapters into, a bundle")
    classifier: Annotated[
        tuple[str, ...],
        AfterValidator(_each_once),
        BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    ] = Field((), description="train these, with commas; all that have labels by default")
    questions: str | None = Field(
        None,
        description="YAML file: classifier -> its question, or keys of its contract, such as labels with the positive "
        "one first; by default that is yes, true, 1 or positive, else the first in the alphabet",
    )
    log_dir: str | None = Field(
        None, description="folder for log.csv, and for TensorBoard's files if it is installed; by default OUT/.training"
    )
    dry_run: bool = Field(False, description="report on the data, and end")
    resume: bool = Field(False, description="go on where an interrupted run with the same data and options ended")
    overwrite: bool = Field(
        False, description="replace adapters that the folder of --out already holds, and an interrupted run's state"
    )
    load: str | None = Field(
        None, description="URL of a running server to load the adapters into, as shadows of what answers there now"
    )


class TrainSettings(NumbersAreNoBooleans):
    """How adapters are trained. The defaults were chosen by measuring; docs/training.md says what was tried."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Annotated[Literal["alora", "lora", "score"], EitherCase] = Field(
        "alora",
        description="alora, whose adapters share a conversation's computation; lora; or score, lora with a head of its "
        "own (SEQ_CLS)",
    )
    prompt: Annotated[Literal["short", "question"], EitherCase] = Field(
        "short", description="what stands behind the conversation: short, a few tokens; or the question in words"
    )
    rank: int = Field(16, ge=1, le=1024, description="rank of each LoRA update")
    alpha: float | None = Field(None, gt=0, description="scale of the updates; twice the rank by default")
    targets: str = Field(
        "all-linear",
        description="layers to train: all-linear, or the ends of their names with commas, such as q_proj,v_proj",
    )
    template: str | None = Field(None, description="the prompt, with {conversation}; by default from the chat template")
    invocation: str | None = Field(
        None, description="with kind alora: the text in the prompt from which on the adapter acts; by default its end"
    )
    max_length: int | None = Field(
        None, ge=8, description="maximum tokens of a prompt, by default the base's; older turns are cut"
    )
    learning_rate: float = Field(1e-3, gt=0, le=1, description="the highest; it rises, then falls as a cosine")
    epochs: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="passes over the training conversations; by default 3, or as many as make 60 steps, but 30 at most",
    )
    batch: int = Field(16, ge=1, le=4096, description="conversations in one step")
    step_tokens: int = Field(8192, ge=64, description="maximum tokens computed at once; a step takes several passes")
    kv_memory: Budget = Field(
        "30%",
        description="memory for the conversations' keys and values, which are then computed once, and not in each pass "
        "over the data: a size, or a share of what is free",
    )
    warmup: Share = Field(0.05, description="share of the steps while the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    max_norm: float = Field(1.0, gt=0, description="largest gradient norm of an adapter; a larger one is scaled down")
    balance: Annotated[Literal["weights", "none"], EitherCase] = Field(
        "weights", description="against rare labels: weights in the loss, taken off again by the calibration; or none"
    )
    dev: Share = Field(0.1, description="share of the conversations that choose the best weights")
    calibration: Share = Field(
        0.1, description="share of the conversations that temperature, bias and threshold are fitted on"
    )
    threshold: Annotated[Literal["f1", "none"], EitherCase] = Field(
        "f1",
        description="of classifiers with two labels: f1, the one with the highest F1; or none, which answers the "
        "likelier label",
    )
    select: Annotated[Literal["f1", "auc", "log_loss"], EitherCase] = Field(
        "f1", description="what the best weights are best at, on dev: f1, auc or log_loss"
    )
    patience: int = Field(8, ge=1, description="an adapter stops after so many evaluations without a better one")
    evaluations: int = Field(4, ge=1, description="evaluations in each pass, every 4th step at most")
    golden: int = Field(
        2,
        ge=0,
        le=100,
        description="examples of each label that the contract keeps, to prove a load; texts that `loraplex routes "
        "export` wrote are never among them",
    )
    seed: int = Field(0, ge=0, description="draws the split, the order of the conversations and the first weights")
    device: Annotated[str, AfterValidator(valid_device), EitherCase] = Field(
        "auto", description="where to compute: auto, cpu, cuda or cuda:N"
    )
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], EitherCase] = Field(
        "auto", description="number format of the base's weights and of what is computed; the adapters' are float32"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "TrainSettings":
        if self.dev + self.calibration >= 1:
            raise wrong("'dev' and 'calibration' leave nothing to train on", "give shares such as 0.1 and 0.1")
        if self.invocation is not None and self.kind != "alora":
            raise wrong(f"'invocation' has no effect with kind {self.kind}", "leave it out")
        without = [name for name in OF_DEV if name in self.model_fields_set] if self.dev == 0 else []
        if without:
            raise wrong(f"{listed(without)} has no effect with dev 0", "leave it out")
        return self

    @property
    def scale(self) -> float:
        """LoRA's alpha."""
        return 2.0 * self.rank if self.alpha is None else self.alpha
