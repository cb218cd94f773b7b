"""llama.cpp as a foreign program: node-llama-cpp out of npm, whose packages carry binaries for the CPU.

Nothing is compiled, and no line of it was written for qadapt. It lies in the cache once it was brought.
"""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers.normalizers import NFC
from transformers import PreTrainedTokenizerFast

from qadapt.cache import cache_folder

VERSION = "3.22.1"
PLATFORMS = {
    ("linux", "x86_64"): "linux-x64",
    ("linux", "aarch64"): "linux-arm64",
    ("darwin", "arm64"): "mac-arm64-metal",
    ("darwin", "x86_64"): "mac-x64",
    ("win32", "AMD64"): "win-x64",
    ("win32", "ARM64"): "win-arm64",
}
SCRIPT = Path(__file__).with_name("foreign_runtime.mjs")
PIECES = (
    " ", "  ", "\n", "\n\n", "\t", " \n ", "the", " and", "Hello", "WORLD", "don't", "I'LL", " we've",
    "x1y2", "1", "12", "123", "1234567", "3.14", "1,000", "¼", "²", ".", "...", "?!", "—", "«", "»",
    '"', "'", "`", "```", "(", ")", "{", "}", "[[", "]]", "<", ">", "</s>", "<|", "|>", "#", "##",
    "@", "&amp;", "\\n", "\\", "/", "://", "def f(x):", "    return", "==", "+=", "->", "straße", "naïve",
    "e\u0301", "Ångström", "ﬁ", "日本語", "中文", "한국어", "русский", "Ελληνικά", "עברית", "العربية",
    "हिन्दी", "ไทย", "🌊", "👩‍👩‍👧", "🇳🇴", "\u00a0", "\u200b", "\u3000", "…", "€", "∑", "¿", "Ⅷ",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What llama.cpp is asked, in token ids.

    `prompts` are answered greedily up to one of `end_ids`; of `scored`, the probabilities of the next token
    are told; `texts` are cut into tokens, special ones among them.
    """

    end_ids: Sequence[int]
    prompts: Sequence[Sequence[int]] = ()
    scored: Sequence[Sequence[int]] = ()
    texts: Sequence[str] = ()
    max_new_tokens: int = 48
    context_tokens: int = 1024


@dataclass(frozen=True)
class Heard:
    """What llama.cpp said of one GGUF file."""

    answers: list[list[int]]
    tokens: list[list[int]]
    adds_bos: bool
    ends_known: list[bool]
    release: str
    warnings: list[str]
    probabilities: list[dict[int, float]] = field(default_factory=list)


def runtime() -> Path:
    """The folder that has node-llama-cpp, brought by npm if it is not there yet."""
    name = PLATFORMS.get((sys.platform, platform.machine()))
    npm = shutil.which("npm")
    if name is None or npm is None or shutil.which("node") is None:
        sys.exit(f"There is no foreign runtime for {sys.platform} {platform.machine()}, or no node and npm.")
    folder = cache_folder() / "bench" / f"node-llama-cpp-{VERSION}"
    whole = folder / "whole"
    if not whole.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "package.json").write_text('{"private": true}', encoding="utf-8")
        packages = [f"node-llama-cpp@{VERSION}", f"@node-llama-cpp/{name}@{VERSION}"]
        options = ["--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund", "--loglevel=error"]
        print(f"npm install {' '.join(packages)}", flush=True)
        subprocess.run([npm, "install", *options, *packages], cwd=folder, check=True)
        whole.touch()
    shutil.copyfile(SCRIPT, folder / SCRIPT.name)
    return folder


def ask(folder: Path, gguf: Path, task: Task, *, lora: Path | None = None) -> Heard:
    """What llama.cpp makes of a GGUF file, with a LoRA file on it or not; ends the program where it fails."""
    given = {
        "model": str(gguf.resolve()), "lora": lora and str(lora.resolve()),
        "endIds": task.end_ids, "prompts": task.prompts, "scored": task.scored,
        "texts": task.texts, "maxNewTokens": task.max_new_tokens, "contextTokens": task.context_tokens,
        "threads": int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())),
    }  # fmt: skip
    done = subprocess.run(
        ["node", SCRIPT.name],
        cwd=folder,
        input=json.dumps(given),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"llama.cpp failed on {gguf}:\n{done.stderr[-2000:]}")
    said: dict[str, Any] = json.loads(done.stdout)
    return Heard(
        said["answers"],
        said["tokens"],
        said["addsBos"],
        said["endsKnown"],
        said["release"],
        said["warnings"],
        [dict(each) for each in said["probabilities"]],
    )


def drawn_texts(count: int, *, seed: int, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Texts of words, numbers, blanks, code and scripts, thrown together.

    A tokenizer that brings texts to Unicode's NFC first gets them so: llama.cpp does not.
    """
    draw = random.Random(seed)
    texts = ["".join(draw.choices(PIECES, k=draw.randint(1, 24))) for _ in range(count)]
    if isinstance(tokenizer.backend_tokenizer.normalizer, NFC):
        return [unicodedata.normalize("NFC", text) for text in texts]
    return texts
