"""The pretrained models that ``make_configs`` writes configs for: where each comes from, and what loads it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial


@dataclass(frozen=True)
class Model:
    """One release on the hub. Components are dotted paths, lists and numbers YAML text."""

    title: str
    repo: str
    builder: str
    file_count: int  # of files with weights
    tokenizer: str
    tokenizer_file: str
    model_type: str
    lr: str
    checkpointer: str = "torchtune.training.FullModelHFCheckpointer"
    file_format: str = "model-{}-of-{}.safetensors"
    ignore: str = ""  # what `tune download` leaves out: other copies of the weights
    dense: str = '["*norm*"]'  # the patterns of norms and biases
    tensor_parallel_plan: str = "torchtune.models.llama3.base_llama_tp_plan"
    why_no_plan: str = ""  # where none fits
    is_tied: bool = False  # the output layer uses the embeddings, which cannot be gathered by themselves
    needs_token: bool = False  # for the download
    note: str = ""  # what a user must know before the download
    tokenizer_keys: Mapping[str, str] = field(default_factory=dict)  # its own, besides those of all

    @property
    def folder(self) -> str:
        return f"/tmp/{self.repo.split('/')[1]}"

    @property
    def download(self) -> str:
        ignore = f' --ignore-patterns "{self.ignore}"' if self.ignore else ""
        token = " --hf-token <HF_TOKEN>" if self.needs_token else ""
        return f"tune download {self.repo} --output-dir {self.folder}{ignore}{token}"

    @property
    def weights(self) -> dict[str, str]:
        """Values of a checkpointer's section, besides those that do not depend on the model."""
        count = f"{self.file_count:05d}"
        if self.file_count > 8:
            files = f'\n    filename_format: {self.file_format}\n    max_filename: "{count}"'
        elif self.file_count > 1:
            names = [self.file_format.format(f"{i:05d}", count) for i in range(1, self.file_count + 1)]
            files = "[\n" + ",\n".join(f"    {name}" for name in names) + "\n  ]"
        else:
            files = "[\n    model.safetensors\n  ]"
        return {
            "_component_": self.checkpointer,
            "checkpoint_dir": self.folder,
            "checkpoint_files": files,
            "model_type": self.model_type,
        }


_llama2 = partial(
    Model,
    tokenizer="torchtune.models.llama2.llama2_tokenizer",
    tokenizer_file="tokenizer.model",
    model_type="LLAMA2",
    lr="2e-5",
    file_format="pytorch_model-{}-of-{}.bin",
    ignore="*.safetensors",
    needs_token=True,
)
LLAMA2_7B = _llama2("Llama 2 7B", "meta-llama/Llama-2-7b-hf", "torchtune.models.llama2.llama2_7b", 2)
LLAMA2_7B_CHAT = _llama2("Llama 2 7B Chat", "meta-llama/Llama-2-7b-chat-hf", "torchtune.models.llama2.llama2_7b", 2)
LLAMA2_13B = _llama2("Llama 2 13B", "meta-llama/Llama-2-13b-hf", "torchtune.models.llama2.llama2_13b", 3)
LLAMA2_70B = _llama2("Llama 2 70B", "meta-llama/Llama-2-70b-hf", "torchtune.models.llama2.llama2_70b", 15)


def _llama3(version: str, size: str, repo: str, file_count: int, **more) -> Model:
    module = "llama" + version.replace(".", "_")
    return Model(
        f"Llama {version} {size}{' Instruct' if repo.endswith('Instruct') else ''}",
        f"meta-llama/{repo}",
        f"torchtune.models.{module}.{module}_{size.lower()}",
        file_count,
        tokenizer="torchtune.models.llama3.llama3_tokenizer",
        tokenizer_file="original/tokenizer.model",
        lr="2e-5",
        ignore="original/consolidated*",
        needs_token=True,
        **{"model_type": "LLAMA3", **more},
    )


LLAMA3_8B = _llama3("3", "8B", "Meta-Llama-3-8B-Instruct", 4)
LLAMA3_8B_BASE = _llama3("3", "8B", "Meta-Llama-3-8B", 4)
LLAMA3_70B = _llama3("3", "70B", "Meta-Llama-3-70B-Instruct", 30)
LLAMA3_1_8B = _llama3("3.1", "8B", "Meta-Llama-3.1-8B-Instruct", 4)
LLAMA3_1_70B = _llama3("3.1", "70B", "Meta-Llama-3.1-70B-Instruct", 30)
LLAMA3_2_1B = _llama3("3.2", "1B", "Llama-3.2-1B-Instruct", 1, model_type="LLAMA3_2", is_tied=True)
LLAMA3_2_3B = _llama3("3.2", "3B", "Llama-3.2-3B-Instruct", 2, model_type="LLAMA3_2", is_tied=True)
LLAMA3_3_70B = _llama3("3.3", "70B", "Llama-3.3-70B-Instruct", 30)

_mistral = partial(
    Model,
    tokenizer="torchtune.models.mistral.mistral_tokenizer",
    tokenizer_file="tokenizer.model",
    model_type="MISTRAL",
    lr="5e-6",
    file_format="pytorch_model-{}-of-{}.bin",
    ignore="*.safetensors",
    needs_token=True,
)
_MISTRAL_7B = "torchtune.models.mistral.mistral_7b"
MISTRAL_7B = _mistral("Mistral 7B v0.1", "mistralai/Mistral-7B-v0.1", _MISTRAL_7B, 2)
MISTRAL_7B_INSTRUCT = _mistral("Mistral 7B Instruct v0.1", "mistralai/Mistral-7B-Instruct-v0.1", _MISTRAL_7B, 2)
MISTRAL_7B_V0_3 = Model(
    "Mistral 7B Instruct v0.3",
    "mistralai/Mistral-7B-Instruct-v0.3",
    "gmt_tune.models.mistral.mistral_7b_v0_3",
    3,
    tokenizer="gmt_tune.models.mistral.mistral_v0_3_tokenizer",
    tokenizer_file="tokenizer.json",
    model_type="MISTRAL",
    lr="5e-6",
    ignore="consolidated.safetensors",
    needs_token=True,
)


def _qwen2_5(size: str, builder: str, file_count: int, **more) -> Model:
    return Model(
        f"Qwen2.5 {size} Instruct",
        f"Qwen/Qwen2.5-{size}-Instruct",
        f"torchtune.models.qwen2_5.{builder}",
        file_count,
        tokenizer="gmt_tune.models.qwen2_5.qwen2_5_tokenizer",
        tokenizer_file="tokenizer.json",
        model_type="QWEN2",
        dense='["*norm*", "*.bias"]',
        **{"lr": "5e-6", **more},
    )


QWEN2_5_0_5B = _qwen2_5("0.5B", "qwen2_5_0_5b", 1, lr="2e-5", is_tied=True)
QWEN2_5_1_5B = _qwen2_5("1.5B", "qwen2_5_1_5b_instruct", 1, lr="2e-5", is_tied=True)
QWEN2_5_3B = _qwen2_5("3B", "qwen2_5_3b", 2, is_tied=True)
QWEN2_5_7B = _qwen2_5("7B", "qwen2_5_7b_instruct", 4)
QWEN2_5_14B = _qwen2_5("14B", "qwen2_5_14b_instruct", 8)
QWEN2_5_32B = _qwen2_5("32B", "qwen2_5_32b_instruct", 17)


def _qwen3(size: str, file_count: int, **more) -> Model:
    return Model(
        f"Qwen3 {size}",
        f"Qwen/Qwen3-{size}",
        f"gmt_tune.models.qwen3.qwen3_{size.lower().replace('.', '_')}",
        file_count,
        tokenizer="gmt_tune.models.qwen3.qwen3_tokenizer",
        tokenizer_file="tokenizer.json",
        tokenizer_keys={"enable_thinking": "False"},
        model_type="gmt_tune.models.qwen3",
        checkpointer="gmt_tune.models.FullModelHFCheckpointer",
        tensor_parallel_plan="gmt_tune.models.qwen3.qwen3_tp_plan",
        **{"lr": "5e-6", **more},
    )


QWEN3_0_6B = _qwen3("0.6B", 1, lr="2e-5", is_tied=True)
QWEN3_1_7B = _qwen3("1.7B", 2, lr="2e-5", is_tied=True)
QWEN3_4B = _qwen3("4B", 3, is_tied=True)
QWEN3_8B = _qwen3("8B", 5)
QWEN3_14B = _qwen3("14B", 8)
QWEN3_32B = _qwen3("32B", 17)


def _gemma2(size: str, file_count: int) -> Model:
    return Model(
        f"Gemma 2 {size} Instruct",
        f"google/gemma-2-{size.lower()}-it",
        f"gmt_tune.models.gemma2.gemma2_{size.lower()}",
        file_count,
        tokenizer="gmt_tune.models.gemma2.gemma2_tokenizer",
        tokenizer_file="tokenizer.json",
        model_type="gmt_tune.models.gemma2",
        lr="5e-6",
        checkpointer="gmt_tune.models.FullModelHFCheckpointer",
        dense='["*.scale"]',  # its norms behind attention and MLP are sa_scale and mlp_scale
        tensor_parallel_plan="",
        why_no_plan="its attention is a module of its own, and the output layer uses the embeddings",
        is_tied=True,
        needs_token=True,
        note="Google's license must be accepted on the model's page on the hub before the download.",
    )


GEMMA2_2B = _gemma2("2B", 2)
GEMMA2_9B = _gemma2("9B", 4)
GEMMA2_27B = _gemma2("27B", 12)

PHI4_14B = Model(
    "Phi-4 14B",
    "microsoft/phi-4",
    "gmt_tune.models.phi4.phi4_14b",
    6,
    tokenizer="gmt_tune.models.phi4.phi4_tokenizer",
    tokenizer_file="tokenizer.json",
    model_type="PHI4",
    lr="5e-6",
)
