"""Rules about which checkpoint a run goes on from."""

from __future__ import annotations

from lastgood.doctor.rule import Rule, advice
from lastgood.doctor.rules import resume_disk, resume_log, resume_runs

_GONE = r"FileNotFoundError: (?:\[\w+ \d+\] )?[^:'\n]{1,80}: '([^'\n]+)'"
"""As Linux, macOS and Windows word it; every long pattern is bounded, for logs hold lines of megabytes."""

RULES: tuple[Rule, ...] = (
    Rule(
        code="CKR001",
        title="There is no checkpoint in the output directory to resume from",
        severity="error",
        message=rf"No valid checkpoint found in output directory \((.*)\)|{_GONE}",
        log=resume_log.none_there,
        means="the script stops before the first step",
        cause="resume_from_checkpoint=True looks for checkpoint-N directories in output_dir and is an error where there"
        " are none: at the first launch of a run, or when output_dir isn't what it was. A relative output_dir means"
        " another directory as soon as the script is started from elsewhere.",
        fix=("on the first launch of a run leave resume_from_checkpoint out",),
        source="transformers 5.23, Trainer.train and get_last_checkpoint; transformers #15341, #10447",
    ),
    Rule(
        code="CKR002",
        title="What was to be resumed from is not a checkpoint",
        severity="error",
        message=r"Can't find a valid checkpoint at (.*)"
        r"|\[deepspeed\] failed to resume from checkpoint (.*)"
        r"|Can't find 'adapter_config\.json' at '([^'\n]+)'"
        r"|Error no file named .{1,300}?, found in directory (.*?)\.?$"
        r"|Repo id must (?:be in the form|use alphanumeric).{0,300}?: '([^'\n]+)'"
        r"|Incorrect path_or_model_id: '([^'\n]+)'"
        r"|Unrecognized model in (.*?)\. Should have a .model_type"
        r"|OSError: (\S+) does not appear to have a file named"
        r"|OSError: (\S+) is not a local folder and is not a valid model identifier"
        r"|Checkpoint (?:file not found: |at )(.*?)(?: not found\. Aborting.*)?$"
        rf"|{_GONE}",
        log=resume_log.not_found,
        run=resume_disk.weightless,
        means="the script stops before the first step, and nothing falls back to an older checkpoint",
        cause="The path doesn't exist where the script runs, or it is the run directory, a step, a file, an empty"
        " directory of a save that was cut off, or something that another tool wrote. The Trainer says the same"
        " sentence in all these cases.",
        fix=("lastgood -C {root} resume --check", "lastgood -C {root} resume --print-path"),
        source="transformers 5.23, Trainer._load_from_checkpoint, deepspeed_load_checkpoint; peft 0.21; transformers"
        " #28531, LLaMA-Factory #2389, #7614",
    ),
    Rule(
        code="CKR003",
        title="The checkpoint has no trainer_state.json",
        severity="error",
        message=r"FileNotFoundError: (?:\[\w+ \d+\] )?[^:'\n]{1,80}: '([^'\n]*trainer_state\.json)'",
        log=resume_log.stateless,
        run=resume_disk.stateless,
        means="the Trainer stops there, though older checkpoints may be good",
        cause="trainer_state.json is written last, so a save that was killed, or that ran out of space, lacks it. An"
        " exported model (save_model, save_pretrained) never has it, nor has the run directory itself: when the final"
        " model was saved into output_dir, giving output_dir passes the check for weights and fails here.",
        fix=("lastgood -C {root} resume --check", "lastgood doctor --fix {root}"),
        source="transformers 5.23, TrainerState.load_from_json, called by Trainer.train; transformers #29059, #35782",
    ),
    Rule(
        code="CKR004",
        title="A JSON file of the checkpoint is empty or cut off",
        severity="error",
        message=r"JSONDecodeError: .*"
        r"|UnicodeDecodeError: 'utf-8' codec.*"
        r"|It looks like the config file at '([^'\n]+)' is not a valid JSON file",
        log=resume_log.not_json,
        run=resume_disk.unreadable,
        means="the Trainer stops with a message that doesn't name the file",
        cause="A power cut or a full disk while trainer_state.json was written leaves it empty, cut off, or full of"
        " zero bytes. The parser only says at which character it failed.",
        fix=("lastgood -C {root} resume --check", "lastgood doctor --fix {root}"),
        source="transformers 5.23, TrainerState.load_from_json: a plain open and json.load, not replaced atomically",
    ),
    Rule(
        code="CKR005",
        title="resume_from_checkpoint stands among the training arguments, where the Trainer doesn't look",
        severity="info",
        arguments=resume_runs.ignored,
        means="unless the script itself hands it to train(), the run starts at step 0 without a word",
        cause="TrainingArguments has a field resume_from_checkpoint for scripts to read. Trainer.train only knows what"
        " it is called with.",
        fix=("trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)",),
        source="transformers 5.23, Trainer.train: no use of args.resume_from_checkpoint",
    ),
    Rule(
        code="CKR006",
        title="resume_from_checkpoint was given to a constructor",
        severity="error",
        message=r"got an unexpected keyword argument 'resume_from_checkpoint'",
        means="the script stops before the first step",
        cause="No trainer takes it when it is made. It is an argument of train().",
        fix=("trainer.train(resume_from_checkpoint=...)",),
        source="trl 1.16, SFTTrainer.__init__; transformers 5.23, Trainer.train",
    ),
    Rule(
        code="CKR007",
        title="Checkpoints of another run, or of an attempt that was given up, lie in the directory",
        severity="error",
        run=resume_runs.strangers,
        arguments=resume_runs.foreign,
        means="the one with the highest number is resumed from, whoever wrote it",
        cause="A stock Trainer takes the checkpoint-N with the highest N, and its save_total_limit deletes the oldest,"
        " whichever run they are of. A directory that is used twice mixes both: a run of 1000 steps is taken up by one"
        " of 300, which then ends at once.",
        fix=("a fresh output_dir for each run", "lastgood -C {root} log"),
        source="transformers 5.23, get_last_checkpoint, rotate_checkpoints; Lightning #11379, open-instruct #1299",
    ),
    Rule(
        code="CKR008",
        title="The run is finished: there is no step left after the checkpoint",
        severity="warning",
        warning=r"Total optimization steps = (?P<end>[\d,]+)[\s\S]{0,3000}?"
        r"(?:Resuming training from checkpoint with epoch \d+ and|Continuing training from) global step (?P<step>\d+)",
        log=resume_log.beyond,
        arguments=resume_runs.finished,
        means="a stock Trainer trains one step beyond the end all the same, and saves that",
        cause="The end of the run is compared after a step, not before the first. max_steps and num_train_epochs count"
        " from the beginning of the run, not from the resume.",
        fix=("a larger max_steps or num_train_epochs, or no resume",),
        source="transformers 5.23, Trainer._run_epoch: global_step >= max_steps is looked at after each step",
    ),
    Rule(
        code="CKR009",
        title="A checkpoint was loaded as a model, and not resumed from",
        severity="warning",
        warning=r"loading weights file (\S*checkpoint-\d+)[/\\]",
        log=resume_log.as_a_model,
        run=resume_runs.from_weights,
        arguments=resume_runs.as_a_model,
        means="optimizer, schedule, random states and the place in the data start anew: the loss jumps up",
        cause="from_pretrained(checkpoint) reads the weights and nothing else. That is right for the next stage of a"
        " training, and loses half of the state if the run was meant to go on.",
        fix=("trainer.train(resume_from_checkpoint= the path of the checkpoint)",),
        source="transformers 5.23, PreTrainedModel.from_pretrained",
    ),
    Rule(
        code="CKR010",
        title="The best checkpoint is recorded by a path that doesn't exist any more",
        severity="warning",
        message=rf"ValueError: '([^'\n]{{1,1000}})' is not in list|{_GONE}",
        warning=r"The best checkpoint (.{1,1000}?) recorded in the resumed state does not exist anymore"
        r"|Could not locate the best model at (.{1,1000}?), if you",
        log=resume_log.lost_best,
        run=resume_disk.lost_best,
        means="the run forgets which checkpoint was the best: it may be deleted by save_total_limit, and"
        " load_best_model_at_end loads nothing",
        cause="trainer_state.json holds the absolute path of the best checkpoint. When the run directory is moved,"
        " renamed, or mounted elsewhere, the path leads nowhere. Older versions stop, newer ones go on without it.",
        fix=("lastgood doctor --fix {root}", "or give the run directory its old path, by a link"),
        source="transformers 5.23, Trainer._init_training_state; transformers #26739, #22172, #10412",
    ),
    Rule(
        code="CKR011",
        title="Lightning forgets its ranking, because the directory of the checkpoints has changed",
        severity="warning",
        warning=r"The dirpath has changed from (.{1,1000}?) to (.{1,1000}?), therefore .best_model_score",
        log=resume_log.moved_callback,
        means="save_top_k counts from zero again: worse models become the best, and the old ones are never deleted",
        cause="ModelCheckpoint restores its scores only if dirpath is what it was. A version_N folder that counts up"
        " with every launch is enough to change it.",
        fix=("ModelCheckpoint(dirpath= where the run began, ...)",),
        source="lightning 2.6, ModelCheckpoint.load_state_dict; Lightning #11379, #12225",
    ),
    Rule(
        code="CKR012",
        title="Lightning found no last checkpoint, and trains from the beginning",
        severity="warning",
        warning=r"\.\w+\(ckpt_path=.last.\) is set, but there is no last checkpoint available",
        log=resume_log.no_last,
        means="training starts at step 0, with a warning only",
        cause="ckpt_path='last' takes what save_last=True wrote, not the newest file. Without it, or with another"
        " dirpath, there is none. On the first launch of a run that is as it should be.",
        fix=("ModelCheckpoint(save_last=True, ...)",),
        source="lightning 2.6, _CheckpointConnector._parse_ckpt_path",
    ),
    Rule(
        code="CKR013",
        title="DeepSpeed's file `latest` is missing or names what isn't there",
        severity="error",
        warning=r"Unable to find latest file at (\S+?)[,]? if trying to load",
        log=resume_log.no_tag,
        run=resume_disk.no_tag,
        means="DeepSpeed only warns: weights, optimizer and step count start anew",
        cause="`latest` holds the name of the newest global_step folder and is written after the shards. A save that"
        " was cut off, or a copy that left it out, lacks it.",
        fix=("printf global_stepN > {checkpoint}/latest, N the newest with all its shards",),
        source="DeepSpeed engine.load_checkpoint",
    ),
    Rule(
        code="CKR014",
        title="An interrupted save was left behind",
        severity="warning",
        warning=r"Failed to save JIT checkpoint: .*",
        run=resume_disk.leftovers,
        means="a stock Trainer takes it for a checkpoint if its name is one, and stops at it",
        cause="A save that was killed leaves what it had written: a temporary directory, an empty one, or the marker"
        " checkpoint-is-incomplete.txt, which nothing ever reads.",
        fix=("lastgood doctor --fix {root}", "lastgood -C {root} prune --incomplete"),
        source="transformers 5.23, trainer_jit_checkpoint; transformers #27820 (tmp-checkpoint-N in 4.36), #35782",
    ),
    Rule(
        code="CKR015",
        title="The run was preempted, and ended as if it were done",
        severity="warning",
        warning=r"SIGTERM received, will request JIT checkpoint.*|Immediate JIT checkpoint completed successfully",
        log=resume_log.preempted,
        run=resume_disk.half_trained,
        arguments=resume_runs.returns_normally,
        means="after a SIGTERM train() returns normally and the script exits with 0: what follows exports a half-"
        "trained model, and the scheduler takes the job for done",
        cause="enable_jit_checkpoint answers SIGTERM with a save and then stops the training loop in the usual way."
        " Nothing tells the script that training isn't over.",
        fix=(
            "after train(): if trainer.state.global_step < trainer.state.max_steps: sys.exit(143)",
            "a managed trainer saves and exits with 75; `lastgood run -- COMMAND` launches it again",
        ),
        source="transformers 5.23, trainer_jit_checkpoint.CheckpointManager",
    ),
    Rule(
        code="CKR016",
        title="Checkpoints without optimizer: none of them can be resumed from",
        severity="warning",
        arguments=lambda case: advice(resume_runs.weights_alone(case), case),
        run=resume_disk.no_optimizer,
        means="a resume starts with an empty optimizer and a fresh schedule, without a word",
        cause="save_only_model=True leaves out optimizer, schedule and random states. The same comes of copying a"
        " checkpoint without its large files. The Trainer loads optimizer and schedule only if both are there, and says"
        " nothing if they aren't.",
        fix=("save_only_model=False", "keep=lastgood.Keep(last=..., full=1) to save space"),
        source="transformers 5.23, Trainer._load_optimizer_and_scheduler",
    ),
    Rule(
        code="CKR017",
        title="A stock Trainer went on in a managed run",
        severity="warning",
        run=resume_disk.beyond,
        means="a resume by lastgood goes back to the newest checkpoint with a manifest: the steps since are redone",
        cause="The script ran once without `lastgood.manage`. What it saved has no manifest, so nothing can be checked,"
        " and nobody knows whether it continues this run.",
        fix=("lastgood -C {root} adopt", "lastgood doctor --fix {root}"),
        source="lastgood, Manager.find",
    ),
)
