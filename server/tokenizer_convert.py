"""Run as a process of its own: makes a tokenizer.json out of an older vocabulary, with transformers.

Usage: python -m …tokenizer_convert DIRECTORY TARGET
"""

from __future__ import annotations

import sys


def main(directory: str, target: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, use_fast=True, trust_remote_code=False, local_files_only=True)
    tokenizer.backend_tokenizer.save(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
