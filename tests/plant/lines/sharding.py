"""Frozen weights in parts, and what other libraries wrap: line 24."""

from tests.plant.data import Fault, Line

_SHARDED = "tests/privacy/ranks/test_fsdp.py"
_WRITTEN = f"{_SHARDED}::test_a_frozen_weight_must_not_change"
_REFUSES = f"{_SHARDED}::test_refuses"
_WRAPPED = "tests/privacy/ranks/test_wrappers.py"

LINES = (
    Line(
        24,
        "A sharded base computes what a whole one does and stays frozen; nothing averages gradients that are not clipped",
        tests={
            f"{_SHARDED}::test_takes_the_steps_of_whole_replicas": "processes with parts of the base take the steps of those with all of it",
            f"{_SHARDED}::test_in_every_setting": "and so with every strategy, checkpointing, empty ranks, and memory that runs out on one",
            f"{_SHARDED}::test_models_of_many_kinds": "and so for other layers, shared and raw parameters, and a user's own fully_shard",
            f"{_SHARDED}::test_no_rank_has_to_call_the_model_as_often_as_the_others": "each rank gathers the weights that it asked for, whatever the others do",
            _WRITTEN: "a frozen weight that is written or replaced, whole or in part, is found by name",
            f"{_SHARDED}::test_a_gathered_weight_ends_with_its_micro_batch": "what changes a gathered weight alone leaves no trace",
            f"{_SHARDED}::test_a_write_to_a_gathered_weight_reaches_no_other_example": "and reaches no other micro-batch, even if fully_shard keeps weights gathered",
            _REFUSES: "sharded trained parameters, tensor parallelism, other processes' parts and other weights are refused",
            f"{_WRAPPED}::test_refuses_a_wrapped_model": "a model in DistributedDataParallel is refused",
            f"{_WRAPPED}::test_refuses_forwards_through_the_wrapper": "so is a forward through it",
            f"{_WRAPPED}::test_refuses_a_distributed_sampler": "a sampler that deals out the data set is refused",
            f"{_WRAPPED}::test_refuses_what_accelerate_prepared": "what Accelerate prepared is refused",
            f"{_WRAPPED}::test_refuses_accelerates_scaled_losses": "so are scaled losses",
        },
        faults=(
            Fault(
                "bits of gathered weights that are not compared",
                "dpkernels/privacy/guards/gathered.py",
                "            if not same:\n",
                "            if not same and bits is None:\n",
                f"{_WRITTEN}[written past autograd]",
            ),
            Fault(
                "versions of gathered weights that are not compared after a backward",
                "dpkernels/privacy/guards/gathered.py",
                "if version_of(tensor) != then]",
                "if version_of(tensor) < then]",
                f"{_WRITTEN}[written in the backward]",
            ),
            Fault(
                "parts of weights that are not read",
                "dpkernels/privacy/guards/parameters.py",
                "    parameter = local_part(parameter)\n",
                "",
                f"{_WRITTEN}[its part written past autograd]",
            ),
            Fault(
                "gathered weights that outlive their micro-batch",
                "dpkernels/privacy/guards/model.py",
                "        self._gathered.check()\n        self._gathered.drop()\n        self._parameter_watch.check()\n",
                "        self._gathered.check()\n        self._parameter_watch.check()\n",
                f"{_SHARDED}::test_a_write_to_a_gathered_weight_reaches_no_other_example",
            ),
            Fault(
                "trained parameters that may be sharded",
                "dpkernels/privacy/ranks/sharded.py",
                "    if trained:\n",
                "    if len(trained) > 1000:\n",
                f"{_REFUSES}[trained-ValueError-ignored_params]",
            ),
            Fault(
                "parts of other weights",
                "dpkernels/privacy/ranks/sharded.py",
                '    bits = "without values" if tensor.is_meta else f"bits {bits_of(tensor)}"\n',
                '    bits = "unknown"\n',
                f"{_REFUSES}[other weights-RanksError-model's .*bits.*rank 0.*bits.*rank 1]",
            ),
            Fault(
                "forwards through DistributedDataParallel",
                "dpkernels/privacy/guards/model.py",
                "        check_forward()\n",
                "",
                f"{_WRAPPED}::test_refuses_forwards_through_the_wrapper",
            ),
            Fault(
                "a sampler for several processes",
                "dpkernels/privacy/sampling/given_loader.py",
                "    if isinstance(data_loader.sampler, DistributedSampler):\n        raise ValueError(\n",
                "    if isinstance(data_loader.sampler, DistributedSampler) and data_loader.drop_last:\n        raise ValueError(\n",
                f"{_WRAPPED}::test_refuses_a_distributed_sampler",
            ),
        ),
    ),
)
