"""The public operators: `delta_rule`, its relatives in place and with fla's signatures, and the checks of values."""

from dn_lib.kernels.rules import RECURRENT_MAX_LENGTH
from dn_lib.ops.autograd import for_triton, through_recurrent, through_triton
from dn_lib.ops.backend import (
    BACKENDS,
    choose_backend,
    resolve_backend,
    triton_problem,
)
from dn_lib.ops.checks import (
    check_arguments,
    check_copy,
    check_rank,
    check_scale_in_float32,
    check_tensor,
    check_values,
    checked,
    checking,
    is_plain,
    refuse_gradients,
    wants_gradient,
)
from dn_lib.ops.delta import autocast_dtype, decode_delta_rule, delta_rule
from dn_lib.ops.fla import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    chunk_gla,
    chunk_lightning_attn,
    chunk_retention,
    chunk_simple_gla,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
)
from dn_lib.ops.gated import gated_delta_rule, linear_attention, retention_gates
from dn_lib.ops.planning import OperatorPlan, plan

__all__ = [
    "BACKENDS",
    "RECURRENT_MAX_LENGTH",
    "OperatorPlan",
    "autocast_dtype",
    "check_arguments",
    "check_copy",
    "check_rank",
    "check_scale_in_float32",
    "check_tensor",
    "check_values",
    "checked",
    "checking",
    "choose_backend",
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_gla",
    "chunk_lightning_attn",
    "chunk_retention",
    "chunk_simple_gla",
    "decode_delta_rule",
    "delta_rule",
    "for_triton",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "gated_delta_rule",
    "is_plain",
    "linear_attention",
    "plan",
    "refuse_gradients",
    "resolve_backend",
    "retention_gates",
    "through_recurrent",
    "through_triton",
    "triton_problem",
    "wants_gradient",
]
