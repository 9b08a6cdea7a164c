"""Every name with a leading underscore that is not ours and that fastft leans on.

A test says which of them an upgrade of torch, transformers, accelerate, datasets or DeepSpeed has
taken away.
"""

from __future__ import annotations

# "module:qualified name" and what it is for; "a|b" is one name of several versions. What no class
# has, only its instances, is looked for in the module's text.
PRIVATE_NAMES = {
    "torch:_disable_dynamo": "torch.compiler.disable without importing the compiler",
    "torch._dynamo.decorators:_dynamo_marked_constant": (
        "torch.compiler.assume_constant_result, without the compiler"
    ),
    "torch:Tensor._make_wrapper_subclass": "lazy logits, and gradients that are elsewhere, are "
    "tensors without memory",
    "torch._C:_disabled_torch_function_impl": "such a gradient is looked at below autograd alone",
    "torch:ops.aten._foreach_zero_": "zero_grad(set_to_none=False)",
    "torch:UntypedStorage._cdata": (
        "whether an operation on lazy logits would share their memory; which memory is live"
    ),
    "torch:_ops.OpOverload._schema": "what an operation writes to, and which results are views",
    "torch:ops.aten._local_scalar_dense": "a look at a number that is not there",
    "torch:ops.aten._grouped_mm": "experts of a model, by shapes alone",
    "torch:Tensor._version": "has somebody written to a gradient, a state or a weight since",
    "torch._C:DisableTorchFunctionSubclass": (
        "computing inside __torch_function__ without entering it again"
    ),
    "torch._C:_len_torch_function_stack": "does a mode answer functions",
    "torch._C:_get_function_stack_at": "is that mode torch.set_default_device's",
    "torch.utils._device:DeviceContext": "the class of that mode",
    "torch._C:_len_torch_dispatch_stack": "does a mode watch operations",
    "torch._C:_are_functorch_transforms_active": "does torch.func map or derive what runs",
    "torch._C:_autograd._top_saved_tensors_default_hooks": "do hooks get what autograd keeps",
    "torch._C:_functorch.is_legacy_batchedtensor": "is a gradient many gradients at once",
    "torch.autograd.forward_ad:_current_level": "are there numbers with derivatives of their own",
    "torch._C:_current_graph_task_id": (
        "is a backward pass under way, as torch.utils.checkpoint asks"
    ),
    "torch._C:_autograd._get_current_graph_task_keep_graph": "will this graph be walked again",
    "torch:ops.aten._flash_attention_forward": "attention within segments on a GPU",
    "torch:ops.aten._flash_attention_backward": "its gradients",
    "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu": (
        "attention within segments on a CPU"
    ),
    "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu_backward": "its gradients",
    "torch._dynamo.eval_frame:OptimizedModule._orig_mod": "the model inside torch.compile",
    "torch.nn:Module._replicate_for_data_parallel": "replicas of a layer are stock ones",
    "torch.nn.modules.module:_has_any_global_hook": "does somebody see what every module does",
    "torch.nn:Module._compiled_call_impl": "has a module been compiled in its place",
    "torch.distributed.fsdp:FullyShardedDataParallel._fsdp_wrapped_module": (
        "the model inside FSDP1"
    ),
    "torch.distributed.fsdp._flat_param:_fsdp_flattened": (
        "a weight that FSDP1 keeps in a flat parameter"
    ),
    "torch.distributed.fsdp:FSDPModule._get_fsdp_state": "which modules one FSDP2 unit gathers",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState."
    "_fsdp_param_groups|_fsdp_param_group": "does it reshard",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup."
    "_wait_all_gather_streams_on_event": "gathering waits for updates of what is gathered",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup.unshard": (
        "what comes before every gather"
    ),
    "torch.distributed.tensor:DTensor._local_tensor": "who reads a DTensor's part",
    "torch.utils._python_dispatch:_disable_current_modes": (
        "updates in the middle of code that counts operations"
    ),
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._modules": (
        "the modules of one FSDP2 unit"
    ),
    "torch.distributed.tensor._utils:compute_local_shape_and_global_offset": "where a shard begins",
    "torch.distributed.tensor:_dtensor_spec.DTensorSpec": (
        "a DTensor on a mesh of GPUs whose parts are on the host, as FSDP2 makes its own"
    ),
    "torch.distributed.tensor:_dtensor_spec.TensorMeta": "likewise",
    "torch.nn.modules.module:_global_backward_hooks": "hooks that would see the gradient of logits",
    "torch.nn.modules.module:_global_backward_pre_hooks": "likewise",
    "torch.nn:Module._backward_hooks": "likewise, of one module",
    "torch.nn:Module._backward_pre_hooks": "likewise",
    "torch.nn:Module._forward_hooks": "hooks that see the packing probe's batches",
    "torch.nn:Module._forward_pre_hooks": "likewise",
    "torch.nn.modules.module:_global_forward_hooks": "likewise, of all modules",
    "torch.nn.modules.module:_global_forward_pre_hooks": "likewise",
    "torch.nn:Module._parameters": "a weight that FSDP1 took out of its module is not in here",
    "torch.nn:Module._buffers": "what a module's twin on the meta device holds",
    "torch.nn:Module._modules": "likewise",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper:"
    "CheckpointWrapper._checkpoint_wrapped_module": "the module inside torch's checkpointing",
    "torch:Tensor._backward_hooks": "a hook on a weight forbids writing to its gradient directly",
    "torch:Tensor._post_accumulate_grad_hooks": "likewise",
    "torch.utils:_python_dispatch": "numbers of meta tensors are computed beside them",
    "torch.utils:_pytree": "lazy logits nested in arguments",
    "torch.optim.lr_scheduler:_wrapped_by_lr_sched": "has a scheduler wrapped an optimizer's step",
    "torch.optim.lr_scheduler:LRScheduler._initial_step": "wraps it without a change of rates",
    "accelerate.accelerator:_is_accelerate_prepared": "has an object been through `prepare`",
    "transformers:AttentionInterface._global_mapping": "is attn_implementation='fastft' registered",
    "transformers:PreTrainedConfig._attn_implementation": "which attention a model uses",
    "transformers:PreTrainedConfig._attn_implementation_internal": (
        "the same, set without a check of the name"
    ),
    "transformers:PreTrainedModel._from_config": "a model of the class that a configuration names",
    "transformers:PreTrainedModel._supports_sdpa": "which stock attention the probe tries",
    "transformers:PreTrainedModel._supports_flash_attn": "would flash-attn help a model",
    "transformers:PreTrainedModel._can_set_attn_implementation": (
        "does the model's code look its attention up by name"
    ),
    "transformers:PreTrainedModel._tp_size": "how many processes compute the same batch",
    "transformers.distributed.tensor_parallel:TensorParallelLayer.install_forward": (
        "the function that it leaves on a head knows the plan by the names `self`, `mesh` and "
        "`original_forward`"
    ),
    "torch.distributed.tensor:_api.distribute_module": "a head's hook that gathers its output",
    "transformers:PreTrainedConfig._experts_implementation_internal": (
        "how a model's experts are computed, set without a check of the name"
    ),
    "transformers:PreTrainedModel._loss_function": "what setting loss_function leaves on a model",
    "transformers:Trainer._train_batch_size": "how many packs a packed batch of `plug` has",
    "transformers:Trainer._load_from_checkpoint": (
        "does a trainer read weights of other names than Trainer's"
    ),
    "transformers:Trainer._loss_shifts_labels": "does it count first labels, unpredicted ones",
    "accelerate.accelerator:_original_forward": "accelerate's mixed precision runs inside forward",
    "accelerate:Accelerator._dataloaders": "which loaders it has prepared",
    "datasets:Dataset._format_type": "whether a transform makes its rows, asked for each batch",
    "datasets:Dataset._indices": "which rows select or shuffle left, in which order",
    "trl.trainer.utils:add_fused_lm_head._fused_forward": (
        "the forward that TRL gives a model, which computes log-probabilities"
    ),
}
