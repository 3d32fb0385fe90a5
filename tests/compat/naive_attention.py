"""Attention as flash-attn documents it, written out: scores, masks and probabilities of one dense batch.

Independent of tilestack's own reference. In float64 it is the oracle, in float16 or bfloat16 the competitor.
"""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random(*shape, dtype=torch.bfloat16, seed=0, scale=1.0):
    """The same numbers on every device; a leaf that wants a gradient."""
    numbers = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return numbers.to(DEVICE, dtype).requires_grad_()


def hidden(length_q, length_k, causal=False, window_size=(-1, -1), device=None):
    """[Sq, Sk]: True where a query must not see a key."""
    left, right = (int(each) for each in window_size)
    right = 0 if causal else right
    own = torch.arange(length_q, device=device)[:, None] + length_k - length_q
    key = torch.arange(length_k, device=device)
    found = torch.zeros(length_q, length_k, dtype=torch.bool, device=device)
    if left >= 0:
        found |= key < own - left
    if right >= 0:
        found |= key > own + right
    return found


def scores(q, k, *, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None):
    """[B, H, Sq, Sk], float32 or wider; -inf where a query must not see a key."""
    length_q, length_k, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k = k.repeat_interleave(group, 2)
    found = torch.einsum("bihd,bjhd->bhij", q * (softmax_scale or q.shape[-1] ** -0.5), k)
    if softcap > 0:
        found = softcap * torch.tanh(found / softcap)
    found = found.to(torch.promote_types(q.dtype, torch.float32))
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(found.device, found.dtype).expand(q.shape[0], -1)[..., None, None]
        own = torch.arange(length_q, device=q.device)[:, None] + length_k - length_q
        found = found - slopes * (own - torch.arange(length_k, device=q.device)).abs()
    return found.masked_fill(hidden(length_q, length_k, causal, window_size, q.device), -torch.inf)


def attention(q, k, v, *, keep=None, dropout_p=0.0, **options):
    """(out, lse). keep: [B, H, Sq, Sk], what dropout keeps."""
    weights = scores(q, k, **options)
    lse = weights.logsumexp(-1)
    probabilities = (weights - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    if keep is not None:
        probabilities = probabilities * keep / (1 - dropout_p)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
    out = torch.einsum("bhij,bjhd->bihd", probabilities.to(v.dtype), v)
    return out, lse.masked_fill(lse == -torch.inf, torch.inf)


def results(q, k, v, dout, **options):
    """out, lse, dq, dk, dv by name."""
    leaves = [each.detach().requires_grad_() for each in (q, k, v)]
    out, lse = attention(*leaves, **options)
    gradients = torch.autograd.grad(out, leaves, dout.to(out.dtype))
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *gradients), strict=True))


def oracle(q, k, v, dout, **options):
    """The same in float64 on the CPU."""
    wide = [each.detach().cpu().double() for each in (q, k, v, dout)]
    moved = {name: each.cpu() if torch.is_tensor(each) else each for name, each in options.items()}
    return results(*wide, **moved)
