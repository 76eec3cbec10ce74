"""The Hopper kernels of `pallas_kernels` behind the public functions: what fits them, and how arguments reach them."""

import re

import jax
import jax.numpy as jnp

from gsa_jax.ops.arguments import forget_at_document_starts
from pallas_kernels import linear_attention, rms_norm, sizes, slot_attention, slot_step


def slot_attention_misfit(q, k, v, log_decay, chunk_size):
    """Why these arguments can't go to the kernels, as a sentence that names the argument; None if they can."""
    return _call_misfit(chunk_size) or slot_attention.misfit(q, k, v, log_decay)


def slot_step_misfit(q, k, v, log_decay):
    """As `slot_attention_misfit`, of `gated_slot_attention_step`."""
    return _call_misfit(None) or slot_step.misfit(q, k, v, log_decay)


def linear_attention_misfit(q, k, v, chunk_size):
    """As `slot_attention_misfit`."""
    return _call_misfit(chunk_size) or linear_attention.misfit(q, k, v)


def rms_norm_misfit(x, mesh=None):
    """As `slot_attention_misfit`, of `rms_norm` for x [..., D]; with a mesh, of each of its devices alone."""
    return (_call_misfit(None) if mesh is None else _device_misfit(mesh)) or rms_norm.misfit(x)


def gated_slot_attention(q, k, v, log_decay, write, *, scale, initial_state, segment_ids):
    """As `gsa_jax.ops.gated_slot_attention`, with the arguments in their own dtypes: (out, (keys, values))."""
    if write is None and segment_ids is not None:
        write = -jnp.expm1(log_decay.astype(jnp.float32))  # of the gates as given, not of those that start a document
    write = write if write is None else write.astype(q.dtype)
    log_decay = forget_at_document_starts(log_decay, segment_ids)
    out, *state = slot_attention.gated_slot_attention(q, k, v, log_decay, write, *initial_state, scale=scale)
    return out, tuple(state)


def gated_linear_attention(q, k, v, log_decay, *, scale, initial_state, segment_ids):
    """As `gsa_jax.ops.gated_linear_attention`, with the arguments in their own dtypes: (out, state)."""
    log_decay = forget_at_document_starts(log_decay, segment_ids)
    return linear_attention.gated_linear_attention(q, k, v, log_decay, initial_state, scale=scale)


def spreads():
    """Whether XLA may have to spread what is called here over devices: the mesh in context has several and there is no
    `shard_map`, or there is no mesh and the process sees several."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() > 1 if mesh.empty else mesh.size > 1 and not _all_manual(mesh)


def _all_manual(mesh):
    return not mesh.empty and all(kind == jax.sharding.AxisType.Manual for kind in mesh.axis_types)


def _call_misfit(chunk_size):
    if chunk_size is not None:
        return f"chunk_size={chunk_size} can't be chosen, the kernels' chunks have 64 tokens"
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1 and not _all_manual(mesh):
        hint = "use gsa_jax.ops.sharded or jax.shard_map"
        return f"XLA can't spread a kernel over the devices of the mesh {dict(mesh.shape)}: {hint}"
    return _device_misfit(mesh)


def _device_misfit(mesh):
    device = (mesh.abstract_device or sizes.device()).device_kind
    if not re.search(r"\b(G?H[128]00|H20)\b", device):
        return f"the kernels need a Hopper GPU, such as an H100 or H200, and the device is {device!r}"
    return None
