"""Accuracy of a checkpoint against sampling steps, and a look at the unmasking itself.

    python eval.py CHECKPOINT                                accuracy at several numbers of sampling steps
    python eval.py CHECKPOINT --base MODEL                   the same, beside the model that it was trained from
    python eval.py CHECKPOINT --show 2 --steps 4             two examples unmasked before your eyes, step by step
    python eval.py CHECKPOINT --samples 8 --temperature 1    also pass@8 and the majority vote of 8
    torchrun --nproc_per_node 8 eval.py CHECKPOINT           on 8 GPUs, which share out the examples

CHECKPOINT and MODEL are whatever `agrpo.load_model` reads: the folder of a run, a checkpoint in it, a LLaDA or Dream
folder or hub id. Defaults are the run's own task, data, lengths and steps; the paper's protocol for other 8B models.
Greedy, as by default, or with the sampling options of the run, the figures are those that training wrote.
"""

import importlib.util
import json
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import transformers as hf
from tqdm import tqdm

import agrpo
from agrpo import Task, option, rank, world_size


@dataclass
class Options:
    checkpoint: str = field(default="", init=False)  # the positional argument
    base: str | None = option(None, "the model it was trained from, to set beside it")
    task: Literal["sudoku", "countdown", "gsm8k", "math"] = option("sudoku", "what to measure on")
    answer_format: Literal["tags", "boxed"] = option("tags", "what gsm8k and math ask for, as in training")
    data: str | None = option(None, "your test examples: a file, a folder of test.*, or a hub id")
    examples: int = option(0, "measure on the first so many (0: on all)")
    device: str | None = option(None, "cuda, mps or cpu; not given: the first of these that there is")
    rollout_batch: int = option(512, "completions sampled at once; under torchrun each process takes whole batches")
    steps: list[int] = field(default_factory=lambda: [16, 8, 4, 2, 1], metadata={"help": "numbers of sampling steps"})
    completion_length: int = option(16, "tokens in a completion")
    block_length: int = option(16, "blocks are unmasked from left to right; must divide completion_length")
    unmasking: Literal["low_confidence", "random"] = option("low_confidence", "which positions a step unmasks")
    temperature: float = option(0.0, "sampling temperature; 0 takes the most probable token")
    top_k: int = option(0, "sample from so many most probable tokens (0: from all)")
    top_p: float = option(1.0, "sample from the most probable tokens that make up this probability")
    samples: int = option(1, "N: completions of each example, for pass@N and the majority vote of N")
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "repeat with each; training measures at 0"})
    show: int = option(0, "unmask so many examples step by step, with the first of --steps")
    save: str | None = option(None, "a new .jsonl file for every prompt, completion, answer and verdict")
    output: str | None = option(None, "a new .json file for the options, versions and figures")
    plot: str | None = option(None, "a new .png, .pdf or .svg file for the curves, of training too (needs matplotlib)")


def decode(model, tokenizer, mask_id: int, task: Task, examples: list, options: Options, steps: int, key: tuple):
    """Every example completed once: a list of records in the order of the examples, the same in every process."""
    mine, texts, rollout = agrpo.generate(model, tokenizer, mask_id, task, examples, options, key, steps=steps)
    numbers = [i for i in range(len(examples)) if i // options.rollout_batch % world_size() == rank()]
    records, ends = [], agrpo.end_tokens(tokenizer)
    for row, (number, example, text) in enumerate(zip(numbers, mine, texts)):
        tokens, step = rollout.completion[row].tolist(), rollout.step[row].tolist()
        record = {"example": number, "prompt": task.prompt(example, tokenizer), "completion": text}
        record |= {"answer": agrpo.answer_in(text), "correct": task.grade(example, text)[1]}
        record |= {"as released": as_released(options.task, example, text, record["correct"])}
        record |= {"length": len(agrpo.before_end(tokens, ends)), "passes": max(step) + 1}
        records.append(record | {"tokens": tokens, "step": step})
    if world_size() > 1:
        shares = [None] * world_size()
        dist.all_gather_object(shares, records)
        records = sorted((record for share in shares for record in share), key=lambda record: record["example"])
    return records


def as_released(task: str, example: dict, text: str, correct: bool) -> float:
    """What the official release counts, 0 to 1. It takes the first <answer>, or everything; of GSM8K the first run of
    digits, in the first box if there is one; Countdown's last line with "="; the share of Sudoku's blanks that are as
    in the given solution, though there may be others. For MATH: what we count."""
    block = re.search("<answer>(.*?)</answer>", text, re.DOTALL)
    text = block[1] if block else text
    if task == "gsm8k":
        box = re.search(r"\\boxed\{(.*?)\}", text)
        digits = re.search("[0-9]+", box[1] if box else text)
        return float(bool(digits) and digits[0] == example["gold"].replace(",", ""))
    if task == "countdown":
        lines = [line for line in text.splitlines() if "=" in line]
        return float(bool(lines) and agrpo.countdown_right(example, lines[-1]))
    if task == "sudoku":
        cells, blanks = re.sub("[^1-4]", "", text).ljust(16), [i for i in range(16) if example["puzzle"][i] == "0"]
        return sum(cells[i] == example["solution"][i] for i in blanks) / len(blanks)
    return float(correct)


def measure(name: str, checkpoint: str, examples: list, options: Options) -> dict:
    """Complete the examples with each number of steps; save and show what was asked for. Returns steps -> figures."""
    half = torch.device(options.device).type == "cuda" and not agrpo.is_tiny(checkpoint)
    dtype = torch.bfloat16 if half else torch.float32
    model, tokenizer, mask_id = agrpo.load_model(checkpoint, options.device, dtype)
    task = agrpo.task_of(options)
    curve, repeats = {}, [(seed, sample) for seed in options.seeds for sample in range(options.samples)]
    passes = len(repeats) * -(-len(examples) // (options.rollout_batch * world_size())) * sum(options.steps)
    bar = tqdm(total=passes, desc=name, unit="pass", leave=False, disable=agrpo.no_bar())
    model.base_model.register_forward_hook(lambda *_: bar.update() and None)
    for steps in options.steps:
        began, runs = time.time(), []
        for seed, sample in repeats:
            key = ("evaluation", seed, sample) if seed or sample else ("evaluation",)  # the latter is training's
            runs.append(decode(model, tokenizer, mask_id, task, examples, options, steps, key))
            if options.save and rank() == 0:
                where = {"model": name, "steps": steps, "seed": seed, "sample": sample}
                with open(options.save, "a") as file:
                    file.writelines(json.dumps(where | record) + "\n" for record in runs[-1])
        curve[str(steps)] = summary(runs, options) | {"seconds": (time.time() - began) / len(runs)}
        if name == "trained" and steps == options.steps[0] and rank() == 0:
            for example, record in zip(examples[: options.show], runs[0]):
                show(task, tokenizer, example, record, sys.stdout.isatty())
    return curve


def summary(runs: list[list[dict]], options: Options) -> dict:
    """The figures of one model at one number of steps, from a list of records for each seed and, within it, sample."""
    n, N, records = len(runs[0]), options.samples, [record for run in runs for record in run]
    share, right = lambda verdicts: sum(verdicts) / len(verdicts), [record["correct"] for record in records]
    figures = {"accuracy": share(right), "95% interval": wilson(share(right), n)}  # n, however often each was completed
    figures["as released"] = share([record["as released"] for record in records])
    if len(options.seeds) > 1:
        figures["by seed"] = [share(right[i : i + n * N]) for i in range(0, len(right), n * N)]
    if N > 1:
        groups = [group for i in range(0, len(runs), N) for group in zip(*runs[i : i + N])]  # N records of one example
        figures[f"pass@{N}"] = share([any(r["correct"] for r in group) for group in groups])
        figures[f"majority@{N}"] = share([vote(group, options.task) for group in groups])
    figures["tokens/pass"] = sum(t >= 0 for r in records for t in r["step"]) / sum(r["passes"] for r in records)
    return figures | {"length": sum(r["length"] for r in records) / len(records)}


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a share seen in n independent trials (Wilson 1927): sensible near 0 and 1, or for small n."""
    middle, half = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def vote(records: list[dict], task: str) -> bool:
    """Whether the most frequent answer to one example is right; the first of those that tie. No answer is no vote."""
    keys = [record["answer"] or None for record in records]
    if task == "gsm8k":  # 1,234 and $1234 are the same
        keys = [agrpo.single_number(key or "") for key in keys]
    votes = [key for key in keys if key is not None]
    return bool(votes) and records[keys.index(max(votes, key=votes.count))]["correct"]


def show(task: Task, tokenizer, example: dict, record: dict, terminal: bool) -> None:
    """Print an example after each step, with · for EOS. On a terminal what is new is highlighted, and slow to come."""
    ends = agrpo.end_tokens(tokenizer)
    texts = ["" if token in ends else tokenizer.decode([token]) for token in record["tokens"]]
    texts = ["".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text) or "·" for text in texts]
    print(f"\nExample {record['example'] + 1}: {record['prompt']}")
    # Each position is drawn as a character of private use, then replaced: nothing long or coloured shifts a picture.
    marks = [chr(0xF0000 + i) for i, when in enumerate(record["step"]) if when >= 0]
    for t in range(record["passes"]):
        drawing = task.picture(example, "".join(marks))
        for mark, text, when in zip(marks, texts, record["step"]):
            seen = "░" if when > t else f"\033[1;7m{text}\033[0m" if when == t and terminal else text
            drawing = drawing.replace(mark, seen)
        print(f"\n  step {t + 1} of {record['passes']}\n{drawing}", flush=True)
        time.sleep(min(0.5, 5 / record["passes"]) if terminal else 0)
    print(f"\n  {'right' if record['correct'] else 'wrong'}; answer: {record['answer']}")


def print_table(title: str, results: dict[str, dict]) -> None:
    text = lambda value: f"{value:.3f}" if isinstance(value, float) else f"{min(value):.3f}-{max(value):.3f}"
    table = [["steps", "model", *next(iter(results["trained"].values()))]]
    for steps in results["trained"]:
        table += [[steps, name, *map(text, curve[steps].values())] for name, curve in results.items()]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in table]
    notes = "tokens/pass: unmasked by a forward pass; length: tokens before EOS; seconds: for each example once"
    print("\n".join(["", title, "", *lines, "", notes]), flush=True)


def plot(results: dict[str, dict], title: str, file: str, run: Path) -> None:
    from matplotlib.figure import Figure  # not pyplot, which would look for a display

    axes, training = Figure(figsize=(12, 4), layout="constrained").subplots(1, 2)
    log = run / "metrics.jsonl"
    history = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for name in ("reward", "accuracy"):
        training.plot([row["update"] for row in history], [row[name] for row in history], label=name)
    training.set(xlabel="updates", title="training")
    training.legend()
    for name, curve in results.items():
        steps, accuracy = [int(n) for n in curve], [f["accuracy"] for f in curve.values()]
        ends = [[abs(f["95% interval"][end] - f["accuracy"]) for f in curve.values()] for end in (0, 1)]
        axes.errorbar(steps, accuracy, yerr=ends, marker="o", capsize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="sampling steps", ylabel="accuracy", ylim=(0, 1), title=title, xticks=steps, xticklabels=steps)
    axes.legend()
    axes.figure.savefig(file, dpi=150)


def report(results: dict[str, dict], test: list, options: Options) -> None:
    title = f"{options.task}, {len(test)} test examples, {options.unmasking}, temperature {options.temperature:g}"
    print_table(title, results)
    if options.output:
        found = {"options": asdict(options), "torch": torch.__version__, "transformers": hf.__version__}
        found |= {"processes": world_size(), "examples": len(test), "results": results}
        Path(options.output).write_text(json.dumps(found, indent=1))
    if options.plot:
        plot(results, title, options.plot, run_of(options.checkpoint))


def run_of(checkpoint: str) -> Path:
    """The folder of the run that a checkpoint is or lies in."""
    return Path(checkpoint) if (Path(checkpoint) / "settings.json").is_file() else Path(checkpoint).parent


def parse_options(argv: list[str] | None = None) -> Options:
    """Options from the command line, over those of CHECKPOINT's run or the paper's; what cannot work is refused."""
    usage = "eval.py CHECKPOINT [--option value ...], where --help lists all options"
    parser = hf.HfArgumentParser(Options, usage=usage, allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="what to measure: a run, a folder or a hub id")
    argv = sys.argv[1:] if argv is None else argv
    first = parser.parse_args(argv)
    run = run_of(first.checkpoint)
    if (run / "settings.json").is_file():
        saved = json.loads((run / "settings.json").read_text())
        names = ("task", "data", "answer_format", "rollout_batch", "completion_length", "block_length")
        parser.set_defaults(**{name: saved[name] for name in names}, steps=saved["eval_steps"])
    elif not agrpo.is_tiny(first.checkpoint):
        parser.set_defaults(completion_length=256, block_length=32, steps=[256, 128, 64, 32], rollout_batch=8)
    given = vars(parser.parse_args(argv))
    checkpoint, options = given.pop("checkpoint"), Options(**given)
    options.checkpoint = checkpoint
    files = [Path(file).absolute() for file in (options.save, options.output, options.plot) if file]
    same = options.temperature == 0 and options.unmasking == "low_confidence"
    wrong = {
        "--samples and --seeds need a --temperature above 0": same and options.samples * len(options.seeds) > 1,
        "tiny has no weights yet: give the folder of a run": "tiny" in (options.checkpoint, options.base),
        f"tiny models know no {options.task}": options.task != "sudoku" and agrpo.is_tiny(options.checkpoint),
        "--save, --output or --plot: the file is there already": any(file.exists() for file in files),
        "--save, --output or --plot: no such folder": not all(file.parent.is_dir() for file in files),
        "--plot needs pip install matplotlib": options.plot and not importlib.util.find_spec("matplotlib"),
    }
    for sentence in [sentence for sentence, is_so in wrong.items() if is_so]:
        parser.error(sentence)
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)
    agrpo.start_processes(options)
    models = {"trained": options.checkpoint} | ({"base": options.base} if options.base else {})
    files = [Path(file) for file in (options.save, options.output, options.plot) if file and rank() == 0]
    try:
        torch.zeros(1, device=options.device)
        for steps in options.steps:
            agrpo.tokens_per_step(options.completion_length, options.block_length, steps)
        for checkpoint in models.values():
            agrpo.find_checkpoint(checkpoint)
        test = agrpo.TASKS[options.task].examples("test", agrpo.Settings(data=options.data))[: options.examples or None]
        for file in files:
            file.touch(exist_ok=False)  # ours from now on, whatever else is measured at the same time
    except (ValueError, OSError, RuntimeError, AssertionError) as error:  # the latter two: no such device
        sys.exit(f"eval.py: {str(error).splitlines()[0]}")
    try:
        results = {name: measure(name, checkpoint, test, options) for name, checkpoint in models.items()}
        if rank() == 0:
            report(results, test, options)
    except agrpo.BadInput as error:
        for file in [file for file in files if file.stat().st_size == 0]:
            file.unlink()
        sys.exit(f"eval.py: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
