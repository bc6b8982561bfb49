"""Attention: one meaning, several kernels for one device, and three ways to share it among the devices of `context`.

Kernels (`KERNELS`), chosen by the platform that a program is compiled for unless one is named:

    xla      everywhere; queries in blocks, so that memory is linear in their number
    heads    the same, head by head: for CPUs, whose products are slow where they come in batches
    splash   the Pallas kernel for TPUs
    cudnn    cuDNN's flash attention on GPUs

Each device of `context` has a part of the tokens of every frame. Tokens attend to all others by

    Ulysses (arXiv:2309.14509)  an all-to-all gives each device all tokens of a part of the heads, and another one back
    ring (arXiv:2310.01889)     keys and values go round, and results over parts of the keys are combined
    both                        Ulysses within groups of devices, as large as heads divide; rings across the groups

Of N tokens of width D on P devices, a device receives 4 N/P D (P-1)/P by Ulysses (queries, keys, values, results) and
2 N/P D (P-1) by the ring (keys and values of all others): as much on two devices, and P/2 times as much on more. So
rings are only for heads that do not divide.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax import mesh as mesh_lib
from sora_jax.errors import InputError

(_CONTEXT,) = mesh_lib.RULES["tokens"]
_TOKENS, _TEXT = ("batch", "heads", None, "tokens", None), ("batch", "heads", None, None)
_ROWS = 8  # of the tiles that TPUs keep arrays in
_SCORES = 2**26  # how many attention scores the XLA kernel holds at a time
_BLOCK_Q, _BLOCK_K, _PRODUCT_K = 1024, 1024, 512  # of the splash kernel
_FEW = 2048  # queries; below this there is little to gain from the TPU's kernel
_MANY = 2**14  # scores of a head; below this there is little to gain from taking heads one by one


def heads_first(x_BFSD: jax.Array, heads: int) -> jax.Array:
    """Tokens of all heads to those of each: (B, F, S, K * E) -> (B, K, F, S, E), as the kernels take them."""
    B, F, S, D = x_BFSD.shape
    tiles = x_BFSD.reshape(B, F, *_in_tiles(S), heads, D // heads)
    return tiles.transpose(0, 4, 1, 2, 3, 5).reshape(B, heads, F, S, D // heads)


def heads_last(x_BKFSE: jax.Array) -> jax.Array:
    """The inverse of `heads_first`: (B, K, F, S, E) -> (B, F, S, K * E)."""
    B, K, F, S, E = x_BKFSE.shape
    tiles = x_BKFSE.reshape(B, K, F, *_in_tiles(S), E)
    return tiles.transpose(0, 2, 3, 4, 1, 5).reshape(B, F, S, K * E)


def _in_tiles(tokens: int) -> tuple[int, int]:
    """How many tiles, of how many tokens each: 1 if whole tiles do not share the tokens of a frame.

    Where whole tiles change places, one pass over the memory does it; otherwise the TPU's compiler makes two.
    """
    rows = 1 if tokens % (_ROWS * mesh_lib.shares("tokens")) else _ROWS
    return tokens // rows, rows


def self_attention(q_BKFSE, k_BKFSE, v_BKFSE, tokens: int | None = None, kernel: str = "auto") -> jax.Array:
    """Softmax attention of every token to every token of all frames; all (B, K, F, S, E), as is the result.

    Args:
      tokens: how many of the S tokens of a frame there are; the others only fill up, and are not attended to.
      kernel: "auto" or one of `KERNELS`.
    """
    _, K, _, S, _ = q_BKFSE.shape
    if K % (tensor := mesh_lib.shares("heads")):
        raise InputError(f"mesh tensor={tensor} cannot divide {K} heads")
    tokens = S if tokens is None else tokens
    share = partial(_share, devices=mesh_lib.shares("tokens"), tokens=None if tokens == S else tokens, kernel=kernel)
    return mesh_lib.per_device(share, (_TOKENS,) * 3, q_BKFSE, k_BKFSE, v_BKFSE)


def cross_attention(q_BKFSE, k_BKLE, v_BKLE, kernel: str = "auto") -> jax.Array:
    """Softmax attention of every token to the same L keys, which every device has."""

    def share(q, k, v):
        B, K, F, S, E = q.shape
        return attend(q.reshape(B, K, F * S, E), k, v, kernel=kernel).reshape(q.shape)

    return mesh_lib.per_device(share, (_TOKENS, _TEXT, _TEXT), q_BKFSE, k_BKLE, v_BKLE)


def _share(q, k, v, *, devices: int, tokens: int | None, kernel: str):
    """Self-attention of one device's part of the tokens, with collectives over `context`."""
    B, K, F, S, E = q.shape
    group = math.gcd(K, devices)  # Ulysses within groups of neighbours
    rounds = devices // group
    if group > 1:
        groups = None if rounds == 1 else np.arange(devices).reshape(rounds, group).tolist()
        whole = partial(jax.lax.all_to_all, axis_name=_CONTEXT, axis_index_groups=groups, tiled=True)
        q, k, v = (whole(x, split_axis=1, concat_axis=3) for x in (q, k, v))
    flat = [x.reshape(B, K // group, F * S * group, E) for x in (q, k, v)]
    if rounds == 1:
        out = attend(*flat, _valid(range(group), F, S, tokens), kernel)
    else:
        out = _ring(*flat, rounds, group, partial(_valid, frames=F, part=S, tokens=tokens), kernel)
    out = out.reshape(B, K // group, F, S * group, E)
    return whole(out, split_axis=3, concat_axis=1) if group > 1 else out


def _valid(devices, frames: int, part: int, tokens: int | None):
    """Which keys of the parts that these devices hold are tokens: bool (L,), or None if all are."""
    if tokens is None:
        return None
    number = jnp.asarray(devices)[:, None] * part + jnp.arange(part)
    return jnp.tile((number < tokens).reshape(-1), frames)


def _ring(q, k, v, rounds: int, group: int, valid, kernel: str):
    """Attention to the keys of every group in turn, each result weighted by its share of the sum of exponentials."""
    devices = rounds * group
    onward = [(i, (i + group) % devices) for i in range(devices)]
    here = jax.lax.axis_index(_CONTEXT) // group

    @jax.checkpoint
    def look(k, v, number):
        part = ((here - number) % rounds) * group + jnp.arange(group)
        return attend(q, k, v, valid(part), kernel, with_log_sum=True)

    def step(carry, number):
        k, v, out, log_sum = carry
        k, v = (jax.lax.ppermute(x, _CONTEXT, onward) for x in (k, v))
        return (k, v, *_combine(out, log_sum, *look(k, v, number))), None

    out, log_sum = look(k, v, 0)
    carry = (k, v, out.astype(jnp.float32), log_sum)
    (_, _, out, _), _ = jax.lax.scan(step, carry, jnp.arange(1, rounds))
    return out.astype(q.dtype)


def _combine(out, log_sum, more, more_log_sum):
    total = jnp.logaddexp(log_sum, more_log_sum)
    old, new = (jnp.exp(part - total)[..., None] for part in (log_sum, more_log_sum))
    return out * old + more.astype(jnp.float32) * new, total


# Kernels: (q_BKNE, k_BKLE, v_BKLE, valid_L, with_log_sum) -> out_BKNE, and if asked for log_sum_BKN float32, the
# logarithm of the sum of the exponentials of the scores.


def attend(q_BKNE, k_BKLE, v_BKLE, valid_L=None, kernel: str = "auto", with_log_sum: bool = False):
    """Softmax attention on one device, by the kernel of that name; `valid_L` are the keys that count."""
    check_kernel(kernel)
    arrays = (q_BKNE, k_BKLE, v_BKLE) + (() if valid_L is None else (valid_L,))

    def run(name, *arrays):
        q, k, v, *valid = arrays
        return KERNELS[name](q, k, v, valid[0] if valid else None, with_log_sum)

    if kernel != "auto":
        return run(kernel, *arrays)
    (N, E), L = q_BKNE.shape[2:], k_BKLE.shape[2]
    choice = {}
    if N * L >= _MANY:
        choice["cpu"] = partial(run, "heads")
    if N >= _FEW and E in (128, 256):
        choice["tpu"] = partial(run, "splash")
    # JAX asks for the installed cuDNN while tracing, so that this one cannot be lowered for elsewhere. Its sums come
    # in the precision of the result and without a gradient.
    fits = q_BKNE.dtype != jnp.float32 and E % 8 == 0 and E <= 128 and valid_L is None and not with_log_sum
    if jax.default_backend() == "gpu" and fits and _has_flash_attention(jax.local_devices()[0]):
        choice["cuda"] = partial(run, "cudnn")
    if not choice:
        return run("xla", *arrays)
    return jax.lax.platform_dependent(*arrays, default=partial(run, "xla"), **choice)


def check_kernel(name: str, platform: str | None = None) -> None:
    """Raises InputError if there is no kernel of that name, or not on a platform of JAX."""
    if name not in (*KERNELS, "auto"):
        raise InputError(f"attention kernel {name!r} does not exist; there are auto, {', '.join(KERNELS)}")
    only = {"splash": "tpu", "cudnn": "gpu"}.get(name, platform)
    if platform and only != platform:
        raise InputError(f"attention kernel {name!r} is for a {only.upper()}; here is a {platform.upper()}")


def _has_flash_attention(device) -> bool:
    """Whether cuDNN's kernel runs on a GPU: from NVIDIA's Ampere on, not on the T4 and V100 before it."""
    try:
        return float(device.compute_capability) >= 8
    except (AttributeError, ValueError):  # AMD's are numbered in another way
        return False


def _xla(q, k, v, valid_L, with_log_sum):
    (B, K), L = q.shape[:2], k.shape[2]
    head = partial(_head, valid_L=valid_L, block=max(_SCORES // (B * K * L), 128))
    out = jax.vmap(jax.vmap(head))(q, k, v)
    return out if with_log_sum else out[0]


def _heads(q, k, v, valid_L, with_log_sum):
    L = k.shape[2]
    # Keeping the scores for the way back costs more than computing them again.
    head = jax.checkpoint(partial(_head, valid_L=valid_L, block=max(_SCORES // L, 128)))
    rows = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    out = jax.lax.map(lambda row: head(*row), rows)
    out = jax.tree.map(lambda x: x.reshape(*q.shape[:2], *x.shape[1:]), out)
    return out if with_log_sum else out[0]


def _head(q_NE, k_LE, v_LE, valid_L, block: int):
    """Attention of one head: out_NE and log_sum_N. From two blocks of queries on, it is done block by block."""

    def one(q_NE):
        scores_NL = jnp.einsum("ne,le->nl", q_NE, k_LE, preferred_element_type=jnp.float32) * q_NE.shape[1] ** -0.5
        if valid_L is not None:
            scores_NL = jnp.where(valid_L, scores_NL, -1e30)
        most_N = jax.lax.stop_gradient(scores_NL.max(1))
        weights_NL = jnp.exp(scores_NL - most_N[:, None])
        sum_N = weights_NL.sum(1)
        out_NE = jnp.einsum("nl,le->ne", weights_NL.astype(v_LE.dtype), v_LE, preferred_element_type=jnp.float32)
        return (out_NE / sum_N[:, None]).astype(v_LE.dtype), most_N + jnp.log(sum_N)

    N, E = q_NE.shape
    if N <= 2 * block:
        return one(q_NE)
    blocks = -(-N // block)
    block = -(-N // blocks)
    q_NE = jnp.pad(q_NE, ((0, blocks * block - N), (0, 0)))
    # Scores are computed again on the way back: keeping them is what the blocks avoid.
    out = jax.lax.map(jax.checkpoint(one), q_NE.reshape(blocks, block, E))
    return jax.tree.map(lambda x: x.reshape(blocks * block, *x.shape[2:])[:N], out)


def _cudnn(q, k, v, valid_L, with_log_sum):
    if valid_L is not None or with_log_sum:
        raise InputError("the cudnn kernel serves no ring, and needs tokens that the mesh divides")
    if q.dtype == jnp.float32:
        raise InputError("the cudnn kernel takes no float32: compute in bfloat16, or with another kernel")
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn").swapaxes(1, 2)


def _splash(q, k, v, valid_L, with_log_sum, interpret: bool = False):
    if not with_log_sum:
        return _splash_forward(q, k, v, valid_L, False, interpret)

    # The kernel has no gradient where it gives the sums too.
    @jax.custom_vjp
    def run(q, k, v, valid_L):
        return _splash_forward(q, k, v, valid_L, True, interpret)

    def forward(q, k, v, valid_L):
        return run(q, k, v, valid_L), (q, k, v, valid_L)

    def backward(arrays, cotangents):
        *arrays, valid_L = arrays
        return *jax.vjp(lambda q, k, v: _xla(q, k, v, valid_L, True), *arrays)[1](cotangents), None

    run.defvjp(forward, backward)
    return run(q, k, v, valid_L)


def _splash_forward(q, k, v, valid_L, with_log_sum, interpret):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (K, N, E), L = q.shape[1:], k.shape[2]
    block_q = min(_BLOCK_Q, -(-N // 128) * 128)
    # More keys than one product takes must be a multiple of those.
    block_k = -(-L // 128) * 128 if L <= _PRODUCT_K else min(_BLOCK_K, -(-L // _PRODUCT_K) * _PRODUCT_K)
    fill_q, fill_k = -N % block_q, -L % block_k
    segments = None
    if valid_L is not None or fill_k:
        valid_L = jnp.ones(L, bool) if valid_L is None else valid_L
        kv = jnp.pad(~valid_L, (0, fill_k), constant_values=True).astype(jnp.int32)
        segments = splash.SegmentIds(q=jnp.zeros(N + fill_q, jnp.int32), kv=kv)
    run = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.FullMask((N + fill_q, L + fill_k)) for _ in range(K)]),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_k,
            block_kv_compute=min(block_k, _PRODUCT_K),
            block_q_dkv=block_q,
            block_kv_dkv=block_k,
            block_kv_dkv_compute=min(block_k, _PRODUCT_K),
            use_fused_bwd_kernel=True,
        ),
        save_residuals=with_log_sum,
        interpret=interpret,
    )

    def padded(x_BKNE, fill):
        return jnp.pad(x_BKNE, ((0, 0), (0, 0), (0, fill), (0, 0)))

    q = padded((q * E**-0.5).astype(q.dtype), fill_q)  # the kernel takes scores as they are
    out = jax.vmap(run, (0, 0, 0, None))(q, padded(k, fill_k), padded(v, fill_k), segments)
    if with_log_sum:
        return out[0][:, :, :N], out[1][0][:, :, :N]
    return out[:, :, :N]


KERNELS = {"xla": _xla, "heads": _heads, "splash": _splash, "cudnn": _cudnn}
