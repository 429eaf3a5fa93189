"""Train `tiny_recall`, the embedded checkpoint, from random weights, in about five minutes.

    python -m tools.tiny_recall.train --out DIR     train, measure, save
    python -m tools.tiny_recall.train --check DIR   measure what is saved

Training uses one thread, seeded draws and deterministic kernels, so the same seed and versions on
the same kind of CPU give the same bytes. The model is small and has everything that a cache must
serve: alternating Mamba and attention layers, three query heads per KV head, and answers that
need all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    PreTrainedTokenizerFast,
)

from granite_paged.checkpoints.recall import (
    BOS,
    EOS,
    FIRST_VALUE,
    KEYS,
    LOST,
    NOT_SCORED,
    PAD,
    PLAIN_VALUES,
    UNK,
    VALUES,
    VOCAB_SIZE,
    VOCABULARY,
    RecallBatch,
    recall_batch,
)
from tools.tiny_recall.record import (
    RECORD,
    WEIGHTS,
    measure,
    shortfalls,
    write_record,
)

# --- the model -----------------------------------------------------------------------------------

LAYER_TYPES = ("linear_attention", "full_attention") * 2
LONGEST_CONTEXT = 131072  # tokens; nothing in the model depends on it


def tiny_config() -> GraniteMoeHybridConfig:
    """Return the config: layers M, A, M, A; 6 query and 2 KV heads; no rotary, no experts."""
    return GraniteMoeHybridConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=96,
        num_hidden_layers=len(LAYER_TYPES),
        layer_types=list(LAYER_TYPES),
        num_attention_heads=6,
        num_key_value_heads=2,
        attention_multiplier=0.25,  # 1 / sqrt(head_dim)
        position_embedding_type=None,
        mamba_expand=1,
        mamba_n_heads=3,
        mamba_d_head=32,
        mamba_d_state=8,
        mamba_d_conv=4,
        mamba_chunk_size=32,
        intermediate_size=96,
        shared_intermediate_size=96,
        num_local_experts=0,
        num_experts_per_tok=0,
        tie_word_embeddings=True,
        initializer_range=0.1,
        max_position_embeddings=LONGEST_CONTEXT,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def untrained_model(seed: int) -> GraniteMoeHybridForCausalLM:
    """Make a model with initial values from which recall is learnt quickly."""
    torch.manual_seed(seed)
    model = GraniteMoeHybridForCausalLM(tiny_config())
    with torch.no_grad():
        embedding: Tensor = model.model.embed_tokens.weight  # [vocabulary, hidden]
        embedding.normal_(std=0.3)
        embedding[PAD] = 0
        for layer in model.model.layers:
            if layer.mamba is not None:
                _start_mamba(layer.mamba)
    return model


def _start_mamba(mamba: Any) -> None:
    taps = mamba.conv1d.weight  # [channels, 1, 4]: the last tap is the token itself
    taps.uniform_(-0.3, 0.3)
    # Half of the channels first look one token back, so a value's position sees its key.
    taps[0::2, 0, -2] += 1
    taps[1::2, 0, -1] += 1
    mamba.A_log.zero_()
    # Time steps of 0.003 to 0.1 make states last for tens to hundreds of tokens.
    time_step = torch.logspace(-2.5, -1, mamba.num_heads)
    mamba.dt_bias.copy_(time_step.expm1().log())  # the inverse of softplus


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per word, split at white space, padding on the left."""
    vocabulary = {word: token for token, word in enumerate(VOCABULARY)}
    words = Tokenizer(WordLevel(vocabulary, unk_token=VOCABULARY[UNK]))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=VOCABULARY[PAD],
        bos_token=VOCABULARY[BOS],
        eos_token=VOCABULARY[EOS],
        unk_token=VOCABULARY[UNK],
        padding_side="left",
        model_max_length=LONGEST_CONTEXT,
    )


# --- making every layer count --------------------------------------------------------------------
#
# Plain training finds a model that recalls through one attention layer, ignores the other, and
# takes the mode from attention too. Such a model would not notice a wrong cache in what it ignores.
# So attention layers fail in some rows: the first layer loses the even keys, the second the odd
# ones, and the mode must be answered without either. Each layer becomes the only source of one
# parity, and the SSM state the only source of the mode.

_NONE, _FIRST, _SECOND, _BOTH = (False, False), (True, False), (False, True), (True, True)
FAILURES = (_NONE, _FIRST, _NONE, _SECOND, _BOTH, _FIRST, _NONE, _SECOND)
"""Which attention layers fail, row by row. Both never fail in two rows running, so every batch of
two rows or more has something to recall."""


@dataclass(frozen=True)
class Disturbance:
    """Which attention layers fail in which rows, and how.

    A failing layer outputs zeros or, in later stages, the next row's output. The target of a
    question that is lost is LOST after zeros; after a substitution the question is not scored.
    """

    fails: Tensor  # bool [2, B]: the first layer, which loses the even keys, and the second
    by_substitution: bool

    @classmethod
    def draw(cls, rows: int, seed: int, *, by_substitution: bool) -> Disturbance:
        """Assign FAILURES to rows in turn; the seed decides where the first row starts."""
        turn = (seed + torch.arange(rows)) % len(FAILURES)
        return cls(torch.tensor(FAILURES)[turn].T, by_substitution)

    def loses(self, batch: RecallBatch) -> Tensor:
        """Questions whose fact is out of reach: bool [B, S]."""
        needs = torch.stack([batch.of_parity(0), batch.of_parity(1)])  # [2, B, S]
        return (self.fails[..., None] & needs).any(dim=0)

    def targets(self, batch: RecallBatch) -> Tensor:
        """Return the target tokens, [B, S]."""
        return batch.targets.masked_fill(
            self.loses(batch), NOT_SCORED if self.by_substitution else LOST
        )

    @contextmanager
    def applied_to(self, model: GraniteMoeHybridForCausalLM) -> Iterator[None]:
        """Make the attention layers fail inside the context."""
        attention = [layer.self_attn for layer in model.model.layers if layer.mamba is None]
        with ExitStack() as hooks:
            for module, rows in zip(attention, self.fails, strict=True):
                hooks.callback(module.register_forward_hook(self._failing(rows)).remove)
            yield

    def _failing(self, rows: Tensor) -> Callable[[nn.Module, Any, Any], Any]:
        def replace(_module: nn.Module, _args: Any, output: tuple[Tensor, Any]) -> Any:
            attended, weights = output  # [B, S, hidden]
            # Detached, so that the next row does not learn to be harmless here.
            wrong = attended.detach().roll(-1, dims=0) if self.by_substitution else 0.0
            return torch.where(rows[:, None, None], wrong, attended), weights

        return replace


def mode_loss(logits: Tensor, mode: Tensor) -> Tensor:
    """Return the cross entropy of answering in the right mode, whatever the value.

    logits: [questions, vocabulary]; mode: [questions].
    """
    values = logits[:, FIRST_VALUE : FIRST_VALUE + VALUES]
    modes = torch.unflatten(values, 1, (2, PLAIN_VALUES)).logsumexp(dim=-1)  # [questions, 2]
    return cross_entropy(modes, mode)


# --- training ------------------------------------------------------------------------------------

TOKENS_PER_STEP = 2112
LEARNING_RATE = 3e-3
BETAS = (0.9, 0.98)
GRADIENT_NORM = 1.0
WARM_UP = 100  # steps
DECAY = 150  # steps, on the last stage's task
LEARNT = 0.95  # smoothed training accuracy that ends a stage
SMOOTHING = 0.05
MOST_STEPS = 3000  # in one stage
MODE_INTERVALS = (4, 8, 16)  # slots, in turn: practise keeping a mode and replacing it
SEED_STRIDE = 2**20  # draws between two seeds; more than any training has steps


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum, a little harder than the one before."""

    context: int  # tokens
    pairs: int
    keys: int
    with_replacement: bool = False
    substitutes: bool = True  # substitute in every other step; else only zero

    @property
    def rows(self) -> int:
        """Sequences per step."""
        return TOKENS_PER_STEP // self.context

    def __str__(self) -> str:
        return f"{self.pairs} of {self.keys} keys in {self.context} tokens"


CURRICULUM = (
    Stage(50, 8, 16, with_replacement=True, substitutes=False),
    Stage(66, 8, 32, with_replacement=True, substitutes=False),
    Stage(96, 12, 64, substitutes=False),
    Stage(128, 16, KEYS),
    Stage(256, 36, KEYS),
    Stage(512, 64, KEYS),
    Stage(1024, 64, KEYS),
)


class StageNotLearnt(Exception):
    """A stage did not reach its accuracy within its steps."""

    def __init__(self, stage: Stage, accuracy: float) -> None:
        super().__init__(f"{stage}: accuracy {accuracy:.3f} after {MOST_STEPS} steps")


Report = Callable[[str, float, str], None]
"""Called after each step with the stage, the share done (0 to 1) and the state in words."""


class Trainer:
    """Owns the optimiser and the step count, which decides every draw."""

    def __init__(self, model: GraniteMoeHybridForCausalLM, seed: int) -> None:
        self.model = model
        self.steps = 0
        self._first_draw = seed * SEED_STRIDE
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS)

    def learn(self, stage: Stage, report: Report) -> None:
        """Train until the stage's smoothed accuracy exceeds `LEARNT`."""
        accuracy = 0.0
        for step in range(MOST_STEPS):
            warmth = min(1.0, (self.steps + 1) / WARM_UP)
            accuracy += SMOOTHING * (self.step(stage, LEARNING_RATE * warmth) - accuracy)
            report(
                str(stage), min(1.0, accuracy / LEARNT), f"{accuracy:.3f} after {step + 1} steps"
            )
            if accuracy > LEARNT:
                return
        raise StageNotLearnt(stage, accuracy)

    def settle(self, stage: Stage, report: Report) -> None:
        """Train while the learning rate falls to zero."""
        for step in range(DECAY):
            accuracy = self.step(stage, LEARNING_RATE * (1 - step / DECAY))
            report("settling", (step + 1) / DECAY, f"{accuracy:.3f} after {step + 1} steps")

    def step(self, stage: Stage, learning_rate: float) -> float:
        """Make one update. Returns the accuracy on the questions that are within reach."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        loss, accuracy = self._loss(stage)
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        self._optimizer.step()
        self.steps += 1
        return accuracy

    def _loss(self, stage: Stage) -> tuple[Tensor, float]:
        seed = self._first_draw + self.steps
        batch = recall_batch(
            context=stage.context,
            pairs=stage.pairs,
            keys=stage.keys,
            batch=stage.rows,
            seed=seed,
            mode_interval=MODE_INTERVALS[self.steps % len(MODE_INTERVALS)],
            with_replacement=stage.with_replacement,
        )
        by_substitution = stage.substitutes and self.steps % 2 == 1
        disturbance = Disturbance.draw(stage.rows, seed, by_substitution=by_substitution)
        with disturbance.applied_to(self.model):
            hidden = self.model.model(batch.input_ids, use_cache=False).last_hidden_state
        scored = batch.scored
        logits = self.model.lm_head(hidden[scored])  # [questions, vocabulary]
        loss = cross_entropy(logits, disturbance.targets(batch)[scored])
        loss = loss + mode_loss(logits, batch.mode[scored])

        answerable = ~disturbance.loses(batch)[scored]
        right = logits.argmax(dim=-1) == batch.targets[scored]
        return loss, right[answerable].float().mean().item()


def train(seed: int, report: Report) -> tuple[GraniteMoeHybridForCausalLM, int]:
    """Train a model. Returns it in evaluation mode, and the number of steps."""
    model = untrained_model(seed).train()
    trainer = Trainer(model, seed)
    for stage in CURRICULUM:
        trainer.learn(stage, report)
    trainer.settle(CURRICULUM[-1], report)
    return model.eval(), trainer.steps


# --- command line --------------------------------------------------------------------------------


def make_repeatable() -> None:
    """Use one thread and deterministic kernels in this process."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


@contextmanager
def progress_bar() -> Iterator[Report]:
    """Show one bar per stage on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        bars: dict[str, TaskID] = {}

        def report(stage: str, done: float, state: str) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=1.0, state="")
            progress.update(bars[stage], completed=done, state=state)

        yield report


def train_and_save(out: Path, seed: int) -> dict[str, Any]:
    """Train, save a Hugging Face folder and measure it. Returns the record."""
    began = time.perf_counter()
    with progress_bar() as report:
        model, steps = train(seed, report)
    training = {"seed": seed, "steps": steps, "seconds": round(time.perf_counter() - began)}
    model.save_pretrained(out)
    word_tokenizer().save_pretrained(out)
    return write_record(out, training)


def judge(folder: Path, measured: dict[str, Any]) -> int:
    """Print the measurements and the missed bounds. Returns the exit status."""
    print(json.dumps(measured, indent=2))
    short = shortfalls(folder, measured)
    for line in short:
        print(line, file=sys.stderr)
    return 1 if short else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.tiny_recall.train",
        description="Train the embedded recall checkpoint, or check a saved one.",
        epilog="Exit status: 0 all bounds hold, 1 a bound is missed or training failed, 2 usage.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="DIR", help="train and save into DIR")
    what.add_argument("--check", type=Path, metavar="DIR", help="only measure DIR")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (default: 0)")
    options = parser.parse_args(arguments)
    if options.check and not all((options.check / name).is_file() for name in (WEIGHTS, RECORD)):
        parser.error(f"{options.check} does not hold both {WEIGHTS} and {RECORD}")
    if not 0 <= options.seed < SEED_STRIDE:
        parser.error(f"--seed must be in 0..{SEED_STRIDE - 1}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train or check. Returns the exit status."""
    options = parse(arguments)
    make_repeatable()
    if options.check:
        return judge(options.check, measure(options.check))
    try:
        return judge(options.out, train_and_save(options.out, options.seed))
    except StageNotLearnt as failure:
        print(failure, file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
