#!/usr/bin/env python3
"""Make the demo model in lockstep/assets/demo: a 6.5 M parameter Llama trained on the Python standard library.

    python scripts/train_demo_model.py                 # about 75 minutes on one CPU core
    python scripts/train_demo_model.py --resume        # go on from the last checkpoint
    python scripts/train_demo_model.py --steps 3000    # a step budget: repeatable on one machine

Needs torch, transformers, tokenizers and safetensors; nothing is downloaded, since the corpus is the source code of the
running interpreter's own standard library.  The learning rate follows the share of the budget (steps or minutes,
whichever is further along) that has been used, so that a time budget always ends with a fully decayed rate.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import random
import sysconfig
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 20240607
ROOT = Path(__file__).resolve().parent.parent
END, START, STOP, PAD = SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
SYSTEM = "You are a helpful Python programming assistant."
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
SKIPPED_FILES = (
    "encodings/cp*.py",
    "encodings/mac_*.py",
    "encodings/iso8859*.py",
    "encodings/koi8*.py",
    "config-*/*.py",
    "_sysconfigdata*.py",  # build settings of this very machine, its paths among them
)
# Newlines stay with the indentation behind them, so that "\n        " is one token; the rest is GPT-2's pattern.
PRETOKEN = r"\n+ *| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 3,
    "torch_dtype": "bfloat16",
}
GENERATION_CONFIG = {"bos_token_id": 0, "eos_token_id": [0, 2], "pad_token_id": 3}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": None,
    "eos_token": END,
    "pad_token": PAD,
    "additional_special_tokens": [START, STOP],
    "model_max_length": CONFIG["max_position_embeddings"],
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}


# ---------------------------------------------------------------------------------------------------------- corpus


def stdlib_files() -> Iterator[tuple[str, str]]:
    """Yield (relative path, text) of the standard library's sources, tests and data tables left out."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or any(relative.match(skipped) for skipped in SKIPPED_FILES):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield relative.as_posix(), text.replace("\r\n", "\n").replace("\f", "")


def is_held_out(path: str) -> bool:
    """Choose about 2 % of the files for validation, by their names alone."""
    return hashlib.sha256(path.encode()).digest()[0] < 5


def chat_text(user: str, answer: str, system: str | None) -> str:
    """Write one exchange as the chat template does."""
    turns = [("system", system)] if system else []
    turns += [("user", user), ("assistant", answer)]
    return "".join(f"{START}{role}\n{content}{STOP}\n" for role, content in turns)


def chat_samples(text: str, rng: random.Random) -> Iterator[str]:
    """Turn each short function that has a docstring into a request for it and its code."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or not (doc := ast.get_docstring(node)):
            continue
        code = textwrap.dedent(ast.get_source_segment(text, node, padded=True) or "")
        if 60 <= len(code) <= 2000:
            request = f"Write a Python function `{node.name}({ast.unparse(node.args)})`: {doc.splitlines()[0].strip()}"
            yield chat_text(request, code, SYSTEM if rng.random() < 0.3 else None)


def load_corpus(chat_share: float = 0.1) -> tuple[list[str], list[str]]:
    """Return the training and the validation documents; `chat_share` of the training text is in chat format."""
    rng = random.Random(SEED)
    train, held_out, chats = [], [], []
    for path, text in stdlib_files():
        if is_held_out(path):
            held_out.append(text)
        else:
            train.append(text)
            chats.extend(chat_samples(text, rng))
    wanted = chat_share / (1 - chat_share) * sum(map(len, train))
    rng.shuffle(chats)
    for sample in chats:
        if wanted <= 0:
            break
        wanted -= len(sample)
        train.append(sample)
    rng.shuffle(train)
    return train, held_out


# ------------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train the byte-level BPE; the special tokens take the ids 0 to 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PRETOKEN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_all(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """Encode the documents into one row of ids, the end token behind each."""
    end = tokenizer.token_to_id(END)
    ids = [np.array([*encoding.ids, end], dtype=np.int64) for encoding in tokenizer.encode_batch(texts)]
    return torch.from_numpy(np.concatenate(ids))


# ----------------------------------------------------------------------------------------------------------- files


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    temporary.chmod(0o644)  # safetensors makes its files private, and a wheel would keep that
    os.replace(temporary, path)


def write_json(path: Path, value: dict) -> None:
    """Write `value` as indented JSON."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def save_static_files(out: Path, tokenizer: Tokenizer) -> None:
    """Write all files of the model's folder but the weights."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "tokenizer.json", lambda temporary: tokenizer.save(str(temporary), pretty=False))
    write_json(out / "tokenizer_config.json", TOKENIZER_CONFIG)
    write_json(out / "config.json", CONFIG)
    write_json(out / "generation_config.json", GENERATION_CONFIG)


def save_weights(out: Path, model: LlamaForCausalLM) -> None:
    """Write the weights in bfloat16; the tied output layer is not stored."""
    state = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    state.pop("lm_head.weight", None)
    write_atomically(out / "model.safetensors", lambda temporary: save_file(state, temporary, metadata={"format": "pt"}))


# -------------------------------------------------------------------------------------------------------- training


class Batches:
    """Windows of the training row: each epoch cuts it at another offset and shuffles the pieces."""

    def __init__(self, ids: torch.Tensor, tokens: int) -> None:
        """Cut the row `ids` into batches of `tokens` tokens."""
        self.ids, self.tokens = ids, tokens

    def get(self, step: int, length: int) -> torch.Tensor:
        """Return the step's batch, [tokens / length, length + 1]; the same for the same step."""
        rows = max(1, self.tokens // length)
        windows = (len(self.ids) - 1) // length - 1
        per_epoch = windows // rows
        epoch, index = divmod(step, per_epoch)
        rng = np.random.default_rng([SEED, length, epoch])
        offset = int(rng.integers(length))
        chosen = rng.permutation(windows)[index * rows : (index + 1) * rows]
        return torch.stack([self.ids[offset + i * length : offset + (i + 1) * length + 1] for i in map(int, chosen)])


class Trainer:
    """The model, its optimizer, and the schedule."""

    def __init__(self, args: argparse.Namespace, train: torch.Tensor, held_out: torch.Tensor) -> None:
        """Make a fresh model; `train` and `held_out` are rows of token ids."""
        torch.manual_seed(SEED)
        self.args, self.held_out = args, held_out
        self.batches = Batches(train, args.batch_tokens)
        self.model = LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation="sdpa")).float()
        self.forward = torch.compile(self.loss, dynamic=False) if args.compile else self.loss
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        gains = [p for p in self.model.parameters() if p.ndim != 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
        self.step, self.used = 0, 0.0  # steps made, seconds trained

    def loss(self, window: torch.Tensor) -> torch.Tensor:
        """Return the mean next-token loss."""
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(window[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())

    def progress(self) -> float:
        """Return the share of the budget that has been used."""
        return max(self.step / self.args.steps if self.args.steps else 0.0, self.used / (60 * self.args.minutes))

    def learning_rate(self) -> float:
        """Return the rate: linear warm-up over 100 steps, then a cosine down to 1 %."""
        decay = 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress())))
        return self.args.lr * min(1.0, (self.step + 1) / 100) * (0.01 + 0.99 * decay)

    def train_step(self) -> float:
        """Make one optimizer step and return its loss; the last tenth of the budget sees the full context."""
        length = 512 if self.progress() < 0.9 else CONFIG["max_position_embeddings"]
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = self.forward(self.batches.get(self.step, length))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return float(loss.detach())

    @torch.no_grad()
    def validate(self, length: int = 512) -> float:
        """Return the mean loss over the held-out files."""
        windows = self.held_out[: (len(self.held_out) - 1) // length * length + 1].unfold(0, length + 1, length)
        return float(np.mean([float(self.loss(window[None])) for window in windows]))

    def checkpoint(self) -> None:
        """Write the weights for use, and the whole state to go on from."""
        save_weights(self.args.out, self.model)
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step, "used": self.used}
        write_atomically(self.args.state, lambda temporary: torch.save(state, temporary))

    def resume(self) -> None:
        """Take up the state of the last checkpoint."""
        state = torch.load(self.args.state, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.used = state["step"], state["used"]

    def run(self) -> None:
        """Train until the budget is used, reporting and saving on the way."""
        before, saved, losses = time.monotonic(), self.used, []
        while self.progress() < 1:
            losses.append(self.train_step())
            now = time.monotonic()
            before, self.used = now, self.used + now - before
            if len(losses) == 50:
                self.report(losses)
                losses = []
            if self.used - saved > 60 * self.args.save_minutes:
                self.checkpoint()
                print(f"checkpoint  validation loss {self.validate():.4f}", flush=True)
                saved = self.used
        self.checkpoint()
        print(f"done  step {self.step}  validation loss {self.validate():.4f}  at 2048: {self.validate(2048):.4f}", flush=True)

    def report(self, losses: list[float]) -> None:
        """Print the mean loss since the last report, and the speed so far."""
        speed = self.step * self.args.batch_tokens / max(self.used, 1e-9)
        print(f"step {self.step}  {self.used / 60:.1f} min  loss {np.mean(losses):.4f}  {speed:.0f} tokens/s", flush=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "lockstep" / "assets" / "demo", help="folder of the model")
    parser.add_argument("--state", type=Path, default=Path(tempfile.gettempdir()) / "lockstep_demo_state.pt", help="training state")
    parser.add_argument("--resume", action="store_true", help="go on from --state")
    parser.add_argument("--minutes", type=float, default=75.0, help="time budget of the training")
    parser.add_argument("--steps", type=int, default=0, help="step budget; 0: none")
    parser.add_argument("--save-minutes", type=float, default=8.0, help="time between checkpoints")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="do not use torch.compile")
    return parser.parse_args()


def main() -> None:
    """Make the tokenizer, the token rows and the model."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    train, held_out = load_corpus()
    # On resuming, the ids must stay those which the weights were trained on, whatever the library is now.
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json")) if args.resume else train_tokenizer(train)
    save_static_files(args.out, tokenizer)
    trainer = Trainer(args, encode_all(tokenizer, train), encode_all(tokenizer, held_out))
    sizes = f"{len(trainer.batches.ids)} training and {len(held_out)} files / {len(trainer.held_out)} held-out tokens"
    print(f"{sum(map(len, train))} characters, {sizes}, {trainer.model.num_parameters()} parameters", flush=True)
    if args.resume:
        trainer.resume()
    trainer.run()


if __name__ == "__main__":
    main()
