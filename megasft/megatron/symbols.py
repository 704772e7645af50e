"""Everything of Megatron that is no interface of it and that we rely on, each with its reason.

Three kinds. *Used*: a name that Megatron could rename in any release: private ones, attributes its
loop sets, and functions of its training loop. *Replaced*: a name that a stand-in of ours takes the
place of. *Mirrored*: a function whose source we repeat, foresee or count on line by line, so that
a change of its text matters even where its signature stays.

Nothing here imports Megatron. ``tests/megatron/test_contract.py`` holds every entry against the
installed release: existence, signature, and the text of what is mirrored; so a new release of
Megatron becomes a list of names to look at.
"""

from typing import Final, NamedTuple


class Symbol(NamedTuple):
    """One name of Megatron's.

    Attributes:
        path: ``module:name``, or ``module:Class.attribute``; an attribute may be one that the class
            or its constructor sets.
        reason: What we do with it.
    """

    path: str
    reason: str


USED: Final = (
    Symbol(
        "megatron.training.checkpointing:_build_sharded_state_dict_metadata",
        "a proof describes the shards of a model as a save does",
    ),
    Symbol(
        "megatron.training.training:update_seqlen_stats_from_cu_seqlens",
        "tells Megatron's TFLOP/s the true lengths of packed documents",
    ),
    Symbol(
        "megatron.training.training:num_floating_point_operations",
        "FLOPs of a step, for the report and the forecast of its duration",
    ),
    Symbol(
        "megatron.training.training:destroy_global_state",
        "several runs in one process group: a proof and the tests",
    ),
    Symbol(
        "megatron.core.transformer.moe.moe_logging:destroy_moe_metrics_tracker",
        "destroy_global_state leaves it, and the next run would use it",
    ),
    Symbol(
        "megatron.core.optimizer_param_scheduler:get_canonical_lr_for_logging",
        "the learning rate a step was made with",
    ),
    Symbol(
        "megatron.core.distributed.finalize_model_grads:finalize_model_grads",
        "our hook calls it first, with its own arguments",
    ),
    Symbol(
        "megatron.core.transformer.transformer_config:TransformerConfig.finalize_model_grads_func",
        "hook: the report and the audit after the gradients are reduced; train() keeps what is set",
    ),
    Symbol(
        "megatron.core.transformer.transformer_config:TransformerConfig.moe_grad_scale_func",
        "hook: factor of the router losses",
    ),
    Symbol(
        "megatron.core.transformer.transformer_config:TransformerConfig.mtp_grad_scale_func",
        "hook: factor of the loss of multi-token prediction",
    ),
    Symbol(
        "megatron.core.transformer.transformer_config:TransformerConfig.grad_scale_func",
        "train() sets it to the optimizer's scale_loss: so the optimizer is found",
    ),
    Symbol(
        "megatron.core.transformer.transformer_config:TransformerConfig.variable_seq_lengths",
        "pipeline stages exchange the shapes of several rows laid end to end",
    ),
    Symbol(
        "megatron.core.models.gpt.gpt_model:GPTModel.rotary_pos_emb",
        "scaled rope: its inv_freq is replaced before its first use",
    ),
    Symbol(
        "megatron.core.models.common.embeddings.rotary_pos_embedding:RotaryEmbedding.inv_freq",
        "scaled rope: the frequencies",
    ),
    Symbol(
        "megatron.core.models.common.embeddings.yarn_rotary_pos_embedding:"
        "_yarn_get_concentration_factor_from_config",
        "what attention multiplies YaRN's cos and sin by, which row_rope.py does in its place",
    ),
    Symbol(
        "megatron.core.models.common.embeddings.rotary_pos_embedding:RotaryEmbedding.get_emb",
        "the table of angles that row_rope.py indexes by position",
    ),
    Symbol(
        "megatron.core.transformer.transformer_layer:TransformerLayer.layer_number",
        "names of parameters in the whole model, for --megasft-freeze; counts from 1",
    ),
    Symbol(
        "megatron.core.transformer.moe.router:TopKRouter.frozen_expert_bias",
        "a frozen router keeps its bias",
    ),
    Symbol(
        "megatron.core.transformer.torch_norm:WrappedTorchNorm",
        "replaced in layer specs by norms that sequence parallelism can use",
    ),
    Symbol(
        "megatron.core.transformer.utils:is_layer_window_attention",
        "which layers have a sliding window",
    ),
    Symbol(
        "megatron.core.num_microbatches_calculator:get_current_running_global_batch_size",
        "rows of the global batch that is being trained",
    ),
    Symbol(
        "megatron.training.global_vars:set_global_variables",
        "publishes validated flags to Megatron's functions; its tokenizer is left out",
    ),
)

REPLACED: Final = (
    Symbol(
        "megatron.core.tensor_parallel.layers:_grad_accum_fusion_available",
        "says for the time a model is built that Apex's kernel is there, which the output layer "
        "asks for and is then told not to use",
    ),
    Symbol(
        "megatron.core.transformer.multi_token_prediction:roll_tensor",
        "shifts a packed row document by document; ours shifts it at once",
    ),
    Symbol(
        "megatron.core.datasets.utils:compile_helpers",
        "runs make in the package, which the wheel ships without a Makefile",
    ),
    Symbol(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:_results_queue",
        "a process per rank at the first save, that imports the program again",
    ),
    Symbol(
        "megatron.training.argument_utils:ArgumentGroupFactory._get_field_docstrings",
        "reads the sources of fourteen classes each time a parser is made",
    ),
    Symbol(
        "megatron.training.training:get_optimizer_param_scheduler",
        "called between the making and the loading of the optimizer: checkpoint.py lets it load "
        "groups of parameters that had other learning rates",
    ),
)

MIRRORED: Final = (
    Symbol(
        "megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_bshd",
        "row_rope.py rotates heads by the same operations in the same order",
    ),
    Symbol(
        "megatron.core.transformer.multi_latent_attention:"
        "MLASelfAttention.get_query_key_value_tensors",
        "row_rope.py gives it angles of each token and no boundaries, and counts on that path",
    ),
    Symbol(
        "megatron.core.models.gpt.gpt_model:GPTModel._preprocess",
        "asks its rope for a length with the row as last argument, and takes None for no embedding",
    ),
    Symbol(
        "megatron.core.transformer.multi_token_prediction:_roll_tensor_packed_seq",
        "row_shift.py computes the same at once",
    ),
    Symbol(
        "megatron.training.models.gpt:GPTModelBuilder.build_model",
        "model_builder.py repeats it, with our layers in multi-token prediction",
    ),
    Symbol(
        "megatron.training.models.gpt:default_layer_spec",
        "model.py replaces parts of what it returns and renames norms in checkpoints",
    ),
    Symbol(
        "megatron.training.datasets.data_samplers:MegatronPretrainingSampler.__iter__",
        "row_order.py distributes rows by the positions it gives each rank",
    ),
    Symbol(
        "megatron.training.training:build_train_valid_test_data_loaders",
        "takes our datasets as they are, by is_distributed, and reads `split`",
    ),
    Symbol(
        "megatron.training.training:evaluate",
        "the batches and sums of an evaluation, which the report expects",
    ),
    Symbol(
        "megatron.training.training:checkpoint_and_decide_exit",
        "best.py and saving.py steer when it saves and exits by the flags it reads",
    ),
    Symbol(
        "megatron.training.training:update_train_iters",
        "how many steps --train-samples are",
    ),
    Symbol(
        "megatron.training.training:train",
        "the order of step, hooks, evaluation and save that the report and the keeper follow",
    ),
    Symbol(
        "megatron.training.arguments:validate_args",
        "checks/run/parallel.py says before what it would refuse, in words of a user",
    ),
    Symbol(
        "megatron.core.pipeline_parallel.schedules:forward_step_calc_loss",
        "what the loss function returns, and what side losses are multiplied with",
    ),
    Symbol(
        "megatron.core.optimizer_param_scheduler:OptimizerParamScheduler.load_state_dict",
        "resume.py sets which of two learning-rate schedules it takes",
    ),
    Symbol(
        "megatron.core.optimizer.optimizer:MegatronOptimizer._filter_and_reorder_param_groups",
        "checkpoint.py gives groups of parameters the rates that it looks for",
    ),
    Symbol(
        "megatron.training.checkpointing:load_checkpoint",
        "checkpoint.py asks before what it asserts; the optimizer is loaded before its schedule",
    ),
    Symbol(
        "megatron.core.dist_checkpointing.strategies.torch:TorchDistLoadShardedStrategy.load",
        "the layer-by-layer verification reads pieces the same way",
    ),
    Symbol(
        "megatron.core.transformer.transformer_layer:get_transformer_layer_offset",
        "checks/run/parameters.py counts a stage's parameters by it",
    ),
)
