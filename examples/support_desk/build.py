"""Train the demo bundle from scratch: a tokenizer, a small Mistral base and one plain LoRA adapter for each task.

    python examples/support_desk/build.py DATA

DATA holds `train.jsonl.gz`, `dev.jsonl.gz` and `tasks.json` (see README.md beside this file). Every stage is
seeded and skipped when its output exists; the base resumes from its last checkpoint, and the adapters from their
last evaluation. Two CPU cores took about an hour and a half when the adapters were trained one after the other.
"""

import argparse
import gzip
import json
import math
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from sklearn.metrics import f1_score, roc_auc_score
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from loraplex.classifier import normalized
from loraplex.cli.main import app
from loraplex.training.run import HIDDEN

BOS, EOS, PAD, ASK, VERDICT = "<s>", "</s>", "<pad>", "<|ask|>", "<|verdict|>"
SPECIAL_TOKENS = [BOS, EOS, PAD, ASK, VERDICT]
TEMPLATE = "{conversation}" + ASK + "{question}" + VERDICT
LABELS = ["yes", "no"]
VOCAB_SIZE = 4096
MAX_LENGTH = 768
NOISE = 0.06  # mean share of a conversation's tokens that training replaces by padding

Example = dict[str, Any]


def read_examples(path: Path) -> list[Example]:
    """Return the examples, with conversations as the server renders them."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        examples = [json.loads(line) for line in file]
    return [{**example, "conversation": normalized(example["conversation"])} for example in examples]


def progress(description: str, total: int) -> tuple[Progress, TaskID]:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    bar.start()
    return bar, bar.add_task(description, total=total, note="")


# --------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(train: list[Example], questions: list[str], folder: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with a BOS. "yes" and "no" become whole tokens because the corpus repeats them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [example["conversation"] for example in train] + questions * 50 + LABELS * 1000
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[ASK, VERDICT],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    fast.save_pretrained(folder)
    return fast


def token_ids(tokenizer: PreTrainedTokenizerFast, tokens: list[str]) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]


# -------------------------------------------------------------------------------------------------- base


def new_base(vocab_size: int) -> MistralForCausalLM:
    """Return a base with random weights at 1 / sqrt(fan-in), and smaller still in the last layers of residual branches.
    With the default 0.02, the verdicts began to be learnt only after three times as many steps."""
    config = MistralConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        sliding_window=None,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        rms_norm_eps=1e-5,
    )
    model = MistralForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            std = 0.04 if "embed" in name else parameter.shape[1] ** -0.5
            if "o_proj" in name or "down_proj" in name:
                std /= math.sqrt(2 * config.num_hidden_layers)
            torch.nn.init.normal_(parameter, std=std)
    return model


def base_optimizers(model: MistralForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices, and AdamW for embeddings and norms."""
    embeddings = [p for name, p in model.named_parameters() if "embed" in name]
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": embeddings, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr=3e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95), fused=True),
    ]


def drop_tokens(ids: torch.Tensor, droppable: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Replace tokens by padding, so that rows are not learnt by heart. Each row has its own rate, up to 2 x NOISE."""
    rate = torch.rand((len(ids), 1), generator=rng) * 2 * NOISE
    return ids.masked_fill((torch.rand(ids.shape, generator=rng) < rate) & droppable, 2)


def length_buckets(lengths: list[int], batch_size: int, rng: random.Random) -> Iterator[list[int]]:
    """Yield batches of indices for ever. A batch holds similar lengths, so little of it is padding."""
    while True:
        order = list(range(len(lengths)))
        rng.shuffle(order)
        batches = []
        for start in range(0, len(order), batch_size * 50):
            pool = sorted(order[start : start + batch_size * 50], key=lengths.__getitem__)
            batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        rng.shuffle(batches)
        yield from (batch for batch in batches if len(batch) == batch_size)


def block_batch(
    conversations: list[list[int]], answers: list[list[int]], ask: int, verdict: int, first_task: int
) -> dict[str, torch.Tensor]:
    """Return one row for each conversation: its tokens, then (ask, task, verdict) for every task. A task's three tokens
    see only the conversation and themselves, and their positions continue the conversation's. So a row holds as many
    independent question-answer pairs as there are tasks."""
    num_tasks = len(answers[0])
    longest = max(map(len, conversations))
    width = longest + 3 * num_tasks
    batch = len(conversations)
    ids = torch.full((batch, width), 2)
    positions = torch.zeros((batch, width), dtype=torch.long)
    block = torch.full((batch, width), -1)  # -1 padding, 0 conversation, 1.. a question
    lm_target = torch.full((batch, width), -100)
    for row, tokens in enumerate(conversations):
        n = len(tokens)
        ids[row, :n] = torch.tensor(tokens)
        lm_target[row, : n - 1] = ids[row, 1:n]
        positions[row, :n] = torch.arange(n)
        block[row, :n] = 0
        for task in range(num_tasks):
            at = longest + 3 * task
            ids[row, at : at + 3] = torch.tensor([ask, first_task + task, verdict])
            positions[row, at : at + 3] = torch.arange(n, n + 3)
            block[row, at : at + 3] = task + 1
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    same = block[:, :, None] == block[:, None, :]
    mask = causal & (same | (block[:, None, :] == 0))  # a padding query sees padding, so that no row is empty
    verdict_at = longest + 3 * torch.arange(num_tasks) + 2
    return {
        "ids": ids,
        "positions": positions,
        "mask": mask[:, None],
        "lm_target": lm_target,
        "verdict_at": verdict_at,
        "answers": torch.tensor(answers),
    }


def cosine(step: int, total: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total))))


@dataclass(frozen=True)
class Asked:
    """Conversations as token ids, and for each the token of every task's answer."""

    conversations: list[list[int]]
    answers: list[list[int]]

    @classmethod
    def of(cls, examples: list[Example], tasks: list[str], tokenizer: PreTrainedTokenizerFast) -> "Asked":
        yes, no = token_ids(tokenizer, LABELS)
        encoded: Any = tokenizer([example["conversation"] for example in examples])
        return cls(
            conversations=[tokens[:MAX_LENGTH] for tokens in encoded["input_ids"]],
            answers=[[yes if example["labels"][task] else no for task in tasks] for example in examples],
        )

    def batch(self, rows: list[int], ask: int, verdict: int, first_task: int) -> dict[str, torch.Tensor]:
        conversations, answers = [self.conversations[i] for i in rows], [self.answers[i] for i in rows]
        return block_batch(conversations, answers, ask, verdict, first_task)


def run_blocks(model: MistralForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    hidden: torch.Tensor = model.model(
        input_ids=batch["ids"], position_ids=batch["positions"], attention_mask=batch["mask"], use_cache=False
    ).last_hidden_state
    return hidden


@torch.no_grad()
def score_base(
    model: MistralForCausalLM, dev: Asked, yes: int, no: int, ask: int, verdict: int, first_task: int
) -> tuple[float, float]:
    """Return mean F1 and AUC over the tasks, asked through the task tokens."""
    order = sorted(range(len(dev.answers)), key=lambda i: len(dev.conversations[i]))
    margins, truth = [], []
    for start in range(0, len(order), 32):
        batch = dev.batch(order[start : start + 32], ask, verdict, first_task)
        batch = {key: value.to(model.device) for key, value in batch.items()}
        with torch.autocast(model.device.type, torch.bfloat16):
            verdicts = model.lm_head(run_blocks(model, batch)[:, batch["verdict_at"]]).float()
        margins.append((verdicts[..., yes] - verdicts[..., no]).cpu())
        truth.append(batch["answers"].cpu() == yes)
    margin, true = torch.cat(margins), torch.cat(truth)
    tasks = range(true.shape[1])
    f1 = [f1_score(true[:, task], margin[:, task] > 0, zero_division=0.0) for task in tasks]
    auc = [roc_auc_score(true[:, task], margin[:, task]) for task in tasks]
    return sum(f1) / len(f1), sum(auc) / len(auc)


def train_base(
    train: list[Example],
    dev: list[Example],
    tasks: list[str],
    tokenizer: PreTrainedTokenizerFast,
    work: Path,
    args: argparse.Namespace,
) -> Path:
    """Train the base on text and verdicts together, and return its folder. The task tokens are cut off at the end."""
    final = work / "base"
    if (final / "model.safetensors").exists():
        return final
    vocab_size = len(tokenizer)
    ask, verdict = token_ids(tokenizer, [ASK, VERDICT])
    yes, no = token_ids(tokenizer, LABELS)
    asked, asked_dev = Asked.of(train, tasks, tokenizer), Asked.of(dev[::4], tasks, tokenizer)

    model = new_base(vocab_size + len(tasks)).to(args.device)
    optimizers = base_optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, args.base_steps, 100))
        for optimizer in optimizers
    ]
    parts = [model, *optimizers, *schedules]
    batches = length_buckets([len(tokens) for tokens in asked.conversations], 16, random.Random(args.seed))
    rng = torch.Generator().manual_seed(args.seed + 1)
    checkpoint, start = work / "base.ckpt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for part, saved in zip(parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        rng.set_state(state["rng"])
        start = state["step"]
        for _ in range(start):
            next(batches)

    bar, task_id = progress("base", args.base_steps)
    bar.update(task_id, completed=start)
    for step in range(start, args.base_steps):
        batch = asked.batch(next(batches), ask, verdict, vocab_size)
        talk = batch["lm_target"] != -100
        batch["ids"] = drop_tokens(batch["ids"], talk & (batch["positions"] > 0), rng)
        batch["talk"] = talk & (torch.rand(talk.shape, generator=rng) < 0.5)  # half of the tokens suffice
        batch = {key: value.to(args.device) for key, value in batch.items()}
        with torch.autocast(args.device, torch.bfloat16):
            hidden = run_blocks(model, batch)
            lm_loss = F.cross_entropy(model.lm_head(hidden[batch["talk"]]).float(), batch["lm_target"][batch["talk"]])
            verdicts = model.lm_head(hidden[:, batch["verdict_at"]]).float()
            verdict_loss = F.cross_entropy(verdicts.flatten(0, 1), batch["answers"].flatten())
        (lm_loss + 8 * verdict_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        bar.update(task_id, advance=1, note=f"lm {lm_loss.item():.3f} verdict {verdict_loss.item():.3f}")
        if (step + 1) % 200 == 0 or step + 1 == args.base_steps:
            f1, auc = score_base(model, asked_dev, yes, no, ask, verdict, vocab_size)
            print(f"step {step + 1} verdict {verdict_loss.item():.3f} dev F1 {f1:.3f} AUC {auc:.3f}", flush=True)
            state = {"parts": [part.state_dict() for part in parts], "rng": rng.get_state(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").rename(checkpoint)
    bar.stop()
    model.resize_token_embeddings(vocab_size)
    model.to("cpu", torch.bfloat16).save_pretrained(final)
    return final


# ---------------------------------------------------------------------------------------------- adapters


def train_adapters(train: list[Example], questions: dict[str, str], args: argparse.Namespace) -> None:
    """Train the plain adapters with `loraplex train`, all at once, unless they are there. This ends the script."""
    is_interrupted = (args.out / HIDDEN / "state.pt").exists()
    if all((args.out / name / "classifier.yaml").exists() for name in questions) and not is_interrupted:
        return
    data, asked = args.work / "adapters.jsonl", args.work / "questions.yaml"
    drawn = random.Random(args.seed).sample(train, min(args.adapter_examples, len(train)))
    data.write_text("".join(json.dumps(example) + "\n" for example in drawn), encoding="utf-8")
    asked.write_text(json.dumps(questions), encoding="utf-8")  # JSON is YAML
    options = {
        "base": args.out,
        "data": data,
        "out": args.out,
        "kind": "lora",
        "prompt": "question",
        "questions": asked,
        "template": TEMPLATE,
        "max-length": MAX_LENGTH,
        "learning-rate": 2e-3,
        "epochs": 1,
        "golden": 0,  # the bundle holds no text of the data
        "log-dir": args.work,
        "device": args.device,
        "seed": args.seed,
    }
    command = [f"--{name}={value}" for name, value in options.items()] + [f"--classifier={name}" for name in questions]
    app(["train", *command, "--resume" if is_interrupted else "--overwrite"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train.jsonl.gz, dev.jsonl.gz and tasks.json")
    parser.add_argument(
        "--work", type=Path, default=Path("build/support_desk"), help="folder of checkpoints (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "bundle",
        help="folder of the bundle (default: beside this file)",
    )
    parser.add_argument("--base-steps", type=int, default=3200)
    parser.add_argument("--adapter-examples", type=int, default=4000, help="conversations to train the adapters on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)

    tasks = json.loads((args.data / "tasks.json").read_text())["tasks"]
    train, dev = read_examples(args.data / "train.jsonl.gz"), read_examples(args.data / "dev.jsonl.gz")
    if (args.out / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    else:
        tokenizer = train_tokenizer(train, [task["question"] for task in tasks], args.out)
    base = train_base(train, dev, [task["name"] for task in tasks], tokenizer, args.work, args)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copyfile(base / name, args.out / name)
    train_adapters(train, {task["name"]: task["question"] for task in tasks}, args)


if __name__ == "__main__":
    main()
