"""Rules about adapters."""

from __future__ import annotations

from lastgood.doctor.rule import Rule
from lastgood.doctor.rules import fit, peft_base, peft_look
from lastgood.doctor.rules.version_optimizer import WITH_ADAPTER

_GROUPS = (
    r"loaded state dict (?:contains a parameter group that doesn't match the size of optimizer's group"
    r"|has a different number of parameter groups)"
)
_NO_GRADIENT = r"element 0 of tensors does not require grad and does not have a grad_fn"

RULES: tuple[Rule, ...] = (
    Rule(
        code="CKP001",
        title="The adapter was loaded for inference: nothing is trained",
        severity="error",
        message=_GROUPS + "|" + _NO_GRADIENT,
        log=peft_look.nothing_trainable,
        run=peft_look.never_moved,
        over=("CKV007", "CKP010", "CKP011"),
        means="the run stops, or goes on for hours without changing a weight",
        cause="PeftModel.from_pretrained(base, path) loads an adapter for inference: all of its weights are frozen. The"
        " Trainer takes such a model without a word. Its optimizer has no parameters, so the state of the saved one"
        " doesn't fit; with a new optimizer it trains nothing at all.",
        fix=WITH_ADAPTER,
        source="peft 0.21, PeftModel.from_pretrained; trl #6700; peft #859",
    ),
    Rule(
        code="CKP002",
        title="The adapter has another rank than the one in the checkpoint",
        severity="error",
        message=fit.MISFIT,
        log=peft_look.other_rank,
        run=peft_look.rank_to_come,
        over=("CKV004", "CKV005"),
        means="the adapter isn't loaded",
        cause="LoRA's two factors have the rank r as their inner size. A LoraConfig with another r makes other shapes.",
        fix=("LoraConfig(r= as in adapter_config.json of the checkpoint)", *peft_look.OTHER_RANK),
        source="peft 0.21, set_peft_model_state_dict",
    ),
    Rule(
        code="CKP003",
        title="The adapter changes other modules than the one in the checkpoint",
        severity="error",
        message=_GROUPS + r"|^KeyError: '(?P<lacks>base_model\.model\.[^'\n]{1,500})'",
        warning=r"Found missing adapter keys while loading the checkpoint: (\[.*?\])",
        log=peft_look.other_targets,
        run=peft_look.targets_to_come,
        over=("CKV007",),
        means="weights of modules that both have are loaded in silence; the optimizer's state fits none of them",
        cause="target_modules, modules_to_save or the bias setting decide which tensors an adapter has. peft loads what"
        " it finds and leaves the rest as it begins. The optimizer, which knows parameters by number, can't.",
        fix=(
            "LoraConfig(target_modules= as in adapter_config.json of the checkpoint)",
            "to change it on purpose: load the adapter, and train with a new optimizer in a new output_dir",
        ),
        source="peft 0.21, PeftModel.load_adapter; torch 2.13, Optimizer.load_state_dict; transformers #24252",
    ),
    Rule(
        code="CKP004",
        title="A checkpoint of an adapter is loaded into a model without one",
        severity="error",
        message=r"Can't find a checkpoint index \(\S+ or \S+\)|Unexpected key\(s\) in state_dict: .*\.lora_",
        log=peft_look.into_bare,
        over=("CKV005",),
        means="the resume stops",
        cause="The checkpoint holds an adapter alone, and the model given to the Trainer is the bare base. The Trainer"
        " looks for a whole model, finds none, and asks for the index of one in several files.",
        fix=(
            "get_peft_model(base, LoraConfig(as in adapter_config.json)), then train(resume_from_checkpoint=...)",
            "SFTTrainer(..., peft_config=...), as when it was saved",
            "lastgood checkout REV DIR --merge  # if a whole model is what you want",
        ),
        source="transformers 5.23, Trainer._load_from_checkpoint, load_sharded_checkpoint",
    ),
    Rule(
        code="CKP005",
        title="A checkpoint of a whole model is loaded into one with an adapter",
        severity="error",
        message=r"Missing key\(s\) in state_dict: \"base_model\.model\.",
        warning=fit.MISSING_LINE,
        log=peft_look.full_into_adapter,
        over=("CKV005", "CKV007"),
        means="nothing of the checkpoint is loaded: the Trainer prints a line and trains on from the base model",
        cause="In a model with an adapter every tensor's name begins with base_model.model. Those of a whole model"
        " don't, so none fits. load_state_dict(strict=False), as the Trainer calls it, doesn't mind.",
        fix=(
            "build the base from the checkpoint: AutoModelForCausalLM.from_pretrained(the checkpoint), then"
            " get_peft_model, and train() without resume_from_checkpoint",
            "or train the whole model as before, without peft_config",
        ),
        source="transformers 5.23, Trainer._issue_warnings_after_load",
    ),
    Rule(
        code="CKP006",
        title="The adapter holds whole tensors of its base",
        severity="warning",
        run=peft_base.large,
        means="each checkpoint is as large as the embeddings, for weights that the base has already",
        cause="peft saves the embeddings with the adapter if it believes that they were resized (save_embedding_layers)"
        " or targeted. That is right where tokens were added, and a gigabyte for nothing where they weren't.",
        fix=(
            "model.save_pretrained(path, save_embedding_layers=False)",
            "modules_to_save=[...], if they are trained on purpose",
        ),
        source="peft 0.21, get_peft_model_state_dict; peft #2092, #2898; unsloth #1093",
    ),
    Rule(
        code="CKP007",
        title="The adapter belongs to another base model",
        severity="error",
        message=r"tensors of the model can't be brought back from the checkpoint: .*base_model\.",
        run=peft_base.other_base,
        means="the adapter loads without a word, and what comes out is wrong",
        cause="An adapter is a change to one base. Loaded onto another, a newer revision, a fine-tuned or resized one,"
        " its tensors may still fit, and nothing compares the rest. A managed run records a digest of every tensor of"
        " the base.",
        fix=("PeftModel.from_pretrained(the base that it was trained on, path)",),
        source="peft 0.21, PeftModel.from_pretrained: base_model_name_or_path is a name and is compared with nothing",
    ),
    Rule(
        code="CKP008",
        title="An old integration of peft may not have saved the adapter",
        severity="warning",
        warning=r"The intermediate checkpoints of PEFT may not be saved correctly",
        means="the best model isn't loaded at the end, or the adapter isn't restored",
        cause="The Trainer finds no adapter file in a checkpoint that should have one: old versions of transformers and"
        " peft saved the whole model, or nothing.",
        fix=("pip install -U transformers peft", "lastgood show REV  # to see whether a checkpoint holds an adapter"),
        source="transformers 5.23, Trainer._load_from_checkpoint; peft #96",
    ),
    Rule(
        code="CKP009",
        title="Parts of the adapter were saved empty, because its shards weren't gathered",
        severity="error",
        message=fit.MISFIT,
        warning=r"LoRA tensor\(s\) have invalid shape",
        log=peft_look.hollow_log,
        run=peft_look.hollow,
        over=("CKP002", "CKV005"),
        means="what is saved can't be loaded; peft warns at the save and raises nothing",
        cause="Under DeepSpeed ZeRO-3 and FSDP each process holds a piece of every tensor, and empty ones in their"
        " place. save_pretrained() called directly writes these.",
        fix=(
            "trainer.save_model(), which gathers, instead of model.save_pretrained()",
            "with deepspeed.zero.GatheredParameters(list(model.parameters())): model.save_pretrained(path)",
        ),
        source="peft 0.21, save_and_load",
    ),
    Rule(
        code="CKP010",
        title="Merging the adapter did nothing, or something else than it should",
        severity="warning",
        message=r"tensors of the merged model aren't what base and adapter give"
        r"|tensors that the adapter doesn't touch are not those of the base",
        run=peft_look.does_nothing,
        means="a model that isn't the trained one would be deployed",
        cause="A merge that finds no tensor by its name, drops the scaling or rounds to another dtype raises nothing"
        " and gives a model that looks right. An adapter whose B is zero gives exactly the base.",
        fix=(
            "lastgood checkout REV DIR --merge  # which compares every tensor with base + scaling * B @ A",
            "--base DIR, if the base isn't the one that the adapter names; --dtype, if it has several",
        ),
        source="weights.check; verl #7285; unsloth #869; peft #868",
    ),
    Rule(
        code="CKP011",
        title="The loss depends on nothing that is trained",
        severity="error",
        message=_NO_GRADIENT,
        log=peft_look.no_gradient,
        means="training stops at its first step",
        cause="Either every weight is frozen, an adapter loaded without is_trainable=True, say. Or gradient"
        " checkpointing in its old form (use_reentrant) stands between the loss and the adapter: it passes gradients on"
        " only if its inputs want some, and those come from an embedding that is frozen.",
        fix=peft_look.CHECKPOINTING,
        source="torch 2.13, autograd; peft's documentation of gradient checkpointing",
    ),
)
