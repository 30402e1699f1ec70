"""Accuracy of a checkpoint against sampling steps, and a look at the unmasking itself.

    python eval.py CHECKPOINT                                accuracy at 16, 8, 4, 2 and 1 steps (8B models: 256 to 32)
    python eval.py CHECKPOINT --base MODEL                   the same, beside the model that it was trained from
    python eval.py CHECKPOINT --show 2 --steps 4             two examples unmasked before your eyes, step by step
    python eval.py CHECKPOINT --samples 8 --temperature 1    also pass@8 and the majority vote of 8
    torchrun --nproc_per_node 8 eval.py CHECKPOINT           on 8 GPUs, which share out the examples
    python eval.py --help                                    every option, with its default

CHECKPOINT and MODEL are whatever `agrpo.load_model` reads: a run's folder or one of its checkpoints, a LoRA adapter, a
LLaDA or Dream folder or hub id. The defaults are the paper's protocol: low-confidence unmasking at temperature 0. With
the settings of a training run, the figures are those that the run printed.
"""

import importlib.util
import itertools
import json
import math
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm
from transformers import HfArgumentParser

import agrpo
from agrpo import BadInput, Settings, Task, option, rank, world_size

# ======================================================================================================================
# 1. Decoding and counting
# ======================================================================================================================


def decode(model, tokenizer, mask_id: int, task: Task, examples: list[dict], options: "Options", steps: int, seed):
    """Every example completed once, as a list of records in the order of the examples; the same in every process.

    Batches and generators are those of `agrpo.evaluate`, so the completions are too. The records of the first
    options.show examples hold their trajectory as well: "pieces", the text of each token, and "step", a row of
    Rollout.step.
    """
    chat, eos_id, records = tokenizer.chat_template is not None, tokenizer.eos_token_id, []
    names = ("completion_length", "block_length", "temperature", "unmasking", "top_k", "top_p")
    sampling = {name: getattr(options, name) for name in names} | {"steps": steps}
    starts = range(rank() * options.batch, len(examples), world_size() * options.batch)
    for start in tqdm(starts, desc=f"{steps} steps", leave=False, disable=rank() > 0):
        part = examples[start : start + options.batch]
        prompts = [task.prompt(example, tokenizer) for example in part]
        rng = agrpo.seeded_generator(model.device, seed, "evaluation", start)
        rollout, texts = agrpo.complete(model, tokenizer, mask_id, prompts, rng, **sampling)
        filled = (rollout.step >= 0).sum(1).tolist()
        length = (rollout.completion != eos_id).int().cumprod(1).sum(1).tolist()  # tokens before the first EOS
        for i, (example, prompt, text) in enumerate(zip(part, prompts, texts)):
            verdict = {"answer": task.answer(text, chat), "correct": task.correct(example, text, chat)}
            counts = {"length": length[i], "filled": filled[i], "passes": int(rollout.num_steps[i])}
            records.append({"example": start + i, "prompt": prompt, "completion": text} | verdict | counts)
            if start + i < options.show:
                pieces = tokenizer.batch_decode(rollout.completion[i, :, None], skip_special_tokens=True)
                records[-1] |= {"pieces": [visible(piece) for piece in pieces], "step": rollout.step[i].tolist()}
    if world_size() > 1:
        shares: list = [None] * world_size()
        dist.all_gather_object(shares, records)
        records = sorted(itertools.chain(*shares), key=lambda record: record["example"])
    return records


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95% interval of a share seen in n independent trials (Wilson 1927): sensible near 0 and 1, or for small n."""
    z = NormalDist().inv_cdf(0.975)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def vote(records: list[dict], task: str) -> bool:
    """Whether the most frequent answer among completions of one example is right; the earlier one where two tie.

    Answers are compared as they are written, for gsm8k as numbers. A completion without an answer has no vote.
    """
    keys = [record["answer"] for record in records]
    if task == "gsm8k":
        keys = [None if key is None else agrpo.single_number(agrpo.boxed(key) or key) for key in keys]
    votes = Counter(key for key in keys if key is not None)
    return bool(votes) and records[keys.index(votes.most_common(1)[0][0])]["correct"]


def summary(runs: list[list[dict]], options: "Options") -> dict:
    """The figures of one model at one number of steps, from one list of records for each seed and, within it, sample.

    Intervals count each example once, however often it was completed: completions of one example say nothing about the
    others. With many of them, intervals are wider than they need be, never too narrow.
    """
    n, N = len(runs[0]), options.samples
    by_seed = [runs[i : i + N] for i in range(0, len(runs), N)]
    total = {name: sum(r[name] for run in runs for r in run) for name in ("correct", "length", "filled", "passes")}
    figures = {"accuracy": total["correct"] / (n * len(runs))}
    figures["interval"] = wilson(figures["accuracy"], n)
    figures["by_seed"] = [sum(r["correct"] for run in group for r in run) / (n * N) for group in by_seed]
    if N > 1:
        of_example = [samples for group in by_seed for samples in zip(*group)]  # the N records of one example and seed
        any_right = [any(r["correct"] for r in samples) for samples in of_example]
        voted_right = [vote(samples, options.task) for samples in of_example]
        for name, right in ("pass", any_right), ("majority", voted_right):
            figures[f"{name}@{N}"] = sum(right) / len(right)
            figures[f"{name}@{N} interval"] = wilson(figures[f"{name}@{N}"], n)
    figures["tokens_per_pass"] = total["filled"] / total["passes"]
    figures["length"] = total["length"] / (n * len(runs))
    return figures


def load(checkpoint: str, options: "Options", task: Task, examples: list[dict], device: torch.device):
    """`agrpo.load_model`; raises BadInput, too, where the model has too few positions for the longest example."""
    dtype = torch.bfloat16 if options.bf16 and device.type == "cuda" else torch.float32
    model, tokenizer, mask_id = agrpo.load_model(checkpoint, device, dtype)
    prompts = tokenizer([task.prompt(example, tokenizer) for example in examples], add_special_tokens=False).input_ids
    longest, limit = max(map(len, prompts)), model.config.max_position_embeddings
    if longest + options.completion_length > limit:
        raise BadInput(f"{checkpoint} has {limit} positions, too few for a prompt of {longest} and its completion")
    return model, tokenizer, mask_id


def measure(name: str, model, tokenizer, mask_id: int, task: Task, examples: list[dict], options: "Options") -> dict:
    """Complete the examples with each number of steps; save and show what was asked for. Returns steps -> figures.

    "seconds" are those for completing every example once.
    """
    chat, curve = tokenizer.chat_template is not None, {}
    for steps in options.steps:
        runs, began = [], time.time()
        for seed, sample in itertools.product(options.seeds, range(options.samples)):
            key = seed if sample == 0 else f"{seed} sample {sample}"  # the first sample is what training measures
            runs.append(decode(model, tokenizer, mask_id, task, examples, options, steps, key))
            if options.save and rank() == 0:
                checkpoint = {"base": options.base, "trained": options.checkpoint}[name]
                where = {"model": name, "checkpoint": checkpoint, "steps": steps, "seed": seed, "sample": sample}
                for record in runs[-1]:
                    record = {key: value for key, value in record.items() if key not in ("pieces", "step")}
                    agrpo.append_line(Path(options.save), where | record)
        curve[str(steps)] = summary(runs, options) | {"seconds": (time.time() - began) / len(runs)}
        if name == "trained" and steps == options.steps[0] and rank() == 0:
            for example, record in zip(examples[: options.show], runs[0]):
                show(task, example, record, chat, sys.stdout.isatty())
    return curve


# ======================================================================================================================
# 2. For the eye: unmasking step by step, a table, bars, a plot
# ======================================================================================================================


def visible(piece: str) -> str:
    """The text of a token as something to look at: · for EOS, and nothing that would move a terminal's cursor."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in piece) or "·"


def replay(pieces: list[str], step: list[int]) -> Iterator[list[tuple[str, bool]]]:
    """The completion after each sampling step: for each position its text, ░ while masked, and whether it is new.

    step: a row of Rollout.step. Positions that no step filled in (-1: the row had ended) are left out.
    """
    for t in range(max(step) + 1):
        yield [(piece if when <= t else "░", when == t) for piece, when in zip(pieces, step) if when >= 0]


def show(task: Task, example: dict, record: dict, chat: bool, terminal: bool) -> None:
    """Print an example as it was unmasked. On a terminal what is new is shown in reverse, and there is time to look."""
    grid = task.picture if not chat else None
    print(f"\nExample {record['example'] + 1}" + ("" if grid else f"\n{record['prompt']}"))
    for t, state in enumerate(replay(record["pieces"], record["step"]), start=1):
        # Each position is drawn as a character of its own (private use, plane 15), then replaced by its text: so a
        # picture can put it where it likes, and neither colours nor long tokens shift anything.
        places = [chr(0xF0000 + i) for i in range(len(state))]
        drawing = task.picture(example, "".join(places)) if grid else "".join(places)
        for place, (piece, new) in zip(places, state):
            drawing = drawing.replace(place, f"\033[1;7m{piece}\033[0m" if new and terminal else piece)
        print(f"\n  step {t} of {record['passes']}\n{drawing}", flush=True)
        if terminal:
            time.sleep(min(0.5, 5 / record["passes"]))
    print(f"\n  {'right' if record['correct'] else 'wrong'}" + ("" if grid else f"; answer: {record['answer']}"))


def print_table(results: dict[str, dict], options: "Options") -> None:
    """A line for each number of steps, the models side by side under every heading; * where the intervals part."""
    columns = {"accuracy [95% interval]": lambda f: "{:.3f} [{:.3f}, {:.3f}]".format(f["accuracy"], *f["interval"])}
    if len(options.seeds) > 1:
        columns["seeds"] = lambda f: f"{min(f['by_seed']):.3f}-{max(f['by_seed']):.3f}"
    if options.samples > 1:
        for name in f"pass@{options.samples}", f"majority@{options.samples}":
            columns[name] = lambda f, name=name: f"{f[name]:.3f}"
    columns["tokens/pass"] = lambda f: f"{f['tokens_per_pass']:.2f}"
    columns["length"] = lambda f: f"{f['length']:.1f}"
    columns["seconds"] = lambda f: f"{f['seconds']:.1f}"

    lines = ["", "steps", *(f"{steps:5d}" for steps in options.steps)]
    for heading, text in columns.items():
        cells = [[model, *(text(results[model][str(steps)]) for steps in options.steps)] for model in results]
        widths = [max(map(len, column)) for column in cells]
        widths[-1] += max(0, len(heading) - sum(widths) - 2 * len(widths) + 2)  # the heading stands over all of them
        rows = zip(*([cell.rjust(width) for cell in column] for column, width in zip(cells, widths)))
        block = ["  ".join(row) for row in rows]
        lines = [f"{line:5}   {more}" for line, more in zip(lines, [heading.ljust(len(block[0])), *block])]
    for i, steps in enumerate(options.steps):
        lows, highs = zip(*(curve[str(steps)]["interval"] for curve in results.values()))
        lines[2 + i] += "  *" * (max(lows) > min(highs))
    print("\n".join(["", *lines]))
    notes = ["tokens/pass: filled in by a forward pass; length: tokens before EOS; seconds: for each example once"]
    notes += ["seeds: accuracy from the lowest to the highest seed"] * (len(options.seeds) > 1)
    notes += ["*: the intervals do not overlap"] * (len(results) > 1)
    print("\n" + "\n".join("  " + note for note in notes))


def print_bars(results: dict[str, dict], width: int = 50) -> None:
    """Accuracy as bars: solid up to the lower end of the interval, shaded up to the upper end."""
    print("\nAccuracy by sampling steps: █ to the lower end of the interval, ▒ to the upper end\n")
    for steps in next(iter(results.values())):
        for i, (model, curve) in enumerate(results.items()):
            low, high = (round(width * end) for end in curve[steps]["interval"])
            bar = ("█" * low + "▒" * (high - low)).ljust(width, "·")
            print(f"{steps if i == 0 else '':>5}  {model:7}  {bar}  {curve[steps]['accuracy']:.3f}")


def plot(results: dict[str, dict], title: str, file: str) -> None:
    from matplotlib.figure import Figure  # not pyplot, which would look for a display

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for model, curve in results.items():
        steps, points = [int(n) for n in curve], list(curve.values())
        ends = [[abs(f["interval"][end] - f["accuracy"]) for f in points] for end in (0, 1)]
        axes.errorbar(steps, [f["accuracy"] for f in points], yerr=ends, marker="o", capsize=3, label=model)
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, labels=map(str, steps))
    axes.set(xlabel="sampling steps", ylabel="accuracy, with its 95% interval", ylim=(0, 1), title=title)
    axes.legend()
    figure.savefig(file, dpi=150)


# ======================================================================================================================
# 3. Command line
# ======================================================================================================================


@dataclass
class Options:
    """Every option there is. The defaults are the tiny model's; PROTOCOL holds those that differ for an 8B model."""

    checkpoint: str = field(default="", init=False)  # the positional argument
    base: str | None = option(None, "a model to set beside it: the one that it was trained from")
    task: Literal["sudoku", "countdown", "gsm8k", "math"] = option("sudoku", "what to measure on")
    data: str | None = option(None, "your test examples: a file, or for gsm8k and math a folder of test.*")
    examples: int = option(0, "measure on the first so many (0: on all)")
    device: str | None = option(None, "cuda, mps or cpu; not given: the first of these that there is")
    bf16: bool = option(False, "weights in bfloat16, on a GPU")
    batch: int = option(Settings.eval_batch, "completions in a batch; under torchrun each process takes whole batches")

    steps: list[int] = field(
        default_factory=lambda: Settings().eval_steps, metadata={"help": "numbers of sampling steps to measure at"}
    )
    completion_length: int = option(Settings.eval_completion_length, "tokens in a completion")
    block_length: int = option(Settings.eval_block_length, "blocks are unmasked from left to right")
    unmasking: Literal["low_confidence", "random"] = option("low_confidence", "which positions a step fills in")
    temperature: float = option(0.0, "sampling temperature; 0 takes the most probable token")
    top_k: int = option(0, "sample from so many most probable tokens (0: from all)")
    top_p: float = option(1.0, "sample from the most probable tokens that make up this probability")
    samples: int = option(1, "N: completions of each example, for pass@N and the majority vote of N")
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "repeat with each of these; 0 is what training measures with"}
    )

    show: int = option(0, "unmask so many examples step by step, with the first of --steps")
    save: str | None = option(None, "a new .jsonl file for every prompt, completion, answer and verdict")
    output: str | None = option(None, "a new .json file for the options, versions and figures")
    plot: str | None = option(None, "a new .png, .pdf or .svg file for the curves (needs matplotlib)")


# The paper's evaluation, for LLaDA and Dream; on bfloat16 weights, as in training.
PROTOCOL = {name: agrpo.RELEASE[f"eval_{name}"] for name in ("completion_length", "block_length", "batch")}
PROTOCOL |= {"steps": [256, 128, 64, 32], "bf16": agrpo.RELEASE["bf16"]}


def refuse(sentence: str):
    sys.exit(f"eval.py: {sentence}")


def parse_options(argv: list[str] | None = None) -> Options:
    parser = HfArgumentParser(Options, description="Accuracy against sampling steps.", allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="the model to measure: a folder or hub id")
    argv = sys.argv[1:] if argv is None else argv
    first, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    if first.checkpoint and not agrpo.is_bert(first.checkpoint):
        parser.set_defaults(**PROTOCOL)
    options, *rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if rest[-1]:
        refuse(f"there is no option {rest[-1][0]}; --help lists them all")
    if not first.checkpoint:
        refuse("which CHECKPOINT? Give a run's folder, such as runs/sudoku-tiny-seed0, or a LLaDA or Dream checkpoint")
    options.checkpoint = first.checkpoint
    return options


def check_options(options: Options) -> None:
    """Raise BadInput with one sentence on the first option that cannot work, before anything is loaded or written."""
    zero, one = ("examples", "show", "top_k", "temperature"), ("samples", "batch", "completion_length", "block_length")
    for name in zero + one:
        if not (name in one) <= getattr(options, name) <= 10**6:
            raise BadInput(f"--{name} must be from {int(name in one)} to 1,000,000, not {getattr(options, name)}")
    if not 0 < options.top_p <= 1:
        raise BadInput(f"--top_p must be above 0 and at most 1, not {options.top_p}")
    for name in ("steps", "seeds"):
        value, times = Counter(getattr(options, name)).most_common(1)[0]
        if times > 1:
            raise BadInput(f"--{name} has {value} twice")
    for steps in options.steps:
        try:
            agrpo.tokens_per_step(options.completion_length, options.block_length, steps)
        except ValueError as error:
            where = "--steps, --block_length, --completion_length"
            raise BadInput(f"{where} do not fit together: {error}") from None
    repeated = {"samples": options.samples > 1, "seeds": len(options.seeds) > 1}
    if any(repeated.values()) and options.temperature == 0 and options.unmasking == "low_confidence":
        name = max(repeated, key=repeated.get)
        raise BadInput(f"--{name}: at temperature 0 every completion would be the same; give a --temperature")
    for checkpoint in filter(None, (options.checkpoint, options.base)):
        if checkpoint == "tiny":
            raise BadInput("tiny has no weights yet: give the folder of a run, or a pretrained-* one beside it")
        if agrpo.is_bert(checkpoint) and options.task != "sudoku":
            raise BadInput(f"{checkpoint} knows only sudoku, not {options.task}: give a LLaDA or Dream checkpoint")
    files = [Path(file).absolute() for file in (options.save, options.output, options.plot) if file]
    if len(set(files)) < len(files):
        raise BadInput("--save, --output and --plot must be different files")
    for name, file in ("save", options.save), ("output", options.output), ("plot", options.plot):
        if file and Path(file).exists():
            raise BadInput(f"--{name} {file} is there already and is not overwritten: choose another name")
        if file and not Path(file).absolute().parent.is_dir():
            raise BadInput(f"--{name} {file}: there is no such folder")
        if file and not os.access(Path(file).absolute().parent, os.W_OK):
            raise BadInput(f"--{name} {file}: this folder cannot be written to")
    if options.plot and Path(options.plot).suffix not in (".png", ".pdf", ".svg"):
        raise BadInput(f"--plot {options.plot}: give a name that ends in .png, .pdf or .svg")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise BadInput("--plot needs the package matplotlib: pip install matplotlib")


def main(argv: list[str] | None = None) -> None:
    transformers.logging.set_verbosity_error()  # what goes wrong in loading is refused below, in a sentence
    transformers.logging.disable_progress_bar()
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # a terminal without ░ and █ shows ? for them
    options = parse_options(argv)
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
        if options.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    task, models = agrpo.TASKS[options.task], {"base": options.base} if options.base else {}
    models["trained"] = options.checkpoint
    try:
        check_options(options)
        device = torch.zeros(1, device=options.device).device
        examples = task.examples("test", Settings(task=options.task, data=options.data))[: options.examples or None]
        for checkpoint in models.values():
            agrpo.find_checkpoint(checkpoint, device)
    except (BadInput, OSError, RuntimeError, AssertionError) as error:
        refuse(str(error).splitlines()[0].replace("--model FOLDER", "the FOLDER"))
    agrpo.any_rank(False)  # every process has looked before one of them writes

    how = f"{options.unmasking} unmasking, temperature {options.temperature:g}"
    title = f"{options.task}, {len(examples)} test examples, {how}"
    say = print if rank() == 0 else lambda *words: None
    say("\n".join([title, *(f"  {name:8} {checkpoint}" for name, checkpoint in models.items())]))
    results = dict.fromkeys(models)
    for name in reversed(models):  # the trained one first: --show should not have to wait for the other
        try:
            loaded = load(models[name], options, task, examples, device)
        except BadInput as error:
            refuse(str(error))
        results[name] = measure(name, *loaded, task, examples, options)
        del loaded  # before the next one is loaded: there may not be room for two
    if rank() > 0:
        return
    print_table(results, options)
    print_bars(results)
    if options.output:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions |= {"transformers": transformers.__version__, "processes": world_size()}
        found = {"arguments": asdict(options), "versions": versions, "examples": len(examples), "results": results}
        Path(options.output).write_text(json.dumps(found, indent=1))
    if options.plot:
        plot(results, title, options.plot)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        refuse("stopped")
