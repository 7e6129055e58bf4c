"""Verbs that make models: train, train finetune, export."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lavit.cli.output import DEFAULT_MODEL, Model, ProgressBar, Words
from lavit.config import InputError, read_config

MIX = "a source; give it again to mix several, SOURCE:0.5 draws half as many documents from one"
Data = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(help=MIX)]


def train(
    stage: Words[Literal["tokenizer", "language", "pixels", "all"]],
    /,
    data: Data = (),
    out: Path | None = None,
    preset: str = "nano",
    minutes: float | None = None,
    seed: int = 0,
    lora: int | None = None,
    lm: str | None = None,
    encoder: str | None = None,
    tracker: tuple[str, ...] = ("tensorboard",),
    fsdp: bool = False,
    stream: bool = False,
    tokens: Path | None = None,
    plan: bool = False,
    gpus: int = 1,
    memory: float | None = None,
    precision: Literal["auto", "fp32", "bf16"] | None = None,
) -> None:
    """Train a stage, or all three, of a preset on a data set.

    The same command goes on after an interruption.

    --minutes scales the steps: about that long on two idle CPU cores. --lm and --encoder put a
    causal LM and a vision encoder of your own, transformers folders or hub names, in the place of
    the preset's. --lora R trains adapters of rank R on a frozen language model. --tracker
    tensorboard, wandb or trackio, in addition to metrics.jsonl. --fsdp shards stage 2 over the
    processes of torchrun. --stream reads the data as they come, shard by shard, in every stage, and
    keeps none of them; --tokens takes the codes of stage 2 from a folder of `lavit
    tokenize-corpus`, and then nothing is read, only written. --plan trains nothing: it computes the
    memory of each stage on --gpus GPUs of --memory GiB; --precision fp32 is for those without bf16.
    """
    from dataclasses import replace

    from lavit.presets import preset as find
    from lavit.presets import scaled, with_encoder, with_lm
    from lavit.train.run import open_run, train_stages
    from lavit.train.settings import STAGES
    from lavit.vision.encoder import encoder_at

    _check_seed(seed)
    _check_gpus(fsdp, stage, plan, gpus, memory)
    chosen = find(preset)
    if lm is not None:
        chosen = with_lm(chosen, lm)
    if encoder is not None:
        chosen = with_encoder(chosen, encoder_at(encoder))
    model = chosen.model
    if lora is not None:
        model = replace(model, language=replace(model.language, lora_rank=lora))
    training = replace(chosen.training, seed=seed, precision=precision or chosen.training.precision)
    if minutes is not None:
        training = scaled(training, minutes / chosen.minutes)
    if stream:
        fed = {name: replace(getattr(training, name), stream=True) for name in STAGES}
        training = replace(training, **fed)
    if tokens is not None:
        training = replace(training, language=replace(training.language, token_corpus=str(tokens)))
    if plan:
        from lavit.train.plan import plan_stage

        for one in STAGES if stage == "all" else (stage,):
            print(*plan_stage(one, model, training, gpus=gpus, memory=memory).lines(), sep="\n")
        return
    if not data or out is None:
        raise InputError("a training needs --data (what to learn from), --out (the run's folder)")
    with ProgressBar() as progress:
        run = open_run(
            out,
            ",".join(data),
            model,
            training,
            trackers=tracker,
            fsdp=fsdp,
            watch=progress.report,
            prepare=progress.count,
        )
        train_stages(run, STAGES if stage == "all" else (stage,))
    print(f"trained: {out}")


def _check_gpus(fsdp: bool, stage: str, plan: bool, gpus: int, memory: float | None) -> None:
    if not plan and (gpus != 1 or memory is not None):
        said = "--gpus and --memory are of --plan"
        raise InputError(f"{said}: several GPUs train by torchrun --nproc-per-node N")
    if fsdp and stage != "language":
        said = f"FSDP2 shards the language stage only, not {stage}"
        raise InputError(f"{said}: leave --fsdp out (DDP), and train language with it afterwards")
    if fsdp and plan and gpus < 2:
        raise InputError("FSDP2 shards over GPUs and there is one: plan with --gpus N")


def finetune(
    data: Path,
    out: Path,
    model: Model = DEFAULT_MODEL,
    lora: int | None = None,
    steps: int = 200,
    minutes: float | None = None,
    seed: int = 0,
    tracker: tuple[str, ...] = ("tensorboard",),
    images: Path | None = None,
    keep_adapter: bool = False,
    replay: str = "",
    check: str | None = None,
) -> None:
    """Fine-tune a trained model on conversations (lavit train finetune); answers alone give loss.

    --data is a file of JSON lines {"messages": […]} with pictures on either side, of LLaVA's or
    ShareGPT's JSON, or TRL's parquet (docs/data.md); --images names the folder that its pictures
    are below, else they are below the file's. --lora R trains adapters of rank R, which are merged
    in the end, or with --keep-adapter stay a PEFT folder beside their base; by default all weights
    train, or the adapter that the model has (--lora 0: all weights even then). --minutes, in place
    of --steps, measures how many fit. The same command goes on after an interruption, unless the
    data have changed.

    --replay TEXTS:0.25 fills a quarter of the rows with texts alone, so that the model keeps its
    language. In the end captions, drawings and texts are measured before and after, on what --check
    DATA (default: what the model was trained on, if it is still there) holds out, and losses that
    have grown are warned of.
    """
    from lavit.evaluate.folder import held_out
    from lavit.train.finetune import finetune as fine_tune
    from lavit.train.finetune import finetune_training

    _check_seed(seed)
    training = finetune_training(
        model,
        lora_rank=lora,
        steps=steps,
        seed=seed,
        keep_adapter=keep_adapter,
        images=images,
        replay=replay,
    )
    if check is not None:
        held_out(check)  # what cannot be read is said before the training
    with ProgressBar() as progress:
        run = fine_tune(
            out,
            data,
            model,
            training,
            minutes=minutes,
            trackers=tracker,
            watch=progress.report,
            prepare=progress.count,
        )
    print(f"fine-tuned: {out}")
    if run.main:
        _forgotten(model, out, check)


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise InputError(f"--seed is {seed}, expected a whole number from 0")


def _forgotten(before: str, after: Path, data: str | None) -> None:
    """Print what a fine-tuning has cost, and warn of what has been forgotten."""
    from lavit.evaluate.folder import training_data
    from lavit.evaluate.forgetting import changes
    from lavit.storage import model_folder

    data = training_data(model_folder(before)) if data is None else data
    if data is None:
        print("not compared with the model before: give --check DATA", file=sys.stderr)
        return
    try:
        with ProgressBar() as progress:
            found, said = changes(before, after, data, progress=progress.count)
    except InputError as error:  # the training is done: this is no reason to fail
        print(f"not compared with the model before: {error}", file=sys.stderr)
        return
    print(f"loss a token before and after, on {said}")
    for change in found:
        moved = f"{change.before:.3f} -> {change.after:.3f}"
        print(f"  {change.what:<9} {moved}  [{change.low:+.3f}, {change.high:+.3f}]")
    if lost := [change.what for change in found if change.forgotten]:
        cure = "train fewer steps, at lower rates or by --lora, or --replay texts"
        print(f"warning: {', '.join(lost)} got worse: {cure}", file=sys.stderr)


def export(run: Words[str], /, out: Path, merge: bool = False, whole: bool = False) -> None:
    """Write a run's language model as a plain transformers folder; --merge joins LoRA to it.

    --whole writes the whole model, a folder for lavit.load, in place of the language model alone.
    """
    from lavit.generate.safety import FOLDER as CHECKER
    from lavit.model import LaVIT
    from lavit.storage import export_language, model_folder

    folder = model_folder(run)
    if not whole:
        export_language(read_config(folder), folder, out, merge=merge)
    elif out.exists():
        raise InputError(f"{out} exists already: give another --out")
    else:
        model = LaVIT.from_pretrained(folder)
        if merge:
            model.merge_adapter()
        model.save_pretrained(out)
        if (folder / CHECKER).is_dir():
            shutil.copytree(folder / CHECKER, out / CHECKER)
    print(out)
