"""Accuracy of a checkpoint against sampling steps, and a look at the unmasking itself.

    python eval.py CHECKPOINT                              accuracy at several numbers of sampling steps
    python eval.py CHECKPOINT --base MODEL                 the same, beside the model that it was trained from
    python eval.py CHECKPOINT --show 2 --steps 4           two examples unmasked before your eyes, step by step
    python eval.py CHECKPOINT --samples 8 --temperature 1  also pass@8 and majority@8
    torchrun --nproc_per_node 8 eval.py CHECKPOINT         on 8 GPUs, which share the examples

Both are the folder of a run, a checkpoint in it, or a LLaDA, Dream or A2D folder or hub id. Defaults are those of the
run, or the paper's for 8B models, but greedy. So, or with the run's sampling options and number of processes, the
figures are training's.
"""

import importlib.util
import json
import re
import sys
import time
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from statistics import fmean as mean
from typing import Literal

import torch
import torch.distributed as dist
import transformers as hf
from tqdm import tqdm

import agrpo
from agrpo import Settings, option, rank, world_size

OF_A_RUN = ("task", "data", "answer_format", "rollout_batch", "completion_length", "block_length")
SHARED = (*OF_A_RUN, "device", "unmasking", "temperature", "top_k", "top_p")  # what is as in agrpo.py
run_of = lambda name: Path(name) if (Path(name) / "settings.json").is_file() else Path(name).parent  # or what it is in


@dataclass
class Options(make_dataclass("Shared", [(f.name, f.type, f) for f in fields(Settings) if f.name in SHARED])):
    task: Literal["sudoku", "countdown", "gsm8k", "math"] = option("sudoku", "what to measure on")
    base: str | None = option(None, "the model that it was trained from")
    examples: int = option(0, "measure on the first so many; 0: all")
    steps: list[int] = field(default_factory=lambda: [16, 8, 4, 2, 1], metadata={"help": "numbers of sampling steps"})
    samples: int = option(1, "N: completions of each example, for pass@N and majority@N")
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "repeat with each; training measures at 0"})
    show: int = option(0, "unmask so many examples step by step, with the first of --steps")
    save: str | None = option(None, "a new .jsonl file for all completions and verdicts")
    output: str | None = option(None, "a new .json file for options and figures")
    plot: str | None = option(None, "a new .png, .pdf or .svg file for curves, of training too")


def measure(name: str, checkpoint: str, examples: list, args: Options) -> dict[str, dict]:
    """Complete the examples with each number of steps; save and show what was asked for. Returns steps -> figures."""
    half = args.device.startswith("cuda") and not agrpo.is_tiny(checkpoint)
    dtype = torch.bfloat16 if half else torch.float32
    loaded = agrpo.load_model(checkpoint, args.device, dtype)
    curve, repeats = {}, [(seed, sample) for seed in args.seeds for sample in range(args.samples)]
    passes = len(repeats) * -(-len(examples) // (args.rollout_batch * world_size())) * sum(args.steps)
    bar = tqdm(total=passes, desc=name, unit="pass", leave=False, disable=agrpo.no_bar())
    loaded[0].base_model.register_forward_hook(lambda *_: bar.update() and None)
    for steps in args.steps:
        began, runs = time.time(), []
        for seed, sample in repeats:
            runs.append(complete(loaded, examples, args, steps, seed, sample))
            if args.save and rank() == 0:
                with open(args.save, "a") as file:
                    file.writelines(json.dumps({"model": name} | record) + "\n" for record in runs[-1])
        curve[str(steps)] = summary(runs, args) | {"seconds": (time.time() - began) / len(runs)}
        if name == "trained" and steps == args.steps[0]:
            for example, record in zip(examples[: args.show], runs[0]):
                show(loaded[1], agrpo.TASKS[args.task].picture, example, record)
    return curve


def complete(loaded: tuple, examples: list, args: Options, steps: int, seed: int, sample: int) -> list[dict]:
    """Each example completed once: records in the order of the examples, the same in every process."""
    task, ends, records = agrpo.TASKS[args.task], agrpo.end_tokens(loaded[1]), []
    key = ("evaluation", seed, sample) if seed or sample else ("evaluation",)  # the latter is training's
    mine, texts, rollout = agrpo.generate(*loaded, examples, args, key, steps=steps)
    paths = zip(rollout.completion.tolist(), rollout.step.tolist()) if mine else []
    for example, text, (tokens, step) in zip(mine, texts, paths):
        record = {"steps": steps, "seed": seed, "sample": sample, "example": example["number"]}
        record |= {"prompt": task.prompt(example, loaded[1], args.answer_format), "completion": text}
        record["answer"] = agrpo.answer_in(text)
        record["correct"] = task.grade(example, text)[1]
        record["as released"] = as_released(args.task, example, text, record["correct"])
        record |= {"length": len(agrpo.before_end(tokens, ends)), "passes": max(step) + 1}
        records.append(record | {"tokens": tokens, "step": step})
    if world_size() > 1:
        shares = [None] * world_size()
        dist.all_gather_object(shares, records)
        records = sorted((r for share in shares for r in share), key=lambda r: r["example"])
    return records


def as_released(task: str, example: dict, text: str, correct: bool) -> float:
    """What the official release counts, 0 to 1. It takes the first <answer>, or all; of GSM8K the first digits, in
    the first box if there is one; Countdown's last line with "="; the share of Sudoku's blanks that are as given."""
    text = (re.findall("<answer>(.*?)</answer>", text, re.DOTALL) or [text])[0]
    if task == "gsm8k":
        box = (re.findall(r"\\boxed\{(.*?)\}", text) or [text])[0]
        return float(re.findall("[0-9]+", box)[:1] == [example["gold"].replace(",", "")])
    if task == "countdown":
        lines = [line for line in text.splitlines() if "=" in line]
        return float(bool(lines) and agrpo.countdown_right(example, lines[-1]))
    if task == "sudoku":
        cells = zip(example["puzzle"], example["solution"], re.sub("[^1-4]", "", text).ljust(16))
        return mean(solution == cell for clue, solution, cell in cells if clue == "0")
    return float(correct)  # MATH


def summary(runs: list[list[dict]], args: Options) -> dict:
    """The figures of runs, lists of records: one run for each seed and, within it, sample."""
    N, records = args.samples, [r for run in runs for r in run]
    right = lambda records: mean(r["correct"] for r in records)
    figures = {"accuracy": right(records), "95% interval": wilson(right(records), len(runs[0]))}
    figures["as released"] = mean(r["as released"] for r in records)
    seeds = [runs[i : i + N] for i in range(0, len(runs), N)]
    if len(seeds) > 1:
        figures["by seed"] = [mean(map(right, seed)) for seed in seeds]
    if N > 1:
        groups = [group for seed in seeds for group in zip(*seed)]  # the N completions of an example
        figures[f"pass@{N}"] = mean(any(r["correct"] for r in group) for group in groups)
        figures[f"majority@{N}"] = mean(vote(group, args.task) for group in groups)
    figures["tokens/pass"] = sum(t >= 0 for r in records for t in r["step"]) / sum(r["passes"] for r in records)
    return figures | {"length": mean(r["length"] for r in records)}


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a share seen in n independent trials (Wilson 1927): sensible near 0 and 1, or for small n."""
    middle, half = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def vote(records: list[dict], task: str) -> bool:
    """Whether the most frequent answer to one example is right; the first of those that tie. No answer is no vote."""
    same = agrpo.single_number if task == "gsm8k" else lambda answer: answer or None  # 1,234 is $1234
    keys = [same(record["answer"]) for record in records]
    votes = [key for key in keys if key is not None]
    return bool(votes) and records[keys.index(max(votes, key=votes.count))]["correct"]


def show(tokenizer, picture, example: dict, record: dict) -> None:
    """Print an example after each step, with · for EOS. On a terminal slowly, with what is new highlighted."""
    ends, terminal = agrpo.end_tokens(tokenizer), sys.stdout.isatty()
    texts = ["" if token in ends else tokenizer.decode([token]) for token in record["tokens"]]
    texts = ["".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text) or "·" for text in texts]
    # In the picture a character of private use stands for each position: nothing long or coloured shifts it.
    marks = [chr(0xF0000 + i) for i, when in enumerate(record["step"]) if when >= 0]
    drawn, highlight = picture(example, "".join(marks)), "\033[1;7m{}\033[0m" if terminal else "{}"
    print(f"\nExample {record['example'] + 1}: {record['prompt']}")
    for t in range(record["passes"]):
        seen = {}
        for mark, text, when in zip(marks, texts, record["step"]):
            seen[ord(mark)] = "░" if when > t else highlight.format(text) if when == t else text
        print(f"\n  step {t + 1} of {record['passes']}\n{drawn.translate(seen)}", flush=True)
        time.sleep(min(0.5, 5 / record["passes"]) * terminal)
    print(f"\n  {'right' if record['correct'] else 'wrong'}; its answer: {record['answer']}")


def print_table(title: str, results: dict[str, dict]) -> None:
    text = lambda value: f"{value:.3f}" if isinstance(value, float) else f"{min(value):.3f}-{max(value):.3f}"
    rows = [["steps", "model", *next(iter(results["trained"].values()))]]
    rows += [[n, name, *map(text, results[name][n].values())] for n in results["trained"] for name in results]
    widths = [max(map(len, column)) for column in zip(*rows)]
    notes = "as released: what the official release counts (README). tokens/pass: unmasked by a forward pass.\n"
    notes += "length: tokens before EOS. seconds: for each example once"
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    print("", title, "", *lines, "", notes, sep="\n")


def plot(results: dict[str, dict], title: str, file: str, log: Path) -> None:
    from matplotlib.figure import Figure  # pyplot would look for a display

    left, right = Figure(figsize=(12, 4), layout="constrained").subplots(1, 2)
    for name, curve in results.items():
        steps, figures = [int(steps) for steps in curve], curve.values()
        (line,) = left.plot(steps, [f["accuracy"] for f in figures], "o-", label=name)
        left.vlines(steps, *zip(*(f["95% interval"] for f in figures)), line.get_color())
    left.set_xscale("log", base=2)
    left.set(xlabel="sampling steps", ylabel="accuracy", ylim=(0, 1), title=title, xticks=steps, xticklabels=steps)
    left.legend()
    history = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for name in ("reward", "accuracy"):
        right.plot([row["update"] for row in history], [row[name] for row in history], label=name)
    right.set(xlabel="updates", title="training")
    right.legend()
    left.figure.savefig(file, dpi=150)


def parse_options(argv: list[str] | None = None) -> Options:
    """From the command line, over the options of the checkpoint's run or the paper's. BadInput for what cannot work."""
    parser = hf.HfArgumentParser(Options, usage="eval.py CHECKPOINT [--option value ...]", allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="what to measure: a run, a folder or a hub id")
    parser.set_defaults(unmasking="low_confidence", temperature=0.0)
    checkpoint = parser.parse_args(argv).checkpoint
    file = run_of(checkpoint) / "settings.json"
    if file.is_file():
        saved = json.loads(file.read_text())
        parser.set_defaults(**{name: saved[name] for name in OF_A_RUN}, steps=saved["eval_steps"])
    elif not agrpo.is_tiny(checkpoint):
        parser.set_defaults(completion_length=256, block_length=32, steps=[256, 128, 64, 32], rollout_batch=8)
    args = parser.parse_args(argv)
    if args.samples * len(args.seeds) > 1 and args.temperature == 0 and args.unmasking == "low_confidence":
        raise agrpo.BadInput("--samples and --seeds need a --temperature above 0")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        raise agrpo.BadInput("--plot needs pip install matplotlib")
    if args.plot and Path(args.plot).suffix not in (".png", ".pdf", ".svg"):
        raise agrpo.BadInput(f"--plot is a .png, .pdf or .svg file, not {args.plot}")
    settings = {name: getattr(args, name) for name in SHARED} | {"temperature": args.temperature or 1.0}
    settings |= {"model": args.checkpoint, "steps": args.steps[0], "eval_steps": args.steps}
    settings = Settings(**settings)
    agrpo.prepare(settings)
    args.device = settings.device
    return args


def main(argv: list[str] | None = None) -> None:
    claimed = []
    try:
        args = parse_options(argv)
        models = {"trained": args.checkpoint} | ({"base": args.base} if args.base else {})
        for checkpoint in models.values():
            agrpo.local_or_hub(checkpoint)
        test = agrpo.TASKS[args.task].examples("test", Settings(data=args.data))[: args.examples or None]
        test = [example | {"number": i} for i, example in enumerate(test)]
        for file in [Path(file) for file in (args.save, args.output, args.plot) if file and rank() == 0]:
            file.touch(exist_ok=False)  # ours from here on
            claimed.append(file)
        results = {name: measure(name, checkpoint, test, args) for name, checkpoint in models.items()}
        title = f"{args.task}, {len(test)} test examples, {args.unmasking}, temperature {args.temperature:g}"
        print_table(title, results)
        if args.output and rank() == 0:
            found = {"options": vars(args), "torch": torch.__version__, "transformers": hf.__version__}
            Path(args.output).write_text(json.dumps(found | {"examples": len(test), "results": results}, indent=1))
        if args.plot and rank() == 0:
            plot(results, title, args.plot, run_of(args.checkpoint) / "metrics.jsonl")
    except (agrpo.BadInput, OSError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        sys.exit(f"eval.py: {(str(error) or 'stopped').splitlines()[0]}")
    finally:
        for file in [file for file in claimed if not file.stat().st_size]:
            file.unlink()


if __name__ == "__main__":
    main()
