"""GGUF files: unpacked once, to a directory of safetensors, which is loaded as any other.

directory = unpacked(Path("weights.gguf"), torch.float32)
restore_rotation(path, directory, network)      # Llama 3.1's, which no config holds
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

from paramspec.errors import InputError
from paramspec.execution.store import Store
from paramspec.models.checkpoints import check_report, checkpoint_files, digest_files
from paramspec.models.devices import device_map
from paramspec.models.gguf_config import honoured
from paramspec.models.libraries import is_of_a_library, line_of

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


UNPACKED = Path("results/gguf")  # where GGUF files are unpacked to, from the working directory
ROPE_FACTORS = "rope_factors.safetensors"


def unpacked(path: Path, dtype: torch.dtype) -> Path:
    """`unpacked(file, torch.float32)`: the directory of safetensors it is unpacked to, once."""
    from safetensors.torch import save_file

    store = Store(UNPACKED)
    key = {"unit": "gguf", "unpacking_version": 1, "dtype": str(dtype)}
    key["file"] = digest_files(checkpoint_files(path))
    with store.turn(key):
        directory = store.get(key)
        if directory is None:
            network, tokenizer, factors = _unpack(path, dtype)

            def write(folder: Path) -> None:
                network.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
                if factors is not None:
                    save_file({"factors": factors}, folder / ROPE_FACTORS)

            directory = store.put(key, write)
    return directory


def _unpack(
    path: Path, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, torch.Tensor | None]:
    """The network of a GGUF file on the CPU, its tokenizer, and what its rotation is divided by."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    reader = read_gguf(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    factors = tensors.pop("rope_freqs.weight", None)
    held = sum(int(tensor.n_elements) for tensor in tensors.values())
    device_map(held * dtype.itemsize, torch.device("cpu"))  # refuses what has no room
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no switch silences
        network, report = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=gguf_config(path, reader),
            # Since transformers 5 the weights stay packed unless this is asked for.
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    check_report(path, report)
    taken = sum(part.numel() for part in network.parameters())
    if held != taken:
        # transformers drops tensors it has no place for, without a word.
        raise InputError(
            f"{path}: holds {held} weights, of which {type(network).__name__} takes {taken}; "
            "use the model's safetensors"
        )
    values = None if factors is None else torch.from_numpy(factors.data.copy())
    if values is not None:
        _divide_rotation(path, network, values)  # refused here, if it is not understood
    return network, tokenizer, values


def gguf_config(path: Path, reader: GGUFReader) -> PreTrainedConfig:
    from transformers import AutoConfig

    return honoured(path, AutoConfig.from_pretrained(path.parent, gguf_file=path.name), reader)


def read_gguf(path: Path) -> GGUFReader:
    import gguf

    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InputError(f"{path}: not a GGUF file; name a GGUF file or a model directory")
    try:
        reader = gguf.GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
    except Exception as error:  # the reader meets the end of the file in many ways
        if not is_of_a_library(error):
            raise
        raise InputError(
            f"{path}: GGUF file corrupt or cut short ({type(error).__name__}: {line_of(error)}); "
            "copy or download it again"
        ) from error
    scaling = reader.fields.get(f"{architecture}.rope.scaling.type")
    if scaling is not None and scaling.contents() != "none":
        raise InputError(
            f"{path}: rope scaling {scaling.contents()!r}, which transformers does not read from "
            "GGUF; use the model's safetensors"
        )
    return reader


def restore_rotation(path: Path, directory: Path, network: PreTrainedModel) -> None:
    """`restore_rotation(file, unpacked(file, dtype), network)`: what no weight or config holds."""
    from safetensors.torch import load_file

    if (directory / ROPE_FACTORS).is_file():
        _divide_rotation(path, network, load_file(directory / ROPE_FACTORS)["factors"])


def _divide_rotation(path: Path, network: PreTrainedModel, values: torch.Tensor) -> None:
    """Llama 3.1 and later: a GGUF file divides each rotary frequency by a factor of its own.

    transformers leaves `rope_freqs.weight` out. It is llama.cpp's form of `rope_type: llama3`.
    """
    rotary = getattr(network.get_decoder(), "rotary_emb", None)
    if network.config.model_type != "llama" or rotary.inv_freq.shape != values.shape:
        raise InputError(
            f"{path}: rope_freqs.weight is understood for Llama only; use the model's safetensors"
        )
    for name in ("inv_freq", "original_inv_freq"):
        frequencies = getattr(rotary, name)
        frequencies.div_(values.to(frequencies.device))
