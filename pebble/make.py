"""Step 2: pebble's words, and a first checkpoint in each form: the trained tower, everything else at random.

python pebble/make.py --tower runs/pebble/tower.pt --output runs/pebble/start
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from draw import LETTERS, scene
from shape import TEMPLATE, pebble
from talk import turns
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

from pumice.checkpoints import write_hf
from pumice.network.llava import Llava
from pumice.prompt import Message, prompt_text, render

SPECIALS = ("<s>", "<|im_start|>", "<|im_end|>", "<image>", "<pad>")
VOCAB = 512


def tokenizer() -> Tokenizer:
    """A byte-level BPE over what is said. Capitals and digits stand alone: a sign is spelled letter by letter."""
    made = Tokenizer(models.BPE())
    alone = pre_tokenizers.Split(Regex("[A-Z0-9]"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([alone, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIALS),
        show_progress=False,
    )
    made.train_from_iterator((_said(index) for index in range(3000)), trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return made


def _said(index: int) -> str:
    talk = turns(scene(index), random.Random(f"turns-{index}"))
    messages = [
        Message(role, text) for turn in talk for role, text in (("user", turn.question), ("assistant", turn.answer))
    ]
    return prompt_text(render(TEMPLATE, messages))


def initialised(network: Llava) -> Llava:
    """Normal weights of 0.02, smaller where a block adds to the stream (GPT-2)."""
    depth = network.config.text.layers
    for name, weight in network.named_parameters():
        if name.startswith("vision_tower"):
            continue
        if weight.dim() > 1:
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(weight, std=0.02 / (2 * depth) ** 0.5 if adds else 0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(weight)
        elif name == "image_newline":
            nn.init.normal_(weight, std=0.02)
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    chosen = parser.parse_args()
    torch.manual_seed(2)
    words = chosen.output / "words"
    words.mkdir(parents=True, exist_ok=True)
    made = tokenizer()
    made.save(str(words / "tokenizer.json"))
    names = {
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (words / "tokenizer_config.json").write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")
    assert all(len(made.encode(letter, add_special_tokens=False).ids) == 1 for letter in LETTERS)
    for form in ("1.5", "1.6"):
        config = pebble(
            form, vocab=VOCAB, image_token_id=made.token_to_id("<image>"), end_id=made.token_to_id("<|im_end|>")
        )
        network = initialised(Llava(config))
        network.vision_tower.load_state_dict(torch.load(chosen.tower, weights_only=True)["tower"])
        write_hf(chosen.output / f"pebble-{form}", config, network.state_dict(), tokenizer_files=words)


if __name__ == "__main__":
    main()
