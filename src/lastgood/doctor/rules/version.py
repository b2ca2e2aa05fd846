"""Rules about versions, formats, and states that don't fit what is running."""

from __future__ import annotations

from lastgood.doctor.rule import Rule
from lastgood.doctor.rules import fit, version_look, version_optimizer

RULES: tuple[Rule, ...] = (
    Rule(
        code="CKV001",
        title="torch refuses to open a file, because it names a class or function that isn't known to be harmless",
        severity="error",
        message=r"Unsupported (?:global: GLOBAL|class) \S+ was not|Trying to load unsupported GLOBAL \S+ whose module",
        log=version_look.refused,
        means="the checkpoint is whole, but this part of it can't be loaded as it is",
        cause="Files of torch.save are pickles: opening one may run what it names. Since torch 2.6 torch.load opens"
        " only what is known to be harmless (weights_only=True). Old random states name numpy's functions, training"
        " arguments name argparse.Namespace or classes of the training script. Turning the check off for all files"
        " runs whatever the next downloaded file names; allow the few names that you know instead.",
        fix=(
            "torch.serialization.add_safe_globals([the class that is named])",
            "not weights_only=False: it runs whatever a file names",
        ),
        source="torch 2.13, serialization.load; transformers #37162, #40500; trl #3247",
    ),
    Rule(
        code="CKV002",
        title="The random states were written with numpy 2, and numpy 1 is installed",
        severity="error",
        message=r"No module named 'numpy\._core",
        run=version_look.numpy_two,
        means="everything but the random states can be loaded; a resume stops at them",
        cause="numpy 2 calls its inner package numpy._core, and a pickled array names it. numpy 1 doesn't know the"
        " name. The other way round works.",
        fix=(
            "pip install 'numpy>=2'",
            "or move rng_state*.pth out of a copy of the checkpoint: the run goes on, with other random numbers",
        ),
        source="numpy 2.0 release notes; numpy.core -> numpy._core",
    ),
    Rule(
        code="CKV003",
        title="The checkpoint was saved with another version of transformers",
        severity="info",
        warning=r"You are resuming training from a checkpoint trained with (\S+) of Transformers but your current"
        r" version is (\S+)",
        log=version_look.other_version,
        run=version_look.other_major,
        means="it mostly works; names of weights and defaults of arguments may have changed between the two",
        cause="config.json records the version that saved it. The Trainer compares it with its own and only warns. A"
        " new major version changes defaults, so the resumed run may not be the same run.",
        fix=("pip install transformers==the version that saved it, to go on exactly as before",),
        source="transformers 5.23, Trainer._load_from_checkpoint",
    ),
    Rule(
        code="CKV004",
        title="The vocabulary of the model being built has another size than the checkpoint's",
        severity="error",
        message=fit.MISFIT,
        log=version_look.vocabulary,
        over=("CKV005",),
        means="nothing is loaded",
        cause="Tokens were added to the tokenizer, and the embedding with them, before the checkpoint was saved or"
        " since; or it was padded to a multiple of 8 or 64. The embedding has a row per token, so the model has to be"
        " resized to the size that was saved before the checkpoint is loaded.",
        fix=("model.resize_token_embeddings(the size in the checkpoint) before it is loaded",),
        source="torch 2.13, Module.load_state_dict; transformers 5.23, log_state_dict_report",
    ),
    Rule(
        code="CKV005",
        title="The model differs from the one in the checkpoint",
        severity="error",
        message=fit.MISFIT + r"|(?:Missing|Unexpected) key\(s\) in state_dict: |[Mm]odel differs after resume"
        r"|the model's tensors differ from those in the checkpoint",
        warning=f"{fit.MISSING_LINE}|{fit.SURPLUS_LINE}",
        log=version_look.shapes_or_left_out,
        run=version_look.changed_model,
        over=("CKV007",),
        means="nothing is loaded",
        cause="The model that the script builds isn't the one that was saved: another size, other layers, another"
        " class, or a wrapper that gives every tensor another name. Where tensors are only missing the Trainer prints a"
        " line and goes on with fresh ones. The configuration in the checkpoint says what was saved.",
        fix=(
            "build the model from the checkpoint's own config.json: AutoConfig.from_pretrained(the checkpoint)",
            "lastgood diff REV OTHER  # with a checkpoint that works as the other",
        ),
        source="torch 2.13, Module.load_state_dict; transformers 5.23, Trainer._issue_warnings_after_load",
    ),
    Rule(
        code="CKV006",
        title="The optimizer is another one than the one whose state was saved",
        severity="error",
        message=r"^KeyError: '(betas|beta1|exp_avg|exp_avg_sq|exp_avg_sq_row|max_exp_avg_sq|momentum|momentum_buffer"
        r"|square_avg|sum|acc_delta|lr_decay|alpha|centered|state1|state2|scale_parameter|clip_threshold)'\s*$"
        r"|the checkpoint holds the state of (\S+), the run uses (\S+)",
        log=version_optimizer.other_optimizer,
        run=version_optimizer.optimizer_to_come,
        means="the resume stops at the first step, or earlier",
        cause="Loading an optimizer's state replaces its settings by the saved ones, whatever class wrote them. The"
        " first step then looks for a setting or a moment that the other class never had.",
        fix=version_optimizer.OTHER_OPTIMIZER,
        source="torch 2.13, Optimizer.load_state_dict; transformers 5.23, Adafactor",
    ),
    Rule(
        code="CKV007",
        title="Other parameters are trained than when the optimizer was saved",
        severity="error",
        message=r"loaded state dict (?:contains a parameter group that doesn't match the size of optimizer's group"
        r"|has a different number of parameter groups)"
        r"|the optimizer's parameters differ from those in the checkpoint",
        log=version_optimizer.other_parameters,
        means="the weights fit and the optimizer's state doesn't: layers were frozen or unfrozen, or grouped otherwise",
        cause="An optimizer knows parameters by their number, not by their name. If more, fewer or other parameters are"
        " trained than before, the numbers no longer mean the same and torch refuses. The usual reasons are frozen"
        " layers, other LoRA targets, and an adapter that was loaded for inference.",
        fix=(
            "train the same parameters as when it was saved: the same frozen layers, the same weight decay groups",
            *version_optimizer.AFRESH,
        ),
        source="torch 2.13, Optimizer.load_state_dict; transformers #24252, #24354; peft #859",
    ),
    Rule(
        code="CKV008",
        title="The state that is loaded has no `step`",
        severity="error",
        message=r"^KeyError: 'step'\s*$|'step' not (?:found )?in (?:the )?checkpoint"
        r"|Missing key in checkpoint state_dict: (?P<key>\S+\.step)\.",
        log=version_optimizer.without_step,
        run=version_optimizer.adam_without_step,
        over=("CKD002",),
        means="the resume stops",
        cause="One message, three troubles. (a) torch's Adam counts steps for each parameter, and the file was written"
        " by something that doesn't. (b) accelerate 0.32 and 0.33 read the step from the random states' file; if that"
        " can't be read they say so in a line that nobody sees, and fail at the step. (c) A sharded checkpoint has no"
        " optimizer state for parameters that never got a gradient, and the loading run asks for them.",
        fix=("lastgood doctor RUN --log FILE  # with the whole traceback",),
        source="torch 2.13, Adam.__setstate__; accelerate 0.33, Accelerator.load_state, #2923, #3067; torch 2.13,"
        " distributed.checkpoint.default_planner; prime-rl #2676, #3399",
    ),
    Rule(
        code="CKV009",
        title="The optimizer's state counts its steps in numbers, and this torch wants tensors",
        severity="error",
        message=r"`?state_steps`? argument must contain a list of singleton tensors",
        log=version_optimizer.step_kind,
        means="the first step of the resumed run stops",
        cause="Until torch 1.11 Adam counted steps in plain numbers. load_state_dict turns them into tensors; code that"
        " puts the state into the optimizer by other ways doesn't.",
        fix=(
            "load it with optimizer.load_state_dict(), which converts it",
            "for state in optimizer.state.values(): state['step'] = torch.tensor(float(state['step']))",
        ),
        source="torch 2.13, optim.adam.adam and Adam.__setstate__",
    ),
    Rule(
        code="CKV010",
        title="A part of the checkpoint belongs to another device, or isn't of the kind that was saved",
        severity="error",
        message=r"Attempting to deserialize object on .{1,40}? but torch\.\S+"
        r"|RNG state must be a torch\.ByteTensor",
        log=version_look.elsewhere,
        run=version_look.cast_random_states,
        means="the resume stops",
        cause="torch.load puts tensors where they were saved, a GPU that isn't here. Or the random states were moved or"
        " cast together with the model, as map_location='cuda' or .half() over a whole checkpoint do: they have to be"
        " bytes, on the CPU.",
        fix=('torch.load(path, map_location="cpu", weights_only=True)',),
        source="torch 2.13, serialization._validate_device, random.set_rng_state",
    ),
    Rule(
        code="CKV011",
        title="Tensors can't be written to safetensors as they are",
        severity="error",
        message=r"Some tensors share memory, this will lead to duplicate memory on disk"
        r"|You are trying to save a non contiguous tensor: \S+",
        means="this checkpoint isn't saved, and often half of its directory is left behind",
        cause="safetensors writes each tensor once and row by row. Tied weights are one piece of memory under two"
        " names; a transposed or sliced tensor is a view that isn't in order.",
        fix=(
            "safetensors.torch.save_model(model, path), which knows tied weights; or model.save_pretrained(path)",
            "tensor.contiguous() for views",
        ),
        source="safetensors 0.8, torch._flatten_as_ptr",
    ),
    Rule(
        code="CKV012",
        title="Lightning is to resume from a checkpoint that holds weights alone",
        severity="error",
        message=r"Trying to restore (?:optimizer|learning rate scheduler) state but checkpoint contains only the model",
        log=version_look.only_weights,
        means="nothing can be resumed from it; its weights are fine",
        cause="ModelCheckpoint(save_weights_only=True) leaves optimizer and schedule out, and ckpt_path= wants to go on"
        " exactly where it stopped.",
        fix=(
            "load the weights and start afresh: model = Model.load_from_checkpoint(path); trainer.fit(model)",
            "ModelCheckpoint(save_weights_only=False), for the checkpoints to come",
        ),
        source="lightning 2.6, _CheckpointConnector.restore_optimizers_and_schedulers",
    ),
    Rule(
        code="CKV013",
        title="A tied weight isn't in the file, which is right",
        severity="benign",
        warning=fit.MISSING_LINE,
        log=version_look.tied,
        means="nothing: the output layer and the embedding are one tensor, saved once, and both have it after the load",
        cause="With tie_word_embeddings lm_head.weight is the embedding under another name. It is written once, and the"
        " Trainer, which compares names, prints a warning at every resume that works.",
        fix=("nothing to do",),
        source="transformers 5.23, Trainer._issue_warnings_after_load",
    ),
)
